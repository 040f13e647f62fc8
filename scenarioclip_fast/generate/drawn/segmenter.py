"""A segmenter for drawn scenes: the part of the picture that fits a box best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scenarioclip_fast.data import rle
from scenarioclip_fast.data.boxes import box_overlap
from scenarioclip_fast.generate.config import SegmentConfig
from scenarioclip_fast.generate.drawn.parts import candidates, find_parts


class DrawnSegmenter:
    """Finds the part whose bounding box has the largest IoU with a box; see `segment.stage.Segmenter`.

    The mask is that of the part, up to the border of the box, and the score is the IoU. Of equal parts, the larger one
    is taken. A box that no part touches has no mask.

    Args:
        config, device: not used.
    """

    def __init__(self, config: SegmentConfig, device: torch.device) -> None:
        del config, device

    def segment(
        self, images: Sequence[Tensor], boxes: Sequence[list[list[float]]]
    ) -> list[list[tuple[dict[str, Any] | None, float]]]:
        """Find the mask of each box.

        Args:
            images: uint8 [H, W, 3].
            boxes: x1, y1, x2, y2 in pixels.
        """
        return [_segment(image, wanted) for image, wanted in zip(images, boxes, strict=True)]


def _segment(image: Tensor, boxes: list[list[float]]) -> list[tuple[dict[str, Any] | None, float]]:
    parts = candidates(find_parts(image))
    masks: list[tuple[dict[str, Any] | None, float]] = []
    for box in boxes:
        best = max(parts, key=lambda part: (box_overlap(part.box, box), part.area), default=None)
        score = box_overlap(best.box, box) if best else 0.0
        if best is None or score == 0:
            masks.append((None, 0.0))
            continue
        mask = best.in_image(*image.shape[:2])
        x1, y1, x2, y2 = round(box[0]), round(box[1]), round(box[2]), round(box[3])
        inside = np.zeros_like(mask)
        inside[y1:y2, x1:x2] = mask[y1:y2, x1:x2]
        masks.append((rle.encode(inside), score))
    return masks
