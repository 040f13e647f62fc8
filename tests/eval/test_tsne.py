"""t-SNE maps of embeddings."""

from __future__ import annotations

import sys

import pytest
import torch

from scenarioclip_fast.data import Vocabulary
from scenarioclip_fast.errors import MissingDependencyError, UserError
from scenarioclip_fast.eval import tsne as module
from scenarioclip_fast.eval.features import Features, LevelFeatures
from scenarioclip_fast.eval.tsne import embedding_map

VOCABULARY = Vocabulary([], ["bird", "cat", "dog", "fish", "owl"], [], {})
COUNTS = [20, 6, 40, 1, 0]  # of each


def make(noise: float, counts: list[int] = COUNTS) -> Features:
    ids = torch.repeat_interleave(torch.tensor(counts))
    generator = torch.Generator().manual_seed(0)
    image = 3 * torch.eye(16)[ids] + noise * torch.randn(len(ids), 16, generator=generator)
    order = torch.randperm(len(ids), generator=generator)
    rows = LevelFeatures(image[order], ids[order], torch.arange(len(ids)))
    return Features([f"scene {i}" for i in range(len(ids))], {"object": rows})


def test_views_of_a_class_cluster() -> None:
    pytest.importorskip("sklearn")
    features = make(0.2)
    found = embedding_map(features, VOCABULARY, classes=3)
    assert found.classes == ["dog", "bird", "cat"]
    assert [found.label.count(i) for i in range(3)] == [40, 20, 6]
    assert found.agreement == 1
    assert found.chance == pytest.approx((40 * 39 + 20 * 19 + 6 * 5) / (66 * 65))
    place, label = torch.tensor([found.x, found.y]).T, torch.tensor(found.label)
    centres = torch.stack([place[label == i].mean(0) for i in range(3)])
    assert torch.equal(torch.cdist(place, centres).argmin(1), label)
    ids = features.levels["object"].text_id.tolist()
    assert [VOCABULARY.objects[ids[int(key.split()[1])]] for key in found.keys] == [
        found.classes[i] for i in found.label
    ]
    again = embedding_map(features, VOCABULARY, classes=3)
    assert (again.x, again.y) == (found.x, found.y)


def test_frequent_classes_do_not_crowd_out_the_others() -> None:
    pytest.importorskip("sklearn")
    found = embedding_map(make(0.2), VOCABULARY, classes=3, views=30)
    assert [found.label.count(i) for i in range(3)] == [10, 10, 6]


@pytest.mark.parametrize(
    ("classes", "views"), [(20, 26), (4, 10), (20, 10)]
)  # there are four classes; ten views suffice
def test_views_are_divided_among_existing_classes(classes: int, views: int) -> None:
    pytest.importorskip("sklearn")
    found = embedding_map(make(0.2, [20, 9, 40, 8, 0]), VOCABULARY, classes=classes, views=views)
    assert found.classes == ["dog", "bird", "cat", "fish"]
    assert [found.label.count(i) for i in range(4)] == ([7, 7, 6, 6] if views == 26 else [3, 3, 2, 2])


def test_equal_embeddings() -> None:
    pytest.importorskip("sklearn")
    features = make(0.2)
    features.levels["object"].image[:] = torch.eye(16)[3]
    with pytest.raises(UserError, match="all 67 object embeddings have the same direction"):
        embedding_map(features, VOCABULARY)


def test_1nn_accuracy_without_structure_is_chance() -> None:
    image = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    nearest = module._nearest(torch.nn.functional.normalize(image, dim=-1))
    assert not (nearest == torch.arange(4000)).any()
    label = torch.arange(4000) % 4
    # A quarter, within five standard deviations.
    assert float((label[nearest] == label).float().mean()) == pytest.approx(0.25, abs=5 * 0.007)


def test_too_little_to_map() -> None:
    pytest.importorskip("sklearn")
    with pytest.raises(UserError, match="classes: got 1"):
        embedding_map(make(0.2), VOCABULARY, classes=1)
    with pytest.raises(UserError, match=r"seed: got -1, expected 0 to 2\^32 - 1"):
        embedding_map(make(0.2), VOCABULARY, seed=-1)
    with pytest.raises(UserError, match="views: got 5"):
        embedding_map(make(0.2), VOCABULARY, views=5)
    with pytest.raises(UserError, match="val split has 0 relation views of 0 classes, expected at least 10"):
        embedding_map(make(0.2), VOCABULARY, split="val", level="relation")
    rows = make(0.2).levels["object"]
    few = Features(list("abcdef"), {"object": LevelFeatures(rows.image[:6], rows.text_id[:6], rows.scene[:6])})
    with pytest.raises(UserError, match="has 6 object views"):
        embedding_map(few, VOCABULARY)


def test_missing_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'scenarioclip-fast\[eval\]'"):
        embedding_map(make(0.2), VOCABULARY)
