from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scenarioclip_fast.cli.main import main
from scenarioclip_fast.data import pack, rle
from scenarioclip_fast.data.check import REASONS
from scenarioclip_fast.data.sources import open_source
from scenarioclip_fast.data.sources.panoptic import plain_name
from scenarioclip_fast.data.sources.registry import recognise
from scenarioclip_fast.errors import UserError

HEIGHT, WIDTH = 40, 60
PERSON, BIKE, FLOOR = 3648962, 300, 16777215
RECTANGLES = [(FLOOR, 0, 20, 60, 40), (BIKE, 5, 10, 35, 38), (PERSON, 10, 2, 30, 25)]
BOXES = {PERSON: [10, 2, 30, 25], BIKE: [5, 10, 35, 38], FLOOR: [0, 20, 60, 40]}
CATEGORIES = {PERSON: 0, BIKE: 1, FLOOR: 3}


def record(image_id: str, coco_id: int, folder: str = "train2017") -> dict[str, Any]:
    """An element of "data", as published."""
    return {
        "file_name": f"{folder}/{coco_id:012d}.jpg",
        "height": HEIGHT,
        "width": WIDTH,
        "image_id": image_id,
        "pan_seg_file_name": f"panoptic_{folder}/{coco_id:012d}.png",
        "segments_info": [
            {"id": id_, "category_id": category, "iscrowd": 0, "isthing": int(category < 2), "area": 1}
            for id_, category in CATEGORIES.items()
        ],
        "relations": [[0, 1, 1], [1, 2, 0], [0, 1, 1]],
        "annotations": [
            {"bbox": [float(v) for v in BOXES[id_]], "bbox_mode": 0, "category_id": category}
            for id_, category in CATEGORIES.items()
        ],
    }


class Psg:
    """A PSG file beside the folder of COCO, with three records that a test may change before packing."""

    def __init__(self, root: Path, write_jpeg: Any, ids: Any, write_png: Any) -> None:
        self.root, self.coco, self.file = root, root / "coco", root / "psg" / "psg.json"
        self.data = [record("107902", 417720), record("285770", 5), record("7", 139, "val2017")]
        self.top: dict[str, Any] = {
            "data": self.data,
            "thing_classes": ["person", "bicycle"],
            "stuff_classes": ["door-stuff", "floor-other-merged"],
            "predicate_classes": ["on", "riding"],
            "test_image_ids": ["7"],
        }
        self.file.parent.mkdir()
        for k, one in enumerate(self.data):
            write_jpeg(self.coco / one["file_name"], HEIGHT, WIDTH, seed=k)
            write_png(self.coco / one["pan_seg_file_name"], ids)
        self.actions = root / "actions.json"
        self.actions.write_text(json.dumps({one["image_id"]: f"Action  {k}" for k, one in enumerate(self.data)}))

    def write(self) -> Path:
        content = json.dumps(self.top)
        if not self.file.exists() or self.file.read_text() != content:  # to keep its time
            self.file.write_text(content)
        return self.file


@pytest.fixture
def psg(tmp_path: Path, write_jpeg: Any, write_png: Any, rectangles: Any) -> Psg:
    return Psg(tmp_path, write_jpeg, rectangles(HEIGHT, WIDTH, *RECTANGLES), write_png)


@pytest.fixture
def packs(psg: Psg, packed: Any) -> Callable[..., Any]:
    """Pack the file and its actions; splits are irrelevant unless a test says otherwise."""
    return lambda **options: packed(psg.write(), **{"actions": psg.actions} | options)


def test_valid_records(psg: Psg, packs: Any, texts: Any) -> None:
    found = packs(val=0)
    assert not found.rejected
    assert found.splits == {"107902": "train", "285770": "train", "7": "test"}
    scene = found.scenes["107902"]
    assert scene.action == "action 0"
    assert scene.image == (psg.coco / "train2017" / "000000417720.jpg").read_bytes()
    assert [o.name for o in scene.objects] == ["person", "bicycle", "floor"]
    assert [list(o.box) for o in scene.objects] == [BOXES[id_] for id_ in CATEGORIES]
    assert texts(scene) == ["person riding bicycle", "bicycle on floor"], "a repeated relation counts once"
    ids = np.zeros((HEIGHT, WIDTH), int)
    for id_, x1, y1, x2, y2 in RECTANGLES:
        ids[y1:y2, x1:x2] = id_
    for id_, item in zip(CATEGORIES, scene.objects, strict=True):
        assert torch.equal(rle.decode(item.mask), torch.from_numpy(ids == id_))


