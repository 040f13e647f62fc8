"""Load batches from packed shards onto the device, ahead of the training step."""

from __future__ import annotations

import inspect
import math
import weakref
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import islice
from typing import Any, Self, cast, get_args

import numpy as np
import torch
from torch import Tensor

from scenarioclip_fast import forks
from scenarioclip_fast.data.batch import Batch
from scenarioclip_fast.data.config import LoaderConfig, ShardsArgument, shard_sources
from scenarioclip_fast.data.decode import Decoder, make_decoder
from scenarioclip_fast.data.decode.base import thread_count
from scenarioclip_fast.data.mix import ShardMix
from scenarioclip_fast.data.order import Kind, Order
from scenarioclip_fast.data.prefetch import Prefetcher
from scenarioclip_fast.data.samples import Sample, SampleDecoder, SampleReader, partition, synchronised
from scenarioclip_fast.data.shards import BadSample
from scenarioclip_fast.data.slab import SlabPool
from scenarioclip_fast.data.views import Views
from scenarioclip_fast.data.vocabulary import Vocabulary
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.ops import render_views
from scenarioclip_fast.suggest import check_keywords

# Bad scenes tend to cluster, so their fraction is computed over at least this many scenes.
_MIN_SCENES = 256


def scene_loader(
    shards: ShardsArgument,
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
    """Open one or more packed data sets as an iterable of batches.

    Args:
        shards: directory written by `pack`, or its URL (see `ShardSet`); or for several data sets, a list of these, of
            `ShardSource`s, or of mappings such as {"path": "a", "weight": 2}.
        batch_size: scenes per batch of this rank.
        config: decoding, views and resources.
        device: where batches are rendered.
        seed: determines the order of scenes and the augmentation.
        rank, world_size: select this rank's share of each global batch of batch_size * world_size scenes.
        split: "train", "val" or "test".
        options: overrides of fields of `config`, such as `blur="reference"`, and further arguments of `SceneLoader`.

    Raises:
        UserError: see `LoaderConfig` and `SceneLoader`.
        TypeError: an unknown option.
    """
    check_keywords(
        "scene_loader", options, [*(f.name for f in fields(config)), *inspect.signature(SceneLoader).parameters]
    )
    plain = isinstance(options.get("shuffle"), bool)  # the argument of SceneLoader, not the field
    names = [f.name for f in fields(config) if f.name in options and not (plain and f.name == "shuffle")]
    changed = {name: options.pop(name) for name in names}
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

    All ranks together have consumed `position` scenes of the epoch's order. This rank has read `ahead` further scenes
    of its share, as replacements for bad ones.
    """

    epoch: int = 0
    position: int = 0
    ahead: int = 0


@dataclass
class EpochCursor:
    """Progress through this rank's share of an epoch.

    Attributes:
        taken: scenes read from the share since the start of the epoch, including bad ones.
        total: scenes in the share.
        bad: how many of those are bad.
        scenes: the rest of the share.
    """

    epoch: int
    taken: int
    total: int
    bad: int
    scenes: Iterator[Sample | BadSample]

    def take(self, n: int) -> list[Sample | BadSample]:
        """Return the next `n` scenes, or as many as remain."""
        taken = list(islice(self.scenes, n))
        self.taken += len(taken)
        return taken

    def bad_fraction(self) -> float:
        """The fraction of bad scenes, over at least 256 scenes if the epoch has that many."""
        return self.bad / max(self.taken, min(self.total, _MIN_SCENES), 1)


@dataclass(frozen=True)
class _Step:
    """Bookkeeping of one batch: the state after it, and the bad scenes found while gathering it."""

    epoch: int
    after: _State
    bad: list[BadSample]


class SceneLoader:
    """Iterates over the batches of one or more packed data sets, rendered on `device`.

    The order of scenes and their augmentation depend only on the seed, the epoch and the scene: threads, prefetching
    and resuming change no pixel. A scene that cannot be read, decoded or parsed is replaced by the next one of this
    rank's share; at the end of the share, the last batches are smaller instead. `bad` counts such scenes by reason, as
    their batches are yielded. On a CPU, later batches reuse the memory of pixels that no tensor or array refers to any
    more; `resize_` cannot enlarge it.

    Args:
        shards: directory written by `pack`, or its URL, or a list: see `scene_loader`. The attribute `shards` is their
            `ShardMix`.
        batch_size: scenes per batch of this rank.
        config: decoding, views and resources.
        split: "train", "val" or "test".
        device: where batches are rendered.
        seed: determines the order of scenes and the augmentation.
        rank, world_size: select this rank's share of each global batch of batch_size * world_size scenes.
        size: side of the views, in pixels.
        shuffle: in the order of `config.shuffle`; False: in the order of the index.
        drop_last: as in torch's DataLoader. Every rank gets the same number of batches either way; with
            `drop_last=False` a rank's last batch may be smaller than another's, or empty.
        epochs: an iteration ends at the next multiple of this many epochs. None: endless with `config.augment`, one
            epoch without.
        dtype, memory_format: of the pixels.
        on_bad: called in the consumer's thread, with the epoch and the bad scenes found for a batch, if any (see
            `BadSampleLog`).

    Raises:
        UserError: no packed data set, a malformed list, an empty split, fewer scenes than one global batch with
            `drop_last`, no masks although `config.relation_view` needs them, or the configured decoder does not work on
            `device`.
        MissingDependencyError: the package of the configured decoder is not installed or does not load.
    """

    def __init__(
        self,
        shards: ShardsArgument,
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
        self.shards = ShardMix(
            shard_sources(shards),
            split,
            shard_cache_dir=config.shard_cache_dir,
            shard_cache_gib=config.shard_cache_gib,
            verify=config.verify,
        )
        mix = self.shards.mix
        kind = (config.shuffle or "scenes") if shuffle else "none"
        self.order = Order(mix, batch_size, seed, rank, world_size, kind, drop_last, window=config.shuffle_window)
        if kind == "shards":
            self.order = replace(self.order, shards=self.shards.shard_scenes())
        self._balance = config.balance and shuffle  # without, ranks read every W-th scene, as evaluations expect
        if self._balance and world_size > 1:
            self.order = replace(self.order, views=self.shards.views())
        if len(self.order) == 0:
            scenes = f"{len(mix)} scenes{' per epoch' * mix.is_weighted}"
            raise UserError(
                f"{self.shards.source}: the {split} split has {scenes}, expected at least {self.order.global_batch} "
                "(one global batch): pack more scenes, or reduce the batch size"
            )
        self.shards.check_masks(config.relation_view)
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
        self._size, self._dtype, self._memory_format = size, dtype, memory_format
        self._slabs = SlabPool() if self.device.type == "cpu" else None
        # On a CPU, a batch prepared during a step would take the step's cores: 15 % of the time at the preset "tiny".
        ahead = 0 if self.device.type == "cpu" else 2
        self._prefetch = ahead if config.prefetch is None else config.prefetch
        threads = thread_count(config.threads)
        decoder = make_decoder(config.decoder, self.device, threads=threads, max_pixels=config.max_pixels)
        self._decoder = SampleDecoder(
            decoder, int(config.cache_gib * 2**30), config.max_batch_gib * 2**30, config.max_pixels
        )
        self._reader = SampleReader(self.shards, threads, need_masks=config.relation_view == "focused")
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._state = _State()
        self._closed = False
        # Weak, so that an abandoned iteration is garbage-collected and stops its threads.
        self._iteration: Callable[[], Generator[Batch, None, None] | None] = lambda: None
        forks.register(self)

    def _after_fork(self) -> None:
        self._iteration = lambda: None  # another thread may be running it in the parent

    def notes(self) -> list[str]:
        """What the scenes of the split lack, a line each, for logs."""
        count, split, scenes = self.shards.count, self.shards.split, len(self.shards)
        found = []
        if count("actions") == 0:
            found.append(f"no scene of the {split} split has an action: the global level has no texts")
        elif count("actions") < scenes:
            missing = scenes - count("actions")
            found.append(f"{missing} of {scenes} scenes of the {split} split have no action: they have no global text")
        without = count("relations") - count("masked_relations")
        if self.config.relation_view == "focused" and without > 0:
            found.append(
                f"{without} of {count('relations')} relations of the {split} split have no masks: they are left out, "
                "because data.relation_view=focused needs masks"
            )
        if (
            self.config.balance
            and self.order.shuffle != "none"
            and self.order.world_size > 1
            and self.order.views is None
        ):
            found.append(
                "data.balance=true has no effect: a data set was packed by an earlier version, or the run that is "
                "resumed was started by one"
            )
        return found

    @property
    def decoder(self) -> Decoder:
        """The decoder in use; `str` of it is one line for logs."""
        return self._decoder.decoder

    def __len__(self) -> int:
        """Batches per epoch, the same on every rank."""
        return len(self.order)

    def state_dict(self) -> dict[str, Any]:
        """The consumer's progress as plain values, excluding prefetched batches.

        Each rank has its own state, since ranks may have replaced different numbers of bad scenes.
        """
        order = self.order
        ranks = {"rank": order.rank, "world_size": order.world_size}
        data: dict[str, Any] = {"seed": order.seed, "scenes": order.scenes, "keys": self.shards.digest}
        data |= {"shuffle": order.shuffle, "balance": self._balance, "balanced_batch_size": self._balanced_batch_size}
        if order.shuffle == "shards":
            data["shuffle_window"] = order.window
        if len(self.shards.sets) > 1 or self.shards.mix.is_weighted:
            data["sets"] = self.shards.identities()
        return {**asdict(self._state), **ranks, **data}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume the next iteration from `state`.

        Exact on the rank that saved the state. On another rank, with another number of ranks, or if the ranks' shares
        are or were balanced, with another batch size, the global order resumes at the same position, but scenes that
        replaced bad ones may occur twice in that epoch.

        Raises:
            UserError: the state belongs to another seed or order, or to other data sets, weights or another order of
                the sets.
        """
        order = self.order
        if state["seed"] != order.seed:
            raise UserError(
                f"the saved loader state has seed {state['seed']}, this run has {order.seed}: resume with the same "
                "seed and shards, or start a new run"
            )
        alone = {"scenes": state["scenes"], "keys": state["keys"], "weight": 1}
        self.shards.check_identities(state.get("sets", [alone]))
        self._resume_order(state)
        share = state["rank"], state["world_size"], state.get("balanced_batch_size")
        same_share = share == (order.rank, order.world_size, self._balanced_batch_size)
        self._state = _State(state["epoch"], state["position"], state["ahead"] if same_share else 0)

    @property
    def _balanced_batch_size(self) -> int | None:
        """The batch size, on which balanced shares depend; None: they are not balanced."""
        return None if self.order.views is None else self.order.batch_size

    def _resume_order(self, state: Mapping[str, Any]) -> None:
        """Continue in the order of the saved state, unless the configuration asks for another."""
        self._balance = self._balance and state.get("balance", False)
        if not self._balance:
            self.order = replace(self.order, views=None)
        order = self.order
        saved, window = state.get("shuffle", "sorted"), state.get("shuffle_window", order.window)
        if "none" in (order.shuffle, saved):
            if "shuffle" in state and order.shuffle != saved:
                then, now = ("without" if kind == "none" else "with" for kind in (saved, order.shuffle))
                raise UserError(
                    f"the saved loader state is of a loader {then} shuffle, this one is {now}: a position means other "
                    "scenes; resume with the same argument"
                )
            return
        if saved not in get_args(Kind):
            raise UserError(
                f"the saved loader state has data.shuffle={saved}, which this version does not know: resume with the "
                "version that saved it"
            )
        if self.config.shuffle not in (None, saved):
            raise UserError(
                f"the saved loader state has data.shuffle={saved}, this run has {self.config.shuffle}: resume with "
                f"data.shuffle={saved}, or start a new run"
            )
        if saved == "shards" and self.config.shuffle is not None and window != order.window:
            raise UserError(
                f"the saved loader state has data.shuffle_window={window}, this run has {order.window}: resume with "
                f"data.shuffle_window={window}, or start a new run"
            )
        shards = self.shards.shard_scenes() if saved == "shards" else ()
        self.order = replace(order, shuffle=saved, window=window, shards=shards)

    def __iter__(self) -> Iterator[Batch]:
        """Iterate from the consumer's position. Starting a new iteration ends the previous one."""
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
        """Stop the threads, and release the decoder and the files. The loader cannot be reused."""
        self._closed = True
        self._end_iteration()
        self._reader.close()
        self._decoder.close()
        if self._slabs is not None:
            self._slabs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _deliver(self) -> Generator[Batch, None, None]:
        """Yield the batches of one iteration; consuming one advances the state and reports its bad scenes."""
        steps = self._plan(self._state)
        depth = self._prefetch
        origin = forks.Origin()
        with Prefetcher(steps, depth, self.shards.close) if depth else nullcontext(steps) as source:
            for step, build in source:
                self._report(step)
                batch = build()
                for tensor in batch.tensors:
                    if tensor.is_cuda:  # allocated on another stream, which must not reuse it while the consumer does
                        tensor.record_stream(torch.cuda.current_stream(tensor.device))
                self._state = step.after
                yield batch
                origin.check("this iteration", "begin another one")

    def _report(self, step: _Step) -> None:
        self.bad.update(sample.reason for sample in step.bad)
        if step.bad and self._on_bad is not None:
            self._on_bad(step.epoch, step.bad)

    def _plan(self, state: _State) -> Iterator[tuple[_Step, Callable[[], Batch]]]:
        """Yield steps, read and decoded, each with a function that renders its batch."""
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
                    build = partial(self._raise_too_many_bad, cursor, bad)
                yield _Step(cursor.epoch, state, bad), build
            state = _State(cursor.epoch + 1)

    def _open_epoch(self, state: _State) -> EpochCursor:
        share = self.order.share(state.epoch, state.position)
        consumed = len(range(self.order.rank, state.position, self.order.world_size))  # of this rank's share
        skipped = min(state.ahead, len(share))
        scenes = self._reader.read_ahead(share.skip(skipped), self.order.batch_size)
        return EpochCursor(state.epoch, consumed + skipped, consumed + len(share), state.ahead, scenes)

    def _gather(self, cursor: EpochCursor) -> tuple[list[Sample], Views, list[BadSample]]:
        """Gather the next batch of good scenes (fewer at the end of the share), and the bad ones found on the way."""
        samples: list[Sample] = []
        bad: list[BadSample] = []
        views = None
        while views is None:
            while not self._too_many_bad(cursor) and (read := cursor.take(self.order.batch_size - len(samples))):
                decoded, failed = self._decoder.decode(read, samples)
                samples += decoded
                bad += failed
                cursor.bad += len(failed)
            samples, views, failed = self._plan_views(samples, cursor.epoch)
            bad += failed
            cursor.bad += len(failed)
        return samples, views, bad

    def _too_many_bad(self, cursor: EpochCursor) -> bool:
        return cursor.bad_fraction() > self.config.max_bad_fraction

    def _raise_too_many_bad(self, cursor: EpochCursor, bad: list[BadSample]) -> Batch:
        last = f"; last: {bad[-1]}" if bad else ""
        raise UserError(
            f"{cursor.bad} of the {cursor.taken} scenes read in epoch {cursor.epoch} cannot be used, "
            f"more than max_bad_fraction = {self.config.max_bad_fraction:g}{last}"
        )

    def _plan_views(self, samples: list[Sample], epoch: int) -> tuple[list[Sample], Views | None, list[BadSample]]:
        """Plan the views of all samples; if any is invalid, return None and move those samples to the bad ones."""
        scenes, repetition = [sample.scene for sample in samples], [sample.repetition for sample in samples]
        try:
            return samples, self._make_views(scenes, epoch=epoch, repetition=repetition), []
        except ValueError:
            good, bad = partition(self._check_views(sample) for sample in samples)
            if not bad:
                raise
            return good, None, bad

    def _check_views(self, sample: Sample) -> Sample | BadSample:
        try:
            self._make_views([sample.scene])
        except ValueError as error:
            return BadSample(sample.scene.key, "bad_scene", str(error), sample.source)
        return sample

    def _build(self, samples: list[Sample], views: Views) -> Batch:
        """Render the views, and copy all tensors to the device."""
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
        with synchronised(self._stream), torch.no_grad():
            images = cast(list[Tensor], [sample.scene.image for sample in samples])
            pixels = render_views(
                images,
                views,
                size=self._size,
                blur=self.config.blur,
                dtype=self._dtype,
                memory_format=self._memory_format,
                out=self._lend_pixels(len(views)),
            ).to(self.device)
            host = tuple(torch.as_tensor(x, dtype=torch.int64) for x in index)
            tensors = [t.to(self.device) for t in host]
        return Batch(pixels, [sample.scene.key for sample in samples], *tensors, host=host)

    def _lend_pixels(self, views: int) -> Tensor | None:
        """Reused memory for a batch: page faults of new memory cost a fifth of rendering. None: a GPU's allocator."""
        if self._slabs is None:
            return None
        shape = (views, 3, self._size, self._size)
        slab = self._slabs.lend(math.prod(shape) * self._dtype.itemsize).view(self._dtype)
        if self._memory_format == torch.channels_last:
            return slab.view(views, self._size, self._size, 3).permute(0, 3, 1, 2)
        return slab.view(shape)
