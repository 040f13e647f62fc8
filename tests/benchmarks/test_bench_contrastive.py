"""The contrastive benchmark: order of its cases, its checks, and all GPU cases rehearsed on a CPU."""

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
from scenarioclip_fast.benchmarks.bench_contrastive import (
    BOTH,
    FOUR,
    LARGE,
    LARGEST_ROWS,
    MAIN_ROWS,
    SIGMOID,
    THIRD_PARTY,
    Case,
)
from torch import Tensor

ROOT = Path(__file__).parents[2]


def test_headline_cases_first_and_third_party_last() -> None:
    cases = bench_contrastive.gpu_cases(512)
    headline = [FOUR, *LARGE, "logits.T compiled", "logits.T"]
    assert [(case.form, case.rows, case.phase) for case in cases[: len(headline)]] == [
        (form, MAIN_ROWS, BOTH) for form in headline
    ]
    largest = Case("rows", "ours: triton", "cuda", LARGEST_ROWS, 512)
    assert cases.index(largest) == max(k for k, case in enumerate(cases) if case.form not in THIRD_PARTY)
    place = {case: k for k, case in enumerate(cases)}
    assert len(place) == len(cases)
    # This package and PyTorch precede third-party losses, some of which compile slowly.
    first_third_party = min(k for case, k in place.items() if case.form in THIRD_PARTY)
    assert all(k < first_third_party for case, k in place.items() if case.form not in THIRD_PARTY)
    assert {case.form for case in cases if case.rows == 65536} == {FOUR, *LARGE}


def test_requested_sizes_run_every_form() -> None:
    cases = bench_contrastive.requested_cases("cuda", [1024], 512)
    cpu = {"ours: cpu", "ours: cpu, no workspace"}
    assert {case.form for case in cases if case.kind == "rows"} == {*bench_contrastive.FORMS} - cpu
    assert {case.form for case in cases if case.kind == "products"} == {*bench_contrastive.PRODUCTS}
    # Graphs of compiled forms, and of forms that compute gradients in the forward pass, allow one backward pass.
    assert {case.form for case in cases if case.phase == "backward"} == {*bench_contrastive.EAGER} - cpu


def test_warm_up_runs_the_cases_that_compile() -> None:
    warm = [case for case in bench_contrastive.gpu_cases(512) if bench_contrastive.compiles(case)]
    assert {case.form for case in warm} == {"ours: triton", "logits.T compiled", "open_clip compiled", *THIRD_PARTY}
    assert max(case.rows for case in warm) == MAIN_ROWS


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
        if case.form in THIRD_PARTY:  # run on GPUs only; a rehearsal gets as far as possible
            assert row["outcome"] == "left out" and ("not installed" in row["reason"] or "failed: " in row["reason"])
            continue
        assert row["outcome"] == "measured", row
        assert row["group"].startswith("contrastive, ") and row["group"].endswith(", cuda")
        assert row["extra"]["device"] == "cuda"
        if case.kind != "products":
            assert row["form"] == case.form
            assert any(key.startswith("error of d image") for key in row["extra"])
    assert not outcomes


def loss_and_gradients(rows: int, width: int) -> tuple[list[Tensor], list[Tensor | None]]:
    leaves = bench_contrastive.features(rows, width, "cpu")
    return list(leaves), bench_contrastive.differentiated(bench_contrastive.FORMS["ours: cpu"](*leaves), leaves)


def test_sample_is_compared_with_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_contrastive, "SAMPLE", 40)
    leaves, found = loss_and_gradients(200, 32)
    errors = bench_contrastive.check_sample("ours: cpu", found, leaves)
    numbers = [error for error in errors.values() if isinstance(error, float)]
    assert len(numbers) == 5 and max(numbers) < 1e-5
    assert errors["compared with float64"] == "40 random rows and as many texts of 200, and the loss"
    # The full float64 result agrees with the sample's expected values.
    exact = bench_contrastive.exact(200, 32, "cpu")
    for name, (full, sample) in bench_contrastive.sampled(leaves, exact).items():
        assert bench_contrastive.relative_error(full, sample) < 1e-6, name  # the sums are float32


@pytest.mark.parametrize("output", [0, 1, 2])
def test_wrong_sample_is_not_timed(output: int) -> None:
    leaves, found = loss_and_gradients(80, 32)
    wrong = found[output]
    assert wrong is not None
    found[output] = wrong * 1.001  # the tolerance of float32 is 1e-4
    with pytest.raises(pytest.fail.Exception, match=r"is off by 1\.0e-03, not timed"):
        bench_contrastive.check_sample("ours: cpu", found, leaves)
    with pytest.raises(pytest.skip.Exception, match=r"is off by 1\.0e-03, not timed"):
        bench_contrastive.check_sample("inf_cl", found, leaves)


def test_exact_sigmoid_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_contrastive, "SIGMOID_ROWS", 12)
    leaves = [t.detach().double().requires_grad_() for t in bench_contrastive.features(50, 16, "cpu")]
    image, text, scale = leaves
    logits = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T + bench_contrastive.SIGMOID_BIAS
    pairs = torch.eye(50, dtype=torch.float64)
    loss = F.binary_cross_entropy_with_logits(logits, pairs, reduction="sum") / 50
    expected = [loss.detach(), *torch.autograd.grad(loss, leaves)]
    torch.testing.assert_close(bench_contrastive.exact_sigmoid(50, 16, "cpu"), expected)


def test_products_match_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_contrastive.Products, "block_side", staticmethod(lambda _: 20))
    x, y = torch.randn(50, 8), torch.randn(70, 8)
    products = bench_contrastive.Products(x, y)
    products.four()
    torch.testing.assert_close(products.d_y, (x @ y.T).T @ x)
    torch.testing.assert_close(products.d_x[:10], x[40:] @ y.T @ y)  # the last row of blocks
    assert products.named("K = side")[0] == "bare product, K = 20, float32 out"


@pytest.mark.parametrize("form", ["memeff", SIGMOID])
def test_failing_third_party_loss_is_skipped(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setitem(bench_contrastive.MEASURE, "rows", broken)
    benchmark = SimpleNamespace(extra_info={})
    with pytest.raises(pytest.skip.Exception, match="failed: RuntimeError: no such instruction"):
        bench_contrastive.test_contrastive(benchmark, Case("rows", form, "cuda", MAIN_ROWS, 512))
    for required in ("ours: triton", "logits.T"):
        with pytest.raises(RuntimeError, match="no such instruction"):
            bench_contrastive.test_contrastive(benchmark, Case("rows", required, "cuda", MAIN_ROWS, 512))
