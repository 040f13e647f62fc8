"""The baseline's dataset renders the published views, and the package renders the same ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scenarioclip_fast.benchmarks import baseline_data

from scenarioclip_fast.data import generate_scenes, load_reference, pack, scene_loader
from scenarioclip_fast.data.scene import Scene
from scenarioclip_fast.ops.views import CLIP_STD


@pytest.mark.parametrize("regions", ["read", "computed"])
def test_same_views_as_the_package(tmp_path: Path, regions: str) -> None:
    scenes = list(generate_scenes(5, seed=1))
    for scene in scenes:
        scene.image, scene.split = baseline_data.encoded(scene.image), "train"  # type: ignore[arg-type]
    entries = baseline_data.write_published(scenes, tmp_path / "published", regions)  # type: ignore[arg-type]
    pack(scenes, tmp_path / "shards", progress=False)
    options = {"size": 48, "augment": False, "shuffle": False, "epochs": 1, "blur": "reference", "decoder": "torch"}
    with scene_loader(tmp_path / "shards", 5, **options) as loader:  # type: ignore[arg-type]
        ours = next(iter(loader)).pixels
    (baseline,) = baseline_data.PublishedLoader(entries, 48, 5, workers=0)
    apart = ((ours - baseline) * torch.tensor(CLIP_STD)[:, None, None] * 255).abs()
    # The renderer's tolerance: off by at most 1/255 on 99.9 % of the values, never by more than 3/255.
    assert apart.max() <= 3.01 and (apart <= 1.01).double().mean() >= 0.999
    assert bool(list((tmp_path / "published").glob("*.png"))) == (regions == "read")


def test_focused_regions_of_real_photos(photos: Path) -> None:
    """Against the published PNGs that come with the photos."""
    compared = 0
    for scene in load_reference(photos):
        if not isinstance(scene, Scene) or compared >= 6:
            continue
        pixels = np.asarray(Image.open(photos / "images" / f"{scene.key}.jpg").convert("RGB"))
        for k, relation in enumerate(scene.relations):
            path = photos / "sam_results" / scene.key / f"{scene.key}_relations_{k}.png"
            if path.exists():
                masks = [baseline_data.as_array(scene.objects[i].mask) for i in (relation.subject, relation.object)]
                found = baseline_data.focused_region(pixels, *masks).astype(int)
                # Floor of float64 products in another order: rarely off, by at most one.
                apart = np.abs(found - np.asarray(Image.open(path)))
                assert apart.max() <= 1 and (apart > 0).mean() < 1e-3
                compared += 1
    assert compared
