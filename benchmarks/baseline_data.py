"""The baseline's data loading: how the method's published code reads a scene, reimplemented from its description.

A map-style dataset over the published layout (a JPEG per image, a PNG per relation), read with Pillow in the worker
processes of PyTorch's DataLoader. Focused regions are computed once with SciPy and stored as PNGs, as published
(`regions="read"`), or computed on the fly (`regions="computed"`).

Tests and benchmarks compare against it. It renders the evaluation views: the published augmentation uses other random
numbers than this package, and omitting it favours the baseline. From the package it uses only the scenes.
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
    """Metadata of a scene: paths and boxes; masks only if regions are computed on the fly."""

    image: Path
    boxes: list[tuple[float, float, float, float]]
    regions: list[Path]
    masks: list[tuple[NDArray[np.bool_], NDArray[np.bool_]]]


def write_published(
    scenes: Iterable[Scene], folder: Path, regions: Literal["read", "computed"] = "read"
) -> list[Entry]:
    """Write images and, with "read", focused regions in the published layout; return the entries."""
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
        return Entry(image, [o.box for o in scene.objects], paths, pairs if regions == "computed" else [])

    with ThreadPoolExecutor() as pool:  # not timed
        return list(pool.map(write, itertools.count(), scenes))


def encoded(pixels: Tensor) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(out, "JPEG", quality=90)
    return out.getvalue()


def as_array(mask: Any) -> NDArray[np.bool_]:
    return (rle.decode(mask) if isinstance(mask, dict) else mask).numpy()


class PublishedScenes(Dataset[Levels]):
    """The views of each scene, rendered as in the published code."""

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
    x1, y1, x2, y2 = map(int, box)
    inside = np.s_[y1:y2, x1:x2]
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
    """Resize the short side to `size`, centre-crop, normalise."""
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


class PublishedLoader:
    """A loader over the entries in order; each iteration is one epoch.

    Workers persist across epochs: benchmark epochs are short, and starting workers by fork makes the first writes to
    the weights slow, which would not matter in a real epoch.
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
