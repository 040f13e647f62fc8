"""Recognises the kind of a part of a drawn scene by comparing it to a drawing of each kind."""

from __future__ import annotations

import itertools
import math
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from scenarioclip_fast.data.synthetic.drawings import COLOURS, KINDS, SUPERSAMPLING, Pen
from scenarioclip_fast.generate.drawn.parts import Part, candidates, find_parts
from scenarioclip_fast.requirements import require

Box = tuple[int, int, int, int]

_GRID = 24  # cells per side
_SIDES, _MARGIN = (96, 36), 8  # of drawings to compare with, pixels; outlines are thicker in small ones
_POSES = {"person": ("whole", "ride", "reach")}
_HIDDEN = ("bottom", "left", "right")  # sides where another object may cover it
_VISIBLE = (0.85, 0.7, 0.55, 0.4)  # fractions that are left
_BESIDE, _COVERS = 2, 0.2  # width of the strip at a side, pixels, and the fraction of it that others cover
_THIN = 0.04  # width of a thin line, as a fraction of the longer side
# The weight of cells of other objects, where the drawing may be covered; a multiple of 1/8, so that sums are exact in
# float32 and do not depend on the number of threads.
_COVERED = 0.625
_STRETCH = 2.0  # similarity halves when the aspect ratio is off by this factor


class _Shapes(NamedTuple):
    """Drawings to compare with.

    Attributes:
        kinds: of each, its position in KINDS.
        log_aspect: of each, the logarithm of width / height.
        own, mask: [shapes, cells], 1 where a cell has the object's colour, and where it belongs to the object.
    """

    kinds: NDArray[np.int64]
    log_aspect: NDArray[np.float64]
    own: NDArray[np.float32]
    mask: NDArray[np.float32]


def similarities(part: Part, others: NDArray[np.bool_]) -> dict[str, float]:
    """How similar a part is to each kind, from 0 to 1.

    The similarity to a drawing is the IoU of the two in the part's box, in which a cell counts as shared if it has the
    object's colour in both, or is a detail in both; cells of other objects count less. Different aspect ratios reduce
    it. If another object is beside the part, drawings without what may be covered there are compared as well. The
    result is the mean of this and the same without thin lines such as strings, which may be another object's.

    Args:
        others: bool [H, W], the pixels of the other objects.
    """
    found = (_compare(part, others, core=False) + _compare(_core(part), others, core=True)) / 2
    return dict(zip(KINDS, found.tolist(), strict=True))


def _compare(part: Part, others: NDArray[np.bool_], *, core: bool) -> NDArray[np.float64]:  # [kinds]
    x1, y1, x2, y2 = part.box
    own, mask = _sample(part.own), _sample(part.mask)
    weights = np.where(mask | ~_sample(others[y1:y2, x1:x2]), 1, _COVERED)
    vectors = np.stack([weights, mask, mask & ~own, own], 1).astype(np.float32)
    log_aspect = np.log((x2 - x1) / (y2 - y1))
    best = np.zeros(len(KINDS))
    for hidden in ("", *_covered(part.box, others)):
        shapes = _shapes(core)[hidden]
        drawn, both, details, _ = (shapes.mask @ vectors).T
        _, _, own_details, shared = (shapes.own @ vectors).T
        found = (shared + details - own_details) / np.maximum(drawn + mask.sum() - both, 1)
        found *= 0.5 ** (np.abs(shapes.log_aspect - log_aspect) / np.log(_STRETCH))
        np.maximum.at(best, shapes.kinds, found)
    return best


def _core(part: Part) -> Part:
    """The part without thin lines; the part itself if it has nothing else."""
    ndimage = require("scipy.ndimage")
    width = 2 * round(max(part.mask.shape) * _THIN / 2) + 1
    padded = np.pad(part.mask, width)  # also opens at the border
    mask = ndimage.minimum_filter(padded, width)
    mask = ndimage.maximum_filter(mask, width)[width:-width, width:-width]
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return part
    top, bottom, left, right = (int(v) for v in (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1))
    x1, y1 = part.box[:2]
    own = (part.own & mask)[top:bottom, left:right]
    return Part(
        part.colour, (x1 + left, y1 + top, x1 + right, y1 + bottom), mask[top:bottom, left:right], own, part.group
    )


def _covered(box: Box, others: NDArray[np.bool_]) -> list[str]:
    """The sides of a box, of _HIDDEN, where other objects are."""
    x1, y1, x2, y2 = box
    before, after = max(x1 - _BESIDE, 0), max(x2 - _BESIDE, 0)
    strips = {
        "bottom": others[max(y2 - _BESIDE, 0) : y2 + _BESIDE, x1:x2],
        "left": others[y1:y2, before : x1 + _BESIDE],
        "right": others[y1:y2, after : x2 + _BESIDE],
    }
    return [side for side in _HIDDEN if strips[side].mean() > _COVERS]


@cache
def _shapes(core: bool) -> dict[str, _Shapes]:
    """The drawings by the side that is hidden, "" for none."""
    rows: dict[str, list[tuple[int, float, NDArray[np.bool_], NDArray[np.bool_]]]] = {}
    for k, kind in enumerate(KINDS):
        for pose, side in itertools.product(_POSES.get(kind, ("whole",)), _SIDES):
            part = _draw(kind, pose, side)
            part = _core(part) if core else part
            height, width = part.mask.shape
            crops = [("", 0, 0, width, height)]
            for visible in _VISIBLE:
                w, h = round(visible * width), round(visible * height)
                crops += [("bottom", 0, 0, width, h), ("left", width - w, 0, width, height), ("right", 0, 0, w, height)]
            for hidden, x1, y1, x2, y2 in crops:
                mask, own = part.mask[y1:y2, x1:x2], part.own[y1:y2, x1:x2]
                ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                inner = slice(ys[0], ys[-1] + 1), slice(xs[0], xs[-1] + 1)
                mask, own = mask[inner], own[inner]
                row = k, math.log(mask.shape[1] / mask.shape[0]), _sample(own), _sample(mask)
                rows.setdefault(hidden, []).append(row)
    found = {}
    for hidden, members in rows.items():
        kinds, aspects, own_, mask_ = (np.array(column) for column in zip(*members, strict=True))
        found[hidden] = _Shapes(kinds, aspects, own_.astype(np.float32), mask_.astype(np.float32))
    return found


def _draw(kind: str, pose: str, side: int) -> Part:
    """A kind in blue before grey."""
    image, image_draw = require("PIL.Image"), require("PIL.ImageDraw")
    draw, aspect = KINDS[kind]
    height, width = round(side / max(aspect, 1)), round(side * min(aspect, 1))
    size = SUPERSAMPLING * (width + 2 * _MARGIN), SUPERSAMPLING * (height + 2 * _MARGIN)
    picture, numbers = image.new("RGB", size, (170, 170, 170)), image.new("L", size)
    corners = tuple(SUPERSAMPLING * v for v in (_MARGIN, _MARGIN, _MARGIN + width, _MARGIN + height))
    draw(Pen(image_draw.Draw(picture), image_draw.Draw(numbers), corners, COLOURS["blue"], 1), pose)  # type: ignore[arg-type]
    found = candidates(find_parts(torch.from_numpy(np.array(picture.reduce(SUPERSAMPLING)))))
    return max(found, key=lambda part: part.area)


def _sample(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:  # [cells]
    """The mask at the centres of a grid of cells."""
    rows, columns = (((np.arange(_GRID) + 0.5) / _GRID * n).astype(np.int64) for n in mask.shape)
    return mask[rows[:, None], columns].ravel()
