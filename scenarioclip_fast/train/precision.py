"""run.precision: TF32 and bf16 contexts; and the kernels of attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from scenarioclip_fast.model.config import VisionConfig

# The first that can run is used. Forward and backward for 1,280 views of 50 tokens on an H200: memory-efficient
# 0.78 ms, cuDNN, which builds a plan for each size, 1.15, FlashAttention 1.96.
_ATTENTION = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Use TF32 for float32 products with "tf32", full float32 otherwise; restore the previous settings on exit."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context of forward passes: bfloat16 autocast with "bf16"."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def attention_kernels() -> AbstractContextManager[Any]:
    """Prefer memory-efficient attention, then FlashAttention, then matrix products with a softmax."""
    return sdpa_kernel(_ATTENTION, set_priority=True)


def describe_attention(config: VisionConfig, precision: str, device: torch.device) -> str:
    """Name the attention that the vision blocks use within `attention_kernels`, for the log."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    q = torch.empty(1, config.heads, config.tokens, config.width // config.heads, dtype=dtype, device=device)
    with attention_kernels():
        chosen = SDPBackend(torch._fused_sdp_choice(q, q, q))
    return f"attention: {chosen.name.removesuffix('_ATTENTION').lower()}"
