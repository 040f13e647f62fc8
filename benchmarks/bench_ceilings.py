"""The ceilings of the roofline, measured in the same run: bytes copied per second, and operations per second
(multiplications plus additions) of a square matrix product.

On a CPU, measured on one thread and on all threads, because the views are measured on one core.

Run: make bench, or: pytest benchmarks/bench_ceilings.py
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from scenarioclip_fast.benchmarks.timing import counted, device_for, sized, timed

THREADS = sorted({1, torch.get_num_threads()})
COPY = {"cpu": 1 << 28, "cuda": sized(1 << 30, 1 << 22)}  # bytes, far more than the caches hold
SIDE = {"cpu": 2048, "cuda": sized(8192, 256)}
CASES = [
    *(pytest.param("cpu", n, id=f"cpu, {n} thread{'s' * (n > 1)}") for n in THREADS),
    pytest.param("cuda", 0, id="cuda", marks=pytest.mark.gpu),
]
PRECISIONS = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}


@contextmanager
def settings(threads: int, precision: str) -> Iterator[None]:
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(threads or before[0])
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])


@pytest.mark.parametrize(("device", "threads"), CASES)
def test_copy(benchmark: Any, device: str, threads: int) -> None:
    source = torch.ones(COPY[device], dtype=torch.uint8, device=device_for(device))
    target = torch.empty_like(source)
    with settings(threads, "float32"):
        counted(benchmark, device, bytes=2 * source.numel(), operations=0)
        benchmark.group = f"ceilings, {device}"
        benchmark.extra_info.update(ceiling="copy", form=name("copy", device, threads))
        timed(benchmark, lambda: target.copy_(source), device, rounds=10, warmup_rounds=2)
    assert torch.equal(target[:: 1 << 20], source[:: 1 << 20])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("device", "threads"), CASES)
def test_product(benchmark: Any, device: str, threads: int, precision: str) -> None:
    if device == "cpu" and precision == "tf32":
        pytest.skip("TF32 exists on GPUs only")
    side = SIDE[device]
    a, b = (torch.randn(side, side, device=device_for(device)).to(PRECISIONS[precision]) for _ in range(2))
    out = torch.empty_like(a)
    with settings(threads, precision):
        counted(
            benchmark, device, bytes=3 * out.numel() * out.element_size(), operations=2 * side**3, precision=precision
        )
        benchmark.group = f"ceilings, {device}"
        benchmark.extra_info.update(ceiling="product", form=name(f"product, {precision}", device, threads))
        timed(benchmark, lambda: torch.mm(a, b, out=out), device, rounds=10, warmup_rounds=2)


def name(what: str, device: str, threads: int) -> str:
    return what if device == "cuda" else f"{what}, {threads} thread{'s' * (threads > 1)}"
