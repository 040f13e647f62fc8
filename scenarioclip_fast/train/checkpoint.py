"""Checkpoints on disk: whole or not there, the last few and the best kept, damage noticed.

torch.distributed.checkpoint writes them, each rank its share, in a thread, from copies in host memory: the run goes on
meanwhile. The leading rank gives the directory its name once all shares are on the disk.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

_NAME = re.compile(r"step-(\d{8,})")
_WRITING, _REMOVING = ".writing-", ".removing-"
_META, _INDEX = "meta.json", ".metadata"  # ours, torch's
_SCHEMA = 2
_ROOT = "run"  # one entry for torch, which logs, and takes its time for, each of those at the top


class BadCheckpoint(ValueError):
    """A checkpoint that cannot be read, and why."""


class NotWritten(OSError):
    """A checkpoint that could not be written, and why; the earlier ones are untouched."""


@dataclass(frozen=True)
class Checkpoint:
    """What `examine` finds: `meta` is plain JSON (step, config, ...), `names` those of everything saved."""

    path: Path
    meta: dict[str, Any]
    names: frozenset[str]


class PendingSave:
    """A checkpoint that is being written."""

    def __init__(self, step: int, future: Future[Any], give_up: Callable[[], None]) -> None:
        self.step = step
        self._future, self._give_up = future, give_up

    def done(self) -> bool:
        return self._future.done()

    def wait(self) -> None:
        """Until the checkpoint is there, on every rank alike; NotWritten says why it is not."""
        try:
            self._future.result()
        except (Exception, CheckpointException) as error:
            self._give_up()
            raise NotWritten(f"checkpoint of step {self.step} not written: {_reason(error)}") from error


class Checkpoints:
    """The folder of a run's checkpoints: `step-00000500/{meta.json, .metadata, __0_0.distcp, ...}`.

    Args:
        directory: the folder, seen by all ranks.
        keep: how many of the newest stay, beside the best.
        group: all ranks, of a backend for host memory (gloo); None: one process.
    """

    def __init__(self, directory: Path, keep: int, group: dist.ProcessGroup | None = None) -> None:
        self.directory, self.keep, self.group = directory, keep, group
        self._attempts = 0
        self._stager: DefaultStager | None = None

    def sweep(self) -> None:
        """Removes what processes that died have left behind."""
        for prefix in (_WRITING, _REMOVING):
            for path in self.directory.glob(f"{prefix}*"):
                shutil.rmtree(path, ignore_errors=True)

    def paths(self) -> list[Path]:
        """Newest first."""
        if not self.directory.is_dir():
            return []
        return sorted((p for p in self.directory.iterdir() if _NAME.fullmatch(p.name)), key=_step, reverse=True)

    def best(self) -> Path | None:
        """The one with the lowest loss, the newer of equal ones."""
        return min(self.paths(), key=_loss, default=None)

    def save(self, step: int, state: Mapping[str, Any], meta: Mapping[str, Any]) -> PendingSave:
        """Copies `state` into host memory and leaves the writing to a thread; all ranks call it together.

        Earlier checkpoints are pruned once this one is whole, and so are those of later steps, which a run that was
        taken up again at an older checkpoint has left behind. One save at a time: the next one takes the same copies.

        Args:
            state: name -> tensor, number or text. Of a DTensor each rank writes its shards; anything else is written
                by the rank that has its name, see `share`.
            meta: plain JSON; "loss" is what `best` compares.
        """
        final = self.directory / f"step-{step:08d}"
        # A number of its own: the leading rank may still clear a failed attempt away.
        self._attempts += 1
        temporary = self.directory / f"{_WRITING}{final.name}-{self._attempts}"
        publish = partial(self._publish, temporary, final, {"schema": _SCHEMA, "step": step, **meta})
        if self._stager is None or torch.__version__ < "2.13":  # stagers of earlier versions serve once
            # Pinned buffers, and copies that do not wait for one another.
            gpu = any(isinstance(value, Tensor) and value.is_cuda for value in state.values())
            self._stager = DefaultStager(StagingOptions(gpu, False, False, gpu))
        future = async_save(
            {_ROOT: dict(state)},
            storage_writer=_Writer(temporary, publish),
            process_group=self.group,
            async_stager=self._stager,
            no_dist=self.group is None,
        )
        assert isinstance(future, Future)
        leads = self.group is None or self.group.rank() == 0
        return PendingSave(step, future, partial(shutil.rmtree, temporary, ignore_errors=True) if leads else _nothing)

    def _publish(self, temporary: Path, final: Path, meta: dict[str, Any]) -> None:
        """On the leading rank, when every rank's share is on the disk: no reader ever sees half a checkpoint."""
        files = {path.name: path.stat().st_size for path in temporary.iterdir()}
        with open(temporary / _META, "w", encoding="utf-8") as file:
            json.dump({**meta, "files": files}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync(temporary)
        if final.exists():  # one that could not be read, or of an abandoned branch
            _remove(final)
        os.rename(temporary, final)
        _sync(self.directory)
        self._prune(meta["step"])

    def _prune(self, step: int) -> None:
        before = [path for path in self.paths() if _step(path) <= step]
        kept = {*before[: self.keep], min(before, key=_loss)}
        for path in self.paths():
            if path not in kept:
                with suppress(OSError):  # the new checkpoint is written, whatever becomes of an old one
                    _remove(path)


class _Writer(FileSystemWriter):
    """Calls `publish` when all ranks' files and the index are written."""

    def __init__(self, path: Path, publish: Callable[[], None]) -> None:
        super().__init__(path)
        self._publish = publish

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            failure: Exception = error
            behind = error.__context__  # torch's archive writer speaks of positions; this is the system's own word
            if isinstance(error, RuntimeError) and isinstance(behind, OSError):
                failure = OSError(behind.errno, behind.strerror)
            # The frames hold views of io.BytesIO in cycles, on which the garbage collector of Python 3.12.1 crashes.
            for part in (error, behind):
                if part is not None:
                    traceback.clear_frames(part.__traceback__)
        raise failure

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        missing = {r.storage_data.relative_path for rank in results for r in rank} - set(os.listdir(self.path))
        if missing:
            raise FileNotFoundError(
                f"{', '.join(sorted(missing))} of other ranks are not in {self.path}: expected run.dir on a file "
                "system that all hosts share"
            )
        super().finish(metadata, results)
        self._publish()


def examine(path: Path) -> Checkpoint:
    """Reads what a checkpoint says about itself; BadCheckpoint when it is not whole."""
    if not (path / _META).is_file():
        raise BadCheckpoint(
            f"{path}: no checkpoint, for there is no {_META}" if path.exists() else f"{path}: not there"
        )
    try:
        meta = json.loads((path / _META).read_text(encoding="utf-8"))
        if meta["schema"] != _SCHEMA:
            raise BadCheckpoint(f"{path}: its schema is {meta['schema']}, this version reads {_SCHEMA}")
        for name, size in meta["files"].items():
            found = (path / name).stat().st_size
            if found != size:
                raise BadCheckpoint(f"{path}: {name} has {found} bytes, {size} were written")
        names = [name.removeprefix(f"{_ROOT}.") for name in FileSystemReader(path).read_metadata().state_dict_metadata]
    except BadCheckpoint:
        raise
    except Exception as error:  # damaged JSON and pickles can fail in any way
        raise BadCheckpoint(f"{path}: {_reason(error)}") from error
    return Checkpoint(path, meta, frozenset(names))


def load(checkpoint: Checkpoint, state: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    """Fills the tensors of `state` in place and replaces its other values; all ranks call it together.

    BadCheckpoint, on every rank, when one of them cannot read its part; tensors are then old or new.
    """
    tree = {_ROOT: state}
    try:
        load_distributed(
            tree,
            storage_reader=FileSystemReader(checkpoint.path),
            process_group=group,
            no_dist=group is None,
        )
    except CheckpointException as error:
        raise BadCheckpoint(f"{checkpoint.path}: {_reason(error)}") from error
    state.update(tree[_ROOT])


def share(tensors: Mapping[str, Tensor], rank: int, size: int) -> dict[str, Tensor]:
    """What rank `rank` writes: its shards, and of the tensors that all ranks hold alike as many bytes as any other."""
    mine: dict[str, Tensor] = {}
    written = [0] * size
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].nbytes, item[0])):
        if isinstance(tensor, DTensor):
            mine[name] = tensor
            continue
        least = written.index(min(written))
        written[least] += tensor.nbytes
        if least == rank:
            mine[name] = tensor
    return mine


