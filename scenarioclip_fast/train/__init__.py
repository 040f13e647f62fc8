"""The trainer: a typed config, one readable step, and checkpoints that resume exactly."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scenarioclip_fast.train.config import TrainConfig
    from scenarioclip_fast.train.trainer import FitResult, Trainer

_HOMES = {"FitResult": "trainer", "TrainConfig": "config", "Trainer": "trainer"}

__all__ = ["FitResult", "TrainConfig", "Trainer"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
