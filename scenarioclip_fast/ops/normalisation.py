"""add_layer_norm and layer_norm: argument checks, custom op and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scenarioclip_fast import dispatch
from scenarioclip_fast.kernels.add_layer_norm import reference
from scenarioclip_fast.ops.plain import is_plain_call


def add_layer_norm(
    x: Tensor,  # [*, W]
    branch: Tensor,  # [*, W]
    weight: Tensor,  # [W]
    bias: Tensor,  # [W]
    *,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # [*, W], [*, W]
    """A residual addition and the LayerNorm of its result, in one pass forward and one backward.

    The sum is rounded to x's dtype; its statistics and the normalisation are float32 (float64 for float64 inputs).
    Formulas in kernels/add_layer_norm/README.md. First derivatives only, except with the reference. Inside
    torch.compile, "auto" is the reference on a CPU; on a GPU the kernel is faster than Inductor's.

    Args:
        x: the residual stream, [*, W], any float dtype.
        branch: of x's shape and dtype.
        weight, bias: [W], any float dtype.
        eps: added to the variance.
        dtype: of the normalised rows; None: x's.
        backend: "auto", "reference", "cpu" (float32 and bfloat16) or "triton" (all but float64, W up to 8192).

    Returns:
        x + branch in x's dtype, and its LayerNorm in `dtype`.

    Raises:
        TypeError: an argument is not a tensor of floats.
        ValueError: shapes, dtypes or devices that do not match.
    """
    _check(x, branch, weight, bias)
    return _add_layer_norm(x, branch, weight, bias, eps, dtype or x.dtype, backend)


def layer_norm(
    x: Tensor,  # [*, W]
    weight: Tensor,  # [W]
    bias: Tensor,  # [W]
    *,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:  # [*, W]
    """LayerNorm that reads x's dtype and writes `dtype`, with float32 statistics: `add_layer_norm` without the sum."""
    _check(x, None, weight, bias)
    return _add_layer_norm(x, None, weight, bias, eps, dtype or x.dtype, backend)[1]


def _add_layer_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1])
    branch_rows = None if branch is None else branch.reshape(rows.shape)
    if backend == "auto" and x.device.type != "cuda" and torch.compiler.is_compiling():
        backend = "reference"
    else:
        backend = dispatch.resolve("add_layer_norm", backend, x.device.type, dtype=_dtype_name(x, dtype))
    if backend == "reference":
        total, normed = reference.add_layer_norm(rows, branch_rows, weight, bias, eps, dtype)
    elif is_plain_call(rows, branch_rows, weight, bias):
        total, normed = _AddLayerNorm.apply(rows, branch_rows, weight, bias, eps, dtype, backend)
    else:
        total, normed, _ = _forward(rows, branch_rows, weight, bias, eps, dtype, backend)
    return x if branch is None else total.view(x.shape), normed.view(x.shape)


def _dtype_name(x: Tensor, dtype: torch.dtype) -> str:
    """The dtype that decides which backends can run: normalised rows are of x's dtype or of float32."""
    name = x.dtype if dtype in (x.dtype, torch.float32) else dtype
    return str(name).removeprefix("torch.")


