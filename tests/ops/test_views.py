"""focused_region and render_views against Pillow and SciPy, and the backends against each other."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scenarioclip_fast.kernels.views import reference
from torch import Tensor

import scenarioclip_fast.ops.views as views_module
from scenarioclip_fast import dispatch
from scenarioclip_fast.data import rle
from scenarioclip_fast.data.scene import Relation, Scene, SceneObject
from scenarioclip_fast.data.views import Views
from scenarioclip_fast.ops.view_batch import pixel_box
from scenarioclip_fast.ops.views import CLIP_MEAN, CLIP_STD

Image = pytest.importorskip("PIL.Image")
ndimage = pytest.importorskip("scipy.ndimage")

PHOTOS = Path(
    os.environ.get("SCENARIOCLIP_FAST_PHOTOS", Path(__file__).resolve().parents[3] / "shared" / "data" / "photos")
)
DEVICES = {"reference": "cpu", "cpu": "cpu", "cuda": "cuda"}
SIZES = [(48, 64), (64, 48), (1, 37), (37, 1), (33, 200), (7, 5), (121, 77), (64, 64)]


def case(backend: str) -> Any:
    marks = [pytest.mark.gpu] if DEVICES[backend] == "cuda" else []
    reason = dispatch.unavailable_reason("render_views", backend, DEVICES[backend])
    return pytest.param(backend, marks=[*marks, pytest.mark.skipif(reason is not None, reason=str(reason))])


FAST = [case("cpu"), case("cuda")]


@pytest.fixture(params=[case(backend) for backend in DEVICES])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def focused_region(image: Tensor, mask1: Tensor, mask2: Tensor, *, backend: str, **keywords: Any) -> Tensor:
    """Run the op on the backend's device; return the result on the CPU."""
    inputs = [t.to(DEVICES[backend]) for t in (image, mask1, mask2)]
    return views_module.focused_region(*inputs, backend=backend, **keywords).cpu()


def render_views(images: Sequence[Tensor], views: Views, *, backend: str = "cpu", **keywords: Any) -> Tensor:
    """Run the op on the backend's device; return the result on the CPU."""
    images = [image.to(DEVICES[backend]) for image in images]
    return views_module.render_views(images, views, backend=backend, **keywords).cpu()


def make_image(height: int, width: int, seed: int = 0, kind: str = "noise") -> np.ndarray:
    rng = np.random.default_rng(seed)
    if kind == "noise":
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if kind == "edges":
        return np.repeat(rng.integers(0, 2, (height, width, 1), dtype=np.uint8) * 255, 3, axis=2)
    waves = np.sin(np.arange(height)[:, None, None] / 9 + np.arange(width)[:, None] / 13 + np.arange(3))
    return (127.5 + 127.5 * waves).astype(np.uint8)


def blob(height: int, width: int, seed: int) -> np.ndarray:
    """An ellipse with a hole, possibly clipped by the border; never empty."""
    rng = np.random.default_rng(seed)
    cy, cx = rng.random(2) * (height, width)
    ry, rx = (0.1 + 0.5 * rng.random(2)) * (height, width)
    y, x = np.ogrid[:height, :width]
    distance = ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2
    mask = (distance < 1) & (distance > 0.1)
    mask[int(cy), int(cx)] = True
    return mask


def exact_blur(image: np.ndarray, sigma: float) -> np.ndarray:  # float64 [H, W, 3]
    return np.asarray(ndimage.gaussian_filter(image.astype(np.float64), (sigma, sigma, 0)))


def scipy_region(
    image: np.ndarray, mask1: np.ndarray, mask2: np.ndarray, sigma: float, blur_sigma: float, blur: str
) -> np.ndarray:
    """The formula with the published code's libraries; an undefined 0/0 becomes the mean, as in this package."""
    y, x = np.indices(mask1.shape)
    (y1, x1), (y2, x2) = ndimage.center_of_mass(mask1), ndimage.center_of_mass(mask2)
    d1, d2 = np.sqrt((y - y1) ** 2 + (x - x1) ** 2), np.sqrt((y - y2) ** 2 + (x - x2) ** 2)
    r1, r2 = np.exp(-(d1**2) / (2 * sigma**2)) * mask1, np.exp(-(d2**2) / (2 * sigma**2)) * mask2
    with np.errstate(invalid="ignore"):
        weight = np.where(d1 + d2 > 0, r1 * (d2 / (d1 + d2)) + r2 * (d1 / (d1 + d2)), (r1 + r2) / 2)
    if blur == "reference":
        blurred = ndimage.gaussian_filter(image, blur_sigma)
    else:
        blurred = np.rint(exact_blur(image, blur_sigma)).astype(np.uint8)
    focused = np.floor(image * weight[..., None]).astype(np.uint8)
    return np.where((mask1 | mask2)[..., None], focused, blurred)


def boxed(image: np.ndarray, box: Sequence[float]) -> np.ndarray:
    """Black outside the box, with edges truncated as published; unlike there, at least one pixel remains."""
    picture, (x1, y1, x2, y2) = Image.fromarray(image), map(int, box)
    box = (x1, y1, max(x2, x1 + 1), max(y2, y1 + 1))
    out = Image.new("RGB", picture.size)
    out.paste(picture.crop(box), box)
    return np.asarray(out)


