"""The contrastive softmax on a CPU, tile by tile: matrix products in MKL, exponentials on a tile that stays in cache.

The N x U matrix never exists. One exponential per logit and pass serves rows and columns alike: with
|S| <= bound, the offset `bound - HEADROOM` keeps every exp(S - offset) finite, and sums that came too close to
underflow send the call to a slower path with running maxima. Float32 inside, float64 for float64 input; the
order of summation is fixed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .reference import unit_rows, unit_rows_backward

ROWS = 512
COLUMNS = 2048  # a float32 tile of ROWS x COLUMNS is 4 MB: in the last-level cache, and still a good matrix product

# exp(HEADROOM) * 2^30 terms is finite in float32. A sum below FLOOR may have lost terms to underflow (exp(-87)) that
# still count for it (2^-26 of it): exp(-87) * 2^26 = 1e-30.
HEADROOM = 60.0
FLOOR = 1e-29


def _tiles(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    for i in range(0, rows, ROWS):
        for j in range(0, columns, COLUMNS):
            yield slice(i, min(i + ROWS, rows)), slice(j, min(j + COLUMNS, columns))


def _product(buffer: Tensor, x: Tensor, y: Tensor) -> Tensor:  # [ROWS * COLUMNS], [n, D], [u, D] -> [n, u]
    return torch.mm(x, y.T, out=buffer[: len(x) * len(y)].view(len(x), len(y)))


def _offset(x: Tensor, y: Tensor, scale: Tensor, normalize: bool) -> float:
    bound = scale.item()
    if not normalize:
        bound *= (x.norm(dim=1).max() * y.norm(dim=1).max()).item()
    return bound - HEADROOM


def _positives(x: Tensor, y: Tensor, index: Tensor | None) -> Tensor:  # [N, D], [U, D], [N] -> [N]
    out = x.new_empty(len(x))
    for i in range(0, len(x), ROWS):
        rows = slice(i, i + ROWS)
        torch.linalg.vecdot(x[rows], y[rows] if index is None else y[index[rows]], out=out[rows])
    return out


def forward(
    image: Tensor,  # [N, D]
    text: Tensor,  # [U, D] distinct texts
    scale: Tensor,  # []
    index: Tensor | None = None,  # [N] int64
    weight: Tensor | None = None,  # [U]
    normalize: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # row_lse [N], col_lse [U], positive [N]
    x, y = unit_rows(image, normalize), unit_rows(text, normalize)
    n, u = len(x), len(y)
    if n == 0 or u == 0:
        return x.new_full((n,), -torch.inf), x.new_full((u,), -torch.inf), x.new_empty(n)
    offset = _offset(x, y, scale, normalize)
    x = x * scale.to(x.dtype)
    positive = _positives(x, y, index)
    w = None if weight is None else weight.to(x.dtype)
    row, col = x.new_zeros(n), x.new_zeros(u)
    buffer = x.new_empty(ROWS * COLUMNS)
    for i, j in _tiles(n, u):
        e = _product(buffer, x[i], y[j]).sub_(offset).exp_()
        col[j] += e.sum(0)
        row[i] += e.sum(1) if w is None else e @ w[j]
    lowest = torch.stack([row.min(), col.min()])
    if (lowest < FLOOR).any() or not (row.isfinite().all() and col.isfinite().all()):
        row, col = _running_maxima(x, y, w, buffer)
    else:
        row, col = row.log_().add_(offset), col.log_().add_(offset)
    return row, col, positive


def _running_maxima(x: Tensor, y: Tensor, w: Tensor | None, buffer: Tensor) -> tuple[Tensor, Tensor]:
    row, col = x.new_full((len(x),), -torch.inf), x.new_full((len(y),), -torch.inf)
    log_w = None if w is None else w.log()
    for i, j in _tiles(len(x), len(y)):
        logits = _product(buffer, x[i], y[j])
        col[j] = torch.logaddexp(col[j], logits.logsumexp(0))
        row[i] = torch.logaddexp(row[i], (logits if log_w is None else logits + log_w[j]).logsumexp(1))
    return row, col


def backward(
    image: Tensor,  # [N, D]
    text: Tensor,  # [U, D]
    scale: Tensor,  # []
    index: Tensor | None,  # [N]
    weight: Tensor | None,  # [U]
    row_lse: Tensor,  # [N]
    col_lse: Tensor,  # [U]
    grad_row: Tensor,  # [N]
    grad_col: Tensor,  # [U]
    grad_positive: Tensor,  # [N]
    normalize: bool = True,
    need_image: bool = True,
    need_text: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # d_image [N, D], d_text [U, D] (empty where not needed), d_scale []
    x, y = unit_rows(image, normalize), unit_rows(text, normalize)
    n, u = len(x), len(y)
    offset = _offset(x, y, scale, normalize) if n and u else 0.0
    s = scale.to(x.dtype)
    x = x * s
    need_image |= not need_text  # d scale is read off one of the two products
    d_x = torch.zeros_like(x) if need_image else x.new_empty(0)
    d_y = torch.zeros_like(y) if need_text else y.new_empty(0)
    w = y.new_ones(u) if weight is None else weight.to(x.dtype)
    shifted = torch.cat([row_lse, col_lse]) - offset
    bounded = bool((shifted.abs() < -math.log(FLOOR)).all())
    row_factor = torch.stack([grad_row * (offset - row_lse).exp(), torch.ones_like(row_lse)], 1)
    col_factor = torch.stack([w, grad_col * (offset - col_lse).exp()])
    own = torch.arange(n) if index is None else index
    buffer, factors = x.new_empty(2, ROWS * COLUMNS)
    for i, j in _tiles(n, u):
        grad = _product(buffer, x[i], y[j])
        if bounded:
            # exp(S - offset) (a_i w_u + b_u): one exponential for both softmaxes, their factors as a product
            # of rank two.
            grad.sub_(offset).exp_().mul_(_product(factors, row_factor[i], col_factor[:, j].T))
        else:
            by_column = (grad - col_lse[j]).exp_().mul_(grad_col[j])
            grad.sub_(row_lse[i, None]).exp_().mul_(grad_row[i, None]).mul_(w[j]).add_(by_column)
        _add_positives(grad, grad_positive[i], own[i] - j.start)
        if need_image:
            d_x[i].addmm_(grad, y[j])
        if need_text:
            d_y[j].addmm_(grad.T, x[i])
    # sum_iu G_iu S_iu / s, from whichever product is there.
    product, rows = (d_y, y) if need_text else (d_x, x)
    d_scale = torch.vdot(product.view(-1), rows.view(-1)) / s
    return (
        _finish(image, d_x.mul_(s), normalize) if need_image else image.new_empty(0),
        _finish(text, d_y, normalize) if need_text else text.new_empty(0),
        d_scale,
    )


def _add_positives(grad: Tensor, value: Tensor, column: Tensor) -> None:  # [n, u], [n], [n] may lie outside the tile
    row = ((column >= 0) & (column < grad.shape[1])).nonzero()[:, 0]
    grad[row, column[row]] += value[row]


def _finish(x: Tensor, d_unit: Tensor, normalize: bool) -> Tensor:  # [N, D], [N, D] -> [N, D]
    out = d_unit if d_unit.dtype == x.dtype else torch.empty_like(x)
    for i in range(0, len(x), ROWS):
        rows = slice(i, i + ROWS)
        out[rows] = unit_rows_backward(x[rows], d_unit[rows], normalize)
    return out
