"""Read packed data sets from object storage or a server: a bounded disk cache of whole shards, and byte ranges.

A global shuffle touches every shard in every batch. Waiting for whole shards would stall the first epoch, and a cache
smaller than the data set that replaced shards on access would fetch a thousand scenes to use one. Hence:

- a scene whose shard is not cached is read with one byte-range request;
- meanwhile, threads fetch whole shards as long as there is room, and a loader keeps them: under a uniform shuffle, each
  shard is equally likely to be needed next;
- shards that no live process uses are evicted to make room, least recently used first.

Each scene is thus transferred at most twice in the first epoch; later epochs fetch only what does not fit in the cache.
"""

from __future__ import annotations

import atexit
import errno
import hashlib
import os
import queue
import random
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from scenarioclip_fast import forks
from scenarioclip_fast.data.shard_cache import ShardCache, verified_time
from scenarioclip_fast.errors import MissingDependencyError, UserError
from scenarioclip_fast.requirements import require
from scenarioclip_fast.terminal import get_logger

T = TypeVar("T")

CACHE_GIB = 32.0

_RETRY_FAILED_S = 60.0  # wait before requesting a file again after all attempts failed
_CHUNK = 8 << 20  # bytes per request of a shard; lost if the connection breaks
_FETCHERS = 4  # shards fetched concurrently
_POLL_S = 2.0  # polling interval for a shard that another process fetches

_log = get_logger(__name__)


class Closed(RuntimeError):
    """The store was closed while a read was waiting."""


class NoRanges(OSError):
    """The server ignores byte ranges."""


# Errors that are not retried.
_PERMANENT = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    NoRanges,
    MemoryError,
    ImportError,
    Closed,
)


def open_url(url: str) -> tuple[Any, str]:
    """The file system of fsspec for a URL, and the path of the URL in it.

    Raises:
        UserError: fsspec does not support the protocol.
        MissingDependencyError: fsspec, or its package for this protocol, is not installed.
    """
    scheme, separator, rest = url.partition("://")
    try:
        fs, path = require("fsspec").core.url_to_fs(f"{scheme.lower()}{separator}{rest}")
    except MissingDependencyError:
        raise
    except ImportError as error:
        raise MissingDependencyError(
            f"{without_query(url)}: this kind of storage requires another package: {error}"
        ) from error
    except (ValueError, OSError) as error:  # OSError: of an archive, which is opened already
        raise UserError(f"{without_query(url)}: not a URL that fsspec can open ({error})") from None
    return fs, path


def without_query(url: str) -> str:
    """A URL without the query of http:// and https://, which may hold a signature that messages must not show."""
    return url.partition("?")[0] if url.lower().startswith(("http://", "https://")) else url


def protocols_of(fs: Any) -> set[str]:
    """The names of a file system's protocol: {"s3", "s3a"}."""
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)


def is_server(fs: Any) -> bool:
    """Whether a file system is that of http:// and https://, which cannot list files."""
    return "http" in protocols_of(fs)


