"""Optimizers by name, their parameter groups, the learning rate, and the guarded optimizer step.

To add an optimizer, see docs/new-optimiser.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.suggest import nearest
from scenarioclip_fast.train.config import OptimSection

ParamGroup = dict[str, Any]  # "params", "weight_decay", and "lr_multiple", a factor of the scheduled rate
OptimizerFactory = Callable[[list[ParamGroup], OptimSection], Optimizer]


def adamw(groups: list[ParamGroup], config: OptimSection) -> Optimizer:
    """Build a fused AdamW."""
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def sgd(groups: list[ParamGroup], config: OptimSection) -> Optimizer:
    """Build SGD with Nesterov momentum optim.betas[0]; weight decay is added to the gradient (L2)."""
    momentum = config.betas[0]
    parameters = [p for group in groups for p in group["params"]]
    fused = not any(isinstance(p, DTensor) for p in parameters)  # unsupported by the fused kernel
    optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=momentum, nesterov=momentum > 0, fused=fused)
    if momentum > 0:  # torch's fused step leaves new buffers uninitialised if `found_inf` skips it
        for p in parameters:
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
    return optimizer


OPTIMIZERS: dict[str, OptimizerFactory] = {"adamw": adamw, "sgd": sgd}


@dataclass(frozen=True)
class GroupRule:
    """Learning rate and weight decay of some parameters; the first rule that matches a parameter applies.

    pattern: a regular expression for the full name, such as "model.vision.global.blocks.0.norm.weight" or
        "loss.contrastive.logit_scale.object";  min_dims: minimum number of dimensions
    """

    pattern: str
    weight_decay: float
    min_dims: int = 0
    lr_multiple: float = 1.0

    def matches(self, name: str, parameter: Tensor) -> bool:
        return parameter.ndim >= self.min_dims and re.fullmatch(self.pattern, name) is not None


def group_rules(config: OptimSection) -> list[GroupRule]:
    """Apply weight decay to matrices only: biases, norms and the class embedding are vectors.

    The loss's temperatures are scalars, but the published run decays them too (optim.decay_logit_scale). They form a
    separate group also because one fused update cannot mix sharded and unsharded tensors (FSDP2).
    """
    return [
        GroupRule(r"model\..*", config.weight_decay, min_dims=2),
        GroupRule(r"model\..*", 0.0),
        GroupRule(r"loss\..*", config.weight_decay if config.decay_logit_scale else 0.0),
    ]


def trained_parameters(model: nn.Module, loss: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters that the optimizer updates, their names prefixed with "model." or "loss."."""
    modules = (("model", model), ("loss", loss))
    return [(f"{part}.{name}", p) for part, m in modules for name, p in m.named_parameters() if p.requires_grad]


def parameter_groups(parameters: Iterable[tuple[str, Tensor]], rules: list[GroupRule]) -> list[ParamGroup]:
    """Return one group per rule that matches a parameter, in the order of the rules."""
    groups: list[ParamGroup] = [
        {"params": [], "weight_decay": rule.weight_decay, "lr_multiple": rule.lr_multiple} for rule in rules
    ]
    for name, parameter in parameters:
        group = next(g for g, rule in zip(groups, rules, strict=True) if rule.matches(name, parameter))
        group["params"].append(parameter)
    return [group for group in groups if group["params"]]


def optimizer_factory(name: str) -> OptimizerFactory:
    """Return the entry of OPTIMIZERS; raise UserError for an unknown name."""
    if name not in OPTIMIZERS:
        near = nearest(name.lower(), OPTIMIZERS)
        hint = f"did you mean {near}? " if near else ""
        raise UserError(f"optim.name: got {name!r}, {hint}expected one of {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name]


def build_optimizer(model: nn.Module, loss: nn.Module, config: OptimSection) -> Optimizer:
    """Build the optimizer `config.name` over the trainable parameters of `model` and `loss` (the temperatures)."""
    groups = parameter_groups(trained_parameters(model, loss), group_rules(config))
    return optimizer_factory(config.name)(groups, config)


def learning_rate(step: int, total: int, config: OptimSection) -> float:
    """Return the rate of step `step` (from 0) of `total`: linear from warmup_start * lr to lr, then cosine to 0."""
    warmup = round(config.warmup * total)
    if step < warmup:
        return config.lr * (config.warmup_start + (1 - config.warmup_start) * step / warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Set each group's learning rate to `rate` times its "lr_multiple"."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_multiple"]


def guarded_step(optimizer: Optimizer, loss: Tensor, clip_norm: float) -> tuple[Tensor, Tensor]:
    """Clip the gradients to `clip_norm` and step, unless `loss` or a gradient is not finite; then nothing changes.

    Both decisions are made on the device, without host synchronisation. Fused optimizers receive them as the scale and
    skip flag of a gradient scaler, which avoids a separate pass over the gradients. Clears the gradients.

    Returns:
        The gradient norm before clipping, and whether the step was skipped (bool), both [] on the device.
    """
    norm = _total_norm(_gradients(optimizer))
    both = norm + loss.detach()
    skipped = (both - both) != 0  # not 0 for infinity and NaN; isfinite would be four launches for each
    scale = ((norm + 1e-6) / clip_norm).clamp(min=1.0)  # as in clip_grad_norm_
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale = scale  # type: ignore[attr-defined]
        optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
        optimizer.step()
    else:
        _step_unless(skipped, optimizer, scale)
    optimizer.zero_grad(set_to_none=True)
    return norm, skipped


@torch.no_grad()
def _step_unless(skipped: Tensor, optimizer: Optimizer, scale: Tensor) -> None:
    """For optimizers without the fused flag: step, then undo it if `skipped`, from copies of weights and state.

    State that the optimizer creates in a skipped step is that of a step with zero gradients. Counters in host memory
    include skipped steps: the flag is on the device, and reading it would synchronise.
    """
    for gradient in map(_local, _gradients(optimizer)):
        gradient.copy_(torch.where(skipped, 0.0, gradient / scale))
    changing = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    changing += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    before = [(t, t.clone()) for t in map(_local, changing) if t.device == skipped.device]
    optimizer.step()
    for t, old in before:
        t.copy_(torch.where(skipped, old, t))


def _local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def _total_norm(gradients: list[Tensor]) -> Tensor:
    """Return the norm of all gradients, reduced over the ranks if sharded; [] on the device."""
    sharded = [g for g in gradients if isinstance(g, DTensor)]
    norm = torch.nn.utils.get_total_norm([g for g in gradients if not isinstance(g, DTensor)])
    if not sharded:
        return norm
    sharded_norm = torch.nn.utils.get_total_norm(sharded)
    assert isinstance(sharded_norm, DTensor)
    return torch.hypot(norm, sharded_norm.full_tensor())


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
