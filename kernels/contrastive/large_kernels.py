"""The Triton kernels for one large level, launched by large_triton.py.

Operands are multiplied as they are; the fold of a row makes its operand a unit row (see large.py). Logits are in base
2: cosines times k2 = scale * log2(e).
"""

# mypy: disable-error-code="no-untyped-def"
# (kernel arguments have no Python types; comments give their shapes)

from __future__ import annotations

import triton
import triton.language as tl

from .triton_constants import HEADROOM, HEAVIEST, HIGH, LN2, LOG2E, LOW

# Backward: log-sums lie between k2 - 200 and k2 + 27 (sums in [LOW, HIGH]). Relative to an offset of k2 - BELOW, one
# exponential serves rows and columns. A tile with a log-sum outside offset + CENTRE -+ REACH, or a weight that could
# overflow the factor of the exponential, takes two.
BELOW = tl.constexpr(86.0)
CENTRE = tl.constexpr(15.0)
REACH = tl.constexpr(95.0)
HEAVY = tl.constexpr(2.0**40)
# Norms that products of bfloat16 features, exponents and H in float32 have room for. Others, except zero, give NaN.
SMALLEST_NORM = tl.constexpr(2.0**-20)
LARGEST_NORM = tl.constexpr(2.0**20)

_SLICES = [
    "index",
    "weight",
    "fold_x",
    "fold_y",
    "inverse",
    "row_log",
    "row_gain",
    "text_log",
    "text_gain",
    "text_weight",
    "positive",
]


