"""Runs jobs in parallel: each has its own log, its own outcome and its own row in the sections table."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu import start_up
from gpu.processes import Process

Start = Callable[[Path], Process]  # argument: the log file
PASSED = "passed"


@dataclass
class Row:
    """A row of sections.csv."""

    section: str
    result: str  # PASSED, "exit N" or a description
    seconds: float
    start_up: float | None = None


class Job:
    """A group of processes, at most `parallel` at a time. Each has its own log; `end` joins them in `log`."""

    def __init__(
        self,
        name: str,
        folder: Path,
        starts: Sequence[Start],
        parallel: int = 1,
        excuse: Callable[[str], str] | None = None,  # log -> why a failure does not count, or ""
    ) -> None:
        self.name, self.log = name, folder / f"{name}.txt"
        self._pending = [(start, folder / f"{name}-{i}.part") for i, start in enumerate(starts)]
        self._logs = [log for _, log in self._pending]
        self._running: list[Process] = []
        self._codes: list[int] = []
        self._parallel, self._interrupted, self._excuse = parallel, False, excuse
        self.note = ""  # of `excuse`; known after `end`
        self._started, self._seconds = time.time(), 0.0

    def advance(self) -> bool:
        """Start pending processes where possible; return whether all have ended."""
        for process in self._running[:]:
            if (code := process.poll()) is not None:
                self._running.remove(process)
                self._codes.append(code)
        while self._pending and len(self._running) < self._parallel and not self._interrupted:
            start, log = self._pending.pop(0)
            self._running.append(start(log))
        ended = not self._running and (not self._pending or self._interrupted)
        if not ended:
            self._seconds = time.time() - self._started
        return ended

    def interrupt(self) -> None:
        """Interrupt running processes and start no more."""
        if self._running or self._pending:
            self._interrupted = True
        for process in self._running:
            process.interrupt()

    def end(self) -> Row:
        """Kill running processes, join the logs and return the outcome."""
        killed = [process.end() for process in self._running]
        texts = [shortened(log) for log in self._logs if log.exists()]
        text = "\n".join(text.rstrip() for text in texts) + "\n"
        failures = [code for code in self._codes if code]
        if failures and self._excuse is not None and (note := self._excuse(text)):
            self.note, failures, text = note, [], f"{text}{note}\n"
        self.log.write_text(text)
        result = "timed out" if self._interrupted else f"exit {failures[0]}" if failures else PASSED
        result += "" if all(killed) else ", and could not be killed"
        start_ups = [seconds for log in self._logs if (seconds := start_up.seconds(log)) is not None]
        for log in self._logs:
            log.unlink(missing_ok=True)
            log.with_suffix(".start-up").unlink(missing_ok=True)
        return Row(self.name, result, self._seconds, sum(start_ups) / self._parallel if start_ups else None)

    def summary(self) -> list[str]:
        """Pytest's counts and failures, or the last lines of the log. Call after `end`."""
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
    """Run jobs in parallel for at most `seconds`: interrupt those still running `grace` seconds before, then kill."""
    end = time.time() + seconds
    rows = []
    try:
        _advance(jobs, end - grace)
        for job in jobs:
            job.interrupt()
        _advance(jobs, end)
    finally:  # also if this process is interrupted
        rows = [job.end() for job in jobs]
    return rows


def shortened(log: Path, head: int = 1 << 18, tail: int = 1 << 20) -> str:
    """The text of a log; of a very long one, only its beginning and end."""
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