def random_state() -> dict[str, Any]:
    """Of Python and torch, the current GPU included; plain values, fit for JSON."""
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {"python": [version, list(internal), gauss], "torch": _hex(torch.get_rng_state())}
    if torch.cuda.is_available():
        state["cuda"] = _hex(torch.cuda.get_rng_state())
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Takes over what `random_state` gave."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(_unhex(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_unhex(state["cuda"]))


def _hex(state: Tensor) -> str:
    return bytes(state.tolist()).hex()


def _unhex(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


def _reason(error: BaseException) -> str:
    """One line: the first rank's reason where ranks failed."""
    if isinstance(error, CheckpointException):
        rank, (cause, _) = min(error.failures.items())
        return f"{_reason(cause)} (rank {rank})" if rank or len(error.failures) > 1 else _reason(cause)
    return str(error).partition("\n")[0] or type(error).__name__


def _loss(path: Path) -> float:
    try:
        return float(json.loads((path / _META).read_text(encoding="utf-8"))["loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return float("inf")


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _remove(path: Path) -> None:
    """In one move, so that a process that dies here leaves nothing that looks like a checkpoint."""
    doomed = path.with_name(f"{_REMOVING}{path.name}")
    if doomed.exists():  # what was left of an earlier one of this step
        shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _nothing() -> None:
    pass


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
