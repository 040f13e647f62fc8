from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from curation import curate, dropped, records, scene_of, texts_of, write_run

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.generate.config import GenerateConfig
from scenarioclip_fast.generate.curate.decisions import read_decisions
from scenarioclip_fast.generate.curate.stage import make, prepare
from scenarioclip_fast.generate.images import Item
from scenarioclip_fast.generate.pipeline import generate
from scenarioclip_fast.generate.records import all_outcomes
from scenarioclip_fast.generate.stages import Outcome, Work

OBJECTS = [("man", (0, 0, 20, 40)), ("horse", (10, 20, 50, 60)), ("tree", (60, 0, 80, 60))]
RELATIONS = [("man", "riding", "horse"), ("tree", "behind", "man"), ("man", "sitting on", "horse")]


def decided(tmp_path: Path, decision: Any, found: dict[str, Any] | None = None, *overrides: str) -> Outcome:
    """Curate one image, k, with a decision."""
    tmp_path.mkdir(exist_ok=True)
    path = tmp_path / "decisions.json"
    path.write_text(json.dumps({"schema": 1, "scenes": {"k": decision}}))
    config = GenerateConfig.of(overrides=[f"curate.decisions={path}", *overrides])
    found = found or records(OBJECTS, RELATIONS)
    run = write_run(tmp_path, {"k": found})
    work = Work(Item("k", "k.jpg", "/k.jpg", -1, 1), found)
    (outcome,) = make(config, "cpu", prepare(config, run)).run(iter([work]))
    return outcome


def test_no_decision_changes_nothing(tmp_path: Path) -> None:
    assert decided(tmp_path, {}) == curate(records(OBJECTS, RELATIONS))


def test_reject_a_scene(tmp_path: Path) -> None:
    outcome = decided(tmp_path, {"scene": "reject", "objects": {"0": {"name": "boy"}}})
    assert outcome == Outcome("k", reason="rejected_by_hand")


@pytest.mark.parametrize("action", ["Jumping  high", "jumping high"])
def test_replace_the_action(tmp_path: Path, action: str) -> None:
    assert scene_of(decided(tmp_path, {"action": action}))["action"] == "jumping high"


def test_reject_and_rename_objects(tmp_path: Path) -> None:
    decision = {"objects": {"2": {"reject": True}, "1": {"name": "Zebras"}}}
    outcome = decided(tmp_path, decision)
    assert texts_of(outcome) == ["man riding zebras", "man sitting on zebras"]  # a person's words are final
    assert dropped(outcome) == [
        ("relation 1 (tree behind man)", "end_dropped"),
        ("object 2 (tree)", "rejected_by_hand"),
    ]
    assert [one["id"] for one in scene_of(outcome)["objects"]] == [0, 1]
    negatives = [text for one in scene_of(outcome)["relations"] for text in one["negatives"]]
    assert "man dismounting zebras" in negatives and not any("horse" in text for text in negatives)


def test_reject_and_replace_relations(tmp_path: Path) -> None:
    outcome = decided(tmp_path, {"relations": {"0": {"reject": True}, "1": {"predicate": "Near"}}})
    assert texts_of(outcome) == ["tree near man", "man sitting on horse"]
    assert dropped(outcome) == [("relation 0 (man riding horse)", "rejected_by_hand")]


def test_relations_that_became_equal_are_one(tmp_path: Path) -> None:
    outcome = decided(tmp_path, {"relations": {"2": {"predicate": "riding"}}})
    assert texts_of(outcome) == ["man riding horse", "tree behind man"]
    assert dropped(outcome) == [("relation 2 (man riding horse)", "duplicate_relation")]


def test_a_rejected_relation_does_not_give_way_to_its_duplicate(tmp_path: Path) -> None:
    found = records(OBJECTS, [RELATIONS[0], RELATIONS[0], RELATIONS[1]])
    outcome = decided(tmp_path, {"relations": {"0": {"reject": True}}}, found)
    assert texts_of(outcome) == ["tree behind man"]


