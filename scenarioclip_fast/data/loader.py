"""Packed shards -> batches on the device, ahead of the step, whatever single scenes do."""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scenarioclip_fast.data.batch import Batch
from scenarioclip_fast.data.decode import MAX_PIXELS, DecodeError, make_decoder
from scenarioclip_fast.data.order import Order
from scenarioclip_fast.data.remote import CACHE_GIB, Closed
from scenarioclip_fast.data.scene import Scene
from scenarioclip_fast.data.shards import BadSample, ShardSet
from scenarioclip_fast.data.views import Views
from scenarioclip_fast.data.vocabulary import Vocabulary
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.ops import render_views

__all__ = ["Batch", "SceneLoader", "scene_loader"]

_log = logging.getLogger(__name__)

# Bad scenes come in clusters: their share is judged over at least so many.
_JUDGED_OVER = 256
_REMOTE_READS = 32  # at a time
# No scene's fault: these end the run.
_FATAL = (MemoryError, ImportError, Closed)
# After so long, what a thread waits for is taken away from it.
_PATIENCE_S = 1.0


@dataclass(frozen=True)
class _State:
    """Where the consumer is.

    `position` scenes of the epoch's order are behind all ranks, and this rank has drawn `ahead` more of its
    share, one for each bad scene.
    """

    epoch: int = 0
    position: int = 0
    ahead: int = 0


@dataclass(frozen=True)
class _Sample:
    index: int
    scene: Scene
    action_id: int
    object_id: list[int]
    relation_id: list[int]


@dataclass
class _Walk:
    """Through this rank's share of an epoch."""

    epoch: int
    share: npt.NDArray[np.int64]
    at: int
    before: int  # scenes of this rank's that lie in front of the share
    bad: int
    scenes: Iterator[_Sample | BadSample]  # of the share from `at` on

    def take(self, n: int) -> list[_Sample | BadSample]:
        taken = list(islice(self.scenes, n))
        self.at += len(taken)
        return taken


@dataclass(frozen=True)
class _Step:
    """What one `next()` delivers: the state after it, the bad scenes on the way, the call that renders."""

    epoch: int
    after: _State
    bad: list[BadSample]
    batch: Callable[[], Batch]


