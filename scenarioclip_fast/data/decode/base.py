"""Common parts of the decoders: protocol, errors, header probe and Pillow fallback."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scenarioclip_fast.data.config import MAX_PIXELS
from scenarioclip_fast.requirements import require

if TYPE_CHECKING:
    from PIL.Image import Image

# Supported image formats (an MPO opens as its first JPEG). Pillow supports many more, but runs Ghostscript on EPS.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")

_JPEG_START = b"\xff\xd8\xff"
_PNG_START = b"\x89PNG\r\n\x1a\n"
_END_OF_IMAGE = b"\xff\xd9"
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_BARE_MARKERS = frozenset((0x01, *range(0xD0, 0xD9)))  # not followed by a length


class DecodeError(ValueError):
    """An image that cannot be used.

    Attributes:
        reason: truncated, corrupt, too_large, not_an_image, undecodable or decoder_failed.
        detail: the cause, as a phrase.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class Decoder(Protocol):
    """Decodes images to tensors on `device`.

    On the CPU, pixels are bitwise equal to Pillow's. EXIF orientation is ignored: boxes and masks refer to the pixels
    as stored. `str` gives one line for logs and records: the name, what decodes, and why "auto" chose it.

    Attributes:
        name: as in `make_decoder`.
    """

    name: ClassVar[str]
    device: torch.device

    def decode(self, images: Sequence[bytes]) -> list[Tensor | DecodeError]:
        """Return a uint8 [H, W, 3] tensor or a DecodeError for each image."""

    def close(self) -> None:
        """Release threads and memory."""


@dataclass(frozen=True)
class Header:
    """Image size in pixels. `plain`: a JPEG with 8-bit grey or three-component colour."""

    height: int
    width: int
    plain: bool


def probe(data: bytes, max_pixels: int = MAX_PIXELS) -> Header | None:
    """Read the header of a JPEG or PNG, without allocating memory for the image.

    Returns:
        The header; None for other data, which Pillow may be able to open.

    Raises:
        DecodeError: larger than `max_pixels`, truncated or corrupt.
    """
    if data.startswith(_JPEG_START):
        header, scan = _jpeg_header(data)
        # Entropy-coded data escapes 0xFF, so after the scan header this byte pair can only be the end marker.
        if data.rfind(_END_OF_IMAGE, scan) < 0:
            raise DecodeError("truncated", f"{len(data)} bytes of JPEG without an end marker")
    elif data.startswith(_PNG_START) and len(data) >= 24:
        width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
        header = Header(height, width, False)
    else:
        return None
    _check_size(header.height, header.width, max_pixels)
    return header


def _jpeg_header(data: bytes) -> tuple[Header, int]:
    """Return the frame header, and the offset just past the first scan header."""
    header = None
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            raise DecodeError("corrupt", f"JPEG: expected a marker at byte {at}, got 0x{data[at]:02x}")
        marker = data[at + 1]
        if marker == 0xFF or marker in _BARE_MARKERS:
            at += 1 if marker == 0xFF else 2
            continue
        size = int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in _FRAME_MARKERS and at + 10 <= len(data):
            height, width = (int.from_bytes(data[i : i + 2], "big") for i in (at + 5, at + 7))
            header = Header(height, width, plain=data[at + 4] == 8 and data[at + 9] in (1, 3))
        at += 2 + size
        if marker == 0xDA and header is not None:
            return header, at
    raise DecodeError("truncated", f"{len(data)} bytes of JPEG end inside the header")


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise DecodeError("too_large", f"{width} x {height} pixels, the limit is {max_pixels}")
    if height * width == 0:
        raise DecodeError("corrupt", f"the header declares {width} x {height} pixels")


def decode_with_pillow(data: bytes, max_pixels: int = MAX_PIXELS) -> Tensor:  # uint8 [H, W, 3]
    """Decode an image of one of FORMATS.

    Raises:
        DecodeError: too large, damaged, or of another format.
    """
    require("PIL")
    import PIL.Image

    try:
        with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image.height, image.width, max_pixels)
            return torch.from_numpy(pillow_to_rgb(image))
    except (DecodeError, MemoryError):
        raise
    except PIL.UnidentifiedImageError as error:  # its message contains a memory address, different in every run
        raise DecodeError("not_an_image", f"none of {', '.join(FORMATS)}") from error
    except PIL.Image.DecompressionBombError as error:
        raise DecodeError("too_large", str(error)) from error
    except Exception as error:  # Pillow's plugins raise many types on damaged files
        reason = "truncated" if "truncated" in str(error).lower() else "undecodable"
        raise DecodeError(reason, f"{type(error).__name__}: {error}") from error


def pillow_to_rgb(image: Image) -> NDArray[np.uint8]:  # [H, W, 3]
    """Convert a Pillow image to RGB, 16-bit grey scaled to 8 bits.

    Raises:
        DecodeError: 32-bit integer or float pixels, whose range is unknown.
    """
    # `convert` clips these modes at 255. Some versions of Pillow open 16-bit PNGs in mode I.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        grey = np.asarray(image).astype(np.float32) / 257
        return np.repeat(np.rint(grey).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        kind = {"I": "32-bit integer", "F": "float"}[image.mode]
        raise DecodeError("undecodable", f"{kind} pixels (Pillow mode {image.mode}): convert the image to 8 or 16 bits")
    return np.array(image.convert("RGB"))  # a copy, because Pillow's buffer is read-only


def decode_checked(decoder: Decoder, data: bytes) -> Tensor:  # uint8 [H, W, 3]
    """Decode one image.

    Raises:
        DecodeError: the image cannot be used.
    """
    (image,) = decoder.decode([data])
    if isinstance(image, DecodeError):
        raise image
    return image


def thread_count(threads: int | None) -> int:
    """Return `threads`, or by default one per core, at most 16.

    Raises:
        ValueError: fewer than one.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads: got {threads}, expected at least 1, or None")
    return threads or min(16, os.cpu_count() or 1)


def catch_error(decode: Callable[[bytes], Tensor], data: bytes) -> Tensor | DecodeError:
    """Return the DecodeError of `decode(data)` instead of raising it, so that a batch survives a bad image."""
    try:
        return decode(data)
    except DecodeError as error:
        return error
