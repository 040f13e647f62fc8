"""Checkpoints on disk: whole or not there, the last few kept, the newest good one found again."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_NAME = re.compile(r"step-(\d{8,})")
_TEMPORARY = ".writing-"
_SCHEMA = 1


class BadCheckpoint(ValueError):
    """A checkpoint that cannot be read, and why."""


@dataclass
class Checkpoint:
    """What `load` returns: `meta` is plain JSON (step, config, world size), `state` holds the tensors."""

    path: Path
    meta: dict[str, Any]
    state: dict[str, Any]


class Checkpoints:
    """The folder of a run's checkpoints: `step-00000500/{state.pt, meta.json}`."""

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory = directory
        self.keep = keep

    def sweep(self) -> None:
        """Removes what writers that died have left behind."""
        for path in self.directory.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(path, ignore_errors=True)

    def paths(self) -> list[Path]:
        """Newest first."""
        if not self.directory.is_dir():
            return []
        return sorted((p for p in self.directory.iterdir() if _NAME.fullmatch(p.name)), key=_step, reverse=True)

    def save(self, step: int, state: dict[str, Any], meta: dict[str, Any]) -> Path:
        """Writes into a temporary directory, flushes it to the disk, then renames it: no reader sees half of one.

        Raises OSError when the disk refuses; the earlier checkpoints are then untouched.
        """
        final = self.directory / f"step-{step:08d}"
        temporary = self.directory / f"{_TEMPORARY}{final.name}"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            with open(temporary / "state.pt", "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
                size = file.tell()
            with open(temporary / "meta.json", "w", encoding="utf-8") as text:
                json.dump({"schema": _SCHEMA, "step": step, "bytes": size, **meta}, text, indent=1)
                text.flush()
                os.fsync(text.fileno())
            if final.exists():  # one that could not be read when the run was resumed
                shutil.rmtree(final)
            os.rename(temporary, final)
            _sync(self.directory)
        except RuntimeError as error:  # torch's archive writer wraps the system's error
            shutil.rmtree(temporary, ignore_errors=True)
            raise OSError(f"writing {temporary} failed: {error}") from error
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        for old in self.paths()[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)
        return final


def load(path: Path) -> Checkpoint:
    """Reads one checkpoint onto the CPU; BadCheckpoint says what is wrong with it."""
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        if meta["schema"] != _SCHEMA:
            raise BadCheckpoint(f"{path}: its schema is {meta['schema']}, this version reads {_SCHEMA}")
        size = (path / "state.pt").stat().st_size
        if size != meta["bytes"]:
            raise BadCheckpoint(f"{path}: state.pt has {size} bytes, {meta['bytes']} were written")
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    except BadCheckpoint:
        raise
    except Exception as error:  # a damaged archive can fail in any way
        raise BadCheckpoint(f"{path}: {error}") from error
    return Checkpoint(path, meta, state)


def random_state() -> dict[str, Any]:
    """Of Python and torch, the current GPU included."""
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {"python": [version, list(internal), gauss], "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
