"""How much memory a loss may keep from its forward to its backward pass in order to compute less."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager

from scenarioclip_fast.errors import UserError

# Per device type. No GPU backend keeps exponentials yet.
_AUTOMATIC = {"cpu": 2**28}
_MOST = 2**30  # GiB, so that bytes fit into the 64 bits of an op's argument

# In the order of entry, since contexts of several threads may overlap: the latest one that has not ended applies.
_budgets: dict[int, int] = {}  # bytes
_entries = itertools.count()


@contextmanager
def use_workspace(gib: float) -> Iterator[None]:
    """Let each contrastive loss keep up to `gib` GiB of exponentials for its backward pass; 0: none.

    A level of N rows and U texts whose N x U exponentials fit needs three matrix products instead of four. The budget
    holds for each call of a loss, over all of its levels: in order, each level is kept that fits into what is left.
    Without this context it is 256 MiB. Only backend `cpu` keeps exponentials, in float32 (float64 for float64 input);
    the others ignore the budget. Enclose the forward call; the backward call may be outside. Process-wide rather than
    per thread, like `use_backend`.

    Args:
        gib: GiB, at least 0.

    Raises:
        ValueError: gib is not a number of at least 0.
    """
    if isinstance(gib, bool) or not isinstance(gib, (int, float)) or not 0 <= gib < math.inf:
        raise UserError(f"use_workspace: got {gib!r}, expected a number of GiB, at least 0")
    entry = next(_entries)
    _budgets[entry] = int(min(gib, _MOST) * 2**30)
    try:
        yield
    finally:
        del _budgets[entry]


def budget(device_type: str) -> int:
    """Return how many bytes a call may keep on this type of device."""
    return list(_budgets.values())[-1] if _budgets else _AUTOMATIC.get(device_type, 0)
