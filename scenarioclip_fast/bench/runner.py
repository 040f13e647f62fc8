"""Runs benchmark files, each in a process of its own, and writes the record after each."""

from __future__ import annotations

import contextlib
import datetime
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
from scenarioclip_fast.bench.record import FILE, Absent, Part, Record, Result, read_record
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.progress import progress

KINDS = ("kernels", "data", "step")
_PREFIX = "bench_"
# A benchmark file is one of a kernel unless it is named here.
_KIND_OF = {"data": "data", "step": "step", "trainer": "step", "end_to_end": "step"}
_POLL_S = 0.2
_END_S = 10.0  # between asking a process to end and ending it


class Process(Protocol):
    """What the runner needs of a process: the methods of subprocess.Popen with these names."""

    returncode: int | None

    def poll(self) -> int | None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...
    def wait(self, timeout: float | None = None) -> int: ...


# Starts pytest with some arguments in a directory, its output going to a file.
Start = Callable[[Sequence[str], Path, IO[bytes]], Process]


def new_process(arguments: Sequence[str], directory: Path, output: IO[bytes]) -> Process:
    """The usual `Start`."""
    command = [sys.executable, "-m", "pytest", *arguments]
    return subprocess.Popen(command, cwd=directory, stdout=output, stderr=subprocess.STDOUT)


def benchmark_files() -> dict[str, Path]:
    """Name -> file of every benchmark, ceilings first."""
    folder = Path(benchmarks.__file__).parent
    files = {path.stem.removeprefix(_PREFIX): path for path in folder.glob(f"{_PREFIX}*.py")}
    return dict(sorted(files.items(), key=lambda item: (item[0] != "ceilings", _kind(item[0]) != "kernels", item[0])))


def _kind(name: str) -> str:
    return _KIND_OF.get(name, "kernels")


def chosen(what: Sequence[str]) -> dict[str, Path]:
    """The files of these kinds and names; of all where none is given."""
    files = benchmark_files()
    for word in what:
        if word not in (*KINDS, *files):
            raise UserError(f"bench: got {word!r}, expected {', '.join(KINDS)}, or one of {', '.join(sorted(files))}")
    return {name: path for name, path in files.items() if not what or name in what or _kind(name) in what}


def pick_device(name: str) -> str:
    """ "cpu" or "cuda" from those or "auto"."""
    import torch

    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("--device cuda: no GPU is visible to torch (see `scenarioclip-fast doctor`)")
    return ("cuda" if available else "cpu") if name == "auto" else name


def measure(
    what: Sequence[str], out: Path, *, device: str = "auto", limit: float | None = None, rehearse: bool = False
) -> tuple[Record, Path]:
    """Runs benchmarks, and leaves OUT/record.json after each file; returns the record and where it is.

    Args:
        what: kinds or names of files; empty for all.
        out: "{date}" and "{device}" in it are filled in. Where only some files are chosen, a record that is there
            already keeps its other parts; it must be of the same machine and versions.
        device: "auto", "cpu" or "cuda".
        limit: seconds that each file may take; what it has measured by then counts.
        rehearse: run the GPU cases on the CPU at toy sizes, which checks that they run and measures nothing.
    """
    files = chosen(what)
    if rehearse:
        device, here = "cuda", machine.describe_rehearsal()
        os.environ[machine.REHEARSAL_VARIABLE] = "1"  # read by the benchmarks' processes
    else:
        device = pick_device(device)
        here = machine.describe(device)
    out = filled_in(out, here)
    record = Record(here)
    if what and (out / FILE).is_file():
        record = read_record(out)
        if differing := _differing(record.machine, here):
            raise UserError(
                f"--out {out}: holds a record of another machine or of other versions ({', '.join(differing)}): name "
                "another directory, or remove it"
            )
    out.mkdir(parents=True, exist_ok=True)  # what cannot be written is no reason to measure
    for name, path in files.items():
        part = run_file(name, path, device, limit)
        record = record.with_part(part)
        record.write(out)
        for absent in part.failed:
            print(f"failed: {absent.name}: {absent.reason.splitlines()[0]}", file=sys.stderr)
        if part.note:
            print(f"{name}: {part.note}", file=sys.stderr)
    return Record(record.machine, record.parts, out.resolve().name), out


