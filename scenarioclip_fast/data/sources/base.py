"""Protocols for data sets that `pack` can read, and helpers to implement them.

See `docs/new-layout.md` for a complete implementation.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

from scenarioclip_fast.config_types import check_types
from scenarioclip_fast.data.boxes import BoxFormat
from scenarioclip_fast.data.check import BadEntry, CheckedScene, Rejection, safe_key
from scenarioclip_fast.data.config import MAX_PIXELS
from scenarioclip_fast.data.shards import SPLITS
from scenarioclip_fast.errors import UserError

T = TypeVar("T")

# A split that a data set may assign: not test, but either of the others, chosen by a hash of the key.
TRAINVAL = "trainval"

# Maps a scene's key and the split assigned by the data set (or None) to the scene's split.
SplitOf = Callable[[str, str | None], str]

LARGE = 2000  # entries from which worker processes pay off


@dataclass(frozen=True)
class SourceOptions:
    """How to read a data set. A format may use fields other than `max_pixels` only if its `accepts` lists them.

    Attributes:
        max_pixels: larger images are rejected.
        images: directory of the images, if they are not where the format expects them.
        actions: JSON file with the action of each image, or COCO captions; see `sources.actions`.
        boxes: convention of the boxes, see `boxes.to_corners`; None: "xyxy", and packing ends with an error if the
            masks show that it is another.

    Raises:
        UserError: a value has the wrong type or is out of range, or a path does not exist.
    """

    max_pixels: int = MAX_PIXELS
    images: Path | None = None
    actions: Path | None = None
    boxes: BoxFormat | None = None

    def __post_init__(self) -> None:
        check_types(self)
        if self.max_pixels < 1:
            raise UserError(f"max_pixels: got {self.max_pixels}, expected at least 1")
        if self.images is not None and not self.images.is_dir():
            raise UserError(f"images: {self.images}: no such directory")
        if self.actions is not None and not self.actions.exists():
            raise UserError(f"actions: {self.actions}: no such file or directory")

    def given(self) -> list[str]:
        """The names of the fields that not every format uses and that are set."""
        return [f.name for f in fields(self) if f.name != "max_pixels" and getattr(self, f.name) != f.default]


@dataclass(frozen=True)
class Scan:
    """Findings about a data set from before its items are read.

    Attributes:
        rejected: entries that are not among the items.
        ignored: counts of files that belong to no scene, by suffix.
        warnings: a sentence for each thing that is usable but may not be what was meant, such as a file name that
            assigns no split where others do; each names the file.
    """

    rejected: list[Rejection] = field(default_factory=list)
    ignored: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


class Reader(Protocol):
    """Reads single items of a `Source`. Pickled to worker processes, so it should be small and hold no open files."""

    def read(self, item: Any) -> CheckedScene:
        """Read and check one item: its image as encoded bytes, its masks as RLE (see `check.SceneChecker`).

        Raises:
            BadEntry: the whole scene is unusable. It is listed in rejected.jsonl under `str(item)`.
        """
        ...


@runtime_checkable
class Source(Protocol):
    """A data set that is read item by item. Subclasses inherit the defaults below.

    Methods are called in the order `fingerprint`, `scan`, then `items`, `reader` and `total`.
    """

    accepts: ClassVar[frozenset[str]] = frozenset()
    """The fields of `SourceOptions` that the format uses besides `max_pixels`; others are refused."""

    @property
    def directories(self) -> set[Path]:
        """Resolved directories of the data, to which no pack may be written."""
        ...

    def items(self, split_of: SplitOf) -> Iterable[Any]:
        """Yield the items, which must be picklable, in a fixed order: all of train first, then val, then test.

        If `fingerprint` is None, any order is allowed.
        """
        ...

    def reader(self) -> Reader:
        """Create the reader of the items."""
        ...

    def scan(self, workers: int, progress: bool) -> Scan:
        """Find the items, using `workers` processes if that is slow."""
        return Scan()

    def fingerprint(self) -> str | None:
        """A hash that changes when the data set does, ideally of file names, sizes and times rather than content.

        None (default): unknown, so the data set is always packed from the start.
        """
        return None

    @property
    def classes(self) -> dict[str, list[str]] | None:
        """The "actions", "objects" and "relations" of the vocabulary. None (default): all texts that occur."""
        return None

    @property
    def total(self) -> int | None:
        """The number of items, for progress reports. None (default): unknown."""
        return None

    @property
    def large(self) -> bool:
        """Whether to use several worker processes by default."""
        return False

    @property
    def parallel(self) -> bool:
        """Whether worker processes are allowed."""
        return True


class SourceFormat(Protocol):
    """What the registry holds for a format: usually a subclass of `Source` with these class members.

    It may also have `accepts`, as `Source` does.
    """

    @property
    def expects(self) -> str:
        """A short description of a data set of this format, for error messages."""
        ...

    def recognises(self, paths: Sequence[str | Path]) -> bool:
        """Whether `paths` look like this format. Must be fast, and False for missing paths."""
        ...

    def open(self, paths: Sequence[str | Path], options: SourceOptions) -> Source:
        """Open a data set.

        Raises:
            UserError: not a usable data set of this format.
        """
        ...


def by_split(items: Iterable[T], split_of: SplitOf, identify: Callable[[T], tuple[str, str | None]]) -> Iterator[T]:
    """Yield items in the order required by `Source.items`: train, val, test. The order within a split is preserved.

    Args:
        identify: returns the id of an item's scene and the split assigned by the data set (or None).
    """
    groups: dict[str, list[T]] = {split: [] for split in SPLITS}
    for item in items:
        name, assigned = identify(item)
        try:
            key = safe_key(name)
        except BadEntry:  # in any split, reading the item rejects it
            key = ""
        groups[split_of(key, assigned)].append(item)
    for split in SPLITS:
        yield from groups[split]


def shuffled(items: Iterable[T], name_of: Callable[[T], str]) -> list[T]:
    """Sort items by a hash of their names.

    Neighbours in an annotation file are often similar (same video, same photographer). This separates them for
    sequential readers.
    """
    return sorted(items, key=lambda item: hashlib.sha256(name_of(item).encode("utf-8", "backslashreplace")).digest())


def fingerprint_files(files: Iterable[Path]) -> str:
    """Hash the names, sizes and modification times of files."""
    digest = hashlib.sha256()
    for path in files:
        status = os.stat(path)
        digest.update(f"{path.name}\0{status.st_size} {status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
