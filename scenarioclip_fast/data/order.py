"""The order of scenes: a pure function of (seed, epoch), the same for every number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from scenarioclip_fast.data.permutation import Permutation, hash_order, permutation
from scenarioclip_fast.data.shares import BalancedShare, Share
from scenarioclip_fast.data.splitmix64 import hash64

_Numbers = npt.NDArray[np.int64]
Kind = Literal["scenes", "shards", "sorted", "none"]
"""How an epoch is shuffled: all scenes; the shards, and the scenes of a window of shards; all scenes by a sort, as in
version 0.0, which takes 16 bytes a scene; or not at all."""

_EXTRA, _SHARDS, _WINDOW = 1, 2, 3  # distinguish hashes from those of an epoch's order


@dataclass(frozen=True)
class Mix:
    """How often the scenes of several sets occur in an epoch.

    The scenes of all sets are numbered consecutively, from 0 to N - 1. An epoch has round(weight * size) occurrences of
    a set's scenes, which are as even as possible: the whole part of the weight for every scene, and one more for a part
    of the scenes. That part moves on from epoch to epoch through a fixed random order of the set, so that over 1 / f
    epochs each scene is in it once, where f is the fractional part of the weight.

    Occurrence r, from 0, of scene s has the number s + r N.

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

    def occurrences(self, seed: int, epoch: int, at: _Numbers | None = None, by_sorting: bool = False) -> _Numbers:
        """Return the occurrences of an epoch, set by set.

        Args:
            at: [n] return those at these positions only; None: all.
            by_sorting: the fixed random order of a set is a sort by a hash.
        """
        at = np.arange(len(self)) if at is None else at
        if not self.is_weighted:
            return at
        total, first = sum(self.sizes), np.concatenate([[0], np.cumsum(self.sizes)])
        start = np.concatenate([[0], np.cumsum(self.counts)])
        number = start[1:].searchsorted(at, "right")
        found = np.empty(len(at), np.int64)
        for k in np.unique(number).tolist():
            rows = np.flatnonzero(number == k)
            size = self.sizes[k]
            whole, extra = divmod(self.counts[k], size)
            repeat, scene = np.divmod(at[rows] - start[k], size)
            if len(moving := np.flatnonzero(repeat == whole)):
                turn = permutation(size, hash64(seed, k, _EXTRA), by_sorting)
                scene[moving] = turn((epoch * extra + scene[moving]) % size)
            found[rows] = first[k] + scene + repeat * total
        return found

    def runs(self, seed: int, epoch: int, shards: Sequence[_Numbers]) -> tuple[_Numbers, _Numbers]:
        """Return the occurrences of an epoch as runs within a shard: the first of each run, and its length.

        Here the part of the scenes that a fractional weight adds moves on through a fixed random order of the shards.

        Args:
            shards: the number of scenes of each shard of each set.
        """
        total, first = sum(self.sizes), 0
        runs: list[tuple[_Numbers, _Numbers]] = [(np.empty(0, np.int64), np.empty(0, np.int64))]
        for number, (size, count, lengths) in enumerate(zip(self.sizes, self.counts, shards, strict=True)):
            start = first + np.cumsum(lengths) - lengths
            whole, extra = divmod(count, max(size, 1))
            runs += [(start + repeat * total, lengths) for repeat in range(whole)]
            if extra:
                turn = hash_order(len(lengths), hash64(seed, number, _EXTRA))
                end = np.cumsum(lengths[turn])
                begin = end - lengths[turn]
                moved = epoch * extra % size
                for low, high in ((moved, min(moved + extra, size)), (0, moved + extra - size)):
                    skipped = np.maximum(low - begin, 0)
                    taken = np.minimum(end, high) - begin - skipped
                    kept = taken > 0
                    runs.append(((start[turn] + whole * total + skipped)[kept], taken[kept]))
            first += size
        starts, counts = (np.concatenate(parts) for parts in zip(*runs, strict=True))
        return starts[counts > 0], counts[counts > 0]


