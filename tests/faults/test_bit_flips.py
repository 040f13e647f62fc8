"""Single-bit flips in everything that is loaded again: detected, or without effect on what is loaded."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from campaign import flip_a_bit, generator, trials

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.eval import features
from scenarioclip_fast.eval.checkpoint import open_checkpoint
from scenarioclip_fast.train import checkpoint
from scenarioclip_fast.train.checkpoint import BadCheckpoint, examine, load
from scenarioclip_fast.train.config import TrainConfig
from scenarioclip_fast.train.trainer import Trainer

Make = Callable[..., TrainConfig]
SECONDS = trials(60, 1200)  # beyond which a campaign stops


@pytest.fixture
def finished(small: Make) -> TrainConfig:
    """A finished run with two checkpoints and an exported teacher."""
    config = small(
        "train.steps=4",
        "train.checkpoint_every=2",
        "train.keep_checkpoints=2",
        "loss.teacher_scope=all",
        run="finished",
    )
    Trainer(config).fit()
    return config


def flips(directory: Path, rng: random.Random, count: int) -> Iterator[str]:
    """Flip a bit in a copy of `directory`, yield, restore. Half of the flips choose files by size, half evenly."""
    files = sorted(path for path in directory.iterdir() if path.stat().st_size)
    sizes = [path.stat().st_size for path in files]
    end = time.monotonic() + SECONDS
    for i in range(count):
        assert time.monotonic() < end, f"only {i} of {count} flips in {SECONDS} s"
        (path,) = rng.choices(files, sizes if i % 2 else None)
        before = path.read_bytes()
        yield flip_a_bit(path, rng)
        path.write_bytes(before)


def ones(path: Path) -> dict[str, Any]:
    """The entries of a checkpoint, all tensors filled with 1."""
    return {
        name: "" if name.startswith("rank/") else torch.ones(size, dtype=dtype)
        for name, (size, dtype) in examine(path).tensors.items()
    }


def ones_like(state: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.ones_like(t) if isinstance(t, torch.Tensor) else "" for name, t in state.items()}


def assert_equal(found: dict[str, Any], expected: dict[str, Any], flip: str) -> None:
    assert found.keys() == expected.keys(), flip
    for name, value in expected.items():
        same = torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
        assert same, f"{flip} loaded, and changed {name}"


def test_no_flip_in_a_checkpoint_is_loaded(finished: TrainConfig) -> None:
    path = Path(finished.run.dir) / "checkpoints" / "step-00000004"
    expected, state = ones(path), ones(path)
    load(examine(path), expected, None)
    meta = examine(path).meta
    rejected, count = 0, trials(200, 1000)
    for flip in flips(path, generator("checkpoint"), count):
        try:
            found = examine(path)
            load(found, state, None)
        except BadCheckpoint as error:
            rejected += 1
            assert path.name in str(error) and "\n" not in str(error), flip
            assert_equal(state, ones_like(state), f"{flip}, unverified,")
        else:  # white space of meta.json
            assert_equal({**state, "meta": found.meta}, {**expected, "meta": meta}, flip)
            state = ones_like(state)
    assert rejected > 0.9 * count


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_resumed(
    finished: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(finished.run.dir)
    expected = (run / "model" / "model.safetensors").read_bytes()
    for name in ("__0_0.distcp", ".metadata", "meta.json"):
        file = run / "checkpoints" / "step-00000004" / name
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        shutil.rmtree(run / "model")
        assert Trainer(finished, resume="auto").fit().completed
        err = capsys.readouterr().err
        assert f"skipping a damaged checkpoint: {file.parent}: {name}: damaged" in err
        assert "step-00000002 at step 2" in err
        assert (run / "model" / "model.safetensors").read_bytes() == expected


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_rank_rejects_what_one_rank_finds(small: Make, fork_server: Any, ranks: int) -> None:
    config = small("train.steps=4", "train.checkpoint_every=2")
    fork_server.start(config, ranks=ranks).finish()
    files = sorted((Path(config.run.dir) / "checkpoints" / "step-00000004").glob("*.distcp"))
    assert len(files) == ranks
    flip_a_bit(files[-1], generator("ranks"))
    out = fork_server.start(config, "--resume", "auto", ranks=ranks).finish()
    assert f"step-00000004: {files[-1].name}: damaged" in out and "step-00000002 at step 2" in out


def test_pieces_are_verified_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scenarioclip_fast.checksums.PIECE", 1000)
    monkeypatch.setattr(checkpoint, "PIECE", 1000)
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, {"model/w": torch.arange(1000.0)}, {}).wait()
    path = checkpoints.paths()[0]
    file = path / "__0_0.distcp"
    assert len(examine(path).digests[file.name]) == -(-file.stat().st_size // 1000) > 4
    into = {"model/w": torch.zeros(1000)}
    load(examine(path), into, None)
    assert torch.equal(into["model/w"], torch.arange(1000.0))
    data = bytearray(file.read_bytes())
    data[2500] ^= 1
    file.write_bytes(data)
    with pytest.raises(BadCheckpoint, match="from byte 2000 on: damaged"):
        load(examine(path), into, None)


def weights(directory: Path, kind: Any) -> dict[str, Any]:
    opened = open_checkpoint(directory, weights=kind)
    return {**opened.model.state_dict(), "config": opened.model.config, "data": opened.data, "scales": opened.scales}


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_no_flip_in_an_exported_model_is_loaded(finished: TrainConfig, kind: str) -> None:
    directory = Path(finished.run.dir) / "model"
    expected = weights(directory, kind)
    for flip in flips(directory, generator(kind), trials(60, 500)):
        try:
            found = weights(directory, kind)
        except UserError as error:
            assert str(directory) in str(error) and "\n" not in str(error), flip
        else:
            assert_equal(found, expected, flip)


def test_an_export_without_checksums_is_loaded_with_a_warning(finished: TrainConfig) -> None:
    directory = Path(finished.run.dir) / "model"
    (directory / "SHA256SUMS").unlink()
    with pytest.warns(UserWarning, match="has no SHA256SUMS"):
        open_checkpoint(directory)


def test_no_flip_in_cached_features_is_loaded(tmp_path: Path) -> None:
    rows = {level: features.LevelFeatures(torch.randn(5, 8), torch.arange(5), torch.arange(5)) for level in ("global",)}
    path = tmp_path / "features.safetensors"
    features._save(features.Features(["a", "b"], rows), path)
    for flip in flips(tmp_path, generator("features"), trials(60, 500)):
        found = features._load(path)
        assert found is None, flip
    assert features._load(path) is not None
