"""The pytest plugin of `make gpu`: notes the start-up, divides long files, and in a rehearsal stops at the device.

A rehearsal runs the GPU's tests on a machine without one. A test that gets as far as its first use of the device has
shown all that can be shown there, and is skipped; any other failure is one.
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
    parser.addoption("--shard", default="0/1", help="I/N: shard I of N, counted from 0 (default: all tests)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    first, count = map(int, config.getoption("--shard").split("/"))
    # Neighbours are cases of one test and compile the same kernels: they are dealt out in turn.
    others = [item for i, item in enumerate(items) if i % count != first]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = items[first::count]


def pytest_collection_finish() -> None:
    start_up.note()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:  # all of a file's GPU tests may be left to other sections
        session.exitstatus = pytest.ExitCode.OK


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    # A command that refuses says so in its output.
    output = [report.longreprtext, *(text for _, text in report.sections)] if report.failed else []
    if REHEARSAL and any(map(_NO_DEVICE.search, output)):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), 0, "Skipped: reached the device")
    return report
