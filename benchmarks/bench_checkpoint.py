"""Checkpoints with checksums against torch.distributed.checkpoint without: saving, verifying and loading 1 GiB.

Both save from the same tensors in host memory, in a thread, and sync the files to disk. `blocked` is the time for which
the training thread waits, until its tensors are copied. The files are in the page cache.

Run: make bench, or: pytest benchmarks/bench_checkpoint.py
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scenarioclip_fast.benchmarks.timing import WARM, sized
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load as load_plain
from torch.distributed.checkpoint.state_dict_saver import async_save

from scenarioclip_fast.checksums import file_digest
from scenarioclip_fast.train.checkpoint import Checkpoints, examine, load, verify

SHAPE, COUNT = sized(((768, 3072), 114), ((16, 64), 4))  # the matrices of an MLP
ROUNDS = 1 if WARM else sized(7, 2)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return {f"model/{i}": torch.randn(SHAPE) for i in range(COUNT)}


@pytest.fixture(scope="module")
def saved(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoints = Checkpoints(tmp_path_factory.mktemp("checkpoints"), keep=1)
    checkpoints.save(1, state, {}).wait()
    return checkpoints.paths()[0]


@pytest.mark.parametrize("form", ["torch.distributed.checkpoint", "ours"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_save(benchmark: Any, state: dict[str, Tensor], tmp_path: Path, form: str) -> None:
    benchmark.group = "checkpoint, save 1 GiB"
    checkpoints, stager = (
        Checkpoints(tmp_path / "ours", keep=1),
        DefaultStager(StagingOptions(False, False, False, False)),
    )
    blocked: list[float] = []
    steps = itertools.count(1)

    def run() -> None:
        start = time.perf_counter()
        if form == "ours":
            pending = checkpoints.save(next(steps), state, {})
            blocked.append(time.perf_counter() - start)
            pending.wait()
        else:
            future: Any = async_save(
                {"run": state}, checkpoint_id=tmp_path / "plain", async_stager=stager, no_dist=True
            )
            blocked.append(time.perf_counter() - start)
            future.result()

    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=0 if WARM else 1)
    benchmark.extra_info["form"] = form
    benchmark.extra_info["blocked, ms"] = 1e3 * statistics.median(blocked)


READERS: dict[str, Callable[[Path, dict[str, Tensor]], object]] = {
    "verify: SHA-256 of each file": lambda path, into: [file_digest(file) for file in path.iterdir()],
    "verify: ours": lambda path, into: verify(examine(path), None),
    "load: torch.distributed.checkpoint": lambda path, into: load_plain(
        {"run": into}, checkpoint_id=path, no_dist=True
    ),
    "load: ours, verified": lambda path, into: load(examine(path), dict(into), None),
}


@pytest.mark.parametrize("form", READERS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_read(benchmark: Any, saved: Path, state: dict[str, Tensor], form: str) -> None:
    benchmark.group = "checkpoint, read 1 GiB"
    benchmark.extra_info["form"] = form
    into = {name: torch.zeros_like(value) for name, value in state.items()}
    benchmark.pedantic(READERS[form], (saved, into), rounds=ROUNDS, warmup_rounds=0 if WARM else 1)
    if form.startswith("load"):
        assert all(torch.equal(into[name], value) for name, value in state.items())


def _load_plain(path: Path, into: dict[str, Tensor]) -> None:
    load_plain({"run": into}, checkpoint_id=path, no_dist=True)
