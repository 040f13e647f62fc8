"""Fixtures for tests that start training runs, imported by the conftest.py of their folders."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from scenarioclip_fast.data import generate_scenes, pack
from scenarioclip_fast.train.config import TrainConfig

# One block of width 32 on 32-pixel views; the token embeddings, most of the weights, are frozen and shared.
SMALL = [
    "model.preset=tiny",
    "model.embed_dim=32",
    "model.vision.image_size=32",
    "model.vision.width=32",
    "model.vision.layers=1",
    "model.text.width=32",
    "model.text.layers=1",
    "model.freeze.embeddings=true",
    "loss.teacher_decay=0.9",
    "loss.teacher_warmup=5",
    "optim.lr=1e-3",
    "data.batch_size=8",
    "data.threads=1",
    "data.decoder=torch",
    "run.device=cpu",
    "train.log_every=3",
    "train.checkpoint_every=1000",
    "train.tensorboard=false",
]


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 synthetic scenes of the train split, packed."""
    directory = tmp_path_factory.mktemp("shards")
    pack(generate_scenes(20, seed=0, val=0.0, test=0.0), directory)
    return directory


@pytest.fixture
def small(shards: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """small("key=value", ..., run="name"): the config of a small run in tmp_path/name."""

    def make(*overrides: str, run: str = "run") -> TrainConfig:
        return TrainConfig.of({}, [*SMALL, f"data.shards={shards}", f"run.dir={tmp_path / run}", *overrides])

    return make


def consumed(keys: Path) -> dict[int, list[str]]:
    """The scenes of each step, over all ranks, as logged to the file `keys`; repeated if the step was repeated."""
    steps: dict[int, list[str]] = defaultdict(list)
    for line in keys.read_text().splitlines():
        step, scenes = json.loads(line)
        steps[step] += scenes
    return {step: sorted(scenes) for step, scenes in steps.items()}


@dataclass
class Running:
    """A running training, with one process per rank."""

    server: ForkServer
    pids: list[int]
    log: Path

    def send(self, number: signal.Signals, rank: int | None = None) -> None:
        """Send a signal to one rank, or to all."""
        for pid in self.pids if rank is None else [self.pids[rank]]:
            os.kill(pid, number)

    def wait(self, seconds: float = 120) -> list[int | None]:
        """Return each rank's exit code: negative if ended by a signal, None if still running after `seconds`."""
        return [self.server.request({"wait": pid, "seconds": seconds}) for pid in self.pids]

    def finish(self, code: int = 0) -> str:
        """Wait for all ranks to exit with `code`; return their output."""
        codes = self.wait()
        assert codes == [code] * len(self.pids), (codes, self.text())
        return self.text()

    def text(self) -> str:
        return self.log.read_text()


class ForkServer:
    """Start `scenarioclip-fast train` on one or several ranks without torchrun: see fork_server.py."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def request(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self,
        config: TrainConfig,
        *options: str,
        ranks: int = 1,
        last_rank: Sequence[str] = (),
        poisoned: Sequence[int] = (),
        file_limit: int | None = None,
        keys: Path | None = None,
        compile_backend: str | None = None,
        restored: Path | None = None,
        env: Mapping[str, str] | None = None,
        last_env: Mapping[str, str] | None = None,
        directory: Path | None = None,
        last_directory: Path | None = None,
        command: Sequence[str] = ("train", "-c", "{config}"),
        output: Path | None = None,
    ) -> Running:
        """Start a run.

        Args:
            last_rank, poisoned, file_limit: for the last rank only: extra options, steps (from 1) whose pixels are NaN,
                and the file size in bytes beyond which writing fails.
            env, directory: extra variables and the working directory of all ranks.
            last_env, last_directory: those of the last rank, in place of `directory` and after `env`.
            command: what each rank runs; "{config}" stands for the file of the config.
            output: the path, without a suffix, of the files of the config and of the output; None: run.dir.
            keys: a file to which each step and rank appends its scenes.
            compile_backend: a Dynamo backend to use instead of Inductor, which takes minutes.
            restored: a file to which rank 0 saves the tensors of the run, as loaded from a checkpoint.
        """
        run = output or Path(config.run.dir)
        run.parent.mkdir(parents=True, exist_ok=True)
        path, log = run.with_suffix(".yaml"), run.with_suffix(".log")
        config.save(path)
        log.write_text("")
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        pids = []
        for rank in range(ranks):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
            environment = {"MASTER_ADDR": "127.0.0.1", **{k: str(v) for k, v in variables.items()}} if ranks > 1 else {}
            last = rank == ranks - 1
            request = {
                "args": [
                    *(str(path) if x == "{config}" else x for x in command),
                    *options,
                    *(last_rank if last else ()),
                ],
                "env": {**environment, **(env or {}), **((last_env or {}) if last else {})},
                "directory": str((last_directory if last else None) or directory or "."),
                "log": str(log),
                "keys": None if keys is None else str(keys),
                "poisoned": list(poisoned) if last else [],
                "file_limit": file_limit if last else None,
                "compile_backend": compile_backend,
                "restored": None if restored is None else str(restored),
            }
            pids.append(self.request(request))
        return Running(self, pids, log)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """Starts runs quickly, in separate processes."""
    server = ForkServer()
    yield server
    server.close()
