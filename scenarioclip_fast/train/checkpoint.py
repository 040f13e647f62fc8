"""Checkpoints on disk: written atomically, pruned to the newest and the best, checked for damage when read.

torch.distributed.checkpoint writes them in a thread, from copies in host memory, while training continues; each rank
writes its share. Rank 0 renames the temporary directory once all shares are on disk.

meta.json contains the size and the checksums of every other file, and a checksum of itself. All of them are verified
before anything is loaded.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.tensor import DTensor

from scenarioclip_fast.checksums import PIECE, piece_digest
from scenarioclip_fast.files import Directory, read_regular
from scenarioclip_fast.parsing import parse_json
from scenarioclip_fast.train.checkpoint_files import INDEX, Planner, Reader, Writer, read_index

_NAME = re.compile(r"step-(\d{8,})")
_WRITING, _REMOVING = ".writing-", ".removing-"
_META = "meta.json"  # next to .metadata, torch's own index
_SCHEMA = 3  # 2 has no checksums
_FILES = re.compile(r"__\d+_\d+\.distcp|\.metadata(\.tmp)?|meta\.json|\.nfs[0-9a-f]+")
_THREADS = 4  # that compute checksums, on each rank
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
    sizes: file name -> bytes;  digests: file name -> SHA-256 of its pieces; empty if saved by an earlier version
    """

    path: Path
    meta: dict[str, Any]
    names: frozenset[str]
    tensors: dict[str, TensorEntry]
    sizes: dict[str, int]
    digests: dict[str, list[str]]


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
                _delete(path)

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
            state: name -> tensor or text. Each rank writes its shards of a DTensor; anything else is written by the
                rank that passes it, see `share`.
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
        # Text as bytes in a tensor: anything but a tensor would be pickled.
        tensors = {name: _encode(value) if isinstance(value, str) else value for name, value in state.items()}
        future = async_save(
            {_ROOT: tensors},
            storage_writer=Writer(temporary, publish),
            process_group=self.group,
            async_stager=self._stager,
            no_dist=self.group is None,
        )
        assert isinstance(future, Future)
        is_main_process = self.group is None or self.group.rank() == 0
        clean_up = partial(_delete, temporary) if is_main_process else _do_nothing
        return PendingSave(step, future, clean_up)

    def _publish(self, temporary: Path, final: Path, meta: dict[str, Any], digests: Mapping[str, list[str]]) -> None:
        """Runs on rank 0 once every rank's share is on disk, so that readers never see a partial checkpoint."""
        files = {}
        for path in sorted(temporary.iterdir()):
            size = path.stat().st_size
            found = digests.get(path.name) or [piece_digest(path, i) for i in range(_pieces(size))]
            files[path.name] = {"bytes": size, "sha256": found}
        record = {**meta, "files": files}
        with open(temporary / _META, "w", encoding="utf-8") as file:
            json.dump({**record, "sha256": _digest_of(record)}, file, indent=1)
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


def examine(path: Path) -> Checkpoint:
    """Read and verify a checkpoint's metadata, and check that its files are complete; raise BadCheckpoint otherwise."""
    if not (path / _META).is_file():
        raise BadCheckpoint(f"{path}: not a checkpoint, {_META} is missing" if path.exists() else f"{path}: not found")
    try:
        meta = _read_meta(path)
        files = meta["files"]
        sizes = {name: found if meta["schema"] == 2 else found["bytes"] for name, found in files.items()}
        digests = {} if meta["schema"] == 2 else {name: found["sha256"] for name, found in files.items()}
        for name, size in sizes.items():
            if not _FILES.fullmatch(name):
                raise BadCheckpoint(f"{path}: {name!r} is not the name of a checkpoint's file")
            found = (path / name).stat()
            if not stat.S_ISREG(found.st_mode) or found.st_size != size:
                got = f"{found.st_size} bytes" if stat.S_ISREG(found.st_mode) else "something other than a file"
                raise BadCheckpoint(f"{path}: {name}: got {got}, expected {size} bytes")
        if digests and (problem := _damage(path, [(INDEX, i) for i in range(_pieces(sizes[INDEX]))], digests)):
            raise BadCheckpoint(problem)
        saved = read_index(path / INDEX, sizes).state_dict_metadata
        entries = {name.removeprefix(f"{_ROOT}."): entry for name, entry in saved.items()}
        tensors = {
            name: (entry.size, entry.properties.dtype)
            for name, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata)
        }
    except BadCheckpoint:
        raise
    except Exception as error:  # damaged JSON and pickles can fail in any way
        raise BadCheckpoint(f"{path}: {_reason(error)}") from error
    return Checkpoint(path, meta, frozenset(entries), tensors, sizes, digests)


