"""Small levels, which share their launches (grouped_kernels.py): mean losses, or log-sums with given gradients.

At these sizes the host is expected to take longer than the kernels. So there is one buffer for all vectors, the
constants of a launch are made once, and operands are read through pointers: a TMA descriptor would be made and encoded
again for each launch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from . import grouped_kernels as kernels
from .grouped_kernels import LEVELS
from .launch import Compiled, launch
from .plan import are_aligned
from .reference import EPS

FLAGGED = 64  # rows per flag and partial sum: BLOCK in grouped_kernels.py
# Rows and texts of a tile of S and of dS: small, as three levels have few tiles for a GPU's processors.
TILE_ROWS, TILE_TEXTS = 128, 64
PRODUCT_BLOCK = 64
ROWS = 4  # per program of the kernels over feature rows
SCAN = 1024  # text indices compared at a time
SCALARS = 16


@dataclass(frozen=True)
class Form:
    """How features are multiplied, the options of the loss, and with them the constants of each kernel.

    A form is kept for all calls like it, with the kernels compiled for it so far.
    """

    operand: torch.dtype
    precision: str
    width: int  # of the features
    padded: int  # width rounded up to the blocks of the inner dimension
    inner: int
    rounds: bool
    positives: bool
    given: bool  # log-sums and given gradients of them, not mean losses
    normalize: bool

    @functools.cached_property
    def compiled(self) -> Compiled:
        return {}

    @property
    def splits(self) -> bool:
        """Whether entries of dS at positives are kept in two pieces: three TF32 products lose nothing."""
        return self.precision != "tf32x3"

    @functools.cached_property
    def _common(self) -> dict[str, Any]:
        constants = {"WIDTH": self.padded, "BK": self.inner, "PRECISION": self.precision}
        return {**constants, "num_warps": 4}

    @functools.cached_property
    def _rows(self) -> dict[str, Any]:
        block = triton.next_power_of_2(self.padded)
        sizes = {"D": self.width, "WIDTH": self.padded, "BLOCK_D": block, "ROWS": ROWS}
        warps = min(max(block // 128, 4), 16)
        return {**sizes, "NORMALIZE": self.normalize, "num_warps": warps}

    @functools.cached_property
    def prepare(self) -> dict[str, Any]:
        options = {"POSITIVES": self.positives, "GIVEN": self.given, "ROUND": self.rounds}
        return {"SMALLEST": EPS, "SCAN": SCAN, **options, **self._rows}

    @functools.cached_property
    def sums(self) -> dict[str, Any]:
        return {"BM": TILE_ROWS, "BN": TILE_TEXTS, "num_stages": 3, **self._common}

    @functools.cached_property
    def log_sums(self) -> dict[str, Any]:
        return {"ROW_TILE": TILE_ROWS, "COLUMN_TILE": TILE_TEXTS, "num_stages": 2, **self._common}

    @functools.cached_property
    def losses(self) -> dict[str, Any]:
        return {"POSITIVES": self.positives, **self.log_sums}

    @functools.cached_property
    def gradients(self) -> dict[str, Any]:
        return {"POSITIVES": self.positives, "GIVEN": self.given, "SPLIT": self.splits, **self.sums}

    @functools.cached_property
    def products(self) -> dict[str, Any]:
        tile = {"ROW_TILE": TILE_ROWS, "COLUMN_TILE": TILE_TEXTS, "BM": PRODUCT_BLOCK, "BN": PRODUCT_BLOCK}
        return {"SPLIT": self.splits, **tile, "num_stages": 3, **self._common}

    @functools.cached_property
    def finish(self) -> dict[str, Any]:
        return {"GIVEN": self.given, **self._rows}


def vectors_size(total: int, given: bool = False) -> int:
    """The length of `vectors` for this many rows: see grouped_kernels.py."""
    return (7 if given else 6) * total + SCALARS + 5 * (total // FLAGGED + 2 * LEVELS)


def _blocks(sizes: Sequence[int], block: int) -> int:
    return sum([-(-n // block) for n in sizes])


class Levels:
    """The features of up to LEVELS levels of one width, with unit stride, and what every launch is told of them."""

    __slots__ = ("aligned", "device", "dtype", "image", "rows", "sizes", "strides", "text", "texts", "tiles", "total")

    def __init__(self, image: Sequence[Tensor], text: Sequence[Tensor]) -> None:
        self.image = [x if x.stride()[1] == 1 else x.contiguous() for x in image]
        self.text = [y if y.stride()[1] == 1 else y.contiguous() for y in text]
        self.rows, self.texts = [x.shape[0] for x in image], [y.shape[0] for y in text]
        self.device, self.dtype = image[0].get_device(), image[0].dtype
        self.aligned = are_aligned([*self.image, *self.text])
        zeros = [0] * (LEVELS - len(image))
        self.sizes = (*self.rows, *zeros, *self.texts, *zeros)
        self.strides = (*[x.stride()[0] for x in self.image], *zeros, *[y.stride()[0] for y in self.text], *zeros)
        self.total = sum(self.sizes)
        self.tiles = sum([-(-n // TILE_ROWS) * -(-u // TILE_TEXTS) for n, u in zip(self.rows, self.texts, strict=True)])

    def blocks(self, block: int) -> int:
        """How many blocks of rows all levels have."""
        return max(_blocks(self.rows, block) + _blocks(self.texts, block), 1)


def _padded(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [*tensors, *[tensors[0]] * (LEVELS - len(tensors))]


def losses(
    form: Form,
    levels: Levels,
    scale: Sequence[Tensor],  # levels x [] float32
    index: Sequence[Tensor | None],  # levels x [N_l] int64; None: row i has text i
    weight: Sequence[Tensor | None],  # levels x [U_l] float32, in the row sums; None: the rows of each text, or ones
    loss: Tensor,  # [levels] float32 out
) -> tuple[Tensor, Tensor]:  # units and vectors, for `losses_backward`
    units, vectors = _prepare(form, levels, scale, index, weight)
    parts = _sums(form, levels, units, vectors)
    arguments, grid = (units, vectors, parts, loss, *levels.sizes, len(levels.image)), (levels.blocks(FLAGGED), 1, 1)
    launch(form.compiled, kernels.level_losses, levels.device, grid, arguments, form.losses)
    return units, vectors


def losses_backward(
    form: Form,
    levels: Levels,
    units: Tensor,
    vectors: Tensor,
    grad: Tensor,  # [levels] of the losses
    d_image: list[Tensor] | None,  # levels x [N_l, D] out, contiguous
    d_text: list[Tensor] | None,  # levels x [U_l, D] out
    d_scale: Tensor,  # [levels] float32 out
) -> None:
    """At least one of d_image and d_text is given; the gradient of the scales follows from either."""
    if levels.tiles:
        _gradients(form, levels, units, vectors, grad, d_image, d_text, d_scale)
    else:
        _clear(d_image, d_text, d_scale)


def log_sums(
    form: Form,
    levels: Levels,
    scale: Sequence[Tensor],
    index: Sequence[Tensor | None],
    weight: Sequence[Tensor | None],  # None: ones
    row_lse: Tensor,  # [sum N] float64 out
    text_lse: Tensor,  # [sum U] float64 out
    positive: Tensor,  # [sum N] float64 out
) -> Tensor:  # [sum N + sum U]: one over the length of each row
    units, vectors = _prepare(form, levels, scale, index, weight)
    parts, grid = _sums(form, levels, units, vectors), (levels.blocks(FLAGGED), 1, 1)
    arguments = (units, vectors, parts, row_lse, text_lse, positive, *levels.sizes)
    launch(form.compiled, kernels.level_log_sums, levels.device, grid, arguments, form.log_sums)
    return vectors[: levels.total]


def log_sums_backward(
    form: Form,
    levels: Levels,
    scale: Sequence[Tensor],
    index: Sequence[Tensor | None],
    weight: Sequence[Tensor | None],
    sums: Sequence[Tensor],  # row_lse [sum N] and text_lse [sum U]
    grads: Sequence[Tensor],  # float64, of row_lse, text_lse and positive
    d_image: list[Tensor] | None,
    d_text: list[Tensor] | None,
    d_scale: Tensor,
) -> None:
    """Outputs as in `losses_backward`. Unit rows are made anew: keeping them would cost the memory of the features."""
    if not levels.tiles:
        _clear(d_image, d_text, d_scale)
        return
    units, vectors = _prepare(form, levels, scale, index, weight)
    arguments, grid = (vectors, *sums, *grads, *levels.sizes), (levels.blocks(FLAGGED), 1, 1)
    launch(form.compiled, kernels.level_factors, levels.device, grid, arguments, {"num_warps": 2})
    _gradients(form, levels, units, vectors, d_scale, d_image, d_text, d_scale)


def _prepare(
    form: Form,
    levels: Levels,
    scale: Sequence[Tensor],
    index: Sequence[Tensor | None],
    weight: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor]:  # units and vectors
    total, device = levels.total, levels.image[0].device
    units = torch.empty((total, form.padded), dtype=form.operand, device=device)
    vectors = torch.empty(vectors_size(total, form.given), dtype=torch.float32, device=device)
    # What is not given is not read; its pointers get the types of those that are.
    given, indices, weights = 0, [], []
    any_index = next((t for t in index if t is not None), units)
    any_weight = next((t for t in weight if t is not None), vectors)
    for k, (own, w) in enumerate(zip(index, weight, strict=True)):
        indices.append(any_index if own is None else own)
        weights.append(any_weight if w is None else w)
        given += (own is not None) * 2**k + (w is not None) * 2 ** (LEVELS + k)
    arguments = (
        *_padded(levels.image),
        *_padded(levels.text),
        *_padded(scale),
        *_padded(indices),
        *_padded(weights),
        *levels.sizes,
        *levels.strides,
        given,
        units,
        vectors,
    )
    key = (levels.device, levels.dtype, levels.aligned, any_index.dtype, any_weight.dtype)
    constants = form.prepare | {"ALIGNED": levels.aligned}
    launch(form.compiled, kernels.prepare_levels, key, (levels.blocks(ROWS), 1, 1), arguments, constants)
    return units, vectors


def _sums(form: Form, levels: Levels, units: Tensor, vectors: Tensor) -> Tensor:
    """The partial sums of each tile: [block columns, sum N], then [block rows, sum U]."""
    blocks = -(-max(levels.texts) // TILE_TEXTS), -(-max(levels.rows) // TILE_ROWS)
    size = blocks[0] * sum(levels.rows) + blocks[1] * sum(levels.texts)
    parts = torch.empty(size, dtype=torch.float32, device=vectors.device)
    if levels.tiles:
        arguments = (units, vectors, parts, *levels.sizes)
        launch(form.compiled, kernels.level_sums, levels.device, (levels.tiles, 1, 1), arguments, form.sums)
    return parts


def _gradients(
    form: Form,
    levels: Levels,
    units: Tensor,
    vectors: Tensor,
    upstream: Tensor,  # [levels] of the losses; not read with given gradients
    d_image: list[Tensor] | None,
    d_text: list[Tensor] | None,
    d_scale: Tensor,
) -> None:
    images, device = sum(levels.rows), vectors.device
    # d_units, dots, rest, and the number of finished programs.
    scratch = torch.empty(levels.total * (form.padded + 1) + images + 1, dtype=torch.float32, device=device)
    # Whole tiles of each level.
    ds = torch.empty(levels.tiles * TILE_ROWS * TILE_TEXTS, dtype=form.operand, device=device)
    arguments: tuple[Any, ...] = (units, vectors, ds, scratch, *levels.sizes)
    launch(form.compiled, kernels.level_gradients, levels.device, (levels.tiles, 1, 1), arguments, form.gradients)
    first_side, sides = 0 if d_image else 1, (d_image is not None) + (d_text is not None)
    row_blocks, text_blocks = _blocks(levels.rows, PRODUCT_BLOCK), _blocks(levels.texts, PRODUCT_BLOCK)
    blocks = max(row_blocks if d_image else 0, text_blocks if d_text else 0)
    grid = (blocks, -(-form.padded // PRODUCT_BLOCK), sides)
    arguments, constants = (ds, units, vectors, scratch, *levels.sizes), form.products | {"FIRST_SIDE": first_side}
    launch(form.compiled, kernels.level_products, (levels.device, first_side), grid, arguments, constants)
    row_blocks = _blocks(levels.rows, ROWS)
    programs = (row_blocks if d_image else 0) + (_blocks(levels.texts, ROWS) if d_text else 0)
    arguments = (
        *_padded(levels.image),
        *_padded(levels.text),
        *_padded(d_image or levels.image),  # what is not needed is not written
        *_padded(d_text or levels.text),
        *levels.sizes,
        *levels.strides,
        vectors,
        scratch,
        upstream,
        d_scale,
        len(levels.image),
        upstream.stride()[0],
        row_blocks if first_side else 0,
    )
    key, constants = (levels.device, levels.dtype, levels.aligned, first_side), form.finish | {"SIDE": first_side}
    constants |= {"ALIGNED": levels.aligned}
    launch(form.compiled, kernels.finish_levels, key, (programs, 1, 1), arguments, constants)


def _clear(d_image: list[Tensor] | None, d_text: list[Tensor] | None, d_scale: Tensor) -> None:
    for out in (*(d_image or ()), *(d_text or ()), d_scale):
        out.zero_()
