"""Self-attention over short sequences in Triton: one program per sequence and head, forward and backward.

A whole sequence is one tile, so the softmax needs no running statistics, and the backward pass recomputes it from the
rows, which are all that is kept. Rows are read and written in place: nothing is split, transposed or concatenated.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = math.log2(math.e)


@triton.jit
def _sequence(starts, length, heads: tl.constexpr):
    """The first row of this program's sequence, and its number of tokens."""
    sequence = (tl.program_id(0) // heads).to(tl.int64)
    if starts is None:
        first, count = sequence * length, length
    else:
        first = tl.load(starts + sequence).to(tl.int64)
        count = (tl.load(starts + sequence + 1) - first).to(tl.int32)
    return first, count


@triton.jit
def _weights(q, k, count, factor, causal: tl.constexpr, LENGTH: tl.constexpr, PRECISION: tl.constexpr):
    """exp(q k^T / sqrt(width) - largest of the row), 0 where a key is not seen, and the sum of each row."""
    query, key = tl.arange(0, LENGTH)[:, None], tl.arange(0, LENGTH)[None, :]
    seen = key < count
    if causal:
        seen &= key <= query
    s = tl.where(seen, tl.dot(q, tl.trans(k), input_precision=PRECISION), float("-inf"))
    # Subtract, then scale: equal logits get equal weights whatever their size.
    p = tl.exp2((s - tl.max(s, 1)[:, None]) * factor)
    return p, tl.sum(p, 1)[:, None]


@triton.jit(do_not_specialize=["length"], do_not_specialize_on_alignment=["starts"])
def short_attention_forward(
    qkv,  # [T, 3, heads, width]
    starts,  # [n + 1], or None: all sequences have `length` tokens
    out,  # [T, heads, width]
    length,
    factor,  # log2(e) / sqrt(width)
    heads: tl.constexpr,
    width: tl.constexpr,
    causal: tl.constexpr,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    part: tl.constexpr = heads * width
    first, count = _sequence(starts, length, heads)
    head = tl.program_id(0) % heads * width
    row, column = tl.arange(0, LENGTH)[:, None], tl.arange(0, WIDTH)[None, :]
    inside = (row < count) & (column < width)
    given = qkv + first * (3 * part) + head + (row * (3 * part) + column)
    q = tl.load(given, mask=inside, other=0.0)
    k = tl.load(given + part, mask=inside, other=0.0)
    v = tl.load(given + 2 * part, mask=inside, other=0.0)
    p, total = _weights(q, k, count, factor, causal, LENGTH, PRECISION)
    y = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) / total
    tl.store(out + first * part + head + (row * part + column), y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length"], do_not_specialize_on_alignment=["starts"])
def short_attention_backward(
    grad,  # [T, heads, width]
    qkv,  # [T, 3, heads, width]
    starts,  # [n + 1], or None: all sequences have `length` tokens
    out,  # [T, 3, heads, width]
    length,
    factor,  # log2(e) / sqrt(width)
    scale,  # 1 / sqrt(width)
    heads: tl.constexpr,
    width: tl.constexpr,
    causal: tl.constexpr,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    part: tl.constexpr = heads * width
    first, count = _sequence(starts, length, heads)
    head = tl.program_id(0) % heads * width
    row, column = tl.arange(0, LENGTH)[:, None], tl.arange(0, WIDTH)[None, :]
    inside = (row < count) & (column < width)
    given = qkv + first * (3 * part) + head + (row * (3 * part) + column)
    q = tl.load(given, mask=inside, other=0.0)
    k = tl.load(given + part, mask=inside, other=0.0)
    v = tl.load(given + 2 * part, mask=inside, other=0.0)
    upstream = tl.load(grad + first * part + head + (row * part + column), mask=inside, other=0.0)
    p, total = _weights(q, k, count, factor, causal, LENGTH, PRECISION)
    p = p / total
    to = out + first * (3 * part) + head + (row * (3 * part) + column)
    # dv is written before ds is computed, which saves a fifth of the registers. Rows of padding have no upstream
    # gradient, so they add nothing.
    dv = tl.dot(tl.trans(p.to(v.dtype)), upstream, input_precision=PRECISION)
    tl.store(to + 2 * part, dv.to(out.dtype.element_ty), mask=inside)
    dp = tl.dot(upstream, tl.trans(v), input_precision=PRECISION)
    ds = (p * (dp - tl.sum(p * dp, 1)[:, None])).to(q.dtype)
    dq = tl.dot(ds, k, input_precision=PRECISION) * scale
    tl.store(to, dq.to(out.dtype.element_ty), mask=inside)
    dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION) * scale
    tl.store(to + part, dk.to(out.dtype.element_ty), mask=inside)


def _options(qkv: Tensor, heads: int, longest: int) -> dict[str, Any]:
    width = qkv.shape[1] // (3 * heads)
    # Tensor cores multiply 16 rows at a time.
    tile = max(triton.next_power_of_2(longest), 16)
    is_float32 = qkv.dtype == torch.float32
    return {
        "heads": heads,
        "width": width,
        "LENGTH": tile,
        "WIDTH": triton.next_power_of_2(width),
        # As in the contrastive kernels: three products in TF32, unless torch may round float32 as well.
        "PRECISION": "tf32x3" if torch.backends.cuda.matmul.fp32_precision != "tf32" else "tf32",
        "num_warps": 4 if is_float32 else tile // 16,
    }


def _programs(qkv: Tensor, heads: int, longest: int, starts: Tensor | None) -> int:
    if not qkv.numel():
        return 0
    return heads * (qkv.shape[0] // longest if starts is None else starts.shape[0] - 1)


def forward(
    qkv: Tensor,  # [T, 3 W]
    heads: int,
    longest: int,
    starts: Tensor | None,  # [n + 1]
    causal: bool,
) -> Tensor:  # [T, W]
    out = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)
    if programs := _programs(qkv, heads, longest, starts):
        options = _options(qkv, heads, longest)
        with torch.cuda.device_of(qkv):  # Triton launches on the current device, not on that of its arguments
            short_attention_forward[(programs,)](
                qkv, starts, out, longest, _LOG2_E / math.sqrt(options["width"]), causal=causal, **options
            )
    return out


def backward(
    grad: Tensor,  # [T, W]
    qkv: Tensor,  # [T, 3 W]
    heads: int,
    longest: int,
    starts: Tensor | None,  # [n + 1]
    causal: bool,
) -> Tensor:  # [T, 3 W]
    out = torch.empty_like(qkv)
    if programs := _programs(qkv, heads, longest, starts):
        options = _options(qkv, heads, longest)
        scale = 1 / math.sqrt(options["width"])
        with torch.cuda.device_of(qkv):
            short_attention_backward[(programs,)](
                grad, qkv, starts, out, longest, _LOG2_E * scale, scale, causal=causal, **options
            )
    return out
