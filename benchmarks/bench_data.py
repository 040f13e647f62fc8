"""Decoding, views and whole batches from packed shards, against the published loader (baseline_data.py): a map-style
dataset read with Pillow in worker processes of PyTorch's DataLoader, with focused regions from precomputed PNGs, as
published, or computed on the fly with SciPy.

Scenes are real photos if available (SCENARIOCLIP_FAST_PHOTOS), else synthetic. Views are those of evaluation, because
the published augmentation uses other random numbers; this package's training views cost the same. `test_loader_alone`
uses uniform scenes, 640 x 480 with 6 objects and 3 relations, to be comparable between machines. On a GPU only the
first batch of an epoch is checked, and the published loader runs last: it takes seconds per epoch. Either loader is
created once per form, and keeps its threads or processes from one epoch to the next.

extra_info["decoder"] is the decoder in use, and why an "auto" one was chosen.

Run: make bench, or: pytest benchmarks/bench_data.py
"""

from __future__ import annotations

import functools
import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from scenarioclip_fast.benchmarks import baseline_data
from scenarioclip_fast.benchmarks.timing import REHEARSAL, WARM, device_for, on_gpu, sized, synchronize
from torch import Tensor

from scenarioclip_fast.data import ShardSet, Views, generate_scenes, pack, scene_loader
from scenarioclip_fast.data.decode import DECODERS, decode_with_pillow, make_decoder
from scenarioclip_fast.data.scene import Relation, Scene, SceneObject
from scenarioclip_fast.dispatch import unavailable_reason
from scenarioclip_fast.ops import render_views
from scenarioclip_fast.ops.views import CLIP_STD
from scenarioclip_fast.requirements import import_problem

PHOTOS = Path(os.environ.get("SCENARIOCLIP_FAST_PHOTOS", Path(__file__).parents[2] / "shared" / "data" / "photos"))
SIZE, BATCH = sized((224, 32), (32, 4))
WORKERS = {"cpu": 2, "cuda": sized(8, 1)}  # of the published loader; eight per GPU, as published
# Epochs of 128 scenes per sample; for the published loader on a GPU, enough to give each worker a batch.
EPOCHS, PUBLISHED_EPOCHS = {"cpu": 1, "cuda": sized(4, 1)}, {"cpu": 1, "cuda": sized(2, 1)}
SYNTHETIC_SCENES, UNIFORM_SCENES = sized((128, 128), (8, 8))
CHECKED_SCENES = sized(32, 4)  # of a batch on a GPU
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def rounds(full: int, warmup: int) -> dict[str, int]:
    return {"rounds": 1, "warmup_rounds": 0} if WARM else {"rounds": sized(full, 1), "warmup_rounds": sized(warmup, 0)}


def skip_unavailable(form: str, device: str) -> None:
    """Skip forms that cannot run here, rather than time a fallback."""
    name = form.removeprefix("ours, ").partition(",")[0]
    if name in DECODERS and (problem := import_problem(DECODERS[name].module)):
        pytest.skip(problem)
    if name == "torchvision" and not on_gpu(device):
        pytest.skip("torchvision decodes on a GPU only")
    if "published" in form:
        pytest.importorskip("scipy", reason="SciPy is not installed; it computes the published regions")
    if on_gpu(device) and (reason := unavailable_reason("render_views", "cuda", "cuda")):
        pytest.skip(reason)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if problem := import_problem("simplejpeg"):
        pytest.skip(problem)
    folder = tmp_path_factory.mktemp("bench") / "shards"
    source: Any = PHOTOS if PHOTOS.is_dir() and not REHEARSAL else list(generate_scenes(SYNTHETIC_SCENES, seed=0))
    pack(source, folder, val=0, test=0, progress=False)
    return folder


@functools.lru_cache(maxsize=1)  # persistent workers of one loader at a time
def published(shards: Path, device: str, regions: Literal["read", "computed"]) -> baseline_data.PublishedLoader:
    entries = layout(shards, regions) * PUBLISHED_EPOCHS[device]
    return baseline_data.PublishedLoader(entries, SIZE, BATCH, WORKERS[device], device_for(device))


@functools.cache
def layout(shards: Path, regions: Literal["read", "computed"]) -> list[baseline_data.Entry]:
    return baseline_data.write_published(scenes_of(shards), shards.with_name(f"published {regions}"), regions)


