"""All forward passes of a training step as one module: DDP and FSDP hook `forward`, so each pass must call it."""

from __future__ import annotations

from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor, nn

from scenarioclip_fast.data import Batch
from scenarioclip_fast.losses import ScenarioLoss
from scenarioclip_fast.model import EMATeacher, ScenarioCLIP
from scenarioclip_fast.model.scenarioclip import Embeddings, TrunkOutput
from scenarioclip_fast.model.tokens import UniqueTexts
from scenarioclip_fast.ops.contrastive import ExchangePlan

IDS_PER_SCENE = 16  # a scene's texts, most of them shared with others, rarely are more


def plan_texts(loss: ScenarioLoss, texts: UniqueTexts, scenes: int, width: int, precision: str) -> ExchangePlan | None:
    """Start to exchange the texts' ids between ranks, before the encoders are launched; None if the loss cannot.

    The host is ahead of the device then: the exchange has the time of the rest of the last step and of the forward
    pass. A batch earlier, the loader would be ahead of the checkpoints.

    scenes: of a full batch of one rank, the same number on all ranks
    """
    plan = getattr(loss.contrastive, "plan", None)
    if plan is None:
        return None
    found: ExchangePlan | None = plan(
        texts.id,
        [len(index) for index in texts.index],
        width=width,
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        capacity=IDS_PER_SCENE * scenes,
    )
    return found


class Phase(Enum):
    """What a call of `StepModule` runs; the comments give its inputs and outputs."""

    LOSS = auto()  # (batch, texts, teacher) -> the terms of the loss
    EMBED = auto()  # (batch, texts, teacher) -> (trunk output, embeddings)
    EMBED_AGAIN = auto()  # (trunk output) -> image and text embeddings, to backpropagate cached gradients


class StepModule(nn.Module):
    """Model and loss as one module."""

    def __init__(self, model: ScenarioCLIP, loss: ScenarioLoss) -> None:
        super().__init__()
        self.model = model
        self.loss: nn.Module = loss

    def forward(self, phase: Phase, *inputs: Any) -> Any:
        if phase is Phase.LOSS:
            return self._loss(*inputs)
        if phase is Phase.EMBED:
            return self._embed(*inputs)
        return self._embed_again(*inputs)

    def _loss(self, batch: Batch, texts: UniqueTexts, teacher: EMATeacher | None) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = self.loss(self.model(batch, teacher, texts))
        return terms

    def _embed(self, batch: Batch, texts: UniqueTexts, teacher: EMATeacher | None) -> tuple[TrunkOutput, Embeddings]:
        trunk = self.model.run_trunk(batch, texts)
        return trunk, self.model.run_levels(trunk, teacher)

    def _embed_again(self, trunk: TrunkOutput) -> list[Tensor]:
        embeddings = self.model.run_levels(trunk)
        return [*embeddings.image, *embeddings.text]
