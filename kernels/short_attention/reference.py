"""Self-attention over many short sequences in plain PyTorch: the reference for the other backends."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _heads_of(*rows: Tensor) -> list[Tensor]:  # [n, L, parts, heads, width] each
    """All parts: [n, heads, L, width] each.

    Unbind, then transpose: the backward pass of unbinding a permuted tensor would need one more copy, that of unbinding
    a single part one as well.
    """
    parts = [part for x in rows for part in (x.unbind(2) if x.shape[2] > 1 else (x.squeeze(2),))]
    return [part.transpose(1, 2) for part in parts]


def attention(*rows: Tensor, **options: Any) -> Tensor:  # [n, heads, L, width]
    """torch's attention; on a CPU in at least float32, where its kernels for bfloat16 take 2 to 8 times as long.

    Args:
        rows: [n, L, parts, heads, width] each, together queries, keys and values.
        options: of `F.scaled_dot_product_attention`.
    """
    if not needs_float32(rows[0]):
        q, k, v = _heads_of(*rows)
        return F.scaled_dot_product_attention(q, k, v, **options)
    with torch.autocast("cpu", enabled=False):  # which would cast to bfloat16 again
        q, k, v = _heads_of(*(x.float() for x in rows))  # cast before splitting, while they are contiguous
        return F.scaled_dot_product_attention(q, k, v, **options).to(rows[0].dtype)


def needs_float32(rows: Tensor) -> bool:
    """Whether torch's kernels for the dtype are slow: on a CPU, those for bfloat16 and float16."""
    return rows.device.type == "cpu" and rows.dtype in (torch.bfloat16, torch.float16)


def short_attention(
    qkv: Tensor,  # [T, 3 W]
    heads: int,
    longest: int,
    starts: Tensor | None,  # [n + 1]
    causal: bool,
) -> Tensor:  # [T, W]
    """torch's attention over sequences of `longest` tokens, or with `starts` over padded ones; differentiable."""
    total, width = qkv.shape[0], qkv.shape[1] // 3
    if not total:
        return qkv[:, :width]
    if starts is None:
        y = attention(qkv.reshape(total // longest, longest, 3, heads, width // heads), is_causal=causal)
        return y.transpose(1, 2).reshape(total, width)
    slot = _slot(starts, longest, total)
    rows = _padded(qkv, starts, longest, slot).unflatten(2, (3, heads, width // heads))
    y = attention(rows, attn_mask=_seen(qkv, longest, starts, causal))
    return y.transpose(1, 2).reshape(-1, width).index_select(0, slot)


def forward(
    qkv: Tensor,  # [T, 3 W]
    heads: int,
    longest: int,
    starts: Tensor | None,  # [n + 1]
    causal: bool,
) -> Tensor:  # [T, W]
    y = short_attention(qkv, heads, longest, starts, causal)
    return y if len(qkv) else y.clone()


def backward(
    grad: Tensor,  # [T, W]
    qkv: Tensor,  # [T, 3 W]
    heads: int,
    longest: int,
    starts: Tensor | None,  # [n + 1]
    causal: bool,
) -> Tensor:  # [T, 3 W]
    """The gradient of qkv, in its dtype, computed in at least float32."""
    total, width = grad.shape
    if not total:
        return torch.empty_like(qkv)
    wide = torch.promote_types(qkv.dtype, torch.float32)
    rows = torch.cat([qkv, grad.to(qkv.dtype)], 1).to(wide)
    slot = None if starts is None else _slot(starts, longest, total)
    padded = rows.view(-1, longest, 4 * width) if starts is None else _padded(rows, starts, longest, slot)
    q, k, v, dy = _heads_of(padded.unflatten(2, (4, heads, width // heads)))
    scale = (width // heads) ** -0.5
    p = (scale * q @ k.mT).masked_fill(~_seen(qkv, longest, starts, causal), -torch.inf).softmax(-1)
    dp = dy @ v.mT
    ds = scale * p * (dp - (p * dp).sum(-1, keepdim=True))
    parts = torch.stack([ds @ k, ds.mT @ q, p.mT @ dy], 3)  # [n, heads, L, 3, width]
    gradients = parts.permute(0, 2, 3, 1, 4).reshape(-1, 3 * width).to(qkv.dtype)
    return gradients if slot is None else gradients.index_select(0, slot)


def _slot(starts: Tensor, longest: int, total: int) -> Tensor:
    """The cell of each row in a grid of sequences padded to `longest`: [T]."""
    n = starts.shape[0] - 1
    of_row = torch.repeat_interleave(torch.arange(n, device=starts.device), starts.diff(), output_size=total)
    return torch.arange(total, device=starts.device) - starts[of_row] + of_row * longest


def _padded(rows: Tensor, starts: Tensor, longest: int, slot: Tensor | None) -> Tensor:  # [T, C]
    """The rows in that grid, padded with zeros: [n, longest, C]."""
    assert slot is not None
    n = starts.shape[0] - 1
    return rows.new_zeros(n * longest, rows.shape[1]).index_copy(0, slot, rows).view(n, longest, rows.shape[1])


def _seen(qkv: Tensor, longest: int, starts: Tensor | None, causal: bool) -> Tensor:
    """Whether a query sees a key: [n or 1, 1, longest, longest]. The first key is always seen, against NaN."""
    key = torch.arange(longest, device=qkv.device)
    seen = key <= key[:, None] if causal else key.new_ones(longest, longest, dtype=torch.bool)
    if starts is None:
        return seen[None, None]
    return (seen & (key < starts.diff()[:, None].clamp_min(1))[:, None])[:, None]
