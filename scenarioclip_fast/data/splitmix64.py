"""SplitMix64 on NumPy arrays: hashes and random numbers that do not depend on the machine or library versions.

Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_U64 = npt.NDArray[np.uint64]
_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def mix(x: _U64) -> _U64:
    """Apply the output function of SplitMix64, a bijection on 64 bits, to each element."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def splitmix64(state: _U64) -> _U64:
    """Return the generator's next output for each state."""
    return mix(state + _GAMMA)


def hash64(*values: int) -> int:
    """Hash a sequence of integers, each taken modulo 2^64, to 64 bits."""
    state = np.zeros(1, np.uint64)
    for value in values:
        state = splitmix64(state ^ np.uint64(value & (2**64 - 1)))
    return int(state[0])


def uniforms(
    state: _U64,  # [n]
    count: int,
) -> npt.NDArray[np.float64]:  # [n, count] in [0, 1)
    """Return the first `count` outputs for each state, as floats. Stateless: rows can be computed in any order."""
    step = np.arange(1, count + 1, dtype=np.uint64) * _GAMMA
    bits = mix(state[:, None] + step)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
