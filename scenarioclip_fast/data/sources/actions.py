"""The actions of a data set that has none: texts by image, or COCO captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scenarioclip_fast.data.sources.classes import load_json
from scenarioclip_fast.data.texts import normalise
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.terminal import short


def load_actions(path: Path) -> dict[str, str]:
    """Read the action of each image, by its id or file name.

    Args:
        path: a JSON object {image id or file name: action}; or COCO captions (captions_train2017.json), of which the
            first of each image counts, by annotation id; or a directory with captions_*.json.

    Raises:
        UserError: unreadable, malformed, or without a single action.
    """
    files = sorted(path.glob("captions_*.json")) if path.is_dir() else [path]
    if not files:
        raise UserError(
            f"{path}: contains no captions_*.json; give the directory that does, or a JSON file with the actions"
        )
    actions: dict[str, str] = {}
    for file in files:
        _, record = load_json(file)
        actions.update(_captions(file, record) if _is_captions(record) else _mapping(file, record))
    if not actions:
        raise UserError(
            f"{path}: contains no actions; expected {{image id or file name: action}}, or COCO captions whose image_id "
            'is listed in "images"'
        )
    return actions


def _is_captions(record: Any) -> bool:
    return isinstance(record, dict) and all(isinstance(record.get(name), list) for name in ("images", "annotations"))


def _mapping(file: Path, record: Any) -> dict[str, str]:
    if not isinstance(record, dict):
        raise UserError(f"{file}: got {short(record)}, expected {{image id or file name: action}} or COCO captions")
    for name, action in record.items():
        if not isinstance(action, str) or not normalise(action):
            raise UserError(f"{file}: got {short(action)} as the action of {short(name)}, expected text")
    return dict(record)


def _captions(file: Path, record: dict[str, Any]) -> dict[str, str]:
    """The first caption of each image, by file name: other data sets with images of COCO have ids of their own."""
    first: dict[str, str] = {}
    try:
        names = {image["id"]: str(image["file_name"]) for image in record["images"]}
        for row in sorted(record["annotations"], key=lambda row: int(row["id"])):
            if row["image_id"] in names and normalise(row["caption"]):
                first.setdefault(names[row["image_id"]], row["caption"])
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise UserError(
            f"{file}: malformed COCO captions ({type(error).__name__}: {error}): expected images with id and "
            "file_name, annotations with id, image_id and caption"
        ) from None
    return first