@pytest.mark.parametrize(
    ("category", "name"),
    [
        ("floor-other-merged", "floor"),
        ("food-other-merged", "food"),
        ("water-other", "water"),
        ("tree-merged", "tree"),
        ("door-stuff", "door"),
        ("mirror-stuff", "mirror"),
        ("wall-brick", "wall brick"),
        ("playingfield", "playingfield"),
        ("teddy bear", "teddy bear"),
    ],
)
def test_names_of_categories(category: str, name: str) -> None:
    assert plain_name(category) == name


def test_training_images_never_go_to_the_test_split(psg: Psg, packs: Any, write_jpeg: Any) -> None:
    for k in range(40):
        one = record(f"more{k}", 5)
        psg.data.append(one)
    found = packs(val=0.5, test=0.5)
    assert {key for key, split in found.splits.items() if split == "test"} == {"7"}
    assert 10 <= sum(split == "val" for split in found.splits.values()) <= 32, "half of 42, by a hash: 3 sigma"
    hashed = packs(out="hash", val=0, test=1, split="hash")
    assert set(hashed.splits.values()) == {"test"}
    psg.top["test_image_ids"] = []
    assert set(packs(out="none", val=0, test=1).splits.values()) == {"test"}, (
        "without a test set of its own, by the hash"
    )


def test_actions_from_captions(psg: Psg, packed: Any) -> None:
    folder = psg.root / "annotations"
    folder.mkdir()
    images = {"train2017": [417720, 5], "val2017": [139]}
    for part, ids in images.items():
        captions = {
            "images": [{"id": i, "file_name": f"{i:012d}.jpg"} for i in ids],
            "annotations": [
                {"id": 9, "image_id": ids[0], "caption": "Later."},
                {"id": 3, "image_id": ids[0], "caption": f"A man rides\n in {part}."},
                {"id": 1, "image_id": ids[0], "caption": " "},
                {"id": 2, "image_id": 7, "caption": "Of an image that the file does not list."},
                *({"id": 4, "image_id": i, "caption": "Other."} for i in ids[1:]),
            ],
        }
        (folder / f"captions_{part}.json").write_text(json.dumps(captions))
    found = packed(psg.write(), actions=folder)
    assert {key: scene.action for key, scene in found.scenes.items()} == {
        "107902": "a man rides in train2017.",
        "285770": "other.",
        "7": "a man rides in val2017.",
    }


@pytest.mark.parametrize("name", ["107902", "train2017/000000417720.jpg", "000000417720.jpg"])
def test_actions_by_id_or_file_name(psg: Psg, packed: Any, name: str) -> None:
    psg.actions.write_text(json.dumps({name: "riding"}))
    found = packed(psg.write(), actions=psg.actions)
    assert {key: scene.action for key, scene in found.scenes.items()} == {"107902": "riding", "285770": None, "7": None}


def test_without_actions(psg: Psg, packed: Any) -> None:
    assert {scene.action for scene in packed(psg.write()).scenes.values()} == {None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", r"expected \{image id or file name: action\} or COCO captions"),
        ("{}", "contains no actions"),
        ('{"7": 3}', "got 3 as the action of '7', expected text"),
        ('{"7": " "}', "got ' ' as the action of '7', expected text"),
        (
            '{"8": "riding"}',
            r"none of its 1 actions belongs to .*: got '8', expected the id or file name of an image, such as '107902'",
        ),
        (
            '{"images": [], "annotations": [{"id": 1, "image_id": 7, "caption": "a"}]}',
            'no actions; .* listed in "images',
        ),
        ('{"images": [], "annotations": [{"id": 1}]}', "malformed COCO captions"),
        ('{"images": [{"id": []}], "annotations": []}', "malformed COCO captions"),
        ('{"images": [], "annotations": [{"id": Infinity}]}', "not readable as JSON: got the number inf"),
        ("{", "not readable as JSON"),
    ],
)
def test_unusable_actions(psg: Psg, packed: Any, content: str, message: str) -> None:
    psg.actions.write_text(content)
    with pytest.raises(UserError, match=message):
        packed(psg.write(), actions=psg.actions)


def test_missing_actions(psg: Psg, packed: Any) -> None:
    with pytest.raises(UserError, match=r"none.json: no such file or directory"):
        packed(psg.write(), actions=psg.root / "none.json")
    with pytest.raises(UserError, match=r"contains no captions_\*.json"):
        packed(psg.write(), actions=psg.coco)
    with pytest.raises(UserError, match="actions: got 3, expected a path, or null"):
        packed(psg.write(), actions=3)


