"""Protocols for data sets that `pack` can read, and helpers to implement them.

See `docs/new-layout.md` for a complete implementation.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from scenarioclip_fast.data.check import BadEntry, CheckedScene, Rejection, safe_key
from scenarioclip_fast.data.shards import SPLITS

T = TypeVar("T")

# Maps a scene's key and the split assigned by the data set (or None) to the scene's split.
SplitOf = Callable[[str, str | None], str]


@dataclass(frozen=True)
class Scan:
    """Findings about a data set from before its items are read.

    `rejected` lists entries that are not among the items; `ignored` counts files that belong to no scene, by suffix.
    """

    rejected: list[Rejection] = field(default_factory=list)
    ignored: dict[str, int] = field(default_factory=dict)


class Reader(Protocol):
    """Reads single items of a `Source`. Pickled to worker processes, so it should be small and hold no open files."""

    def read(self, item: Any) -> CheckedScene:
        """Read and check one item: its image as encoded bytes, its masks as RLE (see `check.SceneChecker`).

        Raises:
            BadEntry: the whole scene is unusable. It is listed in rejected.jsonl under `str(item)`.
        """
        ...


class Source(Protocol):
    """A data set that is read item by item. Subclasses inherit the defaults below.

    Methods are called in the order `fingerprint`, `scan`, then `items`, `reader` and `total`.
    """

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
    """What the registry holds for a format: usually a subclass of `Source` with these class members."""

    @property
    def expects(self) -> str:
        """A short description of a data set of this format, for error messages."""
        ...

    def recognises(self, paths: Sequence[str | Path]) -> bool:
        """Whether `paths` look like this format. Must be fast, and False for missing paths."""
        ...

    def open(self, paths: Sequence[str | Path], max_pixels: int) -> Source:
        """Open a data set whose images have at most `max_pixels` pixels.

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


def fingerprint_files(files: Iterable[Path]) -> str:
    """Hash the names, sizes and modification times of files."""
    digest = hashlib.sha256()
    for path in files:
        status = os.stat(path)
        digest.update(f"{path.name}\0{status.st_size} {status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
