"""quick_gelu against its reference."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from scenarioclip_fast.kernels.quick_gelu import reference
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from scenarioclip_fast.dispatch import implementation, unavailable_reason
from scenarioclip_fast.ops import quick_gelu
from scenarioclip_fast.ops.activation import _backward_op, _forward, _QuickGelu
from scenarioclip_fast.requirements import import_problem

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Results are rounded once, to half an ulp: 2^-9 and 2^-12 of themselves. Float32 is a few ulp from exact.
RTOL = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 4e-6, torch.float64: 1e-12}


def check(x: Tensor, backend: str = "auto", bias: Tensor | None = None) -> None:
    """Compare value and gradients with the reference in float64 on the same inputs."""
    leaf, exact = x.detach().requires_grad_(), x.detach().double().requires_grad_()
    leaf_bias = None if bias is None else bias.detach().requires_grad_()
    exact_bias = None if bias is None else bias.detach().double().requires_grad_()
    upstream = torch.randn(x.shape, device=x.device).to(x.dtype)
    y, expected = quick_gelu(leaf, leaf_bias, backend=backend), reference.quick_gelu(exact, exact_bias)
    y.backward(upstream)
    expected.backward(upstream.double())
    assert y.dtype == x.dtype and leaf.grad is not None and leaf.grad.dtype == x.dtype
    # 1e-6: gradients cancel near their zero at -0.75.
    torch.testing.assert_close(y.double(), expected, rtol=RTOL[x.dtype], atol=1e-6, equal_nan=True)
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=RTOL[x.dtype], atol=1e-6, equal_nan=True)
    if leaf_bias is not None and exact_bias is not None:
        assert leaf_bias.grad is not None and leaf_bias.grad.dtype == leaf_bias.dtype
        # Summed in float32 (float64 for float64) over the rows, whose gradients are of order 1, and rounded once.
        unit = RTOL[torch.promote_types(x.dtype, torch.float32)] * (1 + x[..., 0].numel()) ** 0.5
        rtol = max(unit, RTOL[leaf_bias.dtype])
        torch.testing.assert_close(leaf_bias.grad.double(), exact_bias.grad, rtol=rtol, atol=4 * unit)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (7, 1, 123), (2, 4099)])
def test_value_and_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check((3 * torch.randn(shape)).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 3), (1,), (3, 5), (7, 1, 123), (130, 64), (700, 9), (2, 4099)])
@pytest.mark.parametrize("low", [False, True])
def test_a_bias(low: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    bias = torch.randn(shape[-1]).to(dtype if low else torch.promote_types(dtype, torch.float32))
    check((3 * torch.randn(shape)).to(dtype), bias=bias)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_frozen_bias_needs_no_sum(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := unavailable_reason("quick_gelu", backend, "cpu"):
        pytest.skip(reason)
    module = implementation("quick_gelu", backend)
    asked: list[bool] = []

    def recorded(*arguments: Any, original: Any = module.backward) -> Any:
        asked.append(arguments[-1])
        return original(*arguments)

    monkeypatch.setattr(module, "backward", recorded)
    torch.manual_seed(0)
    x = torch.randn(6, 5, requires_grad=True)
    for trained in (False, True):
        bias = torch.randn(5, requires_grad=trained)
        for function in (_QuickGelu.apply, _forward):
            leaves = [x, bias][: 1 + trained]
            gradients = torch.autograd.grad(function(x, bias, backend).sum(), leaves)
            # As above: float32.
            torch.testing.assert_close(gradients, torch.autograd.grad(reference.quick_gelu(x, bias).sum(), leaves))
    assert asked == [False, False, True, True]


def test_sums_do_not_depend_on_the_threads() -> None:
    torch.manual_seed(0)
    x, results = torch.randn(1000, 32), []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            leaves = [x.clone().requires_grad_(), torch.ones(32, requires_grad=True)]
            quick_gelu(*leaves).square().sum().backward()
            results.append([leaf.grad for leaf in leaves])
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_activation_checkpointing() -> None:
    """It lets a backward pass read saved tensors only once."""
    torch.manual_seed(0)
    given = [torch.randn(6, 5), torch.randn(5)]
    results = []
    for form in (lambda function, *given: function(*given), partial(checkpoint, use_reentrant=False)):
        leaves = [t.clone().requires_grad_() for t in given]
        form(quick_gelu, *leaves).square().sum().backward()
        results.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 8), (2500, 3072), (300, 123), (40, 4096)])
def test_a_bias_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check((3 * torch.randn(shape, device="cuda")).to(dtype), "triton", torch.randn(shape[-1], device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 1023, 1 << 20])
def test_value_and_gradient_on_a_gpu(size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check((3 * torch.randn(size, device="cuda")).to(dtype), "triton")


def test_large_values_and_nan() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        check(torch.tensor([-1e30, -300.0, -88.0, -50.0, 0.0, 50.0, 88.0, 300.0, 1e30, float("nan")]).to(dtype))


def test_non_contiguous_input() -> None:
    torch.manual_seed(0)
    check(torch.randn(8, 6)[:, ::2].T)


@pytest.mark.parametrize("grad_layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_channels_last_images_stay_so(backend: str, grad_layout: torch.memory_format) -> None:
    """A copy to the other layout would cost more than the activation."""
    if reason := unavailable_reason("quick_gelu", backend, "cpu"):
        pytest.skip(reason)
    torch.manual_seed(0)
    x, grad = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5).to(memory_format=grad_layout)
    leaf = x.to(memory_format=torch.channels_last).requires_grad_()
    y = quick_gelu(leaf, backend=backend)
    (dx,) = torch.autograd.grad(y, leaf, grad)
    flat = x.flatten().requires_grad_()
    expected = quick_gelu(flat, backend=backend)
    (expected_dx,) = torch.autograd.grad(expected, flat, grad.flatten())
    # torch's vectorised exponential and its scalar one, for the last elements, differ in the last bit.
    torch.testing.assert_close(y, expected.view_as(x), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(dx, expected_dx.view_as(x), rtol=1e-6, atol=1e-7)
    assert y.is_contiguous(memory_format=torch.channels_last)
    if backend == "cpu":
        assert dx.is_contiguous(memory_format=torch.channels_last)


def test_opcheck_of_channels_last_images() -> None:
    x = torch.randn(2, 4, 3, 5).to(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(_forward, (x, None, "reference"))
    torch.library.opcheck(_backward_op, (torch.randn(2, 4, 3, 5), x.detach(), None, False, "reference"))


@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(with_bias: bool) -> None:
    x = torch.randn(5, 3, requires_grad=True)
    bias = torch.randn(3, requires_grad=True) if with_bias else None
    torch.library.opcheck(_forward, (x, bias, "reference"))
    given = (torch.randn(5, 3), x.detach(), None if bias is None else bias.detach())
    torch.library.opcheck(_backward_op, (*given, with_bias, "reference"))


@pytest.mark.parametrize("backend", ["auto", "reference", "cpu"])
def test_compiled(backend: str) -> None:
    if backend == "cpu" and (reason := unavailable_reason("quick_gelu", "cpu", "cpu")):
        pytest.skip(reason)
    compiled = torch.compile(
        lambda *given: quick_gelu(*given, backend=backend), backend="aot_eager", fullgraph=True, dynamic=True
    )
    for n in (3, 5):
        for given in ([torch.randn(n, 4)], [torch.randn(n, 4), torch.randn(4)]):
            one, other = ([t.clone().requires_grad_() for t in given] for _ in range(2))
            y, expected = compiled(*one), quick_gelu(*other)
            y.sum().backward()
            expected.sum().backward()
            torch.testing.assert_close(y, expected)
            torch.testing.assert_close([t.grad for t in one], [t.grad for t in other])


@pytest.mark.skipif(unavailable_reason("quick_gelu", "cpu", "cpu") is not None, reason="not built")
def test_a_second_derivative_is_an_error_and_not_a_wrong_result() -> None:
    x = torch.randn(8, requires_grad=True)
    (grad,) = torch.autograd.grad(quick_gelu(x, backend="cpu").sum(), x, create_graph=True)
    torch.testing.assert_close(grad, torch.autograd.grad(reference.quick_gelu(x).sum(), x)[0])
    with pytest.raises(RuntimeError, match="quick_gelu_backward"):
        grad.square().sum().backward()


def test_integers_are_rejected() -> None:
    with pytest.raises(TypeError, match=r"x: got torch.int64, expected a float tensor"):
        quick_gelu(torch.arange(3))


def test_errors_of_the_bias() -> None:
    with pytest.raises(ValueError, match=r"bias: got shape \[2\], expected \[3\], the last dimension of x"):
        quick_gelu(torch.ones(4, 3), torch.ones(2))
    with pytest.raises(TypeError, match=r"bias: got torch.int64, expected a float tensor"):
        quick_gelu(torch.ones(4, 3), torch.arange(3))


INTERPRETED = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import test_quick_gelu as t
torch.manual_seed(0)
for size in (1, 5, 1024, 2500):
    for dtype in (torch.float32, torch.float16):
        t.check((3 * torch.randn(size)).to(dtype), "triton")
for shape in ((1, 1), (5, 7), (21, 48), (3, 1030), (2, 3, 512)):
    for dtype in (torch.float32, torch.float16):
        t.check((3 * torch.randn(shape)).to(dtype), "triton", torch.randn(shape[-1]))
"""


def test_triton_in_the_interpreter() -> None:
    if problem := import_problem("triton"):
        pytest.skip(problem)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", INTERPRETED, os.path.dirname(__file__)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
