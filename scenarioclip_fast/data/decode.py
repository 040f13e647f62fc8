"""JPEG bytes -> uint8 [H, W, 3] on a device, one bad image never harming the others."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from scenarioclip_fast.errors import MissingDependencyError
from scenarioclip_fast.requirements import require

MAX_PIXELS = 1 << 26  # 201 MB of RGB: above any camera, far below a decompression bomb
# What a data set's images may be (an MPO opens as the JPEG that it begins with). Pillow knows many more, and hands EPS
# to Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")

_JPEG_START = b"\xff\xd8\xff"
_PNG_START = b"\x89PNG\r\n\x1a\n"
_END_OF_IMAGE = b"\xff\xd9"
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_BARE_MARKERS = frozenset((0x01, *range(0xD0, 0xD9)))  # no length follows


class DecodeError(ValueError):
    """Why an image is unusable.

    `reason`, to count by: truncated, corrupt, too_large, not_an_image, undecodable or decoder_failed.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class Decoder(Protocol):
    """Decodes on `device`.

    Pixels are Pillow's, bit for bit on the CPU. EXIF orientation is ignored: boxes and masks refer to the
    pixels as stored.
    """

    device: torch.device

    def decode(self, images: Sequence[bytes]) -> list[Tensor | DecodeError]:
        """uint8 [H, W, 3], or the reason why not, for each image."""

    def close(self) -> None:
        """Gives threads and memory back."""


@dataclass(frozen=True)
class Header:
    """What an image's header says. `plain` is a JPEG with 8-bit grey or three-component colour."""

    height: int
    width: int
    plain: bool


def probe(data: bytes, max_pixels: int = MAX_PIXELS) -> Header | None:
    """Reads the header of a JPEG or PNG; None for other data, which only Pillow may know.

    Raises:
        DecodeError: larger than `max_pixels`, or cut short. Nothing of the image's size has been allocated
            by then.
    """
    if data.startswith(_JPEG_START):
        header, scan = _jpeg_header(data)
        # Entropy-coded data escape 0xFF, so behind the scan header this pair is the end marker and nothing
        # else.
        if data.rfind(_END_OF_IMAGE, scan) < 0:
            raise DecodeError("truncated", f"{len(data)} bytes of JPEG without an end")
    elif data.startswith(_PNG_START) and len(data) >= 24:
        width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
        header = Header(height, width, False)
    else:
        return None
    _check_size(header.height, header.width, max_pixels)
    return header


def _jpeg_header(data: bytes) -> tuple[Header, int]:
    """The frame header and the offset behind the first scan header."""
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
        raise DecodeError("corrupt", f"the header says {width} x {height} pixels")


def decode_with_pillow(data: bytes, max_pixels: int = MAX_PIXELS) -> Tensor:  # uint8 [H, W, 3]
    """Decodes an image of one of FORMATS. Raises DecodeError."""
    require("PIL")
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image.height, image.width, max_pixels)
            # A copy, because Pillow's buffer is read-only.
            return torch.from_numpy(np.array(image.convert("RGB")))
    except (DecodeError, MemoryError):
        raise
    except UnidentifiedImageError as error:  # its message holds an address, which is another in every run
        raise DecodeError("not_an_image", f"none of {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise DecodeError("too_large", str(error)) from error
    except Exception as error:  # Pillow's plugins raise whatever a damaged file makes them raise
        reason = "truncated" if "truncated" in str(error).lower() else "undecodable"
        raise DecodeError(reason, f"{type(error).__name__}: {error}") from error


def each(decode: Callable[[bytes], Tensor], images: Sequence[bytes]) -> list[Tensor | DecodeError]:
    """Decodes one by one, keeping each failure to its image."""
    return [_guarded(decode, data) for data in images]


def _guarded(decode: Callable[[bytes], Tensor], data: bytes) -> Tensor | DecodeError:
    try:
        return decode(data)
    except DecodeError as error:
        return error


class TorchDecoder:
    """libjpeg-turbo on CPU threads for JPEGs, Pillow for the rest; copies to `device`.

    Args:
        device: where the images are wanted.
        threads: how many images are decoded at a time; None: one per core, at most 16.
        max_pixels: larger images are refused by their header.
    """

    def __init__(
        self, device: str | torch.device = "cpu", threads: int | None = None, max_pixels: int = MAX_PIXELS
    ) -> None:
        self.device = torch.device(device)
        self.max_pixels = max_pixels
        self._turbo: Any = require("simplejpeg").decode_jpeg
        threads = threads or min(16, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(threads, "decode") if threads > 1 else None

    def decode(self, images: Sequence[bytes]) -> list[Tensor | DecodeError]:
        if self._pool is None:
            decoded = each(self._decode_one, images)
        else:
            decoded = list(self._pool.map(lambda data: _guarded(self._decode_one, data), images))
        if self.device.type == "cpu":
            return decoded
        return [x if isinstance(x, DecodeError) else _upload(x, self.device) for x in decoded]

    def _decode_one(self, data: bytes) -> Tensor:
        header = probe(data, self.max_pixels)
        if header is None or not header.plain:
            return decode_with_pillow(data, self.max_pixels)
        try:
            pixels = self._turbo(data, "RGB", fastdct=False, fastupsample=False)
        except ValueError as error:
            # Spare bytes between segments are skipped without loss; every other warning means lost pixels.
            if "extraneous bytes" in str(error):
                return decode_with_pillow(data, self.max_pixels)
            raise DecodeError("corrupt", f"libjpeg-turbo: {error}") from error
        return torch.from_numpy(pixels)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _upload(image: Tensor, device: torch.device) -> Tensor:
    return image.pin_memory().to(device, non_blocking=True)


def make_decoder(
    name: str = "auto",
    device: str | torch.device = "cpu",
    *,
    threads: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Decoder:
    """The decoder `name` for `device`.

    "auto" is DALI on a GPU where it is installed and "torch" otherwise: on a CPU DALI runs the same
    libjpeg-turbo, no faster. A decoder that is named never falls back.

    Raises:
        MissingDependencyError: the named decoder's package is missing.
    """
    device = torch.device(device)
    if name not in ("auto", "dali", "torch"):
        raise ValueError(f"decoder: got {name!r}, expected 'auto', 'dali' or 'torch'")
    if name == "dali" or (name == "auto" and device.type == "cuda"):
        from scenarioclip_fast.data.dali import DaliDecoder

        try:
            return DaliDecoder(device, threads=threads, max_pixels=max_pixels)
        except MissingDependencyError:
            if name == "dali":
                raise
    return TorchDecoder(device, threads, max_pixels)
