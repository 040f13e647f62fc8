"""One large level by chunks and blocks: what the GPU backends share.

The forward pass sums exponentials over tiles, for a chunk of rows at a time. The backward pass writes H, the gradient
with respect to the cosines, block by block, and multiplies each block with the features in the matrix library. The
kernels come from a backend (`Kernels`). Formulas in README.md.

With O the operand of a side (its features, or unit rows where a backend needs a copy) and f its fold, f_i O_i is the
unit row i. The kernels multiply operands and fold f into the exponent and into H, so that bfloat16 features need no
normalised copy.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

FORWARD_ROWS = 16384  # per chunk, which bounds the memory of the partial sums
BLOCK_BYTES = 2**28  # per block of H
PRODUCT_TILE = (128, 256)  # the tile that the matrix library is likely to choose


# Not frozen: the host makes several per block, and that would take a microsecond a field.
@dataclass(slots=True)
class Side:
    """The image rows or the texts of a level."""

    features: Tensor  # [N, D]
    operand: Tensor  # [N, >= D] rows that the kernels multiply
    fold: Tensor  # [N] float32: fold times operand is the unit row
    inverse: Tensor  # [N] float32: one over the norm
    tiles: Any = None  # of the operand, if a backend keeps them in a form of its own

    def __len__(self) -> int:
        return self.features.shape[0]

    def __getitem__(self, rows: slice) -> Side:
        return Side(self.features[rows], self.operand[rows], self.fold[rows], self.inverse[rows])


@dataclass(slots=True)
class Positives:
    """The column of row i's positive: index[i] + shift, or i + shift without an index; none outside of 0 to U - 1."""

    index: Tensor | None  # [N] int64
    shift: int = 0

    def block(self, rows: slice, texts: slice) -> Positives:
        if self.index is None:
            return Positives(None, self.shift + rows.start - texts.start)
        return Positives(self.index[rows], self.shift - texts.start)


@dataclass(frozen=True)
class RowsByText:
    """The image rows that point to each text: order[start[u] : start[u + 1]]."""

    order: Tensor  # [N] int64
    start: Tensor  # [U + 1] int64

    @staticmethod
    def of(index: Tensor, texts: int) -> RowsByText:  # [N]
        ordered, order = index.sort(stable=True)
        return RowsByText(order, torch.searchsorted(ordered, torch.arange(texts + 1, device=index.device)))


@dataclass(slots=True)
class Factors:
    """Per-row and per-text factors of H = 2^shift dL/dcosine / scale, times both folds, in a backend's own layout."""

    rows: tuple[Tensor, ...]  # each [N, ...]
    texts: tuple[Tensor, ...]  # each [U, ...]
    positive: Tensor  # [N] float32: H at the positive, which the kernels leave out of the matrix
    shift: int

    def of_rows(self, rows: slice) -> Factors:
        return Factors(tuple([t[rows] for t in self.rows]), self.texts, self.positive[rows], self.shift)

    def of_texts(self, texts: slice) -> tuple[Tensor, ...]:
        return tuple([t[texts] for t in self.texts])


