"""The Triton kernels of the contrastive softmax, launched by contrastive_triton.py.

Up to LEVELS levels share a launch; arguments numbered k belong to level k, and buffers hold the levels one after
another. Logits are in base 2: cosines times k2 = scale * log2(e).
"""

# mypy: disable-error-code="no-untyped-def"
# (kernel arguments have no Python types; comments give their shapes)

from __future__ import annotations

import triton
import triton.language as tl

# Per launch. Kernels take the size and pointer of each level as separate arguments, not as tuples: in Triton 3.6
# and 3.7, do_not_specialize and do_not_specialize_on_alignment do not reach the elements of a tuple (handle_tuple in
# specialize.cc). Measured with tuples: 7 sets of sizes compiled 7 times instead of once, and the 16 alignments of 4
# pointers 16 times instead of once. A tensor of offsets would cost a copy to the device.
# Within the kernels, ns and us are the tuples of n0..n3 and u0..u3.
LEVELS = 4

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# exp2 flushes results below 2^-126 to zero. A largest possible logit, k2, above 100 is shifted to 100: a row then loses
# only terms with a cosine below -0.57 (at scale 100), and 2^27 terms stay finite. Smaller scales get no offset, which
# would cost precision. Sums outside [LOW, HIGH] are recomputed with a running maximum.
HEADROOM = tl.constexpr(100.0)
LOW = tl.constexpr(2.0**-100)
HIGH = tl.constexpr(2.0**127)
# Tiles whose log-sums differ by less than this use one exponential in the backward pass.
SPREAD = tl.constexpr(60.0)

_SIZES = [f"{side}{k}" for side in "nu" for k in range(LEVELS)]
# The levels of a call may need several batches of launches, which get slices of whole buffers. Their alignment must not
# trigger a recompilation, hence do_not_specialize_on_alignment. ALIGNED handles the alignment of features.
_FEATURES = [f"{side}{k}" for side in "ao" for k in range(LEVELS)]


@triton.jit
def _pick(level, a):
    return tl.where(level == 0, a[0], tl.where(level == 1, a[1], tl.where(level == 2, a[2], a[3])))


@triton.jit
def _before(level, a):
    """The sum over the levels before this one."""
    return tl.where(level > 0, a[0], 0) + tl.where(level > 1, a[1], 0) + tl.where(level > 2, a[2], 0)


@triton.jit
def _cdiv(a, B: tl.constexpr):
    return tl.cdiv(a[0], B), tl.cdiv(a[1], B), tl.cdiv(a[2], B), tl.cdiv(a[3], B)


@triton.jit
def _locate(pid, b):
    """The level of block pid when level k has b[k] blocks, and the block's number within it."""
    level = (pid >= b[0]).to(tl.int32) + (pid >= b[0] + b[1]).to(tl.int32) + (pid >= b[0] + b[1] + b[2]).to(tl.int32)
    return level, pid - _before(level, b)


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
    """x y^T of one tile. Entries past the ends come from other rows: finite if the features are, and to be masked."""
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
def _tile(pid, ns, us, BM: tl.constexpr, BN: tl.constexpr):
    """The tile of a program: level, its sizes, offsets of its rows and texts, block row and block column."""
    level, tile = _locate(
        pid,
        (
            tl.cdiv(ns[0], BM) * tl.cdiv(us[0], BN),
            tl.cdiv(ns[1], BM) * tl.cdiv(us[1], BN),
            tl.cdiv(ns[2], BM) * tl.cdiv(us[2], BN),
            tl.cdiv(ns[3], BM) * tl.cdiv(us[3], BN),
        ),
    )
    n, u = _pick(level, ns), _pick(level, us)
    # Eight block rows at a time, so that concurrent tiles share operands in L2.
    block_rows, block_columns = tl.cdiv(n, BM), tl.cdiv(u, BN)
    first = tile // (8 * block_columns) * 8
    height = tl.minimum(block_rows - first, 8)
    inside = tile % (8 * block_columns)
    return (
        level,
        n,
        u,
        _before(level, ns),
        _before(level, us),
        first + inside % height,
        inside // height,
    )


