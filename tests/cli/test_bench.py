"""`bench`: results become a record, failed or late ones do not, and records become reports."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scenarioclip_fast import benchmarks
from scenarioclip_fast.bench import plugin, runner
from scenarioclip_fast.bench.record import FILE, Part, Record, Result, Unmeasured, read_record, unit_of
from scenarioclip_fast.bench.report import markdown, write_report
from scenarioclip_fast.bench.tables import part_table, roofline_table, roofs
from scenarioclip_fast.cli.main import main
from scenarioclip_fast.errors import UserError

SOURCE = """
import time
import pytest

@pytest.mark.parametrize("form", ["baseline", "ours: quick", "ours: wrong", "ours: absent", "ours: late"])
def test_it(benchmark, form):
    if form == "ours: absent":
        pytest.skip("no such device")
    calls = []
    benchmark.group = "sums"
    benchmark.pedantic(lambda n: calls.append(n), setup=lambda: ((3,), {}), rounds=4, warmup_rounds=2)
    benchmark.extra_info.update(scenes=2, odd=object())
    assert benchmark.stats.stats.median > 0
    assert calls == [3] * 6
    assert form != "ours: wrong", "off by one"

def test_device(benchmark):
    benchmark.group = "sums"
    benchmark.extra_info.update(form="ours: device", device_seconds=[0.5, 0.25])
    benchmark.pedantic(time.time, rounds=2)

@pytest.fixture
def broken_teardown():
    yield
    raise RuntimeError("in teardown")

def test_teardown(benchmark, broken_teardown):
    benchmark.pedantic(time.time, rounds=2)

