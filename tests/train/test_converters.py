from __future__ import annotations

from collections.abc import Callable

import pytest
from torch.distributed.tensor import DTensor

from scenarioclip_fast.distributed import World
from scenarioclip_fast.model import EMATeacher, ScenarioCLIP
from scenarioclip_fast.train import converters
from scenarioclip_fast.train.config import TrainConfig
from scenarioclip_fast.train.trainer import Trainer


def test_a_converter_changes_the_model_before_it_is_wrapped(
    small: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train_only_heads(
        model: ScenarioCLIP, teacher: EMATeacher | None, config: TrainConfig, world: World
    ) -> str | None:
        assert teacher is not None
        assert not any(isinstance(p, DTensor) for p in model.parameters())
        for name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad and "head" in name)
        return "only the heads are trained"

    monkeypatch.setitem(converters.CONVERTERS, "train_only_heads", train_only_heads)
    trainer = Trainer(small("train.steps=1"))
    trainer.fit()
    assert capsys.readouterr().err.count("only the heads are trained\n") == 1
    trained = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    heads = [p for name, p in trainer.model.named_parameters() if "head" in name]
    assert {id(p) for p in trained} == {id(p) for p in (*heads, *trainer.loss.parameters())}
