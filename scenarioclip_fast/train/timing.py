"""Time measurement of a run: waits for data, the bottleneck, and profiler traces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_REPORT_EVERY_S = 300.0
_DATA_BOUND = 0.03  # data is the bottleneck from this share of the time spent waiting for it


class DataWait:
    """Measure how long the device was idle because a batch was not ready.

    On a GPU the host runs ahead, and its wait for a batch costs nothing while earlier steps keep the GPU busy: a wait
    counts for at most the gap on the GPU between two steps.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host: list[float] = []
        self._gaps: list[tuple[Any, Any]] = []  # events: the end of a step, the start of the next
        self._end: Any = None

    def begin_step(self, waited: float) -> None:
        """Mark the start of a step; `waited`: seconds the host waited for its batch."""
        self._host.append(waited)
        if self._device.type == "cuda":
            start = self._record_event()
            self._gaps.append((self._end or start, start))

    def end_step(self) -> None:
        """Mark the end of a step, once all its work is enqueued."""
        if self._device.type == "cuda":
            self._end = self._record_event()

    def pop(self) -> float:
        """Return the seconds waited since the last call. The device must have finished the steps."""
        host, gaps, self._host, self._gaps = self._host, self._gaps, [], []
        if self._device.type != "cuda":
            return sum(host)
        return sum(min(wait, end.elapsed_time(start) / 1e3) for wait, (end, start) in zip(host, gaps, strict=True))

    def _record_event(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


class BottleneckReport:
    """Report whether data loading or the step is the bottleneck."""

    def __init__(self) -> None:
        self.seconds = self.waited = 0.0
        self._next = _REPORT_EVERY_S

    def add(self, seconds: float, waited: float) -> bool:
        """Add an interval; return whether the next report is due."""
        self.seconds += seconds
        self.waited += waited
        if self.seconds < self._next:
            return False
        self._next = self.seconds + _REPORT_EVERY_S
        return True

    def __str__(self) -> str:
        share = self.waited / self.seconds if self.seconds else 0.0
        if share < _DATA_BOUND:
            return f"compute-bound: the step waited for data {share:.1%} of the time"
        return (
            f"data-bound: the step waited for data {share:.1%} of the time; raise data.threads, keep decoded images in "
            "memory with data.cache_gib, or decode on the GPU (data.decoder)"
        )


class StepProfile:
    """A torch.profiler trace of the steps `first` to `last`, both counted from 1, for chrome://tracing or Perfetto."""

    def __init__(self, directory: Path, first: int, last: int) -> None:
        self.path = directory / f"steps-{first}-{last}.json.gz"
        self._first, self._last = first, last
        self._profiler: torch.profiler.profile | None = None

    def before(self, step: int) -> None:
        """Start the trace if `step` is its first step."""
        if step == self._first:
            self._profiler = torch.profiler.profile(record_shapes=True)
            self._profiler.start()

    def after(self, step: int) -> str | None:
        """Write the trace if `step` is its last step; return a log line if so."""
        return self.close() if step >= self._last else None

    def close(self) -> str | None:
        """Write the trace if one was started; return a log line if so."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return None
        profiler.stop()
        try:
            self.path.parent.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(self.path))
        except OSError as error:
            return f"profile not written: {error}"
        return f"profile of steps {self._first} to {self._last}: {self.path} (open it at https://ui.perfetto.dev)"
