"""Quick-GELU in Triton: one pass forward, one backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import SLOPE

# Bandwidth-bound: 16 bytes per thread and tensor in bfloat16. The compiler must know that the size is a multiple of 16,
# so sizes are specialised; those of a model, rows times its width, all are.
BLOCK, WARPS = 1024, 4


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def quick_gelu_forward(
    x,  # [size]
    out,  # [size]
    size,
    SLOPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    value = tl.load(x + index, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + index, value * _sigmoid(SLOPE * value), mask=inside)


@triton.jit
def quick_gelu_backward(
    grad,  # [size]
    x,  # [size]
    out,  # [size]
    size,
    SLOPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    value = tl.load(x + index, mask=inside, other=0.0).to(tl.float32)
    upstream = tl.load(grad + index, mask=inside, other=0.0).to(tl.float32)
    s = _sigmoid(SLOPE * value)
    tl.store(out + index, upstream * s * (1 + SLOPE * value * (1 - s)), mask=inside)


def forward(x: Tensor) -> Tensor:  # [*]
    out = torch.empty_like(x)
    if x.numel():
        quick_gelu_forward[(triton.cdiv(x.numel(), BLOCK),)](x, out, x.numel(), SLOPE, BLOCK, num_warps=WARPS)
    return out


def backward(grad: Tensor, x: Tensor) -> Tensor:  # [*], [*]
    out = torch.empty_like(x)
    if x.numel():
        quick_gelu_backward[(triton.cdiv(x.numel(), BLOCK),)](grad, x, out, x.numel(), SLOPE, BLOCK, num_warps=WARPS)
    return out
