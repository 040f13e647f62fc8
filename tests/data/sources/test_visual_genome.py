from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from scenarioclip_fast.data.check import REASONS
from scenarioclip_fast.data.sources import json_array, open_source
from scenarioclip_fast.data.sources.json_array import index_array, read_element
from scenarioclip_fast.data.sources.registry import recognise
from scenarioclip_fast.errors import UserError

HEIGHT, WIDTH = 40, 60


def item(id_: int, name: str, x: int, y: int, w: int, h: int, version: str, **more: Any) -> dict[str, Any]:
    """An object, as published in a release."""
    named = {"name": name} if more.pop("single", False) else {"names": [name]}
    key = "id" if version == "1.0" else "object_id"
    extra = {"1.0": {}, "1.2": {"synsets": []}, "1.4": {"synsets": [], "merged_object_ids": []}}[version]
    return {key: id_, "x": x, "y": y, "w": w, "h": h} | named | extra | more


class VisualGenome:
    """A directory as it is unpacked, in the format of a release, with two images."""

    def __init__(self, root: Path, version: str, write_jpeg: Any) -> None:
        self.root, self.version = root, version
        write_jpeg(root / "VG_100K" / "1.jpg", HEIGHT, WIDTH)
        write_jpeg(root / "VG_100K_2" / "2407890.jpg", HEIGHT, WIDTH)
        man, bike = self.item(10, "Man ", 5, 5, 20, 30), self.item(11, "bicycle", 0, 15, 40, 20)
        road = self.item(12, "road", 0, 20, 60, 20, single=True)
        self.objects = [
            self.row(1, "objects", [man, bike]),
            self.row(2407890, "objects", [self.item(20, "cat", 1, 2, 3, 4)]),
        ]
        relations = [self.relation("ON", man, bike), self.relation("along", bike, road), self.relation("on", man, bike)]
        self.relationships = [self.row(1, "relationships", relations), self.row(2407890, "relationships", [])]
        self.image_data: list[Any] | None = [
            {("id" if version == "1.0" else "image_id"): i, "width": WIDTH, "height": HEIGHT, "coco_id": None}
            for i in (1, 2407890, 3)
        ]

    def item(self, *fields: Any, **more: Any) -> dict[str, Any]:
        return item(*fields, self.version, **more)

    def row(self, image: Any, part: str, items: Any) -> dict[str, Any]:
        return {"id" if self.version == "1.0" else "image_id": image, part: items}

    def relation(self, predicate: str, subject: Any, object_: Any) -> dict[str, Any]:
        key = "id" if self.version == "1.0" else "relationship_id"
        return {key: 15927, "predicate": predicate, "subject": subject, "object": object_}

    def write(self) -> Path:
        (self.root / "objects.json").write_text(json.dumps(self.objects))
        (self.root / "relationships.json").write_text(json.dumps(self.relationships))
        if self.image_data is not None:
            (self.root / "image_data.json").write_text(json.dumps(self.image_data))
        return self.root


@pytest.fixture(params=["1.4"])
def vg(request: pytest.FixtureRequest, tmp_path: Path, write_jpeg: Any) -> VisualGenome:
    return VisualGenome(tmp_path / "vg", request.param, write_jpeg)


@pytest.mark.parametrize("vg", ["1.0", "1.2", "1.4"], indirect=True)
@pytest.mark.parametrize("sizes", [True, False])
def test_valid_images(vg: VisualGenome, packed: Any, texts: Any, sizes: bool) -> None:
    vg.image_data = vg.image_data if sizes else None
    found = packed(vg.write())
    assert not found.rejected and found.scenes.keys() == {"1", "2407890"}
    scene = found.scenes["1"]
    assert scene.image == (vg.root / "VG_100K" / "1.jpg").read_bytes() and scene.action is None
    assert [(o.name, list(o.box), o.mask) for o in scene.objects] == [
        ("man", [5, 5, 25, 35], None),
        ("bicycle", [0, 15, 40, 35], None),
        ("road", [0, 20, 60, 40], None),
    ], "the road is only in a relationship"
    assert texts(scene) == ["man on bicycle", "bicycle along road"]
    cat = found.scenes["2407890"]
    assert cat.image == (vg.root / "VG_100K_2" / "2407890.jpg").read_bytes()
    assert [(o.name, list(o.box)) for o in cat.objects] == [("cat", [1, 2, 4, 6])] and not cat.relations


