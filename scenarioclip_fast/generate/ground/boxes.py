"""Boxes of a detector: clipping and non-maximum suppression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Corners = tuple[float, float, float, float]
Array = NDArray[np.float64]


class Box(NamedTuple):
    """A box of a detector: x1, y1, x2, y2 in pixels, and its score from 0 to 1."""

    name: str
    box: Corners
    score: float


def clip(boxes: Sequence[Box], size: tuple[int, int]) -> list[Box]:
    """Clip boxes to an image of `size` = (H, W), and drop those that are empty then, or not finite.

    Coordinates are rounded to 0.01 pixels, scores to 4 digits.
    """
    height, width = size
    low, high = np.zeros(4), np.array([width, height, width, height], np.float64)
    clipped = []
    for box in boxes:
        if not np.isfinite([*box.box, box.score]).all():
            continue
        x1, y1, x2, y2 = np.clip(np.array(box.box, np.float64), low, high).round(2).tolist()
        if x1 < x2 and y1 < y2:
            clipped.append(Box(box.name, (x1, y1, x2, y2), round(float(box.score), 4)))
    return clipped


def suppress(boxes: Sequence[Box], iou: float) -> list[Box]:
    """Non-maximum suppression whatever the names: drop boxes with at least this IoU with a better one that is kept.

    As in the published pipeline, a box covers the pixels from its first to its last corner, both included: its sides
    are 1 pixel longer.

    Returns:
        The other boxes, best first. Of equal scores, the box whose corners are lexicographically less is the better
        one, then that with the lesser name: the order of `boxes` does not matter.
    """
    ordered = sorted(boxes, key=lambda one: (-one.score, one.box, one.name))
    corners = np.array([one.box for one in ordered], np.float64).reshape(-1, 4)
    area = (corners[:, 2:] - corners[:, :2] + 1).prod(1)
    left, kept = np.arange(len(ordered)), []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(ordered[best])
        low = np.maximum(corners[best, :2], corners[left, :2])
        shared = (np.minimum(corners[best, 2:], corners[left, 2:]) - low + 1).clip(0).prod(1)
        left = left[shared < iou * (area[best] + area[left] - shared)]
    return kept