class Kernels(Protocol):
    """The kernels of a backend for one level. Outputs are written in place; nothing synchronises."""

    @property
    def sum_tile(self) -> tuple[int, int]:
        """Rows and texts of a tile of the forward pass."""

    @property
    def block_multiple(self) -> int:
        """A block of H is allocated in multiples of this many rows and texts."""

    def side(self, features: Tensor, inverse: Tensor | None, normalize: bool) -> Side:
        """Prepare one side; `inverse` is known in the backward pass."""

    def sums(
        self,
        x: Side,
        y: Side,
        scale: Tensor,  # []
        positives: Positives,
        weight: Tensor | None,  # [U]
        row_parts: Tensor,  # [block columns, N] out
        text_parts: Tensor,  # [block rows, U] out
        own: Tensor,  # [N] out, where a row has a positive: its exponent or cosine, in the backend's own form
    ) -> None: ...

    def log_sums(
        self,
        parts: Tensor,  # [parts, N] partial sums of the rows of x
        x: Side,
        y: Side,
        scale: Tensor,  # []
        weight: Tensor | None,  # [U] of the rows of y
        log_sum: Tensor,  # [N] float64 out
        own: Tensor | None = None,  # [N] of `sums`
        positive: Tensor | None = None,  # [N] float64 out: logits of the positives
    ) -> None:
        """Add partial sums and take logarithms; recompute sums that are out of range."""

    def factors(
        self,
        x: Side,
        y: Side,
        scale: Tensor,  # []
        index: Tensor | None,  # [N]
        weight: Tensor | None,  # [U]
        sums: tuple[Tensor, Tensor, Tensor],  # row_lse, col_lse, positive
        grads: tuple[Tensor, Tensor, Tensor],
        shift: int,
    ) -> Factors: ...

    def gradients(
        self,
        x: Side,
        y: Side,
        scale: Tensor,  # []
        positives: Positives,
        factors: Factors,
        out: Tensor,  # [N, U] H, zero at the positives; a corner of a larger block
    ) -> None: ...

    def finish(
        self,
        side: Side,
        product: Tensor,  # [N, width of the operand] float32
        other: Side,
        partners: Positives | RowsByText,  # of image rows, or of texts that have an index
        positive: Tensor,  # [N of the image rows] H at the positives
        scale: Tensor,  # []
        shift: int,
        normalize: bool,
        out: Tensor | None,  # [N, D] the gradient, in the dtype of the features
        dots: Tensor,  # [N] float32 out: 2^-shift operand . product, whose sum is the gradient of the scale
    ) -> None:
        """Add the positives to the product in float32, and go back through the normalisation."""


