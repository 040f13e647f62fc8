"""Decoding, views and whole batches from packed shards, against the published way: a map-style data set that reads
with Pillow and draws focused regions with SciPy, in two worker processes of torch's DataLoader.

The scenes are the real photos where they are present (SCENARIOCLIP_FAST_PHOTOS), else drawn ones. The evaluation's
views, because the published augmentation draws from other random numbers; those of ours cost the same.

Run: make bench, or: pytest benchmarks/bench_data.py
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from scenarioclip_fast.data import ShardSet, Views, generate_scenes, pack, rle, scene_loader
from scenarioclip_fast.data.decode import decode_with_pillow, make_decoder
from scenarioclip_fast.data.scene import Scene
from scenarioclip_fast.ops import render_views
from scenarioclip_fast.ops.views import CLIP_MEAN, CLIP_STD

PHOTOS = Path(os.environ.get("SCENARIOCLIP_FAST_PHOTOS", Path(__file__).parents[2] / "shared" / "data" / "photos"))
SIZE, BATCH, WORKERS = 224, 32, 2
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "shards"
    source: Any = PHOTOS if PHOTOS.is_dir() else list(generate_scenes(128, seed=0))
    pack(source, folder, val=0, test=0, progress=False)
    return folder


class PublishedScenes(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """One scene's views [1, ...], [N_o, ...], [N_r, ...], made as in the published code."""

    def __init__(self, shards: Path) -> None:
        self.shards = ShardSet(shards)

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        scene = self.shards.read(i)
        image = Image.open(io.BytesIO(scene.image)).convert("RGB")  # type: ignore[arg-type]
        pixels = np.asarray(image)
        objects = [masked(pixels, o.box) for o in scene.objects]
        masks = [None if o.mask is None else rle.decode(o.mask).numpy() for o in scene.objects]  # type: ignore[arg-type]
        regions = [focused_region(pixels, masks[r.subject], masks[r.object]) for r in scene.relations]
        views = [[transform(Image.fromarray(p)) for p in level] for level in ([pixels], objects, regions)]
        empty = torch.zeros(0, 3, SIZE, SIZE)
        return tuple(torch.stack(level) if level else empty for level in views)  # type: ignore[return-value]


def masked(pixels: NDArray[np.uint8], box: tuple[float, float, float, float]) -> NDArray[np.uint8]:
    out = np.zeros_like(pixels)
    inside = np.s_[int(box[1]) : int(np.ceil(box[3])), int(box[0]) : int(np.ceil(box[2]))]
    out[inside] = pixels[inside]
    return out


def focused_region(pixels: NDArray[np.uint8], *masks: Any) -> NDArray[np.uint8]:
    from scipy.ndimage import center_of_mass, gaussian_filter

    y, x = np.mgrid[: pixels.shape[0], : pixels.shape[1]]
    centres = [center_of_mass(mask) for mask in masks]
    distances = [np.hypot(y - cy, x - cx) for cy, cx in centres]
    r1, r2 = (np.exp(-(d**2) / (2 * 100.0**2)) * m for d, m in zip(distances, masks, strict=True))
    weight = (r1 * distances[1] + r2 * distances[0]) / np.maximum(distances[0] + distances[1], 1e-12)
    region = gaussian_filter(pixels, sigma=2)
    inside = masks[0] | masks[1]
    region[inside] = (pixels * weight[:, :, None])[inside].astype(np.uint8)
    return region


