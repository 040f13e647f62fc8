"""Write scenes in the published layout, so that the same code reads synthetic and real scenes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scenarioclip_fast.data import rle
from scenarioclip_fast.data.parallel import ordered_map
from scenarioclip_fast.data.scene import Mask, Scene, check_fractions
from scenarioclip_fast.data.synthetic.scenes import render_scene, split_of, vocabulary
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import naming, write_text
from scenarioclip_fast.progress import progress
from scenarioclip_fast.requirements import require

QUALITY = 90


def write_published_layout(
    scenes: Iterable[Scene],
    out_dir: str | Path,
    *,
    classes: Mapping[str, list[str]] | None = None,
) -> dict[str, int]:
    """Write scenes in the published layout.

    The files are `metadata_SPLIT.json` (`metadata.json` for scenes without a split), `classes.json`, `images/KEY.jpg`
    and `sam_results/KEY_grounding_sam.npz`.

    Args:
        scenes: with images as uint8 [H, W, 3] or encoded bytes, and masks as bool [H, W] or RLE; None is written as a
            mask without pixels.
        out_dir: created if missing; must be empty.
        classes: "actions", "objects" and "relations" of classes.json; None: all texts that occur.

    Returns:
        Metadata file name -> number of scenes in it.

    Raises:
        UserError: `out_dir` is not empty.
    """
    out = _prepare(out_dir)
    return _write_metadata(((scene.split, _write_scene(scene, out)) for scene in scenes), out, classes)


def generate_published_layout(
    n: int, out_dir: str | Path, *, seed: int = 0, val: float = 0.05, test: float = 0.15, workers: int = 1
) -> dict[str, int]:
    """Generate `n` synthetic scenes in the published layout, in `workers` processes.

    The files do not depend on the number of workers. Shows progress.

    Args:
        n: number of scenes, at least 1.
        out_dir: created if missing; must be empty.
        seed, val, test: see `generate_scenes`.
        workers: number of processes, at least 1.

    Returns:
        Metadata file name -> number of scenes in it.

    Raises:
        UserError: an argument is out of range, or `out_dir` is not empty.
    """
    if n <= 0 or workers <= 0:
        raise UserError(f"got {n} scenes and {workers} workers, expected at least one of each")
    if seed < 0:
        raise UserError(f"seed: got {seed}, expected at least 0")
    check_fractions(val, test)
    out = _prepare(out_dir)
    job = partial(_write_one, seed=seed, val=val, test=test, out=out)
    entries = ordered_map(job, range(n), workers)
    return _write_metadata(progress(entries, n, "rendering", "scenes"), out, vocabulary())


def _write_one(index: int, *, seed: int, val: float, test: float, out: Path) -> tuple[str | None, dict[str, Any]]:
    scene = render_scene(seed, index, split_of(index, val, test))
    return scene.split, _write_scene(scene, out)


def _prepare(out_dir: str | Path) -> Path:
    out = Path(out_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: not an empty directory; choose a new one, or empty it first")
    for folder in ("images", "sam_results"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    return out


def _write_scene(scene: Scene, out: Path) -> dict[str, Any]:
    image, key = scene.image, scene.key
    if not isinstance(image, bytes):
        image = require("simplejpeg").encode_jpeg(
            image.numpy(), quality=QUALITY, colorspace="RGB", colorsubsampling="444"
        )
    with naming(path := out / "images" / f"{key}.jpg"):
        path.write_bytes(image)
    known = [None if o.mask is None else _pixels(o.mask) for o in scene.objects]
    size = next((mask.shape for mask in known if mask is not None), (1, 1))
    masks = [np.zeros(size, dtype=bool) if mask is None else mask for mask in known]
    with naming(path := out / "sam_results" / f"{key}_grounding_sam.npz"):
        np.savez_compressed(
            path,
            mask=np.stack(masks)[:, None] if masks else np.zeros((0, 1, 1, 1), dtype=bool),
            score=np.ones((len(masks), 1), dtype=np.float32),
            labels=np.array([o.name for o in scene.objects], dtype=np.str_),
        )
    relations = [
        [
            f"sam_results/{key}/{key}_relations_{k}.png",
            [scene.objects[r.subject].name, r.predicate, scene.objects[r.object].name],
            *([r.negatives] if r.negatives else []),
        ]
        for k, r in enumerate(scene.relations)
    ]
    return {
        "id": key,
        "image_path": f"images/{key}.jpg",
        "action": scene.action,
        **({} if scene.caption is None else {"dense_caption": scene.caption}),
        "objects": [[o.name, list(o.box)] for o in scene.objects],
        "relations": relations,
    }


def _pixels(mask: Mask) -> NDArray[np.bool_]:  # [H, W]
    return rle.decode(mask).numpy() if isinstance(mask, dict) else np.asarray(mask, dtype=bool)


def _write_metadata(
    entries: Iterable[tuple[str | None, dict[str, Any]]],
    out: Path,
    classes: Mapping[str, list[str]] | None,
) -> dict[str, int]:
    data: dict[str, list[dict[str, Any]]] = {}
    for split, entry in entries:
        data.setdefault(f"metadata_{split}.json" if split else "metadata.json", []).append(entry)
    for name, rows in data.items():
        _write_json(out / name, {"data": rows})
    _write_json(out / "classes.json", dict(classes or _classes(row for rows in data.values() for row in rows)))
    return {name: len(rows) for name, rows in sorted(data.items())}


def _classes(entries: Iterator[dict[str, Any]]) -> dict[str, list[str]]:
    actions: set[str] = set()
    objects: set[str] = set()
    relations: set[str] = set()
    for entry in entries:
        actions |= {entry["action"]} - {None}
        objects.update(name for name, _ in entry["objects"])
        relations.update(" ".join(relation[1]) for relation in entry["relations"])
    return {"actions": sorted(actions), "objects": sorted(objects), "relations": sorted(relations)}


def _write_json(path: Path, record: dict[str, Any]) -> None:
    write_text(path, json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n")