class WindowedOrder:
    """Runs of consecutive scenes in a random order, and the scenes shuffled within each window of several runs.

    A window is read before the next one, so that storage serves a few shards at a time.
    """

    def __init__(self, starts: _Numbers, lengths: _Numbers, window: int, seed: int, epoch: int) -> None:
        order = hash_order(len(starts), hash64(seed, epoch, _SHARDS))
        self._starts, self._window, self._seed, self._epoch = starts[order], window, seed, epoch
        self._before = np.concatenate([[0], np.cumsum(lengths[order])])  # [runs + 1]
        self._bounds = np.append(self._before[:-1:window], self._before[-1])  # [windows + 1]

    def __call__(self, positions: _Numbers) -> _Numbers:
        windows = self._bounds[1:].searchsorted(positions, "right")
        found = np.empty(len(positions), np.int64)
        for w in np.unique(windows).tolist():
            rows = np.flatnonzero(windows == w)
            low, high = self._bounds[w : w + 2].tolist()
            shuffled = permutation(high - low, hash64(self._seed, self._epoch, w, _WINDOW))
            at = low + shuffled(positions[rows] - low)
            run = self._before.searchsorted(at, "right") - 1
            found[rows] = self._starts[run] + at - self._before[run]
        return found


@dataclass(frozen=True)
class Order:
    """How an epoch is divided among ranks.

    With W ranks of B scenes each, global batch k holds positions [k B W, (k + 1) B W) of the epoch's order. The global
    order is thus the same for any number of ranks. Rank r gets every W-th of these positions, starting at r, or with
    `views` as many of them that all ranks have about the same number of views. Shares differ by at most one scene.

    Attributes:
        mix: how often each scene occurs in an epoch.
        shuffle: see `Kind`.
        shards: the number of scenes of each shard of each set; only for "shards".
        window: shards whose scenes are shuffled together; only for "shards".
        views: of each scene, by which global batches are balanced; None: they are not.
    """

    mix: Mix
    batch_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    shuffle: Kind = "scenes"
    drop_last: bool = True
    shards: tuple[_Numbers, ...] = ()
    window: int = 64
    views: npt.NDArray[np.uint8] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size: got {self.batch_size}, expected at least 1")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank: got {self.rank} of world_size {self.world_size}, expected 0 <= rank < world_size")

    def __len__(self) -> int:
        """Batches per epoch, the same on every rank."""
        return self.batches()

    @property
    def scenes(self) -> int:
        """Occurrences of scenes per epoch."""
        return len(self.mix)

    @property
    def global_batch(self) -> int:
        """Scenes per batch, summed over all ranks."""
        return self.batch_size * self.world_size

    def batches(self, position: int = 0) -> int:
        """Batches that remain on every rank after `position` scenes of the epoch."""
        left = max(0, self.scenes - position)
        return left // self.global_batch if self.drop_last else -(-left // self.global_batch)

    def share(self, epoch: int, position: int = 0) -> Share:
        """This rank's scenes from `position` to the end of the epoch, including those that `drop_last` drops.

        They are occurrences of scenes, as `Mix` numbers them.
        """
        at, left = self.epoch(epoch), range(self.scenes)[position:]
        if self.views is not None and self.world_size > 1:
            return BalancedShare(at, left, self.views, self.batch_size, self.rank, self.world_size)
        return Share(at, left[self.rank :: self.world_size])

    def epoch(self, epoch: int) -> Callable[[_Numbers], _Numbers]:
        """A function that returns the occurrences at given positions of an epoch."""
        if self.shuffle == "shards":
            return WindowedOrder(*self.mix.runs(self.seed, epoch, self.shards), self.window, self.seed, epoch)
        by_sorting = self.shuffle == "sorted"
        # Not kept for later epochs: a sorted one takes memory.
        shuffled = Permutation(self.scenes, hash64(self.seed, epoch), by_sorting=by_sorting)

        def at(positions: _Numbers) -> _Numbers:
            if self.shuffle != "none":
                positions = shuffled(positions)
            return self.mix.occurrences(self.seed, epoch, positions, by_sorting)

        return at
