"""The model: CLIP encoders at three levels that share their frozen part, and the EMA teacher.

Names are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from scenarioclip_fast.lazy import attach

if TYPE_CHECKING:
    from scenarioclip_fast.model.config import FreezeConfig, ModelConfig, TextConfig, VisionConfig
    from scenarioclip_fast.model.encoders import TextEncoder, VisionEncoder
    from scenarioclip_fast.model.hugging_face import export_hf
    from scenarioclip_fast.model.scenarioclip import Embeddings, ScenarioCLIP
    from scenarioclip_fast.model.teacher import EMATeacher
    from scenarioclip_fast.model.tokens import TokenTable
else:
    __getattr__, __dir__ = attach(
        __name__,
        {
            "config": ["FreezeConfig", "ModelConfig", "TextConfig", "VisionConfig"],
            "encoders": ["TextEncoder", "VisionEncoder"],
            "hugging_face": ["export_hf"],
            "scenarioclip": ["Embeddings", "ScenarioCLIP"],
            "teacher": ["EMATeacher"],
            "tokens": ["TokenTable"],
        },
    )

__all__ = [
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
