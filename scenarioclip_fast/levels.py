"""The three levels of a scene, in the order of every per-level list."""

from __future__ import annotations

LEVELS = ("global", "object", "relation")


def check_level(level: str) -> str:
    """Return `level`. Raises ValueError if it is not one of LEVELS."""
    if level not in LEVELS:
        raise ValueError(f"level: got {level!r}, expected one of {', '.join(LEVELS)}")
    return level
