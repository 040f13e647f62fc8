"""Samples: scenes read from shards, their vocabulary ids, and their decoded images."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scenarioclip_fast import forks
from scenarioclip_fast.data.config import MAX_PIXELS
from scenarioclip_fast.data.decode import DecodeError, Decoder
from scenarioclip_fast.data.decode.base import decoded_size
from scenarioclip_fast.data.mix import ShardMix
from scenarioclip_fast.data.open_files import exhausted_error, is_exhausted
from scenarioclip_fast.data.remote import Closed
from scenarioclip_fast.data.scene import Scene, with_masks
from scenarioclip_fast.data.shards import BadSample
from scenarioclip_fast.data.shares import Share
from scenarioclip_fast.errors import UserError

_REMOTE_READS = 32  # concurrent
# Errors that are not caused by a scene and end the run.
_FATAL = (MemoryError, ImportError, Closed, forks.ForkedError)


@dataclass(frozen=True)
class Sample:
    """A scene at `index` of its split, with its positions in the vocabulary; -1 stands for no action.

    `repetition` tells the occurrences of a key in an epoch apart: it is 0 for the first. `source` is as in `BadSample`.
    """

    index: int
    scene: Scene
    action_id: int
    object_id: list[int]
    relation_id: list[int]
    repetition: int = 0
    source: str | None = None


class SampleReader:
    """Reads scenes in background threads and looks up their texts in the vocabulary.

    Args:
        shards: the data sets.
        threads: number of reader threads; at least 32 for remote shards, as they mostly wait for the network.
        need_masks: leave out relations whose subject or object has no mask.
    """

    def __init__(self, shards: ShardMix, threads: int, need_masks: bool = False) -> None:
        self._shards = shards
        self._need_masks = need_masks
        self._threads = max(_REMOTE_READS, threads) if shards.is_remote else threads
        self._after_fork()
        forks.register(self)

    def _after_fork(self) -> None:
        self._pool = ThreadPoolExecutor(self._threads, "read")

    def read_ahead(self, indices: npt.NDArray[np.int64] | Share, batch_size: int) -> Iterator[Sample | BadSample]:
        """Read the scenes at `indices`, in this order, one batch ahead of the consumer.

        Indices from the number of scenes on are further occurrences: see `Mix.occurrences`.
        """
        per_task = -(-batch_size // self._threads)  # one task per scene would cost more than the reads
        reads: deque[Future[list[Sample | BadSample]]] = deque()
        chunk = indices.chunk if isinstance(indices, Share) else Share.chunk
        chunk = -(-chunk // per_task) * per_task
        for first in range(0, len(indices), chunk):
            part = indices[first : first + chunk]
            for start in range(0, len(part), per_task):
                reads.append(self._pool.submit(self._read, part[start : start + per_task].tolist()))
                if len(reads) * per_task >= 2 * batch_size:
                    yield from reads.popleft().result()
        for read in reads:
            yield from read.result()

    def _read(self, indices: list[int]) -> list[Sample | BadSample]:
        return [self._read_one(index) for index in indices]

    def _read_one(self, occurrence: int) -> Sample | BadSample:
        number, index = divmod(occurrence, len(self._shards))
        source = self._shards.source_of(index)
        try:
            scene = self._shards.read(index)
        except BadSample as bad:
            return bad
        except (UserError, *_FATAL):  # UserError: the cache of remote shards is unusable
            raise
        except Exception as error:  # damaged bytes can make the parsers raise anything
            if is_exhausted(error):
                raise exhausted_error(self._shards.source) from error
            return BadSample(self._shards.key(index), "unreadable", f"{type(error).__name__}: {error}", source)
        if self._need_masks:
            scene = with_masks(scene)
        ids = self._shards.vocabulary
        try:
            return Sample(
                index,
                scene,
                -1 if scene.action is None else ids.action_id(scene.action),
                [ids.object_id(o.name) for o in scene.objects],
                [ids.relation_id(scene.relation_text(k)) for k in range(len(scene.relations))],
                self._shards.repetition(index, number),
                source,
            )
        except UserError as error:
            return BadSample(scene.key, "unknown_text", str(error), source)

    def close(self) -> None:
        """Stop the threads and close the shards."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._shards.close()  # before waiting for the threads, which may be blocked by a silent server
        self._pool.shutdown()


