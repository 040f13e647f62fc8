"""Loader settings. Does not import torch, so configs load fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scenarioclip_fast.config_types import check_types, expand_user
from scenarioclip_fast.data.remote import CACHE_GIB
from scenarioclip_fast.errors import UserError

MAX_PIXELS = 1 << 26  # 201 MB of RGB: more than any camera, far less than a decompression bomb

DecoderName = Literal["auto", "dali", "nvimgcodec", "torchvision", "torch"]
ObjectView = Literal["masked", "crop"]
RelationView = Literal["focused", "box", "scene"]
Blur = Literal["rgb", "reference"]


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How `scene_loader` turns packed scenes into pixels, and the resources it may use.

    Raises:
        UserError: a value has the wrong type or is out of range; the message names the field.
    """

    object_view: ObjectView = "masked"
    """Object views: the whole image, black outside the box (masked), or the box with a margin (crop)."""
    relation_view: RelationView = "focused"
    """Relation views: the focused region, or for ablations the box around both objects or the whole scene."""
    blur: Blur = "rgb"
    """Blur around the masks of a relation: spatial (rgb), or along the colour axis too, as published (reference)."""
    augment: bool = True
    """Random crops, colour jitter and blur; false: evaluation views."""
    decoder: DecoderName = "auto"
    """JPEG decoder; auto: on a GPU the first of dali, nvimgcodec and torchvision that is installed, otherwise torch."""
    prefetch: int | None = None
    """Batches that background threads prepare ahead of the step; 0: each is prepared on request; null: 2 on a GPU, 0
    on a CPU, where the step uses all cores."""
    threads: int | None = None
    """Threads for reading and decoding; null: one per core, at most 16."""
    cache_gib: float = 0.0
    """Device memory for cached decoded images, in GiB; useful for many epochs over a small data set."""
    shard_cache_dir: str | None = None
    """Local directory that caches shards read from a URL; null: ~/.cache/scenarioclip-fast/shards."""
    shard_cache_gib: float = CACHE_GIB
    """Size limit of that directory, in GiB; shards that do not fit are read scene by scene."""
    max_pixels: int = MAX_PIXELS
    """Images with more pixels are rejected, based on their header."""
    max_bad_fraction: float = 0.1
    """Fraction of unusable scenes above which the run ends with an error."""

    def __post_init__(self) -> None:
        check_types(self)
        expand_user(self, "shard_cache_dir")
        _check(self.prefetch is None or self.prefetch >= 0, "prefetch", self.prefetch, "at least 0, or null")
        _check(self.threads is None or self.threads >= 1, "threads", self.threads, "at least 1, or null")
        _check(self.cache_gib >= 0, "cache_gib", self.cache_gib, "at least 0")
        _check(self.shard_cache_gib >= 0, "shard_cache_gib", self.shard_cache_gib, "at least 0")
        _check(self.max_pixels >= 1, "max_pixels", self.max_pixels, "at least 1")
        _check(0 <= self.max_bad_fraction <= 1, "max_bad_fraction", self.max_bad_fraction, "a fraction from 0 to 1")


def _check(good: bool, name: str, got: object, expected: str) -> None:
    if not good:
        raise UserError(f"{name}: got {got!r}, expected {expected}")
