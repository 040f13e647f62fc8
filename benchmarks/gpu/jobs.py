"""Work that runs side by side: each job has its own log, its own end and its own line of the sections table."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu import start_up
from gpu.processes import Process

Begin = Callable[[Path], Process]  # takes the log
DONE = "passed"


@dataclass
class Row:
    """A line of sections.csv."""

    section: str
    result: str  # DONE, "exit N", or in words what happened
    seconds: float
    start_up: float | None = None


class Job:
    """Some processes, at most `at_once` of them side by side. Each has a log; `log` holds all of them in the end."""

    def __init__(self, name: str, folder: Path, begin: Sequence[Begin], at_once: int = 1) -> None:
        self.name, self.log = name, folder / f"{name}.txt"
        self._waiting = [(entry, folder / f"{name}-{i}.part") for i, entry in enumerate(begin)]
        self._logs = [log for _, log in self._waiting]
        self._running: list[Process] = []
        self._codes: list[int] = []
        self._at_once, self._stopped = at_once, False
        self._began, self._seconds = time.time(), 0.0

    def advance(self) -> bool:
        """Starts what may start; whether everything has ended."""
        for process in self._running[:]:
            if (code := process.poll()) is not None:
                self._running.remove(process)
                self._codes.append(code)
        while self._waiting and len(self._running) < self._at_once and not self._stopped:
            begin, log = self._waiting.pop(0)
            self._running.append(begin(log))
        ended = not self._running and (not self._waiting or self._stopped)
        if not ended:
            self._seconds = time.time() - self._began
        return ended

    def interrupt(self) -> None:
        """Asks what still runs to end, and starts nothing more."""
        if self._running or self._waiting:
            self._stopped = True
        for process in self._running:
            process.interrupt()

    def end(self) -> Row:
        """Kills what still runs; what became of it all."""
        killed = [process.end() for process in self._running]
        texts = [shortened(log) for log in self._logs if log.exists()]
        self.log.write_text("\n".join(text.rstrip() for text in texts) + "\n")
        bad = [code for code in self._codes if code]
        result = "timed out" if self._stopped else f"exit {bad[0]}" if bad else DONE
        result += "" if all(killed) else ", and could not be killed"
        started = [seconds for log in self._logs if (seconds := start_up.seconds(log)) is not None]
        for log in self._logs:
            log.unlink(missing_ok=True)
            log.with_suffix(".start-up").unlink(missing_ok=True)
        return Row(self.name, result, self._seconds, sum(started) / self._at_once if started else None)

    def summary(self) -> list[str]:
        """The last lines of the log, or what pytest says of its tests. After `end`."""
        text = self.log.read_text(errors="replace")
        counts: Counter[str] = Counter()
        for line in text.splitlines():
            if re.search(r"\bin [\d.]+s\b", line):
                for number, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", line):
                    counts[what.removesuffix("s") if what.startswith("error") else what] += int(number)
        if not counts:
            return text.splitlines()[-6:]
        failed = [line[:180] for line in text.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        return [", ".join(f"{n} {what}" for what, n in counts.items()), *failed[:20]]


def run(jobs: Sequence[Job], seconds: float, grace: float) -> list[Row]:
    """Runs jobs side by side for at most `seconds`. What is late is interrupted, and after `grace` killed."""
    end = time.time() + seconds
    rows = []
    try:
        _advance(jobs, end - grace)
        for job in jobs:
            job.interrupt()
        _advance(jobs, end)
    finally:  # also where this process is interrupted
        rows = [job.end() for job in jobs]
    return rows


def shortened(log: Path, head: int = 1 << 18, tail: int = 1 << 20) -> str:
    """A log's text; of one that has got out of hand, its beginning and its end."""
    size = log.stat().st_size
    with log.open("rb") as file:
        if size <= head + tail:
            return file.read().decode(errors="replace")
        first = file.read(head).decode(errors="replace")
        file.seek(size - tail)
        return f"{first}\n... {size - head - tail:,} bytes ...\n{file.read().decode(errors='replace')}"


def _advance(jobs: Sequence[Job], until: float) -> None:
    while not all([job.advance() for job in jobs]) and time.time() < until:
        time.sleep(0.05)
