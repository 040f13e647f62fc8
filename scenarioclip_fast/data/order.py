"""The order of scenes: a pure function of (seed, epoch), the same for every number of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from scenarioclip_fast.data.splitmix64 import hash64, splitmix64

_EXTRA = 1  # distinguishes the hash from that of an epoch's order


def epoch_order(scenes: int, seed: int, epoch: int, shuffle: bool = True) -> npt.NDArray[np.int64]:
    """The order [scenes] of an epoch. Sorted by a hash, which is stable across library versions, unlike a shuffle."""
    return _hash_order(scenes, hash64(seed, epoch)) if shuffle else np.arange(scenes, dtype=np.int64)


def _hash_order(n: int, key: int) -> npt.NDArray[np.int64]:
    return np.argsort(splitmix64(np.arange(n, dtype=np.uint64) ^ np.uint64(key)), kind="stable")


@dataclass(frozen=True)
class Mix:
    """How often the scenes of several sets occur in an epoch.

    The scenes of all sets are numbered consecutively, from 0 to N - 1. An epoch has round(weight * size) occurrences of
    a set's scenes, which are as even as possible: the whole part of the weight for every scene, and one more for a part
    of the scenes. That part moves on from epoch to epoch through a fixed random order of the set, so that over 1 / f
    epochs each scene is in it once, where f is the fractional part of the weight.

    Attributes:
        sizes: number of scenes of each set.
        weights: occurrences per scene and epoch of each set.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]

    def __len__(self) -> int:
        """Occurrences per epoch."""
        return sum(self.counts)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Occurrences of each set's scenes per epoch."""
        return tuple(round(weight * size) for size, weight in zip(self.sizes, self.weights, strict=True))

    @property
    def is_weighted(self) -> bool:
        """Whether some set has another weight than 1."""
        return any(weight != 1 for weight in self.weights)

    def occurrences(self, seed: int, epoch: int) -> npt.NDArray[np.int64]:
        """The occurrences [len(self)] of an epoch, set by set: s + r N for occurrence r, from 0, of scene s."""
        total, first = sum(self.sizes), 0
        parts: list[npt.NDArray[np.int64]] = []
        for number, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            whole, extra = divmod(count, max(size, 1))
            parts.append(first + np.add.outer(np.arange(whole) * total, np.arange(size)).ravel())
            if extra:
                turn = _hash_order(size, hash64(seed, number, _EXTRA))
                parts.append(first + whole * total + turn[(epoch * extra + np.arange(extra)) % size])
            first += size
        return np.concatenate(parts)


@dataclass(frozen=True)
class Order:
    """How an epoch is divided among ranks.

    With W ranks of B scenes each, global batch k holds positions [k B W, (k + 1) B W) of the epoch's order, and rank r
    gets every W-th of them, starting at r. The global order is thus the same for any number of ranks, and shares differ
    by at most one scene.

    Attributes:
        scenes: occurrences of scenes per epoch.
        mix: how often each scene occurs in an epoch; None: once.
    """

    scenes: int
    batch_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    shuffle: bool = True
    drop_last: bool = True
    mix: Mix | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size: got {self.batch_size}, expected at least 1")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank: got {self.rank} of world_size {self.world_size}, expected 0 <= rank < world_size")

    def __len__(self) -> int:
        """Batches per epoch, the same on every rank."""
        return self.batches()

    @property
    def global_batch(self) -> int:
        """Scenes per batch, summed over all ranks."""
        return self.batch_size * self.world_size

    def batches(self, position: int = 0) -> int:
        """Batches that remain on every rank after `position` scenes of the epoch."""
        left = max(0, self.scenes - position)
        return left // self.global_batch if self.drop_last else -(-left // self.global_batch)

    def share(self, epoch: int, position: int = 0) -> npt.NDArray[np.int64]:
        """This rank's scenes [n] from `position` to the end of the epoch, including those that `drop_last` drops.

        With a mix they are occurrences of scenes, as `Mix.occurrences` numbers them.
        """
        order = epoch_order(self.scenes, self.seed, epoch, self.shuffle)
        share = order[position:][self.rank :: self.world_size]
        return share if self.mix is None else self.mix.occurrences(self.seed, epoch)[share]
