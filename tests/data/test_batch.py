from __future__ import annotations

import pytest
import torch

from scenarioclip_fast.data import Batch


def make(objects: list[int], relations: list[int]) -> Batch:
    """A batch whose pixels and ids are row numbers."""
    scene = torch.arange(len(objects))
    counts = (len(objects), sum(objects), sum(relations))
    rows = torch.arange(sum(counts))
    return Batch(
        rows.float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2),
        [f"scene {i}" for i in scene],
        scene.repeat_interleave(torch.tensor(objects)),
        scene.repeat_interleave(torch.tensor(relations)),
        *rows.split(counts),
    )


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_split_keeps_rows_with_their_scene(parts: int) -> None:
    whole = make([2, 0, 3, 1], [1, 4, 0, 2])
    split = whole.split(parts)
    assert len(split) == parts
    assert [key for part in split for key in part.keys] == whole.keys
    first = 0
    for part in split:
        ids = torch.cat([part.action_id, part.object_id, part.relation_id])
        torch.testing.assert_close(part.pixels[:, 0, 0, 0], ids.float())
        for name in ("object", "relation"):
            scene, expected = getattr(part, f"{name}_scene"), getattr(whole, f"{name}_scene")
            inside = (expected >= first) & (expected < first + part.num_scenes)
            torch.testing.assert_close(scene + first, expected[inside])
            torch.testing.assert_close(getattr(part, f"{name}_id"), getattr(whole, f"{name}_id")[inside])
        assert all(torch.equal(a, b) for a, b in zip(part.host, part.tensors[1:], strict=True))
        first += part.num_scenes
    assert first == whole.num_scenes


def test_moving_a_batch_keeps_the_host_index() -> None:
    batch = make([1, 1], [0, 1])
    assert all(a is b for a, b in zip(batch.host, batch.tensors[1:], strict=True))
    moved = batch.to("meta")
    assert moved.object_id.is_meta and torch.equal(moved.host_ids[1], batch.object_id)


def test_every_scene_has_an_action_id() -> None:
    """Ids of the scenes with an action alone would be taken for those of the first scenes."""
    good = make([1, 1], [0, 0])
    with pytest.raises(ValueError, match="action_id: got 1 ids, expected one per scene, 2: -1 for no action"):
        Batch(*good.tensors[:1], good.keys, *good.tensors[1:3], good.action_id[:1], *good.tensors[4:])
