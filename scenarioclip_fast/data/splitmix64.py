"""SplitMix64 on NumPy arrays: hashes and random numbers that do not depend on the machine or library versions.

Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_U64 = npt.NDArray[np.uint64]
_MASK = 2**64 - 1
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
        state = splitmix64(state ^ np.uint64(value & _MASK))
    return int(state[0])


def hash_text(text: bytes) -> int:
    """Hash a text to 64 bits, eight bytes at a time; see `hash_texts`."""
    state = len(text)
    for start in range(0, len(text), 8):
        state ^= int.from_bytes(text[start : start + 8], "little")
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def hash_texts(
    texts: bytes,  # one after the other
    ends: npt.NDArray[np.integer[Any]],  # [n]
) -> _U64:  # [n]
    """Hash texts to 64 bits each, as `hash_text` does."""
    lengths = np.diff(ends.astype(np.int64), prepend=0)
    words = -(-int(lengths.max(initial=0)) // 8)
    padded = np.zeros((len(ends), words * 8), np.uint8)
    padded[np.arange(words * 8) < lengths[:, None]] = np.frombuffer(texts, np.uint8)
    state = lengths.astype(np.uint64)
    for word, column in enumerate(padded.view("<u8").T):
        state = np.where(word * 8 < lengths, splitmix64(state ^ column), state)
    return state


def uniforms(
    state: _U64,  # [n]
    count: int,
) -> npt.NDArray[np.float64]:  # [n, count] in [0, 1)
    """Return the first `count` outputs for each state, as floats. Stateless: rows can be computed in any order."""
    step = np.arange(1, count + 1, dtype=np.uint64) * _GAMMA
    bits = mix(state[:, None] + step)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