def test_boxes_come_from_the_masks_if_their_number_differs(psg: Psg, packs: Any) -> None:
    del psg.data[0]["annotations"][0]
    del psg.data[1]["annotations"]
    psg.data[2]["annotations"][1] = {"bbox": [5, 10, "35", 38]}
    found = packs()
    assert not found.rejected
    for scene in found.scenes.values():
        # The person covers the part of the floor between x = 10 and 30 down to y = 25; not its bounds.
        assert [list(o.box) for o in scene.objects] == [BOXES[id_] for id_ in CATEGORIES]


def test_boxes_given_by_corner_and_size(psg: Psg, packs: Any) -> None:
    for annotation in psg.data[0]["annotations"]:
        x1, y1, x2, y2 = annotation["bbox"]
        annotation |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "bbox_mode": 1}
    found = packs()
    assert [list(o.box) for o in found.scenes["107902"].objects] == [BOXES[id_] for id_ in CATEGORIES]


# Damage to the first record: the reason, the objects and the relations that are left; None: the scene is rejected.
DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str, tuple[int, int] | None]] = {
    "not an object": (lambda r: r.clear(), "malformed_entry", None),
    "no segments": (lambda r: r.pop("segments_info"), "malformed_entry", None),
    "segments not a list": (lambda r: r.update(segments_info={}), "malformed_entry", None),
    "relations not a list": (lambda r: r.update(relations=None), "malformed_entry", None),
    "no file name": (lambda r: r.pop("file_name"), "malformed_entry", None),
    "no id": (lambda r: r.pop("image_id"), "unsafe_id", None),
    "id is a path": (lambda r: r.update(image_id="../a"), "unsafe_id", None),
    "id in use": (lambda r: r.update(image_id="285770"), "duplicate_id", None),
    "absolute image": (lambda r: r.update(file_name="/etc/passwd"), "unsafe_path", None),
    "escaping image": (lambda r: r.update(file_name="../coco/a.jpg"), "unsafe_path", None),
    "escaping PNG": (lambda r: r.update(pan_seg_file_name="../../a.png"), "unsafe_path", None),
    "missing image": (lambda r: r.update(file_name="train2017/none.jpg"), "missing_image", None),
    "long name": (lambda r: r.update(file_name="a" * 5000), "missing_image", None),
    "other size": (lambda r: r.update(width=61), "other_size", None),
    "size is text": (lambda r: r.update(width="60"), "other_size", None),
    "missing PNG": (lambda r: r.update(pan_seg_file_name="none.png"), "missing_masks", (3, 0)),
    "segment without an id": (lambda r: r["segments_info"][2].pop("id"), "malformed_object", (2, 1)),
    "segment id too large": (lambda r: r["segments_info"][2].update(id=1 << 24), "malformed_object", (2, 1)),
    "segment is a number": (lambda r: r["segments_info"].__setitem__(2, 3), "malformed_object", (2, 1)),
    "no such category": (lambda r: r["segments_info"][2].update(category_id=4), "unknown_object", (2, 1)),
    "category is text": (lambda r: r["segments_info"][2].update(category_id="3"), "unknown_object", (2, 1)),
    "no pixels": (lambda r: r["segments_info"][2].update(id=77), "empty_mask", (3, 1)),
    "no pixels, no box": (
        lambda r: (r["segments_info"][2].update(id=77), r.pop("annotations")),
        "malformed_object",
        (2, 1),
    ),
    "box outside": (lambda r: r["annotations"][2].update(bbox=[0, 20, 80, 40]), "box_outside", (2, 1)),
    "relation without predicate": (lambda r: r["relations"].append([0, 1]), "malformed_relation", (3, 2)),
    "relation of text": (lambda r: r["relations"].append([0, 1, "on"]), "malformed_relation", (3, 2)),
    "relation is true": (lambda r: r["relations"].append([0, 1, True]), "malformed_relation", (3, 2)),
    "no such predicate": (lambda r: r["relations"].append([0, 1, 2]), "unknown_relation", (3, 2)),
    "negative predicate": (lambda r: r["relations"].append([0, 1, -1]), "unknown_relation", (3, 2)),
    "no such object": (lambda r: r["relations"].append([0, 3, 1]), "relation_unknown_label", (3, 2)),
    "negative object": (lambda r: r["relations"].append([-1, 0, 1]), "relation_unknown_label", (3, 2)),
    "relation with itself": (lambda r: r["relations"].append([1, 1, 1]), "relation_with_itself", (3, 2)),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_records(psg: Psg, packs: Any, name: str) -> None:
    damage, reason, left = DAMAGE[name]
    damage(psg.data[0])
    found = packs()
    assert reason in REASONS and reason in [row[1] for row in found.rejected], found.rejected
    expected = {"285770", "7"} if left is None else {"107902", "285770", "7"}
    assert found.scenes.keys() == expected
    if left is not None:
        scene = found.scenes["107902"]
        assert (len(scene.objects), len(scene.relations)) == left
        assert all(entry.startswith("psg.json: entry 0 (107902)") for entry, _ in found.rejected), found.rejected


@pytest.mark.parametrize("value", [None, 3, "text", []])
def test_records_of_another_type(psg: Psg, packs: Any, value: Any) -> None:
    psg.data[0] = value
    found = packs()
    assert ("psg.json: entry 0", "malformed_entry") in found.rejected and len(found.scenes) == 2


def test_damaged_files(psg: Psg, packs: Any, write_png: Any, rectangles: Any) -> None:
    image = psg.coco / psg.data[0]["file_name"]
    image.write_bytes(image.read_bytes()[:500])
    write_png(psg.coco / psg.data[1]["pan_seg_file_name"], rectangles(HEIGHT, WIDTH + 1, *RECTANGLES))
    found = packs()
    assert found.scenes.keys() == {"285770", "7"}
    assert {reason for _, reason in found.rejected} == {"image_truncated", "bad_masks", "relation_without_mask"}
    assert any("got a PNG of 61 x 40, expected the image's 60 x 40" in detail for detail in found.details)
    assert all(o.mask is None for o in found.scenes["285770"].objects)


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "grey", "palette", "folder"])
def test_damaged_pngs(psg: Psg, packs: Any, write_png: Any, rectangles: Any, damage: str) -> None:
    png = psg.coco / psg.data[0]["pan_seg_file_name"]
    if damage in ("grey", "palette"):
        write_png(png, rectangles(HEIGHT, WIDTH, *RECTANGLES), mode={"grey": "L", "palette": "P"}[damage])
    elif damage == "folder":
        png.unlink()
        png.mkdir()
    else:
        png.write_bytes({"truncated": png.read_bytes()[:80], "text": b"not a PNG", "empty": b""}[damage])
    found = packs()
    (row,) = {row for row in found.rejected if row[1] != "relation_without_mask"}
    assert row == ("psg.json: entry 0 (107902)", "missing_masks" if damage == "folder" else "bad_masks")
    assert len(found.scenes["107902"].objects) == 3 and not found.scenes["107902"].relations


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {}}, "as 'data', expected a list"),
        ({"thing_classes": None}, "got None as 'thing_classes', expected a list"),
        ({"predicate_classes": [1]}, r"got \[1\] as 'predicate_classes', expected names"),
        ({"test_image_ids": 3}, "got 3 as 'test_image_ids', expected a list"),
        ({"data": []}, "the data set is empty"),
    ],
)
def test_unusable_files(psg: Psg, change: dict[str, Any], message: str) -> None:
    psg.top |= change
    with pytest.raises(UserError, match=message):
        open_source(psg.write(), "psg")


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", '"text"', "[" * 100_000, "\udcff"])
def test_unreadable_files(psg: Psg, content: str) -> None:
    psg.file.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"psg.json: "):
        open_source(psg.file, "psg")
    with pytest.raises(UserError, match="not a data set of a known format"):
        open_source(psg.file)


