"""AdamW's parameter groups and the learning rate of a step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from scenarioclip_fast.train.config import OptimSection


def build_optimizer(model: nn.Module, loss: nn.Module, config: OptimSection) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters of `model` and `loss` (the temperatures).

    Weight decay reaches matrices only: biases, norms and the class embedding are vectors. The loss's logit_scale
    parameters are scalars; the published run decays them all the same (optim.decay_logit_scale).
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    scales = [p for p in loss.parameters() if p.requires_grad]
    decayed = [p for p in trainable if p.ndim >= 2]
    plain = [p for p in trainable if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
        # A group of their own: one fused update does not take whole tensors together with sharded ones (FSDP2).
        {"params": scales, "weight_decay": config.weight_decay if config.decay_logit_scale else 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )


def learning_rate(step: int, total: int, config: OptimSection) -> float:
    """The rate of step `step` (from 0) of `total`: linear from warmup_start * lr up to lr, then a cosine to 0."""
    warm = round(config.warmup * total)
    if step < warm:
        return config.lr * (config.warmup_start + (1 - config.warmup_start) * step / warm)
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def guarded_step(optimizer: torch.optim.AdamW, loss: Tensor, clip_norm: float) -> tuple[Tensor, Tensor]:
    """Clips the gradients to `clip_norm` and steps, unless `loss` or a gradient is not finite: then nothing moves.

    Both decisions are taken on the device, by the scale and the skip flag that fused optimisers take from a gradient
    scaler: the host does not wait, and the gradients are not rewritten in a pass of their own. Clears the gradients.

    Returns the gradients' norm before clipping and whether the step was skipped (bool), both 0-d on the device.
    """
    norm = _total_norm(_gradients(optimizer))
    skipped = ~(torch.isfinite(norm) & torch.isfinite(loss.detach()))
    optimizer.grad_scale = ((norm + 1e-6) / clip_norm).clamp(min=1.0)  # type: ignore[attr-defined]  # as clip_grad_norm_
    optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, skipped


def _total_norm(gradients: list[Tensor]) -> Tensor:
    """Of all of them together, over all ranks where they are sharded; [] on the device."""
    sharded = [g for g in gradients if isinstance(g, DTensor)]
    norm = torch.nn.utils.get_total_norm([g for g in gradients if not isinstance(g, DTensor)])
    if not sharded:
        return norm
    of_all = torch.nn.utils.get_total_norm(sharded)
    assert isinstance(of_all, DTensor)
    return torch.hypot(norm, of_all.full_tensor())


def _gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
