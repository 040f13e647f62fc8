"""Conventions of boxes: conversion to corners in pixels, and recognition of a convention that was not declared.

A box that is read in the wrong convention is often still a valid box, and its object's views silently show something
else. Masks tell: a box should fit the bounds of its object's mask.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from scenarioclip_fast.data import rle
from scenarioclip_fast.data.scene import SceneObject

BoxFormat = Literal["xyxy", "xywh", "normalised"]
Box = tuple[float, float, float, float]
Array = NDArray[np.float64]

# Boxes are loose, but of two conventions the right one fits far better than these bounds ask for.
_FITS = 0.5  # intersection over union of a box and its mask's bounds
_WHOLE = 0.95  # intersection over union of the image and a box that stands for all of it
_MOST = 0.8  # of the boxes fit in the right convention
_FEW = 0.5  # of the boxes at most fit in a wrong one
_VALID = 0.98  # without masks: of the boxes lie inside the image in the right convention
_MIN_BOXES = 8
_HUGE = 1e9  # pixels: not a box in any convention, and its area may overflow
_SAME_SIZE = 0.05  # relative spread of a size that all images were resized to

_SCENES = 256  # are examined
_OBJECTS = 8  # of each scene

COLUMNS = 10  # of a row of evidence: box, bounds of its mask (NaN without a mask), width and height of the image


def to_corners(box: Box, kind: BoxFormat, size: tuple[int, int]) -> Box:
    """Convert a box to x1, y1, x2, y2 in pixels.

    Args:
        kind: "xyxy": corners in pixels; "xywh": corner, width and height in pixels; "normalised": corners as fractions
            of the image's width and height.
        size: (H, W) of the image.
    """
    a, b, c, d = box
    if kind == "xywh":
        return a, b, a + c, b + d
    if kind == "normalised":
        height, width = size
        return a * width, b * height, c * width, d * height
    return box


def clip_box(box: Sequence[float], size: Sequence[int]) -> Box:
    """The part of a box, x1, y1, x2, y2, inside an image of `size` = (H, W); x2 <= x1 or y2 <= y1 if there is none."""
    return max(box[0], 0.0), max(box[1], 0.0), min(box[2], float(size[1])), min(box[3], float(size[0]))


def box_overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes x1, y1, x2, y2; 0 if the union is empty."""
    shared = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = sum(max(0.0, one[2] - one[0]) * max(0.0, one[3] - one[1]) for one in (a, b)) - shared
    return shared / union if union > 0 else 0.0


_examined: Counter[str] = Counter()  # scenes, by the id of a `BoxEvidence`


class BoxEvidence:
    """Compares boxes with masks, in the first scenes of each process. Picklable, and pickled with every few scenes."""

    def __init__(self) -> None:
        self._id = uuid.uuid4().hex

    def of(self, objects: Sequence[SceneObject], size: tuple[int, int]) -> Array | None:  # [n, COLUMNS]
        """The rows of a scene's objects; None if it has none, or once enough scenes have been seen.

        Args:
            objects: as the data set gives them.
            size: (H, W) of the image.
        """
        if _examined[self._id] == _SCENES or not objects:
            return None
        _examined[self._id] += 1
        rows = []
        for item in objects[:_OBJECTS]:
            try:
                bounds = None if item.mask is None else rle.bounds(item.mask, size)
                rows.append((*item.box, *(bounds or (np.nan,) * 4), size[1], size[0]))
            except (KeyError, TypeError, ValueError):  # malformed: rejected elsewhere
                continue
        return np.array(rows, np.float64).reshape(-1, COLUMNS)


class BoxTally:
    """Collects the evidence of the first scenes, and judges whether the boxes are corners in pixels."""

    def __init__(self) -> None:
        self._scenes: list[Array] = []

    def add(self, rows: Array | None) -> bool:
        """Add the rows of a scene, and return whether they count: processes examine more scenes than are needed."""
        if rows is None or self.is_full:
            return False
        self._scenes.append(rows)
        return True

    @property
    def is_full(self) -> bool:
        """Whether further scenes do not count."""
        return len(self._scenes) == _SCENES

    def verdict(self) -> str | None:
        """What the boxes are instead of corners in pixels, and what to do; None if nothing speaks against corners."""
        rows, masked = self._rows()
        if len(masked) >= _MIN_BOXES:
            return _by_masks(masked)
        return _by_size(rows) if len(rows) >= _MIN_BOXES else None

    def doubt(self) -> str | None:
        """A warning if most boxes miss their masks, in no convention that `verdict` recognises."""
        _, masked = self._rows()
        box, bounds = masked[:, :4], masked[:, 4:8]
        area = (bounds[:, 2:] - bounds[:, :2]).prod(1)
        missed = int((_shared(box, bounds) < _FITS * area).sum())
        if len(masked) < _MIN_BOXES or missed <= _FEW * len(masked):
            return None
        return f"{missed} of {len(masked)} boxes do not contain half of their masks: check the boxes, and --boxes"

    def _rows(self) -> tuple[Array, Array]:
        """All rows with sensible boxes, and those of them with masks."""
        rows = np.concatenate([np.zeros((0, COLUMNS)), *self._scenes])
        rows = rows[(np.abs(rows[:, :4]) < _HUGE).all(1)]  # False for NaN
        return rows, rows[np.isfinite(rows[:, 4])]


