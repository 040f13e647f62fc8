"""The contrastive softmax in Triton: one pass over S for row and column sums, backward through blocks of dS.

Small levels share their launches; a large level is processed alone, by blocks. There is no host synchronisation, and
the only atomics are the integer counts of equal texts: partial sums are written per tile and added in a fixed order.

float16 and float32 features are multiplied in TF32 (three products for float32, unless torch allows TF32), bfloat16 in
bfloat16; sums are float32, log-sums float64. Speed on a GPU: not yet measured.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import grouped, large
from .large_triton import TritonKernels
from .per_level import Saved
from .plan import Plan, are_aligned, exact, operands
from .reference import EPS
from .triton_kernels import (
    LEVELS,
    count_rows,
    factors,
    finish_rows,
    log_sums,
    mean_gradients,
    mean_loss,
    mean_parts,
    products,
    sum_levels,
    tile_gradients,
    tile_sums,
    unit_rows,
)
from .workspace import kept_dtype

T = TypeVar("T")

PRODUCT_BLOCK = 64
GROUPED = 4096 * 4096  # batches of levels with at most this many logits share their launches
LONGEST = 65536  # and, where they share those of the mean losses, at most this many rows and texts
VECTOR = 1024  # entries per program in kernels over vectors


def _pad(sizes: Sequence[int]) -> list[int]:
    return [*sizes, *[0] * (LEVELS - len(sizes))]


def _sizes(tensors: Sequence[Tensor]) -> list[int]:
    return _pad([len(t) for t in tensors])


def _pad_tensors(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [*tensors, *[tensors[0]] * (LEVELS - len(tensors))]


def _round_up(size: int, block: int) -> int:
    return -(-size // block) * block


def _blocks(sizes: Sequence[int], block: int) -> int:
    return sum(-(-n // block) for n in sizes)


def _units(
    features: Sequence[Tensor], plan: Plan, normalize: bool, positive: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # [sum N, WIDTH], [sum N]
    sizes = _sizes(features)
    unit = torch.empty(sum(sizes), plan.width, dtype=plan.operand, device=features[0].device)
    inverse = torch.empty(sum(sizes), dtype=torch.float32, device=unit.device)
    if len(unit):
        unit_rows[(len(unit),)](
            *_pad_tensors(features),
            *sizes,
            *(t.stride(0) for t in _pad_tensors(features)),
            unit,
            inverse,
            inverse if positive is None else positive,
            D=features[0].shape[1],
            WIDTH=plan.width,
            BLOCK_D=triton.next_power_of_2(plan.width),
            SMALLEST=EPS,
            NORMALIZE=normalize,
            POSITIVE=positive is not None,
            ROUND=plan.rounds,
            ALIGNED=are_aligned(features),
            num_warps=2,
        )
    return unit, inverse


@dataclass(frozen=True)
class _Batch:
    """Up to LEVELS levels of one width: features, and one buffer each for per-row and per-text values."""

    image: list[Tensor]
    text: list[Tensor]
    scale: Tensor
    index: Tensor | None
    weight: Tensor | None
    plan: Plan
    normalize: bool

    @property
    def rows(self) -> list[int]:
        return _sizes(self.image)

    @property
    def texts(self) -> list[int]:
        return _sizes(self.text)

    @property
    def alone(self) -> bool:
        return len(self.image) == 1 and len(self.image[0]) * len(self.text[0]) > GROUPED


def _batches(
    image: Sequence[Tensor],
    text: Sequence[Tensor],
    scale: Tensor,
    index: Tensor | None,
    weight: Tensor | None,
    normalize: bool,
) -> list[tuple[slice, slice, _Batch]]:
    """Consecutive levels that share launches, with the ranges of rows and texts that each batch covers."""
    groups: list[list[int]] = []
    for k, features in enumerate(image):
        members = [*(groups[-1] if groups else []), k]
        logits = sum(len(image[m]) * len(text[m]) for m in members)
        if groups and len(members) <= LEVELS and logits <= GROUPED and image[members[0]].shape[1] == features.shape[1]:
            groups[-1] = members
        else:
            groups.append([k])
    out = []
    row = column = 0
    for members in groups:
        part = slice(members[0], members[-1] + 1)
        x = [t if t.stride(-1) == 1 else t.contiguous() for t in image[part]]
        y = [t if t.stride(-1) == 1 else t.contiguous() for t in text[part]]
        rows, texts = slice(row, row + sum(_sizes(x))), slice(column, column + sum(_sizes(y)))
        row, column = rows.stop, texts.stop
        part_index = None if index is None else index[rows]
        batch = _Batch(
            x, y, scale[part], part_index, None if weight is None else weight[texts], Plan.of(x[0]), normalize
        )
        out.append((rows, texts, batch))
    return out


def forward(
    image: Sequence[Tensor],  # levels x [N_l, D_l]
    text: Sequence[Tensor],  # levels x [U_l, D_l]
    scale: Tensor,  # [levels] float32
    index: Tensor | None,  # [sum N_l] int64
    weight: Tensor | None,  # [sum U_l] float32, or counts as int32
    normalize: bool,
    budget: int,  # nothing is kept
) -> Saved:
    with torch.cuda.device_of(scale):  # Triton launches on the current device, not on that of its arguments
        parts = [_forward(batch) for _, _, batch in _batches(image, text, scale, index, weight, normalize)]
    row, column, positive, by_row, by_text = (
        part[0] if len(part) == 1 else torch.cat(part) for part in zip(*parts, strict=True)
    )
    return row, column, positive, torch.cat([by_row, by_text]), scale.new_empty(0, dtype=kept_dtype(scale))


def _forward(batch: _Batch) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    plan, rows, texts = batch.plan, batch.rows, batch.texts
    n, u = sum(rows), sum(texts)
    device = batch.scale.device
    if not n or not u:
        row_lse, column_lse = (torch.full((k,), -torch.inf, dtype=torch.float64, device=device) for k in (n, u))
        x_inverse, y_inverse = (_units(side, plan, batch.normalize)[1] for side in (batch.image, batch.text))
        return row_lse, column_lse, torch.full_like(row_lse, torch.nan), x_inverse, y_inverse
    if batch.alone:
        return large.forward(
            TritonKernels(plan), batch.image[0], batch.text[0], batch.scale, batch.index, batch.weight, batch.normalize
        )
    cosine = torch.empty(n, dtype=torch.float32, device=device)
    x, x_inverse = _units(batch.image, plan, batch.normalize, cosine)
    y, y_inverse = _units(batch.text, plan, batch.normalize)
    row_lse, positive = (torch.empty(n, dtype=torch.float64, device=device) for _ in range(2))
    column_lse = torch.empty(u, dtype=torch.float64, device=device)
    tile = plan.sum_tile(alone=False)
    row_parts = torch.empty(-(-max(texts) // tile.texts), n, device=device)
    column_parts = torch.empty(-(-max(rows) // tile.rows), u, device=device)
    if tiles := tile.count(rows, texts):
        tile_sums[(tiles,)](
            _tiles(plan, x, tile.rows),
            _tiles(plan, y, tile.texts),
            batch.scale,
            x if batch.index is None else batch.index,
            y if batch.weight is None else batch.weight,
            row_parts,
            column_parts,
            cosine,
            *rows,
            *texts,
            0,
            n,
            u,
            HAS_INDEX=batch.index is not None,
            HAS_WEIGHT=batch.weight is not None,
            TMA=plan.tma,
            **plan.constants(),
            **tile.options(),
        )
    row_blocks = _blocks(rows, PRODUCT_BLOCK)
    log_sums[(row_blocks + _blocks(texts, PRODUCT_BLOCK),)](
        x,
        y,
        batch.scale,
        y if batch.weight is None else batch.weight,
        row_parts,
        column_parts,
        cosine,
        row_lse,
        column_lse,
        positive,
        *rows,
        *texts,
        n,
        u,
        len(row_parts),
        len(column_parts),
        row_blocks,
        HAS_WEIGHT=batch.weight is not None,
        ROW_TILE=tile.rows,
        COLUMN_TILE=tile.texts,
        BM=PRODUCT_BLOCK,
        **plan.constants(),
        num_warps=4,
        num_stages=2,
    )
    return row_lse, column_lse, positive, x_inverse, y_inverse


def _tiles(plan: Plan, unit: Tensor, rows: int) -> Tensor | TensorDescriptor:
    return TensorDescriptor(unit, list(unit.shape), list(unit.stride()), [rows, plan.inner]) if plan.tma else unit


def backward(
    image: Sequence[Tensor],
    text: Sequence[Tensor],
    scale: Tensor,
    index: Tensor | None,
    weight: Tensor | None,
    saved: Saved,  # the results of forward
    grads: tuple[Tensor, Tensor, Tensor],  # of row_lse, col_lse and positive
    normalize: bool,
    need_image: bool,
    need_text: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:  # d_image, d_text (empty tensors where not needed), d_scale [levels]
    d_image, d_text, d_scale = [], [], []
    with torch.cuda.device_of(scale):
        images = sum(len(x) for x in image)
        for rows, texts, batch in _batches(image, text, scale, index, weight, normalize):
            batch_saved = (saved[0][rows], saved[1][texts], saved[2][rows], saved[3][rows], saved[3][images:][texts])
            batch_grads = (grads[0][rows], grads[1][texts], grads[2][rows])
            d_x, d_y, d_s = _backward(batch, batch_saved, batch_grads, need_image, need_text)
            d_image += d_x
            d_text += d_y
            d_scale.append(d_s)
    return d_image, d_text, d_scale[0] if len(d_scale) == 1 else torch.cat(d_scale)


@dataclass(frozen=True)
class _Factors:
    """The per-row and per-text factors of a logit's gradient."""

    row_log: Tensor  # [sum N]
    row: Tensor  # [sum N]
    column_log: Tensor  # [sum U]
    column: Tensor  # [sum U]
    positive: Tensor  # [sum N] float64

    @staticmethod
    def of(log_sums: tuple[Tensor, Tensor], grads: tuple[Tensor, Tensor, Tensor]) -> _Factors:
        n, u = len(log_sums[0]), len(log_sums[1])
        row_log, row, column_log, column = (
            torch.empty(size, dtype=torch.float32, device=grads[0].device) for size in (n, n, u, u)
        )
        factors[(_blocks([n, u], VECTOR),)](
            *log_sums, grads[0], grads[1], row_log, column_log, row, column, n, u, BM=VECTOR
        )
        return _Factors(row_log, row, column_log, column, grads[2])