def pillow_view(image: np.ndarray, size: int) -> np.ndarray:
    """Resize the short side to `size`, bicubic with antialiasing, and crop the centre."""
    height, width = image.shape[:2]
    short = min(height, width)
    wide, tall = (size, int(size * height / width)) if width == short else (int(size * width / height), size)
    left, top = round((wide - size) / 2), round((tall - size) / 2)
    # Horizontally, then vertically, as Pillow did before version 13, which resizes tall images vertically first.
    resized = Image.fromarray(image).resize((wide, height), Image.BICUBIC).resize((wide, tall), Image.BICUBIC)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def bytes_of(pixels: Tensor) -> np.ndarray:  # [3, S, S] -> [S, S, 3]
    """Undo the normalisation."""
    mean, std = (torch.tensor(c)[:, None, None] for c in (CLIP_MEAN, CLIP_STD))
    return ((pixels.float() * std + mean) * 255).permute(1, 2, 0).numpy()


def assert_close(got: np.ndarray, expected: np.ndarray, what: str = "", share: float = 0.999, limit: float = 3) -> None:
    """Assert that 99.9 % of the values differ by at most 1, and none by more than 3.

    Truncation turns last-bit differences between float32 and float64 into whole levels; resizing may add two of them.
    """
    difference = np.abs(got.astype(np.float64) - expected.astype(np.float64))
    assert difference.max(initial=0) <= limit + 1e-3, f"{what}: differ by {difference.max()}"
    assert (difference <= 1 + 1e-3).mean() >= share if difference.size else True, what


def scene(
    image: np.ndarray, boxes: Sequence[tuple[float, ...]] = (), masks: Sequence[np.ndarray] = (), key: str = "s"
) -> Scene:
    objects = [SceneObject("thing", tuple(box), None) for box in boxes]  # type: ignore[arg-type]
    objects += [SceneObject("shape", (0, 0, 1, 1), torch.from_numpy(m)) for m in masks]
    relations = [Relation(k, "on", k + 1) for k in range(len(boxes), len(objects) - 1)]
    return Scene(key, torch.from_numpy(image), "resting", objects, relations)


# focused_region


@pytest.mark.parametrize("blur", ["rgb", "reference"])
@pytest.mark.parametrize("kind", ["noise", "waves"])
@pytest.mark.parametrize("shape", SIZES)
def test_region_matches_scipy(shape: tuple[int, int], kind: str, blur: str, backend: str) -> None:
    image, mask1, mask2 = make_image(*shape, kind=kind), blob(*shape, 1), blob(*shape, 2)
    for sigma, blur_sigma in ((100.0, 2.0), (7.5, 1.0), (30.0, 3.3)):
        expected = scipy_region(image, mask1, mask2, sigma, blur_sigma, blur)
        got = focused_region(
            *map(torch.from_numpy, (image, mask1, mask2)),
            sigma=sigma,
            blur_sigma=blur_sigma,
            blur=blur,
            backend=backend,
        )
        # Where a sum should be an integer (one row only, or three equal colours), rounding noise makes SciPy's
        # truncation lose one level per pass; at sigma 2 that affects one grey level of 256.
        assert_close(got.numpy(), expected, share=0.999 if min(shape) > 1 else 0.9, limit=1 if min(shape) > 1 else 2)
        if min(shape) > 1:
            assert (got.numpy() == expected).mean() >= (0.998 if blur_sigma == 2 else 0.98)


@pytest.mark.parametrize("blur_sigma", [0.0, 0.4, 2.0, 5.2, 20.0, 64.0])
@pytest.mark.parametrize("kind", ["noise", "waves", "edges"])
@pytest.mark.parametrize("shape", [*SIZES, (1, 1), (2, 3), (101, 175)])
def test_blur_is_exact(shape: tuple[int, int], kind: str, blur_sigma: float, backend: str) -> None:
    """In blur="rgb" the only error is that of rounding to the nearest byte: none on average."""
    image, mask = make_image(*shape, kind=kind), np.zeros(shape, np.bool_)
    mask[-1, 0] = True
    inputs = map(torch.from_numpy, (image, mask, mask))
    got = focused_region(*inputs, blur_sigma=blur_sigma, backend=backend).numpy()
    error = (got - exact_blur(image, blur_sigma))[~mask]
    # The rounding between the passes moves a byte by up to 2^-9. A weight is rounded to 2^-24 and the centre takes the
    # sum of these errors: for both passes up to 4 radii of 2^-25 times 255.
    radius = int(4 * blur_sigma + 0.5)
    assert np.abs(error).max(initial=0) <= 0.5 + 2**-9 + radius * 2**-15
    if kind == "noise" and blur_sigma >= 2 and min(shape) > 30:
        # Uniform in [-1/2, 1/2], but neighbours are alike the more, the wider the blur: six standard errors at sigma 2.
        assert abs(error.mean()) <= 6 * blur_sigma / 2 / np.sqrt(12 * error.size)


