"""The output of a training run: metrics.jsonl, TensorBoard, a progress bar on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from scenarioclip_fast import forks
from scenarioclip_fast.parsing import are_numbers, parse_json
from scenarioclip_fast.terminal import echo, printable, unguarded

# Columns that depend on the clock and the machine; repeating a run reproduces all others.
TIMINGS = ("scenes_per_s", "views_per_s", "tflop_per_s", "mfu", "data_wait", "memory_gib")
_LINE_EVERY_S = 5.0


class MetricsLog:
    """Write one row per step, on the main process.

    Args:
        directory: the run's directory.
        start: steps already done. Rows of later steps, left by a run that ended after its last checkpoint, are
            removed, so that metrics.jsonl has each step once.
        total: steps of the whole run.
        tensorboard: also write event files, if the package is installed.
    """

    def __init__(
        self, directory: Path, start: int, total: int, tensorboard: bool = True, file: TextIO | None = None
    ) -> None:
        self.path = directory / "metrics.jsonl"
        self._out = file or sys.stderr
        self._total = total
        _truncate(self.path, start)
        self._rows = open(self.path, "ab", buffering=0)  # noqa: SIM115
        self._unwritten, self._write_failed = b"", False
        self._origin = forks.Origin()
        self._board = _summary_writer(directory / "tensorboard", start) if tensorboard else None
        self._bar: Any = None
        self._last_line = -math.inf
        if self._out.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, initial=start, desc="training", unit="step", file=unguarded(self._out), dynamic_ncols=True
            )

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Append rows, each with a "step"; non-finite numbers become null."""
        if not rows:
            return
        self._origin.check("the metrics log", "write metrics in the process that trains")
        self._unwritten += "".join(json.dumps({k: _finite(v) for k, v in row.items()}) + "\n" for row in rows).encode()
        self._append()
        self._add_to_board(rows)
        self._show(rows[-1], len(rows))

    def log(self, text: str) -> None:
        """Print one line, above the progress bar."""
        if self._bar is not None and self._origin.is_here:
            self._bar.write(printable(text), file=unguarded(self._out))
        else:
            self._print(text)

    def close(self) -> None:
        if not self._origin.is_here:
            return
        self._append()
        self._rows.close()
        if self._board is not None:
            with contextlib.suppress(OSError):  # full disk
                self._board.close()
        if self._bar is not None:
            self._bar.close()

    def _append(self) -> None:
        """Write the pending rows; on a full disk, keep the rest for the next call."""
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._rows.write(self._unwritten) :]
            self._write_failed = False
        except OSError as error:
            if not self._write_failed:
                self.log(f"{self.path} not written: {error}; training continues, and the rows are written later")
            self._write_failed = True

    def _add_to_board(self, rows: list[dict[str, Any]]) -> None:
        if self._board is None:
            return
        try:
            for row in rows:
                for name, value in row.items():
                    if name != "step" and _finite(value) is not None:
                        self._board.add_scalar(name, value, row["step"])
        except OSError as error:  # a full disk ended the writer's thread
            self._board = None
            self.log(f"TensorBoard events are no longer written: {error}; training continues")

    def _print(self, text: str) -> None:
        with contextlib.suppress(OSError):  # redirected to a full disk, or the terminal is closed
            echo(text, file=self._out)

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


def _rate(row: Mapping[str, Any]) -> str:
    return f"MFU {row['mfu']:.1%}" if "mfu" in row else f"{row['tflop_per_s']:.3g} TFLOP/s"


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl, skipping truncated and damaged lines left by a crash."""
    rows = []
    for line in Path(path).read_bytes().splitlines(keepends=True):
        with contextlib.suppress(ValueError):
            row = parse_json(line)
            good = line.endswith(b"\n") and isinstance(row, dict) and isinstance(row.get("step"), int)
            if good and are_numbers(*(value for value in row.values() if value is not None)):
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
