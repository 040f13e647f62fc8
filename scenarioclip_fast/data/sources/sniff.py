"""Tell JSON annotation files apart by their keys, without parsing them: they can be gigabytes."""

from __future__ import annotations

import os
from pathlib import Path

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import open_file

_ENDS = 1 << 16  # bytes at each end: every key below is in the first or last entry of a list, or near the lists

# kind -> keys of which one occurs in such a file; the first kind that matches counts
_KEYS = {
    "psg": ("pan_seg_file_name", "predicate_classes"),
    "coco-panoptic": ("segments_info", "isthing"),
    "captions": ("caption",),
    "keypoints": ("keypoints", "num_keypoints"),
    "instances": ("segmentation", "iscrowd", "supercategory"),
}
_NAMES = {
    "psg": "a file of PSG (--format psg)",
    "coco-panoptic": "COCO panoptic annotations (--format coco-panoptic)",
    "captions": "COCO captions, which describe no objects (--actions of other annotations)",
    "keypoints": "COCO keypoints, without panoptic segments",
    "instances": "COCO instances, without panoptic segments (those are in panoptic_*.json)",
}


def kind_of(path: Path) -> str | None:
    """The kind of a JSON annotation file: "psg", "coco-panoptic", "captions", "keypoints", "instances" or None."""
    if path.suffix != ".json" or not path.is_file():
        return None
    with open_file(path) as file:
        ends = file.read(_ENDS)
        if (size := os.fstat(file.fileno()).st_size) > _ENDS:
            file.seek(max(_ENDS, size - _ENDS))
            ends += file.read(_ENDS)
    ends = ends.replace(b"\0", b"")  # UTF-16
    # Quotation marks inside JSON strings are escaped, so these bytes are a whole string: nearly always a key.
    return next((kind for kind, keys in _KEYS.items() if any(b'"%b"' % key.encode() in ends for key in keys)), None)


def describe(path: Path) -> str | None:
    """Say what a file of COCO is that cannot be packed; None for other files."""
    kind = kind_of(path)
    return _NAMES[kind] if kind in ("captions", "keypoints", "instances") else None


def require_kind(path: Path, kind: str) -> None:
    """Raise UserError if a file is known to be of another kind than `kind`."""
    found = kind_of(path)
    if found not in (None, kind):
        raise UserError(f"{path}: got {_NAMES[found]}, expected {_NAMES[kind]}")