def test_uniform_images_stay_uniform(backend: str) -> None:
    image = torch.arange(256, dtype=torch.uint8)[:, None, None].expand(256, 40, 3)
    mask = torch.zeros(40, 40, dtype=torch.bool)
    mask[0, 0] = True
    for value in (1, 3, 128, 251, 255):
        flat = image[value].expand(40, 40, 3).contiguous()
        for blur in ("rgb", "reference"):
            assert torch.equal(focused_region(flat, mask, mask, blur_sigma=1.7, blur=blur, backend=backend), flat)


@pytest.mark.parametrize(("height", "width"), [(20, 30), (1, 9), (9, 1), (1, 1)])
def test_region_special_masks(height: int, width: int, backend: str) -> None:
    image = make_image(height, width, 3)
    corner, full, last = (np.zeros((height, width), bool) for _ in range(3))
    corner[0, 0] = last[-1, -1] = full[:] = True
    for mask1, mask2 in ((corner, corner), (corner, last), (full, full), (full, corner), (last, full)):
        got = focused_region(*map(torch.from_numpy, (image, mask1, mask2)), backend=backend)
        assert_close(got.numpy(), scipy_region(image, mask1, mask2, 100.0, 2.0, "rgb"), limit=2)
        swapped = focused_region(*map(torch.from_numpy, (image, mask2, mask1)), backend=backend)
        assert torch.equal(got, swapped)
    # Identical one-pixel masks: both weights are 1/2 and both factors 1, so the pixel keeps its value.
    assert torch.equal(
        focused_region(*map(torch.from_numpy, (image, corner, corner)), backend=backend)[0, 0],
        torch.from_numpy(image[0, 0]),
    )


@pytest.mark.parametrize("fast", FAST)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(0, 2**32 - 1),
    st.floats(0.02, 0.98),
    st.sampled_from(["rgb", "reference"]),
)
@settings(max_examples=40, deadline=None)
def test_region_of_random_masks(fast: str, height: int, width: int, seed: int, density: float, blur: str) -> None:
    rng = np.random.default_rng(seed)
    image = make_image(height, width, seed)
    masks = rng.random((2, height, width)) < density
    masks[:, rng.integers(height), rng.integers(width)] = True
    inputs = [torch.from_numpy(a) for a in (image, *masks)]
    exact = focused_region(*inputs, blur=blur, backend="reference")
    expected = scipy_region(image, *masks, 100.0, 2.0, blur)
    # SciPy's rounding noise (see above) shows in images of one row or column.
    assert_close(exact.numpy(), expected, limit=1 if min(height, width) > 1 else 2, share=0.9)
    got = focused_region(*inputs, blur=blur, backend=fast)
    # A weight that differs in float32's last bits may cross an integer: one level, in few pixels. Where it is almost 1,
    # all three colours cross.
    assert_close(got.numpy(), exact.numpy(), limit=1)
    assert (got != exact).any(-1).sum() <= 2
    assert torch.equal(got[~masks.any(0)], exact[~masks.any(0)])  # integers: all backends agree


def photo_regions() -> list[tuple[str, Any, str, tuple[int, int]]]:
    data = json.loads((PHOTOS / "metadata.json").read_text())["data"]
    found = []
    for entry in data:
        boxes = np.array([box for _, box in entry["objects"]])
        names = [name for name, _ in entry["objects"]]
        for path, (subject, _, other), *_ in entry["relations"]:
            if not (PHOTOS / path).exists():
                continue
            centre = (boxes[:, :2] + boxes[:, 2:]) / 2
            pairs = [
                (i, j)
                for i, a in enumerate(names)
                for j, b in enumerate(names)
                if a == subject and b == other and i != j
            ]
            nearest = min(pairs, key=lambda p: float(np.linalg.norm(centre[p[0]] - centre[p[1]])))
            found.append((path, entry, entry["image_path"], nearest))
    return found


def test_golden_images(backend: str) -> None:
    if not PHOTOS.is_dir():
        pytest.skip(f"no photos at {PHOTOS}: set SCENARIOCLIP_FAST_PHOTOS")
    regions = photo_regions()
    assert len(regions) == 60
    # The reference takes seconds where the CPU backend takes milliseconds: every fourth image is enough.
    different = total = 0
    for path, entry, image_path, pair in regions[:: 4 if backend == "reference" else 1]:
        image = np.asarray(Image.open(PHOTOS / image_path).convert("RGB"))
        stored = np.load(PHOTOS / "sam_results" / f"{entry['id']}_grounding_sam.npz")
        masks = stored["mask"][np.arange(len(stored["score"])), stored["score"].argmax(1)]
        golden = np.asarray(Image.open(PHOTOS / path).convert("RGB")).astype(int)
        inputs = [torch.from_numpy(np.array(a)) for a in (image, *masks[list(pair)])]
        got = focused_region(*inputs, blur="reference", backend=backend).numpy()
        assert np.abs(got - golden).max() <= 1, path
        different += int((got != golden).sum())
        total += golden.size
    assert different <= 1e-3 * total


# render_views


