"""Top-k settings and chance levels, shared by zero-shot, retrieval and probes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_topk(topk: Sequence[int]) -> tuple[int, ...]:
    """Return the distinct values of k in ascending order.

    Raises:
        ValueError: `topk` is empty or has a number below 1.
    """
    if not topk or min(topk) < 1:
        raise ValueError(f"topk: got {tuple(topk)}, expected numbers >= 1")
    return tuple(sorted(set(topk)))


def random_hit_rate(
    k: int,
    classes: int,
    correct: Tensor,  # [V] number of correct classes of each view, >= 1
) -> float:
    """Expected top-k accuracy of a random ranking: the mean of 1 - C(classes - m, k) / C(classes, k)."""
    if k >= classes:
        return 1.0
    correct, views = correct.unique(return_counts=True)
    i = torch.arange(k, dtype=torch.float64)
    missed = (classes - correct.double()[:, None] - i).clamp(min=0) / (classes - i)
    return float(((1 - missed.prod(dim=1)) * views).sum() / views.sum())
