"""Loader settings and data sources. Does not import torch, so configs load fast."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any, Literal

from scenarioclip_fast.config_types import check_types, expand_user
from scenarioclip_fast.data.remote import CACHE_GIB
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import is_url
from scenarioclip_fast.suggest import nearest

MAX_PIXELS = 1 << 26  # 201 MB of RGB: more than any camera, far less than a decompression bomb

DecoderName = Literal["auto", "dali", "nvimgcodec", "torchvision", "torch"]
ObjectView = Literal["masked", "crop"]
RelationView = Literal["focused", "box", "scene"]
Blur = Literal["rgb", "reference"]
Shuffle = Literal["scenes", "shards", "sorted"]

MAX_WEIGHT = 1_000_000  # far above any use; a typing error should not exhaust the memory


@dataclass(frozen=True)
class ShardSource:
    """A packed data set of a mix.

    Attributes:
        path: directory written by `pack`, or its URL.
        weight: how many times each of its scenes occurs in an epoch. 0.5: half of the scenes, and the other half in the
            next epoch; 1.5: all of them, and half of them a second time.

    Raises:
        UserError: a value has the wrong type or is out of range; the message names the field.
    """

    path: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_types(self)
        expand_user(self, "path")
        _check(bool(self.path), "path", self.path, "a directory or a URL")
        listed = self.path.startswith(("[", "{"))
        _check(not listed, "path", self.path, "a path: write a list without quotes, or put ./ before such a name")
        good = 0 < self.weight <= MAX_WEIGHT
        _check(good, "weight", self.weight, f"above 0, and at most {MAX_WEIGHT}")


_Set = str | os.PathLike[str] | ShardSource
ShardsArgument = _Set | Sequence[_Set | Mapping[str, Any]]
"""A path or URL, or a list of paths, ShardSources and mappings of `path` and `weight`."""


def shard_sources(shards: ShardsArgument) -> tuple[ShardSource, ...]:
    """Convert the argument `shards` of a loader, or the value of data.shards, to at least one ShardSource.

    Raises:
        UserError: an empty list, a malformed entry, or two entries with the same path.
    """
    if isinstance(shards, str | os.PathLike | ShardSource):
        return (_source(shards, "shards"),)
    if not isinstance(shards, list | tuple):
        kind = "a mapping" if isinstance(shards, Mapping) else repr(shards)
        raise UserError(f"shards: got {kind}, expected a path, or a list such as [{{path: a, weight: 2}}, {{path: b}}]")
    if not shards:
        raise UserError("shards: got an empty list, expected at least one data set")
    sources = tuple(_source(entry, f"shards[{i}]") for i, entry in enumerate(shards))
    first: dict[str, int] = {}
    for i, source in enumerate(sources):
        same = source.path.rstrip("/") if is_url(source.path) else os.path.realpath(source.path)
        if (before := first.setdefault(same, i)) != i:
            raise UserError(
                f"shards[{i}]: got {source.path}, the same data set as {sources[before].path}: list it once, with the "
                "sum of both weights"
            )
    return sources


def _source(entry: Any, name: str) -> ShardSource:
    if isinstance(entry, ShardSource):
        return entry
    if isinstance(entry, Mapping):
        known = [f.name for f in fields(ShardSource)]
        for key in map(str, entry):
            if key not in known:
                near = nearest(key, known)
                hint = f"did you mean {near}?" if near else f"expected one of {', '.join(known)}"
                hint = "a space must follow the colon" if key.startswith(tuple(f"{k}:" for k in known)) else hint
                raise UserError(f"{name}: unknown key {key!r}: {hint}")
        if "path" not in entry:
            raise UserError(f"{name}: got no path, expected {{path: DIR, weight: NUMBER}}")
    elif not isinstance(entry, str | os.PathLike):
        raise UserError(f"{name}: got {entry!r}, expected a path, or a mapping of path and weight")
    values = dict(entry) if isinstance(entry, Mapping) else {"path": entry}
    if isinstance(weight := values.get("weight"), str):  # YAML 1.1 reads 1e-3 as text
        with suppress(ValueError):
            values["weight"] = float(weight)
    try:
        return ShardSource(**values)
    except UserError as error:
        where = f"{name}.{error}" if isinstance(entry, Mapping) else f"{name}{str(error).removeprefix('path')}"
        raise UserError(where) from None


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
    shuffle: Shuffle | None = None
    """Order of an epoch: a shuffle of all scenes (scenes); of the shards, and of the scenes within a window of shards,
    for storage with slow random reads (shards); or the order of earlier versions, which takes 16 bytes a scene
    (sorted); null: scenes, or the order of the run that is resumed."""
    shuffle_window: int = 64
    """Shards whose scenes are shuffled together; only with shuffle=shards."""
    balance: bool = True
    """Distribute the scenes of a batch over the ranks so that all get about the same number of views; only where they
    are shuffled, and for data sets packed by this version."""
    decoder: DecoderName = "auto"
    """JPEG decoder; auto: on a GPU the first of dali, nvimgcodec and torchvision that is installed, otherwise torch."""
    prefetch: int | None = None
    """Batches that background threads prepare ahead of the step; 0: each is prepared on request; null: 2 on a GPU, 0
    on a CPU, where the step uses all cores."""
    threads: int | None = None
    """Threads of each rank for reading and decoding; null: the cores of the host divided by its ranks, at most
    16."""
    cache_gib: float = 0.0
    """Device memory for cached decoded images, in GiB; useful for many epochs over a small data set."""
    shard_cache_dir: str | None = None
    """Directory on a local disk that caches shards read from a URL; null: ~/.cache/scenarioclip-fast/shards."""
    shard_cache_gib: float = CACHE_GIB
    """Size limit of that directory, in GiB; shards that do not fit are read scene by scene."""
    verify: bool = False
    """Check the SHA-256 of a shard at its first read in each process; scenes of a damaged shard are bad samples."""
    max_pixels: int = MAX_PIXELS
    """Images with more pixels are rejected, based on their header."""
    max_batch_gib: float = 8.0
    """Limit on the decoded images of a batch, in GiB. A batch that exceeds it ends the run before it is decoded."""
    max_bad_fraction: float = 0.1
    """Fraction of unusable scenes above which the run ends with an error."""

    def __post_init__(self) -> None:
        check_types(self)
        expand_user(self, "shard_cache_dir")
        _check(self.prefetch is None or self.prefetch >= 0, "prefetch", self.prefetch, "at least 0, or null")
        _check(self.shuffle_window >= 1, "shuffle_window", self.shuffle_window, "at least 1")
        _check(self.threads is None or self.threads >= 1, "threads", self.threads, "at least 1, or null")
        _check(self.cache_gib >= 0, "cache_gib", self.cache_gib, "at least 0")
        _check(self.shard_cache_gib >= 0, "shard_cache_gib", self.shard_cache_gib, "at least 0")
        _check(self.max_pixels >= 1, "max_pixels", self.max_pixels, "at least 1")
        _check(self.max_batch_gib > 0, "max_batch_gib", self.max_batch_gib, "above 0")
        _check(0 <= self.max_bad_fraction <= 1, "max_bad_fraction", self.max_bad_fraction, "a fraction from 0 to 1")


def _check(good: bool, name: str, got: object, expected: str) -> None:
    if not good:
        raise UserError(f"{name}: got {got!r}, expected {expected}")