@pytest.mark.parametrize("shape", [*SIZES, (7000, 40), (300, 401)])
@pytest.mark.parametrize("size", [32, 17])
def test_evaluation_views_equal_pillow(shape: tuple[int, int], size: int, backend: str) -> None:
    height, width = shape
    image = make_image(*shape, kind="waves" if max(shape) > 1000 else "noise")
    box = (width * 0.2, height * 0.1, width * 0.9, height * 0.8)
    masks = [blob(*shape, 1), blob(*shape, 2)]
    views = Views.of_scenes([scene(image, [box], masks)])
    got = render_views([torch.from_numpy(image)], views, size=size, backend=backend)
    assert got.shape == (5, 3, size, size)

    region = scipy_region(image, *masks, 100.0, 2.0, "rgb")
    share = 0.999 if min(shape) > 1 else 0.9
    assert_close(bytes_of(got[4]), pillow_view(region, size), views.describe(4), share=share)
    # Without a truncation before it, the resize is bit-exact.
    for v, source in ((0, image), (1, boxed(image, box))):
        assert np.abs(bytes_of(got[v]) - pillow_view(source, size)).max() < 1e-2, views.describe(v)


@pytest.mark.parametrize(
    "box",
    [
        (10.0, 12.0, 30.0, 40.0),
        (10.99, 12.01, 30.01, 40.99),
        (-0.7, -0.99, 12.5, 59.999),  # as boxes within the slack of packing
        (20.0, 0.0, 60.9, 0.9),
        (33.3, 20.5, 33.9, 20.6),  # narrower than a pixel: the published view is black
        (33.9, 20.5, 34.1, 40.0),
        (-0.7, 10.0, 0.3, 20.0),
        (5.0, 5.0, 5.0, 5.0),
        (59.3, 59.3, 90.0, 70.0),
    ],
)
def test_masked_objects_equal_the_published_ones(box: tuple[float, ...], backend: str) -> None:
    image = make_image(60, 60) | 1  # not black anywhere
    got = render_views([torch.from_numpy(image)], Views.of_scenes([scene(image, [box])]), size=60, backend=backend)
    assert np.abs(bytes_of(got[1]) - boxed(image, box)).max() < 1e-2
    assert (bytes_of(got[1]) > 0.5).any()


def test_masked_objects_of_photos(backend: str) -> None:
    if not PHOTOS.is_dir():
        pytest.skip(f"no photos at {PHOTOS}: set SCENARIOCLIP_FAST_PHOTOS")
    data = json.loads((PHOTOS / "metadata.json").read_text())["data"]
    for entry in data[:: 16 if backend == "reference" else 4]:  # for the time of Pillow's views
        image = np.array(Image.open(PHOTOS / entry["image_path"]).convert("RGB"))
        boxes = [box for _, box in entry["objects"]]
        got = render_views([torch.from_numpy(image)], Views.of_scenes([scene(image, boxes)]), backend=backend)
        for view, box in zip(got[1:], boxes, strict=True):
            assert np.abs(bytes_of(view) - pillow_view(boxed(image, box), 224)).max() < 1e-2, (entry["id"], box)


@pytest.mark.parametrize("fast", FAST)
def test_large_image(fast: str) -> None:
    image = make_image(3000, 4000, kind="waves")
    masks = [blob(3000, 4000, 1), blob(3000, 4000, 2)]
    got = render_views([torch.from_numpy(image)], Views.of_scenes([scene(image, [], masks)]), size=64, backend=fast)
    assert np.abs(bytes_of(got[0]) - pillow_view(image, 64)).max() < 1e-2
    assert_close(bytes_of(got[3]), pillow_view(scipy_region(image, *masks, 100.0, 2.0, "rgb"), 64))


def test_blur_and_sigma_reach_the_views(backend: str) -> None:
    image, masks = make_image(60, 80), [blob(60, 80, 1), blob(60, 80, 2)]
    views = Views.of_scenes([scene(image, [], masks)])
    for blur, sigma, blur_sigma in (("reference", 100.0, 2.0), ("rgb", 20.0, 1.0), ("rgb", 100.0, 0.0)):
        got = render_views(
            [torch.from_numpy(image)], views, size=32, blur=blur, sigma=sigma, blur_sigma=blur_sigma, backend=backend
        )
        region = scipy_region(image, *masks, sigma, blur_sigma, blur)
        assert_close(bytes_of(got[-1]), pillow_view(region, 32))


@pytest.mark.parametrize(
    "box",
    [(10, 12, 30, 40), (0, 0, 80, 60), (70, 50, 80, 60), (33.3, 20.5, 33.9, 20.6), (5, 5, 5, 5), (-20, -9, 12, 200)],
)
def test_object_crops(box: tuple[float, ...], backend: str) -> None:
    image = make_image(60, 80)
    views = Views.of_scenes([scene(image, [box])], object_view="crop")
    x1, y1, x2, y2 = views.source[1].tolist()
    assert x2 - x1 == y2 - y1
    inside = pixel_box(np.array([box], float), np.array([60]), np.array([80]))[0]
    assert (np.array([x1, y1]) <= inside[:2]).all() and (np.array([x2, y2]) >= inside[2:]).all()
    padded = np.pad(image, ((100, 100), (100, 100), (0, 0)))
    window = Image.fromarray(padded[100 + y1 : 100 + y2, 100 + x1 : 100 + x2])
    got = render_views([torch.from_numpy(image)], views, size=24, backend=backend)
    assert_close(bytes_of(got[1]), np.asarray(window.resize((24, 24), Image.BICUBIC)), limit=0)


