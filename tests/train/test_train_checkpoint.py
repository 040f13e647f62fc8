from __future__ import annotations

import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from scenarioclip_fast.train import checkpoint
from scenarioclip_fast.train.checkpoint import (
    BadCheckpoint,
    Checkpoints,
    NotWritten,
    examine,
    load,
    share,
)
from scenarioclip_fast.train.random_state import random_state, set_random_state


def state(step: int) -> dict[str, Any]:
    return {"model/w": torch.full((3,), float(step)), "optimizer/w/step": torch.tensor(step), "rank/0": f"at {step}"}


def save(checkpoints: Checkpoints, step: int, **meta: Any) -> Path:
    checkpoints.save(step, state(step), meta).wait()
    return checkpoints.directory / f"step-{step:08d}"


def loaded(path: Path) -> dict[str, Any]:
    into = {"model/w": torch.zeros(3), "optimizer/w/step": torch.tensor(0), "rank/0": ""}
    load(examine(path), into, None)
    return into


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_round_trip(tmp_path: Path) -> None:
    path = save(Checkpoints(tmp_path / "checkpoints", keep=2), 7, config={"a": 1})
    found = examine(path)
    assert (found.meta["step"], found.meta["config"]) == (7, {"a": 1})
    assert found.names == {"model/w", "optimizer/w/step", "rank/0"}
    into = loaded(path)
    assert torch.equal(into["model/w"], torch.full((3,), 7.0))
    assert into["optimizer/w/step"].item() == 7
    assert into["rank/0"] == "at 7"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_state_is_copied_when_save_is_called(tmp_path: Path, device: str) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    live = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in state(1).items()}
    pending = checkpoints.save(1, live, {})
    live["model/w"].fill_(-1)
    pending.wait()
    live["model/w"].fill_(2)
    checkpoints.save(2, live, {}).wait()  # reuses the host buffers
    first, second = (loaded(path) for path in reversed(checkpoints.paths()))
    assert torch.equal(first["model/w"], torch.ones(3))
    assert torch.equal(second["model/w"], torch.full((3,), 2.0))


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.paths() == [] and checkpoints.best() is None
    for step, loss in ((5, 3.0), (7, 2.0), (8, 2.5), (10, 2.5), (100_000_000, None)):
        save(checkpoints, step, loss=loss)
    assert [p.name for p in checkpoints.paths()] == ["step-100000000", "step-00000010", "step-00000007"]
    assert checkpoints.best() == tmp_path / "step-00000007"
    assert len(names(tmp_path)) == 3


def test_neighbours_that_are_not_checkpoints_are_not_waited_for(tmp_path: Path) -> None:
    first = save(Checkpoints(tmp_path, 2), 1, loss=1.0)
    for step, text in ((2, None), (3, '{"schema": 2, "loss": 1' + "0" * 400 + "}")):
        (tmp_path / f"step-{step:08d}").mkdir()
        meta = tmp_path / f"step-{step:08d}" / "meta.json"
        os.mkfifo(meta) if text is None else meta.write_text(text)
    assert Checkpoints(tmp_path, 2).best() == first


def test_failing_to_remove_an_old_checkpoint_is_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1, loss=2.0)
    (tmp_path / ".removing-step-00000001").mkdir()
    (tmp_path / ".removing-step-00000001" / ".nfs1").touch()  # an NFS file that was open when its directory was removed
    save(checkpoints, 2, loss=1.0)
    assert names(tmp_path) == ["step-00000002"]

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint, "_remove", refuse)
    save(checkpoints, 3, loss=0.5)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_pruning_keeps_files_of_others_and_never_follows_links(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    precious = tmp_path / "elsewhere"
    precious.mkdir()
    for name in ("meta.json", "__0_0.distcp"):  # names that are deleted in a checkpoint
        (precious / name).touch()
    first = save(checkpoints, 1, loss=2.0)
    (first / "notes.txt").touch()
    (checkpoints.directory / "step-00000002").symlink_to(precious)
    (checkpoints.directory / ".writing-step-00000009-1").symlink_to(precious)
    checkpoints.sweep()
    for step in (3, 4):
        save(checkpoints, step, loss=1.0)
    assert names(precious) == ["__0_0.distcp", "meta.json"]
    assert names(checkpoints.directory) == [".removing-step-00000001", "step-00000004"]
    assert names(checkpoints.directory / ".removing-step-00000001") == ["notes.txt"]


def test_the_first_new_checkpoint_removes_later_ones(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=5)
    for step in (2, 4, 6):
        save(checkpoints, step, loss=1.0)
    save(checkpoints, 4, loss=2.0)  # resumed from step 2
    assert names(tmp_path) == ["step-00000002", "step-00000004"]
    assert examine(tmp_path / "step-00000004").meta["loss"] == 2.0


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), RuntimeError("archive writer\nstack")])
def test_a_failed_write_leaves_only_earlier_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1)

    def fail(value: Tensor, file: Any, *args: Any) -> None:
        file.write(b"half")
        raise failure

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(NotWritten, match=r"step 2 not written: (\[Errno 28\] No space left on device|archive writer)$"):
        save(checkpoints, 2)
    monkeypatch.undo()
    assert names(tmp_path) == ["step-00000001"]
    assert examine(checkpoints.paths()[0]).meta["step"] == 1
    save(checkpoints, 2)
    assert names(tmp_path) == ["step-00000002"]


