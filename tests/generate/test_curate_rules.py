from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from curation import curate, dropped, records, rectangle, scene_of, texts_of
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from scenarioclip_fast.data import rle
from scenarioclip_fast.data.boxes import box_overlap
from scenarioclip_fast.generate.config import PUBLISHED, GenerateConfig
from scenarioclip_fast.generate.curate.rules import Mask, similar_name
from scenarioclip_fast.generate.curate.stage import make
from scenarioclip_fast.generate.images import Item
from scenarioclip_fast.generate.source import curated_scene
from scenarioclip_fast.generate.stages import REASONS, Work

MAN, HORSE, TREE = ("man", (0, 0, 20, 40)), ("horse", (10, 20, 50, 60)), ("tree", (60, 0, 80, 60))
RIDES = [("man", "riding", "horse")]


@settings(max_examples=60)
@given(hnp.arrays(bool, st.tuples(st.integers(1, 6), st.integers(1, 7)).map(lambda s: (2, *s))))
def test_overlap_of_run_lengths(masks: np.ndarray) -> None:
    a, b = (Mask(rle.encode(mask)) for mask in masks)
    union = (masks[0] | masks[1]).sum()
    assert a.overlap(b) == ((masks[0] & masks[1]).sum() / union if union else 0)
    assert rle.shared_area(a.runs, b.runs) == (masks[0] & masks[1]).sum()
    assert a.bounds == rle.bounds(masks[0], masks[0].shape)


def test_overlap_with_runs_of_no_pixels() -> None:
    """Uncompressed RLE may have them anywhere."""
    a = Mask({"size": [2, 3], "counts": [1, 2, 0, 1, 2]})
    b = Mask({"size": [2, 3], "counts": [0, 0, 2, 0, 0, 4]})
    assert a.overlap(b) == 2 / 5


def test_the_record() -> None:
    outcome = curate(records([MAN, HORSE, TREE], RIDES, scores=[0.5, 0.6, 0.7]))
    scene = scene_of(outcome)
    assert scene == {
        "size": [60, 80],
        "action": "playing",
        "caption": "A scene.",
        "objects": [
            {"id": i, "name": name, "box": list(map(float, box)), "mask": rectangle(box)}
            for i, (name, box) in enumerate([MAN, HORSE, TREE])
        ],
        "relations": [
            {"id": 0, "subject": 0, "predicate": "riding", "object": 1, "negatives": scene["relations"][0]["negatives"]}
        ],
        "scores": {"boxes": [0.5, 0.6, 0.7], "masks": [0.8, 0.8, 0.8]},
    }
    assert outcome.result["rejected"] == []
    assert curated_scene("k", scene).relation_text(0) == "man riding horse"


def test_names() -> None:
    objects = [("The Men", MAN[1]), ("a  horse", HORSE[1])]
    found = records(objects, [("men", " Riding ", "HORSES")], action="Played Football")
    outcome = curate(found)
    assert texts_of(outcome) == ["man riding horse"] and scene_of(outcome)["action"] == "playing football"
    outcome = curate(found, "curate.singular=false", "curate.gerund=false")
    assert texts_of(outcome) == ["men riding horse"]  # "horses" is similar enough to "horse"
    assert scene_of(outcome)["action"] == "played football"
    assert scene_of(curate(records([MAN, HORSE], RIDES, action=" ")))["action"] is None


def test_merged_classes() -> None:
    merged = {"objects": {"man": "person"}, "actions": {"playing": "play"}, "predicates": {"riding": "on"}}
    outcome = curate(records([MAN, HORSE], RIDES), merged=merged)
    assert texts_of(outcome) == ["person on horse"] and scene_of(outcome)["action"] == "play"


@pytest.mark.parametrize(
    ("options", "change", "reason"),
    [
        (["min_box_score=0.5"], {"scores": [0.9, 0.9, 0.4]}, "low_box_score"),
        (["min_mask_score=0.5"], {"mask_scores": [0.9, 0.9, 0.4]}, "low_mask_score"),
        ([], {"masks": {2: None}}, "no_mask"),
        ([], {"masks": {2: rectangle((0, 0, 0, 0))}}, "no_mask"),
        ([], {"masks": {2: rectangle((0, 0, 5, 5), [60, 81])}}, "no_mask"),
        (["min_agreement=0"], {"masks": {2: rectangle((60, 0, 65, 3))}}, "small_mask"),  # 15 pixels
        (["min_mask_fraction=0.16"], {"masks": {2: rectangle((60, 0, 80, 36))}}, "small_mask"),  # .15
        ([], {"masks": {2: rectangle((60, 0, 80, 29))}}, "mask_not_in_box"),
        ([], {"name": "\u200b "}, "unnamed_object"),
    ],
)
def test_objects_that_are_dropped(options: list[str], change: dict[str, Any], reason: str) -> None:
    name = change.pop("name", "tree")
    found = records([MAN, HORSE, (name, TREE[1])], [*RIDES, ("man", "near", name)], **change)
    outcome = curate(found, *(f"curate.{option}" for option in options))
    assert dropped(outcome)[0][1] == reason and dropped(outcome)[1][1] == "end_dropped"
    assert texts_of(outcome) == ["man riding horse"] and reason in REASONS


