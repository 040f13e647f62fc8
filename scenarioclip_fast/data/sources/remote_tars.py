"""WebDataset tars on URLs: as those of `webdataset`, downloaded one after another and each once.

The headers of a remote tar cannot be read without most of its bytes. So its samples are unknown until it has been
downloaded, and the tars are packed one by one, each by the part that it belongs to (see `packing.units`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import islice, takewhile
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from scenarioclip_fast.data.check import SceneChecker
from scenarioclip_fast.data.remote import (
    Closed,
    NoRanges,
    Store,
    download,
    is_server,
    open_url,
    protocols_of,
)
from scenarioclip_fast.data.remote import without_query as _shown
from scenarioclip_fast.data.shards import split_named
from scenarioclip_fast.data.sources.base import Scan, SourceOptions
from scenarioclip_fast.data.sources.tar_index import (
    COMPRESSED_SUFFIXES,
    TarIndex,
    check_name,
    index_tar,
    open_tar,
    split_of,
    split_warnings,
)
from scenarioclip_fast.data.sources.webdataset import Sample, SampleReader, WebDatasetSource, classes_of
from scenarioclip_fast.errors import MissingDependencyError, UserError
from scenarioclip_fast.files import open_regular

_SUFFIXES = (".tar", *COMPRESSED_SUFFIXES)
_CLASSES = ("classes.json", "manifest.json", "vocabulary.bin", "vocabulary.json")  # see `webdataset.classes_of`
# What storage says of the content of a file, or else of when it was written; the first that is known counts.
_VERSIONS = (
    *("ETag", "etag", "e_tag", "md5Hash", "Content-MD5", "generation", "blob_id"),
    *("LastModified", "last_modified", "Last-Modified", "updated", "modified", "mtime", "created"),
)
_ASKED = 16  # sizes asked for concurrently
_MAX_TARS = 1_000_000  # that brace patterns may stand for
_LARGE = 1 << 28  # bytes of tars from which worker processes pay off
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class RemoteTar:
    """A tar on a URL.

    Attributes:
        url: with the query of a signed URL, which messages must not show.
        name: relative to the common directory of all tars.
        size: bytes.
        version: what changes with its content: a field of `_VERSIONS` and its value; None if the storage has none.
    """

    url: str
    name: str
    size: int
    version: tuple[str, str] | None

    @property
    def split(self) -> str | None:
        """The split that the name assigns."""
        return split_of(self.name)

    def __str__(self) -> str:
        return _shown(self.url)


@dataclass(frozen=True)
class FetchedTar:
    """A tar that has been downloaded.

    Attributes:
        scan: the findings besides its samples, see `base.Scan`.
        reader: of the samples.
    """

    tar: RemoteTar
    scan: Scan
    reader: SampleReader
    _index: TarIndex

    @property
    def count(self) -> int:
        """The number of samples."""
        return len(self._index.extents)

    def samples(self) -> Iterator[Sample]:
        """The samples, in the order of the tar."""
        for key, extents in zip(self._index.keys.splitlines(), self._index.extents, strict=True):
            a, b, c, d = extents.tolist()
            yield Sample(0, self.tar.name, key, self.tar.split, (a, b), (c, d))


class RemoteTarSource:
    """WebDataset tars on URLs. The names of the tars assign splits as those of local ones do.

    Unlike a `base.Source`, it has no list of all samples: `fetch` yields them tar by tar.

    Args:
        urls: of directories, tars, or patterns of tars: `*`, `?` and `[...]`, where the storage lists files, and
            `{000..127}` and `{a,b}`. For a single directory, classes.json or the vocabulary of a pack in it lists the
            known texts, as for a local one.
        options: `max_pixels` and `boxes`.

    Raises:
        UserError: no such file, no tars, a compressed tar, or a URL that cannot be read.
        MissingDependencyError: fsspec, or its package for a protocol, is not installed.
    """

    accepts: ClassVar[frozenset[str]] = WebDatasetSource.accepts
    parallel: ClassVar[bool] = True

    def __init__(self, urls: Sequence[str], options: SourceOptions | None = None) -> None:
        self._options = options or SourceOptions()
        found = _Finder()
        expanded = [one for url in urls for one in islice(_expanded(url), _MAX_TARS + 1)]
        if len(expanded) > _MAX_TARS:
            raise UserError(f"{_shown(urls[0])}: got a pattern of more than {_MAX_TARS} tars; pack several sets")
        for url in expanded:
            found.add(url)
        self.tars = found.tars()
        if not self.tars:
            raise UserError(f"{_shown(urls[0])}: found no .tar, expected {WebDatasetSource.expects}")
        self._folders = {_split(tar.url)[0] for tar in self.tars}.union(found.listings)
        self.classes: dict[str, list[str]] | None = None
        if len(expanded) == 1 and found.listings:
            ((folder, listing),) = found.listings.items()
            self.classes = _classes_at(folder, listing)

    @property
    def large(self) -> bool:
        """Whether worker processes pay off."""
        return sum(tar.size for tar in self.tars) >= _LARGE

    @cached_property
    def directories(self) -> set[Path | str]:
        """The directories of the tars, to which no pack may be written: resolved paths, or URLs as fsspec has them."""
        found: set[Path | str] = set()
        for folder in self._folders:
            fs, path = open_url(folder)
            found.add(fs.unstrip_protocol(path.rstrip("/")))
            if "file" in protocols_of(fs):
                found.add(Path(path).resolve())
        return found

    def fingerprint(self) -> str:
        """A hash of the classes and of the names, sizes and versions of the tars."""
        tars = [[tar.name, tar.size, tar.version] for tar in self.tars]
        return hashlib.sha256(json.dumps(["tars", tars, self.classes]).encode()).hexdigest()

    def scan(self, workers: int, progress: bool) -> Scan:
        """What the names of the tars tell; `FetchedTar.scan` has the rest."""
        return Scan(warnings=split_warnings([tar.name for tar in self.tars]))

    def fetch(self, numbers: Sequence[int], folder: Path) -> Generator[FetchedTar]:
        """Download tars, the next one while the caller reads one. Each is removed when the next one is asked for.

        Args:
            numbers: of tars.
            folder: an empty directory for them; close the iterator before it is removed.

        Raises:
            UserError: a tar cannot be read, was changed, or is compressed; or there is no room for it.
        """
        with ExitStack() as stack:
            stores = {folder: Store(folder) for folder in {_split(self.tars[number].url)[0] for number in numbers}}
            pool = stack.enter_context(ThreadPoolExecutor(1, "download"))
            for store in stores.values():
                stack.callback(store.close)  # ends a download that is under way
            paths = [folder / f"{number:06d}.tar" for number in numbers]
            ahead: Future[None] | None = None
            for at, number in enumerate(numbers):
                tar, path = self.tars[number], paths[at]
                try:
                    with _failures(tar, folder):
                        if ahead is None or _lacked_room(ahead):
                            ahead = pool.submit(_download, stores, tar, path)
                        ahead.result()
                    ahead = None
                    if at + 1 < len(numbers):
                        ahead = pool.submit(_download, stores, self.tars[numbers[at + 1]], paths[at + 1])
                    yield self._opened(tar, path)
                finally:
                    path.unlink(missing_ok=True)

    def _opened(self, tar: RemoteTar, path: Path) -> FetchedTar:
        index = index_tar(open_tar(path, tar.name, str(tar)))
        checker = SceneChecker(self._options.max_pixels, self.classes, self._options.boxes)
        return FetchedTar(tar, Scan(index.rejected, dict(index.ignored)), SampleReader([path], checker), index)


class _Finder:
    """Finds the tars of URLs. `listings` has the URLs of the directories that were listed, and the sizes of files."""

    def __init__(self) -> None:
        self.listings: dict[str, dict[str, int]] = {}
        self._found: dict[str, dict[str, Any]] = {}  # URL -> what the storage says of a tar
        self._given: list[str] = []

    def add(self, url: str) -> None:
        """Add what a URL without braces leads to."""
        fs, path = open_url(url)
        if is_server(fs):
            if any(character in _shown(url) for character in "*[") or not _shown(url).endswith(_SUFFIXES):
                raise UserError(
                    f"{_shown(url)}: got no URL of a .tar, and servers list no files; give the URLs of the tars, or "
                    "all in one, such as https://host/train-{000..127}.tar"
                )
            self._given.append(url)
        elif re.search(r"[*?[]", url):
            self._glob(fs, path, url)
        elif path.endswith(_SUFFIXES):
            self._given.append(url)
        else:
            self._list(url.rstrip("/") if path.strip("/") else url)

    def _list(self, url: str) -> None:
        """Add the tars of a directory, and of its subfolders that are named after a split."""
        entries = _entries(url)
        self.listings[url] = {name: info["size"] or 0 for name, info in entries.items() if info["type"] == "file"}
        for name, info in entries.items():
            if info["type"] == "directory" and split_named(name):
                self._add_tars(_child(url, name), _entries(_child(url, name)))
        self._add_tars(url, entries)

    def _add_tars(self, url: str, entries: dict[str, dict[str, Any]]) -> bool:
        """Add the tars among the entries of a directory; returns whether there are any."""
        named = {name: info for name, info in entries.items() if name.endswith(_SUFFIXES)}
        tars = {_child(url, name): info for name, info in named.items() if info["type"] != "directory"}
        for one, info in tars.items():
            if info["type"] != "file":
                raise UserError(f"{one}: got a broken link or a special file, expected a regular file")
        self._found |= tars
        return bool(tars)

    def _glob(self, fs: Any, path: str, url: str) -> None:
        scheme, _, rest = url.partition("://")
        base = f"{scheme}://{re.split(r'[*?[]', rest, maxsplit=1)[0].rpartition('/')[0]}"
        root = open_url(base)[1].rstrip("/")
        with _errors(url):
            fs.invalidate_cache()
            found = fs.glob(path, detail=True)
            entries = {one[len(root) :].lstrip("/"): _followed(fs, info) for one, info in found.items()}
        if not self._add_tars(base, entries):
            raise UserError(f"{url}: found no .tar, expected {WebDatasetSource.expects}")

    def tars(self) -> list[RemoteTar]:
        """All tars, sorted by name."""
        self._ask()
        for url in self._found:
            check_name(_shown(url))
        folders = [*self.listings, *(_split(url)[0] for url in self._found)]
        levels = zip(*(folder.rstrip("/").split("/") for folder in folders), strict=False)
        common = sum(1 for _ in takewhile(lambda names: len(set(names)) == 1, levels))
        tars = []
        for url, info in self._found.items():
            name = "/".join(_shown(url).split("/")[common:])
            if type(info.get("size")) is not int:
                raise UserError(f"{_shown(url)}: the server does not say its size, by which a download is checked")
            tars.append(RemoteTar(url, name, info["size"], _version(info)))
        return sorted(tars, key=lambda tar: PurePosixPath(tar.name))

    def _ask(self) -> None:
        """Ask the storage about the tars that were given, or list them if they are directories."""
        stores = {folder: Store(folder) for folder in {_split(url)[0] for url in self._given}}
        left = list({_shown(url): url for url in self._given if url not in self._found}.values())

        def ask(url: str) -> dict[str, Any]:
            folder, name = _split(url)
            with _errors(url):
                return stores[folder].info(name)

        with ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(_ASKED, "ask"))
            for store in stores.values():
                stack.callback(store.close)
            found = dict(zip(left, pool.map(ask, left), strict=True))
        for url, info in found.items():
            if info["type"] == "directory":
                self._list(url)
            else:
                self._found[url] = info


def _expanded(pattern: str) -> Iterator[str]:
    """Expand `{000..127}` and `{a,b}`, as a shell does."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    numbers = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", match[1], re.ASCII)
    if numbers is None and "," not in match[1]:
        raise UserError(f"{_shown(pattern)}: got {match[0]}, expected numbers such as {{000..127}}, or words {{a,b}}")
    if numbers is None:
        words: Iterable[str] = match[1].split(",")
    else:
        first, last = int(numbers[1]), int(numbers[2])
        width = max(map(len, numbers.groups())) if any(n != str(int(n)) for n in numbers.groups()) else 0
        if not 0 <= last - first < _MAX_TARS:
            raise UserError(
                f"{_shown(pattern)}: got {match[0]}, expected the smaller number first, and at most {_MAX_TARS} tars"
            )
        words = (f"{n:0{width}d}" for n in range(first, last + 1))
    for word in words:
        yield from _expanded(f"{pattern[: match.start()]}{word}{pattern[match.end() :]}")


