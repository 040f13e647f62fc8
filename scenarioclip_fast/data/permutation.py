"""Random permutations whose elements are computed one by one, in memory that does not depend on their length."""

from __future__ import annotations

import math
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from scenarioclip_fast.data.splitmix64 import hash64, splitmix64

_Numbers = npt.NDArray[np.int64]

# Below this, sorting takes a few milliseconds. Some permutations of a few elements are unlikely in a Feistel network.
_SORTED = 1 << 16
_ROUNDS = 8


def hash_order(n: int, key: int) -> _Numbers:
    """Return n numbers sorted by a hash, which is the same in all versions of NumPy, unlike its shuffle."""
    return np.argsort(splitmix64(np.arange(n, dtype=np.uint64) ^ np.uint64(key)), kind="stable")


class Permutation:
    """A permutation of the numbers from 0 to n - 1, determined by a key.

    It is a Feistel network over pairs (l, r) of l < a and r < b, where a b is at least n: each round adds to one half,
    modulo its size, a hash of the other. A number that falls outside [0, n) is permuted again until it lies inside,
    which keeps the map one-to-one; as a b < n + a, that is rare. See Black and Rogaway, "Ciphers with arbitrary finite
    domains", CT-RSA 2002.

    Args:
        n: at most 2^62.
        key: of 64 bits.
        by_sorting: sort by a hash instead, as always for a small n: takes O(n) memory.
    """

    def __init__(self, n: int, key: int, *, by_sorting: bool = False) -> None:
        self._n, self._key = n, key
        self._by_sorting = by_sorting or n <= _SORTED
        self._a = math.isqrt(max(n - 1, 0)) + 1
        self._b = -(-n // self._a)
        self._keys = [np.uint64(hash64(key, i)) for i in range(_ROUNDS)]

    @cached_property
    def _sorted(self) -> _Numbers:
        return hash_order(self._n, self._key)

    def __len__(self) -> int:
        return self._n

    def __call__(
        self,
        numbers: npt.NDArray[np.integer],  # [m], in [0, n)
    ) -> _Numbers:  # [m]
        """Return the elements at the positions `numbers`."""
        if self._by_sorting:
            return self._sorted[numbers]
        found = self._network(numbers.astype(np.uint64))
        while len(outside := np.flatnonzero(found >= np.uint64(self._n))):
            found[outside] = self._network(found[outside])
        return found.astype(np.int64)

    def _network(self, x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        a, b = np.uint64(self._a), np.uint64(self._b)
        left, right = x // b, x % b
        for i, key in enumerate(self._keys):
            if i % 2:
                right = (right + splitmix64(left ^ key) % b) % b
            else:
                left = (left + splitmix64(right ^ key) % a) % a
        return left * b + right


@lru_cache(maxsize=16)
def permutation(n: int, key: int, by_sorting: bool = False) -> Permutation:
    """Return a Permutation, kept for the next call with the same arguments."""
    return Permutation(n, key, by_sorting=by_sorting)
