"""The contrastive softmax on a CPU, tile by tile: matrix products in MKL, exponentials on a tile that stays in cache.

The N x U matrix never exists. One exponential per logit and pass serves rows and columns alike: with
|S| <= bound, an offset of `bound - HEADROOM` keeps every exp(S - offset) finite, and calls whose sums come too close to
underflow take a slower path with running maxima. Computes in float32 (float64 for float64 input); the order of
summation is fixed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from . import per_level
from .reference import inverse_norms, unit_rows, unit_rows_backward

# A float32 tile of 16 MB. Smaller tiles (down to 512 x 1,024) are as fast on dedicated cores; on shared cores every
# operation on a tile waits for the slowest thread, so few large operations are better.
ROWS = 2048
COLUMNS = 2048
SLICE = 256  # rows per row-wise operation: half a megabyte of intermediate results at D = 512

# exp(HEADROOM) * 2^30 terms is finite in float32. A sum below FLOOR may have lost terms to underflow (exp(-87)) that
# matter in float32, at 2^-26 of the sum: exp(-87) * 2^26 = 1e-30.
HEADROOM = 60.0
FLOOR = 1e-29


def _tiles(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    for i in range(0, rows, ROWS):
        for j in range(0, columns, COLUMNS):
            yield slice(i, min(i + ROWS, rows)), slice(j, min(j + COLUMNS, columns))


def _buffers(x: Tensor, y: Tensor, count: int) -> Tensor:  # [N, D], [U, D] -> [count, elements of the largest tile]
    return x.new_empty(count, min(ROWS, len(x)) * min(COLUMNS, len(y)))


def _product(buffer: Tensor, x: Tensor, y: Tensor) -> Tensor:  # [elements of a tile], [n, D], [u, D] -> [n, u]
    return torch.mm(x, y.T, out=buffer[: len(x) * len(y)].view(len(x), len(y)))


def _offset(x: Tensor, y: Tensor, scale: Tensor, normalize: bool) -> float:
    bound = scale.item()
    if not normalize:
        bound *= (x.norm(dim=1).max() * y.norm(dim=1).max()).item()
    return max(bound - HEADROOM, 0.0)  # moderate scales need no offset, which would cost precision


def _exp(tile: Tensor, offset: float) -> Tensor:
    return (tile.sub_(offset) if offset else tile).exp_()


def _positives(column: Tensor, width: int) -> tuple[Tensor, Tensor]:  # [n] -> two of equal length
    """The rows whose positive lies in a tile of `width` columns, and its column in the tile."""
    row = ((column >= 0) & (column < width)).nonzero()[:, 0]
    return row, column[row]


def level_forward(
    image: Tensor,  # [N, D]
    text: Tensor,  # [U, D] distinct texts
    scale: Tensor,  # []
    index: Tensor | None = None,  # [N] int64
    weight: Tensor | None = None,  # [U]
    normalize: bool = True,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # row_lse [N], col_lse [U], positive [N], inverse norms [N], [U]
    norms = inverse_norms(image, normalize), inverse_norms(text, normalize)
    x, y = unit_rows(image, norms[0]).contiguous(), unit_rows(text, norms[1]).contiguous()
    n, u = len(x), len(y)
    if n == 0 or u == 0:
        row_lse, col_lse, logit = (x.new_full((k,), -torch.inf, dtype=torch.float64) for k in (n, u, n))
        return row_lse, col_lse, logit, *norms
    offset = _offset(x, y, scale, normalize)
    x = x * scale.to(x.dtype)
    positive_column = torch.arange(n, device=x.device) if index is None else index
    w = None if weight is None else weight.to(x.dtype)
    row, col, positive = x.new_zeros(n), x.new_zeros(u), x.new_empty(n)
    (buffer,) = _buffers(x, y, 1)
    for i, j in _tiles(n, u):
        e = _product(buffer, x[i], y[j])
        # Read from the tile: a separate product could be rounded to a positive above the sum of its row.
        r, c = _positives(positive_column[i] - j.start, e.shape[1])
        positive[i][r] = e[r, c]
        _exp(e, offset)
        col[j] += e.sum(0)
        row[i] += e.sum(1) if w is None else e @ w[j]
    if _in_range(row) and _in_range(col):
        return row.double().log_().add_(offset), col.double().log_().add_(offset), positive.double(), *norms
    return *_running_maxima(x, y, w, buffer), positive.double(), *norms


def _in_range(sums: Tensor) -> bool:
    return bool((sums >= FLOOR).all() and (sums <= 1 / FLOOR).all())


def _running_maxima(x: Tensor, y: Tensor, w: Tensor | None, buffer: Tensor) -> tuple[Tensor, Tensor]:
    row, col = (x.new_full((k,), -torch.inf, dtype=torch.float64) for k in (len(x), len(y)))
    log_w = x.new_zeros(len(y)) if w is None else w.log()
    for i, j in _tiles(len(x), len(y)):
        logits = _product(buffer, x[i], y[j])
        top = logits.amax(0)
        col[j] = torch.logaddexp(col[j], (logits - top).exp_().sum(0).double().log_() + top)
        top = (
            logits.add_(log_w[j]).amax(1).nan_to_num_(nan=torch.nan, neginf=0.0)
        )  # -inf where all texts of the tile have zero weight
        row[i] = torch.logaddexp(row[i], logits.sub_(top[:, None]).exp_().sum(1).double().log_() + top)
    return row, col


def level_backward(
    image: Tensor,  # [N, D]
    text: Tensor,  # [U, D]
    scale: Tensor,  # []
    index: Tensor | None,  # [N]
    weight: Tensor | None,  # [U]
    row_lse: Tensor,  # [N]
    col_lse: Tensor,  # [U]
    positive: Tensor,  # [N]
    by_row: Tensor,  # [N] one over the norm of each image row
    by_text: Tensor,  # [U]
    grad_row: Tensor,  # [N]
    grad_col: Tensor,  # [U]
    grad_positive: Tensor,  # [N]
    kept: Tensor | None = None,
    normalize: bool = True,
    need_image: bool = True,
    need_text: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # d_image [N, D], d_text [U, D] (empty where not needed), d_scale []
    x, y = unit_rows(image, by_row).contiguous(), unit_rows(text, by_text).contiguous()
    n, u = len(x), len(y)
    offset = _offset(x, y, scale, normalize) if n and u else 0.0
    s = scale.to(x.dtype)
    x = x * s
    need_x = need_image or not need_text  # d scale follows from either product
    d_x = torch.zeros_like(x) if need_x else x.new_empty(0)
    d_y = torch.zeros_like(y) if need_text else y.new_empty(0)
    positive_column = torch.arange(n, device=x.device) if index is None else index
    w = y.new_ones(u) if weight is None else weight.to(x.dtype)
    log_w = w.log()
    row, col = row_lse - offset, col_lse - offset
    bounded = bool((torch.cat([row, col]).abs() < -math.log(FLOOR)).all())
    if not bounded:
        offset, row, col = 0.0, row_lse, col_lse
    g_row, g_col, g_positive = (g.to(x.dtype) for g in (grad_row, grad_col, grad_positive))
    row_factor = torch.stack([g_row * (-row).exp().to(x.dtype), torch.ones_like(g_row)], 1)
    col_factor = torch.stack([w, g_col * (-col).exp().to(x.dtype)])
    buffer, factors = _buffers(x, y, 2)
    for i, j in _tiles(n, u):
        grad = _product(buffer, x[i], y[j])
        if bounded:
            # exp(S - offset) (a_i w_u + b_u): one exponential for both softmaxes, times a rank-two product.
            _exp(grad, offset).mul_(_product(factors, row_factor[i], col_factor[:, j].T))
        else:
            by_column = _softmax(grad, col[j]).mul_(g_col[j])
            grad.copy_(_softmax(grad.add_(log_w[j]), row[i, None])).mul_(g_row[i, None]).add_(by_column)
        r, c = _positives(positive_column[i] - j.start, grad.shape[1])
        grad[r, c] += g_positive[i][r]
        if need_x:
            d_x[i].addmm_(grad, y[j])
        if need_text:
            d_y[j].addmm_(grad.T, x[i])
    buffer.untyped_storage().resize_(0)  # free the tiles before the next allocation
    # sum_iu G_iu S_iu / s from an available product, summed in float64 because its terms cancel.
    product, rows = (d_y, y) if need_text else (d_x, x)
    parts = zip(product.split(SLICE), rows.split(SLICE), strict=True)
    d_scale = torch.stack([(p * r).sum(dtype=torch.float64) for p, r in parts]).sum().to(s.dtype) / s
    return (
        _finish(image, by_row, d_x.mul_(s), normalize) if need_image else image.new_empty(0),
        _finish(text, by_text, d_y, normalize) if need_text else text.new_empty(0),
        d_scale,
    )


# Over all levels of a call, as in every backend: see per_level.py for the arguments.
forward = partial(per_level.forward, level_forward)
backward = partial(per_level.backward, level_backward)


def _softmax(logits: Tensor, log_sum: Tensor) -> Tensor:
    """exp(logits - log_sum) on a float32 tile, with the precision of a float64 log_sum."""
    high = log_sum.to(logits.dtype)
    return (logits - high).exp_().mul_((high - log_sum).exp().to(logits.dtype))


def _finish(x: Tensor, inverse: Tensor, d_unit: Tensor, normalize: bool) -> Tensor:  # [N, D], [N], [N, D] -> [N, D]
    out = d_unit if d_unit.dtype == x.dtype else torch.empty_like(x)
    for i in range(0, len(x), SLICE):
        rows = slice(i, i + SLICE)
        out[rows] = unit_rows_backward(x[rows], inverse[rows], d_unit[rows], normalize)
    return out
