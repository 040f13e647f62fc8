"""Several packed data sets, read as one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from scenarioclip_fast.data.config import ShardSource
from scenarioclip_fast.data.order import Mix
from scenarioclip_fast.data.remote import CACHE_GIB
from scenarioclip_fast.data.scene import Scene
from scenarioclip_fast.data.shards import BadSample, ShardSet, digest
from scenarioclip_fast.data.vocabulary import Vocabulary
from scenarioclip_fast.errors import UserError


class ShardMix:
    """The scenes of one split of several packed data sets, set by set, with a common vocabulary.

    Like a ShardSet, it may be shared by threads and pickled. Several sets may contain the same key.

    Args:
        sources: at least one data set.
        split: "train", "val" or "test". Only in "train" must every set have scenes.
        shard_cache_dir, shard_cache_gib, verify: see `ShardSet`. The sets share the cache.

    Attributes:
        sets: the data sets.
        mix: how often their scenes occur in an epoch.

    Raises:
        UserError: see `ShardSet`; or no scenes, or a weight that leaves none of a set's scenes.
        MissingDependencyError: see `ShardSet`.
    """

    def __init__(
        self,
        sources: Sequence[ShardSource],
        split: str = "train",
        *,
        shard_cache_dir: str | Path | None = None,
        shard_cache_gib: float = CACHE_GIB,
        verify: bool = False,
    ) -> None:
        options: dict[str, Any] = {"shard_cache_dir": shard_cache_dir, "shard_cache_gib": shard_cache_gib}
        self.split = split
        self.sets = [ShardSet(source.path, split, verify=verify, **options) for source in sources]
        self.mix = Mix(tuple(map(len, self.sets)), tuple(source.weight for source in sources))
        self.is_remote = any(shards.is_remote for shards in self.sets)
        self._first = [0, *accumulate(self.mix.sizes)]
        empty = [shards.source for shards in self.sets if not len(shards)]
        if empty and (split == "train" or not len(self)):
            where = ", ".join(empty)
            raise UserError(f"{where}: the {split} split has no scenes: choose another split, or pack more scenes")
        for shards, weight, count in zip(self.sets, self.mix.weights, self.mix.counts, strict=True):
            if len(shards) and not count:
                raise UserError(
                    f"{shards.source}: a weight of {weight:g} leaves none of the {len(shards)} scenes of the {split} "
                    "split: raise it, or remove the data set"
                )

    def __len__(self) -> int:
        """Number of scenes, each counted once."""
        return self._first[-1]

    def key(self, i: int) -> str:
        """The key of scene `i`."""
        number = self._set(i)
        return self.sets[number].keys[i - self._first[number]]

    @property
    def source(self) -> str:
        """The path of the set, or all paths."""
        return ", ".join(shards.source for shards in self.sets)

    def source_of(self, i: int) -> str | None:
        """The path of the set of scene `i`, if there are several sets."""
        return self.sets[self._set(i)].source if len(self.sets) > 1 else None

    def read(self, i: int) -> Scene:
        """Read scene `i`: see `ShardSet.read`.

        Raises:
            BadSample: the scene is missing, truncated or malformed.
        """
        number = self._set(i)
        try:
            return self.sets[number].read(i - self._first[number])
        except BadSample as bad:
            bad.source = self.source_of(i)
            raise

    def shard_scenes(self) -> tuple[npt.NDArray[np.int64], ...]:
        """The number of scenes of each shard of each set."""
        return tuple(shards.shard_scenes for shards in self.sets)

    def views(self) -> npt.NDArray[np.uint8] | None:  # [scenes]
        """How many objects and relations each scene has, at most 255; None: a set was packed without."""
        found = [shards.views for shards in self.sets]
        known = [views for views in found if views is not None]
        if len(known) < len(found):
            return None
        return known[0] if len(known) == 1 else np.concatenate(known)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary of all sets: see `Vocabulary.merge`."""
        return Vocabulary.merge([shards.read_vocabulary() for shards in self.sets], self.mix.weights)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "vocabulary"}  # read again

    @cached_property
    def digest(self) -> int:
        """Checksum of the keys of all sets in order: see `ShardSet.digest`."""
        if len(self.sets) == 1:
            return self.sets[0].digest
        return digest(f"{shards.digest:08x}" for shards in self.sets)

    def count(self, name: str) -> int:
        """A count of the split over all sets, each once: see `ShardSet.count`."""
        return sum(shards.count(name) for shards in self.sets)

    def check_masks(self, relation_view: str) -> None:
        """Raise UserError if `relation_view` needs masks, and no relation has any."""
        relations, masked = self.count("relations"), self.count("masked_relations")
        if relation_view == "focused" and relations and not masked:
            raise UserError(
                f"{self.source}: none of the {relations} relations of the {self.split} split has masks, which "
                "data.relation_view=focused needs: choose box or scene (eval and inspect: --relation-view), or pack "
                "the scenes with masks"
            )

    def repetition(self, i: int, number: int) -> int:
        """A number for occurrence `number` of scene `i` in an epoch that differs from any other occurrence of its key.

        It is 0 for the first one.
        """
        if len(self.sets) == 1:
            return number
        own = self._set(i)
        key = self.key(i)
        return number * len(self.sets) + sum(shards.find(key) is not None for shards in self.sets[:own])

    def identities(self) -> list[dict[str, Any]]:
        """Plain values of each set for a saved state: its path, number of scenes, contents and weight."""
        return [
            {
                "path": shards.source,
                "scenes": len(shards),
                "keys": shards.digest,
                "shards": shards.content_digest,
                "weight": weight,
            }
            for shards, weight in zip(self.sets, self.mix.weights, strict=True)
        ]

    def check_identities(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Compare the `identities` of a saved state with those of these sets.

        Raises:
            UserError: they differ; the message says in what.
        """
        current = self.identities()
        remedy = "resume with the same data sets, in the same order and with the same weights, or start a new run"

        def paths(sets: Sequence[Mapping[str, Any]]) -> str:
            return ", ".join(entry["path"] for entry in sets if "path" in entry)

        def describe(sets: Sequence[Mapping[str, Any]]) -> str:
            count = "one data set" if len(sets) == 1 else f"{len(sets)} data sets"
            return f"{count} ({paths(sets)})" if paths(sets) else count

        def contents(entry: Mapping[str, Any]) -> tuple[Any, ...]:
            return entry["scenes"], entry["keys"], entry.get("shards")

        if len(saved) != len(current):
            raise UserError(f"the saved loader state has {describe(saved)}, this run has {describe(current)}: {remedy}")
        then, now = [contents(entry) for entry in saved], [contents(entry) for entry in current]
        if then != now and sorted(then, key=str) == sorted(now, key=str):
            raise UserError(
                f"the saved loader state has the data sets in the order {paths(saved)}, this run has {paths(current)}: "
                f"{remedy}"
            )
        for before, entry in zip(saved, current, strict=True):
            path = entry["path"]
            if before["scenes"] != entry["scenes"]:
                raise UserError(
                    f"{path}: the saved loader state has {before['scenes']} scenes, this run has {entry['scenes']}: "
                    f"{remedy}"
                )
            if before["keys"] != entry["keys"] or before.get("shards", entry["shards"]) != entry["shards"]:
                raise UserError(
                    f"{path}: the saved loader state belongs to other scenes or to another order of the same number of "
                    f"scenes: {remedy}"
                )
            if before["weight"] != entry["weight"]:
                raise UserError(
                    f"{path}: the saved loader state has weight {before['weight']:g}, this run has "
                    f"{entry['weight']:g}: {remedy}"
                )

    def describe(self) -> list[str]:
        """A line for each set: path, scenes, weight, and scenes per epoch."""
        return [
            f"data: {shards.source}: {len(shards)} scenes, weight {weight:g}, {count} per epoch"
            for shards, weight, count in zip(self.sets, self.mix.weights, self.mix.counts, strict=True)
        ]

    def views_per_scene(self, need_masks: bool = False) -> float:
        """The mean number of views of a scene over an epoch, by the manifests.

        need_masks: leave out relations without masks.
        """
        relations = "masked_relations" if need_masks else "relations"
        views = 0.0
        for shards, size, count in zip(self.sets, self.mix.sizes, self.mix.counts, strict=True):
            views += (shards.count("objects") + shards.count(relations)) * (count / max(size, 1))
        return 1 + views / len(self.mix)

    def close(self) -> None:
        """Close the files of all sets and stop fetching; the next read reopens them."""
        for shards in self.sets:
            shards.close()

    def _set(self, i: int) -> int:
        return bisect_right(self._first, i) - 1