def transform(image: Image.Image) -> Tensor:
    """Short side to SIZE, middle cut out, normalised."""
    scale = SIZE / min(image.size)
    width, height = (max(SIZE, int(n * scale + 1e-6)) for n in image.size)
    left, top = (round((n - SIZE) / 2) for n in (width, height))
    image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + SIZE, top + SIZE))
    pixels = torch.from_numpy(np.asarray(image).astype(np.float32) / 255).permute(2, 0, 1)
    mean, std = (torch.tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


def collate(scenes: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    return torch.cat([view for level in zip(*scenes, strict=True) for view in level])


def published(shards: Path, device: str) -> Iterator[Tensor]:
    loader = DataLoader(PublishedScenes(shards), BATCH, num_workers=WORKERS, collate_fn=collate)
    for pixels in loader:
        yield pixels.to(device)


def ours(shards: Path, device: str, **options: Any) -> Iterator[Tensor]:
    options = {"blur": "reference", "train": False, "shuffle": False, "drop_last": False, **options}
    with scene_loader(shards, BATCH, device=device, size=SIZE, **options) as loader:
        for batch in loader:
            yield batch.pixels


WHOLE: dict[str, Callable[[Path, str], Iterator[Tensor]]] = {
    "published": published,
    "ours, torch": lambda shards, device: ours(shards, device, decoder="torch"),
    "ours, dali": lambda shards, device: ours(shards, device, decoder="dali"),
    "ours, torch, cached": lambda shards, device: ours(shards, device, decoder="torch", cache_bytes=1 << 30, epochs=4),
}


def check(pixels: Tensor, expected: Tensor) -> None:
    """The renderer's promise: in bytes, one apart at most for 99.9 % of the values, never more than three."""
    std = torch.tensor(CLIP_STD)[:, None, None]
    apart = ((pixels.cpu() - expected) * std * 255).abs()
    assert apart.max() < 3.01 and (apart > 1.01).float().mean() < 1e-3, f"off by {apart.max():.2f} bytes"


def needs(way: str) -> None:
    if "dali" in way:
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", WHOLE)
def test_whole_batches(benchmark: Any, shards: Path, way: str, device: str) -> None:
    needs(way)
    views = 0

    def epoch() -> None:
        nonlocal views
        views = sum(len(pixels) for pixels in WHOLE[way](shards, device))
        if device == "cuda":
            torch.cuda.synchronize()

    # No time is reported for a wrong result. (nvJPEG rounds differently from libjpeg, so it has tests of its own.)
    if way != "published" and not (device == "cuda" and "dali" in way):
        dataset = PublishedScenes(shards)
        check(next(WHOLE[way](shards, device)), collate([dataset[i] for i in range(BATCH)]))
    benchmark.group = f"whole batches, {device}"
    benchmark.pedantic(epoch, rounds=1 if way == "published" else 3, warmup_rounds=int(way != "published"))
    epochs = 4 if "cached" in way else 1
    report(benchmark, len(ShardSet(shards)) * epochs, views)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", ["Pillow", "torch", "torch, one thread", "dali", "dali, one thread"])
def test_decoding(benchmark: Any, shards: Path, way: str, device: str) -> None:
    needs(way)
    images = [scene.image for scene in scenes_of(shards)]
    if way == "Pillow":
        if device == "cuda":
            pytest.skip("Pillow decodes on the CPU")
        run: Callable[[], Any] = lambda: [decode_with_pillow(data) for data in images]  # type: ignore[arg-type] # noqa: E731
    else:
        name, _, one = way.partition(",")
        decoder = make_decoder(name, device, threads=1 if one else None)

        def run() -> Any:
            return [decoder.decode(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]  # type: ignore[misc]

    benchmark.group = f"decoding, {device}"
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    report(benchmark, len(images), len(images))


@pytest.mark.parametrize("device", DEVICES)
def test_decoding_and_views(benchmark: Any, shards: Path, device: str) -> None:
    """What one batch costs when nothing overlaps."""
    scenes = scenes_of(shards)[:BATCH]
    encoded = [scene.image for scene in scenes]
    decoder = make_decoder("auto", device)

    def run() -> Tensor:
        images = decoder.decode(encoded)  # type: ignore[arg-type]
        sizes = [tuple(image.shape[:2]) for image in images]  # type: ignore[union-attr]
        return render_views(images, Views.of_scenes(scenes, train=True, sizes=sizes), size=SIZE)  # type: ignore[arg-type]

    benchmark.group = f"decoding and views, {device}"
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    report(benchmark, BATCH, len(run()))


def scenes_of(shards: Path) -> list[Scene]:
    data = ShardSet(shards)
    return [data.read(i) for i in range(len(data))]


def report(benchmark: Any, scenes: int, views: int) -> None:
    if benchmark.stats is not None:  # None with --benchmark-disable
        seconds = benchmark.stats.stats.median
        benchmark.extra_info |= {"scenes/s": round(scenes / seconds, 1), "views/s": round(views / seconds)}
        print(f"\n{benchmark.name}: {scenes / seconds:.1f} scenes/s, {views / seconds:.0f} views/s")
