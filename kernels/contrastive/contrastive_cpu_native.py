"""The contrastive softmax on a CPU with element-wise passes in C++ (contrastive_cpu.cpp).

For float32 computation with rows of ordinary norms and the compiled library loaded; otherwise, and for levels whose
sums come close to underflow, contrastive_cpu.py. Rows are used as they are: their norms enter through the exponents and
through the gradients of the logits. For small levels the number of calls into torch counts, so vectors of all levels
are processed together where possible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import contrastive_cpu as plain
from . import per_level
from .reference import unit_rows
from .workspace import kept_levels, kept_size

KEEPS_EXPONENTIALS = plain.KEEPS_EXPONENTIALS
# Inverse norms with which products of rows, and factors of sums down to FLOOR, stay far inside the range of float32.
ORDINARY = 2.0**-10, 2.0**10

_OPS = torch.ops.scenarioclip_fast_C


@dataclass(frozen=True)
class _Level:
    x: Tensor  # [N, D] float32
    y: Tensor  # [U, D] float32
    scale: float
    index: Tensor | None  # [N]
    weight: Tensor | None  # [U] float32
    by_row: Tensor  # [N] one over the norm of each row of x
    by_text: Tensor  # [U]
    kept: Tensor | None  # [N, U] exponentials
    offset: float

    @property
    def is_empty(self) -> bool:
        return len(self.x) == 0 or len(self.y) == 0


def forward(
    image: Sequence[Tensor],  # levels x [N_l, D_l]
    text: Sequence[Tensor],  # levels x [U_l, D_l]
    scale: Tensor,  # [levels]
    index: Tensor | None,  # [sum N_l] int64
    weight: Tensor | None,  # [sum U_l]
    normalize: bool,
    budget: int,
) -> per_level.Saved:
    if not _compiled(scale):
        return plain.forward(image, text, scale, index, weight, normalize, budget)
    images, texts = _float32(image), _float32(text)
    inverse: Tensor = _OPS.contrastive_cpu_inverse([*images, *texts], normalize)
    if not _ordinary(inverse):
        return plain.forward(image, text, scale, index, weight, normalize, budget)

    n, u = [len(x) for x in images], [len(y) for y in texts]
    kept = scale.new_empty(kept_size(n, u, scale.itemsize, budget))
    _OPS.contrastive_cpu_large_pages(kept)
    row, column, positive = (scale.new_zeros(sum(k), dtype=torch.float64) for k in (n, u, n))
    levels = _levels(images, texts, scale, index, weight, inverse, kept, normalize)
    results = list(zip(row.split(n), column.split(u), positive.split(n), strict=True))
    for level, result in zip(levels, results, strict=True):
        _add_exponentials(level, *result)
    extreme = (
        []
        if plain.in_range(row, column, weight)
        else [
            not plain.in_range(rows, columns, level.weight)
            for level, (rows, columns, _) in zip(levels, results, strict=True)
        ]
    )
    row.log_()
    column.log_()
    for k, (level, (rows, columns, positives)) in enumerate(zip(levels, results, strict=True)):
        if level.is_empty:
            positives.fill_(-torch.inf)
        elif extreme and extreme[k]:
            x, y = unit_rows(level.x, level.by_row), unit_rows(level.y, level.by_text)
            for out, found in zip((rows, columns), plain.running_maxima(x, y, level.scale, level.weight), strict=True):
                out.copy_(found)
        elif level.offset:
            rows.add_(level.offset)
            columns.add_(level.offset)
    return row, column, positive, inverse, kept


def backward(
    image: Sequence[Tensor],  # levels x [N_l, D_l]
    text: Sequence[Tensor],  # levels x [U_l, D_l]
    scale: Tensor,  # [levels]
    index: Tensor | None,  # [sum N_l]
    weight: Tensor | None,  # [sum U_l]
    saved: per_level.Saved,
    grads: tuple[Tensor, Tensor, Tensor],  # of row_lse, col_lse and positive
    normalize: bool,
    need_image: bool,
    need_text: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:  # d_image, d_text (empty tensors where not needed), d_scale [levels]
    row, column, positive, inverse, kept = saved
    if not _compiled(scale) or not _ordinary(inverse):
        return plain.backward(image, text, scale, index, weight, saved, grads, normalize, need_image, need_text)
    n, u = [len(x) for x in image], [len(y) for y in text]
    levels = _levels(_float32(image), _float32(text), scale, index, weight, inverse, kept, normalize)
    split = [v.split(size) for v, size in zip((row, column, positive, *grads), (n, u, n, n, u, n), strict=True)]
    by_level = zip(*split, strict=True)
    d_image, d_text, d_scale = [], [], []
    for k, (level, (rows, columns, positives, *upstream)) in enumerate(zip(levels, by_level, strict=True)):
        in_range = False
        if not level.is_empty:
            by = (level.by_row, level.by_text)
            factors, magnitude, in_range = _OPS.contrastive_cpu_factors(
                rows, columns, *upstream, *by, level.weight, level.offset
            )
        if in_range:
            d_x, d_y, d_s = _level_backward(level, factors, magnitude, normalize, need_image, need_text)
        else:
            vectors = (rows, columns, positives, level.by_row, level.by_text, *upstream)
            given: Any = (*vectors, level.kept, normalize, need_image, need_text)
            d_x, d_y, d_s = plain.level_backward(image[k], text[k], scale[k], level.index, level.weight, *given)
        d_image.append(d_x.to(image[k].dtype))
        d_text.append(d_y.to(text[k].dtype))
        d_scale.append(d_s)
    return d_image, d_text, torch.stack(d_scale).to(scale.dtype)


def _compiled(scale: Tensor) -> bool:  # [levels] in the dtype of the computation
    """Whether there are compiled passes. The dispatcher loads the library if it can."""
    return scale.dtype == torch.float32 and hasattr(_OPS, "contrastive_cpu_exponentials")


def _float32(features: Sequence[Tensor]) -> list[Tensor]:
    return [x.float().contiguous() for x in features]


def _ordinary(inverse: Tensor) -> bool:  # [rows]
    if len(inverse) == 0:
        return True
    smallest, largest = inverse.aminmax()
    return smallest.item() >= ORDINARY[0] and largest.item() <= ORDINARY[1]  # False for NaN


def _levels(
    images: list[Tensor],  # levels x [N_l, D_l] float32
    texts: list[Tensor],  # levels x [U_l, D_l] float32
    scale: Tensor,  # [levels]
    index: Tensor | None,  # [sum N_l]
    weight: Tensor | None,  # [sum U_l]
    inverse: Tensor,  # [sum N_l + sum U_l]
    kept: Tensor,  # [sum of the kept N_l U_l]
    normalize: bool,
) -> list[_Level]:
    n, u = [len(x) for x in images], [len(y) for y in texts]
    by = inverse.split([*n, *u])
    fields = zip(
        images,
        texts,
        scale.tolist(),
        per_level.split(index, n),
        per_level.split(None if weight is None else weight.float(), u),
        by[: len(n)],
        by[len(n) :],
        per_level.matrices(kept, n, u, kept_levels(n, u, kept.itemsize, kept.nbytes)),
        strict=True,
    )
    return [
        _Level(x, y, s, own, w, by_row, by_text, e, plain.offset_of(x, y, s, normalize))
        for x, y, s, own, w, by_row, by_text, e in fields
    ]


def _add_exponentials(level: _Level, row: Tensor, column: Tensor, positive: Tensor) -> None:  # [N], [U], [N] float64
    """Add the sums of a level's exponentials to `row` and `column`, and write its positives."""
    n, u, kept = len(level.x), len(level.y), level.kept
    buffer = plain.tile_buffer(n, u, level.x) if kept is None else kept
    options = (level.by_row, level.by_text, level.weight, level.index)
    for i, j in plain.tiles(n, u):
        tile = plain.matrix(buffer, i, j) if kept is None else kept[i, j]
        plain.product(tile, level.x[i], level.y[j])
        place = (i.start, j.start, level.scale, level.offset)
        _OPS.contrastive_cpu_exponentials(tile, *options, *place, row, column, positive)


