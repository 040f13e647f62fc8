"""add_layer_norm and layer_norm: argument checks, custom op and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scenarioclip_fast import dispatch
from scenarioclip_fast.kernels.add_layer_norm import reference
from scenarioclip_fast.ops.plain import is_plain_call, plain_function, run_backward


def add_layer_norm(
    x: Tensor,  # [*, W]
    branch: Tensor,  # [*, W]
    weight: Tensor,  # [W]
    bias: Tensor,  # [W]
    *,
    branch_bias: Tensor | None = None,  # [W]
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # [*, W], [*, W]
    """A residual addition and the LayerNorm of its result, in one pass forward and one backward.

    The sum is rounded to x's dtype; its statistics and the normalisation are float32 (float64 for float64 inputs).
    Formulas in kernels/add_layer_norm/README.md. First derivatives only, except with the reference. Inside
    torch.compile, "auto" is the reference on a CPU; on a GPU it is the kernel, which took 256 us on an H200 where
    Inductor's took 397 (without `branch_bias`).

    Args:
        x: the residual stream, [*, W], any float dtype.
        branch: of x's shape and dtype.
        weight, bias: [W], any float dtype.
        branch_bias: added to branch in float32, such as the bias of the product that computed it: its gradient, a sum
            over the rows, then takes no pass of its own. [W], any float dtype.
        eps: added to the variance.
        dtype: of the normalised rows; None: x's.
        backend: "auto", "reference", "cpu" (float32 and bfloat16) or "triton" (all but float64, W up to 8192).

    Returns:
        x + (branch + branch_bias) in x's dtype, and its LayerNorm in `dtype`.

    Raises:
        TypeError: an argument is not a tensor of floats.
        ValueError: shapes, dtypes or devices that do not match.
    """
    _check(x, branch, weight, bias, branch_bias)
    return _add_layer_norm(x, branch, weight, bias, branch_bias, eps, dtype or x.dtype, backend)


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
    _check(x, None, weight, bias, None)
    return _add_layer_norm(x, None, weight, bias, None, eps, dtype or x.dtype, backend)[1]


def _add_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    branch_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1])
    branch_rows = None if branch is None else branch.reshape(rows.shape)
    if backend == "auto" and x.device.type != "cuda" and torch.compiler.is_compiling():
        backend = "reference"
    else:
        backend = dispatch.resolve("add_layer_norm", backend, x.device.type, dtype=_dtype_name(x, dtype))
    if backend == "reference":
        total, normed = reference.add_layer_norm(rows, branch_rows, weight, bias, branch_bias, eps, dtype)
    else:
        call = _AddLayerNorm.apply if is_plain_call(rows, branch_rows, weight, bias, branch_bias) else _forward
        total, normed, _ = call(rows, branch_rows, weight, bias, branch_bias, eps, dtype, backend)
    return x if branch is None else total.view(x.shape), normed.view(x.shape)


def _dtype_name(x: Tensor, dtype: torch.dtype) -> str:
    """The dtype that decides which backends can run: normalised rows are of x's dtype or of float32."""
    name = x.dtype if dtype in (x.dtype, torch.float32) else dtype
    return str(name).removeprefix("torch.")


def _sums(ctx: Any) -> int:
    """How many sums over the rows the backward pass must compute: see `backward` in reference.py."""
    _, _, weight, bias, branch_bias, *_ = ctx.needs_input_grad
    return 3 if branch_bias else 2 if weight or bias else 0


# Saved tensors are arguments of these two: under activation checkpointing, `ctx.saved_tensors` can be read only once.
def _only_sum(ctx: Any, d_total: Tensor | None, branch_bias: Tensor | None) -> tuple[Tensor | None, ...]:
    d_branch_bias = None
    if ctx.needs_input_grad[4] and branch_bias is not None and d_total is not None:
        wide = torch.promote_types(d_total.dtype, torch.float32)
        d_branch_bias = d_total.sum(0, dtype=wide).to(branch_bias.dtype)
    return d_total, d_total if ctx.has_branch else None, None, None, d_branch_bias, None, None, None


