"""Loader settings. Imports no torch, so that configs load fast."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from scenarioclip_fast.data.remote import CACHE_GIB
from scenarioclip_fast.errors import UserError

MAX_PIXELS = 1 << 26  # 201 MB of RGB: above any camera, far below a decompression bomb

DecoderName = Literal["auto", "dali", "torch"]
ObjectView = Literal["masked", "crop"]
RelationView = Literal["focused", "box", "scene"]
Blur = Literal["rgb", "reference"]
_CHOICES: dict[str, Any] = {
    "object_view": ObjectView,
    "relation_view": RelationView,
    "blur": Blur,
    "decoder": DecoderName,
}


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How `scene_loader` turns packed scenes into pixels, and the resources it may use.

    Raises:
        UserError: a value out of range; the message names the field.
    """

    object_view: ObjectView = "masked"  # see Views.of_scenes
    relation_view: RelationView = "focused"  # "box", "scene": ablations without focused regions
    blur: Blur = "rgb"  # around a relation's masks; "reference" is the published quirk
    augment: bool = True  # random crops, colour jitter and blur; False: evaluation views
    decoder: DecoderName = "auto"  # "auto": DALI on a GPU where it is installed, else "torch"
    prefetch: int = 2  # batches prepared ahead by background threads; 0: each is prepared on request
    threads: int | None = None  # for reading and decoding; null: one per core, at most 16
    cache_gib: float = 0.0  # memory of the device for decoded images, for data sets of few scenes
    shard_cache_dir: str | None = None  # local cache of remote shards; null: ~/.cache/scenarioclip-fast/shards
    shard_cache_gib: float = CACHE_GIB  # size limit of that cache; scenes of other shards are read one by one
    max_pixels: int = MAX_PIXELS  # larger images are rejected by their header
    max_bad_fraction: float = 0.1  # a larger share of unusable scenes ends the run

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            _check(value in get_args(choices), name, value, f"one of {', '.join(get_args(choices))}")
        _check(self.prefetch >= 0, "prefetch", self.prefetch, "at least 0")
        _check(self.threads is None or self.threads >= 1, "threads", self.threads, "at least 1, or null")
        _check(0 <= self.cache_gib < math.inf, "cache_gib", self.cache_gib, "at least 0")
        _check(self.shard_cache_gib >= 0, "shard_cache_gib", self.shard_cache_gib, "at least 0")
        _check(self.max_pixels >= 1, "max_pixels", self.max_pixels, "at least 1")
        _check(0 <= self.max_bad_fraction <= 1, "max_bad_fraction", self.max_bad_fraction, "a share from 0 to 1")


def _check(good: bool, name: str, got: object, expected: str) -> None:
    if not good:
        raise UserError(f"{name}: got {got!r}, expected {expected}")