def test_masked_object_may_fall_outside_the_centre(backend: str) -> None:
    """The published view of an object near the border of a wide image is all black; the crop shows the object."""
    image = make_image(20, 100)
    for object_view, black in (("masked", True), ("crop", False)):
        views = Views.of_scenes([scene(image, [(0, 3, 6, 17)])], object_view=object_view)
        got = bytes_of(render_views([torch.from_numpy(image)], views, size=16, backend=backend)[1])
        assert (np.abs(got).max() < 1e-2) == black


def ragged_scenes() -> list[Scene]:
    scenes = []
    for i, shape in enumerate(SIZES):
        height, width = shape
        boxes = [(width * 0.1, height * 0.2, width * 0.7, height * 0.9)] * (i % 3)
        masks = [blob(*shape, 10 * i + k) for k in range(i % 4)]
        scenes.append(scene(make_image(*shape, seed=i), boxes, masks, key=f"scene{i}"))
    return scenes


@pytest.mark.parametrize("object_view", ["masked", "crop"])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("fast", FAST)
def test_fast_backends_match_the_reference(fast: str, train: bool, object_view: str) -> None:
    scenes = ragged_scenes()
    images = [s.image for s in scenes]
    for epoch in range(6 if train else 1):
        views = Views.of_scenes(scenes, object_view=object_view, train=train, epoch=epoch)
        exact = render_views(images, views, size=19, backend="reference")  # type: ignore[arg-type]
        got = render_views(images, views, size=19, backend=fast)  # type: ignore[arg-type]
        std = torch.tensor(CLIP_STD)[:, None, None]
        difference = (got - exact).abs() * std * 255
        assert difference.max() <= 3.001
        assert (difference <= 1.001).double().mean() >= 0.999
        # Most values involve no rounding and must agree closely.
        assert (difference < 0.02).double().mean() >= 0.99


@pytest.mark.parametrize(
    "change",
    [
        (1.2, 1, 1, 0, 0),
        (1, 0.8, 1, 0, 0),
        (1, 1, 1.2, 0, 0),
        (1, 1, 1, -0.04, 0),
        (0.9, 1.1, 0.85, 0.05, 0),
        (1, 1, 1, 0, 0.1),
        (1, 1, 1, 0, 1.5),
        (1.1, 1.2, 0.9, 0.02, 0.7),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 20])
