"""Pickles that would run code are refused by every loader, in one line, and before anything runs."""

from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
import shutil
import sys
import types
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from scenarioclip_fast.cli.main import main
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.model import ScenarioCLIP
from scenarioclip_fast.train import checkpoint
from scenarioclip_fast.train.checkpoint import BadCheckpoint, Checkpoints, examine, load
from scenarioclip_fast.train.config import TrainConfig
from scenarioclip_fast.train.trainer import Trainer

Make = Callable[..., TrainConfig]


class Attack:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


def assign(target: str) -> bytes:
    """A pickle that sets the attribute `hacked` of a class or function: BUILD with a state of slots."""
    module, _, attribute = target.rpartition(".")
    return f"c{module}\n{attribute}\n(N}}Vhacked\nI1\nstb.".encode()


def save(directory: Path, step: int = 1) -> Path:
    checkpoints = Checkpoints(directory, keep=5)
    checkpoints.save(step, {"model/w": torch.full((3,), 7.0), "rank/0": "text"}, {"loss": 1.0}).wait()
    return checkpoints.paths()[0]


def save_old(directory: Path, text: Any) -> Path:
    """A checkpoint as version 2 wrote it: text is pickled, and there are no checksums."""
    path = directory / "step-00000001"
    with pytest.warns(UserWarning, match=r"single process|distributed"):
        dcp.save({"run": {"model/w": torch.full((3,), 7.0), "rank/0": text}}, checkpoint_id=path, no_dist=True)
    files = {file.name: file.stat().st_size for file in path.iterdir()}
    (path / "meta.json").write_text(json.dumps({"schema": 2, "step": 1, "loss": 1.0, "files": files}))
    return path


def forge(path: Path, name: str, data: bytes) -> None:
    """Replace a file of a checkpoint, with valid checksums, as an attacker would."""
    (path / name).write_bytes(data)
    meta = json.loads((path / "meta.json").read_text())
    del meta["sha256"]
    meta["files"][name] = {"bytes": len(data), "sha256": [checkpoint.piece_digest(path / name, 0)]}
    (path / "meta.json").write_text(json.dumps({**meta, "sha256": checkpoint._digest_of(meta)}))