class OurLoader:
    """This package's loader. Each iteration is `epochs` epochs.

    Its threads, decoder and files persist, like the published loader's workers, until `close` or `reopen`.
    """

    def __init__(self, shards: Path, device: str, *, epochs: int | None = None, **options: Any) -> None:
        options = {"blur": "reference", "augment": False, "shuffle": False, "drop_last": False, **options}
        options |= {"device": device_for(device), "size": SIZE, "epochs": EPOCHS[device] if epochs is None else epochs}
        self._open = functools.partial(scene_loader, shards, BATCH, **options)
        self._loader = self._open()

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self._loader:
            yield batch.pixels
        assert not self._loader.bad, self._loader.bad

    @property
    def decoder(self) -> str:
        return str(self._loader.decoder)

    def reopen(self) -> None:
        """Forget the cached images."""
        self._loader.close()
        self._loader = self._open()

    def close(self) -> None:
        self._loader.close()


CACHED_EPOCHS = 4  # of which the first decodes
LOADERS: dict[str, Callable[[Path, str], OurLoader | baseline_data.PublishedLoader]] = {
    "ours, torch": lambda shards, device: OurLoader(shards, device, decoder="torch"),
    "ours, dali": lambda shards, device: OurLoader(shards, device, decoder="dali"),
    "ours, nvimgcodec": lambda shards, device: OurLoader(shards, device, decoder="nvimgcodec"),
    "ours, torchvision": lambda shards, device: OurLoader(shards, device, decoder="torchvision"),
    "ours, torch, cached": lambda shards, device: OurLoader(
        shards, device, decoder="torch", cache_gib=1.0, epochs=CACHED_EPOCHS
    ),
    "published": lambda shards, device: published(shards, device, "read"),
    "published, regions drawn": lambda shards, device: published(shards, device, "computed"),  # slowest: last
}


def cases(*forms: str) -> list[Any]:
    """The forms on each device; nvImageCodec and torchvision only on a GPU, which they are for."""
    return [
        pytest.param(form, device, marks=[pytest.mark.gpu] if device == "cuda" else [], id=f"{form}-{device}")
        for device in ("cpu", "cuda")
        for form in forms
        if device == "cuda" or not ("nvimgcodec" in form or "torchvision" in form)
    ]


@functools.cache
def expected_batches(shards: Path, device: str) -> list[Tensor]:
    """An epoch of the published loader; for a GPU, its first batch by the `cpu` backend, which the CPU cases verify."""
    if device == "cpu":
        return list(published(shards, "cpu", "read"))
    scenes = scenes_of(shards)[:BATCH]
    return [render_views(pixels_of(scenes), Views.of_scenes(scenes), size=SIZE, blur="reference", backend="cpu")]


def check(pixels: Tensor, expected: Tensor, nvjpeg: bool = False) -> None:
    """Check the renderer's tolerance: off by at most 1/255 for 99.9 % of the values, never by more than 3/255.

    nvJPEG's inverse transform and upsampling round differently from libjpeg's, which changes decoded pixels by a few
    levels, and torchvision repeats chroma, which changes edges by more; a wrong colour order, size or crop changes the
    mean by tens.
    """
    std = torch.tensor(CLIP_STD)[:, None, None]
    apart = ((pixels.cpu() - expected) * std * 255).abs()
    if nvjpeg:
        assert apart.mean() < 1.5, f"off by {apart.mean():.2f} bytes in the mean"
    else:
        assert apart.max() < 3.01 and (apart > 1.01).float().mean() < 1e-3, f"off by {apart.max():.2f} bytes"


def uses_nvjpeg(form: str, device: str) -> bool:
    # On a CPU, DALI and nvImageCodec decode with libjpeg-turbo.
    return on_gpu(device) and any(name in form for name in DECODERS if name != "torch")


