"""The pytest plugin of `make gpu`: notes the start-up, runs tests in forks, and in a rehearsal stops at the device.

With --forks N the tests are collected once, and then run in groups, each in a fork with a CUDA context of its own, N at
a time. A crash costs its group. Needs --capture=no or sys: each group writes to a file of its own.

A rehearsal runs the GPU's tests on a machine without one. A test that gets as far as its first use of the device has
shown all that can be shown there, and is skipped; any other failure is one.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from gpu import start_up

GROUP = 16  # tests of one file that share a fork; many of them compile a kernel
_REHEARSAL = os.environ.get("SCENARIOCLIP_FAST_REHEARSAL") == "1"
_NO_DEVICE = re.compile(
    r"No CUDA GPUs are available|Found no NVIDIA driver|not compiled with CUDA|no CUDA device|no GPU is visible|"
    r"cannot serve cuda tensors|needs a GPU|active drivers|device index less than|exchangeDevice",
    re.IGNORECASE,
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--forks", type=int, default=0, help="run tests in forks, so many at a time (0: in this process)")


def pytest_collection_finish() -> None:
    start_up.note()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    at_once = session.config.getoption("--forks")
    if not at_once or session.testsfailed or len(session.items) == 0:  # pytest reports what could not be collected
        return None
    folder, parent = Path(tempfile.mkdtemp()), os.getpid()
    running: dict[int, Path] = {}
    try:
        for i, group in enumerate(list(_groups(session.items))):
            if len(running) == at_once:
                session.testsfailed += _wait(running)
            log = folder / f"{i}.txt"
            if not (pid := _fork(log)):
                session.items[:] = group
                return None  # the fork goes on as pytest does
            running[pid] = log
        while running:
            session.testsfailed += _wait(running)
    finally:
        if os.getpid() == parent:
            while running:  # after an interrupt, which they have got as well
                _wait(running)
            shutil.rmtree(folder, ignore_errors=True)
    return True


def _wait(running: dict[int, Path]) -> int:
    """Waits for a fork and shows its output; 1 where it failed."""
    pid, status = os.wait()
    if (log := running.pop(pid, None)) is None:
        return 0
    os.write(1, log.read_bytes() if log.exists() else b"")
    return int(status != 0)


def _groups(items: list[pytest.Item]) -> Iterator[list[pytest.Item]]:
    for _, group in itertools.groupby(items, key=lambda item: item.path):
        of_file = list(group)
        count = -(-len(of_file) // GROUP)
        # Neighbours are cases of one test and compile the same kernels: they are dealt out in turn.
        yield from (of_file[i::count] for i in range(count))


def _fork(log: Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
    return pid


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    # A command that refuses says so in its output.
    said = [report.longreprtext, *(text for _, text in report.sections)] if report.failed else []
    if _REHEARSAL and any(map(_NO_DEVICE.search, said)):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), 0, "Skipped: reached the device")
    return report
