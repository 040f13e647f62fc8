"""Parts of a pack, which many machines write: the directory of a part.

Part i of n packs the units u with u % n == i - 1 (see `units`). A unit becomes a shard, or one for each split where it
holds the border between two; a tar becomes as many as it fills for each split. Units do not depend on n, and so neither
does what `merging` makes of them.

    DIR/.parts/lock                     locked, shared by the processes that pack parts, or by the one that merges
    DIR/.parts/3-of-7/lock              locked by the process that packs the part
    DIR/.parts/3-of-7/part.json         the source, the options and the version that the part is packed with
    DIR/.parts/3-of-7/train-000012.tar  the scenes of unit 12 in train; further shards are train-000012-1.tar, ...
    DIR/.parts/3-of-7/unit-000012.json  the records of unit 12's shards, and its rejections: written after the shards
    DIR/.parts/3-of-7/done.json         the number of items, or of tars, of the source and, in part 1, what else the
                                        scan found: written last

On a URL (see `remote_parts`), nothing is locked, and files are uploaded in the same order.

A part that was interrupted packs the units without a record, or whose record is damaged or does not have the sizes of
the shards. Without part.json, it packs all units: those that exist may be of another source.
"""

from __future__ import annotations

import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from scenarioclip_fast.data.check import Rejection
from scenarioclip_fast.data.packing.remote_folder import RemoteFolder
from scenarioclip_fast.data.packing.shard_writer import OpenShard, PackedItem, duplicate
from scenarioclip_fast.data.packing.staging import PARTS, dump, lock
from scenarioclip_fast.data.packing.units import ItemUnits, Units, scan_of, shard_name, sizes_of_unit, unit_name
from scenarioclip_fast.data.shards import SPLITS
from scenarioclip_fast.data.sources.base import Scan
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import Directory, is_regular, kind_of, sha256_of, status_of
from scenarioclip_fast.parsing import parse_json

PART_NAME = re.compile(r"([1-9]\d*)-of-([1-9]\d*)")
MERGE = "merge"  # directory of files that the merge writes, in DIR/.parts
HEADER, DONE, LOCK = "part.json", "done.json", "lock"
_UNIT_NAME = re.compile(r"unit-(\d{6,})\.json")
_PARTIAL = ".partial"
_SHARD_NAME = r"(train|val|test)-\d{6,}(-\d+)?\.tar"
FILES = re.compile(rf"(({HEADER}|{DONE}|{_UNIT_NAME.pattern})({_PARTIAL})?|{LOCK}|{_SHARD_NAME})")


def parse_part(text: str) -> tuple[int, int]:
    """Parse the form i/n of a part.

    Raises:
        UserError: another form, or i is not from 1 to n.
    """
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text, re.ASCII)
    return check_part((int(match[1]), int(match[2])) if match else text)


def check_part(part: object) -> tuple[int, int]:
    """Return the number of a part and the number of parts; raise UserError unless these are integers 1 <= i <= n."""
    if (
        isinstance(part, tuple | list)
        and len(part) == 2
        and all(type(n) is int for n in part)
        and 1 <= part[0] <= part[1]
    ):
        return part[0], part[1]
    shown = f"{part[0]}/{part[1]}" if isinstance(part, tuple | list) and len(part) == 2 else part
    raise UserError(f"part: got {shown}, expected i/n with i from 1 to n, such as 3/7 for the third of seven parts")


def part_name(part: tuple[int, int]) -> str:
    """The name of the directory of a part."""
    return f"{part[0]}-of-{part[1]}"


def part_names(out: Path | RemoteFolder) -> dict[tuple[int, int], str]:
    """The directories of the parts in `out`: (i, n) -> name."""
    try:
        names = sorted(os.listdir(out / PARTS)) if isinstance(out, Path) else (out / PARTS).names()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    found = {name: match for name in names if (match := PART_NAME.fullmatch(name))}
    return {part: name for name, match in found.items() if (part := (int(match[1]), int(match[2])))[0] <= part[1]}


def command(out: Path | RemoteFolder, part: tuple[int, int] | None) -> str:
    """The command that packs a part; None: any."""
    return f"pack SOURCE --out {out} --part {'i/n' if part is None else f'{part[0]}/{part[1]}'}"


def directory_of(path: Path | RemoteFolder) -> Directory | RemoteFolder:
    """Open a directory, local or of a URL."""
    return Directory(path) if isinstance(path, Path) else path


