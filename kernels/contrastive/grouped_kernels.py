"""The Triton kernels of small levels, launched by grouped.py: three forward and three backward for the mean losses.

Log-sums take three forward as well; with given gradients of them the backward pass takes two more, which make anew what
the losses keep from their forward pass.

Up to LEVELS levels share a launch. "All rows" are the image rows of all levels, one level after another, then the text
rows. Besides the features, kernels read and write two buffers, so that a launch needs few arguments:

    units    [all rows, WIDTH] unit rows, in the type of the operands
    vectors  float32, T = all rows:
        inverse [T]     one over the length of the row
        label [T]       image rows: the text of the row, or -1; text rows: their weight in the row sums
        extra [T]       image rows: the cosine of the positive, or its given gradient; text rows: their number of rows
        log, low [T]    the log-sum in base 2, and what float32 leaves out of it
        factor [T]      2^(m - log-sum), times the gradient of the log-sum in units of that of a row
        scalars [16]    scale of each level, texts with rows of each level, finished programs (an integer)
        flags           per block of 64 rows: 1 if dS takes two exponentials, each relative to its own log-sum
        partial sums    per block of 64 rows: four numbers, see `level_losses`
        gradient [T]    given gradients of the log-sums, where they are given

Logits are in base 2: cosines times k2 = scale * log2(e). GIVEN: the kernel serves log-sums and given gradients of them;
otherwise it serves the mean losses.
"""

# mypy: disable-error-code="no-untyped-def"
# (kernel arguments have no Python types; comments give their shapes)

from __future__ import annotations

import triton
import triton.language as tl

from .triton_constants import HEADROOM, HEAVIEST, HIGH, LN2, LOG2E, LOW

# Per launch. Kernels take the size and pointer of each level as separate arguments, not as tuples: in Triton 3.6
# and 3.7, do_not_specialize and do_not_specialize_on_alignment do not reach the elements of a tuple (handle_tuple in
# specialize.cc). Measured with tuples: 7 sets of sizes compiled 7 times instead of once, and the 16 alignments of 4
# pointers 16 times instead of once. A tensor of offsets would cost a copy to the device.
# Within the kernels, ns and us are the tuples of n0..n3 and u0..u3.
LEVELS = 4

BLOCK = tl.constexpr(64)  # rows per flag and per partial sum
SCALARS = tl.constexpr(16)
MOST = tl.constexpr(LEVELS)
# The exponents of dS have the offset m = max(k2 - HEADROOM, 0) of the forward pass, so that a probability is the
# quotient of the exponential that was summed and its sum. Relative to a log-sum of at least m - 60, terms above 2^-66
# are kept, as exp2 flushes below 2^-126. One above m + 112, which takes 4,096 equal terms, would lose its factor.
BELOW = tl.constexpr(60.0)
ABOVE = tl.constexpr(112.0)
# A given gradient is not known to be of order one: its product with 2^(m - log-sum) needs room below, too.
ABOVE_GIVEN = tl.constexpr(60.0)

_SIZES = [f"{side}{k}" for side in "nu" for k in range(LEVELS)]
_STRIDES = [f"{side}{k}" for side in "pq" for k in range(LEVELS)]
_POINTERS = [f"{side}{k}" for side in "absiwoe" for k in range(LEVELS)]


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
def _sum(a):
    return a[0] + a[1] + a[2] + a[3]


@triton.jit
def _largest(a):
    return tl.maximum(tl.maximum(a[0], a[1]), tl.maximum(a[2], a[3]))


@triton.jit
def _is_last(finished):
    """Whether this program is the last one of its launch to get here. `finished` is 0.0 when it begins, and so is its
    integer."""
    tl.debug_barrier()  # the atomic publishes the stores of the whole program
    return tl.atomic_add(finished.to(tl.pointer_type(tl.int32), bitcast=True), 1) == tl.num_programs(0) - 1


@triton.jit
def _pointer(level, f):
    pointer = f[0]
    if level == 1:
        pointer = f[1]
    if level == 2:
        pointer = f[2]
    if level == 3:
        pointer = f[3]
    return pointer


@triton.jit
def _segment(pid, ns, us, B: tl.constexpr):
    """The rows of program pid, B of one side of one level: side (1: texts), level, sizes of that side, block."""
    row_blocks = _sum(_cdiv(ns, B))
    is_text = pid >= row_blocks
    sizes = (
        tl.where(is_text, us[0], ns[0]),
        tl.where(is_text, us[1], ns[1]),
        tl.where(is_text, us[2], ns[2]),
        tl.where(is_text, us[3], ns[3]),
    )
    level, i = _locate(tl.where(is_text, pid - row_blocks, pid), _cdiv(sizes, B))
    return is_text, level, sizes, i


@triton.jit
def _feature_rows(is_text, level, a, b, p, q, rows, ALIGNED: tl.constexpr):
    """Pointers [rows, 1] to rows of one level's images or texts."""
    features, stride = _pointer(level, a), _pick(level, p)
    if is_text:
        features, stride = _pointer(level, b), _pick(level, q)
    features = features + (rows * stride)[:, None]
    return tl.multiple_of(features, (16, 16)) if ALIGNED else features


