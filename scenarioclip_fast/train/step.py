"""All forward passes of a training step as one module: DDP and FSDP hook `forward`, so each pass must call it."""

from __future__ import annotations

from enum import Enum, auto
from typing import Any

from torch import Tensor, nn

from scenarioclip_fast.data import Batch
from scenarioclip_fast.losses import ScenarioLoss
from scenarioclip_fast.model import EMATeacher, ScenarioCLIP
from scenarioclip_fast.model.scenarioclip import Embeddings, TrunkOutput
from scenarioclip_fast.model.tokens import UniqueTexts


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
