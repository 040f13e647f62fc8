"""Measures a section's start-up time: imports, collection and probes until its actual work begins.

A section writes it to a file beside its log, whose path it gets from the environment.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

_VARIABLE = "SCENARIOCLIP_FAST_START_UP"  # "start time:file"


def variable(log: Path) -> dict[str, str]:
    """The environment variable for a process that starts now."""
    return {_VARIABLE: f"{time.time()}:{log.with_suffix('.start-up')}"}


def note() -> None:
    """Record that the actual work begins now; does nothing outside `make gpu`."""
    started, _, path = os.environ.pop(_VARIABLE, "").partition(":")
    if path:
        with open(path, "a") as file:
            file.write(f"{time.time() - float(started):.3f}\n")


def seconds(log: Path) -> float | None:
    """Total start-up time of the processes with this log; None if none recorded it."""
    path = log.with_suffix(".start-up")
    return sum(map(float, path.read_text().split())) if path.exists() else None
