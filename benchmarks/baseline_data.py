"""The baseline's data: what the method's published code does to read a scene, written plainly from its description.

A map-style data set over the published layout (a JPEG per image, a PNG per relation) that reads with Pillow, in the
worker processes of torch's DataLoader. The focused regions are drawn once with SciPy and kept as PNGs, as published
(`regions="read"`), or drawn whenever they are wanted (`regions="drawn"`), which needs no disk but time.

It is the yardstick of tests and benchmarks. Evaluation's views: the published augmentation draws from other random
numbers than ours, and leaving it out spares the baseline time. Of the package it uses the scenes alone.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from scenarioclip_fast.data import rle
from scenarioclip_fast.data.scene import Scene

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
Levels = tuple[Tensor, Tensor, Tensor]  # a scene's views [1, ...], [N_o, ...], [N_r, ...]


@dataclass(frozen=True)
class Entry:
    """A scene of the metadata: paths and boxes; masks only where regions are drawn."""

    image: Path
    boxes: list[tuple[float, float, float, float]]
    regions: list[Path]
    masks: list[tuple[NDArray[np.bool_], NDArray[np.bool_]]]


def write_published(scenes: Iterable[Scene], folder: Path, regions: Literal["read", "drawn"] = "read") -> list[Entry]:
    """Writes images and focused regions as the published code finds them; returns their entries."""
    folder.mkdir(parents=True, exist_ok=True)

    def write(i: int, scene: Scene) -> Entry:
        image = folder / f"{i}.jpg"
        image.write_bytes(scene.image if isinstance(scene.image, bytes) else encoded(scene.image))
        pixels = np.asarray(Image.open(image).convert("RGB"))
        masks = [None if o.mask is None else as_array(o.mask) for o in scene.objects]
        pairs: list[Any] = [(masks[r.subject], masks[r.object]) for r in scene.relations]
        paths = [folder / f"{i}_{k}.png" for k in range(len(pairs))]
        if regions == "read":
            for path, pair in zip(paths, pairs, strict=True):
                Image.fromarray(focused_region(pixels, *pair)).save(path)
        return Entry(image, [o.box for o in scene.objects], paths, pairs if regions == "drawn" else [])

    with ThreadPoolExecutor() as pool:  # nothing of this is timed
        return list(pool.map(write, itertools.count(), scenes))


def encoded(pixels: Tensor) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(out, "JPEG", quality=90)
    return out.getvalue()


def as_array(mask: Any) -> NDArray[np.bool_]:
    return (rle.decode(mask) if isinstance(mask, dict) else mask).numpy()


class PublishedScenes(Dataset[Levels]):
    """One scene's views, made as in the published code."""

    def __init__(self, entries: list[Entry], size: int) -> None:
        self.entries, self.size = entries, size

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, i: int) -> Levels:
        entry = self.entries[i]
        image = Image.open(entry.image).convert("RGB")
        pixels = np.asarray(image)
        objects = [Image.fromarray(masked(pixels, box)) for box in entry.boxes]
        if entry.masks:
            regions = [Image.fromarray(focused_region(pixels, *pair)) for pair in entry.masks]
        else:
            regions = [Image.open(path).convert("RGB") for path in entry.regions]
        views = [[transform(p, self.size) for p in level] for level in ([image], objects, regions)]
        empty = torch.zeros(0, 3, self.size, self.size)
        return tuple(torch.stack(level) if level else empty for level in views)  # type: ignore[return-value]


def masked(pixels: NDArray[np.uint8], box: tuple[float, float, float, float]) -> NDArray[np.uint8]:
    out = np.zeros_like(pixels)
    inside = np.s_[int(box[1]) : int(np.ceil(box[3])), int(box[0]) : int(np.ceil(box[2]))]
    out[inside] = pixels[inside]
    return out


def focused_region(pixels: NDArray[np.uint8], *masks: NDArray[np.bool_]) -> NDArray[np.uint8]:
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


def transform(image: Image.Image, size: int) -> Tensor:
    """Short side to `size`, middle cut out, normalised."""
    scale = size / min(image.size)
    width, height = (max(size, int(n * scale + 1e-6)) for n in image.size)
    left, top = (round((n - size) / 2) for n in (width, height))
    image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    pixels = torch.from_numpy(np.asarray(image).astype(np.float32) / 255).permute(2, 0, 1)
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return (pixels - mean) / std


def collate(scenes: list[Levels]) -> Tensor:
    """[V, 3, S, S]: all global, then all object, then all relation views."""
    return torch.cat([view for level in zip(*scenes, strict=True) for view in level])


class Published:
    """A loader whose every iteration is an epoch, in the order of the entries.

    Its workers start with the first epoch and stay: those of a benchmark are short, and after a fork the trainer's
    first writes to its weights are slow, which in a real epoch is nothing.
    """

    def __init__(self, entries: list[Entry], size: int, batch: int, workers: int, device: str = "cpu") -> None:
        self.device = device
        self.loader = DataLoader(
            PublishedScenes(entries, size),
            batch,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=collate,
            pin_memory=device == "cuda",
        )

    def __iter__(self) -> Iterator[Tensor]:
        for pixels in self.loader:
            yield pixels.to(self.device, non_blocking=True)
