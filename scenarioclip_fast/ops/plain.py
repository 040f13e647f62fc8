"""Whether an op may call its kernels through an autograd.Function, without the dispatcher.

A custom op costs the host an estimated 100 us per call, several times what an autograd.Function does. Only tracing
needs it: torch.compile, dispatch modes such as FakeTensorMode, functorch transforms, torch.jit.trace and tensor
subclasses. A backward pass that is itself recorded (create_graph=True) takes the custom op as well, whose derivative
raises an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)


def is_plain_call(*tensors: Tensor | None) -> bool:
    """Whether nothing traces or intercepts calls, and all tensors are plain."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._ops._len_torch_dispatch_stack_pre_dispatch() == 0
        and torch._C._get_tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
        and all(t is None or type(t) in _PLAIN for t in tensors)
    )


def plain_function(
    forward: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """The autograd.Function of what a custom op is made of and registered with.

    Not with a `setup_context` of its own, for which torch would inspect the signature at every call.
    """

    class Plain(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = forward(*inputs)
            setup_context(ctx, inputs, output)
            return output

    Plain.backward = staticmethod(backward)  # type: ignore[method-assign]
    return Plain


def run_backward(run: Callable[..., Any], op: Callable[..., Any], *arguments: Any) -> Any:
    """Call `run`, or the op made of it if something traces the backward pass."""
    is_plain = not torch.is_grad_enabled() and is_plain_call(*(a for a in arguments if isinstance(a, Tensor)))
    return (run if is_plain else op)(*arguments)
