"""The processes that sections run in: forks of a process that has imported everything, or new processes.

A fork starts in milliseconds. It has its own process group, CUDA context and output file: a hanging section is killed
with all its children, and an illegal memory access affects only its own process. The parent must never initialise CUDA.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu import start_up


@dataclass(frozen=True)
class Task:
    """Work that runs either in a fork (`run`) or in a new process (`command`)."""

    run: Callable[[], Any]
    command: list[str]


def pytest_task(arguments: Sequence[str]) -> Task:
    def run() -> int:
        import pytest

        # As `python -m` does: test files may import modules next to pyproject.toml.
        sys.path.insert(0, os.getcwd())
        return int(pytest.main(list(arguments)))

    return Task(run, [sys.executable, "-m", "pytest", *arguments])


def script_task(path: Path, arguments: Sequence[str]) -> Task:
    """A script with a function `main` that returns its exit code or None."""

    def run() -> int:
        sys.path.insert(0, str(path.parent))
        module = importlib.import_module(path.stem)
        start_up.note()
        sys.argv = [str(path), *arguments]
        return int(module.main() or 0)

    return Task(run, [sys.executable, str(path), *arguments])


def command_line_task(arguments: Sequence[str]) -> Task:
    """`scenarioclip-fast ARGUMENTS`."""

    def run() -> int:
        from scenarioclip_fast.cli.main import main

        start_up.note()
        return main(list(arguments))

    return Task(run, [sys.executable, "-m", "scenarioclip_fast.cli.main", *arguments])


class Process(ABC):
    """The part of subprocess.Popen's interface used here, applied to a whole process group."""

    pid: int
    returncode: int | None = None

    @abstractmethod
    def poll(self) -> int | None:
        """The exit code, or None while the process runs."""

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired("a section", timeout or 0.0)
            time.sleep(0.01)
        return code

    def end(self, seconds: float = 5.0) -> bool:
        """Kill the group; return False if it survives for `seconds`, as a process stuck in a driver may."""
        self.kill()
        try:
            self.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def interrupt(self) -> None:
        """Send SIGINT, on which pytest still reports the failures so far."""
        self._signal(signal.SIGINT)

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)


class Forked(Process):
    """Runs a function in a fork. The exit code is its return value, or 1 with a traceback in the output."""

    def __init__(self, run: Callable[[], Any], output: int, cwd: Path, env: Mapping[str, str]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._child(run, output, cwd, env)
        with contextlib.suppress(OSError):  # also set in the child, so that the order does not matter
            os.setpgid(self.pid, self.pid)

    @staticmethod
    def _child(run: Callable[[], Any], output: int, cwd: Path, env: Mapping[str, str]) -> None:
        code = 1
        try:
            os.setpgid(0, 0)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.environ.update(env)
            os.chdir(cwd)
            if "torch" in sys.modules and "OMP_NUM_THREADS" in env:  # OpenMP has already read the environment
                sys.modules["torch"].set_num_threads(int(env["OMP_NUM_THREADS"]))
            code = int(run() or 0)
        except SystemExit as exit_:
            if isinstance(exit_.code, str):
                print(exit_.code, file=sys.stderr)
            code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
                self.kill()  # its remaining children
        return self.returncode


class Spawned(Process):
    """Runs a command in a new process."""

    def __init__(self, command: Sequence[str], output: int, cwd: Path, env: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **env},
            process_group=0,  # a new group, but not a new session, which would outlive this command
        )
        self.pid = self._process.pid

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._process.poll()
            if self.returncode is not None:
                self.kill()
        return self.returncode


class Launcher:
    """Starts tasks in forks, or in new processes if `forks` is false."""

    def __init__(self, cwd: Path) -> None:
        self.cwd, self.forks = cwd, True

    def __call__(self, task: Task, log: Path, **env: str) -> Process:
        with log.open("ab") as output:
            return self.start(task, output.fileno(), self.cwd, **start_up.variable(log), **env)

    def start(self, task: Task, output: int, cwd: Path, **env: str) -> Process:
        """Start a task with an open output file."""
        if self.forks:
            return Forked(task.run, output, cwd, env)
        return Spawned(task.command, output, cwd, env)

    def command(self, command: Sequence[str], log: Path, **env: str) -> Process:
        """Start a command in a new process."""
        with log.open("ab") as output:
            return Spawned(command, output.fileno(), self.cwd, {**start_up.variable(log), **env})
