"""Quick-GELU in plain PyTorch: the reference for the other backends."""

from __future__ import annotations

import torch
from torch import Tensor

SLOPE = 1.702


def quick_gelu(x: Tensor) -> Tensor:  # [*]
    """x sigmoid(1.702 x), computed in at least float32; differentiable."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.sigmoid(SLOPE * wide)).to(x.dtype)


def forward(x: Tensor) -> Tensor:  # [*]
    return quick_gelu(x)


def backward(grad: Tensor, x: Tensor) -> Tensor:  # [*], [*]
    """The gradient of x, in its dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    s = torch.sigmoid(SLOPE * y)
    return (grad.to(wide) * s * (1 + SLOPE * y * (1 - s))).to(x.dtype)
