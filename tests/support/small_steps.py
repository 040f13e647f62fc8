"""Small training steps in float64, for tests that compare gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scenarioclip_fast.data import Batch
from scenarioclip_fast.losses import ScenarioLoss
from scenarioclip_fast.model import EMATeacher, FreezeConfig, ModelConfig, ScenarioCLIP, TextConfig, VisionConfig
from scenarioclip_fast.train.step import StepModule

END = 30


class FixedVocabulary:
    """Twelve texts per level, of two to five tokens."""

    def tokens(self, level: str) -> list[list[int]]:
        return [[29, *range(1, 1 + i % 4), END] for i in range(12)]


def make_step(variant: str, freeze: FreezeConfig, duplicates: str, group: Any = None) -> StepModule:
    """Build a step in float64, so that only the 16th digit can differ."""
    torch.manual_seed(0)
    config = ModelConfig(
        variant=variant,  # type: ignore[arg-type]
        embed_dim=12,
        vision=VisionConfig(image_size=16, patch_size=8, width=24, layers=2, heads=3),
        text=TextConfig(context_length=8, vocab_size=END + 1, width=16, layers=2, heads=2),
        freeze=freeze,
    )
    model = ScenarioCLIP(config)
    model.set_vocabulary(FixedVocabulary())  # type: ignore[arg-type]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)  # so that levels differ
    loss = ScenarioLoss(duplicates=duplicates, distillation_scale=12.0, group=group)
    return StepModule(model, loss).double()


def make_teacher(step: StepModule) -> EMATeacher | None:
    if step.model.config.variant != "scenarioclip1":
        return None
    teacher = EMATeacher(step.model)
    with torch.no_grad():
        for p in step.model.parameters():
            if p.requires_grad:
                p.mul_(1.1)
    return teacher


def make_batch(objects: list[int], relations: list[int], without_action: tuple[int, ...] = (), seed: int = 1) -> Batch:
    """Make a batch; `objects` and `relations` are the numbers in each scene."""
    g = torch.Generator().manual_seed(seed)
    scene = torch.arange(len(objects))
    counts = (len(objects), sum(objects), sum(relations))
    pixels = torch.randn(sum(counts), 3, 16, 16, generator=g, dtype=torch.float64)
    action, *others = (torch.randint(12, (n,), generator=g) for n in counts)
    action[list(without_action)] = -1
    return Batch(
        pixels,
        [f"scene {i}" for i in range(len(objects))],
        scene.repeat_interleave(torch.tensor(objects)),
        scene.repeat_interleave(torch.tensor(relations)),
        action,
        *others,
    )


def gradients(step: StepModule) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in step.named_parameters() if p.grad is not None}
    step.zero_grad()
    return found
