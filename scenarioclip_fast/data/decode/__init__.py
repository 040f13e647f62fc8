"""Decode images to uint8 [H, W, 3] on a device; a bad image never affects the others."""

from __future__ import annotations

import torch

from scenarioclip_fast.data.config import MAX_PIXELS
from scenarioclip_fast.data.decode.base import (
    FORMATS,
    DecodeError,
    Decoder,
    Header,
    decode_checked,
    decode_with_pillow,
    pillow_to_rgb,
    probe,
)
from scenarioclip_fast.data.decode.torch_decoder import TorchDecoder
from scenarioclip_fast.errors import MissingDependencyError

__all__ = [
    "FORMATS",
    "MAX_PIXELS",
    "DecodeError",
    "Decoder",
    "Header",
    "TorchDecoder",
    "decode_checked",
    "decode_with_pillow",
    "make_decoder",
    "pillow_to_rgb",
    "probe",
]


def make_decoder(
    name: str = "auto",
    device: str | torch.device = "cpu",
    *,
    threads: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Decoder:
    """Create the decoder `name` for `device`.

    "auto" is DALI on a GPU if it is installed, and "torch" otherwise: on a CPU, DALI runs the same libjpeg-turbo and is
    no faster. "dali" and "torch" never fall back.

    Args:
        name: "auto", "dali" or "torch".
        device: where decoded images are placed.
        threads: CPU threads; None: one per core, at most 16.
        max_pixels: larger images are rejected, based on their header.

    Raises:
        MissingDependencyError: the package of the requested decoder is not installed.
        ValueError: unknown name.
    """
    device = torch.device(device)
    if name not in ("auto", "dali", "torch"):
        raise ValueError(f"decoder: got {name!r}, expected 'auto', 'dali' or 'torch'")
    if name == "dali" or (name == "auto" and device.type == "cuda"):
        from scenarioclip_fast.data.decode.dali_decoder import DaliDecoder

        try:
            return DaliDecoder(device, threads=threads, max_pixels=max_pixels)
        except MissingDependencyError:
            if name == "dali":
                raise
    return TorchDecoder(device, threads, max_pixels)
