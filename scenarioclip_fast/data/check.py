"""Validate scenes, and record what was rejected and why."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from scenarioclip_fast.data import rle
from scenarioclip_fast.data.boxes import Box, BoxEvidence, BoxFormat, clip_box, to_corners
from scenarioclip_fast.data.decode import MAX_PIXELS, DecodeError, TorchDecoder, decode_checked
from scenarioclip_fast.data.scene import Mask, Relation, Scene, SceneObject, mask_pixels
from scenarioclip_fast.data.shards import SPLITS
from scenarioclip_fast.data.texts import normalise
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.ops.view_batch import MAX_SIDE, check_renderable
from scenarioclip_fast.terminal import short

# reason -> description. The first group rejects a whole scene, the second drops one object, mask or relation.
REASONS = {
    "malformed_entry": "the entry does not match the format of its data set, or the record does not match this schema",
    "unsafe_id": "the id is empty, too long, or contains a path separator or a control character",
    "duplicate_id": "another scene has the same id",
    "split_conflict": "the id occurs in several splits; it stays in test, else in val",
    "unsafe_path": "the path of a file is absolute or escapes the directory",
    "unsafe_member": "the tar member is a link or a device, or its name is absolute or escapes the directory",
    "damaged_tar": "the file is not a tar, is damaged or has no end marker; members after the damage are lost",
    "missing_image": "the image does not exist, or is not a regular file",
    "missing_record": "the tar has an image with this key but no .json",
    "other_size": "the image size differs from the size in the record or annotation",
    "image_truncated": "the image is truncated",
    "image_corrupt": "the image is damaged",
    "image_too_large": "the image exceeds the limit on pixels, bytes or its longer side",
    "image_too_narrow": "the image's longer side exceeds its shorter one too many times to be rendered",
    "image_not_an_image": "the file is not an image",
    "image_undecodable": "the image cannot be decoded",
    "unknown_action": "the action is not in classes.json",
    "missing_masks": "the mask file or panoptic PNG of the scene does not exist",
    "bad_masks": "the mask file or panoptic PNG is damaged or does not match the scene",
    "malformed_object": "the object does not match the format of its data set: no name or no box, for example",
    "unknown_object": "the name is not in classes.json, or the category is not that of a name",
    "box_outside": "the box is empty, not finite, or extends outside the image",
    "empty_mask": "the mask has no set pixels",
    "bad_mask": "the mask is malformed or its size differs from the image's",
    "malformed_relation": "the relation does not match the format of its data set",
    "unknown_relation": "the relation is not in classes.json, or its number is not that of a predicate",
    "relation_unknown_label": "the relation names an object that is not in the scene",
    "relation_without_object": "the relation's subject or object was rejected",
    "relation_with_itself": "the relation's subject and object are the same object",
    "relation_without_mask": "the mask of the relation's subject or object is missing or unusable",
}

# Reasons that drop one object, and those that drop one relation. The last two of these follow from other rejections.
OBJECT_REASONS = frozenset({"malformed_object", "unknown_object", "box_outside"})
CONSEQUENCES = frozenset({"relation_without_object", "relation_without_mask"})
RELATION_REASONS = CONSEQUENCES | {
    "malformed_relation",
    "unknown_relation",
    "relation_unknown_label",
    "relation_with_itself",
}
KEEP_SCENE = OBJECT_REASONS | RELATION_REASONS | {"missing_masks", "bad_masks", "empty_mask", "bad_mask"}
UNKNOWN = "classes.json does not list the text: add it, or remove classes.json to accept every text"

# Boxes that exceed the image by up to this many pixels are clipped, not rejected: annotations are often rounded up.
BOX_SLACK = 1.0

MAX_ITEMS = 1024  # objects per scene; also relations per scene
MAX_KEY = 90  # a tar header has 100 bytes for the name
MAX_IMAGE_BYTES = 1 << 28  # encoded; more than MAX_PIXELS uncompressed


@dataclass(frozen=True)
class Rejection:
    """A rejected part of a data set: `entry` locates it, `reason` is a key of REASONS.

    `entry` and `detail` are reduced to one printable line: text from a data set may be arbitrarily long or contain
    terminal control sequences. `hint` is the cause and the remedy, if they are known: the same text for all entries
    that have this cause.
    """

    entry: str
    reason: str
    detail: str
    hint: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "entry", _line(self.entry))
        object.__setattr__(self, "detail", _line(self.detail))

    def __str__(self) -> str:
        return f"{self.entry}: {self.reason}: {self.detail}"


def _line(text: str) -> str:
    """Escape and shorten `text` to at most 300 printable characters. Idempotent."""
    if len(text) > 300:
        text = f"{text[:200]} ... {text[-60:]}"
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return shown if len(shown) <= 300 else f"{shown[:297]}..."


class BadEntry(ValueError):
    """The whole scene is unusable. `reason` is a key of REASONS; `hint` is as in `Rejection`."""

    def __init__(self, reason: str, detail: str, hint: str = "") -> None:
        assert reason in REASONS, f"{reason!r} is not a key of {__name__}.REASONS: add it, with a description"
        super().__init__(reason, detail, hint)
        self.reason, self.detail, self.hint = reason, detail, hint


def safe_key(name: str, raw: str | None = None) -> str:
    """Turn an id into a WebDataset key: characters other than letters, digits, "_" and "-" become "_".

    If the key differs from `raw` (the original id, default `name`), a hash of `raw` is appended so that distinct ids
    get distinct keys. Idempotent.

    Raises:
        BadEntry: `name` is empty, too long, or contains a path separator or a control character.
    """
    if not name or len(name) > MAX_KEY or re.search(r"[/\\\x00-\x1f\x7f]", name):
        raise BadEntry("unsafe_id", f"{short(name)}: expected 1 to {MAX_KEY} characters, no path separators")
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", name)
    if safe == (raw := name if raw is None else raw):
        return safe
    mark = f"-{hashlib.sha256(raw.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"
    return safe[: MAX_KEY - len(mark)] + mark


def assigned_splits(named: Iterable[tuple[str, str | None]]) -> dict[str, str]:
    """Map each id to its assigned split. An id in several splits is assigned to test, else to val."""
    assigned: dict[str, str] = {}
    for name, split in named:
        if split is not None:
            assigned[name] = max(split, assigned.get(name, split), key=SPLITS.index)
    return assigned


def split_conflict(entry: str, split: str) -> Rejection:
    """Create the rejection of an entry whose id is assigned to another split, `split`."""
    return Rejection(entry, "split_conflict", f"the id is also in the {split} split, where it stays")


def normalise_scene(scene: Scene) -> Scene:
    """Normalise the texts of a scene.

    Raises:
        BadEntry: a text is empty, or there are more than MAX_ITEMS objects or relations.
    """
    if max(len(scene.objects), len(scene.relations)) > MAX_ITEMS:
        raise BadEntry(
            "malformed_entry",
            f"got {len(scene.objects)} objects and {len(scene.relations)} relations, expected at most {MAX_ITEMS} each",
        )
    objects = [replace(item, name=normalise(item.name)) for item in scene.objects]
    relations = [
        replace(r, predicate=normalise(r.predicate), negatives=[normalise(text) for text in r.negatives])
        for r in scene.relations
    ]
    action = None if scene.action is None else normalise(scene.action)
    texts = [item.name for item in objects] + [text for r in relations for text in (r.predicate, *r.negatives)]
    if action == "" or not all(texts):
        raise BadEntry("malformed_entry", "the action, a name, a predicate or a negative is empty")
    return replace(scene, action=action, objects=objects, relations=relations)


@dataclass(frozen=True)
class CheckedScene:
    """A valid scene, its image size (H, W), the parts of it that were rejected, and evidence about its boxes."""

    scene: Scene
    size: tuple[int, int]
    rejected: list[Rejection]
    boxes: NDArray[np.float64] | None = None  # see `boxes.BoxEvidence`


@contextmanager
def malformed_entries() -> Iterator[None]:
    """Convert errors caused by malformed fields to BadEntry("malformed_entry")."""
    try:
        yield
    except (BadEntry, UserError):
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise BadEntry("malformed_entry", f"{type(error).__name__}: {error}") from error


class SceneChecker:
    """Validates scenes and their images. Picklable: each process creates its own decoder.

    Args:
        max_pixels: larger images are rejected.
        classes: the known "actions", "objects" and "relations"; None accepts any text.
        boxes: the convention of the boxes; None: "xyxy", and evidence is collected in case it is another.
    """

    def __init__(
        self,
        max_pixels: int = MAX_PIXELS,
        classes: Mapping[str, Collection[str]] | None = None,
        boxes: BoxFormat | None = "xyxy",
    ) -> None:
        self._max_pixels = max_pixels
        self._boxes = boxes
        self._evidence = BoxEvidence() if boxes is None else None
        self._classes = None if classes is None else {level: frozenset(texts) for level, texts in classes.items()}
        self._decoder: TorchDecoder | None = None

    def check(self, scene: Scene, entry: str) -> CheckedScene:
        """Normalise and validate a scene whose image is encoded bytes; encode its masks as RLE.

        Args:
            entry: name of the scene in rejections.

        Raises:
            BadEntry: the whole scene is unusable.
        """
        assert isinstance(scene.image, bytes)
        size = self.image_size(scene.image)
        scene = replace(normalise_scene(scene), key=safe_key(scene.key))
        self.check_action(scene.action)
        return self.clean(scene, size, entry)

    def image_size(self, image: bytes, where: str = "") -> tuple[int, int]:
        """Decode an image to verify that it is intact, and return its (H, W); see `decode`."""
        height, width = self.decode(image, where).shape[:2]
        return height, width

    def decode(self, image: bytes, where: str = "") -> Tensor:  # uint8 [H, W, 3]
        """Decode an image.

        Args:
            where: prefix for the error's detail.

        Raises:
            BadEntry: the image is damaged, not an image, too large or too narrow.
        """
        if self._decoder is None:
            self._decoder = TorchDecoder(threads=1, max_pixels=self._max_pixels)
        try:
            pixels = decode_checked(self._decoder, image)
        except DecodeError as error:
            known = ("truncated", "corrupt", "too_large", "not_an_image")
            reason = f"image_{error.reason}" if error.reason in known else "image_undecodable"
            raise BadEntry(reason, f"{where}{error.detail}") from error
        height, width = pixels.shape[:2]
        try:
            check_renderable(height, width)
        except ValueError as error:
            reason = "image_too_large" if max(height, width) > MAX_SIDE else "image_too_narrow"
            raise BadEntry(reason, f"{where}{error}") from None
        return pixels

    def is_known(self, level: str, text: str) -> bool:
        """Whether `text` is a known class of `level`: "actions", "objects" or "relations"."""
        return self._classes is None or text in self._classes[level]

    def check_action(self, action: str | None) -> None:
        """Raise BadEntry if there is an action that is not a known class."""
        if action is not None and not self.is_known("actions", action):
            raise BadEntry("unknown_action", f"{action!r} is not a known action", UNKNOWN)

    def corners(self, box: Box, size: tuple[int, int]) -> Box:
        """Convert a box of the data set to x1, y1, x2, y2 in pixels of an image of `size` = (H, W)."""
        return box if self._boxes is None else to_corners(box, self._boxes, size)

    def clean(
        self, scene: Scene, size: tuple[int, int], entry: str, *, corners: bool = False, encode: bool = True
    ) -> CheckedScene:
        """Drop the invalid parts of a scene and encode its masks; see `clean_scene`.

        corners: the boxes have been converted by `corners`.
        """
        evidence = None if self._evidence is None else self._evidence.of(scene.objects, size)
        if not corners:
            objects = [replace(item, box=self.corners(item.box, size)) for item in scene.objects]
            scene = replace(scene, objects=objects)
        clean, rejected = clean_scene(scene, size, entry, encode=encode, classes=self._classes)
        if self._boxes not in (None, "xyxy"):
            hint = f"the boxes were read as --boxes {self._boxes} says: is it right?"
            rejected = [replace(one, hint=hint) if one.reason == "box_outside" else one for one in rejected]
        return CheckedScene(clean, size, rejected, evidence)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_decoder": None}


def clean_scene(
    scene: Scene,
    size: tuple[int, int],
    entry: str,
    *,
    encode: bool = False,
    classes: Mapping[str, Collection[str]] | None = None,
) -> tuple[Scene, list[Rejection]]:
    """Drop the invalid parts of a scene whose image is `size` = (H, W).

    Objects with an invalid box are dropped along with their relations. An unusable mask becomes None, and relations of
    its object are dropped because they have no focused region. Objects that came without a mask keep their relations,
    for the views that need no mask.

    Args:
        entry: name of the scene in rejections.
        encode: convert masks to compressed COCO RLE; otherwise they are unchanged.
        classes: the known "objects" and "relations"; None accepts any text.
    """
    objects, kept, bad = _clean_objects(scene, size, entry, encode, classes)
    lost = {i for i, k in kept.items() if scene.objects[i].mask is not None and objects[k].mask is None}
    relations: list[Relation] = []
    for k, relation in enumerate(scene.relations):
        ends = (relation.subject, relation.object)
        reason, detail = _relation_problem(ends, kept, objects, len(scene.objects), lost)
        if not reason and classes is not None and (text := scene.relation_text(k)) not in classes["relations"]:
            reason, detail = "unknown_relation", f"{text!r} is not a known relation"
        if reason:
            hint = UNKNOWN if reason == "unknown_relation" else ""
            bad.append(Rejection(f"{entry}: relation {k}", reason, detail, hint))
        else:
            relations.append(replace(relation, subject=kept[ends[0]], object=kept[ends[1]]))
    return replace(scene, objects=objects, relations=relations), bad


def _clean_objects(
    scene: Scene,
    size: tuple[int, int],
    entry: str,
    encode: bool,
    classes: Mapping[str, Collection[str]] | None,
) -> tuple[list[SceneObject], dict[int, int], list[Rejection]]:
    """The valid objects, a map from old to new positions, and the rejections."""
    objects: list[SceneObject] = []
    kept: dict[int, int] = {}
    bad: list[Rejection] = []
    for i, item in enumerate(scene.objects):
        here = f"{entry}: object {i} ({item.name})"
        if classes is not None and item.name not in classes["objects"]:
            bad.append(Rejection(here, "unknown_object", f"{item.name!r} is not a known object", UNKNOWN))
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
    return objects, kept, bad


def _clip_box(
    box: tuple[float, float, float, float], size: tuple[int, int]
) -> tuple[float, float, float, float] | None:
    height, width = size
    x1, y1, x2, y2 = map(float, box)
    if not all(map(math.isfinite, (x1, y1, x2, y2))):
        return None
    if min(x1, y1) < -BOX_SLACK or x2 > width + BOX_SLACK or y2 > height + BOX_SLACK:
        return None
    x1, y1, x2, y2 = clip_box((x1, y1, x2, y2), size)
    return (x1, y1, x2, y2) if x2 > x1 and y2 > y1 else None


def _usable_mask(mask: Mask | None, size: tuple[int, int], encode: bool) -> tuple[Mask | None, str, str]:
    """(mask, "", "") or (None, reason, detail)."""
    if mask is None:
        return None, "", ""
    try:
        found = mask if isinstance(mask, dict) else mask_pixels(mask)
        shape = tuple(found["size"]) if isinstance(found, dict) else found.shape
        if shape != size:
            return None, "bad_mask", f"got a mask of size {list(shape)}, expected the image size {list(size)}"
        empty = rle.area(found) == 0 if isinstance(found, dict) else not found.any()
        if empty:
            return None, "empty_mask", "the mask has no set pixels; the object keeps its box"
        return (_compressed(found) if encode else mask), "", ""
    except (KeyError, TypeError, ValueError) as error:
        return None, "bad_mask", str(error)


def _compressed(mask: NDArray[np.bool_] | dict[str, Any]) -> dict[str, Any]:
    if not isinstance(mask, dict):
        return rle.encode(mask)
    height, width, runs = rle.read_runs(mask)
    counts = mask["counts"]
    return {"size": [height, width], "counts": counts if isinstance(counts, str) else rle.compress(runs)}


def _relation_problem(
    ends: tuple[int, int], kept: dict[int, int], objects: list[SceneObject], n: int, lost: set[int]
) -> tuple[str, str]:
    """(reason, detail) of an invalid relation, or two empty strings; `lost`: objects whose mask is unusable."""
    for i in ends:
        if not 0 <= i < n:
            return (
                "relation_unknown_label",
                f"got object {i}, but the scene has {n} objects",
            )
        if i not in kept:
            return "relation_without_object", f"object {i} was rejected"
    if ends[0] == ends[1]:
        return "relation_with_itself", f"object {ends[0]} ({objects[kept[ends[0]]].name})"
    for i in ends:
        if i in lost:
            return "relation_without_mask", f"the mask of object {i} ({objects[kept[i]].name}) is unusable"
    return "", ""
