"""What the kernels take."""

from __future__ import annotations

import torch

LONGEST = 128  # tokens: a sequence is one tile
NARROWEST, WIDEST = 16, 128  # of a head
# Products of float32 need more registers: larger tiles would spill.
LONGEST_FLOAT32, WIDEST_FLOAT32 = 32, 64


def takes(longest: int, width: int, dtype: torch.dtype) -> bool:
    """Whether the kernels take sequences of up to `longest` tokens with heads of this width."""
    if dtype == torch.float32:
        return longest <= LONGEST_FLOAT32 and NARROWEST <= width <= WIDEST_FLOAT32
    return dtype != torch.float64 and longest <= LONGEST and NARROWEST <= width <= WIDEST
