"""Scores of a generation run against exact annotations, on cases small enough to count by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from scenarioclip_fast.data import generate_scenes, rle
from scenarioclip_fast.data.boxes import box_overlap
from scenarioclip_fast.generate.drawn.scores import (
    Annotations,
    Scores,
    Thing,
    Truth,
    after_curation,
    annotations_of,
    before_curation,
    mask_overlap,
    match_objects,
    score_run,
)

SIZE = (20, 40)


def mask(x1: int, y1: int, x2: int, y2: int) -> dict[str, Any]:
    pixels = torch.zeros(SIZE, dtype=torch.bool)
    pixels[y1:y2, x1:x2] = True
    return rle.encode(pixels)


def thing(name: str, *box: int) -> Thing:
    return Thing(name, box, mask(*box))


CAT, DOG, MAT = thing("cat", 0, 0, 10, 10), thing("dog", 20, 0, 30, 10), thing("mat", 0, 10, 40, 20)
TRUE = Annotations([CAT, DOG, MAT], [(0, "on", 2), (1, "on", 2), (0, "beside", 1)])
ALL = frozenset({0, 1, 2})


def scores(found: Annotations, true: Annotations = TRUE, answered: frozenset[int] = ALL) -> Scores:
    result = Scores()
    result.add(found, true, answered)
    return result


def test_the_truth_is_perfect() -> None:
    found = scores(TRUE).measures()
    assert set(found.values()) == {1.0} and len(found) == 8


def test_nothing_is_neither_right_nor_wrong() -> None:
    found = scores(Annotations())
    assert found.measures() == {
        "precision of objects": None,
        "recall of objects": 0.0,
        "precision of relations": None,
        "recall of relations": 0.0,
        "recall of relations answered rightly": 0.0,
        "mean IoU of masks": None,
        "masks with an IoU of at least 0.5": None,
        "masks with an IoU of at least 0.75": None,
    }
    assert scores(Annotations(), Annotations(), frozenset()).measures()["recall of objects"] is None


def test_names_and_boxes_decide_on_objects() -> None:
    half = thing("cat", 0, 0, 10, 5)  # IoU .5
    less = thing("dog", 20, 0, 30, 4)  # IoU .4
    other = thing("rug", 0, 10, 40, 20)
    found = scores(Annotations([half, less, other]))
    assert (found.objects_found, found.objects_true, found.objects_right) == (3, 3, 1)
    assert (found.mask_iou, found.masks_50, found.masks_75) == (0.5, 1, 0)


def test_each_true_object_makes_one_right() -> None:
    near = thing("cat", 0, 0, 10, 9)
    assert match_objects([near, CAT], [CAT]) == {1: 0}  # the better one
    assert match_objects([CAT, CAT], [CAT]) == {0: 0}  # the first one
    # Greedy: the best pair first, although the other found one then matches nothing.
    narrow, wide, true = thing("cat", 0, 0, 16, 10), thing("cat", 0, 0, 20, 10), thing("cat", 0, 0, 13, 10)
    assert match_objects([narrow], [wide, true]) == {0: 1}  # IoU .8 and .81
    assert match_objects([narrow, true], [true, thing("cat", 0, 0, 8, 10)]) == {1: 0, 0: 1}


def test_a_relation_needs_its_text_and_both_ends() -> None:
    objects = [CAT, DOG, MAT]
    assert scores(Annotations(objects, [(0, "on", 2)])).relations_right == 1
    assert scores(Annotations(objects, [(0, "under", 2)])).relations_right == 0  # the predicate
    assert scores(Annotations(objects, [(2, "on", 0)])).relations_right == 0  # the direction
    assert scores(Annotations(objects, [(0, "on", 1)])).relations_right == 0  # the ends
    astray = [thing("cat", 30, 0, 40, 10), DOG, MAT]  # its name, but another place
    assert scores(Annotations(astray, [(0, "on", 2), (1, "on", 2)])).relations_right == 1


def test_a_repeated_relation_is_wrong() -> None:
    found = scores(Annotations([CAT, CAT, MAT], [(0, "on", 2), (0, "on", 2), (1, "on", 2)]))
    assert (found.relations_found, found.relations_right) == (3, 1)
    assert found.measures()["precision of relations"] == pytest.approx(1 / 3)


def test_ends_of_one_name_are_told_apart_by_place() -> None:
    two = Annotations([CAT, thing("cat", 20, 0, 30, 10), MAT], [(1, "on", 2)])
    assert scores(Annotations(two.objects, [(1, "on", 2)]), two).relations_right == 1
    assert scores(Annotations(two.objects, [(0, "on", 2)]), two).relations_right == 0


def test_recall_of_the_answer() -> None:
    found = scores(Annotations(TRUE.objects, [(0, "on", 2), (1, "on", 2)]), answered=frozenset({0, 2}))
    assert (found.relations_answered, found.relations_answered_right, found.relations_right) == (2, 1, 2)
    assert found.measures()["recall of relations answered rightly"] == 0.5


def test_masks_may_be_missing_or_differ() -> None:
    bare = Thing("cat", CAT.box, None)
    found = scores(Annotations([bare, Thing("dog", DOG.box, mask(20, 0, 30, 5))]))
    assert (found.objects_right, found.mask_iou, found.masks_50, found.masks_75) == (2, 0.5, 1, 0)
    assert mask_overlap(mask(0, 0, 0, 0), mask(0, 0, 0, 0)) == 0.0
    assert mask_overlap(mask(0, 0, 4, 4), mask(0, 0, 4, 3)) == 0.75
    assert box_overlap((0, 0, 0, 0), (0, 0, 0, 0)) == 0.0
    assert box_overlap((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)


def test_sums_over_images() -> None:
    total = scores(TRUE)
    total.add(Annotations(), TRUE, ALL)
    assert (total.images, total.objects_found, total.objects_true) == (2, 3, 6)
    assert total.to_dict()["recall of objects"] == 0.5 and total.to_dict()["images"] == 2
    json.dumps(total.to_dict())


CAPTION = {
    "relations": [
        ["cat", "on", "mat"],
        ["cats", "on", "mat"],  # no object of exactly this name
        ["cat", "beside", "cat"],  # one object
        ["dog", "on", "mat"],
    ]
}
GROUND = {"objects": [{"name": one.name, "box": list(one.box)} for one in (CAT, MAT, CAT, DOG)]}
SEGMENT = {"objects": [{"mask": one.mask} for one in (CAT, MAT, CAT)] + [{"mask": None}]}


def test_before_curation() -> None:
    found = before_curation(CAPTION, GROUND, SEGMENT)
    assert [one.name for one in found.objects] == ["cat", "mat", "cat", "dog"]
    assert [one.mask for one in found.objects] == [CAT.mask, MAT.mask, CAT.mask, None]
    assert found.relations == [(0, "on", 1), (3, "on", 1)]  # of two cats the first


def curated(*relations: tuple[int, str, int]) -> dict[str, Any]:
    objects = [{"id": k, "name": o.name, "box": list(o.box), "mask": o.mask} for k, o in enumerate(TRUE.objects)]
    links = [{"id": k, "subject": s, "predicate": p, "object": o} for k, (s, p, o) in enumerate(relations)]
    return {"scene": {"objects": objects, "relations": links}, "rejected": []}


def test_after_curation() -> None:
    found = after_curation(curated(*TRUE.relations))
    assert [one.name for one in found.objects] == ["cat", "dog", "mat"] and list(found.relations) == TRUE.relations


def write_unit(directory: Path, stage: str, number: int, rows: dict[str, dict[str, Any] | str]) -> None:
    (directory / stage).mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = [{"unit": number, "inputs": "", "images": len(rows)}]
    for key, row in rows.items():
        rejected = {"rejected": {"reason": row, "detail": ""}}
        lines.append({"key": key, **(rejected if isinstance(row, str) else {"result": row})})
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    (directory / stage / f"{number:06d}.jsonl").write_text(text)


def test_a_run(tmp_path: Path) -> None:
    """Image a went through, b was rejected by curation, c by the detector, d was not answered; e is in another unit."""
    for stage, record in (("caption", CAPTION), ("ground", GROUND), ("segment", SEGMENT)):
        c: dict[str, Any] | str = CAPTION if stage == "caption" else "no_boxes"
        d = {"d": "answer_not_json"} if stage == "caption" else {}
        c_row = {} if stage == "segment" else {"c": c}
        write_unit(tmp_path, stage, 0, {"a": record, "b": record, **c_row, **d})
        write_unit(tmp_path, stage, 1, {"e": record})
    write_unit(tmp_path, "curate", 0, {"a": curated((0, "on", 2)), "b": "no_relations"})
    write_unit(tmp_path, "curate", 1, {"e": curated(*TRUE.relations)})
    truth = {key: Truth(TRUE, frozenset() if key == "d" else ALL) for key in "abcde"}
    before, after = score_run(tmp_path, truth)
    for found in (before, after):
        assert (found.images, found.objects_true, found.relations_true, found.relations_answered) == (5, 15, 15, 12)
    # a, b and e: 4 objects each, of which the second cat is wrong; 2 relations.
    assert (before.objects_found, before.objects_right, before.relations_found, before.relations_right) == (12, 9, 6, 6)
    assert (before.mask_iou, before.masks_75) == (6.0, 6)
    assert (after.objects_found, after.objects_right, after.relations_found, after.relations_right) == (6, 6, 4, 4)
    assert after.measures()["recall of relations answered rightly"] == pytest.approx(4 / 12)


def test_annotations_of_a_scene() -> None:
    (scene,) = generate_scenes(1, 3)
    found = annotations_of(scene)
    assert [one.name for one in found.objects] == [one.name for one in scene.objects]
    assert all(rle.bounds(one.mask, tuple(scene.image.shape[:2])) == list(one.box) for one in found.objects)  # type: ignore[arg-type, union-attr]
    texts = [" ".join(found.triplet(relation)) for relation in found.relations]
    assert texts == [scene.relation_text(k) for k in range(len(scene.relations))]
