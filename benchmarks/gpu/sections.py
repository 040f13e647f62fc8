"""The sections of `make gpu`: their order, time budgets, and how saved time is redistributed.

Imports only the standard library: it runs before any package is installed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

# `make gpu-rehearse` runs without a GPU.
REHEARSAL = os.environ.get("SCENARIOCLIP_FAST_REHEARSAL") == "1"
TOTAL_S = 480  # for the whole of `make gpu`
HEADLINE_S = 400  # until the headline figures are recorded

Kind = str  # "prepare", "start", "check" (parallel, untimed), "bench", "tune", "demo", "compiled" or "counters"


@dataclass(frozen=True)
class Section:
    """A part of `make gpu` that can fail, hang or be skipped without affecting the others.

    Attributes:
        budget: seconds reserved for it.
        maximum: seconds it may use if earlier sections saved time.
        minimum: it is skipped if fewer seconds remain.
    """

    name: str
    kind: Kind
    budget: float
    maximum: float
    minimum: float = 3.0


# Budgets follow the first run, on an H200 with 16 cores.
PREPARE = Section("prepare", "prepare", 48, 60)
# Imports in the process that all others are forked from, and the first use of the device.
START = Section("start", "start", 12, 60)
CHECKS = Section("checks", "check", 66, 120)
TIMED = [
    Section("bench_ceilings", "bench", 4, 15),
    Section("bench_step", "bench", 60, 110),
    Section("bench_contrastive", "bench", 56, 120),
    Section("bench_views", "bench", 6, 40),
    Section("bench_end_to_end", "bench", 64, 100),
    Section("tune_contrastive", "tune", 12, 40),
    Section("tune_step", "tune", 16, 40),
    Section("tune_views", "tune", 5, 20),
    Section("bench_data", "bench", 24, 50),
    Section("bench_distillation", "bench", 10, 20),
    Section("bench_ema", "bench", 5, 10),
    Section("bench_layers", "bench", 12, 30),
    Section("bench_trainer", "bench", 12, 30),
    Section("counters", "counters", 24, 60, minimum=15),
    # If time allows; useless if cut short.
    Section("demo", "demo", 30, 120, minimum=45),
    Section("tests_compiled", "compiled", 0, 120, minimum=30),
]
HOST_ONLY = frozenset({"checkpoint", "generation", "index", "pack", "vocabulary"})  # benchmarks that do not use a GPU
FINISH_S = 8  # to write the record's README and the archive
HEADLINES = ("bench_step", "bench_contrastive", "bench_views", "bench_end_to_end")
ALL = [PREPARE, START, CHECKS, *TIMED]
# The parts of CHECKS, which run in parallel.
CHECK_PARTS = ("doctor", "tests", "memcheck_cuda", "memcheck_triton", "racecheck", "warm_step", "warm_contrastive")


class Clock:
    """The elapsed time, and the time limit of each section.

    Later sections keep their budgets; time saved by earlier sections goes to the next ones.
    """

    def __init__(self, total: float, started: float, now: Callable[[], float] = time.time) -> None:
        self.total, self.started, self._now = total, started, now

    def elapsed(self) -> float:
        return self._now() - self.started

    def limit(self, section: Section, later: list[Section]) -> float | None:
        """Time limit of `section` when `later` sections follow; None if less than its minimum remains."""
        left = self.total - FINISH_S - self.elapsed()
        spare = left - sum(s.budget for s in later)
        # If already late, a section still gets its proportional share of the remaining time.
        share = left * section.budget / max(section.budget + sum(s.budget for s in later), 1.0)
        limit = min(max(spare, min(share, section.budget)), section.maximum)
        return limit if limit >= section.minimum else None


def names() -> list[str]:
    """The names accepted by ONLY."""
    return [*CHECK_PARTS, *(s.name for s in TIMED)]


def budgets() -> float:
    """Sum of all budgets in seconds."""
    return sum(s.budget for s in ALL) + FINISH_S
