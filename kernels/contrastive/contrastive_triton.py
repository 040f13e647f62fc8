"""The contrastive softmax in Triton: one pass over S for row and column sums, backward through chunks of dS.

All levels of a call share their launches while they are small; a large level goes alone, by chunks of rows. No atomics
and no host synchronisation: partial sums are written per tile and added in a fixed order. Logits are in base 2 inside
the kernels, k2 = scale * log2(e).

float16 and float32 features are multiplied in TF32 (three products for float32, unless torch allows TF32), bfloat16 in
bfloat16; sums are float32, log-sums float64. Speed on a GPU: not yet measured.
"""

# mypy: disable-error-code="no-untyped-def"
# (a kernel's arguments have no Python types; comments give their shapes)

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .reference import EPS

LEVELS = 4  # in one launch; the kernels name the sizes of each
BLOCK = 128
PRODUCT_BLOCK = 64
GROUPED = 4096 * 4096  # logits of all levels up to which a call goes through the grouped launches
FORWARD_ROWS = 16384  # of a chunk: bounds the partial sums at 8 bytes per logit tile row
CHUNK_ROWS = 4096
CHUNK_BYTES = 2**28  # of a chunk of dS

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# exp2 flushes below 2^-126. Where the largest possible logit, k2, is above 100 it is moved to 100: a row then loses
# terms only below a cosine of -0.57 (at scale 100), and 2^27 terms are finite. Smaller scales need no offset, and
# would lose digits to one. Sums outside [LOW, HIGH] are done again with a running maximum.
HEADROOM = tl.constexpr(100.0)
LOW = tl.constexpr(2.0**-100)
HIGH = tl.constexpr(2.0**127)
# Log-sums of one tile closer together than this share one exponential in the backward pass.
SPREAD = tl.constexpr(60.0)

_SIZES = [f"{side}{k}" for side in "nu" for k in range(LEVELS)]


@triton.jit
def _pick(level, a0, a1, a2, a3):
    return tl.where(level == 0, a0, tl.where(level == 1, a1, tl.where(level == 2, a2, a3)))


@triton.jit
def _before(level, a0, a1, a2):
    return tl.where(level > 0, a0, 0) + tl.where(level > 1, a1, 0) + tl.where(level > 2, a2, 0)


@triton.jit
def _locate(pid, b0, b1, b2, b3):
    """The level that block pid belongs to when level k has b_k blocks, and its number there."""
    level = (pid >= b0).to(tl.int32) + (pid >= b0 + b1).to(tl.int32) + (pid >= b0 + b1 + b2).to(tl.int32)
    return level, pid - _before(level, b0, b1, b2)