class SampleDecoder:
    """Replaces the encoded images of samples by pixels, caching decoded images up to a limit.

    Args:
        decoder: owned by this object.
        cache_bytes: memory on the decoder's device for cached images. Images are never evicted: as every scene recurs
            in each epoch, replacing them would hardly help.
        batch_bytes: memory for the images of a batch.
        max_pixels: the decoder rejects larger images.
    """

    def __init__(
        self, decoder: Decoder, cache_bytes: int, batch_bytes: float = math.inf, max_pixels: int = MAX_PIXELS
    ) -> None:
        self.decoder = decoder
        self._batch_bytes, self._max_pixels = batch_bytes, max_pixels
        self.cache: dict[int, Tensor] = {}
        self._cache_left = cache_bytes
        self._stream = torch.cuda.Stream(decoder.device) if decoder.device.type == "cuda" else None

    def decode(
        self, read: Sequence[Sample | BadSample], decoded: Sequence[Sample] = ()
    ) -> tuple[list[Sample], list[BadSample]]:
        """Decode the good samples; those whose image cannot be decoded are added to the bad ones.

        Args:
            decoded: the samples of the same batch that have been decoded.

        Raises:
            UserError: the images of the batch would exceed the limit; nothing has been allocated.
        """
        samples, bad = partition(read)
        self._check_size(samples, decoded)
        missing = {sample.index: sample.scene.image for sample in samples if sample.index not in self.cache}
        with synchronised(self._stream):
            images = self._decode([*missing.values()])
        pixels = dict(zip(missing, images, strict=True))
        good = []
        for sample in samples:
            image = pixels[sample.index] if sample.index in pixels else self.cache[sample.index]
            if isinstance(image, DecodeError):
                bad.append(BadSample(sample.scene.key, image.reason, image.detail, sample.source))
                continue
            if sample.index not in self.cache and image.numel() <= self._cache_left:
                self.cache[sample.index] = _own_memory(image)
                self._cache_left -= image.numel()
            sample.scene.image = image
            good.append(sample)
        return good, bad

    def _check_size(self, samples: Sequence[Sample], decoded: Sequence[Sample]) -> None:
        """Compare the batch with its limit; cached images count too, since a batch must not depend on the cache."""
        if (len(samples) + len(decoded)) * self._max_pixels * 3 <= self._batch_bytes:
            return
        sizes = [(self._size(sample), sample) for sample in (*decoded, *samples)]
        total = sum(height * width * 3 for (height, width), _ in sizes)
        if total > self._batch_bytes:
            (height, width), largest = max(sizes, key=lambda found: math.prod(found[0]))
            where = f" of {largest.source}" if largest.source else ""
            limit = f"more than max_batch_gib = {self._batch_bytes / 2**30:g}"
            raise UserError(
                f"the decoded images of a batch of {len(sizes)} scenes take {total / 2**30:.3g} GiB, {limit}; the "
                f"largest, {largest.scene.key}{where}, has {width} x {height} pixels: pack the data set again with a "
                "lower --max-pixels or smaller images, lower data.batch_size, or raise data.max_batch_gib"
            )

    def _size(self, sample: Sample) -> tuple[int, int]:
        if sample.index in self.cache:
            height, width = self.cache[sample.index].shape[:2]
        elif isinstance(image := sample.scene.image, bytes):
            height, width = decoded_size(image, self._max_pixels)
        else:
            height, width = image.shape[:2]
        return height, width

    def _decode(self, images: list[Any]) -> list[Tensor | DecodeError]:
        try:
            return self.decoder.decode(images)
        except _FATAL:
            raise
        except Exception as error:
            if is_exhausted(error):
                raise exhausted_error(self.decoder.name) from error
            if len(images) > 1:  # find the image that caused the error
                return [self._decode([image])[0] for image in images]
            return [DecodeError("decoder_failed", f"{type(error).__name__}: {error}")]

    def close(self) -> None:
        """Release the decoder and the cache."""
        self.decoder.close()
        self.cache.clear()


def _own_memory(image: Tensor) -> Tensor:
    """Return the image, copied if it is a part of a larger allocation, which it would keep alive."""
    return image.clone() if image.untyped_storage().nbytes() > image.numel() else image


def partition(samples: Iterable[Sample | BadSample]) -> tuple[list[Sample], list[BadSample]]:
    """Separate good samples from bad ones."""
    good: list[Sample] = []
    bad: list[BadSample] = []
    for sample in samples:
        if isinstance(sample, BadSample):
            bad.append(sample)
        else:
            good.append(sample)
    return good, bad


@contextmanager
def synchronised(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Run GPU work on `stream` and wait for it on exit, so that other threads can use the results at once."""
    if stream is None:
        yield
        return
    with torch.cuda.stream(stream):
        yield
        stream.synchronize()
