"""Which scene comes when: a pure function of (seed, epoch), the same for every number of ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_U64 = npt.NDArray[np.uint64]


def mix(*values: int) -> int:
    """A 64-bit hash of integers (splitmix64, chained), the same on every machine and library version."""
    state = np.zeros(1, np.uint64)
    for value in values:
        state = _splitmix64(state ^ np.uint64(value & (2**64 - 1)))
    return int(state[0])


def epoch_order(scenes: int, seed: int, epoch: int, shuffle: bool = True) -> npt.NDArray[np.int64]:
    """The order [scenes] of an epoch. A sort by hash, unlike a library's shuffle, never changes with versions."""
    index = np.arange(scenes, dtype=np.int64)
    if not shuffle:
        return index
    return np.argsort(_splitmix64(index.astype(np.uint64) ^ np.uint64(mix(seed, epoch))), kind="stable")


def _splitmix64(x: _U64) -> _U64:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Order:
    """How an epoch is dealt to ranks.

    Global batch k is positions [k B W, (k + 1) B W) of the epoch's order, for W ranks of B scenes; rank r
    takes every W-th of them from r on. So any number of ranks walks through the same order, and shares
    differ by at most one scene.
    """

    scenes: int
    batch_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    shuffle: bool = True
    drop_last: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size: got {self.batch_size}, expected at least 1")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank: got {self.rank} of world_size {self.world_size}, expected 0 <= rank < world_size")

    def __len__(self) -> int:
        """Batches in an epoch, the same on every rank."""
        return self.batches()

    @property
    def global_batch(self) -> int:
        """Scenes of all ranks' batches together."""
        return self.batch_size * self.world_size

    def batches(self, position: int = 0) -> int:
        """How many batches every rank still gets in an epoch of which `position` scenes are consumed."""
        left = max(0, self.scenes - position)
        return left // self.global_batch if self.drop_last else -(-left // self.global_batch)

    def share(self, epoch: int, position: int = 0) -> npt.NDArray[np.int64]:
        """This rank's scenes from `position` to the epoch's end, including what `drop_last` leaves over."""
        order = epoch_order(self.scenes, self.seed, epoch, self.shuffle)
        return order[position:][self.rank :: self.world_size]
