"""Directories of URLs that are written through fsspec: what `pathlib.Path` and `files.Directory` are for local ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import IO, Any

from scenarioclip_fast.data.remote import open_url, protocols_of
from scenarioclip_fast.errors import UserError

_BATCH = 256  # files per call of fsspec, which requests them concurrently
# Storage without directories, where `makedirs` creates buckets.
_BUCKETS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "hf"}


class RemoteFolder:
    """A directory of a URL, or a path in it.

    On object storage, a file appears when it is complete. Elsewhere (file://, sftp://), an interrupted write may leave
    a shorter file. The sizes of the files are listed once.
    """

    def __init__(self, url: str, fs: Any, path: str) -> None:
        self._url, self._fs, self._path = url, fs, path

    @classmethod
    def of(cls, url: str) -> RemoteFolder:
        """Open the directory of a URL.

        Raises:
            UserError: fsspec does not support the protocol, or cannot write files and copy them in the storage.
            MissingDependencyError: fsspec, or its package for this protocol, is not installed.
        """
        if any(character in url for character in "*?["):
            raise UserError(f"{url}: got a pattern, expected the URL of one directory")
        fs, path = open_url(url)
        if not _can_copy(fs):
            raise _not_writable(url)
        if not path.strip("/"):
            raise UserError(f"{url}: got a URL without a path, expected that of a directory")
        return cls(url.rstrip("/"), fs, path.rstrip("/"))

    def __str__(self) -> str:
        return self._url

    def __truediv__(self, name: str) -> RemoteFolder:
        return RemoteFolder(f"{self._url}/{name}", self._fs, f"{self._path}/{name}")

    def __enter__(self) -> RemoteFolder:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def name(self) -> str:
        """The last component of the path."""
        return self._path.rpartition("/")[2]

    @property
    def local(self) -> Path | None:
        """The resolved path of a file:// URL; otherwise None."""
        return Path(self._path).resolve() if "file" in protocols_of(self._fs) else None

    @property
    def canonical(self) -> str:
        """The URL in the form that fsspec gives it, whatever the alias of its protocol."""
        return str(self._fs.unstrip_protocol(self._path))

    @cached_property
    def _listing(self) -> dict[str, int | None]:
        """The sizes of the files; None for directories."""
        self._fs.invalidate_cache()
        with self._named():
            try:
                found = self._fs.ls(self._path, detail=True)
            except FileNotFoundError:
                return {}
        listing = {}
        for info in found:
            parent, _, name = info["name"].rstrip("/").rpartition("/")
            if name and parent.strip("/") == self._path.strip("/"):  # some list the directory itself
                listing[name] = info["size"] if info["type"] == "file" else None
        return listing

    def names(self) -> list[str]:
        """The names in the directory, sorted."""
        return sorted(self._listing)

    def size(self, name: str) -> int | None:
        """The size of a file in bytes; None if there is no such file."""
        return self._listing.get(name)

    def refresh(self) -> None:
        """List the files again when they are needed next."""
        self.__dict__.pop("_listing", None)

    def exists(self, name: str) -> bool:
        """Whether there is a file now, whatever has been listed."""
        self._fs.invalidate_cache()
        with self._named(name), suppress(FileNotFoundError):  # `exists` takes any error for a no
            self._fs.info(self._at(name))
            return True
        return False

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            FileNotFoundError: there is no such file.
            UserError: it cannot be read.
        """
        with self._named(name):
            return bytes(self._fs.cat_file(self._at(name)))

    def read_each(self, names: Iterable[str], batch: int) -> Iterator[bytes | None]:
        """The contents of files, of which `batch` are requested at the same time; None for one that does not exist."""
        left = iter(names)
        while some := list(islice(left, batch)):
            with self._named():
                contents = self._fs.cat_ranges([self._at(name) for name in some], None, None, on_error="return")
            for name, data in zip(some, contents, strict=True):
                with self._named(name), suppress(FileNotFoundError):
                    if isinstance(data, Exception):
                        raise data
                yield None if isinstance(data, Exception) else bytes(data)

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """Open a file to read it."""
        with self._named(name), self._fs.open(self._at(name), "rb") as file:
            yield file

    def write(self, name: str, data: bytes) -> None:
        """Write a small file."""
        with self._named(name, missing=True):
            self._make_parent(name)
            self._fs.pipe_file(self._at(name), data)

    def upload(self, source: Path, name: str) -> None:
        """Copy a local file to the storage."""
        with self._named(name, missing=True):
            self._make_parent(name)
            self._fs.put_file(str(source), self._at(name))

    def copy(self, names: Sequence[tuple[str, str]]) -> None:
        """Copy files in the storage, from the first name of each pair to the second one."""
        for start in range(0, len(names), _BATCH):
            pairs = names[start : start + _BATCH]
            with self._named(missing=True):
                self._fs.copy(*([self._at(pair[k]) for pair in pairs] for k in (0, 1)))

    def move(self, name: str, new: str) -> None:
        """Rename a file; one that exists is replaced at once."""
        with self._named(new, missing=True):
            self._fs.mv(self._at(name), self._at(new))

    def remove(self, names: Iterable[str]) -> None:
        """Remove files. Those that another process has just removed are passed over."""
        left = iter(names)
        while batch := list(islice(left, _BATCH)):
            with self._named():
                try:
                    self._fs.rm([self._at(name) for name in batch])
                except FileNotFoundError:
                    for name in batch:
                        with suppress(FileNotFoundError):
                            self._fs.rm_file(self._at(name))

    def remove_folder(self) -> None:
        """Remove the directory if it is empty and the storage has directories."""
        if self._has_folders:
            with suppress(OSError):
                self._fs.rmdir(self._path)

    @property
    def _has_folders(self) -> bool:
        return _BUCKETS.isdisjoint(protocols_of(self._fs))

    def _make_parent(self, name: str) -> None:
        if self._has_folders:
            self._fs.makedirs(self._at(name).rpartition("/")[0], exist_ok=True)

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}"

    @contextmanager
    def _named(self, name: str = "", missing: bool = False) -> Iterator[None]:
        """Turn the errors of storage libraries, each of which has its own, into one line.

        Args:
            missing: also FileNotFoundError.
        """
        url = f"{self._url}/{name}" if name else self._url
        try:
            yield
        except UserError:
            raise
        except NotImplementedError:
            raise _not_writable(url) from None
        except Exception as error:
            if isinstance(error, FileNotFoundError) and not missing:
                raise
            what = " ".join(str(error).split())
            raise UserError(f"{url}: {type(error).__name__}: {what}") from error


def _can_copy(fs: Any) -> bool:
    """Whether a file system implements copies, which those that only read do not."""
    from fsspec.asyn import AsyncFileSystem
    from fsspec.spec import AbstractFileSystem

    method, base = ("_cp_file", AsyncFileSystem) if fs.async_impl else ("cp_file", AbstractFileSystem)
    return getattr(type(fs), method) is not getattr(base, method)


def _not_writable(url: str) -> UserError:
    return UserError(
        f"{url}: got a URL that packs cannot be written to, expected one of storage whose files can be written and "
        "copied, such as s3://, gs:// or file://"
    )