@triton.jit
def _positive_column(index, row, rows, start, shift, mask, HAS_INDEX: tl.constexpr):
    """The column of each row's positive, relative to start. `shift`: the offset of this block, in texts with an
    index, in texts minus rows without."""
    if HAS_INDEX:
        return (tl.load(index + row + rows, mask=mask, other=-1) - shift - start).to(tl.int32)
    else:
        return rows - shift - start


@triton.jit
def _rows_of(level, row, f, stride, ALIGNED: tl.constexpr):
    """A pointer to a row of one level's features."""
    features = f[0]
    if level == 1:
        features = f[1]
    if level == 2:
        features = f[2]
    if level == 3:
        features = f[3]
    features += row.to(tl.int64) * stride
    return tl.multiple_of(features, 16) if ALIGNED else features


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_FEATURES)
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
    ROUND: tl.constexpr,
    ALIGNED: tl.constexpr,  # all rows of all levels are 16-byte aligned
):
    pid = tl.program_id(0)
    level, row = _locate(pid, (n0, n1, n2, n3))
    features = _rows_of(level, row, (a0, a1, a2, a3), _pick(level, (u0, u1, u2, u3)), ALIGNED)
    d = tl.arange(0, BLOCK_D)
    x = tl.load(features + d, mask=d < D, other=0.0).to(tl.float32)
    scale = 1.0
    if NORMALIZE:
        # Divide by the largest entry first: squares of large or tiny float32 features overflow or underflow.
        largest = tl.max(tl.abs(x), 0)
        scaled = tl.where(largest > 0, x / largest, x)
        length = largest * tl.sqrt(tl.sum(scaled * scaled, 0))
        scale = 1.0 / tl.where(length < SMALLEST, SMALLEST, length)
    x *= scale
    if ROUND:
        # Round to TF32: the tensor cores truncate 13 bits, which makes every cosine smaller. NaN would become 0.
        nearest = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, nearest, x)
    tl.store(unit + pid.to(tl.int64) * WIDTH + d, x, mask=d < WIDTH)
    tl.store(inverse + pid, scale)
    if POSITIVE:
        tl.store(positive + pid, float("nan"))


