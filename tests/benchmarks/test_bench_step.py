"""bench_step.py and bench_end_to_end.py: every GPU case without a GPU, their order, and what they refuse to time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scenarioclip_fast.benchmarks import bench_end_to_end, bench_step, readme, timing

from scenarioclip_fast.bench.plugin import Timer
from scenarioclip_fast.bench.record import Part, Record, Result

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The lines of both files' GPU benchmarks."""
    lines = tmp_path_factory.mktemp("rehearsal") / "lines.jsonl"
    files = ["benchmarks/bench_step.py", "benchmarks/bench_end_to_end.py"]
    plugin = ["-p", "scenarioclip_fast.bench.plugin", "--bench-lines", str(lines), "-p", "no:cacheprovider"]
    env = {**os.environ, "SCENARIOCLIP_FAST_REHEARSAL": "1", "OMP_NUM_THREADS": "1"}
    env.pop("SCENARIOCLIP_FAST_BENCH_WARM", None)
    command = [sys.executable, "-m", "pytest", *files, "-m", "gpu", *plugin]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [row for row in map(json.loads, lines.read_text().splitlines()) if "total" not in row]


def test_every_gpu_case_in_its_order(rehearsed: list[dict[str, Any]]) -> None:
    assert {row["outcome"] for row in rehearsed} == {"measured"}
    steps, loops = rehearsed[:6], rehearsed[6:]
    assert [row["form"] for row in steps] == [
        "ours, bf16",
        "ours, bf16, compiled",
        "baseline, bf16",
        "baseline, float32",
        "ours as published (pre_layernorm trains), float32",
        "ours, bf16, compiled, cuda graphs",
    ]
    assert [(row["group"].split(", ")[1], row["form"]) for row in loops] == [
        ("whole loop", "ours, bf16"),
        ("whole loop", "baseline, float32"),
        ("loader", "ours, bf16"),
        ("step", "ours, bf16"),
        ("step", "baseline, float32"),
        ("loader", "baseline, float32"),
    ]
    for row in steps:
        assert row["extra"]["needed_tflop"] > 0
        assert 0 < row["extra"]["host, ms"] <= 1.001e3 * max(row["samples"])
    ours, theirs = loops[:2]
    # Timed are 4 of 6 batches and 2 of 4, of 3 scenes each.
    assert (ours["extra"]["scenes"], theirs["extra"]["scenes"]) == (12, 6)
    assert 0 <= ours["extra"]["data_wait"] < 1 and ours["extra"]["blocks"] == "compiled"


def test_claims_find_their_groups_and_forms(rehearsed: list[dict[str, Any]]) -> None:
    keys = ("name", "group", "form", "samples", "clock", "extra", "took")
    results = [Result(**{key: row[key] for key in keys}) for row in rehearsed]
    part = Part("all", "pytest", "c", "2026-01-01T08:00:00", 1.0, 0, {}, {}, results)
    record = Record({"device": "a GPU", "kind": "cuda", "versions": {}}, [part], "here")
    claims = [c for c in [*readme.GPU, *readme.GPU_TARGETS] if "training step" in c.group or "end to end" in c.group]
    assert len(claims) >= 3 and all(readme.find(claim, [record]) is not None for claim in claims)


def test_the_baseline_is_timed_over_whole_rounds_of_its_workers() -> None:
    """Eight processes deliver eight batches at a time."""
    setting = bench_end_to_end.SETTINGS[bench_end_to_end.ON_GPU]
    assert (setting.theirs - setting.untimed) % setting.workers == 0
    # Our loop is made of the same packed batches, and both begin alike.
    assert setting.batches > setting.untimed > 0 and setting.batch % setting.distinct == 0


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Which ways are built."""
    names: list[str] = []
    build: Callable[..., Any] = bench_step.build

    def recorded(name: str, *args: Any) -> Any:
        names.append(name)
        return build(name, *args)

    monkeypatch.setattr(timing, "REHEARSAL", True)  # a small model
    monkeypatch.setattr(bench_step, "build", recorded)
    monkeypatch.setattr(bench_step, "EXPECTED", {})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many small operators
    yield names
    torch.set_num_threads(threads)


def run(way: str) -> Timer:
    benchmark = Timer(way)
    bench_step.run(benchmark, way, "vit-b-32", bench_step.drawn(3, 64), "cpu", rounds=1)
    return benchmark


def test_one_pass_of_the_baseline_serves_all(built: list[str]) -> None:
    published = "ours as published (pre_layernorm trains), float32"
    for way in ("ours, float32", published, bench_step.REFERENCE):
        assert len(run(way).stats.stats.data) == 1
    # It is built for the check of the first, and once more to be timed.
    assert built == [bench_step.REFERENCE, "ours, float32", published, bench_step.REFERENCE]


def test_no_time_for_a_wrong_step(built: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run("ours, float32")
    ((key, (loss, norm)),) = bench_step.EXPECTED.items()
    for wrong, what in (((1.001 * loss, norm), "loss"), ((loss, 1.001 * norm), "gradient norm")):
        monkeypatch.setitem(bench_step.EXPECTED, key, wrong)
        with pytest.raises(AssertionError, match=f"ours, float32: {what} "):
            run("ours, float32")


def test_warm_up_makes_the_same_steps_without_the_check(built: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "WARM", True)
    steps: list[Any] = []
    step = bench_step.OurStep.step
    monkeypatch.setattr(bench_step.OurStep, "step", lambda self, batch: steps.append(batch) or step(self, batch))
    run("ours, float32")
    assert built == ["ours, float32"] and bench_step.EXPECTED == {}
    assert len(steps) == 2 and all(batch is bench_step.drawn(3, 64).batch for batch in steps)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_losses_of_a_loop_that_differ(device: str) -> None:
    class Side:
        way, on_gpu, wrong = "ours, bf16", device == "cuda", None

    side: Any = Side()
    tolerance = 2e-2 if side.on_gpu else 4e-3
    expected = [5.0, 4.0]
    bench_end_to_end.check(side, [5.0, 4.0 * (1 + 0.9 * tolerance)], expected)
    assert side.wrong is None
    for other in (4.0 * (1 + 1.1 * tolerance), float("nan")):
        with pytest.raises(pytest.fail.Exception, match=r"ours, bf16, step 1: loss .*, the baseline's is 4\.0"):
            bench_end_to_end.check(side, [5.0, other], expected)
    with pytest.raises(ValueError):  # a step too few
        bench_end_to_end.check(side, [5.0], expected)
    # Nothing else is measured of a side that was found wrong.
    with pytest.raises(pytest.fail.Exception, match="ours, bf16, step 1"):
        bench_end_to_end.test_vit_b_32_on_a_gpu(None, "loader", side.way, lambda way: side)
