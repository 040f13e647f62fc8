"""FSDP2 on two CPU ranks, compared with DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from training_runs import SMALL, consumed

from scenarioclip_fast.train.checkpoint import examine, load
from scenarioclip_fast.train.config import TrainConfig
from scenarioclip_fast.train.metrics import TIMINGS, read_metrics

Make = Callable[..., TrainConfig]
# Two blocks, the first one frozen and shared by all levels: both sharded and whole weights.
TOWERS = (
    "model.text.layers=2",
    "model.freeze.text_blocks=1",
    "model.vision.layers=2",
    "model.freeze.vision_blocks=1",
)


def rows(config: TrainConfig) -> list[dict[str, Any]]:
    found = read_metrics(Path(config.run.dir) / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in found]


def weights(config: TrainConfig, file: str = "model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(Path(config.run.dir) / "model" / file)


def checkpoint(config: TrainConfig, step: int) -> Path:
    return Path(config.run.dir) / "checkpoints" / f"step-{step:08d}"


def assert_close(a: TrainConfig, b: TrainConfig, start: int = 0) -> None:
    """Assert that `a`, started at step `start`, trained like `b`."""
    for row_a, row_b in zip(rows(a), rows(b)[start:], strict=True):
        # float32 sums in another order; steps amplify the difference
        assert row_a["loss"] == pytest.approx(row_b["loss"], rel=1e-5)
        assert row_a["grad_norm"] == pytest.approx(row_b["grad_norm"], rel=1e-3)
    for file in ("model.safetensors", "teacher.safetensors"):
        assert weights(a, file).keys() == weights(b, file).keys()
        for name, w in weights(a, file).items():
            # Adam turns a gradient near 0 into a step of the size of the learning rate, of either sign
            torch.testing.assert_close(w, weights(b, file)[name], rtol=0, atol=2e-4, msg=name)


@pytest.mark.parametrize(
    "overrides",
    [TOWERS, ("train.accumulate=2", "train.activation_checkpointing=true", "loss.teacher_scope=all")],
    ids=["frozen blocks", "microbatches and activation checkpointing"],
)
def test_sharded_training_equals_ddp(small: Make, fork_server: Any, overrides: tuple[str, ...]) -> None:
    ddp, fsdp = (
        small("train.steps=6", f"train.parallel={kind}", "optim.lr=1e-4", *overrides, run=kind)
        for kind in ("ddp", "fsdp")
    )
    fork_server.start(ddp, ranks=2).finish()
    fork_server.start(fsdp, ranks=2).finish()
    assert_close(fsdp, ddp)
    saved = FileSystemReader(checkpoint(fsdp, 6)).read_metadata().state_dict_metadata
    chunks = {name: len(entry.chunks) for name, entry in saved.items() if isinstance(entry, TensorStorageMetadata)}
    block = "vision.global.blocks.1.expand.weight" if TOWERS[0] in overrides else "vision.global.blocks.0.expand.weight"
    for part in ("model", "teacher", "optimizer/model"):
        name = f"run.{part}/{block}" + ("/exp_avg" if part.startswith("optimizer") else "")
        assert chunks[name] == 2, name  # half of it on each rank


def test_compiled_blocks_with_sharded_weights(small: Make, fork_server: Any) -> None:
    options = ("train.steps=2", "train.parallel=fsdp", "optim.lr=1e-4")
    plain, compiled = (small(*options, f"train.compile={x}", run=x) for x in ("false", "true"))
    fork_server.start(plain, ranks=2).finish()
    out = fork_server.start(compiled, ranks=2, compile_backend="eager").finish()
    assert out.count("the transformer blocks are compiled") == 1
    assert_close(compiled, plain)


def test_checkpoints_load_on_a_different_number_of_ranks(small: Make, fork_server: Any) -> None:
    def run(name: str, ranks: int, *options: str) -> TrainConfig:
        config = small("train.steps=6", "train.checkpoint_every=3", "train.parallel=fsdp", "optim.lr=1e-4", run=name)
        fork_server.start(config, *options, ranks=ranks).finish()
        return config

    one, two = run("one", 1), run("two", 2)
    assert_close(two, one)
    again = run("again", 2, "--resume", str(checkpoint(two, 3)))
    assert rows(again) == rows(two)[3:]
    for file in ("model.safetensors", "teacher.safetensors"):
        assert all(torch.equal(w, weights(two, file)[name]) for name, w in weights(again, file).items())
    assert_close(run("from one to two", 2, "--resume", str(checkpoint(one, 3))), one, start=3)
    assert_close(run("from two to one", 1, "--resume", str(checkpoint(two, 3))), two, start=3)


BATCH = ("data.batch_size=12", "optim.lr=1e-4")  # of 20 scenes: a step is three fifths of an epoch


@pytest.fixture(scope="module")
def saved(shards: Path, fork_server: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of two ranks for each kind of parallelism."""
    found = {}
    for kind in ("ddp", "fsdp"):
        run = tmp_path_factory.mktemp("saved") / kind
        own = [f"data.shards={shards}", f"run.dir={run}", f"train.parallel={kind}", "train.steps=3", *TOWERS, *BATCH]
        config = TrainConfig.of({}, [*SMALL, *own])
        fork_server.start(config, ranks=2).finish()
        found[kind] = checkpoint(config, 3)
    return found


