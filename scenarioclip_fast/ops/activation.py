"""quick_gelu: argument checks, custom op and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scenarioclip_fast import dispatch
from scenarioclip_fast.kernels.quick_gelu import reference
from scenarioclip_fast.ops.plain import is_plain_call


def quick_gelu(x: Tensor, *, backend: str = "auto") -> Tensor:  # [*]
    """CLIP's activation, x sigmoid(1.702 x), in one pass forward and one backward, which keeps only x.

    Source: CLIP (arXiv 2103.00020). First derivatives only, except with the reference. Inside torch.compile, "auto" is
    the reference, which the compiler fuses with its neighbours.

    Args:
        x: any shape and float dtype.
        backend: "auto", "reference", "cpu" (float32 and bfloat16) or "triton" (all but float64).

    Returns:
        The shape and dtype of x, computed in float32 (float64 for float64).

    Raises:
        TypeError: x is not a tensor of floats.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x: got {x.dtype if isinstance(x, Tensor) else type(x).__name__}, expected a float tensor")
    if backend == "auto" and torch.compiler.is_compiling():
        return reference.quick_gelu(x)
    backend = dispatch.resolve("quick_gelu", backend, x.device.type, dtype=str(x.dtype).removeprefix("torch."))
    if backend == "reference":
        return reference.quick_gelu(x)
    y: Tensor = _QuickGelu.apply(x, backend) if is_plain_call(x) else _forward(x, backend)
    return y


class _QuickGelu(torch.autograd.Function):
    """The custom op without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, backend: str) -> Tensor:
        ctx.backend = backend
        ctx.save_for_backward(x)
        y: Tensor = dispatch.implementation("quick_gelu", backend).forward(x.contiguous())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return dispatch.implementation("quick_gelu", ctx.backend).backward(grad.contiguous(), x.contiguous()), None


@torch.library.custom_op("scenarioclip_fast::quick_gelu_forward", mutates_args=())
def _forward(x: Tensor, backend: str) -> Tensor:
    y: Tensor = dispatch.implementation("quick_gelu", backend).forward(x.contiguous())
    return y


@torch.library.custom_op("scenarioclip_fast::quick_gelu_backward", mutates_args=())
def _backward_op(grad: Tensor, x: Tensor, backend: str) -> Tensor:
    dx: Tensor = dispatch.implementation("quick_gelu", backend).backward(grad.contiguous(), x.contiguous())
    return dx


@_forward.register_fake
def _(x: Tensor, backend: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_backward_op.register_fake
def _(grad: Tensor, x: Tensor, backend: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.backend = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (x,) = ctx.saved_tensors
    return _backward_op(grad, x, ctx.backend), None


_forward.register_autograd(_backward, setup_context=_setup_context)
