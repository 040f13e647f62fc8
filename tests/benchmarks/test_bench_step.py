"""bench_step.py and bench_end_to_end.py: all GPU cases rehearsed, their order, and the checks before timing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scenarioclip_fast.benchmarks import bench_end_to_end, bench_step, readme, timing

from scenarioclip_fast.bench.plugin import Timer
from scenarioclip_fast.bench.record import Part, Record, Result

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The result lines of both files' GPU benchmarks."""
    lines = tmp_path_factory.mktemp("rehearsal") / "lines.jsonl"
    files = ["benchmarks/bench_step.py", "benchmarks/bench_end_to_end.py"]
    plugin = ["-p", "scenarioclip_fast.bench.plugin", "--bench-lines", str(lines), "-p", "no:cacheprovider"]
    env = {**os.environ, "SCENARIOCLIP_FAST_REHEARSAL": "1", "OMP_NUM_THREADS": "1"}
    env.pop("SCENARIOCLIP_FAST_BENCH_WARM", None)
    command = [sys.executable, "-m", "pytest", *files, "-m", "gpu", *plugin]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [row for row in map(json.loads, lines.read_text().splitlines()) if "total" not in row]


def test_gpu_cases_run_in_order(rehearsed: list[dict[str, Any]]) -> None:
    assert {row["outcome"] for row in rehearsed} == {"measured"}
    steps, loops = rehearsed[:6], rehearsed[6:]
    assert [row["form"] for row in steps] == [
        "ours, bf16",
        "ours, bf16, cuda graphs",
        "baseline, bf16",
        "baseline, float32",
        "ours as published (pre_layernorm trains), float32",
        "ours, bf16, cuda graphs, fp8",
    ]
    assert [(row["group"].split(", ")[1], row["form"]) for row in loops] == [
        ("whole loop", "ours, bf16, cuda graphs"),
        ("whole loop", "baseline, float32"),
        ("whole loop", "ours, bf16"),
        ("loader", "ours, bf16"),
        ("step", "ours, bf16, cuda graphs"),
        ("step", "ours, bf16"),
        ("step", "baseline, float32"),
        ("loader", "baseline, float32"),
    ]
    for row in steps:
        assert row["extra"]["needed_tflop"] > 0
        assert 0 < row["extra"]["host, ms"] <= 1.001e3 * max(row["samples"])
    ours, baseline = loops[:2]
    # 4 of 6 and 2 of 4 batches are timed, of 3 scenes each.
    assert (ours["extra"]["scenes"], baseline["extra"]["scenes"]) == (12, 6)
    assert 0 <= ours["extra"]["data_wait"] < 1


def test_claims_find_their_groups_and_forms(rehearsed: list[dict[str, Any]]) -> None:
    keys = ("name", "group", "form", "samples", "clock", "extra", "took")
    results = [Result(**{key: row[key] for key in keys}) for row in rehearsed]
    part = Part("all", "pytest", "c", "2026-01-01T08:00:00", 1.0, 0, {}, {}, results)
    record = Record({"device": "a GPU", "kind": "cuda", "versions": {}}, [part], "here")
    claims = [c for c in [*readme.GPU, *readme.GPU_TARGETS] if "training step" in c.group or "end to end" in c.group]
    assert len(claims) >= 3 and all(readme.find(claim, [record]) is not None for claim in claims)


def test_baseline_is_timed_over_a_multiple_of_its_workers() -> None:
    """Eight workers deliver eight batches at a time."""
    setting = bench_end_to_end.SETTINGS[bench_end_to_end.ON_GPU]
    assert (setting.baseline_batches - setting.untimed) % setting.workers == 0
    # Both loops repeat the same packed batches and start with the same untimed ones.
    assert setting.batches > setting.untimed > 0 and setting.batch % setting.distinct == 0


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the forms that were built."""
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


def run(form: str) -> Timer:
    benchmark = Timer(form)
    bench_step.run(benchmark, form, "vit-b-32", bench_step.synthetic(3, 64), "cpu", rounds=1)
    return benchmark


def test_baseline_is_measured_once(built: list[str]) -> None:
    published = "ours as published (pre_layernorm trains), float32"
    for form in ("ours, float32", published, bench_step.REFERENCE):
        assert len(run(form).stats.stats.data) == 1
    # It is built for the first check, and again to be timed.
    assert built == [bench_step.REFERENCE, "ours, float32", published, bench_step.REFERENCE]


def test_wrong_step_is_not_timed(built: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run("ours, float32")
    ((key, (loss, norm)),) = bench_step.EXPECTED.items()
    for wrong, what in (((1.001 * loss, norm), "loss"), ((loss, 1.001 * norm), "gradient norm")):
        monkeypatch.setitem(bench_step.EXPECTED, key, wrong)
        with pytest.raises(AssertionError, match=f"ours, float32: {what} "):
            run("ours, float32")


def test_warm_up_takes_the_same_steps_unchecked(built: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "WARM", True)
    steps: list[Any] = []
    step = bench_step.OurStep.step
    monkeypatch.setattr(bench_step.OurStep, "step", lambda self, batch: steps.append(batch) or step(self, batch))
    run("ours, float32")
    assert built == ["ours, float32"] and bench_step.EXPECTED == {}
    assert len(steps) == 2 and all(batch is bench_step.synthetic(3, 64).batch for batch in steps)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_differing_losses_of_a_loop_fail(device: str) -> None:
    contender: Any = SimpleNamespace(form="ours, bf16", on_gpu=device == "cuda", error=None)
    tolerance = 2e-2 if contender.on_gpu else 4e-3
    expected = [5.0, 4.0]
    bench_end_to_end.check(contender, [5.0, 4.0 * (1 + 0.9 * tolerance)], expected)
    assert contender.error is None
    for other in (4.0 * (1 + 1.1 * tolerance), float("nan")):
        with pytest.raises(pytest.fail.Exception, match=r"ours, bf16, step 1: loss .*, the baseline's is 4\.0"):
            bench_end_to_end.check(contender, [5.0, other], expected)
    with pytest.raises(ValueError):  # one step is missing
        bench_end_to_end.check(contender, [5.0], expected)
    # All later benchmarks of this contender fail, too.
    with pytest.raises(pytest.fail.Exception, match="ours, bf16, step 1"):
        bench_end_to_end.test_vit_b_32_on_a_gpu(None, "loader", contender.form, lambda form: contender)
