from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from scenarioclip_fast.data import rle
from scenarioclip_fast.data.sources import open_source
from scenarioclip_fast.data.sources.registry import recognise
from scenarioclip_fast.errors import UserError

HEIGHT, WIDTH = 40, 60
BALL, GRASS, CROWD = 16757838, 10025880, 3153362
RECTANGLES = [(GRASS, 0, 20, 60, 40), (CROWD, 30, 0, 60, 15), (BALL, 10, 2, 30, 25)]
BOXES = {BALL: [10, 2, 20, 23], GRASS: [0, 20, 60, 20], CROWD: [30, 0, 30, 15]}  # x, y, width, height
CATEGORIES = [
    {"supercategory": "person", "color": [220, 20, 60], "isthing": 1, "id": 1, "name": "person"},
    {"supercategory": "sports", "color": [78, 180, 255], "isthing": 1, "id": 37, "name": "sports ball"},
    {"supercategory": "plant", "color": [152, 251, 152], "isthing": 0, "id": 193, "name": "grass-merged"},
]


def annotations(*ids: int) -> dict[str, Any]:
    """The content of a panoptic file, as published."""

    def segment(id_: int, category: int) -> dict[str, Any]:
        return {"area": 1, "category_id": category, "iscrowd": int(id_ == CROWD), "id": id_, "bbox": BOXES[id_]}

    segments = [segment(BALL, 37), segment(CROWD, 1), segment(GRASS, 193)]
    return {
        "info": {"description": "COCO 2018 Panoptic Dataset", "version": "1.0", "year": 2018},
        "licenses": [{"url": "http://creativecommons.org/licenses/by-nc/2.0/", "id": 2, "name": "A License"}],
        "images": [
            {"license": 2, "file_name": f"{i:012d}.jpg", "height": HEIGHT, "width": WIDTH, "id": i} for i in ids
        ],
        "annotations": [
            {"segments_info": [dict(s) for s in segments], "file_name": f"{i:012d}.png", "image_id": i} for i in ids
        ],
        "categories": CATEGORIES,
    }


class Coco:
    """COCO as it is unpacked: annotations/panoptic_*.json beside folders of PNGs, and folders of images around it."""

    def __init__(self, root: Path, write_jpeg: Any, write_png: Any, ids: Any) -> None:
        self.root = root
        self.train, self.val = (root / "annotations" / f"panoptic_{part}2017.json" for part in ("train", "val"))
        self.content = {self.train: annotations(9, 25), self.val: annotations(139)}
        for file, content in self.content.items():
            for one in content["annotations"]:
                name = f"{one['image_id']:012d}"
                write_jpeg(root / file.stem.removeprefix("panoptic_") / f"{name}.jpg", HEIGHT, WIDTH)
                write_png(root / "annotations" / file.stem / f"{name}.png", ids)
        self.actions = root / "actions.json"
        self.actions.write_text('{"9": "kicking", "25": "kicking", "139": "kicking"}')

    def write(self) -> None:
        for file, content in self.content.items():
            file.write_text(json.dumps(content))


@pytest.fixture
def coco(tmp_path: Path, write_jpeg: Any, write_png: Any, rectangles: Any) -> Coco:
    return Coco(tmp_path / "coco", write_jpeg, write_png, rectangles(HEIGHT, WIDTH, *RECTANGLES))


@pytest.mark.parametrize("what", ["root", "annotations", "files", "file"])
def test_valid_files(coco: Coco, packed: Any, rectangles: Any, what: str) -> None:
    coco.write()
    source: Any = {
        "root": coco.root,
        "annotations": coco.val.parent,
        "files": [coco.val, coco.train],
        "file": coco.val,
    }[what]
    found = packed(source, actions=coco.actions)
    assert not found.rejected
    assert found.splits == {"139": "val"} | ({"9": "train", "25": "train"} if what != "file" else {})
    scene = found.scenes["139"]
    assert scene.image == (coco.root / "val2017" / "000000000139.jpg").read_bytes()
    assert [(o.name, list(o.box)) for o in scene.objects] == [
        ("sports ball", [10, 2, 30, 25]),
        ("grass", [0, 20, 60, 40]),
    ], "without the crowd"
    ids = rectangles(HEIGHT, WIDTH, *RECTANGLES)
    for id_, item in zip((BALL, GRASS), scene.objects, strict=True):
        assert torch.equal(rle.decode(item.mask), torch.from_numpy(ids == id_))
    assert not scene.relations and found.report.vocabulary["relation"] == 0


