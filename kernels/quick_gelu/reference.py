"""Quick-GELU in plain PyTorch: the reference for the other backends."""

from __future__ import annotations

import torch
from torch import Tensor

SLOPE = 1.702


def _wide(x: Tensor, bias: Tensor | None) -> Tensor:
    """x + bias in at least float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide if bias is None else wide + bias.to(wide.dtype)


def quick_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:  # [*, W], [W]
    """y sigmoid(1.702 y) of y = x + bias, computed in at least float32; differentiable."""
    wide = _wide(x, bias)
    return (wide * torch.sigmoid(SLOPE * wide)).to(x.dtype)


def forward(x: Tensor, bias: Tensor | None) -> Tensor:  # [*, W], [W]
    return quick_gelu(x, bias)


def backward(
    grad: Tensor,  # [*, W]
    x: Tensor,  # [*, W]
    bias: Tensor | None,  # [W]
    with_sums: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of x, in its dtype, and with `with_sums` that of bias, in at least float32: [W]."""
    y = _wide(x, bias)
    s = torch.sigmoid(SLOPE * y)
    dx = grad.to(y.dtype) * s * (1 + SLOPE * y * (1 - s))
    return dx.to(x.dtype), dx.flatten(0, -2).sum(0) if with_sums else None
