"""FSDP2: shard trained weights, their gradients, optimizer state and averages over the ranks, for large towers.

A stage of an encoder (embedding, norm, block, head) is gathered when it runs and freed afterwards. Frozen weights are
replicated: without gradients, optimizer state or averages they take 4 bytes each, where a trained weight takes 16 to
20. The temperatures of the loss are scalars, which cannot be sharded: DDP averages their gradients.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from scenarioclip_fast.distributed import World
from scenarioclip_fast.model import EMATeacher
from scenarioclip_fast.train.step import StepModule


def shard(step: StepModule, teacher: EMATeacher | None, world: World) -> nn.Module:
    """Shard the trained weights of `step`, and their averages in `teacher`, in place, before building the optimizer.

    Gradients are averaged over the ranks, as the losses of this package expect.
    """
    mesh = init_device_mesh(world.device.type, (world.size,))
    with torch.no_grad():
        for p in step.parameters():
            dist.broadcast(p, 0, group=world.group)
    replicated = {p for p in step.parameters() if not p.requires_grad} | set(step.loss.parameters())
    step.loss = DistributedDataParallel(step.loss, gradient_as_bucket_view=True)
    encoders = list(step.model.encoders())
    if teacher is not None:  # under the same root, so that one stage is prefetched while another runs
        averaged = list(dict.fromkeys(teacher.encoders.values()))
        step.teacher = nn.ModuleList(averaged)
        encoders += averaged
    for encoder in encoders:
        for stage in encoder.stages:
            if any(p not in replicated for p in stage.parameters()):
                fully_shard(stage, mesh=mesh, reshard_after_forward=True, ignored_params=replicated)
    fully_shard(step, mesh=mesh, ignored_params=replicated)
    if teacher is not None:
        teacher.refresh()
    return step


def whole_tensor(t: Tensor) -> Tensor:
    """Return a tensor, gathered if it is sharded; all ranks call it together."""
    return t.full_tensor() if isinstance(t, DTensor) else t
