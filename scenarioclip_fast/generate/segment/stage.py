"""The stage `segment`: a segmenter finds a mask for each box.

Result: {"objects": [{"mask": COCO RLE or null, "score": predicted IoU}]}, parallel to the objects of `ground`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from scenarioclip_fast.data import rle
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.generate.config import GenerateConfig, SegmentConfig
from scenarioclip_fast.generate.models import VisionStage, check_model, decode_ahead
from scenarioclip_fast.generate.segment.transformers_segmenter import KINDS, TransformersSegmenter
from scenarioclip_fast.generate.stages import Outcome, Work
from scenarioclip_fast.terminal import short

Mask = dict[str, Any] | None
Corners = list[float]


class Segmenter(Protocol):
    """Finds masks for boxes. A class of your own is constructed as `Class(config, device)`.

    Args:
        config: the section `segment`.
        device: to run on.
    """

    def __init__(self, config: SegmentConfig, device: torch.device) -> None: ...

    def segment(
        self,
        images: Sequence[Tensor],  # uint8 [H, W, 3], of several sizes, on the CPU
        boxes: Sequence[list[Corners]],
    ) -> list[list[tuple[Mask, float]]]:
        """Find the mask of each box; the result of an image should not depend on the others.

        Args:
            boxes: x1, y1, x2, y2 in pixels, at least one per image.

        Returns:
            For each box of each image, in order: the mask as COCO RLE (`data.rle.encode`) of the size of the image, or
            None, and its score, the predicted IoU, from 0 to 1.

        Raises:
            torch.OutOfMemoryError: is called again with fewer images.
        """
        ...


class _Loaded(NamedTuple):
    work: Work
    image: Tensor  # uint8 [H, W, 3]
    boxes: list[Corners]


class SegmentStage(VisionStage):
    """Finds the masks.

    Args:
        device: auto, cpu, cuda or cuda:N.
    """

    name: ClassVar[str] = "segment"

    def __init__(self, config: SegmentConfig, device: str) -> None:
        super().__init__(config, device)
        self.counts: dict[str, float] = {"masks": 0}

    def run(self, works: Iterator[Work]) -> Iterator[Outcome]:
        """Yield the masks of each image."""
        self._load("segment", TransformersSegmenter)
        batch: list[_Loaded] = []
        for work, image in decode_ahead(works, _early, self._config.batch_size):
            if isinstance(image, Outcome):
                yield image
                continue
            batch.append(_Loaded(work, 255 - image if self._config.invert else image, _boxes(work)))
            if len(batch) == self._config.batch_size:
                yield from self._segment(batch)
                batch = []
        if batch:
            yield from self._segment(batch)

    def _segment(self, batch: Sequence[_Loaded]) -> list[Outcome]:
        found = self._run_batch(self._call, batch, batch[0].image)
        return [self._outcome(one, masks) for one, masks in zip(batch, found, strict=True)]

    def _call(self, batch: Sequence[_Loaded]) -> list[list[tuple[Mask, float]]]:
        images, boxes = [one.image for one in batch], [one.boxes for one in batch]
        with self._calling("segment"):
            found: list[list[tuple[Mask, float]]] = self._model.segment(images, boxes)
        where = f"segment.model: {self._config.model}: segment returned"
        if not isinstance(found, list) or len(found) != len(batch):
            count = f"{len(found)} lists" if isinstance(found, list) else short(found)
            raise UserError(f"{where} {count} for {len(batch)} images, expected one list of masks per image")
        for one, masks in zip(batch, found, strict=True):
            if not isinstance(masks, list) or len(masks) != len(one.boxes):
                count = f"{len(masks)} masks" if isinstance(masks, list) else short(masks)
                raise UserError(f"{where} {count} for {len(one.boxes)} boxes, expected one (mask, score) per box")
        try:
            return [
                [self._checked(*mask, one.image) for mask in masks] for one, masks in zip(batch, found, strict=True)
            ]
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{where} a malformed mask ({error}), expected (COCO RLE or None, score), scores from 0 to 1"
            ) from None

    def _checked(self, mask: Any, score: Any, image: Tensor) -> tuple[Mask, float]:
        """A mask of the image's size, or None if it has no pixels, and its score; 0 if a checkpoint gave no number."""
        score = self._score(score)
        score = score if math.isfinite(score) else 0.0
        if mask is None:
            return None, score
        height, width, runs = rle.read_runs(mask)
        if (height, width) != tuple(image.shape[:2]):
            raise ValueError(f"a mask of {width} x {height} in an image of {image.shape[1]} x {image.shape[0]}")
        return (mask if runs[1::2].any() else None), score

    def _outcome(self, one: _Loaded, masks: Sequence[tuple[Mask, float]]) -> Outcome:
        count = sum(mask is not None for mask, _ in masks)
        self.counts["masks"] += count
        if not count:
            return Outcome(one.work.key, reason="no_masks", detail=f"{len(masks)} boxes")
        return Outcome(one.work.key, {"objects": [{"mask": mask, "score": score} for mask, score in masks]})


def _boxes(work: Work) -> list[Corners]:
    return [list(one["box"]) for one in work.records["ground"]["objects"]]


def _early(work: Work) -> Outcome | None:
    """Scenes of a packed data set may have no objects."""
    return None if _boxes(work) else Outcome(work.key, reason="no_objects")


def check(config: GenerateConfig) -> None:
    """Check that the model exists; see `factory`."""
    check_model(config.segment.model, "segment.model", "segment", KINDS)


def make(config: GenerateConfig, device: str, context: Any = None) -> SegmentStage:
    """Create the stage; see `factory`."""
    return SegmentStage(config.segment, device)
