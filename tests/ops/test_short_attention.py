"""short_attention against its reference."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from scenarioclip_fast.kernels.short_attention import reference
from torch import Tensor

from scenarioclip_fast.dispatch import BackendError, use_backend
from scenarioclip_fast.ops import short_attention
from scenarioclip_fast.ops.attention import _backward_op, _forward, attention_backend
from scenarioclip_fast.requirements import import_problem

# Relative to the largest value: sums of up to 128 products of values that are rounded once.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
LENGTHS = [1, 2, 15, 16, 17, 50, 77, 128]
PACKED = [[3], [5, 1, 9, 16], [2, 17, 0, 4], [50, 77, 1], [128, 7]]


def naive(qkv: Tensor, heads: int, lengths: list[int], causal: bool) -> Tensor:
    """One sequence and head at a time."""
    width = qkv.shape[1] // 3
    sequences = []
    for rows in qkv.split(lengths):
        q, k, v = (part.unflatten(1, (heads, width // heads)).transpose(0, 1) for part in rows.split(width, 1))
        s = q @ k.mT / (width // heads) ** 0.5
        if causal:
            s = s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), -torch.inf)
        sequences.append((s.softmax(-1) @ v).transpose(0, 1).flatten(1))
    return torch.cat(sequences)


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    largest = expected.abs().max().clamp_min(1e-30)
    error = (got.double() - expected).abs().max() / largest
    assert error <= tolerance, f"off by {error:.1e}"


def check(qkv: Tensor, heads: int, lengths: list[int], causal: bool, packed: bool, **options: Any) -> None:
    """Compare the output and the gradient with a naive implementation in float64."""
    tolerance = options.pop("tolerance", TOLERANCE[qkv.dtype])
    leaf = qkv.detach().requires_grad_()
    if packed:
        ends = torch.tensor(lengths).cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends]).to(options.pop("index", torch.int64)).to(qkv.device)
        sizes = {"starts": starts, "longest": max(lengths, default=0)}
    else:
        sizes = {"length": lengths[0]}
    y = short_attention(leaf, heads, causal=causal, **sizes, **options)
    exact = qkv.detach().double().cpu().requires_grad_()
    expected = naive(exact, heads, lengths, causal)
    assert y.dtype == qkv.dtype and y.shape == expected.shape
    close(y.cpu(), expected, tolerance)
    upstream = torch.randn(y.shape).to(y.dtype)
    y.backward(upstream.to(y.device))
    expected.backward(upstream.double())
    assert leaf.grad is not None and exact.grad is not None
    # Those of queries and keys are differences, which are rounded before they are multiplied.
    close(leaf.grad.cpu(), exact.grad, 2 * tolerance)


def rows(total: int, heads: int, width: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    return torch.randn(total, 3 * heads * width, device=device).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [*LENGTHS, 130])
def test_sequences_of_one_length(length: int, causal: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for n, heads, width in ((1, 2, 16), (3, 1, 20)):
        check(rows(n * length, heads, width, dtype), heads, [length] * n, causal, packed=False)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", PACKED, ids=str)
def test_packed_sequences(lengths: list[int], causal: bool, index: torch.dtype) -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        check(rows(sum(lengths), 3, 16, dtype), 3, lengths, causal, packed=True, index=index)


# The interpreter multiplies bfloat16 wrongly; float16 takes the same code.
def interpreted_lengths() -> None:
    """Every length with a wide and a narrow head, in the interpreter."""
    torch.manual_seed(0)
    for i, length in enumerate(LENGTHS):
        n, heads = (1, 3)[i % 2], 1 + i % 3
        for width, causal in zip((16, 32, 64, 80), (i % 2 == 0, i % 2 == 1) * 2, strict=True):
            check(rows(n * length, heads, width, torch.float16), heads, [length] * n, causal, False, backend="triton")
            if length <= 32 and width <= 64:
                qkv = rows(n * length, heads, width, torch.float32)
                check(qkv, heads, [length] * n, causal, packed=False, backend="triton")


def interpreted_packed() -> None:
    torch.manual_seed(0)
    for lengths in PACKED:
        for causal in (False, True):
            for index in (torch.int32, torch.int64):
                check(rows(sum(lengths), 2, 32, torch.float16), 2, lengths, causal, True, index=index, backend="triton")
                if max(lengths) <= 32:
                    check(rows(sum(lengths), 2, 32, torch.float32), 2, lengths, causal, True, backend="triton")


def interpreted_values() -> None:
    """Large logits, equal rows, NaN, other strides, no sequences, the custom op and the model's choice."""
    torch.manual_seed(0)
    # Logits of some thousands, which float32 rounds by up to 2^-12; then equal rows.
    check(30 * rows(34, 2, 16, torch.float32), 2, [17, 17], False, False, backend="triton", tolerance=2**-11)
    check(0 * rows(34, 2, 16, torch.float32), 2, [17, 17], False, False, backend="triton")
    check(rows(1, 2, 16, torch.float32).expand(20, -1).contiguous(), 2, [10, 10], True, False, backend="triton")
    check(rows(40, 2, 16, torch.float32)[::2], 2, [10, 10], False, False, backend="triton")
    check(rows(96, 2, 16, torch.float32)[:20, :96].T.contiguous().T, 2, [10, 10], False, False, backend="triton")
    qkv = rows(20, 2, 16, torch.float32)
    with torch.no_grad():
        equal = short_attention(torch.ones_like(qkv) * 1e15, 2, length=10, backend="triton")
        torch.testing.assert_close(equal, torch.full_like(equal, 1e15))  # equal weights
        qkv[3, 5] = float("nan")
        y = short_attention(qkv, 2, length=10, backend="triton")
        assert y[:10, :16].isnan().any() and not y[10:].isnan().any()
    empty_starts = torch.zeros(1, dtype=torch.int64)
    for sizes in ({"length": 5}, {"starts": empty_starts, "longest": 0}):
        leaf = torch.zeros(0, 96, requires_grad=True)
        y = short_attention(leaf, 2, **sizes, backend="triton")
        y.sum().backward()
        assert y.shape == (0, 32) and leaf.grad is not None
    starts = torch.tensor([0, 4, 9])
    for leaf, sizes in (
        (rows(9, 2, 16, torch.float32), (5, starts, True)),
        (rows(8, 2, 16, torch.float32), (4, None, False)),
    ):
        arguments = (leaf.requires_grad_(), 2, *sizes, "triton")
        torch.library.opcheck(_forward, arguments)
        torch.library.opcheck(_backward_op, (torch.randn(len(leaf), 32), leaf.detach(), 2, *sizes, "triton"))
        y, plain = _forward(*arguments), reference.short_attention(leaf, *arguments[1:-1])
        upstream = torch.randn_like(y)
        (grad,), (expected,) = (torch.autograd.grad(out, leaf, upstream) for out in (y, plain))
        torch.testing.assert_close(y, plain)
        torch.testing.assert_close(grad, expected)
    leaf = rows(8, 2, 16, torch.float32).requires_grad_()
    y = short_attention(leaf, 2, length=4, backend="triton")
    (grad,) = torch.autograd.grad(y.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="short_attention_backward"):
        grad.square().sum().backward()
    assert attention_backend(rows(100, 2, 16, torch.float16), 2, 50) == "triton"
    for given in ((rows(9, 2, 8, torch.float16), 2, 9), (rows(130, 2, 16, torch.float16), 2, 130)):
        assert attention_backend(*given) == "reference"
        assert short_attention(given[0], 2, length=given[2]).shape == (given[2], given[0].shape[1] // 3)
    assert attention_backend(rows(50, 2, 16, torch.float32), 2, 50) == "reference"
    for message, width, length, dtype in (
        ("got 130 tokens and heads of 16 in torch.float16, expected at most 128 tokens", 16, 130, torch.float16),
        ("heads of 8 in torch.float16, expected at most 128 tokens and heads of 16 to 128", 8, 9, torch.float16),
        ("expected at most 32 tokens and heads of 16 to 64 for backend 'triton'", 16, 50, torch.float32),
    ):
        with pytest.raises(BackendError, match=message):
            short_attention(rows(length, 2, width, dtype), 2, length=length, backend="triton")


def interpreted_model() -> None:
    """Encoders with the kernels against those without."""
    import numpy as np

    from scenarioclip_fast.model.encoders import Attention, Packing

    for packed, pooled in ((False, False), (True, False), (True, True)):
        torch.manual_seed(0)
        attention = Attention(32, 2)
        packing = Packing.of_lengths(np.array([3, 5, 2, 7]), torch.device("cpu")) if packed else None
        x = torch.randn(17, 32) if packed else torch.randn(6, 10, 32)
        results = []
        for backend in ("triton", "reference"):
            leaf = x.clone().requires_grad_()
            with use_backend(backend):
                y = attention(leaf, packing, pooled)
                y.square().sum().backward()
            gradients = [
                p.grad.clone() for p in attention.parameters() if p.grad is not None
            ]  # the block adds the last bias
            results.append([y.detach(), leaf.grad, *gradients])
            attention.zero_grad()
        torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)  # float32, another order


