"""Divides a drawn scene into the visible parts of its objects, by colour.

Every object has one colour, also in its dark outlines and its dark and light areas, in front of a nearly grey
background; its details are black, white, grey, skin, wood or glass. So the pixels are classified by hue, details belong
to the nearest colour, and connected pixels of one colour are a part. Two objects of one colour that touch become one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from scenarioclip_fast.data.synthetic.drawings import COLOURS
from scenarioclip_fast.requirements import require

BACKGROUND, DETAIL = 0, len(COLOURS) + 1  # classes of pixels; 1 to len(COLOURS) are the colours
_BITS = 6  # per channel of the table of classes
_HUES = {"blue": (195, 255), "green": (90, 170), "pink": (285, 342), "red": (342, 374), "yellow": (39, 75)}  # degrees
# A pixel has a hue if the difference between its channels is more than this, absolutely and relative to the brightest
# one. The nearly grey background is above _DARK, where limits are higher; below, they admit outlines.
_DARK, _LIMITS_DARK, _LIMITS = 95, (16, 0.30), (46, 0.24)
# Duller pixels that are not bright are mixtures of wood or skin with an outline. Pink is duller than the other colours.
_VIVID, _PALE, _BRIGHT = 0.6, {"pink": 0.35}, 185
_BLACK, _WHITE, _WHITER = 70, 228, 30  # the brightest channel is below; the darkest is above, also above the background
_LEAST = 12  # pixels of a part; less is noise
_SQUARE = np.ones((3, 3), bool)  # neighbours, diagonals included
_FRAGMENT = 0.15  # of the area of the largest part of its colour: what is smaller may belong to it


@dataclass(frozen=True)
class Part:
    """A part of a picture.

    Attributes:
        colour: a key of COLOURS.
        box: x1, y1, x2, y2 around its pixels, the last two exclusive.
        mask: its pixels in the box, bool.
        own: those that have the colour itself; the others are details.
        group: number of the connected foreground that it is in, with gaps of up to two pixels.
    """

    colour: str
    box: tuple[int, int, int, int]
    mask: NDArray[np.bool_]
    own: NDArray[np.bool_]
    group: int

    @property
    def area(self) -> int:
        return int(np.count_nonzero(self.mask))

    def in_image(self, height: int, width: int) -> NDArray[np.bool_]:  # [H, W]
        """The mask in the picture."""
        x1, y1, x2, y2 = self.box
        whole = np.zeros((height, width), bool)
        whole[y1:y2, x1:x2] = self.mask
        return whole


@cache
def _classes() -> NDArray[np.uint8]:  # [64, 64, 64]
    """The class of each colour, quantised."""
    values = (np.arange(1 << _BITS, dtype=np.float32) + 0.5) * (1 << (8 - _BITS))
    r, g, b = np.meshgrid(values, values, values, indexing="ij")
    high, low = np.maximum(np.maximum(r, g), b), np.minimum(np.minimum(r, g), b)
    chroma = high - low
    hue = np.degrees(np.arctan2(np.sqrt(3) / 2 * (g - b), r - (g + b) / 2))
    ratio = chroma / high
    dark = high < _DARK
    strong = chroma > np.where(dark, _LIMITS_DARK[0], _LIMITS[0])
    strong &= ratio > np.where(dark, _LIMITS_DARK[1], _LIMITS[1])
    classes = np.where(strong | (high < _BLACK), DETAIL, BACKGROUND).astype(np.uint8)
    for number, colour in enumerate(COLOURS, start=1):
        first, last = _HUES[colour]
        vivid = (ratio > _PALE.get(colour, _VIVID)) | (high > _BRIGHT)
        classes[strong & vivid & ((hue - first) % 360 < last - first)] = number
    return classes


def find_parts(image: Tensor) -> list[Part]:
    """Find the parts of a picture, from large to small.

    Args:
        image: uint8 [H, W, 3].
    """
    ndimage = require("scipy.ndimage")
    pixels = image.cpu().numpy()
    quantised = pixels >> (8 - _BITS)
    classes = _classes()[quantised[..., 0], quantised[..., 1], quantised[..., 2]]
    grey = pixels[..., 1]  # of the background and of white
    plain = classes == BACKGROUND
    if plain.any():
        classes[plain & (grey > max(_WHITE, float(np.median(grey[plain])) + _WHITER))] = DETAIL
    owners = _thick(classes)
    if not owners.any():
        return []
    foreground = _fill_holes(ndimage, classes != BACKGROUND)
    nearest = ndimage.distance_transform_edt(owners == 0, return_distances=False, return_indices=True)
    groups, _ = ndimage.label(ndimage.binary_dilation(foreground, _SQUARE), _SQUARE)  # over gaps of two pixels
    regions = np.where(foreground, owners[nearest[0], nearest[1]], 0)
    found = [part for number in range(1, DETAIL) for part in _divide(ndimage, number, regions, classes, groups)]
    return sorted(found, key=lambda part: (-part.area, part.colour, part.box))


def candidates(parts: Sequence[Part]) -> list[Part]:
    """The parts, and what may be one object in several parts: of one colour, in one group, two of them or all."""
    found = list(parts)
    groups: dict[tuple[str, int], list[Part]] = {}
    for part in parts:
        groups.setdefault((part.colour, part.group), []).append(part)
    for members in groups.values():
        found += [_union(pair) for pair in itertools.combinations(members, 2)]
        found += [_union(members)] if len(members) > 2 else []
    return found


def _union(parts: Sequence[Part]) -> Part:
    corners = np.array([part.box for part in parts])
    (x1, y1), (x2, y2) = corners[:, :2].min(0).tolist(), corners[:, 2:].max(0).tolist()
    mask, own = np.zeros((2, y2 - y1, x2 - x1), bool)
    for part in parts:
        left, top, right, bottom = part.box
        here = slice(top - y1, bottom - y1), slice(left - x1, right - x1)
        mask[here] |= part.mask
        own[here] |= part.own
    return Part(parts[0].colour, (x1, y1, x2, y2), mask, own, parts[0].group)


def _thick(classes: NDArray[np.uint8]) -> NDArray[np.uint8]:  # [H, W]
    """The pixels whose colour covers a square of 2 x 2; thinner lines are mixtures of the colours beside them."""
    corner = classes[:-1, :-1]
    same = (corner == classes[1:, :-1]) & (corner == classes[:-1, 1:]) & (corner == classes[1:, 1:])
    same &= (corner != BACKGROUND) & (corner != DETAIL)
    thick = np.zeros(classes.shape, bool)
    for rows in (slice(None, -1), slice(1, None)):
        for columns in (slice(None, -1), slice(1, None)):
            thick[rows, columns] |= same
    return np.where(thick, classes, 0)


def _fill_holes(ndimage: Any, foreground: NDArray[np.bool_]) -> NDArray[np.bool_]:
    labels, count = ndimage.label(~foreground)
    outside = np.zeros(count + 1, bool)
    for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        outside[edge] = True
    outside[0] = False  # the foreground
    return ~outside[labels]


def _divide(
    ndimage: Any,
    number: int,  # of the colour
    regions: NDArray[np.uint8],
    classes: NDArray[np.uint8],
    groups: NDArray[np.int32],
) -> Iterator[Part]:
    """Divide the pixels of one colour; small fragments that an object in front cut off join the largest part."""
    mask = regions == number
    if not mask.any():
        return
    labels, count = ndimage.label(mask, _SQUARE)
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    group = np.zeros(count + 1, np.int32)
    group[labels] = groups
    places = ndimage.find_objects(labels)
    kept: list[int] = []
    for label in np.argsort(-areas[1:], kind="stable") + 1:
        larger = [k for k in kept if group[k] == group[label] and areas[label] < _FRAGMENT * areas[k]]
        if larger:
            whole = min(larger, key=lambda k: _gap(places[k - 1], places[label - 1]))
            labels[labels == label] = whole
        elif areas[label] >= _LEAST:
            kept.append(int(label))
    boxes = ndimage.find_objects(labels)
    colour = list(COLOURS)[number - 1]
    for label in kept:
        rows, columns = boxes[label - 1]
        pixels = labels[rows, columns] == label
        own = pixels & (classes[rows, columns] == number)
        yield Part(colour, (columns.start, rows.start, columns.stop, rows.stop), pixels, own, int(group[label]))


def _gap(a: tuple[slice, slice], b: tuple[slice, slice]) -> int:
    """The distance of two boxes along the axis where it is greater; negative if they overlap."""
    return max(max(one.start - other.stop, other.start - one.stop) for one, other in zip(a, b, strict=True))