class _AddLayerNorm(torch.autograd.Function):
    """The custom op without the dispatcher; the sum is None without a branch."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        dtype: torch.dtype,
        backend: str,
    ) -> tuple[Tensor | None, Tensor]:
        x = x.contiguous()
        total, normed, statistics = dispatch.implementation("add_layer_norm", backend).forward(
            x,
            None if branch is None else branch.contiguous(),
            weight.contiguous(),
            bias.contiguous(),
            eps,
            dtype,
        )
        ctx.backend, ctx.has_branch = backend, branch is not None
        ctx.save_for_backward(x if branch is None else total, weight, bias, statistics)
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor | None, d_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, bias, statistics = ctx.saved_tensors
        if d_normed is None:  # only the sum was used
            return d_total, d_total, None, None, None, None, None
        with_weights = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        dx, d_weights = dispatch.implementation("add_layer_norm", ctx.backend).backward(
            None if d_total is None else d_total.contiguous(),
            d_normed.contiguous(),
            total,
            weight.contiguous(),
            statistics,
            with_weights,
        )
        if d_weights is None:
            return dx, dx if ctx.has_branch else None, None, None, None, None, None
        d_weight, d_bias = d_weights[0].to(weight.dtype), d_weights[1].to(bias.dtype)
        return dx, dx if ctx.has_branch else None, d_weight, d_bias, None, None, None


@torch.library.custom_op("scenarioclip_fast::add_layer_norm_forward", mutates_args=())
def _forward(
    x: Tensor,  # [R, W]
    branch: Tensor | None,  # [R, W]
    weight: Tensor,  # [W]
    bias: Tensor,  # [W]
    eps: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # the sum ([0] without a branch), the normalised rows, their statistics [2, R]
    total, normed, statistics = dispatch.implementation("add_layer_norm", backend).forward(
        x.contiguous(),
        None if branch is None else branch.contiguous(),
        weight.contiguous(),
        bias.contiguous(),
        eps,
        dtype,
    )
    return x.new_empty(0) if total is None else total, normed, statistics


@_forward.register_fake
def _(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.new_empty(0 if branch is None else x.shape)
    return total, x.new_empty(x.shape, dtype=dtype), x.new_empty((2, x.shape[0]), dtype=wide)


@torch.library.custom_op("scenarioclip_fast::add_layer_norm_backward", mutates_args=())
def _backward_op(
    d_total: Tensor | None,  # [R, W]
    d_normed: Tensor,  # [R, W]
    total: Tensor,  # [R, W]
    weight: Tensor,  # [W]
    statistics: Tensor,  # [2, R]
    with_weights: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:  # the gradient of x and branch, and that of weight and bias [2, W] ([0] if not asked for)
    dx, d_weights = dispatch.implementation("add_layer_norm", backend).backward(
        None if d_total is None else d_total.contiguous(),
        d_normed.contiguous(),
        total.contiguous(),
        weight.contiguous(),
        statistics,
        with_weights,
    )
    return dx, statistics.new_empty(0) if d_weights is None else d_weights


@_backward_op.register_fake
def _(
    d_total: Tensor | None,
    d_normed: Tensor,
    total: Tensor,
    weight: Tensor,
    statistics: Tensor,
    with_weights: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return total.new_empty(total.shape), statistics.new_empty((2, total.shape[1]) if with_weights else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, branch, weight, bias, _, _, ctx.backend = inputs
    total, normed, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.save_for_backward(x if branch is None else total, weight, bias, statistics)
    ctx.normed_dtype, ctx.has_branch = normed.dtype, branch is not None
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_total: Tensor | None, d_normed: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    total, weight, bias, statistics = ctx.saved_tensors
    if not ctx.has_branch:
        d_total = None
    if d_normed is None:  # only the sum was used
        return d_total, d_total, None, None, None, None, None
    with_weights = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    dx, d_weights = _backward_op(d_total, d_normed, total, weight, statistics, with_weights, ctx.backend)
    d_weight, d_bias = (d_weights[0].to(weight.dtype), d_weights[1].to(bias.dtype)) if with_weights else (None, None)
    return dx, dx if ctx.has_branch else None, d_weight, d_bias, None, None, None


_forward.register_autograd(_backward, setup_context=_setup_context)


def _check(x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor) -> None:
    for name, t in (("x", x), ("branch", branch), ("weight", weight), ("bias", bias)):
        if name == "branch" and t is None:
            continue
        if not isinstance(t, Tensor) or not t.is_floating_point():
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{name}: got {got}, expected a float tensor")
        if t.device != x.device:
            raise ValueError(f"{name}: got a tensor on {t.device}, expected {x.device} like x")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: got shape {list(x.shape)}, expected [*, W] with W > 0")
    if branch is not None and (branch.shape != x.shape or branch.dtype != x.dtype):
        raise ValueError(f"branch: got {branch.dtype} {list(branch.shape)}, expected {x.dtype} {list(x.shape)} like x")
    for name, t in (("weight", weight), ("bias", bias)):
        if t.shape != x.shape[-1:]:
            raise ValueError(f"{name}: got shape {list(t.shape)}, expected [{x.shape[-1]}], the width of x")
