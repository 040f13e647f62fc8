"""Load a split for evaluation: every scene once, in order. Unusable scenes are skipped and reported."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from scenarioclip_fast.data.batch import Batch
from scenarioclip_fast.data.config import LoaderConfig, ShardsArgument, shard_sources
from scenarioclip_fast.data.loader import SceneLoader
from scenarioclip_fast.data.shards import BadSample
from scenarioclip_fast.distributed import World
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.eval.encoding import SINGLE_PROCESS
from scenarioclip_fast.terminal import warn

_MAX_LISTED = 3  # scenes listed in a message
# A single rank aborts only above this fraction; `max_bad_fraction` is checked over all ranks at the end.
_MAX_RANK_BAD_FRACTION = 0.5


class SkippedScene(NamedTuple):
    """A scene that could not be read, decoded or parsed: `reason` is an identifier, `detail` the error message."""

    split: str
    scene: str
    reason: str
    detail: str


class EvaluationLoader(SceneLoader):
    """Loads one rank's share of a split: every scene once, also of data sets with weights.

    At the end of a pass, the ranks exchange their skipped scenes: new ones are appended to `skipped`, and the main
    process prints a warning.

    Args:
        shards, batch_size, split, options: see `SceneLoader`.
        config: decoding, views and resources; `augment` is ignored. `max_bad_fraction` limits the skipped scenes of the
            split, and is checked over all ranks at the end of a pass.
        world: the ranks that share the split.
        skipped: list to which skipped scenes are appended; may be shared by several splits or passes.

    Raises:
        UserError: see `SceneLoader`; at the end of a pass, too many scenes were skipped.
    """

    def __init__(
        self,
        shards: ShardsArgument,
        batch_size: int,
        config: LoaderConfig = LoaderConfig(),  # noqa: B008
        *,
        split: str = "test",
        world: World = SINGLE_PROCESS,
        skipped: list[SkippedScene] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            [replace(source, weight=1.0) for source in shard_sources(shards)],
            batch_size,
            replace(config, augment=False, max_bad_fraction=max(config.max_bad_fraction, _MAX_RANK_BAD_FRACTION)),
            split=split,
            rank=world.rank,
            world_size=world.size,
            shuffle=False,
            drop_last=False,
            epochs=1,
            on_bad=self._record,
            **options,
        )
        self.skipped = [] if skipped is None else skipped
        self._split, self._world, self._max_bad_fraction = split, world, config.max_bad_fraction
        self._own: dict[str, SkippedScene] = {}

    def __iter__(self) -> Iterator[Batch]:
        self._own.clear()
        yield from super().__iter__()
        found = sorted(scene for own in self._world.gather(list(self._own.values())) for scene in own)
        scenes = len(self.shards)
        if len(found) > self._max_bad_fraction * scenes:
            raise UserError(
                f"{len(found)} of the {scenes} scenes of the {self._split} split cannot be used, more than "
                f"max_bad_fraction = {self._max_bad_fraction:g}: {_list_scenes(found)}"
            )
        if new := sorted(set(found) - set(self.skipped)):
            self.skipped += new
            if self._world.is_main_process:
                about = f"{len(new)} of the {scenes} scenes of the {self._split} split cannot be used and are skipped"
                warn(f"warning: {about}: {_list_scenes(new)}")

    def _record(self, epoch: int, samples: Sequence[BadSample]) -> None:
        for bad in samples:
            name = bad.key if bad.source is None else f"{bad.key} of {bad.source}"
            self._own[name] = SkippedScene(self._split, name, bad.reason, bad.detail)


def skipped_record(scenes: Sequence[SkippedScene]) -> dict[str, Any]:
    """Format skipped scenes as the `skipped` entry of a JSON result."""
    return {"count": len(scenes), "scenes": [scene._asdict() for scene in scenes]}


def _list_scenes(scenes: Sequence[SkippedScene]) -> str:
    shown = [
        f"{s.scene} ({s.reason}: {textwrap.shorten(s.detail, 100, placeholder='…')})" for s in scenes[:_MAX_LISTED]
    ]
    return ", ".join(shown) + (f" and {len(scenes) - _MAX_LISTED} more" if len(scenes) > _MAX_LISTED else "")
