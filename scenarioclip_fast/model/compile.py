"""Compile transformer blocks, optionally with CUDA graphs for the vision blocks."""

from __future__ import annotations

from typing import Any

from torch import nn

from scenarioclip_fast.model.encoders import Block, VisionBlock, VisionEncoder


def compile_blocks(module: nn.Module, cuda_graphs: bool = False, **options: Any) -> None:
    """`torch.compile` every transformer block below `module` in place; the number of rows may change between calls.

    Args:
        cuda_graphs: replay the vision blocks as CUDA graphs. Views are then padded to a few batch sizes (see
            `VisionEncoder.bucketed`); call `torch.compiler.cudagraph_mark_step_begin()` before each step.
        options: passed to `torch.compile`.
    """
    import torch._dynamo.config as dynamo

    # Dynamo runs a block uncompiled beyond this number of versions. Versions differ in the autograd graph (none, full,
    # none for the input), the weights (trained, frozen, teacher's), the computed tokens (all, pooled) and the rows
    # (0, 1, more); a step with microbatches exceeds the default of 8.
    dynamo.recompile_limit = max(dynamo.recompile_limit, 64)
    for part in module.modules():
        if isinstance(part, VisionEncoder):
            part.bucketed = cuda_graphs
        if isinstance(part, Block):
            graphs = {"options": {"triton.cudagraphs": True}} if cuda_graphs and isinstance(part, VisionBlock) else {}
            part.compile(**{"dynamic": True, **graphs, **options})
