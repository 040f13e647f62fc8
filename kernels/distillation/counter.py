"""A device counter that tells a block whether it is the last one of its kernel to finish."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def counter(device: torch.device) -> Tensor:  # [] int32
    """Return the counter of the current stream; it is 0 when a kernel begins, since each kernel resets it.

    One per stream, since kernels of one stream never overlap. A CUDA graph, which may be replayed on any stream, gets
    a counter of its own, which the graph sets to 0.
    """
    if device.type == "cpu":  # Triton's interpreter
        return torch.zeros((), dtype=torch.int32)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros((), dtype=torch.int32, device=device)
    return _of_stream(device, torch.cuda.current_stream(device).cuda_stream)


@functools.cache
def _of_stream(device: torch.device, stream: int) -> Tensor:
    # Allocated in another thread: while torch.compile warms up a CUDA graph, allocations of this thread must be freed
    # by the end of the warm-up.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_zero, device).result()


def _zero(device: torch.device) -> Tensor:
    zero = torch.zeros((), dtype=torch.int32, device=device)
    torch.cuda.current_stream(device).synchronize()
    return zero
