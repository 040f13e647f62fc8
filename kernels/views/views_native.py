"""The compiled backends, C++ on a CPU and CUDA on a GPU; torch picks one by the device of the tensors.

Import only after the compiled libraries are loaded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def focused_region(
    image: Tensor,  # [H, W, 3] uint8
    subject_mask: Tensor,  # [H, W] bool, not empty
    object_mask: Tensor,  # [H, W] bool, not empty
    sigma: float,
    weights: Sequence[int],
    published: bool,
) -> Tensor:  # [H, W, 3] uint8
    """As in reference.py, for contiguous tensors."""
    region: Tensor = torch.ops.scenarioclip_fast_C.focused_region(
        image, subject_mask, object_mask, sigma, weights, published
    )
    return region


def render_views(
    images: Sequence[Tensor],  # [H_i, W_i, 3] uint8
    plan: Tensor,  # [V, 16] int32
    augment: Tensor,  # [V, 5] float32
    mask_runs: Tensor,  # [R] int32
    mask_start: Tensor,  # [M + 1] int64
    mean: Sequence[float],
    std: Sequence[float],
    sigma: float,
    weights: Sequence[int],
    published: bool,
    out: Tensor,  # [V, 3, S, S], contiguous in either memory format
) -> None:
    """As in reference.py, for contiguous tensors."""
    channels_last = not out.is_contiguous()
    torch.ops.scenarioclip_fast_C.render_views(
        images,
        plan,
        augment,
        mask_runs,
        mask_start,
        mean,
        std,
        sigma,
        weights,
        published,
        channels_last,
        out.permute(0, 2, 3, 1) if channels_last else out,
    )
