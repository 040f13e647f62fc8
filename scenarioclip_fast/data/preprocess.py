"""Preprocess images for inference, exactly as the loader renders global views for evaluation."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scenarioclip_fast.data.decode import MAX_PIXELS, DecodeError, TorchDecoder, pillow_to_rgb
from scenarioclip_fast.data.scene import Scene
from scenarioclip_fast.data.views import Views
from scenarioclip_fast.devices import pick_device
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import read_regular
from scenarioclip_fast.ops.view_batch import check_renderable
from scenarioclip_fast.ops.views import render_views

if TYPE_CHECKING:
    from PIL.Image import Image

_EXPECTED = "expected a path, encoded bytes, a PIL image, or a uint8 array or tensor [H, W, 3]"


def preprocess(
    images: str | os.PathLike[str] | bytes | Image | NDArray[np.uint8] | Tensor | Sequence[Any],
    *,
    size: int = 224,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    max_pixels: int = MAX_PIXELS,
) -> Tensor:  # [N, 3, size, size]
    """Decode, resize and normalise images as for evaluation.

    The short side is resized to `size` (bicubic, antialiased), followed by a centre crop and normalisation with CLIP's
    mean and standard deviation. The pixels are bitwise equal to the loader's global views. EXIF orientation is ignored,
    as in packed data sets.

    Args:
        images: one image or a list of images: paths, encoded bytes (JPEG, PNG, WebP, BMP, GIF or TIFF), PIL images, or
            uint8 arrays or tensors [H, W, 3]. 16-bit grey is scaled to 8 bits.
        size: side of the output in pixels; a model's is `model.config.vision.image_size`.
        device: where the images are resized and returned: a torch device, or "auto" for a GPU if there is one.
        dtype: float32, bfloat16 or float16.
        max_pixels: larger encoded images are rejected, based on their header.

    Returns:
        [N, 3, size, size]; N = 1 for a single image.

    Raises:
        UserError: a file cannot be read or decoded, or an image is too long or too narrow (see
            `ops.view_batch.check_renderable`); the message names it.
        TypeError: not an image.
        ValueError: an array has the wrong shape or dtype, or `size` is not a positive integer.
    """
    if isinstance(size, bool) or not isinstance(size, Integral) or size < 1:
        raise UserError(f"size: got {size!r}, expected the side of the output in pixels, an integer of at least 1")
    device = pick_device(device)
    many = list(images) if isinstance(images, (list, tuple)) else [images]
    decoded = _decode(many, device, max_pixels)
    scenes = [Scene(str(i), image) for i, image in enumerate(decoded)]
    return render_views(decoded, Views.of_scenes(scenes), size=size, dtype=dtype).to(device)


def _decode(images: list[Any], device: torch.device, max_pixels: int) -> list[Tensor]:  # N x [H, W, 3] uint8
    names = [f"images[{i}]" for i in range(len(images))]
    encoded: dict[int, bytes] = {}
    decoded: dict[int, Tensor] = {}
    for i, image in enumerate(images):
        if isinstance(image, (str, os.PathLike)):
            names[i] = os.fspath(image)
            encoded[i] = _read(Path(image))
        elif isinstance(image, (bytes, bytearray, memoryview)):
            encoded[i] = bytes(image)
        else:
            decoded[i] = _as_tensor(image, names[i]).to(device)
    if encoded:
        decoder = TorchDecoder(device, min(len(encoded), os.cpu_count() or 1), max_pixels)
        try:
            results = decoder.decode(list(encoded.values()))
        finally:
            decoder.close()
        for i, result in zip(encoded, results, strict=True):
            if isinstance(result, DecodeError):
                raise UserError(f"{names[i]}: {result}")
            decoded[i] = result
    for i, result in decoded.items():
        try:
            check_renderable(*result.shape[:2])
        except ValueError as error:
            raise UserError(f"{names[i]}: {error}") from None
    return [decoded[i] for i in range(len(images))]


def _read(path: Path) -> bytes:
    try:
        return read_regular(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def _as_tensor(image: Any, name: str) -> Tensor:  # [H, W, 3] uint8
    pil = sys.modules.get("PIL.Image")  # imported already if `image` is a PIL image
    if pil is not None and isinstance(image, pil.Image):
        try:
            image = pillow_to_rgb(image)
        except (DecodeError, OSError, ValueError) as error:  # the latter two: truncated, closed, of an unknown mode
            raise UserError(f"{name}: {error}") from error
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3:
            raise ValueError(f"{name}: got {image.dtype} {list(image.shape)}, expected uint8 [H, W, 3]")
        # Copies only arrays whose memory torch cannot share: read-only or with negative strides.
        image = torch.from_numpy(np.require(image, requirements=["C", "W"]))
    if not isinstance(image, Tensor):
        raise TypeError(f"{name}: got a {type(image).__name__}, {_EXPECTED}")
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.numel():
        raise ValueError(f"{name}: got {image.dtype} {list(image.shape)}, expected uint8 [H, W, 3] with H, W > 0")
    return image.contiguous()
