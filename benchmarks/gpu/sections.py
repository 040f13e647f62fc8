"""The sections of `make gpu`: their order, what each may take, and how saved time is passed on.

Imports nothing but the standard library: it is read before any package is known to be there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

# `make gpu-rehearse`: no GPU is there, and none is expected.
REHEARSAL = os.environ.get("SCENARIOCLIP_FAST_REHEARSAL") == "1"
TOTAL_S = 480  # of the whole call, from its first instruction to its last
HEADLINE_S = 400  # by then the headline figures are in the record

Kind = str  # "prepare", "start", "check" (side by side, untimed), "bench", "tune", "demo" or "compiled"


@dataclass(frozen=True)
class Section:
    """A part of the call that fails, hangs or is skipped without affecting the others.

    budget: seconds that are kept for it. It may take more where earlier sections left some, up to `most`.
    least: it is skipped where fewer seconds remain.
    """

    name: str
    kind: Kind
    budget: float
    most: float
    least: float = 3.0


PREPARE = Section("prepare", "prepare", 50, 60)
# Imports of the process that all others are forked from, and a first look at the device.
START = Section("start", "start", 12, 60)
CHECKS = Section("checks", "check", 88, 120)
TIMED = [
    Section("bench_ceilings", "bench", 8, 15),
    Section("bench_step", "bench", 62, 110),
    Section("bench_contrastive", "bench", 72, 120),
    Section("bench_views", "bench", 22, 40),
    Section("bench_end_to_end", "bench", 64, 100),
    Section("tune_contrastive", "tune", 16, 40),
    Section("tune_step", "tune", 16, 40),
    Section("tune_views", "tune", 8, 20),
    Section("bench_data", "bench", 24, 50),
    Section("bench_distillation", "bench", 8, 20),
    Section("bench_ema", "bench", 5, 10),
    Section("bench_trainer", "bench", 12, 30),
    # As time allows; useless if cut short.
    Section("demo", "demo", 0, 120, least=45),
    Section("tests_compiled", "compiled", 0, 120, least=30),
]
FINISH_S = 8  # the record's README, the archive
HEADLINES = ("bench_step", "bench_contrastive", "bench_views", "bench_end_to_end")
ALL = [PREPARE, START, CHECKS, *TIMED]
# What runs in parallel under CHECKS, each by itself.
CHECK_PARTS = ("doctor", "tests", "memcheck_cuda", "memcheck_triton", "racecheck", "warm_step", "warm_contrastive")


class Clock:
    """Time since the call began, and how much of it a section may take.

    Every section after the one at hand keeps its budget; what the earlier ones saved is passed on.
    """

    def __init__(self, total: float, started: float, now: Callable[[], float] = time.time) -> None:
        self.total, self.started, self._now = total, started, now

    def elapsed(self) -> float:
        return self._now() - self.started

    def limit(self, section: Section, later: list[Section]) -> float | None:
        """Seconds for `section` when `later` are still to come; None where too few are left for it."""
        left = self.total - FINISH_S - self.elapsed()
        spare = left - sum(s.budget for s in later)
        # Where the call is late already, a section still gets its share of what is left.
        share = left * section.budget / max(section.budget + sum(s.budget for s in later), 1.0)
        limit = min(max(spare, min(share, section.budget)), section.most)
        return limit if limit >= section.least else None


def names() -> list[str]:
    """What ONLY may name."""
    return [*CHECK_PARTS, *(s.name for s in TIMED)]


def budgets() -> float:
    """Seconds of all sections together."""
    return sum(s.budget for s in ALL) + FINISH_S
