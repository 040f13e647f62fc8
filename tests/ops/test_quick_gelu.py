"""quick_gelu against its reference."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from scenarioclip_fast.kernels.quick_gelu import reference
from torch import Tensor

from scenarioclip_fast.dispatch import unavailable_reason
from scenarioclip_fast.ops import quick_gelu
from scenarioclip_fast.ops.activation import _backward_op, _forward
from scenarioclip_fast.requirements import import_problem

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Results are rounded once, to half an ulp: 2^-9 and 2^-12 of themselves. Float32 is a few ulp from exact.
RTOL = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 4e-6, torch.float64: 1e-12}


def check(x: Tensor, backend: str = "auto") -> None:
    """Compare value and gradient with the reference in float64 on the same inputs."""
    leaf, exact = x.detach().requires_grad_(), x.detach().double().requires_grad_()
    upstream = torch.randn(x.shape, device=x.device).to(x.dtype)
    y, expected = quick_gelu(leaf, backend=backend), reference.quick_gelu(exact)
    y.backward(upstream)
    expected.backward(upstream.double())
    assert y.dtype == x.dtype and leaf.grad is not None and leaf.grad.dtype == x.dtype
    # 1e-6: gradients cancel near their zero at -0.75.
    torch.testing.assert_close(y.double(), expected, rtol=RTOL[x.dtype], atol=1e-6, equal_nan=True)
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=RTOL[x.dtype], atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (7, 1, 123), (2, 4099)])
def test_value_and_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check((3 * torch.randn(shape)).to(dtype))


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


def test_opcheck() -> None:
    x = torch.randn(5, 3, requires_grad=True)
    torch.library.opcheck(_forward, (x, "reference"))
    torch.library.opcheck(_backward_op, (torch.randn(5, 3), x.detach(), "reference"))


@pytest.mark.parametrize("backend", ["auto", "reference", "cpu"])
def test_compiled(backend: str) -> None:
    if backend == "cpu" and (reason := unavailable_reason("quick_gelu", "cpu", "cpu")):
        pytest.skip(reason)
    compiled = torch.compile(
        lambda x: quick_gelu(x, backend=backend), backend="aot_eager", fullgraph=True, dynamic=True
    )
    for n in (3, 5):
        x = torch.randn(n, 4)
        one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = compiled(one), quick_gelu(other)
        y.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(one.grad, other.grad)


def test_integers_are_rejected() -> None:
    with pytest.raises(TypeError, match=r"x: got torch.int64, expected a float tensor"):
        quick_gelu(torch.arange(3))


INTERPRETED = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import test_quick_gelu as t
torch.manual_seed(0)
for size in (1, 5, 1024, 2500):
    for dtype in (torch.float32, torch.float16):
        t.check((3 * torch.randn(size)).to(dtype), "triton")
"""


def test_triton_in_the_interpreter() -> None:
    if problem := import_problem("triton"):
        pytest.skip(problem)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", INTERPRETED, os.path.dirname(__file__)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
