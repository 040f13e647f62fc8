"""Reads WebDataset tars whose samples are KEY.jpg (or .jpeg) and KEY.json in this package's schema.

KEY.json is what `scene.scene_to_json` gives:

    {"schema": 1, "size": [H, W], "action": "riding a bike",
     "objects": [{"name": "dog", "box": [x1, y1, x2, y2], "mask": {"size": [H, W], "counts": "..."} or null}, ...],
     "relations": [{"subject": 0, "predicate": "on", "object": 1}, ...]}

Members of one key may come in any order; a tar's directories become part of the key, what no key may have is replaced
(see `check.safe_key`), and everything else in it is passed over and counted. Nothing is ever extracted: headers say
where a sample lies, and its bytes are read from there.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import stat
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scenarioclip_fast.data.check import (
    MAX_IMAGE_BYTES,
    BadEntry,
    Rejection,
    clean_scene,
    given_splits,
    image_reason,
    normalised,
    safe_key,
    short,
    split_conflict,
)
from scenarioclip_fast.data.decode import MAX_PIXELS, DecodeError, TorchDecoder
from scenarioclip_fast.data.parallel import ordered_map
from scenarioclip_fast.data.reference_layout import load_classes
from scenarioclip_fast.data.scene import Scene, scene_from_json
from scenarioclip_fast.data.shards import SPLITS
from scenarioclip_fast.data.vocabulary import Vocabulary
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.progress import progress as show_progress

MAX_RECORD_BYTES = 1 << 24  # a KEY.json; a thousand objects with their masks stay below
_MAX_HEADER = 1 << 20  # names and attributes of one member
_LARGE = 1 << 28  # bytes of tars from which several processes pay
_IMAGES = ("jpg", "jpeg")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_COMPRESSED_NAMES = (".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass(frozen=True)
class Sample:
    """Where one sample lies: (offset, size) of its image and of its record in tar number `tar`."""

    tar: int
    name: str
    key: str
    split: str | None
    image: tuple[int, int]
    record: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.name}: {self.key}"


@dataclass(frozen=True)
class _Tar:
    path: Path
    name: str  # from the directory that all tars have in common
    split: str | None
    size: int
    mtime_ns: int


@dataclass
class _Listing:
    """The samples of one tar, compactly: there may be many millions."""

    keys: str = ""  # a line each
    places: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 4), np.int64))
    rejected: list[Rejection] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)


def find_tars(source: str | Path) -> list[Path]:
    """The tars that a directory, a file's name or a glob pattern stands for, by name; none if it stands for none."""
    path = Path(source)
    if path.is_dir():
        found = [entry for entry in path.iterdir() if entry.name.endswith((".tar", *_COMPRESSED_NAMES))]
    elif path.exists():
        found = [path] if path.name.endswith((".tar", *_COMPRESSED_NAMES)) else []
    else:
        found = [Path(name) for name in glob.glob(str(source)) if name.endswith((".tar", *_COMPRESSED_NAMES))]
    return sorted(found)


