"""torchrun with two agents on this machine, as on two nodes: restarts, and nodes that leave and join."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_runs import consumed

from scenarioclip_fast.cli.train import STOPPED
from scenarioclip_fast.train.config import TrainConfig
from scenarioclip_fast.train.metrics import TIMINGS, read_metrics

Make = Callable[..., TrainConfig]
PROGRAM = Path(__file__).parents[1] / "support" / "instruments.py"
WAIT_S = 120  # each start imports torch in four processes, which share the cores with other tests
# 4 of 20 scenes a step: 5 steps an epoch, and checkpoints within epochs. A checkpoint is on disk when the next begins:
# a restart repeats at most 14 steps.
RUN = ("data.batch_size=4", "train.checkpoint_every=7", "train.log_every=1", "run.timeout_s=16")


@dataclass
class Nodes:
    """torchrun's agents, one for each node, with one rank each."""

    config: TrainConfig
    options: list[str]
    port: int
    env: dict[str, str]
    agents: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def keys(self) -> Path:
        return Path(self.config.run.dir).with_suffix(".keys")

    def add(self) -> int:
        """Start another node; the first one hosts the rendezvous."""
        node = len(self.agents)
        config = Path(self.config.run.dir).with_suffix(".yaml")
        self.config.save(config)
        is_host = f"is_host={int(node == 0)},keep_alive_interval=1,last_call_timeout=2"
        launcher = ["--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{self.port}"]
        launcher += ["--rdzv-id", "test", "--rdzv-conf", is_host, "--local-addr", "127.0.0.1", *self.options]
        command = [sys.executable, "-m", "torch.distributed.run", *launcher, str(PROGRAM)]
        with open(self.log(node), "wb") as log:
            self.agents.append(
                subprocess.Popen(
                    [*command, "train", "-c", str(config), "--resume"],
                    env={**os.environ, **self.env, "OMP_NUM_THREADS": "1", "KEYS": str(self.keys)},
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )
        return node

    def log(self, node: int) -> Path:
        return Path(self.config.run.dir).with_suffix(f".node-{node}.log")

    def text(self) -> str:
        return "".join(self.log(node).read_text() for node in range(len(self.agents)))

    def wait_until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < end, self.text()
            time.sleep(0.005)

    def wait_for_checkpoint(self, step: int) -> None:
        """Wait for a checkpoint of this step or a later one."""
        self.wait_until(lambda: max(checkpoints(self.config), default=0) >= step)

    def worker(self, rank: int) -> int:
        """The process id of a rank."""
        return int(Path(f"{self.keys}.{rank}").read_text())

    def kill_node(self, node: int) -> None:
        """End the agent and its rank at once, as when a machine fails."""
        pid = self.agents[node].pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for process in (pid, *map(int, children)):
            os.kill(process, signal.SIGKILL)

    def finish(self, *nodes: int) -> str:
        """Wait until these nodes, by default all, have succeeded; return the output of all."""
        for node in nodes or range(len(self.agents)):
            assert self.agents[node].wait(WAIT_S) == 0, self.text()
        return self.text()

    def close(self) -> None:
        for agent in self.agents:
            if agent.poll() is None:
                agent.terminate()  # which ends its rank
        for node, agent in enumerate(self.agents):
            try:
                agent.wait(40)  # it waits for its rank, for 30 s
            except subprocess.TimeoutExpired:
                self.kill_node(node)


@pytest.fixture
def nodes() -> Iterator[Callable[..., Nodes]]:
    """nodes(config, *options): two running agents."""
    started: list[Nodes] = []

    def start(config: TrainConfig, *options: str, **env: str) -> Nodes:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        started.append(Nodes(config, [*options], port, env))
        for _ in range(2):
            started[-1].add()
        return started[-1]

    yield start
    for each in started:
        each.close()


def rows(config: TrainConfig) -> list[dict[str, Any]]:
    found = read_metrics(Path(config.run.dir) / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in found]


def checkpoints(config: TrainConfig) -> list[int]:
    found = (Path(config.run.dir) / "checkpoints").glob("step-*")
    return sorted(int(path.name.removeprefix("step-")) for path in found)


def resumed_at(text: str) -> list[int]:
    return [int(step) for step in re.findall(r"resumed from \S+ at step (\d+)", text)]


def assert_same_scenes(keys: Path, expected: Path, repeated: Container[int] = ()) -> None:
    """Assert that each step consumed the expected scenes once, or twice if it may have been repeated."""
    found, reference = consumed(keys), consumed(expected)
    for step, scenes in found.items():
        assert set(scenes) == set(reference[step]), step
        times = Counter(scenes) - Counter(reference[step])
        assert not times or (step in repeated and set(times.values()) == {1}), step
    assert list(found) == list(range(1, len(found) + 1))


# Rank 0 holds the lock of run.dir and, unless torchrun does, hosts the store of the ranks.
@pytest.mark.parametrize(("victim", "own_store"), [(1, "0"), (0, "1")])
def test_a_killed_rank_is_restarted_with_its_group(
    small: Make, fork_server: Any, nodes: Any, victim: int, own_store: str
) -> None:
    full, restarted = (small(*RUN, "train.steps=42", run=name) for name in ("full", "restarted"))
    keys = Path(full.run.dir).with_suffix(".keys")
    fork_server.start(full, ranks=2, keys=keys).finish()
    env = {"PAUSE_S": "0.05", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": own_store}
    running = nodes(restarted, "--nnodes", "2", "--max-restarts", "3", **env)
    running.wait_for_checkpoint(7)
    os.kill(running.worker(victim), signal.SIGKILL)
    text = running.finish()
    (step,) = resumed_at(text)
    assert 7 <= step < 42 and step % 7 == 0
    # Bit for bit, on a CPU: a sum over two ranks does not depend on its order.
    assert rows(restarted) == rows(full)
    for file in ("model.safetensors", "teacher.safetensors"):
        weights, expected = (load_file(Path(c.run.dir) / "model" / file) for c in (restarted, full))
        assert all(torch.equal(weights[name], w) for name, w in expected.items())
    assert_same_scenes(running.keys, keys, repeated=range(step + 1, step + 15))
    scenes = consumed(keys)
    for epoch in range(0, 40, 5):
        assert len({key for i in range(epoch + 1, epoch + 6) for key in scenes[i]}) == 20


def test_nodes_leave_and_join_and_are_preempted(small: Make, fork_server: Any, nodes: Any) -> None:
    # Longer than the test, with the same learning rate in all steps.
    budget = (*RUN, "train.steps=100000", "optim.warmup=0", "optim.lr=1e-4")
    full, elastic = (small(*budget, run=name) for name in ("full", "elastic"))
    env = {"PAUSE_S": "0.2", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # see docs/multi-node.md
    running = nodes(elastic, "--nnodes", "1:2", "--max-restarts", "3", **env)
    running.wait_for_checkpoint(7)
    running.kill_node(1)
    running.wait_until(lambda: len(resumed_at(running.text())) == 1)
    alone = resumed_at(running.text())[0]
    running.wait_for_checkpoint(alone + 7)
    running.add()
    running.wait_until(lambda: len(resumed_at(running.text())) == 2)
    together = resumed_at(running.text())[1]
    running.wait_for_checkpoint(together + 7)
    for node in (0, 2):
        running.agents[node].send_signal(signal.SIGTERM)
    assert [running.agents[node].wait(WAIT_S) for node in (0, 2)] == [1, 1]  # torchrun's code, whatever the ranks'
    text = running.text()
    stopped = [int(step) for step in re.findall(r"stopped by SIGTERM after step (\d+)", text)]
    # The arrival of a node stops the ranks, which save: no step is repeated then, nor after the preemption.
    assert stopped == [together, checkpoints(elastic)[-1]], text
    assert re.findall(r" on cpu(.*); 100000 steps", text) == [" x 2 ranks", "", " x 2 ranks"]

    keys = Path(full.run.dir).with_suffix(".keys")
    reference = fork_server.start(full, ranks=2, keys=keys)
    running.wait_until(lambda: (Path(full.run.dir) / "metrics.jsonl").exists() and len(rows(full)) >= stopped[-1])
    reference.send(signal.SIGTERM)
    reference.finish(STOPPED)
    assert_same_scenes(running.keys, keys, repeated=range(alone + 1, alone + 15))
    found, expected = rows(elastic), rows(full)[: stopped[-1]]
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    # While there is one rank, float32 sums have another order; steps amplify the difference.
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=1e-5)