@pytest.mark.parametrize(
    ("before", "after", "ranks"),
    [("fsdp", "fsdp", 1), ("fsdp", "fsdp", 3), ("fsdp", "fsdp", 4), ("fsdp", "ddp", 3), ("ddp", "fsdp", 3)],
)
def test_checkpoints_are_resharded_exactly(
    small: Make, fork_server: Any, saved: dict[str, Path], tmp_path: Path, before: str, after: str, ranks: int
) -> None:
    """Parameters, averages and the optimizer's state, of which every rank has other parts, or all."""
    config = small("train.steps=3", f"train.parallel={after}", *TOWERS, *BATCH)
    file = tmp_path / "restored.pt"
    fork_server.start(config, "--resume", str(saved[before]), ranks=ranks, restored=file).finish()
    restored, found = torch.load(file), examine(saved[before])
    expected = {name: torch.zeros(size, dtype=dtype) for name, (size, dtype) in found.tensors.items()}
    load(found, expected, None)
    assert {name for name in expected if not name.startswith("rank/")} == restored.keys()
    for part in ("model/", "loss/", "teacher/", "optimizer/model/", "optimizer/loss/"):
        assert any(name.startswith(part) for name in restored), part
    assert all(torch.equal(t, expected[name]) for name, t in restored.items())


@pytest.mark.parametrize(
    ("ranks", "options"),
    [(1, ["train.parallel=ddp"]), (3, ["train.parallel=ddp"]), (3, ["train.parallel=fsdp", "data.shuffle=shards"])],
    ids=["1", "3", "3, sharded weights and shuffled shards"],
)
def test_another_number_of_ranks_continues_within_an_epoch(
    small: Make, fork_server: Any, tmp_path: Path, ranks: int, options: list[str]
) -> None:
    """With the same global batch, which 1, 2 and 3 ranks divide: 6 of 20 scenes, three steps an epoch."""
    budget = ("train.steps=11", "train.checkpoint_every=4", "train.keep_checkpoints=9", "data.batch_size=6")
    full, other = (small(*budget, "optim.lr=1e-4", *options, run=name) for name in ("full", "other"))
    fork_server.start(full, ranks=2, keys=tmp_path / "full.keys").finish()
    resume = ("--resume", str(checkpoint(full, 4)))
    fork_server.start(other, *resume, ranks=ranks, keys=tmp_path / "other.keys").finish()
    steps = consumed(tmp_path / "full.keys")
    assert consumed(tmp_path / "other.keys") == {step: steps[step] for step in range(5, 12)}
    assert_close(other, full, start=4)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_non_finite_steps_are_skipped_on_every_rank(small: Make, fork_server: Any, parallel: str) -> None:
    config = small("train.steps=6", f"train.parallel={parallel}")
    out = fork_server.start(config, ranks=2, poisoned=[3]).finish()  # one rank's pixels
    assert [row["skipped"] for row in rows(config)] == [0, 0, 1, 0, 0, 0]
    assert out.count("step 3 skipped: loss nan, gradient norm nan; scenes") == 1
    assert all(row["loss"] is not None for row in rows(config)[3:])
    assert all(torch.isfinite(w).all() for w in weights(config).values())
