"""The package matches the benchmarks' baseline, an independent implementation, in loss and all gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scenarioclip_fast.benchmarks.baseline import LEVELS, BaselineStep

from scenarioclip_fast.data import Batch
from scenarioclip_fast.losses import ScenarioLoss
from scenarioclip_fast.model import EMATeacher, FreezeConfig, ModelConfig, ScenarioCLIP, TextConfig, VisionConfig

END = 30
TOKENS = {
    "global": [[29, 3, END], [29, 4, 5, 6, END]],
    "object": [[29, 3, END], [29, 1, 2, END], [29, *range(10, 22), END]],  # the last is truncated to the context of 8
    "relation": [[29, 9, 2, 3, 4, END], [29, 5, END]],
}


class SmallVocabulary:
    def tokens(self, level: str) -> list[list[int]]:
        return TOKENS[level]


def small_batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(
        torch.randn(13, 3, 16, 16, generator=generator, dtype=torch.float64),
        ["a", "b", "c"],
        torch.tensor([0, 0, 0, 1, 2, 2]),
        torch.tensor([0, 0, 0, 2]),  # scene "b" has no relation
        torch.tensor([0, 1, 0]),
        torch.tensor([2, 0, 0, 1, 0, 2]),
        torch.tensor([0, 0, 1, 0]),
    )


def gradients(module: Any) -> dict[str, torch.Tensor]:
    """Return gradients by this package's names, with query, key and value concatenated."""
    found: dict[str, torch.Tensor] = {}
    for name, p in module.named_parameters():
        if not p.requires_grad:
            continue
        kind, level, rest = name.replace("embedding.", "").split(".", 2)
        for q in "qkv":
            rest = rest.replace(f"attention.{q}.", "attention.qkv.")
        key = f"{kind}.{level}.{rest}"
        flat = p.grad.flatten()
        found[key] = torch.cat([found[key], flat]) if key in found else flat
    return found


@pytest.mark.parametrize("stem", ["linear", "conv"])
def test_loss_and_every_gradient(stem: str) -> None:
    config = ModelConfig(
        embed_dim=12,
        vision=VisionConfig(16, 8, 24, 3, 3, stem=stem),  # type: ignore[arg-type]
        text=TextConfig(8, END + 1, 16, 3, 2),
        freeze=FreezeConfig(2, 1, pre_layernorm=False) if stem == "linear" else FreezeConfig.nothing(),
    )
    torch.manual_seed(0)
    model = ScenarioCLIP(config).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    baseline = BaselineStep(config, model, TOKENS, "cpu")
    for module in (baseline.model, baseline.teacher):
        module.double()
    baseline.model.copy_weights_of(model)
    baseline.teacher.load_state_dict(baseline.model.state_dict())
    for scale in baseline.logit_scale.values():
        scale.data = scale.data.double()
    model.set_vocabulary(SmallVocabulary())  # type: ignore[arg-type]
    teacher, loss = EMATeacher(model), ScenarioLoss().double()
    batch = small_batch()
    with torch.no_grad():  # so that the teacher differs from the student
        for p in teacher.state_dict()["tensors"].values():
            p.mul_(1.1)
        for name, p in baseline.model.named_parameters():
            if p.requires_grad:
                baseline.teacher.get_parameter(name).mul_(1.1)
    actual = loss(model(batch, teacher=teacher))["loss"]
    actual.backward()
    expected = baseline.loss(batch)
    expected.backward()
    # Float64 with a different order of summation.
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)
    got, expected_gradients = gradients(model), gradients(baseline.model)
    assert got.keys() == expected_gradients.keys()
    scale = max(g.abs().max() for g in expected_gradients.values())
    for name, g in expected_gradients.items():
        torch.testing.assert_close(got[name], g, rtol=1e-7, atol=1e-10 * scale.item(), msg=name)
    for level in LEVELS:
        got_scale = loss.contrastive.logit_scale[level].grad
        torch.testing.assert_close(got_scale, baseline.logit_scale[level].grad, rtol=1e-7, atol=1e-12)


def test_the_baseline_refuses_scenes_without_an_action() -> None:
    """As an index, -1 would be the last action."""
    config = ModelConfig(
        embed_dim=12,
        vision=VisionConfig(16, 8, 24, 1, 3),
        text=TextConfig(8, END + 1, 16, 1, 2),
        freeze=FreezeConfig.nothing(),
    )
    baseline = BaselineStep(config, ScenarioCLIP(config), TOKENS, "cpu")
    full = small_batch()
    batch = Batch(full.pixels.float(), full.keys, *full.tensors[1:3], torch.tensor([0, -1, 0]), *full.tensors[4:])
    with pytest.raises(ValueError, match="got scenes without an action"):
        baseline.loss(batch)
