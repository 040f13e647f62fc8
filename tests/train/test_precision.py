from __future__ import annotations

import pytest
import torch

from scenarioclip_fast.model import ModelConfig
from scenarioclip_fast.train import precision
from scenarioclip_fast.train.precision import describe_attention

CPU = torch.device("cpu")


def test_the_attention_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig.preset("vit-b-32").vision
    assert describe_attention(config, "fp32", CPU) == "attention: torch's flash kernels"
    assert describe_attention(config, "bf16", CPU) == "attention: torch's flash kernels in float32"
    monkeypatch.setattr(precision, "attention_backend", lambda *_: "triton")
    assert describe_attention(config, "bf16", CPU) == "attention: short_attention, backend triton"