def test_files_of_coco_are_named(psg: Psg) -> None:
    images = [{"id": 139, "file_name": "000000000139.jpg"}]
    others = {
        "instances_val2017": ({"id": 1, "segmentation": [], "iscrowd": 0, "bbox": [0, 0, 1, 1]}, "COCO instances"),
        "person_keypoints_val2017": ({"id": 1, "segmentation": [], "keypoints": [0]}, "COCO keypoints"),
        "captions_val2017": ({"id": 1, "caption": "A man."}, "COCO captions"),
    }
    for name, (annotation, what) in others.items():
        path = psg.root / f"{name}.json"
        path.write_text(json.dumps({"images": images, "annotations": [annotation | {"image_id": 139}]}))
        for format in ("auto", "psg", "coco-panoptic"):
            with pytest.raises(UserError, match=what):
                open_source(path, format)


def test_large_files_are_recognised_by_their_ends(psg: Psg) -> None:
    filler = [copy.deepcopy(psg.data[0]) for _ in range(200)]
    for order in (["data", "predicate_classes"], ["predicate_classes", "data"]):
        top = psg.top | {"data": filler}
        psg.file.write_text(json.dumps({name: top[name] for name in [*order, *(set(top) - set(order))]}))
        assert psg.file.stat().st_size > 2 << 16
        assert recognise([psg.file]) == "psg"


