"""The kernels of one large level in Triton (see large.py).

bfloat16 features are multiplied as they are, in bfloat16. float16 and float32 features are copied to float32 unit rows,
rounded to TF32 for a single TF32 product, because the tensor cores truncate, which would make every cosine smaller.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .large import Factors, Positives, RowsByText, Side
from .large_kernels import (
    factors,
    finish_rows,
    inverse_norms,
    log_sums,
    tile_gradients,
    tile_sums,
    unit_rows,
)
from .launch import Compiled, launch
from .plan import Plan, are_aligned

LOG_SUM_ROWS = 64  # rows per program that adds partial sums
LOG_SUM_PARTS = 32  # partial sums that it loads at a time
VECTOR = 1024  # entries per program in kernels over vectors
PARTNER_ENTRIES = 8192  # of image rows that are read at a time for one text


class TritonKernels:
    """The kernels for one plan and device, with those compiled so far."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.compiled: Compiled = {}
        self.block = 1 << (plan.width - 1).bit_length()  # a row with its padding

    @staticmethod
    def of(features: Tensor) -> TritonKernels:
        return _kernels(Plan.of(features), features.device)

    @property
    def sum_tile(self) -> tuple[int, int]:
        tile = self.plan.sum_tile()
        return tile.rows, tile.texts

    @property
    def block_multiple(self) -> int:
        tile = self.plan.gradient_tile()
        return max(tile.rows, tile.texts)

    def side(self, features: Tensor, inverse: Tensor | None, normalize: bool) -> Side:
        plan, (n, d) = self.plan, features.shape
        if features.stride(1) != 1 or (n > 1 and features.stride(0) < d):
            features = features.contiguous()  # rows that overlap, too: TMA takes none
        aligned = are_aligned([features])
        options = {"D": d, "BLOCK_D": self.block, "num_warps": 2}
        options |= {"NORMALIZE": normalize, "ALIGNED": aligned}
        key = (features.dtype, d, normalize, aligned)
        if not plan.folds:  # the inverse norms are computed again: they cost nothing beside the unit rows
            unit = torch.empty(n, plan.width, dtype=plan.operand, device=features.device)
            inverse = torch.empty(n, dtype=torch.float32, device=features.device)
            options |= {"WIDTH": plan.width, "ROUND": plan.rounds}
            arguments = (features, unit, inverse, features.stride(0))
            launch(self.compiled, unit_rows, key, (n, 1, 1), arguments, options)
            return Side(features, unit, torch.ones_like(inverse), inverse)
        if inverse is None:
            inverse = torch.empty(n, dtype=torch.float32, device=features.device)
            launch(self.compiled, inverse_norms, key, (n, 1, 1), (features, inverse, features.stride(0)), options)
        operand = features
        if plan.width != d or plan.operand != features.dtype or not aligned:
            operand = F.pad(features, [0, plan.width - d]).to(plan.operand).contiguous()
        return Side(features, operand, inverse, inverse)

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
        tile = self.plan.sum_tile()
        arguments = (
            self._tiles(x, tile.rows),
            self._tiles(y, tile.texts),
            x.fold,
            y.fold,
            scale,
            scale if positives.index is None else positives.index,
            scale if weight is None else weight,
            row_parts,
            text_parts,
            own,
            len(x),
            len(y),
            *_strides(x, y),
            positives.shift,
            row_parts.stride(0),
            text_parts.stride(0),
        )
        key = (tile, positives.index is not None, None if weight is None else weight.dtype)
        constants = {
            "HAS_INDEX": positives.index is not None,
            "HAS_WEIGHT": weight is not None,
            "TMA": self.plan.tma,
            **self.plan.constants(),
            **tile.options(),
        }
        launch(self.compiled, tile_sums, key, (tile.count(len(x), len(y)), 1, 1), arguments, constants)

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
        arguments = (
            parts,
            x.operand,
            y.operand,
            x.fold,
            y.fold,
            scale,
            scale if weight is None else weight,
            scale if own is None else own,
            log_sum,
            log_sum if positive is None else positive,
            len(x),
            len(y),
            *_strides(x, y),
            len(parts),
            parts.stride(0),
        )
        key = (positive is not None, None if weight is None else weight.dtype)
        constants = {
            "HAS_WEIGHT": weight is not None,
            "POSITIVE": positive is not None,
            "PARTS": LOG_SUM_PARTS,
            "BM": LOG_SUM_ROWS,
            **self.plan.constants(),
            "num_warps": 8,
            "num_stages": 2,
        }
        launch(self.compiled, log_sums, key, (-(-len(x) // LOG_SUM_ROWS), 1, 1), arguments, constants)

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
        n, u = len(x), len(y)
        sizes = [n, n, u, u, u, n]
        row_log, row, text_log, text, text_weight, positive = torch.empty(sum(sizes), device=scale.device).split(sizes)
        arguments = (
            *sums,
            *grads,
            x.fold,
            y.fold,
            scale if index is None else index,
            scale if weight is None else weight,
            row_log,
            row,
            text_log,
            text,
            text_weight,
            positive,
            n,
            u,
            2.0**shift,
        )
        key = (index is not None, None if weight is None else weight.dtype)
        constants = {"HAS_INDEX": index is not None, "HAS_WEIGHT": weight is not None, "BM": VECTOR}
        launch(self.compiled, factors, key, (-(-n // VECTOR) - (-u // VECTOR), 1, 1), arguments, constants)
        return Factors((row_log, row), (text_log, text, text_weight), positive, shift)

    def gradients(
        self,
        x: Side,
        y: Side,
        scale: Tensor,
        positives: Positives,
        factors: Factors,
        out: Tensor,
    ) -> None:
        tile = self.plan.gradient_tile()
        arguments = (
            self._tiles(x, tile.rows),
            self._tiles(y, tile.texts),
            x.fold,
            y.fold,
            scale,
            scale if positives.index is None else positives.index,
            *factors.rows,
            *factors.texts,
            out,
            len(x),
            len(y),
            *_strides(x, y),
            positives.shift,
            out.stride(0) // 8,
        )
        key = (tile, positives.index is not None)
        constants = {
            "HAS_INDEX": positives.index is not None,
            "TMA": self.plan.tma,
            **self.plan.constants(),
            **tile.options(),
        }
        launch(self.compiled, tile_gradients, key, (tile.count(len(x), len(y)), 1, 1), arguments, constants)

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
        by_text = isinstance(partners, RowsByText)
        index = None if isinstance(partners, RowsByText) else partners.index
        rows = [side.operand, other.operand, *([] if out is None else [out])]
        aligned, block = are_aligned(rows), self.block
        arguments = (
            side.operand,
            product,
            other.operand,
            side.fold,
            side.inverse,
            positive,
            scale if index is None else index,
            partners.order if isinstance(partners, RowsByText) else scale,
            partners.start if isinstance(partners, RowsByText) else scale,
            scale,
            dots if out is None else out,
            dots,
            len(other),
            *_strides(side, other),
            0 if isinstance(partners, RowsByText) else partners.shift,
            2.0**shift,
        )
        key = (
            side.features.dtype,
            side.features.shape[1],
            by_text,
            index is not None,
            normalize,
            out is not None,
            aligned,
        )
        constants = {
            "D": side.features.shape[1],
            "WIDTH": self.plan.width,
            "BLOCK_D": block,
            "BY_TEXT": by_text,
            "PARTNERS": max(PARTNER_ENTRIES // block, 1),
            "HAS_INDEX": index is not None,
            "NORMALIZE": normalize,
            "STORE": out is not None,
            "ALIGNED": aligned,
            "num_warps": 8 if by_text else 2,
        }
        launch(self.compiled, finish_rows, key, (len(side), 1, 1), arguments, constants)

    def _tiles(self, side: Side, rows: int) -> Any:
        operand = side.operand
        if not self.plan.tma:
            return operand
        if side.tiles is not None and side.tiles.block_shape[0] == rows:
            return side.tiles
        stride = operand.stride(0) if len(operand) > 1 else self.plan.width  # that of a single row may be anything
        side.tiles = TensorDescriptor(operand, list(operand.shape), [stride, 1], [rows, self.plan.inner])
        return side.tiles


@functools.lru_cache
def _kernels(plan: Plan, device: torch.device) -> TritonKernels:
    return TritonKernels(plan)


def _strides(x: Side, y: Side) -> tuple[int, int]:
    """Of operands, in units of 8 entries: operands are aligned."""
    return x.operand.stride(0) // 8, y.operand.stride(0) // 8
