"""Devices: names, and copies from the host."""

from __future__ import annotations

import torch
from torch import Tensor

from scenarioclip_fast.errors import UserError


def pick_device(name: str | torch.device, setting: str = "device") -> torch.device:
    """Return the device called `name`; "auto" is a GPU if there is one, otherwise the CPU.

    Args:
        name: auto, cpu, cuda, cuda:N, or a torch device of type cpu or cuda.
        setting: what the error calls the setting.

    Raises:
        UserError: no such device.
    """
    shown = repr(str(name))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"{setting}: got {shown}, expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"{setting}: got {shown}, but torch sees no CUDA device; use cpu or auto")
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"{setting}: got {shown}, but torch sees {torch.cuda.device_count()} GPUs")
    return device


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy from the host without synchronising."""
    if x.device == device or device.type != "cuda":
        return x.to(device)
    return (x if x.is_cuda else x.pin_memory()).to(device, non_blocking=True)