@triton.jit(
    do_not_specialize=[*_SIZES, "shift", "rows_total", "columns_total"],
    do_not_specialize_on_alignment=["scale", "index", "weight"],
)
def tile_sums(
    x,  # [sum N, WIDTH]
    y,  # [sum U, WIDTH]
    scale,  # [levels]
    index,  # [sum N] int64
    weight,  # [sum U] numbers or counts
    row_parts,  # [block columns, sum N] out
    column_parts,  # [block rows, sum U] out
    positive,  # [sum N] out: cosine of each row's positive
    n0,
    n1,
    n2,
    n3,
    u0,
    u1,
    u2,
    u3,
    shift,
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
    ns, us = (n0, n1, n2, n3), (u0, u1, u2, u3)
    level, n, u, row, column, i, j = _tile(tl.program_id(0), ns, us, BM, BN)
    acc = _dot_tile(x, y, row + i * BM, column + j * BN, row + n, column + u, WIDTH, BM, BN, BK, TMA, PRECISION)
    rows, columns = i * BM + tl.arange(0, BM), j * BN + tl.arange(0, BN)
    in_rows, in_columns = rows < n, columns < u
    # Read from this accumulator: the result of another product could exceed the log-sum.
    positive_column = _positive_column(index, row, rows, j * BN, shift, in_rows, HAS_INDEX)
    in_tile = in_rows & (positive_column >= 0) & (positive_column < tl.minimum(u - j * BN, BN))
    if tl.max(in_tile.to(tl.int32), 0) > 0:
        at = tl.arange(0, BN)[None, :] == positive_column[:, None]
        tl.store(positive + row + rows, tl.sum(tl.where(at, acc, 0.0), 1), mask=in_tile)
    k2 = tl.load(scale + level) * LOG2E
    e = tl.exp2(acc * k2 - tl.maximum(k2 - HEADROOM, 0.0))
    w = in_columns.to(tl.float32)
    if HAS_WEIGHT:
        w = tl.load(weight + column + columns, mask=in_columns, other=0).to(tl.float32)
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
    cosine,  # [sum N_a] of the positives
    positive,  # [sum N_a] float64
    out,  # [sum N_a] float64
    ns,
    us,
    total,
    count,
    WIDTH: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    POSITIVE: tl.constexpr,
    TILE: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    level, i = _locate(pid, _cdiv(ns, BM))
    n, u = _pick(level, ns), _pick(level, us)
    row, column = _before(level, ns), _before(level, us)
    rows = i * BM + tl.arange(0, BM)
    in_rows = rows < n
    k2 = tl.load(scale + level) * LOG2E
    total_sum = tl.zeros([BM], tl.float32)
    at = parts + row + rows
    for _ in range(0, tl.minimum(count, tl.cdiv(u, TILE))):
        total_sum += tl.load(at, mask=in_rows, other=1.0)
        at += total
    log_sum = tl.log2(total_sum.to(tl.float64)) + tl.maximum(k2 - HEADROOM, 0.0).to(tl.float64)
    in_range = (total_sum >= LOW) & (total_sum <= HIGH) | (rows >= n)
    if tl.min(in_range.to(tl.int32), 0) == 0:
        top = tl.full([BM], float("-inf"), tl.float32)
        terms = tl.zeros([BM], tl.float32)
        for start in range(0, u, BM):
            acc = _dot_tile(
                a, b, row + i * BM, column + start, row + n, column + u, WIDTH, BM, BM, BK, False, PRECISION
            )
            columns = start + tl.arange(0, BM)
            w = (columns < u).to(tl.float32)
            if HAS_WEIGHT:
                w = tl.load(weight + column + columns, mask=columns < u, other=0).to(tl.float32)
            # A text of weight zero contributes nothing, unless it is NaN.
            logits = tl.where((w > 0)[None, :] | (acc != acc), acc * k2, float("-inf"))
            higher = tl.maximum(top, tl.max(logits, 1))
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            terms = terms * tl.exp2(top - shift) + tl.sum(tl.exp2(logits - shift[:, None]) * w[None, :], 1)
            top = higher
        recomputed = tl.log2(terms.to(tl.float64)) + top.to(tl.float64)
        log_sum = tl.where(in_range, log_sum, recomputed)
    # The host does not check the scale, which would synchronise: one that is not positive gives NaN.
    tl.store(out + row + rows, tl.where(k2 > 0, log_sum * LN2, float("nan")), mask=in_rows)
    if POSITIVE:
        own_cosine = tl.load(cosine + row + rows, mask=in_rows, other=0.0).to(tl.float64)
        tl.store(positive + row + rows, own_cosine * (k2.to(tl.float64) * LN2), mask=in_rows)


@triton.jit(
    do_not_specialize=[*_SIZES, "rows_total", "columns_total", "row_count", "column_count", "row_blocks"],
    do_not_specialize_on_alignment=["scale", "weight"],
)
def log_sums(
    x,  # [sum N, WIDTH]
    y,  # [sum U, WIDTH]
    scale,  # [levels]
    weight,  # [sum U]
    row_parts,  # [row_count, sum N]
    column_parts,  # [column_count, sum U]
    cosine,  # [sum N] of the positives
    row_lse,  # [sum N] float64 out
    column_lse,  # [sum U] float64 out
    positive,  # [sum N] float64 out
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
    row_blocks,  # programs that process rows; the rest process columns
    WIDTH: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ROW_TILE: tl.constexpr,
    COLUMN_TILE: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds the partial sums of tiles and takes logarithms; recomputes blocks whose sums are out of range."""
    ns, us = (n0, n1, n2, n3), (u0, u1, u2, u3)
    pid = tl.program_id(0)
    if pid < row_blocks:
        _log_sums(
            pid, row_parts, x, y, weight, scale, cosine, positive, row_lse,
            ns, us, rows_total, row_count,
            WIDTH, HAS_WEIGHT, True, COLUMN_TILE, BM, BK, PRECISION,
        )  # fmt: skip
    else:
        _log_sums(
            pid - row_blocks, column_parts, y, x, weight, scale, cosine, positive, column_lse,
            us, ns, columns_total, column_count,
            WIDTH, False, False, ROW_TILE, BM, BK, PRECISION,
        )  # fmt: skip


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
    row_factor,  # [N] out: grad_row, corrected for that rounding
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
    correction = tl.exp2((rounded.to(tl.float64) - exact).to(tl.float32))
    tl.store(log_out + i, rounded, mask=i < size)
    tl.store(factor_out + i, tl.load(grad + i, mask=i < size, other=0.0).to(tl.float32) * correction, mask=i < size)


@triton.jit
def _gradient(
    cosine,  # [BM, BN]
    k2,
    r,  # [BM] log-sums of the rows
    a,  # [BM] their factors
    positive_column,  # [BM] column of each row's positive, in this tile or not
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
    """dS of one tile: a_i w_u exp2(S - r_i) + b_u exp2(S - c_u), plus the gradient of the positives."""
    at = column + tl.minimum(start + tl.arange(0, BN), u - 1)
    c, b = tl.load(column_log + at), tl.load(column_factor + at)
    w = tl.full([BN], 1.0, tl.float32)
    if HAS_WEIGHT:
        w = tl.load(weight + at).to(tl.float32)
    highest = tl.maximum(tl.max(r, 0), tl.max(c, 0))
    lowest = tl.minimum(tl.min(r, 0), tl.min(c, 0))
    if highest - lowest < SPREAD:
        # One exponential for both softmaxes. No logit exceeds its column's log-sum, so that none overflows, and what
        # underflows is below 2^(SPREAD - 126) of its sum.
        a *= tl.exp2(highest - r)
        b *= tl.exp2(highest - c)
        out = tl.exp2(cosine * k2 - highest) * (a[:, None] * w[None, :] + b[None, :])
    else:
        logits = cosine * k2
        # A text without weight may exceed the row's log-sum without bound.
        by_row = tl.exp2(tl.where((w > 0)[None, :], logits - r[:, None], 0.0)) * a[:, None] * w[None, :]
        out = by_row + tl.exp2(logits - c[None, :]) * b[None, :]
    in_tile = (positive_column >= 0) & (positive_column < BN)
    if tl.max(in_tile.to(tl.int32), 0) > 0:
        positive = tl.load(grad_positive, mask=in_tile, other=0.0).to(tl.float32)
        out += tl.where(tl.arange(0, BN)[None, :] == positive_column[:, None], positive[:, None], 0.0)
    return out


@triton.jit(
    do_not_specialize=[*_SIZES, "shift"],
    do_not_specialize_on_alignment=["scale", "index", "weight", "grad_positive"],
)
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
    shift,
    WIDTH: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    ns, us = (n0, n1, n2, n3), (u0, u1, u2, u3)
    level, n, u, row, column, i, j = _tile(tl.program_id(0), ns, us, BM, BN)
    acc = _dot_tile(x, y, row + i * BM, column + j * BN, row + n, column + u, WIDTH, BM, BN, BK, TMA, PRECISION)
    rows = i * BM + tl.arange(0, BM)
    at_rows = row + tl.minimum(rows, n - 1)
    r, a = tl.load(row_log + at_rows), tl.load(row_factor + at_rows)
    positive_column = tl.where(rows < n, _positive_column(index, row, rows, j * BN, shift, rows < n, HAS_INDEX), -1)
    k2 = tl.load(scale + level) * LOG2E
    # Stored in whole tiles: entries past the ends are never read, and a mask would cost registers.
    base, stride = _grad_level(level, ns, us, u, BM, BN)
    out = grad + base + (i * BM).to(tl.int64) * stride + j * BN
    out = out + tl.arange(0, BM).to(tl.int64)[:, None] * stride + tl.arange(0, BN // 2)[None, :]
    # Half the columns at a time: the values loaded per column would not fit in registers beside a whole tile.
    left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
    first = _gradient(
        left, k2, r, a, positive_column, column_log, weight, column_factor, grad_positive + row + rows,
        column, j * BN, u, HAS_WEIGHT, BN // 2,
    )  # fmt: skip
    tl.store(out, first.to(grad.dtype.element_ty))
    second = _gradient(
        right, k2, r, a, positive_column - BN // 2, column_log, weight, column_factor, grad_positive + row + rows,
        column, j * BN + BN // 2, u, HAS_WEIGHT, BN // 2,
    )  # fmt: skip
    tl.store(out + BN // 2, second.to(grad.dtype.element_ty))


@triton.jit
def _grad_level(level, ns, us, u, BM: tl.constexpr, BN: tl.constexpr):
    """The offset of a level's dS, and the stride of its rows."""
    base = _before(
        level,
        (
            (tl.cdiv(ns[0], BM) * BM).to(tl.int64) * (tl.cdiv(us[0], BN) * BN),
            (tl.cdiv(ns[1], BM) * BM).to(tl.int64) * (tl.cdiv(us[1], BN) * BN),
            (tl.cdiv(ns[2], BM) * BM).to(tl.int64) * (tl.cdiv(us[2], BN) * BN),
        ),
    )
    return base, tl.cdiv(u, BN) * BN


@triton.jit
def _product(
    pid,
    grad,
    other,  # [rows of the inner dimension, WIDTH]
    out,
    ns,
    us,
    SIDE: tl.constexpr,  # 0: dS other; 1: dS^T other
    WIDTH: tl.constexpr,
    ROW_TILE: tl.constexpr,
    COLUMN_TILE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # dS is read in whole blocks, without a mask, so blocks must not extend beyond its padding.
    tl.static_assert(ROW_TILE % BM == 0 and COLUMN_TILE % BM == 0 and ROW_TILE % BK == 0 and COLUMN_TILE % BK == 0)
    if SIDE == 0:
        level, i = _locate(pid, _cdiv(ns, BM))
    else:
        level, i = _locate(pid, _cdiv(us, BM))
    n, u = _pick(level, ns), _pick(level, us)
    row, column = _before(level, ns), _before(level, us)
    base, stride = _grad_level(level, ns, us, u, ROW_TILE, COLUMN_TILE)
    if SIDE == 0:
        height, depth, first, first_inner = n, u, row, column
    else:
        height, depth, first, first_inner = u, n, column, row
    rows, columns, inner = i * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BK)
    if i * BM < height:
        if SIDE == 0:
            a, step = grad + base + rows.to(tl.int64)[:, None] * stride + inner[None, :], tl.full([], 1, tl.int64)
        else:
            a, step = grad + base + inner.to(tl.int64)[None, :] * stride + rows[:, None], stride.to(tl.int64)
        b = other + (first_inner + inner).to(tl.int64)[:, None] * WIDTH + columns[None, :]
        width = tl.full([], WIDTH, tl.int64)
        in_width = (columns < WIDTH)[None, :]
        acc = tl.zeros([BM, BN], tl.float32)
        whole = depth // BK * BK
        for k in range(0, whole, BK):
            acc = tl.dot(
                tl.load(a + k * step),
                tl.load(b + k * width, mask=in_width, other=0.0),
                acc,
                input_precision=PRECISION,
            )
        if whole < depth:
            # Entries past the ends may be infinite, and infinity times zero is NaN.
            inside = inner < depth - whole
            acc = tl.dot(
                tl.where(inside[None, :], tl.load(a + whole * step), 0.0),
                tl.load(b + whole * width, mask=inside[:, None] & in_width, other=0.0),
                acc,
                input_precision=PRECISION,
            )
        at_out = out + (first + rows).to(tl.int64)[:, None] * WIDTH + columns[None, :]
        tl.store(at_out, acc, mask=(rows < height)[:, None] & in_width)


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
    ROW_TILE: tl.constexpr,
    COLUMN_TILE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Both products of all levels; program ids: block of rows, block of columns, side."""
    ns, us = (n0, n1, n2, n3), (u0, u1, u2, u3)
    pid = tl.program_id(0)
    # The side is a constant in each branch, so that the compiler knows along which dimension dS is contiguous.
    if tl.program_id(2) + FIRST_SIDE == 0:
        _product(pid, grad, y, d_x, ns, us, 0, WIDTH, ROW_TILE, COLUMN_TILE, BM, BN, BK, PRECISION)
    else:
        _product(pid, grad, x, d_y, ns, us, 1, WIDTH, ROW_TILE, COLUMN_TILE, BM, BN, BK, PRECISION)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=[*_FEATURES, "scale"])
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
    d_unit,  # [sum N, WIDTH] gradient of the unit row, not yet multiplied by the scale
    scale,  # [levels]
    dots,  # [sum N] out: unit row . d_unit, whose sum is the gradient of the scale
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
    ALIGNED: tl.constexpr,  # all rows of all levels are 16-byte aligned, in and out
):
    pid = tl.program_id(0)
    level, row = _locate(pid, (n0, n1, n2, n3))
    features = _rows_of(level, row, (a0, a1, a2, a3), _pick(level, (u0, u1, u2, u3)), ALIGNED)
    out = _rows_of(level, row, (o0, o1, o2, o3), D, ALIGNED)
    d = tl.arange(0, BLOCK_D)
    inv = tl.load(inverse + pid)
    x = tl.load(features + d, mask=d < D, other=0.0).to(tl.float32) * inv
    g = tl.load(d_unit + pid.to(tl.int64) * WIDTH + d, mask=d < D, other=0.0)
    dot = tl.sum(x * g, 0)
    tl.store(dots + pid, dot)
    if NORMALIZE:
        g = (g - x * dot) * inv
    g *= tl.load(scale + level)
    tl.store(out + d, g.to(out.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["n0", "n1", "n2", "n3"])
def sum_levels(dots, out, n0, n1, n2, n3, BM: tl.constexpr):
    """dots [sum N] -> out [levels]: the sum of each level's rows."""
    ns, level = (n0, n1, n2, n3), tl.program_id(0)
    first, n = _before(level, ns), _pick(level, ns)
    total = tl.zeros([BM], tl.float32)
    for i in range(0, n, BM):
        at = i + tl.arange(0, BM)
        total += tl.load(dots + first + at, mask=at < n, other=0.0)
    tl.store(out + level, tl.sum(total, 0))


@triton.jit(do_not_specialize=["n", "u"], do_not_specialize_on_alignment=["index"])
def count_rows(
    index,  # [N] int64
    count,  # [U] int32, zero-initialised, out: rows of each text
    n,
    u,
    BM: tl.constexpr,
):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    text = tl.load(index + rows, mask=rows < n, other=-1)
    # Integers: the sum does not depend on the order.
    tl.atomic_add(count + text, tl.full([BM], 1, tl.int32), mask=(text >= 0) & (text < u), sem="relaxed")


@triton.jit
def _counts_of(count, index, u, rows, mask):
    """The number of rows that share the text of each row; an index out of range, whose row is NaN, reads nothing."""
    text = tl.load(index + rows, mask=mask, other=0)
    return tl.load(count + text, mask=mask & (text >= 0) & (text < u), other=1).to(tl.float64)


@triton.jit(do_not_specialize=["n", "u", "row_blocks"], do_not_specialize_on_alignment=["index"])
def mean_parts(
    row_lse,  # [N] float64
    column_lse,  # [U] float64
    positive,  # [N] float64
    count,  # [U] int32
    index,  # [N] int64
    parts,  # [blocks, 2] float64 out
    n,
    u,
    row_blocks,  # programs that process rows; the rest process columns
    HAS_COUNT: tl.constexpr,
    POSITIVES: tl.constexpr,
    BM: tl.constexpr,
):
    """The parts of a loss that `mean_loss` adds up.

    Rows: log-sums minus positives, and minus positives (per row of their text, for "positives"). Columns: weighted
    log-sums, and texts that have rows.
    """
    pid = tl.program_id(0)
    if pid < row_blocks:
        at = pid * BM + tl.arange(0, BM)
        mask = at < n
        logit = tl.load(positive + at, mask=mask, other=0.0)
        first = tl.load(row_lse + at, mask=mask, other=0.0) - logit
        second = -logit / _counts_of(count, index, u, at, mask) if POSITIVES else -logit
    else:
        at = (pid - row_blocks) * BM + tl.arange(0, BM)
        mask = at < u
        c = mask.to(tl.float64)
        if HAS_COUNT:
            c = tl.load(count + at, mask=mask, other=0).to(tl.float64)
        second = (c > 0).to(tl.float64)
        # A text without rows does not count.
        log_sum = tl.load(column_lse + at, mask=mask & (c > 0), other=0.0)
        first = log_sum * second if POSITIVES else log_sum * c
    tl.store(parts + 2 * pid, tl.sum(first, 0))
    tl.store(parts + 2 * pid + 1, tl.sum(second, 0))


@triton.jit(do_not_specialize=["n", "row_blocks", "blocks"], do_not_specialize_on_alignment=["loss"])
def mean_loss(
    parts,  # [blocks, 2] float64
    loss,  # [] float32 out
    used,  # [1] float64 out: texts that have rows
    n,
    row_blocks,
    blocks,
    POSITIVES: tl.constexpr,
    BM: tl.constexpr,
):
    by_row, by_column = tl.zeros([BM], tl.float64), tl.zeros([BM], tl.float64)
    texts = tl.zeros([BM], tl.float64)
    for start in range(0, blocks, BM):
        at = start + tl.arange(0, BM)
        first = tl.load(parts + 2 * at, mask=at < blocks, other=0.0)
        second = tl.load(parts + 2 * at + 1, mask=at < blocks, other=0.0)
        is_row = at < row_blocks
        by_row += tl.where(is_row, first, 0.0)
        by_column += tl.where(is_row, second, first)
        texts += tl.where(is_row, 0.0, second)
    total = tl.sum(texts, 0)
    rows = tl.maximum(n, 1).to(tl.float64)
    divisor = tl.maximum(total, 1.0) if POSITIVES else rows
    value = (tl.sum(by_row, 0) / rows + tl.sum(by_column, 0) / divisor) / 2
    tl.store(loss, value.to(tl.float32))
    tl.store(used, total)


@triton.jit(do_not_specialize=["n", "u", "row_blocks"], do_not_specialize_on_alignment=["grad", "index"])
def mean_gradients(
    grad,  # [] float32 of the loss
    used,  # [1] float64
    count,  # [U] int32
    index,  # [N] int64
    grad_row,  # [N] float64 out
    grad_column,  # [U] float64 out
    grad_positive,  # [N] float64 out
    n,
    u,
    row_blocks,  # programs that process rows; the rest process columns
    HAS_COUNT: tl.constexpr,
    POSITIVES: tl.constexpr,
    BM: tl.constexpr,
):
    """The gradient of `mean_loss` with respect to each log-sum and each positive."""
    pid = tl.program_id(0)
    half = tl.load(grad).to(tl.float64) / 2
    if pid < row_blocks:
        at = pid * BM + tl.arange(0, BM)
        mask = at < n
        share = tl.full([BM], 1.0, tl.float64) * (half / tl.maximum(n, 1))
        tl.store(grad_row + at, share, mask=mask)
        if POSITIVES:
            shared = _counts_of(count, index, u, at, mask)
            # In float32, like the value it is added to: a vector of float64 quotients would need the stack.
            tl.store(grad_positive + at, -share - half / tl.load(used) * (1.0 / shared.to(tl.float32)), mask=mask)
        else:
            tl.store(grad_positive + at, -2 * share, mask=mask)
    else:
        at = (pid - row_blocks) * BM + tl.arange(0, BM)
        mask = at < u
        c = mask.to(tl.float64)
        if HAS_COUNT:
            c = tl.load(count + at, mask=mask, other=0).to(tl.float64)
        share = (
            tl.where(c > 0, half / tl.maximum(tl.load(used), 1.0), 0.0) if POSITIVES else c * (half / tl.maximum(n, 1))
        )
        tl.store(grad_column + at, share, mask=mask)
