"""The trainer: a typed config, the training loop, and checkpoints that resume exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scenarioclip_fast.lazy import attach

if TYPE_CHECKING:
    from scenarioclip_fast.train.config import TrainConfig
    from scenarioclip_fast.train.trainer import FitResult, Trainer
else:
    __getattr__, __dir__ = attach(__name__, {"config": ["TrainConfig"], "trainer": ["FitResult", "Trainer"]})

__all__ = ["FitResult", "TrainConfig", "Trainer"]
