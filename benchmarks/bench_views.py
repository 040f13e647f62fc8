"""render_views on one CPU core, against the published steps in NumPy, SciPy and Pillow; planning on one CPU core; and
render_views on a GPU, against the roofline.

From 640 x 480 to 224 pixels (ViT-B/32), and from 192 x 144 to 64 (the demo). Photos if available
(SCENARIOCLIP_FAST_PHOTOS), else synthetic scenes. On a CPU a sample is one call that renders all views of a kind. On a
GPU the samples are device time alone, excluding the host's planning of the views. "as launched" is the time of a call
on an idle device, planning included: the views/s of a caller that does not overlap planning with the previous batch.

Run: make bench, or: pytest benchmarks/bench_views.py
"""

from __future__ import annotations

import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scenarioclip_fast.benchmarks.timing import backend_for, counted, device_for, sized, synchronize, timed
from scenarioclip_fast.kernels.views import reference
from torch import Tensor

from scenarioclip_fast.data import Relation, Scene, SceneObject, Views, rle
from scenarioclip_fast.data.decode import decode_with_pillow
from scenarioclip_fast.data.scene import mask_pixels
from scenarioclip_fast.dispatch import unavailable_reason
from scenarioclip_fast.ops import render_views
from scenarioclip_fast.ops.views import CLIP_MEAN, CLIP_STD, lower_views
from scenarioclip_fast.requirements import import_problem

PHOTOS = Path(os.environ.get("SCENARIOCLIP_FAST_PHOTOS", Path(__file__).parents[2] / "shared" / "data" / "photos"))
SETTINGS = {"640 x 480 to 224": ((640, 480), 224, 16), "192 x 144 to 64": ((192, 144), 64, 32)}
GPU_SIZE, GPU_SIDE = sized(((640, 480), 224), ((96, 72), 32))
GPU_SCENES, GPU_CHECKED = sized((128, 16), (4, 4))
PLANNED_SCENES = sized(32, 4)  # distinct scenes of a planned batch
KINDS = {"global": reference.GLOBAL, "object": reference.MASKED, "crop": reference.CROP, "relation": reference.RELATION}
Bytes = NDArray[np.uint8]


@pytest.fixture
def one_core() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def make_scenes(size: tuple[int, int], count: int) -> list[Scene]:
    """`count` scenes of `size` pixels, image as a tensor and masks as RLE; shared by all cases, do not modify."""
    scenes = from_photos(size, count)
    rng = np.random.default_rng(0)
    while len(scenes) < count:
        scenes.append(synthetic(f"synthetic {len(scenes)}", size, rng))
    return scenes


def from_photos(size: tuple[int, int], count: int) -> list[Scene]:
    """At most `count` of the first photos with relations; none if the photos or their decoder are missing."""
    scenes: list[Scene] = []
    if not PHOTOS.is_dir() or import_problem("simplejpeg"):
        return scenes
    from scenarioclip_fast.data.check import BadEntry
    from scenarioclip_fast.data.sources.published import Entry, PublishedSource

    source = PublishedSource(PHOTOS)
    reader = source.reader()

    def read(entry: Entry) -> Scene | None:
        try:
            scene = reader.read(entry).scene
        except BadEntry:
            return None
        return resized(scene, size) if scene.relations else None

    threads = torch.get_num_threads()
    try:
        # PyTorch operators in these threads must not start threads of their own.
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for start in range(0, source.total, count):
                scenes += filter(None, pool.map(read, source.entries[start : start + count]))
                if len(scenes) >= count:
                    break
    finally:
        torch.set_num_threads(threads)  # the setting also applies to threads started later
    return scenes[:count]


def resized(scene: Scene, size: tuple[int, int]) -> Scene:
    assert isinstance(scene.image, bytes)
    pixels = decode_with_pillow(scene.image).numpy()
    old = np.array([pixels.shape[1], pixels.shape[0]] * 2)
    new = np.array(size * 2)
    objects = []
    for entry in scene.objects:
        assert entry.mask is not None
        mask = rle.decode(entry.mask).numpy() if isinstance(entry.mask, dict) else mask_pixels(entry.mask)
        small = np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
        small[min(int(entry.box[1] * size[1] / old[1]), size[1] - 1), int(entry.box[0] * size[0] / old[0])] = True
        x1, y1, x2, y2 = (np.array(entry.box) * new / old).tolist()
        objects.append(SceneObject(entry.name, (x1, y1, x2, y2), rle.encode(small)))
    image = torch.from_numpy(np.array(Image.fromarray(pixels).resize(size)))
    return Scene(scene.key, image, scene.action, objects, scene.relations)


