"""Maps of embeddings, and their pictures."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from scenarioclip_fast.data import Vocabulary
from scenarioclip_fast.errors import MissingDependencyError, UserError
from scenarioclip_fast.eval import tsne as module
from scenarioclip_fast.eval.features import Features, LevelFeatures
from scenarioclip_fast.eval.samples import Answer, SampleScene
from scenarioclip_fast.eval.tsne import EmbeddingMap, embedding_map
from scenarioclip_fast.report.maps import map_picture, nearest_sheet

VOCABULARY = Vocabulary([], ["bird", "cat", "dog", "fish", "owl"], [], {})
COUNTS = [20, 6, 40, 1, 0]  # of each


def make(noise: float, counts: list[int] = COUNTS) -> Features:
    ids = torch.repeat_interleave(torch.tensor(counts))
    generator = torch.Generator().manual_seed(0)
    image = 3 * torch.eye(16)[ids] + noise * torch.randn(len(ids), 16, generator=generator)
    order = torch.randperm(len(ids), generator=generator)
    rows = LevelFeatures(image[order], ids[order], torch.arange(len(ids)))
    return Features([f"scene {i}" for i in range(len(ids))], {"object": rows})


def test_views_of_a_class_lie_together() -> None:
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


@pytest.mark.parametrize(("classes", "views"), [(20, 26), (4, 10), (20, 10)])  # four exist; ten views are enough
def test_views_are_shared_by_the_classes_that_are_there(classes: int, views: int) -> None:
    pytest.importorskip("sklearn")
    found = embedding_map(make(0.2, [20, 9, 40, 8, 0]), VOCABULARY, classes=classes, views=views)
    assert found.classes == ["dog", "bird", "cat", "fish"]
    assert [found.label.count(i) for i in range(4)] == ([7, 7, 6, 6] if views == 26 else [3, 3, 2, 2])


def test_embeddings_that_are_all_the_same() -> None:
    pytest.importorskip("sklearn")
    features = make(0.2)
    features.levels["object"].image[:] = torch.eye(16)[3]
    with pytest.raises(UserError, match="all 67 object embeddings point the same way"):
        embedding_map(features, VOCABULARY)


def test_agreement_without_structure_is_chance() -> None:
    image = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    nearest = module._nearest(torch.nn.functional.normalize(image, dim=-1))
    assert not (nearest == torch.arange(4000)).any()
    label = torch.arange(4000) % 4
    # a quarter, give or take five standard deviations
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


def test_says_how_to_get_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'scenarioclip-fast\[eval\]'"):
        embedding_map(make(0.2), VOCABULARY)


def size(picture: Path) -> tuple[int, int]:
    data = picture.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_pictures(tmp_path: Path) -> None:
    label = [i % 35 for i in range(70)]
    places = [float(i) for i in range(70)]
    found = EmbeddingMap("test", "object", [f"a thing {i}" for i in range(35)], [""] * 70, label, places, places, 1, 0)
    assert min(size(map_picture(found, tmp_path / "deep" / "map.png"))) > 800

    def answer(rank: int) -> Answer:
        guesses = [(f"text {i}", 0.9 - i / 3) for i in range(1, 6)]
        return Answer(torch.full((8, 8, 3), 90, dtype=torch.uint8), f"text {rank}", guesses, False, -0.2, rank)

    whole = SampleScene("a", answer(1), [answer(3)], [answer(40)])
    bare = SampleScene("b", answer(9))
    wide, narrow = (size(nearest_sheet(s, tmp_path / "n.png")) for s in ([whole, bare], [bare]))
    assert wide[0] > 2 * narrow[0] and wide[1] > 1.5 * narrow[1]
    with pytest.raises(ValueError, match="at least one"):
        nearest_sheet([], tmp_path / "empty.png")
