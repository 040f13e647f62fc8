"""Random access to a packed data set."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import threading
import zlib
from pathlib import Path
from typing import Any

from scenarioclip_fast.data.remote import (
    CACHE_GIB,
    NoRanges,
    RemoteShard,
    RemoteShards,
    Store,
    default_cache_dir,
    is_url,
)
from scenarioclip_fast.data.scene import SCHEMA, Scene, scene_from_json
from scenarioclip_fast.data.vocabulary import Vocabulary
from scenarioclip_fast.errors import UserError

SPLITS = ("train", "val", "test")
_OPEN_FILES = 256  # at a time: a process may have 1024, and a large data set has more shards


class BadSample(ValueError):
    """One scene of a shard cannot be used. `reason` is a short name to count by."""

    def __init__(self, key: str, reason: str, detail: str) -> None:
        super().__init__(key, reason, detail)
        self.key, self.reason, self.detail = key, reason, detail

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}: {self.detail}"


class ShardSet:
    """The scenes of one split, in the order of the index.

    Reads are positioned (`pread`), so threads may share one ShardSet; a copy sent to another process opens
    its own files. Remote shards come by byte ranges and, as many as fit, into a cache on disk (see `remote`), which the
    first read sets going: whoever looks at the keys or the vocabulary alone fetches no shard.

    Args:
        source: what `scenarioclip-fast pack` wrote: a directory, or the URL of one ("s3://...", "https://...",
            whatever fsspec knows; "file://..." caches what lies on a slow mount).
        split: "train", "val" or "test".
        shard_cache_dir: where remote shards are cached, on a local disk; processes may share it. None:
            ~/.cache/scenarioclip-fast/shards.
        shard_cache_gib: how much of that disk they may fill; 0 caches nothing.

    Raises:
        UserError: no packed data set, one that cannot be reached, or no such split; at the first read, a cache
            directory that cannot be written.
        MissingDependencyError: fsspec, or its package for this kind of storage, is not installed.
    """

    def __init__(
        self,
        source: str | Path,
        split: str = "train",
        *,
        shard_cache_dir: str | Path | None = None,
        shard_cache_gib: float = CACHE_GIB,
    ) -> None:
        self.source, self.split = str(source), split
        if split not in SPLITS:
            raise UserError(f"split: got {split!r}, expected one of {', '.join(SPLITS)}")
        if not 0 <= shard_cache_gib < math.inf:
            raise UserError(f"shard_cache_gib: got {shard_cache_gib:g}, expected a number of at least 0")
        self.is_remote = is_url(source)
        if not self.is_remote and not Path(source).is_dir():
            problem = "is a file" if Path(source).exists() else "no such directory"
            raise UserError(
                f"{source}: {problem}; `scenarioclip-fast pack SOURCE --out DIR` makes a directory of shards"
            )
        self._cache = (Path(shard_cache_dir or default_cache_dir()), int(shard_cache_gib * 2**30))
        store = Store(self.source) if self.is_remote else None
        self.manifest = self._read_json("manifest.json", store)
        index = self._read_json("index.json", store)
        try:
            shards = [
                RemoteShard(str(shard["name"]), str(shard["sha256"]), int(shard["bytes"]))
                for shard in self.manifest["splits"][split]["shards"]
            ]
            entries = [
                (str(key), number, int(jo), int(js), int(to), int(ts))
                for number, shard in enumerate(shards)
                for key, jo, js, to, ts in index["shards"][shard.name]
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{source}: malformed index ({type(error).__name__}: {error}); pack it again") from None
        for shard in shards:
            if os.path.basename(shard.name) != shard.name:
                raise UserError(f"{self._where('manifest.json')}: a shard's name leads out of the directory")
            if len(shard.sha256) != 64 or set(shard.sha256) - set("0123456789abcdef"):  # a file's name in the cache
                raise UserError(f"{self._where('manifest.json')}: {shard.name} has no SHA-256; pack it again")
        for key, number, *members in entries:
            jo, js, to, ts = members
            if min(members) < 0 or max(jo + js, to + ts) > shards[number].size:
                raise UserError(f"{source}: malformed index: {key} lies outside of its shard; pack it again")
        self._shards, self._entries = shards, entries
        self.keys = [entry[0] for entry in entries]
        self._vocabulary: Vocabulary | None = None
        self._files: dict[int, _File] = {}
        self._fetching: RemoteShards | None = None
        self._lock = threading.Lock()
        if store is not None:
            self._check_ranges(store)

    def __len__(self) -> int:
        return len(self._entries)

    @functools.cached_property
    def digest(self) -> int:
        """Of the keys in their order: shards that differ in it hold other scenes."""
        return functools.reduce(lambda crc, key: zlib.crc32(key.encode(), crc), self.keys, 0)

    @property
    def vocabulary(self) -> Vocabulary:
        if self._vocabulary is None:
            name = "vocabulary.json"
            record = self._read_json(name, Store(self.source) if self.is_remote else None)
            self._vocabulary = Vocabulary.from_json(record, self._where(name))
        return self._vocabulary

    def read(self, i: int) -> Scene:
        """Scene `i`: `image` holds the JPEG's bytes, masks are RLE. BadSample if it is not there whole."""
        key, shard, jpg_offset, jpg_size, json_offset, json_size = self._entries[i]
        try:
            file = self._open(shard)
            if file is not None:
                image, record = file.read(jpg_offset, jpg_size), file.read(json_offset, json_size)
            else:  # in one request: `pack` writes them side by side
                start = min(jpg_offset, json_offset)
                data = self._remote().read(shard, start, max(jpg_offset + jpg_size, json_offset + json_size))
                image, record = (
                    data[at - start : at - start + size]
                    for at, size in ((jpg_offset, jpg_size), (json_offset, json_size))
                )
        except OSError as error:
            name = self._shards[shard].name
            raise BadSample(key, "unreadable_shard", f"{name}: {error.strerror or error}") from error
        for member, offset, size in ((image, jpg_offset, jpg_size), (record, json_offset, json_size)):
            if len(member) != size:
                name = self._shards[shard].name
                raise BadSample(key, "short_shard", f"{name}: got {len(member)} of {size} bytes at {offset}")
        try:
            scene = scene_from_json(key, image, json.loads(record))
        except ValueError as error:
            raise BadSample(key, "bad_json", str(error)) from error
        scene.split = self.split
        return scene

    def close(self) -> None:
        """Closes the shard files and ends what waits for remote ones; the next read opens them again."""
        with self._lock:
            fetching = self._fetching
            self._files, self._fetching = {}, None
        if fetching is not None:
            fetching.close()

    def _open(self, shard: int) -> _File | None:
        """The shard's file, None while it is not on this machine."""
        with self._lock:
            if (file := self._files.get(shard)) is not None:
                return file
        path = self._remote().path(shard) if self.is_remote else Path(self.source, self._shards[shard].name)
        try:
            file = _File(path)
        except FileNotFoundError:
            if self.is_remote:
                return None
            raise
        with self._lock:
            if shard not in self._files:
                if len(self._files) >= _OPEN_FILES:
                    del self._files[next(iter(self._files))]
                self._files[shard] = file
            return self._files[shard]

    def _check_ranges(self, store: Store) -> None:
        try:
            store.read("manifest.json", 0, 1)
        except NoRanges as error:
            raise UserError(
                f"{self.source}: this server ignores byte ranges ({error}), without which single scenes cannot be "
                "read; use another server, or copy the shards to a disk"
            ) from None
        except OSError as error:
            raise UserError(f"{self.source}: not readable ({error})") from None

    def _remote(self) -> RemoteShards:
        with self._lock:
            if self._fetching is None:
                self._fetching = RemoteShards(Store(self.source), self._shards, *self._cache)
            return self._fetching

    def _where(self, name: str) -> str:
        return f"{self.source.rstrip('/')}/{name}"

    def _read_file(self, name: str, store: Store | None) -> bytes:
        """A small file whole, checked against the manifest where it came from afar."""
        try:
            if store is None:
                return Path(self.source, name).read_bytes()
            data = store.read(name)
        except FileNotFoundError:
            raise UserError(
                f"{self._where(name)}: no such file; is this what `scenarioclip-fast pack` wrote?"
            ) from None
        except OSError as error:
            raise UserError(f"{self._where(name)}: not readable ({error.strerror or error})") from None
        if name != "manifest.json" and hashlib.sha256(data).hexdigest() != self.manifest.get("sha256", {}).get(name):
            raise UserError(f"{self._where(name)}: its checksum is not the manifest's; copy the data set there again")
        return data

    def _read_json(self, name: str, store: Store | None) -> dict[str, Any]:
        try:
            record = json.loads(self._read_file(name, store))
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{self._where(name)}: not readable as JSON ({error}); pack the data set again") from None
        got = record.get("schema") if isinstance(record, dict) else type(record).__name__
        if got != SCHEMA:
            raise UserError(f"{self._where(name)}: got schema {got!r}, expected {SCHEMA}; pack the data set again")
        return dict(record)

    def __del__(self) -> None:
        if hasattr(self, "_lock"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_files", "_fetching", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._files, self._fetching, self._lock = {}, None, threading.Lock()


class _File:
    """An open shard. Closed when nobody holds it any more: neither the ShardSet nor a thread that reads."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._size = os.fstat(self._descriptor).st_size

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._descriptor, min(size, max(0, self._size - offset)), offset)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)
