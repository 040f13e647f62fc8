"""High-throughput ScenarioCLIP: fused losses, rendered views, and the trainer.

Importing the package does not import torch: each name below is imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from scenarioclip_fast.lazy import attach

if TYPE_CHECKING:
    from scenarioclip_fast import data, env, eval, losses, model, ops, report, train
    from scenarioclip_fast.data.preprocess import preprocess
    from scenarioclip_fast.dispatch import BackendError, use_backend
    from scenarioclip_fast.errors import MissingDependencyError, UserError
    from scenarioclip_fast.model import ScenarioCLIP
    from scenarioclip_fast.train import TrainConfig, Trainer
    from scenarioclip_fast.workspace import use_workspace
else:
    __getattr__, __dir__ = attach(
        __name__,
        {
            "data.preprocess": ["preprocess"],
            "dispatch": ["BackendError", "use_backend"],
            "errors": ["MissingDependencyError", "UserError"],
            "model": ["ScenarioCLIP"],
            "train": ["TrainConfig", "Trainer"],
            "workspace": ["use_workspace"],
        },
        modules=["data", "env", "eval", "losses", "model", "ops", "report", "train"],
    )

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
    "preprocess",
    "report",
    "train",
    "use_backend",
    "use_workspace",
]
