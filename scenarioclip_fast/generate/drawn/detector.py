"""A detector for drawn scenes: by colour, and by comparing shapes. It knows the drawings, but not the scenes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from scenarioclip_fast.data.synthetic.drawings import COLOURS, KINDS
from scenarioclip_fast.generate.config import GroundConfig
from scenarioclip_fast.generate.drawn.parts import Part, candidates, find_parts
from scenarioclip_fast.generate.drawn.shapes import similarities
from scenarioclip_fast.generate.ground.boxes import Box

_SHARPNESS = 25.0  # of the choice between kinds; a similarity of .1 less is 12 times less probable
_LEAST_SIMILAR = 0.35  # a part that is less similar to any kind is none of them
_LEAST_SCORE = 0.05


class DrawnDetector:
    """Finds "red ball" among the red parts of a picture; see `ground.stage.Detector`.

    The score is the probability of the kind among all kinds, given the similarities of the shapes. A name needs one
    colour and one kind of `data.synthetic.drawings`, in the singular or plural, among other words; others have no box.

    Args:
        config, device: not used.
    """

    def __init__(self, config: GroundConfig, device: torch.device) -> None:
        del config, device

    def detect(self, images: Sequence[Tensor], names: Sequence[Sequence[str]]) -> list[list[Box]]:
        """Find at most one box per name.

        Args:
            images: uint8 [H, W, 3].
        """
        return [_detect(image, wanted) for image, wanted in zip(images, names, strict=True)]


def _detect(image: Tensor, names: Sequence[str]) -> list[Box]:
    wanted = {name: parsed for name in names if (parsed := parse_name(name)) is not None}
    if not wanted:
        return []
    colours = {colour for colour, _ in wanted.values()}
    parts = find_parts(image)
    foreground = np.zeros(image.shape[:2], bool)
    for part in parts:
        foreground |= part.in_image(*foreground.shape)
    scored: list[tuple[Part, dict[str, float]]] = []
    for part in candidates(parts):
        if part.colour in colours:
            similar = similarities(part, foreground & ~part.in_image(*foreground.shape))
            scored.append((part, _probabilities(similar)))
    boxes = []
    for name, (colour, kind) in wanted.items():
        found = ((scores[kind], part.box) for part, scores in scored if part.colour == colour)
        score, box = max(found, default=(0.0, (0, 0, 0, 0)))
        if score >= _LEAST_SCORE:
            boxes.append(Box(name, (float(box[0]), float(box[1]), float(box[2]), float(box[3])), score))
    return boxes


def parse_name(name: str) -> tuple[str, str] | None:
    """The colour and the kind of a name; None unless it has one of each."""
    words = re.findall(r"[a-z]+", name.lower())
    colours = [word for word in words if word in COLOURS]
    kinds = [kind for word in words if (kind := _kind(word)) is not None]
    return (colours[0], kinds[0]) if len(colours) == len(kinds) == 1 else None


def _kind(word: str) -> str | None:
    forms = (word, word.removesuffix("s"), word.removesuffix("es"), {"people": "person", "cacti": "cactus"}.get(word))
    return next((form for form in forms if form in KINDS), None)


def _probabilities(similar: dict[str, float]) -> dict[str, float]:
    best = max(similar.values())
    weights = {kind: math.exp(_SHARPNESS * (value - best)) for kind, value in similar.items()}
    total = sum(weights.values())
    certain = min(1.0, best / _LEAST_SIMILAR)
    return {kind: certain * weight / total for kind, weight in weights.items()}
