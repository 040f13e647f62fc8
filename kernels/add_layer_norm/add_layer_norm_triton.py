"""Residual addition and LayerNorm in Triton: one pass forward, one backward, rows distributed over a few programs.

A program keeps the weights in registers while it walks over its rows. The gradients of weights and biases are summed
within each program, then over the programs in a fixed order.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs per multiprocessor, enough to hide the latency of one row at a time.
FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 16, 8
# With the sum for a bias of the branch, the registers of a multiprocessor suffice for 7 programs of width 768 or 1,024:
# an eighth would wait for the others to end, and then run alone.
BACKWARD_PROGRAMS_WITH_BIAS = 7
WIDEST = 8192  # a row must fit in a program's registers


@triton.jit(do_not_specialize=["rows"])
def add_layer_norm_forward(
    x,  # [rows, width]
    branch,  # [rows, width], or None
    weight,  # [width]
    bias,  # [width]
    branch_bias,  # [width], or None
    total,  # [rows, width], unused without a branch
    normed,  # [rows, width]
    statistics,  # [2, rows]
    rows,
    eps,
    width: tl.constexpr,
    WIDTH: tl.constexpr,
):
    column = tl.arange(0, WIDTH)
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
    if branch_bias is not None:
        extra = tl.load(branch_bias + column, mask=column < width, other=0.0).to(tl.float32)
    for first in range(0, rows, tl.num_programs(0)):
        row = tl.program_id(0).to(tl.int64) + first
        inside = (column < width) & (row < rows)
        start = row * width
        value = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)
        if branch is not None:
            added = tl.load(branch + start + column, mask=inside, other=0.0).to(tl.float32)
            if branch_bias is not None:
                added += extra
            value += added
            rounded = value.to(total.dtype.element_ty)
            tl.store(total + start + column, rounded, mask=inside)
            value = rounded.to(tl.float32)
        mean = tl.sum(value, 0) / width
        centred = tl.where(inside, value - mean, 0.0)
        inverse = 1 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
        tl.store(normed + start + column, centred * inverse * w + b, mask=inside)
        tl.store(statistics + row, mean, mask=row < rows)
        tl.store(statistics + rows + row, inverse, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def add_layer_norm_backward(
    d_total,  # [rows, width], or None
    d_normed,  # [rows, width]
    total,  # [rows, width]
    weight,  # [width]
    statistics,  # [2, rows]
    dx,  # [rows, width]
    parts,  # [programs, SUMS, width], or None
    rows,
    width: tl.constexpr,
    SUMS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    column = tl.arange(0, WIDTH)
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    d_weight = tl.zeros([WIDTH], tl.float32)
    d_bias = tl.zeros([WIDTH], tl.float32)
    d_branch_bias = tl.zeros([WIDTH], tl.float32)
    for first in range(0, rows, tl.num_programs(0)):
        row = tl.program_id(0).to(tl.int64) + first
        inside = (column < width) & (row < rows)
        start = row * width
        upstream = tl.load(d_normed + start + column, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(total + start + column, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(statistics + row, mask=row < rows, other=0.0)
        inverse = tl.load(statistics + rows + row, mask=row < rows, other=0.0)
        normalised = tl.where(inside, (value - mean) * inverse, 0.0)
        scaled = upstream * w
        along = tl.sum(scaled * normalised, 0) / width
        gradient = inverse * (scaled - tl.sum(scaled, 0) / width - normalised * along)
        if d_total is not None:
            gradient += tl.load(d_total + start + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + start + column, gradient, mask=inside)
        d_weight += upstream * normalised
        d_bias += upstream
        if SUMS == 3:
            d_branch_bias += tl.where(inside, gradient, 0.0)
    if SUMS:
        out = parts + tl.program_id(0).to(tl.int64) * (SUMS * width) + column
        tl.store(out, d_weight, mask=column < width)
        tl.store(out + width, d_bias, mask=column < width)
        if SUMS == 3:
            tl.store(out + 2 * width, d_branch_bias, mask=column < width)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _options(width: int) -> dict[str, int]:
    padded = triton.next_power_of_2(width)
    return {"WIDTH": padded, "num_warps": min(max(padded // 256, 1), 16)}


def forward(
    x: Tensor,  # [R, W]
    branch: Tensor | None,  # [R, W]
    weight: Tensor,  # [W]
    bias: Tensor,  # [W]
    branch_bias: Tensor | None,  # [W]
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor, Tensor]:
    rows, width = x.shape
    total = None if branch is None else torch.empty_like(x)
    normed = torch.empty_like(x, dtype=dtype)
    statistics = torch.empty(2, rows, dtype=torch.float32, device=x.device)
    if x.numel():
        programs = min(rows, FORWARD_PROGRAMS * _multiprocessors(x.device))
        with torch.cuda.device_of(x):  # Triton launches on the current device, not on that of its arguments
            add_layer_norm_forward[(programs,)](
                x, branch, weight, bias, branch_bias, x if total is None else total, normed, statistics, rows, eps,
                width, **_options(width),
            )  # fmt: skip
    return total, normed, statistics


def backward(
    d_total: Tensor | None,  # [R, W]
    d_normed: Tensor,  # [R, W]
    total: Tensor,  # [R, W]
    weight: Tensor,  # [W]
    statistics: Tensor,  # [2, R]
    sums: int,
) -> tuple[Tensor, Tensor | None]:
    rows, width = total.shape
    dx = torch.empty_like(total)
    per_multiprocessor = BACKWARD_PROGRAMS_WITH_BIAS if sums == 3 else BACKWARD_PROGRAMS
    programs = min(rows, per_multiprocessor * _multiprocessors(total.device))
    parts = torch.empty(programs, sums, width, dtype=torch.float32, device=total.device) if sums else None
    if total.numel():
        with torch.cuda.device_of(total):
            add_layer_norm_backward[(programs,)](
                d_total, d_normed, total, weight, statistics, dx, parts, rows, width, sums, **_options(width)
            )
    return dx, None if parts is None else parts.sum(0)
