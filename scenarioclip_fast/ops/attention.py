"""short_attention: argument checks, custom op and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scenarioclip_fast import dispatch
from scenarioclip_fast.kernels.short_attention import limits, reference
from scenarioclip_fast.ops.plain import is_plain_call, plain_function, run_backward

# For models and trainers, which do not import kernels.
attention, needs_float32 = reference.attention, reference.needs_float32


def short_attention(
    qkv: Tensor,  # [T, 3 W]
    heads: int,
    *,
    length: int | None = None,
    starts: Tensor | None = None,  # [n + 1]
    longest: int | None = None,
    causal: bool = False,
    backend: str = "auto",
) -> Tensor:  # [T, W]
    """Self-attention over many short sequences, without splitting, transposing or padding their rows.

    For every sequence and head softmax(q k^T / sqrt(W / heads)) v. One launch forward and one backward, which keeps
    only qkv. Formulas in kernels/short_attention/README.md. First derivatives only, except with the reference.

    Args:
        qkv: rows of tokens: queries, keys and values of all heads, any float dtype.
        heads: a divisor of W.
        length: of all sequences, which follow each other; instead of `starts` and `longest`.
        starts: int32 or int64, [n + 1] on qkv's device: the first row of each sequence, then T. Ascending, from 0 to T,
            by at most `longest`; values on a GPU are not checked.
        longest: the number of tokens of the longest sequence, or more.
        causal: a token sees itself and earlier tokens only.
        backend: "auto", "reference" or "cpu" (torch's attention), or "triton": up to 128 tokens and heads of 16 to
            128, in float32 up to 32 tokens and heads of 16 to 64. "auto" is the reference for anything else.

    Returns:
        The heads' outputs side by side, in qkv's dtype; statistics are float32.

    Raises:
        TypeError: qkv is not a tensor of floats, or starts not one of integers.
        ValueError: shapes, sizes or devices that do not match.
        BackendError: the named backend does not take these sizes.
    """
    longest = _check(qkv, heads, length, starts, longest)
    backend = _resolve(qkv, heads, longest, backend)
    if backend == "reference":
        return reference.short_attention(qkv, heads, longest, starts, causal)
    call = _ShortAttention.apply if is_plain_call(qkv, starts) else _forward
    y: Tensor = call(qkv, heads, longest, starts, causal, backend)
    return y


def attention_backend(qkv: Tensor, heads: int, longest: int) -> str:
    """The backend for a model: the reference where the one in force does not take its sizes."""
    width = qkv.shape[-1] // (3 * heads)
    if dispatch.requested()[0] in ("auto", "triton") and limits.takes(longest, width, qkv.dtype):
        return _resolve(qkv, heads, longest, "auto")
    return "reference"


def _resolve(qkv: Tensor, heads: int, longest: int, backend: str) -> str:
    name = dispatch.resolve("short_attention", backend, qkv.device.type, dtype=str(qkv.dtype).removeprefix("torch."))
    width = qkv.shape[-1] // (3 * heads)
    if name == "cpu":
        return "reference"
    if name == "reference" or limits.takes(longest, width, qkv.dtype):
        return name
    if dispatch.requested(backend)[0] == "auto":
        return "reference"
    is_float32 = qkv.dtype == torch.float32
    tokens, widest = (limits.LONGEST_FLOAT32, limits.WIDEST_FLOAT32) if is_float32 else (limits.LONGEST, limits.WIDEST)
    raise dispatch.BackendError(
        f"short_attention: got {longest} tokens and heads of {width} in {qkv.dtype}, expected at most {tokens} tokens "
        f"and heads of {limits.NARROWEST} to {widest} for backend {name!r}; usable: reference, or 'auto'"
    )


def _run_forward(qkv: Tensor, heads: int, longest: int, starts: Tensor | None, causal: bool, backend: str) -> Tensor:
    y: Tensor = dispatch.implementation("short_attention", backend).forward(
        qkv.contiguous(), heads, longest, None if starts is None else starts.contiguous(), causal
    )
    return y


def _run_backward(
    grad: Tensor, qkv: Tensor, heads: int, longest: int, starts: Tensor | None, causal: bool, backend: str
) -> Tensor:
    d_qkv: Tensor = dispatch.implementation("short_attention", backend).backward(
        grad.contiguous(), qkv.contiguous(), heads, longest, None if starts is None else starts.contiguous(), causal
    )
    return d_qkv


_forward = torch.library.custom_op("scenarioclip_fast::short_attention_forward", _run_forward, mutates_args=())
_backward_op = torch.library.custom_op("scenarioclip_fast::short_attention_backward", _run_backward, mutates_args=())


@_forward.register_fake
def _(qkv: Tensor, heads: int, longest: int, starts: Tensor | None, causal: bool, backend: str) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)


@_backward_op.register_fake
def _(grad: Tensor, qkv: Tensor, heads: int, longest: int, starts: Tensor | None, causal: bool, backend: str) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    qkv, ctx.heads, ctx.longest, starts, ctx.causal, ctx.backend = inputs
    ctx.save_for_backward(qkv, starts)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    qkv, starts = ctx.saved_tensors
    arguments = (grad, qkv, ctx.heads, ctx.longest, starts, ctx.causal, ctx.backend)
    d_qkv = run_backward(_run_backward, _backward_op, *arguments)
    return d_qkv, None, None, None, None, None


_forward.register_autograd(_backward, setup_context=_setup_context)
_ShortAttention = plain_function(_run_forward, _setup_context, _backward)


def _check(qkv: Tensor, heads: int, length: int | None, starts: Tensor | None, longest: int | None) -> int:
    """Check all arguments; return the number of tokens of the longest sequence."""
    if not isinstance(qkv, Tensor) or not qkv.is_floating_point():
        kind = qkv.dtype if isinstance(qkv, Tensor) else type(qkv).__name__
        raise TypeError(f"qkv: got {kind}, expected a float tensor")
    if qkv.dim() != 2 or qkv.shape[1] == 0 or qkv.shape[1] % 3:
        raise ValueError(f"qkv: got shape {list(qkv.shape)}, expected [T, 3 W] with W > 0")
    width = qkv.shape[1] // 3
    if heads < 1 or width % heads:
        raise ValueError(f"heads: got {heads}, expected a divisor of W = {width}")
    if starts is None:
        if length is None or longest is not None:
            got = "neither" if length is None else "length and longest"
            raise ValueError(f"length, starts and longest: got {got}, expected length, or starts and longest")
        if length < 1 or qkv.shape[0] % length:
            raise ValueError(f"length: got {length}, expected a divisor of T = {qkv.shape[0]}")
        return length
    if length is not None or longest is None:
        got = "starts alone" if length is None else "length and starts"
        raise ValueError(f"length, starts and longest: got {got}, expected length, or starts and longest")
    if not isinstance(starts, Tensor) or starts.dtype not in (torch.int32, torch.int64):
        kind = starts.dtype if isinstance(starts, Tensor) else type(starts).__name__
        raise TypeError(f"starts: got {kind}, expected a tensor of int32 or int64")
    if starts.device != qkv.device:
        raise ValueError(f"starts: got a tensor on {starts.device}, expected {qkv.device} like qkv")
    if starts.dim() != 1 or starts.shape[0] == 0:
        raise ValueError(f"starts: got shape {list(starts.shape)}, expected [n + 1]")
    if longest < 0 or (longest == 0 and qkv.shape[0]):
        raise ValueError(f"longest: got {longest}, expected the number of tokens of the longest sequence")
    if starts.device.type == "cpu" and is_plain_call(qkv, starts):
        _check_starts(starts, qkv.shape[0], longest)
    return longest


def _check_starts(starts: Tensor, total: int, longest: int) -> None:
    first, last, lengths = int(starts[0]), int(starts[-1]), starts.diff()
    if first or last != total or (lengths < 0).any():
        raise ValueError(f"starts: got values from {first} to {last}, expected ascending ones from 0 to T = {total}")
    if (lengths > longest).any():
        raise ValueError(f"longest: got {longest}, expected at least {int(lengths.max())}, the longest of starts")
