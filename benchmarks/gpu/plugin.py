"""The pytest plugin of `make gpu`: records the start-up time, shards long files, and handles GPU tests in a rehearsal.

A rehearsal runs the GPU tests on a machine without a GPU. A test that reaches its first use of the device is reported
as skipped; any other failure counts.
"""

from __future__ import annotations

import re
from collections.abc import Generator

import pytest
from gpu import start_up
from gpu.sections import REHEARSAL

_NO_DEVICE = re.compile(
    r"No CUDA GPUs are available|Found no NVIDIA driver|not compiled with CUDA|no CUDA device|sees no GPU|"
    r"no GPU is visible|cannot run on cuda tensors|needs a GPU|active drivers|device index less than|exchangeDevice",
    re.IGNORECASE,
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="0/1", help="I/N: run shard I of N, counted from 0 (default: all tests)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    shard, count = map(int, config.getoption("--shard").split("/"))
    # Adjacent items are cases of one test and compile the same kernels: distribute them over the shards.
    deselected = [item for i, item in enumerate(items) if i % count != shard]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = items[shard::count]


def pytest_collection_finish() -> None:
    start_up.note()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:  # other sections or shards may have all GPU tests of a file
        session.exitstatus = pytest.ExitCode.OK


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    # The message may be in the captured output of a command.
    output = [report.longreprtext, *(text for _, text in report.sections)] if report.failed else []
    if REHEARSAL and any(map(_NO_DEVICE.search, output)):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), 0, "Skipped: reached the device")
    return report
