"""A batch of views to render, as a struct of arrays; `scenarioclip_fast.data.Views` builds one from scenes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from scenarioclip_fast.kernels.views.reference import KIND_NAMES

# A crop of a box as long as the image resizes a square of 1.2 times that length, with tables and rows in proportion: 86
# MiB for one view at size 512 if the image has this side, 2.7 GB for one of a million pixels.
MAX_SIDE = 1 << 15
# Long side over short side. A view shows the central square of an image, here less than a thousandth of it.
MAX_ASPECT = 1 << 10


def check_renderable(height: int, width: int) -> None:
    """Raise ValueError for an image too long or too narrow for `render_views` to make every kind of view of it."""
    if max(height, width) > MAX_SIDE:
        raise ValueError(f"got an image of {width} x {height}, expected sides of at most {MAX_SIDE} pixels")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"got an image of {width} x {height}, expected a ratio of the sides of at most {MAX_ASPECT}")


@dataclass(slots=True, eq=False)
class ViewBatch:
    """V views of a batch of images, as a struct of CPU arrays.

    Attributes:
        kind: int32 [V]; 0 the unchanged window, 1 black outside the box, 2 a crop, 3 a focused region.
        image: int64 [V], the image of each view.
        source: int32 [V, 4], x1, y1, x2, y2 of the source window in pixels; black beyond the edges of the image.
        stretch: bool [V]; True: the window is resized to the whole view. False: its short side is resized to the
            view's side, and the centre is cropped.
        box: float64 [V, 4], the object's box in pixels; a masked view is black outside it, its edges truncated to
            integers. Zeros without an object.
        mask: int64 [V, 2], the two masks of a relation, -1 for none.
        augment: float32 [V, 5]; factors of brightness, contrast and saturation, hue shift in turns, blur sigma in
            pixels of the view (0: none).
        mask_runs, mask_start, mask_size: int32 [R], int64 [M + 1], int32 [M, 2]; mask m has size (H, W) and the
            column-order run lengths mask_runs[mask_start[m] : mask_start[m + 1]], the first of them zeros.
    """

    kind: Tensor
    image: Tensor
    source: Tensor
    stretch: Tensor
    box: Tensor
    mask: Tensor
    augment: Tensor
    mask_runs: Tensor
    mask_start: Tensor
    mask_size: Tensor

    def __len__(self) -> int:
        return self.kind.shape[0]

    @property
    def tensors(self) -> list[Tensor]:
        """The arrays, in the order of the attributes."""
        return [getattr(self, field.name) for field in fields(self)]

    def select(self, index: Tensor) -> Self:
        """Return the views at `index` (int64 or bool [V]), with all masks."""
        return type(self)(*[t[index] for t in self.tensors[:7]], *self.tensors[7:])

    def describe(self, v: int) -> str:
        """Return a view's name for error messages: "view 7 (relation, image 2)"."""
        kind = int(self.kind[v])
        name = KIND_NAMES[kind] if 0 <= kind < len(KIND_NAMES) else f"kind {kind}"
        return f"view {v} ({name}, image {int(self.image[v])})"


def pixel_box(
    box: NDArray[np.float64],  # [n, 4] x1, y1, x2, y2
    height: NDArray[np.int64],  # [n]
    width: NDArray[np.int64],  # [n]
) -> NDArray[np.int64]:  # [n, 4]
    """Return the pixels that a box touches, at least one, clipped to the image; empty for a box outside it."""
    if not np.isfinite(box).all():
        box = np.where(np.isfinite(box).all(1, keepdims=True), box, -2.0)
    limit = float(1 << 30)
    low = np.floor(box[:, :2].clip(-limit, limit)).astype(np.int64)
    high = np.maximum(np.ceil(box[:, 2:].clip(-limit, limit)).astype(np.int64), low + 1)
    edge = np.stack([width, height], axis=1)
    return np.concatenate([low.clip(0, edge), high.clip(0, edge)], axis=1)


def masked_box(
    box: NDArray[np.float64],  # [n, 4] x1, y1, x2, y2
    height: NDArray[np.int64],  # [n]
    width: NDArray[np.int64],  # [n]
) -> NDArray[np.int64]:  # [n, 4]
    """Return the pixels that a masked view shows: edges truncated to integers, as published, but at least one pixel.

    Clipped to the image; empty for a box outside it.
    """
    pixels = pixel_box(box, height, width)
    high = np.fmin(box[:, 2:], pixels[:, 2:]).clip(0).astype(np.int64)  # fmin: not NaN, which has no pixels
    pixels[:, 2:] = np.minimum(np.maximum(high, pixels[:, :2] + 1), pixels[:, 2:])
    return pixels


def is_empty(box: NDArray[np.int64]) -> NDArray[np.bool_]:  # [n, 4] -> [n]
    """Return which boxes contain no pixels."""
    return np.any(box[:, 2:] <= box[:, :2], axis=1)
