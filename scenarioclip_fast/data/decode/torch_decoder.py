"""Decoding on the CPU with libjpeg-turbo and Pillow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scenarioclip_fast import forks
from scenarioclip_fast.data.config import MAX_PIXELS
from scenarioclip_fast.data.decode.base import (
    DecodeError,
    Header,
    catch_error,
    check_jpeg,
    decode_with_pillow,
    probe,
    thread_count,
)
from scenarioclip_fast.data.slab import PinnedSlabs, SlabPool, layout
from scenarioclip_fast.requirements import require

T = TypeVar("T")

# Of libjpeg-turbo's warnings and errors, those that a sound JPEG may cause. It reports only the first of an image.
_HARMLESS = (
    "extraneous bytes",
    "Adobe color transform",
    "JFIF revision",
    "SOS parameters",
    "subsampling level",
    "color conversion",  # of lossless grey
)


class TorchDecoder:
    """Decode JPEGs with libjpeg-turbo on CPU threads, other images with Pillow, and copy them to `device`.

    The images of a call share a slab of memory. For a GPU it is pinned, and copied to the device in one piece.

    Args:
        device: where decoded images are placed.
        threads: images decoded at a time; None: see `base.thread_count`.
        max_pixels: larger images are rejected, based on their header.
        check_scans: check the entropy-coded data of every JPEG before decoding, which takes a third longer. Otherwise
            libjpeg-turbo's warnings have to do, which miss about a tenth of what the check finds; JPEGs that go through
            Pillow are checked either way.

    Raises:
        MissingDependencyError: simplejpeg is not installed.
    """

    name: ClassVar[str] = "torch"
    library = "libjpeg-turbo"
    module = "simplejpeg"
    passed_over = ""  # set by `make_decoder`

    def __init__(
        self,
        device: str | torch.device = "cpu",
        threads: int | None = None,
        max_pixels: int = MAX_PIXELS,
        check_scans: bool = True,
    ) -> None:
        self.device = torch.device(device)
        self._check_scans = check_scans
        self.max_pixels = max_pixels
        self._decode_jpeg: Any = require(self.module).decode_jpeg
        self._threads = thread_count(threads)
        self._slabs = SlabPool() if self.device.type == "cpu" else PinnedSlabs(self.device)
        self._after_fork()
        forks.register(self)

    def _after_fork(self) -> None:
        self._pool = ThreadPoolExecutor(self._threads, "decode") if self._threads > 1 else None

    def __str__(self) -> str:
        threads = f"{self._threads} threads" if self._threads > 1 else "one thread"
        return f"{self.name} ({'; '.join(filter(None, (f'{self.library} on {threads}', self.passed_over)))})"

    def decode(self, images: Sequence[bytes]) -> list[Tensor | DecodeError]:
        found = self._for_each(len(images), lambda i: self._inspect(images[i]))
        shapes = [_shape(x) for x in found]
        offsets, size = layout([h * w * 3 for h, w in shapes])
        if size == 0:
            return [x for x in found if isinstance(x, DecodeError)]
        slab = self._slabs.lend(size)
        places = [
            slab[offset : offset + h * w * 3].view(h, w, 3) for offset, (h, w) in zip(offsets, shapes, strict=True)
        ]
        errors = self._for_each(len(images), lambda i: self._fill(images[i], found[i], places[i]))
        if isinstance(self._slabs, PinnedSlabs):
            on_device = self._slabs.upload(slab)
            places = [on_device[p.storage_offset() :][: p.numel()].view(p.shape) for p in places]
        return [place if error is None else error for place, error in zip(places, errors, strict=True)]

    def _inspect(self, data: bytes) -> Header | Tensor | DecodeError:
        """Return the header of a plain JPEG, else the pixels, whose number may be known only after decoding."""
        try:
            header = probe(data, self.max_pixels)
            plain = header is not None and header.plain
            return header if header is not None and plain else decode_with_pillow(data, self.max_pixels)
        except DecodeError as error:
            return error

    def _fill(self, data: bytes, found: Header | Tensor | DecodeError, out: Tensor) -> DecodeError | None:
        """Write the pixels of an image to its place in the slab."""
        if isinstance(found, DecodeError):
            return found
        if isinstance(found, Tensor):
            np.copyto(out.numpy(), found.numpy())  # torch's copy starts OpenMP threads, which hang in forked processes
            return None
        result = catch_error(lambda data: self._decode_into(data, out), data)
        return result if isinstance(result, DecodeError) else None

    def _decode_into(self, data: bytes, out: Tensor) -> Tensor:
        if self._check_scans:
            check_jpeg(data)
        try:
            pixels = self._decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, buffer=out.numpy())
        except ValueError as error:
            pixels = self._decode_odd(data, error)
            _check_shape(pixels.shape, out)
            np.copyto(out.numpy(), pixels)
        else:
            _check_shape(pixels.shape, out)
        return out

    def _decode_odd(self, data: bytes, error: ValueError) -> NDArray[np.uint8]:
        """Decode a JPEG with Pillow after an error or warning of libjpeg-turbo, if its entropy-coded data is sound."""
        try:
            if check_jpeg(data) or any(text in str(error) for text in _HARMLESS):
                return decode_with_pillow(data, self.max_pixels).numpy()
        except DecodeError as damage:
            if damage.reason == "corrupt":
                raise
        raise DecodeError("corrupt", f"libjpeg-turbo: {error}") from error

    def _for_each(self, count: int, call: Callable[[int], T]) -> list[T]:
        """Return [call(0), ..., call(count - 1)]; each thread takes the next index, since a task per image is slow."""
        results: list[Any] = [None] * count
        indices = iter(range(count))

        def work(indices: Iterator[int]) -> None:
            for i in indices:
                results[i] = call(i)

        if self._pool is None:
            work(indices)
            return results
        tasks = [self._pool.submit(work, indices) for _ in range(min(self._threads, count))]
        wait(tasks)  # all of them, even if one fails: they write to the slab
        for task in tasks:
            task.result()
        return results

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        if isinstance(self._slabs, SlabPool):
            self._slabs.close()


def _shape(found: Header | Tensor | DecodeError) -> tuple[int, int]:
    if isinstance(found, Header):
        return found.height, found.width
    return (found.shape[0], found.shape[1]) if isinstance(found, Tensor) else (0, 0)


def _check_shape(shape: Sequence[int], out: Tensor) -> None:
    if tuple(shape) != tuple(out.shape):
        raise DecodeError("corrupt", f"the header declares {list(out.shape)}, decoded {list(shape)}")
