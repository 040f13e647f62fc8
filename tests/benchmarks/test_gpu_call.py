"""`make gpu` without a GPU: time budgets, failures and hangs, and the output files.

`make gpu-rehearse` tests it as a whole.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu import counters, headline, jobs, measure, pack, rehearse, run, sections, start_up
from gpu.processes import Forked, Launcher, Process, Spawned, Task, pytest_task, script_task

from scenarioclip_fast.bench import machine
from scenarioclip_fast.bench.record import Part, Record, Result, Unmeasured, read_record
from scenarioclip_fast.bench.runner import benchmark_files

ROOT = Path(__file__).parents[2]


def test_budgets_fit_the_total() -> None:
    assert sections.budgets() <= sections.TOTAL_S
    last = max(sections.ALL.index(s) for s in sections.ALL if s.name in sections.HEADLINES)
    assert sum(s.budget for s in sections.ALL[: last + 1]) < sections.HEADLINE_S
    assert all(s.budget <= s.maximum for s in sections.ALL)


COUNTERS = """==PROF== Connected to process 1
"ID","Kernel Name","gpu__time_duration.sum","dram__throughput.avg.pct_of_peak_sustained_elapsed"
"","","ns","%"
"0","void scf::(anonymous namespace)::resize_down<float>(const ViewJob *, int)","1,234.5","23.4"
"1","tile_sums","2000","n/a"
"2","void scf::(anonymous namespace)::resize_down<float>(const ViewJob *, int)","2,234.5","24.4"
"""


def test_table_of_counters() -> None:
    head, longest, other = [line.split() for line in counters.table(COUNTERS.splitlines())]
    assert head[:3] == ["kernel", "launches", "us"]
    assert longest[:3] == ["resize_down", "2", "2.2"] and "24.4" in longest  # the longer of two launches
    assert other[:3] == ["tile_sums", "1", "2.0"] and set(other[3:]) == {"nan"}
    assert counters.table(["==ERROR== no permission"]) == ["ncu wrote no counters"]
    excluded = re.compile(counters.KERNELS.removeprefix("regex:"))
    ours = ("device_kernel", "tile_sums", "resize_across", "add_layer_norm_forward", "short_attention_backward")
    assert all(excluded.match(name) for name in ours)
    theirs = ("nvjet_sm90_tst_192x192", "vectorized_elementwise_kernel", "reduce_kernel", "splitKreduce_kernel")
    assert not any(excluded.match(name) for name in theirs)


def test_counted_kernels_include_the_contrastive_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's type decides what is available: a form that was passed over without a word was not counted."""
    asked: list[Any] = []
    monkeypatch.setattr("scenarioclip_fast.dispatch.unavailable_reason", lambda *given: asked.append(given))
    monkeypatch.setattr("scenarioclip_fast.benchmarks.timing.REHEARSAL", True)
    monkeypatch.setattr("scenarioclip_fast.benchmarks.bench_contrastive.REHEARSAL", True)
    views = SimpleNamespace(of=lambda *_: SimpleNamespace(render=None))
    monkeypatch.setattr("scenarioclip_fast.benchmarks.bench_views.MixedViews", views)
    assert len(list(counters.calls())) == 4
    assert [given[:3] for given in asked] == [("contrastive_loss", name, "cpu") for name in ("cuda", "triton")]


def test_every_benchmark_has_a_section() -> None:
    assert {s.name for s in sections.TIMED if s.kind == "bench"} == {
        f"bench_{name}" for name in benchmark_files() if name not in sections.HOST_ONLY
    }
    tunes = {path.stem for path in (ROOT / "benchmarks").glob("tune_*.py")}
    assert {s.name for s in sections.TIMED if s.kind == "tune"} == tunes


