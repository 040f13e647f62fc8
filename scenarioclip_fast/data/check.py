"""What a scene must be to be used, and the record of what was turned away."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from scenarioclip_fast.data.decode import DecodeError
from scenarioclip_fast.data.scene import Mask, Relation, Scene, SceneObject
from scenarioclip_fast.data.shards import SPLITS

# reason -> what it says about an entry. Reasons of one scene are listed before those of its objects and relations,
# which cost the scene no more than that object, mask or relation.
REASONS = {
    "malformed_entry": "the entry is not of the published form, or the record not of our schema",
    "unsafe_id": "the id is empty, too long, or holds a path separator or a control character",
    "duplicate_id": "the id has been used before",
    "split_conflict": "the id is in several splits, and this is not the one that is held out most: test, then val",
    "unsafe_path": "the image path is absolute or leads out of the directory",
    "unsafe_member": "the tar's member is a link or a device, or its name is absolute or leads out",
    "damaged_tar": "the tar is none, or ends too early: what stands behind is lost",
    "missing_image": "there is no such image file",
    "missing_record": "the tar has an image of this key, and no .json",
    "other_size": "the image is not of the size that its record names",
    "image_truncated": "the image ends too early",
    "image_corrupt": "the image is damaged",
    "image_too_large": "the image has more pixels or bytes than the limit",
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

MAX_ITEMS = 1024  # objects, and relations, of one scene
MAX_KEY = 90  # a tar header holds 100 bytes of name
MAX_IMAGE_BYTES = 1 << 28  # of an encoded image: more than MAX_PIXELS take without compression


@dataclass(frozen=True)
class Rejection:
    """Something of a data set that is not used: `entry` says where it stands, `reason` is a key of REASONS.

    Names and texts of a data set may be endless, or hold what moves a terminal's cursor: both texts fit into a line.
    """

    entry: str
    reason: str
    detail: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "entry", _line(self.entry))
        object.__setattr__(self, "detail", _line(self.detail))

    def __str__(self) -> str:
        return f"{self.entry}: {self.reason}: {self.detail}"


def _line(text: str) -> str:
    """At most 300 printable characters; such a text stays as it is."""
    if len(text) > 300:
        text = f"{text[:200]} ... {text[-60:]}"
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return shown if len(shown) <= 300 else f"{shown[:297]}..."


class BadEntry(ValueError):
    """A whole scene is unusable."""

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in REASONS, reason
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def normalise(text: str) -> str:
    """Lower case, single spaces: the form of every text of a vocabulary."""
    # JSON can spell half of a surrogate pair, which is no character and no UTF-8.
    return " ".join(text.encode("utf-8", "ignore").decode().lower().split())


def safe_key(name: str, raw: str | None = None) -> str:
    """A file name's stem for an id. A dot would end a WebDataset key, so that it and other signs become "_".

    A hash of `raw`, what the name was made from, follows where it is not the same: names that differ have keys that
    differ. A key is its own key.

    Raises:
        BadEntry: empty, too long, or with a path separator or a control character.
    """
    if not name or len(name) > MAX_KEY or re.search(r"[/\\\x00-\x1f\x7f]", name):
        raise BadEntry("unsafe_id", f"{short(name)}: expected 1 to {MAX_KEY} characters, no path separators")
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", name)
    if safe == (raw := name if raw is None else raw):
        return safe
    mark = f"-{hashlib.sha256(raw.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"
    return safe[: MAX_KEY - len(mark)] + mark


def given_splits(named: Iterable[tuple[str, str | None]]) -> dict[str, str]:
    """The split of each id that is given one. Of several it is the one held out most: test, then val."""
    given: dict[str, str] = {}
    for name, split in named:
        if split is not None:
            given[name] = max(split, given.get(name, split), key=SPLITS.index)
    return given


def split_conflict(entry: str, keeps: str) -> Rejection:
    """What becomes of an entry of another split than the one, `keeps`, that `given_splits` says."""
    return Rejection(entry, "split_conflict", f"the {keeps} split has this id too, and keeps it")


def normalised(scene: Scene) -> Scene:
    """The scene with its texts in the form of a vocabulary. BadEntry if one is empty, or if there are too many."""
    if max(len(scene.objects), len(scene.relations)) > MAX_ITEMS:
        raise BadEntry("malformed_entry", f"got {len(scene.objects)} objects and {len(scene.relations)} relations")
    objects = [replace(item, name=normalise(item.name)) for item in scene.objects]
    relations = [replace(relation, predicate=normalise(relation.predicate)) for relation in scene.relations]
    action = normalise(scene.action)
    if not all([action, *(item.name for item in objects), *(relation.predicate for relation in relations)]):
        raise BadEntry("malformed_entry", "the action, a name or a predicate is empty")
    return replace(scene, action=action, objects=objects, relations=relations)


def image_reason(error: DecodeError) -> str:
    """The rejection that a decoder's error stands for."""
    known = ("truncated", "corrupt", "too_large", "not_an_image")
    return f"image_{error.reason}" if error.reason in known else "image_undecodable"


def short(value: object) -> str:
    """A value's repr, cut to what fits into a message."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a {type(value).__name__} nested too deeply"
    return text if len(text) <= 80 else f"{text[:77]}..."


def clean_scene(
    scene: Scene,
    size: tuple[int, int],
    entry: str,
    *,
    encode: bool = False,
    classes: Mapping[str, Collection[str]] | None = None,
) -> tuple[Scene, list[Rejection]]:
    """Keeps what is sound of a scene whose image is `size` = (H, W).

    Objects with an impossible box go, and the relations of such objects. An unusable mask becomes None, and a
    relation of an object without a mask goes: it has no focused region.

    Args:
        entry: how to name the scene in a rejection.
        encode: turn masks into RLE, of COCO's compressed form; otherwise they stay as they are.
        classes: the "objects" and "relations" that are known; None: whatever occurs.
    """
    bad: list[Rejection] = []
    kept: dict[int, int] = {}  # position before -> position after
    objects: list[SceneObject] = []
    for i, item in enumerate(scene.objects):
        here = f"{entry}: object {i} ({item.name})"
        if classes is not None and item.name not in classes["objects"]:
            bad.append(Rejection(here, "unknown_object", "the name is not among the objects of the vocabulary"))
            continue
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
        if not reason and classes is not None and (text := scene.relation_text(k)) not in classes["relations"]:
            reason, detail = "unknown_relation", f"{text!r} is not among the relations of the vocabulary"
        if reason:
            bad.append(Rejection(f"{entry}: relation {k}", reason, detail))
        else:
            relations.append(Relation(kept[ends[0]], relation.predicate, kept[ends[1]]))
    return replace(scene, objects=objects, relations=relations), bad


def _clip_box(
    box: tuple[float, float, float, float], size: tuple[int, int]
) -> tuple[float, float, float, float] | None:
    height, width = size
    x1, y1, x2, y2 = map(float, box)
    if not all(map(math.isfinite, (x1, y1, x2, y2))):
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
        return (_compressed(mask) if encode else mask), "", ""
    except (KeyError, TypeError, ValueError) as error:
        return None, "bad_mask", str(error)


def _compressed(mask: Mask) -> dict[str, Any]:
    from scenarioclip_fast.data import rle

    if isinstance(mask, Tensor):
        return rle.encode(mask)
    height, width, runs = rle.read_runs(mask)
    counts = mask["counts"]
    return {"size": [height, width], "counts": counts if isinstance(counts, str) else rle.compress(runs)}


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
