"""Benchmark helpers: timing by device events with a cold L2, rehearsal on a CPU, bytes and operations of a call.

The fields of `extra_info` that reports use are listed in scenarioclip_fast/bench/record.py.

With SCENARIOCLIP_FAST_REHEARSAL=1 (`make gpu-rehearse`), the GPU benchmarks run on the CPU at toy sizes, which covers
everything but the device: `device_for` maps "cuda" to "cpu", `sized` selects the toy size, `backend_for` the CPU
backend. With SCENARIOCLIP_FAST_BENCH_WARM=1, each benchmark takes one sample, to fill the compilers' caches.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

REHEARSAL = os.environ.get("SCENARIOCLIP_FAST_REHEARSAL") == "1"
WARM = os.environ.get("SCENARIOCLIP_FAST_BENCH_WARM") == "1"
# Above this host time per call, launches cannot be queued ahead; samples then include the host time.
LONGEST_SLEEP_S = 0.05

T = TypeVar("T")


def device_for(device: str) -> str:
    """The device of a case's tensors: the CPU in a rehearsal."""
    return "cpu" if REHEARSAL else device


def on_gpu(device: str) -> bool:
    """Whether a case runs on a real GPU, so that torch.cuda may be used."""
    return device_for(device) == "cuda"


def sized(full: T, toy: T) -> T:
    """`full`, or `toy` in a rehearsal."""
    return toy if REHEARSAL else full


def backend_for(backend: str) -> str:
    """The backend that a case uses: "cpu" in place of GPU backends in a rehearsal."""
    return "cpu" if REHEARSAL and backend in ("triton", "cuda") else backend


def synchronize(device: str) -> None:
    if on_gpu(device):
        torch.cuda.synchronize()


def timed(benchmark: Any, run: Callable[[], Any], device: str, *, rounds: int, warmup_rounds: int = 1) -> None:
    """Time calls of `run`.

    On a GPU the samples are device times with a cold L2. Launches are queued while the device sleeps, so host time is
    excluded; `extra_info["as launched, ms"]` is the median on an idle device, including host time.
    """
    if WARM:
        rounds, warmup_rounds = 1, 0
    if not on_gpu(device):
        benchmark.pedantic(run, rounds=rounds, warmup_rounds=warmup_rounds)
        return
    timer = DeviceTimer(run)
    seconds: list[float] = []
    hidden = {"hide_host": True}
    for _ in range(warmup_rounds):
        run()
    timer.measure_host()
    benchmark.pedantic(lambda **options: seconds.append(timer.sample(**options)), kwargs=hidden, rounds=rounds)
    benchmark.extra_info["device_seconds"] = seconds
    launched = [timer.sample(hide_host=False) for _ in range(min(rounds, 5))]
    benchmark.extra_info["as launched, ms"] = round(1e3 * statistics.median(launched), 4)


class DeviceTimer:
    """Times calls of `run` by device events; writes twice the L2 size before each so that no input is cached."""

    def __init__(self, run: Callable[[], Any]) -> None:
        properties = torch.cuda.get_device_properties(0)
        self.run = run
        self.flush = torch.empty(2 * properties.L2_cache_size, dtype=torch.uint8, device="cuda")
        self.clock = 1e3 * getattr(properties, "clock_rate", 2e6)  # Hz; the attribute is in kHz
        self.host_s = 0.0

    def measure_host(self, calls: int = 3) -> None:
        """Measure the host time of a call, which `sample` can hide."""
        times = []
        for _ in range(calls):
            torch.cuda.synchronize()
            start = time.perf_counter()
            self.run()
            times.append(time.perf_counter() - start)
            if times[-1] >= LONGEST_SLEEP_S:  # too long to hide
                break
        torch.cuda.synchronize()
        self.host_s = statistics.median(times)

    def sample(self, hide_host: bool) -> float:
        """Seconds of one call."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        if hide_host and self.host_s < LONGEST_SLEEP_S:
            # 1.5 x, since the host time varies; oversleeping does not affect the measurement.
            torch.cuda._sleep(int((1.5 * self.host_s + 1e-4) * self.clock))
        else:
            torch.cuda.synchronize()
        start.record()
        self.run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def median(self, rounds: int, warmup_rounds: int = 2) -> float:
        """Median seconds of `rounds` calls, excluding host time."""
        for _ in range(warmup_rounds):
            self.run()
        self.measure_host(1)
        return statistics.median(self.sample(hide_host=True) for _ in range(rounds))


def median_seconds(run: Callable[[], Any], device: str, rounds: int = 10, warmup_rounds: int = 2) -> float:
    """Median seconds of a call, without pytest: device time on a GPU, wall time on a CPU."""
    if on_gpu(device):
        return DeviceTimer(run).median(rounds, warmup_rounds)
    for _ in range(warmup_rounds):
        run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def counted(
    benchmark: Any,
    device: str,
    *,
    bytes: float,  # read and written per sample, each tensor once
    operations: float,  # additions and multiplications per sample
    precision: str = "float32",
) -> None:
    """Record bytes and operations for the roofline."""
    benchmark.extra_info.update(bytes=bytes, operations=operations, precision=precision, device=device)
    if device == "cpu":
        benchmark.extra_info["threads"] = torch.get_num_threads()