@pytest.mark.parametrize("layout", ["beside", "inside", "around", "elsewhere", "flat"])
def test_where_images_are_found(psg: Psg, packed: Any, layout: str) -> None:
    file, options = psg.write(), {}
    if layout == "inside":  # DIR/psg.json, DIR/coco/train2017
        file = psg.file.replace(psg.root / "psg.json")
    elif layout == "around":  # coco/annotations/psg.json, coco/train2017, coco/annotations/panoptic_train2017
        (psg.coco / "annotations").mkdir()
        for part in ("train2017", "val2017"):
            (psg.coco / f"panoptic_{part}").rename(psg.coco / "annotations" / f"panoptic_{part}")
        file = psg.file.replace(psg.coco / "annotations" / "psg.json")
    elif layout in ("elsewhere", "flat"):
        options["images"] = psg.root / "far" / "away"
        options["images"].mkdir(parents=True)
        psg.coco.rename(options["images"] / "coco") if layout == "elsewhere" else None
        if layout == "flat":
            for one in psg.coco.glob("*/*"):
                one.rename(options["images"] / one.name)
        else:
            options["images"] /= "coco"
    found = packed(file, actions=psg.actions, **options)
    assert len(found.scenes) == 3 and not found.rejected
    source = open_source(file, "psg") if not options else None
    assert source is None or file.parent.resolve() in source.directories


def test_a_wrong_directory_of_images_is_one_error(psg: Psg, packed: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UserError, match=r"psg.json: none of its files, such as 'train2017/000000417720.jpg', is in .*empty"
    ):
        packed(psg.write(), images=tmp_path / "empty")
    with pytest.raises(UserError, match=r"images: .*none: no such directory"):
        packed(psg.write(), images=tmp_path / "none")
    for png in psg.coco.glob("panoptic_*/*"):
        png.unlink()
    with pytest.raises(UserError, match=r"such as 'panoptic_train2017/000000417720.png'.*as --images"):
        packed(psg.write())


def test_directories(psg: Psg, packed: Any, packs: Any) -> None:
    assert recognise([psg.write()]) == recognise([psg.file.parent]) == "psg"
    expected = packs().report.splits
    psg.file.rename(psg.file.with_name("psg_train_val.json"))
    assert packed(psg.file.parent, "one", actions=psg.actions).report.splits == expected
    psg.file.with_name("psg_val_test.json").write_text(json.dumps(psg.top))
    with pytest.raises(UserError, match=r"contains psg_train_val.json, psg_val_test.json; name the file to pack"):
        packed(psg.file.parent, "several")
    psg.write()
    assert packed(psg.file.parent, "all", actions=psg.actions).report.splits == expected, "psg.json comes first"
    with pytest.raises(UserError, match="contains no psg"):
        packed(psg.coco, "none", format="psg")
    with pytest.raises(UserError, match=r"got 2 sources, expected psg.json"):
        packed([psg.file, psg.file], "two", format="psg")


def test_an_up_to_date_pack_and_changes(psg: Psg, packs: Any, write_png: Any, rectangles: Any) -> None:
    assert not packs().report.up_to_date
    assert packs().report.up_to_date
    image, png = (psg.coco / psg.data[0][name] for name in ("file_name", "pan_seg_file_name"))
    changes: dict[str, Callable[[], Any]] = {
        "an image": lambda: image.write_bytes(image.read_bytes() + b"\0"),
        "a PNG": lambda: write_png(png, rectangles(HEIGHT, WIDTH, *RECTANGLES[1:])),
        "the actions": lambda: psg.actions.write_text(json.dumps({"7": "riding"})),
        "the file": lambda: psg.data.pop(),
    }
    for name, change in changes.items():
        change()
        if name == "the file":
            psg.actions.write_text(json.dumps({"107902": "riding"}))
        assert not packs().report.up_to_date, name
        assert packs().report.up_to_date, name


def test_workers_give_the_same_pack(psg: Psg, tmp_path: Path) -> None:
    file = psg.write()
    for workers in (1, 2):
        pack(file, tmp_path / str(workers), actions=psg.actions, workers=workers, progress=False)
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "2").iterdir())
    assert all((tmp_path / "1" / n).read_bytes() == (tmp_path / "2" / n).read_bytes() for n in names)


def test_the_command_line(psg: Psg, capsys: pytest.CaptureFixture[str]) -> None:
    out = psg.root / "out"
    command = ["pack", str(psg.write()), "--out", str(out), "--actions", str(psg.actions), "--images", str(psg.coco)]
    assert main(command) == 0 and (out / "manifest.json").exists()
    assert main([*command, "--actions", str(psg.root / "none")]) == 2
    assert "none: no such file" in capsys.readouterr().err