def _scaled(rows: Array) -> Array:  # [n, 4]
    return rows[:, :4] * rows[:, [8, 9, 8, 9]]


def _sized(box: Array) -> Array:  # [n, 4]
    return np.concatenate([box[:, :2], box[:, :2] + box[:, 2:]], axis=1)


def _centred(box: Array) -> Array:  # [n, 4]
    return np.concatenate([box[:, :2] - box[:, 2:] / 2, box[:, :2] + box[:, 2:] / 2], axis=1)


_CORNERS = "x1, y1, x2, y2 in pixels"
_CONVERT = f"convert them to {_CORNERS}"
# (what the boxes are, conversion of the rows to corners in pixels, what to do)
_CONVENTIONS: list[tuple[str, Callable[[Array], Array], str]] = [
    ("x, y, width, height", lambda rows: _sized(rows[:, :4]), "pass --boxes xywh"),
    ("x1, y1, x2, y2 as fractions of the image's size", _scaled, "pass --boxes normalised"),
    ("x, y, width, height as fractions of the image's size", lambda rows: _sized(_scaled(rows)), _CONVERT),
    ("centre, width and height", lambda rows: _centred(rows[:, :4]), _CONVERT),
    ("centre, width and height as fractions of the image's size", lambda rows: _centred(_scaled(rows)), _CONVERT),
    ("y1, x1, y2, x2", lambda rows: rows[:, [1, 0, 3, 2]], _CONVERT),
]


def _shared(box: Array, bounds: Array) -> Array:  # [n, 4] each -> [n]
    """The area of the intersection."""
    low, high = np.maximum(box[:, :2], bounds[:, :2]), np.minimum(box[:, 2:], bounds[:, 2:])
    return (high - low).clip(0).prod(1)


def _overlap(box: Array, bounds: Array) -> Array:  # [n, 4] each -> [n]
    """Intersection over union; 0 for empty boxes."""
    shared = _shared(box, bounds)
    union = (box[:, 2:] - box[:, :2]).clip(0).prod(1) + (bounds[:, 2:] - bounds[:, :2]).prod(1) - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def _by_masks(rows: Array) -> str | None:
    n, bounds = len(rows), rows[:, 4:8]
    images = np.concatenate([np.zeros((n, 2)), rows[:, 8:10]], axis=1)
    # Boxes that are the whole image are loose, not of another size: any mask of theirs is a scaled form of them.
    given = int(((_overlap(rows[:, :4], bounds) >= _FITS) | (_overlap(rows[:, :4], images) >= _WHOLE)).sum())
    if given > _FEW * n:
        return None
    fits = [int((_overlap(convert(rows), bounds) >= _FITS).sum()) for _, convert, _ in _CONVENTIONS]
    if max(fits) >= _MOST * n:
        what, _, remedy = _CONVENTIONS[fits.index(max(fits))]
        return f"{max(fits)} of {n} boxes fit their masks as {what}, {given} as {_CORNERS}: {remedy}"
    scale = (rows[:, :4] * bounds).reshape(-1, 2, 2).sum(1) / (rows[:, :4] ** 2).reshape(-1, 2, 2).sum(1).clip(1e-9)
    fitting = _overlap(rows[:, :4] * np.tile(scale, 2), bounds) >= _FITS
    resized = rows[fitting, 8:10] / scale[fitting]
    if fitting.sum() >= _MOST * n and (size := _common_size(resized)):
        return (
            f"{int(fitting.sum())} of {n} boxes fit their masks if they belong to images resized to {size}, {given} as "
            "they are: scale them to the size of the images, which pack does not resize"
        )
    return None


def _common_size(size: Array) -> str | None:  # [n, 2] width and height
    """The size, or the length of a side, that most of the sizes have."""
    width, height = np.median(size, axis=0)
    longer, shorter = np.median(size.max(1)), np.median(size.min(1))
    if _agrees(size[:, 0], width) and _agrees(size[:, 1], height):
        return f"about {width:.0f} x {height:.0f} pixels"
    if _agrees(size.max(1), longer):
        return f"a longer side of about {longer:.0f} pixels"
    return f"a shorter side of about {shorter:.0f} pixels" if _agrees(size.min(1), shorter) else None


def _agrees(values: Array, middle: float) -> bool:
    return bool((np.abs(values - middle) <= _SAME_SIZE * middle).mean() >= _MOST)


def _by_size(rows: Array) -> str | None:
    if (np.abs(rows[:, :4]) <= 1).all():
        return f"all {len(rows)} boxes lie between 0 and 1: for fractions of the image's size, pass --boxes normalised"
    given, sized = _valid(rows[:, :4], rows), _valid(_sized(rows[:, :4]), rows)
    if given < _MOST * len(rows) and sized >= _VALID * len(rows):
        return (
            f"{sized} of {len(rows)} boxes are valid as x, y, width, height, {given} as {_CORNERS}: pass --boxes xywh"
        )
    return None


def _valid(box: Array, rows: Array) -> int:
    inside = (box[:, :2] >= -1).all(1) & (box[:, 2:] <= rows[:, 8:10] + 1).all(1)
    return int((inside & (box[:, 2:] > box[:, :2]).all(1)).sum())
