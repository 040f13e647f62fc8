"""torch.distributed.checkpoint's files, written with checksums and read without running code.

Its index, `.metadata`, is a pickle, and so are entries that are not tensors, which earlier versions of this package
wrote. Both are read here by unpicklers that admit only the types that they need.
"""

from __future__ import annotations

import io
import os
import pickle
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, ClassVar

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


# In Python, because C's version does not let opcodes be overridden.
_PythonUnpickler: Any = pickle._Unpickler


class _IndexUnpickler(_PythonUnpickler):
    """Admits the types of an index, none of which does anything when it is created."""

    dispatch: ClassVar = dict(_PythonUnpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in _ADMITTED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f"it contains {module}.{name}, and reading it could run code")

    def load_build(self) -> None:
        target = self.stack[-2]
        if isinstance(target, type) or callable(target):  # BUILD can set attributes, also those of a class
            raise pickle.UnpicklingError(f"it changes {target!r}, and reading it could run code")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


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
    for key, where in index.storage_data.items():
        if not isinstance(key, MetadataIndex) or where.transform_descriptors:
            raise ValueError(f"{INDEX}: unexpected storage of {key}")
        if not 0 <= where.offset <= where.offset + where.length <= sizes.get(where.relative_path, -1):
            raise ValueError(f"{INDEX}: {key.fqn} extends past the end of {where.relative_path}")
        stored[key.fqn] = stored.get(key.fqn, 0) + where.length
    for name, entry in index.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata | BytesStorageMetadata) or not isinstance(name, str):
            raise ValueError(f"{INDEX}: {name} is a {type(entry).__name__}, expected a tensor")
        # Memory is allocated by these sizes.
        if isinstance(entry, TensorStorageMetadata):
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