@pytest.mark.parametrize("part", ["lengths", "packed", "values", "model"])
def test_triton_in_the_interpreter(part: str) -> None:
    if problem := import_problem("triton"):
        pytest.skip(problem)
    code = f"import sys; sys.path.insert(0, sys.argv[1]); import test_short_attention as t; t.interpreted_{part}()"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, os.path.dirname(__file__)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [16, 32, 64, 80, 128])
def test_on_a_gpu(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for length in LENGTHS:
        for causal in (False, True):
            qkv = rows(3 * length, 2, width, dtype, "cuda")
            check(qkv, 2, [length] * 3, causal, packed=False)  # "auto": the kernels, where they take it
    for lengths in PACKED:
        check(rows(sum(lengths), 12, width, dtype, "cuda"), 12, lengths, True, packed=True)
    # Logits of some thousands, in low precision rounded on the way to the gradients of queries and keys.
    tolerance = 2**-11 if dtype == torch.float32 else 2**-5
    check(30 * rows(34, 2, width, dtype, "cuda"), 2, [17, 17], False, packed=False, tolerance=tolerance)


@pytest.mark.gpu
def test_compiled_on_a_gpu() -> None:
    torch.manual_seed(0)
    compiled = torch.compile(short_attention, fullgraph=True, dynamic=True)
    for n in (3, 5):
        qkv = rows(50 * n, 2, 64, torch.bfloat16, "cuda")
        leaves = [qkv.clone().requires_grad_() for _ in range(2)]
        for leaf, function in zip(leaves, (compiled, short_attention), strict=True):
            function(leaf, 2, length=50).float().square().sum().backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


def test_backward_of_the_reference() -> None:
    torch.manual_seed(0)
    for starts in (None, torch.tensor([0, 3, 3, 5, 6])):
        for causal in (False, True):
            leaf = rows(6, 2, 5, torch.float64).requires_grad_()
            y = reference.short_attention(leaf, 2, 3, starts, causal)
            upstream = torch.randn_like(y)
            (expected,) = torch.autograd.grad(y, leaf, upstream)
            torch.testing.assert_close(reference.backward(upstream, leaf.detach(), 2, 3, starts, causal), expected)


def test_cpu_is_another_name_of_the_reference() -> None:
    qkv = rows(12, 2, 8, torch.float32)
    outputs = [short_attention(qkv, 2, length=4, backend=backend) for backend in ("auto", "cpu", "reference")]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[1], outputs[2])
    with use_backend("cpu"):
        assert attention_backend(qkv, 2, 4) == "reference"


