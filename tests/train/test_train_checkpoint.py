from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from scenarioclip_fast.train import checkpoint
from scenarioclip_fast.train.checkpoint import BadCheckpoint, Checkpoints, load, random_state, set_random_state


def state(step: int) -> dict[str, Any]:
    return {"model": {"w": torch.full((3,), float(step))}, "optimizer": {0: {"step": torch.tensor(step)}}}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    path = checkpoints.save(7, state(7), {"config": {"a": 1}})
    found = load(path)
    assert (found.meta["step"], found.meta["config"]) == (7, {"a": 1})
    assert torch.equal(found.state["model"]["w"], torch.full((3,), 7.0))


def test_the_last_few_are_kept_newest_first(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.paths() == []
    for step in (5, 100_000_000, 10):
        checkpoints.save(step, state(step), {})
    assert [p.name for p in checkpoints.paths()] == ["step-100000000", "step-00000010"]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), RuntimeError("archive writer")])
def test_a_failed_write_leaves_the_earlier_ones_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state(1), {})

    def fail(value: object, file: Any) -> None:
        file.write(b"half")
        raise failure

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError):
        checkpoints.save(2, state(2), {})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert load(checkpoints.paths()[0]).meta["step"] == 1


def test_a_writer_that_died_leaves_no_checkpoint_and_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    monkeypatch.setattr(checkpoint.os, "rename", lambda a, b: (_ for _ in ()).throw(SystemExit))
    # The process is gone before any clean-up.
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *a, **k: None)
    with pytest.raises(SystemExit):
        checkpoints.save(1, state(1), {})
    monkeypatch.undo()
    assert checkpoints.paths() == []
    assert len(list(tmp_path.iterdir())) == 1
    checkpoints.sweep()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "garbage", "no meta", "schema"])
def test_a_damaged_checkpoint_says_so(tmp_path: Path, damage: str) -> None:
    path = Checkpoints(tmp_path, keep=1).save(1, state(1), {})
    file = path / "state.pt"
    size = file.stat().st_size
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-10])
    elif damage == "garbage":
        file.write_bytes(b"\0" * size)
    elif damage == "no meta":
        (path / "meta.json").unlink()
    else:
        meta = (path / "meta.json").read_text()
        (path / "meta.json").write_text(meta.replace('"schema": 1', '"schema": 9'))
    with pytest.raises(BadCheckpoint, match="step-00000001"):
        load(path)


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    saved = Checkpoints(tmp_path, keep=1).save(1, {"random": random_state()}, {})
    expected = random.random(), torch.rand(3)
    set_random_state(load(saved).state["random"])
    assert random.random() == expected[0]
    assert torch.equal(torch.rand(3), expected[1])