class Store:
    """Reads files below a URL. Reads never hang: each attempt has a timeout, and transient failures are retried.

    Args:
        url: URL of a directory, with any protocol that fsspec supports.

    Raises:
        UserError: fsspec does not support the protocol.
        MissingDependencyError: fsspec, or its package for this protocol, is not installed.
    """

    timeout = 30.0  # seconds per attempt
    pause = 0.5  # seconds before the second attempt; doubles after each further one
    attempts = 4

    def __init__(self, url: str) -> None:
        self.url = url
        self._fs, self._root = open_url(url)
        self._closed = threading.Event()
        self._origin = forks.Origin()
        self._retry_at: dict[str, float] = {}  # failed file -> earliest time of the next attempt
        self._failing = False  # no read has succeeded since the last one failed

    def where(self, name: str) -> str:
        """The URL of a file."""
        return f"{self.url.rstrip('/')}/{name}"

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Read the bytes [start, end) of a file, fewer at its end; by default the whole file.

        Raises:
            OSError: the file does not exist, or every attempt failed. Such a file is not requested again for a minute,
                and until a read succeeds, every other file gets a single attempt, so that reads fail fast.
        """
        short: int | None = None

        def once() -> bytes:
            nonlocal short
            data = self._read_once(name, start, end)
            if start is not None and end is not None and len(data) != end - start:
                if len(data) > end - start:
                    raise NoRanges(f"got {len(data)} bytes for a range of {end - start}")
                if len(data) != short:  # twice the same size: the end of the file
                    short = len(data)
                    raise OSError(f"got {len(data)} of {end - start} bytes")
            return data

        return self._attempt(name, once)

    def info(self, name: str) -> dict[str, Any]:
        """What the storage says of a file now: "type", "size", and its ETag or times, whose names differ.

        Raises:
            OSError: as `read`.
        """
        return self._attempt(name, lambda: self._info_once(name))

    def _attempt(self, name: str, once: Callable[[], T]) -> T:
        """Call `once` for a file, with pauses between the attempts if it fails."""
        self._origin.check(f"the connection to {self.url}", "open it again")  # as fsspec would, after some attempts
        if time.monotonic() < self._retry_at.get(name, 0):
            raise OSError(f"not reachable; the next attempt is at most {_RETRY_FAILED_S:g} s away")
        attempts = 1 if self._failing else self.attempts
        failure: Exception | None = None
        for attempt in range(attempts):
            if attempt and self._closed.wait(self.pause * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)):
                break
            try:
                result = once()
            except _PERMANENT:
                raise
            except Exception as error:  # each storage library has its own exceptions
                failure = error
                continue
            self._failing = False
            self._retry_at.pop(name, None)
            return result
        if self._closed.is_set():
            raise Closed(self.url)
        self._failing = True
        self._retry_at[name] = time.monotonic() + _RETRY_FAILED_S
        tried = f"{attempts} attempts" if attempts > 1 else "one attempt"
        raise OSError(f"not reachable in {tried}: {type(failure).__name__}: {failure}") from failure

    def _info_once(self, name: str) -> dict[str, Any]:
        self._fs.invalidate_cache()  # of listings
        try:
            return dict(self._with_timeout(lambda: self._fs.info(self._at(name))))
        except FileNotFoundError as error:  # of a server, fsspec says so whatever the failure
            cause = error.__cause__ if is_server(self._fs) else None
            if isinstance(cause, Exception) and getattr(cause, "status", None) not in (404, 410):
                raise cause from None
            raise

    def _at(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _read_once(self, name: str, start: int | None, end: int | None) -> bytes:
        try:
            # By keyword: the second parameter of s3fs is a version.
            return self._with_timeout(lambda: bytes(self._fs.cat_file(self._at(name), start=start, end=end)))
        except FileNotFoundError as error:  # fsspec's message is the path
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from error
        except Exception as error:
            if getattr(error, "status", None) == 416:  # the range starts after the end of the file
                return b""
            raise

    def _with_timeout(self, call: Callable[[], T]) -> T:
        """Run `call` in a thread that is abandoned on timeout, since not every storage library has timeouts."""
        outcome: queue.SimpleQueue[T | BaseException] = queue.SimpleQueue()

        def run() -> None:
            try:
                outcome.put(call())
            except BaseException as error:
                outcome.put(error)

        threading.Thread(target=run, name="fetch", daemon=True).start()
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                result = outcome.get(timeout=max(0.0, min(0.2, deadline - time.monotonic())))
                break
            except queue.Empty:
                if self._closed.is_set():
                    raise Closed(self.url) from None
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"no answer within {self.timeout:g} s") from None
        if isinstance(result, BaseException):
            raise result
        return result

    def close(self) -> None:
        """Make waiting reads raise `Closed`."""
        self._closed.set()


@dataclass(frozen=True)
class RemoteShard:
    """A shard, or another file, as listed in the manifest; `size` in bytes."""

    name: str
    sha256: str
    size: int


def _copy(store: Store, file: RemoteShard, descriptor: int) -> str:
    """Download a file, and return the SHA-256 of the received bytes."""
    digest = hashlib.sha256()
    for start in range(0, file.size, _CHUNK):
        data = store.read(file.name, start, min(start + _CHUNK, file.size))
        os.pwrite(descriptor, data, start)
        digest.update(data)
    return digest.hexdigest()


def read_large(store: Store, file: RemoteShard) -> bytes:
    """Read a file of any size, or what there is of it; raises OSError."""
    data = bytearray()
    while len(data) < file.size:
        end = min(len(data) + _CHUNK, file.size)
        data += store.read(file.name, len(data), end)
        if len(data) < end:
            break
    return bytes(data)


def download(store: Store, name: str, size: int, descriptor: int) -> None:
    """Copy a file of `size` bytes to an open one, a few ranges at a time.

    Raises:
        OSError: it cannot be read or written.
        EOFError: it is shorter.
    """

    def copy(start: int) -> None:
        end = min(start + _CHUNK, size)
        data = store.read(name, start, end)
        if len(data) != end - start:
            raise EOFError(f"got {start + len(data)} of {size} bytes")
        while data:
            written = os.pwrite(descriptor, data, start)
            start, data = start + written, data[written:]

    if size:
        copy(0)  # alone: a server without ranges sends the whole file
    with ThreadPoolExecutor(_FETCHERS, "fetch") as pool:
        for _ in pool.map(copy, range(_CHUNK, size, _CHUNK)):
            pass


def fetch(store: Store, file: RemoteShard, directory: Path, limit: int) -> ShardCache | None:
    """Fetch a file into the cache of shards, unless it is there or another process fetches it.

    Returns:
        The cache, whose `close` gives the file up to eviction; None: there is no room for it, or it cannot be written,
        which is logged, or its SHA-256 is not the expected one.

    Raises:
        OSError: the file cannot be read.
        UserError: the directory is not writable, was removed meanwhile, or has a directory in place of the file.
    """
    if file.size > limit:
        return None
    cache = ShardCache(directory, limit)
    try:
        while True:
            try:
                verified = cache.claim({file.sha256: file.size}).get(file.sha256)
                if verified or (verified is not None and cache.verify(file.sha256) is not None):
                    return cache
                descriptor = cache.reserve(file.sha256, file.size)
                break
            except BlockingIOError:  # another process is fetching or hashing it
                time.sleep(_POLL_S / 10)
            except FileNotFoundError:  # another process has removed it as damaged
                if not directory.is_dir():
                    raise UserError(
                        f"{directory}: the shard cache was removed while it was in use; try again"
                    ) from None
            except IsADirectoryError as error:
                raise UserError(
                    f"{error.filename}: got a directory, expected a cached file, or none; remove it"
                ) from None
        if descriptor is not None and _fill(cache, store, file, descriptor):
            return cache
    except BaseException:
        cache.close()
        raise
    cache.close()
    return None


def _fill(cache: ShardCache, store: Store, file: RemoteShard, descriptor: int) -> bool:
    try:
        if _copy(store, file, descriptor) == file.sha256:
            cache.commit(file.sha256, descriptor)
            return True
    except OSError as error:
        cache.drop(file.sha256, descriptor)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        _log.warning("%s: not cached: %s", store.where(file.name), error.strerror)
        return False
    except BaseException:
        cache.drop(file.sha256, descriptor)
        raise
    cache.drop(file.sha256, descriptor)
    return False


_OPEN: weakref.WeakSet[RemoteShards] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Close what the program has not closed, while its threads still run: a finaliser would wait for them forever."""
    for shards in list(_OPEN):
        shards.close()


