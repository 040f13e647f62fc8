"""A rank's share of an epoch: every W-th scene, or as many of each global batch with balanced numbers of views.

A step takes as long as on the rank with most views. As the loss covers the scenes of all ranks, it does not depend on
which rank has which.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

_Numbers = npt.NDArray[np.int64]


class Share:
    """A rank's share of an epoch's order, computed as it is read.

    Args:
        at: returns the occurrences at given positions of the epoch.
        positions: those of this rank.

    Attributes:
        chunk: scenes to read at once.
    """

    chunk = 4096

    def __init__(self, at: Callable[[_Numbers], _Numbers], positions: range) -> None:
        self._at, self._positions = at, positions

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, part: slice) -> _Numbers:
        positions = self._positions[part]
        return self._at(np.arange(positions.start, positions.stop, positions.step))

    def skip(self, n: int) -> Share:
        """The share without its first n scenes."""
        return Share(self._at, self._positions[n:])

    def tolist(self) -> list[int]:
        return [i for start in range(0, len(self), self.chunk) for i in self[start : start + self.chunk].tolist()]


class BalancedShare(Share):
    """A rank's share of the rest of an epoch, of which it has a batch of every global batch.

    Args:
        at: returns the occurrences at given positions of the epoch.
        positions: of all ranks, from the start of a global batch on.
        views: [scenes] of each scene; occurrence i is one of scene i % scenes.
        batch_size: scenes of a rank in a global batch.
    """

    def __init__(
        self,
        at: Callable[[_Numbers], _Numbers],
        positions: range,
        views: npt.NDArray[np.uint8],
        batch_size: int,
        rank: int,
        ranks: int,
        skipped: int = 0,
    ) -> None:
        super().__init__(at, positions)
        self._views, self._batch_size, self._rank, self._ranks = views, batch_size, rank, ranks
        self._skipped = skipped
        self.chunk = batch_size  # to compute one, those of the other ranks are computed, too
        self._latest: tuple[int, _Numbers] | None = None  # of which a slice may need only a part

    def __len__(self) -> int:
        return max(len(self._positions[self._rank :: self._ranks]) - self._skipped, 0)

    def __getitem__(self, part: slice) -> _Numbers:
        wanted = range(self._skipped, self._skipped + len(self))[part]
        if not wanted:
            return np.empty(0, np.int64)
        first, last = wanted[0] // self._batch_size, wanted[-1] // self._batch_size
        own = np.concatenate([self._batch(number) for number in range(first, last + 1)])
        return own[np.arange(wanted.start, wanted.stop, wanted.step) - first * self._batch_size]

    def _batch(self, number: int) -> _Numbers:
        """This rank's scenes of a global batch, in the order of the epoch."""
        if self._latest is not None and self._latest[0] == number:
            return self._latest[1]
        size = self._batch_size * self._ranks
        positions = self._positions[number * size : (number + 1) * size]
        found = self._at(np.arange(positions.start, positions.stop))
        own = found[assign(self._views[found % len(self._views)], self._ranks) == self._rank]
        self._latest = number, own
        return own

    def skip(self, n: int) -> BalancedShare:
        """The share without its first n scenes."""
        return BalancedShare(
            self._at, self._positions, self._views, self._batch_size, self._rank, self._ranks, self._skipped + n
        )


def assign(views: npt.NDArray[np.uint8], ranks: int) -> npt.NDArray[np.int64]:  # [n] -> [n]
    """Return the rank of each scene, given its number of views.

    Ranks get equally many scenes; if n is not a multiple of their number, the first n % ranks get one more. From the
    largest on, `ranks` scenes at a time are given to the ranks, the largest of them to the rank with fewest views yet.
    """
    order = np.argsort(255 - views, kind="stable")
    out = np.empty(len(views), np.int64)
    loads = np.zeros(ranks, np.int64)
    for start in range(0, len(order), ranks):
        scenes = order[start : start + ranks]
        to = np.argsort(loads[: len(scenes)], kind="stable")
        out[scenes] = to
        loads[to] += views[scenes]
    return out
