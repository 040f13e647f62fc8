"""Units: what a source is cut into, whatever the number of parts. Part i of n packs the units u with u % n == i - 1.

The items of most sources are numbered in their order, and a unit has `shard_size` of them. Remote tars are units
themselves (see `sources.remote_tars`), and their items are numbered within each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from scenarioclip_fast.data.boxes import COLUMNS
from scenarioclip_fast.data.check import Rejection
from scenarioclip_fast.data.packing.shard_writer import COUNTS
from scenarioclip_fast.data.shards import SPLITS
from scenarioclip_fast.data.sources.base import Scan
from scenarioclip_fast.levels import LEVELS


class Units(ABC):
    """How a source is cut into units. `total` is always the number of its items, or of its tars.

    Attributes:
        noun: what becomes of a unit, or what it is, in messages.
        batch: records that are held in memory at the same time.
    """

    noun: ClassVar[str]
    batch: ClassVar[int] = 256

    @staticmethod
    def of(header: Mapping[str, Any]) -> Units:
        """The units that a part with this header has."""
        return TarUnits() if header.get("units") == TarUnits.name else ItemUnits(header["options"]["shard_size"])

    def of_part(self, part: tuple[int, int], total: int) -> range:
        """The units of a part."""
        return range(part[0] - 1, self.count(total), part[1])

    @abstractmethod
    def count(self, total: int) -> int:
        """The number of units."""

    @abstractmethod
    def numbers(self, record: Mapping[str, Any], total: int | None, found: int) -> range | None:
        """The numbers of a unit's items; None if its record is damaged.

        Args:
            total: None if it is not known yet.
            found: the number of items in the record.
        """


@dataclass(frozen=True)
class ItemUnits(Units):
    """Units of `size` items; the last one may have fewer."""

    size: int
    noun: ClassVar[str] = "shards"

    def count(self, total: int) -> int:
        """The number of units."""
        return -(-total // self.size)

    def items(self, units: Sequence[int], total: int) -> int:
        """The number of items in some units."""
        return sum(min(self.size, total - unit * self.size) for unit in units)

    def numbers(self, record: Mapping[str, Any], total: int | None, found: int) -> range | None:
        """The numbers of a unit's items. Without `total`, any unit may be the last one."""
        first = record["unit"] * self.size
        count = min(found, self.size) if total is None else min(self.size, total - first)
        return range(first, first + count) if count > 0 else None


class TarUnits(Units):
    """A unit for each tar, which may have no items. Its record also has what `of_tar` adds."""

    name: ClassVar[str] = "tars"  # in headers
    noun: ClassVar[str] = "tars"
    batch: ClassVar[int] = 16  # tars may have many more scenes than shards

    def count(self, total: int) -> int:
        """The number of units."""
        return total

    def numbers(self, record: Mapping[str, Any], total: int | None, found: int) -> range | None:
        """The positions of the items in the tar."""
        tar, split = tar_of(record)
        valid = isinstance(tar, str) and split in (None, *SPLITS) and {"tar", "assigned", "scan"} <= record.keys()
        return range(found) if valid and record["items"] == found else None

    @staticmethod
    def of_tar(tar: str, split: str | None, items: int, scan: Scan) -> dict[str, Any]:
        """What the record of a tar has besides that of any unit.

        Args:
            tar: its name.
            split: that its name assigns.
            items: their number.
            scan: the other findings in the tar.
        """
        rejected = [[r.entry, r.reason, r.detail, r.hint] for r in scan.rejected]
        return {
            "tar": tar,
            "assigned": split,
            "items": items,
            "scan": {"rejected": rejected, "ignored": scan.ignored, "warnings": scan.warnings},
        }


def tar_of(record: Mapping[str, Any]) -> tuple[str, str | None]:
    """The tar that a unit is, and the split that its name assigns; ("", None) for a unit of items."""
    return record.get("tar", ""), record.get("assigned")


def unit_name(unit: int) -> str:
    """The name of the record of a unit."""
    return f"unit-{unit:06d}.json"


def shard_name(split: str, unit: int, number: int) -> str:
    """The name of a shard of a unit; `number`: among those of its split."""
    return f"{split}-{unit:06d}-{number}.tar" if number else f"{split}-{unit:06d}.tar"


def sizes_of_unit(record: dict[str, Any] | None, unit: int, units: Units, total: int | None) -> dict[str, int] | None:
    """The sizes of a unit's shards in bytes, by name.

    Args:
        record: of the unit; None if it cannot be read.
        units: of which it is one.
        total: of the source, see `Units`; None if it is not known yet.

    Returns:
        None if the record is damaged; above all, if an item is neither in a shard nor rejected.
    """
    sizes: dict[str, int] = {}
    shards = Counter[str]()  # by split
    kept: list[int] = []
    try:
        if record is None or record["unit"] != unit:
            return None
        for shard in record["shards"]:
            numbers, split = shard["numbers"], shard["split"]
            complete = tuple(shard["counts"]) == COUNTS and set(LEVELS) == set(shard["texts"]) and "sha256" in shard
            if not complete or shard["name"] != shard_name(split, unit, shards[split]):
                return None
            if not len(shard["rows"]) == len(bytes(shard["views"])) == len(numbers):
                return None
            shards[split] += 1
            sizes[shard["name"]] = shard["bytes"]
            kept += numbers
        list(evidence_of(record))
        scan_of(record)
        found = {*kept, *(number for number, _ in rejections_of(record))}
        expected = units.numbers(record, total, len(found))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return None
    return sizes if expected is not None and len(set(kept)) == len(kept) and found == set(expected) else None


def evidence_of(record: Mapping[str, Any]) -> Iterator[NDArray[np.float64]]:
    """The evidence of a unit's boxes, by scene; see `boxes.BoxEvidence`."""
    return (np.array(rows, np.float64).reshape(-1, COLUMNS) for rows in record["boxes"])


def rejections_of(record: Mapping[str, Any]) -> list[tuple[int, Rejection]]:
    """The rejections of a unit's items, with their numbers."""
    rows: Sequence[list[Any]] = record["rejected"]
    return [(row[0], Rejection(*row[1:])) for row in rows]


def scan_of(record: Mapping[str, Any]) -> Scan:
    """What the scan of a source found, in done.json, or that of a tar, in the record of a unit; nothing by default."""
    found = record.get("scan", {"rejected": [], "ignored": {}, "warnings": []})
    scan = Scan([Rejection(*row) for row in found["rejected"]], found["ignored"], found["warnings"])
    if not isinstance(scan.ignored, dict) or not isinstance(scan.warnings, list):
        raise TypeError
    return scan