@pytest.mark.gpu
def test_gpu_only(benchmark):
    raise AssertionError("selected on a CPU")
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], Path]:
    """Replaces the checkout's benchmark files."""

    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # pytest-benchmark measures nothing in a worker

    def make(files: dict[str, str]) -> Path:
        folder = tmp_path / "benchmarks"
        folder.mkdir()
        (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a GPU\n")
        for name, source in files.items():
            (folder / f"bench_{name}.py").write_text(source)
        monkeypatch.setattr(benchmarks, "__file__", str(folder / "__init__.py"))
        root = str(Path(runner.__file__).parents[2])
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
        return tmp_path / "record"

    return make


@pytest.mark.parametrize("library", ["pytest-benchmark", "none"])
def test_measured_skipped_and_failed(
    library: str, checkout: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if library == "none":
        monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:benchmark")
    else:
        pytest.importorskip("pytest_benchmark")
    out = checkout({"sums": SOURCE})
    assert main(["bench", "--out", str(out), "--device", "cpu"]) == 1
    printed = capsys.readouterr()
    assert "bench sums: 7/7" in printed.err and "error: benchmarks failed: sums" in printed.err
    (part,) = read_record(out).parts
    assert [r.form for r in part.results] == ["baseline", "ours: quick", "ours: late", "ours: device"]
    assert [len(r.samples) for r in part.results] == [4, 4, 4, 2]
    assert [r.clock for r in part.results] == ["host"] * 3 + ["device"]
    assert part.results[3].samples == [0.5, 0.25]
    assert part.results[0].extra["scenes"] == 2 and "object" in part.results[0].extra["odd"]
    assert part.left_out == [Unmeasured("test_it[ours: absent]", "no such device")]
    assert [(a.name, a.reason.splitlines()[0]) for a in part.failed] == [
        ("test_it[ours: wrong]", "AssertionError: off by one"),
        ("test_teardown", "RuntimeError: in teardown"),
    ]
    variables, _, command = part.command.partition("pytest ")
    assert command == "benchmarks/bench_sums.py -m 'not gpu'" and "THP_MEM_ALLOC_ENABLE=1" in variables.split()
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert "off by one" in (out / "report.md").read_text()


SLOW = """
import pathlib, time

def test_a(benchmark):
    benchmark.pedantic(time.time)

def test_b(benchmark):
    pathlib.Path(__file__).with_name("hanging").touch()
    time.sleep(600)
"""


def test_time_limit_keeps_finished_benchmarks(
    checkout: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = checkout({"slow": SLOW, "broken": "import nothing_of_this_name\n"})
    hanging = out.parent / "benchmarks" / "hanging"
    # The clock jumps past the limit once the second benchmark hangs.
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + 3600 * hanging.exists(), sleep=time.sleep)
    monkeypatch.setattr(runner, "time", clock)
    record, _ = runner.measure([], out, device="cpu", limit=3000)
    parts = {part.name: part for part in record.parts}
    assert [r.name for r in parts["slow"].results] == ["test_a"]
    assert (
        parts["slow"].exit is None
        and "stopped at its time limit of 3000 s" in parts["slow"].note
        and not parts["slow"].ok
    )
    assert "No module named 'nothing_of_this_name'" in parts["broken"].failed[0].reason
    assert "failed: benchmarks/bench_broken.py: ModuleNotFoundError" in capsys.readouterr().err
    # Measuring again replaces its part and keeps the other.
    (out.parent / "benchmarks" / "bench_broken.py").write_text("def test_c(benchmark): benchmark.pedantic(int)\n")
    again, _ = runner.measure(["broken"], out, device="cpu")
    assert [part.name for part in again.parts] == ["broken", "slow"] and again.parts[0].ok
    assert read_record(out).parts == again.parts


def test_file_selection() -> None:
    files = runner.benchmark_files()
    assert next(iter(files)) == "ceilings"
    assert {"contrastive", "views", "distillation", "ceilings"} <= set(runner.selected_files(["kernels"]))
    assert {"step", "end_to_end"} <= set(runner.selected_files(["step"])) and "views" not in runner.selected_files(
        ["step"]
    )
    data = {"data", "generation", "index", "pack", "vocabulary"}
    assert set(runner.selected_files(["data"])) == data and set(runner.selected_files([])) == set(files)
    assert set(runner.selected_files(["views", "data"])) == {"views", *data}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["kernel"], "bench: got 'kernel', expected kernels, data, step, or one of "),
        (["--report", "nowhere"], "nowhere: no record here, expected a directory that holds record.json, or that file"),
        (["views", "--report", "nowhere"], "bench: got views and --report, expected only one of them"),
        (["--rehearse", "--device", "cpu"], "bench: got --device and --rehearse, which always runs on the CPU"),
        (["--rehearse", "--report", "nowhere"], "bench: got --rehearse and --report, which measures nothing"),
        (["--limit", "3", "--report", "nowhere"], "bench: got --limit and --report, which measures nothing"),
        (["index", "--scenes", "0"], "--scenes: got 0, expected from 1 to 1000000000"),
        (["index", "--scenes", "10000000000000"], "--scenes: got 10000000000000, expected from 1 to 1000000000"),
        (["views", "--scenes", "9"], "--scenes: only the benchmark `index` uses it"),
        (["--limit", "0"], "--limit: got 0, expected seconds above 0"),
        (["--limit", "nan"], "--limit: got nan, expected seconds above 0"),
        (["--device", "cuda"], "--device cuda: no GPU is visible to torch"),
    ],
)
def test_user_errors_are_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if "cuda" in argv and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["bench", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


def test_surrounding_pytest_configuration_is_ignored(checkout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    out = checkout({"quick": "def test_a(benchmark): benchmark.pedantic(int)\n"})
    (out.parent / "pytest.ini").unlink()
    (out.parent.parent / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\n")
    subprocess.run(["git", "init", "--quiet", out.parent.parent], check=True)
    record, _ = runner.measure([], out, device="cpu")
    assert record.parts[0].ok and len(record.parts[0].results) == 1
    assert record.parts[0].commit == "unknown"


def test_rehearsal(checkout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = """
import os
import pytest

@pytest.mark.gpu
def test_a(benchmark):
    assert os.environ["SCENARIOCLIP_FAST_REHEARSAL"] == "1"
    benchmark.pedantic(int)
"""
    out = checkout({"quick": source})
    monkeypatch.setenv("SCENARIOCLIP_FAST_REHEARSAL", "0")  # restored at the end
    monkeypatch.delenv("SCENARIOCLIP_FAST_COMMIT", raising=False)
    assert main(["bench", "--rehearse", "--out", str(out)]) == 0
    record = read_record(out)
    assert record.machine["kind"] == "rehearsal" and len(record.parts[0].results) == 1
    (out / FILE).write_text((out / FILE).read_text().replace('"rehearsal"', '"cpu"'))  # as if it had been measured
    assert main(["bench", "--rehearse", "--out", str(out)]) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a record"),
        ('{"format": 99}', "got format 99, expected 1"),
        ("[]", "not a record"),
        ('{"format": 1}', "not a record"),
        ('{"format": 1, "machine": {}, "parts": [{"name": "x"}]}', "not a record"),
    ],
)
def test_unreadable_records(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(UserError, match=message):
        read_record(tmp_path)


def result(form: str, samples: list[float], group: str = "g", **extra: Any) -> Result:
    return Result(f"test[{form}]", group, form, samples, extra=extra)


def record_of(*results: Result, name: str = "here", device: str = "a processor") -> Record:
    part = Part("part", "pytest x", "c" * 40, "2026-01-02T03:04:05+00:00", 1.0, 0, {}, {}, list(results))
    machine = {"device": device, "kind": "cpu", "versions": {"python": "3"}}
    return Record(machine, [part], name)


def test_record_of_another_machine_is_rejected(tmp_path: Path) -> None:
    record_of(result("ours", [1.0])).write(tmp_path)
    with pytest.raises(UserError, match=r"holds a record of another machine or other versions \(device"):
        runner.measure(["ceilings"], tmp_path, device="cpu")


def test_record_is_extended_after_memory_grew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A virtual machine that was given more memory counts as the same machine."""
    before = record_of(result("ours", [1.0]))
    before.write(tmp_path)
    monkeypatch.setattr(runner.machine, "describe", lambda device: {**before.machine, "memory_gib": 7.5})
    monkeypatch.setattr(runner, "run_file", lambda *_: record_of(name="there").parts[0])
    record, _ = runner.measure(["ceilings"], tmp_path, device="cpu")
    assert record.machine == before.machine


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(machine={}), "KeyError: 'versions'"),
        (lambda r: r["machine"].pop("kind"), "machine: expected kind, device and versions"),
        (lambda r: r["parts"][0].update(name="a/b"), "got the name 'a/b'"),
        (lambda r: r["parts"][0].update(started=None), "a part's name, command, commit, start or note is not a string"),
        (lambda r: r["parts"][0].update(after=None), "part part: before or after is not a mapping"),
        (lambda r: r["parts"][0]["results"][0].update(form=5), "got name, group and form 'test.ours.', 'g', 5"),
        (lambda r: r["parts"][0]["results"][0].update(samples=[]), "no median for empty data"),
        (lambda r: r["parts"][0]["results"][0].update(samples=[float("nan")]), "got the number nan"),
        (lambda r: r["parts"][0]["results"][0].update(samples=[0.0]), "expected samples in seconds"),
        (lambda r: r["parts"][0]["results"][0].update(samples="12"), "TypeError"),
        (lambda r: r["parts"][0]["results"][0].update(extra={"scenes": 0}), "scenes: got 0, expected a number above 0"),
        (
            lambda r: r["parts"][0]["results"][0].update(extra={"ceiling": "copy"}),
            "ceiling without bytes or operations",
        ),
    ],
)
def test_damaged_records(tmp_path: Path, change: Any, message: str) -> None:
    record_of(result("ours", [1.0])).write(tmp_path)
    content = json.loads((tmp_path / FILE).read_text())
    assert read_record(tmp_path).parts
    change(content)
    (tmp_path / FILE).write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"{FILE}: not a record .*{message}"):
        read_record(tmp_path)


def test_unwritable_directory_fails_before_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "run_file", lambda *_: pytest.fail("measured"))
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        runner.measure(["ema"], tmp_path / "file", device="cpu")


def test_samples_round_trip(tmp_path: Path) -> None:
    record = record_of(result("ours", [0.1, 1e-7, 3.0], scenes=3, odd="[1, 2]"), name=tmp_path.name)
    record.write(tmp_path)
    assert read_record(tmp_path) == record
    assert "[0.1, 1e-07, 3.0]" in (tmp_path / FILE).read_text()


def test_forms_are_compared_per_unit() -> None:
    """Two scenes in 1 s are as fast as four in 2 s."""
    results = [result("baseline", [6.0], scenes=2), result("ours", [1.0, 2.0, 9.0], scenes=4)]
    assert unit_of(results) == "scene" and unit_of([results[0], result("x", [1.0])]) == "call"
    table = part_table(record_of(*results).parts[0])
    assert [row[1:6] for row in table.rows] == [
        ["ours", "500 ms", "250 ms to 2.25 s", "3", ""],
        ["baseline", "3 s", "3 s to 3 s", "1", "6.00 x"],
    ]


def test_table_shows_errors() -> None:
    """Also for losses that do not compute every gradient."""
    errors = {"error of loss": 1e-7, "error of d image": 3e-7, "error of d scale": "not computed"}
    ((*_, details),) = part_table(record_of(result("memeff", [1.0], **errors)).parts[0]).rows
    assert "3.0e-07" in details and "error of d scale not computed" in details


def test_no_ratio_without_a_form_of_this_package() -> None:
    assert [row[5] for row in part_table(record_of(result("a", [1.0]), result("b", [2.0])).parts[0]).rows] == ["", ""]


def test_roofline() -> None:
    ceilings = [
        result("copy", [2.0, 1.0, 3.0], "ceilings", bytes=100.0, operations=0, threads=2, ceiling="copy"),
        result("product", [0.5], "ceilings", bytes=1.0, operations=500.0, threads=2, ceiling="product"),
    ]
    kernel = result("ours", [4.0], bytes=200.0, operations=1500.0, threads=2)
    (roof,) = roofs(record_of(*ceilings, kernel, result("baseline", [5.0], bytes=1, operations=1, threads=2)))
    assert (roof.copy, roof.product, roof.floor) == (100.0, 1000.0, 2.0)  # 200 / 100 > 1500 / 1000
    row = roofline_table(record_of(*ceilings, kernel)).rows[0]
    assert row[4:] == ["2 s (copy)", "4 s", "50 %"]
    # Ceilings measured with another number of threads do not apply.
    other = result("ours", [4.0], bytes=200.0, operations=1500.0, threads=1)
    assert roofline_table(record_of(*ceilings, other)).rows[0][4:] == ["not yet measured", "4 s", "not yet measured"]


def test_report_of_several_records(tmp_path: Path) -> None:
    both = result("ours", [1.0], bytes=2.0, operations=3.0)
    records = [
        record_of(both, result("a|b", [4.0]), name="first"),
        record_of(both, name="second", device="<another>"),
    ]
    page = write_report(records, tmp_path).read_text()
    assert page.count("data:image/png;base64,") == 2 and "&lt;another&gt;" in page
    text = (tmp_path / "report.md").read_text()
    assert text == markdown(records) and "| g | ours | 1 s | 1 s |" in text and "a\\|b" in text
    # Records of the same name do not overwrite each other's plots.
    page = write_report([replace(record, name="same") for record in records], tmp_path).read_text()
    assert len(set(re.findall(r"data:image/png;base64,([^\"]+)", page))) == 2


def test_stand_in_timer() -> None:
    timer = plugin.Timer("name")
    assert timer.pedantic(lambda a, b=0: a + b, args=(1,), kwargs={"b": 2}, rounds=3) == 3
    stats = timer.stats.stats
    assert len(stats.data) == 3 and min(stats.data) == stats.min <= stats.median <= stats.max