class WebDatasetLayout:
    """WebDataset tars as a source to pack. A tar's name gives the split where it begins with train-, val- or test-.

    A key of several splits stays in the one that is held out most (test, then val).

    Args:
        source: a directory, a tar, a glob pattern, or several paths of tars. A directory's classes.json, or the
            vocabulary of a pack, says which texts are known; without one whatever occurs is.
        max_pixels: larger images are rejected.

    Raises:
        UserError: no such file, no tar, or a compressed one.
    """

    def __init__(self, source: str | Path | Sequence[str | Path], max_pixels: int = MAX_PIXELS) -> None:
        self._max_pixels = max_pixels
        single = source if isinstance(source, (str, Path)) else None
        paths = sorted(set(map(Path, source))) if not isinstance(source, (str, Path)) else find_tars(source)
        if not paths:
            raise UserError(
                f"{single or 'the source'}: no .tar there, expected WebDataset tars of KEY.jpg and KEY.json"
            )
        above = os.path.commonpath([path.absolute().parent for path in paths])
        self._tars = [_stat(path, os.path.relpath(path, above)) for path in paths]
        self._listings: list[_Listing] = []
        self._given: dict[str, str] = {}  # key -> split, where names of tars leave it open
        self.classes: dict[str, list[str]] | None = None
        if single is not None and Path(single).is_dir():
            self.classes = load_classes(Path(single) / "classes.json") or _classes_of_pack(Path(single))

    def __len__(self) -> int:
        return sum(len(listing.places) for listing in self._listings)

    @property
    def directories(self) -> set[Path]:
        """Where the source lies, and no pack may be written."""
        return {tar.path.resolve().parent for tar in self._tars}

    @property
    def large(self) -> bool:
        """Whether several processes pay."""
        return sum(tar.size for tar in self._tars) >= _LARGE

    def fingerprint(self) -> str:
        """Changes with the classes, and with the name, size or time of any tar."""
        tars = [[tar.name, tar.size, tar.mtime_ns] for tar in self._tars]
        return hashlib.sha256(json.dumps([tars, self.classes]).encode()).hexdigest()

    def scan(self, workers: int, progress: bool) -> tuple[list[Rejection], dict[str, int]]:
        """Reads the tars' headers. What was rejected by them, and how many members of which kind were passed over."""
        listings = ordered_map(_list, self._tars, min(workers, len(self._tars)), chunk=1)
        if progress:
            listings = show_progress(listings, len(self._tars), "reading headers", "tars")
        self._listings = list(listings)
        self._settle_splits()
        ignored: Counter[str] = Counter()
        for listing in self._listings:
            ignored.update(listing.ignored)
        rejected = [rejection for listing in self._listings for rejection in listing.rejected]
        return rejected, dict(sorted(ignored.items()))

    def _settle_splits(self) -> None:
        """A key of a tar without a split has the one that another tar gives it; samples of two splits are taken out."""
        if len({tar.split for tar in self._tars}) == 1:
            return
        listings = list(zip(self._tars, self._listings, strict=True))
        self._given = given_splits((key, tar.split) for tar, some in listings for key in some.keys.splitlines())
        for tar, listing in listings:
            keys = listing.keys.splitlines()
            kept = [i for i, key in enumerate(keys) if tar.split in (None, self._given.get(key))]
            for i in sorted(set(range(len(keys))) - set(kept)):
                listing.rejected.append(split_conflict(f"{tar.name}: {keys[i]}", self._given[keys[i]]))
            listing.keys, listing.places = "\n".join(keys[i] for i in kept), listing.places[kept]

    def items(self, split_of: Callable[[str, str | None], str]) -> Iterable[Sample]:
        """The samples split by split, as they lie: writers of WebDataset tars mix, and reading in order is fast."""
        for split in SPLITS:
            for i, (tar, listing) in enumerate(zip(self._tars, self._listings, strict=True)):
                for key, place in zip(listing.keys.splitlines(), listing.places, strict=True):
                    given = self._given.get(key, tar.split)
                    if split_of(key, given) == split:
                        a, b, c, d = place.tolist()
                        yield Sample(i, tar.name, key, given, (a, b), (c, d))

    def reader(self) -> SampleReader:
        return SampleReader([tar.path for tar in self._tars], self.classes, self._max_pixels)