def read_json(files: Directory | RemoteFolder, name: str) -> dict[str, Any] | None:
    """A JSON object in a directory; None if the file does not exist or is damaged."""
    try:
        return parse_record(files.read(name))
    except OSError:
        return None


def parse_record(data: bytes | None) -> dict[str, Any] | None:
    """Parse a JSON object; None if the data are damaged, or None."""
    try:
        found = None if data is None else parse_json(data, strict=False)  # boxes of objects without masks come with NaN
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def read_header(files: Directory | RemoteFolder) -> dict[str, Any] | None:
    """The header of a part; None if it does not exist or is damaged."""
    found = read_json(files, HEADER)
    if found is None or not isinstance(options := found.get("options"), dict):
        return None
    size = options.get("shard_size")
    return found if type(size) is int and size > 0 and isinstance(found.get("fingerprint"), str) else None


def read_done(files: Directory | RemoteFolder, number: int) -> dict[str, Any] | None:
    """The done.json of the part with this number; None if it does not exist or is damaged."""
    found = read_json(files, DONE)
    if found is None or type(items := found.get("items")) is not int or items < 0:
        return None
    if number == 1 and not {"scan", "classes"} <= found.keys():
        return None
    try:
        scan_of(found)
    except (KeyError, TypeError):
        return None
    return found


def check_directory(path: Path) -> None:
    """Raise UserError if there is something else than a directory, such as a link to one."""
    found = status_of(path)
    if found is not None and not stat.S_ISDIR(found.st_mode):
        what = "links are refused, move the directory itself here" if stat.S_ISLNK(found.st_mode) else "move it away"
        raise UserError(
            f"{path}: got a {kind_of(found.st_mode)}, expected a directory of parts; {what}, or choose another "
            "directory for the pack"
        )


def difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """What makes the headers of two parts differ; None if they are equal."""
    if found == expected:
        return None
    for name in ("version", "pack_version"):
        if found.get(name) != expected.get(name):
            return f"{name.replace('_', ' ')} {found.get(name)}, not {expected.get(name)}"
    options = found.get("options")
    theirs: dict[str, Any] = options if isinstance(options, dict) else {}
    for name, value in expected["options"].items():
        if theirs.get(name) != value:
            return f"{name.replace('_', ' ')} {theirs.get(name)}, not {value}"
    return "another source, or a source that was changed meanwhile"


def lock_parts(out: Path, shared: bool) -> IO[bytes] | None:
    """Lock the parts in `out`, which must not be merged while they are packed; None if another process prevents it."""
    while True:
        check_directory(out / PARTS)
        (out / PARTS).mkdir(parents=True, exist_ok=True)
        try:
            with Directory(out / PARTS) as files:
                file = files.open(LOCK, "ab+")
        except FileNotFoundError:  # a merge has just removed the directory
            continue
        if not lock(file.fileno(), shared):
            file.close()
            return None
        found = status_of(out / PARTS / LOCK)
        if found is not None and os.path.samestat(os.fstat(file.fileno()), found):
            return file
        file.close()


