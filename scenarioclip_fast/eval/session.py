"""What every evaluation starts from: one trained model, one packed data set, and this process's place among ranks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from scenarioclip_fast.data.config import LoaderConfig
from scenarioclip_fast.data.shards import ShardSet
from scenarioclip_fast.data.vocabulary import Vocabulary
from scenarioclip_fast.distributed import World, join_world
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.eval.checkpoint import Trained, open_checkpoint, pick_device
from scenarioclip_fast.eval.loading import EvaluationLoader, LeftOut
from scenarioclip_fast.eval.zeroshot import ALONE
from scenarioclip_fast.model import ScenarioCLIP, TokenTable
from scenarioclip_fast.train.config import DataSection

# Ranks meet at the end of their shares, to which some come late.
_PATIENCE_S = 3600.0
# Not those of the run, which may have had another machine; and every scene is read once, so that a cache is useless.
_LOADING = {"threads": LoaderConfig.threads, "prefetch": LoaderConfig.prefetch, "cache_gib": 0.0}


@dataclass(frozen=True)
class Session:
    """An open checkpoint and the data set to evaluate it on.

    data: the settings of the model's run, with the overrides of this evaluation

    left_out: scenes that could not be used in any pass so far, of all ranks
    """

    trained: Trained
    shards: str | Path
    world: World
    batch_size: int
    data: DataSection
    vocabulary: Vocabulary
    left_out: list[LeftOut] = field(default_factory=list)

    @property
    def model(self) -> ScenarioCLIP:
        return self.trained.model

    def scenes(self, split: str) -> int:
        """How many scenes a split has."""
        return len(ShardSet(self.shards, split))

    def loader(self, split: str, *, whole: bool = False) -> EvaluationLoader:
        """This rank's share of a split, in order; or the whole of it.

        UserError where the data set has no such split or no scene in it.
        """
        return EvaluationLoader(
            self.shards,
            self.batch_size,
            self.data,
            split=split,
            world=ALONE if whole else self.world,
            # pictures are of some scenes: what these passes meet is no part of a result
            left_out=[*self.left_out] if whole else self.left_out,
            device=self.world.device,
            size=self.model.config.vision.image_size,
        )


@contextmanager
def open_session(
    checkpoint: str | Path,
    shards: str | Path,
    *,
    weights: Literal["student", "teacher"] = "student",
    device: str = "auto",
    batch_size: int = 64,
    **overrides: Any,
) -> Iterator[Session]:
    """Opens `checkpoint` on every rank that torchrun started, or in this process alone.

    Says so where texts of the data set are too long for the model.

    Args:
        checkpoint, weights: as `open_checkpoint` takes them.
        shards: directory that `pack` wrote.
        device: auto, cpu, cuda or cuda:N.
        batch_size: scenes at a time, of each rank.
        overrides: fields of `LoaderConfig` that replace those of the model's run; None keeps the run's value.

    Raises:
        UserError: no such checkpoint, data set or device, or texts that do not fit the model.
    """
    if batch_size < 1:
        raise UserError(f"batch size: got {batch_size}, expected at least 1")
    pick_device(device)
    with join_world(device, _PATIENCE_S) as world:
        trained = open_checkpoint(checkpoint, world.device, weights)
        given = {name: value for name, value in overrides.items() if value is not None}
        data = replace(trained.data, **(_LOADING | given))
        vocabulary = ShardSet(shards).vocabulary
        cut = TokenTable(vocabulary, trained.model.config.text).describe_truncated()
        if cut and world.is_main_process:
            print(cut, file=sys.stderr)
        yield Session(trained, shards, world, batch_size, data, vocabulary)