def test_every_file_with_gpu_tests_is_run() -> None:
    marked = re.compile(
        r"^(?:@|pytestmark = )pytest\.mark\.gpu|marks=\[?pytest\.mark\.gpu|\[pytest\.mark\.gpu\]", re.MULTILINE
    )
    files = {path for path in (ROOT / "tests").rglob("test_*.py") if marked.search(path.read_text())}
    files.discard(ROOT / "tests" / "cli" / "test_bench.py")  # contains the marker in generated files
    assert {str(path.relative_to(ROOT)) for path in files} - {str(Path(__file__).relative_to(ROOT))} == set(
        measure.TESTS
    )


def test_every_file_with_tests_that_compile_is_run() -> None:
    files = {path for path in (ROOT / "tests").rglob("test_*.py") if "@pytest.mark.compiles" in path.read_text()}
    files.discard(Path(__file__))
    assert {str(path.relative_to(ROOT)) for path in files} == set(measure.TESTS_COMPILED)


@pytest.mark.parametrize("seed", range(20))
def test_random_runs_stay_within_the_total(seed: int) -> None:
    """Sections fail immediately, end at a random time, or run into their limit."""
    rng, now = random.Random(seed), 0.0
    clock = sections.Clock(sections.TOTAL_S, 0.0, lambda: now)
    now += rng.uniform(0, sections.PREPARE.maximum + sections.START.maximum)
    remaining = [sections.CHECKS, *sections.TIMED]
    while remaining:
        section = remaining.pop(0)
        limit = clock.limit(section, remaining)
        on_time = now <= sum(s.budget for s in sections.ALL[: sections.ALL.index(section)])
        if on_time:
            assert limit is None or limit >= section.budget, "a section on time has at least its budget"
            assert limit is not None or section.budget < section.minimum
        if limit is not None:
            assert section.minimum <= limit <= section.maximum
            now += rng.choice([0.0, rng.uniform(0, limit), limit])
    assert now <= sections.TOTAL_S - sections.FINISH_S


def test_saved_time_is_redistributed() -> None:
    demo = next(s for s in sections.TIMED if s.name == "demo")
    assert sections.Clock(480, 0.0, lambda: 480.0 - sections.FINISH_S - 20).limit(demo, []) is None
    assert sections.Clock(480, 0.0, lambda: 400.0).limit(demo, []) == 480 - sections.FINISH_S - 400


def output(tmp_path: Path) -> Any:
    return (tmp_path / "log.txt").open("ab")


def test_forks(tmp_path: Path) -> None:
    def fork(run: Any, **env: str) -> Forked:
        with output(tmp_path) as log:
            return Forked(run, log.fileno(), tmp_path, env)

    assert fork(lambda: 0).wait(10) == 0
    assert fork(lambda: 3).wait(10) == 3
    assert fork(lambda: sys.exit("one line")).wait(10) == 1
    assert fork(lambda: int(os.environ["ANSWER"]), ANSWER="4").wait(10) == 4
    assert fork(lambda: 1 / 0).wait(10) == 1
    assert fork(lambda: torch.get_num_threads() - 1, OMP_NUM_THREADS="1").wait(10) == 0
    text = (tmp_path / "log.txt").read_text()
    assert "one line\n" in text and "ZeroDivisionError" in text


def test_hanging_fork_is_killed_with_its_children(tmp_path: Path) -> None:
    def hang() -> None:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
        (tmp_path / "child").write_text(str(child.pid))
        time.sleep(100)

    with output(tmp_path) as log:
        process = Forked(hang, log.fileno(), tmp_path, {})
    wait_for(tmp_path / "child")
    child = int((tmp_path / "child").read_text())
    assert process.poll() is None
    process.kill()
    assert process.wait(10) == -9
    end = time.monotonic() + 10
    while alive(child) and time.monotonic() < end:
        time.sleep(0.01)
    assert not alive(child)


def alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(path: Path) -> None:
    end = time.monotonic() + 20
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < end, f"{path} was not written"
        time.sleep(0.01)


