"""The contrastive softmax in CUDA: CUTLASS's tensor core loops with our own epilogues, for compute capability 9.0.

For bfloat16 features; every level is processed alone, as in large.py. Features that TMA cannot read (widths that are
not a multiple of 8, rows that do not begin at 16 bytes) are copied.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import large, per_level
from .large import Factors, Positives, RowsByText, Side


def _op(name: str) -> Callable[..., None]:
    function: Callable[..., None] = getattr(torch.ops.scenarioclip_fast_C, f"contrastive_{name}")
    return function


WIDEST = 8192  # kFinishWidth in contrastive.h


class NativeKernels:
    sum_tile = (128, 128)
    block_multiple = 2048  # the scheduler's order of tiles shares operands in L2 best on whole groups of clusters

    def side(self, features: Tensor, inverse: Tensor | None, normalize: bool) -> Side:
        n, d = features.shape
        if d > WIDEST:
            raise ValueError(
                f"backend 'cuda': got features of width {d}, expected at most {WIDEST}: use backend 'triton'"
            )
        overlap = n > 1 and features.stride(0) < d
        rows = features.contiguous() if overlap or features.stride(1) != 1 else features
        if inverse is None:
            inverse = torch.empty(n, dtype=torch.float32, device=rows.device)
            _op("inverse_norms")(rows, normalize, inverse)
        if d % 8 or rows.data_ptr() % 16 or (n > 1 and rows.stride(0) % 8):
            rows = F.pad(rows, [0, -d % 8]).clone(memory_format=torch.contiguous_format)
        return Side(features, rows, inverse, inverse)

    def sums(
        self,
        x: Side,
        y: Side,
        scale: Tensor,
        positives: Positives,
        weight: Tensor | None,
        row_parts: Tensor,
        text_parts: Tensor,
        own: Tensor,
    ) -> None:
        index, first = positives.index, positives.shift
        _op("sums")(*_operands(x, y, scale), index, first, weight, row_parts, text_parts, own)

    def log_sums(
        self,
        parts: Tensor,
        x: Side,
        y: Side,
        scale: Tensor,
        weight: Tensor | None,
        log_sum: Tensor,
        own: Tensor | None = None,
        positive: Tensor | None = None,
    ) -> None:
        _op("finish_sums")(parts, *_operands(x, y, scale), weight, own, log_sum, positive)

    def factors(
        self,
        x: Side,
        y: Side,
        scale: Tensor,
        index: Tensor | None,
        weight: Tensor | None,
        sums: tuple[Tensor, Tensor, Tensor],
        grads: tuple[Tensor, Tensor, Tensor],
        shift: int,
    ) -> Factors:
        rows, texts = scale.new_empty(len(x), 8), scale.new_empty(len(y), 8)
        positive = scale.new_empty(len(x))
        _op("factors")(*sums, *grads, x.fold, y.fold, scale.view(1), index, 0, weight, shift, rows, texts, positive)
        return Factors((rows,), (texts,), positive, shift)

    def gradients(self, x: Side, y: Side, scale: Tensor, positives: Positives, factors: Factors, out: Tensor) -> None:
        _op("gradients")(x.operand, y.operand, positives.index, positives.shift, *factors.rows, *factors.texts, out)

    def finish(
        self,
        side: Side,
        product: Tensor,
        other: Side,
        partners: Positives | RowsByText,
        positive: Tensor,
        scale: Tensor,
        shift: int,
        normalize: bool,
        out: Tensor | None,
        dots: Tensor,
    ) -> None:
        whole = out if out is not None and out.shape == side.operand.shape else torch.empty_like(side.operand)
        rest: tuple[Any, ...] = (positive, scale.view(1), shift, normalize, whole, dots)
        operands = (side.operand, side.fold, product, other.operand)
        if isinstance(partners, RowsByText):
            _op("finish_texts")(*operands, partners.order, partners.start, 0, *rest)
        else:
            _op("finish_rows")(*operands, partners.index, partners.shift, *rest)
        if out is not None and whole is not out:
            out.copy_(whole[:, : out.shape[1]])


def _operands(x: Side, y: Side, scale: Tensor) -> tuple[Tensor, ...]:
    return x.operand, y.operand, x.fold, y.fold, scale.view(1)


# Over all levels of a call, as in every backend: see per_level.py for the arguments.
forward = partial(per_level.forward, partial(large.forward, NativeKernels()))
backward = partial(per_level.backward, partial(large.backward, NativeKernels()))
