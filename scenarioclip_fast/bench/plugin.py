"""The pytest plugin behind `scenarioclip-fast bench`: writes a JSON line as each benchmark ends, so that an aborted run
keeps its earlier results.

Where pytest-benchmark is not installed, a stand-in for its `benchmark` fixture provides what the benchmark files use:
`pedantic`, `group`, `extra_info`, `name` and `stats.stats`.
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

_MAX_REASON = 2000  # characters kept of an error message


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-lines", type=Path, required=True, help="JSON lines file to append each result to")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_ResultWriter(config.getoption("--bench-lines")))
    if not config.pluginmanager.hasplugin("benchmark"):
        config.pluginmanager.register(_BenchmarkFixture())


class _ResultWriter:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._pending: dict[str, Any] | None = None  # written once teardown has passed

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
            # A failure in teardown discards the timing.
            self._pending = None
            self._write({"name": name, "outcome": "failed", "reason": _reason(report.longreprtext)})
        elif call.when == "call":
            self._pending = _result_line(item, name, report.duration)
        if call.when == "teardown" and self._pending is not None:
            self._write(self._pending)
            self._pending = None
        return report


def _reason(text: str) -> str:
    """The lines that pytest marks as the error, or the end of the traceback."""
    marked = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    return ("\n".join(marked) or text.strip())[-_MAX_REASON:]


def _result_line(item: pytest.Item, name: str, seconds: float) -> dict[str, Any]:
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
        "form": str(extra.pop("form", params.get("form", name))),
        "clock": "host" if samples is None else "device",
        "samples": list(benchmark.stats.stats.data) if samples is None else samples,
        "extra": {key: _json_value(value) for key, value in extra.items()},
        "took": seconds,
    }


def _json_value(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str | list | dict | None) else str(value)


class _BenchmarkFixture:
    """Registered only if pytest-benchmark is not."""

    @pytest.fixture
    def benchmark(self, request: pytest.FixtureRequest) -> Timer:
        return Timer(request.node.name)


class Timer:
    """Times calls like pytest-benchmark's `pedantic`: `rounds` samples after `warmup_rounds`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.group: str | None = None
        self.extra_info: dict[str, Any] = {}
        self.stats: Any = None  # same shape as pytest-benchmark's: stats.stats.data, .median, .min, .max

    def pedantic(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        setup: Callable[[], tuple[tuple[Any, ...], dict[str, Any]] | None] | None = None,
        rounds: int = 1,
        warmup_rounds: int = 0,
    ) -> Any:
        """Time calls of `target`; `setup` runs untimed before each and may return (args, kwargs)."""
        samples = []
        result = None
        for round_ in range(-warmup_rounds, rounds):
            prepared = setup() if setup is not None else None
            a, k = prepared if prepared is not None else (args, kwargs or {})
            start = time.perf_counter()
            result = target(*a, **k)
            seconds = time.perf_counter() - start
            if round_ >= 0:
                samples.append(seconds)
        stats = SimpleNamespace(
            data=samples, median=statistics.median(samples), min=min(samples), max=max(samples), rounds=len(samples)
        )
        self.stats = SimpleNamespace(stats=stats)
        return result
