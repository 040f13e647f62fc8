"""The contrastive benchmark's order, its checks, and all of its GPU cases on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scenarioclip_fast.benchmarks import bench_contrastive
from scenarioclip_fast.benchmarks.bench_contrastive import BOTH, FOUR, LARGEST, MAIN, RIVALS, SIGMOID, Case
from torch import Tensor

ROOT = Path(__file__).parents[2]


def test_the_headline_comes_first_and_the_code_of_others_last() -> None:
    cases = bench_contrastive.gpu_cases(512)
    headline = [FOUR, "ours: triton", "logits.T compiled", "logits.T"]
    assert [(case.way, case.rows, case.phase) for case in cases[:4]] == [(way, MAIN, BOTH) for way in headline]
    largest = Case("rows", "ours: triton", "cuda", LARGEST, 512)
    assert cases.index(largest) == max(k for k, case in enumerate(cases) if case.way not in RIVALS)
    place = {case: k for k, case in enumerate(cases)}
    assert len(place) == len(cases)
    # What is ours and asked for precedes what others do, and what takes a compiler long.
    first_rival = min(k for case, k in place.items() if case.way in RIVALS)
    assert all(k < first_rival for case, k in place.items() if case.way not in RIVALS)
    assert {case.way for case in cases if case.rows == 65536} == {FOUR, "ours: triton"}


def test_asked_sizes_take_every_form() -> None:
    cases = bench_contrastive.asked_cases("cuda", [1024], 512)
    assert {case.way for case in cases if case.kind == "rows"} == {*bench_contrastive.WAYS} - {"ours: cpu"}
    assert {case.way for case in cases if case.kind == "products"} == {*bench_contrastive.PRODUCTS}
    # Graphs of compiled forms, and of those that compute gradients with the loss, serve one backward pass.
    assert {case.way for case in cases if case.phase == "backward"} == {*bench_contrastive.PLAIN} - {"ours: cpu"}


def test_a_warm_up_runs_what_compiles() -> None:
    warm = [case for case in bench_contrastive.gpu_cases(512) if bench_contrastive.compiles(case)]
    assert {case.way for case in warm} == {"ours: triton", "logits.T compiled", "open_clip compiled", *RIVALS}
    assert max(case.rows for case in warm) == MAIN


def test_every_gpu_case_is_rehearsed(tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.touch()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SCENARIOCLIP_FAST_BENCH")}
    environment |= {"SCENARIOCLIP_FAST_REHEARSAL": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_contrastive.py", "-m", "gpu", "-p", "no:cacheprovider"]
    command += ["-p", "no:randomly", "-p", "scenarioclip_fast.bench.plugin", "--bench-lines", str(lines)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    outcomes = {row["name"]: row for row in rows if "outcome" in row}
    for case in bench_contrastive.gpu_cases(512):
        row = outcomes.pop(f"test_contrastive[{case.id}]")
        if case.way in RIVALS:  # they run on GPUs alone, but a rehearsal goes as far as they let it
            assert row["outcome"] == "left out" and ("not installed" in row["reason"] or "failed: " in row["reason"])
            continue
        assert row["outcome"] == "measured", row
        assert row["group"].startswith("contrastive, ") and row["group"].endswith(", cuda")
        assert row["extra"]["device"] == "cuda"
        if case.kind != "products":
            assert row["form"] == case.way
            assert any(key.startswith("error of d image") for key in row["extra"])
    assert not outcomes


def loss_and_gradients(rows: int, width: int) -> tuple[list[Tensor], list[Tensor | None]]:
    leaves = bench_contrastive.features(rows, width, "cpu")
    return list(leaves), bench_contrastive.differentiated(bench_contrastive.WAYS["ours: cpu"](*leaves), leaves)


def test_a_sample_is_compared_with_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_contrastive, "SAMPLE", 40)
    leaves, found = loss_and_gradients(200, 32)
    errors = bench_contrastive.checked_by_sample("ours: cpu", found, leaves)
    numbers = [error for error in errors.values() if isinstance(error, float)]
    assert len(numbers) == 5 and max(numbers) < 1e-5
    assert errors["compared with float64"] == "40 random rows and as many texts of 200, and the loss"
    # What the law gives for these rows is what the sample wants of them.
    wanted = bench_contrastive.exact(200, 32, "cpu")
    for name, (of_law, of_sample) in bench_contrastive.sampled(leaves, wanted).items():
        assert bench_contrastive.relative_error(of_law, of_sample) < 1e-6, name  # the sums are float32's


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_wrong_sample_is_not_timed(part: int) -> None:
    leaves, found = loss_and_gradients(80, 32)
    wrong = found[part]
    assert wrong is not None
    found[part] = wrong * 1.001  # float32 is held to 1e-4
    with pytest.raises(pytest.fail.Exception, match=r"is off by 1\.0e-03, not timed"):
        bench_contrastive.checked_by_sample("ours: cpu", found, leaves)
    with pytest.raises(pytest.skip.Exception, match=r"is off by 1\.0e-03, not timed"):
        bench_contrastive.checked_by_sample("inf_cl", found, leaves)


def test_the_exact_sigmoid_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_contrastive, "SIGMOID_ROWS", 12)
    leaves = [t.detach().double().requires_grad_() for t in bench_contrastive.features(50, 16, "cpu")]
    image, text, scale = leaves
    logits = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T + bench_contrastive.SIGMOID_BIAS
    pairs = torch.eye(50, dtype=torch.float64)
    loss = F.binary_cross_entropy_with_logits(logits, pairs, reduction="sum") / 50
    wanted = [loss.detach(), *torch.autograd.grad(loss, leaves)]
    torch.testing.assert_close(bench_contrastive.exact_sigmoid(50, 16, "cpu"), wanted)


def test_products_are_those_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_contrastive.Products, "block_side", staticmethod(lambda _: 20))
    x, y = torch.randn(50, 8), torch.randn(70, 8)
    products = bench_contrastive.Products(x, y)
    products.four()
    torch.testing.assert_close(products.d_y, (x @ y.T).T @ x)
    torch.testing.assert_close(products.d_x[:10], x[40:] @ y.T @ y)  # of the last row of blocks
    assert products.named("K = side")[0] == "bare product, K = 20, float32 out"


@pytest.mark.parametrize("way", ["memeff", SIGMOID])
def test_a_rival_that_fails_costs_only_itself(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setitem(bench_contrastive.MEASURE, "rows", broken)
    benchmark = SimpleNamespace(extra_info={})
    with pytest.raises(pytest.skip.Exception, match="failed: RuntimeError: no such instruction"):
        bench_contrastive.test_contrastive(benchmark, Case("rows", way, "cuda", MAIN, 512))
    for known in ("ours: triton", "logits.T"):
        with pytest.raises(RuntimeError, match="no such instruction"):
            bench_contrastive.test_contrastive(benchmark, Case("rows", known, "cuda", MAIN, 512))
