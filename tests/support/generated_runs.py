"""Directories of generation runs whose records are those of synthetic scenes, with true boxes and masks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from scenarioclip_fast.data import rle
from scenarioclip_fast.data.scene import Scene
from scenarioclip_fast.data.synthetic import generate_scenes
from scenarioclip_fast.generate.images import Item, Unit, divide, list_images, write_list
from scenarioclip_fast.generate.records import UnitFile
from scenarioclip_fast.generate.stages import Outcome

Records = dict[str, dict[str, Any]]


def write_run(
    directory: Path, n: int, *, unit_size: int = 8, change: Callable[[int, Records], None] = lambda i, records: None
) -> list[Unit]:
    """Write the images and records of `n` scenes, and return the units.

    In every second scene, the segmenter found no mask of the last object, and curation dropped it, if no relation uses
    it. The last of several images was rejected by the stage `caption`.

    Args:
        change: called with the position of each scene and its records by stage, to modify them.
    """
    photos = directory / "photos"
    photos.mkdir(parents=True)
    scenes = [scene for scene in generate_scenes(4 * n) if scene.relations][:n]
    assert len(scenes) == n
    for i, scene in enumerate(scenes):
        data = simplejpeg.encode_jpeg(scene.image.numpy(), quality=95, colorsubsampling="444")
        (photos / f"{i:03d}.jpg").write_bytes(data)
    items = [item for item in list_images([photos]) if isinstance(item, Item)]
    units = divide(items, unit_size)
    write_list(units, directory / "images.jsonl")
    (directory / "generate.json").write_text(json.dumps({"schema": 1, "settings": {}, "stages": {}}))
    stages: dict[str, dict[str, Outcome]] = {name: {} for name in ("caption", "ground", "segment", "curate")}
    for i, (item, scene) in enumerate(zip(items, scenes, strict=True)):
        if i == n - 1 and n > 1:
            stages["caption"][item.key] = Outcome(item.key, reason="answer_not_json", detail="got 'I see a dog.'")
            continue
        records = records_of(scene, drop_last=i % 2 == 0)
        change(i, records)
        for name, record in records.items():
            stages[name][item.key] = Outcome(item.key, record)
    for unit in units:
        for name, outcomes in stages.items():
            keys = [item.key for item in unit.items if item.key in outcomes]
            file = UnitFile(directory / name, unit.number, "inputs", keys)
            file.resume()
            for key in keys:
                file.append(outcomes[key])
            file.finish()
    rejected = {"caption": {"answer_not_json": 1}} if n > 1 else {}
    runs = [
        {"stage": "caption", "images": n, "seconds": 4.0, "counts": {"requests": n + 2, "retries": 2, "cost": 0.0125}},
        {"stage": "ground", "images": n // 2, "seconds": 2.0, "counts": {"boxes": 9}},
        {"stage": "ground", "images": n - n // 2, "seconds": 1.0, "counts": {"boxes": 5}},
        {"stage": "segment", "images": n, "seconds": 8.0, "counts": {}},
        {"stage": "curate", "images": n, "seconds": 0.5, "counts": {}},
    ]
    lines = [json.dumps({**run, "rejected": rejected.get(run["stage"], {})}) for run in runs]
    (directory / "runs.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return units


def records_of(scene: Scene, drop_last: bool = False) -> Records:
    """The records of a scene as the stages write them."""
    size = list(scene.image.shape[:2])
    names = [entry.name for entry in scene.objects]
    masks: list[Any] = [rle.encode(np.asarray(entry.mask, bool)) for entry in scene.objects]
    used = {end for r in scene.relations for end in (r.subject, r.object)}
    dropped = len(names) - 1 if drop_last and len(names) - 1 not in used else None
    kept = [i for i in range(len(names)) if i != dropped]
    if dropped is not None:
        masks[dropped] = None
    triplets = [[names[r.subject], r.predicate, names[r.object]] for r in scene.relations]
    caption = f"A picture of {', '.join(names)}."
    shared = {"size": size, "action": scene.action}
    return {
        "caption": {**shared, "caption": caption, "objects": list(dict.fromkeys(names)), "relations": triplets},
        "ground": {
            "objects": [
                {"name": o.name, "box": list(o.box), "score": round(0.9 - 0.07 * i, 3)}
                for i, o in enumerate(scene.objects)
            ]
        },
        "segment": {"objects": [{"mask": mask, "score": 0.95 if mask else 0.0} for mask in masks]},
        "curate": {
            "scene": {
                **shared,
                "caption": caption,
                "objects": [
                    {"id": i, "name": names[i], "box": list(scene.objects[i].box), "mask": masks[i]} for i in kept
                ],
                "relations": [
                    {
                        "id": k,
                        "subject": kept.index(r.subject),
                        "predicate": r.predicate,
                        "object": kept.index(r.object),
                        "negatives": [f"{names[r.subject]} far from {names[r.object]}"],
                    }
                    for k, r in enumerate(scene.relations)
                ],
                "scores": {"boxes": [round(0.9 - 0.07 * i, 3) for i in kept], "masks": [0.95 for _ in kept]},
            },
            "rejected": []
            if dropped is None
            else [
                {
                    "part": f"object {dropped} ({names[dropped]})",
                    "reason": "no_mask",
                    "detail": "the segmenter found none",
                }
            ],
        },
    }
