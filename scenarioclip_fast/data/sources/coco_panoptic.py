"""COCO panoptic segmentation: panoptic_train2017.json and panoptic_val2017.json.

    {"images": [{"id": 142238, "file_name": "000000142238.jpg", "height": 427, "width": 640}, ...],
     "annotations": [{"image_id": 142238, "file_name": "000000142238.png",
                      "segments_info": [{"id": 3937500, "category_id": 1, "iscrowd": 0, "bbox": [x, y, width, height],
                                         "area": 3528}, ...]}, ...],
     "categories": [{"id": 1, "name": "person", "isthing": 1, "supercategory": "person"}, ...]}

Crowds are left out: a segment of many objects is not an object of its name. There are no relations.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scenarioclip_fast.data.check import SceneChecker
from scenarioclip_fast.data.sources.annotations import (
    AnnotatedSource,
    Box,
    Entry,
    corners,
    id_text,
    load_lists,
    single_path,
)
from scenarioclip_fast.data.sources.base import SourceOptions
from scenarioclip_fast.data.sources.files import Folders
from scenarioclip_fast.data.sources.panoptic import PanopticReader, plain_name
from scenarioclip_fast.data.sources.sniff import kind_of, require_kind
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.terminal import short


class CocoPanopticSource(AnnotatedSource):
    """The images of annotation files. A file named train* or val* (after "panoptic_") assigns that split.

    Raises:
        UserError: not such files, or none of their images or PNGs exists.
    """

    expects = "panoptic_*.json of COCO, or their directory"

    def __init__(self, files: list[Path], options: SourceOptions) -> None:
        entries: list[Entry] = []
        self._names: dict[int, str] = {}
        for file in files:
            images, annotations, categories = _load(file)
            names = {one["id"]: plain_name(one["name"]) for one in categories}
            if any(self._names.get(category, name) != name for category, name in names.items()):
                raise UserError(f"{file}: its categories differ from those of {files[0]}; pack them separately")
            self._names |= names
            entries += [_entry(file, i, one, images) for i, one in enumerate(annotations)]
        parts = [file.stem.removeprefix("panoptic_") for file in files]
        folders = dict.fromkeys(file.parent for file in files)
        roots = [options.images] if options.images else [root for one in folders for root in (one, one.parent)]
        self._images = Folders(roots, [*parts, *(f"images/{part}" for part in parts), "images"])
        png = [f"panoptic_{part}" for part in parts]
        self._masks = Folders(roots, [*png, *(f"annotations/{one}" for one in png)])
        super().__init__(files, entries, [self._images, self._masks], options)

    @classmethod
    def recognises(cls, paths: Sequence[str | Path]) -> bool:
        """Whether every path is a panoptic annotation file, or a directory with some."""
        found = [_candidates(Path(path)) for path in paths]
        return bool(found) and all(files and all(kind_of(file) == "coco-panoptic" for file in files) for files in found)

    @classmethod
    def open(cls, paths: Sequence[str | Path], options: SourceOptions) -> CocoPanopticSource:
        """Open the files, or all files of the directories, in `paths`."""
        files: list[Path] = []
        for path in paths:
            if not (found := _candidates(single_path([path], cls.expects))):
                raise UserError(f"{path}: contains no panoptic_*.json; expected {cls.expects}")
            files += found
        for file in files:
            require_kind(file, "coco-panoptic")
        return cls(list(dict.fromkeys(files)), options)

    def named_files(self, entry: Entry) -> tuple[Any, ...]:
        """The names of the image and of the PNG."""
        return entry.image, entry.record.get("file_name")

    def reader(self) -> CocoPanopticReader:
        """Create the reader of the entries."""
        return CocoPanopticReader(self._images, self._masks, self._names, [], SceneChecker(self.options.max_pixels))


class CocoPanopticReader(PanopticReader):
    """Reads single entries."""

    def _boxes(self, record: Any, segments: list[Any]) -> list[Box | None]:
        return [corners(segment.get("bbox")) if isinstance(segment, dict) else None for segment in segments]


def _load(file: Path) -> tuple[dict[str, Any], list[Any], list[Any]]:
    """The images by id, the annotations and the categories of a file."""
    _, (images, annotations, categories) = load_lists(file, ("images", "annotations", "categories"))
    for one in categories:
        if not isinstance(one, dict) or type(one.get("id")) is not int or not isinstance(one.get("name"), str):
            raise UserError(f"{file}: got {short(one)} as a category, expected one with id and name")
    by_id = {id_text(one.get("id")): one for one in images if isinstance(one, dict)}
    return by_id, annotations, categories


def _entry(file: Path, i: int, annotation: Any, images: dict[str, Any]) -> Entry:
    """An annotation with the size of its image, and without its crowds."""
    fields = dict(annotation) if isinstance(annotation, dict) else {}
    if isinstance(segments := fields.get("segments_info"), list):
        fields["segments_info"] = [one for one in segments if not isinstance(one, dict) or not one.get("iscrowd")]
    name = id_text(fields.get("image_id"))
    image = images.get(name, {})
    fields |= {side: image.get(side) for side in ("height", "width")}
    found = re.match(r"panoptic_(train|val)", file.name)
    return Entry(f"{file.name}: entry {i}", name, image.get("file_name"), fields, found[1] if found else None)


def _candidates(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted(path.glob("panoptic_*.json")) or sorted(path.glob("annotations/panoptic_*.json"))
