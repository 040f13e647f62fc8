"""The fused ops: plain functions with autograd. scenarioclip_fast.dispatch chooses their backends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scenarioclip_fast.lazy import attach
from scenarioclip_fast.requirements import check_installed

check_installed()  # every use of scenarioclip_fast.kernels imports this package first

if TYPE_CHECKING:
    from scenarioclip_fast.ops.activation import quick_gelu
    from scenarioclip_fast.ops.attention import short_attention
    from scenarioclip_fast.ops.contrastive import contrastive_loss, multilevel_contrastive_loss, plan_exchange
    from scenarioclip_fast.ops.distillation import distillation_loss
    from scenarioclip_fast.ops.ema import ema_update_
    from scenarioclip_fast.ops.normalisation import add_layer_norm, layer_norm
    from scenarioclip_fast.ops.views import focused_region, render_views
else:
    # Lazy, so that importing the losses does not import the views.
    __getattr__, __dir__ = attach(
        __name__,
        {
            "activation": ["quick_gelu"],
            "attention": ["short_attention"],
            "contrastive": ["contrastive_loss", "multilevel_contrastive_loss", "plan_exchange"],
            "distillation": ["distillation_loss"],
            "ema": ["ema_update_"],
            "normalisation": ["add_layer_norm", "layer_norm"],
            "views": ["focused_region", "render_views"],
        },
    )

__all__ = [
    "add_layer_norm",
    "contrastive_loss",
    "distillation_loss",
    "ema_update_",
    "focused_region",
    "layer_norm",
    "multilevel_contrastive_loss",
    "plan_exchange",
    "quick_gelu",
    "render_views",
    "short_attention",
]
