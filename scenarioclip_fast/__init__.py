"""High-throughput ScenarioCLIP: fused losses and views, and the trainer around them.

Importing the package imports nothing heavy, torch included: each name below is loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scenarioclip_fast import data, env, eval, losses, model, ops, train
    from scenarioclip_fast.dispatch import BackendError, use_backend
    from scenarioclip_fast.errors import MissingDependencyError, UserError
    from scenarioclip_fast.model import ScenarioCLIP
    from scenarioclip_fast.train import TrainConfig, Trainer

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "MissingDependencyError",
    "ScenarioCLIP",
    "TrainConfig",
    "Trainer",
    "UserError",
    "data",
    "env",
    "eval",
    "losses",
    "model",
    "ops",
    "train",
    "use_backend",
]

_HOME = {
    "BackendError": "dispatch",
    "use_backend": "dispatch",
    "MissingDependencyError": "errors",
    "UserError": "errors",
    "ScenarioCLIP": "model",
    "TrainConfig": "train",
    "Trainer": "train",
}
_MODULES = frozenset({"data", "env", "eval", "losses", "model", "ops", "train"})


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOME:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
