"""Creates the stages; a stage is imported when it is first used."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from scenarioclip_fast.generate.config import GIVEN, GenerateConfig
from scenarioclip_fast.generate.given import GivenBoxes, GivenCaptions
from scenarioclip_fast.generate.stages import Stage


def prepare_context(name: str, config: GenerateConfig, directory: Path) -> Any:
    """What a stage needs to know of the records of all units before: JSON, on which its results depend; or None."""
    module = importlib.import_module(f"scenarioclip_fast.generate.{name}.stage")
    return module.prepare(config, directory) if hasattr(module, "prepare") else None


def make_stage(name: str, config: GenerateConfig, device: str, context: Any = None) -> Stage:
    """Create a stage.

    Args:
        name: one of config.STAGES but "pack".
        device: auto, cpu, cuda or cuda:N.
        context: of `prepare_context`.
    """
    if name == "caption" and config.caption.model == GIVEN:
        return GivenCaptions()
    if name == "ground" and config.ground.model == GIVEN:
        return GivenBoxes()
    module = importlib.import_module(f"scenarioclip_fast.generate.{name}.stage")
    stage: Stage = module.make(config, device, context)
    return stage
