"""Quick-GELU in Triton: one pass forward, one backward.

With a bias, a program keeps some columns of it in registers while it walks over rows. The gradient of the bias is
summed within each program, then over the programs in a fixed order.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import SLOPE

# Bandwidth-bound: 16 bytes per thread and tensor in bfloat16. The compiler must know that the size is a multiple of 16,
# so sizes are specialised; those of a model, rows times its width, all are.
BLOCK, WARPS = 1024, 4
# With a bias: rows and columns at a time, and programs per multiprocessor, whose registers suffice for all of them.
ROWS, COLUMNS = 4, 512
FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 12, 7


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


@triton.jit(do_not_specialize=["rows"])
def quick_gelu_bias_forward(
    x,  # [rows, width]
    bias,  # [width]
    out,  # [rows, width]
    rows,
    width: tl.constexpr,
    SLOPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    b = tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
    for first in range(tl.program_id(1) * ROWS, rows, tl.num_programs(1) * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        index = row.to(tl.int64)[:, None] * width + column[None, :]
        value = tl.load(x + index, mask=inside, other=0.0).to(tl.float32) + b[None, :]
        tl.store(out + index, value * _sigmoid(SLOPE * value), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def quick_gelu_bias_backward(
    grad,  # [rows, width]
    x,  # [rows, width]
    bias,  # [width]
    out,  # [rows, width]
    parts,  # [programs, width], or None
    rows,
    width: tl.constexpr,
    SLOPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    b = tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
    d_bias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(tl.program_id(1) * ROWS, rows, tl.num_programs(1) * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        index = row.to(tl.int64)[:, None] * width + column[None, :]
        value = tl.load(x + index, mask=inside, other=0.0).to(tl.float32) + b[None, :]
        upstream = tl.load(grad + index, mask=inside, other=0.0).to(tl.float32)
        s = _sigmoid(SLOPE * value)
        gradient = upstream * s * (1 + SLOPE * value * (1 - s))
        tl.store(out + index, gradient, mask=inside)
        if parts is not None:
            d_bias += tl.where(inside, gradient, 0.0)
    if parts is not None:
        tl.store(parts + tl.program_id(1).to(tl.int64) * width + column, tl.sum(d_bias, 0), mask=column < width)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _grid(x: Tensor, programs: int) -> tuple[int, int]:  # [*, W]
    """Programs over columns and over rows, `programs` per multiprocessor in all."""
    columns = triton.cdiv(x.shape[-1], COLUMNS)
    rows = triton.cdiv(x.numel() // x.shape[-1], ROWS) if x.numel() else 0
    return columns, min(rows, max(programs * _multiprocessors(x.device) // columns, 1))


def forward(x: Tensor, bias: Tensor | None) -> Tensor:  # [*, W], [W]
    out = torch.empty_like(x)
    if not x.numel():
        return out
    width = x.shape[-1] if x.dim() else 1
    with torch.cuda.device_of(x):  # Triton launches on the current device, not on that of its arguments
        if bias is None:
            quick_gelu_forward[(triton.cdiv(x.numel(), BLOCK),)](x, out, x.numel(), SLOPE, BLOCK, num_warps=WARPS)
        else:
            quick_gelu_bias_forward[_grid(x, FORWARD_PROGRAMS)](
                x, bias, out, x.numel() // width, width, SLOPE, ROWS, COLUMNS, num_warps=WARPS
            )
    return out


def backward(
    grad: Tensor,  # [*, W]
    x: Tensor,  # [*, W]
    bias: Tensor | None,  # [W]
    with_sums: bool,
) -> tuple[Tensor, Tensor | None]:
    out = torch.empty_like(x)
    if not x.numel():
        sums = torch.zeros(x.shape[-1], device=x.device) if bias is not None and with_sums else None
        return out, sums
    with torch.cuda.device_of(x):
        if bias is None:
            blocks = triton.cdiv(x.numel(), BLOCK)
            quick_gelu_backward[(blocks,)](grad, x, out, x.numel(), SLOPE, BLOCK, num_warps=WARPS)
            return out, None
        width, grid = x.shape[-1], _grid(x, BACKWARD_PROGRAMS)
        parts = torch.empty(grid[1], width, dtype=torch.float32, device=x.device) if with_sums else None
        quick_gelu_bias_backward[grid](
            grad, x, bias, out, parts, x.numel() // width, width, SLOPE, ROWS, COLUMNS, num_warps=WARPS
        )
    return out, None if parts is None else parts.sum(0)