def _backward(
    batch: _Batch,
    saved: Saved,  # with the two sides' inverse norms apart
    grads: tuple[Tensor, Tensor, Tensor],
    need_image: bool,
    need_text: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    no_gradient = batch.image[0].new_empty(0)
    if not sum(batch.rows) or not sum(batch.texts):
        return (
            [torch.zeros_like(x) if need_image else no_gradient.clone() for x in batch.image],
            [torch.zeros_like(y) if need_text else no_gradient.clone() for y in batch.text],
            torch.zeros_like(batch.scale),
        )
    if batch.alone:
        d_x, d_y, d_scale = large.backward(
            TritonKernels(batch.plan),
            batch.image[0],
            batch.text[0],
            batch.scale,
            batch.index,
            batch.weight,
            *saved,
            *grads,
            None,
            batch.normalize,
            need_image,
            need_text,
        )
        return [d_x], [d_y], d_scale[None]
    # The gradient of the scale follows from either product, so one of them is always needed.
    d_image = [_contiguous_like(x) for x in batch.image] if need_image or not need_text else None
    d_text = [_contiguous_like(y) for y in batch.text] if need_text else None
    d_scale = _backward_together(batch, _Factors.of(saved[:2], grads), d_image, d_text)
    return (
        d_image if need_image and d_image is not None else [no_gradient.clone() for _ in batch.image],
        d_text if d_text is not None else [no_gradient.clone() for _ in batch.text],
        d_scale,
    )


def _contiguous_like(x: Tensor) -> Tensor:
    if x.is_contiguous():
        return torch.empty_like(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)  # rows of x may overlap


def _backward_together(
    batch: _Batch, terms: _Factors, d_image: list[Tensor] | None, d_text: list[Tensor] | None
) -> Tensor:  # d_scale [levels]
    """All levels in the same launches, with dS of all of them in memory."""
    plan, rows, texts = batch.plan, batch.rows, batch.texts
    n, u, tile, device = sum(rows), sum(texts), batch.plan.gradient_tile(), batch.scale.device
    x, x_inverse = _units(batch.image, plan, batch.normalize)
    y, y_inverse = _units(batch.text, plan, batch.normalize)
    size = sum(_round_up(a, tile.rows) * _round_up(b, tile.texts) for a, b in zip(rows, texts, strict=True))
    grad = torch.empty(size, dtype=plan.operand, device=device)
    if size:
        tile_gradients[(tile.count(rows, texts),)](
            _tiles(plan, x, tile.rows),
            _tiles(plan, y, tile.texts),
            batch.scale,
            x if batch.index is None else batch.index,
            y if batch.weight is None else batch.weight,
            terms.row_log,
            terms.column_log,
            terms.row,
            terms.column,
            terms.positive,
            grad,
            *rows,
            *texts,
            0,
            HAS_INDEX=batch.index is not None,
            HAS_WEIGHT=batch.weight is not None,
            TMA=plan.tma,
            **plan.constants(),
            **tile.options(),
        )
    d_x, d_y = (
        None if out is None else torch.empty(count, plan.width, dtype=torch.float32, device=device)
        for out, count in ((d_image, n), (d_text, u))
    )
    products[
        (
            max(_blocks(rows, PRODUCT_BLOCK), _blocks(texts, PRODUCT_BLOCK)),
            -(-plan.width // PRODUCT_BLOCK),
            (d_x is not None) + (d_y is not None),
        )
    ](
        grad,
        x,
        y,
        x if d_x is None else d_x,
        y if d_y is None else d_y,
        *rows,
        *texts,
        FIRST_SIDE=0 if d_x is not None else 1,
        ROW_TILE=tile.rows,
        COLUMN_TILE=tile.texts,
        BM=PRODUCT_BLOCK,
        BN=PRODUCT_BLOCK,
        **plan.constants(),
        num_warps=4,
        num_stages=3,
    )
    # The gradient of the scale is the sum over rows (or columns) of unit row . d_unit.
    dots, sizes = None, rows
    if d_y is not None and d_text is not None:
        dots, sizes = _finish(batch, batch.text, d_text, y_inverse, d_y), texts
    if d_x is not None and d_image is not None:
        dots, sizes = _finish(batch, batch.image, d_image, x_inverse, d_x), rows
    assert dots is not None
    return _level_sums(dots, sizes, len(batch.image))


def _finish(
    batch: _Batch, features: Sequence[Tensor], out: Sequence[Tensor], inverse: Tensor, d_unit: Tensor
) -> Tensor:  # [sum N]
    dots = torch.empty_like(inverse)
    finish_rows[(len(dots),)](
        *_pad_tensors(features),
        *_pad_tensors(out),
        inverse,
        d_unit,
        batch.scale,
        dots,
        *_sizes(features),
        *(t.stride(0) for t in _pad_tensors(features)),
        D=features[0].shape[1],
        WIDTH=batch.plan.width,
        BLOCK_D=triton.next_power_of_2(batch.plan.width),
        NORMALIZE=batch.normalize,
        ALIGNED=are_aligned([*features, *out]),
        num_warps=2,
    )
    return dots


def _level_sums(dots: Tensor, sizes: Sequence[int], levels: int) -> Tensor:  # [sum N] -> [levels]
    out = torch.empty(levels, dtype=torch.float32, device=dots.device)
    sum_levels[(levels,)](dots, out, *sizes, BM=VECTOR)
    return out


@dataclass(slots=True)
class _Share:
    """Consecutive levels whose mean losses share launches, or one large level."""

    first: int
    rows: list[int]
    texts: list[int]
    large: bool

    def of(self, levels: Sequence[T]) -> Sequence[T]:
        """The levels of this share."""
        return levels if len(levels) == len(self.rows) else levels[self.first : self.first + len(self.rows)]


def _shares(image: Sequence[Tensor], text: Sequence[Tensor]) -> list[_Share]:
    """Fake kernels call this too, so it depends on sizes alone."""
    out: list[_Share] = []
    logits = width = 0
    for k, (x, y) in enumerate(zip(image, text, strict=True)):
        (n, d), (u, _) = x.shape, y.shape
        large = n * u > GROUPED or n > LONGEST or u > LONGEST
        logits += n * u
        if not out or large or out[-1].large or len(out[-1].rows) == LEVELS or logits > GROUPED or d != width:
            out.append(_Share(k, [n], [u], large))
            logits, width = n * u, d
        else:
            out[-1].rows.append(n)
            out[-1].texts.append(u)
    return out


def losses(
    image: Sequence[Tensor],  # levels x [N_l, D_l], one dtype
    text: Sequence[Tensor],  # levels x [U_l, D_l]
    scale: Sequence[Tensor],  # levels x [] float32
    index: Sequence[Tensor | None],  # levels x [N_l] int64: the text of each row; None: row i has text i
    weight: Sequence[Tensor | None],  # levels x [U_l] float32, in the row sums; None: the rows of each text, or ones
    positives: bool,
    normalize: bool,
) -> tuple[Tensor, list[Tensor]]:  # [levels] float32, and what the backward pass needs
    """The mean loss of each level, for either kind of duplicates."""
    loss = torch.empty(len(image), dtype=torch.float32, device=image[0].device)
    saved: list[Tensor] = []
    with torch.cuda.device_of(loss):  # Triton launches on the current device, not on that of its arguments
        for share in _shares(image, text):
            x, y = _unit_stride(share.of(image)), _unit_stride(share.of(text))
            s, own, given = share.of(scale), _contiguous(share.of(index)), _contiguous(share.of(weight))
            out = loss if len(image) == len(x) else loss[share.first : share.first + len(x)]
            if share.large:
                saved += _large(x[0], y[0], s[0], own[0], given[0], positives, normalize, out)
            else:
                form, aligned = _form_of(x[0], positives, normalize), are_aligned([*x, *y])
                saved += grouped.forward(form, x, y, share.rows, share.texts, s, own, given, aligned, out)
    return loss, saved


def losses_saved(image: Sequence[Tensor], text: Sequence[Tensor], index: Sequence[Tensor | None]) -> list[Tensor]:
    """Empty tensors like those that `losses` returns for the backward pass, for the fake kernel of its op."""
    saved: list[Tensor] = []
    for share in _shares(image, text):
        n, u, like = sum(share.rows), sum(share.texts), image[share.first]
        numbers = like.new_empty(n + u, dtype=torch.float32)
        if share.large:
            rows, texts = like.new_empty(n, dtype=torch.float64), like.new_empty(u, dtype=torch.float64)
            count = like.new_empty(0 if index[share.first] is None else u, dtype=torch.int32)
            saved += [
                rows,
                texts,
                torch.empty_like(rows),
                numbers.new_empty(n),
                numbers.new_empty(u),
                count,
                rows.new_empty(1),
            ]
        else:
            operand, _, inner = operands(like.dtype, is_exact=True)
            saved.append(like.new_empty((n + u, -(-like.shape[1] // inner) * inner), dtype=operand))
            saved.append(numbers.new_empty(grouped.vectors_size(n + u)))
    return saved


def losses_backward(
    image: Sequence[Tensor],
    text: Sequence[Tensor],
    scale: Sequence[Tensor],
    index: Sequence[Tensor | None],
    weight: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    grad: Tensor,  # [levels] of the losses
    positives: bool,
    normalize: bool,
    need_image: bool,
    need_text: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:  # d_image, d_text (empty tensors where not needed), d_scale [levels]
    d_image: list[Tensor] = []
    d_text: list[Tensor] = []
    d_scale = torch.empty(len(image), dtype=torch.float32, device=grad.device)
    with torch.cuda.device_of(grad):
        for share in _shares(image, text):
            x, y = _unit_stride(share.of(image)), _unit_stride(share.of(text))
            whole = len(image) == len(x)
            upstream, d_s = (t if whole else t[share.first : share.first + len(x)] for t in (grad, d_scale))
            if share.large:
                s, own, given = share.of(scale)[0], share.of(index)[0], share.of(weight)[0]
                d_x, d_y, d_large = _large_backward(
                    x[0], y[0], s, own, given, saved[:7], upstream, positives, normalize, need_image, need_text
                )
                d_s.copy_(d_large)
                d_image.append(d_x)
                d_text.append(d_y)
                saved = saved[7:]
            else:
                # The gradient of the scale follows from either product, so one of them is always needed.
                out_image = [_contiguous_like(t) for t in x] if need_image or not need_text else None
                out_text = [_contiguous_like(t) for t in y] if need_text else None
                # They are as wide as the features, contiguous, and begin where the allocator lets them: at 64 bytes.
                form, aligned = _form_of(x[0], positives, normalize), are_aligned([*x, *y])
                units, vectors, *saved = saved
                grouped.backward(
                    form, x, y, share.rows, share.texts, units, vectors, upstream, aligned, out_image, out_text, d_s
                )
                d_image += out_image if need_image and out_image else [t.new_empty(0) for t in x]
                d_text += out_text or [t.new_empty(0) for t in y]
    return d_image, d_text, d_scale


def _unit_stride(features: Sequence[Tensor]) -> list[Tensor]:
    return [t if t.stride()[1] == 1 else t.contiguous() for t in features]


def _contiguous(vectors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [t if t is None else t.contiguous() for t in vectors]


def _form_of(features: Tensor, positives: bool, normalize: bool) -> grouped.Form:
    return _form(features.dtype, features.shape[1], exact(features), positives, normalize)


@functools.lru_cache
def _form(dtype: torch.dtype, width: int, is_exact: bool, positives: bool, normalize: bool) -> grouped.Form:
    operand, precision, inner = operands(dtype, is_exact)
    plan = Plan(operand, precision, _round_up(width, inner), inner, tma=False, folds=False)
    return grouped.Form(operand, precision, width, plan.width, inner, plan.rounds, positives, normalize)


def _large(
    image: Tensor,  # [N, D]
    text: Tensor,  # [U, D]
    scale: Tensor,  # []
    index: Tensor | None,  # [N]
    weight: Tensor | None,  # [U]
    positives: bool,
    normalize: bool,
    loss: Tensor,  # [1] out
) -> list[Tensor]:
    """The mean loss of one large level; returns the results of `forward`, the rows of each text, and texts with rows.

    The rows of each text are an empty tensor without an index.
    """
    n, u, device = len(image), len(text), loss.device
    count = torch.zeros(0 if index is None else u, dtype=torch.int32, device=device)
    if index is not None:
        count_rows[(_blocks([n], VECTOR),)](index, count, n, u, BM=VECTOR)
    by_row = weight if weight is not None or positives or index is None else count
    with torch.autocast(device.type, enabled=False):
        *sums, by_image, by_text = large.forward(TritonKernels.of(image), image, text, scale, index, by_row, normalize)
    used = torch.empty(1, dtype=torch.float64, device=device)
    row_blocks, blocks = _blocks([n], VECTOR), _blocks([n, u], VECTOR)
    parts = used.new_empty(2 * blocks)
    counts = {"HAS_COUNT": index is not None, "POSITIVES": positives and index is not None, "BM": VECTOR}
    mean_parts[(blocks,)](*sums, count, used if index is None else index, parts, n, u, row_blocks, **counts)
    mean_loss[(1,)](parts, loss, used, n, row_blocks, blocks, POSITIVES=counts["POSITIVES"], BM=VECTOR)
    return [*sums, by_image, by_text, count, used]


def _large_backward(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    index: Tensor | None,
    weight: Tensor | None,
    saved: Sequence[Tensor],  # the results of `_large`
    grad: Tensor,  # [1] of the loss
    positives: bool,
    normalize: bool,
    need_image: bool,
    need_text: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # d_image, d_text (empty where not needed), d_scale []
    row_lse, col_lse, positive, by_image, by_text, count, used = saved
    index, weight = _contiguous([index, weight])
    n, u = len(image), len(text)
    grad_row, grad_positive = (torch.empty(n, dtype=torch.float64, device=grad.device) for _ in range(2))
    grad_column = grad_row.new_empty(u)
    counts = {"HAS_COUNT": index is not None, "POSITIVES": positives and index is not None, "BM": VECTOR}
    mean_gradients[(_blocks([n, u], VECTOR),)](
        grad,
        used,
        count,
        used if index is None else index,
        grad_row,
        grad_column,
        grad_positive,
        n,
        u,
        _blocks([n], VECTOR),
        **counts,
    )
    by_row = weight if weight is not None or positives or index is None else count
    with torch.autocast(grad.device.type, enabled=False):
        return large.backward(
            TritonKernels.of(image),
            image,
            text,
            scale,
            index,
            by_row,
            row_lse,
            col_lse,
            positive,
            by_image,
            by_text,
            grad_row,
            grad_column,
            grad_positive,
            None,
            normalize,
            need_image,
            need_text,
        )
