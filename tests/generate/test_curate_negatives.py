from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from curation import curate, records, scene_of

from scenarioclip_fast.data.texts import normalise
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.generate.curate.negatives import TrueTriples, antonym, false_texts, read_antonyms

OBJECTS = [("man", (0, 0, 20, 40)), ("horse", (10, 20, 50, 60)), ("tree", (60, 0, 80, 60)), ("dog", (0, 45, 10, 60))]


def test_packaged_antonyms() -> None:
    found = read_antonyms()
    assert len(found) >= 150
    for predicate, opposite in found.items():
        assert predicate == normalise(predicate) and opposite == normalise(opposite) and predicate != opposite


@pytest.mark.parametrize(
    ("predicate", "expected"),
    [
        ("on", "under"),
        ("on top of", "underneath"),
        ("standing on", "standing under"),
        ("standing on top of", "standing underneath"),
        ("sitting to the left of", "sitting to the right of"),
        ("sitting on", "standing beside"),  # the whole predicate first
        ("running inside", "running outside"),
        ("is holding", "is releasing"),
        ("holding up", "holding down"),  # then the preposition
        ("pushing hard", "pulling hard"),  # then the verb
        ("holds", "releasing"),
        ("pushed", "pulling"),
        ("photographing", None),
        ("is", None),
    ],
)
def test_antonym(predicate: str, expected: str | None) -> None:
    assert antonym(predicate, read_antonyms()) == expected


def test_a_file_adds_and_replaces_antonyms(tmp_path: Path) -> None:
    path = tmp_path / "antonyms.json"
    path.write_text(json.dumps({"Photographing": "filming", "on": "beneath"}))
    found = read_antonyms(str(path))
    assert found["photographing"] == "filming" and found["on"] == "beneath" and found["under"] == "on"
    scene = scene_of(curate(records(OBJECTS[:2], [("man", "on", "horse")]), f"curate.antonyms={path}"))
    assert scene["relations"][0]["negatives"] == ["man beneath horse"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "got a list, expected"),
        ("{", "not JSON"),
        ('{"on": 1}', "got 1 for 'on'"),
        ('{"on": "On "}', "expected another predicate"),
        ('{"": "under"}', "expected another predicate"),
    ],
)
def test_unusable_files_of_antonyms(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "antonyms.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_antonyms(str(path))
    with pytest.raises(UserError, match="No such file"):
        read_antonyms(str(tmp_path / "missing.json"))


def test_one_antonym_and_one_other_object() -> None:
    scene = scene_of(curate(records(OBJECTS, [("man", "riding", "horse")])))
    first, second = scene["relations"][0]["negatives"]
    assert first == "man dismounting horse"
    others = {f"{name} riding horse" for name in ("tree", "dog")} | {f"man riding {name}" for name in ("tree", "dog")}
    assert second in others


def test_negatives_are_chosen_by_key_and_relation() -> None:
    found = records(OBJECTS, [("man", "riding", "horse")])
    chosen = [scene_of(curate(found, key=f"k{i}"))["relations"][0]["negatives"][1] for i in range(200)]
    assert chosen == [scene_of(curate(found, key=f"k{i}"))["relations"][0]["negatives"][1] for i in range(200)]
    counts = Counter(chosen)
    # 4 candidates at 50 each, standard deviation 6: 25 is 4 of them away.
    assert len(counts) == 4 and min(counts.values()) > 25


def test_no_negative_is_true_in_the_scene() -> None:
    relations = [
        ("man", "near", "horse"),
        ("man", "near", "tree"),
        ("dog", "standing on", "horse"),
        ("man", "far from", "dog"),
        ("tree", "on", "horse"),
    ]
    for i in range(50):
        scene = scene_of(curate(records(OBJECTS, relations), key=f"k{i}"))
        texts = {" ".join(one) for one in relations}
        texts |= {"horse near man", "tree near man", "dog far from man"}  # the same from the other side
        texts |= {"dog on horse"}  # says less than "standing on"
        for relation in scene["relations"]:
            assert not texts & set(relation["negatives"])
            assert len(set(relation["negatives"])) == len(relation["negatives"])


def test_the_antonym_is_left_out_if_it_is_true() -> None:
    known = TrueTriples([("cup", "on", "table"), ("cup", "under", "table")])
    assert false_texts("k", 0, ("cup", "on", "table"), ["cup", "table"], known, {"on": "under"}) == []


def test_without_another_object_or_antonym_there_are_none() -> None:
    assert (
        scene_of(curate(records(OBJECTS[:2], [("man", "photographing", "horse")])))["relations"][0]["negatives"] == []
    )
    twins = [("man", (0, 0, 20, 40)), ("man", (40, 0, 60, 40))]
    assert scene_of(curate(records(twins, [("man", "photographing", "man")])))["relations"][0]["negatives"] == []


def test_negatives_can_be_switched_off() -> None:
    scene = scene_of(curate(records(OBJECTS, [("man", "on", "horse")]), "curate.negatives=none"))
    assert scene["relations"][0]["negatives"] == []
