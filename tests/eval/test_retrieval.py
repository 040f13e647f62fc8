"""Recall compared with the full similarity matrix, which the code never builds."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from scenarioclip_fast.data import Batch, Vocabulary
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.eval import retrieval as module
from scenarioclip_fast.eval.retrieval import ranks, retrieval
from scenarioclip_fast.levels import LEVELS

Synthetic = Callable[..., tuple[Any, list[Batch], Vocabulary]]


def naive_ranks(model: Any, ids: torch.Tensor, level: str) -> tuple[list[int], list[int]]:
    """Ranks from 1 of each view and of each text of the split, by sorting the full matrix."""
    present = ids.unique()
    text = F.normalize(model.texts[level][present], dim=-1)
    scores = F.normalize(model.images[level], dim=-1) @ text.T
    by_view, by_text = [], []
    for row, own in zip(scores, ids.tolist(), strict=True):
        ranking = present[row.argsort(descending=True)].tolist()
        by_view.append(1 + ranking.index(own))
    for column, own in zip(scores.T, present.tolist(), strict=True):
        ranking = ids[column.argsort(descending=True)].tolist()
        by_text.append(1 + ranking.index(own))
    return by_view, by_text


@pytest.mark.parametrize("block", [1, 100, 1 << 24])
def test_equals_the_full_matrix(synthetic: Synthetic, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    model, batches, vocabulary = synthetic(30, seed=0, noise=1.5)
    model.train()
    result = retrieval(model, batches, vocabulary, topk=(3, 1), show_progress=False)
    assert model.training and model.modes == {False}
    assert (result.scenes, result.topk) == (30, (1, 3))
    rows = {(row.level, row.direction): row for row in result.rows}
    assert len(rows) == len(result.rows) == 6
    for level, name in zip(LEVELS, ("action_id", "object_id", "relation_id"), strict=True):
        ids = torch.cat([getattr(batch, name) for batch in batches])
        for direction, found, gallery in zip(
            ("image_to_text", "text_to_image"),
            naive_ranks(model, ids, level),
            (len(ids.unique()), len(ids)),
            strict=True,
        ):
            row = rows[level, direction]
            assert (row.queries, row.gallery) == (len(found), gallery)
            assert row.median_rank == statistics.median(found)
            assert row.recall == {k: sum(rank <= k for rank in found) / len(found) for k in (1, 3)}
    # All correct or all wrong would be a weak test.
    row = rows["object", "image_to_text"]
    assert row.chance[1] == pytest.approx(1 / row.gallery)
    assert row.chance[1] < row.recall[1] < row.recall[3] < 1


def test_chance_of_a_text_counts_all_its_views() -> None:
    vocabulary = Vocabulary(["a", "b"], [], [], {})
    none = torch.zeros(0, dtype=torch.int64)
    batch = Batch(torch.zeros(4, 3, 2, 2), list("wxyz"), none, none, torch.tensor([0, 0, 0, 1]), none, none)

    class Model:
        def encode_image(self, pixels: torch.Tensor, level: str) -> torch.Tensor:
            return torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.1]])

        def encode_text(self, texts: list[list[int]], level: str) -> torch.Tensor:
            return torch.eye(2)[: len(texts)]

    result = retrieval(Model(), [batch], vocabulary, topk=(1, 2), show_progress=False)
    to_text, to_image = result.rows
    # Views 0 to 2 have text a, but only view 0 resembles it; view 3 has text b, but resembles a.
    assert to_text.recall == {1: 0.25, 2: 1.0}
    assert to_text.median_rank == 2
    # Text a retrieves view 0 first; text b retrieves two views of a before its own.
    assert to_image.recall == {1: 0.5, 2: 0.5}
    assert (to_image.queries, to_image.gallery, to_image.median_rank) == (2, 4, 2)
    # Three of four views are correct for a, one for b.
    assert to_image.chance == {1: pytest.approx((3 / 4 + 1 / 4) / 2), 2: pytest.approx((1 + 2 / 4) / 2)}


@pytest.mark.parametrize("value", [0.0, 1.0, float("nan")])
def test_ties_count_against_the_model(value: float) -> None:
    index = torch.tensor([0, 1, 1, 2, 2, 2])
    to_text, to_image = ranks(torch.full((6, 4), value), torch.ones(3, 4), index)
    assert to_text.tolist() == [0, 0, 6]
    # Ranked after all views with another text.
    assert to_image.tolist() == [5, 4, 3]


def test_memory_is_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    views, texts, width, block = 3000, 500, 8, 20_000
    monkeypatch.setattr(module, "_BLOCK", block)

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                assert out.dtype is not torch.float64
                self.size = max(self.size, out.numel())
            return out

    image, text = (F.normalize(torch.randn(n, width), dim=-1) for n in (views, texts))
    index = torch.arange(views) % texts
    with Largest() as largest:
        ranks(image, text, index)
    # An N x U tensor would have 1.5 million elements.
    assert block * 0.9 < largest.size <= max(block, views * width)


def test_a_split_without_scenes(synthetic: Synthetic) -> None:
    model, _, vocabulary = synthetic(4, seed=0)
    with pytest.raises(UserError, match="no scenes"):
        retrieval(model, [], vocabulary, show_progress=False)


def test_embeddings_that_are_not_finite(synthetic: Synthetic) -> None:
    model, batches, vocabulary = synthetic(4, seed=0)
    model.images["object"][0] = float("inf")
    with pytest.raises(UserError, match=r"^1 of \d+ object embeddings are not finite"):
        retrieval(model, batches, vocabulary, show_progress=False)
    model.images["object"][0] = 1.0
    model.encode_text = lambda texts, level: torch.full((len(texts), 24), float("nan"))
    with pytest.raises(UserError, match=r"^(\d+) of \1 global text embeddings are not finite"):
        retrieval(model, batches, vocabulary, show_progress=False)


def test_table(synthetic: Synthetic) -> None:
    model, batches, vocabulary = synthetic(12, seed=1)
    result = retrieval(model, batches, vocabulary, topk=(1,), show_progress=False)
    lines = str(result).splitlines()
    assert len(lines) == 8
    assert lines[2].split()[:4] == ["action", "image", "to", "text"]
    assert f"{100 * result.rows[0].recall[1]:.1f} %" in lines[2]
