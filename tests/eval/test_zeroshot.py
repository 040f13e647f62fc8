"""Zero-shot accuracies compared with a slow direct count, and chance levels with random rankings."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from scenarioclip_fast.data import Batch, Vocabulary
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.eval import encoding
from scenarioclip_fast.eval.ranking import random_hit_rate
from scenarioclip_fast.eval.zeroshot import MATCHES, ZeroShotResult, zeroshot
from scenarioclip_fast.levels import LEVELS

Synthetic = Callable[..., tuple[Any, list[Batch], Vocabulary]]


def direct_count(
    model: Any, batches: list[Batch], level: str, match: str, k: int, train_counts: list[int], subset: str
) -> tuple[int, float, float]:
    """Count views, accuracy and chance view by view."""
    hits, chances = [], []
    texts = nn.functional.normalize(model.texts[level], dim=-1)
    row = 0
    for batch in batches:
        ids, homes = {
            "global": (batch.action_id, torch.arange(batch.num_scenes)),
            "object": (batch.object_id, batch.object_scene),
            "relation": (batch.relation_id, batch.relation_scene),
        }[level]
        for own, home in zip(ids.tolist(), homes.tolist(), strict=True):
            image = nn.functional.normalize(model.images[level][row], dim=-1)
            row += 1
            if subset != "all" and (train_counts[own] > 0) != (subset == "seen"):
                continue
            right = {own} if match == "own" else set(ids[homes == home].tolist())
            hits.append(bool(right & set((texts @ image).topk(min(k, len(texts))).indices.tolist())))
            classes = len(texts)
            missed = math.comb(classes - len(right), k) / math.comb(classes, k) if k <= classes else 0.0
            chances.append(1 - missed)
    return len(hits), sum(hits) / len(hits), sum(chances) / len(chances)


@pytest.mark.parametrize("block", [1, 50, 1 << 24])
def test_equals_direct_count(synthetic: Synthetic, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_BLOCK", block)
    model, batches, vocabulary = synthetic(30, seed=0, noise=2.0)
    model.train()
    result = zeroshot(model, batches, vocabulary, topk=(5, 1, 3), show_progress=False)
    assert (result.scenes, result.topk) == (30, (1, 3, 5))
    assert model.modes == {False}
    assert model.training
    subsets = {"global": ["all"], "object": ["all"], "relation": ["all", "seen", "held_out"]}
    assert [(r.level, r.match, r.subset) for r in result.rows] == [
        (level, match, subset) for level in LEVELS for match in MATCHES for subset in subsets[level]
    ]
    for row in result.rows:
        for k in (1, 3, 5):
            counts = vocabulary.train_counts(row.level)
            views, accuracy, chance = direct_count(model, batches, row.level, row.match, k, counts, row.subset)
            assert row.views == views
            assert row.top[k] == pytest.approx(accuracy, abs=1e-12)
            assert row.chance[k] == pytest.approx(chance, abs=1e-12)
    # All correct or all wrong would not distinguish the rules.
    strict, loose = (result.get("object", match) for match in MATCHES)
    assert strict is not None and loose is not None
    assert strict.chance[1] < strict.top[1] < loose.top[1] < 1


@pytest.mark.parametrize(("k", "classes"), [(1, 7), (3, 7), (5, 7), (7, 7), (9, 7)])
def test_chance_equals_random_rankings(k: int, classes: int) -> None:
    right = torch.tensor([1, 1, 2, 4, 7])
    generator = torch.Generator().manual_seed(0)
    trials = 20_000
    order = torch.rand(trials, classes, generator=generator).argsort(1)[:, :k]
    measured = torch.stack([(order < m).any(1).double().mean() for m in right]).mean()
    # The standard error of the mean is below 0.5 / sqrt(20000) = 0.0035.
    assert random_hit_rate(k, classes, right) == pytest.approx(float(measured), abs=0.014)


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor created."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel())
        return out


def test_memory_is_one_block(lookup_model: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    objects, classes, block = 400, 900, 20_000
    monkeypatch.setattr(encoding, "_BLOCK", block)
    vocabulary = Vocabulary(["a"], map(str, range(classes)), [], {})
    model = lookup_model(vocabulary, {level: torch.randn(objects, 24) for level in LEVELS})
    ids = torch.arange(objects) % classes
    rows = torch.cat([torch.zeros(1), torch.arange(objects)]).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
    none, one = (torch.zeros(n, dtype=torch.int64) for n in (0, 1))
    batch = Batch(rows, ["scene"], torch.zeros(objects, dtype=torch.int64), none, one, ids, none)
    with Largest() as largest:
        zeroshot(model, [batch], vocabulary, show_progress=False)
    # A views x classes tensor would have 360,000 elements; the text embeddings have 21,600.
    assert largest.size <= max(block, classes * 24)


def test_chance_of_many_views_needs_little_memory() -> None:
    right = torch.arange(100_000) % 7 + 1
    expected = sum(1 - math.comb(50 - m, 10) / math.comb(50, 10) for m in right.tolist()) / 100_000
    with Largest() as largest:
        assert random_hit_rate(10, 50, right) == pytest.approx(expected, abs=1e-12)
    assert largest.size <= 100_000


def test_k_larger_than_the_number_of_classes(lookup_model: type[Any]) -> None:
    vocabulary = Vocabulary(["a", "b"], ["c"], [], {})
    pixels = torch.zeros(2, 3, 2, 2)
    none = torch.zeros(0, dtype=torch.int64)
    zero = torch.zeros(1, dtype=torch.int64)
    batch = Batch(pixels, ["scene"], zero, none, zero, zero, none)
    model = lookup_model(vocabulary, {level: torch.ones(1, 24) for level in LEVELS})
    result = zeroshot(model, [batch], vocabulary, topk=(1, 10), show_progress=False)
    action = result.get("global", subset="all")
    assert action is not None
    assert (action.top[10], action.chance[10], action.chance[1]) == (1.0, 1.0, 0.5)
    assert result.get("relation") is None
    # No text of this split is in the train split.
    assert result.get("global", subset="seen") is None
    held_out = result.get("global", subset="held_out")
    assert held_out is not None and held_out.views == 1


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_scores_are_never_correct(synthetic: Synthetic, value: float) -> None:
    model, batches, vocabulary = synthetic(10, seed=2)
    for table in model.images.values():
        table.fill_(value)
    model.encode_text = lambda texts, level: torch.ones(len(texts), 24)
    for row in zeroshot(model, batches, vocabulary, topk=(1,), show_progress=False).rows:
        assert row.top[1] == 0


def test_embeddings_that_are_not_finite(synthetic: Synthetic) -> None:
    model, batches, vocabulary = synthetic(10, seed=2)
    model.images["object"][3] = float("nan")
    with pytest.raises(UserError, match=r"^1 of \d+ object embeddings are not finite"):
        zeroshot(model, batches, vocabulary, show_progress=False)
    model.encode_text = lambda texts, level: torch.full((len(texts), 24), float("inf"))
    with pytest.raises(UserError, match=r"^6 of 6 global text embeddings are not finite"):
        zeroshot(model, batches, vocabulary, show_progress=False)


def test_nothing_to_evaluate(synthetic: Synthetic) -> None:
    model, _, vocabulary = synthetic(4, seed=0)
    with pytest.raises(UserError, match="no scenes"):
        zeroshot(model, [], vocabulary, show_progress=False)
    with pytest.raises(ValueError, match="topk"):
        zeroshot(model, [], vocabulary, topk=(0,), show_progress=False)


def test_a_failing_loader_restores_the_mode_of_the_model(synthetic: Synthetic) -> None:
    model, _, vocabulary = synthetic(4, seed=0)
    model.train()

    def broken() -> Iterator[Batch]:
        raise RuntimeError("disk")
        yield

    with pytest.raises(RuntimeError, match="disk"):
        zeroshot(model, broken(), vocabulary, show_progress=False)
    assert model.training


def test_result_survives_json_and_prints_a_table(synthetic: Synthetic) -> None:
    model, batches, vocabulary = synthetic(12, seed=1)
    result = zeroshot(model, batches, vocabulary, show_progress=False)
    assert ZeroShotResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    only = result.only("own")
    assert {row.match for row in only.rows} == {"own"}
    lines = str(only).splitlines()
    assert len(lines) == 2 + len(only.rows)
    assert lines[0].split()[:3] == ["task", "match", "texts"]
    assert "held-out" in lines[-1]
    relation = only.get("relation", subset="held_out")
    assert relation is not None
    assert f"{100 * relation.top[1]:.1f} %" in lines[-1]