class Part(ABC):
    """The directory of a part.

    Args:
        out: of the pack.
        part: the number of the part, from 1, and the number of parts.
        header: identifies the source, the options and the version.

    Raises:
        UserError: another process packs this part or merges the parts, or there are parts of something else.
    """

    _files: Directory | RemoteFolder

    def __init__(self, out: Path | RemoteFolder, part: tuple[int, int], header: dict[str, Any]) -> None:
        self.out, self.number, self.count = out, *part
        self.name = part_name(part)
        self.path = out / PARTS / self.name
        self.cut = Units.of(header)
        with ExitStack() as stack:
            self._open(stack, header)
            for name in self._files.names():
                if not FILES.fullmatch(name):
                    raise UserError(
                        f"{self.path / name}: not a file of a part; move it away, or choose another directory"
                    )
            if read_header(self._files) is None:  # whatever is there may be of another source
                self._remove(
                    sorted(set(self._files.names()) - {LOCK}, key=lambda name: (name != DONE, name[:5] != "unit-"))
                )
            self._write(HEADER, header)
            self.units = self._intact_units()
            self._stack = stack.pop_all()

    @abstractmethod
    def _open(self, stack: ExitStack, header: dict[str, Any]) -> None:
        """Compare the header with that of other parts, and open the directory."""

    def _check_others(self, header: dict[str, Any]) -> None:
        """Compare the header with that of this part and of one other."""
        compared = 0
        names = part_names(self.out)
        for (i, n), name in sorted(names.items(), key=lambda item: item[1] != self.name):
            if n != self.count:
                raise UserError(
                    f"{self.out}: contains part {i} of {n}, and this is part {self.number} of {self.count}; pack all "
                    f"parts with the same number of parts, or remove {self.out / PARTS / name}"
                )
            if compared == 2:
                continue
            with directory_of(self.out / PARTS / name) as files:
                other = read_header(files)
            if other is None:  # just created, or damaged
                continue
            compared += 1
            if (what := difference(other, header)) is not None:
                raise UserError(
                    f"{self.out}: contains part {i} of {n} from {what}; remove {self.out / PARTS}, or choose another "
                    "directory"
                )

    def _intact_units(self) -> set[int]:
        """The units that are finished."""
        names = set(self._files.names())
        done = read_done(self._files, self.number)
        items = None if done is None else done["items"]
        kept, units = {LOCK, HEADER, *([] if done is None else [DONE])}, set()
        records = sorted(name for name in names if _UNIT_NAME.fullmatch(name))
        for name, record in zip(records, self._read(records), strict=True):
            unit = int(name[len("unit-") : -len(".json")])
            if unit % self.count != self.number - 1:  # copied from another part
                continue
            sizes = sizes_of_unit(record, unit, self.cut, items)
            if sizes is not None and all(self._files.size(one) == size for one, size in sizes.items()):
                units.add(unit)
                kept |= {name, *sizes}
        if set(records) - kept:
            kept.discard(DONE)
        self._tidy(sorted(names - kept, key=lambda name: name not in records))
        return units

    @abstractmethod
    def _read(self, names: Sequence[str]) -> Iterator[dict[str, Any] | None]:
        """Read JSON objects; None if damaged."""

    @abstractmethod
    def _tidy(self, names: Sequence[str]) -> None:
        """Remove the files of unfinished units, in this order, where that is safe."""

    @abstractmethod
    def _remove(self, names: Sequence[str]) -> None:
        """Remove files in this order."""

    def __enter__(self) -> Part:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def __str__(self) -> str:
        return f"part {self.number} of {self.count}"

    @property
    def is_done(self) -> bool:
        """Whether all units are packed."""
        done = read_done(self._files, self.number)
        return done is not None and not self.units_left(done["items"])

    def units_left(self, total: int) -> list[int]:
        """The units of the part that are not packed yet. `total`: see `Units`."""
        return [unit for unit in self.cut.of_part((self.number, self.count), total) if unit not in self.units]

    def records(self) -> Iterator[dict[str, Any]]:
        """The records of the finished units, in their order."""
        for record in self._read([unit_name(unit) for unit in sorted(self.units)]):
            assert record is not None
            yield record

    @property
    def scan(self) -> Scan:
        """What the scan found, of the first part when it is done; otherwise nothing."""
        return scan_of(read_done(self._files, self.number) or {})

    @abstractmethod
    def create(self, name: str) -> IO[bytes]:
        """Create a shard."""

    def add(self, record: dict[str, Any]) -> None:
        """Finish a unit, whose shards are written."""
        self._store(record["shards"])
        self._write(unit_name(record["unit"]), record)
        self.units.add(record["unit"])

    def finish(self, total: int, scan: Scan, classes: dict[str, list[str]] | None) -> None:
        """Note that all units are packed.

        Args:
            total: of the source, see `Units`.
            scan, classes: of the source; stored once, in the first part.
        """
        found: dict[str, Any] = {"items": total}
        if self.number == 1:
            rejected = [[r.entry, r.reason, r.detail, r.hint] for r in scan.rejected]
            found["scan"] = {"rejected": rejected, "ignored": scan.ignored, "warnings": scan.warnings}
            found["classes"] = classes
        self._write(DONE, found)

    @abstractmethod
    def _store(self, shards: list[dict[str, Any]]) -> None:
        """Store finished shards durably, and add their digests and sizes to their records."""

    @abstractmethod
    def _write(self, name: str, record: dict[str, Any]) -> None:
        """Write a JSON object."""


