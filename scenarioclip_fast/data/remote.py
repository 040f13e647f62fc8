"""Packed data sets in a bucket or on a server: whole shards in a bounded cache on disk, byte ranges for the rest.

A global shuffle touches every shard in every batch. Waiting for whole shards would stall the first epoch, and replacing
shards as they are touched would, in a cache smaller than the data set, fetch a thousand scenes to use one. Hence:

- a scene whose shard is not on the disk is read alone, by one byte range;
- meanwhile threads fetch whole shards, as many as there is room for, and a loader keeps the ones it has: under a
  uniform shuffle each is as likely to be wanted next as any other;
- room is made by evicting what no living process uses, least recently used first.

A scene thus crosses the network twice at most in the first epoch, and later ones fetch only what does not fit.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import queue
import random
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from scenarioclip_fast.errors import MissingDependencyError, UserError
from scenarioclip_fast.requirements import require

CACHE_GIB = 32.0

_ASK_AGAIN_S = 60.0  # after a file has used up its attempts
_CHUNK = 8 << 20  # of a shard, per request: what a cut connection costs
_FETCHERS = 4  # shards at a time
_LOOK_AGAIN_S = 2.0  # at a shard that another process fetches

_log = logging.getLogger(__name__)


def is_url(source: str | Path) -> bool:
    """Whether `source` is for fsspec: "s3://...", "https://...", also "file://..." for a slow mount."""
    return "://" in str(source)


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/scenarioclip-fast/shards, by default below ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scenarioclip-fast" / "shards"


class Closed(RuntimeError):
    """The store has been closed while somebody waited for it."""


class NoRanges(OSError):
    """The server sends whole files, whatever is asked for."""


# What no second attempt changes.
_FINAL = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    NoRanges,
    MemoryError,
    ImportError,
    Closed,
)


class Store:
    """The files below a URL. No call hangs: each attempt has a time limit, transient failures a few attempts.

    Args:
        url: of a directory, of any kind that fsspec knows.

    Raises:
        UserError: fsspec knows no such protocol.
        MissingDependencyError: fsspec, or its package for this protocol, is not installed.
    """

    timeout = 30.0  # seconds for one attempt
    pause = 0.5  # seconds before the second attempt; doubled before each further one
    attempts = 4

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self._fs, self._root = require("fsspec").core.url_to_fs(url)
        except MissingDependencyError:
            raise
        except ImportError as error:
            raise MissingDependencyError(f"{url}: this kind of storage needs one more package: {error}") from error
        except ValueError as error:
            raise UserError(f"{url}: not a URL that fsspec can open ({error})") from None
        self._closed = threading.Event()
        self._given_up: dict[str, float] = {}  # file -> when it may be asked for again
        self._failing = False  # nothing has succeeded since the last file was given up

    def where(self, name: str) -> str:
        return f"{self.url.rstrip('/')}/{name}"

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """The bytes [start, end) of a file, fewer where it ends before; all of it by default.

        Raises:
            OSError: the file is not there, or could not be had in several attempts. Such a file is not asked for
                again for a minute, and while the whole store is silent, each further file gets one attempt: what is
                gone fails fast.
        """
        if time.monotonic() < self._given_up.get(name, 0):
            raise OSError(f"not reachable; the next attempt is at most {_ASK_AGAIN_S:g} s away")
        attempts = 1 if self._failing else self.attempts
        failure: Exception | None = None
        short: bytes | None = None
        for attempt in range(attempts):
            if attempt and self._closed.wait(self.pause * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)):
                break
            try:
                data = self._within_time(lambda: self._fs.cat_file(f"{self._root.rstrip('/')}/{name}", start, end))
            except _FINAL:
                raise
            except Exception as error:  # each kind of storage has its own
                if getattr(error, "status", None) != 416:  # the range lies behind the end of the file
                    failure = error
                    continue
                data = b""
            if start is not None and end is not None and len(data) != end - start:
                if len(data) > end - start:
                    raise NoRanges(f"got {len(data)} bytes for a range of {end - start}")
                if len(data) != (-1 if short is None else len(short)):  # the file's end, if it happens again
                    failure, short = OSError(f"got {len(data)} of {end - start} bytes"), data
                    continue
            self._failing = False
            self._given_up.pop(name, None)
            return data
        if self._closed.is_set():
            raise Closed(self.url)
        self._failing = True
        self._given_up[name] = time.monotonic() + _ASK_AGAIN_S
        tried = f"{attempts} attempts" if attempts > 1 else "one attempt"
        raise OSError(f"not reachable in {tried}: {type(failure).__name__}: {failure}") from failure

    def _within_time(self, call: Callable[[], bytes]) -> bytes:
        """Runs `call` in a thread that is left behind if it does not answer: not every library has time limits."""
        answer: queue.SimpleQueue[bytes | BaseException] = queue.SimpleQueue()

        def run() -> None:
            try:
                answer.put(call())
            except BaseException as error:
                answer.put(error)

        threading.Thread(target=run, name="fetch", daemon=True).start()
        give_up = time.monotonic() + self.timeout
        while True:
            try:
                result = answer.get(timeout=max(0.0, min(0.2, give_up - time.monotonic())))
                break
            except queue.Empty:
                if self._closed.is_set():
                    raise Closed(self.url) from None
                if time.monotonic() >= give_up:
                    raise TimeoutError(f"no answer within {self.timeout:g} s") from None
        if isinstance(result, BaseException):
            raise result
        return result

    def close(self) -> None:
        """Ends what waits, with `Closed`."""
        self._closed.set()


class ShardCache:
    """Files on a local disk, named by their SHA-256, that the processes of a host share.

        DIR/DIGEST.tar    a whole file, checked. Its time of modification says when it was last used
        DIR/DIGEST.part   one on its way, of full size from the start; locked by its writer
        DIR/ID.claims     digests that one process uses; locked as long as it lives
        DIR/lock          held while any of this changes

    Args:
        directory: made where it is missing.
        limit: bytes that files may fill, those on their way included. What is in use is never evicted.

    Raises:
        UserError: the directory cannot be written.
    """

    def __init__(self, directory: Path, limit: int) -> None:
        self.directory, self.limit = directory, limit
        self._mine: set[str] = set()
        self._claims = directory / f"{uuid.uuid4().hex}.claims"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self._claims_fd = os.open(self._claims, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
                fcntl.flock(self._claims_fd, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(
                f"{directory}: cannot hold the cache of shards ({error.strerror}); name another directory"
            ) from None

    def path(self, digest: str) -> Path:
        return self.directory / f"{digest}.tar"

    def claim(self, digests: Iterable[str]) -> set[str]:
        """Which of the files are here. These stay until `close`."""
        with self._locked():
            return {digest for digest in digests if self._claim(digest)}

    def trim(self) -> None:
        """Evicts what is beyond `limit`: an earlier one may have been larger."""
        with self._locked():
            self._make_room(0)

    def reserve(self, digest: str, size: int) -> int | None:
        """A descriptor of a file of `size` zeros, to be filled and given to `commit` or `drop`; None: no room.

        Raises:
            BlockingIOError: another process is fetching this file, or has just done so.
        """
        part = self._part(digest)
        with self._locked():
            if _is_locked(part) or self.path(digest).exists():
                raise BlockingIOError(f"{part.name} is being written")
            part.unlink(missing_ok=True)  # of a process that died
            if not self._make_room(size):
                return None
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                os.posix_fallocate(descriptor, 0, max(1, size))
            except OSError as error:
                self.drop(digest, descriptor)
                _log.warning("%s: no room for a shard: %s", self.directory, error.strerror)
                return None
        return descriptor

    def commit(self, digest: str, descriptor: int) -> None:
        """The reserved file is whole: it appears, claimed, and whole it is even after the machine has lost power.

        Raises:
            OSError: the disk does not take it; it is to be given to `drop`.
        """
        os.fsync(descriptor)
        with self._locked():
            os.replace(self._part(digest), self.path(digest))
            self._claim(digest)
        directory = os.open(self.directory, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        os.close(descriptor)

    def drop(self, digest: str, descriptor: int) -> None:
        """The reserved file is not wanted after all."""
        self._part(digest).unlink(missing_ok=True)
        os.close(descriptor)

    def close(self) -> None:
        """Gives all claims up."""
        if self._claims_fd < 0:
            return
        with suppress(FileNotFoundError), self._locked():  # the directory may be gone
            for digest in self._mine:
                with suppress(FileNotFoundError):
                    os.utime(self.path(digest))
            self._claims.unlink(missing_ok=True)
        os.close(self._claims_fd)
        self._claims_fd = -1

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # Opened anew, so that threads of one process exclude one another too.
        descriptor = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _part(self, digest: str) -> Path:
        return self.directory / f"{digest}.part"

    def _claim(self, digest: str) -> bool:
        try:
            os.utime(self.path(digest))
        except FileNotFoundError:
            return False
        if digest not in self._mine:
            self._mine.add(digest)
            os.write(self._claims_fd, f"{digest}\n".encode())
        return True

    def _make_room(self, size: int) -> bool:
        """Evicts until `size` more bytes fit; nothing, where that would not be enough."""
        claimed = self._claimed()
        evictable: list[tuple[int, int, Path]] = []
        filled = 0
        for path in self.directory.iterdir():
            if path.suffix not in (".tar", ".part"):
                continue
            with suppress(FileNotFoundError):
                status = path.stat()
                filled += status.st_size
                if path.suffix == ".tar" and path.stem not in claimed:
                    evictable.append((status.st_mtime_ns, status.st_size, path))
                if path.suffix == ".part" and not _is_locked(path):
                    evictable.append((0, status.st_size, path))
        if size and filled + size - sum(n for _, n, _ in evictable) > self.limit:
            return False
        for _, n, path in sorted(evictable):
            if filled + size <= self.limit:
                break
            path.unlink(missing_ok=True)
            filled -= n
        return True

    def _claimed(self) -> set[str]:
        """What living processes use."""
        claimed: set[str] = set()
        for path in self.directory.glob("*.claims"):
            if _is_locked(path):
                claimed.update(path.read_text().split())
            else:
                path.unlink(missing_ok=True)
        return claimed


def _is_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@dataclass(frozen=True)
class RemoteShard:
    """What the manifest says of a shard."""

    name: str
    sha256: str
    size: int


class RemoteShards:
    """The shards of one split: on the disk, or still where they come from.

    Threads fetch whole shards into the cache until there is no more room. One whose checksum is wrong does not get in:
    its scenes are read one by one, so that the damaged ones are told from the others just as on a local disk.
    """

    def __init__(self, store: Store, shards: list[RemoteShard], directory: Path, limit: int) -> None:
        self.store = store
        self._shards = shards
        self._cache = ShardCache(directory, limit)
        self._stop = threading.Event()
        here = self._cache.claim(shard.sha256 for shard in shards)
        self._cache.trim()
        self._waiting = deque((0.0, shard) for shard in shards if shard.sha256 not in here and shard.size <= limit)
        self._fetchers = [
            threading.Thread(target=self._fetch_all, name="shards", daemon=True)
            for _ in range(min(_FETCHERS, len(self._waiting)))
        ]
        for thread in self._fetchers:
            thread.start()

    def path(self, shard: int) -> Path:
        """Where shard number `shard` lies once it is on the disk."""
        return self._cache.path(self._shards[shard].sha256)

    def read(self, shard: int, start: int, end: int) -> bytes:
        """The bytes [start, end) of a shard, from afar, fewer where it ends before. OSError if they cannot be had."""
        return self.store.read(self._shards[shard].name, start, end)

    def _fetch_all(self) -> None:
        while not self._stop.is_set():
            try:
                due, shard = self._waiting.popleft()
            except IndexError:
                return
            if self._stop.wait(max(0.0, due - time.monotonic())):
                return
            try:
                self._fetch(shard)
            except BlockingIOError:
                self._waiting.append((time.monotonic() + _LOOK_AGAIN_S, shard))
            except Closed:
                return
            except OSError as error:
                _log.warning("%s: not fetched: %s", self.store.where(shard.name), error)
                if not isinstance(error, _FINAL):
                    self._waiting.append((time.monotonic() + _ASK_AGAIN_S, shard))

    def _fetch(self, shard: RemoteShard) -> None:
        if self._cache.claim([shard.sha256]):  # another process has brought it
            return
        for _ in range(2):
            descriptor = self._cache.reserve(shard.sha256, shard.size)
            if descriptor is None:
                return
            try:
                if self._copy(shard, descriptor) == shard.sha256:
                    self._cache.commit(shard.sha256, descriptor)
                    return
            except BaseException:
                self._cache.drop(shard.sha256, descriptor)
                raise
            self._cache.drop(shard.sha256, descriptor)
        _log.warning("%s: not kept: its checksum is not the manifest's", self.store.where(shard.name))

    def _copy(self, shard: RemoteShard, descriptor: int) -> str:
        """Copies a shard, and returns the SHA-256 of what came."""
        digest = hashlib.sha256()
        for start in range(0, shard.size, _CHUNK):
            data = self.store.read(shard.name, start, min(start + _CHUNK, shard.size))
            os.pwrite(descriptor, data, start)
            digest.update(data)
        return digest.hexdigest()

    def close(self) -> None:
        """Ends the threads, and what waits for the store."""
        self._stop.set()
        self.store.close()
        for thread in self._fetchers:
            thread.join()
        self._cache.close()
