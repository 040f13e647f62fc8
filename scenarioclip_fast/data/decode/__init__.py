"""Decode images to uint8 [H, W, 3] on a device; a bad image never affects the others."""

from __future__ import annotations

from typing import Any, get_args

import torch

from scenarioclip_fast.data.config import MAX_PIXELS, DecoderName
from scenarioclip_fast.data.decode.base import (
    FORMATS,
    DecodeError,
    Decoder,
    Header,
    decode_checked,
    decode_with_pillow,
    pillow_to_rgb,
    probe,
    thread_count,
)
from scenarioclip_fast.data.decode.dali_decoder import DaliDecoder
from scenarioclip_fast.data.decode.nvimgcodec_decoder import NvimgcodecDecoder
from scenarioclip_fast.data.decode.run_decoder import RunDecoder, first_line
from scenarioclip_fast.data.decode.torch_decoder import TorchDecoder
from scenarioclip_fast.data.decode.torchvision_decoder import TorchvisionDecoder
from scenarioclip_fast.errors import MissingDependencyError, UserError

__all__ = [
    "DECODERS",
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


# In the order in which "auto" tries them on a GPU.
DECODERS: dict[str, type[RunDecoder] | type[TorchDecoder]] = {
    decoder.name: decoder for decoder in (DaliDecoder, NvimgcodecDecoder, TorchvisionDecoder, TorchDecoder)
}


def make_decoder(
    name: str = "auto",
    device: str | torch.device = "cpu",
    *,
    threads: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Decoder:
    """Create the decoder `name` for `device`.

    "auto" is "torch" on a CPU, where the others run libjpeg-turbo as well and are no faster. On a GPU it is the first
    of DECODERS that is installed and decodes a small JPEG there; `str` of the decoder tells why others were passed
    over.

    The order has reasons, but no measurements:

    - "dali" decodes with nvImageCodec, and keeps device memory from one batch to the next.
    - "nvimgcodec" is the same library without DALI, and allocates every image.
    - "torchvision" does not interpolate chroma, so its pixels differ from libjpeg-turbo's.
    - "torch" decodes on the CPU and copies pixels to the device, where the others copy JPEGs. It needs no further
      package.

    A decoder that is named never falls back. None checks the entropy-coded data of JPEGs in full, as `pack` does:
    "torch" rejects what libjpeg-turbo warns of.

    Args:
        name: "auto" or one of DECODERS.
        device: where decoded images are placed.
        threads: CPU threads; None: see `base.thread_count`.
        max_pixels: larger images are rejected, based on their header.

    Raises:
        MissingDependencyError: the package of the requested decoder is not installed or does not load.
        UserError: the requested decoder does not work on `device`.
        ValueError: unknown name, or fewer than one thread.
    """
    device = torch.device(device)
    options: dict[str, Any] = {"threads": thread_count(threads), "max_pixels": max_pixels}
    if name in DECODERS:
        return _start(DECODERS[name], device, options)
    if name != "auto":
        raise ValueError(f"decoder: got {name!r}, expected one of {', '.join(get_args(DecoderName))}")
    preferred = [kind for kind in DECODERS.values() if kind is not TorchDecoder and device.type == "cuda"]
    absent: list[str] = []
    broken: list[str] = []
    for kind in preferred:
        try:
            decoder = _start(kind, device, options)
            break
        except MissingDependencyError as error:
            if _is_absent(kind.module, error):
                absent.append(kind.library)
            else:
                broken.append(f"{kind.library} does not load: {first_line(error.__cause__ or error)}")
        except UserError as error:
            broken.append(str(error).removeprefix("decoder: "))
    else:
        decoder = _start(TorchDecoder, device, options)
    decoder.passed_over = "; ".join(filter(None, (_not_installed(absent), *broken)))
    return decoder


def _start(
    kind: type[RunDecoder] | type[TorchDecoder], device: torch.device, options: dict[str, Any]
) -> RunDecoder | TorchDecoder:
    """Create a decoder; on a GPU, try it as well, since DALI and torchvision touch the device only when they decode."""
    if not issubclass(kind, RunDecoder):
        return kind(device, check_scans=False, **options)  # `pack` has checked the images
    try:
        decoder = kind(device, **options)
        if device.type == "cuda":
            _check(decoder)
    except (MissingDependencyError, UserError):
        raise
    except Exception as error:  # the libraries raise many types
        raise UserError(f"decoder: {kind.library} does not start on {device}: {first_line(error)}") from error
    return decoder


def _check(decoder: RunDecoder) -> None:
    try:
        decoder.check()
    except Exception:
        decoder.close()
        raise


def _is_absent(module: str, error: MissingDependencyError) -> bool:
    """Whether the package itself is missing, and not a part of it or of what it needs."""
    cause = error.__cause__
    return isinstance(cause, ModuleNotFoundError) and f"{module}.".startswith(f"{cause.name}.")


def _not_installed(libraries: list[str]) -> str:
    if len(libraries) < 2:
        return f"{libraries[0]} is not installed" if libraries else ""
    return f"{', '.join(libraries[:-1])} and {libraries[-1]} are not installed"
