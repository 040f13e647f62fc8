"""Batches, as the loader yields them and the model consumes them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass(slots=True)
class Batch:
    """One rank's batch: B scenes with N_o objects and N_r relations, V = B + N_o + N_r views.

    Attributes:
        pixels: [V, 3, S, S], normalised; global, then object, then relation views.
        keys: [B], keys of the scenes.
        object_scene, relation_scene: int64 [N_o] and [N_r], the scene of each row.
        action_id, object_id, relation_id: int64 [B], [N_o] and [N_r], positions in the vocabulary; -1 for a scene
            without an action.
        host: CPU copies of the five index tensors, in this order, readable without synchronising with the device. By
            default they are copied from the device, which synchronises once.

    Raises:
        ValueError: the number of rows of `pixels` is not B + N_o + N_r, or that of `action_id` is not B.
    """

    pixels: Tensor  # [V, 3, S, S]
    keys: list[str]  # [B]
    object_scene: Tensor  # [N_o]
    relation_scene: Tensor  # [N_r]
    action_id: Tensor  # [B]
    object_id: Tensor  # [N_o]
    relation_id: Tensor  # [N_r]
    host: tuple[Tensor, ...] = field(default=(), repr=False, kw_only=True)

    def __post_init__(self) -> None:
        rows = (len(self.keys), self.object_id.shape[0], self.relation_id.shape[0])
        if self.pixels.shape[0] != sum(rows):
            raise ValueError(f"pixels: got {self.pixels.shape[0]} views, expected {rows[0]} + {rows[1]} + {rows[2]}")
        if self.action_id.shape[0] != rows[0]:
            raise ValueError(
                f"action_id: got {self.action_id.shape[0]} ids, expected one per scene, {rows[0]}: -1 for no action"
            )
        self.host = self.host or tuple(t.cpu() for t in self.tensors[1:])

    @property
    def num_scenes(self) -> int:
        return len(self.keys)

    @property
    def num_objects(self) -> int:
        return self.object_id.shape[0]

    @property
    def num_relations(self) -> int:
        return self.relation_id.shape[0]

    @property
    def host_ids(self) -> list[Tensor]:
        """Vocabulary ids of the three levels on the CPU: [N_a] of the scenes with an action, [N_o], [N_r]."""
        action, *others = self.host[2:]
        known = action.numpy() >= 0
        return [action if known.all() else torch.from_numpy(action.numpy()[known]), *others]

    @property
    def action_scene(self) -> Tensor | None:
        """The scenes that have an action, int64 [N_a] on the device of the batch; None: all of them."""
        known = self.host[2].numpy() >= 0
        if known.all():
            return None
        found = torch.from_numpy(np.flatnonzero(known))
        return found.pin_memory().to(self.pixels.device, non_blocking=True) if self.pixels.is_cuda else found

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, `pixels` first."""
        return (
            self.pixels,
            self.object_scene,
            self.relation_scene,
            self.action_id,
            self.object_id,
            self.relation_id,
        )

    def to(self, device: str | torch.device, non_blocking: bool = False) -> Batch:
        """Copy the batch to another device."""
        pixels, *index = (t.to(device, non_blocking=non_blocking) for t in self.tensors)
        return Batch(pixels, self.keys, *index, host=self.host)

    def split(self, parts: int) -> list[Batch]:
        """Split into `parts` microbatches of consecutive scenes; some are empty if there are fewer scenes.

        Sizes differ by at most one scene. Rows must be ordered by scene, as the loader yields them. Does not
        synchronise with the device.
        """
        scene_of_row = [torch.arange(self.num_scenes), *self.host[:2]]
        ends = torch.tensor([len(scenes) for scenes in scene_of_row[0].tensor_split(parts)]).cumsum(0)
        edges = [[0, *torch.searchsorted(scene, ends).tolist()] for scene in scene_of_row]
        levels = self.pixels.split([len(scene) for scene in scene_of_row])
        batches = []
        for k in range(parts):
            rows = [slice(edge[k], edge[k + 1]) for edge in edges]
            pixels = torch.cat([x[of_level] for x, of_level in zip(levels, rows, strict=True)])
            index, host = (_select_index(tensors, rows) for tensors in (self.tensors[1:], self.host))
            batches.append(Batch(pixels, self.keys[rows[0]], *index, host=tuple(host)))
        return batches


def _select_index(
    index: tuple[Tensor, ...],  # a batch's five index tensors
    rows: list[slice],  # scenes, objects and relations to select
) -> list[Tensor]:
    object_scene, relation_scene, *ids = index
    first = rows[0].start
    scenes = [object_scene[rows[1]] - first, relation_scene[rows[2]] - first]
    return scenes + [x[of_level] for x, of_level in zip(ids, rows, strict=True)]
