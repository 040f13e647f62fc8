"""The part of `make gpu` that runs on the prepared machine: parallel checks, then the timed sections, all in forks.

Started by run.py (`python -m gpu.measure FILE`); the JSON file holds the start time and the preparation's results.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from gpu import counters, headline, jobs, sections
from gpu.jobs import PASSED, Job, Row
from gpu.processes import Launcher, Process, Task, command_line_task, pytest_task, script_task
from gpu.sections import REHEARSAL, Section

if TYPE_CHECKING:
    from scenarioclip_fast.bench.record import Record

ROOT = Path(__file__).resolve().parents[2]
# Modules that sections import, imported once before forking. None may initialise CUDA.
IMPORTS = (
    "torch",
    "torch._dynamo",
    "triton",
    "numpy",
    "scipy.ndimage",
    "PIL.Image",
    "pytest",
    "hypothesis",
    "yaml",
    "safetensors.torch",
    "simplejpeg",
    "instant_clip_tokenizer",
    "matplotlib.figure",
    "scenarioclip_fast.ops",
    "scenarioclip_fast.losses",
    "scenarioclip_fast.data",
    "scenarioclip_fast.model",
    "scenarioclip_fast.train.trainer",
    "scenarioclip_fast.recipes.demo",
    "scenarioclip_fast.bench.runner",
    "scenarioclip_fast.bench.report",
    "scenarioclip_fast.kernels.add_layer_norm.add_layer_norm_triton",
    "scenarioclip_fast.kernels.contrastive.contrastive_triton",
    "scenarioclip_fast.kernels.distillation.distillation_triton",
    "scenarioclip_fast.kernels.quick_gelu.quick_gelu_triton",
    "scenarioclip_fast.kernels.short_attention.short_attention_triton",
)
# Each test file, and the number of processes that share its tests, many of which compile a kernel. Collecting tests
# queries the driver for devices, so no process that has collected tests may be forked.
TESTS = {
    "tests/ops/test_contrastive.py": 4,
    "tests/ops/test_views.py": 3,
    "tests/ops/test_distillation.py": 2,
    "tests/ops/test_contrastive_chunked.py": 1,
    "tests/ops/test_exchange_plan.py": 1,
    "tests/ops/test_contrastive_distributed.py": 1,
    "tests/ops/test_contrastive_large.py": 2,
    "tests/ops/test_contrastive_weights.py": 2,
    "tests/kernels/test_contrastive_cuda.py": 1,
    "tests/train/test_trainer.py": 1,
    "tests/train/test_trainer_switches.py": 1,
    "tests/train/test_saving.py": 1,
    "tests/model/test_exactness.py": 1,
    "tests/model/test_fp8.py": 1,
    "tests/cli/test_eval.py": 1,
    "tests/data/test_loader.py": 1,
    "tests/data/test_decode.py": 1,
    "tests/data/test_preprocess.py": 1,
    "tests/train/test_train_checkpoint.py": 1,
    "tests/ops/test_ema.py": 1,
    "tests/ops/test_add_layer_norm.py": 1,
    "tests/ops/test_quick_gelu.py": 1,
    "tests/ops/test_short_attention.py": 2,
    "tests/test_native.py": 1,
    "tests/faults/test_raw_ops.py": 1,
}
PARALLEL_TESTS = 8
FEW_THREADS = {"OMP_NUM_THREADS": "2"}  # per process: the checks share the cores
# Test files that compile training steps, run at the end if time allows.
TESTS_COMPILED = ("tests/train/test_trainer_switches.py",)
# Benchmarks that are compiled ahead, so that the timed sections find warm caches.
WARM = {"warm_step": ("bench_step", "graphs"), "warm_contrastive": ("bench_contrastive", "compiled or triton")}
SANITIZE = {
    "memcheck_cuda": ("memcheck", "cuda"),
    "racecheck": ("racecheck", "cuda"),
    "memcheck_triton": ("memcheck", "triton"),
}
UNKNOWN: dict[str, Any] = {"kind": "cuda", "device": "unknown", "versions": {}}
NO_TIME = "skipped: too little time left"
FILES = ("record.json", "README.md", "sections.csv", "log.txt", "all.tar.gz")
# Files that are large and reproducible are not archived.
MAX_FILE_BYTES = 4 << 20
EXCLUDED = ("demo/scenes", "demo/shards", "checkpoints", ".safetensors")


def hazards_in_libraries(log: str) -> str:
    """A note if racecheck ran to its end and all that it reports is within kernels of cuBLAS, which are not ours.

    `--kernel-name-exclude` should leave those out, but the verdict does not depend on how they are called.
    """
    lines = [line.removeprefix("=========").strip() for line in log.splitlines()]
    reported = [i for i, line in enumerate(lines) if line.startswith(("Error:", "Warning:"))]
    summary = re.search(r"RACECHECK SUMMARY: (\d+) hazards? displayed", log)
    if not reported or summary is None or int(summary[1]) != len(reported) or not re.search(r"^\w+: done$", log, re.M):
        return ""
    library = r"(?:void )?(?:nvjet_|cublas|cutlass_\d+_|cutlass::Kernel2?<cutlass_\d+_)"
    first = re.compile(rf"(?:Error|Warning): Race reported between (?:Read|Write) access at {library}")
    second = re.compile(rf"and (?:Read|Write) access at {library}")
    for i in reported:
        rest = [line for line in lines[i + 1 :] if line]
        if not first.match(lines[i]) or not rest or not second.match(rest[0]):
            return ""
        more = rest[1] if len(rest) > 1 else ""
        if more.startswith("and "):  # more accesses than two: nothing that was seen so far
            return ""
    return "hazards in cuBLAS only"


class GpuRun:
    """A run of `make gpu`: its clock, its folders and the outcome of each section."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.factor: float = state["factor"]
        self.clock = sections.Clock(state["total"], state["started"])
        self.destination, self.out = Path(state["out"]), Path(state["work"]) / "out"
        self.only: list[str] = state["only"]
        self.rows = [Row(*note) for note in state["notes"]]
        self.launch = Launcher(ROOT)
        self.machine: dict[str, Any] = {}
        self.commit: str | None = state["commit"]
        self.out.mkdir()
        self.earlier = self._move_earlier_files()
        for text in Path(state["work"]).glob("*.txt"):
            shutil.move(text, self.out / text.name)
        for row in self.rows:
            self._log(row)

    def _move_earlier_files(self) -> Path | None:
        """Move the files of an earlier run from OUT to OUT/earlier-N; return that folder, or None."""
        found = [self.destination / name for name in FILES if (self.destination / name).exists()]
        if not found:
            return None
        number = 1
        while (folder := self.destination / f"earlier-{number}").exists():
            number += 1
        folder.mkdir()
        for path in found:
            path.rename(folder / path.name)
        print(f"== moved the files of an earlier run to {folder}", flush=True)
        return folder

    def run(self) -> int:
        """Run all sections; return 1 if one failed or was skipped."""
        try:
            self.start()
            checks = [name for name in sections.CHECK_PARTS if self.requested(name)]
            if checks:
                self._guarded("checks", lambda: self.run_checks(checks))
            for section in sections.TIMED:
                if self.requested(section.name):
                    self.run_timed(section)
        finally:  # also if interrupted
            self.archive()
        print(f"\n== headline figures, after {self.clock.elapsed():.0f} s")
        from scenarioclip_fast.bench import machine

        for line in headline.lines(self.out, self.machine, self.rows, machine.commit(ROOT)):
            print(line)
        return int(any(row.result != PASSED for row in self.rows))

    def requested(self, name: str) -> bool:
        return not self.only or name in self.only

    def limit(self, section: Section) -> float | None:
        """The time limit of `section` in seconds, or None to skip it."""
        later = [s for s in sections.TIMED if self.requested(s.name)]
        if section in later:
            later = later[later.index(section) + 1 :]
        return self.clock.limit(self._scaled(section), [self._scaled(s) for s in later])

    def _scaled(self, section: Section) -> Section:
        return replace(section, budget=section.budget * self.factor, maximum=section.maximum * self.factor)

    # Output files

    def add_row(self, row: Row) -> None:
        """Print and save the outcome of a section."""
        self.rows.append(row)
        print(self._log(row), flush=True)
        self.save()

    def _log(self, row: Row) -> str:
        line = f"== {row.section}: {row.result}, {row.seconds:.1f} s"
        log = self.out / f"{row.section}.txt"
        with (self.destination / "log.txt").open("a", encoding="utf-8") as full_log:
            full_log.write(f"{line}\n{jobs.shortened(log) if log.exists() else ''}\n")
        return line

    def save(self) -> None:
        """Copy the results so far into OUT, each file atomically."""
        lines = ["section,result,seconds,start-up seconds"]
        for row in self.rows:
            start_up = "" if row.start_up is None else f"{row.start_up:.2f}"
            lines.append(f"{row.section},{row.result.replace(',', ';')},{row.seconds:.1f},{start_up}")
        (self.out / "sections.csv").write_text("\n".join(lines) + "\n")
        headline.write_readme(self.out)
        for name in ("record.json", "README.md", "sections.csv"):
            if (self.out / name).exists():
                shutil.copyfile(self.out / name, self.destination / f"{name}.partial")
                (self.destination / f"{name}.partial").replace(self.destination / name)

    def archive(self) -> None:
        """Archive everything else in one file, since some machines return only a few files."""

        def keep(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
            excluded = entry.size > MAX_FILE_BYTES or any(part in entry.name for part in EXCLUDED)
            return None if excluded else entry

        partial = self.destination / "all.tar.gz.partial"
        with tarfile.open(partial, "w:gz", compresslevel=1) as everything:
            everything.add(self.out, arcname=".", filter=keep)
        partial.replace(self.destination / "all.tar.gz")

    # Sections

    def start(self) -> None:
        """Import everything, then use the device for the first time in a fork, which also describes the machine."""
        begin = time.time()
        problems = []
        for name in IMPORTS:
            try:
                importlib.import_module(name)
            except Exception as error:  # fatal only to the sections that need it
                problems.append(f"cannot import {name}: {type(error).__name__}: {error}".splitlines()[0])
        for plugin in importlib.metadata.entry_points(group="pytest11"):
            with contextlib.suppress(Exception):  # pytest reports broken plugins
                plugin.load()
        gc.freeze()  # else the first collection in each fork touches, and so copies, all imported objects
        from scenarioclip_fast.bench import machine

        if self.commit is not None:
            os.environ.setdefault(machine.COMMIT_VARIABLE, self.commit)
        log, description = self.out / "start.txt", self.out / "machine.json"
        task = script_task(Path(__file__).with_name("describe.py"), [str(description)])
        if not self._succeeds(self.launch(task, log), 30):
            problems.append("a fork could not use the GPU: sections run in new processes")
            self.launch.forks = False
            if not self._succeeds(self.launch(task, log), 40):
                problems.append("the GPU could not be used: see start in log.txt")
        self.machine = self._read_description(description)
        with log.open("a") as text:
            text.write("".join(f"{line}\n" for line in problems))
        for line in problems:
            print(f"   {line}")
        seconds = time.time() - begin
        result = "the machine could not be described" if self.machine == UNKNOWN else PASSED
        self.add_row(Row("start", result, seconds, seconds))

    def _succeeds(self, process: Process, seconds: float) -> bool:
        try:
            return process.wait(seconds * self.factor) == 0
        except subprocess.TimeoutExpired:
            process.end()
            return False

    @staticmethod
    def _read_description(path: Path) -> dict[str, Any]:
        try:
            return dict(json.loads(path.read_text()))
        except (OSError, ValueError):
            return UNKNOWN

    def run_checks(self, names: Sequence[str]) -> None:
        """Run tests, sanitizers and warm-ups of the compilers' caches, in parallel and untimed."""
        limit = self.limit(sections.CHECKS)
        if limit is None:
            self.add_row(Row("checks", NO_TIME, 0))
            return
        print(f"== in parallel, limit {limit:.0f} s: {', '.join(names)}", flush=True)
        started = []
        for name in names:
            job = self._check(name)
            if isinstance(job, Row):
                self.add_row(job)
            else:
                started.append(job)
        rows = jobs.run(started, limit, grace=5 * self.factor)
        for job, row in zip(started, rows, strict=True):
            self.add_row(row)
            if row.result != PASSED or job.note or job.name == "tests":
                self._show(job.summary())
        # Inductor autotuned on a GPU busy with the other checks: make it choose again.
        if cache := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
            for choice in Path(cache).glob("**/*.best_config"):
                choice.unlink(missing_ok=True)

    def _check(self, name: str) -> Job | Row:
        if name == "doctor":
            return Job(name, self.out, [lambda log: self.launch(command_line_task(["doctor"]), log, **FEW_THREADS)])
        if name == "tests":
            return self._tests()
        if name in WARM:
            file, keyword = WARM[name]
            lines = self.out / f"{name}.jsonl"
            arguments = [f"benchmarks/{file}.py", "-m", "gpu", "-k", keyword, "-p", "no:cacheprovider"]
            arguments += ["-p", "gpu.plugin", "-p", "scenarioclip_fast.bench.plugin", "--bench-lines", str(lines)]
            task = pytest_task(arguments)
            env = {"SCENARIOCLIP_FAST_BENCH_WARM": "1", **FEW_THREADS}
            return Job(name, self.out, [lambda log: self.launch(task, log, **env)])
        tool, part = SANITIZE[name]
        sanitizer = shutil.which("compute-sanitizer")
        if sanitizer is None and not REHEARSAL:
            return Row(name, "skipped: compute-sanitizer is not on PATH", 0)
        command = [sys.executable, "-m", "gpu.sanitize", part]
        if not REHEARSAL:
            # racecheck reports hazards within cuBLAS's own kernels for Hopper.
            options = ["--report-api-errors", "no"] if tool == "memcheck" else ["--kernel-name-exclude", "kns=nvjet"]
            command = [str(sanitizer), "--tool", tool, *options, "--error-exitcode", "9", *command]
        # Without PyTorch's memory pools, each tensor is its own allocation with known bounds.
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", **FEW_THREADS}
        excuse = hazards_in_libraries if tool == "racecheck" else None
        return Job(name, self.out, [lambda log: self.launch.command(command, log, **env)], excuse=excuse)

    def _tests(self) -> Job:
        def start(file: str, shard: str) -> jobs.Start:
            task = self._tests_task([file], "gpu and not compiles", f"--shard={shard}", timeout=60)
            return lambda log: self.launch(task, log, **FEW_THREADS)

        starts = [start(file, f"{i}/{count}") for file, count in TESTS.items() for i in range(count)]
        return Job("tests", self.out, starts, parallel=min(PARALLEL_TESTS, os.cpu_count() or 1))

    @staticmethod
    def _tests_task(files: Sequence[str], marks: str, *options: str, timeout: int) -> Task:
        arguments = [
            *files,
            "-m",
            marks,
            "-rs",
            "--tb=short",
            "--durations=3",
            "-p",
            "no:cacheprovider",
            "-p",
            "gpu.plugin",
        ]
        if importlib.util.find_spec("pytest_benchmark") is not None:
            arguments.append("--benchmark-disable")
        if importlib.util.find_spec("pytest_timeout") is not None:
            arguments.append(f"--timeout={timeout}")
        if REHEARSAL:  # else pytest may truncate the message that shows a use of the device
            arguments.append("-vv")
        return pytest_task([*arguments, *options])

    def run_timed(self, section: Section) -> None:
        """Run one timed section; its failure does not affect the others."""
        limit = self.limit(section)
        if limit is None:
            self.add_row(Row(section.name, NO_TIME, 0))
            return
        print(f"== {section.name}: limit {limit:.0f} s, elapsed {self.clock.elapsed():.0f} s", flush=True)
        runs = {"bench": self._bench, "tune": self._tune, "demo": self._demo, "compiled": self._tests_compiled}
        runs["counters"] = self._counters
        self._guarded(section.name, lambda: self.add_row(runs[section.kind](section.name, limit)))

    def _guarded(self, name: str, run: Callable[[], None]) -> None:
        begin = time.time()
        try:
            run()
        except Exception as error:  # an error in this script must not prevent later sections
            result = f"{type(error).__name__}: {error}".splitlines()[0]
            self.add_row(Row(name, result, time.time() - begin))

    def _bench(self, name: str, limit: float) -> Row:
        from scenarioclip_fast.bench.record import FILE, read_record
        from scenarioclip_fast.bench.runner import run_file

        def start(arguments: Sequence[str], directory: Path, output: IO[bytes]) -> Process:
            return self.launch.start(pytest_task(arguments), output.fileno(), directory)

        record = read_record(self.out) if (self.out / FILE).exists() else self._first_record()
        path = ROOT / "benchmarks" / f"{name}.py"
        part = run_file(name.removeprefix("bench_"), path, "cuda", limit, start)
        record.with_part(part).write(self.out)
        table = headline.short_table(part)
        failures = [f"{failure.name}: {failure.reason}" for failure in part.failed]
        (self.out / f"{name}.txt").write_text("\n".join([*table, *failures]) + "\n")
        self._show(table)
        result = "timed out" if part.exit is None else f"exit {part.exit}" if part.exit else PASSED
        return Row(name, result, part.seconds, part.start_up)

    def _first_record(self) -> Record:
        """An empty record or, if only some sections are requested, that of an earlier run on this machine."""
        from scenarioclip_fast.bench.record import FILE, Record, read_record
        from scenarioclip_fast.bench.runner import same_machine

        if self.only and self.earlier is not None and (self.earlier / FILE).exists():
            record = read_record(self.earlier)
            if same_machine(record.machine, self.machine):
                return record
        return Record(self.machine)

    def _tune(self, name: str, limit: float) -> Row:
        task = script_task(ROOT / "benchmarks" / f"{name}.py", ["--quick", "--out", str(self.out / f"{name}.json")])
        return self._run_alone(Job(name, self.out, [lambda log: self.launch(task, log)]), limit, shown=60)

    def _tests_compiled(self, name: str, limit: float) -> Row:
        task = self._tests_task(TESTS_COMPILED, "gpu and compiles", timeout=120)
        job = Job(name, self.out, [lambda log: self.launch(task, log)])
        (row,) = jobs.run([job], limit, grace=5.0)
        self._show(job.summary())
        return row

    def _counters(self, name: str, limit: float) -> Row:
        """Hardware counters of the largest kernels, if Nsight Compute is there and may read them."""
        if shutil.which("ncu") is None:
            return Row(name, PASSED if REHEARSAL else "skipped: ncu is not on PATH", 0)
        output = self.out / "counters.csv"
        command = counters.command(str(output), sys.executable)
        job = Job(name, self.out, [lambda log: self.launch.command(command, log)])
        (row,) = jobs.run([job], limit, grace=5.0)
        lines = output.read_text(errors="replace").splitlines() if output.exists() else []
        self._show([*counters.table(lines), *([] if row.result == PASSED else job.summary())])
        return row

    def _demo(self, name: str, limit: float) -> Row:
        arguments = ["demo", "--device", "cpu" if REHEARSAL else "cuda", "--out", str(self.out / "demo")]
        arguments += ["--scenes", "48", "--views", "700"] if REHEARSAL else []
        task = command_line_task(arguments)
        return self._run_alone(Job(name, self.out, [lambda log: self.launch(task, log)]), limit, shown=12)

    def _run_alone(self, job: Job, limit: float, shown: int) -> Row:
        (row,) = jobs.run([job], limit, grace=1.0)
        self._show(job.log.read_text(errors="replace").splitlines()[-shown:])
        return row

    @staticmethod
    def _show(lines: Sequence[str]) -> None:
        for line in lines:
            print(f"   {line}", flush=True)


def main() -> int:
    state = json.loads(Path(sys.argv[1]).read_text())
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that results are saved and children killed
    try:
        return GpuRun(state).run()
    except KeyboardInterrupt:
        print("== interrupted: OUT holds the results so far", flush=True)
        return 130
    finally:
        shutil.rmtree(state["work"], ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
