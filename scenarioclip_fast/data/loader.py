"""Packed shards -> batches on the device, prepared ahead of the training step."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from torch import Tensor

from scenarioclip_fast.data.batch import Batch
from scenarioclip_fast.data.config import LoaderConfig
from scenarioclip_fast.data.decode import make_decoder
from scenarioclip_fast.data.decode.base import thread_count
from scenarioclip_fast.data.order import Order
from scenarioclip_fast.data.prefetch import Prefetcher
from scenarioclip_fast.data.samples import Sample, SampleDecoder, SampleReader, partition, synchronized
from scenarioclip_fast.data.shards import BadSample, ShardSet
from scenarioclip_fast.data.views import Views
from scenarioclip_fast.data.vocabulary import Vocabulary
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.ops import render_views

# Bad scenes come in clusters, so their share is taken over at least this many scenes.
_MIN_JUDGED = 256


def scene_loader(
    shards: str | Path,
    batch_size: int,
    config: LoaderConfig = LoaderConfig(),  # noqa: B008
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    split: str = "train",
    **options: Any,
) -> SceneLoader:
    """Open a packed data set as an iterable of batches.

    Args:
        shards: directory written by `pack`, or its URL (see `ShardSet`).
        batch_size: scenes per batch of this rank.
        config: how scenes become pixels.
        device: where batches are made and delivered.
        seed: determines the order of scenes and the augmentation.
        rank, world_size: this rank's share of each global batch of batch_size * world_size scenes.
        split: "train", "val" or "test".
        options: fields of `config` to change, such as `blur="reference"`, and further arguments of `SceneLoader`.

    Raises:
        UserError: see `LoaderConfig` and `SceneLoader`.
        TypeError: an option that neither of them has.
    """
    changed = {f.name: options.pop(f.name) for f in fields(config) if f.name in options}
    return SceneLoader(
        shards,
        batch_size,
        replace(config, **changed),
        device=device,
        seed=seed,
        rank=rank,
        world_size=world_size,
        split=split,
        **options,
    )


@dataclass(frozen=True)
class _State:
    """The consumer's progress.

    All ranks together have consumed `position` scenes of the epoch's order, and this rank has taken `ahead` more of its
    share to replace as many bad ones.
    """

    epoch: int = 0
    position: int = 0
    ahead: int = 0


@dataclass
class EpochCursor:
    """Progress through this rank's share of an epoch.

    Attributes:
        drawn: scenes taken from the share since the epoch began, bad ones included.
        total: scenes in the share.
        bad: how many of the drawn scenes are bad.
        scenes: the rest of the share.
    """

    epoch: int
    drawn: int
    total: int
    bad: int
    scenes: Iterator[Sample | BadSample]

    def take(self, n: int) -> list[Sample | BadSample]:
        """Draw the next `n` scenes, or as many as are left."""
        taken = list(islice(self.scenes, n))
        self.drawn += len(taken)
        return taken

    def bad_fraction(self) -> float:
        """The share of bad scenes, among at least 256 where the epoch has as many."""
        return self.bad / max(self.drawn, min(self.total, _MIN_JUDGED), 1)


@dataclass(frozen=True)
class _Step:
    """What belongs to one delivered batch: the state after it, and the bad scenes found while gathering it."""

    epoch: int
    after: _State
    bad: list[BadSample]


class SceneLoader:
    """Batches of a packed data set, rendered on `device`.

    The order of scenes and every random number of their augmentation depend on the seed, the epoch and the scene alone:
    threads, prefetching and resuming change no pixel. A scene that cannot be read, decoded or understood is replaced by
    the next one of this rank's share; at the end of the share the last batches are shorter instead. `bad` counts such
    scenes by reason, as their batches are delivered.

    Args:
        shards: directory written by `pack`, or its URL (see `ShardSet`).
        batch_size: scenes per batch of this rank.
        config: how scenes become pixels.
        split: "train", "val" or "test".
        device: where batches are made and delivered.
        seed: determines the order of scenes and the augmentation.
        rank, world_size: this rank's share of each global batch of batch_size * world_size scenes.
        size: side of the views, in pixels.
        shuffle, drop_last: as in torch's DataLoader. Every rank gets the same number of batches either way; with
            `drop_last=False` a rank's last batch may be smaller than another's, or empty.
        epochs: an iteration ends at the next multiple of this many epochs. None: never with `config.augment`, after one
            epoch without.
        dtype, memory_format: of the pixels.
        on_bad: called with the epoch and the bad scenes of each batch that met any, in the consumer's thread (see
            `BadSampleLog`).

    Raises:
        UserError: no packed data set, an empty split, or fewer scenes than one global batch with `drop_last`.
        MissingDependencyError: the package of the configured decoder is not installed.
    """

    def __init__(
        self,
        shards: str | Path,
        batch_size: int,
        config: LoaderConfig = LoaderConfig(),  # noqa: B008
        *,
        split: str = "train",
        device: str | torch.device = "cpu",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        size: int = 224,
        shuffle: bool = True,
        drop_last: bool = True,
        epochs: int | None = None,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
        on_bad: Callable[[int, Sequence[BadSample]], None] | None = None,
    ) -> None:
        if epochs is not None and epochs < 1:
            raise ValueError(f"epochs: got {epochs}, expected at least 1, or None")
        self.config = config
        self.shards = ShardSet(
            shards, split, shard_cache_dir=config.shard_cache_dir, shard_cache_gib=config.shard_cache_gib
        )
        self.order = Order(len(self.shards), batch_size, seed, rank, world_size, shuffle, drop_last)
        if len(self.shards) == 0:
            raise UserError(f"{shards}: the {split} split holds no scenes: choose another split, or pack it with some")
        if len(self.order) == 0:
            raise UserError(
                f"{shards}: the {split} split has {len(self.shards)} scenes, expected at least "
                f"{self.order.global_batch}: pack more, or lower the batch size"
            )
        self.vocabulary: Vocabulary = self.shards.vocabulary
        self.device = torch.device(device)
        self.epochs = 1 if epochs is None and not config.augment else epochs
        self.bad: Counter[str] = Counter()
        self._on_bad = on_bad
        self._make_views = partial(
            Views.of_scenes,
            object_view=config.object_view,
            relation_view=config.relation_view,
            train=config.augment,
            seed=seed,
        )
        self._render = partial(render_views, size=size, blur=config.blur, dtype=dtype, memory_format=memory_format)
        threads = thread_count(config.threads)
        decoder = make_decoder(config.decoder, self.device, threads=threads, max_pixels=config.max_pixels)
        self._decoder = SampleDecoder(decoder, int(config.cache_gib * 2**30))
        self._reader = SampleReader(self.shards, threads)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._state = _State()
        self._closed = False
        # Weak, so that an iteration that its consumer abandons is collected and stops its threads.
        self._iteration: Callable[[], Generator[Batch, None, None] | None] = lambda: None

    def __len__(self) -> int:
        """Batches per epoch, the same on every rank."""
        return len(self.order)

    def state_dict(self) -> dict[str, int]:
        """The consumer's progress as plain integers; prefetched batches do not count.

        Each rank has its own state: ranks differ in how many bad scenes they have replaced.
        """
        order = self.order
        ranks = {"rank": order.rank, "world_size": order.world_size}
        return {**asdict(self._state), **ranks, "seed": order.seed, "scenes": order.scenes, "keys": self.shards.digest}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Make the next iteration continue where `state` was taken.

        Exact on the rank that took the state. On another rank, or with another number of ranks, the global order
        continues at the same position; only scenes that replaced bad ones may then come twice in that epoch.

        Raises:
            UserError: the state belongs to another order of scenes.
        """
        order = self.order
        for name, here in (("seed", order.seed), ("scenes", order.scenes)):
            if state[name] != here:
                raise UserError(
                    f"the saved loader state has {name} {state[name]}, this run has {here}: resume with "
                    "the same seed and shards, or start a new run"
                )
        if state["keys"] != self.shards.digest:
            raise UserError(
                f"{self.shards.source}: the saved loader state belongs to as many scenes, but other ones or in another "
                "order: resume with the same shards, or start a new run"
            )
        same_rank = (state["rank"], state["world_size"]) == (order.rank, order.world_size)
        self._state = _State(state["epoch"], state["position"], state["ahead"] if same_rank else 0)

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the consumer's position on. One iteration at a time: a new one ends the previous one."""
        if self._closed:
            raise RuntimeError("this loader is closed: create a new one")
        self._end_iteration()
        iteration = self._deliver()
        self._iteration = weakref.ref(iteration)
        return iteration

    def _end_iteration(self) -> None:
        if (iteration := self._iteration()) is not None:
            iteration.close()

    def close(self) -> None:
        """Stop the threads and release the decoder and the files. The loader cannot be used again."""
        self._closed = True
        self._end_iteration()
        self._reader.close()
        self._decoder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _deliver(self) -> Generator[Batch, None, None]:
        """The batches of one iteration; consuming one advances the state and reports its bad scenes."""
        steps = self._plan(self._state)
        depth = self.config.prefetch
        with Prefetcher(steps, depth, self.shards.close) if depth else nullcontext(steps) as source:
            for step, build in source:
                self._report(step)
                batch = build()
                for tensor in batch.tensors:
                    if tensor.is_cuda:  # made on another stream, which must not reuse it under the consumer's kernels
                        tensor.record_stream(torch.cuda.current_stream(tensor.device))
                self._state = step.after
                yield batch

    def _report(self, step: _Step) -> None:
        self.bad.update(sample.reason for sample in step.bad)
        if step.bad and self._on_bad is not None:
            self._on_bad(step.epoch, step.bad)

    def _plan(self, state: _State) -> Iterator[tuple[_Step, Callable[[], Batch]]]:
        """Read and decode one batch after the other; calling the function beside a step renders its batch."""
        order = self.order
        end = math.inf if self.epochs is None else (state.epoch // self.epochs + 1) * self.epochs
        while state.epoch < end:
            cursor = self._open_epoch(state)
            for left in reversed(range(order.batches(state.position))):
                samples, views, bad = self._gather(cursor)
                position = min(state.position + order.global_batch, order.scenes)
                state = _State(cursor.epoch, position, cursor.bad) if left else _State(cursor.epoch + 1)
                build = partial(self._build, samples, views)
                if self._too_many_bad(cursor):
                    build = partial(self._give_up, cursor, bad)
                yield _Step(cursor.epoch, state, bad), build
            state = _State(cursor.epoch + 1)

    def _open_epoch(self, state: _State) -> EpochCursor:
        share = self.order.share(state.epoch, state.position)
        consumed = len(range(self.order.rank, state.position, self.order.world_size))  # of this rank's share
        skipped = min(state.ahead, len(share))
        scenes = self._reader.read_ahead(share[skipped:], self.order.batch_size)
        return EpochCursor(state.epoch, consumed + skipped, consumed + len(share), state.ahead, scenes)

    def _gather(self, cursor: EpochCursor) -> tuple[list[Sample], Views, list[BadSample]]:
        """The next good scenes, a batch of them unless the share ends, and the bad ones met on the way."""
        samples: list[Sample] = []
        bad: list[BadSample] = []
        views = None
        while views is None:
            while not self._too_many_bad(cursor) and (read := cursor.take(self.order.batch_size - len(samples))):
                decoded, failed = self._decoder.decode(read)
                samples += decoded
                bad += failed
                cursor.bad += len(failed)
            samples, views, failed = self._plan_views(samples, cursor.epoch)
            bad += failed
            cursor.bad += len(failed)
        return samples, views, bad

    def _too_many_bad(self, cursor: EpochCursor) -> bool:
        return cursor.bad_fraction() > self.config.max_bad_fraction

    def _give_up(self, cursor: EpochCursor, bad: list[BadSample]) -> Batch:
        last = f"; the last one is {bad[-1]}" if bad else ""
        raise UserError(
            f"{cursor.bad} of the {cursor.drawn} scenes drawn in epoch {cursor.epoch} cannot be used, "
            f"more than max_bad_fraction = {self.config.max_bad_fraction:g}{last}"
        )

    def _plan_views(self, samples: list[Sample], epoch: int) -> tuple[list[Sample], Views | None, list[BadSample]]:
        """The views of all samples; or None, with the samples that do not fit their image moved to the bad ones."""
        try:
            return samples, self._make_views([sample.scene for sample in samples], epoch=epoch), []
        except ValueError:
            good, bad = partition(self._check_views(sample) for sample in samples)
            if not bad:
                raise
            return good, None, bad

    def _check_views(self, sample: Sample) -> Sample | BadSample:
        try:
            self._make_views([sample.scene])
        except ValueError as error:
            return BadSample(sample.scene.key, "bad_scene", str(error))
        return sample

    def _build(self, samples: list[Sample], views: Views) -> Batch:
        """Render the views, and copy everything to the device."""
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
        with synchronized(self._stream), torch.no_grad():
            images = cast(list[Tensor], [sample.scene.image for sample in samples])
            pixels = self._render(images, views).to(self.device)
            host = tuple(torch.as_tensor(x, dtype=torch.int64) for x in index)
            tensors = [t.to(self.device) for t in host]
        return Batch(pixels, [sample.scene.key for sample in samples], *tensors, host=host)