class LocalPart(Part):
    """The locked directory of a part."""

    _files: Directory

    def _open(self, stack: ExitStack, header: dict[str, Any]) -> None:
        out = self.out
        assert isinstance(out, Path) and isinstance(self.path, Path)
        parts = lock_parts(out, shared=True)
        if parts is None:
            raise UserError(f"{out}: another process is merging the parts")
        stack.enter_context(parts)
        if is_regular(out / PARTS / MERGE / "manifest.json"):
            raise UserError(f"{out}: the merge of its parts was interrupted; finish it with `pack --merge {out}`")
        check_directory(self.path)
        self._check_others(header)
        self.path.mkdir(exist_ok=True)
        self._files = stack.enter_context(Directory(self.path))
        if not lock(stack.enter_context(self._files.open(LOCK, "ab+")).fileno()):
            raise UserError(f"{out}: another process is packing part {self.number} of {self.count}")

    def _read(self, names: Sequence[str]) -> Iterator[dict[str, Any] | None]:
        return (read_json(self._files, name) for name in names)

    def _tidy(self, names: Sequence[str]) -> None:
        self._remove(names)

    def _remove(self, names: Sequence[str]) -> None:
        for name in names:
            self._files.unlink(name)

    def create(self, name: str) -> IO[bytes]:
        """Create a shard."""
        return self._files.open(name, "xb")

    def _store(self, shards: list[dict[str, Any]]) -> None:
        for shard in shards:
            with self._files.open(shard["name"]) as file:
                os.fsync(file.fileno())
                shard |= {"sha256": sha256_of(file), "bytes": os.fstat(file.fileno()).st_size}
        self._files.sync()

    def _write(self, name: str, record: dict[str, Any]) -> None:
        """Write a file, all or nothing."""
        with self._files.open(f"{name}{_PARTIAL}", "wb") as file:
            file.write(dump(record))
            file.flush()
            os.fsync(file.fileno())
        self._files.move(f"{name}{_PARTIAL}", self._files, name)
        self._files.sync()


class Numbered:
    """The items of a part, with their numbers in the source.

    Args:
        items: of the source.
        units: of the source.
        part: leaves out its finished units.
    """

    def __init__(self, items: Iterable[Any], units: ItemUnits, part: Part) -> None:
        self._items, self._size, self._part = items, units.size, part
        self.total = 0  # items of the source, once all have been passed

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        for number, item in enumerate(self._items):
            unit = number // self._size
            if unit % self._part.count == self._part.number - 1 and unit not in self._part.units:
                yield number, item
            self.total = number + 1


def write_units(part: Part, units: Iterable[tuple[int, Iterable[PackedItem], dict[str, Any]]], size: int) -> None:
    """Write units of a part.

    Args:
        units: the number of each, its items, and what else its record has.
        size: scenes per shard, at most.
    """
    finishing: Future[None] | None = None
    with ThreadPoolExecutor(1, "finish") as finisher:  # waits for the unit in progress, so that it is kept
        for unit, items, more in units:
            record = _write_unit(part, unit, items, size) | more
            if finishing is not None:
                finishing.result()
            finishing = finisher.submit(part.add, record)
        if finishing is not None:
            finishing.result()


def _write_unit(part: Part, unit: int, items: Iterable[PackedItem], size: int) -> dict[str, Any]:
    """Write the shards of a unit, and return its record."""
    shards: dict[str, list[tuple[OpenShard, list[int]]]] = {split: [] for split in SPLITS}  # and the numbers of items
    keys: set[str] = set()
    rejected: list[tuple[int, Rejection]] = []
    boxes: list[list[list[float]]] = []
    try:
        for item in items:
            if item.boxes is not None:
                boxes.append(item.boxes.tolist())
            if item.key is not None and item.key in keys:
                rejected.append((item.number, duplicate(item.key)))
                continue
            rejected += [(item.number, one) for one in item.rejected]
            if item.key is None:
                continue
            written = shards[item.split]
            if written and len(written[-1][1]) == size:
                written[-1][0].close()
            if not written or len(written[-1][1]) == size:
                name = shard_name(item.split, unit, len(written))
                written.append((OpenShard.create(name, part.create(name)), []))
            keys.add(item.key)
            written[-1][0].add(item)
            written[-1][1].append(item.number)
        for written in shards.values():
            for shard, _ in written[-1:]:
                shard.close()
    finally:
        with suppress(OSError):  # disk full: already reported
            for written in shards.values():
                for shard, _ in written[-1:]:
                    shard.close()
    return {
        "unit": unit,
        "shards": [
            shard.record(split) | {"numbers": numbers}
            for split, written in shards.items()
            for shard, numbers in written
        ],
        "rejected": [[number, r.entry, r.reason, r.detail, r.hint] for number, r in rejected],
        "boxes": boxes,
    }
