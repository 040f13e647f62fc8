"""Evaluations on several gloo processes are bitwise equal to one process with all scenes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from scenarioclip_fast.data import Batch, Vocabulary
from scenarioclip_fast.distributed import World
from scenarioclip_fast.eval import features as features_module
from scenarioclip_fast.eval.features import embed_views, gather_features
from scenarioclip_fast.eval.negatives import hard_negatives
from scenarioclip_fast.eval.retrieval import retrieval
from scenarioclip_fast.eval.zeroshot import zeroshot
from scenarioclip_fast.levels import LEVELS

RELATIONS = [f"{a} {p} {b}" for a in ("cat", "dog") for p in ("on", "under", "in") for b in ("box", "car")]
VOCABULARY = Vocabulary(
    ["eat", "run", "sit"], ["cat", "dog", "box", "car"], RELATIONS, {"relation": dict.fromkeys(RELATIONS[::2], 1)}
)
RANKS = 3
# The rank of each scene. A rank may have no scenes, or none with a relation.
DEALS = ([0, 1, 2] * 7, [0, 2] * 10, [1] * 12, [0, 0, 1, 0, 0])


class Model:
    """Embeds a view by its pixels and a text by its tokens, independently of the rest of the batch."""

    def encode_image(self, pixels: Tensor, level: str) -> Tensor:
        return torch.stack([_vector(f"{level} {view[0, 0, 0].item()}") for view in pixels])

    def encode_text(self, texts: list[list[int]], level: str) -> Tensor:
        return torch.stack([_vector(f"{level} {text}") for text in texts])


def _vector(seed: str) -> Tensor:
    return torch.randn(6, generator=torch.Generator().manual_seed(sum(map(ord, seed))))


def scene(number: int) -> Batch:
    """One scene: two objects, and two relations for every other scene, with repeating texts."""
    relations = 2 * (number % 2)
    views = 3 + relations
    pixels = (10.0 * number + torch.arange(views)).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
    ids = ([number % 3], [number % 4, (number // 2) % 4], [(3 * number + k) % len(RELATIONS) for k in range(relations)])
    homes = (torch.zeros(2, dtype=torch.int64), torch.zeros(relations, dtype=torch.int64))
    return Batch(pixels, [f"{number:03}"], *homes, *(torch.tensor(i, dtype=torch.int64) for i in ids))


def empty() -> Batch:
    """The batch of a rank without scenes."""
    none = torch.zeros(0, dtype=torch.int64)
    return Batch(torch.zeros(0, 3, 1, 1), [], none, none, none, none, none)


def evaluate(batches: list[Batch], world: World) -> dict[str, Any]:
    model: Any = Model()
    options: dict[str, Any] = {"world": world, "show_progress": False}
    found: dict[str, Any] = {
        "zeroshot": zeroshot(model, batches, VOCABULARY, **options).to_dict(),
        "retrieval": retrieval(model, batches, VOCABULARY, topk=(1, 2), **options).to_dict(),
    }
    if any(len(batch.relation_id) for batch in batches) or world.size > 1:
        found["negatives"] = hard_negatives(model, batches, VOCABULARY, **options).to_dict()
    features = gather_features(embed_views(model, batches, show_progress=False), world)
    found["keys"] = features.keys
    for level, rows in features.levels.items():
        found[level] = [t.tolist() for t in (rows.image, rows.text_id, rows.scene)]
    return found


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    features_module._ROWS = 4  # several exchanges; in some of them, ranks have no rows left
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    try:
        world = World(rank, RANKS, torch.device("cpu"), dist.group.WORLD)
        for i, deal in enumerate(DEALS):
            own = [scene(number) for number, owner in enumerate(deal) if owner == rank]
            torch.save(evaluate(own or [empty()], world), f"{folder}/{i}-{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def test_ranks_equal_one_process(tmp_path: Path) -> None:
    mp.spawn(run, (str(tmp_path),), nprocs=RANKS)
    alone = World(0, 1, torch.device("cpu"), None)
    for i, deal in enumerate(DEALS):
        expected = evaluate([scene(number) for number in range(len(deal))], alone)
        assert expected["keys"] == [f"{number:03}" for number in range(len(deal))]
        assert set(LEVELS) < expected.keys()
        assert 0 < expected["zeroshot"]["rows"][0]["top"][1] < 1
        for rank in range(RANKS):
            found = torch.load(tmp_path / f"{i}-{rank}.pt")
            # features are gathered on rank 0 alone
            assert found.keys() == expected.keys() - (set(LEVELS) if rank else set())
            for name in found:
                assert found[name] == expected[name], (name, i, rank)


def test_order_of_batches_does_not_matter() -> None:
    alone = World(0, 1, torch.device("cpu"), None)
    scenes = [scene(number) for number in range(9)]
    assert evaluate(scenes[::-1], alone) == evaluate(scenes, alone)