@pytest.mark.parametrize("moment", ["before the index", "before the rename", "while pruning"])
def test_a_killed_writer_leaves_no_partial_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1)

    def die(*args: Any, **kwargs: Any) -> None:
        raise SystemExit

    if moment == "before the index":
        monkeypatch.setattr(FileSystemWriter, "finish", die)
    elif moment == "before the rename":
        monkeypatch.setattr(checkpoint.os, "rename", die)
    # The process is killed before any clean-up.
    if moment == "while pruning":
        monkeypatch.setattr(Path, "rmdir", die)
    else:
        monkeypatch.setattr(checkpoint, "_delete", die)
    with pytest.raises((SystemExit, NotWritten)):
        save(checkpoints, 2)
    monkeypatch.undo()
    newest = 2 if moment == "while pruning" else 1
    assert len(names(tmp_path)) == 2
    assert [examine(path).meta["step"] for path in checkpoints.paths()] == [newest]
    checkpoints.sweep()
    assert names(tmp_path) == [f"step-{newest:08d}"]


@pytest.mark.parametrize("damage", ["cut", "gone", "garbage", "no index", "garbage index", "no meta", "schema"])
def test_damage_is_reported(tmp_path: Path, damage: str) -> None:
    path = save(Checkpoints(tmp_path, keep=1), 1)
    files = {"no index": ".metadata", "garbage index": ".metadata", "no meta": "meta.json", "schema": "meta.json"}
    file = path / files.get(damage, "__0_0.distcp")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-10])
    elif "garbage" in damage:
        file.write_bytes(b"\0" * file.stat().st_size)
    elif damage == "schema":
        file.write_text(file.read_text().replace('"schema": 3', '"schema": 9'))
    else:
        file.unlink()
    with pytest.raises(BadCheckpoint, match="step-00000001") as caught:
        loaded(path)
    assert "\n" not in str(caught.value)


def test_files_missing_on_this_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.os, "listdir", lambda path: [])
    with pytest.raises(NotWritten, match=r"__0_0\.distcp of other ranks missing in .*shared by all hosts"):
        save(Checkpoints(tmp_path, keep=1), 1)


def test_ranks_share_the_bytes_equally(tmp_path: Path) -> None:
    tensors = {f"w{i}": torch.zeros(i % 7 + 1) for i in range(100)}
    shares = [share(tensors, rank, 3) for rank in range(3)]
    assert sorted(name for part in shares for name in part) == sorted(tensors)
    sizes = [sum(t.nbytes for t in part.values()) for part in shares]
    assert max(sizes) - min(sizes) <= 4 * 7  # at most one tensor more
    assert share(tensors, 0, 1) == tensors


def test_random_numbers_continue_after_a_round_trip(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, {"rank/0": json.dumps(random_state())}, {}).wait()
    expected = random.random(), torch.rand(3)
    into = {"rank/0": ""}
    load(examine(checkpoints.paths()[0]), into, None)
    set_random_state(json.loads(into["rank/0"]))
    assert random.random() == expected[0]
    assert torch.equal(torch.rand(3), expected[1])


def test_the_meta_file_is_plain_json(tmp_path: Path) -> None:
    path = save(Checkpoints(tmp_path, keep=1), 3, progress={"scenes": 24})
    meta = json.loads((path / "meta.json").read_text())
    assert (meta["schema"], meta["step"], meta["progress"]) == (3, 3, {"scenes": 24})
    assert set(meta["files"]) == {"__0_0.distcp", ".metadata"}
    for name, found in meta["files"].items():  # files of up to a piece have the digest that sha256sum prints
        data = (path / name).read_bytes()
        assert found == {"bytes": len(data), "sha256": [hashlib.sha256(data).hexdigest()]}
