from __future__ import annotations

import json

import pytest
import torch

from scenarioclip_fast.data import Relation, Scene, SceneObject
from scenarioclip_fast.data.rle import decode, encode
from scenarioclip_fast.data.scene import scene_from_json, scene_to_json


def example() -> Scene:
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[1:3, 2:5] = True
    objects = [SceneObject("cat", (2.0, 1.0, 5.0, 3.0), encode(mask)), SceneObject("mat", (0.0, 0.5, 6.0, 4.0))]
    return Scene("a", b"jpeg", "sitting", objects, [Relation(0, "on", 1), Relation(1, "under", 0)])


def test_relation_text() -> None:
    assert [example().relation_text(k) for k in range(2)] == ["cat on mat", "mat under cat"]


def test_json_round_trip() -> None:
    scene = example()
    record = json.loads(json.dumps(scene_to_json(scene, (4, 6))))
    back = scene_from_json("a", b"jpeg", record)
    assert (back.key, back.image, back.action, back.relations) == ("a", b"jpeg", "sitting", scene.relations)
    assert [(o.name, o.box) for o in back.objects] == [(o.name, o.box) for o in scene.objects]
    assert back.objects[1].mask is None
    assert int(decode(back.objects[0].mask).sum()) == 6  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 3}, "got schema 3, expected 1 or 2"),
        ({"size": [4]}, "malformed record"),
        ({"objects": [{"name": "cat"}]}, "malformed record"),
        ({"objects": [{"name": "cat", "box": [0, 0, 1], "mask": None}]}, "malformed record"),
        ({"size": [4, 7]}, "differs from the image size"),
        ({"relations": [{"subject": 0, "predicate": "on", "object": 2}]}, r"does not exist \(the scene has 2\)"),
        ({"relations": [{"subject": -1, "predicate": "on", "object": 0}]}, r"does not exist \(the scene has 2\)"),
        ({"action": None, "objects": None}, "malformed record"),
        ({"objects": {"name": "cat"}}, "got a dict, expected a list"),
        ({"objects": [{"name": "cat", "box": "1234", "mask": None}]}, "got a str, expected a list"),
        ({"action": 0}, "got a int, expected a string"),
        ({"action": False}, "got a bool, expected a string"),
        ({"caption": []}, "got a list, expected a string"),
        ({"relations": {}}, "got a dict, expected a list"),
        ({"relations": "abc"}, "got a str, expected a list"),
        ({"relations": [None]}, "malformed record"),
        ({"relations": [7]}, "malformed record"),
        ({"relations": [{"subject": 0, "predicate": "on", "object": 1, "negatives": "cat"}]}, "got a str, expected a"),
        ({"size": [4.0, 4]}, "got 4.0, expected an integer"),
        ({"relations": [{"subject": "0", "predicate": "on", "object": 0}]}, "got '0', expected an integer"),
        ({"relations": [{"subject": 0, "predicate": "on", "object": True}]}, "got True, expected an integer"),
    ],
)
def test_bad_records_are_rejected(change: dict[str, object], message: str) -> None:
    record = scene_to_json(example(), (4, 6)) | change
    with pytest.raises(ValueError, match=message):
        scene_from_json("a", b"", record)


def test_a_record_must_be_an_object() -> None:
    with pytest.raises(ValueError, match="got schema None, expected 1"):
        scene_from_json("a", b"", [])  # type: ignore[arg-type]
