"""Visual Genome: objects.json and relationships.json of releases 1.0, 1.2 and 1.4.

    objects.json        [{"image_id": 1, "objects": [{"object_id": 1058498, "x": 421, "y": 91, "w": 79, "h": 339,
                                                      "names": ["clock"], "merged_object_ids": []}, ...]}, ...]
    relationships.json  [{"image_id": 1, "relationships": [{"predicate": "ON", "subject": {"object_id": 5045, "x": 119,
                                                            "y": 338, "w": 274, "h": 192, "name": "shade"},
                                                            "object": {...}}, ...]}, ...]
    image_data.json     [{"image_id": 1, "width": 800, "height": 600}, ...]; optional
    object_alias.txt, relationship_alias.txt   lines of equivalent names, the first of which counts; optional

Release 1.0 has "id" in place of "image_id" and "object_id". Objects have "names" or "name". There are no masks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scenarioclip_fast.data.boxes import clip_box
from scenarioclip_fast.data.check import (
    BadEntry,
    CheckedScene,
    Rejection,
    SceneChecker,
    malformed_entries,
)
from scenarioclip_fast.data.sources.annotations import (
    AnnotatedSource,
    Box,
    Entry,
    SceneBuilder,
    corners,
    id_text,
    load_image,
    require_some,
    single_path,
    with_actions,
)
from scenarioclip_fast.data.sources.base import Scan, SourceOptions, fingerprint_files
from scenarioclip_fast.data.sources.files import Folders
from scenarioclip_fast.data.sources.json_array import Extent, index_array, read_element
from scenarioclip_fast.data.texts import normalise
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import read_regular
from scenarioclip_fast.progress import progress as show_progress
from scenarioclip_fast.terminal import short

_LISTS = {"objects": "objects.json", "relationships": "relationships.json"}
_LARGE = 1 << 23  # bytes of objects.json, about 2,000 images, from which worker processes pay off
_OPTIONAL = ("image_data.json", "object_alias.txt", "relationship_alias.txt")


class VisualGenomeSource(AnnotatedSource):
    """The images of a directory with Visual Genome's annotations, of which only positions are kept in memory.

    Raises:
        UserError: a file is missing.
    """

    expects = "a directory with objects.json and relationships.json"

    def __init__(self, directory: Path, options: SourceOptions) -> None:
        self._directory, self.options = directory, options
        for name in _LISTS.values():
            if not (directory / name).is_file():
                raise UserError(f"{directory}: contains no {name}; expected {self.expects}")
        self.files = [directory / name for name in (*_LISTS.values(), *_OPTIONAL) if (directory / name).is_file()]
        self._images = Folders([options.images or directory], ["VG_100K", "VG_100K_2", "images", "images2"])
        self.folders = [self._images]
        self.entries: list[Entry] = []

    @classmethod
    def recognises(cls, paths: Sequence[str | Path]) -> bool:
        """Whether `paths` is one directory with the two files of annotations."""
        return len(paths) == 1 and all(Path(paths[0], name).is_file() for name in _LISTS.values())

    @classmethod
    def open(cls, paths: Sequence[str | Path], options: SourceOptions) -> VisualGenomeSource:
        """Open the one directory in `paths`."""
        return cls(single_path(paths, cls.expects), options)

    def fingerprint(self) -> str:
        """A hash of the names, sizes and times of the annotations and of all JPEGs."""
        images = [path for folder in self._images.paths for path in sorted(folder.glob("*.jpg"))]
        return fingerprint_files([*self.files, *images])

    def scan(self, workers: int, progress: bool) -> Scan:
        """Find the images in the annotations."""
        found: dict[str, dict[str, Any]] = {}
        rejected: list[Rejection] = []
        for part, file in (*_LISTS.items(), ("size", "image_data.json")):
            if part == "size" and self._directory / file not in self.files:
                continue
            rows = index_array(self._directory / file)
            if progress:
                rows = show_progress(rows, None, f"reading {file}", "images")
            for i, (extent, row) in enumerate(rows):
                name, here = _id_of(row, "image_id"), f"{file}: entry {i}"
                if not name:
                    rejected.append(Rejection(here, "malformed_entry", f"got {short(row)}, expected an image_id"))
                    continue
                # image_data.json also has images without annotations.
                entry = found.get(name, {}) if part == "size" else found.setdefault(name, {})
                if part in entry:
                    rejected.append(Rejection(f"{here} ({name})", "duplicate_id", "an earlier entry has this id"))
                else:
                    entry[part] = extent if part != "size" else (row.get("height"), row.get("width"))
        entries = [Entry(_LISTS["objects"], name, f"{name}.jpg", row) for name, row in found.items()]
        self.entries = with_actions(entries, self.options.actions)
        if self.entries:
            require_some(self.files[0], self._images, (entry.image for entry in self.entries))
        return Scan(rejected)

    @property
    def large(self) -> bool:
        """Whether worker processes pay off: judged by the size of a file, because the images are not counted yet."""
        return self.files[0].stat().st_size >= _LARGE

    def reader(self) -> VisualGenomeReader:
        """Create the reader of the entries."""
        return VisualGenomeReader(self._directory, self._images, SceneChecker(self.options.max_pixels))


class VisualGenomeReader:
    """Reads single entries at their positions in the files."""

    def __init__(self, directory: Path, images: Folders, checker: SceneChecker) -> None:
        self._directory, self._images, self._checker = directory, images, checker
        # Not the aliases themselves: readers are pickled often.
        self._aliases = [_stamp(directory / name) for name in ("object_alias.txt", "relationship_alias.txt")]

    def read(self, entry: Entry) -> CheckedScene:
        """Read and check an entry.

        Raises:
            BadEntry: the whole scene is unusable.
            UserError: the annotations have changed since they were scanned.
        """
        with malformed_entries():
            objects, relationships = (self._list(entry, part) for part in _LISTS)
            declared = entry.record.get("size", (None, None))
            image, size = load_image(self._images, self._checker, entry.image, declared)
            names, predicates = (load_aliases(*stamp) for stamp in self._aliases)
            scene = _Scene(SceneBuilder(entry), names, size)
            scene.add_objects(objects)
            for k, relationship in enumerate(relationships):
                scene.add_relationship(k, relationship, predicates)
            return scene.builder.build(self._checker, image, size, entry.action)

    def _list(self, entry: Entry, part: str) -> list[Any]:
        extent: Extent | None = entry.record.get(part)
        if extent is None:
            return []
        rows = read_element(self._directory / _LISTS[part], extent).get(part)
        if not isinstance(rows, list):
            raise BadEntry("malformed_entry", f"got {short(rows)} as {part!r}, expected a list")
        return rows


class _Scene:
    """The objects of one image by id."""

    def __init__(self, builder: SceneBuilder, aliases: dict[str, str], size: tuple[int, int]) -> None:
        self.builder, self._aliases, self._size = builder, aliases, size
        self._position: dict[str, int] = {}

    def add_objects(self, objects: list[Any]) -> None:
        for item in objects:
            self._add(item)
        for i, item in enumerate(objects):  # ids of objects come before those of objects merged into others
            for merged in _merged(item):
                self._position.setdefault(merged, i)

    def add_relationship(self, k: int, relationship: Any, aliases: dict[str, str]) -> None:
        fields = relationship if isinstance(relationship, dict) else {}
        ends = [fields.get(name) for name in ("subject", "object")]
        predicate = fields.get("predicate")
        if not all(_id_of(end, "object_id") for end in ends) or not isinstance(predicate, str):
            self.builder.reject(f"relation {k}", "malformed_relation", f"got {short(relationship)}")
            return
        subject, object_ = map(self._find, ends)
        predicate = normalise(predicate)
        self.builder.add_relation(k, subject, aliases.get(predicate, predicate), object_)

    def _find(self, item: Any) -> int:
        """The position of a relationship's object, which is added if only the relationship has it."""
        for name in (_id_of(item, "object_id"), *_merged(item)):
            if name in self._position:
                return self._position[name]
        return self._add(item)

    def _add(self, item: Any) -> int:
        position = len(self.builder.objects)
        fields = item if isinstance(item, dict) else {}
        names = fields.get("names")
        first = names[0] if isinstance(names, list) and names else fields.get("name")
        name = normalise(first) if isinstance(first, str) else ""
        box = _clip(corners([fields.get(side) for side in "xywh"]), self._size)
        self.builder.add_object(self._aliases.get(name, name), box)
        if own := _id_of(item, "object_id"):
            self._position.setdefault(own, position)
        return position


