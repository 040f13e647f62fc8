"""What the loader hands to the model."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True)
class Batch:
    """One rank's batch: B scenes with N_o objects and N_r relations, V = B + N_o + N_r views.

    pixels: [V, 3, S, S], the global, then the object, then the relation views, normalised
    keys: B scene keys
    object_scene [N_o], relation_scene [N_r]: int64, the scene of each row
    action_id [B], object_id [N_o], relation_id [N_r]: int64, positions in the vocabulary
    host: the five index tensors on the CPU, in this order, so that nobody waits for the device to read them. Left out:
        copied, which waits once
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
        """Vocabulary ids of the three levels, on the CPU: [B], [N_o], [N_r]."""
        return list(self.host[2:])

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
        return Batch(pixels, self.keys, *index, host=self.host)

    def split(self, parts: int) -> list[Batch]:
        """The scenes in `parts` runs of nearly equal length, some of them empty where there are fewer scenes.

        Rows must come scene by scene, as a loader makes them. Does not wait for the device.
        """
        homes = [torch.arange(self.num_scenes), *self.host[:2]]
        ends = torch.tensor([len(run) for run in homes[0].tensor_split(parts)]).cumsum(0)
        edges = [[0, *torch.searchsorted(home, ends).tolist()] for home in homes]
        levels = self.pixels.split([len(home) for home in homes])
        batches = []
        for k in range(parts):
            runs = [slice(edge[k], edge[k + 1]) for edge in edges]
            scenes, objects, relations = runs
            pixels = torch.cat([x[run] for x, run in zip(levels, runs, strict=True)])
            index, host = (
                [
                    o[objects] - scenes.start,
                    r[relations] - scenes.start,
                    *(x[run] for x, run in zip(ids, runs, strict=True)),
                ]
                for o, r, *ids in (self.tensors[1:], self.host)
            )
            batches.append(Batch(pixels, self.keys[scenes], *index, host=tuple(host)))
        return batches
