"""tune_contrastive.py: a rehearsal on a CPU, and its predictions."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scenarioclip_fast.benchmarks import tune_contrastive
from scenarioclip_fast.benchmarks.tune_contrastive import DEFAULTS, Predictions
from scenarioclip_fast.kernels.contrastive import large
from scenarioclip_fast.kernels.contrastive.plan import Plan, Tile

ROOT = Path(__file__).parents[2]


def test_rehearsal_runs_every_variant(tmp_path: Path) -> None:
    """Without Triton, which a CPU machine need not have."""
    out = tmp_path / "tune.json"
    code = "import sys; sys.modules['triton'] = None; import tune_contrastive; tune_contrastive.main(sys.argv[1:])"
    path = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])
    environment = {**os.environ, "SCENARIOCLIP_FAST_REHEARSAL": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", code, "--quick", "--rows", "64", "--width", "128", "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(out.read_text())
    assert record["device"] == "cpu" and "estimates" in record["predictions"]
    rows = {(row["what"], row["variant"]): row for row in record["rows"]}
    assert not any(row["error"] for row in rows.values())
    for name, values in tune_contrastive.QUICK.items():
        own = [row for (what, _), row in rows.items() if what == name]
        assert len(own) == len(values)
        assert all(row["measured_ms"] > 0 and row["share_of_bare_products"] > 0 for row in own)
    names = [name for name, *_ in tune_contrastive.parts(Predictions(64, 128))]
    assert all(("part of one call", name) in rows for name in names)
    assert len(done.stdout.splitlines()) == len(rows) + 2  # one line each


def test_defaults_are_those_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The predictions assume the code's choices on an H100."""
    plan = Plan(torch.bfloat16, "tf32", 512, 64, tma=True, folds=True)
    assert plan.sum_tile() == Tile(*DEFAULTS["sum_tile"])
    assert plan.gradient_tile() == Tile(*DEFAULTS["gradient_tile"])
    monkeypatch.setattr(large, "processors", lambda _: tune_contrastive.PROCESSORS)
    block = (torch.device("cuda"), 512, 2, 128)
    assert large.block_side(*block) == DEFAULTS["block_side"]
    with tune_contrastive.override("gradient_tile", (256, 128, 8, 4)):
        assert plan.gradient_tile() == Tile(256, 128, 8, 4)
    with tune_contrastive.override("block_side", 4224):
        assert large.block_side(*block) == 4224


def test_parts_are_the_kernels_of_a_large_level() -> None:
    """Each kernel in bfloat16 belongs to one part; unit rows are of the other types."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from scenarioclip_fast.kernels.contrastive import large_kernels, mean_kernels

    functions = {**vars(large_kernels), **vars(mean_kernels)}
    kernels = [name for name, f in functions.items() if hasattr(f, "arg_names") and not name.startswith("_")]
    launched = [name for name in kernels if name not in ("unit_rows", "count_rows")]
    patterns = [pattern for _, pattern, _ in tune_contrastive.parts(Predictions(32768, 512))]
    matched = {name: sum(bool(re.search(pattern, name)) for pattern in patterns) for name in launched}
    assert matched == dict.fromkeys(launched, 1), matched


def test_predictions() -> None:
    predicted = Predictions(32768, 512)
    # A tile of 128 x 128 needs 64 bytes per cycle from the L2, and 8 more if it writes; 32 to 39 are available.
    assert predicted.peak_share((128, 128), written=0) == (32 / 64, 39 / 64)
    assert predicted.peak_share((128, 128), written=2) == (32 / 72, 39 / 72)
    assert predicted.peak_share((256, 128), written=0) == tune_contrastive.ONE_BLOCK  # below 32 / 48
    assert predicted.forward_tiles((256, 128)) == pytest.approx((1.112 / 0.70, 1.112 / 0.65), rel=1e-3)
    # 8,448 rows are one wave of 128 x 256 tiles; 4,224 rows are half a wave, which takes as long.
    one, half = Predictions(8448, 512), Predictions(8448, 512).products(4224)
    assert one.products(8448)[0] == pytest.approx(2 * one.cublas()[0])
    assert half[0] == pytest.approx(4 * one.cublas()[0])
    parts = [span for *_, span in tune_contrastive.parts(predicted)]
    assert tune_contrastive.total(*parts) == pytest.approx(predicted.both(**DEFAULTS))


def test_each_kernel_belongs_to_one_part() -> None:
    kernels = {
        "tile_sums": 1.0,
        "log_sums": 0.25,
        "mean_parts": 0.5,
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>(float)": 0.125,
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTN": 2.0,
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>(int)": 4.0,
    }
    rows = {row.variant: row.measured_ms for row in tune_contrastive.split(kernels, Predictions(32768, 512))}
    assert rows["tile_sums"] == 1.0 and rows["log_sums"] == 0.25 and rows["sums of partial sums"] == 0.125
    assert rows["mean_parts, mean_loss"] == 0.5 and rows["the two products"] == 2.0
    assert rows["others: at::native::vectorized_element"] == 4.0 and sum(rows.values()) == sum(kernels.values())


def test_difference() -> None:
    expected = [torch.tensor(3.0), torch.ones(4)]
    assert tune_contrastive.difference(expected, expected) == 0
    assert tune_contrastive.difference([expected[0], torch.full((4,), 1.5)], expected) == pytest.approx(0.5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is available")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        tune_contrastive.main([])
    assert error.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("error: torch sees no GPU: there is nothing to tune")
