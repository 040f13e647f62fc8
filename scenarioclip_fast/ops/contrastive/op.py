"""The custom ops: log-sums of all levels at once and their gradients.

`contrastive_forward` returns row and column log-sums and the positive logits; `contrastive_backward` turns gradients of
those three into gradients of features and scale. What both passes need travels between them: one over the norm of each
row and, within a budget, the exponentials. The losses are plain PyTorch on top, and collectives stay outside; fused.py
has the op of backends that compute mean losses themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from scenarioclip_fast import dispatch
from scenarioclip_fast.kernels.contrastive import reference
from scenarioclip_fast.kernels.contrastive.workspace import kept_dtype, kept_size
from scenarioclip_fast.ops.contrastive.validate import check_numbers, level_name


def keeps_exponentials(backend: str) -> bool:
    """Whether a backend can keep exponentials for the backward pass."""
    return dispatch.offers("contrastive_loss", backend, "KEEPS_EXPONENTIALS")


def _implementation(backend: str) -> ModuleType:
    return dispatch.implementation("contrastive_loss", backend)


@torch.library.custom_op("scenarioclip_fast::contrastive_forward", mutates_args=())
def contrastive_forward(
    image: Sequence[Tensor],  # levels x [N_l, D_l], one dtype
    text: Sequence[Tensor],  # levels x [U_l, D_l]
    scale: Tensor,  # [levels]
    index: Tensor | None,  # [sum N_l] int64: the text of each row within its level; None: row i has text i
    weight: Tensor | None,  # [sum U_l] float32 or int32; None: ones
    normalize: bool,
    budget: int,  # bytes that `kept` may take; 0 where no gradient is needed or the backend keeps nothing
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the log-sums and positives in float64, and for the backward pass `inverse` and `kept`.

    row_lse [sum N_l], col_lse [sum U_l], positive [sum N_l], inverse [sum N_l + sum U_l] (one over the norm of each
    image row, then of each text row), kept [sum of N_l U_l of the levels in the budget].
    """
    # In a compiled graph, argument values can first be read here.
    if scale.device.type == "cpu":
        n, u = [len(x) for x in image], [len(y) for y in text]
        indices = [None] * len(n) if index is None else index.split(n)
        for k, numbers in enumerate(zip(scale.tolist(), indices, u, strict=True)):
            check_numbers(*numbers, level_name(k, len(n)))
    with torch.autocast(scale.device.type, enabled=False):
        row, column, positive, inverse, kept = _implementation(backend).forward(
            image, text, scale, index, weight, normalize, budget
        )
    return row, column, positive, inverse, kept


@contrastive_forward.register_fake
def _(
    image: Sequence[Tensor],
    text: Sequence[Tensor],
    scale: Tensor,
    index: Tensor | None,
    weight: Tensor | None,
    normalize: bool,
    budget: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, u = [x.shape[0] for x in image], [y.shape[0] for y in text]
    rows = scale.new_empty(sum(n), dtype=reference.sums_dtype(scale.device))
    dtype = kept_dtype(scale)
    kept = scale.new_empty(kept_size(n, u, dtype.itemsize, budget), dtype=dtype)
    return rows, rows.new_empty(sum(u)), torch.empty_like(rows), scale.new_empty(sum(n) + sum(u)), kept


@torch.library.custom_op("scenarioclip_fast::contrastive_backward", mutates_args=())
def contrastive_backward(
    image: Sequence[Tensor],  # levels x [N_l, D_l]
    text: Sequence[Tensor],  # levels x [U_l, D_l]
    scale: Tensor,  # [levels]
    index: Tensor | None,  # [sum N_l]
    weight: Tensor | None,  # [sum U_l]
    row_lse: Tensor,  # [sum N_l]
    col_lse: Tensor,  # [sum U_l]
    positive: Tensor,  # [sum N_l]
    inverse: Tensor,  # [sum N_l + sum U_l]
    kept: Tensor,  # [sum of the kept N_l U_l]
    grad_row: Tensor,  # [sum N_l]
    grad_col: Tensor,  # [sum U_l]
    grad_positive: Tensor,  # [sum N_l]
    normalize: bool,
    need_image: bool,
    need_text: bool,
    backend: str,
) -> tuple[list[Tensor], list[Tensor], Tensor]:  # d_image, d_text (empty tensors where not needed), d_scale [levels]
    saved, grads = (row_lse, col_lse, positive, inverse, kept), (grad_row, grad_col, grad_positive)
    with torch.autocast(scale.device.type, enabled=False):
        d_image, d_text, d_scale = _implementation(backend).backward(
            image, text, scale, index, weight, saved, grads, normalize, need_image, need_text
        )
    return d_image, d_text, d_scale


@contrastive_backward.register_fake
def _(
    image: Sequence[Tensor],
    text: Sequence[Tensor],
    scale: Tensor,
    index: Tensor | None,
    weight: Tensor | None,
    row_lse: Tensor,
    col_lse: Tensor,
    positive: Tensor,
    inverse: Tensor,
    kept: Tensor,
    grad_row: Tensor,
    grad_col: Tensor,
    grad_positive: Tensor,
    normalize: bool,
    need_image: bool,
    need_text: bool,
    backend: str,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    d_image = [x.new_empty(x.shape if need_image else 0) for x in image]
    return d_image, [y.new_empty(y.shape if need_text else 0) for y in text], torch.empty_like(scale)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    image, text, scale, index, weight, ctx.normalize, _, ctx.backend = inputs
    ctx.levels = len(image)
    ctx.save_for_backward(*image, *text, scale, index, weight, *output)
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)  # do not allocate zeros of the size of `kept`


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    levels, saved = ctx.levels, ctx.saved_tensors
    image, text, sums = saved[:levels], saved[levels : 2 * levels], saved[-5:-2]
    need_image, need_text = (any(ctx.needs_input_grad[k]) for k in (0, 1))
    d_image, d_text, d_scale = contrastive_backward(
        image,
        text,
        *saved[2 * levels :],
        *(torch.zeros_like(s) if g is None else g.contiguous() for s, g in zip(sums, grads[:3], strict=True)),
        ctx.normalize,
        need_image,
        need_text,
        ctx.backend,
    )
    nothing = [None] * levels
    return d_image if need_image else nothing, d_text if need_text else nothing, d_scale, *[None] * 5


contrastive_forward.register_autograd(_backward, setup_context=_setup_context)


def _no_second_derivative(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    raise RuntimeError(
        "contrastive_loss supports first derivatives only: got a gradient of its gradient (create_graph=True)"
    )


contrastive_backward.register_autograd(_no_second_derivative)
