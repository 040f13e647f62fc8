"""The fused ops: plain functions with autograd, one file each. Backends are chosen in scenarioclip_fast.dispatch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scenarioclip_fast.ops.contrastive import contrastive_loss, multilevel_contrastive_loss
    from scenarioclip_fast.ops.distillation import distillation_loss
    from scenarioclip_fast.ops.ema import ema_update_
    from scenarioclip_fast.ops.views import focused_region, render_views

__all__ = [
    "contrastive_loss",
    "distillation_loss",
    "ema_update_",
    "focused_region",
    "multilevel_contrastive_loss",
    "render_views",
]

# Loaded when used, so that an import of the losses does not bring the views and their data types.
_HOME = {
    "contrastive_loss": "contrastive",
    "multilevel_contrastive_loss": "contrastive",
    "distillation_loss": "distillation",
    "ema_update_": "ema",
    "focused_region": "views",
    "render_views": "views",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
