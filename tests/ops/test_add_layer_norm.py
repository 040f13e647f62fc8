"""add_layer_norm and layer_norm against their reference."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from scenarioclip_fast.kernels.add_layer_norm import reference
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from scenarioclip_fast.dispatch import implementation, resolve, unavailable_reason
from scenarioclip_fast.ops import add_layer_norm, layer_norm
from scenarioclip_fast.ops.normalisation import _AddLayerNorm, _backward_op, _forward
from scenarioclip_fast.requirements import import_problem

EPS = 1e-5
# Units in the last place of each dtype: a result is rounded once, and its float32 arithmetic adds little to that.
UNIT = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-23, torch.float64: 2**-52}


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    x, branch = (torch.randn(shape, device=device).to(dtype) + 0.5 for _ in range(2))
    weight, bias = torch.randn(shape[-1], device=device) + 1, torch.randn(shape[-1], device=device)
    wide = torch.promote_types(dtype, torch.float32)
    return [x, branch, weight.to(wide), bias.to(wide)]


def check(
    given: list[Tensor],
    with_branch: bool = True,
    out: torch.dtype | None = None,
    backend: str = "auto",
    branch_bias: Tensor | None = None,
) -> None:
    """Compare both outputs and all gradients with the reference in float64, from the same rounded sum."""
    x, branch, weight, bias = given
    leaves = [t.detach().requires_grad_() for t in given]
    if with_branch:
        extra = None if branch_bias is None else branch_bias.detach().requires_grad_()
        total, normed = add_layer_norm(*leaves, branch_bias=extra, eps=EPS, dtype=out, backend=backend)
        exact_total = x.double() + branch.double() + (0 if branch_bias is None else branch_bias.double())
        # Three terms may cancel, which leaves the rounding of float32.
        atol = 0 if branch_bias is None else 16 * UNIT[torch.promote_types(x.dtype, torch.float32)]
        torch.testing.assert_close(total.double(), exact_total, rtol=UNIT[x.dtype], atol=atol)
    else:
        total, normed = leaves[0], layer_norm(leaves[0], *leaves[2:], eps=EPS, dtype=out, backend=backend)
    assert total.dtype == x.dtype and normed.dtype == (out or x.dtype)
    # Exact values for the sum that was returned.
    exact = [t.detach().double().requires_grad_() for t in (total, weight, bias)]
    _, expected = reference.add_layer_norm(exact[0], None, exact[1], exact[2], None, EPS, torch.float64)
    # 64: mean and variance cancel; a float32 sum of up to 4,099 terms.
    unit = max(UNIT[normed.dtype], 64 * UNIT[torch.promote_types(x.dtype, torch.float32)])
    torch.testing.assert_close(normed.double(), expected, rtol=unit, atol=8 * unit)

    upstream = [torch.randn_like(t) for t in (total, normed)]
    if with_branch:
        torch.autograd.backward([total, normed], upstream)
    else:
        normed.backward(upstream[1])
    expected.backward(upstream[1].double())
    assert exact[0].grad is not None
    dx = exact[0].grad + (upstream[0].double() if with_branch else 0)
    unit = max(UNIT[x.dtype], 64 * UNIT[torch.promote_types(x.dtype, torch.float32)])
    torch.testing.assert_close(leaves[0].grad.double(), dx, rtol=unit, atol=8 * unit)
    if with_branch:
        torch.testing.assert_close(leaves[1].grad, leaves[0].grad, rtol=0, atol=0)
    # Sums over the rows in float32. A row of equal values has no deviation but its rounding, times 1 / sqrt(eps) = 316.
    size = 1 + x[..., 0].numel()
    for leaf, reference_leaf in zip(leaves[2:], exact[1:], strict=True):
        tolerance = 8 * size * UNIT[leaf.dtype]
        atol = tolerance + 512 * UNIT[leaf.dtype]
        torch.testing.assert_close(leaf.grad.double(), reference_leaf.grad, rtol=tolerance, atol=atol)
    if with_branch and extra is not None:
        tolerance = 64 * size * max(UNIT[extra.dtype], UNIT[torch.promote_types(x.dtype, torch.float32)])
        name = str(x.dtype).removeprefix("torch.")
        if resolve("add_layer_norm", backend, x.device.type, dtype=name) == "reference":
            tolerance = max(tolerance, size * UNIT[x.dtype])  # autograd sums the rounded gradients
        assert extra.grad is not None and extra.grad.dtype == extra.dtype
        torch.testing.assert_close(extra.grad.double(), dx.flatten(0, -2).sum(0), rtol=tolerance, atol=8 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("with_branch", [True, False])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 7), (2, 5, 64), (130, 123), (5, 4099)])
def test_values_and_gradients(shape: tuple[int, ...], with_branch: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check(inputs(shape, dtype), with_branch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 7), (2, 5, 64), (130, 123), (5, 4099)])
@pytest.mark.parametrize("low", [False, True])
def test_a_bias_of_the_branch(low: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    given = inputs(shape, dtype)
    check(given, branch_bias=torch.randn(shape[-1]).to(dtype if low else given[-1].dtype))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_frozen_bias_needs_no_sum(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := unavailable_reason("add_layer_norm", backend, "cpu"):
        pytest.skip(reason)
    torch.manual_seed(0)
    x, branch, weight, bias = inputs((6, 5), torch.float32)
    module = implementation("add_layer_norm", backend)
    asked: list[int] = []

    def recorded(*arguments: Any, original: Any = module.backward) -> Any:
        asked.append(arguments[-1])
        return original(*arguments)

    monkeypatch.setattr(module, "backward", recorded)
    for trained in ((), (2,), (4,), (3, 4)):
        given = [t.detach().clone() for t in (x, branch, weight, bias, torch.randn(5))]
        for i in (0, 1, *trained):
            given[i].requires_grad_()
        for function in (_AddLayerNorm.apply, _forward):
            _, normed, *_ = function(*given, EPS, torch.float32, backend)
            gradients = torch.autograd.grad(normed.square().sum(), [t for t in given if t.requires_grad])
            assert len(gradients) == 2 + len(trained)
    assert asked == [0, 0, 2, 2, 3, 3, 3, 3]


@pytest.mark.parametrize("with_branch", [True, False])
def test_float32_rows_from_bfloat16(with_branch: bool) -> None:
    torch.manual_seed(0)
    check(inputs((33, 48), torch.bfloat16), with_branch, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 8), (2500, 768), (300, 123), (40, 4096)])
def test_values_and_gradients_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for with_branch in (True, False):
        check(inputs(shape, dtype, "cuda"), with_branch, backend="triton")
    check(inputs(shape, dtype, "cuda"), True, torch.float32, backend="triton")
    check(inputs(shape, dtype, "cuda"), backend="triton", branch_bias=torch.randn(shape[-1], device="cuda"))


def test_only_one_output_is_used() -> None:
    torch.manual_seed(0)
    for use in (0, 1):
        given = [t.requires_grad_() for t in (*inputs((6, 5), torch.float32), torch.randn(5))]
        exact = [t.detach().double().requires_grad_() for t in given]
        add_layer_norm(*given[:4], branch_bias=given[4])[use].square().sum().backward()
        reference.add_layer_norm(*exact, 1e-5, torch.float64)[use].square().sum().backward()
        for leaf, expected in zip(given, exact, strict=True):
            if expected.grad is None:
                assert leaf.grad is None
            else:
                # As above: float32, with cancellation.
                torch.testing.assert_close(leaf.grad.double(), expected.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("use", [0, 1])
def test_activation_checkpointing(use: int) -> None:
    """It lets a backward pass read saved tensors only once."""
    torch.manual_seed(0)
    given = [*inputs((6, 5), torch.float32), torch.randn(5)]
    results = []
    for form in (lambda function, *given: function(*given), partial(checkpoint, use_reentrant=False)):
        leaves = [t.clone().requires_grad_() for t in given]
        form(lambda *given: add_layer_norm(*given[:4], branch_bias=given[4])[use], *leaves).square().sum().backward()
        results.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_frozen_weights_and_a_non_contiguous_input() -> None:
    torch.manual_seed(0)
    x, branch, weight, bias = inputs((12, 6), torch.float32)
    x, branch = x[:, ::2].requires_grad_(), branch[:, ::2]
    _, normed = add_layer_norm(x, branch, weight[:3], bias[:3])
    _, expected = reference.add_layer_norm(x.detach(), branch, weight[:3], bias[:3], None, 1e-5, torch.float32)
    torch.testing.assert_close(normed, expected)
    normed.sum().backward()
    assert x.grad is not None


def test_partial_sums_do_not_depend_on_the_threads() -> None:
    torch.manual_seed(0)
    given = [*inputs((1000, 32), torch.float32), torch.randn(32)]
    results = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            leaves = [t.detach().requires_grad_() for t in given]
            add_layer_norm(*leaves[:4], branch_bias=leaves[4])[1].square().sum().backward()
            results.append([leaf.grad for leaf in leaves])
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.skipif(unavailable_reason("add_layer_norm", "cpu", "cpu") is not None, reason="not built")
def test_a_second_derivative_is_an_error_and_not_a_wrong_result() -> None:
    x, weight, bias = torch.randn(3, 8, requires_grad=True), torch.ones(8), torch.zeros(8)
    (grad,) = torch.autograd.grad(
        layer_norm(x, weight, bias, backend="cpu").square().sum(), x, create_graph=True, retain_graph=True
    )
    expected = torch.nn.functional.layer_norm(x, (8,)).square().sum()
    torch.testing.assert_close(grad, torch.autograd.grad(expected, x)[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="add_layer_norm_backward"):
        grad.square().sum().backward()


@pytest.mark.parametrize("sums", [0, 2, 3])
def test_opcheck(sums: int) -> None:
    x, branch, weight, bias = (t.requires_grad_() for t in inputs((5, 4), torch.float32))
    added = (branch if sums else None, weight, bias, torch.randn(4, requires_grad=True) if sums == 3 else None)
    torch.library.opcheck(_forward, (x, *added, EPS, torch.float32, "reference"))
    rows = [t.detach() for t in (x, branch, x)]
    statistics = torch.rand(2, 5) + 1
    torch.library.opcheck(_backward_op, (*rows, weight.detach(), statistics, sums, "reference"))


@pytest.mark.parametrize("backend", ["auto", "reference", "cpu"])
def test_compiled(backend: str) -> None:
    if backend == "cpu" and (reason := unavailable_reason("add_layer_norm", "cpu", "cpu")):
        pytest.skip(reason)
    torch.manual_seed(0)
    compiled = torch.compile(add_layer_norm, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (3, 5):
        given = [*inputs((n, 2, 8), torch.float32), torch.randn(8)]
        leaves = [[t.clone().requires_grad_() for t in given] for _ in range(2)]
        for function, own in ((compiled, leaves[0]), (add_layer_norm, leaves[1])):
            total, normed = function(*own[:4], branch_bias=own[4], backend=backend)
            (total.sin() + normed.cos()).sum().backward()
        for one, other in zip(*leaves, strict=True):
            torch.testing.assert_close(one.grad, other.grad)


def test_errors() -> None:
    x, branch, weight, bias = inputs((4, 3), torch.float32)
    with pytest.raises(ValueError, match=r"branch: got torch.float32 \[4, 2\], expected torch.float32 \[4, 3\] like x"):
        add_layer_norm(x, branch[:, :2], weight, bias)
    with pytest.raises(ValueError, match=r"bias: got shape \[2\], expected \[3\], the width of x"):
        layer_norm(x, weight, bias[:2])
    with pytest.raises(ValueError, match=r"branch_bias: got shape \[2\], expected \[3\], the width of x"):
        add_layer_norm(x, branch, weight, bias, branch_bias=bias[:2])
    with pytest.raises(TypeError, match=r"x: got torch.int64, expected a float tensor"):
        layer_norm(x.long(), weight, bias)
    with pytest.raises(ValueError, match=r"x: got shape \[4, 0\], expected \[\*, W\] with W > 0"):
        layer_norm(x[:, :0], weight[:0], bias[:0])


INTERPRETED = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import test_add_layer_norm as t
torch.manual_seed(0)
for shape in ((1, 1), (5, 7), (21, 48), (3, 1030)):
    for with_branch in (True, False):
        for dtype in (torch.float32, torch.float16):
            t.check(t.inputs(shape, dtype), with_branch, backend="triton")
    for dtype in (torch.float32, torch.float16):
        t.check(t.inputs(shape, dtype), backend="triton", branch_bias=torch.randn(shape[-1]))
t.check(t.inputs((9, 16), torch.float16), True, torch.float32, backend="triton")
"""


def test_triton_in_the_interpreter() -> None:
    if problem := import_problem("triton"):
        pytest.skip(problem)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", INTERPRETED, os.path.dirname(__file__)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
