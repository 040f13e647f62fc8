"""Counts the collectives and the matrix products of a rank, and the bytes that it sends over TCP."""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# c10d operator -> name and the argument with the tensors that the rank contributes. With gloo, torch.distributed.nn
# backpropagates through all_gather by one scatter per rank; with NCCL the same bytes are one reduce-scatter.
_COLLECTIVES = {
    "allreduce_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 1),
    "allgather_": ("all_gather", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "scatter_": ("scatter", 1),
    "broadcast_": ("broadcast", 0),
}
# Products of N x U logits: one in the forward pass; recomputed logits and two gradients in the backward pass.
_FORWARD, _BACKWARD = 1, 3
_TCP_INFO = 11
_BYTES_ACKNOWLEDGED = 120  # offset of tcpi_bytes_acked in Linux's struct tcp_info


class CallCounter(TorchDispatchMode):
    """Count the collectives of this process, DistributedDataParallel's included, and the operations of its products.

    calls, bytes: collective -> number of calls, and bytes that this rank contributes to them.
    operations: additions and multiplications of matrix products.

    Raises:
        NotImplementedError: a collective that is not listed in this module.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d" and name != "barrier":
            self._add(name, args)
        elif name.startswith("contrastive_"):
            images, texts = args[:2]
            products = _FORWARD if name == "contrastive_forward" else _BACKWARD
            self.operations += products * sum(
                2 * x.shape[1] * len(x) * len(y) for x, y in zip(images, texts, strict=True)
            )
        elif func._overloadpacket in flop_registry:
            self.operations += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out

    def _add(self, name: str, args: tuple[Any, ...]) -> None:
        if name not in _COLLECTIVES:
            raise NotImplementedError(f"collective c10d::{name}: expected one of {', '.join(_COLLECTIVES)}")
        kind, argument = _COLLECTIVES[name]
        tensors = [leaf for leaf in tree_leaves(args[argument]) if isinstance(leaf, Tensor)]
        if kind == "scatter":
            if not tensors:  # another rank's
                return
            kind = "reduce_scatter"
        self.calls[kind] += 1
        self.bytes[kind] += sum(t.numel() * t.element_size() for t in tensors)


def tcp_bytes_sent() -> int:
    """Return how many bytes the open TCP connections of this process have delivered (Linux); 0 elsewhere."""
    total = 0
    if not sys.platform.startswith("linux"):
        return total
    for name in os.listdir("/proc/self/fd"):
        try:
            copy = socket.socket(fileno=os.dup(int(name)))
        except OSError:  # closed meanwhile, or no socket
            continue
        with copy:
            if copy.family in (socket.AF_INET, socket.AF_INET6) and copy.type == socket.SOCK_STREAM:
                info = copy.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, 256)
                total += (
                    struct.unpack_from("=Q", info, _BYTES_ACKNOWLEDGED)[0]
                    if len(info) >= _BYTES_ACKNOWLEDGED + 8
                    else 0
                )
    return total
