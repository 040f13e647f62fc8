"""torch.distributed.checkpoint's files, written with checksums and read without running code.

Its index, `.metadata`, is a pickle, and so are entries that are not tensors, which earlier versions of this package
wrote. Both are read here by unpicklers that admit only the types that they need.
"""

from __future__ import annotations

import errno
import io
import os
import pickle
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from math import prod
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult

from scenarioclip_fast.checksums import PieceHash
from scenarioclip_fast.files import check_expansion

INDEX = ".metadata"
_DCP = "torch.distributed.checkpoint"
_ADMITTED = {
    f"{_DCP}.metadata.{name}"
    for name in (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    f"{_DCP}.filesystem._StorageInfo",
    "torch.Size",
    "torch.serialization._get_layout",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",  # Python 3.13
}


# Opcodes of an index. The others could call what is on the stack or allocate what a length claims.
_OPCODES = [
    getattr(pickle, name)[0]
    for name in (
        "APPEND", "APPENDS", "BINGET", "BININT", "BININT1", "BININT2", "BINPUT", "BINUNICODE", "BUILD", "EMPTY_DICT",
        "EMPTY_LIST", "EMPTY_TUPLE", "FRAME", "GLOBAL", "INT", "LONG1", "LONG_BINGET", "LONG_BINPUT", "MARK", "MEMOIZE",
        "NEWFALSE", "NEWOBJ", "NEWTRUE", "NONE", "PROTO", "REDUCE", "SETITEM", "SETITEMS", "SHORT_BINUNICODE",
        "STACK_GLOBAL", "STOP", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "UNICODE",
    )
]  # fmt: skip

# In Python, because C's version does not let opcodes be overridden.
_PythonUnpickler: Any = pickle._Unpickler


def _is_plain(value: Any) -> bool:
    """Whether a value is a text, a number or numbers: hashing deeply nested tuples overflows C's stack."""
    if isinstance(value, tuple):
        return all(isinstance(number, int) for number in value)
    return value is None or isinstance(value, str | int)


def _is_key(key: Any) -> bool:
    if isinstance(key, MetadataIndex):
        return isinstance(key.fqn, str) and isinstance(key.offset, torch.Size | None)
    return isinstance(key, str)


class _IndexUnpickler(_PythonUnpickler):
    """Admits the types of an index, none of which does anything when it is created."""

    dispatch: ClassVar[dict[int, Any]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in _ADMITTED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f"it contains {module}.{name}, and reading it could run code")

    def refuse(self) -> None:
        raise pickle.UnpicklingError("it contains an opcode that an index does not have, and could run code")

    def load_build(self) -> None:
        target, state = self.stack[-2:]
        # BUILD can also set attributes of classes, functions and members of enumerations, and special methods.
        if isinstance(target, type) or not is_dataclass(target):
            raise pickle.UnpicklingError(f"it changes {type(target).__name__}, and reading it could run code")
        unpacked = isinstance(state, dict) and state.keys() <= {f.name for f in fields(target)}
        if not (unpacked or hasattr(type(target), "__setstate__")):
            raise pickle.UnpicklingError(f"it contains a malformed {type(target).__name__}")
        super().load_build()

    def load_reduce(self) -> None:
        self._check_arguments()
        super().load_reduce()

    def load_newobj(self) -> None:
        self._check_arguments()
        super().load_newobj()

    def _check_arguments(self) -> None:
        if not (isinstance(self.stack[-1], tuple) and all(map(_is_plain, self.stack[-1]))):
            raise pickle.UnpicklingError(f"it creates {self.stack[-2]!r} from unexpected arguments")

    def load_setitem(self) -> None:
        self._check_keys([self.stack[-2]])
        super().load_setitem()

    def load_setitems(self) -> None:
        self._check_keys(self.stack[::2])
        super().load_setitems()

    def _check_keys(self, keys: list[Any]) -> None:
        if not all(map(_is_key, keys)):
            raise pickle.UnpicklingError("it contains unexpected keys")

    dispatch |= dict.fromkeys(_PythonUnpickler.dispatch, refuse)
    dispatch |= {code: _PythonUnpickler.dispatch[code] for code in _OPCODES}
    dispatch |= {pickle.BUILD[0]: load_build, pickle.REDUCE[0]: load_reduce, pickle.NEWOBJ[0]: load_newobj}
    dispatch |= {pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems}


def read_index(path: Path, sizes: dict[str, int]) -> Metadata:
    """Read and check an index.

    Args:
        sizes: file name -> bytes of the checkpoint's files.

    Raises:
        pickle.UnpicklingError: it contains other types than those of an index.
        Exception: it is damaged in any other way.
    """
    index = _IndexUnpickler(io.BytesIO(path.read_bytes())).load()
    if not isinstance(index, Metadata):
        raise ValueError(f"{INDEX} is a {type(index).__name__}, expected {Metadata.__name__}")
    stored: dict[str, int] = {}  # bytes of each entry
    left = dict(sizes)
    for key, where in index.storage_data.items():
        if not isinstance(key, MetadataIndex) or not _is_key(key) or where.transform_descriptors:
            raise ValueError(f"{INDEX}: unexpected storage of {type(key).__name__}")
        if not all(map(_is_plain, (where.relative_path, where.offset, where.length))):
            raise ValueError(f"{INDEX}: unexpected storage of {key.fqn}")
        if not 0 <= where.offset <= where.offset + where.length <= sizes.get(where.relative_path, -1):
            raise ValueError(f"{INDEX}: {key.fqn} extends past the end of {where.relative_path}")
        stored[key.fqn] = stored.get(key.fqn, 0) + where.length
        left[where.relative_path] -= where.length
    if min(left.values(), default=0) < 0:  # many entries in the same bytes could claim any amount of memory
        raise ValueError(f"{INDEX}: entries overlap")
    for name, entry in index.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata | BytesStorageMetadata) or not isinstance(name, str):
            raise ValueError(f"{INDEX}: {name} is a {type(entry).__name__}, expected a tensor")
        # Memory is allocated by these sizes.
        if isinstance(entry, TensorStorageMetadata):
            if not (isinstance(entry.size, torch.Size) and isinstance(entry.properties.dtype, torch.dtype)):
                raise ValueError(f"{INDEX}: {name}: unexpected size or dtype")
            size = prod(entry.size) * entry.properties.dtype.itemsize
            if min(entry.size, default=0) < 0 or size > stored.get(name, 0):
                raise ValueError(f"{INDEX}: {name} of {list(entry.size)} has only {stored.get(name, 0)} bytes on disk")
    return index


