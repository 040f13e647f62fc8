"""Host memory for the images and the pixels of a batch, reused by later batches."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT = 256  # bytes; also that of CUDA's allocations
_KEPT = 2  # free slabs that are kept: one is filled while another is in use
_SPARE = 8  # new slabs are larger by this fraction of their size, so that larger batches fit too


def layout(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Place blocks of these sizes one after another; return their aligned offsets and the total size, in bytes."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


class SlabPool:
    """Lends slabs of CPU memory. A slab is reused once no tensor refers to it any more."""

    def __init__(self) -> None:
        self._free: list[NDArray[np.uint8]] = []
        self._kept = _KEPT

    def lend(self, size: int) -> Tensor:  # uint8 [size]
        """Return a slab, to be returned by dropping all tensors that share its memory."""
        memory = self._take(size)
        lease = memory[:size]  # referenced only by the tensor's storage
        weakref.finalize(lease, self._return, memory).atexit = False
        return torch.from_numpy(lease)

    def _take(self, size: int) -> NDArray[np.uint8]:
        if self._free and len(memory := self._free.pop()) >= size:
            return memory
        memory = np.empty(size + size // _SPARE + _ALIGNMENT, np.uint8)
        return memory[-memory.ctypes.data % _ALIGNMENT :]

    def _return(self, memory: NDArray[np.uint8]) -> None:
        if len(self._free) < self._kept:
            self._free.append(memory)

    def close(self) -> None:
        """Free the memory that is not lent, now, and the rest when it is returned."""
        self._kept = 0
        self._free.clear()


class PinnedSlabs:
    """Two slabs of pinned memory in turn, each copied to the device at once, and its event.

    Where memory cannot be pinned, the slabs are pageable.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._slabs: list[tuple[Tensor, torch.cuda.Event | None]] = [(torch.empty(0, dtype=torch.uint8), None)] * 2

    def lend(self, size: int) -> Tensor:  # uint8 [size]
        """Return the next slab, after its last copy has ended."""
        slab, copied = self._slabs.pop(0)
        if copied is not None:
            copied.synchronize()
        if len(slab) < size:
            slab = _pinned(size)
        self._slabs.append((slab, None))
        return slab[:size]

    def upload(self, slab: Tensor) -> Tensor:  # uint8 [size] -> [size] on the device
        """Copy the slab that was lent last to the device, asynchronously."""
        on_device = slab.to(self.device, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self.device))
        self._slabs[-1] = (self._slabs[-1][0], copied)
        return on_device


def _pinned(size: int) -> Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:  # the limit of locked memory
        return torch.empty(size, dtype=torch.uint8)