@triton.jit
def _dot_tile(
    x,  # [N, WIDTH] pointer, or a descriptor with TMA
    y,  # [U, WIDTH]
    i,
    j,
    n,
    u,
    x_stride,  # in units of 8 entries, so that the compiler knows that rows are aligned
    y_stride,
    WIDTH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x y^T from row i and column j on. Entries past the ends are those of the last row or column, or 0."""
    acc = tl.zeros([BM, BN], tl.float32)
    if TMA:
        for k in range(0, WIDTH, BK):
            acc = tl.dot(x.load([i, k]), y.load([j, k]).T, acc, input_precision=PRECISION)
    else:
        rows = tl.minimum(i + tl.arange(0, BM), n - 1).to(tl.int64)
        columns = tl.minimum(j + tl.arange(0, BN), u - 1).to(tl.int64)
        inner = tl.arange(0, BK)
        a = x + rows[:, None] * (x_stride * 8) + inner[None, :]
        b = y + columns[None, :] * (y_stride * 8) + inner[:, None]
        for k in range(0, WIDTH, BK):
            acc = tl.dot(tl.load(a + k), tl.load(b + k), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _tile(pid, n, u, BM: tl.constexpr, BN: tl.constexpr):
    """The first row and column of a program's tile: eight block rows at a time, which share operands in L2."""
    block_rows, block_columns = tl.cdiv(n, BM), tl.cdiv(u, BN)
    first = pid // (8 * block_columns) * 8
    height = tl.minimum(block_rows - first, 8)
    inside = pid % (8 * block_columns)
    return (first + inside % height) * BM, inside // height * BN


@triton.jit
def _positive_column(index, rows, mask, shift, u, HAS_INDEX: tl.constexpr):
    """The column of each row's positive, -1 if it is not one of `u`."""
    column = (rows + shift).to(tl.int64)
    if HAS_INDEX:
        column = tl.load(index + rows, mask=mask, other=-1) + shift
    return tl.where((column >= 0) & (column < u), column, -1).to(tl.int32)


@triton.jit(do_not_specialize=["stride"], do_not_specialize_on_alignment=["features", "inverse"])
def inverse_norms(
    features,  # [N, D]
    inverse,  # [N] out
    stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ALIGNED: tl.constexpr,  # rows are 16-byte aligned
):
    """One over the norm of each row, for features that are folded."""
    pid = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    row = features + pid.to(tl.int64) * stride
    x = tl.load((tl.multiple_of(row, 16) if ALIGNED else row) + d, mask=d < D, other=0.0).to(tl.float32)
    out = 1.0
    if NORMALIZE:
        norm = tl.sqrt(tl.sum(x * x, 0))
        in_range = (norm >= SMALLEST_NORM) & (norm <= LARGEST_NORM) | (tl.sum(tl.abs(x), 0) == 0)
        out = tl.where(in_range, 1.0 / tl.maximum(norm, 1e-12), float("nan"))
    tl.store(inverse + pid, out)


@triton.jit(do_not_specialize=["stride"], do_not_specialize_on_alignment=["features", "unit", "inverse"])
def unit_rows(
    features,  # [N, D]
    unit,  # [N, WIDTH] out
    inverse,  # [N] out: one over the norm
    stride,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROUND: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Unit rows for features that are not folded."""
    pid = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    row = features + pid.to(tl.int64) * stride
    x = tl.load((tl.multiple_of(row, 16) if ALIGNED else row) + d, mask=d < D, other=0.0).to(tl.float32)
    scale = 1.0
    if NORMALIZE:
        # Divide by the largest entry first: squares of large or tiny float32 features overflow or underflow.
        largest = tl.max(tl.abs(x), 0)
        scaled = tl.where(largest > 0, x / largest, x)
        norm = largest * tl.sqrt(tl.sum(scaled * scaled, 0))
        scale = 1.0 / tl.where(norm < 1e-12, 1e-12, norm)
    x *= scale
    if ROUND:
        # Round to TF32: the tensor cores truncate 13 bits, which makes every cosine smaller. NaN would become 0.
        nearest = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, nearest, x)
    tl.store(unit + pid.to(tl.int64) * WIDTH + d, x, mask=d < WIDTH)
    tl.store(inverse + pid, scale)


@triton.jit(
    do_not_specialize=["n", "u", "x_stride", "y_stride", "shift", "row_total", "text_total"],
    do_not_specialize_on_alignment=[*_SLICES, "scale", "row_parts", "text_parts", "own"],
)
def tile_sums(
    x,  # [N, WIDTH]
    y,  # [U, WIDTH]
    fold_x,  # [N]
    fold_y,  # [U]
    scale,  # []
    index,  # [N] int64
    weight,  # [U] numbers or counts
    row_parts,  # [block columns, N] out
    text_parts,  # [block rows, U] out
    own,  # [N] out: the exponent of each row's positive
    n,
    u,
    x_stride,
    y_stride,
    shift,
    row_total,  # strides of the partial sums
    text_total,
    WIDTH: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i, j = _tile(tl.program_id(0), n, u, BM, BN)
    acc = _dot_tile(x, y, i, j, n, u, x_stride, y_stride, WIDTH, BM, BN, BK, TMA, PRECISION)
    rows, columns = i + tl.arange(0, BM), j + tl.arange(0, BN)
    in_rows, in_columns = rows < n, columns < u
    f = tl.load(fold_x + rows, mask=in_rows, other=0.0)
    k2 = tl.load(scale) * LOG2E
    offset = tl.maximum(k2 - HEADROOM, 0.0)
    positive = _positive_column(index, rows, in_rows, shift, u, HAS_INDEX)
    positive = tl.where(positive >= 0, positive - j, -1)
    in_tile = in_rows & (positive >= 0) & (positive < BN)
    if tl.max(in_tile.to(tl.int32), 0) > 0:
        # From the same accumulator and rounded alike: where a row's positive dominates, the loss is the small
        # difference of this exponent and the row's sum.
        at = tl.arange(0, BN)[None, :] == positive[:, None]
        product = tl.sum(tl.where(at, acc, 0.0), 1)
        fold = tl.load(fold_y + j + positive, mask=in_tile, other=0.0)
        tl.store(own + rows, product * f * (fold * k2) - offset, mask=in_tile)
    g = tl.load(fold_y + columns, mask=in_columns, other=0.0)
    # In this order the first product is exact where rows are unit rows already, as those of float32 features.
    e = tl.exp2(acc * f[:, None] * (g * k2)[None, :] - offset)
    w = in_columns.to(tl.float32)
    if HAS_WEIGHT:
        w = tl.load(weight + columns, mask=in_columns, other=0).to(tl.float32)
        w = tl.where(w > HEAVIEST, float("inf"), w)
    tl.store(row_parts + (j // BN).to(tl.int64) * row_total + rows, tl.sum(e * w[None, :], 1), mask=in_rows)
    if i + BM > n:
        e = tl.where(in_rows[:, None], e, 0.0)
    tl.store(text_parts + (i // BM).to(tl.int64) * text_total + columns, tl.sum(e, 0), mask=in_columns)


@triton.jit(
    do_not_specialize=["n", "u", "x_stride", "y_stride", "part_count", "part_total"],
    do_not_specialize_on_alignment=[*_SLICES, "x", "y", "scale", "parts", "own", "out"],
)
def log_sums(
    parts,  # [part_count, N]
    x,  # [N, WIDTH] rows whose sums these are
    y,  # [U, WIDTH]
    fold_x,  # [N]
    fold_y,  # [U]
    scale,  # []
    weight,  # [U]
    own,  # [N] exponents of the positives
    out,  # [N] float64
    positive,  # [N] float64 out: logits of the positives
    n,
    u,
    x_stride,
    y_stride,
    part_count,
    part_total,  # stride of the partial sums
    WIDTH: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    POSITIVE: tl.constexpr,
    PARTS: tl.constexpr,  # that are loaded at a time
    BM: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add partial sums and take logarithms; a block with sums out of range is recomputed."""
    i = tl.program_id(0) * BM
    rows = i + tl.arange(0, BM)
    in_rows = rows < n
    k2 = tl.load(scale) * LOG2E
    # Many parts at a time: one after the other, each load waits for the one before.
    part = tl.arange(0, PARTS)
    at = parts + part.to(tl.int64)[:, None] * part_total + rows[None, :]
    row_sum = tl.zeros([BM], tl.float32)
    for first in range(0, part_count, PARTS):
        row_sum += tl.sum(tl.load(at, mask=(first + part < part_count)[:, None] & in_rows[None, :], other=0.0), 0)
        at += PARTS * part_total.to(tl.int64)
    row_sum = tl.where(in_rows, row_sum, 1.0)
    offset = tl.maximum(k2 - HEADROOM, 0.0).to(tl.float64)
    log_sum = tl.log2(row_sum.to(tl.float64)) + offset
    in_range = (row_sum >= LOW) & (row_sum <= HIGH) | (rows >= n)
    if tl.min(in_range.to(tl.int32), 0) == 0:
        f = tl.load(fold_x + rows, mask=in_rows, other=0.0)
        top = tl.full([BM], float("-inf"), tl.float32)
        terms = tl.zeros([BM], tl.float32)
        for j in range(0, u, BM):
            acc = _dot_tile(x, y, i, j, n, u, x_stride, y_stride, WIDTH, BM, BM, BK, False, PRECISION)
            columns = j + tl.arange(0, BM)
            g = tl.load(fold_y + columns, mask=columns < u, other=0.0)
            w = (columns < u).to(tl.float32)
            if HAS_WEIGHT:
                w = tl.load(weight + columns, mask=columns < u, other=0).to(tl.float32)
            logits = acc * f[:, None] * (g * k2)[None, :]
            # A text of weight zero contributes nothing, unless it is NaN.
            logits = tl.where((w > 0)[None, :] | (logits != logits), logits, float("-inf"))
            higher = tl.maximum(top, tl.max(logits, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            terms = terms * tl.exp2(top - base) + tl.sum(tl.exp2(logits - base[:, None]) * w[None, :], 1)
            top = higher
        recomputed = tl.log2(terms.to(tl.float64)) + top.to(tl.float64)
        log_sum = tl.where(in_range, log_sum, recomputed)
    # The host does not check the scale, which would synchronise: one that is not positive gives NaN.
    tl.store(out + rows, tl.where(k2 > 0, log_sum * LN2, float("nan")), mask=in_rows)
    if POSITIVE:
        exponent = tl.load(own + rows, mask=in_rows, other=0.0).to(tl.float64)
        tl.store(positive + rows, (exponent + offset) * LN2, mask=in_rows)


@triton.jit
def _rounded(log_sum, grad, at, mask, up):
    """A log-sum in base 2, rounded to float32, and its gradient times `up`, corrected for the rounding."""
    exact = tl.load(log_sum + at, mask=mask, other=0.0) * LOG2E
    rounded = exact.to(tl.float32)
    correction = tl.exp2((rounded.to(tl.float64) - exact).to(tl.float32))
    gain = (tl.load(grad + at, mask=mask, other=0.0) * up).to(tl.float32) * correction
    return rounded, gain


@triton.jit(
    do_not_specialize=["n", "u", "up"],
    do_not_specialize_on_alignment=[
        *_SLICES, "scale", "row_lse", "text_lse", "logit", "grad_row", "grad_text", "grad_positive",
    ],
)  # fmt: skip
def factors(
    row_lse,  # [N] float64
    text_lse,  # [U] float64
    logit,  # [N] float64: of the positives
    grad_row,  # [N] float64
    grad_text,  # [U] float64
    grad_positive,  # [N] float64
    fold_x,  # [N]
    fold_y,  # [U]
    index,  # [N] int64
    weight,  # [U]
    row_log,  # [N] out
    row_gain,  # [N] out
    text_log,  # [U] out
    text_gain,  # [U] out
    text_weight,  # [U] out: weight times fold
    positive,  # [N] out: H at the positives
    n,
    u,
    up: tl.float32,  # 2^shift
    HAS_INDEX: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BM: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks = tl.cdiv(n, BM)
    if pid < blocks:
        rows = pid * BM + tl.arange(0, BM)
        mask = rows < n
        r, a = _rounded(row_lse, grad_row, rows, mask, up)
        tl.store(row_log + rows, r, mask=mask)
        tl.store(row_gain + rows, a, mask=mask)
        text = _positive_column(index, rows, mask, 0, u, HAS_INDEX)
        known = mask & (text >= 0)
        c, b = _rounded(text_lse, grad_text, text, known, up)
        w = tl.full([BM], 1.0, tl.float32)
        if HAS_WEIGHT:
            w = tl.load(weight + text, mask=known, other=0).to(tl.float32)
        p = tl.load(logit + rows, mask=known, other=0.0) * LOG2E
        # A text of weight 0 may exceed the row's log-sum without bound.
        by_row = tl.where(w > 0, tl.exp2((p - r).to(tl.float32)) * w, 0.0) * a
        by_text = tl.exp2((p - c).to(tl.float32)) * b
        h = by_row + by_text + (tl.load(grad_positive + rows, mask=known, other=0.0) * up).to(tl.float32)
        f, g = tl.load(fold_x + rows, mask=known, other=0.0), tl.load(fold_y + text, mask=known, other=0.0)
        tl.store(positive + rows, h * f * g, mask=mask)
    else:
        texts = (pid - blocks) * BM + tl.arange(0, BM)
        mask = texts < u
        c, b = _rounded(text_lse, grad_text, texts, mask, up)
        tl.store(text_log + texts, c, mask=mask)
        tl.store(text_gain + texts, b, mask=mask)
        w = tl.load(fold_y + texts, mask=mask, other=0.0)
        if HAS_WEIGHT:
            w *= tl.load(weight + texts, mask=mask, other=0).to(tl.float32)
        tl.store(text_weight + texts, w, mask=mask)


@triton.jit
def _gradient(
    acc,  # [BM, BN]
    k2,
    offset,
    far,  # the largest distance of a row's log-sum from the centre
    r,  # [BM] log-sums of the rows
    a,  # [BM] their gains
    f,  # [BM] folds
    positive,  # [BM] column of each row's positive, in this tile or not
    text_log,  # [U]
    text_gain,  # [U]
    text_weight,  # [U]
    fold_y,  # [U]
    j,
    u,
    BN: tl.constexpr,
):
    """H of one tile, zero at the positives."""
    at = tl.minimum(j + tl.arange(0, BN), u - 1)
    c = tl.load(text_log + at)
    # Columns are loaded in each branch: those of both would not fit in registers.
    if tl.maximum(far, tl.max(tl.abs(c - offset - CENTRE), 0)) <= REACH:  # not with NaN
        g, w = tl.load(fold_y + at), tl.load(text_weight + at)
        b = tl.load(text_gain + at) * tl.exp2(offset - c) * g
        a *= tl.exp2(offset - r)
        e = tl.exp2(acc * f[:, None] * (g * k2)[None, :] - (offset - tl.log2(f))[:, None])
        out = e * (a[:, None] * w[None, :] + b[None, :])
    else:
        g, w = tl.load(fold_y + at), tl.load(text_weight + at)
        b = tl.load(text_gain + at) * g
        logits = acc * f[:, None] * (g * k2)[None, :]
        # A text of weight 0 may exceed the row's log-sum without bound.
        by_row = tl.exp2(tl.where((w > 0)[None, :], logits - r[:, None], 0.0)) * a[:, None] * w[None, :]
        out = (by_row + tl.exp2(logits - c[None, :]) * b[None, :]) * f[:, None]
    return tl.where(tl.arange(0, BN)[None, :] == positive[:, None], 0.0, out)


@triton.jit
def _halves(acc, BM: tl.constexpr, BN: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit(
    do_not_specialize=["n", "u", "x_stride", "y_stride", "shift", "stride"],
    do_not_specialize_on_alignment=[*_SLICES, "scale"],
)
def tile_gradients(
    x,  # [N, WIDTH]
    y,  # [U, WIDTH]
    fold_x,  # [N]
    fold_y,  # [U]
    scale,  # []
    index,  # [N] int64
    row_log,  # [N]
    row_gain,  # [N]
    text_log,  # [U]
    text_gain,  # [U]
    text_weight,  # [U]
    out,  # [N and U rounded up to tiles] H
    n,
    u,
    x_stride,
    y_stride,
    shift,
    stride,  # of a row of H, in units of 8 entries
    WIDTH: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i, j = _tile(tl.program_id(0), n, u, BM, BN)
    acc = _dot_tile(x, y, i, j, n, u, x_stride, y_stride, WIDTH, BM, BN, BK, TMA, PRECISION)
    rows = i + tl.arange(0, BM)
    at = tl.minimum(rows, n - 1)
    r, a, f = tl.load(row_log + at), tl.load(row_gain + at), tl.load(fold_x + at)
    positive = _positive_column(index, rows, rows < n, shift, u, HAS_INDEX)
    positive = tl.where(positive >= 0, positive - j, -1)
    k2 = tl.load(scale) * LOG2E
    offset = tl.maximum(k2 - BELOW, 0.0)
    heaviest = tl.max(tl.load(text_weight + tl.minimum(j + tl.arange(0, BN), u - 1)), 0)
    far = tl.where(heaviest <= HEAVY, tl.max(tl.abs(r - offset - CENTRE), 0), float("inf"))
    # Stored in whole tiles: entries past the ends are never read, and a mask would cost registers.
    target = out + rows.to(tl.int64)[:, None] * (stride * 8) + (j + tl.arange(0, BN // 4))[None, :]
    # A quarter of the columns at a time: the values loaded per column would not fit in registers beside a whole tile.
    left, right = _halves(acc, BM, BN)
    q0, q1 = _halves(left, BM, BN // 2)
    q2, q3 = _halves(right, BM, BN // 2)
    quarters = (q0, q1, q2, q3)
    for k in tl.static_range(4):
        h = _gradient(
            quarters[k], k2, offset, far, r, a, f, positive - k * (BN // 4), text_log, text_gain, text_weight,
            fold_y, j + k * (BN // 4), u, BN // 4,
        )  # fmt: skip
        tl.store(target + k * (BN // 4), h.to(out.dtype.element_ty))


@triton.jit(
    do_not_specialize=["others", "shift", "stride", "operand_stride", "other_stride", "up"],
    do_not_specialize_on_alignment=[
        *_SLICES, "operand", "other", "product", "order", "start", "scale", "out", "dots",
    ],
)  # fmt: skip
def finish_rows(
    operand,  # [N, WIDTH]
    product,  # [N, WIDTH]
    other,  # [other rows, WIDTH] operand of the other side
    fold_x,  # [N]
    inverse,  # [N]
    positive,  # [image rows] H at the positives
    index,  # [N] int64: image rows with an index
    order,  # [image rows] int64: texts with an index
    start,  # [N + 1] int64
    scale,  # []
    out,  # [N, D]
    dots,  # [N] out
    others,  # rows of the other side
    operand_stride,
    other_stride,
    shift,
    up: tl.float32,  # 2^shift of the factors
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BY_TEXT: tl.constexpr,  # partners are order[start[u] : start[u + 1]]
    PARTNERS: tl.constexpr,  # that are read at a time
    HAS_INDEX: tl.constexpr,
    NORMALIZE: tl.constexpr,
    STORE: tl.constexpr,
    ALIGNED: tl.constexpr,  # rows of operands and of the gradient are 16-byte aligned
):
    """Add the positives to a row of the product, and go back through the normalisation."""
    pid = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    inside = d < WIDTH
    total = tl.load(product + pid.to(tl.int64) * WIDTH + d, mask=inside, other=0.0)
    if BY_TEXT:
        last = tl.load(start + pid + 1)
        # Several at a time: a text may have thousands of rows.
        for first in range(tl.load(start + pid), last, PARTNERS):
            given = first + tl.arange(0, PARTNERS) < last
            partner = tl.load(order + first + tl.arange(0, PARTNERS), mask=given, other=0)
            rows = (other + partner * (other_stride * 8))[:, None]
            rows = tl.multiple_of(rows, (16, 16)) if ALIGNED else rows
            x = tl.load(rows + d[None, :], mask=given[:, None] & inside[None, :], other=0.0).to(tl.float32)
            total += tl.sum(x * tl.load(positive + partner, mask=given, other=0.0)[:, None], 0)
    else:
        partner = pid.to(tl.int64) + shift
        if HAS_INDEX:
            partner = tl.load(index + pid) + shift
        if (partner >= 0) & (partner < others):
            row = other + partner * (other_stride * 8)
            row = tl.multiple_of(row, 16) if ALIGNED else row
            total += tl.load(row + d, mask=inside, other=0.0).to(tl.float32) * tl.load(positive + pid)
    row = operand + pid.to(tl.int64) * (operand_stride * 8)
    x = tl.load((tl.multiple_of(row, 16) if ALIGNED else row) + d, mask=inside, other=0.0).to(tl.float32)
    dot = tl.sum(x * total, 0)
    tl.store(dots + pid, dot / up)
    if STORE:
        f = tl.load(fold_x + pid)
        if NORMALIZE:
            total -= x * (dot * f * f)
        total *= tl.load(scale) / up * (tl.load(inverse + pid) / f)
        row = out + pid.to(tl.int64) * D
        tl.store((tl.multiple_of(row, 16) if ALIGNED else row) + d, total.to(out.dtype.element_ty), mask=d < D)
