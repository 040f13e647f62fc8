"""Creates the stage `caption`: with a model on a server, or in this process."""

from __future__ import annotations

from typing import Any

from scenarioclip_fast.generate.caption.local import LocalCaptions, check_model
from scenarioclip_fast.generate.caption.server import ServerCaptions, check_server
from scenarioclip_fast.generate.config import GenerateConfig
from scenarioclip_fast.generate.stages import Stage


def check(config: GenerateConfig) -> None:
    """Check that the server has the model, or that the checkpoint exists; see `factory`."""
    check_server(config.caption) if config.caption.url else check_model(config.caption)


def make(config: GenerateConfig, device: str, context: Any = None) -> Stage:
    """Create the stage; nothing is loaded or connected to before it runs."""
    return ServerCaptions(config.caption) if config.caption.url else LocalCaptions(config.caption, device)