def test_opcheck() -> None:
    for sizes in ((3, None, False), (4, torch.tensor([0, 2, 6]), True)):
        leaf = rows(6, 2, 5, torch.float32).requires_grad_()
        torch.library.opcheck(_forward, (leaf, 2, *sizes, "reference"))
        torch.library.opcheck(_backward_op, (torch.randn(6, 10), leaf.detach(), 2, *sizes, "reference"))


@pytest.mark.parametrize("packed", [False, True])
def test_compiled(packed: bool) -> None:
    torch.manual_seed(0)
    compiled = torch.compile(short_attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (3, 5):
        lengths = list(range(2, 2 + n)) if packed else [4] * n
        starts = torch.tensor([0, *lengths]).cumsum(0)
        sizes = {"starts": starts, "longest": max(lengths)} if packed else {"length": 4}
        qkv = rows(sum(lengths), 2, 8, torch.float32)
        results = []
        for function in (compiled, short_attention):
            leaf = qkv.clone().requires_grad_()
            y = function(leaf, 2, causal=packed, **sizes)
            y.sin().sum().backward()
            results.append((y.detach(), leaf.grad))
        torch.testing.assert_close(*results)


def test_errors() -> None:
    qkv, starts = torch.randn(6, 24), torch.tensor([0, 2, 6])
    with pytest.raises(TypeError, match=r"qkv: got torch.int64, expected a float tensor"):
        short_attention(qkv.long(), 2, length=3)
    with pytest.raises(ValueError, match=r"qkv: got shape \[6, 20\], expected \[T, 3 W\] with W > 0"):
        short_attention(qkv[:, :20], 2, length=3)
    with pytest.raises(ValueError, match=r"heads: got 3, expected a divisor of W = 8"):
        short_attention(qkv, 3, length=3)
    with pytest.raises(ValueError, match=r"length: got 4, expected a divisor of T = 6"):
        short_attention(qkv, 2, length=4)
    for sizes, got in (
        ({}, "neither"),
        ({"length": 3, "longest": 3}, "length and longest"),
        ({"starts": starts}, "starts alone"),
        ({"starts": starts, "length": 3}, "length and starts"),
    ):
        with pytest.raises(ValueError, match=f"got {got}, expected length, or starts and longest"):
            short_attention(qkv, 2, **sizes)
    with pytest.raises(TypeError, match=r"starts: got torch.float32, expected a tensor of int32 or int64"):
        short_attention(qkv, 2, starts=starts.float(), longest=4)
    with pytest.raises(ValueError, match=r"starts: got shape \[1, 3\], expected \[n \+ 1\]"):
        short_attention(qkv, 2, starts=starts[None], longest=4)
    with pytest.raises(ValueError, match=r"starts: got a tensor on meta, expected cpu like qkv"):
        short_attention(qkv, 2, starts=starts.to("meta"), longest=4)
    with pytest.raises(ValueError, match=r"starts: got values from 0 to 5, expected ascending ones from 0 to T = 6"):
        short_attention(qkv, 2, starts=torch.tensor([0, 2, 5]), longest=4)
    with pytest.raises(ValueError, match=r"longest: got 3, expected at least 4, the longest of starts"):
        short_attention(qkv, 2, starts=starts, longest=3)
    with pytest.raises(ValueError, match=r"longest: got 0, expected the number of tokens of the longest sequence"):
        short_attention(qkv, 2, starts=starts, longest=0)
