"""Runs that are killed, stopped and resumed, on one and two ranks, without torchrun."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from campaign import flip_a_bit, generator, trials
from safetensors.torch import load_file
from training_runs import consumed

from scenarioclip_fast.cli.train import STOPPED
from scenarioclip_fast.train.checkpoint import BadCheckpoint, Checkpoints, examine, verify
from scenarioclip_fast.train.config import TrainConfig
from scenarioclip_fast.train.metrics import TIMINGS, read_metrics

Make = Callable[..., TrainConfig]
KILLS = trials(6, 50)
DAMAGED = trials(2, 20)  # of the resumes after a kill, those that find the newest checkpoint damaged


def rows(config: TrainConfig) -> list[dict[str, Any]]:
    found = read_metrics(Path(config.run.dir) / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in found]


def assert_same_run(a: TrainConfig, b: TrainConfig) -> None:
    """Compare every number of every step, and the weights, bit for bit."""
    assert rows(a) == rows(b)
    for file in ("model.safetensors", "teacher.safetensors"):
        weights_a, weights_b = (load_file(Path(config.run.dir) / "model" / file) for config in (a, b))
        assert weights_a.keys() == weights_b.keys()
        assert all(torch.equal(weights_a[name], weights_b[name]) for name in weights_a)


def wait_until(condition: Callable[[], bool], running: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, running.text()
        time.sleep(0.005)


def leftovers(run: Path) -> list[Path]:
    return [path for path in run.rglob(".*") if path.name.startswith((".writing", ".removing"))]


def intact(checkpoints: Checkpoints) -> list[int]:
    """The steps of the checkpoints that can be resumed, newest first."""
    steps = []
    for path in checkpoints.paths():
        with suppress(BadCheckpoint):
            verify(examine(path), None)
            steps.append(examine(path).meta["step"])
    return steps


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_killed_after_20_steps_resumes_exactly(small: Make, fork_server: Any, ranks: int) -> None:
    full, resumed = (small("train.steps=40", "train.checkpoint_every=20", run=name) for name in ("full", "resumed"))
    fork_server.start(full, ranks=ranks).finish()
    checkpoint = Path(resumed.run.dir) / "checkpoints" / "step-00000020"
    running = fork_server.start(resumed, ranks=ranks)
    wait_until(checkpoint.exists, running)
    running.send(signal.SIGKILL)
    assert running.wait() == [-signal.SIGKILL] * ranks
    assert "at step 20" in fork_server.start(resumed, "--resume", "auto", ranks=ranks).finish()
    assert_same_run(resumed, full)


def test_the_order_of_scenes_survives_a_change_from_two_ranks_to_one(
    small: Make, fork_server: Any, tmp_path: Path
) -> None:
    full, resumed = (small("train.steps=20", "train.checkpoint_every=10", run=name) for name in ("full", "resumed"))
    fork_server.start(full, keys=tmp_path / "full.keys").finish()
    running = fork_server.start(resumed, ranks=2, keys=tmp_path / "resumed.keys")
    wait_until((Path(resumed.run.dir) / "checkpoints" / "step-00000010").exists, running)
    running.send(signal.SIGTERM, rank=1)
    out = running.finish(STOPPED)
    assert out.count("stopped by SIGTERM after step") == 1
    fork_server.start(resumed, "--resume", keys=tmp_path / "resumed.keys").finish()
    assert consumed(tmp_path / "resumed.keys") == consumed(tmp_path / "full.keys")
    assert [row["step"] for row in rows(resumed)] == list(range(1, 21))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_other_with_one_error_line(small: Make, fork_server: Any, victim: int) -> None:
    config = small("train.steps=100000", "run.timeout_s=8")
    running = fork_server.start(config, ranks=2)
    wait_until(lambda: (Path(config.run.dir) / "metrics.jsonl").exists() and len(rows(config)) > 0, running)
    running.send(signal.SIGKILL, rank=victim)
    codes = running.wait(seconds=40)  # RankWatchdog takes at most 8 + 10 s; the collective may fail earlier
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 1
    out = running.text()
    errors = [line for line in out.splitlines() if line.startswith("error")]  # torch's C++ code logs other lines
    assert len(errors) == 1, out
    assert re.match(rf"error: rank {1 - victim} cannot continue: rank {victim}\b.* is gone", errors[0]), out
    assert "Traceback" not in out


def test_a_hung_rank_ends_the_other_in_bounded_time(small: Make, fork_server: Any) -> None:
    config = small("train.steps=100000", "run.timeout_s=5")
    running = fork_server.start(config, ranks=2)
    wait_until(lambda: (Path(config.run.dir) / "metrics.jsonl").exists() and len(rows(config)) > 0, running)
    running.send(signal.SIGSTOP, rank=1)
    try:
        assert fork_server.request({"wait": running.pids[0], "seconds": 60}) == 1
    finally:
        running.send(signal.SIGKILL, rank=1)
    assert re.search(r"error: rank 0 cannot continue: rank 1\b.*(is gone|no heartbeat)", running.text())
    assert running.wait()[1] == -signal.SIGKILL


def test_a_failed_rank_reports_the_reason_to_the_others(small: Make, fork_server: Any) -> None:
    config = small("train.steps=5", "run.timeout_s=8")
    running = fork_server.start(config, ranks=2, last_rank=["data.shards=absent"])
    assert running.wait() == [1, 2]
    lines = sorted(line for line in running.text().splitlines() if line.startswith("error"))
    assert len(lines) == 2 and lines[0].startswith("error: absent")
    assert lines[1].startswith("error: rank 0 cannot continue: rank 1 ended with UserError: absent"), lines


def test_random_kills_lose_nothing_beyond_the_last_intact_checkpoint(small: Make, fork_server: Any) -> None:
    rng = generator("kills")
    budget = ("train.steps=36", "train.checkpoint_every=3", "train.log_every=2", "run.timeout_s=10")
    reference = {}
    for ranks in (1, 2):
        reference[ranks] = small(*budget, run=f"full-{ranks}")
        fork_server.start(reference[ranks], ranks=ranks).finish()
    killed, damaged, runs = 0, 0, 0
    while killed < KILLS:
        runs += 1
        ranks = 1 + runs % 2
        config = small(*budget, run=f"run-{runs}")
        checkpoints = Checkpoints(Path(config.run.dir) / "checkpoints", keep=2)
        codes: list[int | None] = []
        while codes != [0] * ranks:
            before = intact(checkpoints)
            if len(before) > 1 and damaged < DAMAGED:
                newest = checkpoints.directory / f"step-{before[0]:08d}"
                flip_a_bit(rng.choice(sorted(newest.iterdir())), rng)
                damaged += len(before) > len(intact(checkpoints))  # not by a flip in white space
                before = intact(checkpoints)
            running = fork_server.start(config, "--resume", "auto", ranks=ranks)
            if killed < KILLS:
                number = rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1])
                during_start = rng.random() < 0.2
                if not during_start:
                    wait_until(lambda running=running: "parameters train" in running.text(), running)
                time.sleep(rng.random())
                running.send(number, rank=rng.choice([None, *range(ranks)]))
                killed += 1
            codes = running.wait()
            out = running.text()
            assert None not in codes and "Traceback" not in out, out
            if resumed := re.search(r"resumed from \S+ at step (\d+)", out):
                assert int(resumed[1]) == before[0], out
            assert bool(before) == bool(resumed) or "parameters train" not in out
            if STOPPED in codes:
                stopped = re.search(r"stopped by (SIGTERM|SIGUSR1) after step (\d+)", out)
                assert codes == [STOPPED] * ranks and stopped, out
                assert examine(checkpoints.paths()[0]).meta["step"] == int(stopped[2])
                assert leftovers(Path(config.run.dir)) == []
        assert leftovers(Path(config.run.dir)) == []
        assert_same_run(config, reference[ranks])
    assert damaged == DAMAGED