class RemoteShards:
    """The shards of one split, cached or remote.

    Threads fetch whole shards into the cache as long as there is room, and hash cached shards that are not verified
    (see `ShardCache`) before they are used. A cached shard that turns out to be damaged is fetched again; meanwhile,
    its scenes are read one by one. So are those of a remote shard with a wrong checksum, which is not cached, so that
    only damaged scenes are lost, as with a local shard.

    Args:
        store: of the shards.
        shards: as listed in the manifest.
        directory, limit: of the cache, see `ShardCache`.
        rehash: hash also the cached shards that an earlier process verified.
    """

    def __init__(
        self, store: Store, shards: list[RemoteShard], directory: Path, limit: int, *, rehash: bool = False
    ) -> None:
        self.store = store
        self._shards = shards
        self._cache = ShardCache(directory, limit)
        self._stop = threading.Event()
        self._origin = forks.Origin()
        self._lock = threading.Lock()
        self._usable: dict[str, int] = {}  # digests of verified shards in the cache -> their modification times
        self._hashed: set[str] = set()  # those of them that this process read and hashed
        self._suspects = {shard.sha256 for shard in shards} if rehash else set()
        cached = self._cache.claim({shard.sha256: shard.size for shard in shards})
        self._cache.trim()
        for digest, verified in cached.items():
            if verified and not rehash:
                self._usable[digest] = verified_time(digest)
        unverified = cached.keys() - self._usable.keys()
        self._waiting = deque((0.0, shard) for shard in shards if shard.sha256 in unverified)
        self._waiting.extend((0.0, shard) for shard in shards if shard.sha256 not in cached and shard.size <= limit)
        self._fetchers: list[threading.Thread] = []
        _OPEN.add(self)
        self._fetching = 0  # threads that are still going to look at `_waiting`
        with self._lock:
            for _ in range(min(_FETCHERS, len(self._waiting))):
                self._start_fetcher()

    def path(self, shard: int) -> Path | None:
        """The path of shard number `shard` in the cache; None if it must not be used (yet)."""
        digest = self._shards[shard].sha256
        return self._cache.path(digest) if digest in self._usable else None

    def is_unchanged(self, shard: int, status: os.stat_result) -> bool:
        """Whether an open cached shard has been neither written to nor removed since it was verified."""
        expected = self._shards[shard]
        written = (status.st_size, status.st_mtime_ns) != (expected.size, self._usable.get(expected.sha256))
        return not written and status.st_nlink > 0

    def suspect(self, shard: int, certain: bool) -> bool:
        """Stop using a cached shard, and hash it in the background: it is fetched again if it is damaged.

        Args:
            certain: the shard has been changed or removed since it was verified.

        Returns:
            False: nothing is done, since this process has hashed the shard, and it is as the manifest says.
        """
        found = self._shards[shard]
        with self._lock:
            if not certain and found.sha256 in self._hashed:
                return False
            self._hashed.discard(found.sha256)
            if self._usable.pop(found.sha256, None) is not None:  # the first thread that notices
                self._suspects.add(found.sha256)
                self._waiting.appendleft((0.0, found))
                if self._fetching < _FETCHERS and not self._stop.is_set():
                    self._start_fetcher()
        return True

    def read(self, shard: int, start: int, end: int) -> bytes:
        """Read the bytes [start, end) of a remote shard, fewer at its end.

        Raises:
            OSError: the read failed.
        """
        return self.store.read(self._shards[shard].name, start, end)

    def _start_fetcher(self) -> None:
        self._fetching += 1
        thread = threading.Thread(target=self._fetch_all, name="shards", daemon=True)
        self._fetchers.append(thread)
        thread.start()

    def _next(self) -> tuple[float, RemoteShard] | None:
        with self._lock:
            if self._waiting and not self._stop.is_set():
                return self._waiting.popleft()
            self._fetching -= 1
            return None

    def _fetch_all(self) -> None:
        while (item := self._next()) is not None:
            due, shard = item
            if self._stop.wait(max(0.0, due - time.monotonic())):
                return
            try:
                self._fetch(shard)
            except BlockingIOError:
                self._waiting.append((time.monotonic() + _POLL_S, shard))
            except Closed:
                return
            except OSError as error:
                _log.warning("%s: not fetched: %s", self.store.where(shard.name), error)
                if not isinstance(error, _PERMANENT):
                    self._waiting.append((time.monotonic() + _RETRY_FAILED_S, shard))

    def _fetch(self, shard: RemoteShard) -> None:
        if self._use_cached(shard):  # fetched by another process, or not verified
            return
        for _ in range(2):
            descriptor = self._cache.reserve(shard.sha256, shard.size)
            if descriptor is None:
                return
            try:
                if _copy(self.store, shard, descriptor) == shard.sha256:
                    self._cache.commit(shard.sha256, descriptor)
                    self._use(shard, verified_time(shard.sha256))
                    return
            except BaseException:
                self._cache.drop(shard.sha256, descriptor)
                raise
            self._cache.drop(shard.sha256, descriptor)
        _log.warning("%s: not cached: its checksum differs from the manifest's", self.store.where(shard.name))

    def _use_cached(self, shard: RemoteShard) -> bool:
        """Use a cached shard, after hashing it where that is necessary; whether there is an intact one."""
        verified = self._cache.claim({shard.sha256: shard.size}).get(shard.sha256)
        if verified is None:
            return False
        if verified and shard.sha256 not in self._suspects:
            self._use(shard, verified_time(shard.sha256))
            return True
        time_ns = self._cache.verify(shard.sha256)
        if time_ns is None:
            return False
        self._hashed.add(shard.sha256)
        self._use(shard, time_ns)
        return True

    def _use(self, shard: RemoteShard, time_ns: int) -> None:
        with self._lock:
            self._suspects.discard(shard.sha256)
            self._usable[shard.sha256] = time_ns

    def close(self) -> None:
        """Stop the threads and waiting reads, and release the cache."""
        if not self._origin.is_here or sys.is_finalizing():  # then the threads have ended, maybe holding a lock
            return
        with self._lock:
            self._stop.set()
        self.store.close()
        for thread in self._fetchers:
            thread.join()
        self._cache.close()