class SceneLoader:
    """Batches of a packed data set, rendered on `device`.

    Which scenes come when, and every random number of their augmentation, is a function of the seed, the
    epoch and the scene alone: neither threads nor prefetching nor a resume changes a pixel. A scene that
    cannot be read, decoded or understood is replaced by the next one of this rank's share; where the share
    ends before the epoch does, the last batches are short. `bad` counts such scenes by reason, as delivered
    batches meet them.

    Args:
        shards: directory that `pack` wrote, or its URL (see `ShardSet`).
        batch_size: scenes per batch of this rank.
        split: "train", "val" or "test".
        device: where batches are made and delivered.
        decoder: "torch", "dali" or "auto" (see `decode.make_decoder`).
        seed: of the order and of the augmentation.
        rank, world_size: this rank's share of each global batch of batch_size * world_size scenes.
        size: of the views, in pixels.
        object_view: "masked" or "crop" (see `Views.of_scenes`).
        relation_view: "focused", "box" or "scene" (see `Views.of_scenes`).
        blur: of what lies outside a relation's masks, "rgb" or "reference".
        train: augmented views; False renders those of the evaluation.
        shuffle, drop_last: as everywhere. Every rank gets the same number of batches either way; with
            `drop_last=False` a rank's last batch may be smaller than another's, or empty.
        epochs: one iteration runs up to the next multiple of so many epochs. None: without end in training,
            one epoch otherwise.
        prefetch: batches made ahead of the consumer by background threads; 0: made when asked for.
        dtype, memory_format: of the pixels.
        threads: for reading and decoding; None: one per core, at most 16.
        max_pixels: larger images are refused by their header.
        max_bad_fraction: a larger share of bad scenes, among those this rank has drawn in an epoch, ends
            the run.
        bad_samples: file to which each bad scene is appended as a line of JSON.
        cache_bytes: how much memory (of `device`) decoded images may fill, for data sets that are seen often.
        shard_cache_dir, shard_cache_gib: where shards from a URL are kept on disk, and how much of it they may fill.

    Raises:
        UserError: no packed data set, an empty split, or fewer scenes than one global batch with `drop_last`.
    """

    def __init__(
        self,
        shards: str | Path,
        batch_size: int,
        *,
        split: str = "train",
        device: str | torch.device = "cpu",
        decoder: str = "auto",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        size: int = 224,
        object_view: str = "masked",
        relation_view: str = "focused",
        blur: str = "rgb",
        train: bool = True,
        shuffle: bool = True,
        drop_last: bool = True,
        epochs: int | None = None,
        prefetch: int = 2,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
        threads: int | None = None,
        max_pixels: int = MAX_PIXELS,
        max_bad_fraction: float = 0.1,
        bad_samples: str | Path | None = None,
        cache_bytes: int = 0,
        shard_cache_dir: str | Path | None = None,
        shard_cache_gib: float = CACHE_GIB,
    ) -> None:
        if epochs is not None and epochs < 1:
            raise ValueError(f"epochs: got {epochs}, expected at least 1, or None")
        if prefetch < 0:
            raise ValueError(f"prefetch: got {prefetch}, expected at least 0")
        self.shards = ShardSet(shards, split, shard_cache_dir=shard_cache_dir, shard_cache_gib=shard_cache_gib)
        self.order = Order(len(self.shards), batch_size, seed, rank, world_size, shuffle, drop_last)
        if len(self.shards) == 0:
            raise UserError(f"{shards}: the {split} split holds no scenes: take another split, or pack it with some")
        if len(self.order) == 0:
            raise UserError(
                f"{shards}: the {split} split has {len(self.shards)} scenes, expected at least "
                f"{self.order.global_batch}: pack more, or lower the batch size"
            )
        self.vocabulary: Vocabulary = self.shards.vocabulary
        self.device = torch.device(device)
        self.epochs = 1 if epochs is None and not train else epochs
        self.prefetch = prefetch
        self.max_bad_fraction = max_bad_fraction
        self.bad: Counter[str] = Counter()
        self._bad_samples = None if bad_samples is None else Path(bad_samples)
        self._make_views = partial(
            Views.of_scenes, object_view=object_view, relation_view=relation_view, train=train, seed=seed
        )
        self._render = partial(render_views, size=size, blur=blur, dtype=dtype, memory_format=memory_format)
        self._threads = threads or min(16, os.cpu_count() or 1)
        self._decoder = make_decoder(decoder, self.device, threads=self._threads, max_pixels=max_pixels)
        # What comes from afar is waited for, and costs no core.
        self._reading = max(_REMOTE_READS, self._threads) if self.shards.is_remote else self._threads
        self._readers = ThreadPoolExecutor(self._reading, "read")
        self._cache: dict[int, Tensor] = {}
        self._cache_left = cache_bytes
        on_gpu = self.device.type == "cuda"
        self._decoding, self._rendering = (torch.cuda.Stream(self.device) if on_gpu else None for _ in range(2))
        self._state = _State()
        self._closed = False
        # Weak, so that an iteration that is left early ends, threads and all.
        self._iteration: Callable[[], Generator[Batch, None, None] | None] = lambda: None

    def __len__(self) -> int:
        """Batches in an epoch, the same on every rank."""
        return len(self.order)

    def state_dict(self) -> dict[str, int]:
        """Where the consumer is; what is prefetched beyond that does not count. Plain integers.

        Each rank has a state of its own: ranks differ in how many scenes they have drawn in place of bad
            ones.
        """
        order = self.order
        ranks = {"rank": order.rank, "world_size": order.world_size}
        return {**asdict(self._state), **ranks, "seed": order.seed, "scenes": order.scenes, "keys": self.shards.digest}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Makes the next iteration continue where `state` was taken.

        Exact on the rank where it was taken. On another rank, or among another number of ranks, the global
        order goes on at the same position; only scenes drawn in place of bad ones may then come twice in
        that epoch.

        Raises:
            UserError: the state belongs to another order of scenes.
        """
        order = self.order
        for name, here in (("seed", order.seed), ("scenes", order.scenes)):
            if state[name] != here:
                raise UserError(
                    f"the saved state of the data has {name} {state[name]}, this run has {here}: resume with "
                    "the same seed and shards, or start a new run"
                )
        if state["keys"] != self.shards.digest:
            raise UserError(
                f"{self.shards.source}: as many scenes as in the saved state of the data, but others, or in another "
                "order: resume with the same shards, or start a new run"
            )
        same_rank = (state["rank"], state["world_size"]) == (order.rank, order.world_size)
        self._state = _State(state["epoch"], state["position"], state["ahead"] if same_rank else 0)

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the consumer's position on. One iteration at a time: a new one ends the one before."""
        if self._closed:
            raise RuntimeError("this loader has been closed; make a new one")
        self._end_iteration()
        iteration = self._deliver()
        self._iteration = weakref.ref(iteration)
        return iteration

    def _end_iteration(self) -> None:
        if (iteration := self._iteration()) is not None:
            iteration.close()

    def close(self) -> None:
        """Stops the threads and releases the decoder and the files. The loader cannot be used again."""
        self._closed = True
        self._end_iteration()
        self._readers.shutdown(wait=False, cancel_futures=True)
        self.shards.close()  # before its readers have ended: they may wait for a server that is silent
        self._readers.shutdown()
        self._decoder.close()
        self._cache.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _deliver(self) -> Generator[Batch, None, None]:
        steps = self._plan(self._state)
        with _Prefetcher(steps, self.prefetch, self.shards.close) if self.prefetch else nullcontext(steps) as source:
            for step in source:
                self._report(step)
                batch = step.batch()
                for tensor in batch.tensors:
                    if tensor.is_cuda:  # from a stream of ours, which must not reuse it under the consumer's kernels
                        tensor.record_stream(torch.cuda.current_stream(tensor.device))
                self._state = step.after
                yield batch

    def _report(self, step: _Step) -> None:
        self.bad.update(sample.reason for sample in step.bad)
        if step.bad and self._bad_samples is not None:
            records = [
                {"epoch": step.epoch, "key": bad.key, "reason": bad.reason, "detail": bad.detail} for bad in step.bad
            ]
            lines = "".join(json.dumps(record) + "\n" for record in records)
            try:
                self._bad_samples.parent.mkdir(parents=True, exist_ok=True)
                with self._bad_samples.open("a", encoding="utf-8") as file:
                    file.write(lines)
            except OSError as error:  # a full disk is no reason to stop: the list goes to the log instead
                _log.warning("%s not written: %s; it lacks\n%s", self._bad_samples, error, lines.rstrip())

    def _plan(self, state: _State) -> Iterator[_Step]:
        """Reads and decodes one batch after the other; rendering it is left to `_Step.batch`."""
        order = self.order
        end = math.inf if self.epochs is None else (state.epoch // self.epochs + 1) * self.epochs
        while state.epoch < end:
            share = order.share(state.epoch, state.position)
            before = len(range(order.rank, state.position, order.world_size))
            at = min(state.ahead, len(share))
            walk = _Walk(state.epoch, share, at, before, state.ahead, self._read_ahead(share[at:]))
            for left in reversed(range(order.batches(state.position))):
                samples, views, bad = self._gather(walk)
                position = min(state.position + order.global_batch, order.scenes)
                state = _State(walk.epoch, position, walk.bad) if left else _State(walk.epoch + 1)
                build = partial(self._build, samples, views)
                if self._too_many(walk):
                    build = partial(self._give_up, walk, bad)
                yield _Step(walk.epoch, state, bad, build)
            state = _State(walk.epoch + 1)

    def _gather(self, walk: _Walk) -> tuple[list[_Sample], Views, list[BadSample]]:
        """The next good scenes of the walk, a batch if there are as many, and the bad ones between them."""
        samples: list[_Sample] = []
        bad: list[BadSample] = []
        views = None
        while views is None:
            while not self._too_many(walk) and (read := walk.take(self.order.batch_size - len(samples))):
                decoded, failed = self._decode_all(read)
                samples += decoded
                bad += failed
                walk.bad += len(failed)
            samples, views, failed = self._plan_views(samples, walk.epoch)
            bad += failed
            walk.bad += len(failed)
        return samples, views, bad

    def _too_many(self, walk: _Walk) -> bool:
        drawn = max(walk.before + walk.at, min(walk.before + len(walk.share), _JUDGED_OVER))
        return walk.bad > self.max_bad_fraction * drawn

    def _give_up(self, walk: _Walk, bad: list[BadSample]) -> Batch:
        last = f"; the last one is {bad[-1]}" if bad else ""
        raise UserError(
            f"{walk.bad} of the {walk.before + walk.at} scenes drawn in epoch {walk.epoch} cannot be used, "
            f"more than max_bad_fraction = {self.max_bad_fraction:g}{last}"
        )

    def _read_ahead(self, share: npt.NDArray[np.int64]) -> Iterator[_Sample | BadSample]:
        """The scenes of `share`, read a batch ahead of the one that is being decoded."""
        batch = self.order.batch_size
        each = -(-batch // self._reading)  # one task a thread: a task a scene would cost more than the reads
        reads: deque[Future[list[_Sample | BadSample]]] = deque()
        for start in range(0, len(share), each):
            reads.append(self._readers.submit(self._read, share[start : start + each].tolist()))
            if len(reads) * each >= 2 * batch:
                yield from reads.popleft().result()
        for read in reads:
            yield from read.result()

    def _decode_all(self, read: list[_Sample | BadSample]) -> tuple[list[_Sample], list[BadSample]]:
        """Gives samples their images."""
        samples, bad = _split(read)
        missing = [sample for sample in samples if sample.index not in self._cache]
        with _finished_on(self._decoding):
            images = self._decode([sample.scene.image for sample in missing])
        decoded = {sample.index: image for sample, image in zip(missing, images, strict=True)}
        good = []
        for sample in samples:
            image = decoded[sample.index] if sample.index in decoded else self._cache[sample.index]
            if isinstance(image, DecodeError):
                bad.append(BadSample(sample.scene.key, image.reason, image.detail))
                continue
            if sample.index in decoded and image.numel() <= self._cache_left:
                # Kept for good: where every scene comes once an epoch, a newer one has no better claim.
                self._cache[sample.index] = image
                self._cache_left -= image.numel()
            sample.scene.image = image
            good.append(sample)
        return good, bad

    def _read(self, indices: list[int]) -> list[_Sample | BadSample]:
        return [self._read_one(index) for index in indices]

    def _read_one(self, index: int) -> _Sample | BadSample:
        key = self.shards.keys[index]
        try:
            scene = self.shards.read(index)
        except BadSample as bad:
            return bad
        except (UserError, *_FATAL):  # a UserError is about the cache of remote shards
            raise
        except Exception as error:  # whatever damaged bytes make a parser raise
            return BadSample(key, "unreadable", f"{type(error).__name__}: {error}")
        ids = self.vocabulary
        try:
            return _Sample(
                index,
                scene,
                ids.action_id(scene.action),
                [ids.object_id(o.name) for o in scene.objects],
                [ids.relation_id(scene.relation_text(k)) for k in range(len(scene.relations))],
            )
        except UserError as error:
            return BadSample(key, "unknown_text", str(error))

    def _decode(self, images: list[Any]) -> list[Tensor | DecodeError]:
        try:
            return self._decoder.decode(images)
        except _FATAL:
            raise
        except Exception as error:
            if len(images) > 1:  # on whose account?
                return [self._decode([image])[0] for image in images]
            return [DecodeError("decoder_failed", f"{type(error).__name__}: {error}")]

    def _plan_views(self, samples: list[_Sample], epoch: int) -> tuple[list[_Sample], Views | None, list[BadSample]]:
        """The views of all samples; None, and the samples told apart, where a scene does not fit its image."""
        try:
            return samples, self._make_views([sample.scene for sample in samples], epoch=epoch), []
        except ValueError:
            good, bad = _split(self._checked(sample) for sample in samples)
            if not bad:
                raise
            return good, None, bad

    def _checked(self, sample: _Sample) -> _Sample | BadSample:
        try:
            self._make_views([sample.scene])
        except ValueError as error:
            return BadSample(sample.scene.key, "bad_scene", str(error))
        return sample

    def _build(self, samples: list[_Sample], views: Views) -> Batch:
        """Renders, and puts everything on the device."""
        objects = [len(sample.object_id) for sample in samples]
        relations = [len(sample.relation_id) for sample in samples]
        rows = np.arange(len(samples))
        index = (
            np.repeat(rows, objects),
            np.repeat(rows, relations),
            [sample.action_id for sample in samples],
            [i for sample in samples for i in sample.object_id],
            [i for sample in samples for i in sample.relation_id],
        )
        with _finished_on(self._rendering), torch.no_grad():
            images = cast(list[Tensor], [sample.scene.image for sample in samples])
            pixels = self._render(images, views).to(self.device)
            host = tuple(torch.as_tensor(x, dtype=torch.int64) for x in index)
            tensors = [t.to(self.device) for t in host]
        return Batch(pixels, [sample.scene.key for sample in samples], *tensors, host=host)


scene_loader = SceneLoader


class _Prefetcher:
    """Runs `steps` in a thread, and the batch of each in another, at most `depth` finished ones ahead.

    `interrupt` makes reads fail that still wait for a server when nobody wants them any more.
    """

    def __init__(self, steps: Iterator[_Step], depth: int, interrupt: Callable[[], None]) -> None:
        self._interrupt = interrupt
        self._ready: queue.Queue[_Step | BaseException | None] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._renderer = ThreadPoolExecutor(1, "render")
        self._thread = threading.Thread(target=self._run, args=(steps,), name="load", daemon=True)
        self._thread.start()

    def _run(self, steps: Iterator[_Step]) -> None:
        try:
            for step in steps:
                if not self._put(replace(step, batch=self._renderer.submit(step.batch).result)):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: _Step | BaseException | None) -> bool:
        if not self._stopped.is_set():
            self._ready.put(item)
        return not self._stopped.is_set()

    def __iter__(self) -> Iterator[_Step]:
        return self

    def __next__(self) -> _Step:
        while True:
            try:
                item = self._ready.get(timeout=1.0)
                break
            except queue.Empty:
                if not self._thread.is_alive() and self._ready.empty():
                    raise RuntimeError("the loader's thread has died without a word") from None
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        return item

    def __enter__(self) -> Iterator[_Step]:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        while not self._ready.empty():  # makes room for a thread that waits to put its last item
            self._ready.get_nowait()
        self._thread.join(_PATIENCE_S)
        if self._thread.is_alive():
            self._interrupt()
            self._thread.join()
        self._renderer.shutdown(cancel_futures=True)


def _split(loaded: Iterable[_Sample | BadSample]) -> tuple[list[_Sample], list[BadSample]]:
    samples: list[_Sample] = []
    bad: list[BadSample] = []
    for item in loaded:
        if isinstance(item, BadSample):
            bad.append(item)
        else:
            samples.append(item)
    return samples, bad


@contextmanager
def _finished_on(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """GPU work goes to `stream` and is done on leaving, so that threads can hand tensors over freely."""
    if stream is None:
        yield
        return
    with torch.cuda.stream(stream):
        yield
        stream.synchronize()
