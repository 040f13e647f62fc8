"""Decoding on the CPU with libjpeg-turbo and Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from scenarioclip_fast.data.config import MAX_PIXELS
from scenarioclip_fast.data.decode.base import DecodeError, catch_error, decode_with_pillow, probe, thread_count
from scenarioclip_fast.requirements import require


class TorchDecoder:
    """Decode JPEGs with libjpeg-turbo on CPU threads, other images with Pillow, and copy them to `device`.

    Args:
        device: where decoded images are placed.
        threads: images decoded at a time; None: one per core, at most 16.
        max_pixels: larger images are rejected, based on their header.

    Raises:
        MissingDependencyError: simplejpeg is not installed.
    """

    def __init__(
        self, device: str | torch.device = "cpu", threads: int | None = None, max_pixels: int = MAX_PIXELS
    ) -> None:
        self.device = torch.device(device)
        self.max_pixels = max_pixels
        self._decode_jpeg: Any = require("simplejpeg").decode_jpeg
        threads = thread_count(threads)
        self._pool = ThreadPoolExecutor(threads, "decode") if threads > 1 else None

    def decode(self, images: Sequence[bytes]) -> list[Tensor | DecodeError]:
        map_images = map if self._pool is None else self._pool.map
        decoded = list(map_images(lambda data: catch_error(self._decode_one, data), images))
        if self.device.type == "cpu":
            return decoded
        return [x if isinstance(x, DecodeError) else _upload(x, self.device) for x in decoded]

    def _decode_one(self, data: bytes) -> Tensor:
        header = probe(data, self.max_pixels)
        if header is None or not header.plain:
            return decode_with_pillow(data, self.max_pixels)
        try:
            pixels = self._decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)
        except ValueError as error:
            # Extra bytes between segments are harmless; every other warning means lost pixels.
            if "extraneous bytes" in str(error):
                return decode_with_pillow(data, self.max_pixels)
            raise DecodeError("corrupt", f"libjpeg-turbo: {error}") from error
        return torch.from_numpy(pixels)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _upload(image: Tensor, device: torch.device) -> Tensor:
    return image.pin_memory().to(device, non_blocking=True)