def forward(
    kernels: Kernels,
    image: Tensor,  # [N, D]
    text: Tensor,  # [U, D]
    scale: Tensor,  # [] float32
    index: Tensor | None,  # [N] int64
    weight: Tensor | None,  # [U] float32, or counts as int32
    normalize: bool,
    kept: Tensor | None = None,  # ignored: GPU backends keep no exponentials
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # row_lse [N], col_lse [U], positive [N], inverse norms [N], [U]
    x, y = kernels.side(image, None, normalize), kernels.side(text, None, normalize)
    n, u = len(x), len(y)
    row_log, text_log = (scale.new_full((size,), -torch.inf, dtype=torch.float64) for size in (n, u))
    positive = torch.full_like(row_log, torch.nan)
    own = scale.new_full((n,), torch.nan)
    text_sums: Tensor | None = None
    everything = slice(0, u)
    for rows in chunks(n, FORWARD_ROWS) if u else ():
        count = rows.stop - rows.start
        row_parts = scale.new_empty(-(-u // kernels.sum_tile[1]), count)
        text_parts = scale.new_empty(-(-count // kernels.sum_tile[0]), u)
        positives = Positives(index).block(rows, everything)
        kernels.sums(x[rows], y, scale, positives, weight, row_parts, text_parts, own[rows])
        kernels.log_sums(row_parts, x[rows], y, scale, weight, row_log[rows], own[rows], positive[rows])
        if n > FORWARD_ROWS:
            text_parts = text_parts.sum(0, keepdim=True)
        text_sums = text_parts if text_sums is None else text_sums.add_(text_parts)
    if text_sums is not None:
        kernels.log_sums(text_sums, y, x, scale, None, text_log)
    return row_log, text_log, positive, x.inverse, y.inverse


def backward(
    kernels: Kernels,
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
) -> tuple[Tensor, Tensor, Tensor]:  # d_image, d_text (empty where not needed), d_scale []
    n, u = len(image), len(text)
    d_image, d_text = (
        torch.empty_like(side, memory_format=torch.contiguous_format) if needed else None
        for side, needed in ((image, need_image), (text, need_text))
    )
    d_scale = torch.zeros_like(scale)
    if n and u:
        x, y = kernels.side(image, by_row, normalize), kernels.side(text, by_text, normalize)
        shift = math.ceil(math.log2(n))  # the gradients of a mean are of the order of 1/N
        sums, grads = (row_lse, col_lse, positive), (grad_row, grad_col, grad_positive)
        factors = kernels.factors(x, y, scale, index, weight, sums, grads, shift)
        d_scale = _products(kernels, x, y, scale, index, factors, normalize, d_image, d_text)
    else:
        for side in (d_image, d_text):
            if side is not None:
                side.zero_()
    return (
        image.new_empty(0) if d_image is None else d_image,
        text.new_empty(0) if d_text is None else d_text,
        d_scale,
    )


def _products(
    kernels: Kernels,
    x: Side,
    y: Side,
    scale: Tensor,  # []
    index: Tensor | None,  # [N]
    factors: Factors,
    normalize: bool,
    d_image: Tensor | None,  # [N, D] out
    d_text: Tensor | None,  # [U, D] out
) -> Tensor:  # d_scale []
    """Memory: float32 products of all texts, and of the image rows of one block; one block of H."""
    n, u, device = len(x), len(y), scale.device
    width, dtype = x.operand.shape[1], x.operand.dtype
    side = block_side(device, width, dtype.itemsize, kernels.block_multiple)
    rows_and_texts = (-(-min(side, k) // kernels.block_multiple) * kernels.block_multiple for k in (n, u))
    buffer = torch.empty(*rows_and_texts, dtype=dtype, device=device)
    by_text = None if d_text is None else scale.new_empty(u, width)
    # The gradient of the scale follows from either product, so one of them is always needed.
    by_row = None if d_image is None and d_text is not None else scale.new_empty(min(side, n), width)
    dots = scale.new_empty(u if by_row is None else n)
    positives, everything = Positives(index), slice(0, u)
    # What does not depend on the rows is made once: slicing tensors takes the host longer than launching kernels.
    by_block = [
        (texts, y[texts], factors.of_texts(texts), None if by_text is None else by_text[texts])
        for texts in chunks(u, side)
    ]
    for rows in chunks(n, side):
        part, of_rows = x[rows], factors.of_rows(rows)
        count, row_product = len(part), None if by_row is None else by_row[: len(part)]
        for texts, columns, of_texts, text_product in by_block:
            h = buffer[:count, : len(columns)]
            own = Factors(of_rows.rows, of_texts, of_rows.positive, factors.shift)
            kernels.gradients(part, columns, scale, positives.block(rows, texts), own, h)
            if row_product is not None:
                multiply(h, columns.operand, row_product, accumulate=texts.start > 0)
            if text_product is not None:
                multiply(h.T, part.operand, text_product, accumulate=rows.start > 0)
        if row_product is not None:
            kernels.finish(
                part,
                row_product,
                y,
                positives.block(rows, everything),
                of_rows.positive,
                scale,
                factors.shift,
                normalize,
                None if d_image is None else d_image[rows],
                dots[rows],
            )
    if by_text is not None:
        partners = positives if index is None else RowsByText.of(index, u)
        unused = dots if by_row is None else torch.empty_like(y.inverse)
        kernels.finish(y, by_text, x, partners, factors.positive, scale, factors.shift, normalize, d_text, unused)
    return dots.sum(dtype=torch.float64).to(scale.dtype)


def chunks(size: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, size)) for i in range(0, size, step)]


def block_side(device: torch.device, width: int, itemsize: int, multiple: int) -> int:
    """Rows and texts of a block of H, such that each of its two products is one wave of tiles of the matrix library and
    the accumulated operand is small compared with the work."""
    side = math.isqrt(BLOCK_BYTES // itemsize)
    if device.type == "cuda":
        tile_rows, tile_columns = PRODUCT_TILE
        side = min(side, tile_rows * (processors(device) // -(-width // tile_columns)))
    return max(side // multiple, 1) * multiple


@functools.cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def multiply(
    a: Tensor,  # [N, K]
    b: Tensor,  # [K, M]
    out: Tensor,  # [N, M] float32
    accumulate: bool,
) -> None:
    """out (+)= a b, with low-precision operands and float32 accumulation."""
    if a.dtype == torch.float32:
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif a.device.type != "cuda":
        multiply(a.float(), b.float(), out, accumulate)
    elif accumulate and _accumulates(a.dtype, a.device):
        torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)
    elif accumulate:
        out.add_(torch.mm(a, b, out_dtype=torch.float32))
    else:
        torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)


@functools.cache
def _accumulates(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether addmm accepts a float32 accumulator with operands of `dtype`, which depends on the version of torch.

    Tested with empty matrices: the arguments are checked, and nothing is launched.
    """
    out, empty = torch.empty(0, 0, device=device), torch.empty(0, 0, dtype=dtype, device=device)
    try:
        torch.ops.aten.addmm.dtype_out(out, empty, empty, torch.float32, out=out)
    except (RuntimeError, AttributeError):
        return False
    return True