@pytest.mark.parametrize(
    "options",
    [["min_box_score=0.9"], ["min_mask_score=0.8"], ["min_mask_pixels=800"], ["min_mask_fraction=0.1666"], []],
)
def test_objects_at_a_limit_are_kept(options: list[str]) -> None:
    """The man's mask has 800 of 4800 pixels; half of a box agrees."""
    found = records([MAN, HORSE], RIDES, masks={} if options else {0: rectangle((0, 0, 20, 20))})
    assert texts_of(curate(found, *(f"curate.{option}" for option in options))) == ["man riding horse"]


def test_relations_move_to_the_better_of_two_duplicates() -> None:
    objects = [MAN, HORSE, ("a man", (0, 0, 20, 40)), ("dog", (0, 0, 20, 40))]
    outcome = curate(records(objects, RIDES, scores=[0.5, 0.9, 0.7, 0.9]))
    scene = scene_of(outcome)
    assert [one["id"] for one in scene["objects"]] == [1, 2, 3]
    assert texts_of(outcome) == ["man riding horse"] and scene["relations"][0]["subject"] == 1
    assert dropped(outcome) == [("object 0 (man)", "duplicate_object")]
    # The same by positions, and with the earlier one better.
    ends = [[0, 1], [2, 3]]
    relations = [*RIDES, ("man", "near", "dog")]
    options = ("curate.max_overlap=0.99",)
    for scores, kept in (([0.5, 0.9, 0.7, 0.9], 2), ([0.7, 0.9, 0.7, 0.9], 0)):
        masks = {3: rectangle((0, 0, 20, 38))}
        outcome = curate(records(objects, relations, scores=scores, ends=ends, masks=masks), *options)
        scene = scene_of(outcome)
        assert [scene["objects"][r["subject"]]["id"] for r in scene["relations"]] == [kept, kept]


def test_duplicates_need_a_large_overlap() -> None:
    objects = [MAN, HORSE, ("man", (0, 0, 20, 39))]  # IoU .975 with the first
    assert [one["id"] for one in scene_of(curate(records(objects, RIDES)))["objects"]] == [0, 1]
    kept = scene_of(curate(records(objects, RIDES), "curate.max_overlap=0.98"))["objects"]
    assert [one["id"] for one in kept] == [0, 1, 2]


@pytest.mark.parametrize(
    ("relation", "reason"),
    [
        (("man", "riding", "unicorn"), "unknown_end"),
        (("man", "hugging", "man"), "same_ends"),
        (("man", " \u200b", "tree"), "empty_predicate"),
        (("man", "is one of those who like to look at", "tree"), "long_predicate"),
        (("The man", "Riding", "horses"), "duplicate_relation"),
        (("man", "watching", "shadow"), "same_ends"),  # the masks of man and shadow
    ],
)
def test_relations_that_are_dropped(relation: tuple[str, str, str], reason: str) -> None:
    objects = [MAN, HORSE, TREE, ("shadow", (0, 0, 20, 39))]
    outcome = curate(records(objects, [*RIDES, relation]))
    assert texts_of(outcome) == ["man riding horse"]
    assert [one[1] for one in dropped(outcome)] == [reason] and reason in REASONS


def test_a_predicate_of_eight_words_is_kept() -> None:
    predicate = "one two three four five six seven eight"
    assert texts_of(curate(records([MAN, HORSE], [("man", predicate, "horse")]))) == [f"man {predicate} horse"]


def test_distance_of_the_ends() -> None:
    """The centres of man and horse, (10, 20) and (30, 40), are 28.3 pixels apart; the diagonal is 100."""
    assert texts_of(curate(records([MAN, HORSE], RIDES), "curate.min_ends_distance=0.28"))
    outcome = curate(records([MAN, HORSE], RIDES), "curate.min_ends_distance=0.29", "curate.min_relations=0")
    assert dropped(outcome) == [("relation 0 (man riding horse)", "same_ends")]


def test_the_nearest_pair_of_a_name() -> None:
    objects = [MAN, HORSE, ("man", (60, 20, 80, 60)), ("horse", (62, 0, 78, 20))]
    scene = scene_of(curate(records(objects, [*RIDES, ("man", "facing", "man")])))
    assert [(r["subject"], r["object"]) for r in scene["relations"]] == [(0, 1), (0, 2)]
    objects[1] = ("horse", (0, 50, 40, 60))
    scene = scene_of(curate(records(objects, RIDES)))
    assert [(r["subject"], r["object"]) for r in scene["relations"]] == [(2, 3)]