def restore(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = {"model/w": torch.zeros(3), "rank/0": ""}
    load(examine(path), state, None)
    return state


def test_checkpoints_of_the_earlier_schema_are_read(tmp_path: Path) -> None:
    path = save_old(tmp_path, "text")
    state = restore(path)
    assert state["rank/0"] == "text" and torch.equal(state["model/w"], torch.full((3,), 7.0))
    assert examine(path).digests == {}


def test_no_entry_is_pickled_as_an_object(tmp_path: Path) -> None:
    path = save(tmp_path)
    assert set(examine(path).tensors) == {"model/w", "rank/0"}  # BytesStorageMetadata would be missing here


METADATA = b"\x80\x04c" + Metadata.__module__.encode() + b"\nMetadata\n)\x81"
ENCODING = b"\x80\x04c" + Metadata.__module__.encode() + b"\n_MEM_FORMAT_ENCODING\nI0\n\x85R"
NESTED = b")" + b"\x85" * 1_000_000  # hashing it would overflow the stack of C
PROPERTIES = TensorProperties()
BOMB: Any = ([None], 1 << 50)  # the product is a list
INDEXES: dict[str, Callable[[Path], bytes]] = {
    "a call": lambda file: pickle.dumps(Attack(file)),
    "a call inside an index": lambda file: pickle.dumps(Metadata({}, planner_data=Attack(file), storage_data={})),
    "a builtin": lambda file: b"cbuiltins\neval\n(Vopen(%r, 'w')\ntR." % str(file).encode(),
    "a submodule of torch": lambda file: b"ctorch.hub\nload\n(V%s\ntR." % str(file).encode(),
    "a dotted name": lambda file: b"\x80\x04\x8c\x05torch\x8c\x0fserialization.os\x93.",
    "an attribute of an admitted name": lambda file: b"\x80\x04\x8c\x07pathlib\x8c\x0ePosixPath.home\x93(tR.",
    "a change to a class": lambda file: assign("torch.distributed.checkpoint.metadata.Metadata"),
    "a change to a function": lambda file: assign("torch.serialization._get_layout"),
    "an extension": lambda file: b"\x80\x02\x82\x01.",
    "a persistent id": lambda file: b"Pname\n.",
    "not an index": lambda file: pickle.dumps([1, 2]),
    "an empty file": lambda file: b"",
    "a text": lambda file: b"{}",
    "a huge allocation": lambda file: b"\x80\x04\x8e" + (1 << 50).to_bytes(8, "little") + b".",
    "another huge allocation": lambda file: b"\x80\x05\x96" + (1 << 50).to_bytes(8, "little") + b".",
    "a change to a constant": lambda file: ENCODING + b"}Vhacked\nI1\nsb.",
    "a special method": lambda file: METADATA + b"}V__setstate__\ncpathlib\nPosixPath\nsb.",
    "a key nested deeply": lambda file: METADATA + b"}" + NESTED + b"Nssb.",
    "an argument nested deeply": lambda file: b"ctorch.serialization\n_get_layout\n" + NESTED + b"\x85R.",
    "a set of deeply nested tuples": lambda file: b"(" + NESTED + b"\x91.",
    "a size that is a list": lambda file: pickle.dumps(Metadata({"a": TensorStorageMetadata(PROPERTIES, BOMB, [])})),
    "unusual storage": lambda file: pickle.dumps(Metadata({}, storage_data={"a": 1}, storage_meta=StorageMeta())),
}


def test_the_attacks_work_on_other_loaders(tmp_path: Path) -> None:
    for kind in ("a call", "a call inside an index", "a builtin"):
        file = tmp_path / kind.replace(" ", "-")
        pickle.loads(INDEXES[kind](file))
        assert file.exists(), kind
    victim = types.ModuleType("victim")
    victim.Victim = type("Victim", (), {})  # type: ignore[attr-defined]
    sys.modules["victim"] = victim
    try:
        pickle.loads(assign("victim.Victim"))
    finally:
        del sys.modules["victim"]
    assert victim.Victim.hacked == 1


@pytest.mark.parametrize("kind", INDEXES)
def test_an_index_that_is_not_one_is_refused(tmp_path: Path, kind: str) -> None:
    path = save(tmp_path / "checkpoints")
    file = tmp_path / "sentinel"
    forge(path, ".metadata", INDEXES[kind](file))
    with pytest.raises(BadCheckpoint, match="step-00000001") as caught:
        restore(path)
    assert "\n" not in str(caught.value)
    assert not file.exists()
    assert not hasattr(_MEM_FORMAT_ENCODING(0), "hacked")
    assert not hasattr(Metadata, "hacked") and not hasattr(torch.serialization._get_layout, "hacked")


def edit_index(path: Path, change: Callable[[Metadata], None]) -> None:
    index = pickle.loads((path / ".metadata").read_bytes())
    change(index)
    forge(path, ".metadata", pickle.dumps(index))


def leave_the_directory(index: Metadata) -> None:
    for where in index.storage_data.values():
        where.relative_path = "../secret"


def exceed_the_file(index: Metadata) -> None:
    for where in index.storage_data.values():
        where.length += 1 << 30


def claim_terabytes(index: Metadata) -> None:
    for entry in index.state_dict_metadata.values():
        assert isinstance(entry, TensorStorageMetadata)
        entry.size = torch.Size([1 << 42])


def name_a_transform(index: Metadata) -> None:
    for where in index.storage_data.values():
        where.transform_descriptors = ["stream.zstd"]


def claim_the_same_bytes(index: Metadata) -> None:
    key, where = next(iter(index.storage_data.items()))
    index.storage_data |= {replace(key, offset=torch.Size([i])): where for i in range(1000)}


LIES = [leave_the_directory, exceed_the_file, claim_terabytes, name_a_transform, claim_the_same_bytes]


@pytest.mark.parametrize("change", LIES)
def test_an_index_that_lies_is_refused(tmp_path: Path, change: Callable[[Metadata], None]) -> None:
    path = save(tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "secret").write_bytes((path / "__0_0.distcp").read_bytes())
    edit_index(path, change)
    with pytest.raises(BadCheckpoint, match=r"step-00000001.*\.metadata"):
        restore(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
def test_a_tensor_that_is_a_pickle_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints")
    file, attack = tmp_path / "sentinel", io.BytesIO()
    torch.save(Attack(file), attack)
    for data in (attack.getvalue(), pickle.dumps(Attack(file))):
        name, size = "__0_0.distcp", (path / "__0_0.distcp").stat().st_size
        forge(path, name, data.ljust(size, b"\0"))
        edit_index(path, lambda index, data=data: set_storage(index, len(data)))
        with pytest.raises(BadCheckpoint, match="step-00000001") as caught:
            restore(path)
        assert "\n" not in str(caught.value) and not file.exists()


def expanding() -> bytes:
    """A pickle of a tensor whose archive expands two hundredfold or more."""
    plain, small = io.BytesIO(), io.BytesIO()
    torch.save(torch.zeros(1 << 18), plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert len(small.getvalue()) * 200 < len(plain.getvalue())
    assert torch.load(io.BytesIO(small.getvalue()), weights_only=True).numel() == 1 << 18
    return small.getvalue()


def test_compressed_tensors_are_refused(tmp_path: Path) -> None:
    path, data = save(tmp_path / "checkpoints"), expanding()
    index = pickle.loads((path / ".metadata").read_bytes())
    where = next(where for key, where in index.storage_data.items() if key.fqn == "run.model/w")
    kept = (path / "__0_0.distcp").read_bytes()
    where.offset, where.length = len(kept), len(data)
    forge(path, "__0_0.distcp", kept + data)
    forge(path, ".metadata", pickle.dumps(index))
    with pytest.raises(BadCheckpoint, match=r"step-00000001: its \d+ bytes expand to 1\d{6}"):
        restore(path)
    (tmp_path / "weights.bin").write_bytes(data)
    with pytest.raises(UserError, match=r"weights.bin: .*its \d+ bytes expand to 1\d{6}"):
        ScenarioCLIP.from_reference(tmp_path / "weights.bin")


def set_storage(index: Metadata, length: int) -> None:
    for where in index.storage_data.values():
        where.offset, where.length = 0, length


def test_text_of_the_earlier_schema_that_is_a_pickle_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "sentinel"
    path = save_old(tmp_path, Attack(file))
    file.unlink(missing_ok=True)
    with pytest.raises(BadCheckpoint, match="step-00000001") as caught:
        restore(path)
    assert "\n" not in str(caught.value) and not file.exists()


def test_names_of_files_outside_the_checkpoint_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints")
    meta = json.loads((path / "meta.json").read_text())
    del meta["sha256"]
    meta["files"]["../../secret"] = meta["files"]["__0_0.distcp"]
    (path / "meta.json").write_text(json.dumps({**meta, "sha256": checkpoint._digest_of(meta)}))
    with pytest.raises(BadCheckpoint, match=r"'\.\./\.\./secret' is not the name"):
        examine(path)


def test_an_index_contains_only_admitted_opcodes(tmp_path: Path) -> None:
    """What torch writes today; a new type in a later torch must be admitted deliberately."""
    data = (save(tmp_path) / ".metadata").read_bytes()
    assert not {op.name for op, _, _ in pickletools.genops(data)} & {"PERSID", "BINPERSID", "EXT1", "INST", "OBJ"}


def test_resuming_from_a_hostile_run_ends_with_one_line(small: Make, tmp_path: Path) -> None:
    config = small("train.steps=2", "train.checkpoint_every=2")
    Trainer(config).fit()
    file = tmp_path / "sentinel"
    forge(Path(config.run.dir) / "checkpoints" / "step-00000002", ".metadata", pickle.dumps(Attack(file)))
    config.save(tmp_path / "config.yaml")
    with pytest.raises(UserError, match=r"no readable checkpoint: .*reading it could run code") as caught:
        Trainer(config, resume=True).fit()
    assert "\n" not in str(caught.value) and not file.exists()


@pytest.mark.parametrize(("key", "value"), [("step", "x"), ("recent_losses", 5), ("first_losses", [None])])
def test_progress_that_is_malformed_is_refused(small: Make, key: str, value: Any) -> None:
    config = small("train.steps=1")
    Trainer(config).fit()
    path = Path(config.run.dir) / "checkpoints" / "step-00000001"
    meta = json.loads((path / "meta.json").read_text())
    meta["progress"][key] = value
    (path / "meta.json").write_text(json.dumps(meta))
    forge(path, ".metadata", (path / ".metadata").read_bytes())
    with pytest.raises(UserError, match=f"no readable checkpoint: .*progress.{key}: expected a"):
        Trainer(config, resume=True).fit()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "open_clip_pytorch_model.bin"])
def test_weights_that_run_code_are_refused(small: Make, tmp_path: Path, name: str, capsys: Any) -> None:
    directory, file = tmp_path / "clip", tmp_path / "sentinel"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    config = small("train.steps=1", f"model.init={directory}")
    config.save(tmp_path / "config.yaml")
    for write in (
        lambda path: torch.save({"state_dict": Attack(file)}, path),
        lambda path: path.write_bytes(pickle.dumps(Attack(file))),
    ):
        write(directory / name)
        with pytest.raises(UserError) as caught:
            ScenarioCLIP.from_clip(directory)
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError):
            ScenarioCLIP.from_reference(directory / name)
        assert main(["train", "-c", str(tmp_path / "config.yaml")]) == 2
        assert capsys.readouterr().err.count("error:") == 1
        assert not file.exists()
        shutil.rmtree(config.run.dir, ignore_errors=True)
