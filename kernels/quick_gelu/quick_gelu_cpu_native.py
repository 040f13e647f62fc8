"""The compiled CPU backend, for contiguous float32 and bfloat16 tensors.

Import only after the compiled library is loaded.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(x: Tensor) -> Tensor:  # [*]
    y: Tensor = torch.ops.scenarioclip_fast_C.quick_gelu_forward(x)
    return y


def backward(grad: Tensor, x: Tensor) -> Tensor:  # [*], [*]
    dx: Tensor = torch.ops.scenarioclip_fast_C.quick_gelu_backward(grad, x)
    return dx
