"""Step logging: values stay on the device until a log interval ends, then are read, reduced and written."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scenarioclip_fast.data import Batch
from scenarioclip_fast.distributed import World
from scenarioclip_fast.errors import TrainingFailed
from scenarioclip_fast.train.config import TrainConfig
from scenarioclip_fast.train.metrics import MetricsLog
from scenarioclip_fast.train.state import SUMMARY_STEPS, Progress
from scenarioclip_fast.train.timing import BottleneckReport, DataWait

SKIPPED_FILE = "skipped.jsonl"
_MAX_KEYS = 10  # in a message


@dataclass(frozen=True)
class Status:
    """A rank's report at a log interval, to be summed over the ranks."""

    stop: int  # whether it is requested
    save: int  # whether a checkpoint is due
    bad_samples: int  # in this process


@dataclass(frozen=True)
class Totals:
    """Totals of a log interval, over all ranks."""

    counts: list[tuple[int, int, int]]  # per step: scenes, views, flops
    seconds: float
    waited: float  # seconds the slowest rank waited for data: the others wait for it
    status: Status


class PendingSteps:
    """The steps since the last flush: their values on the device and on the host."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.values: list[Tensor] = []  # per step [names]
        self.steps: list[int] = []
        self.rates: list[float] = []
        self.counts: list[tuple[int, int, int]] = []  # scenes, views, flops
        self.keys: list[list[str]] = []
        self.started = time.perf_counter()

    def add(self, step: int, batch: Batch, flops: float, rate: float, values: Mapping[str, Tensor]) -> None:
        self.names = list(values)
        self.values.append(torch.stack([v.float() for v in values.values()]))
        self.steps.append(step)
        self.rates.append(rate)
        self.counts.append((batch.num_scenes, batch.pixels.shape[0], round(flops)))
        self.keys.append(batch.keys)


class StepLog:
    """Collect steps; at log intervals, write them to metrics.jsonl and update `progress`.

    Args:
        metrics: None except on the main process.
        peak_flops: FLOP/s of all ranks' devices at the run's precision; None if unknown.
        log: logs a line on the main process.
    """

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        progress: Progress,
        metrics: MetricsLog | None,
        peak_flops: float | None,
        log: Callable[[str], None],
    ) -> None:
        self._config, self._world, self._progress = config, world, progress
        self._metrics, self._peak_flops, self._log = metrics, peak_flops, log
        self._bad_before = progress.bad_samples
        self._pending = PendingSteps()
        self.wait = DataWait(world.device)
        self.bottleneck = BottleneckReport()
        self._views, self._seconds = 0, 0.0

    @property
    def views_per_s(self) -> float:
        """The mean over all intervals, excluding start-up and checkpoints."""
        return self._views / self._seconds if self._seconds else 0.0

    @property
    def has_steps(self) -> bool:
        return bool(self._pending.steps)

    def start_clock(self) -> None:
        """Restart the clock of the interval."""
        self._pending.started = time.perf_counter()

    def exclude(self, seconds: float) -> None:
        """Exclude `seconds` of other work from the interval."""
        self._pending.started += seconds

    def add(self, step: int, batch: Batch, flops: float, rate: float, values: Mapping[str, Tensor]) -> None:
        """Add one step: its FLOPs, learning rate and named values, each [] on the device."""
        self._pending.add(step, batch, flops, rate, values)

    def flush(self, status: Status) -> Status:
        """Read the steps since the last flush from the device and write them; all ranks call it together.

        Returns:
            `status`, summed over the ranks.
        """
        pending, self._pending = self._pending, PendingSteps()
        values = torch.stack(pending.values).tolist()  # the host waits for the device here
        totals = self._reduce(pending, status)
        self._progress.bad_samples = self._bad_before + totals.status.bad_samples
        speed = self._speed(totals)
        self._record_speed(totals)
        rows = [self._row(pending, k, values[k], totals.counts[k], speed) for k in range(len(values))]
        if self._metrics is not None:
            self._metrics.write(rows)
        return totals.status

    def check_skipped(self) -> None:
        """Raise TrainingFailed if train.max_skipped steps in a row were skipped."""
        skipped = self._progress.skipped_in_row
        if skipped >= self._config.train.max_skipped:
            raise TrainingFailed(
                f"{skipped} steps in a row had a non-finite loss or gradient (the last: step "
                f"{self._progress.step}); they did not change the weights. Their scenes are in {self._skipped_path}. "
                "Lower optim.lr, or set run.precision=float32; --resume starts from the last checkpoint"
            )

    def _reduce(self, pending: PendingSteps, status: Status) -> Totals:
        """Reduce counts, waits and status over all ranks, in one collective."""
        seconds = time.perf_counter() - pending.started
        world, steps = self._world, len(pending.counts)
        waits = [(0, 0, 0)] * world.size
        waits[world.rank] = (round(1e6 * self.wait.pop()), 0, 0)
        table = torch.tensor([*pending.counts, *waits, astuple(status)], device=world.device)
        *rows, summed = world.sum_(table).tolist()
        counts = [(scenes, views, flops) for scenes, views, flops in rows[:steps]]
        waited = max(micros for micros, *_ in rows[steps:]) / 1e6
        return Totals(counts, seconds, waited, Status(*summed))

    def _speed(self, totals: Totals) -> dict[str, float]:
        scenes, views, flops = (sum(column) / totals.seconds for column in zip(*totals.counts, strict=True))
        speed: dict[str, float] = {
            "scenes_per_s": scenes,
            "views_per_s": views,
            "tflop_per_s": flops / 1e12,
            "data_wait": totals.waited / totals.seconds,
            "bad_samples": self._progress.bad_samples,
        }
        if self._peak_flops is not None:
            speed["mfu"] = flops / self._peak_flops
        if self._world.device.type == "cuda":
            speed["memory_gib"] = torch.cuda.max_memory_allocated(self._world.device) / 2**30
        else:
            speed["memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return speed

    def _record_speed(self, totals: Totals) -> None:
        self._views += sum(views for _, views, _ in totals.counts)
        self._seconds += totals.seconds
        if self.bottleneck.add(totals.seconds, totals.waited):
            self._log(str(self.bottleneck))

    def _row(
        self,
        pending: PendingSteps,
        k: int,
        values: list[float],
        counts: tuple[int, int, int],
        speed: Mapping[str, float],
    ) -> dict[str, Any]:
        """Return the row of the k-th pending step, and add the step to the progress."""
        progress = self._progress
        progress.scenes += counts[0]
        progress.views += counts[1]
        named = dict(_as_temperature(name, v) for name, v in zip(pending.names, values, strict=True))
        row: dict[str, Any] = {"step": pending.steps[k], **named}
        row |= {"skipped": int(row["skipped"]), "lr": pending.rates[k], "views": progress.views, **speed}
        if row["skipped"]:
            self._record_skipped(row, pending.keys[k])
        else:
            progress.skipped_in_row = 0
            progress.recent_losses.append(row["loss"])
            if len(progress.first_losses) < SUMMARY_STEPS:
                progress.first_losses.append(row["loss"])
        return row

    def _record_skipped(self, row: Mapping[str, Any], keys: list[str]) -> None:
        """Log a skipped step and its scenes, over all ranks."""
        self._progress.skipped += 1
        self._progress.skipped_in_row += 1
        keys = [key for rank_keys in self._world.gather(keys) for key in rank_keys]
        self._log(
            f"step {row['step']} skipped: loss {row['loss']:g}, gradient norm {row['grad_norm']:g}; "
            f"scenes {', '.join(keys[:_MAX_KEYS])}{' ...' if len(keys) > _MAX_KEYS else ''}"
        )
        if self._world.is_main_process:
            try:
                with open(self._skipped_path, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": row["step"], "scenes": keys}) + "\n")
            except OSError as error:
                self._log(f"{self._skipped_path} not written: {error}; training continues")

    @property
    def _skipped_path(self) -> Path:
        return Path(self._config.run.dir) / SKIPPED_FILE


def _as_temperature(name: str, value: float) -> tuple[str, float]:
    """Replace a logit scale with its inverse, the temperature."""
    kind, _, level = name.partition("/")
    return (f"temperature/{level}", 1 / value) if kind == "logit_scale" else (name, value)
