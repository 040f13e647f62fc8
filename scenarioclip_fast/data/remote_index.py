"""An index on a server, of which only the parts in use are fetched."""

from __future__ import annotations

import mmap
import os
import threading
import zlib
from collections import OrderedDict
from pathlib import Path

from scenarioclip_fast.data.index import NAME
from scenarioclip_fast.data.remote import Store
from scenarioclip_fast.data.shard_cache import ShardCache
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.terminal import get_logger

_KEPT = 1024  # parts in memory where they cannot be cached on disk, 45 MB of an index of shards of 1,000 scenes

_log = get_logger(__name__)


class CachedIndex:
    """Reads an index by byte ranges into a sparse file of the shard cache, which the processes of a host share.

    Every part has a checksum, by which a process recognises what others have fetched. If the cache is disabled or its
    disk is full, the parts last used are kept in memory.

    Args:
        store: of the data set.
        digest, size: SHA-256 in hex and size in bytes of the index, by the manifest.
        directory, limit: of the cache, see `ShardCache`.
    """

    def __init__(self, store: Store, digest: str, size: int, directory: Path, limit: int) -> None:
        if not 0 < size < 1 << 48:
            raise ValueError(f"got {size} bytes")
        self.size = size
        self._store = store
        self._lock = threading.Lock()
        self._known: set[int] = set()  # where the parts start that have been compared with their checksum
        self._memory: OrderedDict[int, bytes] = OrderedDict()
        self._digest, self._directory, self._limit = digest, directory, limit
        self._is_open = False
        self._cache: ShardCache | None = None
        self._file: int | None = None
        self._map = memoryview(b"")

    def _open(self) -> None:
        """Open the cache before its first use, so that opening a data set writes nothing."""
        with self._lock:
            if self._is_open or self.size > self._limit:
                return
            self._is_open = True
            self._cache = ShardCache(self._directory, self._limit)
            try:
                self._file = self._cache.open_index(self._digest, self.size)
                self._map = memoryview(mmap.mmap(self._file, self.size, access=mmap.ACCESS_READ))
            except OSError as error:
                self._give_up(error)

    def read(self, start: int, stop: int, crc: int | None) -> memoryview:
        """Return the bytes from `start` to `stop`, from the cache if their CRC-32 is given.

        Raises:
            UserError: they cannot be read or have another CRC-32, or the cache is not writable.
        """
        if crc is not None:
            self._open()
            if (cached := self._cached(start, stop, crc)) is not None:
                return cached
        try:
            data = self._store.read(NAME, start, stop)
        except OSError as error:
            raise UserError(f"{self._store.where(NAME)}: not readable ({error.strerror or error})") from error
        if len(data) != stop - start:
            got = f"got {len(data)} of {stop - start} bytes at {start}"
            raise UserError(f"{self._store.where(NAME)}: damaged index: {got}; copy the data set again")
        if crc is None:
            return memoryview(data)
        if zlib.crc32(data) != crc:  # of the first read or of a later one: the caller checks a part once
            what = f"the {len(data)} bytes at {start} have another checksum"
            raise UserError(f"{self._store.where(NAME)}: damaged index: {what}; copy the data set again")
        with self._lock:
            if self._file is not None:
                try:
                    written = 0
                    while written < len(data):
                        written += os.pwrite(self._file, data[written:], start + written)
                    self._known.add(start)
                    return self._map[start:stop]
                except OSError as error:
                    self._give_up(error)
            self._memory[start] = data
            while len(self._memory) > _KEPT:
                self._memory.popitem(last=False)
        return memoryview(data)

    def _cached(self, start: int, stop: int, crc: int) -> memoryview | None:
        with self._lock:
            if (data := self._memory.get(start)) is not None:
                self._memory.move_to_end(start)
                return memoryview(data)
            if self._file is None:
                return None
            if start not in self._known:
                # Not through the map: to read what has not been written yet would allocate a page, and end the process
                # if a file system in memory is full.
                if zlib.crc32(os.pread(self._file, stop - start, start)) != crc:
                    return None
                self._known.add(start)
            return self._map[start:stop]

    def _give_up(self, error: OSError) -> None:
        self._close_file()
        _log.warning("%s: an index cannot be cached: %s", self._directory, error.strerror)

    def _close_file(self) -> None:
        file, self._file = self._file, None
        if file is not None and self._cache is not None:
            self._cache.close_index(file)

    def close(self) -> None:
        """Stop waiting reads, and release the cache."""
        self._store.close()
        with self._lock:
            self._close_file()
        if self._cache is not None:
            self._cache.close()
