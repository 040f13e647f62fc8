"""Creates the stages; a stage is imported when it is first used."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from scenarioclip_fast.generate.config import GIVEN, GenerateConfig
from scenarioclip_fast.generate.given import GivenBoxes, GivenCaptions
from scenarioclip_fast.generate.stages import Stage


def _module(name: str) -> Any:
    return importlib.import_module(f"scenarioclip_fast.generate.{name}.stage")


def _is_given(name: str, config: GenerateConfig) -> bool:
    return name in ("caption", "ground") and getattr(config, name).model == GIVEN


def needs_context(name: str, config: GenerateConfig) -> bool:
    """Whether a stage starts only when the stages before have finished all units."""
    return not _is_given(name, config) and hasattr(_module(name), "prepare")


def prepare_context(name: str, config: GenerateConfig, directory: Path) -> Any:
    """What a stage needs to know of the records of all units before: JSON, on which its results depend; or None."""
    return _module(name).prepare(config, directory) if needs_context(name, config) else None


def check_stage(name: str, config: GenerateConfig) -> None:
    """Check that the model of a stage exists and is of a known kind, as far as that is known without loading it.

    Raises:
        UserError: it does not exist, or is of another kind.
        MissingDependencyError: the package that loads it is not installed.
    """
    if not _is_given(name, config) and hasattr(module := _module(name), "check"):
        module.check(config)


def make_stage(name: str, config: GenerateConfig, device: str, context: Any = None) -> Stage:
    """Create a stage.

    Args:
        name: one of config.STAGES but "pack".
        device: auto, cpu, cuda or cuda:N.
        context: of `prepare_context`.
    """
    if _is_given(name, config):
        return GivenCaptions() if name == "caption" else GivenBoxes()
    stage: Stage = _module(name).make(config, device, context)
    return stage
