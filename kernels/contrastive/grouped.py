"""Mean losses of small levels, which share their launches: three forward, three backward (grouped_kernels.py).

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
from .reference import EPS
from .triton_kernels import LEVELS

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

    Kernels are launched by `run`: `kernel[grid]` makes a function and repacks all arguments first.
    """

    operand: torch.dtype
    precision: str
    width: int  # of the features
    padded: int  # width rounded up to the blocks of the inner dimension
    inner: int
    rounds: bool
    positives: bool
    normalize: bool

    @property
    def splits(self) -> bool:
        """Whether entries of dS at positives are kept in two pieces: three TF32 products lose nothing."""
        return self.precision != "tf32x3"

    @functools.cached_property
    def _common(self) -> dict[str, Any]:
        constants = {"WIDTH": self.padded, "BK": self.inner, "PRECISION": self.precision}
        return {**constants, "num_warps": 4, "warmup": False}

    @functools.cached_property
    def _rows(self) -> dict[str, Any]:
        block = triton.next_power_of_2(self.padded)
        sizes = {"D": self.width, "WIDTH": self.padded, "BLOCK_D": block, "ROWS": ROWS}
        warps = min(max(block // 128, 4), 16)
        return {**sizes, "NORMALIZE": self.normalize, "num_warps": warps, "warmup": False}

    @functools.cached_property
    def prepare(self) -> dict[str, Any]:
        return {"SMALLEST": EPS, "POSITIVES": self.positives, "ROUND": self.rounds, "SCAN": SCAN, **self._rows}

    @functools.cached_property
    def sums(self) -> dict[str, Any]:
        return {"BM": TILE_ROWS, "BN": TILE_TEXTS, "num_stages": 3, **self._common}

    @functools.cached_property
    def losses(self) -> dict[str, Any]:
        tile = {"ROW_TILE": TILE_ROWS, "COLUMN_TILE": TILE_TEXTS}
        return {"POSITIVES": self.positives, **tile, "num_stages": 2, **self._common}

    @functools.cached_property
    def gradients(self) -> dict[str, Any]:
        return {"POSITIVES": self.positives, "SPLIT": self.splits, **self.sums}

    @functools.cached_property
    def products(self) -> dict[str, Any]:
        tile = {"ROW_TILE": TILE_ROWS, "COLUMN_TILE": TILE_TEXTS, "BM": PRODUCT_BLOCK, "BN": PRODUCT_BLOCK}
        return {"SPLIT": self.splits, **tile, "num_stages": 3, **self._common}

    @functools.cached_property
    def finish(self) -> dict[str, Any]:
        return self._rows


def vectors_size(total: int) -> int:
    """The length of `vectors` for this many rows: see grouped_kernels.py."""
    return 6 * total + SCALARS + 5 * (total // FLAGGED + 2 * LEVELS)


def _blocks(sizes: Sequence[int], block: int) -> int:
    return sum([-(-n // block) for n in sizes])


def _tiles(rows: Sequence[int], texts: Sequence[int]) -> int:
    return sum([-(-n // TILE_ROWS) * -(-u // TILE_TEXTS) for n, u in zip(rows, texts, strict=True)])


def forward(
    form: Form,
    image: list[Tensor],  # up to LEVELS x [N_l, D], rows of stride 1
    text: list[Tensor],  # [U_l, D]
    rows: list[int],
    texts: list[int],
    scale: Sequence[Tensor],  # [] float32
    index: Sequence[Tensor | None],  # [N_l] int64; None: row i has text i
    weight: Sequence[Tensor | None],  # [U_l] float32, in the row sums; None: the rows of each text, or ones
    aligned: bool,  # every row of the features begins at a multiple of 16 bytes
    loss: Tensor,  # [levels] float32 out
) -> tuple[Tensor, Tensor]:  # units and vectors, for the backward pass
    levels, n, u, device = len(image), sum(rows), sum(texts), loss.device
    missing = LEVELS - levels
    zeros = [0] * missing
    units = torch.empty((n + u, form.padded), dtype=form.operand, device=device)
    vectors = torch.empty(vectors_size(n + u), dtype=torch.float32, device=device)
    # What is not given is not read; its pointers get the types of those that are.
    given, indices, weights = 0, [], []
    any_index = next((t for t in index if t is not None), units)
    any_weight = next((t for t in weight if t is not None), vectors)
    for k in range(levels):
        own, w = index[k], weight[k]
        indices.append(any_index if own is None else own)
        weights.append(any_weight if w is None else w)
        given += (own is not None) * 2**k + (w is not None) * 2 ** (LEVELS + k)
    sizes = (*rows, *zeros, *texts, *zeros)
    kernels.prepare_levels.run(
        *image,
        *[image[0]] * missing,
        *text,
        *[text[0]] * missing,
        *scale,
        *[scale[0]] * missing,
        *indices,
        *[any_index] * missing,
        *weights,
        *[any_weight] * missing,
        *sizes,
        *[x.stride(0) for x in image],
        *zeros,
        *[y.stride(0) for y in text],
        *zeros,
        given,
        units,
        vectors,
        ALIGNED=aligned,
        grid=(max(_blocks(rows, ROWS) + _blocks(texts, ROWS), 1),),
        **form.prepare,
    )
    size = -(-max(texts) // TILE_TEXTS) * n + -(-max(rows) // TILE_ROWS) * u
    parts = torch.empty(size, dtype=torch.float32, device=device)
    if tiles := _tiles(rows, texts):
        kernels.level_sums.run(units, vectors, parts, *sizes, grid=(tiles,), **form.sums)
    grid = (max(_blocks(rows, FLAGGED) + _blocks(texts, FLAGGED), 1),)
    kernels.level_losses.run(units, vectors, parts, loss, *sizes, levels, grid=grid, **form.losses)
    return units, vectors


def backward(
    form: Form,
    image: list[Tensor],  # up to LEVELS x [N_l, D]
    text: list[Tensor],  # [U_l, D]
    rows: list[int],
    texts: list[int],
    units: Tensor,
    vectors: Tensor,
    grad: Tensor,  # [levels] of the losses
    aligned: bool,
    d_image: list[Tensor] | None,  # [N_l, D] out, contiguous
    d_text: list[Tensor] | None,  # [U_l, D] out
    d_scale: Tensor,  # [levels] float32 out
) -> None:
    """At least one of d_image and d_text is given; the gradient of the scales follows from either."""
    tiles = _tiles(rows, texts)
    if not tiles:
        for out in (*(d_image or ()), *(d_text or ()), d_scale):
            out.zero_()
        return
    n, u, device = sum(rows), sum(texts), vectors.device
    missing = LEVELS - len(image)
    zeros = [0] * missing
    sizes = (*rows, *zeros, *texts, *zeros)
    # d_units, dots, rest, and the number of finished programs.
    scratch = torch.empty((n + u) * (form.padded + 1) + n + 1, dtype=torch.float32, device=device)
    # Whole tiles of each level.
    ds = torch.empty(tiles * TILE_ROWS * TILE_TEXTS, dtype=form.operand, device=device)
    kernels.level_gradients.run(units, vectors, ds, scratch, *sizes, grid=(tiles,), **form.gradients)
    first_side, sides = 0 if d_image else 1, (d_image is not None) + (d_text is not None)
    blocks = max(_blocks(rows, PRODUCT_BLOCK) if d_image else 0, _blocks(texts, PRODUCT_BLOCK) if d_text else 0)
    grid = (blocks, -(-form.padded // PRODUCT_BLOCK), sides)
    kernels.level_products.run(ds, units, vectors, scratch, *sizes, FIRST_SIDE=first_side, grid=grid, **form.products)
    row_blocks = _blocks(rows, ROWS)
    programs = (row_blocks if d_image else 0) + (_blocks(texts, ROWS) if d_text else 0)
    d_image, d_text = d_image or image, d_text or text  # what is not needed is not written
    kernels.finish_levels.run(
        *image,
        *[image[0]] * missing,
        *text,
        *[text[0]] * missing,
        *d_image,
        *[d_image[0]] * missing,
        *d_text,
        *[d_text[0]] * missing,
        *sizes,
        *[x.stride(0) for x in image],
        *zeros,
        *[y.stride(0) for y in text],
        *zeros,
        vectors,
        scratch,
        grad,
        d_scale,
        len(image),
        grad.stride(0),
        row_blocks if first_side else 0,
        ALIGNED=aligned,
        SIDE=first_side,
        grid=(programs,),
        **form.finish,
    )
