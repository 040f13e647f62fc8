"""List the samples of an untrusted, uncompressed tar from its headers (see `tars`). Nothing is extracted."""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from scenarioclip_fast.data.check import MAX_IMAGE_BYTES, BadEntry, Rejection, safe_key
from scenarioclip_fast.data.shards import split_named, words_of
from scenarioclip_fast.data.tars import read_members, special_kind
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import open_file
from scenarioclip_fast.terminal import short

MAX_RECORD_BYTES = 1 << 24  # of a KEY.json; enough for a thousand objects with masks
COMPRESSED_SUFFIXES = (".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
_IMAGES = ("jpg", "jpeg")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}

# (offset, size) of a sample's image and of its record; None if not found (yet)
_Extents = list[tuple[int, int] | None]


@dataclass(frozen=True)
class Tar:
    """A tar on disk. `name` is relative to the common directory of all tars, and determines `split` (`split_of`)."""

    path: Path
    name: str
    split: str | None
    size: int
    mtime_ns: int


@dataclass
class TarIndex:
    """The samples of one tar, stored compactly because there may be many millions."""

    keys: str = ""  # one per line
    extents: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 4), np.int64))
    rejected: list[Rejection] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)


def check_name(where: str | Path) -> None:
    """Raise UserError if the path or URL of a tar ends like that of a compressed one."""
    if str(where).endswith(COMPRESSED_SUFFIXES):
        raise _compressed(where, PurePosixPath(where).suffix)


def open_tar(path: Path, name: str, where: str = "") -> Tar:
    """Check that `path` is an uncompressed regular file.

    Args:
        where: the URL that the file was downloaded from; "": none.

    Raises:
        UserError: compressed, not a regular file, or unreadable.
    """
    check_name(path)
    try:
        with open_file(path) as file:
            status = os.fstat(file.fileno())
            start = file.read(8)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    for magic, how in _COMPRESSED.items():
        if start.startswith(magic):
            raise _compressed(where or path, how)
    return Tar(path, name, split_of(name), status.st_size, status.st_mtime_ns)


def split_warnings(names: Sequence[str]) -> list[str]:
    """A warning if the names of some tars name a split and others do not, which may be a misspelling."""
    without = [name for name in names if split_of(name) is None]
    if len(without) in (0, len(names)):
        return []
    prefixes = list(dict.fromkeys(map(_prefix, without)))
    shown = ", ".join(map(short, prefixes[:5])) + ", ..." * (len(prefixes) > 5)
    named = next(name for name in names if split_of(name) is not None)
    return [
        f"{len(without)} of {len(names)} tars have a prefix that names no split ({shown}), unlike {short(named)}: "
        "their scenes are split by the hash of their keys"
    ]


def split_of(name: str) -> str | None:
    """The split that the first word of a tar's name names, or else the innermost of its folders that names one."""
    words = [_prefix(name), *reversed(PurePosixPath(name).parts[:-1])]
    return next((split for word in words if (split := split_named(word))), None)


def _prefix(name: str) -> str:
    return next(iter(words_of(PurePosixPath(name).name)), "")


def _compressed(where: str | Path, how: str) -> UserError:
    return UserError(
        f"{where}: compressed ({how}), which prevents random access to samples; decompress it to a plain .tar"
    )


def index_tar(tar: Tar) -> TarIndex:
    """List all samples of a tar, and the rejected and ignored members."""
    index = TarIndex()
    found: dict[str, _Extents] = {}  # member name without the suffix -> extents

    def damaged(detail: str) -> None:
        _reject(index, tar, "the tar", "damaged_tar", f"{detail}; {len(found)} samples precede the damage")

    try:
        with open_file(tar.path) as file:
            for member in read_members(file, damaged):
                if not member.isdir():
                    _add_member(tar, member, found, index)
    except OSError as error:
        raise UserError(f"{tar.path}: {error.strerror}") from None
    for name, (image, record) in found.items():
        if image is None:
            _reject(index, tar, name, "missing_image", "the sample has a .json but no .jpg or .jpeg")
        elif record is None:
            _reject(index, tar, name, "missing_record", "the sample has an image but no .json")
    complete = [(_key(name), *image, *record) for name, (image, record) in found.items() if image and record]
    index.keys = "\n".join(row[0] for row in complete)
    index.extents = np.array([row[1:] for row in complete], np.int64).reshape(-1, 4)
    return index


def _add_member(tar: Tar, member: tarfile.TarInfo, found: dict[str, _Extents], index: TarIndex) -> None:
    try:
        kind, name = _kind(member)
        if kind is None:
            index.ignored[name] += 1
            return
        _key(name)
    except BadEntry as error:
        _reject(index, tar, member.name, error.reason, error.detail)
        return
    extents = found.setdefault(name, [None, None])
    if extents[kind] is None:
        extents[kind] = (member.offset_data, member.size)
    else:
        what = "a record" if kind else "an image"
        _reject(index, tar, name, "duplicate_id", f"the tar already has {what} with this name")


def _reject(index: TarIndex, tar: Tar, name: str, reason: str, detail: str) -> None:
    index.rejected.append(Rejection(f"{tar.name}: {name}", reason, detail))


def _key(name: str) -> str:
    """The key for a member's name without suffix; directories become part of it. Raises BadEntry if invalid."""
    return safe_key(name.replace("/", "_"), name)


def _kind(member: tarfile.TarInfo) -> tuple[int | None, str]:
    """(0 for an image or 1 for a record, its name without the suffix), or (None, suffix) for other files.

    Raises:
        BadEntry: unsafe name, not a regular file, or too large.
    """
    path = PurePosixPath(member.name)
    stem, _, suffix = path.name.partition(".")
    suffix = suffix.lower()
    if path.is_absolute() or ".." in path.parts:
        raise BadEntry("unsafe_member", "the name is absolute or escapes the directory")
    if suffix not in (*_IMAGES, "json"):
        more, _, last = suffix.rpartition(".")
        return None, (".*." if more else ".") + short(last)[1:-1] if suffix else "no suffix"
    if (special := special_kind(member)) is not None:
        raise BadEntry("unsafe_member", f"got a {special}, expected a regular file")
    limit = MAX_RECORD_BYTES if suffix == "json" else MAX_IMAGE_BYTES
    if member.size > limit:
        reason = "malformed_entry" if suffix == "json" else "image_too_large"
        raise BadEntry(reason, f"got {member.size} bytes, expected at most {limit}")
    return int(suffix == "json"), "/".join((*path.parts[:-1], stem))
