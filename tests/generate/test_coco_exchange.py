from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from curation import records, rectangle, write_run
from hypothesis import given, settings
from hypothesis import strategies as st

from scenarioclip_fast.data import rle
from scenarioclip_fast.data.shards import ShardSet
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.generate.coco import IDS, polygon_mask, read_coco, write_coco
from scenarioclip_fast.generate.config import GenerateConfig
from scenarioclip_fast.generate.curate.stage import make, prepare
from scenarioclip_fast.generate.given import GivenBoxes, GivenCaptions
from scenarioclip_fast.generate.images import Item, divide, list_images, write_list
from scenarioclip_fast.generate.pipeline import generate
from scenarioclip_fast.generate.records import all_outcomes
from scenarioclip_fast.generate.stages import Work

MAN, HORSE, TREE = ("man", (0, 0, 20, 40)), ("horse", (10, 20, 50, 60)), ("tree", (60, 0, 80, 60))
RELATIONS = [("man", "riding", "horse"), ("tree", "behind", "man"), ("horse", "near", "tree")]
Edit = Callable[[dict[str, Any]], None]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """a: three objects; b: none that pass; c: an object is dropped; d: boxes that are no integers."""
    scenes = {
        "a": records([MAN, HORSE, TREE], RELATIONS),
        "b": records([MAN], []),
        "c": records([("dog", MAN[1]), MAN, HORSE, TREE], RELATIONS, masks={0: None}, action=None),
        "d": records([MAN, HORSE, TREE], RELATIONS),
    }
    for one in scenes["d"]["ground"]["objects"]:
        one["box"] = [v + 0.1 + v / 7e3 for v in one["box"]]
    out = write_run(tmp_path, scenes)
    generate([], out, GenerateConfig(), stages=("curate",), progress=False)
    return out


def scenes_of(run: Path, *overrides: str) -> dict[str, Any]:
    generate([], run, GenerateConfig.of(overrides=overrides), stages=("curate",), progress=False)
    return {one.key: one.result.get("scene", one.reason) for one in all_outcomes(run / "curate")}


def corrected(run: Path, edit: Edit, *overrides: str) -> dict[str, Any]:
    """Export, edit, import."""
    path = run.parent / "coco.json"
    scenes_of(run)
    write_coco(run, path)
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return scenes_of(run, f"curate.decisions={path}", *overrides)


def annotation_of(content: dict[str, Any], key: str, number: int) -> dict[str, Any]:
    (found,) = (a for a in content["annotations"] if a["key"] == key and a["object"] == number)
    return found


def test_the_file(run: Path) -> None:
    path = run.parent / "new" / "coco.json"
    assert write_coco(run, path, run.parent / "export") == 3
    content = json.loads(path.read_text())
    assert content["info"]["ids"] == "run"
    assert [(one["id"], one["file_name"], one["key"]) for one in content["images"]] == [
        (1, "a.jpg", "a"),
        (3, "c.jpg", "c"),
        (4, "d.jpg", "d"),
    ]
    assert content["images"][0] | {"scores": 0} == {
        **{"id": 1, "file_name": "a.jpg", "width": 80, "height": 60, "key": "a", "action": "playing"},
        **{"caption": "A scene.", "scores": 0},
    }
    assert [one["name"] for one in content["categories"]] == ["horse", "man", "tree"]
    assert annotation_of(content, "c", 1) == {
        "id": 3 * IDS + 1,
        "image_id": 3,
        "category_id": 2,
        "bbox": [0, 0, 20, 40],
        "segmentation": rectangle(MAN[1]),
        "area": 800,
        "iscrowd": 0,
        "key": "c",
        "object": 1,
    }
    scene = next(all_outcomes(run / "curate")).result["scene"]
    assert content["relations"][1] == {
        "id": IDS + 1,
        "image_id": 1,
        "subject_id": IDS + 2,
        "predicate": "behind",
        "object_id": IDS,
        "negatives": scene["relations"][1]["negatives"],
        "key": "a",
        "relation": 1,
    }
    images = run.parent / "images"
    assert all((run.parent / "export" / f"{k}.jpg").read_bytes() == (images / f"{k}.jpg").read_bytes() for k in "acd")