def test_augmentation(change: tuple[float, ...], size: int, backend: str) -> None:
    """Compare with the same steps in Pillow and SciPy, in float64."""
    import colorsys

    image = make_image(40, 40, kind="waves")
    views = Views.of_scenes([scene(image)])
    views.augment[0] = torch.tensor(change)
    got = bytes_of(render_views([torch.from_numpy(image)], views, size=size, backend=backend)[0]) / 255
    x = pillow_view(image, size) / 255.0
    brightness, contrast, saturation, hue, blur = change
    x = np.clip(x * brightness, 0, 1)
    x = np.clip(contrast * x + (1 - contrast) * (x @ reference.GREY).mean(), 0, 1)
    x = np.clip(saturation * x + (1 - saturation) * (x @ reference.GREY)[..., None], 0, 1)
    if hue:
        hsv = [colorsys.rgb_to_hsv(*p) for p in x.reshape(-1, 3)]
        x = np.array([colorsys.hsv_to_rgb((h + hue) % 1, s, v) for h, s, v in hsv]).reshape(x.shape)
    if blur and size > 1:
        for axis in (0, 1):
            kernel = np.exp(-0.5 * (np.arange(-4, 5) / blur) ** 2)
            x = ndimage.correlate1d(x, kernel / kernel.sum(), axis=axis, mode="mirror")
    # float32 against float64; no rounding to bytes after the resize.
    np.testing.assert_allclose(got, x, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_output_formats(dtype: torch.dtype, memory_format: torch.memory_format, backend: str) -> None:
    scenes = ragged_scenes()[:4]
    images = [s.image for s in scenes]
    views = Views.of_scenes(scenes, train=True)
    plain = render_views(images, views, size=13, backend=backend)  # type: ignore[arg-type]
    got = render_views(images, views, size=13, dtype=dtype, memory_format=memory_format, backend=backend)  # type: ignore[arg-type]
    assert got.dtype == dtype and got.is_contiguous(memory_format=memory_format)
    assert torch.equal(got, plain.to(dtype))


def corner_masks(height: int, width: int) -> list[np.ndarray]:
    """A pixel in each corner and in the middle, the last row and the first column, and everything."""
    masks = [np.zeros((height, width), np.bool_) for _ in range(7)]
    for mask, (y, x) in zip(masks, ((0, 0), (0, -1), (-1, 0), (-1, -1), (height // 2, width // 2)), strict=False):
        mask[y, x] = True
    masks[5][-1], masks[6][:, 0] = True, True
    return [*masks, np.ones((height, width), np.bool_), blob(height, width, 1)]


@pytest.mark.parametrize("size", [1, 7, 16, 61])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("fast", FAST)
def test_views_of_an_image_do_not_depend_on_each_other(fast: str, train: bool, size: int) -> None:
    """Relations share the resized background, and masked objects compute a part of the view."""
    for seed, shape in enumerate(((40, 90), (90, 40), (33, 33), (1, 50), (3, 2))):
        height, width = shape
        rng = np.random.default_rng(seed)
        corners = rng.uniform(-5, (width, height), (9, 2))
        boxes = np.concatenate([corners, corners.clip(0) + rng.uniform(0.1, (width, height), (9, 2))], axis=1)
        masks = corner_masks(*shape)
        one = Scene("a", torch.from_numpy(make_image(*shape, seed=seed)), "", objects := [], [])
        objects += [
            SceneObject("o", tuple(box), torch.from_numpy(mask))  # type: ignore[arg-type]
            for box, mask in zip(boxes.tolist(), masks, strict=True)
        ]
        one.relations = [Relation(i, "near", int(k)) for i, k in enumerate(rng.permutation(len(masks)))]
        views = Views.of_scenes([one], train=train, seed=seed)
        together = render_views([one.image], views, size=size, backend=fast)  # type: ignore[list-item]
        for v in range(len(views)):
            alone = render_views([one.image], views.select(torch.tensor([v])), size=size, backend=fast)  # type: ignore[list-item]
            assert torch.equal(together[v], alone[0]), views.describe(v)
        exact = render_views([one.image], views, size=size, backend="reference")  # type: ignore[list-item]
        difference = (together - exact).abs() * torch.tensor(CLIP_STD)[:, None, None] * 255
        assert difference.max() <= 3.001  # as in test_fast_backends_match_the_reference
        assert (difference < 0.02).double().mean() >= 0.99


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("fast", FAST)
def test_pixels_beyond_the_image_are_black_after_any_other_view(fast: str) -> None:
    """At 28 rows to 20, the rows of the last output pixel depend on how the compiler rounds."""
    images = [torch.full((90, 90, 3), 255, dtype=torch.uint8), torch.from_numpy(make_image(15, 60))]
    pair = Views.of_scenes([Scene(str(i), image, "", [], []) for i, image in enumerate(images)])
    for height, width in itertools.chain(((h, 50) for h in range(2, 60)), ((20, w) for w in range(7, 120))):
        pair.source[1], pair.stretch[1] = torch.tensor([-5, 0, width - 5, height], dtype=torch.int32), True
        got, exact = (render_views(images, pair, size=20, backend=name)[1] for name in (fast, "reference"))
        assert (got - exact).abs().max() < 1e-5, (height, width)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_out(memory_format: torch.memory_format, backend: str) -> None:
    scenes = ragged_scenes()[:4]
    images = [s.image.to(DEVICES[backend]) for s in scenes]  # type: ignore[union-attr]
    views = Views.of_scenes(scenes)
    options: dict[str, Any] = {"size": 13, "dtype": torch.bfloat16, "memory_format": memory_format, "backend": backend}
    expected = views_module.render_views(images, views, **options)
    out = torch.full_like(expected, float("nan"))
    assert views_module.render_views(images, views, **options, out=out) is out
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (
            torch.empty(4, 3, 8, 8),
            r"out: got torch.float32 \[4, 3, 8, 8\] on cpu, expected torch.float32 \[5, 3, 8, 8",
        ),
        (torch.empty(5, 3, 8, 8, dtype=torch.bfloat16), "out: got torch.bfloat16"),
        (torch.empty(5, 3, 8, 8, device="meta"), "on meta, expected torch.float32"),
        (torch.empty(5, 8, 8, 3).permute(0, 3, 1, 2), "out: got strides"),
        (torch.empty(5, 3, 8, 8, requires_grad=True), "out: got a tensor that requires gradients"),
    ],
)
def test_bad_out(out: Tensor, message: str) -> None:
    images, views = good()
    assert len(views) == 5
    with pytest.raises(ValueError, match=message):
        views_module.render_views(images, views, size=8, out=out)
    with pytest.raises(TypeError, match="out: got ndarray, expected a tensor"):
        views_module.render_views(images, views, size=8, out=np.empty((5, 3, 8, 8)))  # type: ignore[arg-type]


def test_out_in_memory_that_is_read(backend: str) -> None:
    memory = torch.zeros(5 * 3 * 8 * 8 * 4 + 30 * 40 * 3, dtype=torch.uint8, device=DEVICES[backend])
    out = memory[: 5 * 3 * 8 * 8 * 4].view(torch.float32).view(5, 3, 8, 8)
    images, views = good()
    expected = render_views(images, views, size=8, backend=backend)

    def image_at(offset: int) -> Tensor:
        place = memory[offset : offset + 30 * 40 * 3].view(30, 40, 3)
        return place.copy_(images[0])

    last = out.numel() * 4
    got = views_module.render_views([image_at(last)], views, size=8, backend=backend, out=out)
    assert torch.equal(got.cpu(), expected)
    with pytest.raises(ValueError, match=r"out: shares memory with images\[0\]"):
        views_module.render_views([image_at(last - 1)], views, size=8, backend=backend, out=out)


def test_an_inference_tensor_as_out(backend: str) -> None:
    images, views = good()
    images = [image.to(DEVICES[backend]) for image in images]
    with torch.inference_mode():
        out = torch.empty(5, 3, 8, 8, device=DEVICES[backend])
        views_module.render_views(images, views, size=8, backend=backend, out=out)
    with pytest.raises(ValueError, match="out: got an inference tensor"):
        views_module.render_views(images, views, size=8, backend=backend, out=out)


def test_zero_views(backend: str) -> None:
    image = make_image(5, 6)
    none = Views.of_scenes([scene(image)]).select(torch.zeros(0, dtype=torch.int64))
    assert render_views([torch.from_numpy(image)], none, size=8, backend=backend).shape == (0, 3, 8, 8)
    if DEVICES[backend] == "cpu":  # no image, hence no device
        assert render_views([], Views.of_scenes([]), size=8, backend=backend).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("fast", FAST)
def test_many_views(fast: str) -> None:
    """More views than the CUDA backend renders at a time (64 MiB between its kernels), and wider than one block."""
    shapes = ((500, 700), (700, 500), (501, 699), (480, 640))
    scenes = [scene(make_image(*s, seed=i), [], [blob(*s, 1), blob(*s, 2)], str(i)) for i, s in enumerate(shapes)]
    images = [s.image for s in scenes]
    views = Views.of_scenes(scenes, train=True)
    index = torch.randint(len(views), (200,), generator=torch.Generator().manual_seed(0))
    once = render_views(images, views, size=260, dtype=torch.float16, backend=fast)  # type: ignore[arg-type]
    many = render_views(images, views.select(index), size=260, dtype=torch.float16, backend=fast)  # type: ignore[arg-type]
    assert torch.equal(many, once[index])


def test_custom_normalisation(backend: str) -> None:
    image = make_image(30, 30)
    views = Views.of_scenes([scene(image)])
    got = render_views([torch.from_numpy(image)], views, size=30, mean=(0, 0, 0), std=(1, 1, 1), backend=backend)
    np.testing.assert_allclose(got[0].permute(1, 2, 0).numpy() * 255, image, atol=1e-4)


def test_non_contiguous_images(backend: str) -> None:
    image = torch.from_numpy(make_image(31, 45))
    views = Views.of_scenes([Scene("s", image, "resting")])
    transposed = image.permute(1, 0, 2).contiguous().permute(1, 0, 2)
    assert not transposed.is_contiguous()
    assert torch.equal(
        render_views([transposed], views, size=9, backend=backend),
        render_views([image], views, size=9, backend=backend),
    )


def test_rle_and_bool_masks_agree(backend: str) -> None:
    image, masks = make_image(30, 40), [blob(30, 40, 1), blob(30, 40, 2)]
    plain = scene(image, [], masks)
    encoded = scene(image, [], masks)
    for entry, mask in zip(encoded.objects, masks, strict=True):
        entry.mask = rle.encode(mask)
    first, second = (
        render_views([torch.from_numpy(image)], Views.of_scenes([s]), size=16, backend=backend)
        for s in (plain, encoded)
    )
    assert torch.equal(first, second)


def test_compiles_without_a_graph_break(backend: str) -> None:
    one = scene(make_image(30, 40), [(3, 4, 20, 20)], [blob(30, 40, 1), blob(30, 40, 2)])
    views = Views.of_scenes([one])
    image, mask = one.image.to(DEVICES[backend]), torch.from_numpy(blob(30, 40, 1)).to(DEVICES[backend])  # type: ignore[union-attr]

    def both(image: Tensor, views: Views, mask: Tensor) -> tuple[Tensor, ...]:
        pixels = views_module.render_views([image], views, size=8, backend=backend)
        out = torch.full_like(pixels, 7)
        before = out + 1
        given = views_module.render_views([image], views, size=8, backend=backend, out=out)
        return pixels + 1, before, given, out, views_module.focused_region(image, mask, mask, backend=backend)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(image, views, mask), both(image, views, mask), strict=True):  # type: ignore[arg-type]
        assert torch.equal(got, expected)


def test_opcheck(backend: str) -> None:
    one = scene(make_image(20, 30), [(3, 4, 20, 20)], [blob(20, 30, 1), blob(20, 30, 2)])
    weights = reference.blur_weights(2.0)
    image, mask = one.image.to(DEVICES[backend]), torch.from_numpy(blob(20, 30, 1)).to(DEVICES[backend])  # type: ignore[union-attr]
    torch.library.opcheck(views_module._focused_region, (image, mask, mask, 100.0, weights, False, backend))
    views, half = Views.of_scenes([one]), [0.5] * 3
    for layout in (torch.contiguous_format, torch.channels_last):
        out = torch.empty((len(views), 3, 8, 8), dtype=torch.bfloat16, device=image.device, memory_format=layout)
        arguments = ([image], views.tensors, half, half, 100.0, weights, False, out, backend)
        torch.library.opcheck(views_module._render_views, arguments)


# bad input


def good() -> tuple[list[Tensor], Views]:
    one = scene(make_image(30, 40), [(3, 4, 20, 20)], [blob(30, 40, 1), blob(30, 40, 2)])
    return [one.image], Views.of_scenes([one])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("field", "index", "value", "message"),
    [
        ("image", 2, 1, r"view 2 \(masked object, image 1\): got image 1"),
        ("image", 0, -1, r"view 0 \(global, image -1\)"),
        ("kind", 1, 9, r"view 1 \(kind 9, image 0\): got kind 9"),
        ("mask", 4, 7, r"view 4 \(relation, image 0\): got masks \[7, 7\]"),
        ("mask", 4, -1, r"view 4 \(relation, image 0\)"),
        ("box", 1, torch.tensor([50.0, 3, 60, 9]), r"view 1 .*overlaps the image of 40 x 30"),
        ("box", 1, float("nan"), r"view 1 .*overlaps"),
        ("source", 3, torch.tensor([5, 5, 5, 9]), r"view 3 .*source window"),
        ("source", 0, torch.tensor([40, 0, 60, 9]), r"view 0 .*overlaps the image"),
        ("mask_size", 1, 3, r"view 4 .*got a mask of 3 x 3, expected 40 x 30"),
        ("mask_runs", 0, -1, r"view 4 .*do not cover"),
    ],
)
def test_errors_name_the_view(field: str, index: int, value: Any, message: str, backend: str) -> None:
    images, views = good()
    getattr(views, field)[index] = value
    with pytest.raises(ValueError, match=message):
        render_views(images, views, size=8, backend=backend)


