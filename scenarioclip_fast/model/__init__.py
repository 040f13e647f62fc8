"""The model: CLIP encoders at three levels, their frozen part shared, and the EMA teacher.

Names load when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scenarioclip_fast.model.config import FreezeConfig, ModelConfig, TextConfig, VisionConfig
    from scenarioclip_fast.model.encoders import TextEncoder, VisionEncoder
    from scenarioclip_fast.model.scenarioclip import Embeddings, ScenarioCLIP
    from scenarioclip_fast.model.teacher import EMATeacher
    from scenarioclip_fast.model.tokens import LEVELS, TokenTable
    from scenarioclip_fast.model.weights import export_hf

__all__ = [
    "LEVELS",
    "EMATeacher",
    "Embeddings",
    "FreezeConfig",
    "ModelConfig",
    "ScenarioCLIP",
    "TextConfig",
    "TextEncoder",
    "TokenTable",
    "VisionConfig",
    "VisionEncoder",
    "export_hf",
]

_HOME = {
    "FreezeConfig": "config",
    "ModelConfig": "config",
    "TextConfig": "config",
    "VisionConfig": "config",
    "TextEncoder": "encoders",
    "VisionEncoder": "encoders",
    "LEVELS": "tokens",
    "Embeddings": "scenarioclip",
    "ScenarioCLIP": "scenarioclip",
    "EMATeacher": "teacher",
    "TokenTable": "tokens",
    "export_hf": "weights",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
