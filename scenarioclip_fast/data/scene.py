"""A scene in memory, and its conversion to and from JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.terminal import short

SCHEMA = 2  # of records and packs that are written
READABLE = (1, 2)  # in schema 1, every scene has an action, and every relation two masks

Mask = Tensor | NDArray[Any] | dict[str, Any]
"""Pixels [H, W], bool or uint8 (see `mask_pixels`), or COCO RLE {"size": [H, W], "counts": compressed string}."""


@dataclass(slots=True, eq=False)
class SceneObject:
    """A named object. `box` is x1, y1, x2, y2 in source pixels, x2 and y2 exclusive."""

    name: str
    box: tuple[float, float, float, float]
    mask: Mask | None = None


@dataclass(slots=True)
class Relation:
    """A relation between two objects, given as indices into the scene's list of objects.

    `negatives` are texts that are false of it: "subject predicate object" with one of the three replaced.
    """

    subject: int
    predicate: str
    object: int
    negatives: list[str] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Scene:
    """An image with its action, objects and relations.

    `image` holds encoded bytes (JPEG) or uint8 [H, W, 3]. A scene whose `action` is None has no text as a whole: it
    counts at the object and relation levels only. `split` is the split assigned by the data set, if any. `caption`
    describes the image in a sentence or two, and `scores` holds what the models that found the scene said of their
    confidence; training reads neither.
    """

    key: str
    image: bytes | Tensor
    action: str | None = None
    objects: list[SceneObject] = field(default_factory=list)
    relations: list[Relation] = field(default_factory=list)
    split: str | None = None
    caption: str | None = None
    scores: dict[str, Any] | None = None

    def relation_text(self, k: int) -> str:
        """The text of relation `k`: "subject predicate object"."""
        relation = self.relations[k]
        return f"{self.objects[relation.subject].name} {relation.predicate} {self.objects[relation.object].name}"


def has_masks(scene: Scene, relation: Relation) -> bool:
    """Whether subject and object both have a mask, as a focused region requires."""
    return scene.objects[relation.subject].mask is not None and scene.objects[relation.object].mask is not None


def with_masks(scene: Scene) -> Scene:
    """The scene without the relations that have no focused region for lack of masks."""
    return replace(scene, relations=[r for r in scene.relations if has_masks(scene, r)])


def mask_pixels(mask: Tensor | NDArray[Any]) -> NDArray[np.bool_]:  # [H, W]
    """Return the pixels of a mask that is not RLE: bool, or uint8 with the values 0 and 1, or 0 and 255.

    Raises:
        ValueError: another shape, type or value.
    """
    kind = str(mask.dtype).removeprefix("torch.") if isinstance(mask, Tensor | np.ndarray) else type(mask).__name__
    if kind not in ("bool", "uint8") or mask.ndim != 2:
        shape = f" {list(mask.shape)}" if isinstance(mask, Tensor | np.ndarray) else ""
        raise ValueError(f"got a mask of {kind}{shape}, expected bool or uint8 [H, W], or RLE")
    pixels: NDArray[Any] = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else mask
    if kind == "uint8":
        top = pixels.max(initial=0)
        if top not in (0, 1, 255) or (top == 255 and ((pixels > 0) & (pixels < 255)).any()):
            values = np.unique(pixels).tolist()
            shown = ", ".join(map(str, values[:6])) + ", ..." * (len(values) > 6)
            raise ValueError(f"got a mask of uint8 with the values {shown}; expected 0 and 1, or 0 and 255")
    return pixels.astype(np.bool_, copy=False)


def scene_to_json(scene: Scene, size: tuple[int, int]) -> dict[str, Any]:
    """Convert a scene to the KEY.json record of a pack; `size` is (H, W). Masks must be RLE or None."""
    optional = {"caption": scene.caption, "scores": scene.scores}
    return {
        "schema": SCHEMA,
        "size": list(size),
        "action": scene.action,
        **{name: value for name, value in optional.items() if value is not None},
        "objects": [{"name": o.name, "box": list(o.box), "mask": o.mask} for o in scene.objects],
        "relations": [
            {"subject": r.subject, "predicate": r.predicate, "object": r.object}
            | ({"negatives": r.negatives} if r.negatives else {})
            for r in scene.relations
        ],
    }


def scene_from_json(key: str, image: bytes | Tensor, record: Mapping[str, Any]) -> Scene:
    """Invert `scene_to_json`.

    Raises:
        ValueError: unsupported schema, or a malformed record.
    """
    schema = record.get("schema") if isinstance(record, Mapping) else None
    if schema not in READABLE:
        raise ValueError(f"scene {key}: got schema {short(schema)}, expected {' or '.join(map(str, READABLE))}")
    try:
        height, width = (_integer(n) for n in record["size"])
        objects = [_object_from_json(o, height, width) for o in _list(record["objects"])]
        relations = [_relation_from_json(r) for r in _list(record["relations"])]
        action = _text(record["action"]) if schema == 1 else _optional_text(record.get("action"))
        caption, scores = _optional_text(record.get("caption")), record.get("scores")
        if scores is not None and not isinstance(scores, dict):
            raise TypeError(f"got scores of type {type(scores).__name__}, expected an object")
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"scene {key}: malformed record ({type(error).__name__}: {error})") from error
    if any(not (0 <= i < len(objects)) for r in relations for i in (r.subject, r.object)):
        raise ValueError(
            f"scene {key}: a relation refers to an object that does not exist (the scene has {len(objects)})"
        )
    return Scene(key, image, action, objects, relations, caption=caption, scores=scores)


def _relation_from_json(record: Mapping[str, Any]) -> Relation:
    negatives = [_text(text) for text in _list(record.get("negatives", []))]
    return Relation(_integer(record["subject"]), _text(record["predicate"]), _integer(record["object"]), negatives)


def _object_from_json(record: Mapping[str, Any], height: int, width: int) -> SceneObject:
    x1, y1, x2, y2 = (float(v) for v in _list(record["box"]))
    mask = record["mask"]
    if mask is not None and list(mask["size"]) != [height, width]:
        raise ValueError(f"mask size {mask['size']} differs from the image size {[height, width]}")
    return SceneObject(_text(record["name"]), (x1, y1, x2, y2), None if mask is None else dict(mask))


def _integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"got {short(value)}, expected an integer")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"got a {type(value).__name__}, expected a list")
    return list(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"got a {type(value).__name__}, expected a string")
    return value


def _optional_text(value: Any) -> str | None:
    return None if value is None else _text(value)


def check_fractions(val: float, test: float) -> None:
    """Raise UserError unless `val` and `test` are valid fractions of all scenes."""
    if not (val >= 0 and test >= 0 and val + test <= 1):
        raise UserError(f"got fractions val={val:g} and test={test:g}, expected values >= 0 with a sum <= 1")
