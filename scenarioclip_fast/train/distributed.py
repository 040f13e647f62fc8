"""Who this process is among the ranks of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scenarioclip_fast.errors import UserError


@dataclass(frozen=True)
class World:
    """One rank's place and device. Both groups are None when the run is one process.

    group: for tensors on the device;  host: for what lies in host memory, and for use by other threads
    """

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None
    host: dist.ProcessGroup | None = None

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def mean_(self, values: Tensor) -> Tensor:
        """The mean over the ranks, in place."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
            values /= self.size
        return values

    def sum_(self, values: Tensor) -> Tensor:
        """The sum over the ranks, in place; `values` lies on the run's device."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable value, on every rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def barrier(self) -> None:
        if self.group is not None:
            dist.barrier(group=self.group)


@contextmanager
def join_world(device: str) -> Iterator[World]:
    """The world that torchrun's variables or an initialised process group describe, left again at the end."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    chosen = _device(device, local, several=size > 1)
    if size == 1:
        yield World(0, 1, chosen, None)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    ours = not dist.is_initialized()
    if ours:
        gpu = chosen.type == "cuda"
        dist.init_process_group("nccl" if gpu else "gloo", device_id=chosen if gpu else None)
    try:
        # A group of its own: the loss's collectives must not interleave with those of the gradients' buckets.
        yield World(dist.get_rank(), size, chosen, dist.new_group(), dist.new_group(backend="gloo"))
    finally:
        if ours:
            dist.destroy_process_group()


def _device(name: str, local: int, several: bool) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"run.device: got {name!r}, expected auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"run.device: got {name!r}, expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"run.device: got {name!r}, but torch sees no CUDA device; set run.device=cpu or auto")
        index = local if several else device.index or 0
        if index >= torch.cuda.device_count():
            raise UserError(f"run.device: wants GPU {index}, but torch sees {torch.cuda.device_count()} of them")
        device = torch.device("cuda", index)
    return device
