"""Run single-level functions over the levels of a call, whose per-row and per-text tensors are concatenated."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .workspace import kept_dtype, kept_levels

# row_lse [sum N_l], col_lse [sum U_l], positive [sum N_l], inverse [sum N_l + sum U_l], kept [sum of the kept N_l U_l]
Saved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def forward(
    level_forward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]],
    image: Sequence[Tensor],  # levels x [N_l, D_l]
    text: Sequence[Tensor],  # levels x [U_l, D_l]
    scale: Tensor,  # [levels]
    index: Tensor | None,  # [sum N_l] int64
    weight: Tensor | None,  # [sum U_l]
    normalize: bool,
    budget: int,  # bytes that `kept` may take
) -> Saved:
    n, u = [len(x) for x in image], [len(y) for y in text]
    dtype = kept_dtype(scale)
    keep = kept_levels(n, u, dtype.itemsize, budget)
    kept = scale.new_empty(sum(a * b for a, b, k in zip(n, u, keep, strict=True) if k), dtype=dtype)
    levels = zip(image, text, scale, split(index, n), split(weight, u), strict=True)
    parts = [
        level_forward(*level, normalize, matrix)
        for level, matrix in zip(levels, matrices(kept, n, u, keep), strict=True)
    ]
    row, column, positive, by_row, by_text = (torch.cat(part) for part in zip(*parts, strict=True))
    return row, column, positive, torch.cat([by_row, by_text]), kept


def backward(
    level_backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    image: Sequence[Tensor],  # levels x [N_l, D_l]
    text: Sequence[Tensor],  # levels x [U_l, D_l]
    scale: Tensor,  # [levels]
    index: Tensor | None,  # [sum N_l]
    weight: Tensor | None,  # [sum U_l]
    saved: Saved,  # the results of `forward`
    grads: tuple[Tensor, Tensor, Tensor],  # of row_lse, col_lse and positive
    normalize: bool,
    need_image: bool,
    need_text: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:  # d_image, d_text (empty tensors where not needed), d_scale [levels]
    n, u = [len(x) for x in image], [len(y) for y in text]
    row, column, positive, inverse, kept = saved
    keep = kept_levels(n, u, kept.itemsize, kept.nbytes)
    by_row, by_text = inverse.split([sum(n), sum(u)])
    levels = zip(image, text, scale, split(index, n), split(weight, u), strict=True)
    vectors = [(row, n), (column, u), (positive, n), (by_row, n), (by_text, u)]
    vectors += [(grads[0], n), (grads[1], u), (grads[2], n)]
    by_level = [vector.split(sizes) for vector, sizes in vectors]
    parts = [
        level_backward(*level, *each, matrix, normalize, need_image, need_text)
        for level, each, matrix in zip(levels, zip(*by_level, strict=True), matrices(kept, n, u, keep), strict=True)
    ]
    d_image, d_text, d_scale = zip(*parts, strict=True)
    return list(d_image), list(d_text), torch.stack(d_scale)


def split(joined: Tensor | None, sizes: list[int]) -> Sequence[Tensor | None]:
    return [None] * len(sizes) if joined is None else joined.split(sizes)


def matrices(kept: Tensor, n: list[int], u: list[int], keep: list[bool]) -> list[Tensor | None]:  # levels x [N_l, U_l]
    out: list[Tensor | None] = []
    start = 0
    for rows, texts, is_kept in zip(n, u, keep, strict=True):
        out.append(kept[start : start + rows * texts].view(rows, texts) if is_kept else None)
        start += rows * texts if is_kept else 0
    return out
