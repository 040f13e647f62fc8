"""Hard negatives: never true of their image, independent of batching, and scored as by a direct count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from scenarioclip_fast.data import Batch, Vocabulary
from scenarioclip_fast.data.vocabulary import tokenize
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.eval import negatives as module
from scenarioclip_fast.eval.negatives import Triple, hard_negatives, make_negatives, parse_relations

Synthetic = Callable[..., tuple[Any, list[Batch], Vocabulary]]


def test_relations_are_parsed_by_the_longest_names() -> None:
    objects = ["light", "traffic light", "pole", "telephone pole", "man"]
    relations = ["man next to telephone pole", "traffic light on pole", "man pole", "dog on man", "man on dog"]
    found = dict(zip(sorted(relations), parse_relations(Vocabulary([], objects, relations)), strict=True))
    assert found == {
        "man next to telephone pole": Triple("man", "next to", "telephone pole"),
        "traffic light on pole": Triple("traffic light", "on", "pole"),
        "man pole": None,  # no predicate
        "dog on man": None,
        "man on dog": None,
    }


def test_a_negative_is_never_true_of_the_image() -> None:
    triple, predicates = Triple("cat", "on", "box"), ["beside", "in", "on", "under"]
    true = {"cat on box", "box on cat", "cat in box"}
    for number in range(20):
        found = make_negatives(triple, true, predicates, number)
        assert set(found) == {"predicate"}
        assert found["predicate"] in {"cat beside box", "cat under box"}
    assert make_negatives(triple, {"cat on box"}, ["on"]) == {"swapped": "box on cat"}
    assert make_negatives(Triple("cat", "on", "cat"), {"cat on cat"}, predicates, 0).keys() == {"predicate"}


def test_every_predicate_is_chosen() -> None:
    predicates = ["beside", "in", "on", "under"]
    counts = Counter(
        make_negatives(Triple("a", "on", "b"), {"a on b"}, predicates, 0, i)["predicate"] for i in range(600)
    )
    assert set(counts) == {"a beside b", "a in b", "a under b"}
    # Where "on" is chosen, "under" replaces it; the bound is six standard deviations below a quarter.
    assert min(counts.values()) > 150 - 6 * 10.6


@pytest.mark.parametrize("chunk", [3, 1 << 14])
def test_equals_direct_count(synthetic: Synthetic, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    model, batches, vocabulary = synthetic(40, seed=0, noise=3.0)
    result = hard_negatives(model, batches, vocabulary, seed=5, show_progress=False)
    triples = dict(zip(vocabulary.relations, parse_relations(vocabulary), strict=True))
    points: dict[str, list[bool]] = {"swapped": [], "predicate": []}
    row = 0
    for batch in batches:
        for i, home in zip(batch.relation_id.tolist(), batch.relation_scene.tolist(), strict=True):
            triple = triples[vocabulary.relations[i]]
            true = {vocabulary.relations[j] for j in batch.relation_id[batch.relation_scene == home].tolist()}
            other = "under" if triple.predicate == "on" else "on"
            negatives = {
                "swapped": f"{triple.object} {triple.predicate} {triple.subject}",
                "predicate": f"{triple.subject} {other} {triple.object}",
            }
            image = F.normalize(model.images["relation"][row], dim=-1)
            row += 1
            for kind, negative in negatives.items():
                if negative not in true:
                    texts = [tokenize(text) for text in (vocabulary.relations[i], negative)]
                    right, wrong = F.normalize(model.encode_text(texts, "relation"), dim=-1) @ image
                    points[kind].append(bool(right > wrong))
    assert result.relations == row
    for kind, own in points.items():
        found = result.get(kind)
        assert (found.questions, result.without[kind]) == (len(own), row - len(own))
        assert found.accuracy == sum(own) / len(own)
        assert 0.5 < found.accuracy < 1
        named = [r for r in result.predicates if r.kind == kind]
        assert {r.predicate for r in named} == {"on", "under"}
        assert sum(r.questions for r in named) == found.questions
        assert sum(r.questions * r.accuracy for r in named) == pytest.approx(sum(own))
    # Images with both predicates leave no other predicate.
    assert result.without["predicate"] > 0 == result.without["swapped"]


def test_negatives_do_not_depend_on_batching(synthetic: Synthetic) -> None:
    model, batches, _ = synthetic(40, seed=1)
    # With eight predicates, the choice could differ.
    words = ("cat on box", "dog under box", *(f"dog {i} car" for i in "abcdef"))
    texts = [f"{a} {w.split()[1]} {b}" for w in words for a in ("cat", "dog") for b in ("box", "car", "tree")]
    vocabulary = Vocabulary([], ["cat", "dog", "box", "car", "tree"], texts)
    first = hard_negatives(model, batches, vocabulary, show_progress=False)
    assert hard_negatives(model, batches[::-1], vocabulary, show_progress=False) == first
    assert hard_negatives(model, batches, vocabulary, seed=1, show_progress=False) != first


def test_random_embeddings_score_one_half(synthetic: Synthetic) -> None:
    model, batches, vocabulary = synthetic(20, seed=0)
    model.encode_text = lambda texts, level: torch.ones(len(texts), 24)
    for row in hard_negatives(model, batches, vocabulary, show_progress=False).rows:
        assert row.accuracy == 0.5


def test_embeddings_that_are_not_finite(synthetic: Synthetic) -> None:
    model, batches, vocabulary = synthetic(20, seed=0)
    model.encode_text = lambda texts, level: torch.full((len(texts), 24), float("nan"))
    with pytest.raises(UserError, match=r"^(\d+) of \1 relation text embeddings are not finite"):
        hard_negatives(model, batches, vocabulary, show_progress=False)


def test_no_relation_has_a_negative(synthetic: Synthetic) -> None:
    model, batches, _ = synthetic(20, seed=0)
    for batch in batches:
        batch.relation_id.zero_()
    vocabulary = Vocabulary([], ["cat"], ["cat on cat"])  # only one predicate, and swapping gives the same text
    with pytest.raises(UserError, match=r"none of the \d+ relations of the test split has a valid negative"):
        hard_negatives(model, batches, vocabulary, show_progress=False)


def test_no_relations(synthetic: Synthetic) -> None:
    model, _, vocabulary = synthetic(4, seed=0)
    with pytest.raises(UserError, match="no relations"):
        hard_negatives(model, [], vocabulary, show_progress=False)
