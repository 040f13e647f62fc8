"""The length of the fault-injection tests: a few trials each in `make test`, many in `make faults`."""

from __future__ import annotations

import os
import random

LONG = os.environ.get("SCENARIOCLIP_FAST_FAULTS") == "1"
SEED = int(os.environ.get("SCENARIOCLIP_FAST_FAULTS_SEED", "0"))


def trials(short: int, long: int) -> int:
    """The number of trials of a test."""
    return long if LONG else short


def generator(name: str) -> random.Random:
    """The random numbers of the test `name`; the same in every run with the same SCENARIOCLIP_FAST_FAULTS_SEED."""
    return random.Random(f"{SEED} {name}")