def synthetic(key: str, size: tuple[int, int], rng: np.random.Generator) -> Scene:
    width, height = size
    y, x = np.ogrid[:height, :width]
    objects = []
    for _ in range(5):
        (cx, cy), (rx, ry) = rng.random(2) * size, (0.08 + 0.15 * rng.random(2)) * size
        mask = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1
        box = (cx - rx, cy - ry, cx + rx, cy + ry)
        objects.append(SceneObject("ellipse", box, rle.encode(mask)))
    image = torch.from_numpy(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    return Scene(key, image, "none", objects, [Relation(k, "near", k + 1) for k in range(3)])


def step_by_step(scene: Scene, kind: str, size: int) -> list[Tensor]:
    """A scene's views of one kind, with the tools of the published code."""
    image = scene.image.numpy()  # type: ignore[union-attr]
    if kind == "global":
        return [to_tensor(centre(image, size))]
    if kind == "object":
        return [to_tensor(centre(boxed(image, entry.box), size)) for entry in scene.objects]
    if kind == "crop":
        source = Views.of_scenes([scene], object_view="crop").source[1 : 1 + len(scene.objects)].tolist()
        picture = Image.fromarray(image)
        return [to_tensor(picture.crop(box).resize((size, size), Image.Resampling.BICUBIC)) for box in source]
    masks = [rle.decode(entry.mask).numpy() for entry in scene.objects]  # type: ignore[arg-type]
    return [to_tensor(centre(focused(image, masks[r.subject], masks[r.object]), size)) for r in scene.relations]


def boxed(image: Bytes, box: tuple[float, float, float, float]) -> Bytes:
    x1, y1, x2, y2 = (max(int(edge), 0) for edge in box)
    out = np.zeros_like(image)
    out[y1:y2, x1:x2] = image[y1:y2, x1:x2]
    return out


def focused(image: Bytes, subject: NDArray[np.bool_], other: NDArray[np.bool_], sigma: float = 100.0) -> Bytes:
    from scipy import ndimage

    y, x = np.indices(subject.shape)
    (y1, x1), (y2, x2) = ndimage.center_of_mass(subject), ndimage.center_of_mass(other)
    d1, d2 = np.sqrt((y - y1) ** 2 + (x - x1) ** 2), np.sqrt((y - y2) ** 2 + (x - x2) ** 2)
    r1, r2 = np.exp(-(d1**2) / (2 * sigma**2)) * subject, np.exp(-(d2**2) / (2 * sigma**2)) * other
    both = np.where(d1 + d2 > 0, d1 + d2, 1)
    weight = r1 * (d2 / both) + r2 * (d1 / both)
    blurred = np.rint(ndimage.gaussian_filter(image, (2, 2, 0), output=np.float32)).astype(np.uint8)
    return np.where((subject | other)[..., None], (image * weight[..., None]).astype(np.uint8), blurred)


def centre(image: Bytes, size: int) -> Image.Image:
    height, width = image.shape[:2]
    short = min(height, width)
    wide, tall = (size, int(size * height / width)) if width == short else (int(size * width / height), size)
    left, top = round((wide - size) / 2), round((tall - size) / 2)
    picture = Image.fromarray(image).resize((wide, tall), Image.Resampling.BICUBIC)
    return picture.crop((left, top, left + size, top + size))


def to_tensor(picture: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float().div_(255)
    mean, std = torch.tensor(CLIP_MEAN)[:, None, None], torch.tensor(CLIP_STD)[:, None, None]
    return pixels.sub_(mean).div_(std)


@pytest.mark.usefixtures("one_core")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["step by step", "ours: reference", "ours: cpu"])
def test_views(benchmark: Any, form: str, kind: str, setting: str) -> None:
    pixels, size, count = SETTINGS[setting]
    backend = form.removeprefix("ours: ")
    if form.startswith("ours") and (reason := unavailable_reason("render_views", backend, "cpu")):
        pytest.skip(reason)
    scenes = make_scenes(pixels, count if form != "ours: reference" else 2)
    images = [scene.image for scene in scenes]
    views = Views.of_scenes(scenes, object_view="crop" if kind == "crop" else "masked")
    views = views.select(views.kind == KINDS[kind])
    calls: dict[str, Callable[[], Tensor]] = {
        "step by step": lambda: torch.stack([v for scene in scenes for v in step_by_step(scene, kind, size)]),
        form if form.startswith("ours") else "": lambda: render_views(images, views, size=size, backend=backend),  # type: ignore[arg-type]
    }
    # Checked before timing: off by at most 1/255 on 99.9 % of the values, by at most 3/255 on the rest.
    std = torch.tensor(CLIP_STD)[:, None, None]
    apart = (calls[form]() - calls["step by step"]()).abs() * std * 255
    assert apart.max() <= 3.01 and (apart <= 1.01).double().mean() >= 0.999, f"{form} is {apart.max():.2f} bytes off"

    benchmark.group = f"{kind} views, {setting}, one core"
    benchmark.extra_info.update(form=form, views=len(views))
    pixels_out = size * size * len(views)
    counted(benchmark, "cpu", bytes=bytes_to_move(scenes, views, pixels_out, 4), operations=operations(views, size))
    benchmark.pedantic(calls[form], rounds=7 if form == "ours: cpu" else 4, warmup_rounds=1)


def bytes_to_move(scenes: list[Scene], views: Views, pixels_out: int, bytes_out: int) -> int:
    """Minimum bytes: the visible part of each image once, the relations' masks once as bits, the views once.

    3 bytes per image pixel: the centre square for a global or relation view and the boxes of object views, in total at
    most the image; H W / 8 bytes per mask; 3 numbers of `bytes_out` bytes per pixel of a view.
    """
    shown = [0.0] * len(scenes)
    boxes = [0.0] * len(scenes)
    masks = 0
    for kind, i, source, box in zip(views.kind, views.image, views.source, views.box, strict=True):
        x1, y1, x2, y2 = (source if kind in (reference.GLOBAL, reference.RELATION) else box).tolist()
        if kind in (reference.GLOBAL, reference.RELATION):
            shown[i] = max(shown[i], min(x2 - x1, y2 - y1) ** 2)
        else:
            boxes[i] += (x2 - x1) * (y2 - y1)
    for i in views.image[views.kind == reference.RELATION].unique().tolist():
        height, width = scenes[i].image.shape[:2]
        masks += len({k for r in scenes[i].relations for k in (r.subject, r.object)}) * height * width // 8
    limits = [scene.image.numel() for scene in scenes]  # type: ignore[union-attr]
    read = sum(min(3 * (a + b), limit) for a, b, limit in zip(shown, boxes, limits, strict=True))
    return int(read) + masks + 3 * pixels_out * bytes_out


def operations(views: Views, size: int) -> float:
    """Multiplications and additions for 3 channels, without augmentation.

    A view of a window with a short side of n pixels (f = max(n / size, 1)) takes: horizontally, n rows of `size` with
    4 f taps; vertically, size^2 with 4 f taps; normalisation, 2 per number. Of a masked object, only the box is
    resized. A relation view is resized as a whole, although relations of an image could share the background, and takes
    about 20 per pixel for the weights (two distances, exponentials counted as one, the product with 3 channels). The
    blur takes 2 passes of 17 taps, once per image.
    """
    total = 0.0
    for kind, source, box in zip(views.kind.tolist(), views.source.tolist(), views.box.tolist(), strict=True):
        n = min(source[2] - source[0], source[3] - source[1])
        taps = 4 * max(n / size, 1)
        columns, rows = (
            (min((high - low) / n, 1) for low, high in zip(box[:2], box[2:], strict=True))
            if kind == reference.MASKED
            else (1, 1)
        )
        total += 3 * (2 * taps * columns * rows * (n * size + size**2) + 2 * size**2)
        total += 20 * n**2 if kind == reference.RELATION else 0
    relations = views.select(views.kind == reference.RELATION)
    for i in relations.image.unique():
        x1, y1, x2, y2 = relations.source[relations.image == i][0].tolist()
        total += 3 * 2 * 2 * 17 * min(x2 - x1, y2 - y1) ** 2
    return total


@dataclass(frozen=True)
class MixedViews:
    """All views of some scenes, with images on the device, as in a batch of training or evaluation."""

    scenes: list[Scene]
    images: list[Tensor]
    views: Views

    @staticmethod
    def of(device: str, object_view: str, train: bool, count: int = GPU_SCENES) -> MixedViews:
        """All views of the first `count` scenes, repeated if there are fewer."""
        scenes = list(itertools.islice(itertools.cycle(make_scenes(GPU_SIZE, GPU_SCENES)), count))
        images = list(itertools.islice(itertools.cycle(images_on(device)), count))
        return MixedViews(scenes, images, Views.of_scenes(scenes, object_view=object_view, train=train))

    def render(
        self, dtype: torch.dtype = torch.bfloat16, memory_format: torch.memory_format = torch.channels_last
    ) -> Tensor:
        options = {"dtype": dtype, "memory_format": memory_format, "backend": backend_for("cuda")}
        return render_views(self.images, self.views, size=GPU_SIDE, **options)

    def planning_ms(self, rounds: int = 5) -> float:
        """Host time of `lower_views`, which is part of every call."""
        return median_ms(lambda: lower_views(self.images, self.views.tensors, GPU_SIDE), rounds)

    def host_ms(self, rounds: int = 5) -> float:
        """Host time until a call returns, on an idle device: planning in Python and C++, and launches."""
        return median_ms(self.render, rounds, lambda: synchronize("cuda"))


@functools.cache
def images_on(device: str) -> list[Tensor]:
    return [scene.image.to(device_for(device)) for scene in make_scenes(GPU_SIZE, GPU_SCENES)]  # type: ignore[union-attr]


def median_ms(run: Callable[[], Any], rounds: int, before: Callable[[], None] = lambda: None) -> float:
    times = []
    for _ in range(rounds):
        before()
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def check(rendered: Tensor, mixed: MixedViews) -> None:
    """Check the first scenes' views against `cpu`, and one view of each kind and augmentation against `reference`.

    The reference takes 0.1 s per relation view; the tests check `cpu` against it. Rounding a normalised colour to
    bfloat16 alone may be off by 0.5/255.
    """
    views = mixed.views
    augmented = (views.augment != torch.tensor([1.0, 1, 1, 0, 0])).any(1)
    groups = [(views.kind == kind) & (augmented == flag) for kind in views.kind.unique() for flag in (False, True)]
    one_per_group = torch.tensor([int(group.nonzero()[0]) for group in groups if group.any()])
    for backend, chosen in (("cpu", (views.image < GPU_CHECKED).nonzero()[:, 0]), ("reference", one_per_group)):
        images = [scene.image for scene in mixed.scenes]
        expected = render_views(images, views.select(chosen), size=GPU_SIDE, backend=backend)  # type: ignore[arg-type]
        std = 255 * torch.tensor(CLIP_STD, device=rendered.device)[:, None, None]
        apart = (rendered[chosen.to(rendered.device)] - expected.to(rendered.device)).abs_().mul_(std)
        share = int((apart > 2).sum()) / apart.numel()
        assert apart.max() <= 4 and share <= 1e-3, (
            f"off from backend {backend} by up to {apart.max():.2f}/255, {share:.2%} of the values by over 2/255"
        )


@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
@pytest.mark.usefixtures("one_core")
def test_planning(benchmark: Any, train: bool) -> None:
    """Planning the views of a batch: in `Views.of_scenes` and `lower_views`, before a backend is called."""
    scenes = list(itertools.islice(itertools.cycle(make_scenes(GPU_SIZE, PLANNED_SCENES)), GPU_SCENES))
    images = [scene.image for scene in scenes]

    def plan() -> tuple[Tensor, ...]:
        return lower_views(images, Views.of_scenes(scenes, train=train).tensors, GPU_SIDE)  # type: ignore[arg-type]

    views = len(plan()[0])
    assert views == sum(1 + len(scene.objects) + len(scene.relations) for scene in scenes)
    benchmark.group = f"planning of {len(scenes)} scenes, {'training' if train else 'evaluation'}, one core"
    benchmark.extra_info.update(form="ours", views=views)
    benchmark.pedantic(plan, rounds=sized(50, 2), warmup_rounds=2)


@pytest.mark.gpu
@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("object_view", ["masked", "crop"])
def test_mixed_views_on_a_gpu(benchmark: Any, object_view: str, train: bool) -> None:
    """All views of 128 scenes, bf16 and channels last, images in the GPU's memory."""
    if reason := unavailable_reason("render_views", backend_for("cuda"), device_for("cuda")):
        pytest.skip(reason)
    mixed = MixedViews.of("cuda", object_view, train)
    views = len(mixed.views)
    check(mixed.render(), mixed)

    benchmark.group = (
        f"mixed views, {object_view} objects, {'training' if train else 'evaluation'}, 640 x 480 to 224, GPU"
    )
    benchmark.extra_info.update(form="ours: cuda", views=views)
    counted(
        benchmark,
        "cuda",
        bytes=bytes_to_move(mixed.scenes, mixed.views, GPU_SIDE**2 * views, 2),
        operations=operations(mixed.views, GPU_SIDE),
    )
    timed(benchmark, mixed.render, "cuda", rounds=sized(20, 2), warmup_rounds=sized(3, 1))
    report(benchmark, mixed)


def report(benchmark: Any, mixed: MixedViews) -> None:
    """Record host times and both rates."""
    info, views = benchmark.extra_info, len(mixed.views)
    info["planning, ms"] = round(mixed.planning_ms(), 3)
    info["host before the call returns, ms"] = round(mixed.host_ms(), 3)
    if device := info.get("device_seconds"):
        info["views/s, device alone"] = round(views / statistics.median(device))
        info["views/s, as launched, with planning"] = round(1e3 * views / info["as launched, ms"])