def test_aliases(vg: VisualGenome, packed: Any, texts: Any) -> None:
    (vg.root / "object_alias.txt").write_text("person,man,guy\nbike,bicycle,cycle\nguy,fellow,man\n\n")
    (vg.root / "relationship_alias.txt").write_text("On top of,ON\r\nnext to,along\r\n")
    vg.objects[1]["objects"][0]["names"] = ["Fellow"]
    found = packed(vg.write())
    assert texts(found.scenes["1"]) == ["person on top of bike", "bike next to road"]
    assert [o.name for o in found.scenes["2407890"].objects] == ["person"], "guy, and so its own aliases, are a person"
    (vg.root / "object_alias.txt").write_text("human,man\n")
    again = packed(vg.root)
    assert not again.report.up_to_date and "human" in [o.name for o in again.scenes["1"].objects]
    (vg.root / "object_alias.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"object_alias.txt: not readable as text"):
        packed(vg.root)


def test_actions(vg: VisualGenome, packed: Any) -> None:
    actions = vg.root / "actions.json"
    actions.write_text('{"1": "Riding a bike", "2407890.jpg": "sleeping"}')
    found = packed(vg.write(), actions=actions)
    assert {key: scene.action for key, scene in found.scenes.items()} == {"1": "riding a bike", "2407890": "sleeping"}


def test_ids_of_text_and_merged_objects(vg: VisualGenome, packed: Any, texts: Any) -> None:
    man = vg.item("a", "man", 5, 5, 20, 30, merged_object_ids=[77, "b"])
    bike, road = vg.item("b", "bike", 0, 15, 40, 20), vg.item("r", "road", 0, 20, 60, 20)
    vg.objects[0]["objects"] = [man, bike, road]
    ends = [(vg.item(77, "male", 0, 0, 9, 9), bike), (bike, vg.item(5, "street", 0, 0, 9, 9, merged_object_ids=["r"]))]
    vg.relationships[0]["relationships"] = [vg.relation("near", *pair) for pair in ends]
    found = packed(vg.write())
    assert not found.rejected
    assert texts(found.scenes["1"]) == ["man near bike", "bike near road"]
    assert len(found.scenes["1"].objects) == 3


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ([-10, -20, 30, 50], [0, 0, 20, 30]),
        ([50, 30, 100, 100], [50, 30, 60, 40]),
        ([-5, -5, 500, 500], [0, 0, 60, 40]),
        ([60, 0, 10, 10], None),
        ([5, 5, 0, 10], None),
        ([5, 5, -4, 10], None),
        ([float("nan"), 5, 4, 10], None),
        ([5, 5, 1e400, 10], None),
    ],
)
def test_boxes_are_clipped(vg: VisualGenome, packed: Any, box: list[float], expected: list[float] | None) -> None:
    vg.objects[1]["objects"] = [vg.item(20, "cat", *box)]
    found = packed(vg.write())
    boxes = [list(o.box) for o in found.scenes["2407890"].objects]
    assert boxes == ([] if expected is None else [expected])
    assert [reason for _, reason in found.rejected] == ([] if expected is not None else ["box_outside"])


