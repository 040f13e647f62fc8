"""Factories of the trainer's parts, in the order of their calls; the others are in `train.optim` and `converters`.

build_model -> build_loss -> build_teacher -> convert -> build_copies -> wrap -> build_optimizer
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from scenarioclip_fast.data import Vocabulary
from scenarioclip_fast.distributed import World
from scenarioclip_fast.losses import ScenarioLoss
from scenarioclip_fast.model import EMATeacher, ScenarioCLIP
from scenarioclip_fast.model.layers import WeightCopies
from scenarioclip_fast.train.config import LossSection, ModelSection, TrainConfig
from scenarioclip_fast.train.sharding import shard
from scenarioclip_fast.train.step import StepModule
from scenarioclip_fast.train.weights import load_initial_weights


def build_model(config: ModelSection, vocabulary: Vocabulary, device: torch.device) -> ScenarioCLIP:
    """Build the model with its initial weights, on `device`."""
    model = ScenarioCLIP(config.architecture)
    if config.init is not None:
        load_initial_weights(model, config.init)
    model.set_vocabulary(vocabulary)
    return model.to(device)


def build_loss(config: LossSection, world: World) -> ScenarioLoss:
    """Build the loss over all ranks. See docs/new-loss.md."""
    return ScenarioLoss(
        init_temperature=config.init_temperature,
        max_scale=config.max_scale,
        duplicates=config.duplicates,
        distillation_scale=config.distillation_scale,
        group=world.group,
    ).to(world.device)


def build_teacher(config: TrainConfig, model: ScenarioCLIP) -> EMATeacher | None:
    """Build the teacher, a copy of `model`; None for variants and losses without distillation."""
    if config.model.variant != "scenarioclip1" or config.loss.distillation_scale == 0:
        return None
    return EMATeacher(
        model,
        decay=config.loss.teacher_decay,
        warmup=config.loss.teacher_warmup,
        scope=config.loss.teacher_scope,
    )


def build_copies(
    model: ScenarioCLIP, teacher: EMATeacher | None, config: TrainConfig, world: World
) -> WeightCopies | None:
    """Keep the weights of products in bfloat16 with run.precision=bf16; with sharded weights, copies are per use."""
    sharded = world.size > 1 and config.train.parallel == "fsdp"
    if config.run.precision != "bf16" or sharded:
        return None
    return WeightCopies(model, [] if teacher is None else teacher.encoders.values(), torch.bfloat16)


def wrap(step: StepModule, teacher: EMATeacher | None, config: TrainConfig, world: World) -> nn.Module:
    """Wrap `step` for data parallelism as train.parallel sets; return it unchanged on a single rank."""
    if world.size == 1:
        return step
    if config.train.parallel == "fsdp":
        return shard(step, teacher, world)
    # The model's buffers are caches that each rank fills itself. The option's name depends on the torch version.
    parameters = inspect.signature(DistributedDataParallel).parameters
    sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
    options: dict[str, Any] = {"gradient_as_bucket_view": True, sync_buffers: False}
    return DistributedDataParallel(step, **options)
