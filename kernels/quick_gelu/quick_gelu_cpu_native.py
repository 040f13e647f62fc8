"""The compiled CPU backend, for contiguous float32 and bfloat16 tensors and float32 biases.

Import only after the compiled library is loaded.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(x: Tensor, bias: Tensor | None) -> Tensor:  # [*, W], [W]
    y: Tensor = torch.ops.scenarioclip_fast_C.quick_gelu_forward(x, None if bias is None else bias.float())
    return y


def backward(
    grad: Tensor,  # [*, W]
    x: Tensor,  # [*, W]
    bias: Tensor | None,  # [W]
    with_sums: bool,
) -> tuple[Tensor, Tensor | None]:
    dx, d_bias = torch.ops.scenarioclip_fast_C.quick_gelu_backward(
        grad, x, None if bias is None else bias.float(), with_sums
    )
    return dx, d_bias if with_sums else None
