"""Data sets of scenes from raw images: a vision-language model, a detector, a segmenter, and curation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scenarioclip_fast.lazy import attach

if TYPE_CHECKING:
    from scenarioclip_fast.generate.config import PUBLISHED, STAGES, GenerateConfig
    from scenarioclip_fast.generate.pipeline import GenerateReport, generate
    from scenarioclip_fast.generate.stages import Outcome, Stage, Work
else:
    __getattr__, __dir__ = attach(
        __name__,
        {
            "config": ["PUBLISHED", "STAGES", "GenerateConfig"],
            "pipeline": ["GenerateReport", "generate"],
            "stages": ["Outcome", "Stage", "Work"],
        },
    )

__all__ = ["PUBLISHED", "STAGES", "GenerateConfig", "GenerateReport", "Outcome", "Stage", "Work", "generate"]