@pytest.mark.parametrize("forks", [True, False], ids=["forks", "processes"])
def test_jobs_are_independent(tmp_path: Path, forks: bool) -> None:
    """One succeeds, one fails, one hangs; each has its own row and log."""
    launch = Launcher(tmp_path)
    launch.forks = forks

    def job(name: str, source: str) -> jobs.Job:
        (tmp_path / f"{name}_script.py").write_text(source)
        task = script_task(tmp_path / f"{name}_script.py", ["--quick"])
        return jobs.Job(name, tmp_path, [lambda log: launch(task, log)])

    main = "\nif __name__ == '__main__':\n    import sys\n    sys.exit(main())\n"
    all_jobs = [
        job("good", f"import sys\ndef main():\n    print(sys.argv[1:])\n{main}"),
        job("bad", f"def main():\n    return 7\n{main}"),
        job("late", f"import time\ndef main():\n    print('started', flush=True)\n    time.sleep(60)\n{main}"),
    ]
    rows = {row.section: row for row in jobs.run(all_jobs, 4.0, grace=1.0)}
    assert [rows[name].result for name in ("good", "bad", "late")] == ["passed", "exit 7", "timed out"]
    assert rows["good"].seconds < rows["late"].seconds < 10
    assert "['--quick']" in all_jobs[0].log.read_text() and "started" in all_jobs[2].log.read_text()
    if forks:
        assert rows["good"].start_up is not None and 0 <= rows["good"].start_up < 4


class StuckProcess(Process):
    """A process stuck in a driver, where no signal reaches it."""

    pid = 2**22 + 1

    def poll(self) -> int | None:
        return None


def test_unkillable_process_affects_only_its_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StuckProcess, "end", lambda self: Process.end(self, 0.2))
    stuck = jobs.Job("stuck", tmp_path, [lambda log: StuckProcess()])
    (row,) = jobs.run([stuck], 0.3, grace=0.1)
    assert row.result == "timed out, and could not be killed"


def test_long_log_is_shortened(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"first" + b"\xff" * 1000 + b"last")
    assert jobs.shortened(log, head=5, tail=4) == "first\n... 1,000 bytes ...\nlast"
    assert len(jobs.shortened(log)) == 1009


def test_job_with_several_processes(tmp_path: Path) -> None:
    """At most `parallel` run at a time, and the log has all outputs in order."""
    running: list[int] = []

    def start(i: int) -> jobs.Start:
        def spawn(log: Path) -> Spawned:
            with log.open("ab") as out:
                running.append(i)
                return Spawned([sys.executable, "-c", f"print('part', {i})"], out.fileno(), tmp_path, {})

        return spawn

    job = jobs.Job("parts", tmp_path, [start(i) for i in range(3)], parallel=1)
    job.advance()
    assert running == [0]
    (row,) = jobs.run([job], 30, grace=1)
    assert row.result == "passed" and job.log.read_text().split() == ["part", "0", "part", "1", "part", "2"]


def test_interrupted_pytest_reports_its_failures(tmp_path: Path) -> None:
    (tmp_path / "test_slow.py").write_text(
        "import time\ndef test_wrong():\n    assert 1 == 2\ndef test_slow():\n    time.sleep(60)\n"
    )
    launch = Launcher(tmp_path)
    task = pytest_task(
        ["-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-c", os.devnull, str(tmp_path / "test_slow.py")]
    )
    job = jobs.Job("tests", tmp_path, [lambda log: launch(task, log)])
    (row,) = jobs.run([job], 8.0, grace=4.0)
    assert row.result == "timed out"
    assert "assert 1 == 2" in job.log.read_text() and "KeyboardInterrupt" in job.log.read_text()
    assert job.summary()[0] == "1 failed"
    assert job.summary()[1].startswith("FAILED ")


