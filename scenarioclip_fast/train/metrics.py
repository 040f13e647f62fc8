"""What a run tells while it goes: metrics.jsonl, TensorBoard, a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

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

_LINE_EVERY_S = 5.0


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
        self._rows = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
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
        for row in rows:
            self._rows.write(json.dumps({k: _finite(v) for k, v in row.items()}) + "\n")
        self._rows.flush()
        if self._board is not None:
            for row in rows:
                for name, value in row.items():
                    if name != "step" and _finite(value) is not None:
                        self._board.add_scalar(name, value, row["step"])
        self._show(rows[-1], len(rows))

    def say(self, text: str) -> None:
        """One line for people, not in the bar's way."""
        if self._bar is not None:
            self._bar.write(text, file=self._out)
        else:
            print(text, file=self._out, flush=True)

    def close(self) -> None:
        self._rows.close()
        if self._board is not None:
            self._board.close()
        if self._bar is not None:
            self._bar.close()

    def _show(self, row: Mapping[str, Any], steps: int) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {row['loss']:.3f}, {row['views_per_s']:.0f} views/s", refresh=False)
            self._bar.update(steps)
            return
        now = time.monotonic()
        if now - self._last_line < _LINE_EVERY_S and row["step"] != self._total:
            return
        self._last_line = now
        levels = ", ".join(f"{k.split('/')[1]} {v:.3f}" for k, v in row.items() if k.startswith("contrastive/"))
        print(
            f"step {row['step']}/{self._total}: loss {row['loss']:.4f} ({levels}), lr {row['lr']:.2e}, "
            f"grad norm {row['grad_norm']:.2f}, {row['scenes_per_s']:.1f} scenes/s, {row['views_per_s']:.0f} views/s, "
            f"waiting for data {row['data_wait']:.0%}",
            file=self._out,
            flush=True,
        )


class PendingSteps:
    """The steps since the last flush: device values nobody has waited for yet, and what the host knows."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.rows: list[Tensor] = []
        self.steps: list[int] = []
        self.rates: list[float] = []
        self.counts: list[tuple[int, int]] = []  # scenes, views
        self.keys: list[list[str]] = []
        self.waited = 0.0
        self.started = time.perf_counter()

    def add(self, step: int, batch: Batch, rate: float, names: list[str], values: tuple[Tensor, ...]) -> None:
        self.names = names
        self.rows.append(torch.stack([v.float() for v in values]))
        self.steps.append(step)
        self.rates.append(rate)
        self.counts.append((batch.num_scenes, batch.pixels.shape[0]))
        self.keys.append(batch.keys)


def readable(name: str, value: float) -> tuple[str, float]:
    """The factors of the cosines as what people speak of: temperatures."""
    kind, _, level = name.partition("/")
    return (f"temperature/{level}", 1 / value) if kind == "logit_scale" else (name, value)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that was cut off is left out."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


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
