"""The scenes of a split, each once and in order, with the views of the evaluation; what cannot be used is named."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from scenarioclip_fast.data.batch import Batch
from scenarioclip_fast.data.config import LoaderConfig
from scenarioclip_fast.data.loader import SceneLoader
from scenarioclip_fast.data.shards import BadSample
from scenarioclip_fast.distributed import World
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.eval.zeroshot import ALONE

_NAMED = 3  # in a message
# A rank alone gives up early only here: what is too much is judged over all ranks, at the end.
_HOPELESS = 0.5


class LeftOut(NamedTuple):
    """A scene that could not be read, decoded or understood, with a short name for why, and in words."""

    split: str
    scene: str
    reason: str
    detail: str


class EvaluationLoader(SceneLoader):
    """One rank's share of a split.

    At the end of a pass the ranks tell each other which scenes they could not use. These join `left_out`, and the
    leading rank prints a line, once for each scene.

    Args:
        shards, batch_size, split, options: see `SceneLoader`.
        config: how scenes become pixels; never augmented. `max_bad_fraction` is checked over all ranks at the end of a
            pass.
        world: the ranks that share the split.
        left_out: the list to use, for several splits or passes.

    Raises:
        UserError: as `SceneLoader` does; at the end of a pass, too many bad scenes.
    """

    def __init__(
        self,
        shards: str | Path,
        batch_size: int,
        config: LoaderConfig = LoaderConfig(),  # noqa: B008
        *,
        split: str = "test",
        world: World = ALONE,
        left_out: list[LeftOut] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            shards,
            batch_size,
            replace(config, augment=False, max_bad_fraction=max(config.max_bad_fraction, _HOPELESS)),
            split=split,
            rank=world.rank,
            world_size=world.size,
            shuffle=False,
            drop_last=False,
            epochs=1,
            on_bad=self._record,
            **options,
        )
        self.left_out = [] if left_out is None else left_out
        self._split, self._world, self._tolerated = split, world, config.max_bad_fraction
        self._own: dict[str, LeftOut] = {}

    @property
    def decoder(self) -> str:
        """Which one "auto" has come to."""
        return type(self._decoder.decoder).__name__

    def __iter__(self) -> Iterator[Batch]:
        self._own.clear()
        yield from super().__iter__()
        found = sorted(scene for own in self._world.gather(list(self._own.values())) for scene in own)
        scenes = len(self.shards)
        if len(found) > self._tolerated * scenes:
            raise UserError(
                f"{len(found)} of the {scenes} scenes of the {self._split} split cannot be used, more than "
                f"max_bad_fraction = {self._tolerated:g}: {_named(found)}"
            )
        if new := sorted(set(found) - set(self.left_out)):
            self.left_out += new
            if self._world.is_main_process:
                about = f"{len(new)} of the {scenes} scenes of the {self._split} split cannot be used and are left out"
                print(f"warning: {about}: {_named(new)}", file=sys.stderr)

    def _record(self, epoch: int, samples: Sequence[BadSample]) -> None:
        self._own |= {bad.key: LeftOut(self._split, bad.key, bad.reason, bad.detail) for bad in samples}


def left_out_record(scenes: Sequence[LeftOut]) -> dict[str, Any]:
    """Ready for JSON."""
    return {"count": len(scenes), "scenes": [scene._asdict() for scene in scenes]}


def _named(scenes: Sequence[LeftOut]) -> str:
    shown = [f"{s.scene} ({s.reason}: {textwrap.shorten(s.detail, 100, placeholder='…')})" for s in scenes[:_NAMED]]
    return ", ".join(shown) + (f" and {len(scenes) - _NAMED} more" if len(scenes) > _NAMED else "")