PLUGIN = """
import pytest
@pytest.mark.parametrize("i", range(20))
def test_numbers(i):
    pass
def test_device():
    raise RuntimeError("Found no NVIDIA driver on your system.")
def test_command():
    print("error: torch sees no CUDA device")
    raise AssertionError
def test_wrong():
    assert 1 == 2
"""


@pytest.mark.parametrize("rehearsal", ["0", "1"])
def test_rehearsed_tests_are_skipped_at_the_device(tmp_path: Path, rehearsal: str) -> None:
    """Also: shards of a file run each of its tests once."""
    (tmp_path / "test_it.py").write_text(PLUGIN)
    counts: dict[str, int] = {}
    command = [sys.executable, "-m", "pytest", "-p", "gpu.plugin", "-c", os.devnull, "-p", "no:cacheprovider"]
    env = {**os.environ, "SCENARIOCLIP_FAST_REHEARSAL": rehearsal, "PYTHONPATH": str(ROOT / "benchmarks")}
    for shard in ("0/2", "1/2"):
        done = subprocess.run(
            [*command, f"--shard={shard}", "test_it.py"],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        for n, what in re.findall(r"(\d+) (passed|failed|skipped)", done.stdout):
            counts[what] = counts.get(what, 0) + int(n)
    assert counts == {"passed": 20, **({"failed": 1, "skipped": 2} if rehearsal == "1" else {"failed": 3})}


def test_start_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "part.txt"
    assert start_up.seconds(log) is None
    for _ in range(2):
        for name, value in start_up.variable(log).items():
            monkeypatch.setenv(name, value)
        start_up.note()
        start_up.note()  # only the first call counts
    assert len((tmp_path / "part.start-up").read_text().split()) == 2
    seconds = start_up.seconds(log)
    assert seconds is not None and 0 <= seconds < 1


# run.py, before any package is installed


def test_without_a_gpu(tmp_path: Path) -> None:
    env = {**os.environ, "SCENARIOCLIP_FAST_REHEARSAL": "0", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": "benchmarks"}
    command = [sys.executable, "-m", "gpu.run", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "sees no GPU: make gpu needs one" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_unwritable_output_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(run.SetupError, match=r"--out .*: is not writable \("):
            run.create_output_folder(out)


def test_damaged_pack_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "ROOT", tmp_path)
    (tmp_path / pack.FOLDER).mkdir()
    (tmp_path / pack.FOLDER / "manifest.json").write_text("{")
    assert run.load_pack() == (None, None)
    assert "not a manifest of make gpu-pack" in capsys.readouterr().out


def test_unknown_section(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gpu.run", "--only", "bench_stp", "--out", str(tmp_path / "out")]
    env = {**os.environ, "PYTHONPATH": "benchmarks"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "got bench_stp, expected some of: doctor tests" in done.stderr


@pytest.mark.parametrize(
    ("answer", "message"),
    [("", "cannot import torch"), ('{"python": "3.12", "error": "ModuleNotFoundError: torch"}', "has no torch")],
)
def test_without_torch(answer: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 1, answer, "gone")
    monkeypatch.setattr(run.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(run.SetupError, match=message):
        run.probe()


def test_environment_sees_the_packages_of_this_python(tmp_path: Path) -> None:
    python = run.environment(tmp_path / "venv")
    code = "import sys, numpy, scenarioclip_fast; print(sys.prefix, scenarioclip_fast.__file__)"
    done = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(tmp_path / "venv"), str(ROOT / "scenarioclip_fast" / "__init__.py")]


PIP = """#!/bin/sh
echo "$@" >>"$LOG"
case "$*" in
  *"$BAD_WHEEL"*) exit 1;;
  *--editable*) [ "$SCENARIOCLIP_FAST_BUILD" = none ] || exit "$BUILD";;
esac
"""


class FakeCheckout:
    """A checkout with a pack, and a fake pip."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad_wheel: str, build: int) -> None:
        self.root, self.calls = tmp_path / "checkout", tmp_path / "calls"
        for name in ("wheels/a-1-py3-none-any.whl", "wheels/b-1-py3-none-any.whl", "native/libx.so"):
            (self.root / pack.FOLDER / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / pack.FOLDER / name).write_text(name)
        (self.root / pack.FOLDER / "native" / "build.json").write_text('{"built": ["cpu"]}')
        self.native = self.root / "scenarioclip_fast" / "_native"
        self.native.parent.mkdir()
        python = tmp_path / "python"
        python.write_text(PIP)
        python.chmod(0o755)
        for name, value in (("LOG", self.calls), ("BAD_WHEEL", bad_wheel), ("BUILD", build)):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(run, "ROOT", self.root)
        monkeypatch.setattr(run, "NATIVE", self.native)
        self.manifest: pack.Manifest | None = pack.Manifest("abc123", "3.12", "2.11.0")
        self.found = {"cuda": True, "capability": "90"}
        self.work, self.python = tmp_path, python

    def notes(self) -> dict[str, str]:
        preparation = run.Preparation(self.work, self.python, self.found, self.manifest, time.time() + 20)
        preparation.run()
        return {name: result for name, result, _ in preparation.notes}


def test_wheels_are_installed_in_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = FakeCheckout(tmp_path, monkeypatch, "no such wheel", 0)
    assert prepared.notes() == {"wheels": "passed", "build": "passed"}
    calls = prepared.calls.read_text().splitlines()
    assert len(calls) == 2 and sum("a-1" in call and "b-1" in call for call in calls) == 1
    assert all("--no-index" in call for call in calls)


def test_headers_of_the_pack_reach_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = FakeCheckout(tmp_path, monkeypatch, "no such wheel", 0)
    monkeypatch.delenv("SCENARIOCLIP_FAST_CUTLASS", raising=False)
    folder = prepared.root / pack.FOLDER
    assert pack.headers(folder, tmp_path / "none") == {}
    (folder / "headers").mkdir()
    with zipfile.ZipFile(folder / "headers" / "cutlass-1-py3-none-any.whl", "w") as archive:
        archive.writestr("cutlass_library/source/include/cutlass/version.h", "version")
        archive.writestr("cutlass_library/generator.py", "")
    prepared.python.write_text(PIP.replace('"$LOG"', '"$LOG"; echo "$SCENARIOCLIP_FAST_CUTLASS" >>"$LOG"', 1))
    prepared.notes()
    named = {line for line in prepared.calls.read_text().splitlines() if line.startswith("/")}
    assert len(named) == 1
    include = Path(named.pop())
    assert [path.name for path in include.rglob("*.*")] == ["version.h"]
    assert not list(include.parents[1].rglob("*.py"))


def test_incompatible_wheel_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = FakeCheckout(tmp_path, monkeypatch, "b-1", 0)
    assert prepared.notes() == {"wheels": "failed to install: b", "build": "passed"}


def test_failed_build_falls_back_to_prebuilt_extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = FakeCheckout(tmp_path, monkeypatch, "no such wheel", 5)
    assert prepared.notes()["build"] == "failed (exit 5): using the prebuilt extensions of gpu-pack"
    assert (prepared.native / "libx.so").read_text() == "native/libx.so"
    info = json.loads((prepared.native / "build.json").read_text())
    assert info == {"built": ["cpu"], "prebuilt_from": "abc123"}


def test_failed_build_without_prebuilt_extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton and PyTorch backends still run."""
    prepared = FakeCheckout(tmp_path, monkeypatch, "no such wheel", 5)
    prepared.manifest = None
    assert prepared.notes()["build"].endswith("is empty: Triton and PyTorch backends only")
    assert not prepared.native.exists()


def test_record_names_the_origin_of_prebuilt_extensions(monkeypatch: pytest.MonkeyPatch) -> None:
    from scenarioclip_fast import native

    monkeypatch.setattr(native, "build_info", lambda: {"built": ["cpu"], "prebuilt_from": "abc123"})
    assert machine.describe("cpu")["compiled_parts"] == "built on another machine, from commit abc123"


def test_commit_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv(machine.COMMIT_VARIABLE, raising=False)
    assert machine.commit(tmp_path) == "unknown"
    monkeypatch.setenv(machine.COMMIT_VARIABLE, "abc123 + changes")
    assert machine.commit(tmp_path) == "abc123 + changes"


# The rehearsal


def test_rehearsal_fails_if_a_section_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rehearse.report(tmp_path, ["bench_ema"]) == 1
    rows = ["section,result,seconds,start-up seconds", "wheels,passed,1,", "build,passed,9,", "start,passed,5,5.00"]
    for name in ("record.json", "README.md", "log.txt", "all.tar.gz"):
        (tmp_path / name).touch()
    for result, code in (("passed", 0), ("exit 1", 1)):
        (tmp_path / "sections.csv").write_text("\n".join([*rows, "tests,passed,9,8.00", f"bench_ema,{result},2,0.50"]))
        assert rehearse.report(tmp_path, ["tests", "bench_ema"]) == code
    out, error = capsys.readouterr()
    assert "total                 13.50" in out
    assert "error: rehearsal failed: bench_ema (exit 1); see " in error


# The pack


def test_pack_verifies_its_files(tmp_path: Path) -> None:
    assert pack.read_manifest(tmp_path) is None
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "a.whl").write_bytes(b"one")
    manifest = pack.Manifest(
        "abc", "3.12", None, ["photos: none"], {"wheels/a.whl": pack._size_and_digest(tmp_path / "wheels/a.whl")}
    )
    (tmp_path / "manifest.json").write_text(json.dumps(manifest.__dict__))
    assert pack.read_manifest(tmp_path) == manifest
    assert pack.damaged_files(tmp_path, manifest) == []
    (tmp_path / "wheels" / "a.whl").write_bytes(b"two")
    assert pack.damaged_files(tmp_path, manifest) == ["wheels/a.whl"]
    (tmp_path / "wheels" / "a.whl").unlink()
    assert pack.damaged_files(tmp_path, manifest) == ["wheels/a.whl"]
    for text in ("{", "[]", '{"files": {}}'):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(SystemExit, match="run make gpu-pack again"):
            pack.read_manifest(tmp_path)


def test_pack_detects_changed_sources(tmp_path: Path) -> None:
    (tmp_path / "kernel.cu").write_text("one")
    manifest = pack.Manifest("abc", "3.12", None, sources={"kernel.cu": pack._digest(tmp_path / "kernel.cu")})
    assert pack.commit_here(tmp_path, manifest) == "abc"
    (tmp_path / "kernel.cu").write_text("two")
    assert pack.commit_here(tmp_path, manifest) == "abc + changes"
    assert pack.commit_here(tmp_path, replace(manifest, commit="abc + changes")) == "abc + changes"
    assert "setup.py" in pack._sources() and "README.md" not in pack._sources()


def test_unavailable_wheel_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (missing,) = pack.download(sys.executable, ("inf-cl",), tmp_path)
    assert missing.startswith("inf-cl: ERROR: ")


# The sanitizers

RACECHECK = """\
========= COMPUTE-SANITIZER
cuda, 137 x 70: done
========= Error: Race reported between Read access at nvjet_sm90_tss_32x64_64x16_4x2_h_bz_splitK_NNN+0xb30
=========     and Write access at nvjet_sm90_tss_32x64_64x16_4x2_h_bz_splitK_NNN+0x2fc0 [480 hazards]
=========
========= Error: Race reported between Read access at nvjet_sm90_tss_32x256_64x5_1x4_h_bz_NTN+0xa00
=========     and Write access at nvjet_sm90_tss_32x256_64x5_1x4_h_bz_NTN+0x39c0 [432 hazards]
=========
cuda, 600 x 8600: done
cuda: done
========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)
"""


def test_hazards_in_cublas_alone_are_no_failure(tmp_path: Path) -> None:
    """As in the first run on a GPU; a hazard of any other kernel, another error or an early end is a failure."""
    assert measure.hazards_in_libraries(RACECHECK) == "hazards in cuBLAS only"
    other = "scf::(anonymous namespace)::finish_rows(float*)+0x39c0"
    for old, new in (
        ("nvjet_sm90_tss_32x256_64x5_1x4_h_bz_NTN+0xa00", other),
        ("nvjet_sm90_tss_32x256_64x5_1x4_h_bz_NTN+0x39c0", other),
        ("nvjet_sm90_tss_32x64_64x16_4x2_h_bz_splitK_NNN+0x2fc0 [480", f"{other} in nvjet_x [480"),
        ("Error: Race reported between", "Error: Potential hazard between"),
        ("cuda: done", "RuntimeError: CUDA error"),
        ("SUMMARY: 2", "SUMMARY: 3"),
        ("========= RACECHECK SUMMARY", "interrupted"),
    ):
        assert old in RACECHECK
        assert measure.hazards_in_libraries(RACECHECK.replace(old, new, 1)) == "", new
    assert measure.hazards_in_libraries("cuda: done\n========= RACECHECK SUMMARY: 0 hazards displayed") == ""

    def outcome(text: str, code: int) -> tuple[str, str, str]:
        command = [sys.executable, "-c", "import sys; print(sys.argv[1]); sys.exit(int(sys.argv[2]))", text, str(code)]
        job = jobs.Job(
            "racecheck",
            tmp_path,
            [lambda log: Launcher(tmp_path).command(command, log)],
            excuse=measure.hazards_in_libraries,
        )
        (row,) = jobs.run([job], 20, grace=1)
        return row.result, job.note, job.summary()[-1]

    assert outcome(RACECHECK, 9) == ("passed", "hazards in cuBLAS only", "hazards in cuBLAS only")
    assert outcome(RACECHECK.replace("nvjet_", "ours_"), 9)[:2] == ("exit 9", "")
    assert outcome("cuda: done", 0)[:2] == ("passed", "")


# The output


def test_headline_figures_come_last(tmp_path: Path) -> None:
    group = "training step, vit-b-32, 128 scenes (random pixels), cuda"
    results = [
        Result("a", group, "ours, bf16, cuda graphs", [0.064], extra={"scenes": 128, "mfu": 0.31, "host, ms": 21.0}),
        Result("b", group, "baseline, float32", [0.32], extra={"scenes": 128}),
    ]
    failed = [Unmeasured("c", "out of memory\nat line 3")]
    part = Part("step", "pytest", "abc", "2026-01-01T00:00:00", 9.0, 1, {}, {}, results, [], failed)
    table = headline.short_table(part)
    assert [line.split("  ")[0] for line in table] == [group, "", "", "", "failed: c: out of memory"]
    assert table[1].split() == ["per", "scene", "rate", "time", "/", "ours"]
    assert "2,000 scenes/s" in table[2] and "1.00  MFU 31.0 %, host 21.0 ms per step" in table[2]
    assert "5.00" in table[3]
    Record({"kind": "cuda", "device": "a GPU", "versions": {}}, [part]).write(tmp_path)
    lines = headline.lines(tmp_path, {"device": "a GPU"}, [jobs.Row("tests", "exit 1", 2.0)], "abc")
    assert lines[0] == "a GPU, commit abc"
    assert any("5.00 x (2,000 scenes/s vs. 400 scenes/s), target 4.5 x: met" in line for line in lines)
    assert lines[-1] == "failed or skipped: tests (exit 1)"
    headline.write_readme(tmp_path)
    assert "at least 4.5 x | 5.00 x" in (tmp_path / "README.md").read_text()


def test_failing_sections_do_not_affect_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sections fail, hang or pass: OUT holds a row for each, and the results."""
    benchmarks = tmp_path / "checkout" / "benchmarks"
    benchmarks.mkdir(parents=True)
    (tmp_path / "checkout" / "pyproject.toml").write_text('[tool.pytest.ini_options]\nmarkers = ["gpu: x"]\n')
    good = "import pytest\n@pytest.mark.gpu\ndef test_it(benchmark):\n    benchmark.pedantic(lambda: None, rounds=2)\n"
    (benchmarks / "bench_good.py").write_text(good)
    (benchmarks / "bench_broken.py").write_text("import no_such_module\n")
    (benchmarks / "bench_hangs.py").write_text(good.replace("lambda: None", "lambda: time.sleep(60)") + "import time\n")
    (benchmarks / "tune_it.py").write_text("def main():\n    raise SystemExit('no GPU here')\n")
    kinds = {"bench_broken": "bench", "bench_hangs": "bench", "tune_it": "tune", "bench_good": "bench"}
    # Generous limits for those that end by themselves, on a busy machine.
    fakes = [sections.Section(name, kind, 5, 6 if name == "bench_hangs" else 60) for name, kind in kinds.items()]
    monkeypatch.setattr(sections, "TIMED", fakes)
    monkeypatch.setattr(measure, "ROOT", tmp_path / "checkout")
    monkeypatch.setattr(measure.GpuRun, "start", lambda self: setattr(self, "machine", MACHINE))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    (tmp_path / "out").mkdir()
    (tmp_path / "work").mkdir()
    state = {"started": time.time(), "total": 200, "factor": 1.0, "only": list(kinds), "notes": [], "commit": None}
    call = measure.GpuRun({**state, "out": str(tmp_path / "out"), "work": str(tmp_path / "work")})
    assert call.run() == 1
    results = {row.section: row.result for row in call.rows}
    assert results["bench_broken"] not in ("passed", "timed out")
    assert results["bench_hangs"] == "timed out"
    assert results["tune_it"] == "exit 1" and results["bench_good"] == "passed"
    names = ["README.md", "all.tar.gz", "log.txt", "record.json", "sections.csv"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert [len(part["results"]) for part in record["parts"]] == [0, 0, 1]
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "no GPU here" in log and "no_such_module" in log

    readme = (tmp_path / "out" / "README.md").read_text()
    assert "| bench_hangs | timed out |" in readme and "| bench_good | passed |" in readme
    # Running one section again keeps the other results and the earlier files.
    (tmp_path / "again").mkdir()
    monkeypatch.setattr(sections, "TIMED", fakes[-1:])
    again = {**state, "only": ["bench_good"], "out": str(tmp_path / "out"), "work": str(tmp_path / "again")}
    assert measure.GpuRun(again).run() == 0
    assert (tmp_path / "out" / "earlier-1" / "record.json").exists()
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert [part["name"] for part in record["parts"]] == ["broken", "hangs", "good"]


def test_undescribed_machine(tmp_path: Path) -> None:
    """Its results are still saved in a readable record."""
    machine = measure.GpuRun._read_description(tmp_path / "machine.json")
    part = Part("x", "pytest", "abc", "2026-01-01T00:00:00", 1.0, 0, {}, {}, [Result("t", "g", "ours", [1.0])])
    Record(machine, [part]).write(tmp_path)
    assert read_record(tmp_path).machine == measure.UNKNOWN


MACHINE = {"kind": "rehearsal", "device": "none", "versions": {}}


def test_task_in_a_fork_and_in_a_process(tmp_path: Path) -> None:
    launch = Launcher(tmp_path)
    task = Task(lambda: print("here") or 0, [sys.executable, "-c", "print('here')"])  # type: ignore[func-returns-value]
    for launch.forks in (True, False):
        log = tmp_path / f"{launch.forks}.txt"
        assert launch(task, log).wait(20) == 0
        assert log.read_text() == "here\n"
