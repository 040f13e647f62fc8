"""Common setup of evaluations: a trained model, a packed data set and the ranks that share the work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from scenarioclip_fast.data.config import LoaderConfig, ShardsArgument, shard_sources
from scenarioclip_fast.data.shards import ShardSet, digest
from scenarioclip_fast.data.vocabulary import Vocabulary
from scenarioclip_fast.distributed import World, join_world
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.eval.checkpoint import OpenedCheckpoint, Weights, open_checkpoint
from scenarioclip_fast.eval.encoding import SINGLE_PROCESS
from scenarioclip_fast.eval.loading import EvaluationLoader, SkippedScene
from scenarioclip_fast.model import ScenarioCLIP, TokenTable
from scenarioclip_fast.suggest import check_keywords
from scenarioclip_fast.terminal import warn
from scenarioclip_fast.train import agreement
from scenarioclip_fast.train.config import DataSection

# Ranks wait for one another at the end of their shares, which may take different times.
_TIMEOUT_S = 3600.0
# The run's values may suit another machine; and each scene is read once, so a cache is useless.
_LOADING = {"threads": LoaderConfig.threads, "prefetch": LoaderConfig.prefetch, "cache_gib": 0.0}


@dataclass(frozen=True)
class Session:
    """An open checkpoint, a data set and the settings for reading it.

    Attributes:
        data: data settings of the training run, with the caller's overrides.
        skipped: scenes skipped so far, on all ranks.
    """

    trained: OpenedCheckpoint
    shards: ShardsArgument
    world: World
    batch_size: int
    data: DataSection
    vocabulary: Vocabulary
    skipped: list[SkippedScene] = field(default_factory=list)

    @property
    def model(self) -> ScenarioCLIP:
        return self.trained.model

    def scenes(self, split: str) -> int:
        """Number of scenes in a split."""
        return sum(len(ShardSet(source.path, split)) for source in shard_sources(self.shards))

    def loader(self, split: str, *, whole: bool = False) -> EvaluationLoader:
        """Open this rank's share of a split, or with `whole`, the whole split. Scenes are in order.

        Raises:
            UserError: the data set has no such split, or the split has no scenes.
        """
        return EvaluationLoader(
            self.shards,
            self.batch_size,
            self.data,
            split=split,
            world=SINGLE_PROCESS if whole else self.world,
            # Passes over the whole split only select sample scenes, so their skipped scenes are not reported.
            skipped=[*self.skipped] if whole else self.skipped,
            device=self.world.device,
            size=self.model.config.vision.image_size,
        )


@contextmanager
def open_session(
    checkpoint: str | Path,
    shards: ShardsArgument,
    *,
    weights: Weights = "student",
    device: str = "auto",
    batch_size: int = 64,
    **overrides: Any,
) -> Iterator[Session]:
    """Open `checkpoint` and `shards`, on every rank under torchrun, otherwise in this process.

    Reports texts of the data set that exceed the model's context length.

    Args:
        checkpoint, weights: see `open_checkpoint`.
        shards: directory written by `pack`, or its URL, or a list (see `scene_loader`), whose weights are ignored.
        device: auto, cpu, cuda or cuda:N.
        batch_size: scenes per batch and rank.
        overrides: fields of `LoaderConfig`, except augment, that replace those of the training run; None keeps the
            run's value.

    Raises:
        UserError: no such checkpoint, data set or device, or the texts do not match the model.
        TypeError: an unknown override.
    """
    known = [f.name for f in fields(LoaderConfig) if f.name != "augment"]  # evaluations never augment
    check_keywords("open_session", overrides, known)
    if batch_size < 1:
        raise UserError(f"batch size: got {batch_size}, expected at least 1")
    same = {"the batch size": batch_size, "the choice of weights": weights, **agreement.loading(overrides)}
    with join_world(device, _TIMEOUT_S, same=same) as world:
        trained = open_checkpoint(checkpoint, world.device, weights)
        given = {name: value for name, value in overrides.items() if value is not None}
        data = replace(trained.data, **(_LOADING | given))
        sets = [ShardSet(source.path) for source in shard_sources(shards)]
        vocabularies = [opened.vocabulary for opened in sets]
        vocabulary = Vocabulary.merge(vocabularies, [1.0] * len(vocabularies))
        cut = TokenTable(vocabulary, trained.model.config.text).describe_truncated()
        if cut and world.is_main_process:
            warn(cut)
        session = Session(trained, shards, world, batch_size, data, vocabulary)
        if world.size > 1:
            _compare_ranks(world, session, sets)
        yield session


def _compare_ranks(world: World, session: Session, sets: list[ShardSet]) -> None:
    world.check_same(agreement.weights(session.model), f"CHECKPOINT: {agreement.SAME_WEIGHTS}")
    world.check_same(agreement.loading(asdict(session.data)))
    world.check_same(agreement.backends(world.device.type), agreement.SAME_BACKENDS)
    manifests = [f"{digest([json.dumps(shards.manifest['splits'])]):08x}" for shards in sets]
    contents = {"the checksum of the contents of SHARDS": manifests, **agreement.vocabulary(session.vocabulary)}
    world.check_same(contents, agreement.SAME_DATA)
