"""Residual addition and LayerNorm in plain PyTorch: the reference for the other backends."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def add_layer_norm(
    x: Tensor,  # [R, W]
    branch: Tensor | None,  # [R, W]
    weight: Tensor,  # [W]
    bias: Tensor,  # [W]
    branch_bias: Tensor | None,  # [W]
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # [R, W] in x's dtype, [R, W] in dtype
    """x + (branch + branch_bias), and its LayerNorm, in at least float32 from the rounded sum; differentiable."""
    wide = _wide(x)
    total = x
    if branch is not None:
        added = branch.to(wide) if branch_bias is None else branch.to(wide) + branch_bias.to(wide)
        total = (x.to(wide) + added).to(x.dtype)
    normed = F.layer_norm(total.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps)
    return total, normed.to(dtype)


def forward(
    x: Tensor,  # [R, W]
    branch: Tensor | None,  # [R, W]
    weight: Tensor,  # [W]
    bias: Tensor,  # [W]
    branch_bias: Tensor | None,  # [W]
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The sum (None without a branch), its LayerNorm, and the mean and inverse deviation of each row: [2, R]."""
    total, normed = add_layer_norm(x, branch, weight, bias, branch_bias, eps, dtype)
    rows = total.to(_wide(x))
    mean = rows.mean(1)
    deviation = (rows - mean[:, None]).square().mean(1)
    return None if branch is None else total, normed, torch.stack([mean, (deviation + eps).rsqrt()])


def backward(
    d_total: Tensor | None,  # [R, W], the gradient of the sum
    d_normed: Tensor,  # [R, W]
    total: Tensor,  # [R, W]
    weight: Tensor,  # [W]
    statistics: Tensor,  # [2, R]
    sums: int,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of x and branch, in their dtype, and sums over the rows: [sums, W].

    sums: 0: none; 2: the gradients of weight and bias; 3: and that of branch_bias.
    """
    wide = _wide(total)
    mean, inverse = (s[:, None] for s in statistics)
    normalised = (total.to(wide) - mean) * inverse
    upstream = d_normed.to(wide)
    scaled = upstream * weight.to(wide)
    along = (scaled * normalised).mean(1, keepdim=True)
    dx = inverse * (scaled - scaled.mean(1, keepdim=True) - normalised * along)
    if d_total is not None:
        dx = dx + d_total.to(wide)
    if not sums:
        return dx.to(total.dtype), None
    return dx.to(total.dtype), torch.stack([t.sum(0) for t in (upstream * normalised, upstream, dx)[:sums]])
