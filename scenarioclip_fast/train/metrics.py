"""What a run tells while it goes: metrics.jsonl, TensorBoard, a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch import Tensor

if TYPE_CHECKING:
    from scenarioclip_fast.data import Batch

# The columns that the clock and the machine decide about; all others are the same whenever a run is repeated.
TIMINGS = ("scenes_per_s", "views_per_s", "tflop_per_s", "mfu", "data_wait", "memory_gib")
_LINE_EVERY_S = 5.0
_VERDICT_EVERY_S = 300.0
_BOUND_BY_DATA = 0.03  # share of the time from which on waiting for data is worth a user's attention


class MetricsLog:
    """Writes one row per step. Made on the leading rank only.

    Args:
        directory: the run's directory.
        start: steps already done. Rows of later steps, left by a run that was cut off after its last
            checkpoint, are removed, so that metrics.jsonl always holds each step once.
        total: steps of the whole run.
        tensorboard: write event files too, where the package is installed.
    """

    def __init__(
        self, directory: Path, start: int, total: int, tensorboard: bool = True, file: TextIO | None = None
    ) -> None:
        self.path = directory / "metrics.jsonl"
        self._out = file or sys.stderr
        self._total = total
        _truncate(self.path, start)
        self._rows = open(self.path, "ab", buffering=0)  # noqa: SIM115
        self._unwritten, self._refused = b"", False
        self._board = _summary_writer(directory / "tensorboard", start) if tensorboard else None
        self._bar: Any = None
        self._last_line = -math.inf
        if self._out.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, initial=start, desc="training", unit="step", file=self._out, dynamic_ncols=True
            )

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Appends rows (each with "step"); a number that is not finite becomes null."""
        if not rows:
            return
        self._unwritten += "".join(json.dumps({k: _finite(v) for k, v in row.items()}) + "\n" for row in rows).encode()
        self._append()
        self._add_to_board(rows)
        self._show(rows[-1], len(rows))

    def say(self, text: str) -> None:
        """One line for people, not in the bar's way."""
        if self._bar is not None:
            self._bar.write(text, file=self._out)
        else:
            self._print(text)

    def close(self) -> None:
        self._append()
        self._rows.close()
        if self._board is not None:
            with contextlib.suppress(OSError):  # of a full disk
                self._board.close()
        if self._bar is not None:
            self._bar.close()

    def _append(self) -> None:
        """Writes what is left to write; what a full disk has no room for stays for the next time."""
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._rows.write(self._unwritten) :]
            self._refused = False
        except OSError as error:
            if not self._refused:
                self.say(f"{self.path} not written: {error}; the run goes on and keeps the rows for later")
            self._refused = True

    def _add_to_board(self, rows: list[dict[str, Any]]) -> None:
        if self._board is None:
            return
        try:
            for row in rows:
                for name, value in row.items():
                    if name != "step" and _finite(value) is not None:
                        self._board.add_scalar(name, value, row["step"])
        except OSError as error:  # a full disk has ended its thread
            self._board = None
            self.say(f"TensorBoard's events are no longer written: {error}; the run goes on")

    def _print(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a full disk behind it, or a terminal that is gone
            print(text, file=self._out, flush=True)

    def _show(self, row: Mapping[str, Any], steps: int) -> None:
        if self._bar is not None:
            pace = f"{row['views_per_s']:.0f} views/s, {_rate(row)}"
            self._bar.set_postfix_str(f"loss {row['loss']:.3f}, {pace}", refresh=False)
            self._bar.update(steps)
            return
        now = time.monotonic()
        if now - self._last_line < _LINE_EVERY_S and row["step"] != self._total:
            return
        self._last_line = now
        levels = ", ".join(f"{k.split('/')[1]} {v:.3f}" for k, v in row.items() if k.startswith("contrastive/"))
        self._print(
            f"step {row['step']}/{self._total}: loss {row['loss']:.4f} ({levels}), lr {row['lr']:.2e}, "
            f"grad norm {row['grad_norm']:.2f}, {row['scenes_per_s']:.1f} scenes/s, {row['views_per_s']:.0f} views/s, "
            f"{_rate(row)}, waiting for data {row['data_wait']:.0%}"
            + (f", {row['memory_gib']:.1f} GiB" if "memory_gib" in row else "")
            + (f", {row['bad_samples']} bad samples" if row["bad_samples"] else "")
        )


class DataWait:
    """How long the device had nothing to do because a batch was not there.

    On a GPU the host runs ahead, and its wait for a batch costs nothing as long as earlier steps keep the GPU busy.
    There, what counts of a wait is at most the gap on the GPU between two steps.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host: list[float] = []
        self._gaps: list[tuple[Any, Any]] = []  # events: the end of a step, the start of the next
        self._end: Any = None

    def step_begins(self, waited: float) -> None:
        """`waited`: seconds that the host waited for the step's batch."""
        self._host.append(waited)
        if self._device.type == "cuda":
            start = self._recorded()
            self._gaps.append((self._end or start, start))

    def step_ends(self) -> None:
        """Everything of the step is on its way to the device."""
        if self._device.type == "cuda":
            self._end = self._recorded()

    def take(self) -> float:
        """Seconds since the last call. The device must be done with the steps."""
        host, gaps, self._host, self._gaps = self._host, self._gaps, [], []
        if self._device.type != "cuda":
            return sum(host)
        return sum(min(wait, end.elapsed_time(start) / 1e3) for wait, (end, start) in zip(host, gaps, strict=True))

    def _recorded(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


class Verdict:
    """Who sets the pace: the data, or the step."""

    def __init__(self) -> None:
        self.seconds = self.waited = 0.0
        self._next = _VERDICT_EVERY_S

    def add(self, seconds: float, waited: float) -> bool:
        """Whether it is time to tell."""
        self.seconds += seconds
        self.waited += waited
        if self.seconds < self._next:
            return False
        self._next = self.seconds + _VERDICT_EVERY_S
        return True

    def __str__(self) -> str:
        share = self.waited / self.seconds if self.seconds else 0.0
        if share < _BOUND_BY_DATA:
            return f"bound by the step: it waited {share:.1%} of the time for data"
        return (
            f"bound by data: the step waited {share:.1%} of the time; raise data.threads, keep decoded images in "
            "memory with data.cache_gib, or decode with data.decoder=dali"
        )


class StepProfile:
    """A torch.profiler trace of the steps `first` to `last`, both counted from 1, for chrome://tracing or Perfetto."""

    def __init__(self, directory: Path, first: int, last: int) -> None:
        self.path = directory / f"steps-{first}-{last}.json.gz"
        self._first, self._last = first, last
        self._profiler: torch.profiler.profile | None = None

    def before(self, step: int) -> None:
        if step == self._first:
            self._profiler = torch.profiler.profile(record_shapes=True)
            self._profiler.start()

    def after(self, step: int) -> str | None:
        """Writes the trace behind its last step; what to tell then."""
        return self.close() if step >= self._last else None

    def close(self) -> str | None:
        """Writes what there is of the trace, if there is any; what to tell then."""
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


class PendingSteps:
    """The steps since the last flush: device values nobody has waited for yet, and what the host knows."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.rows: list[Tensor] = []
        self.steps: list[int] = []
        self.rates: list[float] = []
        self.counts: list[tuple[int, int, int]] = []  # scenes, views, operations
        self.keys: list[list[str]] = []
        self.started = time.perf_counter()

    def add(
        self, step: int, batch: Batch, operations: float, rate: float, names: list[str], values: tuple[Tensor, ...]
    ) -> None:
        self.names = names
        self.rows.append(torch.stack([v.float() for v in values]))
        self.steps.append(step)
        self.rates.append(rate)
        self.counts.append((batch.num_scenes, batch.pixels.shape[0], round(operations)))
        self.keys.append(batch.keys)


def _rate(row: Mapping[str, Any]) -> str:
    return f"MFU {row['mfu']:.1%}" if "mfu" in row else f"{row['tflop_per_s']:.3g} TFLOP/s"


def readable(name: str, value: float) -> tuple[str, float]:
    """The factors of the cosines as what people speak of: temperatures."""
    kind, _, level = name.partition("/")
    return (f"temperature/{level}", 1 / value) if kind == "logit_scale" else (name, value)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, without a last line that was cut off and what a machine that went down left of
    others."""
    rows = []
    for line in Path(path).read_bytes().splitlines(keepends=True):
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if line.endswith(b"\n") and isinstance(row, dict) and "step" in row:
                rows.append(row)
    return rows


def _truncate(path: Path, start: int) -> None:
    if not path.exists():
        return
    kept = [row for row in read_metrics(path) if row["step"] <= start]
    temporary = path.with_suffix(".writing")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    os.replace(temporary, path)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _summary_writer(directory: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(directory), purge_step=start + 1)
