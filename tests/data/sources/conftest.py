"""Fixtures for data sets of annotation files: JPEGs, panoptic PNGs, and packing them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from scenarioclip_fast.data import PackReport, Scene, ShardSet, pack
from scenarioclip_fast.data.shards import SPLITS


@dataclass
class Packed:
    """A pack: its report, its scenes and splits by key, and (entry, reason) of each rejection."""

    report: PackReport
    scenes: dict[str, Scene]
    splits: dict[str, str]
    rejected: list[tuple[str, str]]
    details: list[str]


@pytest.fixture
def packed(tmp_path: Path) -> Callable[..., Packed]:
    """Pack a data set and read it back."""

    def run(source: Any, out: str = "out", **options: Any) -> Packed:
        directory = tmp_path / out
        report = pack(source, directory, progress=False, **{"allow_empty_level": True} | options)
        rows = [json.loads(line) for line in (directory / "rejected.jsonl").read_text().splitlines()]
        scenes: dict[str, Scene] = {}
        splits: dict[str, str] = {}
        for split in (split for split in SPLITS if report.splits[split]["scenes"]):
            shards = ShardSet(directory, split)
            for scene in map(shards.read, range(len(shards))):
                scenes[scene.key], splits[scene.key] = scene, split
        rejected = [(row["entry"], row["reason"]) for row in rows]
        return Packed(report, scenes, splits, rejected, [row["detail"] for row in rows])

    return run


@pytest.fixture
def write_jpeg() -> Callable[..., bytes]:
    """Write a JPEG of H x W noise, in a folder that is created."""

    def write(path: Path, height: int, width: int, seed: int = 0) -> bytes:
        import simplejpeg

        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data := bytes(simplejpeg.encode_jpeg(pixels)))
        return data

    return write


@pytest.fixture
def write_png() -> Callable[..., None]:
    """Write a panoptic PNG of ids [H, W], in a folder that is created."""

    def write(path: Path, ids: NDArray[np.int64], mode: str = "RGB") -> None:
        from PIL import Image

        pixels = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).convert(mode).save(path)

    return write


@pytest.fixture
def texts() -> Callable[[Scene], list[str]]:
    """The texts of a scene's relations."""

    def of(scene: Scene) -> list[str]:
        return [scene.relation_text(k) for k in range(len(scene.relations))]

    return of


@pytest.fixture
def rectangles() -> Callable[..., NDArray[np.int64]]:
    """A map of ids, [H, W], with a rectangle (id, x1, y1, x2, y2) over another."""

    def draw(height: int, width: int, *parts: Sequence[int]) -> NDArray[np.int64]:
        ids = np.zeros((height, width), np.int64)
        for id_, x1, y1, x2, y2 in parts:
            ids[y1:y2, x1:x2] = id_
        return ids

    return draw