@triton.jit
def _dot_tile(
    x,  # [sum N, WIDTH] pointer, or a descriptor with TMA
    y,  # [sum U, WIDTH]
    row,
    column,
    row_end,
    column_end,
    WIDTH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x y^T of one tile. Entries past the ends are of other rows: finite where the features are, and to be masked."""
    acc = tl.zeros([BM, BN], tl.float32)
    if TMA:
        for k in range(0, WIDTH, BK):
            acc = tl.dot(x.load([row, k]), y.load([column, k]).T, acc, input_precision=PRECISION)
    else:
        rows = tl.minimum(row + tl.arange(0, BM), row_end - 1).to(tl.int64)
        columns = tl.minimum(column + tl.arange(0, BN), column_end - 1).to(tl.int64)
        inner = tl.arange(0, BK)
        a = x + rows[:, None] * WIDTH + inner[None, :]
        b = y + columns[None, :] * WIDTH + inner[:, None]
        for k in range(0, WIDTH, BK):
            acc = tl.dot(tl.load(a + k), tl.load(b + k), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _tile(pid, n0, n1, n2, n3, u0, u1, u2, u3, BM: tl.constexpr, BN: tl.constexpr):
    """Which tile of which level: level, its sizes, where its rows and texts begin, block row and block column."""
    level, tile = _locate(
        pid,
        tl.cdiv(n0, BM) * tl.cdiv(u0, BN),
        tl.cdiv(n1, BM) * tl.cdiv(u1, BN),
        tl.cdiv(n2, BM) * tl.cdiv(u2, BN),
        tl.cdiv(n3, BM) * tl.cdiv(u3, BN),
    )
    n, u = _pick(level, n0, n1, n2, n3), _pick(level, u0, u1, u2, u3)
    # Eight block rows at a time, so that neighbours in time share operands in the L2 cache.
    high, wide = tl.cdiv(n, BM), tl.cdiv(u, BN)
    first = tile // (8 * wide) * 8
    height = tl.minimum(high - first, 8)
    inside = tile % (8 * wide)
    return (
        level,
        n,
        u,
        _before(level, n0, n1, n2),
        _before(level, u0, u1, u2),
        first + inside % height,
        inside // height,
    )


@triton.jit
def _own_column(index, row, rows, start, mask, HAS_INDEX: tl.constexpr):
    """The column of each row's positive, counted from start."""
    if HAS_INDEX:
        return (tl.load(index + row + rows, mask=mask, other=-1) - start).to(tl.int32)
    else:
        return rows - start


@triton.jit(do_not_specialize=_SIZES)
def unit_rows(
    a0,  # [n_k, D] features of each level
    a1,
    a2,
    a3,
    n0,
    n1,
    n2,
    n3,
    u0,  # row strides
    u1,
    u2,
    u3,
    unit,  # [sum N, WIDTH] out
    inverse,  # [sum N] out: one over the length
    positive,  # [sum N] out: NaN, which stays where an index is out of range
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SMALLEST: tl.constexpr,
    NORMALIZE: tl.constexpr,
    POSITIVE: tl.constexpr,
):
    pid = tl.program_id(0)
    level, row = _locate(pid, n0, n1, n2, n3)
    features = a0
    if level == 1:
        features = a1
    if level == 2:
        features = a2
    if level == 3:
        features = a3
    d = tl.arange(0, BLOCK_D)
    stride = _pick(level, u0, u1, u2, u3)
    x = tl.load(features + row.to(tl.int64) * stride + d, mask=d < D, other=0.0).to(tl.float32)
    scale = 1.0
    if NORMALIZE:
        # By the largest entry first: squares of large or tiny float32 features leave the range.
        largest = tl.max(tl.abs(x), 0)
        shrunk = tl.where(largest > 0, x / largest, x)
        length = largest * tl.sqrt(tl.sum(shrunk * shrunk, 0))
        scale = 1.0 / tl.where(length < SMALLEST, SMALLEST, length)
    tl.store(unit + pid.to(tl.int64) * WIDTH + d, x * scale, mask=d < WIDTH)
    tl.store(inverse + pid, scale)
    if POSITIVE:
        tl.store(positive + pid, float("nan"))


@triton.jit(do_not_specialize=[*_SIZES, "rows_total", "columns_total"])
def tile_sums(
    x,  # [sum N, WIDTH]
    y,  # [sum U, WIDTH]
    scale,  # [levels]
    index,  # [sum N] int64
    weight,  # [sum U]
    row_parts,  # [block columns, sum N] out
    column_parts,  # [block rows, sum U] out
    positive,  # [sum N] out: cosine of each row's own text
    n0,
    n1,
    n2,
    n3,
    u0,
    u1,
    u2,
    u3,
    rows_total,
    columns_total,
    WIDTH: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    level, n, u, row, column, i, j = _tile(tl.program_id(0), n0, n1, n2, n3, u0, u1, u2, u3, BM, BN)
    acc = _dot_tile(x, y, row + i * BM, column + j * BN, row + n, column + u, WIDTH, BM, BN, BK, TMA, PRECISION)
    rows, columns = i * BM + tl.arange(0, BM), j * BN + tl.arange(0, BN)
    in_rows, in_columns = rows < n, columns < u
    # From this accumulator: from another one it may exceed the log-sum that it is part of.
    own = _own_column(index, row, rows, j * BN, in_rows, HAS_INDEX)
    mine = in_rows & (own >= 0) & (own < BN)
    if tl.max(mine.to(tl.int32), 0) > 0:
        at = tl.arange(0, BN)[None, :] == own[:, None]
        tl.store(positive + row + rows, tl.sum(tl.where(at, acc, 0.0), 1), mask=mine)
    k2 = tl.load(scale + level) * LOG2E
    e = tl.exp2(acc * k2 - tl.maximum(k2 - HEADROOM, 0.0))
    w = in_columns.to(tl.float32)
    if HAS_WEIGHT:
        w = tl.load(weight + column + columns, mask=in_columns, other=0.0)
    tl.store(row_parts + j.to(tl.int64) * rows_total + row + rows, tl.sum(e * w[None, :], 1), mask=in_rows)
    if (i + 1) * BM > n:
        e = tl.where(in_rows[:, None], e, 0.0)
    tl.store(column_parts + i.to(tl.int64) * columns_total + column + columns, tl.sum(e, 0), mask=in_columns)


@triton.jit
def _log_sums(
    pid,
    parts,  # [count, total]
    a,  # [sum N_a, WIDTH] rows to sum over
    b,  # [sum N_b, WIDTH]
    weight,  # [sum N_b]
    scale,
    out,  # [sum N_a] float64
    n0,
    n1,
    n2,
    n3,
    u0,
    u1,
    u2,
    u3,
    total,
    count,
    WIDTH: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    TILE: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    level, i = _locate(pid, tl.cdiv(n0, BM), tl.cdiv(n1, BM), tl.cdiv(n2, BM), tl.cdiv(n3, BM))
    n, u = _pick(level, n0, n1, n2, n3), _pick(level, u0, u1, u2, u3)
    row, column = _before(level, n0, n1, n2), _before(level, u0, u1, u2)
    rows = i * BM + tl.arange(0, BM)
    in_rows = rows < n
    k2 = tl.load(scale + level) * LOG2E
    total_sum = tl.zeros([BM], tl.float32)
    at = parts + row + rows
    for _ in range(0, tl.minimum(count, tl.cdiv(u, TILE))):
        total_sum += tl.load(at, mask=in_rows, other=1.0)
        at += total
    log_sum = tl.log2(total_sum.to(tl.float64)) + tl.maximum(k2 - HEADROOM, 0.0).to(tl.float64)
    fine = (total_sum >= LOW) & (total_sum <= HIGH) | (rows >= n)
    if tl.min(fine.to(tl.int32), 0) == 0:
        top = tl.full([BM], float("-inf"), tl.float32)
        terms = tl.zeros([BM], tl.float32)
        for start in range(0, u, BM):
            acc = _dot_tile(
                a, b, row + i * BM, column + start, row + n, column + u, WIDTH, BM, BM, BK, False, PRECISION
            )
            columns = start + tl.arange(0, BM)
            w = (columns < u).to(tl.float32)
            if HAS_WEIGHT:
                w = tl.load(weight + column + columns, mask=columns < u, other=0.0)
            # A text without weight leaves no trace, unless it is NaN.
            logits = tl.where((w > 0)[None, :] | (acc != acc), acc * k2, float("-inf"))
            higher = tl.maximum(top, tl.max(logits, 1))
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            terms = terms * tl.exp2(top - shift) + tl.sum(tl.exp2(logits - shift[:, None]) * w[None, :], 1)
            top = higher
        again = tl.log2(terms.to(tl.float64)) + top.to(tl.float64)
        log_sum = tl.where(fine, log_sum, again)
    # Nobody on the host has looked at the scale: one that is not positive must not give a plausible number.
    tl.store(out + row + rows, tl.where(k2 > 0, log_sum * LN2, float("nan")), mask=in_rows)


@triton.jit(do_not_specialize=[*_SIZES, "rows_total", "columns_total", "row_count", "column_count", "row_blocks"])
def log_sums(
    x,  # [sum N, WIDTH]
    y,  # [sum U, WIDTH]
    scale,  # [levels]
    weight,  # [sum U]
    row_parts,  # [row_count, sum N]
    column_parts,  # [column_count, sum U]
    row_lse,  # [sum N] float64 out
    column_lse,  # [sum U] float64 out
    n0,
    n1,
    n2,
    n3,
    u0,
    u1,
    u2,
    u3,
    rows_total,
    columns_total,
    row_count,
    column_count,
    row_blocks,  # programs that do rows; the rest do columns
    WIDTH: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    TILE: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds the tiles' partial sums and takes logarithms; blocks whose sums left the range are summed again, slowly."""
    pid = tl.program_id(0)
    if pid < row_blocks:
        _log_sums(
            pid, row_parts, x, y, weight, scale, row_lse,
            n0, n1, n2, n3, u0, u1, u2, u3, rows_total, row_count,
            WIDTH, HAS_WEIGHT, TILE, BM, BK, PRECISION,
        )  # fmt: skip
    else:
        _log_sums(
            pid - row_blocks, column_parts, y, x, weight, scale, column_lse,
            u0, u1, u2, u3, n0, n1, n2, n3, columns_total, column_count,
            WIDTH, False, TILE, BM, BK, PRECISION,
        )  # fmt: skip


# Slices of whole buffers come in here: their alignment must not compile the kernel again.
@triton.jit(
    do_not_specialize=["n", "u"],
    do_not_specialize_on_alignment=["row_lse", "column_lse", "grad_row", "grad_column"],
)
def factors(
    row_lse,  # [N] float64
    column_lse,  # [U] float64
    grad_row,  # [N] float64
    grad_column,  # [U] float64
    row_log,  # [N] out: row_lse in base 2, rounded to float32
    column_log,  # [U] out
    row_factor,  # [N] out: grad_row, with what the rounding lost
    column_factor,  # [U] out
    n,
    u,
    BM: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks = tl.cdiv(n, BM)
    log_sum, grad, log_out, factor_out, size = row_lse, grad_row, row_log, row_factor, n
    if pid >= blocks:
        log_sum, grad, log_out, factor_out, size = column_lse, grad_column, column_log, column_factor, u
        pid -= blocks
    i = pid.to(tl.int64) * BM + tl.arange(0, BM)
    exact = tl.load(log_sum + i, mask=i < size, other=0.0) * LOG2E
    rounded = exact.to(tl.float32)
    rest = tl.exp2((rounded.to(tl.float64) - exact).to(tl.float32))
    tl.store(log_out + i, rounded, mask=i < size)
    tl.store(factor_out + i, tl.load(grad + i, mask=i < size, other=0.0).to(tl.float32) * rest, mask=i < size)


@triton.jit
def _gradient(
    cosine,  # [BM, BN]
    k2,
    r,  # [BM] log-sums of the rows
    a,  # [BM] their factors
    own,  # [BM] column of each row's positive, in this tile or not
    column_log,  # [sum U]
    weight,  # [sum U]
    column_factor,  # [sum U]
    grad_positive,  # [BM] pointers
    column,
    start,
    u,
    HAS_WEIGHT: tl.constexpr,
    BN: tl.constexpr,
):
    """dS of one tile: a_i w_u exp2(S - r_i) + b_u exp2(S - c_u), and the positives' own gradient."""
    at = column + tl.minimum(start + tl.arange(0, BN), u - 1)
    c, b = tl.load(column_log + at), tl.load(column_factor + at)
    w = tl.full([BN], 1.0, tl.float32)
    if HAS_WEIGHT:
        w = tl.load(weight + at)
    middle = tl.maximum(tl.max(r, 0), tl.max(c, 0))
    lowest = tl.minimum(tl.min(r, 0), tl.min(c, 0))
    if middle - lowest < SPREAD:
        # One exponential for both softmaxes. No logit exceeds its column's log-sum, so that none overflows, and what
        # underflows is below 2^(SPREAD - 126) of its sum.
        a *= tl.exp2(middle - r)
        b *= tl.exp2(middle - c)
        out = tl.exp2(cosine * k2 - middle) * (a[:, None] * w[None, :] + b[None, :])
    else:
        logits = cosine * k2
        # A text without weight may exceed the row's log-sum without bound.
        by_row = tl.exp2(tl.where((w > 0)[None, :], logits - r[:, None], 0.0)) * a[:, None] * w[None, :]
        out = by_row + tl.exp2(logits - c[None, :]) * b[None, :]
    mine = (own >= 0) & (own < BN)
    if tl.max(mine.to(tl.int32), 0) > 0:
        positive = tl.load(grad_positive, mask=mine, other=0.0).to(tl.float32)
        out += tl.where(tl.arange(0, BN)[None, :] == own[:, None], positive[:, None], 0.0)
    return out


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=["grad_positive"])
def tile_gradients(
    x,  # [sum N, WIDTH]
    y,  # [sum U, WIDTH]
    scale,  # [levels]
    index,  # [sum N] int64
    weight,  # [sum U]
    row_log,  # [sum N]
    column_log,  # [sum U]
    row_factor,  # [sum N]
    column_factor,  # [sum U]
    grad_positive,  # [sum N] float64
    grad,  # levels x [n_l, u_l, both rounded up to tiles] out, one after the other
    n0,
    n1,
    n2,
    n3,
    u0,
    u1,
    u2,
    u3,
    WIDTH: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    level, n, u, row, column, i, j = _tile(tl.program_id(0), n0, n1, n2, n3, u0, u1, u2, u3, BM, BN)
    acc = _dot_tile(x, y, row + i * BM, column + j * BN, row + n, column + u, WIDTH, BM, BN, BK, TMA, PRECISION)
    rows = i * BM + tl.arange(0, BM)
    at_rows = row + tl.minimum(rows, n - 1)
    r, a = tl.load(row_log + at_rows), tl.load(row_factor + at_rows)
    own = tl.where(rows < n, _own_column(index, row, rows, j * BN, rows < n, HAS_INDEX), -1)
    k2 = tl.load(scale + level) * LOG2E
    # Whole tiles: what lies past the ends is never read, and a mask costs registers.
    base, stride = _grad_level(level, n0, n1, n2, u0, u1, u2, u, BM, BN)
    out = grad + base + (i * BM).to(tl.int64) * stride + j * BN
    out = out + tl.arange(0, BM).to(tl.int64)[:, None] * stride + tl.arange(0, BN // 2)[None, :]
    # Half the columns at a time: what each column brings along would not fit in registers beside a whole tile.
    left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
    first = _gradient(
        left, k2, r, a, own, column_log, weight, column_factor, grad_positive + row + rows,
        column, j * BN, u, HAS_WEIGHT, BN // 2,
    )  # fmt: skip
    tl.store(out, first.to(grad.dtype.element_ty))
    second = _gradient(
        right, k2, r, a, own - BN // 2, column_log, weight, column_factor, grad_positive + row + rows,
        column, j * BN + BN // 2, u, HAS_WEIGHT, BN // 2,
    )  # fmt: skip
    tl.store(out + BN // 2, second.to(grad.dtype.element_ty))


@triton.jit
def _grad_level(level, n0, n1, n2, u0, u1, u2, u, BM: tl.constexpr, BN: tl.constexpr):
    """Where dS of a level begins, and the distance of its rows."""
    base = _before(
        level,
        (tl.cdiv(n0, BM) * BM).to(tl.int64) * (tl.cdiv(u0, BN) * BN),
        (tl.cdiv(n1, BM) * BM).to(tl.int64) * (tl.cdiv(u1, BN) * BN),
        (tl.cdiv(n2, BM) * BM).to(tl.int64) * (tl.cdiv(u2, BN) * BN),
    )
    return base, tl.cdiv(u, BN) * BN


@triton.jit(do_not_specialize=_SIZES)
def products(
    grad,  # levels x [n_l, u_l, both rounded up to tiles]
    x,  # [sum N, WIDTH]
    y,  # [sum U, WIDTH]
    d_x,  # [sum N, WIDTH] out: dS y
    d_y,  # [sum U, WIDTH] out: dS^T x
    n0,
    n1,
    n2,
    n3,
    u0,
    u1,
    u2,
    u3,
    WIDTH: tl.constexpr,
    FIRST_SIDE: tl.constexpr,
    TILE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Both products of all levels; program ids are block of rows, block of columns, side."""
    pid = tl.program_id(0)
    side = tl.program_id(2) + FIRST_SIDE
    by_row = side == 0
    level, i = _locate(
        pid,
        tl.cdiv(tl.where(by_row, n0, u0), BM),
        tl.cdiv(tl.where(by_row, n1, u1), BM),
        tl.cdiv(tl.where(by_row, n2, u2), BM),
        tl.cdiv(tl.where(by_row, n3, u3), BM),
    )
    n, u = _pick(level, n0, n1, n2, n3), _pick(level, u0, u1, u2, u3)
    row, column = _before(level, n0, n1, n2), _before(level, u0, u1, u2)
    base, stride = _grad_level(level, n0, n1, n2, u0, u1, u2, u, TILE, TILE)
    high, deep, step, inner_step = n, u, stride, 1
    first, first_inner = row, column
    other, out = y, d_x
    if side == 1:
        high, deep, step, inner_step = u, n, 1, stride
        first, first_inner = column, row
        other, out = x, d_y
    rows, columns, inner = i * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BK)
    if i * BM < high:
        acc = tl.zeros([BM, BN], tl.float32)
        for k in range(0, deep, BK):
            ks = k + inner
            a = tl.load(
                grad + base + rows.to(tl.int64)[:, None] * step + ks.to(tl.int64)[None, :] * inner_step,
                mask=(rows < high)[:, None] & (ks < deep)[None, :],
                other=0.0,
            )
            b = tl.load(
                other + (first_inner + ks).to(tl.int64)[:, None] * WIDTH + columns[None, :],
                mask=(ks < deep)[:, None] & (columns < WIDTH)[None, :],
                other=0.0,
            )
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        at = out + (first + rows).to(tl.int64)[:, None] * WIDTH + columns[None, :]
        tl.store(at, acc, mask=(rows < high)[:, None] & (columns < WIDTH)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def finish_rows(
    a0,  # [n_k, D] features of each level
    a1,
    a2,
    a3,
    o0,  # [n_k, D] out: gradients
    o1,
    o2,
    o3,
    inverse,  # [sum N]
    d_unit,  # [sum N, WIDTH] gradient of the unit row, before the scale
    scale,  # [levels]
    along,  # [sum N] out: unit row . d_unit, whose sum is the gradient of the scale
    n0,
    n1,
    n2,
    n3,
    u0,  # row strides
    u1,
    u2,
    u3,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    pid = tl.program_id(0)
    level, row = _locate(pid, n0, n1, n2, n3)
    features, out = a0, o0
    if level == 1:
        features, out = a1, o1
    if level == 2:
        features, out = a2, o2
    if level == 3:
        features, out = a3, o3
    d = tl.arange(0, BLOCK_D)
    stride = _pick(level, u0, u1, u2, u3)
    inv = tl.load(inverse + pid)
    x = tl.load(features + row.to(tl.int64) * stride + d, mask=d < D, other=0.0).to(tl.float32) * inv
    g = tl.load(d_unit + pid.to(tl.int64) * WIDTH + d, mask=d < D, other=0.0)
    dot = tl.sum(x * g, 0)
    tl.store(along + pid, dot)
    if NORMALIZE:
        g = (g - x * dot) * inv
    g *= tl.load(scale + level)
    tl.store(out + row.to(tl.int64) * D + d, g.to(out.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["n0", "n1", "n2", "n3"])
def sum_levels(along, out, n0, n1, n2, n3, BM: tl.constexpr):
    """along [sum N] -> out [levels]: the sum of each level's rows."""
    level = tl.program_id(0)
    first, n = _before(level, n0, n1, n2), _pick(level, n0, n1, n2, n3)
    total = tl.zeros([BM], tl.float32)
    for i in range(0, n, BM):
        at = i + tl.arange(0, BM)
        total += tl.load(along + first + at, mask=at < n, other=0.0)
    tl.store(out + level, tl.sum(total, 0))


def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@dataclass(frozen=True)
class Plan:
    """How one dtype and width is multiplied on one device."""

    operand: torch.dtype
    precision: str
    width: int  # D rounded up to the blocks of the inner dimension, so that no load needs a mask
    inner: int
    tma: bool

    @staticmethod
    def of(features: Tensor) -> Plan:
        if features.dtype == torch.bfloat16 and not _interprets():
            operand, precision, inner = torch.bfloat16, "tf32", 64
        else:
            # float16 has TF32's digits and not its range. The interpreter gets bfloat16 wrong, and knows no TF32.
            exact = features.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
            operand, precision, inner = torch.float32, "tf32x3" if exact else "tf32", 32
        tma = features.device.type == "cuda" and torch.cuda.get_device_capability(features.device)[0] >= 9
        return Plan(operand, precision, -(-features.shape[1] // inner) * inner, inner, tma)

    def options(self) -> dict[str, int]:
        """Warps and stages of the two tile kernels, from register counts and shared memory at sm_90a."""
        return (
            {"num_warps": 4, "num_stages": 3} if self.operand == torch.bfloat16 else {"num_warps": 8, "num_stages": 3}
        )

    def tiles(self, unit: Tensor) -> Tensor | TensorDescriptor:
        if not self.tma:
            return unit
        return TensorDescriptor(unit, list(unit.shape), list(unit.stride()), [BLOCK, self.inner])


def _sizes(tensors: Sequence[Tensor]) -> list[int]:
    return [len(t) for t in tensors] + [0] * (LEVELS - len(tensors))


def _fill(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [*tensors, *[tensors[0]] * (LEVELS - len(tensors))]


def _whole(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _blocks(sizes: Sequence[int], block: int) -> int:
    return sum(-(-n // block) for n in sizes)


def _units(
    features: Sequence[Tensor], plan: Plan, normalize: bool, positive: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # [sum N, WIDTH], [sum N]
    sizes = _sizes(features)
    unit = torch.empty(sum(sizes), plan.width, dtype=plan.operand, device=features[0].device)
    inverse = torch.empty(sum(sizes), dtype=torch.float32, device=unit.device)
    if len(unit):
        unit_rows[(len(unit),)](
            *_fill(features),
            *sizes,
            *(t.stride(0) for t in _fill(features)),
            unit,
            inverse,
            inverse if positive is None else positive,
            D=features[0].shape[1],
            WIDTH=plan.width,
            BLOCK_D=triton.next_power_of_2(plan.width),
            SMALLEST=EPS,
            NORMALIZE=normalize,
            POSITIVE=positive is not None,
            num_warps=2,
        )
    return unit, inverse


@dataclass(frozen=True)
class _Batch:
    """Up to LEVELS levels of one width: features, and one buffer for what is per row or per text."""

    image: list[Tensor]
    text: list[Tensor]
    scale: Tensor
    index: Tensor | None
    weight: Tensor | None
    plan: Plan
    normalize: bool

    @property
    def rows(self) -> list[int]:
        return _sizes(self.image)

    @property
    def texts(self) -> list[int]:
        return _sizes(self.text)


def _batches(
    image: Sequence[Tensor],
    text: Sequence[Tensor],
    scale: Tensor,
    index: Sequence[Tensor],
    weight: Sequence[Tensor],
    normalize: bool,
) -> list[tuple[slice, _Batch]]:
    """Neighbouring levels that go through the same launches, with the range of levels each batch covers."""
    groups: list[list[int]] = []
    for k, features in enumerate(image):
        members = [*(groups[-1] if groups else []), k]
        logits = sum(len(image[m]) * len(text[m]) for m in members)
        if groups and len(members) <= LEVELS and logits <= GROUPED and image[members[0]].shape[1] == features.shape[1]:
            groups[-1] = members
        else:
            groups.append([k])
    out = []
    for members in groups:
        part = slice(members[0], members[-1] + 1)
        x = [t if t.stride(-1) == 1 else t.contiguous() for t in image[part]]
        y = [t if t.stride(-1) == 1 else t.contiguous() for t in text[part]]
        batch = _Batch(
            x,
            y,
            scale[part],
            torch.cat(list(index[part])) if index else None,
            torch.cat(list(weight[part])) if weight else None,
            Plan.of(x[0]),
            normalize,
        )
        out.append((part, batch))
    return out


def forward(
    image: Sequence[Tensor],  # levels x [N_l, D_l]
    text: Sequence[Tensor],  # levels x [U_l, D_l]
    scale: Tensor,  # [levels] float32
    index: Sequence[Tensor],  # levels x [N_l] int64, or none
    weight: Sequence[Tensor],  # levels x [U_l] float32, or none
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # row_lse [sum N_l], col_lse [sum U_l], positive [sum N_l], float64
    with torch.cuda.device_of(scale):  # Triton launches on the current device, whatever its arguments are on
        parts = [_forward(batch) for _, batch in _batches(image, text, scale, index, weight, normalize)]
    row, column, positive = (torch.cat(part) for part in zip(*parts, strict=True))
    return row, column, positive


def _forward(batch: _Batch) -> tuple[Tensor, Tensor, Tensor]:
    plan, rows, texts = batch.plan, batch.rows, batch.texts
    n, u = sum(rows), sum(texts)
    device = batch.scale.device
    cosine = torch.empty(n, dtype=torch.float32, device=device)
    x, _ = _units(batch.image, plan, batch.normalize, cosine)
    y, _ = _units(batch.text, plan, batch.normalize)
    row_lse = torch.full((n,), -torch.inf, dtype=torch.float64, device=device)
    column_lse = torch.full((u,), -torch.inf, dtype=torch.float64, device=device)
    positive = cosine
    if n and u:
        # One level alone may be cut into chunks of its rows; several are small.
        step = FORWARD_ROWS if len(batch.image) == 1 else n
        chunks = [slice(i, min(i + step, n)) for i in range(0, n, step)]
        row_sums, column_sums = [], None
        for chunk in chunks:
            sizes = rows if len(chunks) == 1 else [chunk.stop - chunk.start, 0, 0, 0]
            row_parts = torch.empty(-(-max(texts) // BLOCK), sum(sizes), device=device)
            column_parts = torch.empty(-(-max(sizes) // BLOCK), u, device=device)
            index = batch.index
            if index is None and chunk.start:
                index = torch.arange(n, device=device)
            tiles = sum(-(-a // BLOCK) * -(-b // BLOCK) for a, b in zip(sizes, texts, strict=True))
            if tiles:
                tile_sums[(tiles,)](
                    plan.tiles(x[chunk]),
                    plan.tiles(y),
                    batch.scale,
                    x if index is None else index[chunk],
                    y if batch.weight is None else batch.weight,
                    row_parts,
                    column_parts,
                    cosine[chunk],
                    *sizes,
                    *texts,
                    sum(sizes),
                    u,
                    WIDTH=plan.width,
                    HAS_INDEX=index is not None,
                    HAS_WEIGHT=batch.weight is not None,
                    BM=BLOCK,
                    BN=BLOCK,
                    BK=plan.inner,
                    TMA=plan.tma,
                    PRECISION=plan.precision,
                    **plan.options(),
                )
            if len(chunks) > 1:
                row_sums.append(row_parts.sum(0, keepdim=True))
                total = column_parts.sum(0, keepdim=True)
                column_sums = total if column_sums is None else column_sums.add_(total)
        if column_sums is not None:
            row_parts, column_parts = torch.cat(row_sums, 1), column_sums
        row_blocks = _blocks(rows, PRODUCT_BLOCK)
        log_sums[(row_blocks + _blocks(texts, PRODUCT_BLOCK),)](
            x,
            y,
            batch.scale,
            y if batch.weight is None else batch.weight,
            row_parts,
            column_parts,
            row_lse,
            column_lse,
            *rows,
            *texts,
            n,
            u,
            len(row_parts),
            len(column_parts),
            row_blocks,
            WIDTH=plan.width,
            HAS_WEIGHT=batch.weight is not None,
            TILE=BLOCK,
            BM=PRODUCT_BLOCK,
            BK=plan.inner,
            PRECISION=plan.precision,
            num_warps=4,
            num_stages=2,
        )
        positive = _times_scale(cosine, batch)
    return row_lse, column_lse, positive.double()


def _times_scale(cosine: Tensor, batch: _Batch) -> Tensor:  # [sum N] -> [sum N] float64
    # The kernels' own scale: k2 as float32, back from base 2.
    k2 = (batch.scale * LOG2E.value).double() * LN2.value
    levels = len(batch.image)
    per_row = k2 if levels == 1 else torch.cat([k2[k].expand(len(x)) for k, x in enumerate(batch.image)])
    return cosine.double() * per_row


def backward(
    image: Sequence[Tensor],
    text: Sequence[Tensor],
    scale: Tensor,
    index: Sequence[Tensor],
    weight: Sequence[Tensor],
    sums: tuple[Tensor, Tensor, Tensor],  # what forward returned
    grads: tuple[Tensor, Tensor, Tensor],  # of those three
    normalize: bool,
    need_image: bool,
    need_text: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:  # d_image, d_text (empty tensors where not needed), d_scale [levels]
    d_image, d_text, d_scale = [], [], []
    n, u = [len(x) for x in image], [len(y) for y in text]
    for part, batch in _batches(image, text, scale, index, weight, normalize):
        rows = slice(sum(n[: part.start]), sum(n[: part.stop]))
        texts = slice(sum(u[: part.start]), sum(u[: part.stop]))
        with torch.cuda.device_of(scale):
            d_x, d_y, d_s = _backward(
                batch,
                (sums[0][rows], sums[1][texts]),
                (grads[0][rows], grads[1][texts], grads[2][rows]),
                need_image,
                need_text,
            )
        d_image += d_x
        d_text += d_y
        d_scale.append(d_s)
    return d_image, d_text, torch.cat(d_scale)


def _backward(
    batch: _Batch,
    log_sums: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor, Tensor],
    need_image: bool,
    need_text: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    plan, rows, texts = batch.plan, batch.rows, batch.texts
    n, u, device = sum(rows), sum(texts), batch.scale.device
    nothing = batch.image[0].new_empty(0)
    d_image = [torch.zeros_like(x) if need_image else nothing.clone() for x in batch.image]
    d_text = [torch.zeros_like(y) if need_text else nothing.clone() for y in batch.text]
    if not n or not u:
        return d_image, d_text, torch.zeros_like(batch.scale)
    need_x = need_image or not need_text  # the gradient of the scale is read off one of the two products
    x, x_inverse = _units(batch.image, plan, batch.normalize)
    y, y_inverse = _units(batch.text, plan, batch.normalize)
    row_log, row_factor, column_log, column_factor = (
        torch.empty(size, dtype=torch.float32, device=device) for size in (n, n, u, u)
    )
    factors[(_blocks([n, u], 1024),)](
        *log_sums, grads[0], grads[1], row_log, column_log, row_factor, column_factor, n, u, BM=1024
    )
    d_x = torch.empty(n, plan.width, dtype=torch.float32, device=device) if need_x else None
    d_y = torch.zeros(u, plan.width, dtype=torch.float32, device=device) if need_text else None

    grouped = sum(a * b for a, b in zip(rows, texts, strict=True)) <= GROUPED
    step = n if grouped else max(BLOCK, min(CHUNK_ROWS, CHUNK_BYTES // (u * plan.operand.itemsize)) // BLOCK * BLOCK)
    index = batch.index
    if index is None and step < n:
        index = torch.arange(n, device=device)
    stride = [_whole(b) for b in texts]
    grad = torch.empty(
        sum(_whole(min(step, a)) * b for a, b in zip(rows, stride, strict=True)), dtype=plan.operand, device=device
    )
    for start in range(0, n, step):
        chunk = slice(start, min(start + step, n))
        sizes = rows if grouped else [chunk.stop - chunk.start, 0, 0, 0]
        tile_gradients[(sum(-(-a // BLOCK) * -(-b // BLOCK) for a, b in zip(sizes, texts, strict=True)),)](
            plan.tiles(x[chunk]),
            plan.tiles(y),
            batch.scale,
            x if index is None else index[chunk],
            y if batch.weight is None else batch.weight,
            row_log[chunk],
            column_log,
            row_factor[chunk],
            column_factor,
            grads[2][chunk],
            grad,
            *sizes,
            *texts,
            WIDTH=plan.width,
            HAS_INDEX=index is not None,
            HAS_WEIGHT=batch.weight is not None,
            BM=BLOCK,
            BN=BLOCK,
            BK=plan.inner,
            TMA=plan.tma,
            PRECISION=plan.precision,
            **plan.options(),
        )
        if grouped:
            sides = [need_x, need_text]
            products[
                (
                    max(_blocks(rows, PRODUCT_BLOCK), _blocks(texts, PRODUCT_BLOCK)),
                    -(-plan.width // PRODUCT_BLOCK),
                    sum(sides),
                )
            ](
                grad,
                x,
                y,
                x if d_x is None else d_x,
                y if d_y is None else d_y,
                *rows,
                *texts,
                WIDTH=plan.width,
                FIRST_SIDE=0 if need_x else 1,
                TILE=BLOCK,
                BM=PRODUCT_BLOCK,
                BN=PRODUCT_BLOCK,
                BK=plan.inner,
                PRECISION=plan.precision,
                num_warps=4,
                num_stages=3,
            )
        else:
            tile = grad[: sizes[0] * stride[0]].view(sizes[0], stride[0])[:, : texts[0]]
            if d_x is not None:
                _product(tile, y, d_x[chunk], accumulate=False)
            if d_y is not None:
                _product(tile.T, x[chunk], d_y, accumulate=True)

    # Every row of dS sums up to the gradient of the scale along with the row's own feature, and so does every column.
    if d_x is not None:
        along = _finish(batch.image, d_image, x_inverse, d_x, batch, need_image)
        d_scale = _level_sums(along, rows, len(batch.image))
    if d_y is not None:
        along = _finish(batch.text, d_text, y_inverse, d_y, batch, need_text)
        if d_x is None:
            d_scale = _level_sums(along, texts, len(batch.image))
    return d_image, d_text, d_scale


def _product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """out (+)= a b, low-precision operands and float32 sums."""
    if a.dtype == torch.float32:
        out.addmm_(a, b) if accumulate else torch.mm(a, b, out=out)
    elif accumulate and _accumulates(a.dtype, a.device):
        torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)
    elif accumulate:
        out.add_(torch.mm(a, b, out_dtype=torch.float32))
    else:
        torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)


@functools.cache
def _accumulates(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether addmm takes float32 to add to beside operands of `dtype`: not every version of torch does.

    Asked with empty matrices: the arguments are checked, and nothing is launched.
    """
    out, empty = torch.empty(0, 0, device=device), torch.empty(0, 0, dtype=dtype, device=device)
    try:
        torch.ops.aten.addmm.dtype_out(out, empty, empty, torch.float32, out=out)
    except (RuntimeError, AttributeError):
        return False
    return True


def _finish(
    features: Sequence[Tensor],
    out: Sequence[Tensor],
    inverse: Tensor,
    d_unit: Tensor,
    batch: _Batch,
    wanted: bool,
) -> Tensor:  # [sum N]
    along = torch.empty_like(inverse)
    finish_rows[(len(along),)](
        *_fill(features),
        *_fill(out if wanted else [torch.empty_like(x) for x in features]),
        inverse,
        d_unit,
        batch.scale,
        along,
        *_sizes(features),
        *(t.stride(0) for t in _fill(features)),
        D=features[0].shape[1],
        WIDTH=batch.plan.width,
        BLOCK_D=triton.next_power_of_2(batch.plan.width),
        NORMALIZE=batch.normalize,
        num_warps=2,
    )
    return along


def _level_sums(along: Tensor, sizes: list[int], levels: int) -> Tensor:  # [sum N] -> [levels]
    out = torch.empty(levels, dtype=torch.float32, device=along.device)
    sum_levels[(levels,)](along, out, *sizes, BM=1024)
    return out