def pixels_of(scenes: Iterable[Scene]) -> list[Tensor]:
    """Decode with Pillow, independently of this package's decoders."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(decode_with_pillow, [scene.image for scene in scenes]))


def uniform_scenes(pictures: Iterable[bytes], n: int) -> Iterator[Scene]:
    """Yield `n` scenes of 640 x 480 with 6 objects and 3 relations: rescaled `pictures` with elliptic masks."""
    with ThreadPoolExecutor() as pool:
        yield from pool.map(uniform_scene, range(n), itertools.cycle(pictures))


def uniform_scene(i: int, picture: bytes) -> Scene:
    y, x = np.mgrid[:480, :640]
    rng = np.random.default_rng(i)
    out = io.BytesIO()
    Image.open(io.BytesIO(picture)).convert("RGB").resize((640, 480)).save(out, "JPEG", quality=90)
    objects = []
    for cx, cy, rx, ry in rng.uniform((130, 130, 40, 40), (510, 350, 120, 120), (6, 4)):
        mask = torch.from_numpy(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1)
        objects.append(SceneObject("disc", (cx - rx, cy - ry, cx + rx, cy + ry), mask))
    return Scene(f"{i:06d}", out.getvalue(), "lying", objects, [Relation(k, "near", k + 1) for k in range(3)])


@pytest.fixture(scope="session")
def uniform_shards(shards: Path) -> Path:
    folder = shards.with_name("uniform shards")
    pictures: list[bytes] = [scene.image for scene in scenes_of(shards)]  # type: ignore[misc]
    pack(uniform_scenes(pictures, UNIFORM_SCENES), folder, val=0, test=0, progress=False)
    return folder


@pytest.mark.parametrize(("form", "device"), cases(*(f"ours, {name}" for name in DECODERS)))
def test_loader_alone(benchmark: Any, uniform_shards: Path, form: str, device: str) -> None:
    """Training batches from shards in the page cache without a training step: the loader's peak throughput."""
    skip_unavailable(form, device)
    batch_size = sized(128, 4) if device == "cuda" else BATCH
    epochs = sized(16, 2) if device == "cuda" else 1
    options = {"device": device_for(device), "size": SIZE, "decoder": form.removeprefix("ours, "), "shuffle": False}
    scenes = scenes_of(uniform_shards)[:batch_size]
    with scene_loader(uniform_shards, batch_size, **options, epochs=1) as loader:
        views = Views.of_scenes(scenes, train=True)
        checked = (views.image < CHECKED_SCENES).nonzero()[:, 0]
        expected = render_views(pixels_of(scenes[:CHECKED_SCENES]), views.select(checked), size=SIZE)
        found = next(iter(loader)).pixels
        check(found[checked.to(found.device)], expected, uses_nvjpeg(form, device))
    with scene_loader(uniform_shards, batch_size, **options, epochs=epochs) as loader:

        def run() -> None:
            for _ in loader:
                pass
            synchronize(device)

        benchmark.group = f"640 x 480, 6 objects, 3 relations, {device}"
        benchmark.extra_info["decoder"] = str(loader.decoder)
        benchmark.pedantic(run, **rounds(3 if device == "cuda" else 5, 1))
        assert not loader.bad, loader.bad
    report(benchmark, UNIFORM_SCENES * epochs, UNIFORM_SCENES * epochs * 10)
    if benchmark.stats is not None:
        size = sum(len(scene.image) for scene in scenes_of(uniform_shards)) * epochs
        seconds = benchmark.stats.stats.median
        benchmark.extra_info |= {
            "JPEG MB/s": round(size / seconds / 1e6, 1),
            "KB per JPEG": round(size / 1e3 / UNIFORM_SCENES / epochs),
        }


@functools.cache
def pillow_pixels(shards: Path) -> list[Tensor]:
    return pixels_of(scenes_of(shards))