def test_pycocotools_reads_the_file(run: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    path = run.parent / "coco.json"
    write_coco(run, path)
    found = coco.COCO(str(path))
    assert found.getImgIds() == [1, 3, 4] and len(found.getAnnIds(catIds=found.getCatIds(["man"]))) == 3
    for annotation in found.loadAnns(found.getAnnIds(imgIds=[1])):
        expected = rle.decode(annotation["segmentation"]).numpy()
        assert np.array_equal(found.annToMask(annotation), expected) and expected.sum() == annotation["area"]


def nothing(content: dict[str, Any]) -> None:
    pass


def without_members(content: dict[str, Any]) -> None:
    """What a tool keeps that knows only COCO's members, but not their values."""
    for part in ("annotations", "relations"):
        for one in content[part]:
            for name in ("key", "object", "relation"):
                one.pop(name, None)
    for one in content["images"]:
        for name in ("key", "action", "caption", "scores"):
            one.pop(name, None)


def renumbered(content: dict[str, Any]) -> None:
    """A tool's own numbers, in another order, and without relations and info."""
    images = {one["id"]: 100 - i for i, one in enumerate(content["images"])}
    content["images"].reverse()
    content["annotations"].reverse()
    content["categories"].reverse()
    categories = {one["id"]: i + 7 for i, one in enumerate(content["categories"])}
    for one in content["images"]:
        one["id"] = images[one["id"]]
    for one in content["categories"]:
        one["id"] = categories[one["id"]]
    for i, one in enumerate(content["annotations"], start=1):
        one |= {"id": i, "image_id": images[one["image_id"]], "category_id": categories[one["category_id"]]}
    del content["relations"], content["info"]


def without_ids(content: dict[str, Any]) -> None:
    without_members(content)
    renumbered(content)


def as_attributes(content: dict[str, Any]) -> None:
    """The members as attributes, in which some tools keep what they do not know, as texts."""
    for one in content["annotations"]:
        one["attributes"] = {"key": one.pop("key"), "object": str(one.pop("object"))}
    renumbered(content)


def rounded(content: dict[str, Any]) -> None:
    for one in content["annotations"]:
        one["bbox"] = [round(v, 1) for v in one["bbox"]]


def uncompressed(content: dict[str, Any]) -> None:
    for one in content["annotations"]:
        height, width, runs = rle.read_runs(one["segmentation"])
        one |= {"segmentation": {"size": [height, width], "counts": runs.tolist()}, "iscrowd": 1}


def without_segmentation(content: dict[str, Any]) -> None:
    for one in content["annotations"]:
        one["segmentation"] = []


@pytest.mark.parametrize(
    "tool",
    [
        nothing,
        without_members,
        renumbered,
        without_ids,
        as_attributes,
        rounded,
        uncompressed,
        without_segmentation,
    ],
)
def test_round_trip(run: Path, tool: Edit) -> None:
    before = scenes_of(run)
    assert corrected(run, tool) == before
    assert before["b"] == "no_relations" and [o["id"] for o in before["c"]["objects"]] == [1, 2, 3]


def test_round_trip_of_a_correction(run: Path) -> None:
    """The export of corrected scenes gives the same scenes again."""

    def edit(content: dict[str, Any]) -> None:
        new = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1.3, 2.7, 30.1, 20.9]}
        new["segmentation"] = rectangle((2, 3, 31, 23))
        content["annotations"].append(new)
        content["relations"].append(
            {"id": 1, "image_id": 1, "subject_id": 1, "predicate": "near", "object_id": IDS + 1}
        )

    once = corrected(run, edit)
    assert [o["id"] for o in once["a"]["objects"]] == [0, 1, 2, 3]
    assert once["a"]["objects"][3]["mask"] == rectangle((2, 3, 31, 23))
    assert once["a"]["relations"][3]["subject"] == 3 and once["a"]["relations"][3]["id"] == 3
    path = run.parent / "again.json"
    write_coco(run, path)
    assert scenes_of(run, f"curate.decisions={path}") == once