def test_given_ends_bypass_names() -> None:
    objects = [MAN, ("man", (60, 0, 80, 60)), HORSE]
    scene = scene_of(curate(records(objects, [("man", "riding", "horse")], ends=[[1, 2]])))
    assert scene["relations"][0]["subject"] == 1
    outcome = curate(records(objects, [*RIDES, *RIDES], ends=[[1, 2], [0, 2]], masks={1: None}))
    assert ("relation 0 (man riding horse)", "end_dropped") in dropped(outcome)
    assert scene_of(outcome)["relations"][0]["id"] == 1


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("man", ["young man", "horse"], "young man"),
        ("young man", ["man", "horse"], "man"),
        ("man", ["young man", "old man"], None),  # which?
        ("man", ["woman"], None),
        ("skate board", ["skateboard", "boy"], "skateboard"),
        ("tshirt", ["t-shirt"], "t-shirt"),
        ("bicycel", ["bicycle", "motorcycle"], "bicycle"),
        ("cat", ["cart"], None),
        ("boat", ["coat"], None),
        ("white horse", ["white house", "horse"], "horse"),
        ("unicorn", ["horse"], None),
        ("unicorn", [], None),
        ("", ["horse"], None),
    ],
)
def test_similar_names(name: str, known: list[str], expected: str | None) -> None:
    assert similar_name(name, known, 0.85) == expected
    assert similar_name(name, known[::-1], 0.85) == expected
    assert similar_name(name, known, 1.0) is None


def test_a_dropped_object_is_not_replaced_by_a_similar_one() -> None:
    objects = [MAN, HORSE, ("young man", (60, 0, 80, 60))]
    outcome = curate(records(objects, [*RIDES, ("young man", "near", "horse")], masks={0: None}))
    assert texts_of(outcome) == ["young man near horse"]
    assert ("relation 0 (man riding horse)", "end_dropped") in dropped(outcome)


def test_unused_objects() -> None:
    outcome = curate(records([MAN, TREE, HORSE], RIDES), "curate.drop_unused=true")
    scene = scene_of(outcome)
    assert [one["id"] for one in scene["objects"]] == [0, 2] and len(scene["scores"]["boxes"]) == 2
    assert scene["relations"][0]["object"] == 1 and dropped(outcome) == [("object 1 (tree)", "unused_object")]


def test_too_few_relations() -> None:
    outcome = curate(records([MAN, HORSE], [*RIDES, ("man", "on", "cow")]), "curate.min_relations=2")
    assert outcome.reason == "too_few_relations"
    assert outcome.detail == "1 relations left, expected 2; dropped: 1 unknown_end"
    assert curate(records([MAN, HORSE])).reason == "no_relations"
    assert scene_of(curate(records([MAN, HORSE]), "curate.min_relations=0"))["relations"] == []
    empty = records([MAN], masks={0: None}, action=None)
    assert curate(empty, "curate.min_relations=0").reason == "no_objects"


def test_published_settings() -> None:
    """Exact names, at least three relations, no check of masks, unused objects are dropped."""
    objects = [MAN, HORSE, ("tree", (60, 0, 80, 60)), ("sun", (0, 0, 9, 9)), ("men", (0, 0, 20, 40))]
    relations = [*RIDES, ("man", "near", "tree"), ("tree", "behind", "horse"), ("men", "under", "sun")]
    masks = {2: rectangle((79, 59, 80, 60))}
    found = records(objects, relations, masks=masks)
    options = GenerateConfig.of(PUBLISHED)
    stage = make(options, "cpu", {"merged": {}})
    work = Work(Item("k", "k.jpg", "/k.jpg", -1, 1), found)
    (outcome,) = stage.run(iter([work]))
    assert texts_of(outcome) == [" ".join(one) for one in relations]
    found["caption"]["relations"] = [*relations[:2], ("mens", "under", "sun")]
    (outcome,) = stage.run(iter([work]))
    assert outcome.reason == "too_few_relations"


def test_a_damaged_record_rejects_its_image_only() -> None:
    good, bad = records([MAN, HORSE], RIDES), records([MAN, HORSE], RIDES, masks={1: {"size": [60, 80], "counts": "~"}})
    works = [Work(Item(k, k, "/k", -1, 1), found) for k, found in (("bad", bad), ("worse", {}), ("good", good))]
    stage = make(GenerateConfig(), "cpu", {"merged": {}})
    assert [one.reason for one in stage.run(iter(works))] == ["malformed_entry", "malformed_entry", ""]
    assert stage.counts == {"objects": 2, "relations": 1, "negatives": 1, "parts dropped": 0}


def test_box_overlap() -> None:
    assert box_overlap((0, 0, 2, 2), (1, 1, 3, 3)) == 1 / 7
    assert box_overlap((0, 0, 1, 1), (2, 2, 3, 3)) == 0 and box_overlap((0, 0, 0, 0), (0, 0, 0, 0)) == 0