class Reader(FileSystemReader):
    """Reads the index with `read_index`."""

    def __init__(self, path: Path, sizes: dict[str, int]) -> None:
        super().__init__(path)
        self._sizes = sizes

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        index = read_index(Path(self.path) / INDEX, self._sizes)
        index.storage_meta = StorageMeta(load_id=self.load_id)
        return index

    def _slice_file(self, file: Any, sinfo: Any) -> Any:
        check_expansion(_Part(file, sinfo.offset, sinfo.length))
        return super()._slice_file(file, sinfo)


class _Part(io.RawIOBase):
    """Bytes of an open file, as a file; torch's own view of an entry cannot seek from the end."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = (0, self._at, self._size)[whence] + offset
        if at < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._at = at
        return at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        data = self._file.read(max(0, min(len(buffer), self._size - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class Planner(DefaultLoadPlanner):
    """Reads entries that are not tensors without running code: they are text, of earlier versions."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        *parents, last = self.mappings[read_item.dest_index.fqn]
        target: Any = self.original_state_dict
        for parent in parents:
            target = target[parent]
        target[last] = torch.load(value, weights_only=True)


@dataclass(frozen=True)
class _Written(WriteResult):
    """Carries the checksums of a rank's files to rank 0, along with the result of one of its entries."""

    digests: dict[str, list[str]] = field(default_factory=dict)


class Writer(FileSystemWriter):
    """Computes checksums while it writes, and calls `publish` once all ranks' files and the index are written.

    Args:
        publish: called on rank 0 with the checksums of the pieces of each file; the index has none.
    """

    def __init__(self, path: Path, publish: Callable[[dict[str, list[str]]], None]) -> None:
        super().__init__(path)
        self._publish = publish
        self.fs = self._files = _HashingFileSystem()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        try:
            results = super().write_data(plan, planner).wait()
        except Exception as error:
            failure: Exception = error
            cause = error.__context__  # torch's archive writer reports file positions; the context is the OS error
            if isinstance(error, RuntimeError) and isinstance(cause, OSError):
                failure = OSError(cause.errno, cause.strerror)
            # The frames hold views of io.BytesIO in cycles, on which the garbage collector of Python 3.12.1 crashes.
            for part in (error, cause):
                if part is not None:
                    traceback.clear_frames(part.__traceback__)
        else:
            if results:
                first = results[0]
                results[0] = _Written(first.index, first.size_in_bytes, first.storage_data, self._files.digests)
            future: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
            future.set_result(results)
            return future
        raise failure

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        missing = {r.storage_data.relative_path for rank in results for r in rank} - set(os.listdir(self.path))
        if missing:
            raise FileNotFoundError(
                f"{', '.join(sorted(missing))} of other ranks missing in {self.path}: expected run.dir on a file "
                "system shared by all hosts"
            )
        super().finish(metadata, results)
        digests = {
            name: found
            for rank in results
            for r in rank
            if isinstance(r, _Written)
            for name, found in r.digests.items()
        }
        self._publish(digests)


class _HashingFileSystem(FileSystem):
    """Hashes the files that are written: what left the process, and not what the disk returned."""

    def __init__(self) -> None:
        self.digests: dict[str, list[str]] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            if mode != "wb":
                yield stream
                return
            hashing = _HashingStream(stream)
            yield hashing
            self.digests[Path(path).name] = hashing.digest.digests()


class _HashingStream:
    """A file that is only appended to."""

    def __init__(self, file: Any) -> None:
        self.digest = PieceHash()
        self._write = file.write
        self.flush, self.tell, self.fileno, self.close = file.flush, file.tell, file.fileno, file.close

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return int(self._write(data))