def test_corrections_of_objects(run: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["categories"].append({"id": 50, "name": "Donkey"})
        annotation_of(content, "a", 1)["category_id"] = 50
        annotation_of(content, "a", 0)["bbox"] = [0, 0, 20, 39]
        annotation_of(content, "a", 2)["segmentation"] = [
            [60, 0, 80, 0, 80, 30, 60, 30],
            [60, 40, 80, 40, 80, 50, 60, 50],
        ]

    before, after = scenes_of(run), corrected(run, edit)
    man, donkey, tree = after["a"]["objects"]
    assert donkey == before["a"]["objects"][1] | {"name": "donkey"}
    assert man == before["a"]["objects"][0] | {"box": [0, 0, 20, 39]}
    mask = rle.decode(tree["mask"]).numpy()
    expected = np.zeros((60, 80), bool)
    expected[:30, 60:] = expected[40:50, 60:] = True
    assert np.array_equal(mask, expected) and tree["box"] == [60, 0, 80, 60]
    negatives = [text for relation in after["a"]["relations"] for text in relation["negatives"]]
    assert not any("horse" in text for text in negatives)
    assert after["c"] == before["c"] and after["a"]["scores"] == before["a"]["scores"]


def test_removed_objects_take_their_relations_along(run: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["annotations"].remove(annotation_of(content, "a", 2))

    after = corrected(run, edit)
    assert [o["id"] for o in after["a"]["objects"]] == [0, 1] and [r["id"] for r in after["a"]["relations"]] == [0]
    (outcome,) = (one for one in all_outcomes(run / "curate") if one.key == "a")
    assert {one["reason"] for one in outcome.result["rejected"]} == {"rejected_by_hand", "end_dropped"}

    def all_of_it(content: dict[str, Any]) -> None:
        content["annotations"] = [a for a in content["annotations"] if a["key"] != "a"]

    assert corrected(run, all_of_it)["a"] == "no_relations"


def test_images_that_are_not_in_the_file_stay(run: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["images"] = content["images"][1:]
        content["annotations"] = [a for a in content["annotations"] if a["key"] != "a"]
        content["relations"] = [a for a in content["relations"] if a["key"] != "a"]

    before = scenes_of(run)
    assert corrected(run, edit) == before


def test_corrections_of_texts_and_relations(run: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["images"][0] |= {"action": "Riding ", "caption": "New."}
        first, second, third = (r for r in content["relations"] if r["key"] == "a")
        first["predicate"] = "Sitting on"
        second["subject_id"] = third["subject_id"]
        content["relations"].remove(third)

    after = corrected(run, edit)["a"]
    assert (after["action"], after["caption"]) == ("riding", "New.")
    assert [(r["id"], r["subject"], r["predicate"], r["object"]) for r in after["relations"]] == [
        (0, 0, "sitting on", 1),
        (1, 1, "behind", 0),
    ]


def test_copies_are_new_objects(run: Path) -> None:
    """Tools copy the members along, also to other images."""

    def edit(content: dict[str, Any]) -> None:
        copied = copy.deepcopy(annotation_of(content, "a", 0))
        moved = {"bbox": [30, 0, 20, 40], "segmentation": rectangle((30, 0, 50, 40))}
        content["annotations"] += [copied | {"id": 7}, copied | {"id": 8, "image_id": 3} | moved]

    after = corrected(run, edit)
    assert [o["id"] for o in after["a"]["objects"]] == [0, 1, 2, 3]
    assert [o["id"] for o in after["c"]["objects"]] == [1, 2, 3, 4]
    assert after["c"]["objects"][3]["box"] == [30, 0, 50, 40] and after["c"]["scores"]["boxes"][3] == 1


def rejected_in(run: Path, key: str) -> list[tuple[str, str]]:
    """The parts of a scene in rejected.jsonl and their reasons."""
    lines = map(json.loads, (run / "rejected.jsonl").read_text().splitlines())
    return [(one["part"], one["reason"]) for one in lines if one["key"] == key and one["stage"] == "curate"]


@pytest.mark.parametrize("kept", [True, False])
def test_a_corrected_box_that_misses_the_mask_drops_the_object(run: Path, kept: bool) -> None:
    """Whether the tool kept the segmentation, which was not corrected, or dropped it."""

    def edit(content: dict[str, Any]) -> None:
        annotation_of(content, "a", 0).update(bbox=[40, 0, 20, 40])
        annotation_of(content, "a", 1).update(bbox=[10, 20, 40, 35])
        for i in (0, 1):
            one = annotation_of(content, "a", i)
            one["segmentation"] = one["segmentation"] if kept else []

    horse, tree = corrected(run, edit)["a"]["objects"]
    assert horse["mask"] == rectangle(HORSE[1]) and horse["box"] == [10, 20, 50, 55]
    assert tree["name"] == "tree"
    assert rejected_in(run, "a") == [
        ("relation 0 (man riding horse)", "end_dropped"),
        ("relation 1 (tree behind man)", "end_dropped"),
        ("object 0 (man)", "mask_not_in_box"),
    ]
    scene = corrected(run, edit, "curate.min_agreement=0")["a"]
    assert scene["objects"][0] == {"id": 0, "name": "man", "box": [40, 0, 60, 40], "mask": rectangle(MAN[1])}


def test_a_box_that_was_left_alone_follows_a_corrected_mask(run: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        annotation_of(content, "a", 0)["segmentation"] = rectangle((40, 0, 58, 38))
        annotation_of(content, "a", 1)["segmentation"] = rectangle((12, 20, 50, 60))  # still agrees

    man, horse, _ = corrected(run, edit)["a"]["objects"]
    assert man["mask"] == rectangle((40, 0, 58, 38)) and man["box"] == [40, 0, 58, 38]
    assert horse["mask"] == rectangle((12, 20, 50, 60)) and horse["box"] == [10, 20, 50, 60]


def test_a_box_and_a_mask_may_be_corrected_together(run: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        annotation_of(content, "a", 0).update(bbox=[40, 0, 20, 40], segmentation=rectangle((41, 0, 60, 39)))

    man = corrected(run, edit)["a"]["objects"][0]
    assert man == {"id": 0, "name": "man", "box": [40, 0, 60, 40], "mask": rectangle((41, 0, 60, 39))}


def test_a_new_object_without_a_segmentation_is_rejected(run: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        new = {"image_id": 1, "category_id": 1, "bbox": [30, 0, 20, 20]}
        content["annotations"] += [new | {"id": 1}, new | {"id": 2, "segmentation": []}]
        content["annotations"] += [new | {"id": 3, "segmentation": rectangle((0, 40, 20, 60))}]
        relation = {"id": 1, "image_id": 1, "subject_id": 1, "predicate": "near", "object_id": IDS + 1}
        content["relations"].append(relation)

    before, after = scenes_of(run), corrected(run, edit)
    assert after == before
    assert rejected_in(run, "a") == [
        ("relation 3 (horse near horse)", "end_dropped"),
        ("object 3 (horse)", "no_mask"),
        ("object 4 (horse)", "no_mask"),
        ("object 5 (horse)", "mask_not_in_box"),
    ]


def test_exchange_with_a_packed_data_set(run: Path, tmp_path: Path) -> None:
    """It can be corrected by a run that takes it as given."""
    generate([], run, GenerateConfig(), stages=("curate", "pack"), progress=False)
    path = tmp_path / "packed.json"
    assert write_coco(run / "shards", path) == 3
    content = json.loads(path.read_text())
    scenes = {}
    for split in ("train", "val", "test"):
        shards = ShardSet(run / "shards", split)
        scenes |= {scene.key: scene for scene in map(shards.read, range(len(shards)))}
    assert {one["key"]: one["split"] for one in content["images"]} == {key: s.split for key, s in scenes.items()}
    assert annotation_of(content, "c", 0)["segmentation"] == scenes["c"].objects[0].mask  # positions, without ids
    assert len(content["relations"]) == sum(len(scene.relations) for scene in scenes.values())

    masks = {scene.key: [{"mask": o.mask, "score": 1.0} for o in scene.objects] for scene in scenes.values()}
    with pytest.raises(UserError, match="exported from a packed data set; export it from the run"):
        scenes_of(run, f"curate.decisions={path}")

    items = [item for item in list_images([run / "shards"]) if isinstance(item, Item)]
    write_list(divide(items, 2), tmp_path / "images.jsonl")
    works = [Work(item) for item in items]
    stages = GivenCaptions(), GivenBoxes()
    captions, boxes = ({one.key: one.result for one in stage.run(iter(works))} for stage in stages)
    works = [
        Work(item, {"caption": captions[item.key], "ground": boxes[item.key], "segment": {"objects": masks[item.key]}})
        for item in items
    ]
    config = GenerateConfig.of(overrides=[f"curate.decisions={path}"])
    found = {one.key: one.result["scene"] for one in make(config, "cpu", prepare(config, tmp_path)).run(iter(works))}
    for key, scene in scenes.items():
        assert [o["mask"] for o in found[key]["objects"]] == [o.mask for o in scene.objects]
        assert [(r["subject"], r["predicate"], r["object"]) for r in found[key]["relations"]] == [
            (r.subject, r.predicate, r.object) for r in scene.relations
        ]


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a packed data set, or the --out directory of generate"):
        write_coco(tmp_path, tmp_path / "coco.json")
    run = write_run(tmp_path, {"a": records([MAN], [])})
    with pytest.raises(UserError, match="no scenes; run generate"):
        write_coco(run, tmp_path / "coco.json")
    assert not list(tmp_path.glob("*coco.json*"))


def change(part: str, **members: Any) -> Edit:
    def edit(content: dict[str, Any]) -> None:
        content[part][0].update(members)

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda content: content.update(images=1), "got 1 as 'images', expected a list"),
        (lambda content: content.update(images=[], annotations=[], relations=[]), "'images' is empty, so that nothing"),
        (lambda content: content.pop("images"), 'expected a COCO file with "images" and "annotations"'),
        (lambda content: content.pop("annotations"), 'expected a COCO file with "images" and "annotations"'),
        (lambda content: content.update(scenes={}, schema=1), "unknown member 'info': expected schema, scenes"),
        (change("annotations", id=True), "annotations: got .*an id of its own"),
        (change("annotations", image_id=True), "annotation 4096: no image True"),
        (change("annotations", bbox=[True, 2, 3, 4]), r"annotation 4096: got \[True, 2, 3, 4\] as bbox"),
        (change("annotations", segmentation={"size": [60, True], "counts": [60]}), "annotation 4096: segmentation"),
        (change("annotations", segmentation=[[True, 0, 9, 0, 9, 9]]), "annotation 4096: segmentation: .*three points"),
        (change("images", width=True), "image 1: got a size of"),
        (lambda content: content["annotations"].append(content["annotations"][0]), "an id of its own"),
        (lambda content: content["images"].append(content["images"][0] | {"id": 9}), "the image 'a' occurs twice"),
        (change("annotations", id="x"), "annotations: got .*an id of its own"),
        (change("annotations", image_id=77), "annotation 4096: no image 77"),
        (change("annotations", image_id=[1]), "annotation 4096: no image"),
        (change("annotations", category_id=77), "annotation 4096: no category 77"),
        (change("annotations", bbox=[1, 2, 3]), r"annotation 4096: got \[1, 2, 3\] as bbox"),
        (change("annotations", bbox=[1, 2, 3, float("nan")]), "annotation 4096: got .* as bbox"),
        (change("annotations", bbox=[90, 0, 5, 5]), "annotation 4096: the box .* is empty in an image of 80 x 60"),
        (change("annotations", segmentation=[[1, 2, 3, 4]]), "annotation 4096: segmentation: .*three points"),
        (change("annotations", segmentation=[["x"] * 6]), "annotation 4096: segmentation: .*three points"),
        (change("annotations", segmentation={"size": [60, 80], "counts": "~"}), "annotation 4096: segmentation"),
        (change("annotations", segmentation={"size": [4, 4], "counts": [16]}), "expected the image size"),
        (change("annotations", segmentation=3), "expected RLE or polygons"),
        (change("categories", name=" "), "category 1: got ' ' as 'name'"),
        (change("images", width=0), "image 1: got a size of"),
        (change("images", width=81), r"scene a: got an image of \[60, 81\], expected \[60, 80\]|segmentation"),
        (change("images", action=3), "image 1: got 3 as 'action', expected a text or null"),
        (change("images", key="zzz"), "scene 'zzz': the run has no such image"),
        (change("relations", predicate=""), "relation 4096: got '' as 'predicate'"),
        (change("relations", image_id=None), "relation 4096: no image None"),
    ],
)
def test_malformed_files(run: Path, edit: Edit, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        corrected(run, edit)
    assert "\n" not in str(error.value) and "coco.json" in str(error.value)


def test_not_a_coco_file(tmp_path: Path) -> None:
    for content, message in ((b"{", "not JSON"), (b"[]", 'expected a COCO file with "images"')):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_coco(tmp_path / "x.json")
    with pytest.raises(UserError, match="No such file"):
        read_coco(tmp_path / "none.json")


def test_polygons_cover_the_pixels_whose_centres_are_inside() -> None:
    square = polygon_mask([1, 2, 4, 2, 4, 5, 1, 5], (6, 7))
    assert square.sum() == 9 and square[2:5, 1:4].all()
    assert not polygon_mask([1.6, 2, 2.4, 2, 2.4, 5, 1.6, 5], (6, 7)).any()  # between two columns of centres
    outside = polygon_mask([-5, -5, 50, -5, 50, 50, -5, 50], (6, 7))
    assert outside.all()
    hourglass = polygon_mask([-0.5, 0, 6.5, 6, -0.5, 6, 6.5, 0], (6, 6))  # crosses itself
    assert hourglass[0].all() and hourglass[2].tolist() == [False, False, True, True, False, False]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 40), st.floats(0, 30)), min_size=3, max_size=8))
def test_polygons_follow_the_even_odd_rule(points: list[tuple[float, float]]) -> None:
    """Each pixel against the crossings to the right of its centre, where that is not on the outline."""
    corners = np.array(points)
    mask = polygon_mask([float(v) for v in corners.ravel()], (30, 40))
    x, y = np.meshgrid(np.arange(40) + 0.5, np.arange(30) + 0.5)
    parity = np.zeros((30, 40), bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, 0), strict=True):
        crosses = (ay > y) != (by > y)
        with np.errstate(divide="ignore", invalid="ignore"):
            parity ^= crosses & (x < (bx - ax) * (y - ay) / (by - ay) + ax)
    distance = np.min([_distance(x, y, a, b) for a, b in zip(corners, np.roll(corners, -1, 0), strict=True)], axis=0)
    clear = distance > 1e-6  # rounding decides on the outline
    assert np.array_equal(mask[clear], parity[clear])


def _distance(x: np.ndarray, y: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    along = b - a
    length = float(along @ along) or 1.0
    t = np.clip(((x - a[0]) * along[0] + (y - a[1]) * along[1]) / length, 0, 1)
    return np.hypot(x - a[0] - t * along[0], y - a[1] - t * along[1])


def test_polygons_are_nearly_those_of_pycocotools() -> None:
    coco = pytest.importorskip("pycocotools.mask")
    angle = np.linspace(0, 2 * np.pi, 50, endpoint=False)
    polygon = np.stack([60 + 40 * np.cos(angle), 50 + 30 * np.sin(angle)], 1).ravel().tolist()
    theirs = coco.decode(coco.frPyObjects([polygon], 100, 120))[..., 0].astype(bool)
    ours = polygon_mask(polygon, (100, 120))
    # They differ in pixels of the outline, 220 pixels long around 3,760.
    assert (ours & theirs).sum() / (ours | theirs).sum() > 0.96
