"""A cache of shards on a local disk, shared by processes."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import stat
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from scenarioclip_fast import forks
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import (
    NotRegularError,
    is_regular,
    kind_of,
    open_regular,
    read_regular,
    sha256_of,
    status_of,
)
from scenarioclip_fast.terminal import get_logger

_log = get_logger(__name__)


_libc = ctypes.CDLL(None)
_UTIME_NOW, _UTIME_OMIT, _AT_FDCWD, _AT_SYMLINK_NOFOLLOW = (1 << 30) - 1, (1 << 30) - 2, -100, 0x100  # Linux
_FILE = re.compile(r"[0-9a-f]{64}\.(tar|part|index)")
_CLAIMS = re.compile(r"[0-9a-f]{32}\.claims")


def default_cache_dir() -> Path:
    """Return $XDG_CACHE_HOME/scenarioclip-fast/shards, by default below ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scenarioclip-fast" / "shards"


class ShardCache:
    """Files on a local disk, named by their SHA-256 and shared by the processes of a host.

        DIR/DIGEST.tar    a complete file; its access time is the time of last use
        DIR/DIGEST.index  an index, as long as the original; what has not been fetched yet is zero
        DIR/DIGEST.part   a file being fetched, preallocated at full size and locked by its writer
        DIR/ID.claims     digests of the files that one process uses; locked while the process lives
        DIR/lock          held while any of these files changes

    A verified file has the modification time `verified_time` of its digest. Writing to it changes that time, so a file
    with this time need not be hashed again by later processes, and one that was damaged by a write is recognised.

    Other files in the directory are left alone, and symbolic links in it are never followed.

    A forked process has no claims and no files being fetched: those remain its parent's.

    Args:
        directory: created if missing.
        limit: maximum total size in bytes, including files being fetched. Files in use are never evicted.

    Raises:
        UserError: the directory is not writable.
    """

    def __init__(self, directory: Path, limit: int) -> None:
        self.directory, self.limit = directory, limit
        self._descriptors: set[int] = set()  # locked ones
        self._forget()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self._open_claims()
        except OSError as error:
            raise UserError(
                f"{error.filename or directory}: cannot be used as shard cache ({error.strerror}); choose another "
                "directory"
            ) from None
        forks.register(self)

    def _forget(self) -> None:
        self._mine: set[str] = set()
        self._claims = self.directory / f"{uuid.uuid4().hex}.claims"
        self._claims_fd = -1

    def _open_claims(self) -> None:
        self._claims_fd = self._open(self._claims, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND)
        fcntl.flock(self._claims_fd, fcntl.LOCK_EX)

    def _after_fork(self) -> None:
        # A lock lasts until every process has closed its descriptor: otherwise those of a dead parent would remain.
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()
        self._forget()

    def _open(self, path: Path, flags: int) -> int:
        descriptor = open_regular(path, flags, follow=False)
        self._descriptors.add(descriptor)
        return descriptor

    def _close(self, descriptor: int) -> None:
        self._descriptors.discard(descriptor)
        os.close(descriptor)

    def path(self, digest: str) -> Path:
        """The path of a complete file."""
        return self.directory / f"{digest}.tar"

    def claim(self, sizes: Mapping[str, int]) -> dict[str, bool]:
        """Find cached files, and protect them from eviction until `close`. What cannot be such a file is removed.

        Args:
            sizes: digests of the files, and their sizes in bytes.

        Returns:
            The digests of cached files, and whether they are verified.
        """
        with self._locked():
            return {d: status for d, size in sizes.items() if (status := self._claim(d, size)) is not None}

    def verify(self, digest: str) -> int | None:
        """Hash a cached file. One with another digest is removed, or one that is written to meanwhile.

        Returns:
            The modification time of the verified file, in ns; None: it was removed.

        Raises:
            BlockingIOError: another thread or process is hashing it.
            OSError: it cannot be opened.
        """
        path = self.path(digest)
        descriptor = open_regular(path, follow=False)
        with open(descriptor, "rb") as file:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            before = os.fstat(descriptor).st_mtime_ns
            try:
                intact = sha256_of(file) == digest
            except OSError:  # a bad block
                intact = False
            with self._locked():
                status = os.fstat(descriptor)
                if intact and status.st_mtime_ns == before:
                    with suppress(PermissionError):  # a file of another user: hashed by every process
                        os.utime(descriptor, ns=(status.st_atime_ns, verified_time(digest)))
                    return os.fstat(descriptor).st_mtime_ns
                if (found := status_of(path)) is not None and os.path.samestat(found, status):
                    path.unlink()
        _log.warning("%s: damaged, removed from the cache", path)
        return None

    def trim(self) -> None:
        """Evict files in excess of `limit`, which may be lower than in an earlier run."""
        with self._locked():
            self._make_room(0)

    def reserve(self, digest: str, size: int) -> int | None:
        """Allocate a file of `size` bytes; the caller fills it and calls `commit` or `drop`.

        Returns:
            The file descriptor, or None if there is no room.

        Raises:
            BlockingIOError: another process is fetching this file, or has just fetched it.
            IsADirectoryError: the path of the file is a directory.
        """
        part = self._part(digest)
        with self._locked():
            found = status_of(self.path(digest))
            if found is not None and stat.S_ISDIR(found.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(self.path(digest)))
            if _is_locked(part) or found is not None:
                raise BlockingIOError(f"another process is writing {part.name}")
            part.unlink(missing_ok=True)  # left by a process that died
            if not self._make_room(size):
                return None
            descriptor = self._open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                os.posix_fallocate(descriptor, 0, max(1, size))
            except OSError as error:
                self.drop(digest, descriptor)
                _log.warning("%s: cannot allocate space for a shard: %s", self.directory, error.strerror)
                return None
        return descriptor

    def commit(self, digest: str, descriptor: int) -> None:
        """Sync a file filled with verified content to disk, move it to its final name and claim it.

        Raises:
            OSError: writing failed; call `drop`.
        """
        os.utime(descriptor, ns=(time.time_ns(), verified_time(digest)))
        os.fsync(descriptor)
        with self._locked():
            os.replace(self._part(digest), self.path(digest))
            self._claim(digest, os.fstat(descriptor).st_size)
        directory = os.open(self.directory, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        self._close(descriptor)

    def drop(self, digest: str, descriptor: int) -> None:
        """Discard a reserved file."""
        self._part(digest).unlink(missing_ok=True)
        self._close(descriptor)

    def open_index(self, digest: str, size: int) -> int:
        """Open the file of an index for reading and writing, created if missing, and claim it.

        Raises:
            OSError: it cannot be opened, or is not a regular file.
        """
        with self._locked():
            descriptor = self._open(self.directory / f"{digest}.index", os.O_RDWR | os.O_CREAT)
            os.ftruncate(descriptor, size)
            self._mark(digest)
        return descriptor

    def close_index(self, descriptor: int) -> None:
        """Close a file that `open_index` opened."""
        self._close(descriptor)

    def close(self) -> None:
        """Release all claims."""
        if self._claims_fd < 0:
            return
        with suppress(FileNotFoundError), self._locked():  # the directory may have been removed
            for digest in self._mine:
                if is_regular(self.path(digest)):
                    _set_used(self.path(digest))
            self._claims.unlink(missing_ok=True)
        self._close(self._claims_fd)
        self._claims_fd = -1

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # Opened each time, so that the lock also excludes other threads of this process.
        descriptor = self._open(self.directory / "lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # not only closed: a process forked meanwhile has it open
            self._close(descriptor)

    def _part(self, digest: str) -> Path:
        return self.directory / f"{digest}.part"

    def _claim(self, digest: str, size: int) -> bool | None:
        """Claim a file, and return whether it is verified; None: there is none of this size."""
        path = self.path(digest)
        status = status_of(path)
        if status is None or stat.S_ISDIR(status.st_mode):
            return None
        if not stat.S_ISREG(status.st_mode) or status.st_size != size:
            path.unlink()
            what = f"a {kind_of(status.st_mode)} of {status.st_size} bytes"
            _log.warning("%s: got %s, expected a shard of %d bytes: removed from the cache", path, what, size)
            return None
        _set_used(path)
        self._mark(digest)
        return status.st_mtime_ns == verified_time(digest)

    def _mark(self, digest: str) -> None:
        """Claim a file."""
        if digest not in self._mine:
            if self._claims_fd < 0:  # after a fork
                self._open_claims()
            self._mine.add(digest)
            os.write(self._claims_fd, f"{digest}\n".encode())

    def _make_room(self, size: int) -> bool:
        """Evict files until `size` more bytes fit; if that is impossible, evict nothing."""
        claimed = self._claimed()
        evictable: list[tuple[int, int, Path]] = []
        used = 0
        for path in self.directory.iterdir():
            status = status_of(path) if _FILE.fullmatch(path.name) else None
            if status is None or not stat.S_ISREG(status.st_mode):
                continue
            size_of = 512 * status.st_blocks if path.suffix == ".index" else status.st_size
            used += size_of
            if path.suffix in (".tar", ".index") and path.stem not in claimed:
                evictable.append((status.st_atime_ns, size_of, path))
            if path.suffix == ".part" and not _is_locked(path):
                evictable.append((0, status.st_size, path))
        if size and used + size - sum(n for _, n, _ in evictable) > self.limit:
            return False
        for _, n, path in sorted(evictable):
            if used + size <= self.limit:
                break
            path.unlink(missing_ok=True)
            used -= n
        return True

    def _claimed(self) -> set[str]:
        """The digests claimed by live processes."""
        claimed: set[str] = set()
        for path in self.directory.iterdir():
            if not _CLAIMS.fullmatch(path.name) or not is_regular(path):
                continue
            if _is_locked(path):
                claimed.update(read_regular(path, follow=False).decode("ascii", "replace").split())
            else:
                path.unlink(missing_ok=True)
        return claimed


def verified_time(digest: str) -> int:
    """The modification time of a verified file, in ns: between 1987 and 2004, in whole seconds and even, which every
    file system stores exactly."""
    return (2**29 + 2 * int(digest[:7], 16)) * 10**9


def _set_used(path: Path) -> None:
    """Set only the access time: `os.utime` would also set the modification time, and hide a write just before."""
    times = (ctypes.c_long * 4)(0, _UTIME_NOW, 0, _UTIME_OMIT)  # two struct timespec
    _libc.utimensat(_AT_FDCWD, os.fsencode(path), times, _AT_SYMLINK_NOFOLLOW)  # fails on a file of another user


def _is_locked(path: Path) -> bool:
    try:
        descriptor = open_regular(path, follow=False)
    except (FileNotFoundError, NotRegularError):
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # as in `_locked`
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
