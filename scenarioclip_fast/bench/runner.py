"""Runs benchmark files, each in its own process, and saves the record after each."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import scenarioclip_fast.benchmarks as benchmarks
from scenarioclip_fast.bench import machine
from scenarioclip_fast.bench.record import FILE, Part, Record, Result, Unmeasured, read_record
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.progress import progress
from scenarioclip_fast.terminal import warn

KINDS = ("kernels", "data", "step")
_PREFIX = "bench_"
# Benchmark files not listed here measure kernels.
_KIND_OF = {
    "data": "data",
    "pack": "data",
    "index": "data",
    "generation": "data",
    "vocabulary": "data",
    "step": "step",
    "trainer": "step",
    "checkpoint": "step",
    "end_to_end": "step",
}
_POLL_S = 0.2
_TERMINATE_S = 10.0  # between SIGTERM and SIGKILL
_NO_TESTS = 5  # pytest's exit code if no tests were collected: not an error here


class Process(Protocol):
    """The part of subprocess.Popen's interface that the runner uses."""

    returncode: int | None

    def poll(self) -> int | None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...
    def wait(self, timeout: float | None = None) -> int: ...


# Starts pytest: arguments, working directory, output file.
Start = Callable[[Sequence[str], Path, IO[bytes]], Process]


def new_process(arguments: Sequence[str], directory: Path, output: IO[bytes]) -> Process:
    """Start pytest in a new process, the default `Start`."""
    command = [sys.executable, "-m", "pytest", *arguments]
    return subprocess.Popen(command, cwd=directory, stdout=output, stderr=subprocess.STDOUT)


def benchmark_files() -> dict[str, Path]:
    """Map the name of every benchmark to its file, ceilings first."""
    folder = Path(benchmarks.__file__).parent
    files = {path.stem.removeprefix(_PREFIX): path for path in folder.glob(f"{_PREFIX}*.py")}
    return dict(sorted(files.items(), key=lambda item: (item[0] != "ceilings", _kind(item[0]) != "kernels", item[0])))


def _kind(name: str) -> str:
    return _KIND_OF.get(name, "kernels")


def selected_files(what: Sequence[str]) -> dict[str, Path]:
    """The files of the given kinds and names; all files if `what` is empty."""
    files = benchmark_files()
    for word in what:
        if word not in (*KINDS, *files):
            raise UserError(f"bench: got {word!r}, expected {', '.join(KINDS)}, or one of {', '.join(sorted(files))}")
    return {name: path for name, path in files.items() if not what or name in what or _kind(name) in what}


def resolve_device(name: str) -> str:
    """Resolve "auto", "cpu" or "cuda" to "cpu" or "cuda"."""
    import torch

    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("--device cuda: no GPU is visible to torch (see `scenarioclip-fast doctor`)")
    return ("cuda" if available else "cpu") if name == "auto" else name


def measure(
    what: Sequence[str], out: Path, *, device: str = "auto", limit: float | None = None, rehearse: bool = False
) -> tuple[Record, Path]:
    """Run benchmarks, saving OUT/record.json after each file; return the record and its directory.

    Args:
        what: kinds or names of files; empty for all.
        out: directory of the record; "{date}" and "{device}" are replaced. If `what` is given, an existing record keeps
            its other parts; it must come from the same machine and versions.
        device: "auto", "cpu" or "cuda".
        limit: time limit per file in seconds; benchmarks that finished before it are kept.
        rehearse: run the GPU cases on the CPU at toy sizes, to check that they run; the times mean nothing.
    """
    files = selected_files(what)
    if rehearse:
        device, description = "cuda", machine.describe_rehearsal()
        os.environ[machine.REHEARSAL_VARIABLE] = "1"  # read by the benchmark processes
    else:
        device = resolve_device(device)
        description = machine.describe(device)
        if device == "cpu":
            # PyTorch requests huge pages for large tensors. Page faults of 4 KiB can take half of a step on a CPU, and
            # scatter.
            os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    out = expand_placeholders(out, description)
    record = Record(description)
    if (what or rehearse) and (out / FILE).is_file():
        existing = read_record(out)
        record = existing if what else record
        if differing := _differing(existing.machine, description):
            raise UserError(
                f"--out {out}: holds a record of another machine or other versions ({', '.join(differing)}): choose "
                "another directory, or remove it"
            )
    out.mkdir(parents=True, exist_ok=True)  # fail before measuring if it is not writable
    for name, path in files.items():
        part = run_file(name, path, device, limit)
        record = record.with_part(part)
        record.write(out)
        for failure in part.failed:
            warn(f"failed: {failure.name}: {failure.reason.splitlines()[0]}")
        if part.note:
            warn(f"{name}: {part.note}")
    return Record(record.machine, record.parts, out.resolve().name), out


