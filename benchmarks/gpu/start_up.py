"""How long a section takes until its own work begins: imports, collection, probes.

A section notes it in a file that its environment names, beside its log.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

_VARIABLE = "SCENARIOCLIP_FAST_START_UP"  # when the process was started, and the file


def variable(log: Path) -> dict[str, str]:
    """What a process that starts now must have in its environment."""
    return {_VARIABLE: f"{time.time()}:{log.with_suffix('.start-up')}"}


def note() -> None:
    """Says that the work begins now; does nothing outside of `make gpu`."""
    began, _, path = os.environ.pop(_VARIABLE, "").partition(":")
    if path:
        with open(path, "a") as file:
            file.write(f"{time.time() - float(began):.3f}\n")


def seconds(log: Path) -> float | None:
    """Of all processes with this log; None where none got as far."""
    path = log.with_suffix(".start-up")
    return sum(map(float, path.read_text().split())) if path.exists() else None