def _entries(url: str) -> dict[str, dict[str, Any]]:
    """What a directory contains, by name."""
    fs, path = open_url(url)
    with _errors(url):
        fs.invalidate_cache()
        found = fs.ls(path, detail=True)
    entries = {}
    for info in found:
        parent, _, name = info["name"].rstrip("/").rpartition("/")
        if name and parent.strip("/") == path.strip("/"):  # some list the directory itself
            with _errors(url):
                entries[name] = _followed(fs, info)
    return dict(sorted(entries.items()))


def _followed(fs: Any, info: dict[str, Any]) -> dict[str, Any]:
    """What a listing says of a file; of a symbolic link, what the storage says of its target."""
    if info.get("islink") or info["type"] == "link":
        with suppress(FileNotFoundError):
            return dict(fs.info(info["name"]))
    return info


def _version(info: dict[str, Any]) -> tuple[str, str] | None:
    for name in _VERSIONS:
        if (value := info.get(name)) not in (None, ""):
            time = value.timestamp() if isinstance(value, datetime) else value  # listings may have the one or the other
            return name, str(time).strip('"')
    return None


def _classes_at(url: str, listing: dict[str, int]) -> dict[str, list[str]] | None:
    """The known texts of a directory of tars, see `webdataset.classes_of`."""
    names = [name for name in _CLASSES if name in listing]
    if "manifest.json" not in names:
        names = names[:1] if names[:1] == ["classes.json"] else []
    if not names:
        return None
    store = Store(url)
    with tempfile.TemporaryDirectory(prefix="scenarioclip-pack-") as temporary:
        for name in names:
            with _errors(_child(url, name)):
                _copy(store, name, listing[name], Path(temporary) / name)
        try:
            return classes_of(Path(temporary))
        except UserError as error:
            raise UserError(str(error).replace(temporary, url)) from None


