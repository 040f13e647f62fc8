"""The common part of the decoders that pass plain JPEGs to a library in runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from scenarioclip_fast import forks
from scenarioclip_fast.data.config import MAX_PIXELS
from scenarioclip_fast.data.decode.base import DecodeError, catch_error, decode_with_pillow, probe, thread_count
from scenarioclip_fast.requirements import require

# 16 x 16 pixels of one colour: a baseline JPEG with 4:2:0 subsampling.
_SAMPLE = bytes.fromhex(
    "ffd8ffe000104a46494600010100000100010000ffdb004300080606070605080707070909080a0c140d0c0b0b0c1912130f141d1a1f1e"
    "1d1a1c1c20242e2720222c231c1c2837292c30313434341f27393d38323c2e333432ffdb0043010909090c0b0c180d0d1832211c213232"
    "323232323232323232323232323232323232323232323232323232323232323232323232323232323232323232323232ffc00011080010"
    "001003012200021101031101ffc4001500010100000000000000000000000000000003ffc4001410010000000000000000000000000000"
    "0000ffc40014010100000000000000000000000000000006ffc40014110100000000000000000000000000000000ffda000c0301000211"
    "0311003f00b802054fffd9"
)
_ORIGINS: dict[str, forks.Origin] = {}  # library -> where it was first used
_SAMPLE_SHAPE, _SAMPLE_COLOUR, _TOLERANCE = (16, 16, 3), (200, 120, 40), 4


class RunDecoder(ABC):
    """Decodes plain JPEGs with a library, in runs of a bounded number of pixels, and other images with Pillow.

    A run that fails is repeated image by image, so that one bad image affects only itself. Damage after the header that
    leaves the end marker intact may not be detected, as these libraries do not always report it; `pack` rejects such
    images. Threads may share a decoder, but decode one after the other: the libraries crash or hang otherwise.

    Subclasses define `_open`, `_run` and `_close`. In a forked process, decoding raises ForkedError.

    Args:
        device: where decoded images are placed.
        threads: CPU threads of the library; None: see `base.thread_count`.
        max_pixels: larger images are rejected, based on their header.
        run_pixels: maximum number of pixels per run, which bounds the library's memory. A larger image is decoded in a
            separate run.

    Attributes:
        name: of the decoder, as in `make_decoder`.
        library: its name in messages.
        module: the library's module, one of `requirements.OPTIONAL`.
        passed_over: why `make_decoder` chose none of the decoders that "auto" prefers; may be empty.

    Raises:
        MissingDependencyError: the library is not installed.
        UserError: the library does not support the kind of device.
    """

    name: ClassVar[str]
    library: ClassVar[str]
    module: ClassVar[str]
    passed_over = ""

    def __init__(
        self,
        device: str | torch.device = "cpu",
        *,
        threads: int | None = None,
        max_pixels: int = MAX_PIXELS,
        run_pixels: int = MAX_PIXELS,
    ) -> None:
        self.device, self.threads = torch.device(device), thread_count(threads)
        self.max_pixels, self.run_pixels = max_pixels, run_pixels
        self._lock = forks.Lock()
        self._check_origin()
        self._open()
        _ORIGINS.setdefault(self.library, forks.Origin())
        forks.register(self)

    def _check_origin(self) -> None:
        # A new decoder in a forked process may hang as well, once a parent has started the library.
        if (origin := _ORIGINS.get(self.library)) is not None:
            origin.check(self.library, "use the decoder torch, or start processes with the method spawn")

    def _after_fork(self) -> None:
        for thing in vars(self).values():
            forks.keep(thing)

    def __str__(self) -> str:
        version = getattr(require(self.module), "__version__", "")
        library = " ".join(filter(None, (self.library, version, f"on {self.device}")))
        return f"{self.name} ({'; '.join(filter(None, (library, self.passed_over)))})"

    def decode(self, images: Sequence[bytes]) -> list[Tensor | DecodeError]:
        self._check_origin()
        with self._lock:
            return self._decode(images)

    def _decode(self, images: Sequence[bytes]) -> list[Tensor | DecodeError]:
        decoded: list[Tensor | DecodeError | None] = [None] * len(images)
        run: list[int] = []
        pixels = 0
        for i, data in enumerate(images):
            try:
                header = probe(data, self.max_pixels)
                if header is None or not header.plain:
                    decoded[i] = decode_with_pillow(data, self.max_pixels).to(self.device)
                    continue
            except DecodeError as error:
                decoded[i] = error
                continue
            size = header.height * header.width
            if run and pixels + size > self.run_pixels:
                self._decode_run(images, run, decoded)
                run, pixels = [], 0
            run.append(i)
            pixels += size
        if run:
            self._decode_run(images, run, decoded)
        return [x for x in decoded if x is not None]

    def _decode_run(self, images: Sequence[bytes], run: list[int], out: list[Tensor | DecodeError | None]) -> None:
        results: Sequence[Tensor | DecodeError]
        try:
            results = self._run([images[i] for i in run])
        except RuntimeError:
            results = [catch_error(self._run_one, images[i]) for i in run]
        for i, result in zip(run, results, strict=True):
            out[i] = result

    def _run_one(self, data: bytes) -> Tensor:
        try:
            (image,) = self._run([data])
        except RuntimeError as error:
            raise DecodeError("undecodable", f"{self.library}: {self._cause(error)}") from error
        if isinstance(image, DecodeError):
            raise image
        return image

    @abstractmethod
    def _open(self) -> None:
        """Check that the library is installed and supports the device, and prepare it."""

    @abstractmethod
    def _run(self, images: list[bytes]) -> Sequence[Tensor | DecodeError]:
        """Decode at least one plain JPEG to uint8 [H, W, 3] each, in memory that later runs leave alone.

        Raises:
            RuntimeError: the run failed; any of the images may be the cause.
        """

    def _cause(self, error: Exception) -> str:
        """Return the phrase of the library's error that names the cause."""
        return first_line(error)

    def check(self) -> None:
        """Decode a small JPEG.

        Raises:
            RuntimeError: the library does not work on this device.
        """
        try:
            image = self._run_one(_SAMPLE)
        except DecodeError as error:
            raise RuntimeError(error.detail.removeprefix(f"{self.library}: ")) from error
        apart = (image.cpu().int() - torch.tensor(_SAMPLE_COLOUR)).abs().max() if image.shape == _SAMPLE_SHAPE else None
        if apart is None or apart > _TOLERANCE:
            raise RuntimeError("it decodes a test image to wrong pixels")

    def close(self) -> None:
        """Release the library's threads and memory."""
        origin = _ORIGINS.get(self.library)
        if origin is None or origin.is_here:
            self._close()

    @abstractmethod
    def _close(self) -> None:
        """Release the library's threads and memory."""


def first_line(error: BaseException) -> str:
    """Return the first line of the error's message, or its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