class SampleReader:
    """Reads single samples. Light to send to a process, which opens its own files."""

    def __init__(self, paths: list[Path], classes: dict[str, list[str]] | None, max_pixels: int) -> None:
        self._paths, self._max_pixels = paths, max_pixels
        self._classes = None if classes is None else {level: frozenset(texts) for level, texts in classes.items()}
        self._open: tuple[int, int] | None = None  # number of the tar, descriptor
        self._decoder: TorchDecoder | None = None

    def read(self, sample: Sample, *, encode: bool = False) -> tuple[Scene, tuple[int, int], list[Rejection]]:
        """The scene of a sample, its image's (H, W), and what of it was rejected.

        The image is decoded, to know that it is whole, and kept as bytes. Masks are RLE.

        Raises:
            BadEntry: the whole scene is unusable.
            UserError: the tar cannot be read any more.
        """
        image = self._pread(sample, *sample.image)
        scene, named = _parse(sample.key, image, self._pread(sample, *sample.record))
        if self._classes is not None and scene.action not in self._classes["actions"]:
            raise BadEntry("unknown_action", f"{scene.action!r} is not among the actions of the vocabulary")
        if self._decoder is None:
            self._decoder = TorchDecoder(threads=1, max_pixels=self._max_pixels)
        (pixels,) = self._decoder.decode([image])
        if isinstance(pixels, DecodeError):
            raise BadEntry(image_reason(pixels), pixels.detail)
        size = (pixels.shape[0], pixels.shape[1])
        if named != size:
            raise BadEntry(
                "other_size", f"the image has {size[1]} x {size[0]}, its record says {named[1]} x {named[0]}"
            )
        scene.split = sample.split
        scene, bad = clean_scene(scene, size, str(sample), encode=encode, classes=self._classes)
        return scene, size, bad

    def _pread(self, sample: Sample, offset: int, size: int) -> bytes:
        path = self._paths[sample.tar]
        try:
            if self._open is None or self._open[0] != sample.tar:
                self.close()
                self._open = (sample.tar, os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            data = os.pread(self._open[1], size, offset)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; is what it lies on still there?") from None
        if len(data) != size:
            raise UserError(f"{path}: got {len(data)} of {size} bytes at {offset}: the file has changed meanwhile")
        return data

    def close(self) -> None:
        """Closes the tar that is open."""
        if self._open is not None:
            os.close(self._open[1])
            self._open = None

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None, "_decoder": None}


def _parse(key: str, image: bytes, content: bytes) -> tuple[Scene, tuple[int, int]]:
    """The scene of a record, with normalised texts, and the (H, W) that it names."""
    try:
        record = json.loads(content)
        scene = normalised(scene_from_json(key, image, record))
        height, width = (int(n) for n in record["size"])
    except BadEntry:
        raise
    except (ValueError, RecursionError) as error:
        raise BadEntry("malformed_entry", str(error)) from None
    return scene, (height, width)


def _stat(path: Path, name: str) -> _Tar:
    if path.name.endswith(_COMPRESSED_NAMES):
        raise _compressed(path, path.suffix)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: not a regular file, expected a tar")
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    for magic, how in _COMPRESSED.items():
        if start.startswith(magic):
            raise _compressed(path, how)
    prefix, dash, _ = path.name.partition("-")
    return _Tar(path, name, prefix if dash and prefix in SPLITS else None, status.st_size, status.st_mtime_ns)


def _compressed(path: Path, how: str) -> UserError:
    return UserError(f"{path}: compressed ({how}), which allows no access to single samples; unpack it to a plain .tar")


def _classes_of_pack(directory: Path) -> dict[str, list[str]] | None:
    if not (directory / "manifest.json").exists() or not (directory / "vocabulary.json").exists():
        return None
    words = Vocabulary.load(directory / "vocabulary.json")
    return {"actions": words.actions, "objects": words.objects, "relations": words.relations}


