"""Checkpoints on disk: written atomically, pruned to the newest and the best, checked for damage when read.

torch.distributed.checkpoint writes them in a thread, from copies in host memory, while training continues; each rank
writes its share. Rank 0 renames the temporary directory once all shares are on disk.
"""

from __future__ import annotations

import json
import os
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
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

_NAME = re.compile(r"step-(\d{8,})")
_WRITING, _REMOVING = ".writing-", ".removing-"
_META = "meta.json"  # next to .metadata, torch's own index
_SCHEMA = 2
_ROOT = "run"  # a single top-level entry: torch logs each of them, which is slow


TensorEntry = tuple[torch.Size, torch.dtype]  # of a saved tensor


class BadCheckpoint(ValueError):
    """A checkpoint cannot be read; the message gives the reason."""


class NotWritten(OSError):
    """A checkpoint could not be written; earlier ones are untouched."""


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint, from its metadata.

    meta: plain JSON (step, config, ...);  names: of all entries;  tensors: size and dtype of those that are tensors
    """

    path: Path
    meta: dict[str, Any]
    names: frozenset[str]
    tensors: dict[str, TensorEntry]


class PendingSave:
    """A checkpoint being written."""

    def __init__(self, step: int, future: Future[Any], clean_up: Callable[[], None]) -> None:
        self.step = step
        self._future, self._clean_up = future, clean_up

    def done(self) -> bool:
        return self._future.done()

    def wait(self) -> None:
        """Wait until the checkpoint is complete. Raises NotWritten, on every rank, if that fails."""
        try:
            self._future.result()
        except (Exception, CheckpointException) as error:
            self._clean_up()
            raise NotWritten(f"checkpoint of step {self.step} not written: {_reason(error)}") from error


class Checkpoints:
    """The folder of a run's checkpoints: `step-00000500/{meta.json, .metadata, __0_0.distcp, ...}`.

    Args:
        directory: the folder, on a file system that all ranks share.
        keep: number of newest checkpoints to keep, in addition to the best.
        group: all ranks, with a CPU backend (gloo); None: a single process.
    """

    def __init__(self, directory: Path, keep: int, group: dist.ProcessGroup | None = None) -> None:
        self.directory, self.keep, self.group = directory, keep, group
        self._attempts = 0
        self._stager: DefaultStager | None = None

    def sweep(self) -> None:
        """Remove what killed processes left behind."""
        for prefix in (_WRITING, _REMOVING):
            for path in self.directory.glob(f"{prefix}*"):
                shutil.rmtree(path, ignore_errors=True)

    def paths(self) -> list[Path]:
        """Return all checkpoints, newest first."""
        if not self.directory.is_dir():
            return []
        return sorted((p for p in self.directory.iterdir() if _NAME.fullmatch(p.name)), key=_step, reverse=True)

    def best(self) -> Path | None:
        """Return the checkpoint with the lowest loss; of equal ones, the newest."""
        return min(self.paths(), key=_loss, default=None)

    def save(self, step: int, state: Mapping[str, Any], meta: Mapping[str, Any]) -> PendingSave:
        """Copy `state` into host memory and write it in a thread; all ranks call it together.

        Once this checkpoint is complete, earlier ones are pruned, and so are those of later steps, which remain when a
        run resumes from an older checkpoint. One save at a time, because saves share the host buffers.

        Args:
            state: name -> tensor, number or text. Each rank writes its shards of a DTensor; anything else is written
                by the rank that passes it, see `share`.
            meta: plain JSON; `best` compares "loss".
        """
        final = self.directory / f"step-{step:08d}"
        # Numbered: rank 0 may still be removing a failed attempt.
        self._attempts += 1
        temporary = self.directory / f"{_WRITING}{final.name}-{self._attempts}"
        publish = partial(self._publish, temporary, final, {"schema": _SCHEMA, "step": step, **meta})
        if self._stager is None or torch.__version__ < "2.13":  # in earlier versions, a stager can be used only once
            # Pinned buffers and non-blocking copies.
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
        is_main_process = self.group is None or self.group.rank() == 0
        clean_up = partial(shutil.rmtree, temporary, ignore_errors=True) if is_main_process else _do_nothing
        return PendingSave(step, future, clean_up)

    def _publish(self, temporary: Path, final: Path, meta: dict[str, Any]) -> None:
        """Runs on rank 0 once every rank's share is on disk, so that readers never see a partial checkpoint."""
        files = {path.name: path.stat().st_size for path in temporary.iterdir()}
        with open(temporary / _META, "w", encoding="utf-8") as file:
            json.dump({**meta, "files": files}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync(temporary)
        if final.exists():  # damaged, or left from before resuming at an older step
            _remove(final)
        os.rename(temporary, final)
        _sync(self.directory)
        self._prune(meta["step"])

    def _prune(self, step: int) -> None:
        before = [path for path in self.paths() if _step(path) <= step]
        kept = {*before[: self.keep], min(before, key=_loss)}
        for path in self.paths():
            if path not in kept:
                with suppress(OSError):  # failing to remove an old checkpoint is harmless
                    _remove(path)


class _Writer(FileSystemWriter):
    """Calls `publish` once all ranks' files and the index are written."""

    def __init__(self, path: Path, publish: Callable[[], None]) -> None:
        super().__init__(path)
        self._publish = publish

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            failure: Exception = error
            cause = error.__context__  # torch's archive writer reports file positions; the context is the OS error
            if isinstance(error, RuntimeError) and isinstance(cause, OSError):
                failure = OSError(cause.errno, cause.strerror)
            # The frames hold views of io.BytesIO in cycles, on which the garbage collector of Python 3.12.1 crashes.
            for part in (error, cause):
                if part is not None:
                    traceback.clear_frames(part.__traceback__)
        raise failure

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        missing = {r.storage_data.relative_path for rank in results for r in rank} - set(os.listdir(self.path))
        if missing:
            raise FileNotFoundError(
                f"{', '.join(sorted(missing))} of other ranks missing in {self.path}: expected run.dir on a file "
                "system shared by all hosts"
            )
        super().finish(metadata, results)
        self._publish()


def examine(path: Path) -> Checkpoint:
    """Read a checkpoint's metadata and check that its files are complete; raise BadCheckpoint otherwise."""
    if not (path / _META).is_file():
        raise BadCheckpoint(f"{path}: not a checkpoint, {_META} is missing" if path.exists() else f"{path}: not found")
    try:
        meta = json.loads((path / _META).read_text(encoding="utf-8"))
        if meta["schema"] != _SCHEMA:
            raise BadCheckpoint(f"{path}: got schema {meta['schema']}, expected {_SCHEMA}")
        for name, size in meta["files"].items():
            found = (path / name).stat().st_size
            if found != size:
                raise BadCheckpoint(f"{path}: {name} has {found} bytes, expected {size}")
        saved = FileSystemReader(path).read_metadata().state_dict_metadata
        entries = {name.removeprefix(f"{_ROOT}."): entry for name, entry in saved.items()}
    except BadCheckpoint:
        raise
    except Exception as error:  # damaged JSON and pickles can fail in any way
        raise BadCheckpoint(f"{path}: {_reason(error)}") from error
    tensors = {
        name: (entry.size, entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    return Checkpoint(path, meta, frozenset(entries), tensors)


def load(checkpoint: Checkpoint, state: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    """Fill the tensors of `state` in place and replace its other values; all ranks call it together.

    Raises:
        BadCheckpoint: on every rank, if any rank cannot read its part; some tensors may already have changed.
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
    """Return what rank `rank` writes: its shards, and an equal share, in bytes, of the replicated tensors."""
    own: dict[str, Tensor] = {}
    written = [0] * size
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].nbytes, item[0])):
        if isinstance(tensor, DTensor):
            own[name] = tensor
            continue
        least = written.index(min(written))
        written[least] += tensor.nbytes
        if least == rank:
            own[name] = tensor
    return own


def _reason(error: BaseException) -> str:
    """Return one line; if ranks failed, the reason of the first one."""
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
    """Rename, then delete: a process killed in between leaves nothing that looks like a checkpoint."""
    doomed = path.with_name(f"{_REMOVING}{path.name}")
    if doomed.exists():  # left by an earlier attempt
        shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _do_nothing() -> None:
    pass


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
