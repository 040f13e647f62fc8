"""What a scene must be to be used, and the record of what was turned away."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from scenarioclip_fast.data.scene import Mask, Relation, Scene, SceneObject

# reason -> what it says about an entry. Reasons of one scene are listed before those of its objects and relations,
# which cost the scene no more than that object, mask or relation.
REASONS = {
    "malformed_entry": "the entry is not of the published form",
    "unsafe_id": "the id is empty, too long, or holds a path separator or a control character",
    "duplicate_id": "the id has been used before",
    "unsafe_path": "the image path is absolute or leads out of the directory",
    "missing_image": "there is no such image file",
    "image_truncated": "the image ends too early",
    "image_corrupt": "the image is damaged",
    "image_too_large": "the image has more pixels than the limit",
    "image_not_an_image": "the file is not an image",
    "image_undecodable": "the image cannot be decoded",
    "unknown_action": "the action is not in classes.json",
    "missing_masks": "the scene has no file of masks",
    "bad_masks": "the file of masks is not of the published form",
    "malformed_object": "the object is not [name, [x1, y1, x2, y2]]",
    "unknown_object": "the name is not in classes.json",
    "box_outside": "the box is empty, not finite, or leaves the image",
    "empty_mask": "the mask has no pixel",
    "bad_mask": "the mask is not one of the image's size",
    "malformed_relation": "the relation is not [path, [subject, predicate, object]]",
    "unknown_relation": "the relation is not in classes.json",
    "relation_unknown_label": "the relation names something that is not among the objects",
    "relation_without_object": "the relation's subject or object was rejected",
    "relation_with_itself": "the relation's subject and object are one and the same",
    "relation_without_mask": "the relation's subject or object has no mask",
}

# A box may leave the image by this much, in pixels: annotations are often rounded outwards. It is clipped.
BOX_SLACK = 1.0


@dataclass(frozen=True)
class Rejection:
    """Something of a data set that is not used: `entry` says where it stands, `reason` is a key of REASONS."""

    entry: str
    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{self.entry}: {self.reason}: {self.detail}"


class BadEntry(ValueError):
    """A whole scene is unusable."""

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in REASONS, reason
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def clean_scene(
    scene: Scene, size: tuple[int, int], entry: str, *, encode: bool = False
) -> tuple[Scene, list[Rejection]]:
    """Keeps what is sound of a scene whose image is `size` = (H, W).

    Objects with an impossible box go, and the relations of such objects. An unusable mask becomes None, and a
    relation of an object without a mask goes: it has no focused region.

    Args:
        entry: how to name the scene in a rejection.
        encode: turn masks into RLE; otherwise they stay as they are.
    """
    bad: list[Rejection] = []
    kept: dict[int, int] = {}  # position before -> position after
    objects: list[SceneObject] = []
    for i, item in enumerate(scene.objects):
        here = f"{entry}: object {i} ({item.name})"
        box = _clip_box(item.box, size)
        if box is None:
            coordinates = ", ".join(f"{v:g}" for v in item.box)
            bad.append(Rejection(here, "box_outside", f"[{coordinates}] in an image of {size[1]} x {size[0]}"))
            continue
        mask, reason, detail = _usable_mask(item.mask, size, encode)
        if reason:
            bad.append(Rejection(here, reason, detail))
        kept[i] = len(objects)
        objects.append(SceneObject(item.name, box, mask))
    relations: list[Relation] = []
    for k, relation in enumerate(scene.relations):
        ends = (relation.subject, relation.object)
        reason, detail = _relation_problem(ends, kept, objects, len(scene.objects))
        if reason:
            bad.append(Rejection(f"{entry}: relation {k}", reason, detail))
        else:
            relations.append(Relation(kept[ends[0]], relation.predicate, kept[ends[1]]))
    return replace(scene, objects=objects, relations=relations), bad


def _clip_box(
    box: tuple[float, float, float, float], size: tuple[int, int]
) -> tuple[float, float, float, float] | None:
    height, width = size
    x1, y1, x2, y2 = box
    if not all(math.isfinite(v) for v in box):
        return None
    if min(x1, y1) < -BOX_SLACK or x2 > width + BOX_SLACK or y2 > height + BOX_SLACK:
        return None
    x1, y1, x2, y2 = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    return (x1, y1, x2, y2) if x2 > x1 and y2 > y1 else None


def _usable_mask(mask: Mask | None, size: tuple[int, int], encode: bool) -> tuple[Mask | None, str, str]:
    """(mask, "", "") or (None, reason, detail)."""
    from scenarioclip_fast.data import rle

    if mask is None:
        return None, "", ""
    try:
        shape: Any = tuple(mask.shape) if isinstance(mask, Tensor) else tuple(mask["size"])
        if shape != size:
            return None, "bad_mask", f"got a mask of {list(shape)}, expected the image's {list(size)}"
        empty = not bool(mask.any()) if isinstance(mask, Tensor) else rle.area(mask) == 0
        if empty:
            return None, "empty_mask", "the mask has no pixel; the object's box is kept"
        return (rle.encode(mask) if encode and isinstance(mask, Tensor) else mask), "", ""
    except (KeyError, TypeError, ValueError) as error:
        return None, "bad_mask", str(error)


def _relation_problem(
    ends: tuple[int, int], kept: dict[int, int], objects: list[SceneObject], n: int
) -> tuple[str, str]:
    for i in ends:
        if not 0 <= i < n:
            return "relation_unknown_label", f"got object {i}, expected one of {n}"
        if i not in kept:
            return "relation_without_object", f"object {i} was rejected"
    if ends[0] == ends[1]:
        return "relation_with_itself", f"object {ends[0]} ({objects[kept[ends[0]]].name})"
    for i in ends:
        if objects[kept[i]].mask is None:
            return "relation_without_mask", f"object {i} ({objects[kept[i]].name}) has no mask"
    return "", ""