@pytest.mark.parametrize(
    ("form", "device"),
    cases("Pillow", "torch", "torch, one thread", "dali", "dali, one thread", "nvimgcodec", "torchvision"),
)
def test_decoding(benchmark: Any, shards: Path, form: str, device: str) -> None:
    skip_unavailable(form, device)
    images: list[bytes] = [scene.image for scene in scenes_of(shards)]  # type: ignore[misc]
    if form == "Pillow" and device == "cuda":
        pytest.skip("Pillow decodes on the CPU")
    name, _, one = form.partition(",")
    decoder = None if form == "Pillow" else make_decoder(name, device_for(device), threads=1 if one else None)

    def run() -> list[Any]:
        if decoder is None:
            return [decode_with_pillow(data) for data in images]
        decoded: list[Any] = []
        for i in range(0, len(images), BATCH):
            decoded += decoder.decode(images[i : i + BATCH])
        synchronize(device)
        return decoded

    for expected, found in zip(pillow_pixels(shards), run(), strict=True):
        apart = (found.cpu().int() - expected.int()).abs()
        if form == "torchvision":  # repeats chroma, which changes few pixels by much
            assert apart.float().mean() <= 3, f"off by {apart.float().mean():.2f} in the mean"
        else:
            assert apart.max() <= (3 if uses_nvjpeg(form, device) else 0), f"off by {apart.max()}"
    benchmark.group = f"decoding, {device}"
    benchmark.extra_info["decoder"] = "Pillow" if decoder is None else str(decoder)
    slow = one and device == "cuda"  # few rounds, warmed up by the check
    benchmark.pedantic(run, **(rounds(2, 0) if slow else rounds(5, 1)))
    report(benchmark, len(images), len(images))
    if decoder is not None:
        decoder.close()


@pytest.mark.parametrize("device", DEVICES)
def test_decoding_and_views(benchmark: Any, shards: Path, device: str) -> None:
    """The time of one batch without overlap."""
    skip_unavailable("", device)
    scenes = scenes_of(shards)[:BATCH]
    encoded = [scene.image for scene in scenes]
    decoder = make_decoder("auto", device_for(device))

    def run() -> Tensor:
        images = decoder.decode(encoded)  # type: ignore[arg-type]
        sizes = [tuple(image.shape[:2]) for image in images]  # type: ignore[union-attr]
        views = render_views(images, Views.of_scenes(scenes, train=True, sizes=sizes), size=SIZE)  # type: ignore[arg-type]
        synchronize(device)
        return views

    expected = render_views(pixels_of(scenes), Views.of_scenes(scenes, train=True), size=SIZE)
    check(run(), expected, uses_nvjpeg(decoder.name, device))
    benchmark.group = f"decoding and views, {device}"
    benchmark.extra_info |= {"form": "ours", "decoder": str(decoder)}
    benchmark.pedantic(run, **rounds(5, 1))
    report(benchmark, BATCH, len(expected))
    decoder.close()


@pytest.mark.parametrize(("form", "device"), cases(*LOADERS))
def test_whole_batches(benchmark: Any, shards: Path, form: str, device: str) -> None:
    skip_unavailable(form, device)
    if device == "cuda" and "drawn" in form:
        pytest.skip("takes half a minute on the host and does not use the GPU: measured on CPUs")
    with ExitStack() as stack:
        loader = LOADERS[form](shards, device)
        if isinstance(loader, OurLoader):
            stack.callback(loader.close)
            benchmark.extra_info["decoder"] = loader.decoder
        views = 0

        def epoch() -> None:
            nonlocal views
            views = sum(len(pixels) for pixels in loader)
            synchronize(device)

        # Check the whole epoch, which also warms up. Writing the published PNGs precedes training and is not timed.
        expected, batches = expected_batches(shards, device), -(-len(ShardSet(shards)) // BATCH)
        for i, pixels in enumerate(loader):
            if i % batches < len(expected):
                check(pixels, expected[i % batches], uses_nvjpeg(form, device))
        benchmark.group = f"whole batches, {device}"
        if "published" in form:
            benchmark.pedantic(epoch, **rounds(1 if device == "cuda" else 2, 0))
        elif "cached" in form:
            assert isinstance(loader, OurLoader)
            benchmark.pedantic(epoch, setup=loader.reopen, **rounds(3, 0))
        else:
            benchmark.pedantic(epoch, **rounds(5 if device == "cuda" else 9, 1))
    epochs = CACHED_EPOCHS if "cached" in form else (PUBLISHED_EPOCHS if "published" in form else EPOCHS)[device]
    report(benchmark, len(ShardSet(shards)) * epochs, views)


def scenes_of(shards: Path) -> list[Scene]:
    data = ShardSet(shards)
    return [data.read(i) for i in range(len(data))]


def report(benchmark: Any, scenes: int, views: int) -> None:
    benchmark.extra_info |= {"scenes": scenes, "views": views}
    if benchmark.stats is not None:  # None with --benchmark-disable
        seconds = benchmark.stats.stats.median
        print(f"\n{benchmark.name}: {scenes / seconds:.1f} scenes/s, {views / seconds:.0f} views/s")