def load(checkpoint: Checkpoint, state: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    """Verify a checkpoint, fill the tensors of `state` in place and replace its texts; all ranks call it together.

    Raises:
        BadCheckpoint: on every rank, if a file is damaged or any rank cannot read its part. `state` is unchanged in the
            first case; in the second, which files without checksums make possible, some tensors may have changed.
    """
    verify(checkpoint, group)
    texts = [name for name, value in state.items() if isinstance(value, str) and name in checkpoint.tensors]
    encoded = {name: torch.zeros(checkpoint.tensors[name][0], dtype=torch.uint8) for name in texts}
    tree = {_ROOT: state | encoded}
    try:
        load_distributed(
            tree,
            storage_reader=Reader(checkpoint.path, checkpoint.sizes),
            planner=Planner(),
            process_group=group,
            no_dist=group is None,
        )
        loaded = tree[_ROOT]
        state.update(loaded | {name: loaded[name].numpy().tobytes().decode() for name in texts})
    except (CheckpointException, UnicodeDecodeError) as error:
        raise BadCheckpoint(f"{checkpoint.path}: {_reason(error)}") from error


def verify(checkpoint: Checkpoint, group: dist.ProcessGroup | None) -> None:
    """Compare all files with their checksums; all ranks call it together, and each reads its share of the pieces.

    Raises:
        BadCheckpoint: on every rank, if a file is damaged. A checkpoint without checksums is not verified.
    """
    if not checkpoint.digests:
        return
    rank, ranks = (0, 1) if group is None else (group.rank(), group.size())
    pieces = [(name, i) for name, size in sorted(checkpoint.sizes.items()) for i in range(_pieces(size))]
    problems = [_damage(checkpoint.path, pieces[rank::ranks], checkpoint.digests)]
    if group is not None:
        found: list[str | None] = [None] * ranks
        dist.all_gather_object(found, problems[0], group=group)
        problems = found
    if problem := next(filter(None, problems), None):
        raise BadCheckpoint(problem)


def _damage(path: Path, pieces: Iterable[tuple[str, int]], digests: Mapping[str, list[str]]) -> str | None:
    """The first of the pieces that differs from its checksum."""

    def check(piece: tuple[str, int]) -> str | None:
        name, i = piece
        try:
            good = piece_digest(path / name, i) == digests[name][i]
        except (OSError, LookupError) as error:
            return f"{path}: {name}: {_reason(error)}"
        start = f", from byte {i * PIECE} on" if i else ""
        return None if good else f"{path}: {name}{start}: damaged, its SHA-256 differs from the one in {_META}"

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), "verify") as pool:
        return next(filter(None, pool.map(check, pieces)), None)


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


def _read_meta(path: Path) -> dict[str, Any]:
    """Read meta.json. Raises BadCheckpoint if it is damaged or of another schema, or any error if malformed."""
    try:
        record: dict[str, Any] = parse_json(read_regular(path / _META), strict=False)
    except ValueError as error:
        raise BadCheckpoint(f"{path}: {_META}: damaged, not readable as JSON ({error})") from None
    schema, digest = record["schema"], record.pop("sha256", None)
    if schema == _SCHEMA if digest is None else digest != _digest_of(record):
        raise BadCheckpoint(f"{path}: {_META}: damaged, its contents differ from its checksum")
    if schema != (2 if digest is None else _SCHEMA):
        raise BadCheckpoint(f"{path}: got schema {schema}, expected {_SCHEMA}, or 2 of an earlier version")
    return record


def _digest_of(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _pieces(size: int) -> int:
    return max(1, -(-size // PIECE))


def _encode(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(text.encode(), np.uint8).copy())


def _loss(path: Path) -> float:
    try:
        return float(_read_meta(path)["loss"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return float("inf")


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _remove(path: Path) -> None:
    """Rename, then delete: a process killed in between leaves nothing that looks like a checkpoint."""
    doomed = path.with_name(f"{_REMOVING}{path.name}")
    for i in itertools.count(1):
        _delete(doomed)  # left by an earlier attempt
        if not os.path.lexists(doomed):
            break
        doomed = path.with_name(f"{_REMOVING}{path.name}-{i}")
    os.rename(path, doomed)
    _delete(doomed)


def _delete(path: Path) -> None:
    """Delete the files of a checkpoint, and its directory if nothing else is in it; failing to do so is harmless.

    Of a link, only the link is deleted.
    """
    with suppress(OSError):
        if path.is_symlink():
            path.unlink()
            return
        with Directory(path) as directory:
            for name in filter(_FILES.fullmatch, directory.names()):
                directory.unlink(name)
        path.rmdir()


def _do_nothing() -> None:
    pass


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