def same_machine(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two descriptions are of the same machine with the same versions."""
    return not _differing(one, other)


def _differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    # Virtual machines are given memory as they use it.
    return [key for key in other if key != "memory_gib" and one.get(key) != other[key]]


def filled_in(out: Path, here: dict[str, Any]) -> Path:
    """`out` with {date} and {device} replaced."""
    slug = "-".join("".join(c if c.isalnum() else " " for c in here["device"].lower()).split())
    return Path(str(out).replace("{date}", f"{datetime.date.today()}").replace("{device}", slug))


def run_file(name: str, path: Path, device: str, limit: float | None, start: Start = new_process) -> Part:
    """Runs one benchmark file.

    Args:
        name: of the part.
        path: the file, in the folder `benchmarks` of a checkout or of the installed package.
        device: "cpu" or "cuda", which selects its cases.
        limit: seconds that it may take; what it has measured by then counts. None: no limit.
        start: starts pytest.
    """
    root = path.parents[1]
    arguments = [str(path.relative_to(root)), "-m", "gpu" if device == "cuda" else "not gpu"]
    variables = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("SCENARIOCLIP_FAST_BENCH")]
    if threads := os.environ.get("OMP_NUM_THREADS"):
        variables.append(f"OMP_NUM_THREADS={threads}")
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
                rows = list(_watched(process, lines, name, limit, lambda: collected.append(time.monotonic() - begin)))
            finally:
                _end(process)
        seconds = time.monotonic() - begin
        late = limit is not None and seconds >= limit
        note = f"stopped after {limit:.0f} s, its limit: the rest was not measured" if late else ""
        if not late and process.returncode not in (0, 1) and not any(row["outcome"] == "failed" for row in rows):
            note = f"pytest ended with code {process.returncode}: " + log.read_text(errors="replace").strip()[-1000:]
            # Not one benchmark for this device in the file: nothing went wrong.
            note = "nothing for this device" if process.returncode == 5 else note
    of = {kind: [row for row in rows if row["outcome"] == kind] for kind in ("measured", "left out", "failed")}
    keys = ("name", "group", "form", "samples", "clock", "extra", "took")
    return Part(
        name=name,
        command=" ".join([*variables, shlex.join(["pytest", *arguments])]),
        commit=commit,
        started=started,
        seconds=round(seconds, 1),
        start_up=round(collected[0], 2) if collected else None,
        exit=None if late else 0 if process.returncode == 5 else process.returncode,
        before=before,
        after=machine.state(device),
        results=[Result(**{key: row[key] for key in keys}) for row in of["measured"]],
        left_out=[Absent(row["name"], row["reason"]) for row in of["left out"]],
        failed=[Absent(row["name"], row["reason"]) for row in of["failed"]],
        note=note,
    )


def _isolation(root: Path) -> list[str]:
    """Options that keep the pytest configuration of a project around the installed package out of a benchmark."""
    if any((root / name).is_file() for name in ("pyproject.toml", "pytest.ini")):
        return []
    unknown_marks = ["-W", "ignore::pytest.PytestUnknownMarkWarning"]
    return ["-c", os.devnull, "--rootdir", str(root), "--import-mode=importlib", *unknown_marks]


def _watched(
    process: Process, lines: Path, name: str, limit: float | None, collected: Callable[[], None]
) -> Iterator[dict[str, Any]]:
    """The plugin's lines until the process ends, with progress; calls `collected` once the cases are known."""
    total = 0

    def follow() -> Iterator[dict[str, Any]]:
        nonlocal total
        stop = None if limit is None else time.monotonic() + limit
        with lines.open(encoding="utf-8") as source:
            rest = ""
            while True:
                ended = process.poll() is not None
                rest += source.read()
                *whole, rest = rest.split("\n")
                for row in map(json.loads, whole):
                    if "total" in row:
                        total = row["total"]
                        collected()
                        continue
                    yield row
                if ended or (stop is not None and time.monotonic() > stop):
                    return
                time.sleep(_POLL_S)

    rows = follow()
    first = next(rows, None)  # by then the number of benchmarks is known
    if first is None:
        return

    def again() -> Iterator[dict[str, Any]]:
        yield first
        yield from rows

    yield from progress(again(), total=total or None, desc=f"bench {name}", unit="benchmarks")


def _end(process: Process) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # one stuck in a driver is left behind
                process.wait(_END_S)
