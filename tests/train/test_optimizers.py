"""Runs with each optimizer: they train, resume exactly and shard."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.train import optim
from scenarioclip_fast.train.checkpoint import examine
from scenarioclip_fast.train.config import OptimSection, TrainConfig
from scenarioclip_fast.train.metrics import TIMINGS, read_metrics
from scenarioclip_fast.train.trainer import Trainer

Make = Callable[..., TrainConfig]


def rows(config: TrainConfig) -> list[dict[str, Any]]:
    found = read_metrics(Path(config.run.dir) / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in found]


def weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.run.dir) / "model" / "model.safetensors")


def checkpoint(config: TrainConfig, step: int) -> Path:
    return Path(config.run.dir) / "checkpoints" / f"step-{step:08d}"


def nadam(groups: list[optim.ParamGroup], config: OptimSection) -> torch.optim.Optimizer:
    """An optimizer with non-zero initial state, counters in host memory and no fused kernel."""
    return torch.optim.NAdam(groups, lr=config.lr, betas=config.betas)


@pytest.mark.parametrize(
    ("name", "lr", "state"),
    [
        ("adamw", "1e-3", {"step", "exp_avg", "exp_avg_sq"}),
        ("sgd", "0.1", {"momentum_buffer"}),
        ("nadam", "1e-3", {"step", "exp_avg", "exp_avg_sq", "mu_product"}),
    ],
)
def test_a_run_trains_and_resumes_exactly(
    small: Make, monkeypatch: pytest.MonkeyPatch, name: str, lr: str, state: set[str]
) -> None:
    monkeypatch.setitem(optim.OPTIMIZERS, "nadam", nadam)
    options = (f"optim.name={name}", f"optim.lr={lr}", "train.steps=12", "train.checkpoint_every=6")
    full, resumed = small(*options, run="full"), small(*options, run="resumed")
    Trainer(full).fit()
    assert rows(full)[-1]["loss"] < rows(full)[0]["loss"]
    found = examine(checkpoint(full, 6))
    # Names that later versions must be able to load.
    of_weight = {n.rpartition("/")[2] for n in found.names if n.startswith("optimizer/model/vision.global.blocks.0")}
    of_loss = {n.rpartition("/")[2] for n in found.names if n.startswith("optimizer/loss/contrastive.logit_scale.")}
    assert of_weight == of_loss == state
    Trainer(resumed, resume=checkpoint(full, 6)).fit()
    assert rows(resumed) == rows(full)[6:]
    assert all(torch.equal(w, weights(full)[k]) for k, w in weights(resumed).items())


def test_a_different_optimizer_cannot_resume(small: Make) -> None:
    Trainer(small("train.steps=2")).fit()
    with pytest.raises(UserError, match=r"a different optimizer: optim\.name was 'adamw', is now 'sgd'"):
        Trainer(small("train.steps=3", "optim.name=sgd"), resume=True).fit()


def test_an_unknown_optimizer_is_reported_before_anything_is_written(small: Make) -> None:
    config = small("train.steps=2", "optim.name=adamv")
    with pytest.raises(UserError, match=r"optim\.name: got 'adamv', did you mean adamw\?"):
        Trainer(config).fit()
    assert not Path(config.run.dir).exists()


def test_sgd_with_sharded_weights(small: Make, fork_server: Any) -> None:
    options = ("train.steps=6", "train.checkpoint_every=3", "optim.name=sgd", "optim.lr=0.1")
    ddp, fsdp = (small(*options, f"train.parallel={kind}", run=kind) for kind in ("ddp", "fsdp"))
    fork_server.start(ddp, ranks=2).finish()
    fork_server.start(fsdp, ranks=2).finish()
    for a, b in zip(rows(fsdp), rows(ddp), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    for name, w in weights(fsdp).items():
        torch.testing.assert_close(w, weights(ddp)[name], rtol=0, atol=1e-5, msg=name)
    resumed = small(*options, "train.parallel=fsdp", run="resumed")
    fork_server.start(resumed, "--resume", str(checkpoint(fsdp, 3)), ranks=2).finish()
    assert rows(resumed) == rows(fsdp)[3:]
