"""Panoptic Scene Graphs (PSG): psg.json, with images and panoptic PNGs of COCO.

    {"data": [{"image_id": "107902", "file_name": "train2017/000000417720.jpg", "height": 640, "width": 480,
               "pan_seg_file_name": "panoptic_train2017/000000417720.png",
               "segments_info": [{"id": 3648962, "category_id": 0, "iscrowd": 0, "isthing": 1, "area": 42555}, ...],
               "annotations": [{"bbox": [x1, y1, x2, y2], "bbox_mode": 0, "category_id": 0}, ...],
               "relations": [[subject, object, predicate], ...]}, ...],
     "thing_classes": [...], "stuff_classes": [...], "predicate_classes": [...], "test_image_ids": ["107902", ...]}

Categories count through the things, then the stuff; subjects and objects are positions in segments_info.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scenarioclip_fast.data.check import SceneChecker
from scenarioclip_fast.data.sources.annotations import (
    AnnotatedSource,
    Box,
    Entry,
    corners,
    four_numbers,
    id_text,
    load_lists,
    single_path,
)
from scenarioclip_fast.data.sources.base import TRAINVAL, SourceOptions
from scenarioclip_fast.data.sources.files import Folders
from scenarioclip_fast.data.sources.panoptic import PanopticReader, plain_name
from scenarioclip_fast.data.sources.sniff import kind_of, require_kind
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.terminal import short

_LISTS = ("data", "thing_classes", "stuff_classes", "predicate_classes")
_XYWH = 1  # "bbox_mode" of a box given by its corner and size


class PsgSource(AnnotatedSource):
    """The scenes of a PSG file.

    Raises:
        UserError: not such a file, or none of its images or PNGs exists.
    """

    expects = "psg.json, or its directory"

    def __init__(self, file: Path, options: SourceOptions) -> None:
        record, (data, *classes) = load_lists(file, _LISTS)
        for name, texts in zip(_LISTS[1:], classes, strict=True):
            if not all(isinstance(text, str) for text in texts):
                raise UserError(f"{file}: got {short(texts)} as {name!r}, expected names")
        things, stuff, self._predicates = classes
        test_ids = record.get("test_image_ids")
        if not isinstance(test_ids, (list, type(None))):
            raise UserError(f"{file}: got {short(test_ids)} as 'test_image_ids', expected a list")
        self._names = dict(enumerate(map(plain_name, things + stuff)))
        roots = [options.images] if options.images else _roots(file.parent)
        self._images, self._masks = Folders(roots), Folders(roots, ["annotations"])
        tested = {id_text(one) for one in test_ids or []}
        entries = [_entry(file, i, one, tested) for i, one in enumerate(data)]
        super().__init__([file], entries, [self._images, self._masks], options)

    @classmethod
    def recognises(cls, paths: Sequence[str | Path]) -> bool:
        """Whether `paths` is one file of PSG, or a directory with one."""
        return len(paths) == 1 and any(kind_of(file) == "psg" for file in _candidates(Path(paths[0])))

    @classmethod
    def open(cls, paths: Sequence[str | Path], options: SourceOptions) -> PsgSource:
        """Open the one file or directory in `paths`."""
        path = single_path(paths, cls.expects)
        files = _candidates(path)
        if path.is_dir():
            files = [file for file in files if kind_of(file) == "psg"]
            files = [file for file in files if file.name == "psg.json"] or files
        if len(files) != 1:
            found = ", ".join(file.name for file in files) or "no psg*.json"
            raise UserError(f"{path}: contains {found}; name the file to pack")
        require_kind(files[0], "psg")
        return cls(files[0], options)

    def named_files(self, entry: Entry) -> tuple[Any, ...]:
        """The names of the image and of the PNG."""
        return entry.image, entry.record.get("pan_seg_file_name") if isinstance(entry.record, dict) else None

    def reader(self) -> PsgReader:
        """Create the reader of the entries."""
        checker = SceneChecker(self.options.max_pixels)
        return PsgReader(self._images, self._masks, self._names, self._predicates, checker)


class PsgReader(PanopticReader):
    """Reads single entries."""

    def png_name(self, record: Any) -> Any:
        """The name of an entry's PNG."""
        return record.get("pan_seg_file_name")

    def _boxes(self, record: Any, segments: list[Any]) -> list[Box | None]:
        annotations = record.get("annotations")
        if not isinstance(annotations, list) or len(annotations) != len(segments):
            return [None] * len(segments)
        return [_box(annotation) for annotation in annotations]


def _box(annotation: Any) -> Box | None:
    if not isinstance(annotation, dict):
        return None
    return (corners if annotation.get("bbox_mode") == _XYWH else four_numbers)(annotation.get("bbox"))


def _entry(file: Path, i: int, record: Any, tested: set[str]) -> Entry:
    fields = record if isinstance(record, dict) else {}
    name = id_text(fields.get("image_id"))
    split = None if not tested else "test" if name in tested else TRAINVAL
    return Entry(f"{file.name}: entry {i}", name, fields.get("file_name"), record, split)


def _candidates(path: Path) -> list[Path]:
    return sorted(path.glob("psg*.json")) if path.is_dir() else [path]


def _roots(folder: Path) -> list[Path]:
    """Where COCO is: with psg.json, in a folder beside it, or around it (coco/annotations/psg.json, psg/psg.json)."""
    return [folder, folder / "coco", folder.parent, folder.parent / "coco"]
