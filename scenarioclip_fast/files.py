"""Open files and directories whose paths may lead to something else: a link, a named pipe, a device.

Opening a named pipe blocks until another process opens its other end, and opening a device may have side effects.
"""

from __future__ import annotations

import errno
import hashlib
import io
import mmap
import os
import stat
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from scenarioclip_fast.errors import UserError

Mapped = bytes | mmap.mmap
"""The content of a file that is mapped into memory, or in it."""

_KINDS = {
    stat.S_IFREG: "regular file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symbolic link",
    stat.S_IFIFO: "named pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


class NotRegularError(OSError):
    """A path leads to something other than a regular file, such as a named pipe."""

    def __init__(self, path: str | Path, mode: int) -> None:
        super().__init__(errno.EINVAL, f"got a {kind_of(mode)}, expected a regular file", str(path))

    def __str__(self) -> str:
        return str(self.strerror)


def is_url(source: str | Path) -> bool:
    """Whether `source` is a URL for fsspec: "s3://...", "https://...", or "file://..." for a slow mount."""
    return "://" in str(source)


def kind_of(mode: int) -> str:
    """What a file with this `st_mode` is: "regular file", "named pipe", ..."""
    return _KINDS.get(stat.S_IFMT(mode), "special file")


def status_of(path: str | Path, dir_fd: int | None = None) -> os.stat_result | None:
    """The status of a path, of a symbolic link itself; None if there is no such file."""
    try:
        return os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        return None


def is_regular(path: str | Path, dir_fd: int | None = None) -> bool:
    """Whether a path is a regular file, and not a symbolic link to one."""
    status = status_of(path, dir_fd)
    return status is not None and stat.S_ISREG(status.st_mode)


def open_regular(
    path: str | Path, flags: int = os.O_RDONLY, *, follow: bool = True, dir_fd: int | None = None, mode: int = 0o666
) -> int:
    """Open a regular file without ever blocking, and return its descriptor. Usable as the `opener` of `open`.

    Args:
        flags: as of `os.open`.
        follow: whether the path may be a symbolic link to a regular file.
        dir_fd: descriptor of the directory that a relative path starts from.
        mode: permissions of a created file.

    Raises:
        NotRegularError: the path leads to something else.
        OSError: it cannot be opened.
    """
    try:
        _check_regular(path, os.stat(path, dir_fd=dir_fd, follow_symlinks=follow))  # opens no device
    except FileNotFoundError:
        if not flags & os.O_CREAT:
            raise
    flags |= os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    descriptor = os.open(path, flags, mode, dir_fd=dir_fd)
    try:
        _check_regular(path, os.fstat(descriptor))  # it may have been replaced since
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _check_regular(path: str | Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise NotRegularError(path, status.st_mode)


def open_file(path: str | Path) -> io.BufferedReader:
    """Open a regular file to read bytes; raises OSError like `open_regular`."""
    return open(path, "rb", opener=open_regular)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Let the errors of a full or read-only disk name `path`: those of writing to an open file name none."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
            error.filename = str(path)
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a new file beside `path`, which replaces `path` if no exception is raised.

    A symbolic link at `path` is replaced, and what it leads to stays as it is.

    Raises:
        UserError: there is something else than a file, such as a directory or a device, or a link to that.
        OSError: it cannot be written; the error names `path`.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:  # none, a broken link, or a folder that cannot be searched: then writing fails
        mode = stat.S_IFREG
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: got a {kind_of(mode)}, expected a regular file, or none; move it away")
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with naming(path):
            yield partial
            os.replace(partial, path)
    except OSError as error:
        if error.filename == str(partial):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        with suppress(OSError):  # the error that led here says more
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8, all or nothing; what is at `path` is replaced as by `replacing`."""
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")


def check_folder(path: Path) -> None:
    """Raise UserError unless `path` is a directory, a link to one, or does not exist yet."""
    status = status_of(path)
    if status is None or path.is_dir():
        return
    if stat.S_ISLNK(status.st_mode):
        raise UserError(
            f"{path}: got a symbolic link to {os.readlink(path)}, which is no directory; expected a directory or a "
            "link to one: create what it leads to, or remove the link"
        )
    raise UserError(f"{path}: got a {kind_of(status.st_mode)}, expected a directory or a link to one; move it away")


def read_regular(path: str | Path, *, follow: bool = True) -> bytes:
    """The content of a regular file; raises OSError like `open_regular`."""
    with open(path, "rb", opener=lambda name, flags: open_regular(name, flags, follow=follow)) as file:
        return file.read()


def map_file(path: str | Path, *, follow: bool = True) -> Mapped:
    """Map a regular file into memory, read-only; raises OSError like `open_regular`.

    The file must not be truncated meanwhile: reading it would end the process.
    """
    descriptor = open_regular(path, follow=follow)
    try:
        return map_descriptor(descriptor)
    finally:
        os.close(descriptor)


def map_descriptor(descriptor: int) -> Mapped:
    """Map an open file into memory, read-only."""
    return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) if os.fstat(descriptor).st_size else b""


def check_expansion(file: Any) -> None:
    """Raise ValueError if an open zip archive expands to more than its size; `torch.save` compresses nothing.

    Compressed or overlapping records could expand a thousandfold. Other files pass.
    """
    start = file.tell()
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                expanded = sum(record.file_size for record in archive.infolist())
            size = file.seek(0, os.SEEK_END)
            if expanded > size:
                raise ValueError(f"its {size} bytes expand to {expanded}, expected uncompressed tensors")
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"a damaged zip archive: {error}") from None
    finally:
        file.seek(start)


def sha256_of(file: IO[bytes]) -> str:
    """The SHA-256 of an open file in hex."""
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


class Directory:
    """An open directory. Its files are addressed by name, and never through symbolic links.

    Args:
        path: not a symbolic link.

    Raises:
        OSError: no directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)

    def close(self) -> None:
        """Close the directory."""
        os.close(self.fd)

    def __enter__(self) -> Directory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def names(self) -> list[str]:
        """The names in the directory, sorted."""
        return sorted(os.listdir(self.fd))

    def status(self, name: str) -> os.stat_result | None:
        """The status of a file, of a symbolic link itself; None if there is no such file."""
        return status_of(name, self.fd)

    def open(self, name: str, mode: str = "rb") -> IO[Any]:
        """Open a regular file like `open`; raises OSError like `open_regular`."""

        def opener(path: str, flags: int) -> int:
            return open_regular(path, flags, follow=False, dir_fd=self.fd)

        with self._named(name):
            return open(name, mode, opener=opener)

    def size(self, name: str) -> int | None:
        """The size of a file in bytes; None if there is no such file."""
        status = self.status(name)
        return None if status is None else status.st_size

    def read(self, name: str) -> bytes:
        """The content of a regular file; raises OSError like `open_regular`."""
        with self.open(name) as file:
            return bytes(file.read())

    def unlink(self, name: str, missing_ok: bool = False) -> None:
        """Remove a file; of a symbolic link, the link."""
        with self._named(name):
            try:
                os.unlink(name, dir_fd=self.fd)
            except FileNotFoundError:
                if not missing_ok:
                    raise

    def move(self, name: str, to: Directory, new: str | None = None) -> None:
        """Rename a file into a directory, where it replaces a file or link of its new name."""
        with self._named(name):
            os.replace(name, new or name, src_dir_fd=self.fd, dst_dir_fd=to.fd)

    def sync(self) -> None:
        """Write the names in the directory to disk."""
        os.fsync(self.fd)

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = str(self.path / name)
            raise
