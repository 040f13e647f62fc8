"""Run single-level functions over the levels of a call, whose per-row and per-text tensors are concatenated."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def forward(
    level_forward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    image: Sequence[Tensor],  # levels x [N_l, D_l]
    text: Sequence[Tensor],  # levels x [U_l, D_l]
    scale: Tensor,  # [levels]
    index: Tensor | None,  # [sum N_l] int64
    weight: Tensor | None,  # [sum U_l]
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # row_lse [sum N_l], col_lse [sum U_l], positive [sum N_l]
    n, u = [len(x) for x in image], [len(y) for y in text]
    levels = zip(image, text, scale, _split(index, n), _split(weight, u), strict=True)
    parts = [level_forward(*level, normalize) for level in levels]
    row, column, positive = (torch.cat(part) for part in zip(*parts, strict=True))
    return row, column, positive


def backward(
    level_backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    image: Sequence[Tensor],  # levels x [N_l, D_l]
    text: Sequence[Tensor],  # levels x [U_l, D_l]
    scale: Tensor,  # [levels]
    index: Tensor | None,  # [sum N_l]
    weight: Tensor | None,  # [sum U_l]
    sums: tuple[Tensor, Tensor],  # row_lse and col_lse of forward
    grads: tuple[Tensor, Tensor, Tensor],  # of row_lse, col_lse and positive
    normalize: bool,
    need_image: bool,
    need_text: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:  # d_image, d_text (empty tensors where not needed), d_scale [levels]
    n, u = [len(x) for x in image], [len(y) for y in text]
    levels = zip(image, text, scale, _split(index, n), _split(weight, u), strict=True)
    vectors = (v.split(size) for v, size in zip((*sums, *grads), (n, u, n, u, n), strict=True))
    parts = [
        level_backward(*level, *each, normalize, need_image, need_text)
        for level, each in zip(levels, zip(*vectors, strict=True), strict=True)
    ]
    d_image, d_text, d_scale = zip(*parts, strict=True)
    return list(d_image), list(d_text), torch.stack(d_scale)


def _split(joined: Tensor | None, sizes: list[int]) -> Sequence[Tensor | None]:
    return [None] * len(sizes) if joined is None else joined.split(sizes)
