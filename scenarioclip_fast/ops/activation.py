"""quick_gelu: argument checks, custom op and autograd."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from scenarioclip_fast import dispatch
from scenarioclip_fast.kernels.quick_gelu import reference
from scenarioclip_fast.ops.plain import is_plain_call, plain_function, run_backward


def quick_gelu(x: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:  # [*] or [*, W], [W]
    """CLIP's activation, y sigmoid(1.702 y) of y = x + bias, in one pass forward and one backward, which keeps only x.

    Source: CLIP (arXiv 2103.00020). First derivatives only, except with the reference. Inside torch.compile, "auto" is
    the reference, which the compiler fuses with its neighbours.

    Args:
        x: any shape and float dtype.
        bias: added to x in float32, such as the bias of the product that computed x: its gradient, a sum over the
            rows, then takes no pass of its own. [W] for the last dimension of x, any float dtype.
        backend: "auto", "reference", "cpu" (float32 and bfloat16) or "triton" (all but float64).

    Returns:
        The shape and dtype of x, computed in float32 (float64 for float64). Without a bias, channels-last images stay
        channels-last.

    Raises:
        TypeError: x or bias is not a tensor of floats.
        ValueError: the shape or device of bias does not match x.
    """
    _check(x, bias)
    if backend == "auto" and torch.compiler.is_compiling():
        return reference.quick_gelu(x, bias)
    backend = dispatch.resolve("quick_gelu", backend, x.device.type, dtype=str(x.dtype).removeprefix("torch."))
    if backend == "reference":
        return reference.quick_gelu(x, bias)
    call = _QuickGelu.apply if is_plain_call(x, bias) else _forward
    y: Tensor = call(x, bias, backend)
    return y


def _run_forward(x: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    layout = _layout(x, bias)
    bias = None if bias is None else bias.contiguous()
    y: Tensor = dispatch.implementation("quick_gelu", backend).forward(_rows(x, layout), bias)
    return _restored(y, layout)


def _run_backward(
    grad: Tensor,  # [*, W]
    x: Tensor,  # [*, W]
    bias: Tensor | None,  # [W]
    with_sums: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:  # the gradients of x, and of bias ([0] if not asked for)
    layout = _layout(x, bias)
    bias = None if bias is None else bias.contiguous()
    dx, d_bias = dispatch.implementation("quick_gelu", backend).backward(
        _rows(grad, layout), _rows(x, layout), bias, with_sums
    )
    return _restored(dx, layout), _no_sums(x) if d_bias is None else d_bias


def _layout(x: Tensor, bias: Tensor | None) -> torch.memory_format:
    """The layout of the result. Copying the output of a convolution to C order would cost more than the activation."""
    if bias is None and x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _rows(x: Tensor, layout: torch.memory_format) -> Tensor:
    """x in C order: [n, h, w, c] if it is channels-last."""
    x = x.contiguous(memory_format=layout)
    return rearrange(x, "n c h w -> n h w c") if layout is torch.channels_last else x


def _restored(rows: Tensor, layout: torch.memory_format) -> Tensor:
    return rearrange(rows, "n h w c -> n c h w") if layout is torch.channels_last else rows


def _no_sums(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))


_forward = torch.library.custom_op("scenarioclip_fast::quick_gelu_forward", _run_forward, mutates_args=())
_backward_op = torch.library.custom_op("scenarioclip_fast::quick_gelu_backward", _run_backward, mutates_args=())


@_forward.register_fake
def _(x: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return torch.empty_like(x, memory_format=_layout(x, bias))


@_backward_op.register_fake
def _(grad: Tensor, x: Tensor, bias: Tensor | None, with_sums: bool, backend: str) -> tuple[Tensor, Tensor]:
    d_bias = _no_sums(x)
    dx = torch.empty_like(x, memory_format=_layout(x, bias))
    return dx, d_bias.new_empty(x.shape[-1]) if with_sums else d_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.backend = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
    x, bias = ctx.saved_tensors
    with_sums = ctx.needs_input_grad[1]
    dx, d_bias = run_backward(_run_backward, _backward_op, grad, x, bias, with_sums, ctx.backend)
    return dx, d_bias.to(bias.dtype) if with_sums else None, None


_forward.register_autograd(_backward, setup_context=_setup_context)
_QuickGelu = plain_function(_run_forward, _setup_context, _backward)


def _check(x: Tensor, bias: Tensor | None) -> None:
    for name, t in (("x", x), ("bias", bias)):
        if name == "bias" and t is None:
            continue
        if not isinstance(t, Tensor) or not t.is_floating_point():
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{name}: got {got}, expected a float tensor")
    if bias is None:
        return
    if bias.device != x.device:
        raise ValueError(f"bias: got a tensor on {bias.device}, expected {x.device} like x")
    if x.dim() == 0 or bias.shape != x.shape[-1:]:
        expected = list(x.shape[-1:])
        raise ValueError(f"bias: got shape {list(bias.shape)}, expected {expected}, the last dimension of x")
