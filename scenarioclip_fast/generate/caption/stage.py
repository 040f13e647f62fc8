"""Creates the stage `caption`: with a model on a server, or in this process."""

from __future__ import annotations

from typing import Any

from scenarioclip_fast.generate.caption.local import LocalCaptions
from scenarioclip_fast.generate.caption.server import ServerCaptions
from scenarioclip_fast.generate.config import GenerateConfig
from scenarioclip_fast.generate.stages import Stage


def make(config: GenerateConfig, device: str, context: Any = None) -> Stage:
    """Create the stage; nothing is loaded or connected to before it runs."""
    return ServerCaptions(config.caption) if config.caption.url else LocalCaptions(config.caption, device)
