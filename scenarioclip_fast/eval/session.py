"""What every evaluation starts from: one trained model, one packed data set, and this process's place among ranks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from scenarioclip_fast.data.loader import SceneLoader
from scenarioclip_fast.data.shards import ShardSet
from scenarioclip_fast.data.vocabulary import Vocabulary
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.eval.checkpoint import Trained, open_checkpoint, pick_device
from scenarioclip_fast.eval.zeroshot import ALONE, evaluation_loader
from scenarioclip_fast.model import ScenarioCLIP, TokenTable
from scenarioclip_fast.train.distributed import World, join_world

# Ranks meet at the end of their shares, to which some come late.
_PATIENCE_S = 3600.0


@dataclass(frozen=True)
class Session:
    """An open checkpoint and how its data are read."""

    trained: Trained
    shards: str | Path
    world: World
    batch_size: int
    decoder: str
    object_view: str
    relation_view: str
    vocabulary: Vocabulary

    @property
    def model(self) -> ScenarioCLIP:
        return self.trained.model

    def scenes(self, split: str) -> int:
        """How many scenes a split has."""
        return len(ShardSet(self.shards, split))

    def loader(self, split: str, *, whole: bool = False) -> SceneLoader:
        """This rank's share of a split, in order; or the whole of it.

        UserError where the data set has no such split or no scene in it.
        """
        return evaluation_loader(
            self.shards,
            self.batch_size,
            split=split,
            device=self.world.device,
            decoder=self.decoder,
            size=self.model.config.vision.image_size,
            object_view=self.object_view,
            relation_view=self.relation_view,
            world=ALONE if whole else self.world,
        )


@contextmanager
def open_session(
    checkpoint: str | Path,
    shards: str | Path,
    *,
    weights: Literal["student", "teacher"] = "student",
    device: str = "auto",
    batch_size: int = 64,
    decoder: str = "auto",
    object_view: str | None = None,
    relation_view: str | None = None,
) -> Iterator[Session]:
    """Opens `checkpoint` on every rank that torchrun started, or in this process alone.

    Says so where texts of the data set are too long for the model.

    Args:
        checkpoint, weights: as `open_checkpoint` takes them.
        shards: directory that `pack` wrote.
        device: auto, cpu, cuda or cuda:N.
        batch_size: scenes at a time, of each rank.
        decoder: as `scene_loader` takes it.
        object_view, relation_view: as `scene_loader` takes them; None: as the model was trained.

    Raises:
        UserError: no such checkpoint, data set or device, or texts that do not fit the model.
    """
    if batch_size < 1:
        raise UserError(f"batch size: got {batch_size}, expected at least 1")
    pick_device(device)
    with join_world(device, _PATIENCE_S) as world:
        trained = open_checkpoint(checkpoint, world.device, weights)
        views = (object_view or trained.object_view or "masked", relation_view or trained.relation_view or "focused")
        vocabulary = ShardSet(shards).vocabulary
        cut = TokenTable(vocabulary, trained.model.config.text).describe_truncated()
        if cut and world.leads:
            print(cut, file=sys.stderr)
        yield Session(trained, shards, world, batch_size, decoder, *views, vocabulary)