def test_actions_from_captions(coco: Coco, packed: Any) -> None:
    coco.write()
    captions = coco.val.parent / "captions_val2017.json"
    images = [{"id": 139, "file_name": "000000000139.jpg"}]
    rows = [{"id": 5, "image_id": 139, "caption": "A man kicks a ball."}]
    captions.write_text(json.dumps({"images": images, "annotations": rows}))
    found = packed([coco.val], actions=captions)
    assert found.scenes["139"].action == "a man kicks a ball."


def test_damaged_entries(coco: Coco, packed: Any) -> None:
    content = coco.content[coco.train] = annotations(9, 25, 26, 27, 28)
    rows = content["annotations"]
    rows[0]["segments_info"][2] |= {"category_id": 194}
    rows[1]["segments_info"][0]["bbox"] = [10, 2, 20]
    rows[2]["image_id"] = 1000
    rows[3]["segments_info"] = "none"
    rows[4] = None
    rows.append(dict(annotations(9)["annotations"][0]))
    coco.write()
    found = packed([coco.train], actions=coco.actions)
    assert sorted(found.rejected) == [
        ("9", "duplicate_id"),
        ("panoptic_train2017.json: entry 0 (9): object 1", "unknown_object"),
        ("panoptic_train2017.json: entry 2 (1000)", "malformed_entry"),
        ("panoptic_train2017.json: entry 3 (27)", "malformed_entry"),
        ("panoptic_train2017.json: entry 4", "malformed_entry"),
    ]
    assert found.scenes.keys() == {"9", "25"}
    assert [list(o.box) for o in found.scenes["25"].objects] == [[10, 2, 30, 25], [0, 20, 60, 40]], "from the mask"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotations": None}, "got None as 'annotations', expected a list"),
        ({"categories": [{"id": "1", "name": "person"}]}, "as a category, expected one with id and name"),
        ({"categories": [*CATEGORIES, {"id": 1, "name": "cat"}]}, None),
        ({"annotations": []}, "the data set is empty"),
    ],
)
def test_unusable_files(coco: Coco, change: dict[str, Any], message: str | None) -> None:
    coco.content[coco.val] |= change
    coco.write()
    if message is not None:
        with pytest.raises(UserError, match=message):
            open_source(coco.val, "coco-panoptic")
    else:
        with pytest.raises(UserError, match=r"its categories differ from those of .*panoptic_train2017.json"):
            open_source([coco.train, coco.val], "coco-panoptic")


def test_recognising(coco: Coco, tmp_path: Path) -> None:
    coco.write()
    assert recognise([coco.val]) == recognise([coco.root]) == recognise([coco.train, coco.val]) == "coco-panoptic"
    renamed = coco.val.with_name("mine.json")
    coco.val.rename(renamed)
    assert recognise([renamed]) == "coco-panoptic"
    renamed.write_bytes(renamed.read_text().encode("utf-16"))
    assert recognise([renamed]) == "coco-panoptic"
    psg = tmp_path / "psg.json"
    psg.write_text('{"data": [{"pan_seg_file_name": "a.png", "segments_info": [{"isthing": 1}]}]}')
    with pytest.raises(UserError, match=r"psg.json: got a file of PSG.*expected COCO panoptic"):
        open_source(psg, "coco-panoptic")
    with pytest.raises(UserError, match=r"got COCO panoptic annotations.*expected a file of PSG"):
        open_source(coco.train, "psg")
    with pytest.raises(UserError, match=r"contains no panoptic_\*.json"):
        open_source(tmp_path, "coco-panoptic")