def _level_backward(
    level: _Level,
    factors: Tensor,  # [3 (N + U)]
    magnitude: float,  # of the upstream gradients, without which the factors are
    normalize: bool,
    need_image: bool,
    need_text: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # d_image [N, D], d_text [U, D] (empty where not needed), d_scale []
    x, y, kept = level.x, level.y, level.kept
    need_x = need_image or not need_text  # d scale follows from either product
    d_x, d_y = (torch.empty_like(v) if need else v.new_empty(0) for v, need in ((x, need_x), (y, need_text)))
    buffer = plain.tile_buffer(len(x), len(y), x)
    options = (factors, level.by_row, level.by_text, level.index)
    for i, j in plain.tiles(len(x), len(y)):
        grad = plain.matrix(buffer, i, j)
        source = plain.product(grad, x[i], y[j]) if kept is None else kept[i, j]
        place = (i.start, j.start, level.scale, level.offset)
        _OPS.contrastive_cpu_gradients(source, kept is not None, *options, *place, grad)
        if need_x:
            d_x[i].addmm_(grad, y[j], beta=float(j.start > 0))
        if need_text:
            d_y[j].addmm_(grad.T, x[i], beta=float(i.start > 0))
    buffer.untyped_storage().resize_(0)  # free the tile before the next allocation
    factor, dot = level.scale * magnitude, 0.0
    for rows, by, product in ((x, level.by_row, d_x), (y, level.by_text, d_y)):
        if len(product):
            # sum_iu G_iu S_iu / s, from either product.
            dot = _OPS.contrastive_cpu_finish(rows, by, factor, normalize, product)
    return d_x if need_image else x.new_empty(0), d_y, torch.tensor(dot * magnitude)
