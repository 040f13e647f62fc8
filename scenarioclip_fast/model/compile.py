"""Compile transformer blocks."""

from __future__ import annotations

from typing import Any

from torch import nn

from scenarioclip_fast.model.encoders import Block


def compile_blocks(module: nn.Module, **options: Any) -> None:
    """`torch.compile` every transformer block below `module` in place; the number of rows may change between calls.

    Args:
        options: passed to `torch.compile`.
    """
    import torch._dynamo.config as dynamo

    # Dynamo runs a block uncompiled beyond this number of versions. Versions differ in the autograd graph (none, full,
    # none for the input), the weights (trained, frozen, teacher's), the computed tokens (all, pooled) and the rows
    # (0, 1, more); a step with microbatches exceeds the default of 8.
    dynamo.recompile_limit = max(dynamo.recompile_limit, 64)
    for part in module.modules():
        if isinstance(part, Block):
            part.compile(**{"dynamic": True, **options})
