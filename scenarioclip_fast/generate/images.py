"""The images of a generation run: listed once, with unique keys, in units of work that never change.

The list is a file of JSON lines, one per image. A later run appends images that are new to it, in units of their own.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from scenarioclip_fast.data.check import MAX_KEY, safe_key
from scenarioclip_fast.data.images import SUFFIXES, SkippedImage, find_images
from scenarioclip_fast.data.shards import SPLITS, ShardSet, is_packed
from scenarioclip_fast.data.tars import read_members, special_kind
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import open_file, read_regular, replacing
from scenarioclip_fast.parsing import parse_json
from scenarioclip_fast.terminal import short

RUN_FILE = "generate.json"
"""A directory with this file is that of a run."""


@dataclass(frozen=True)
class Item:
    """One image: a file, or a range of bytes of a tar; in a packed data set, with the range of its record.

    Attributes:
        key: unique, valid as a WebDataset key.
        name: path of the image as listed, which identifies it in later runs.
        path: absolute path of the file or tar.
        offset, size: range of the encoded image in `path`; offset -1: the whole file, of `size` bytes.
        split: assigned by a packed data set.
        record: offset and size of the record in `path`, if there is one.
    """

    key: str
    name: str
    path: str
    offset: int
    size: int
    split: str | None = None
    record: tuple[int, int] | None = None

    def read(self) -> bytes:
        """Read the encoded image.

        Raises:
            OSError: it cannot be read, or is another file than the one that was listed.
        """
        if self.offset >= 0:
            return _read_range(self.path, self.offset, self.size)
        data = read_regular(self.path)
        if len(data) != self.size:
            raise OSError(0, f"got {len(data)} bytes, expected {self.size} as when it was listed", self.path)
        return data

    def read_record(self) -> dict[str, Any] | None:
        """Read the record of a packed scene; None if there is none.

        Raises:
            OSError, ValueError: it cannot be read or parsed.
        """
        return None if self.record is None else dict(parse_json(_read_range(self.path, *self.record), strict=False))


def _read_range(path: str, offset: int, size: int) -> bytes:
    with open_file(path) as file:
        data = os.pread(file.fileno(), size, offset)
    if len(data) != size:
        raise OSError(0, f"got {len(data)} of {size} bytes at {offset}", path)
    return data


def list_images(sources: Sequence[str | Path], known: Iterable[Item] = ()) -> Iterator[Item | SkippedImage]:
    """List images in a fixed order, without reading them. What `generate` wrote below a folder is left out.

    Args:
        sources: folders, image files, tars, text files (.txt, .lst) with a path per line, relative to the file's
            folder, and packed data sets.
        known: items of earlier runs, which are left out.

    Yields:
        Items, or what was skipped: damaged tars, links in tars, files that do not exist.

    Raises:
        UserError: a source does not exist, has no images, or is the directory of a run.
    """
    keys = {item.key for item in known}
    places = {(item.path, item.offset) for item in known}
    for source in sources:
        for found in _list_source(Path(source)):
            if isinstance(found, Item):
                if (found.path, found.offset) in places:
                    continue
                found = replace(found, key=_new_key(found, keys))
                keys.add(found.key)
                places.add((found.path, found.offset))
            yield found


def _list_source(source: Path) -> Iterator[Item | SkippedImage]:
    if source.is_dir() and is_packed(source):
        yield from _list_packed(source)
    elif source.is_file() and source.suffix.lower() in (".txt", ".lst"):
        yield from _list_lines(source)
    elif (source / RUN_FILE).is_file():
        raise UserError(
            f"{source}: is the output of generate; name {source / 'shards'} for its data set, or leave out IMAGES to "
            "continue the run"
        )
    else:
        root = source.parent if source.is_file() else source

        @functools.cache
        def of_run(folder: Path) -> bool:
            return folder not in (root, folder.parent) and ((folder / RUN_FILE).is_file() or of_run(folder.parent))

        paths = [path for path in find_images(source) if not of_run(path.parent)]
        if not paths:
            raise UserError(f"{source}: no images found besides those that generate wrote")
        for path in paths:
            yield from _list_file(path, path.relative_to(root).as_posix())


def _list_lines(source: Path) -> Iterator[Item | SkippedImage]:
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: byte {error.start} is not UTF-8 text; expected a path per line") from None
    names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not names:
        raise UserError(f"{source}: the list is empty; expected a path per line")
    for name in names:
        yield from _list_file(source.parent / name, name)


def _list_file(path: Path, name: str) -> Iterator[Item | SkippedImage]:
    name = os.fsencode(name).decode("utf-8", "backslashreplace")
    try:
        if path.suffix.lower() == ".tar":
            yield from _list_tar(path, name)
            return
        with open_file(path) as file:
            yield Item("", name, str(path.absolute()), -1, os.fstat(file.fileno()).st_size)
    except OSError as error:
        yield SkippedImage(name, str(error.strerror or error))


def _list_tar(path: Path, name: str) -> Iterator[Item | SkippedImage]:
    damage: list[str] = []
    with open_file(path) as file:
        for member in read_members(file, damage.append):
            inner = Path(member.name)
            if member.isdir() or inner.suffix.lower() not in SUFFIXES or inner.name.startswith("."):
                continue
            here = f"{name}/{os.fsencode(member.name).decode('utf-8', 'backslashreplace')}"
            if (special := special_kind(member)) is not None:
                yield SkippedImage(here, f"got a {special}, expected a regular file")
            else:
                yield Item("", here, str(path.absolute()), member.offset_data, member.size)
    yield from (SkippedImage(name, f"damaged tar: {detail}") for detail in damage)


def _list_packed(source: Path) -> Iterator[Item]:
    for split in SPLITS:
        shards = ShardSet(source, split)
        for key, shard, offset, size, record in shards.locations():
            yield Item(key, f"{split}/{key}", str(Path(source, shard).absolute()), offset, size, split, record)


def _new_key(item: Item, taken: Collection[str]) -> str:
    """The key of a packed scene or the stem of a file, with a hash if it is in a folder or tar, odd, or taken."""
    name = item.key or str(Path(item.name).with_suffix(""))
    stem = re.sub(r"[/\\\x00-\x1f\x7f]", "_", name)[-MAX_KEY // 2 :]
    key = safe_key(stem, name)
    return safe_key(stem, f"{item.path}:{item.offset}") if key in taken else key


def shrunk_size(height: int, width: int, side: int) -> tuple[int, int]:
    """The size (H, W) of an image whose longer side is reduced to `side` if it is longer."""
    scale = min(1.0, side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


@dataclass(frozen=True)
class Unit:
    """A unit of work: images that are processed and stored together."""

    number: int
    items: tuple[Item, ...]

    @property
    def file_name(self) -> str:
        """The name of its file in the directory of a stage."""
        return f"{self.number:06d}.jsonl"


def divide(items: Sequence[Item], size: int, first: int = 0) -> list[Unit]:
    """Divide items into units of `size`, numbered from `first`."""
    parts = [tuple(items[i : i + size]) for i in range(0, len(items), size)]
    return [Unit(first + number, part) for number, part in enumerate(parts)]


def write_list(units: Iterable[Unit], path: Path) -> None:
    """Write a list, replacing an earlier one."""
    with replacing(path) as new, new.open("x", encoding="ascii") as file:
        for unit in units:
            for item in unit.items:
                record = {"unit": unit.number, **asdict(item)}
                file.write(json.dumps(record, ensure_ascii=True, separators=(",", ":")) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_list(path: Path) -> list[Unit]:
    """Read a list; empty if there is none.

    Raises:
        UserError: it is damaged.
    """
    units: dict[int, list[Item]] = {}
    for number, line in enumerate(read_regular(path).splitlines() if path.exists() else [], start=1):
        try:
            record = parse_json(line)
            at = record.pop("record")
            unit = int(record.pop("unit"))
            item = Item(**record, record=None if at is None else (int(at[0]), int(at[1])))
            units.setdefault(unit, []).append(item)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: line {number}: got {short(line.decode('utf-8', 'replace'))} ({error})") from None
    return [Unit(number, tuple(items)) for number, items in sorted(units.items())]
