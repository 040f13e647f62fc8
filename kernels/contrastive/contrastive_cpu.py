"""The contrastive softmax on a CPU, tile by tile: matrix products in MKL, exponentials on a tile that stays in cache.

Of the N x U matrix, only what fits into the workspace budget outlives the forward pass: with a level's exponentials at
hand, its backward pass takes two products instead of three. One exponential per logit and pass serves rows and columns
alike: with |S| <= bound, an offset of `bound - HEADROOM` keeps every exp(S - offset) finite, and calls whose sums come
too close to underflow take a slower path with running maxima. Computes in float32 (float64 for float64 input); the
order of summation is fixed.

This is the complete backend in PyTorch; contrastive_cpu_native.py replaces its element-wise passes by C++.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from . import per_level
from .reference import inverse_norms, unit_rows, unit_rows_backward

KEEPS_EXPONENTIALS = True

# A float32 tile of 16 MB. Smaller tiles (down to 512 x 1,024) are as fast on dedicated cores; on shared cores every
# operation on a tile waits for the slowest thread, so few large operations are better.
ROWS = 2048
COLUMNS = 2048
SLICE = 256  # rows per row-wise operation: half a megabyte of intermediate results at D = 512

# exp(HEADROOM) * 2^30 terms is finite in float32. A sum below FLOOR may have lost terms to underflow (exp(-87)) that
# matter in float32, at 2^-26 of the sum: exp(-87) * 2^26 = 1e-30.
HEADROOM = 60.0
FLOOR = 1e-29


def tiles(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    for i in range(0, rows, ROWS):
        for j in range(0, columns, COLUMNS):
            yield slice(i, min(i + ROWS, rows)), slice(j, min(j + COLUMNS, columns))


def tile_buffer(rows: int, columns: int, like: Tensor) -> Tensor:  # -> [elements of the largest tile]
    return like.new_empty(min(ROWS, rows) * min(COLUMNS, columns))


def matrix(buffer: Tensor, i: slice, j: slice) -> Tensor:  # [elements of the largest tile] -> [n, u]
    n, u = i.stop - i.start, j.stop - j.start
    return buffer[: n * u].view(n, u)


def product(out: Tensor, x: Tensor, y: Tensor, factor: float = 1.0) -> Tensor:  # [n, u], [n, D], [u, D] -> [n, u]
    return torch.addmm(out, x, y.T, beta=0, alpha=factor, out=out)


def offset_of(x: Tensor, y: Tensor, scale: float, normalize: bool) -> float:
    """What is subtracted from the logits: a number of their dtype, so that all use the same one."""
    if not len(x) or not len(y):
        return 0.0
    if not normalize:
        scale *= (x.norm(dim=1).max() * y.norm(dim=1).max()).item()
    offset = max(scale - HEADROOM, 0.0)  # moderate scales need no offset, which would cost precision
    return torch.tensor(offset, dtype=x.dtype).item()


def _exp(tile: Tensor, offset: float) -> Tensor:
    return (tile.sub_(offset) if offset else tile).exp_()


def _positives(
    index: Tensor | None, i: slice, j: slice, device: torch.device
) -> tuple[Tensor, Tensor]:  # [N] -> two of equal length
    """The rows of a tile whose positive lies in it, and its column in the tile."""
    column = (torch.arange(i.start, i.stop, device=device) if index is None else index[i]) - j.start
    row = ((column >= 0) & (column < j.stop - j.start)).nonzero()[:, 0]
    return row, column[row]


def level_forward(
    image: Tensor,  # [N, D]
    text: Tensor,  # [U, D] distinct texts
    scale: Tensor,  # []
    index: Tensor | None = None,  # [N] int64
    weight: Tensor | None = None,  # [U]
    normalize: bool = True,
    kept: Tensor | None = None,  # [N, U] where to leave exp(S - offset)
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # row_lse [N], col_lse [U], positive [N], inverse norms [N], [U]
    norms = inverse_norms(image, normalize), inverse_norms(text, normalize)
    x, y = unit_rows(image, norms[0]).contiguous(), unit_rows(text, norms[1]).contiguous()
    n, u, s = len(x), len(y), scale.item()
    if n == 0 or u == 0:
        row_lse, col_lse, logit = (x.new_full((k,), -torch.inf, dtype=torch.float64) for k in (n, u, n))
        return row_lse, col_lse, logit, *norms
    offset = offset_of(x, y, s, normalize)
    w = None if weight is None else weight.to(x.dtype)
    row, col, positive = (x.new_zeros(k, dtype=torch.float64) for k in (n, u, n))
    buffer = tile_buffer(n, u, x) if kept is None else x.new_empty(0)
    for i, j in tiles(n, u):
        e = product(matrix(buffer, i, j) if kept is None else kept[i, j], x[i], y[j], s)
        # Read from the tile: a separate product could be rounded to a positive above the sum of its row.
        r, c = _positives(index, i, j, x.device)
        positive[i][r] = e[r, c].double()
        _exp(e, offset)
        col[j] += e.sum(0)
        row[i] += e.sum(1) if w is None else e @ w[j]
    if in_range(row, col, w):
        return row.log_().add_(offset), col.log_().add_(offset), positive, *norms
    return *running_maxima(x, y, s, w), positive, *norms


def in_range(rows: Tensor, columns: Tensor, weight: Tensor | None) -> bool:
    """Whether no sum has lost terms that matter."""
    least = FLOOR * _heaviest(weight)
    bounds = [(*v.aminmax(), floor) for v, floor in ((rows, least), (columns, FLOOR)) if len(v)]
    return all(low.item() >= floor and high.item() <= 1 / FLOOR for low, high, floor in bounds)  # False for NaN


def _heaviest(weight: Tensor | None) -> float:
    """The largest weight, at least 1. A heavy text may count where its exponential has underflowed."""
    return 1.0 if weight is None or not len(weight) else max(weight.max().item(), 1.0)


def running_maxima(
    x: Tensor,  # [N, D] unit rows
    y: Tensor,  # [U, D] unit rows
    scale: float,
    weight: Tensor | None,  # [U]
) -> tuple[Tensor, Tensor]:  # row_lse [N], col_lse [U]
    row, col = (x.new_full((k,), -torch.inf, dtype=torch.float64) for k in (len(x), len(y)))
    log_w = x.new_zeros(len(y)) if weight is None else weight.log()
    buffer = tile_buffer(len(x), len(y), x)
    for i, j in tiles(len(x), len(y)):
        logits = product(matrix(buffer, i, j), x[i], y[j], scale)
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
    kept: Tensor | None = None,  # [N, U] exp(S - offset)
    normalize: bool = True,
    need_image: bool = True,
    need_text: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # d_image [N, D], d_text [U, D] (empty where not needed), d_scale []
    x, y = unit_rows(image, by_row).contiguous(), unit_rows(text, by_text).contiguous()
    n, u, s = len(x), len(y), scale.item()
    need_x = need_image or not need_text  # d scale follows from either product
    d_x = torch.zeros_like(x) if need_x else x.new_empty(0)
    d_y = torch.zeros_like(y) if need_text else y.new_empty(0)
    w = x.new_ones(u) if weight is None else weight.to(x.dtype)
    offset = offset_of(x, y, s, normalize)
    magnitude = _magnitude(grad_row, grad_col, grad_positive)
    g_row, g_col, g_positive = (g / magnitude for g in (grad_row, grad_col, grad_positive))
    gradients = _Gradients(row_lse, col_lse, g_row, g_col, g_positive, w, offset, index)
    buffer = tile_buffer(n, u, x)
    for i, j in tiles(n, u):
        grad = matrix(buffer, i, j)
        if kept is not None and gradients.bounded:
            gradients.of_exponentials(grad.copy_(kept[i, j]), i, j)
        else:
            gradients.of_logits(product(grad, x[i], y[j], s), i, j)
        if need_x:
            d_x[i].addmm_(grad, y[j])
        if need_text:
            d_y[j].addmm_(grad.T, x[i])
    buffer.untyped_storage().resize_(0)  # free the tile before the next allocation
    # sum_iu G_iu S_iu / s from an available product, summed in float64 because its terms cancel.
    parts = zip(*(v.split(SLICE) for v in ((d_y, y) if need_text else (d_x, x))), strict=True)
    d_scale = torch.stack([(d * r).sum(dtype=torch.float64) for d, r in parts]).sum().mul_(magnitude)
    return (
        _finish(image, by_row, d_x.mul_(s * magnitude), normalize) if need_image else image.new_empty(0),
        _finish(text, by_text, d_y.mul_(s * magnitude), normalize) if need_text else text.new_empty(0),
        d_scale.to(scale.dtype),
    )


def _magnitude(*grads: Tensor) -> float:
    """The power of two that brings the largest gradient to order one, in which factors stay in the range of float32."""
    largest = max((g.abs().max().item() for g in grads if len(g)), default=0.0)
    return math.ldexp(1.0, min(max(math.frexp(largest)[1], -1000), 1000)) if math.isfinite(largest) else 1.0


# Over all levels of a call, as in every backend: see per_level.py for the arguments.
forward = partial(per_level.forward, level_forward)
backward = partial(per_level.backward, level_backward)


class _Gradients:
    """Turns the logits or the exponentials of a tile into the gradients of its logits, in place."""

    def __init__(
        self,
        row_lse: Tensor,  # [N]
        col_lse: Tensor,  # [U]
        grad_row: Tensor,  # [N]
        grad_col: Tensor,  # [U]
        grad_positive: Tensor,  # [N]
        weight: Tensor,  # [U]
        offset: float,
        index: Tensor | None,  # [N]
    ) -> None:
        dtype = weight.dtype
        row, col = row_lse - offset, col_lse - offset
        reach = -math.log(FLOOR)
        self.bounded = bool(
            (torch.cat([row, col]).abs() < reach).all() & (row > math.log(_heaviest(weight)) - reach).all()
        )
        self.g_row, self.g_col, self.g_positive = (g.to(dtype) for g in (grad_row, grad_col, grad_positive))
        self.index, self.offset, self.log_w = index, offset, weight.log()
        if self.bounded:
            # exp(S - offset) (a_i w_u + b_u): one exponential for both softmaxes, times a rank-two product.
            self.by_row = torch.stack([self.g_row * (-row).exp().to(dtype), torch.ones_like(self.g_row)], 1)
            self.by_text = torch.stack([weight, self.g_col * (-col).exp().to(dtype)])
        else:
            self.by_row, self.by_text = row_lse, col_lse

    def of_logits(self, tile: Tensor, i: slice, j: slice) -> None:  # [n, u]
        if self.bounded:
            self.of_exponentials(_exp(tile, self.offset), i, j)
            return
        by_text = _softmax(tile, self.by_text[j]).mul_(self.g_col[j])
        by_row = _softmax(tile.add_(self.log_w[j]), self.by_row[i, None]).mul_(self.g_row[i, None])
        self._add_positives(torch.add(by_row, by_text, out=tile), i, j)

    def of_exponentials(self, tile: Tensor, i: slice, j: slice) -> None:  # [n, u]
        self._add_positives(tile.mul_(self.by_row[i] @ self.by_text[:, j]), i, j)

    def _add_positives(self, tile: Tensor, i: slice, j: slice) -> None:  # [n, u]
        r, c = _positives(self.index, i, j, tile.device)
        tile[r, c] += self.g_positive[i][r]


def _softmax(logits: Tensor, log_sum: Tensor) -> Tensor:
    """exp(logits - log_sum) on a float32 tile, with the precision of a float64 log_sum."""
    high = log_sum.to(logits.dtype)
    return (logits - high).exp_().mul_((high - log_sum).exp().to(logits.dtype))


def _finish(x: Tensor, inverse: Tensor, d_unit: Tensor, normalize: bool) -> Tensor:  # [N, D], [N], [N, D] -> [N, D]
    out = d_unit if d_unit.dtype == x.dtype else torch.empty_like(x, memory_format=torch.contiguous_format)
    for i in range(0, len(x), SLICE):
        rows = slice(i, i + SLICE)
        out[rows] = unit_rows_backward(x[rows], inverse[rows], d_unit[rows], normalize)
    return out