# Damage to the first image: the reason, its objects and relations; None: the image is rejected.
DAMAGE: dict[str, tuple[Callable[[VisualGenome], Any], str, tuple[int, int] | None]] = {
    "objects not a list": (lambda vg: vg.objects[0].update(objects=3), "malformed_entry", None),
    "relationships missing": (lambda vg: vg.relationships[0].pop("relationships"), "malformed_entry", None),
    "object without a name": (lambda vg: vg.objects[0]["objects"][1].update(names=[]), "malformed_object", (2, 0)),
    "object with a number as name": (
        lambda vg: vg.objects[0]["objects"][1].update(names=[3]),
        "malformed_object",
        (2, 0),
    ),
    "object without a box": (lambda vg: vg.objects[0]["objects"][1].pop("w"), "malformed_object", (2, 0)),
    "object is a number": (lambda vg: vg.objects[0]["objects"].append(3), "malformed_object", (3, 2)),
    "no subject": (lambda vg: vg.relationships[0]["relationships"][0].pop("subject"), "malformed_relation", (3, 2)),
    "no predicate": (lambda vg: vg.relationships[0]["relationships"][1].pop("predicate"), "malformed_relation", (2, 1)),
    "empty predicate": (
        lambda vg: vg.relationships[0]["relationships"][1].update(predicate=" "),
        "malformed_relation",
        (3, 1),
    ),
    "relation is a number": (lambda vg: vg.relationships[0]["relationships"].append(3), "malformed_relation", (3, 2)),
    "relation with itself": (
        lambda vg: vg.relationships[0]["relationships"].append(
            vg.relation("on", vg.objects[0]["objects"][0], vg.objects[0]["objects"][0])
        ),
        "relation_with_itself",
        (3, 2),
    ),
    "other size": (lambda vg: vg.image_data[0].update(width=600), "other_size", None),  # type: ignore[index]
    "missing image": (lambda vg: (vg.root / "VG_100K" / "1.jpg").unlink(), "missing_image", None),
    "id is a path": (lambda vg: vg.objects.append(vg.row("../1", "objects", [])), "unsafe_path", (3, 2)),
    "repeated image": (lambda vg: vg.objects.append(vg.row(1, "objects", [])), "duplicate_id", (3, 2)),
    "no image id": (lambda vg: vg.objects.append({"objects": []}), "malformed_entry", (3, 2)),
    "an entry is a number": (lambda vg: vg.relationships.append(3), "malformed_entry", (3, 2)),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_entries(vg: VisualGenome, packed: Any, name: str) -> None:
    damage, reason, left = DAMAGE[name]
    damage(vg)
    found = packed(vg.write())
    assert reason in REASONS and reason in [row[1] for row in found.rejected], found.rejected
    assert found.scenes.keys() == ({"2407890"} if left is None else {"1", "2407890"})
    if left is not None:
        assert (len(found.scenes["1"].objects), len(found.scenes["1"].relations)) == left


def test_unusable_directories(vg: VisualGenome, packed: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"contains no objects.json"):
        open_source(vg.root, "visual-genome")
    vg.write()
    assert recognise([vg.root]) == "visual-genome"
    with pytest.raises(
        UserError,
        match=r"objects.json: none of its files, such as '1.jpg', is in .*empty; pass the directory .* as --images",
    ):
        (tmp_path / "empty").mkdir()
        packed(vg.root, images=tmp_path / "empty")
    (vg.root / "relationships.json").write_text('{"image_id": 1}')
    with pytest.raises(UserError, match=r"relationships.json: not readable as a JSON array: expected \[ at the start"):
        packed(vg.root)
    (vg.root / "relationships.json").unlink()
    with pytest.raises(UserError, match="not a data set of a known format"):
        packed(vg.root)


def test_an_up_to_date_pack_and_changes(vg: VisualGenome, packed: Any) -> None:
    assert not packed(vg.write()).report.up_to_date
    assert packed(vg.root).report.up_to_date
    image = vg.root / "VG_100K" / "1.jpg"
    image.write_bytes(image.read_bytes() + b"\0")
    assert not packed(vg.root).report.up_to_date
    vg.objects[1]["objects"][0]["names"] = ["dog"]
    assert "dog" in [o.name for o in packed(vg.write()).scenes["2407890"].objects]


def test_images_elsewhere(vg: VisualGenome, packed: Any, tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    for path in vg.root.glob("VG_100K*/*"):
        path.rename(tmp_path / "flat" / path.name)
    assert len(packed(vg.write(), images=tmp_path / "flat").scenes) == 2


def test_workers_give_the_same_pack(vg: VisualGenome, packed: Any, tmp_path: Path) -> None:
    (vg.root / "object_alias.txt").write_text("person,man\n")
    vg.write()
    for workers in (1, 2):
        packed(vg.root, str(workers), workers=workers)
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert all((tmp_path / "1" / n).read_bytes() == (tmp_path / "2" / n).read_bytes() for n in names)


ROWS = [{"a": [1, "é,]"]}, 17, "text", [[]], None, {"b": "\U0001f600" * 9}, 1.5, {}]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 20])
@pytest.mark.parametrize("form", [{}, {"indent": 2}, {"separators": (",", ":")}, {"ensure_ascii": False}])
def test_arrays_are_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, form: dict[str, Any]
) -> None:
    monkeypatch.setattr(json_array, "_CHUNK", chunk)
    path = tmp_path / "a.json"
    path.write_text(f" \n{json.dumps(ROWS, **form)}\n", "utf-8")
    found = list(index_array(path))
    assert [value for _, value in found] == ROWS
    assert [read_element(path, extent) for extent, _ in found] == ROWS
    path.write_text("[ ]")
    assert list(index_array(path)) == []


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[",
        "[1",
        "[1,",
        "[1,]",
        "[1 2]",
        '[{"a": 1',
        "[nul]",
        "[" * 100_000,
        "\udcff",
        "[] x",
        "[1][2]",
        "[1],",
    ],
)
def test_damaged_arrays(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"a.json: not readable as a JSON array"):
        list(index_array(path))


def test_a_damaged_element_does_not_read_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_array, "_CHUNK", 16)
    monkeypatch.setattr(json_array, "_MAX_ELEMENT", 1000)
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1, 2' + ", 3" * 10_000)
    with path.open("rb") as file:
        monkeypatch.setattr(Path, "open", lambda *_: nullcontext(file))
        with pytest.raises(UserError, match="not readable"):
            list(index_array(path))
        assert file.tell() < 4000, "each read doubles what is held, up to 1,000 characters"


def test_changes_while_packing(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1}, {"b": 2}]')
    *_, (extent, _) = index_array(path)
    path.write_text("[1]")
    with pytest.raises(UserError, match="the file was changed while packing"):
        read_element(path, extent)