def test_empty_mask(backend: str) -> None:
    images, views = good()
    views.mask_runs, views.mask_start = torch.tensor([1200, 1200], dtype=torch.int32), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"view 4 .*mask 0 is empty"):
        render_views(images, views, size=8, backend=backend)


@pytest.mark.parametrize(
    "image",
    [torch.zeros(30, 40, 4, dtype=torch.uint8), torch.zeros(30, 40, 3), torch.zeros(0, 40, 3, dtype=torch.uint8)],
)
def test_bad_images(image: Tensor, backend: str) -> None:
    _, views = good()
    with pytest.raises(ValueError, match=r"view 0 \(global, image 0\): got an image"):
        render_views([image], views, size=8, backend=backend)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"size": 0}, "size: got 0"),
        ({"dtype": torch.float64}, "dtype: got torch.float64"),
        ({"memory_format": torch.channels_last_3d}, "memory_format"),
        ({"std": (1, 1, 0)}, "std: got"),
        ({"mean": (1, 1)}, "mean: got"),
        ({"blur": "none"}, "blur: got 'none'"),
        ({"sigma": 0.0}, "sigma: got 0.0"),
        ({"blur_sigma": -1.0}, "blur_sigma: got -1.0"),
    ],
)
def test_bad_arguments(keywords: dict[str, Any], message: str) -> None:
    images, views = good()
    with pytest.raises(ValueError, match=message):
        render_views(images, views, **keywords)


