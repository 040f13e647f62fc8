"""contrastive_loss against eager and compiled PyTorch, and against four bare matrix products of the same size.

Run: make bench, or: pytest benchmarks/bench_contrastive.py --benchmark-only
More sizes: SCENARIOCLIP_FAST_BENCH_ROWS=4096,16384 pytest benchmarks/bench_contrastive.py --benchmark-only

Beside each time stand the errors of loss and gradients against float64 on the same inputs, and the peak of memory above
inputs and their gradients. Results that are wrong are not timed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scenarioclip_fast.kernels.contrastive import contrastive_cpu, reference
from torch import Tensor

from scenarioclip_fast.dispatch import why_not
from scenarioclip_fast.ops import contrastive_loss, multilevel_contrastive_loss

WIDTH = 512
SCALE = 1 / 0.07
LEVELS = (128, 700, 350)  # global, object and relation rows of a batch of 128 scenes
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ROWS = {"cpu": (1024,), "cuda": (8192, 32768)}
# Relative error of a gradient above which a result counts as wrong: float32 products, and bfloat16 logits at scale 14.
WRONG = {torch.float32: 1e-4, torch.bfloat16: 0.1}

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def open_clip(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    return reference.open_clip_loss(F.normalize(x, dim=1), F.normalize(y, dim=1), s.to(x.dtype))


def transposed(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """The reference implementation's form: one product, and cross entropy over it and over its transpose."""
    logits = s.to(x.dtype) * F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
    target = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def ours(backend: str) -> Loss:
    return lambda x, y, s: contrastive_loss(x, y, s, backend=backend)


WAYS: dict[str, Loss] = {
    "open_clip": open_clip,
    "open_clip compiled": torch.compile(open_clip, dynamic=False),
    "logits.T": transposed,
    "logits.T compiled": torch.compile(transposed, dynamic=False),
    **{f"ours: {backend}": ours(backend) for backend in ("reference", "cpu", "triton")},
}


def sizes(device: str) -> Sequence[int]:
    asked = os.environ.get("SCENARIOCLIP_FAST_BENCH_ROWS")
    return [int(n) for n in asked.split(",")] if asked else ROWS[device]


CASES = [
    pytest.param(device, n, marks=[pytest.mark.gpu] if device == "cuda" else [], id=f"{device}-{n}")
    for device in ROWS
    for n in sizes(device)
]


def features(rows: int, device: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Matching pairs with noise, as in training; bfloat16 on a GPU."""
    g = torch.Generator().manual_seed(seed)
    text = torch.randn(rows, WIDTH, generator=g)
    image = text + 2 * torch.randn(rows, WIDTH, generator=g)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    leaves = (image.to(device, dtype), text.to(device, dtype), torch.tensor(SCALE, device=device))
    return tuple(t.requires_grad_() for t in leaves)  # type: ignore[return-value]


def exact(leaves: Sequence[Tensor]) -> list[Tensor]:
    """Loss and gradients in float64, tile by tile: the N x N form in float64 would not fit at the larger sizes."""
    image, text, scale = (t.detach().double() for t in leaves)
    row, column, positive = contrastive_cpu.forward(image, text, scale)
    share = torch.full_like(row, 0.5 / len(row))
    grads = contrastive_cpu.backward(image, text, scale, None, None, row, column, share, share, -2 * share)
    return [((row + column) / 2 - positive).mean(), *grads]


def checked(name: str, found: Sequence[Tensor], wanted: Sequence[Tensor], dtype: torch.dtype) -> dict[str, float]:
    errors = {}
    for part, f, w in zip(("loss", "d image", "d text", "d scale"), found, wanted, strict=True):
        errors[f"error of {part}"] = ((f.double() - w).norm() / w.norm()).item()
        assert errors[f"error of {part}"] < WRONG[dtype], f"{name}: {part} is off by {errors[f'error of {part}']:.1e}"
    return errors


def peak_memory(run: Callable[[], Any], device: str) -> float | None:
    """MiB above what was held before, at the highest point; None where the system does not tell."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    except OSError:
        return None
    status = Path("/proc/self/status")
    before = int(re.findall(r"VmRSS:\s+(\d+)", status.read_text())[0])
    run()
    return (int(re.findall(r"VmHWM:\s+(\d+)", status.read_text())[0]) - before) / 2**10


def skip_without(way: str, device: str) -> None:
    if way.startswith("ours") and (reason := why_not("contrastive_loss", way.removeprefix("ours: "), device)):
        pytest.skip(reason)


def timed(benchmark: Any, run: Callable[[], Any], device: str) -> None:
    def waited() -> None:
        run()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(waited, rounds=20 if device == "cuda" else 5, warmup_rounds=2)


@pytest.mark.parametrize("phase", ["forward", "forward + backward"])
@pytest.mark.parametrize(("device", "rows"), CASES)
@pytest.mark.parametrize("way", WAYS)
def test_rows(benchmark: Any, way: str, device: str, rows: int, phase: str) -> None:
    skip_without(way, device)
    leaves = features(rows, device)

    def both() -> list[Tensor]:
        loss = WAYS[way](*leaves)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    benchmark.extra_info.update(checked(way, both(), exact(leaves), leaves[0].dtype))
    run = both if phase != "forward" else lambda: WAYS[way](*leaves)
    peak = peak_memory(run, device)
    if peak is not None:
        gradients = sum(t.nbytes for t in leaves) / 2**20 if phase != "forward" else 0.0
        benchmark.extra_info["MiB above inputs and gradients"] = round(peak - gradients, 1)
    benchmark.group = f"contrastive, {phase}, {rows} x {rows} x {WIDTH}, {device}"
    timed(benchmark, run, device)


@pytest.mark.parametrize(("device", "rows"), CASES)
def test_four_products(benchmark: Any, device: str, rows: int) -> None:
    """The floor without N x N storage: one product forward, three backward."""
    x, y, _ = (t.detach() for t in features(rows, device))
    out = x.new_empty(rows, min(rows, 16384))

    def run() -> None:
        for part in y.split(out.shape[1]):
            for _ in range(4):
                torch.mm(x, part.T, out=out[:, : len(part)])

    benchmark.group = f"contrastive, forward + backward, {rows} x {rows} x {WIDTH}, {device}"
    timed(benchmark, run, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", [*(w for w in WAYS if "open_clip" not in w)])
def test_levels(benchmark: Any, way: str, device: str) -> None:
    """The three levels of one batch: where the launches are the cost."""
    skip_without(way, device)
    levels = [features(rows, device, seed) for seed, rows in enumerate(LEVELS)]
    leaves = [leaf for level in zip(*levels, strict=True) for leaf in level]

    def loss() -> Tensor:
        if not way.startswith("ours"):
            return torch.stack([WAYS[way](*level) for level in levels])
        images, texts, scales = ([level[k] for level in levels] for k in range(3))
        return multilevel_contrastive_loss(images, texts, scales, backend=way.removeprefix("ours: "))

    def both() -> list[Tensor]:
        value = loss()
        return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]

    found = both()
    for k, level in enumerate(levels):
        checked(way, [found[0][k], *found[1 + k :: len(levels)]], exact(level), level[0].dtype)
    benchmark.group = f"contrastive, forward + backward, levels of {LEVELS} rows, {device}"
    timed(benchmark, both, device)
