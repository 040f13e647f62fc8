"""Packing a data set of panoptic PNGs (PSG) against the same scenes in the published layout, in one process.

The scenes are uniform: a JPEG of 640 x 480 each, and 8 segments that cover the image, with ragged borders. Both forms
have the same JPEGs, boxes and masks, and `pack` writes the same scenes from both, which is checked. The data
sets and the packs are in the page cache.

Run: make bench, or: pytest benchmarks/bench_pack.py
"""

from __future__ import annotations

import io
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scenarioclip_fast.benchmarks.timing import WARM, sized

from scenarioclip_fast.data import Relation, Scene, SceneObject, ShardSet, generate_scenes, pack
from scenarioclip_fast.data.synthetic import write_published_layout
from scenarioclip_fast.requirements import import_problem

HEIGHT, WIDTH = 480, 640
SCENES, SEGMENTS = sized((200, 8), (4, 3))
PICTURES = sized(50, 2)  # distinct JPEGs, repeated with other segments
PREDICATE, NAME, ACTION = "beside", "person", "standing"


def segment_ids(i: int) -> NDArray[np.int64]:  # [H, W]
    """The nearest of SEGMENTS points to each pixel, in slightly distorted coordinates, plus 1."""
    rng = np.random.default_rng(i)
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    x, y = x + 6 * np.sin(y / 5), y + 6 * np.sin(x / 7)
    points = rng.uniform((0, 0), (WIDTH, HEIGHT), (SEGMENTS, 2)).astype(np.float32)
    nearest: NDArray[np.int64] = np.argmin([(x - px) ** 2 + (y - py) ** 2 for px, py in points], axis=0)
    return nearest + 1


def scene(i: int, picture: bytes) -> Scene:
    ids = segment_ids(i)
    objects = []
    for k in range(1, SEGMENTS + 1):
        rows, columns = (ids == k).nonzero()
        box = tuple(float(v) for v in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
        # Distinct names, because the published layout refers to objects by name.
        objects.append(SceneObject(f"{NAME} {k}", box, torch.from_numpy(ids == k)))  # type: ignore[arg-type]
    relations = [Relation(k, PREDICATE, k + 1) for k in range(SEGMENTS - 1)]
    return Scene(f"{i:06d}", picture, ACTION, objects, relations)


def write_psg(root: Path, scenes: list[Scene]) -> Path:
    """Write scenes as PSG and COCO are unpacked; return the annotation file."""
    for folder in ("train2017", "panoptic_train2017"):
        (root / "coco" / folder).mkdir(parents=True)
    data = []
    for i, one in enumerate(scenes):
        names = {part: f"{folder}train2017/{one.key}.{suffix}" for part, folder, suffix in _FILES}
        assert isinstance(one.image, bytes)
        (root / "coco" / names["file_name"]).write_bytes(one.image)
        ids = segment_ids(i) * 70_001  # all three channels are in use
        rgb = np.stack([ids >> shift & 255 for shift in (0, 8, 16)], -1).astype(np.uint8)
        Image.fromarray(rgb).save(root / "coco" / names["pan_seg_file_name"])
        segments = [{"id": 70_001 * (k + 1), "category_id": k, "iscrowd": 0, "isthing": 1} for k in range(SEGMENTS)]
        boxes = [{"bbox": list(o.box), "bbox_mode": 0, "category_id": k} for k, o in enumerate(one.objects)]
        relations = [[r.subject, r.object, 0] for r in one.relations]
        parts = {"segments_info": segments, "annotations": boxes, "relations": relations}
        data.append({"image_id": one.key, "height": HEIGHT, "width": WIDTH} | names | parts)
    things = [f"{NAME} {k + 1}" for k in range(SEGMENTS)]
    classes = {"thing_classes": things, "stuff_classes": [], "predicate_classes": [PREDICATE], "test_image_ids": []}
    (root / "psg.json").write_text(json.dumps({"data": data} | classes))
    (root / "actions.json").write_text(json.dumps({one.key: ACTION for one in scenes}))
    return root / "psg.json"


_FILES = (("file_name", "", "jpg"), ("pan_seg_file_name", "panoptic_", "png"))


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same scenes in both forms."""
    for package in ("simplejpeg", "PIL"):
        if problem := import_problem(package):
            pytest.skip(problem)
    root = tmp_path_factory.mktemp("pack")
    pictures = []
    for one in generate_scenes(PICTURES, seed=0):
        out = io.BytesIO()
        Image.fromarray(one.image.numpy()).resize((WIDTH, HEIGHT)).save(out, "JPEG", quality=90)  # type: ignore[union-attr]
        pictures.append(out.getvalue())
    scenes = [scene(i, picture) for i, picture in zip(range(SCENES), itertools.cycle(pictures), strict=False)]
    write_published_layout(scenes, root / "published")
    write_psg(root, scenes)
    return root


FORMS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "published": lambda root: {"source": root / "published"},
    "psg": lambda root: {"source": root / "psg.json", "actions": root / "actions.json"},
}


def records(directory: Path) -> dict[str, Any]:
    shards = ShardSet(directory)
    scenes = [shards.read(i) for i in range(len(shards))]
    return {
        one.key: (one.image, one.action, one.relations, [(o.name, o.box, o.mask) for o in one.objects])
        for one in scenes
    }


@pytest.mark.parametrize("form", FORMS)
def test_pack(benchmark: Any, sets: Path, form: str) -> None:
    out = sets / f"packed {form}"

    def clear() -> None:
        shutil.rmtree(out, ignore_errors=True)

    def run() -> None:
        report = pack(**FORMS[form](sets), out_dir=out, val=0, test=0, workers=1, progress=False)
        assert not report.rejected, report

    benchmark.group = f"pack, {WIDTH} x {HEIGHT}, {SEGMENTS} objects, one process"
    benchmark.extra_info["form"] = form
    benchmark.pedantic(run, setup=clear, rounds=1 if WARM else sized(3, 1), warmup_rounds=0 if WARM else sized(1, 0))
    expected = sets / "packed published"
    if expected.exists():
        assert records(out) == records(expected), "both forms hold the same scenes"
    benchmark.extra_info["scenes"] = SCENES
    if benchmark.stats is not None:  # None with --benchmark-disable
        print(f"\n{benchmark.name}: {SCENES / benchmark.stats.stats.median:.0f} scenes/s")