def test_an_accepted_scene_may_have_too_few_relations(tmp_path: Path) -> None:
    three = "curate.min_relations=4"
    assert decided(tmp_path / "a", {}, None, three).reason == "too_few_relations"
    outcome = decided(tmp_path / "b", {"scene": "accept", "relations": {"0": {"reject": True}}}, None, three)
    assert texts_of(outcome) == ["tree behind man", "man sitting on horse"]


def test_decisions_for_what_the_rules_drop_have_no_effect(tmp_path: Path) -> None:
    decision = {"objects": {"2": {"name": "bush"}}, "relations": {"1": {"predicate": "near"}}}
    found = records(OBJECTS, RELATIONS, scores=[0.9, 0.9, 0.1])
    outcome = decided(tmp_path, decision, found, "curate.min_box_score=0.5")
    assert texts_of(outcome) == ["man riding horse", "man sitting on horse"]


@pytest.mark.parametrize("part", ["objects", "relations"])
def test_stale_ids(tmp_path: Path, part: str) -> None:
    with pytest.raises(UserError, match=rf"scene k: {part} 3: the records have 3 {part}; .* another run"):
        decided(tmp_path, {part: {"3": {"reject": True}}})


def test_stale_keys(tmp_path: Path) -> None:
    run = write_run(tmp_path, {"k": records(OBJECTS, RELATIONS)})
    path = tmp_path / "decisions.json"
    path.write_text(json.dumps({"schema": 1, "scenes": {"k": {}, "other": {}}}))
    config = GenerateConfig.of(overrides=[f"curate.decisions={path}"])
    with pytest.raises(UserError, match="scene 'other': the run has no such image"):
        generate([], run, config, stages=("curate",), progress=False)
    assert list(all_outcomes(run / "curate")) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "or a COCO file"),
        ('{"schema": 2, "scenes": {}}', 'expected {"schema": 1'),
        ('{"schema": true, "scenes": {}}', 'expected {"schema": 1'),
        ('{"scenes": {}}', 'expected {"schema": 1'),
        ('{"schema": 1, "scenes": {}, "scene": {}}', "unknown member 'scene': did you mean scenes?"),
        ('{"annotations": [], "categories": []}', 'expected a COCO file with "images" and "annotations"'),
        ('{"images": [], "annotations": [], "categories": []}', "'images' is empty"),
        ({"k": {"scene": True}}, 'got True as "scene", expected accept or reject'),
        ({"k": {"objects": {"0": {"name": True}}}}, "got True as 'name', expected a text"),
        ('{"schema": 1, "scenes": []}', 'expected {"schema": 1'),
        ({"k": []}, "scene k: got .*, expected an object"),
        ({"k": {"scene": "maybe"}}, "got 'maybe' as \"scene\", expected accept or reject"),
        ({"k": {"scenes": "accept"}}, "unknown member 'scenes': did you mean scene?"),
        ({"k": {"action": ""}}, "got '' as 'action', expected a text"),
        ({"k": {"action": None}}, "got None as 'action', expected a text"),
        ({"k": {"objects": []}}, r"got \[\] as 'objects', expected an object"),
        ({"k": {"objects": {"x": {}}}}, "got 'x', expected an id"),
        ({"k": {"objects": {"-1": {}}}}, "got '-1', expected an id"),
        ({"k": {"objects": {"0": {"reject": 1}}}}, 'got 1 as "reject", expected true'),
        ({"k": {"objects": {"0": {"predicate": "on"}}}}, "unknown member 'predicate': expected reject, name"),
        ({"k": {"relations": {"0": {"predicate": " "}}}}, "got ' ' as 'predicate', expected a text"),
    ],
)
def test_unusable_files(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "decisions.json"
    path.write_text(content if isinstance(content, str) else json.dumps({"schema": 1, "scenes": content}))
    with pytest.raises(UserError, match=message) as error:
        read_decisions(str(path))
    assert str(error.value).startswith(f"curate.decisions: {path}: ") and "\n" not in str(error.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"curate\.decisions: .*none\.json: No such file"):
        read_decisions(str(tmp_path / "none.json"))
