"""The layers of a transformer block other than products, forward and backward, against PyTorch.

Quick-GELU, and a residual addition with the LayerNorm after it, as autocast runs them, without and with the bias of the
product before; on a GPU also attention, with the split of its rows, against PyTorch's fastest kernel for these lengths.
On a CPU short_attention is PyTorch's.

The rows are those of ViT-B/32: on a CPU 4 scenes in float32, on a GPU 128 scenes in bfloat16.

Run: make bench, or: pytest benchmarks/bench_layers.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scenarioclip_fast.benchmarks.timing import backend_for, counted, device_for, sized, timed
from torch import Tensor

from scenarioclip_fast.ops import add_layer_norm, quick_gelu, short_attention
from scenarioclip_fast.train.precision import attention_kernels

# op, and whether with the bias of the product before
OPS = [("quick_gelu", False), ("quick_gelu", True), ("add_layer_norm", False), ("add_layer_norm", True)]
CASES = [pytest.param(*op, "cpu") for op in OPS]
CASES += [pytest.param(*op, "cuda", marks=pytest.mark.gpu) for op in [*OPS, ("short_attention", False)]]
TOKENS, WIDTH, HEADS = 50, sized(768, 32), sized(12, 2)
VIEWS = {"cpu": sized(40, 4), "cuda": sized(1280, 4)}
Run = Callable[[list[Tensor]], tuple[Tensor, ...]]


def gelu_in_torch(given: list[Tensor]) -> tuple[Tensor, ...]:
    """The bias is one of the dtype of the product that adds it."""
    x, *bias = given
    if bias:
        x = x + bias[0].to(x.dtype)
    return (x * torch.sigmoid(1.702 * x),)


def norm_in_torch(given: list[Tensor]) -> tuple[Tensor, ...]:
    """The residual stream is float32, as under autocast, and the normalised rows are cast for the next product."""
    x, branch, weight, bias, *branch_bias = given
    if branch_bias:
        branch = branch + branch_bias[0].to(branch.dtype)
    total = x + branch
    return total, F.layer_norm(total, weight.shape, weight, bias).to(branch.dtype)


def attention_in_torch(given: list[Tensor]) -> tuple[Tensor, ...]:
    (qkv,) = given
    rows = qkv.view(-1, TOKENS, 3, HEADS, WIDTH // HEADS)
    q, k, v = (part.transpose(1, 2) for part in rows.unbind(2))
    with attention_kernels():
        return (F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, WIDTH),)


IN_TORCH = {"quick_gelu": gelu_in_torch, "add_layer_norm": norm_in_torch, "short_attention": attention_in_torch}
# Elements read and written, each tensor once, and operations, per element of the first tensor (both about).
BYTES_AND_OPERATIONS = {
    "quick_gelu": (5, 20),
    "add_layer_norm": (8, 25),
    "short_attention": (11 / 3, 14 * TOKENS / 3),  # seven products of each row with those of its view
}


def ours(op: str, device: str) -> Run:
    backend = backend_for("cpu" if device == "cpu" else "triton")
    if op == "quick_gelu":
        return lambda given: (quick_gelu(*given, backend=backend),)
    if op == "short_attention":
        return lambda given: (short_attention(given[0], HEADS, length=TOKENS, backend=backend),)
    return lambda given: add_layer_norm(*given[:4], branch_bias=given[4] if len(given) == 5 else None, backend=backend)


def inputs(op: str, form: str, device: str, with_bias: bool) -> list[Tensor]:
    where = device_for(device)
    low = torch.float32 if device == "cpu" else torch.bfloat16
    g = torch.Generator(where).manual_seed(0)
    shape = (VIEWS[device] * TOKENS, WIDTH)
    if op == "quick_gelu":
        x = torch.randn(shape[0], 4 * WIDTH, generator=g, device=where).to(low)
        return [x, torch.randn(4 * WIDTH, generator=g, device=where)] if with_bias else [x]
    if op == "short_attention":
        return [torch.randn(shape[0], 3 * WIDTH, generator=g, device=where).to(low)]
    x, branch = (torch.randn(shape, generator=g, device=where).to(low) for _ in range(2))
    weights = [torch.randn(WIDTH, generator=g, device=where) for _ in range(3 if with_bias else 2)]
    return [x if form == "ours" else x.float(), branch, *weights]


FORMS = ["ours", "torch, eager", "torch, compiled"]


@pytest.mark.parametrize(("op", "with_bias", "device"), CASES)
@pytest.mark.parametrize("form", FORMS)
def test_layer(benchmark: Any, form: str, op: str, with_bias: bool, device: str) -> None:
    if form == "torch, compiled" and (device == "cpu" or device_for(device) == "cpu"):
        pytest.skip("takes half a minute to compile")
    in_torch = IN_TORCH[op]
    run = ours(op, device) if form == "ours" else in_torch
    if form == "torch, compiled":
        run = torch.compile(run)
    leaves = [t.requires_grad_() for t in inputs(op, form, device, with_bias)]
    upstream = [torch.ones_like(y) for y in run(leaves)]

    def once() -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(leaves), leaves, upstream)

    expected = torch.autograd.grad(in_torch([t.double() for t in leaves]), leaves, [t.double() for t in upstream])
    # Relative to the largest gradient: bfloat16 keeps 8 bits, and its residual stream is rounded once more.
    tolerance = 1e-5 if device == "cpu" else 2e-2
    for got, reference in zip(once(), expected, strict=True):
        assert (got.double() - reference.double()).abs().max() <= tolerance * reference.double().abs().max()

    benchmark.group = f"{op}{' with a bias' if with_bias else ''}, forward + backward, {VIEWS[device]} views, {device}"
    elements, size = leaves[0].numel(), 4 if device == "cpu" else 2
    passes, operations = BYTES_AND_OPERATIONS[op]
    counted(
        benchmark,
        device,
        bytes=passes * size * elements,
        operations=operations * elements,
        precision="bfloat16" if op == "short_attention" else "float32",
    )
    timed(benchmark, once, device, rounds=20, warmup_rounds=3)
