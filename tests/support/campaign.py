"""The length of the fault-injection tests: a few trials each in `make test`, many in `make faults`."""

from __future__ import annotations

import os
import random
from pathlib import Path

LONG = os.environ.get("SCENARIOCLIP_FAST_FAULTS") == "1"
SEED = int(os.environ.get("SCENARIOCLIP_FAST_FAULTS_SEED", "0"))


def trials(short: int, long: int) -> int:
    """The number of trials of a test."""
    return long if LONG else short


def generator(name: str) -> random.Random:
    """The random numbers of the test `name`; the same in every run with the same SCENARIOCLIP_FAST_FAULTS_SEED."""
    return random.Random(f"{SEED} {name}")


def flip_a_bit(path: Path, rng: random.Random) -> str:
    """Flip a random bit of a file; return which."""
    data = bytearray(path.read_bytes())
    byte, bit = rng.randrange(len(data)), rng.randrange(8)
    data[byte] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {byte} of {path.name}"