def same_machine(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two descriptions are of the same machine and the same versions."""
    return not _differing(one, other)


def _differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    # Memory may differ: virtual machines can be given more while they run.
    return [key for key in other if key != "memory_gib" and one.get(key) != other[key]]


def expand_placeholders(out: Path, description: dict[str, Any]) -> Path:
    """Replace "{date}" and "{device}" in `out`."""
    slug = "-".join("".join(c if c.isalnum() else " " for c in description["device"].lower()).split())
    return Path(str(out).replace("{date}", f"{datetime.date.today()}").replace("{device}", slug))


def run_file(name: str, path: Path, device: str, limit: float | None, start: Start = new_process) -> Part:
    """Run one benchmark file.

    Args:
        name: name of the part.
        path: the file, in the `benchmarks` folder of a checkout or of the installed package.
        device: "cpu" or "cuda"; selects the file's cases.
        limit: time limit in seconds, or None; benchmarks that finished before it are kept.
        start: starts pytest.
    """
    root = path.parents[1]
    arguments = [str(path.relative_to(root)), "-m", "gpu" if device == "cuda" else "not gpu"]
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    commit, before = machine.commit(root), machine.state(device)
    begin = time.monotonic()
    collected: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        lines, log = Path(folder) / "lines.jsonl", Path(folder) / "log.txt"
        lines.touch()
        options = ["-p", "scenarioclip_fast.bench.plugin", "--bench-lines", str(lines), "-p", "no:cacheprovider"]
        with log.open("wb") as output:
            process = start([*arguments, *options, *_isolation(root)], root, output)
            try:
                rows = list(_follow(process, lines, name, limit, lambda: collected.append(time.monotonic() - begin)))
            finally:
                _stop(process)
        seconds = time.monotonic() - begin
        timed_out = limit is not None and seconds >= limit
        failed = any(row["outcome"] == "failed" for row in rows)
        note = ""
        if timed_out:
            note = f"stopped at its time limit of {limit:.0f} s: the remaining benchmarks did not run"
        elif process.returncode == _NO_TESTS and not failed:
            note = "no benchmarks for this device"
        elif process.returncode not in (0, 1) and not failed:
            note = f"pytest exited with code {process.returncode}: " + log.read_text(errors="replace").strip()[-1000:]
    by_outcome = {kind: [row for row in rows if row["outcome"] == kind] for kind in ("measured", "left out", "failed")}
    keys = ("name", "group", "form", "samples", "clock", "extra", "took")
    return Part(
        name=name,
        command=" ".join([*_variables(), shlex.join(["pytest", *arguments])]),
        commit=commit,
        started=started,
        seconds=round(seconds, 1),
        start_up=round(collected[0], 2) if collected else None,
        exit=None if timed_out else 0 if process.returncode == _NO_TESTS else process.returncode,
        before=before,
        after=machine.state(device),
        results=[Result(**{key: row[key] for key in keys}) for row in by_outcome["measured"]],
        left_out=[Unmeasured(row["name"], row["reason"]) for row in by_outcome["left out"]],
        failed=[Unmeasured(row["name"], row["reason"]) for row in by_outcome["failed"]],
        note=note,
    )


def _variables() -> list[str]:
    """The environment variables that affect benchmarks, as NAME=VALUE."""
    others = ("OMP_NUM_THREADS", "THP_MEM_ALLOC_ENABLE")
    affects = [k for k in sorted(os.environ) if k.startswith("SCENARIOCLIP_FAST_BENCH") or k in others]
    return [f"{k}={os.environ[k]}" for k in affects]


def _isolation(root: Path) -> list[str]:
    """Options that keep pytest from using the configuration of a project that surrounds the installed package."""
    if any((root / name).is_file() for name in ("pyproject.toml", "pytest.ini")):
        return []
    unknown_marks = ["-W", "ignore::pytest.PytestUnknownMarkWarning"]
    return ["-c", os.devnull, "--rootdir", str(root), "--import-mode=importlib", *unknown_marks]


def _follow(
    process: Process, lines: Path, name: str, limit: float | None, collected: Callable[[], None]
) -> Iterator[dict[str, Any]]:
    """Yield the plugin's lines until the process ends, with progress; call `collected` once the cases are known."""
    total = 0

    def tail() -> Iterator[dict[str, Any]]:
        nonlocal total
        stop = None if limit is None else time.monotonic() + limit
        with lines.open(encoding="utf-8") as source:
            rest = ""
            while True:
                ended = process.poll() is not None
                rest += source.read()
                *complete, rest = rest.split("\n")
                for row in map(json.loads, complete):
                    if "total" in row:
                        total = row["total"]
                        collected()
                        continue
                    yield row
                if ended or (stop is not None and time.monotonic() > stop):
                    return
                time.sleep(_POLL_S)

    rows = tail()
    first = next(rows, None)  # after this, `total` is known
    if first is None:
        return

    yield from progress(itertools.chain([first], rows), total=total or None, desc=f"bench {name}", unit="benchmarks")


def _stop(process: Process) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_TERMINATE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # a process stuck in a driver cannot be killed
                process.wait(_TERMINATE_S)
