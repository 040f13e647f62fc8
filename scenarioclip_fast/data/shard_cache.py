"""A cache of shards on a local disk, shared by processes."""

from __future__ import annotations

import fcntl
import logging
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from scenarioclip_fast.errors import UserError

_log = logging.getLogger(__name__)


def default_cache_dir() -> Path:
    """Return $XDG_CACHE_HOME/scenarioclip-fast/shards, by default below ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scenarioclip-fast" / "shards"


class ShardCache:
    """Files on a local disk, named by their SHA-256 and shared by the processes of a host.

        DIR/DIGEST.tar    a complete, verified file; its modification time is the time of last use
        DIR/DIGEST.part   a file being fetched, preallocated at full size and locked by its writer
        DIR/ID.claims     digests of the files that one process uses; locked while the process lives
        DIR/lock          held while any of these files changes

    Args:
        directory: created if missing.
        limit: maximum total size in bytes, including files being fetched. Files in use are never evicted.

    Raises:
        UserError: the directory is not writable.
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
                f"{directory}: cannot be used as shard cache ({error.strerror}); choose another directory"
            ) from None

    def path(self, digest: str) -> Path:
        """The path of a complete file."""
        return self.directory / f"{digest}.tar"

    def claim(self, digests: Iterable[str]) -> set[str]:
        """Return those of `digests` that are cached, and protect their files from eviction until `close`."""
        with self._locked():
            return {digest for digest in digests if self._claim(digest)}

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
        """
        part = self._part(digest)
        with self._locked():
            if _is_locked(part) or self.path(digest).exists():
                raise BlockingIOError(f"another process is writing {part.name}")
            part.unlink(missing_ok=True)  # left by a process that died
            if not self._make_room(size):
                return None
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                os.posix_fallocate(descriptor, 0, max(1, size))
            except OSError as error:
                self.drop(digest, descriptor)
                _log.warning("%s: cannot allocate space for a shard: %s", self.directory, error.strerror)
                return None
        return descriptor

    def commit(self, digest: str, descriptor: int) -> None:
        """Sync a filled file to disk, move it to its final name and claim it.

        Raises:
            OSError: writing failed; call `drop`.
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
        """Discard a reserved file."""
        self._part(digest).unlink(missing_ok=True)
        os.close(descriptor)

    def close(self) -> None:
        """Release all claims."""
        if self._claims_fd < 0:
            return
        with suppress(FileNotFoundError), self._locked():  # the directory may have been removed
            for digest in self._mine:
                with suppress(FileNotFoundError):
                    os.utime(self.path(digest))
            self._claims.unlink(missing_ok=True)
        os.close(self._claims_fd)
        self._claims_fd = -1

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # Opened each time, so that the lock also excludes other threads of this process.
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
        """Evict files until `size` more bytes fit; if that is impossible, evict nothing."""
        claimed = self._claimed()
        evictable: list[tuple[int, int, Path]] = []
        used = 0
        for path in self.directory.iterdir():
            if path.suffix not in (".tar", ".part"):
                continue
            with suppress(FileNotFoundError):
                status = path.stat()
                used += status.st_size
                if path.suffix == ".tar" and path.stem not in claimed:
                    evictable.append((status.st_mtime_ns, status.st_size, path))
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
