"""The order of scenes: a pure function of (seed, epoch), the same for every number of ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from scenarioclip_fast.data.splitmix64 import hash64, splitmix64


def epoch_order(scenes: int, seed: int, epoch: int, shuffle: bool = True) -> npt.NDArray[np.int64]:
    """The order [scenes] of an epoch. Sorted by a hash, which is stable across library versions, unlike a shuffle."""
    index = np.arange(scenes, dtype=np.int64)
    if not shuffle:
        return index
    return np.argsort(splitmix64(index.astype(np.uint64) ^ np.uint64(hash64(seed, epoch))), kind="stable")


@dataclass(frozen=True)
class Order:
    """How an epoch is divided among ranks.

    With W ranks of B scenes each, global batch k holds positions [k B W, (k + 1) B W) of the epoch's order, and rank r
    gets every W-th of them, starting at r. The global order is thus the same for any number of ranks, and shares differ
    by at most one scene.
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
        """This rank's scenes [n] from `position` to the end of the epoch, including those that `drop_last` drops."""
        order = epoch_order(self.scenes, self.seed, epoch, self.shuffle)
        return order[position:][self.rank :: self.world_size]
