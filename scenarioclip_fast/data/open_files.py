"""Open files for positioned reads, as many as the process may keep."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import resource
import threading
import time
from collections import OrderedDict, deque
from pathlib import Path

from scenarioclip_fast import forks
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import open_regular

# Opening a file of a network file system takes milliseconds, so all shards of a large data set should stay open. More
# are of little use, and the descriptors count towards a limit that the whole machine has.
_MOST = 2048
_OWNERS = itertools.count()
_CHUNK = 1 << 20  # bytes hashed at once
_WAIT_S, _TRIES = 0.005, 200  # for files that other threads are reading


def is_exhausted(error: BaseException) -> bool:
    """Whether the process or the machine has too many open files."""
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)


def exhausted_error(where: object) -> UserError:
    """The error for `where` if closing files of ours did not help."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return UserError(
        f"{where}: too many open files, the limit of this process is {limit}: raise it with `ulimit -n {2 * _MOST}`, "
        "or close other files and sockets"
    )


class File:
    """A file open for reading, closed when neither OpenFiles nor a reading thread references it."""

    def __init__(self, path: Path, *, follow: bool = True) -> None:
        self._descriptor = open_regular(path, follow=follow)
        self._size = os.fstat(self._descriptor).st_size

    def status(self) -> os.stat_result:
        return os.fstat(self._descriptor)

    def sha256(self) -> str:
        """The SHA-256 of the file in hex."""
        digest = hashlib.sha256()
        for offset in range(0, self._size, _CHUNK):
            digest.update(os.pread(self._descriptor, _CHUNK, offset))
        return digest.hexdigest()

    def read(self, offset: int, size: int) -> bytes:
        """Read `size` bytes, fewer at the end of the file; threads may share the file."""
        return os.pread(self._descriptor, min(size, max(0, self._size - offset)), offset)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


class OpenFiles:
    """The most recently used files of all data sets of the process.

    At most half of the process's soft limit, and at most 2048. If that is full, or no file can be opened, the soft
    limit is raised, to at most 4096 and the hard limit, and then the least recently used files are closed.
    """

    def __init__(self) -> None:
        self._after_fork()
        forks.register(self)

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
        self._files: OrderedDict[tuple[int, int], File] = OrderedDict()
        self._closed: deque[int] = deque()
        self.most = min(_MOST, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)

    def __len__(self) -> int:
        return len(self._files)

    def new_owner(self) -> int:
        """A number for `open` and `close`."""
        return next(_OWNERS)

    def open(self, owner: int, number: int, path: Path, *, follow: bool = True) -> File:
        """Return file `number` of an owner, opened unless it is still open.

        follow: whether the path may be a symbolic link.

        Raises:
            OSError: the file cannot be opened.
            UserError: too many open files, although this object has closed all of its own.
        """
        key = owner, number
        with self._lock:
            self._forget_closed()
            if (file := self._files.get(key)) is not None:
                self._files.move_to_end(key)
                return file
        file = self._open(path, follow)
        with self._lock:
            file = self._files.setdefault(key, file)
            if len(self._files) > self.most:
                self._raise_limit()
            while len(self._files) > self.most:
                self._files.popitem(last=False)
        return file

    def forget(self, owner: int, number: int, file: File) -> None:
        """Close a file, so that the next `open` opens what is now at its path; unless that has already happened."""
        with self._lock:
            if self._files.get((owner, number)) is file:
                del self._files[owner, number]

    def close(self, owner: int) -> None:
        """Close the files of an owner. It may run in a finaliser, while this thread holds the lock."""
        self._closed.append(owner)
        if self._lock.acquire(blocking=False):  # otherwise the next `open` closes them
            try:
                self._forget_closed()
            finally:
                self._lock.release()

    def _forget_closed(self) -> None:
        while self._closed:
            owner = self._closed.popleft()
            for key in [key for key in self._files if key[0] == owner]:
                del self._files[key]

    def _open(self, path: Path, follow: bool) -> File:
        for _ in range(_TRIES):
            try:
                return File(path, follow=follow)
            except OSError as error:
                if not is_exhausted(error):
                    raise
            with self._lock:
                left = len(self._files) // 2
                if not self._raise_limit() and self._files:
                    self.most = max(1, left)
                    while len(self._files) > left:
                        self._files.popitem(last=False)
                    continue
            time.sleep(_WAIT_S)
        raise exhausted_error(path)

    def _raise_limit(self) -> bool:
        """Raise the soft limit, if that is allowed and useful."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 2 * _MOST if hard == resource.RLIM_INFINITY else min(2 * _MOST, hard)
        if soft == resource.RLIM_INFINITY or soft >= wanted:
            return False
        with contextlib.suppress(OSError, ValueError):  # a sandbox may forbid it
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            self.most = min(_MOST, wanted // 2)
            return True
        return False


OPEN_FILES = OpenFiles()
