"""The contrastive softmax in Triton: one pass over S for row and column sums, backward through blocks of dS.

Small levels share their launches (grouped.py); a large level is processed alone, by blocks (large.py). There is no host
synchronisation, and the only atomics are integers: partial sums are written per tile and added in a fixed order.

float16 and float32 features are multiplied in TF32 (three products for float32, unless torch allows TF32), bfloat16 in
bfloat16; sums are float32, log-sums float64.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from . import grouped, large
from .grouped_kernels import LEVELS
from .large_triton import TritonKernels
from .launch import Compiled, launch
from .mean_kernels import count_rows, mean_gradients, mean_loss, mean_parts
from .per_level import Saved, split
from .plan import Plan, exact, operands
from .workspace import kept_dtype

T = TypeVar("T")

GROUPED = 4096 * 4096  # levels with at most this many logits together share their launches
LONGEST = 65536  # if each has at most this many rows and texts
VECTOR = 1024  # entries per program in kernels over vectors
_compiled: Compiled = {}  # kernels between the log-sums of a large level and its loss


@dataclass(slots=True)
class _Share:
    """Consecutive levels that share launches, or one large level."""

    part: slice
    rows: slice  # of the rows of all levels
    texts: slice
    large: bool

    @property
    def count(self) -> int:
        return self.part.stop - self.part.start

    def of(self, levels: Sequence[T]) -> Sequence[T]:
        """The levels of this share."""
        return levels if len(levels) == self.count else levels[self.part]

    def of_tensor(self, levels: Tensor) -> Tensor:  # [levels]
        return levels if levels.shape[0] == self.count else levels[self.part]


def _shares(image: Sequence[Tensor], text: Sequence[Tensor]) -> list[_Share]:
    """Fake kernels call this too, so it depends on sizes alone."""
    out: list[_Share] = []
    row = column = logits = width = 0
    for k, (x, y) in enumerate(zip(image, text, strict=True)):
        (n, d), u = x.shape, y.shape[0]
        alone = n * u > GROUPED or n > LONGEST or u > LONGEST
        logits += n * u
        if not out or alone or out[-1].large or out[-1].count == LEVELS or logits > GROUPED or d != width:
            out.append(_Share(slice(k, k), slice(row, row), slice(column, column), alone))
            logits, width = n * u, d
        row, column, share = row + n, column + u, out[-1]
        share.part = slice(share.part.start, k + 1)
        share.rows, share.texts = slice(share.rows.start, row), slice(share.texts.start, column)
    return out


def forward(
    image: Sequence[Tensor],  # levels x [N_l, D_l]
    text: Sequence[Tensor],  # levels x [U_l, D_l]
    scale: Tensor,  # [levels] float32
    index: Tensor | None,  # [sum N_l] int64
    weight: Tensor | None,  # [sum U_l] float32
    normalize: bool,
    budget: int,  # nothing is kept
) -> Saved:
    scales, indices, weights = _by_level(image, text, scale, index, weight)
    parts = []
    with torch.cuda.device_of(scale):  # Triton launches on the current device, not on that of its arguments
        for share in _shares(image, text):
            x, y, s = share.of(image), share.of(text), share.of(scales)
            own, given = share.of(indices), share.of(weights)
            if share.large:
                parts.append(large.forward(TritonKernels.of(x[0]), x[0], y[0], s[0], own[0], given[0], normalize))
                continue
            levels, form = grouped.Levels(x, y), _form_of(x[0], False, normalize, given=True)
            n, u = sum(levels.rows), sum(levels.texts)
            sums = [torch.empty(size, dtype=torch.float64, device=scale.device) for size in (n, u, n)]
            inverse = grouped.log_sums(form, levels, s, own, given, *sums)
            parts.append((sums[0], sums[1], sums[2], inverse[:n], inverse[n:]))
    row, column, positive, by_row, by_text = (
        part[0] if len(part) == 1 else torch.cat(part) for part in zip(*parts, strict=True)
    )
    return row, column, positive, torch.cat([by_row, by_text]), scale.new_empty(0, dtype=kept_dtype(scale))


def _by_level(
    image: Sequence[Tensor], text: Sequence[Tensor], scale: Tensor, index: Tensor | None, weight: Tensor | None
) -> tuple[Sequence[Tensor], Sequence[Tensor | None], Sequence[Tensor | None]]:
    return scale.unbind(), split(index, [len(x) for x in image]), split(weight, [len(y) for y in text])


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
    d_image: list[Tensor] = []
    d_text: list[Tensor] = []
    d_scale = torch.empty_like(scale)
    scales, indices, weights = _by_level(image, text, scale, index, weight)
    images, inverse = len(saved[0]), saved[3]
    with torch.cuda.device_of(scale):
        for share in _shares(image, text):
            x, y, s = share.of(image), share.of(text), share.of(scales)
            own, given = share.of(indices), share.of(weights)
            sums = saved[0][share.rows], saved[1][share.texts]
            upstream = grads[0][share.rows], grads[1][share.texts], grads[2][share.rows]
            d_s = share.of_tensor(d_scale)
            if share.large:
                lengths = inverse[share.rows], inverse[images:][share.texts]
                level = (x[0], y[0], s[0], own[0], given[0], *sums, saved[2][share.rows], *lengths)
                kernels = TritonKernels.of(x[0])
                d_x, d_y, d_large = large.backward(kernels, *level, *upstream, None, normalize, need_image, need_text)
                d_s.copy_(d_large)
                d_image.append(d_x)
                d_text.append(d_y)
            else:
                levels, form = grouped.Levels(x, y), _form_of(x[0], False, normalize, given=True)
                out = _outputs(levels, need_image, need_text)
                grouped.log_sums_backward(form, levels, s, own, given, sums, upstream, *out, d_s)
                d_image += out[0] if need_image and out[0] else [t.new_empty(0) for t in x]
                d_text += out[1] or [t.new_empty(0) for t in y]
    return d_image, d_text, d_scale


def _outputs(
    levels: grouped.Levels, need_image: bool, need_text: bool
) -> tuple[list[Tensor] | None, list[Tensor] | None]:
    """The gradients' tensors. The gradient of the scale follows from either product, so one of them is always needed.

    They are contiguous, as rows of the features may overlap, and begin where the allocator lets them: at 64 bytes.
    """
    like = functools.partial(torch.empty_like, memory_format=torch.contiguous_format)
    return (
        [like(x) for x in levels.image] if need_image or not need_text else None,
        [like(y) for y in levels.text] if need_text else None,
    )


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
    with torch.cuda.device_of(loss):
        for share in _shares(image, text):
            x, y, s = share.of(image), share.of(text), share.of(scale)
            own, given, out = _contiguous(share.of(index)), _contiguous(share.of(weight)), share.of_tensor(loss)
            if share.large:
                saved += _large(x[0], y[0], s[0], own[0], given[0], positives, normalize, out)
            else:
                form = _form_of(x[0], positives, normalize)
                saved += grouped.losses(form, grouped.Levels(x, y), s, own, given, out)
    return loss, saved


def losses_saved(image: Sequence[Tensor], text: Sequence[Tensor], index: Sequence[Tensor | None]) -> list[Tensor]:
    """Empty tensors like those that `losses` returns for the backward pass, for the fake kernel of its op."""
    saved: list[Tensor] = []
    for share in _shares(image, text):
        first = share.part.start
        n, u, like = share.rows.stop - share.rows.start, share.texts.stop - share.texts.start, image[first]
        numbers = like.new_empty(n + u, dtype=torch.float32)
        if share.large:
            rows, texts = like.new_empty(n, dtype=torch.float64), like.new_empty(u, dtype=torch.float64)
            count = like.new_empty(0 if index[first] is None else u, dtype=torch.int32)
            by_row, by_text = numbers.new_empty(n), numbers.new_empty(u)
            saved += [rows, texts, torch.empty_like(rows), by_row, by_text, count, rows.new_empty(1)]
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
            x, y = share.of(image), share.of(text)
            upstream, d_s = share.of_tensor(grad), share.of_tensor(d_scale)
            if share.large:
                level = (x[0], y[0], share.of(scale)[0], share.of(index)[0], share.of(weight)[0])
                options = (positives, normalize, need_image, need_text)
                d_x, d_y, d_large = _large_backward(*level, saved[:7], upstream, *options)
                d_s.copy_(d_large)
                d_image.append(d_x)
                d_text.append(d_y)
                saved = saved[7:]
            else:
                levels, form = grouped.Levels(x, y), _form_of(x[0], positives, normalize)
                out = _outputs(levels, need_image, need_text)
                grouped.losses_backward(form, levels, saved[0], saved[1], upstream, *out, d_s)
                d_image += out[0] if need_image and out[0] else [t.new_empty(0) for t in x]
                d_text += out[1] or [t.new_empty(0) for t in y]
                saved = saved[2:]
    return d_image, d_text, d_scale


def _contiguous(vectors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [t if t is None else t.contiguous() for t in vectors]


def _form_of(features: Tensor, positives: bool, normalize: bool, given: bool = False) -> grouped.Form:
    return _form(features.dtype, features.shape[1], exact(features), positives, normalize, given)


@functools.lru_cache
def _form(
    dtype: torch.dtype, width: int, is_exact: bool, positives: bool, normalize: bool, given: bool
) -> grouped.Form:
    operand, precision, inner = operands(dtype, is_exact)
    plan = Plan(operand, precision, -(-width // inner) * inner, inner, tma=False, folds=False)
    return grouped.Form(operand, precision, width, plan.width, inner, plan.rounds, positives, given, normalize)


def _blocks(*sizes: int) -> int:
    """How many programs of VECTOR entries vectors of these sizes take."""
    return sum(-(-n // VECTOR) for n in sizes)


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
        launch(_compiled, count_rows, device, (_blocks(n), 1, 1), (index, count, n, u), {"BM": VECTOR})
    by_row = weight if weight is not None or positives or index is None else count
    with torch.autocast(device.type, enabled=False):
        *sums, by_image, by_text = large.forward(TritonKernels.of(image), image, text, scale, index, by_row, normalize)
    used = torch.empty(1, dtype=torch.float64, device=device)
    row_blocks, blocks = _blocks(n), _blocks(n, u)
    parts = used.new_empty(2 * blocks)
    counts = {"HAS_COUNT": index is not None, "POSITIVES": positives and index is not None, "BM": VECTOR}
    key, arguments = (device, *counts.values()), (*sums, count, used if index is None else index, parts)
    launch(_compiled, mean_parts, key, (blocks, 1, 1), (*arguments, n, u, row_blocks), counts)
    constants = {"POSITIVES": counts["POSITIVES"], "BM": VECTOR}
    launch(_compiled, mean_loss, key, (1, 1, 1), (parts, loss, used, n, row_blocks, blocks), constants)
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
    arguments = (grad, used, count, used if index is None else index, grad_row, grad_column, grad_positive)
    key = (grad.device, *counts.values())
    launch(_compiled, mean_gradients, key, (_blocks(n, u), 1, 1), (*arguments, n, u, _blocks(n)), counts)
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
