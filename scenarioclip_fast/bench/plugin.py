"""The pytest plugin behind `scenarioclip-fast bench`: one JSON line per benchmark as it ends, so that a run that is cut
short leaves what came before.

Where pytest-benchmark is not installed, a stand-in for its fixture `benchmark` does what the benchmark files ask of it:
`pedantic`, `group`, `extra_info`, `name` and `stats.stats.median`.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

_REASON = 2000  # characters kept of why something failed


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-lines", type=Path, required=True, help="file that takes one JSON line per benchmark")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Lines(config.getoption("--bench-lines")))
    if not config.pluginmanager.hasplugin("benchmark"):
        config.pluginmanager.register(_StandIn())


class _Lines:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._timed: dict[str, Any] | None = None  # until its teardown has passed too

    def _write(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._write({"total": len(session.items)})

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write({"name": report.nodeid, "outcome": "failed", "reason": _reason(report.longreprtext)})

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        name = item.nodeid.rpartition("::")[2]
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self._write({"name": name, "outcome": "left out", "reason": reason.removeprefix("Skipped: ")})
        elif report.failed:
            # Whatever was timed before the failure is not reported.
            self._timed = None
            self._write({"name": name, "outcome": "failed", "reason": _reason(report.longreprtext)})
        elif call.when == "call":
            self._timed = _measured(item, name, report.duration)
        if call.when == "teardown" and self._timed is not None:
            self._write(self._timed)
            self._timed = None
        return report


def _reason(text: str) -> str:
    """The lines pytest marks as the error, or the end of a traceback."""
    marked = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    return ("\n".join(marked) or text.strip())[-_REASON:]


def _measured(item: pytest.Item, name: str, seconds: float) -> dict[str, Any]:
    benchmark = getattr(item, "funcargs", {}).get("benchmark")
    if benchmark is None or benchmark.stats is None:
        return {"name": name, "outcome": "left out", "reason": "nothing was timed"}
    extra = dict(benchmark.extra_info)
    params = getattr(item, "callspec", SimpleNamespace(params={})).params
    samples = extra.pop("device_seconds", None)
    return {
        "name": name,
        "outcome": "measured",
        "group": benchmark.group or "",
        "form": str(extra.pop("form", params.get("way", name))),
        "clock": "host" if samples is None else "device",
        "samples": list(benchmark.stats.stats.data) if samples is None else samples,
        "extra": {key: _plain(value) for key, value in extra.items()},
        "took": seconds,
    }


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str | list | dict | None) else str(value)


class _StandIn:
    """Registered only where pytest-benchmark is not."""

    @pytest.fixture
    def benchmark(self, request: pytest.FixtureRequest) -> Timer:
        return Timer(request.node.name)


class Timer:
    """Times calls as pytest-benchmark's `pedantic` does: `rounds` samples after `warmup_rounds`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.group: str | None = None
        self.extra_info: dict[str, Any] = {}
        self.stats: Any = None  # as in pytest-benchmark: stats.stats.data, .median, .min, .max

    def pedantic(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        setup: Callable[[], tuple[tuple[Any, ...], dict[str, Any]] | None] | None = None,
        rounds: int = 1,
        warmup_rounds: int = 0,
    ) -> Any:
        """Calls `target`; `setup` runs before each call, outside the time, and may return its arguments."""
        samples = []
        result = None
        for round_ in range(-warmup_rounds, rounds):
            given = setup() if setup is not None else None
            a, k = given if given is not None else (args, kwargs or {})
            start = time.perf_counter()
            result = target(*a, **k)
            seconds = time.perf_counter() - start
            if round_ >= 0:
                samples.append(seconds)
        numbers = SimpleNamespace(
            data=samples, median=statistics.median(samples), min=min(samples), max=max(samples), rounds=len(samples)
        )
        self.stats = SimpleNamespace(stats=numbers)
        return result
