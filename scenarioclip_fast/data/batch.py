"""What the loader hands to the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class Batch:
    """One rank's batch: B scenes with N_o objects and N_r relations, V = B + N_o + N_r views.

    pixels: [V, 3, S, S], the global, then the object, then the relation views, normalised
    keys: B scene keys
    object_scene [N_o], relation_scene [N_r]: int64, the scene of each row
    action_id [B], object_id [N_o], relation_id [N_r]: int64, positions in the vocabulary
    """

    pixels: Tensor  # [V, 3, S, S]
    keys: list[str]  # [B]
    object_scene: Tensor  # [N_o]
    relation_scene: Tensor  # [N_r]
    action_id: Tensor  # [B]
    object_id: Tensor  # [N_o]
    relation_id: Tensor  # [N_r]

    def __post_init__(self) -> None:
        rows = (len(self.keys), self.object_id.shape[0], self.relation_id.shape[0])
        if self.pixels.shape[0] != sum(rows):
            raise ValueError(f"pixels: got {self.pixels.shape[0]} views, expected {rows[0]} + {rows[1]} + {rows[2]}")

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
        """The same batch on another device."""
        pixels, *index = (t.to(device, non_blocking=non_blocking) for t in self.tensors)
        return Batch(pixels, self.keys, *index)
