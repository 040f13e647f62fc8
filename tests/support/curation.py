"""Records of a generation run, for the tests of curation: rectangles as masks, written as finished units."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scenarioclip_fast.data import rle
from scenarioclip_fast.generate.config import GenerateConfig
from scenarioclip_fast.generate.curate.stage import make
from scenarioclip_fast.generate.images import Item, divide, list_images, write_list
from scenarioclip_fast.generate.pipeline import Job
from scenarioclip_fast.generate.stages import Outcome, Work

SIZE = [60, 80]


def rectangle(box: Sequence[float], size: Sequence[int] = SIZE) -> dict[str, Any]:
    """The RLE of the pixels of a box with integer corners."""
    mask = np.zeros(size, bool)
    x1, y1, x2, y2 = (int(v) for v in box)
    mask[y1:y2, x1:x2] = True
    return rle.encode(mask)


def records(
    objects: Sequence[tuple[str, Sequence[float]]],
    relations: Sequence[Sequence[str]] = (),
    *,
    action: str | None = "playing",
    scores: Sequence[float] = (),
    mask_scores: Sequence[float] = (),
    masks: Mapping[int, Any] | None = None,
    ends: list[list[int]] | None = None,
) -> dict[str, Any]:
    """The records of the stages before curate; masks are the boxes, unless others are given by position."""
    n = len(objects)
    caption = {"size": SIZE, "action": action, "caption": "A scene.", "objects": [name for name, _ in objects]}
    caption |= {"relations": [list(one) for one in relations]} | ({} if ends is None else {"ends": ends})
    found = [
        {"name": name, "box": [float(v) for v in box], "score": score}
        for (name, box), score in zip(objects, scores or [0.9] * n, strict=True)
    ]
    segments = [
        {"mask": (masks or {}).get(i, rectangle(box)), "score": score}
        for i, ((_, box), score) in enumerate(zip(objects, mask_scores or [0.8] * n, strict=True))
    ]
    return {"caption": caption, "ground": {"objects": found}, "segment": {"objects": segments}}


def curate(
    found: Mapping[str, Any], *overrides: str, key: str = "k", merged: Mapping[str, Any] | None = None
) -> Outcome:
    """Curate the records of one image."""
    stage = make(GenerateConfig.of(overrides=overrides), "cpu", {"merged": merged or {}})
    (outcome,) = stage.run(iter([Work(Item(key, f"{key}.jpg", "/k.jpg", -1, 1), dict(found))]))
    return outcome


def scene_of(outcome: Outcome) -> dict[str, Any]:
    assert not outcome.reason, outcome
    scene: dict[str, Any] = outcome.result["scene"]
    return scene


def texts_of(outcome: Outcome) -> list[str]:
    """The relations as text."""
    scene = scene_of(outcome)
    names = [one["name"] for one in scene["objects"]]
    return [f"{names[r['subject']]} {r['predicate']} {names[r['object']]}" for r in scene["relations"]]


def dropped(outcome: Outcome) -> list[tuple[str, str]]:
    """The parts that were dropped, with their reasons."""
    return [(one["part"], one["reason"]) for one in outcome.result["rejected"]]


def write_run(directory: Path, scenes: Mapping[str, dict[str, Any]], unit_size: int = 2) -> Path:
    """Write a run whose stages before curate are finished; the images are noise of SIZE."""
    import simplejpeg

    images = directory / "images"
    images.mkdir(parents=True)
    for i, key in enumerate(scenes):
        pixels = np.random.default_rng(i).integers(0, 256, (*SIZE, 3), np.uint8)
        (images / f"{key}.jpg").write_bytes(simplejpeg.encode_jpeg(pixels))
    out = directory / "run"
    out.mkdir()
    (out / "generate.json").write_text(json.dumps({"schema": 1, "settings": {}, "stages": {}}))
    units = divide([item for item in list_images([images]) if isinstance(item, Item)], unit_size)
    write_list(units, out / "images.jsonl")
    for unit in units:
        for stage in ("caption", "ground", "segment"):
            file, _ = Job(out, stage, GenerateConfig(), "cpu").file(unit)
            for key in file.resume():
                file.append(Outcome(key, scenes[key][stage]))
            file.finish()
    return out
