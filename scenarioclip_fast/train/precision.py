"""run.precision: TF32 and bf16 contexts; and the kernels of attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from scenarioclip_fast.model.config import VisionConfig
from scenarioclip_fast.ops.attention import attention_backend, needs_float32

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
    """Name the attention of the vision blocks for the log: `short_attention`, or what torch chooses."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    qkv = torch.empty(config.tokens, 3 * config.width, dtype=dtype, device=device)
    if (backend := attention_backend(qkv, config.heads, config.tokens)) != "reference":
        return f"attention: short_attention, backend {backend}"
    rows = qkv.view(1, config.tokens, 3, config.heads, config.width // config.heads)
    in_float32 = needs_float32(rows)
    q = (rows.float() if in_float32 else rows)[:, :, 0].transpose(1, 2)
    with attention_kernels():
        chosen = SDPBackend(torch._fused_sdp_choice(q, q, q)).name.removesuffix("_ATTENTION").lower()
    return f"attention: torch's {chosen} kernels{' in float32' if in_float32 else ''}"
