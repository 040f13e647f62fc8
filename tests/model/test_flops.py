"""FLOP counts against manual counts and torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scenarioclip_fast.data import Batch
from scenarioclip_fast.model import EMATeacher, FreezeConfig, ModelConfig, ScenarioCLIP, TextConfig, VisionConfig
from scenarioclip_fast.model.flops import batch_flops, peak_flops, step_flops

END = 30
FREEZES = {
    "part": FreezeConfig(2, 1),
    "published": FreezeConfig(2, 1, pre_layernorm=False),
    "nothing": FreezeConfig.nothing(),
    "blocks only": FreezeConfig(1, 1, embeddings=False, pre_layernorm=False),
    "all vision blocks": FreezeConfig(3, 2),
}


def config(freeze: FreezeConfig, stem: str = "linear") -> ModelConfig:
    return ModelConfig(
        embed_dim=12,
        vision=VisionConfig(16, 8, 24, 3, 3, stem=stem),  # type: ignore[arg-type]
        text=TextConfig(8, END + 1, 16, 3, 2),
        freeze=freeze,
    )


def test_manual_count() -> None:
    """One view and one text of two tokens per level, one trained block of width 2 in each encoder."""
    small = ModelConfig(
        embed_dim=1,
        vision=VisionConfig(2, 2, 2, 1, 1),
        text=TextConfig(4, 4, 2, 1, 1),
        freeze=FreezeConfig(0, 0),
    )
    stem = 2 * 1 * 12 * 2  # one patch of 12 numbers, frozen
    keys_and_values, pooled_token, head = 2 * 2 * 2 * 4, 2 * 2 * (2 + 2 + 8 + 8), 2 * 2
    attention = 2 * 2 * 2 * 2  # two products, two keys, width 2
    tower = keys_and_values + pooled_token + head + attention
    logits = 2
    trained = 3 * (stem + 3 * (2 * tower + logits))
    assert step_flops(small, [1, 1, 1], [[2]] * 3, teacher=False) == trained
    # The teacher embeds the whole image, the object's text and the relation's.
    assert step_flops(small, [1, 1, 1], [[2]] * 3, teacher=True) == trained + 3 * tower
    assert step_flops(small, [0, 0, 0], [[], [], []], teacher=True) == 0


def test_manual_count_of_texts() -> None:
    """Texts of 2 and 3 tokens at one level: a cached block, a trained one and the last one."""
    some = ModelConfig(embed_dim=5, text=TextConfig(8, 31, 2, 3, 1), freeze=FreezeConfig(12, 1))
    whole = 5 * 24 * 2**2 + 4 * 2 * (1 + 2 + 1 + 2 + 3)  # causal attention
    last = 5 * 4 * 2**2 + 2 * 20 * 2**2 + 4 * 2 * (2 + 3)
    head = 2 * 2 * 2 * 5
    counted = step_flops(some, [0, 0, 0], [[], [2, 3], []], teacher=False)
    assert counted == 3 * (whole + last + head)
    assert step_flops(some, [0, 0, 0], [[], [2, 3], []], teacher=True) == 4 * (whole + last + head)


class OneTokenVocabulary:
    """Texts of one token, for which unfused attention computes no masked entries."""

    def tokens(self, level: str) -> list[list[int]]:
        return [[END]] * 4


@pytest.mark.parametrize("action", [0, -1])
@pytest.mark.parametrize("stem", ["linear", "conv"])
@pytest.mark.parametrize("freeze", FREEZES)
def test_counts_match_torchs_counter(freeze: str, stem: str, action: int) -> None:
    some = config(FREEZES[freeze], stem)
    model = ScenarioCLIP(some)
    teacher = EMATeacher(model)
    model.set_vocabulary(OneTokenVocabulary())  # type: ignore[arg-type]
    batch = Batch(
        pixels=torch.randn(7, 3, 16, 16),
        keys=["a", "b"],
        action_id=torch.tensor([2, action]),
        object_id=torch.tensor([0, 1, 1, 3]),
        relation_id=torch.tensor([1]),
        object_scene=torch.tensor([0, 0, 1, 1]),
        relation_scene=torch.tensor([1]),
    )
    model(batch)  # fills the cache of the texts' frozen features
    # torch counts only unfused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        e = model(batch, teacher=teacher)
        torch.stack([x.sum() for x in (*e.image, *e.text)]).sum().backward()
    logits = 6 * 12 * ((2 * 2 if action == 0 else 1 * 1) + 4 * 3 + 1 * 1)
    assert model.tokens is not None
    assert batch_flops(some, batch, model.tokens, teacher=True) - logits == counter.get_total_flops()


def test_peaks() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989.4e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "tf32") == 156e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") is None
    with pytest.raises(ValueError, match="precision: got 'fp8', expected one of bf16, tf32, float32"):
        peak_flops("NVIDIA H200", "fp8")
