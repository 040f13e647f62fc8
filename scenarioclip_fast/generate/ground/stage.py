"""The stage `ground`: a detector finds boxes for the names of each image.

Result: {"objects": [{"name", "box": [x1, y1, x2, y2] in pixels, "score"}]}, best first; and "rejected" for
boxes that the detector gave no name, if there are any.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.generate.config import GenerateConfig, GroundConfig
from scenarioclip_fast.generate.ground.boxes import Box, clip, suppress
from scenarioclip_fast.generate.ground.transformers_detector import KINDS, TransformersDetector
from scenarioclip_fast.generate.models import VisionStage, check_model, decode_ahead
from scenarioclip_fast.generate.stages import Outcome, Work
from scenarioclip_fast.terminal import short

_WINDOW = 4  # batches among which images of one size are looked for
_WINDOW_PIXELS = 1 << 26


class Detector(Protocol):
    """Finds boxes for names. A class of your own is constructed as `Class(config, device)`.

    Args:
        config: the section `ground`.
        device: to run on.
    """

    def __init__(self, config: GroundConfig, device: torch.device) -> None: ...

    def detect(
        self,
        images: Sequence[Tensor],  # uint8 [H, W, 3], of several sizes, on the CPU
        names: Sequence[Sequence[str]],
    ) -> list[list[Box]]:
        """Find boxes; the result of an image should not depend on the others.

        Args:
            names: asked for in each image, at least one; distinct.

        Returns:
            The boxes of each image, in any order, each with one of the image's names and a score from 0 to 1. Boxes
            with another name are listed in rejected.jsonl.

        Raises:
            torch.OutOfMemoryError: is called again with fewer images.
        """
        ...


class _Loaded(NamedTuple):
    work: Work
    image: Tensor  # uint8 [H, W, 3]
    names: list[str]


class GroundStage(VisionStage):
    """Finds the boxes.

    Args:
        device: auto, cpu, cuda or cuda:N.
    """

    name: ClassVar[str] = "ground"

    def __init__(self, config: GroundConfig, device: str) -> None:
        super().__init__(config, device)
        self.counts: dict[str, float] = {"boxes": 0}

    def run(self, works: Iterator[Work]) -> Iterator[Outcome]:
        """Yield the boxes of each image."""
        self._load("detect", TransformersDetector)
        waiting: list[_Loaded] = []
        for work, image in decode_ahead(works, _early, self._config.batch_size):
            if isinstance(image, Outcome):
                yield image
            else:
                waiting.append(_Loaded(work, 255 - image if self._config.invert else image, _names(work)))
                while self._is_full(waiting):
                    yield from self._detect(_take(waiting, self._config.batch_size))
        while waiting:
            yield from self._detect(_take(waiting, self._config.batch_size))

    def _is_full(self, waiting: Sequence[_Loaded]) -> bool:
        pixels = sum(one.image.shape[0] * one.image.shape[1] for one in waiting)
        return len(waiting) >= _WINDOW * self._config.batch_size or pixels >= _WINDOW_PIXELS

    def _detect(self, batch: Sequence[_Loaded]) -> list[Outcome]:
        found = self._run_batch(self._call, batch, batch[0].image)
        outcomes = [self._outcome(one, boxes) for one, boxes in zip(batch, found, strict=True)]
        self.counts["boxes"] += sum(len(outcome.result.get("objects", ())) for outcome in outcomes)
        return outcomes

    def _call(self, batch: Sequence[_Loaded]) -> list[list[Box]]:
        with self._calling("detect"):
            found: list[list[Box]] = self._model.detect([one.image for one in batch], [one.names for one in batch])
        where = f"ground.model: {self._config.model}: detect returned"
        if not isinstance(found, list) or len(found) != len(batch):
            count = f"{len(found)} lists" if isinstance(found, list) else short(found)
            raise UserError(f"{where} {count} for {len(batch)} images, expected one list of boxes per image")
        try:
            return [[self._checked(*box) for box in boxes] for boxes in found]
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{where} {short(found)} ({error}), expected Box(name, (x1, y1, x2, y2), score), scores from 0 to 1"
            ) from None

    def _checked(self, name: Any, box: Any, score: Any) -> Box:
        if not isinstance(name, str):
            raise TypeError(f"the name is {short(name)}")
        x1, y1, x2, y2 = map(float, box)
        if self._is_custom and not all(map(math.isfinite, (x1, y1, x2, y2))):
            raise ValueError(f"the corners of {short(name)} are {short([x1, y1, x2, y2])}, expected finite numbers")
        return Box(name, (x1, y1, x2, y2), self._score(score))

    def _outcome(self, one: _Loaded, found: Sequence[Box]) -> Outcome:
        config, height, width = self._config, *one.image.shape[:2]
        boxes = [box for box in clip(found, (height, width)) if box.score >= config.box_threshold]
        unnamed = Counter(box.name for box in boxes if box.name not in one.names)
        kept = suppress([box for box in boxes if box.name in one.names], config.nms)
        if not kept:
            others = f"; without a name: {_count(unnamed.total())}" if unnamed else ""
            detail = f"asked for {short(', '.join(one.names))}, threshold {config.box_threshold:g}{others}"
            return Outcome(one.work.key, reason="no_boxes", detail=detail)
        result: dict[str, Any] = {"objects": [{"name": n, "box": list(box), "score": s} for n, box, s in kept]}
        if unnamed:
            detail = "the detector's phrase is none of the names that were asked for"
            result["rejected"] = [
                {"part": f"{_count(n)} ({name})", "reason": "unnamed", "detail": detail}
                for name, n in sorted(unnamed.items())
            ]
        return Outcome(one.work.key, result)


def _names(work: Work) -> list[str]:
    return [name for name in dict.fromkeys(work.records["caption"]["objects"]) if name.strip()]


def _early(work: Work) -> Outcome | None:
    """As published, images without objects or relations are dropped before detection."""
    if not _names(work):
        return Outcome(work.key, reason="no_objects")
    return None if work.records["caption"]["relations"] else Outcome(work.key, reason="no_relations")


def _count(boxes: int) -> str:
    return f"{boxes} {'box' if boxes == 1 else 'boxes'}"


def _take(waiting: list[_Loaded], size: int) -> list[_Loaded]:
    """Remove a batch: the first image, others of its size, which detectors process together, then the next ones."""
    shape = waiting[0].image.shape
    batch = sorted(waiting, key=lambda one: one.image.shape != shape)[:size]
    waiting[:] = [one for one in waiting if not any(one is taken for taken in batch)]
    return batch


def check(config: GenerateConfig) -> None:
    """Check that the model exists; see `factory`."""
    check_model(config.ground.model, "ground.model", "detect", KINDS)


def make(config: GenerateConfig, device: str, context: Any = None) -> GroundStage:
    """Create the stage; see `factory`."""
    return GroundStage(config.ground, device)
