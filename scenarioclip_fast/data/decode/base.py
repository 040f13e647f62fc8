"""Common parts of the decoders: protocol, errors, header probe and Pillow fallback."""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scenarioclip_fast import forks, native
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
_BARE_MARKERS = frozenset((0x00, 0x01, *range(0xD0, 0xD9)))  # not followed by a length; 0x00: a stuffed byte
# TIFF tags, and a value of the second.
_BITS, _PHOTOMETRIC, _COMPRESSION, _PLANAR, _SAMPLE_FORMAT, _SUBSAMPLING = 258, 262, 259, 284, 339, 530
_YCBCR = 6
_PILLOW_LIMIT = forks.Lock()


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
        DecodeError: larger than `max_pixels`, truncated or corrupt; a JPEG of other than 8 bits.
    """
    if data.startswith(_JPEG_START):
        header, scan = _jpeg_header(data)
        # Entropy-coded data escapes 0xFF, so past the scan header this is an end marker, if not always this image's:
        # another one may follow a truncated image. No test for that is as fast, and libjpeg-turbo warns.
        if data.rfind(_END_OF_IMAGE, scan) < 0:
            raise DecodeError("truncated", f"{len(data)} bytes of JPEG without an end marker")
    elif data.startswith(_PNG_START) and len(data) >= 24:
        width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
        header = Header(height, width, False)
    else:
        return None
    _check_size(header.height, header.width, max_pixels)
    return header


def decoded_size(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """The (height, width) that an image declares, without decoding it; (0, 0) if a decoder would reject it."""
    try:
        if data.startswith(_JPEG_START):
            header, _ = _jpeg_header(data)
            size = header.height, header.width
        elif (found := probe(data)) is not None:
            size = found.height, found.width
        else:
            require("PIL")
            import PIL.Image

            _raise_pillow_limit(max_pixels)
            with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
                size = image.height, image.width
    except MemoryError:
        raise
    except Exception:  # the decoder says what is wrong
        return 0, 0
    return size if size[0] * size[1] <= max_pixels else (0, 0)


def _jpeg_header(data: bytes) -> tuple[Header, int]:
    """Return the frame header, and the offset just past the first scan header."""
    header = None
    at = data.find(b"\xff", 2)  # like libjpeg, skip spare bytes between segments
    while 0 <= at <= len(data) - 4 and (marker := data[at + 1]) != 0xD9:
        end = at + (1 if marker == 0xFF else 2)
        if marker != 0xFF and marker not in _BARE_MARKERS:
            end += max(2, int.from_bytes(data[at + 2 : at + 4], "big"))
        if marker in _FRAME_MARKERS and at + 10 <= len(data):
            bits, components = data[at + 4], data[at + 9]
            if bits != 8:
                raise DecodeError("undecodable", f"JPEG of {bits} bits per sample: convert the image to 8 bits")
            height, width = (int.from_bytes(data[i : i + 2], "big") for i in (at + 5, at + 7))
            header = Header(height, width, plain=components in (1, 3))
        if marker == 0xDA and header is not None:
            return header, end
        at = data.find(b"\xff", end)
    raise DecodeError("truncated", f"{len(data)} bytes of JPEG end inside the header")


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise DecodeError("too_large", f"{width} x {height} pixels, the limit is {max_pixels}")
    if height * width == 0:
        raise DecodeError("corrupt", f"the header declares {width} x {height} pixels")


def check_jpeg(data: bytes) -> bool:
    """Check the entropy-coded data of a JPEG, which decoders repair silently, in a third of the time of decoding it.

    Returns:
        Whether it was checked: not with arithmetic or lossless coding, nor without the compiled extension.

    Raises:
        DecodeError: it is damaged.
    """
    host = native.host()
    damage = None if host is None else host.jpeg_damage(data)
    if damage:
        raise DecodeError("corrupt", f"JPEG: {damage}")
    return damage is not None


def decode_with_pillow(data: bytes, max_pixels: int = MAX_PIXELS) -> Tensor:  # uint8 [H, W, 3]
    """Decode an image of one of FORMATS.

    Raises:
        DecodeError: too large, damaged, or of another format.
    """
    require("PIL")
    import PIL.Image

    _raise_pillow_limit(max_pixels)
    try:
        with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image.height, image.width, max_pixels)
            if data.startswith(_JPEG_START):
                check_jpeg(data)  # Pillow ignores libjpeg's warnings
            elif data.startswith(_PNG_START):
                _check_png(data)  # Pillow ignores the checksums of pixels
            return torch.from_numpy(pillow_to_rgb(image))
    except (DecodeError, MemoryError):
        raise
    except PIL.UnidentifiedImageError as error:  # its message contains a memory address, different in every run
        raise DecodeError("not_an_image", f"none of {', '.join(FORMATS)}") from error
    except PIL.Image.DecompressionBombError as error:
        raise DecodeError("too_large", f"more than {max_pixels} pixels: {error}") from error
    except Exception as error:  # Pillow's plugins raise many types on damaged files
        reason = "truncated" if "truncated" in str(error).lower() else "undecodable"
        raise DecodeError(reason, f"{type(error).__name__}: {error}") from error


def _check_png(data: bytes) -> None:
    at = len(_PNG_START)
    while at + 12 <= len(data):
        kind = data[at + 4 : at + 8]
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        # Of the chunks that pixels depend on, the names begin with a capital.
        if not kind[0] & 0x20 and zlib.crc32(memoryview(data)[at + 4 : end]).to_bytes(4, "big") != data[end : end + 4]:
            reason = "truncated" if end + 4 > len(data) else "corrupt"
            raise DecodeError(reason, f"PNG: the checksum of {kind.decode('latin-1')} does not match")
        if kind == b"IEND":
            break
        at = end + 4


def _raise_pillow_limit(max_pixels: int) -> None:
    """Keep Pillow's own limit, one for the process, from rejecting images of at most `max_pixels`.

    It is never lowered, so that threads with different limits do not disturb each other.
    """
    import PIL.Image

    with _PILLOW_LIMIT:
        if PIL.Image.MAX_IMAGE_PIXELS is not None:
            PIL.Image.MAX_IMAGE_PIXELS = max(PIL.Image.MAX_IMAGE_PIXELS, max_pixels)


def pillow_to_rgb(image: Image) -> NDArray[np.uint8]:  # [H, W, 3]
    """Convert a Pillow image to RGB: 12-bit and 16-bit grey scaled to 8 bits, transparency dropped.

    Raises:
        DecodeError: pixels whose range is unknown (float, signed or 32-bit), or that Pillow reads wrongly.
    """
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    bits = max(tags.get(_BITS, (16,)))
    if (unusable := _unusable(image, tags, bits)) is not None:
        raise DecodeError("undecodable", f"{unusable}: convert the image to unsigned 8-bit pixels")
    # `convert` clips these modes at 255. Some versions of Pillow open 16-bit PNGs in mode I.
    if image.mode.startswith("I"):
        grey = np.asarray(image) * np.float32(255 / (2**bits - 1))
        if tags and tags.get(_PHOTOMETRIC, 0) == 0:  # Pillow inverts images whose zero is white only up to 8 bits
            grey = 255 - grey
        return np.repeat(np.rint(grey).astype(np.uint8)[..., None], 3, axis=2)
    # `convert` has no direct way from La, and warns of some palettes with transparency.
    if (between := {"La": "LA", "P": "RGBA"}.get(image.mode)) is not None:
        image = image.convert(between)
    return np.array(image.convert("RGB"))  # a copy, because Pillow's buffer is read-only


def _unusable(image: Image, tags: Any, bits: int) -> str | None:
    """Return why the pixels cannot be converted to 8 bits, or None."""
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        kind = "float" if image.mode == "F" else "32-bit integer"
        return f"{kind} pixels of unknown range (Pillow mode {image.mode})"
    if 2 in tags.get(_SAMPLE_FORMAT, ()):  # of 8 bits, which Pillow reads as unsigned
        return "signed pixels"
    # Pillow unpacks uncompressed data itself, as if it were 8-bit, or not subsampled.
    if tags.get(_COMPRESSION, 1) != 1:
        return None
    if tags.get(_PLANAR, 1) == 2 and bits > 8:
        return f"{bits}-bit colour in planes, which Pillow reads as 8-bit"
    if tags.get(_PHOTOMETRIC) == _YCBCR and tags.get(_SUBSAMPLING, (2, 2)) != (1, 1):
        return "uncompressed YCbCr with subsampled chroma, which Pillow reads as not subsampled"
    return None


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
    """Return `threads`, or by default the cores that this process may use, divided by the ranks on this host; 1 to 16.

    torchrun tells the number of ranks.

    Raises:
        ValueError: fewer than one.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads: got {threads}, expected at least 1, or None")
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    return threads or min(16, max(1, cores() // (int(ranks) if ranks.isdecimal() and int(ranks) else 1)))


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def catch_error(decode: Callable[[bytes], Tensor], data: bytes) -> Tensor | DecodeError:
    """Return the DecodeError of `decode(data)` instead of raising it, so that a batch survives a bad image."""
    try:
        return decode(data)
    except DecodeError as error:
        return error
