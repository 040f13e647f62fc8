"""Runs started from the command line, alone and under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from scenarioclip_fast.cli import main
from scenarioclip_fast.train.config import TrainConfig
from scenarioclip_fast.train.metrics import TIMINGS, read_metrics

Make = Callable[..., TrainConfig]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Match the runs of `start`: the last bits depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def start(config: TrainConfig, *options: str, ranks: int = 1) -> subprocess.Popen[str]:
    path = Path(config.run.dir).with_suffix(".yaml")
    config.save(path)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "scenarioclip_fast", "train", "-c", str(path), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    out, _ = process.communicate(timeout=120)
    assert process.returncode == code, out
    return out


def rows(config: TrainConfig) -> list[dict[str, Any]]:
    found = read_metrics(Path(config.run.dir) / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in found]


def saved(config: TrainConfig) -> Path:
    path = Path(config.run.dir).with_suffix(".yaml")
    config.save(path)
    return path


def test_two_ranks_match_one_process(small: Make) -> None:
    one, two = (small("train.steps=20", "data.batch_size=10", run=name) for name in ("one", "two"))
    assert main.main(["train", "-c", str(saved(one))]) == 0
    out = finish(start(two, ranks=2))
    assert "x 2 ranks" in out
    assert out.count("model: ") == 1
    for a, b in zip(rows(one), rows(two), strict=True):
        # float32 sums in another order; steps amplify the difference
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
        assert (a["views"], a["lr"]) == (b["views"], b["lr"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optim.lrr=1"], "error: unknown config key optim.lrr: did you mean optim.lr?"),
        (["-c", "absent.yaml"], "error: cannot read the config absent.yaml"),
        ([], "error: data.shards is not set"),
        (["data.shards=absent"], "absent"),
    ],
)
def test_user_errors_exit_with_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main.main(["train", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_resume_may_precede_an_override(small: Make, capsys: pytest.CaptureFixture[str]) -> None:
    config = small("train.steps=5")
    assert main.main(["train", "-c", str(saved(config)), "--resume", "train.steps=1"]) == 0
    assert "step 1 of 1" in capsys.readouterr().out
