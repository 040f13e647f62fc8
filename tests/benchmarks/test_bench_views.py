"""bench_views.py: its scenes, and its check of a GPU's views."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scenarioclip_fast.benchmarks import bench_views
from scenarioclip_fast.benchmarks.bench_views import MixedViews

from scenarioclip_fast.data import Scene, Views, load_reference
from scenarioclip_fast.ops import render_views


def test_first_photos_with_relations(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_views, "PHOTOS", photos)
    threads = torch.get_num_threads()
    scenes = bench_views.from_photos((64, 48), 5)
    assert torch.get_num_threads() == threads
    with_relations = (scene.key for scene in load_reference(photos) if isinstance(scene, Scene) and scene.relations)
    assert [scene.key for scene in scenes] == [next(with_relations) for _ in range(5)]
    assert all(scene.image.shape == (48, 64, 3) for scene in scenes)  # type: ignore[union-attr]


def test_without_photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_views, "PHOTOS", tmp_path / "none")
    assert bench_views.from_photos((64, 48), 5) == []
    scenes = bench_views.make_scenes((65, 48), 3)
    assert [scene.key for scene in scenes] == ["synthetic 0", "synthetic 1", "synthetic 2"]


@pytest.mark.parametrize("object_view", ["masked", "crop"])
def test_check_detects_a_wrong_view(object_view: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_views, "PHOTOS", Path("none"))
    monkeypatch.setattr(bench_views, "GPU_SIDE", 16)
    scenes = bench_views.make_scenes((40, 32), 12)
    views = Views.of_scenes(scenes, object_view=object_view, train=True)
    mixed = MixedViews(scenes, [scene.image for scene in scenes], views)  # type: ignore[misc]
    rendered = render_views(mixed.images, views, size=16, dtype=torch.bfloat16, backend="cpu")
    bench_views.check(rendered, mixed)
    wrong = rendered.clone()
    wrong[1] = wrong[0]
    with pytest.raises(AssertionError, match="off from backend cpu"):
        bench_views.check(wrong, mixed)
