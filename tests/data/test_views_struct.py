"""Views.of_scenes: order, geometry, augmentation, errors, and the JPEG header probe."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from scenarioclip_fast import native
from scenarioclip_fast.data import rle
from scenarioclip_fast.data.decode import probe
from scenarioclip_fast.data.scene import Relation, Scene, SceneObject
from scenarioclip_fast.data.views import CROP_MARGIN, Views
from scenarioclip_fast.ops.view_batch import is_empty, masked_box, pixel_box
from scenarioclip_fast.ops.views import render_views

HEIGHT, WIDTH = 40, 60
SEED: Any = {"seed": 3, "epoch": 2}


def make_scene(key: str = "a", objects: int = 3, relations: int = 2, size: tuple[int, int] = (HEIGHT, WIDTH)) -> Scene:
    height, width = size
    image = torch.zeros(height, width, 3, dtype=torch.uint8)
    things = []
    for k in range(objects):
        mask = torch.zeros(height, width, dtype=torch.bool)
        mask[k : k + 2, 2 * k : 2 * k + 3] = True
        things.append(SceneObject(f"thing {k}", (2.0 * k, float(k), 2.0 * k + 3, k + 2.0), mask))
    pairs = [Relation(k % objects, "near", (k + 1) % objects) for k in range(relations)]
    return Scene(key, image, "resting", things, pairs)


def test_order_is_global_object_relation() -> None:
    scenes = [make_scene("a", 3, 2), make_scene("b", 1, 0), make_scene("c", 0, 0), make_scene("d", 2, 1)]
    views = Views.of_scenes(scenes)
    assert len(views) == 4 + 6 + 3
    assert views.kind.tolist() == [0] * 4 + [1] * 6 + [3] * 3
    assert views.image.tolist() == [0, 1, 2, 3, 0, 0, 0, 1, 3, 3, 0, 0, 3]
    assert views.box[6].tolist() == list(scenes[0].objects[2].box)
    assert not views.stretch.any()
    assert (views.source == torch.tensor([0, 0, WIDTH, HEIGHT])).all()
    assert (views.augment == torch.tensor([1.0, 1, 1, 0, 0])).all()
    assert views.describe(12) == "view 12 (relation, image 3)"


def test_each_mask_is_stored_once() -> None:
    scenes = [make_scene("a", 3, 3), make_scene("d", 4, 1)]
    views = Views.of_scenes(scenes)
    assert len(views.mask_size) == 3 + 2  # objects without a relation have no mask row
    relation = views.kind == 3
    assert views.mask[relation].tolist() == [[0, 1], [1, 2], [2, 0], [3, 4]]
    assert (views.mask[~relation] == -1).all()
    for row, (scene, k) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]):
        runs = views.mask_runs[views.mask_start[row] : views.mask_start[row + 1]]
        assert torch.equal(
            rle.decode({"size": views.mask_size[row].tolist(), "counts": runs.tolist()}), scenes[scene].objects[k].mask
        )


def test_rle_and_bool_masks_give_the_same_views() -> None:
    raw, packed = make_scene(), make_scene()
    for entry in packed.objects:
        entry.mask = rle.encode(entry.mask)  # type: ignore[arg-type]
    for a, b in zip(Views.of_scenes([raw]).tensors, Views.of_scenes([packed]).tensors, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("scale", [0, 1, 255])
def test_masks_as_pixels_of_every_type(scale: int) -> None:
    scene = make_scene()
    expected = Views.of_scenes([scene])
    for numpy in (False, True):
        for entry, original in zip(scene.objects, make_scene().objects, strict=True):
            assert isinstance(original.mask, torch.Tensor)
            mask = original.mask.to(torch.uint8) * scale if scale else original.mask
            entry.mask = mask.numpy() if numpy else mask
        for a, b in zip(expected.tensors, Views.of_scenes([scene]).tensors, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones((HEIGHT, WIDTH), np.float32), rf"float32 \[{HEIGHT}, {WIDTH}\], expected bool or uint8 \[H, W\]"),
        (torch.ones(1, HEIGHT, WIDTH, dtype=torch.bool), r"bool \[1, 40, 60\], expected bool or uint8"),
        (np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH) % 2 + 1, "values 1, 2; expected 0 and 1, or"),
        (np.full((HEIGHT, WIDTH), 7, np.uint8), "uint8 with the values 7; expected 0 and 1, or 0 and 255"),
        (np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint8), r"values 0, 1, 2, 3, 4, 5, \.\.\.; exp"),
        ([[True]], "list, expected bool or uint8"),
    ],
)
def test_other_masks_are_named(mask: Any, message: str) -> None:
    scene = make_scene("kitchen 7")
    scene.objects[0].mask = mask
    with pytest.raises(ValueError, match=f"kitchen 7, relation 0: mask of object 0: got a mask of .*{message}"):
        Views.of_scenes([scene])


def test_select_and_pickle() -> None:
    views = Views.of_scenes([make_scene()])
    relations = views.select(views.kind == 3)
    assert relations.kind.tolist() == [3, 3] and len(relations.mask_size) == 3
    again = pickle.loads(pickle.dumps(views))
    assert all(torch.equal(a, b) for a, b in zip(views.tensors, again.tensors, strict=True))


def test_no_scenes() -> None:
    views = Views.of_scenes([], train=True)
    assert len(views) == 0 and views.mask_start.tolist() == [0]


@pytest.mark.parametrize(
    ("box", "touched", "truncated"),
    [
        ((1, 2, 5, 6), [1, 2, 5, 6], [1, 2, 5, 6]),
        ((1.2, 2.9, 4.1, 5.01), [1, 2, 5, 6], [1, 2, 4, 5]),
        ((1.2, 2.1, 1.9, 8.99), [1, 2, 2, 9], [1, 2, 2, 8]),
        ((0.9, 2.0, 1.1, 3.0), [0, 2, 2, 3], [0, 2, 1, 3]),
        ((3, 3, 3, 3), [3, 3, 4, 4], [3, 3, 4, 4]),
        ((-9, -9, 2, 2), [0, 0, 2, 2], [0, 0, 2, 2]),
        ((-0.7, -0.2, 0.6, 9.5), [0, 0, 1, 10], [0, 0, 1, 9]),
        ((59, 39, 99, 99), [59, 39, 60, 40], [59, 39, 60, 40]),
        ((59.9, 39.9, 60, 40), [59, 39, 60, 40], [59, 39, 60, 40]),
        ((60, 0, 70, 5), None, None),
        ((5, -7, 9, -1), None, None),
        ((-0.7, 3, -0.2, 9), None, None),
        ((1, 2, 5, np.nan), None, None),
    ],
)
def test_pixels_of_a_box(box: tuple[float, ...], touched: list[int] | None, truncated: list[int] | None) -> None:
    for function, expected in ((pixel_box, touched), (masked_box, truncated)):
        got = function(np.array([box], float), np.array([HEIGHT]), np.array([WIDTH]))
        if expected is None:
            assert is_empty(got).all(), got
        else:
            assert got.tolist() == [expected]


@pytest.mark.parametrize(
    "box", [(10.0, 5.0, 20.0, 15.0), (0.0, 0.0, 60.0, 40.0), (50.0, 0.0, 60.0, 3.0), (7.0, 7.0, 7.0, 7.0)]
)
def test_crop_windows(box: tuple[float, float, float, float]) -> None:
    scene = Scene("a", torch.zeros(HEIGHT, WIDTH, 3, dtype=torch.uint8), "resting", [SceneObject("thing", box)])
    views = Views.of_scenes([scene], object_view="crop")
    x1, y1, x2, y2 = views.source[1].tolist()
    side = int(np.ceil(max(box[2] - box[0], box[3] - box[1], 1) * (1 + 2 * CROP_MARGIN)))
    assert x2 - x1 == y2 - y1 == side
    assert x1 <= box[0] and y1 <= box[1] and x2 >= box[2] and y2 >= box[3]
    # The window exceeds the image only along a side that is too short.
    assert (side > WIDTH) or (x1 >= 0 and x2 <= WIDTH)
    assert (side > HEIGHT) or (y1 >= 0 and y2 <= HEIGHT)
    assert views.kind.tolist() == [0, 2] and views.stretch.tolist() == [False, True]


# augmentation


def test_random_numbers_depend_only_on_the_view() -> None:
    scenes = [make_scene(key, 3, 2) for key in "abcde"]
    together = Views.of_scenes(scenes, train=True, seed=3, epoch=7)
    for i, scene in enumerate(scenes):
        alone = Views.of_scenes([scene], train=True, seed=3, epoch=7)
        mine = together.select(together.image == i)
        assert torch.equal(mine.augment, alone.augment) and torch.equal(mine.source, alone.source)
    # More objects do not change the relations' random numbers.
    more = make_scene("a", 5, 2)
    first, second = (Views.of_scenes([s], train=True, seed=3) for s in (scenes[0], more))
    assert torch.equal(first.augment[first.kind == 3], second.augment[second.kind == 3])


def test_seed_epoch_and_key_change_the_random_numbers() -> None:
    def draws(seed: int = 0, epoch: int = 0, key: str = "a") -> torch.Tensor:
        return Views.of_scenes([make_scene(key, 40, 40, (60, 100))], train=True, seed=seed, epoch=epoch).augment

    first = draws()
    assert torch.equal(first, draws())
    for other in (draws(seed=1), draws(epoch=1), draws(key="b")):
        assert not torch.equal(first, other)


def test_generator_supplies_the_seed() -> None:
    def draws(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return Views.of_scenes([make_scene("a", 40, 40, (60, 100))], train=True, generator=generator).augment

    assert torch.equal(draws(1), draws(1)) and not torch.equal(draws(1), draws(2))


def test_probabilities_and_ranges() -> None:
    """4000 scenes; the bounds are five standard deviations of the counts."""
    scenes = [make_scene(str(k), 1, 1, size=(120, 140)) for k in range(4000)]
    for scene in scenes:
        scene.relations[0].object = 0
    views = Views.of_scenes(scenes, train=True)
    n = len(scenes)
    for kind, (brightness, contrast, saturation, hue) in {
        0: (0.2, 0.2, 0.2, 0.05),
        1: (0.15, 0.15, 0.15, 0.03),
        3: (0.1, 0.1, 0.1, 0.02),
    }.items():
        change = views.augment[views.kind == kind]
        changed = (change[:, :4] != torch.tensor([1.0, 1, 1, 0])).any(1)
        assert abs(int(changed.sum()) - 0.2 * n) < 5 * (n * 0.2 * 0.8) ** 0.5
        for column, (middle, spread) in enumerate([(1, brightness), (1, contrast), (1, saturation), (0, hue)]):
            value = change[changed, column] - middle
            assert value.abs().max() <= spread + 1e-6
            assert value.min() < -0.9 * spread and value.max() > 0.9 * spread
        blurred = change[:, 4] > 0
        if kind == 0:
            assert abs(int(blurred.sum()) - 0.1 * n) < 5 * (n * 0.1 * 0.9) ** 0.5
            assert 0.1 <= change[blurred, 4].min() < 0.2 and 1.4 < change[blurred, 4].max() <= 1.5
        else:
            assert not blurred.any()
    x1, y1, x2, y2 = views.source[views.kind == 0].double().T
    assert (x1 >= 0).all() and (y1 >= 0).all() and (x2 <= 140).all() and (y2 <= 120).all()
    area, ratio = (x2 - x1) * (y2 - y1) / (120 * 140), (x2 - x1) / (y2 - y1)
    # Rounding to whole pixels changes the sampled area by up to half a pixel per side.
    assert 0.78 < area.min() < 0.82 and 0.95 < area.max() <= 1
    assert ratio.min() > 0.98 * 3 / 4 and ratio.max() < 1.02 * 4 / 3
    assert (views.source[views.kind != 0] == torch.tensor([0, 0, 140, 120])).all()
    assert torch.equal(views.stretch, views.kind == 0)


@pytest.mark.parametrize("size", [(10, 400), (400, 10), (1, 1), (1, 50), (2, 3)])
def test_random_crop_of_extreme_shapes(size: tuple[int, int]) -> None:
    """If no sample fits, the crop is centred, with the nearest allowed ratio."""
    views = Views.of_scenes([make_scene(str(k), 0, 0, size=size) for k in range(50)], train=True)
    x1, y1, x2, y2 = views.source.T
    assert (x1 >= 0).all() and (y1 >= 0).all() and (x2 > x1).all() and (y2 > y1).all()
    assert (x2 <= size[1]).all() and (y2 <= size[0]).all()


# errors


def test_errors_name_scene_and_entry() -> None:
    scene = make_scene("kitchen 7")
    scene.objects[1].mask = None
    with pytest.raises(ValueError, match=r"scene kitchen 7, relation 0: object 1 has no mask"):
        Views.of_scenes([scene])
    scene = make_scene("kitchen 7")
    scene.objects[2].mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"kitchen 7, relation 1: the mask of object 2 is empty"):
        Views.of_scenes([scene])
    scene.objects[2].mask = torch.ones(HEIGHT, WIDTH + 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"mask of 61 x 40 for object 2, expected the image's 60 x 40"):
        Views.of_scenes([scene])
    scene.objects[2].mask = {"size": [HEIGHT, WIDTH], "counts": "0"}
    with pytest.raises(ValueError, match=r"relation 1: mask of object 2: got RLE runs"):
        Views.of_scenes([scene])
    scene = make_scene("kitchen 7")
    scene.objects[0].box = (60.0, 1.0, 70.0, 9.0)
    with pytest.raises(ValueError, match=r"kitchen 7, object 0: got box .* overlap the image \(60 x 40\)"):
        Views.of_scenes([scene])
    scene = make_scene("kitchen 7")
    scene.relations[0].object = 9
    with pytest.raises(ValueError, match=r"relation 0: got object 9, expected one of 3"):
        Views.of_scenes([scene])
    with pytest.raises(ValueError, match="object_view: got 'boxed'"):
        Views.of_scenes([], object_view="boxed")
    with pytest.raises(ValueError, match="relation_view: got 'boxed', expected 'focused', 'box' or 'scene'"):
        Views.of_scenes([], relation_view="boxed")


# relations without focused regions


def without_masks(scene: Scene) -> Scene:
    for entry in scene.objects:
        entry.mask = None
    return scene


@pytest.mark.parametrize("relation_view", ["box", "scene"])
def test_without_focused_regions_nothing_else_changes(relation_view: str) -> None:
    for train in (False, True):
        scenes = [make_scene("a", 3, 3), make_scene("b", 0, 0), make_scene("c", 2, 1, size=(50, 30))]
        focused = Views.of_scenes(scenes, train=train, **SEED)
        other = Views.of_scenes([without_masks(s) for s in scenes], relation_view=relation_view, train=train, **SEED)
        relation = torch.arange(len(focused)) >= len(focused) - 4
        for name in ("kind", "source", "stretch", "box"):
            a, b = getattr(focused, name), getattr(other, name)
            assert torch.equal(a[~relation], b[~relation])
        # The views have the same colour jitter, without the blur and random crop of global views.
        assert torch.equal(focused.image, other.image) and torch.equal(focused.augment, other.augment)
        assert other.kind[relation].tolist() == [2 if relation_view == "box" else 0] * 4
        assert (other.mask == -1).all() and len(other.mask_size) == len(other.mask_runs) == 0
        if relation_view == "scene":
            assert torch.equal(other.source[relation], focused.source[relation])
            assert not other.stretch[relation].any()


def test_the_scene_view_of_a_relation_is_the_global_view() -> None:
    scene = make_scene()
    scene.image = torch.randint(256, (HEIGHT, WIDTH, 3), generator=torch.manual_seed(0), dtype=torch.uint8)
    views = Views.of_scenes([without_masks(scene)], relation_view="scene")
    pixels = render_views([scene.image], views, size=24)
    assert torch.equal(pixels[4:], pixels[:1].expand(2, -1, -1, -1))


def test_the_box_view_of_a_relation_contains_subject_and_object() -> None:
    scenes = [make_scene("a", 3, 2), make_scene("b", 4, 0), make_scene("c", 2, 1)]
    scenes[0].objects[1].box = (30.0, 2.0, 41.5, 9.0)
    scenes[2].objects[0].box, scenes[2].objects[1].box = (50.0, 30.0, 58.0, 39.0), (2.0, 1.0, 9.0, 4.0)
    views = Views.of_scenes(scenes, relation_view="box")
    union = {  # of each relation, as one object's box
        (0, 0): (0.0, 0.0, 41.5, 9.0),
        (0, 1): (4.0, 2.0, 41.5, 9.0),
        (2, 0): (2.0, 1.0, 58.0, 39.0),
    }
    for v, ((i, _), box) in enumerate(union.items(), len(views) - 3):
        whole = Scene("w", scenes[i].image, "resting", [SceneObject("both", box)])
        assert torch.equal(views.source[v], Views.of_scenes([whole], object_view="crop").source[1])
        assert views.stretch[v]
    scenes[0].relations[1].object = -1
    for relation_view in ("box", "scene", "focused"):
        with pytest.raises(ValueError, match=r"scene a, relation 1: got object -1, expected one of 3"):
            Views.of_scenes(scenes, relation_view=relation_view)


# image sizes


def jpeg(mode: str = "RGB", progressive: bool = False) -> bytes:
    pillow = pytest.importorskip("PIL.Image")
    buffer = io.BytesIO()
    pillow.new(mode, (WIDTH, HEIGHT)).save(buffer, "JPEG", progressive=progressive, comment=b"x" * 500)
    return buffer.getvalue()


@pytest.mark.parametrize("compiled", [True, False])
def test_sizes_come_from_the_header(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(native, "host", lambda: None)
    for data in (jpeg(), jpeg("L"), jpeg(progressive=True)):
        scene = make_scene()
        scene.image = data
        assert Views.of_scenes([scene]).source[0].tolist() == [0, 0, WIDTH, HEIGHT]
    scene.image = b"not a picture"
    with pytest.raises(ValueError, match="scene a: the image is neither JPEG nor PNG"):
        Views.of_scenes([scene])
    views = Views.of_scenes([scene], sizes=[(HEIGHT, WIDTH)])
    assert views.source[0].tolist() == [0, 0, WIDTH, HEIGHT]
    scene.image = torch.zeros(HEIGHT, WIDTH)
    with pytest.raises(ValueError, match=r"scene a: got an image \[40, 60\]"):
        Views.of_scenes([scene])


def test_compiled_probe_matches_the_python_probe_and_survives_damage() -> None:
    if (host := native.host()) is None:
        pytest.skip("scenarioclip_fast._native.host is not built")
    for mode, components in (("RGB", 3), ("L", 1), ("CMYK", 4)):
        data = jpeg(mode)
        header = probe(data)
        assert header is not None
        assert host.jpeg_header(data) == (header.height, header.width, components)
    data = jpeg()
    found = {host.jpeg_header(data[:n]) for n in range(len(data))}
    assert found == {None, (HEIGHT, WIDTH, 3)}
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(data[:700])
        damaged[int(rng.integers(2, 700))] = int(rng.integers(256))
        assert host.jpeg_header(bytes(damaged)) is None or len(host.jpeg_header(bytes(damaged))) == 3
