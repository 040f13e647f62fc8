"""The part of `make gpu` that runs on the prepared machine: checks side by side, then the timed sections, all in forks.

Started by run.py (`python -m gpu.measure FILE`), with a file that says when the call began and what was prepared.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.metadata
import importlib.util
import json
import os
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

from gpu import headline, jobs, sections
from gpu.jobs import DONE, Job, Row
from gpu.processes import Launcher, Process, Task, command_line_task, pytest_task, script_task
from gpu.sections import REHEARSAL, Section

if TYPE_CHECKING:
    from scenarioclip_fast.bench.record import Record

ROOT = Path(__file__).resolve().parents[2]
# What sections import, imported once before they are forked. None of it may initialise CUDA.
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
    "scenarioclip_fast.kernels.contrastive.contrastive_triton",
    "scenarioclip_fast.kernels.distillation.distillation_triton",
)
# Each file, and the number of processes that share its tests: many of them compile a kernel. No process is forked from
# one that has collected tests, since that asks the driver for devices.
TESTS = {
    "tests/ops/test_contrastive.py": 4,
    "tests/ops/test_views.py": 3,
    "tests/ops/test_distillation.py": 2,
    "tests/ops/test_contrastive_distributed.py": 1,
    "tests/train/test_trainer.py": 1,
    "tests/train/test_trainer_switches.py": 1,
    "tests/train/test_saving.py": 1,
    "tests/model/test_exactness.py": 1,
    "tests/cli/test_eval.py": 1,
    "tests/data/test_loader.py": 1,
    "tests/data/test_decode.py": 1,
    "tests/train/test_train_checkpoint.py": 1,
    "tests/ops/test_ema.py": 1,
    "tests/test_native.py": 1,
}
TESTS_AT_ONCE = 8
FEW_THREADS = {"OMP_NUM_THREADS": "2"}  # of each process of the checks, which share the cores
# Those of them that compile training steps, for what time is left in the end.
TESTS_COMPILED = ("tests/train/test_trainer_switches.py",)
# The benchmarks whose compilation is brought forward, so that the timed sections find warm caches.
WARM = {"warm_step": ("bench_step", "compiled"), "warm_contrastive": ("bench_contrastive", "compiled or triton")}
SANITIZE = {
    "memcheck_cuda": ("memcheck", "cuda"),
    "racecheck": ("racecheck", "cuda"),
    "memcheck_triton": ("memcheck", "triton"),
}
UNKNOWN: dict[str, Any] = {"kind": "cuda", "device": "unknown", "versions": {}}
NO_TIME = "skipped: too little time was left"
FILES = ("record.json", "README.md", "sections.csv", "log.txt", "all.tar.gz")
# Large, and can be made again.
LARGEST = 4 << 20  # bytes of a file in the archive
EXCLUDED = ("demo/scenes", "demo/shards", "checkpoints", ".safetensors")


class Call:
    """One call of `make gpu`: its clock, its folders and what became of each section."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.factor: float = state["factor"]
        self.clock = sections.Clock(state["total"], state["started"])
        self.left, self.out = Path(state["out"]), Path(state["work"]) / "out"
        self.only: list[str] = state["only"]
        self.rows = [Row(*note) for note in state["notes"]]
        self.launch = Launcher(ROOT)
        self.machine: dict[str, Any] = {}
        self.commit: str | None = state["commit"]
        self.out.mkdir()
        self.earlier = self._set_aside()
        for text in Path(state["work"]).glob("*.txt"):
            shutil.move(text, self.out / text.name)
        for row in self.rows:
            self._log(row)

    def _set_aside(self) -> Path | None:
        """Moves what an earlier call left in OUT to OUT/earlier-N; its folder, if there is any."""
        found = [self.left / name for name in FILES if (self.left / name).exists()]
        if not found:
            return None
        number = 1
        while (folder := self.left / f"earlier-{number}").exists():
            number += 1
        folder.mkdir()
        for path in found:
            path.rename(folder / path.name)
        print(f"== the files of an earlier call are in {folder}", flush=True)
        return folder

    def run(self) -> int:
        """All sections; 1 where one failed or was skipped."""
        try:
            self.start()
            checks = [name for name in sections.CHECK_PARTS if self.wanted(name)]
            if checks:
                self._guarded("checks", lambda: self.checks(checks))
            for section in sections.TIMED:
                if self.wanted(section.name):
                    self.timed(section)
        finally:  # an interrupted call keeps what it has measured
            self.archive()
        print(f"\n== headline figures, after {self.clock.elapsed():.0f} s")
        from scenarioclip_fast.bench import machine

        for line in headline.lines(self.out, self.machine, self.rows, machine.commit(ROOT)):
            print(line)
        return int(any(row.result != DONE for row in self.rows))

    def wanted(self, name: str) -> bool:
        return not self.only or name in self.only

    def limit(self, section: Section) -> float | None:
        """Seconds that `section` may take."""
        later = [s for s in sections.TIMED if self.wanted(s.name)]
        if section in later:
            later = later[later.index(section) + 1 :]
        return self.clock.limit(self._scaled(section), [self._scaled(s) for s in later])

    def _scaled(self, section: Section) -> Section:
        return replace(section, budget=section.budget * self.factor, most=section.most * self.factor)

    # What is left behind

    def ended(self, row: Row) -> None:
        """Prints and keeps what became of a section."""
        self.rows.append(row)
        print(self._log(row), flush=True)
        self.keep()

    def _log(self, row: Row) -> str:
        line = f"== {row.section}: {row.result}, {row.seconds:.1f} s"
        log = self.out / f"{row.section}.txt"
        with (self.left / "log.txt").open("a", encoding="utf-8") as whole:
            whole.write(f"{line}\n{jobs.shortened(log) if log.exists() else ''}\n")
        return line

    def keep(self) -> None:
        """Copies the results so far into OUT, each file whole."""
        lines = ["section,result,seconds,start-up seconds"]
        for row in self.rows:
            start_up = "" if row.start_up is None else f"{row.start_up:.2f}"
            lines.append(f"{row.section},{row.result.replace(',', ';')},{row.seconds:.1f},{start_up}")
        (self.out / "sections.csv").write_text("\n".join(lines) + "\n")
        headline.write_readme(self.out)
        for name in ("record.json", "README.md", "sections.csv"):
            if (self.out / name).exists():
                shutil.copyfile(self.out / name, self.left / f"{name}.partial")
                (self.left / f"{name}.partial").replace(self.left / name)

    def archive(self) -> None:
        """Everything else, in one file: a machine may hand back no more than a few."""

        def kept(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
            excluded = entry.size > LARGEST or any(part in entry.name for part in EXCLUDED)
            return None if excluded else entry

        partial = self.left / "all.tar.gz.partial"
        with tarfile.open(partial, "w:gz", compresslevel=1) as everything:
            everything.add(self.out, arcname=".", filter=kept)
        partial.replace(self.left / "all.tar.gz")

    # Sections

    def start(self) -> None:
        """Imports, and a first use of the device in a fork, which also describes the machine."""
        begin = time.time()
        missing = []
        for name in IMPORTS:
            try:
                importlib.import_module(name)
            except Exception as error:  # what needs it will say so
                missing.append(f"cannot import {name}: {type(error).__name__}: {error}".splitlines()[0])
        for plugin in importlib.metadata.entry_points(group="pytest11"):
            with contextlib.suppress(Exception):  # pytest says what it thinks of it
                plugin.load()
        gc.freeze()  # else the first collection of each fork walks, and copies, all that was imported
        from scenarioclip_fast.bench import machine

        if self.commit is not None:
            os.environ.setdefault(machine.COMMIT_VARIABLE, self.commit)
        log, answer = self.out / "start.txt", self.out / "machine.json"
        task = script_task(Path(__file__).with_name("describe.py"), [str(answer)])
        if not self._ends_well(self.launch(task, log), 30):
            missing.append("a fork could not use the GPU: every section gets a process of its own")
            self.launch.forks = False
            if not self._ends_well(self.launch(task, log), 40):
                missing.append("the GPU could not be used: see start in log.txt")
        self.machine = self._described(answer)
        with log.open("a") as text:
            text.write("".join(f"{line}\n" for line in missing))
        for line in missing:
            print(f"   {line}")
        seconds = time.time() - begin
        result = "the machine could not be described" if self.machine == UNKNOWN else DONE
        self.ended(Row("start", result, seconds, seconds))

    def _ends_well(self, process: Process, seconds: float) -> bool:
        try:
            return process.wait(seconds * self.factor) == 0
        except subprocess.TimeoutExpired:
            process.end()
            return False

    @staticmethod
    def _described(answer: Path) -> dict[str, Any]:
        try:
            return dict(json.loads(answer.read_text()))
        except (OSError, ValueError):
            return UNKNOWN

    def checks(self, names: Sequence[str]) -> None:
        """Correctness, and the compilers' caches: untimed, side by side."""
        limit = self.limit(sections.CHECKS)
        if limit is None:
            self.ended(Row("checks", NO_TIME, 0))
            return
        print(f"== side by side, limit {limit:.0f} s: {', '.join(names)}", flush=True)
        chosen = []
        for name in names:
            job = self._check(name)
            if isinstance(job, Row):
                self.ended(job)
            else:
                chosen.append(job)
        rows = jobs.run(chosen, limit, grace=5 * self.factor)
        for job, row in zip(chosen, rows, strict=True):
            self.ended(row)
            if row.result != DONE or job.name == "tests":
                self._show(job.summary())
        # Inductor has chosen between its kernels on a GPU that was busy with all of this: it shall choose again.
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
            options = ["--report-api-errors", "no"] if tool == "memcheck" else []
            command = [str(sanitizer), "--tool", tool, *options, "--error-exitcode", "9", *command]
        # Without torch's pools every tensor is an allocation of its own, whose bounds are known.
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", **FEW_THREADS}
        return Job(name, self.out, [lambda log: self.launch.command(command, log, **env)])

    def _tests(self) -> Job:
        def begin(file: str, shard: str) -> jobs.Begin:
            task = self._tests_task([file], "gpu and not compiles", f"--shard={shard}", timeout=60)
            return lambda log: self.launch(task, log, **FEW_THREADS)

        parts = [begin(file, f"{i}/{count}") for file, count in TESTS.items() for i in range(count)]
        return Job("tests", self.out, parts, at_once=min(TESTS_AT_ONCE, os.cpu_count() or 1))

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
        if REHEARSAL:  # else pytest may cut off the words by which a use of the device is known
            arguments.append("-vv")
        return pytest_task([*arguments, *options])

    def timed(self, section: Section) -> None:
        """A section by itself; whatever goes wrong in it costs no other."""
        limit = self.limit(section)
        if limit is None:
            self.ended(Row(section.name, NO_TIME, 0))
            return
        print(f"== {section.name}: limit {limit:.0f} s, elapsed {self.clock.elapsed():.0f} s", flush=True)
        runs = {"bench": self._bench, "tune": self._tune, "demo": self._demo, "compiled": self._tests_compiled}
        self._guarded(section.name, lambda: self.ended(runs[section.kind](section.name, limit)))

    def _guarded(self, name: str, run: Callable[[], None]) -> None:
        begin = time.time()
        try:
            run()
        except Exception as error:  # a fault of this script must not cost the sections that follow
            result = f"{type(error).__name__}: {error}".splitlines()[0]
            self.ended(Row(name, result, time.time() - begin))

    def _bench(self, name: str, limit: float) -> Row:
        from scenarioclip_fast.bench.record import FILE, read_record
        from scenarioclip_fast.bench.runner import run_file

        def start(arguments: Sequence[str], directory: Path, output: IO[bytes]) -> Process:
            return self.launch.to(pytest_task(arguments), output.fileno(), directory)

        record = read_record(self.out) if (self.out / FILE).exists() else self._first_record()
        path = ROOT / "benchmarks" / f"{name}.py"
        part = run_file(name.removeprefix("bench_"), path, "cuda", limit, start)
        record.with_part(part).write(self.out)
        table = headline.short_table(part)
        failures = [f"{absent.name}: {absent.reason}" for absent in part.failed]
        (self.out / f"{name}.txt").write_text("\n".join([*table, *failures]) + "\n")
        self._show(table)
        result = "timed out" if part.exit is None else f"exit {part.exit}" if part.exit else DONE
        return Row(name, result, part.seconds, part.start_up)

    def _first_record(self) -> Record:
        """Empty, or what an earlier call measured on this machine where only some sections are wanted."""
        from scenarioclip_fast.bench.record import FILE, Record, read_record
        from scenarioclip_fast.bench.runner import same_machine

        if self.only and self.earlier is not None and (self.earlier / FILE).exists():
            record = read_record(self.earlier)
            if same_machine(record.machine, self.machine):
                return record
        return Record(self.machine)

    def _tune(self, name: str, limit: float) -> Row:
        task = script_task(ROOT / "benchmarks" / f"{name}.py", ["--quick", "--out", str(self.out / f"{name}.json")])
        return self._alone(Job(name, self.out, [lambda log: self.launch(task, log)]), limit, shown=60)

    def _tests_compiled(self, name: str, limit: float) -> Row:
        task = self._tests_task(TESTS_COMPILED, "gpu and compiles", timeout=120)
        job = Job(name, self.out, [lambda log: self.launch(task, log)])
        (row,) = jobs.run([job], limit, grace=5.0)
        self._show(job.summary())
        return row

    def _demo(self, name: str, limit: float) -> Row:
        arguments = ["demo", "--device", "cpu" if REHEARSAL else "cuda", "--out", str(self.out / "demo")]
        arguments += ["--scenes", "48", "--views", "700"] if REHEARSAL else []
        task = command_line_task(arguments)
        return self._alone(Job(name, self.out, [lambda log: self.launch(task, log)]), limit, shown=12)

    def _alone(self, job: Job, limit: float, shown: int) -> Row:
        (row,) = jobs.run([job], limit, grace=1.0)
        self._show(job.log.read_text(errors="replace").splitlines()[-shown:])
        return row

    @staticmethod
    def _show(lines: Sequence[str]) -> None:
        for line in lines:
            print(f"   {line}", flush=True)


def main() -> int:
    state = json.loads(Path(sys.argv[1]).read_text())
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is measured is kept, children are killed
    try:
        return Call(state).run()
    except KeyboardInterrupt:
        print("== interrupted: OUT holds what was measured", flush=True)
        return 130
    finally:
        shutil.rmtree(state["work"], ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
