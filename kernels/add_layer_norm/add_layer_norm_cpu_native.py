"""The compiled CPU backend, for contiguous float32 and bfloat16 rows and float32 weights.

Import only after the compiled library is loaded.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    x: Tensor,  # [R, W]
    branch: Tensor | None,  # [R, W]
    weight: Tensor,  # [W]
    bias: Tensor,  # [W]
    branch_bias: Tensor | None,  # [W]
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor, Tensor]:
    total, normed, statistics = torch.ops.scenarioclip_fast_C.add_layer_norm_forward(
        x, branch, weight.float(), bias.float(), None if branch_bias is None else branch_bias.float(), eps, dtype
    )
    return None if branch is None else total, normed, statistics


def backward(
    d_total: Tensor | None,  # [R, W]
    d_normed: Tensor,  # [R, W]
    total: Tensor,  # [R, W]
    weight: Tensor,  # [W]
    statistics: Tensor,  # [2, R]
    sums: int,
) -> tuple[Tensor, Tensor | None]:
    dx, d_sums = torch.ops.scenarioclip_fast_C.add_layer_norm_backward(
        d_total, d_normed, total, weight.float(), statistics, sums
    )
    return dx, d_sums if sums else None