@triton.jit(do_not_specialize=[*_SIZES, *_STRIDES, "given"], do_not_specialize_on_alignment=_POINTERS)
def prepare_levels(
    a0,  # [n_k, D] image features of each level
    a1,
    a2,
    a3,
    b0,  # [u_k, D] text features
    b1,
    b2,
    b3,
    s0,  # [] scales
    s1,
    s2,
    s3,
    i0,  # [n_k] int64: the text of each row
    i1,
    i2,
    i3,
    w0,  # [u_k] float32: weights in the row sums
    w1,
    w2,
    w3,
    n0,
    n1,
    n2,
    n3,
    u0,
    u1,
    u2,
    u3,
    p0,  # row strides of the images
    p1,
    p2,
    p3,
    q0,  # row strides of the texts
    q1,
    q2,
    q3,
    given,  # bit k: level k has an index; bit LEVELS + k: it has weights
    units,  # out
    vectors,  # out
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SMALLEST: tl.constexpr,
    POSITIVES: tl.constexpr,
    GIVEN: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROUND: tl.constexpr,
    ALIGNED: tl.constexpr,  # all rows of all levels are 16-byte aligned
    ROWS: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Unit rows, the text of each image row, and the number of rows and the weight of each text."""
    ns, us = (n0, n1, n2, n3), (u0, u1, u2, u3)
    pid = tl.program_id(0)
    total = _sum(ns) + _sum(us)
    if pid == 0:
        scalars = vectors + 6 * total
        # A scale that is not positive, which the host cannot check without synchronising, gives NaN.
        tl.store(scalars + 0, tl.where(tl.load(s0) > 0, tl.load(s0), float("nan")))
        tl.store(scalars + 1, tl.where(tl.load(s1) > 0, tl.load(s1), float("nan")))
        tl.store(scalars + 2, tl.where(tl.load(s2) > 0, tl.load(s2), float("nan")))
        tl.store(scalars + 3, tl.where(tl.load(s3) > 0, tl.load(s3), float("nan")))
        # The rest of the buffer: the number of finished programs, and what not every call fills.
        end = SCALARS + 5 * (total // BLOCK + 2 * MOST)
        for start in range(MOST, end, SCAN):
            entry = start + tl.arange(0, SCAN)
            tl.store(scalars + entry, tl.zeros([SCAN], tl.float32), mask=entry < end)
    is_text, level, sizes, i = _segment(pid, ns, us, ROWS)
    rows = i * ROWS + tl.arange(0, ROWS)
    inside = rows < _pick(level, sizes)
    at = _before(level, sizes) + tl.where(is_text, _sum(ns), 0) + rows
    d = tl.arange(0, BLOCK_D)
    features = _feature_rows(
        is_text, level, (a0, a1, a2, a3), (b0, b1, b2, b3), (p0, p1, p2, p3), (q0, q1, q2, q3), rows.to(tl.int64),
        ALIGNED,
    )  # fmt: skip
    x = tl.load(features + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    scale = tl.full([ROWS], 1.0, tl.float32)
    if NORMALIZE:
        # Divide by the largest entry first: squares of large or tiny float32 features overflow or underflow.
        largest = tl.max(tl.abs(x), 1)
        scaled = tl.where((largest > 0)[:, None], x / largest[:, None], x)
        length = largest * tl.sqrt(tl.sum(scaled * scaled, 1))
        scale = 1.0 / tl.where(length < SMALLEST, SMALLEST, length)
    x *= scale[:, None]
    if ROUND:
        # Round to TF32: the tensor cores truncate 13 bits, which makes every cosine smaller. NaN would become 0.
        nearest = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, nearest, x)
    tl.store(units + at.to(tl.int64)[:, None] * WIDTH + d[None, :], x, mask=inside[:, None] & (d < WIDTH)[None, :])
    tl.store(vectors + at, scale, mask=inside)
    label, extra = vectors + total + at, vectors + 2 * total + at
    has_index = (given >> level) & 1 != 0
    index, n, u = _pointer(level, (i0, i1, i2, i3)), _pick(level, ns), _pick(level, us)
    if is_text:
        count = tl.full([ROWS], 1, tl.int32)
        if not GIVEN:  # noqa: SIM102 (known to the compiler)
            if has_index:
                count = tl.zeros([ROWS], tl.int32)
                for start in range(0, n, SCAN):
                    scanned = start + tl.arange(0, SCAN)
                    own = tl.load(index + scanned, mask=scanned < n, other=-1).to(tl.int32)
                    count += tl.sum((own[None, :] == rows[:, None]).to(tl.int32), 1)
        weight = tl.full([ROWS], 1.0, tl.float32) if POSITIVES or GIVEN else count.to(tl.float32)
        if (given >> (level + MOST)) & 1 != 0:
            weight = tl.load(_pointer(level, (w0, w1, w2, w3)) + rows, mask=inside, other=0.0).to(tl.float32)
        tl.store(label, weight, mask=inside)
        tl.store(extra, count.to(tl.float32), mask=inside)
    else:
        own = rows.to(tl.int64)
        if has_index:
            own = tl.load(index + rows, mask=inside, other=-1).to(tl.int64)
        tl.store(label, tl.where((own >= 0) & (own < u), own, -1).to(tl.float32), mask=inside)
        # Stays where the text is out of range, and makes the loss NaN.
        tl.store(extra, tl.full([ROWS], float("nan"), tl.float32), mask=inside)


@triton.jit
def _dot_tile(
    units,  # [all rows, WIDTH]
    row,
    column,
    row_end,
    column_end,
    WIDTH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x y^T of one tile. Entries past the ends come from other rows: finite if the features are, and to be masked."""
    acc = tl.zeros([BM, BN], tl.float32)
    rows = tl.minimum(row + tl.arange(0, BM), row_end - 1).to(tl.int64)
    columns = tl.minimum(column + tl.arange(0, BN), column_end - 1).to(tl.int64)
    inner = tl.arange(0, BK)
    a = units + rows[:, None] * WIDTH + inner[None, :]
    b = units + columns[None, :] * WIDTH + inner[:, None]
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


@triton.jit(do_not_specialize=_SIZES)
def level_sums(
    units,
    vectors,
    parts,  # [block columns, sum N] then [block rows, sum U] out
    n0,
    n1,
    n2,
    n3,
    u0,
    u1,
    u2,
    u3,
    WIDTH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of S: its parts of the row and column sums, and the cosines of its positives."""
    ns, us = (n0, n1, n2, n3), (u0, u1, u2, u3)
    level, n, u, row, column, i, j = _tile(tl.program_id(0), ns, us, BM, BN)
    images, total = _sum(ns), _sum(ns) + _sum(us)
    text = images + column
    acc = _dot_tile(units, row + i * BM, text + j * BN, row + n, text + u, WIDTH, BM, BN, BK, PRECISION)
    rows, columns = i * BM + tl.arange(0, BM), j * BN + tl.arange(0, BN)
    in_rows, in_columns = rows < n, columns < u
    label, extra = vectors + total, vectors + 2 * total
    positive_column = tl.load(label + row + rows, mask=in_rows, other=-1.0).to(tl.int32) - j * BN
    in_tile = (positive_column >= 0) & (positive_column < BN)
    # Read from this accumulator: the result of another product could exceed the log-sum.
    if tl.max(in_tile.to(tl.int32), 0) > 0:
        at = tl.arange(0, BN)[None, :] == positive_column[:, None]
        tl.store(extra + row + rows, tl.sum(tl.where(at, acc, 0.0), 1), mask=in_tile)
    k2 = tl.load(vectors + 6 * total + level) * LOG2E
    e = tl.exp2(acc * k2 - tl.maximum(k2 - HEADROOM, 0.0))
    w = tl.load(label + text + columns, mask=in_columns, other=0.0)
    w = tl.where(w > HEAVIEST, float("inf"), w)
    tl.store(parts + j.to(tl.int64) * images + row + rows, tl.sum(e * w[None, :], 1), mask=in_rows)
    if (i + 1) * BM > n:
        e = tl.where(in_rows[:, None], e, 0.0)
    by_column = parts + _largest(_cdiv(us, BN)).to(tl.int64) * images + i.to(tl.int64) * _sum(us)
    tl.store(by_column + column + columns, tl.sum(e, 0), mask=in_columns)


@triton.jit
def _store_double(pointer, value, blocks):
    """Store a float64 as two float32."""
    high = value.to(tl.float32)
    low = value - high.to(tl.float64)
    tl.store(pointer, high)
    tl.store(pointer + blocks, tl.where(low == low, low, 0.0).to(tl.float32))  # infinity minus itself is NaN


@triton.jit
def _total(pointer, count, blocks):
    """The sum of `count` numbers stored by `_store_double`, in a fixed order."""
    total = tl.zeros([128], tl.float64)
    for start in range(0, count, 128):
        at = start + tl.arange(0, 128)
        # From L2: other programs have written them.
        total += tl.load(pointer + at, mask=at < count, other=0.0, cache_modifier=".cg").to(tl.float64)
        total += tl.load(pointer + blocks + at, mask=at < count, other=0.0, cache_modifier=".cg").to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def _log_sums(
    pid,
    units,
    vectors,
    parts,
    ns,
    us,
    WIDTH: tl.constexpr,
    ROW_TILE: tl.constexpr,
    COLUMN_TILE: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The log-sums of 64 rows or texts, in base 2 (float64), and their positives (nothing for texts).

    Sums outside [LOW, HIGH] are recomputed with a running maximum.
    """
    images, total = _sum(ns), _sum(ns) + _sum(us)
    is_text, level, sizes, i = _segment(pid, ns, us, BLOCK)
    n, u = _pick(level, ns), _pick(level, us)
    size, depth = _pick(level, sizes), tl.where(is_text, n, u)
    rows = i * BLOCK + tl.arange(0, BLOCK)
    inside = rows < size
    before = _before(level, sizes)
    first = before + tl.where(is_text, images, 0)
    other_first = tl.where(is_text, _before(level, ns), images + _before(level, us))
    label, extra = vectors + total, vectors + 2 * total
    k2 = tl.load(vectors + 6 * total + level) * LOG2E

    at = parts + before + rows
    if is_text:
        at += _largest(_cdiv(us, COLUMN_TILE)).to(tl.int64) * images
    stride = tl.where(is_text, total - images, images)
    sum_of = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, tl.where(is_text, tl.cdiv(n, ROW_TILE), tl.cdiv(u, COLUMN_TILE))):
        sum_of += tl.load(at, mask=inside, other=1.0)
        at += stride
    offset = tl.maximum(k2 - HEADROOM, 0.0)
    log_sum = tl.log2(sum_of.to(tl.float64)) + offset.to(tl.float64)
    in_range = (sum_of >= LOW) & (sum_of <= HIGH) | (rows >= size)
    if tl.min(in_range.to(tl.int32), 0) == 0:
        top = tl.full([BLOCK], float("-inf"), tl.float32)
        terms = tl.zeros([BLOCK], tl.float32)
        for start in range(0, depth, BLOCK):
            acc = _dot_tile(
                units, first + i * BLOCK, other_first + start, first + size, other_first + depth,
                WIDTH, BLOCK, BLOCK, BK, PRECISION,
            )  # fmt: skip
            columns = start + tl.arange(0, BLOCK)
            w = tl.load(label + other_first + columns, mask=columns < depth, other=0.0)
            w = tl.where(is_text, (columns < depth).to(tl.float32), w)
            # A text of weight zero contributes nothing, unless it is NaN.
            logits = acc * k2 + _log_weight(w)[None, :]
            higher = tl.maximum(top, tl.max(logits, 1))
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            terms = terms * tl.exp2(top - shift) + tl.sum(tl.exp2(logits - shift[:, None]), 1)
            top = higher
        log_sum = tl.where(in_range, log_sum, tl.log2(terms.to(tl.float64)) + top.to(tl.float64))
    own = tl.load(extra + first + rows, mask=inside, other=0.0)
    # Rounded like its term of the sum: where it dominates, the loss is the small difference of the two.
    positive = (own * k2 - offset).to(tl.float64) + offset.to(tl.float64)
    positive = tl.where(in_range, positive, own.to(tl.float64) * k2.to(tl.float64))
    return log_sum, positive


@triton.jit
def _log_weight(w):
    return tl.where(w > 0, tl.log2(tl.where(w > 0, w, 1.0)), float("-inf"))


@triton.jit
def _store_factors(vectors, pid, at, inside, log_sum, k2, gradient, heavy, total, ABOVE_BY: tl.constexpr):
    """What dS needs of 64 log-sums: the log-sums, the factors of a single exponential, and whether it will not do."""
    high = log_sum.to(tl.float32)
    tl.store(vectors + 3 * total + at, high, mask=inside)
    tl.store(vectors + 4 * total + at, (log_sum - high.to(tl.float64)).to(tl.float32), mask=inside)
    distance = tl.maximum(k2 - HEADROOM, 0.0).to(tl.float64) - log_sum
    rounded = distance.to(tl.float32)
    factor = tl.exp2(rounded) * tl.exp2((distance - rounded.to(tl.float64)).to(tl.float32))
    tl.store(vectors + 5 * total + at, factor * gradient, mask=inside)
    close = (rounded <= BELOW) & (rounded >= -ABOVE_BY) & (heavy == 0) | (inside == 0)
    tl.store(vectors + 6 * total + SCALARS + pid, 1.0 - tl.min(close.to(tl.float32), 0))


@triton.jit(do_not_specialize=[*_SIZES, "levels"], do_not_specialize_on_alignment=["loss"])
def level_losses(
    units,
    vectors,
    parts,  # [block columns, sum N] then [block rows, sum U]
    loss,  # [levels] float32 out
    n0,
    n1,
    n2,
    n3,
    u0,
    u1,
    u2,
    u3,
    levels,
    WIDTH: tl.constexpr,
    POSITIVES: tl.constexpr,
    ROW_TILE: tl.constexpr,
    COLUMN_TILE: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Log-sums of 64 rows or texts and what the backward pass needs of them; the last program adds up the losses."""
    ns, us = (n0, n1, n2, n3), (u0, u1, u2, u3)
    pid = tl.program_id(0)
    images, total = _sum(ns), _sum(ns) + _sum(us)
    log_sum, positive = _log_sums(pid, units, vectors, parts, ns, us, WIDTH, ROW_TILE, COLUMN_TILE, BK, PRECISION)
    is_text, level, sizes, i = _segment(pid, ns, us, BLOCK)
    rows = i * BLOCK + tl.arange(0, BLOCK)
    inside = rows < _pick(level, sizes)
    at = _before(level, sizes) + tl.where(is_text, images, 0) + rows
    label, extra, scalars = vectors + total, vectors + 2 * total, vectors + 6 * total
    k2 = tl.load(scalars + level) * LOG2E
    blocks = total // BLOCK + 2 * MOST
    flags = scalars + SCALARS
    # Images: sum of log-sum - positive, and of positives (divided by the number of rows of the text, for "positives").
    # Texts: sum of kappa * log-sum, and the number of texts that have rows.
    partial = flags + blocks + pid
    gradient = tl.full([BLOCK], 1.0, tl.float32)
    heavy = tl.zeros([BLOCK], tl.int32)
    own = tl.load(label + at, mask=inside, other=-1.0)
    if is_text:
        count = tl.load(extra + at, mask=inside, other=0.0)
        has = count > 0
        gradient = has.to(tl.float32) if POSITIVES else count
        heavy = (own > HEAVIEST).to(tl.int32)
        # The log-sum is -inf if there are no rows at all.
        _store_double(partial, tl.sum(tl.where(has, log_sum * gradient.to(tl.float64), 0.0), 0), blocks)
        _store_double(partial + 2 * blocks, tl.sum(has.to(tl.float64), 0), blocks)
    else:
        _store_double(partial, tl.sum(tl.where(inside, log_sum - positive, 0.0), 0), blocks)
        if POSITIVES:
            text = own.to(tl.int32)
            counted = tl.load(extra + images + _before(level, us) + text, mask=text >= 0, other=1.0)
            positive = positive / counted.to(tl.float64)
        _store_double(partial + 2 * blocks, tl.sum(positive, 0), blocks)
    _store_factors(vectors, pid, at, inside, log_sum, k2, gradient, heavy, total, ABOVE)

    if _is_last(scalars + 2 * MOST):
        row_blocks, text_blocks = _cdiv(ns, BLOCK), _cdiv(us, BLOCK)
        for k in range(0, levels):
            rows_at = flags + blocks + _before(k, row_blocks)
            texts_at = flags + blocks + _sum(row_blocks) + _before(k, text_blocks)
            by_row = _total(rows_at, _pick(k, row_blocks), blocks)
            positives = _total(rows_at + 2 * blocks, _pick(k, row_blocks), blocks)
            by_text = _total(texts_at, _pick(k, text_blocks), blocks)
            used = _total(texts_at + 2 * blocks, _pick(k, text_blocks), blocks)
            n_k = tl.maximum(_pick(k, ns), 1).to(tl.float64)
            divisor = tl.maximum(used, 1.0) if POSITIVES else n_k
            value = (by_row / n_k + (by_text - positives) / divisor) * (LN2 / 2)
            tl.store(loss + k, value.to(tl.float32))
            tl.store(scalars + MOST + k, used.to(tl.float32))


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=["row_lse", "text_lse", "positive"])
def level_log_sums(
    units,
    vectors,
    parts,  # [block columns, sum N] then [block rows, sum U]
    row_lse,  # [sum N] float64 out
    text_lse,  # [sum U] float64 out
    positive,  # [sum N] float64 out
    n0,
    n1,
    n2,
    n3,
    u0,
    u1,
    u2,
    u3,
    WIDTH: tl.constexpr,
    ROW_TILE: tl.constexpr,
    COLUMN_TILE: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Log-sums of 64 rows or texts, and positives, as natural logarithms."""
    ns, us = (n0, n1, n2, n3), (u0, u1, u2, u3)
    pid = tl.program_id(0)
    log_sum, logit = _log_sums(pid, units, vectors, parts, ns, us, WIDTH, ROW_TILE, COLUMN_TILE, BK, PRECISION)
    is_text, level, sizes, i = _segment(pid, ns, us, BLOCK)
    rows = i * BLOCK + tl.arange(0, BLOCK)
    inside = rows < _pick(level, sizes)
    at = _before(level, sizes) + rows
    if is_text:
        tl.store(text_lse + at, log_sum * LN2, mask=inside)
    else:
        tl.store(row_lse + at, log_sum * LN2, mask=inside)
        tl.store(positive + at, logit * LN2, mask=inside)


@triton.jit(
    do_not_specialize=_SIZES,
    do_not_specialize_on_alignment=["row_lse", "text_lse", "grad_row", "grad_text", "grad_positive"],
)
def level_factors(
    vectors,
    row_lse,  # [sum N] float64
    text_lse,  # [sum U] float64
    grad_row,  # [sum N] float64
    grad_text,  # [sum U] float64
    grad_positive,  # [sum N] float64
    n0,
    n1,
    n2,
    n3,
    u0,
    u1,
    u2,
    u3,
):
    """What the backward pass needs of 64 log-sums and of their given gradients."""
    ns, us = (n0, n1, n2, n3), (u0, u1, u2, u3)
    pid = tl.program_id(0)
    images, total = _sum(ns), _sum(ns) + _sum(us)
    is_text, level, sizes, i = _segment(pid, ns, us, BLOCK)
    rows = i * BLOCK + tl.arange(0, BLOCK)
    inside = rows < _pick(level, sizes)
    before = _before(level, sizes)
    at = before + tl.where(is_text, images, 0) + rows
    log_sum, upstream = row_lse, grad_row
    heavy = tl.zeros([BLOCK], tl.int32)
    if is_text:
        log_sum, upstream = text_lse, grad_text
        heavy = (tl.load(vectors + total + at, mask=inside, other=0.0) > HEAVIEST).to(tl.int32)
    else:
        own = tl.load(grad_positive + before + rows, mask=inside, other=0.0)
        tl.store(vectors + 2 * total + at, own.to(tl.float32), mask=inside)
    base_2 = tl.load(log_sum + before + rows, mask=inside, other=0.0) * LOG2E
    gradient = tl.load(upstream + before + rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(vectors + _gradients_at(total) + at, gradient, mask=inside)
    k2 = tl.load(vectors + 6 * total + level) * LOG2E
    _store_factors(vectors, pid, at, inside, base_2, k2, gradient, heavy, total, ABOVE_GIVEN)


@triton.jit
def _gradients_at(total):
    """Where the given gradients begin in `vectors`."""
    return 6 * total + SCALARS + 5 * (total // BLOCK + 2 * MOST)


@triton.jit
def _gradient(
    cosine,  # [BM, BN]
    vectors,
    rest,  # [sum N] out: what the type of dS leaves out of its entry at the positive
    row,
    rows,  # [BM]
    in_rows,
    text,
    start,
    n,
    u,
    total,
    k2,
    ratio,
    near,
    TYPE: tl.constexpr,
    POSITIVES: tl.constexpr,
    GIVEN: tl.constexpr,
    SPLIT: tl.constexpr,
    BN: tl.constexpr,
):
    """dS of one tile: g^row_i w_u p_iu + g^col_u q_iu + g^pos_i [u = t_i], with given gradients or those of a mean.

    For a mean loss and an upstream gradient of 2 N, they are 1, ratio kappa_u and -(1 + ratio / c_u).
    """
    at_row = row + tl.minimum(rows, n - 1)
    at_text = text + tl.minimum(start + tl.arange(0, BN), u - 1)
    label, extra, log, low = vectors + total, vectors + 2 * total, vectors + 3 * total, vectors + 4 * total
    w = tl.load(label + at_text)
    if near:
        a, b = tl.load(vectors + 5 * total + at_row), tl.load(vectors + 5 * total + at_text) * ratio
        # One exponential for both softmaxes.
        out = tl.exp2(cosine * k2 - tl.maximum(k2 - HEADROOM, 0.0)) * (a[:, None] * w[None, :] + b[None, :])
    else:
        logits = cosine * k2
        from_row = logits - tl.load(log + at_row)[:, None] - tl.load(low + at_row)[:, None] + _log_weight(w)[None, :]
        from_text = logits - tl.load(log + at_text)[None, :] - tl.load(low + at_text)[None, :]
        out = tl.exp2(from_row)
        if GIVEN:
            gradient = vectors + _gradients_at(total)
            out *= tl.load(gradient + at_row)[:, None]
            kappa = tl.load(gradient + at_text)
        else:
            kappa = tl.load(extra + at_text)
            if POSITIVES:
                kappa = (kappa > 0).to(tl.float32)
            kappa *= ratio
        out += tl.exp2(from_text) * kappa[None, :]
    positive = tl.load(label + row + rows, mask=in_rows, other=-1.0).to(tl.int32)
    own = positive - start
    in_tile = (own >= 0) & (own < BN)
    if tl.max(in_tile.to(tl.int32), 0) > 0:
        at = tl.arange(0, BN)[None, :] == own[:, None]
        value = tl.sum(tl.where(at, out, 0.0), 1)
        if GIVEN:
            value += tl.load(extra + row + rows, mask=in_tile, other=0.0)
        elif POSITIVES:
            value -= 1.0 + ratio / tl.load(extra + text + positive, mask=in_tile, other=1.0)
        else:
            value -= 2.0
        if SPLIT:
            # In two pieces, each in the type of the operands: the second one is added by `level_products`.
            if tl.float32 == TYPE:
                first = (value.to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)  # as TF32
            else:
                first = value.to(TYPE).to(tl.float32)
            tl.store(rest + row + rows, value - first, mask=in_tile)
            value = first
        out = tl.where(at, value[:, None], out)
    return out.to(TYPE)


@triton.jit
def _scratch(scratch, ns, us, WIDTH: tl.constexpr):
    """The parts of the backward pass's scratch: d_units is first; then dots [T], rest [sum N], finished."""
    total = _sum(ns) + _sum(us)
    dots = scratch + total.to(tl.int64) * WIDTH
    return dots, dots + total, dots + total + _sum(ns)


@triton.jit
def _ratio(scalars, level, n, POSITIVES: tl.constexpr):
    """The factor of a text's gradient relative to that of a row: 1, or N / U' for the mean with "positives"."""
    ratio = 1.0
    if POSITIVES:
        ratio = n.to(tl.float32) / tl.maximum(tl.load(scalars + MOST + level), 1.0)
    return ratio


@triton.jit(do_not_specialize=_SIZES)
def level_gradients(
    units,
    vectors,
    grad,  # levels x [n_l, u_l, both rounded up to tiles] out
    scratch,  # rest out
    n0,
    n1,
    n2,
    n3,
    u0,
    u1,
    u2,
    u3,
    WIDTH: tl.constexpr,
    POSITIVES: tl.constexpr,
    GIVEN: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of dS. The factors that a level has in common, such as 1 / 2 N, are left to `finish_levels`."""
    ns, us = (n0, n1, n2, n3), (u0, u1, u2, u3)
    pid = tl.program_id(0)
    _dots, rest, finished = _scratch(scratch, ns, us, WIDTH)
    if pid == 0:
        tl.store(finished, 0.0)
    level, n, u, row, column, i, j = _tile(pid, ns, us, BM, BN)
    images, total = _sum(ns), _sum(ns) + _sum(us)
    text = images + column
    acc = _dot_tile(units, row + i * BM, text + j * BN, row + n, text + u, WIDTH, BM, BN, BK, PRECISION)
    scalars = vectors + 6 * total
    k2 = tl.load(scalars + level) * LOG2E
    ratio = _ratio(scalars, level, n, POSITIVES)
    row_blocks, text_blocks = _cdiv(ns, BLOCK), _cdiv(us, BLOCK)
    row_flags = scalars + SCALARS + _before(level, row_blocks)
    text_flags = scalars + SCALARS + _sum(row_blocks) + _before(level, text_blocks)
    far = 0.0
    for k in tl.static_range(BM // BLOCK):
        far += tl.load(row_flags + tl.minimum(i * (BM // BLOCK) + k, tl.cdiv(n, BLOCK) - 1))
    for k in tl.static_range(BN // BLOCK):
        far += tl.load(text_flags + tl.minimum(j * (BN // BLOCK) + k, tl.cdiv(u, BLOCK) - 1))
    near = far == 0.0
    rows = i * BM + tl.arange(0, BM)
    in_rows = rows < n
    # Stored in whole tiles: entries past the ends are never read, and a mask would cost registers.
    base, stride = _grad_level(level, ns, us, u, BM, BN)
    out = grad + base + (i * BM).to(tl.int64) * stride + j * BN
    out = out + tl.arange(0, BM).to(tl.int64)[:, None] * stride
    TYPE: tl.constexpr = grad.dtype.element_ty
    if BN > BLOCK:
        # Half the columns at a time: the values loaded per column would not fit in registers beside a whole tile.
        left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
        tl.store(
            out + tl.arange(0, BN // 2)[None, :],
            _gradient(
                left, vectors, rest, row, rows, in_rows, text, j * BN, n, u, total, k2, ratio, near,
                TYPE, POSITIVES, GIVEN, SPLIT, BN // 2,
            ),
        )  # fmt: skip
        tl.store(
            out + BN // 2 + tl.arange(0, BN // 2)[None, :],
            _gradient(
                right, vectors, rest, row, rows, in_rows, text, j * BN + BN // 2, n, u, total, k2, ratio, near,
                TYPE, POSITIVES, GIVEN, SPLIT, BN // 2,
            ),
        )  # fmt: skip
    else:
        tl.store(
            out + tl.arange(0, BN)[None, :],
            _gradient(
                acc, vectors, rest, row, rows, in_rows, text, j * BN, n, u, total, k2, ratio, near,
                TYPE, POSITIVES, GIVEN, SPLIT, BN,
            ),
        )  # fmt: skip


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
    units,
    label,
    rest,
    out,
    ns,
    us,
    SIDE: tl.constexpr,  # 0: dS y; 1: dS^T x
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
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
    row, text = _before(level, ns), _sum(ns) + _before(level, us)
    base, stride = _grad_level(level, ns, us, u, ROW_TILE, COLUMN_TILE)
    if SIDE == 0:
        height, depth, first, first_inner = n, u, row, text
    else:
        height, depth, first, first_inner = u, n, text, row
    rows, columns, inner = i * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BK)
    if i * BM < height:
        if SIDE == 0:
            a, step = grad + base + rows.to(tl.int64)[:, None] * stride + inner[None, :], tl.full([], 1, tl.int64)
        else:
            a, step = grad + base + inner.to(tl.int64)[None, :] * stride + rows[:, None], stride.to(tl.int64)
        b = units + (first_inner + inner).to(tl.int64)[:, None] * WIDTH + columns[None, :]
        width = tl.full([], WIDTH, tl.int64)
        in_width = (columns < WIDTH)[None, :]
        own, value = inner.to(tl.float32), inner.to(tl.float32)
        if SPLIT and SIDE == 0:
            own = tl.load(label + row + rows, mask=rows < n, other=-1.0)
            value = tl.load(rest + row + rows, mask=rows < n, other=0.0)
        acc = tl.zeros([BM, BN], tl.float32)
        whole = depth // BK * BK
        for k in range(0, whole, BK):
            other = tl.load(b + k * width, mask=in_width, other=0.0)
            acc = tl.dot(tl.load(a + k * step), other, acc, input_precision=PRECISION)
            if SPLIT:
                if SIDE == 1:
                    own, value = tl.load(label + row + k + inner), tl.load(rest + row + k + inner)
                second = _second_piece(own, value, rows, k + inner, SIDE, grad.dtype.element_ty)
                acc = tl.dot(second, other, acc, input_precision=PRECISION)
        if whole < depth:
            # Entries past the ends may be infinite, and infinity times zero is NaN.
            inside = inner < depth - whole
            other = tl.load(b + whole * width, mask=inside[:, None] & in_width, other=0.0)
            acc = tl.dot(
                tl.where(inside[None, :], tl.load(a + whole * step), 0.0), other, acc, input_precision=PRECISION
            )
            if SPLIT:
                if SIDE == 1:
                    own = tl.load(label + row + whole + inner, mask=inside, other=-1.0)
                    value = tl.load(rest + row + whole + inner, mask=inside, other=0.0)
                second = _second_piece(own, value, rows, whole + inner, SIDE, grad.dtype.element_ty)
                acc = tl.dot(second, other, acc, input_precision=PRECISION)
        at_out = out + (first + rows).to(tl.int64)[:, None] * WIDTH + columns[None, :]
        tl.store(at_out, acc, mask=(rows < height)[:, None] & in_width)


@triton.jit
def _second_piece(own, value, rows, inner, SIDE: tl.constexpr, TYPE: tl.constexpr):
    """What dS leaves out at the positives: `value` where a row's own text meets it."""
    text = own.to(tl.int32)
    if SIDE == 0:
        return tl.where(text[:, None] == inner[None, :], value[:, None], 0.0).to(TYPE)
    else:
        return tl.where(text[None, :] == rows[:, None], value[None, :], 0.0).to(TYPE)


@triton.jit(do_not_specialize=_SIZES)
def level_products(
    grad,  # levels x [n_l, u_l, both rounded up to tiles]
    units,
    vectors,
    scratch,  # rest; d_units out
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
    SPLIT: tl.constexpr,
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
    label = vectors + (_sum(ns) + _sum(us))
    _dots, rest, _finished = _scratch(scratch, ns, us, WIDTH)
    # The side is a constant in each branch, so that the compiler knows along which dimension dS is contiguous.
    if tl.program_id(2) + FIRST_SIDE == 0:
        _product(
            pid, grad, units, label, rest, scratch, ns, us,
            0, WIDTH, SPLIT, ROW_TILE, COLUMN_TILE, BM, BN, BK, PRECISION,
        )  # fmt: skip
    else:
        _product(
            pid, grad, units, label, rest, scratch, ns, us,
            1, WIDTH, SPLIT, ROW_TILE, COLUMN_TILE, BM, BN, BK, PRECISION,
        )  # fmt: skip


@triton.jit
def _common_factor(level, ns, upstream, stride, GIVEN: tl.constexpr):
    """The factor of all gradients of a level, where dS stands for an upstream gradient of 2 N."""
    factor = 1.0
    if not GIVEN:
        factor = tl.load(upstream + level * stride).to(tl.float32) / (2.0 * tl.maximum(_pick(level, ns), 1))
    return factor


@triton.jit(
    do_not_specialize=[*_SIZES, *_STRIDES, "levels", "upstream_stride", "first_block"],
    do_not_specialize_on_alignment=[*_POINTERS, "upstream", "d_scale"],
)
def finish_levels(
    a0,  # [n_k, D] image features of each level
    a1,
    a2,
    a3,
    b0,  # [u_k, D] text features
    b1,
    b2,
    b3,
    o0,  # [n_k, D] out: gradients of the images
    o1,
    o2,
    o3,
    e0,  # [u_k, D] out: gradients of the texts
    e1,
    e2,
    e3,
    n0,
    n1,
    n2,
    n3,
    u0,
    u1,
    u2,
    u3,
    p0,  # row strides of the images
    p1,
    p2,
    p3,
    q0,  # row strides of the texts
    q1,
    q2,
    q3,
    vectors,
    scratch,  # d_units; dots out
    upstream,  # [levels] of the losses; not read if GIVEN
    d_scale,  # [levels] float32 out
    levels,
    upstream_stride,
    first_block,  # the blocks before this one, of the images, are left out
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ALIGNED: tl.constexpr,  # all rows of all levels are 16-byte aligned, in and out
    SIDE: tl.constexpr,  # the side whose rows give the gradient of the scale
    GIVEN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The gradients of the features from those of the unit rows; the last program adds up those of the scales."""
    ns, us = (n0, n1, n2, n3), (u0, u1, u2, u3)
    total = _sum(ns) + _sum(us)
    dots, _rest, finished = _scratch(scratch, ns, us, WIDTH)
    is_text, level, sizes, i = _segment(tl.program_id(0) + first_block, ns, us, ROWS)
    rows = i * ROWS + tl.arange(0, ROWS)
    inside = rows < _pick(level, sizes)
    at = _before(level, sizes) + tl.where(is_text, _sum(ns), 0) + rows
    d = tl.arange(0, BLOCK_D)
    features = _feature_rows(
        is_text, level, (a0, a1, a2, a3), (b0, b1, b2, b3), (p0, p1, p2, p3), (q0, q1, q2, q3), rows.to(tl.int64),
        ALIGNED,
    )  # fmt: skip
    out = _pointer(level, (o0, o1, o2, o3))
    if is_text:
        out = _pointer(level, (e0, e1, e2, e3))
    out = out + (rows.to(tl.int64) * D)[:, None]
    out = tl.multiple_of(out, (16, 16)) if ALIGNED else out
    in_row = inside[:, None] & (d < D)[None, :]
    inverse = tl.load(vectors + at, mask=inside, other=0.0)
    x = tl.load(features + d[None, :], mask=in_row, other=0.0).to(tl.float32) * inverse[:, None]
    g = tl.load(scratch + at.to(tl.int64)[:, None] * WIDTH + d[None, :], mask=in_row, other=0.0)
    dot = tl.sum(x * g, 1)
    tl.store(dots + at, dot, mask=inside)
    scalars = vectors + 6 * total
    if NORMALIZE:
        g = (g - x * dot[:, None]) * inverse[:, None]
    g *= _common_factor(level, ns, upstream, upstream_stride, GIVEN) * tl.load(scalars + level)
    tl.store(out + d[None, :], g.to(out.dtype.element_ty), mask=in_row)

    if _is_last(finished):
        for k in range(0, levels):
            count, first = _pick(k, ns), _before(k, ns)
            if SIDE == 1:
                count, first = _pick(k, us), _sum(ns) + _before(k, us)
            sum_of = tl.zeros([1024], tl.float64)
            for start in range(0, count, 1024):
                entry = start + tl.arange(0, 1024)
                # From L2: other programs have written them.
                sum_of += tl.load(dots + first + entry, mask=entry < count, other=0.0, cache_modifier=".cg").to(
                    tl.float64
                )
            factor = _common_factor(k, ns, upstream, upstream_stride, GIVEN)
            tl.store(d_scale + k, tl.sum(sum_of, 0).to(tl.float32) * factor)
