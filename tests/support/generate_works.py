"""Images and the works that lead to them, for tests of the stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from scenarioclip_fast.generate.images import Item
from scenarioclip_fast.generate.stages import Outcome, Stage, Work

SIZES = [(96, 128), (64, 64), (96, 128), (120, 90), (64, 64), (96, 128), (200, 4), (70, 128)]  # H, W


def make_images() -> list[torch.Tensor]:
    """Images of SIZES, uint8 [H, W, 3]: smooth noise, which differs from image to image on the scale of a patch."""
    generator = torch.Generator().manual_seed(0)
    noise = [torch.rand(1, 3, 4, 4, generator=generator) for _ in SIZES]
    smooth = [F.interpolate(n, size, mode="bicubic")[0] for n, size in zip(noise, SIZES, strict=True)]
    return [(image.clamp(0, 1) * 255).to(torch.uint8).permute(1, 2, 0).contiguous() for image in smooth]


def make_works(folder: Path, records: Sequence[dict[str, Any]], sizes: Sequence[tuple[int, int]] = SIZES) -> list[Work]:
    """Write an image of noise per record, and return the works."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    works = []
    for i, (record, (height, width)) in enumerate(zip(records, sizes, strict=False)):
        path = folder / f"{i}.png"
        Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)).save(path)
        works.append(Work(Item(f"image{i}", path.name, str(path), -1, path.stat().st_size), record))
    return works


def caption(*objects: str, relations: bool = True) -> dict[str, Any]:
    """The record of a caption."""
    return {"caption": {"objects": list(objects), "relations": [["dog", "on", "mat"]] if relations else []}}


def grounded(*boxes: Sequence[float]) -> dict[str, Any]:
    """The record of boxes."""
    return {"ground": {"objects": [{"name": "dog", "box": list(box), "score": 0.5} for box in boxes]}}


def run(stage: Stage, works: Sequence[Work]) -> dict[str, Outcome]:
    """The outcomes of a stage by key; it must give one per image."""

    def each() -> Iterator[Work]:
        yield from works

    outcomes = list(stage.run(each()))
    stage.close()
    assert sorted(outcome.key for outcome in outcomes) == sorted(work.key for work in works)
    return {outcome.key: outcome for outcome in outcomes}
