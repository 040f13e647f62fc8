"""Top-k settings and their chance level, shared by the rankings of zero-shot, retrieval and probes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_topk(topk: Sequence[int]) -> tuple[int, ...]:
    """Return the distinct numbers k in ascending order.

    Raises:
        ValueError: a k below 1, or none.
    """
    if not topk or min(topk) < 1:
        raise ValueError(f"topk: got {tuple(topk)}, expected numbers >= 1")
    return tuple(sorted(set(topk)))


def random_hit_rate(
    k: int,
    classes: int,
    right: Tensor,  # [V] number of right classes of each view, >= 1
) -> float:
    """Expected top-k accuracy of a random ranking: the mean of 1 - C(classes - m, k) / C(classes, k)."""
    if k >= classes:
        return 1.0
    right, views = right.unique(return_counts=True)
    i = torch.arange(k, dtype=torch.float64)
    missed = (classes - right.double()[:, None] - i).clamp(min=0) / (classes - i)
    return float(((1 - missed.prod(dim=1)) * views).sum() / views.sum())