def _clip(box: Box | None, size: tuple[int, int]) -> Box | None:
    """Clip a box, which may reach far beyond the image: annotators drew on scaled images."""
    if box is None or not all(map(math.isfinite, box)):
        return box  # rejected with the scene
    return clip_box(box, size)


def _id_of(item: Any, key: str) -> str:
    """The id of an image or object: `key`, or "id" in release 1.0; empty if there is none."""
    return id_text(item.get(key, item.get("id"))) if isinstance(item, dict) else ""


def _merged(item: Any) -> list[str]:
    merged = item.get("merged_object_ids") if isinstance(item, dict) else None
    return [name for one in merged if (name := id_text(one))] if isinstance(merged, list) else []


def _stamp(path: Path) -> tuple[Path, int]:
    return path, path.stat().st_mtime_ns if path.is_file() else 0


@functools.lru_cache(maxsize=2)
def load_aliases(path: Path, mtime_ns: int) -> dict[str, str]:
    """Read lines of equivalent names, separated by commas. A name in several lines belongs to the first.

    Args:
        mtime_ns: 0 if there is no such file.

    Returns:
        The first name of its line for each name, both normalised.

    Raises:
        UserError: the file is not UTF-8 text.
    """
    aliases: dict[str, str] = {}
    if mtime_ns == 0:
        return aliases
    try:
        lines = read_regular(path).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as text: {error}") from None
    for line in lines:
        names = [name for text in line.split(",") if (name := normalise(text))]
        for name in names:
            aliases.setdefault(name, aliases.get(names[0], names[0]))
    return aliases