def _copy(store: Store, name: str, size: int, path: Path) -> None:
    descriptor = open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        download(store, name, size, descriptor)
    except BaseException:
        path.unlink()
        raise
    finally:
        os.close(descriptor)


def _download(stores: dict[str, Store], tar: RemoteTar, path: Path) -> None:
    """Download a tar, and check that it has not changed since it was found."""
    if (free := shutil.disk_usage(path.parent).free) < tar.size:
        raise OSError(errno.ENOSPC, f"{free} bytes are free")
    folder, name = _split(tar.url)
    try:
        _copy(stores[folder], name, tar.size, path)
        info = stores[folder].info(name)
    except EOFError as error:
        raise UserError(f"{tar}: {error}; it was changed while packing: pack it again, from the start") from None
    field = {} if tar.version is None else {tar.version[0]: info.get(tar.version[0])}
    if info.get("size") != tar.size or _version(field) not in (None, tar.version):
        raise UserError(f"{tar}: it was changed while packing: pack it again, from the start")


def _lacked_room(ahead: Future[None]) -> bool:
    """Whether a download failed because another tar had not been removed yet."""
    error = ahead.exception()
    return isinstance(error, OSError) and error.errno in _FULL


@contextmanager
def _failures(tar: RemoteTar, folder: Path) -> Iterator[None]:
    """Turn the errors of a download into one line."""
    try:
        with _errors(tar.url):
            yield
    except OSError as error:
        raise UserError(
            f"{folder}: no room for {tar} of {tar.size} bytes ({error.strerror}); set TMPDIR to a directory with more"
        ) from None


@contextmanager
def _errors(url: str) -> Iterator[None]:
    """Turn the errors of storage libraries into one line; but not those of a full disk."""
    try:
        yield
    except (UserError, MissingDependencyError, Closed):
        raise
    except FileNotFoundError:
        raise UserError(f"{_shown(url)}: no such file or directory") from None
    except NoRanges:
        raise UserError(
            f"{_shown(url)}: the server ignores byte ranges, in which tars are downloaded; serve them with another one"
        ) from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _FULL:
            raise
        what = " ".join(str(error).split()) or type(error).__name__
        what = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", what)  # as `_shown`
        raise UserError(f"{_shown(url)}: {what}") from error


def _child(url: str, name: str) -> str:
    return f"{url}{name}" if url.endswith("/") else f"{url}/{name}"


def _split(url: str) -> tuple[str, str]:
    """The URL of the directory of a file, and the file's name, with the query."""
    folder, _, name = _shown(url).rpartition("/")
    query = url[len(_shown(url)) :]
    return (f"{folder}/" if folder.endswith(":/") else folder), name + query
