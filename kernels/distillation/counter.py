"""A counter on the device with which the block that finishes last knows that it is the last."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def counter(device: torch.device) -> Tensor:  # [] int32
    """0 whenever a kernel of the current stream begins, given that each kernel leaves it at 0 again.

    Each stream has its own, since kernels of one stream never overlap. A CUDA graph, which may be replayed on any
    stream, gets one that the graph itself sets to 0.
    """
    if device.type == "cpu":  # Triton's interpreter
        return torch.zeros((), dtype=torch.int32)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros((), dtype=torch.int32, device=device)
    return _of_stream(device, torch.cuda.current_stream(device).cuda_stream)


@functools.cache
def _of_stream(device: torch.device, stream: int) -> Tensor:
    # Another thread allocates it: what this one allocates while torch.compile warms up a CUDA graph has to be gone at
    # the end of that.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_zero, device).result()


def _zero(device: torch.device) -> Tensor:
    zero = torch.zeros((), dtype=torch.int32, device=device)
    torch.cuda.current_stream(device).synchronize()
    return zero