def test_bad_regions(backend: str) -> None:
    image, mask = torch.from_numpy(make_image(5, 6)), torch.ones(5, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match="object_mask: got an empty mask"):
        focused_region(image, mask, ~mask, backend=backend)
    with pytest.raises(ValueError, match=r"subject_mask: got torch.bool \[6, 5\], expected bool \[5, 6\]"):
        focused_region(image, mask.T, mask, backend=backend)
    with pytest.raises(ValueError, match=r"image: got torch.uint8 \[5, 6, 1\]"):
        focused_region(image[:, :, :1], mask, mask, backend=backend)


@pytest.mark.parametrize("fast", FAST)
def test_blur_weights_that_do_not_sum_to_one(fast: str) -> None:
    """The sums of the blur fit their integers only if they do."""
    region = dispatch.implementation("focused_region", fast).focused_region
    image = torch.zeros(5, 6, 3, dtype=torch.uint8, device=DEVICES[fast])
    mask = torch.ones(5, 6, dtype=torch.bool, device=DEVICES[fast])
    with pytest.raises(RuntimeError, match=r"weights: got a Gaussian that sums to 16777218, expected 2\^24"):
        region(image, mask, mask, 100.0, [2**24 - 2, 2], False)


def test_arguments_that_are_not_tensors() -> None:
    images, views = good()
    mask = np.ones((30, 40), np.bool_)
    with pytest.raises(
        TypeError, match=r"subject_mask: got ndarray, expected a tensor; convert it with torch.from_numpy"
    ):
        views_module.focused_region(images[0], mask, mask)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"images\[1\]: got str, expected a tensor"):
        views_module.render_views([images[0], "b.jpg"], views)  # type: ignore[list-item]
