"""The Triton kernels between the log-sums of one large level and its mean loss, launched by contrastive_triton.py."""

# mypy: disable-error-code="no-untyped-def"
# (kernel arguments have no Python types; comments give their shapes)

from __future__ import annotations

import triton
import triton.language as tl


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
