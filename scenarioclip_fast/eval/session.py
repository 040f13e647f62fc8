"""What every evaluation starts from: one trained model, one packed data set, and this process's place among ranks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

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


@dataclass(frozen=True)
class Session:
    """An open checkpoint and how its data are read: `data` is that of the model's run, with what was asked for instead.

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
        data = self.data
        return EvaluationLoader(
            self.shards,
            self.batch_size,
            split=split,
            world=ALONE if whole else self.world,
            # pictures are of some scenes: what these passes meet is no part of a result
            left_out=[*self.left_out] if whole else self.left_out,
            device=self.world.device,
            decoder=data.decoder,
            size=self.model.config.vision.image_size,
            object_view=data.object_view,
            relation_view=data.relation_view,
            blur=data.blur,
            max_pixels=data.max_pixels,
            max_bad_fraction=data.max_bad_fraction,
            shard_cache_dir=data.shard_cache_dir,
            shard_cache_gib=data.shard_cache_gib,
        )


@contextmanager
def open_session(
    checkpoint: str | Path,
    shards: str | Path,
    *,
    weights: Literal["student", "teacher"] = "student",
    device: str = "auto",
    batch_size: int = 64,
    decoder: str | None = None,
    object_view: str | None = None,
    relation_view: str | None = None,
    blur: str | None = None,
    shard_cache_dir: str | Path | None = None,
    shard_cache_gib: float | None = None,
) -> Iterator[Session]:
    """Opens `checkpoint` on every rank that torchrun started, or in this process alone.

    Says so where texts of the data set are too long for the model.

    Args:
        checkpoint, weights: as `open_checkpoint` takes them.
        shards: directory that `pack` wrote.
        device: auto, cpu, cuda or cuda:N.
        batch_size: scenes at a time, of each rank.
        decoder, object_view, relation_view, blur, shard_cache_dir, shard_cache_gib: as `scene_loader` takes them; None:
            as the model was trained.

    Raises:
        UserError: no such checkpoint, data set or device, or texts that do not fit the model.
    """
    if batch_size < 1:
        raise UserError(f"batch size: got {batch_size}, expected at least 1")
    pick_device(device)
    with join_world(device, _PATIENCE_S) as world:
        trained = open_checkpoint(checkpoint, world.device, weights)
        asked: dict[str, Any] = {
            "decoder": decoder,
            "object_view": object_view,
            "relation_view": relation_view,
            "blur": blur,
            "shard_cache_dir": shard_cache_dir and str(shard_cache_dir),
            "shard_cache_gib": shard_cache_gib,
        }
        data = replace(trained.data, **{name: value for name, value in asked.items() if value is not None})
        vocabulary = ShardSet(shards).vocabulary
        cut = TokenTable(vocabulary, trained.model.config.text).describe_truncated()
        if cut and world.is_main_process:
            print(cut, file=sys.stderr)
        yield Session(trained, shards, world, batch_size, data, vocabulary)