def _gradients(
    ctx: Any, dx: Tensor, sums: Tensor | None, given: tuple[Tensor, Tensor, Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The gradients of all arguments of `forward`; given: weight, bias and branch_bias."""
    rows = () if sums is None else sums.unbind()
    of_columns = [row.to(t.dtype) for row, t in zip(rows, given, strict=False) if t is not None]
    return dx, dx if ctx.has_branch else None, *of_columns, *[None] * (6 - len(of_columns))


def _run_forward(
    x: Tensor,  # [R, W]
    branch: Tensor | None,  # [R, W]
    weight: Tensor,  # [W]
    bias: Tensor,  # [W]
    branch_bias: Tensor | None,  # [W]
    eps: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # the sum ([0] without a branch), the normalised rows, their statistics [2, R]
    total, normed, statistics = dispatch.implementation("add_layer_norm", backend).forward(
        x.contiguous(),
        None if branch is None else branch.contiguous(),
        weight.contiguous(),
        bias.contiguous(),
        None if branch_bias is None else branch_bias.contiguous(),
        eps,
        dtype,
    )
    return x.new_empty(0) if total is None else total, normed, statistics


_forward = torch.library.custom_op("scenarioclip_fast::add_layer_norm_forward", _run_forward, mutates_args=())


@_forward.register_fake
def _(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    branch_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.new_empty(0 if branch is None else x.shape)
    return total, x.new_empty(x.shape, dtype=dtype), x.new_empty((2, x.shape[0]), dtype=wide)


def _run_backward(
    d_total: Tensor | None,  # [R, W]
    d_normed: Tensor,  # [R, W]
    total: Tensor,  # [R, W]
    weight: Tensor,  # [W]
    statistics: Tensor,  # [2, R]
    sums: int,
    backend: str,
) -> tuple[Tensor, Tensor]:  # the gradient of x and branch, and sums over the rows [sums, W] ([0] for none)
    dx, d_sums = dispatch.implementation("add_layer_norm", backend).backward(
        None if d_total is None else d_total.contiguous(),
        d_normed.contiguous(),
        total.contiguous(),
        weight.contiguous(),
        statistics,
        sums,
    )
    return dx, statistics.new_empty(0) if d_sums is None else d_sums


_backward_op = torch.library.custom_op("scenarioclip_fast::add_layer_norm_backward", _run_backward, mutates_args=())


@_backward_op.register_fake
def _(
    d_total: Tensor | None,
    d_normed: Tensor,
    total: Tensor,
    weight: Tensor,
    statistics: Tensor,
    sums: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return total.new_empty(total.shape), statistics.new_empty((sums, total.shape[1]) if sums else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, branch, weight, bias, branch_bias, _, _, ctx.backend = inputs
    total, _, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.save_for_backward(x if branch is None else total, weight, bias, branch_bias, statistics)
    ctx.has_branch = branch is not None
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_total: Tensor | None, d_normed: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    total, weight, bias, branch_bias, statistics = ctx.saved_tensors
    if not ctx.has_branch:
        d_total = None
    if d_normed is None:  # only the sum was used
        return _only_sum(ctx, d_total, branch_bias)
    sums = _sums(ctx)
    arguments = (d_total, d_normed, total, weight, statistics, sums, ctx.backend)
    dx, d_sums = run_backward(_run_backward, _backward_op, *arguments)
    return _gradients(ctx, dx, d_sums if sums else None, (weight, bias, branch_bias))


_forward.register_autograd(_backward, setup_context=_setup_context)
_AddLayerNorm = plain_function(_run_forward, _setup_context, _backward)


def _check(x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, branch_bias: Tensor | None) -> None:
    of_columns = [("weight", weight), ("bias", bias), ("branch_bias", branch_bias)]
    for name, t in (("x", x), ("branch", branch), *of_columns):
        if name.startswith("branch") and t is None:
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
    for name, t in of_columns:
        if t is not None and t.shape != x.shape[-1:]:
            raise ValueError(f"{name}: got shape {list(t.shape)}, expected [{x.shape[-1]}], the width of x")
