"""The curated scenes of a generation run as a source for `pack`."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scenarioclip_fast.data.check import BadEntry, CheckedScene, SceneChecker
from scenarioclip_fast.data.scene import Scene, scene_from_json
from scenarioclip_fast.data.sources.base import LARGE, Source, SplitOf, by_split, shuffled
from scenarioclip_fast.files import open_file, replacing
from scenarioclip_fast.generate.config import STAGES
from scenarioclip_fast.generate.images import Item, Unit
from scenarioclip_fast.generate.records import KEPT, content_hash, rejections
from scenarioclip_fast.parsing import parse_json


@dataclass(frozen=True)
class CuratedItem:
    """A scene that curation kept: its image, and the range of its record in a file."""

    item: Item
    path: Path
    offset: int
    size: int

    def __str__(self) -> str:
        return self.item.name

    def read(self) -> dict[str, Any]:
        """Read the scene's record; see `curate.stage`."""
        with open_file(self.path) as file:
            record = parse_json(os.pread(file.fileno(), self.size, self.offset), strict=False)
        return dict(record["result"]["scene"])


class CuratedSource(Source):
    """The scenes in DIR/curate.

    Args:
        directory: of the run.
        units: its images.
    """

    def __init__(self, directory: Path, units: Sequence[Unit]) -> None:
        self.directory, self._units = directory, units

    @functools.cached_property
    def scenes(self) -> list[CuratedItem]:
        """The scenes in the order of the list of images."""
        return list(self._find_scenes())

    @property
    def directories(self) -> set[Path]:
        """The directories of the records."""
        return {self.directory.resolve(), *((self.directory / stage).resolve() for stage in STAGES)}

    @property
    def total(self) -> int:
        """The number of scenes."""
        return len(self.scenes)

    @property
    def large(self) -> bool:
        """Whether worker processes pay off."""
        return sum(len(unit.items) for unit in self._units) >= LARGE

    def items(self, split_of: SplitOf) -> Iterator[CuratedItem]:
        """Yield the scenes split by split, shuffled within each split by a hash of the key."""
        found = shuffled(self.scenes, lambda one: one.item.key)
        return by_split(found, split_of, lambda one: (one.item.key, one.item.split))

    def _find_scenes(self) -> Iterator[CuratedItem]:
        for unit in self._units:
            items = {item.key: item for item in unit.items}
            path, offset = self._file("curate", unit), 0
            if path.is_file():
                for line in open_file(path):
                    if (found := KEPT.match(line)) and (item := items.get(found[1].decode())):
                        yield CuratedItem(item, path, offset, len(line))
                    offset += len(line)

    def fingerprint(self) -> str:
        """A hash of the records, and of the names and sizes of the images."""
        digest = hashlib.sha256()
        for unit in self._units:
            digest.update(json.dumps([[item.key, item.name, item.size] for item in unit.items]).encode())
            digest.update(content_hash(self._file("curate", unit)).encode())
        return digest.hexdigest()

    def reader(self) -> CuratedReader:
        """Create the reader of the scenes."""
        return CuratedReader(SceneChecker())

    def write_rejections(self, path: Path) -> None:
        """List what the stages rejected, images and parts of them."""
        with replacing(path) as new, new.open("x", encoding="ascii") as file:
            for unit in self._units:
                for stage in STAGES[:-1]:
                    for outcome in rejections(self._file(stage, unit)):
                        parts = [{"part": "image", "reason": outcome.reason, "detail": outcome.detail}]
                        parts = parts if outcome.reason else outcome.result.get("rejected", [])
                        for part in parts:
                            file.write(json.dumps({"stage": stage, "key": outcome.key, **part}) + "\n")

    def _file(self, stage: str, unit: Unit) -> Path:
        return self.directory / stage / unit.file_name


class CuratedReader:
    """Reads the images of curated scenes."""

    def __init__(self, checker: SceneChecker) -> None:
        self._checker = checker

    def read(self, item: CuratedItem) -> CheckedScene:
        """Read and check a scene.

        Raises:
            BadEntry: the whole scene is unusable.
        """
        try:
            scene = curated_scene(item.item.key, item.read())
            scene.image = item.item.read()
        except OSError as error:
            raise BadEntry("missing_image", f"{item.item.name}: {error.strerror or error}") from None
        scene.split = item.item.split
        return self._checker.check(scene, str(item))


def curated_scene(key: str, record: dict[str, Any]) -> Scene:
    """The scene of a curated record, without its image."""
    try:
        return scene_from_json(key, b"", {"schema": 2, **record})
    except ValueError as error:
        raise BadEntry("malformed_entry", str(error)) from None


def published_scenes(source: CuratedSource, split_of: SplitOf) -> Iterator[Scene]:
    """The scenes with their images and splits; unusable images, which `pack` lists, are left out."""
    reader = source.reader()
    for item in source.items(split_of):
        with contextlib.suppress(BadEntry):
            scene = reader.read(item).scene
            scene.split = split_of(scene.key, scene.split)
            yield scene
