"""What the benchmarks share: timing by device events with a cold L2 on a GPU, and the bytes and operations of a call.

The fields of `extra_info` that reports read are those of scenarioclip_fast/bench/record.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def timed(benchmark: Any, run: Callable[[], Any], device: str, *, rounds: int, warmup_rounds: int = 1) -> None:
    """Samples `run`. On a GPU by events around each call, after writing twice the L2's size, so that nothing of the
    inputs is in it; the host's clock around the synchronised call stands in the usual place.
    """
    if device == "cpu":
        benchmark.pedantic(run, rounds=rounds, warmup_rounds=warmup_rounds)
        return
    flush = torch.empty(2 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.uint8, device=device)
    seconds: list[float] = []

    def cold() -> None:
        flush.zero_()
        torch.cuda.synchronize()

    def once() -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)

    benchmark.pedantic(once, setup=cold, rounds=rounds, warmup_rounds=warmup_rounds)
    benchmark.extra_info["device_seconds"] = seconds[-rounds:]


def counted(
    benchmark: Any,
    device: str,
    *,
    bytes: float,  # that one sample must read and write, each tensor once
    operations: float,  # additions and multiplications of one sample
    precision: str = "float32",
) -> None:
    """Puts a kernel into the roofline."""
    benchmark.extra_info.update(bytes=bytes, operations=operations, precision=precision, device=device)
    if device == "cpu":
        benchmark.extra_info["threads"] = torch.get_num_threads()
