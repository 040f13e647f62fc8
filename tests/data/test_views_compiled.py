"""Views.of_scenes and lower_views: the compiled parts give the arrays of the Python parts, which word the errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scenarioclip_fast.kernels.views.reference import BOX_X1, BOX_Y2

from scenarioclip_fast import native
from scenarioclip_fast.data import Relation, Scene, SceneObject, Views, rle
from scenarioclip_fast.data.views import _in_order
from scenarioclip_fast.ops.view_batch import is_empty, masked_box
from scenarioclip_fast.ops.views import _compiled_plan, lower_views

SIZES = [(40, 60), (33, 17), (480, 640), (1, 5)]


def scenes(count: int, packed: bool = True) -> list[Scene]:
    rng = np.random.default_rng(count)
    found = []
    for i in range(count):
        height, width = SIZES[i % len(SIZES)]
        objects = []
        for _ in range(1 + i % 5):
            mask = rng.random((height, width)) < rng.choice([0.01, 0.5, 0.99])
            mask[rng.integers(height), rng.integers(width)] = True
            x, y = rng.random(2) * (width, height) * 0.9
            box = (x, y, x + rng.random() * width, y + rng.random() * height)
            objects.append(SceneObject("thing", box, rle.encode(mask) if packed else torch.from_numpy(mask)))
        pairs = rng.integers(len(objects), size=(i % 4, 2)).tolist()
        relations = [Relation(subject, "near", other) for subject, other in pairs]
        found.append(Scene(f"s{i}", torch.zeros(height, width, 3, dtype=torch.uint8), "a", objects, relations))
    return found


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("object_view", ["masked", "crop"])
def test_compiled_planning_equals_python(train: bool, object_view: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if native.host() is None:
        pytest.skip("scenarioclip_fast._native.host is not built")
    options: dict[str, Any] = {"train": train, "object_view": object_view, "seed": 3, "epoch": 5}
    for count in (0, 1, 2, 40):
        batch = scenes(count)
        images: Any = [scene.image for scene in batch]
        compiled = Views.of_scenes(batch, **options)
        plans = [lower_views(images, compiled.tensors, size) for size in (1, 17, 224)]
        with monkeypatch.context() as patch:
            patch.setattr(native, "host", lambda: None)
            plain = Views.of_scenes(batch, **options)
            plain_plans = [lower_views(images, plain.tensors, size) for size in (1, 17, 224)]
        unpacked = Views.of_scenes(scenes(count, packed=False), **options)
        for views in (plain, unpacked):
            for a, b in zip(compiled.tensors, views.tensors, strict=True):
                assert a.dtype == b.dtype and torch.equal(a, b)
        for got, expected in zip(plans, plain_plans, strict=True):
            for a, b in zip(got, expected, strict=True):
                assert a.dtype == b.dtype and torch.equal(a, b)


def test_compiled_boxes_equal_python() -> None:
    if native.host() is None:
        pytest.skip("scenarioclip_fast._native.host is not built")
    height, width = 33, 17
    image = torch.zeros(height, width, 3, dtype=torch.uint8)
    views = Views.of_scenes([Scene("a", image, "", [SceneObject("thing", (0, 0, 1, 1))], [])]).select(torch.tensor([1]))
    values = np.array([-1e300, -9, -1, -0.7, -0.0, 0.3, 0.9, 1, 5.5, 16.2, 17, 17.5, 32.9, 33, 40, np.inf, np.nan])
    empty = 0
    for box in np.random.default_rng(0).choice(values, (3000, 4)):
        views.box[0] = torch.from_numpy(box)
        plan = _compiled_plan(views, [image], 8)
        expected = masked_box(box[None], np.array([height]), np.array([width]))
        if is_empty(expected).any():
            empty += 1
            assert plan is None, box
        else:
            assert plan is not None and plan[0, BOX_X1 : BOX_Y2 + 1].tolist() == expected[0].tolist(), box
    assert 100 < empty < 2900


def test_mask_table_decodes_every_length_of_number() -> None:
    if (host := native.host()) is None:
        pytest.skip("scenarioclip_fast._native.host is not built")
    rng = np.random.default_rng(0)
    for _ in range(200):
        tables = [rng.integers(0, 1 << rng.integers(1, 25), rng.integers(2, 150)) for _ in range(3)]
        masks, sizes = [], []
        for runs in tables:
            runs[1] += 1
            sizes.append([int(runs.sum()), 1])
            masks.append({"size": sizes[-1], "counts": rle.compress(runs)})
        if max(size[0] for size in sizes) > rle.MAX_PIXELS:
            assert host.mask_table(masks, np.array(sizes)) is None
            continue
        got, start = host.mask_table(masks, np.array(sizes))
        assert got.dtype == np.int32 and np.array_equal(got, np.concatenate(tables))
        assert np.array_equal(start, np.cumsum([0, *map(len, tables)]))


@pytest.mark.parametrize(
    "mask",
    [
        None,
        torch.ones(2, 2, dtype=torch.bool),
        {"size": [2, 2]},
        {"size": [2, 3], "counts": "04"},
        {"size": [True, 2], "counts": "04"},
        {"size": [1 << 70, 2], "counts": "04"},
        {"size": [2, 2], "counts": [0, 4]},
        {"size": [2, 2], "counts": "é"},
        {"size": [2, 2], "counts": " "},
        {"size": [2, 2], "counts": "0~"},
        {"size": [2, 2], "counts": "0T"},
        {"size": [2, 2], "counts": "0ooooooooo0"},
        {"size": [2, 2], "counts": "05"},
        {"size": [2, 2], "counts": ""},
        {"size": [2, 2], "counts": "4"},
        {"size": [2, 2], "counts": "O"},
    ],
)
def test_mask_table_leaves_the_rest_to_python(mask: Any) -> None:
    if (host := native.host()) is None:
        pytest.skip("scenarioclip_fast._native.host is not built")
    good = {"size": (2, 2), "counts": b"04"}
    assert host.mask_table([good], np.array([[2, 2]]))[0].tolist() == [0, 4]
    assert host.mask_table([good, mask], np.array([[2, 2], [2, 2]])) is None


def test_in_order() -> None:
    used, place = _in_order(np.array([[7, 3], [3, 9], [7, 7]]))
    assert used.tolist() == [7, 3, 9] and place.tolist() == [[0, 1], [1, 2], [0, 0]]
