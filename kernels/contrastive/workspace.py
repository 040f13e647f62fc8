"""Which levels of a call keep their exponentials from the forward to the backward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def kept_levels(rows: Sequence[int], texts: Sequence[int], itemsize: int, budget: int) -> list[bool]:
    """Choose levels in order, as long as the N_l U_l exponentials of all chosen ones fit into `budget` bytes.

    Fake kernels call this too, so it depends on sizes alone.
    """
    kept, free = [], budget
    for n, u in zip(rows, texts, strict=True):
        fits = n * u * itemsize <= free
        kept.append(bool(fits and budget > 0))
        free -= n * u * itemsize if kept[-1] else 0
    return kept


def kept_size(rows: Sequence[int], texts: Sequence[int], itemsize: int, budget: int) -> int:
    """Return the number of exponentials that `kept_levels` chooses."""
    kept = kept_levels(rows, texts, itemsize, budget)
    return sum(n * u for n, u, keep in zip(rows, texts, kept, strict=True) if keep)


def kept_dtype(scale: Tensor) -> torch.dtype:
    """Return the dtype of exponentials, given a scale in the dtype of the sums."""
    return torch.bfloat16 if scale.device.type == "cuda" else scale.dtype
