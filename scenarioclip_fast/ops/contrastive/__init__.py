"""Symmetric contrastive softmax over distinct texts, without an N x U matrix (kernels/contrastive/README.md).

api.py: the public functions. validate.py: argument checks. levels.py: the levels of a call and their coefficients.
ranks.py: levels whose rows are spread over ranks. plan.py: their sizes and ids ahead of a call. op.py: the custom ops.
"""

from __future__ import annotations

from scenarioclip_fast.ops.contrastive.api import (
    contrastive_loss,
    distributed_dot_product_loss,
    log_sums,
    multilevel_contrastive_loss,
)
from scenarioclip_fast.ops.contrastive.plan import ExchangePlan, plan_exchange
from scenarioclip_fast.ops.contrastive.validate import DUPLICATES

__all__ = [
    "DUPLICATES",
    "ExchangePlan",
    "contrastive_loss",
    "distributed_dot_product_loss",
    "log_sums",
    "multilevel_contrastive_loss",
    "plan_exchange",
]