def _list(tar: _Tar) -> _Listing:
    """Every sample of a tar by its headers alone."""
    listing = _Listing()
    # name without the suffix -> the place of its image and of its record
    found: dict[str, list[tuple[int, int] | None]] = {}

    def reject(name: str, reason: str, detail: str) -> None:
        listing.rejected.append(Rejection(f"{tar.name}: {name}", reason, detail))

    try:
        with tar.path.open("rb") as file:
            for member in _members(file, tar.size):
                if member.isdir():
                    continue
                if member.offset_data + member.size > tar.size:
                    raise tarfile.ReadError(f"{member.name} ends behind the end of the file")
                try:
                    kind, name = _kind(member)
                    if kind is None:
                        listing.ignored[name] += 1
                        continue
                    _key(name)
                except BadEntry as error:
                    reject(member.name, error.reason, error.detail)
                    continue
                places = found.setdefault(name, [None, None])
                if places[kind] is None:
                    places[kind] = (member.offset_data, member.size)
                else:
                    reject(name, "duplicate_id", f"{'a record' if kind else 'an image'} of this name came before")
    except (tarfile.TarError, ValueError, RecursionError) as error:
        reject("the tar", "damaged_tar", f"{error}; {len(found)} samples were found before")
    except OSError as error:
        raise UserError(f"{tar.path}: {error.strerror}") from None
    for name, (image, record) in found.items():
        if image is None:
            reject(name, "missing_image", "there is a .json, and no .jpg or .jpeg")
        elif record is None:
            reject(name, "missing_record", "there is an image, and no .json")
    whole = [(_key(name), *image, *record) for name, (image, record) in found.items() if image and record]
    listing.keys = "\n".join(row[0] for row in whole)
    listing.places = np.array([row[1:] for row in whole], np.int64).reshape(-1, 4)
    return listing


def _key(name: str) -> str:
    """The key of a member's name without its suffix, in which directories count. BadEntry if it can have none."""
    return safe_key(name.replace("/", "_"), name)


def _kind(member: tarfile.TarInfo) -> tuple[int | None, str]:
    """(0 for an image or 1 for a record, its name without the suffix), or (None, the suffix) of something else.

    Raises:
        BadEntry: nothing to be read.
    """
    path = PurePosixPath(member.name)
    stem, _, suffix = path.name.partition(".")
    suffix = suffix.lower()
    if path.is_absolute() or ".." in path.parts:
        raise BadEntry("unsafe_member", "the name is absolute or leads out of the directory")
    if suffix not in (*_IMAGES, "json"):
        more, _, last = suffix.rpartition(".")
        return None, (".*." if more else ".") + short(last)[1:-1] if suffix else "no suffix"
    if not member.isreg() or member.issparse():
        raise BadEntry("unsafe_member", f"a {_KINDS.get(member.type, 'special file')}, expected a regular file")
    limit = MAX_RECORD_BYTES if suffix == "json" else MAX_IMAGE_BYTES
    if member.size > limit:
        reason = "malformed_entry" if suffix == "json" else "image_too_large"
        raise BadEntry(reason, f"{member.size} bytes, the limit is {limit}")
    return int(suffix == "json"), "/".join((*path.parts[:-1], stem))


_KINDS = {
    tarfile.SYMTYPE: "symbolic link",
    tarfile.LNKTYPE: "hard link",
    tarfile.FIFOTYPE: "pipe",
    tarfile.CHRTYPE: "device",
    tarfile.BLKTYPE: "device",
    tarfile.GNUTYPE_SPARSE: "sparse file",
}


def _members(file: io.BufferedReader, size: int) -> Iterator[tarfile.TarInfo]:
    """The members in order. tarfile.ReadError where the tar is damaged."""
    tar: Any = tarfile.TarFile(fileobj=_Headers(file))  # type: ignore[arg-type]
    before = -1
    while (member := tar.next()) is not None:
        # A negative size would send tarfile back and round for ever.
        if member.size < 0 or tar.offset <= before:
            raise tarfile.ReadError(f"{member.name}: a header of a negative size")
        before = tar.offset
        yield member
        tar.members.clear()  # it would keep every member
    file.seek(tar.offset)
    if tar.offset < size and file.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"no header at byte {tar.offset}")


class _Headers:
    """A file that gives out no more at a time than a header may have: tarfile believes the sizes that it reads."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError(f"got a header of {size} bytes, expected at most {_MAX_HEADER}")
        return self._file.read(size)
