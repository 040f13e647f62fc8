from __future__ import annotations

import io
import json
import os
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scenarioclip_fast.data import Scene, load_reference, pack
from scenarioclip_fast.data.check import REASONS, BadEntry, Rejection, safe_key
from scenarioclip_fast.data.sources.masks_npz import MAX_MASK_BYTES, read_masks
from scenarioclip_fast.data.sources.published import PublishedSource
from scenarioclip_fast.errors import UserError

HEIGHT, WIDTH = 40, 60
BOXES = {"cat": [5, 5, 25, 25], "mat": [0, 20, 60, 40], "dog": [40, 2, 58, 30]}


def jpeg(height: int = HEIGHT, width: int = WIDTH) -> bytes:
    import simplejpeg

    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    return bytes(simplejpeg.encode_jpeg(pixels))


def box_mask(box: Sequence[float]) -> np.ndarray:
    x1, y1, x2, y2 = (int(v) for v in box)
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y1:y2, x1:x2] = True
    return mask


class Dataset:
    """A data set with one valid entry, which a test may damage before loading it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "images").mkdir()
        (directory / "sam_results").mkdir()
        self.image = directory / "images" / "a.jpg"
        self.npz = directory / "sam_results" / "a_grounding_sam.npz"
        self.image.write_bytes(jpeg())
        self.entry: Any = {
            "id": "a",
            "image_path": "images/a.jpg",
            "action": "Sitting ",
            "objects": [[name, [float(v) for v in box]] for name, box in BOXES.items()],
            "relations": [["r0.png", ["Cat", "on", "mat"]], ["r1.png", ["dog", "left  of", "cat"], ["negative"]]],
        }
        self.arrays: dict[str, Any] = {
            "mask": np.stack([box_mask(box) for box in BOXES.values()])[:, None],
            "score": np.ones((3, 1), np.float32),
            "labels": np.array(list(BOXES)),
        }
        self.classes: Any = None

    def load(self) -> tuple[list[Scene], list[Rejection]]:
        if self.arrays and not self.npz.exists():
            np.savez(self.npz, **self.arrays)
        (self.directory / "metadata.json").write_text(json.dumps({"data": [self.entry]}))
        if self.classes is not None:
            (self.directory / "classes.json").write_text(json.dumps(self.classes))
        rejected: list[Rejection] = []
        return list(load_reference(self.directory, rejected.append)), rejected


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    return Dataset(tmp_path)


def texts(scene: Scene) -> list[str]:
    return [scene.relation_text(k) for k in range(len(scene.relations))]


def test_valid_entry(data: Dataset) -> None:
    (scene,), rejected = data.load()
    assert not rejected
    assert (scene.key, scene.action, scene.split) == ("a", "sitting", None)
    assert scene.image == data.image.read_bytes()
    assert [(o.name, list(o.box)) for o in scene.objects] == [(n, [float(v) for v in b]) for n, b in BOXES.items()]
    assert texts(scene) == ["cat on mat", "dog left of cat"]
    for item in scene.objects:
        assert isinstance(item.mask, Tensor)
        assert torch.equal(item.mask, torch.from_numpy(box_mask(BOXES[item.name])))


def test_the_mask_with_the_best_score_is_used(data: Dataset) -> None:
    good = data.arrays["mask"]
    data.arrays["mask"] = np.concatenate([~good, good, ~good], 1)
    data.arrays["score"] = np.array([[0.1, 0.9, 0.2], [np.nan, 0.3, 0.1], [-2, -1, -3]], np.float32)
    (scene,), rejected = data.load()
    assert not rejected
    assert all(torch.equal(o.mask, torch.from_numpy(box_mask(BOXES[o.name]))) for o in scene.objects)  # type: ignore[arg-type]


def test_masks_are_matched_by_label(data: Dataset) -> None:
    order = [2, 0, 1]
    data.arrays["mask"] = np.asfortranarray(data.arrays["mask"][order])
    data.arrays["labels"] = data.arrays["labels"][order]
    (scene,), rejected = data.load()
    assert not rejected
    assert all(torch.equal(o.mask, torch.from_numpy(box_mask(BOXES[o.name]))) for o in scene.objects)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [1, 255])
@pytest.mark.parametrize("axes", [3, 4])
def test_masks_as_bytes_and_one_per_object(data: Dataset, scale: int, axes: int) -> None:
    masks = data.arrays["mask"].astype(np.uint8) * scale
    data.arrays["mask"] = masks[:, 0] if axes == 3 else masks
    if axes == 3 and scale == 1:
        del data.arrays["score"]
    (scene,), rejected = data.load()
    assert not rejected
    assert all(torch.equal(o.mask, torch.from_numpy(box_mask(BOXES[o.name]))) for o in scene.objects)  # type: ignore[arg-type]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_encodings_of_json(data: Dataset, encoding: str) -> None:
    _classes(data)
    data.load()
    for name in ("metadata.json", "classes.json"):
        path = data.directory / name
        text = json.dumps(json.loads(path.read_text()) | {"note": "née"}, ensure_ascii=False)
        path.write_bytes(text.encode(encoding))
    assert [scene.key for scene in load_reference(data.directory)] == ["a"]


def test_repeated_labels_resolve_to_the_nearest_pair(data: Dataset) -> None:
    boxes = [[0, 0, 10, 10], [30, 0, 40, 10], [44, 0, 54, 10], [11, 0, 21, 10]]
    names = ["cup", "plate", "cup", "cup"]  # distances to the plate: 30, 14, 19
    data.entry["objects"] = [[n, b] for n, b in zip(names, boxes, strict=True)]
    data.entry["relations"] = [["", ["cup", "beside", "plate"]], ["", ["cup", "beside", "cup"]]]
    data.arrays = {
        "mask": np.stack([box_mask(b) for b in boxes])[:, None],
        "score": np.ones((4, 1)),
        "labels": np.array(names),
    }
    (scene,), rejected = data.load()
    assert not rejected
    assert [(r.subject, r.object) for r in scene.relations] == [(2, 1), (0, 3)]


def test_file_names_assign_the_split(data: Dataset) -> None:
    data.load()
    rows = {}
    for name in ("metadata_train.json", "metadata_val.json", "metadata_openpsg_test.json", "metadata_all.json"):
        key = name.split(".")[0]
        rows[key] = data.entry | {"id": key}
        (data.directory / name).write_text(json.dumps({"data": [rows[key]]}))
    (data.directory / "metadata.json").unlink()
    rejected: list[Rejection] = []
    splits = {s.key: s.split for s in load_reference(data.directory, rejected.append)}
    assert splits == {
        "metadata_train": "train",
        "metadata_val": "val",
        "metadata_openpsg_test": "test",
        "metadata_all": None,
    }
    assert {r.reason for r in rejected} == {"missing_masks", "relation_without_mask"}


def _entry(**change: Any) -> Callable[[Dataset], None]:
    return lambda data: data.entry.update(change)


def _object(i: int, value: Any) -> Callable[[Dataset], None]:
    return lambda data: data.entry["objects"].__setitem__(i, value)


def _relation(i: int, value: Any) -> Callable[[Dataset], None]:
    return lambda data: data.entry["relations"].__setitem__(i, value)


def _array(**change: Any) -> Callable[[Dataset], None]:
    return lambda data: data.arrays.update(change)


def _file(make: Callable[[Dataset], tuple[Path, bytes | None]]) -> Callable[[Dataset], None]:
    def damage(data: Dataset) -> None:
        path, content = make(data)
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)

    return damage


def _empty_mask(data: Dataset) -> None:
    data.arrays["mask"][0] = False


def _no_masks(data: Dataset) -> None:
    data.arrays = {}


def _classes(data: Dataset, **drop: str) -> None:
    classes = {
        "actions": ["sitting"],
        "objects": list(BOXES),
        "relations": ["cat on mat", "dog left of cat"],
    }
    data.classes = {level: [t for t in names if t != drop.get(level)] for level, names in classes.items()}


BAD_SCENES: dict[str, tuple[str, Callable[[Dataset], None]]] = {
    "not an object": ("malformed_entry", lambda data: setattr(data, "entry", ["a"])),
    "no action": ("malformed_entry", lambda data: data.entry.pop("action")),
    "empty action": ("malformed_entry", _entry(action="  ")),
    "objects not a list": ("malformed_entry", _entry(objects={"cat": 1})),
    "id is a bool": ("malformed_entry", _entry(id=True)),
    "too many objects": ("malformed_entry", _entry(objects=[["cat", BOXES["cat"]]] * 2000)),
    "id with a path": ("unsafe_id", _entry(id="../../a")),
    "id with line breaks": ("unsafe_id", _entry(id="a\nb" * 20_000)),
    "empty id": ("unsafe_id", _entry(id="")),
    "long id": ("unsafe_id", _entry(id="a" * 91)),
    "absolute image path": ("unsafe_path", _entry(image_path="/etc/passwd")),
    "image path that escapes the directory": ("unsafe_path", _entry(image_path="images/../../a.jpg")),
    "image path with a line break": ("missing_image", _entry(image_path="images/a\nb.jpg")),
    "very long image path": ("missing_image", _entry(image_path="images/" + "a" * 5000)),
    "image path with a lone surrogate": ("unsafe_path", _entry(image_path="images/\ud800.jpg")),
    "no image path": ("unsafe_path", _entry(image_path="")),
    "no image": ("missing_image", _file(lambda data: (data.image, None))),
    "image is a directory": ("missing_image", _entry(image_path="images")),
    "truncated image": ("image_truncated", _file(lambda data: (data.image, data.image.read_bytes()[:-300]))),
    "half an image with an end marker": (
        "image_corrupt",
        _file(lambda data: (data.image, data.image.read_bytes()[:-1500] + b"\xff\xd9")),
    ),
    "text instead of an image": ("image_not_an_image", _file(lambda data: (data.image, b"hello, I am a picture"))),
    "EPS instead of an image": (
        "image_not_an_image",
        _file(lambda data: (data.image, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")),
    ),
    "image too narrow": (
        "image_too_narrow",
        lambda data: (data.image.write_bytes(jpeg(1, 1025)), None)[1],
    ),
    "image too long": ("image_too_large", lambda data: (data.image.write_bytes(jpeg(33, 32_769)), None)[1]),
    "empty image": ("image_not_an_image", _file(lambda data: (data.image, b""))),
    "unknown action": ("unknown_action", lambda data: _classes(data, actions="sitting")),
    "very long unknown action": (
        "unknown_action",
        lambda data: (_entry(action="\x1b[2J" * 5000)(data), _classes(data)),  # type: ignore[func-returns-value]
    ),
}

# Reasons; then the objects, objects with a mask and relations that are kept; then the damage.
PARTLY_BAD: dict[str, tuple[list[str], list[str], list[str], list[str], Callable[[Dataset], None]]] = {
    "no npz": (["missing_masks", "relation_without_mask"], list(BOXES), [], [], _no_masks),
    "masks with a different size": (
        ["bad_masks", "relation_without_mask"],
        list(BOXES),
        [],
        [],
        _array(mask=np.ones((3, 1, 40, 61), bool)),
    ),
    "masks of bytes with three values": (
        ["bad_masks", "relation_without_mask"],
        list(BOXES),
        [],
        [],
        _array(mask=np.full((3, HEIGHT, WIDTH), 7, np.uint8)),
    ),
    "masks of integers": (
        ["bad_masks", "relation_without_mask"],
        list(BOXES),
        [],
        [],
        _array(mask=np.ones((3, 1, HEIGHT, WIDTH), np.int64)),
    ),
    "too few masks": (
        ["bad_masks", "relation_without_mask"],
        list(BOXES),
        [],
        [],
        _array(mask=np.ones((2, 1, HEIGHT, WIDTH), bool)),
    ),
    "labels of other objects": (
        ["bad_masks", "relation_without_mask"],
        list(BOXES),
        [],
        [],
        _array(labels=np.array(["cat", "mat", "cow"])),
    ),
    "empty mask": (
        ["empty_mask", "relation_without_mask"],
        list(BOXES),
        ["mat", "dog"],
        [],
        _empty_mask,
    ),
    "box outside": (
        ["box_outside", "relation_without_object"],
        ["cat", "mat"],
        ["cat", "mat"],
        ["cat on mat"],
        _object(2, ["dog", [40, 2, 62, 30]]),
    ),
    "box without area": (
        ["box_outside", "relation_without_object"],
        ["cat", "mat"],
        ["cat", "mat"],
        ["cat on mat"],
        _object(2, ["dog", [40, 2, 40, 30]]),
    ),
    "box that is not a number": (
        ["box_outside", "relation_without_object"],
        ["cat", "mat"],
        ["cat", "mat"],
        ["cat on mat"],
        _object(2, ["dog", [float("nan"), 2, 50, 30]]),
    ),
    "box with three numbers": (
        ["malformed_object", "relation_unknown_label"],
        ["cat", "mat"],
        ["cat", "mat"],
        ["cat on mat"],
        _object(2, ["dog", [1, 2, 3]]),
    ),
    "box of strings": (
        ["malformed_object", "relation_unknown_label"],
        ["cat", "mat"],
        ["cat", "mat"],
        ["cat on mat"],
        _object(2, ["dog", ["1", "2", "3", "4"]]),
    ),
    "box that overflows a float": (
        ["malformed_object", "relation_unknown_label"],
        ["cat", "mat"],
        ["cat", "mat"],
        ["cat on mat"],
        _object(2, ["dog", [1, 2, 10**400, 4]]),
    ),
    "relation with an unknown label": (
        ["relation_unknown_label"],
        list(BOXES),
        list(BOXES),
        ["cat on mat"],
        _relation(1, ["", ["dog", "near", "cow"]]),
    ),
    "relation with a very long label": (
        ["relation_unknown_label"],
        list(BOXES),
        list(BOXES),
        ["cat on mat"],
        _relation(1, ["", ["dog", "near", "\x1b[2J" * 5000]]),
    ),
    "very long name": (
        ["bad_masks", "relation_unknown_label", "relation_without_mask"],
        ["cat", "mat", "[2j" * 5000],
        [],
        [],
        _object(2, ["\x1b[2J" * 5000, BOXES["dog"]]),
    ),
    "very long name, box outside the image": (
        ["bad_masks", "box_outside", "relation_unknown_label", "relation_without_mask"],
        ["cat", "mat"],
        [],
        [],
        _object(2, ["\x1b[2J" * 5000, [0, 0, 99, 99]]),
    ),
    "relation with itself": (
        ["relation_with_itself"],
        list(BOXES),
        list(BOXES),
        ["cat on mat"],
        _relation(1, ["", ["dog", "near", "dog"]]),
    ),
    "relation with two words": (
        ["malformed_relation"],
        list(BOXES),
        list(BOXES),
        ["cat on mat"],
        _relation(1, ["", ["dog", "near"]]),
    ),
    "relation that is a number": (["malformed_relation"], list(BOXES), list(BOXES), ["cat on mat"], _relation(1, 7)),
    "unknown relation": (
        ["unknown_relation"],
        list(BOXES),
        list(BOXES),
        ["cat on mat"],
        lambda data: _classes(data, relations="dog left of cat"),
    ),
    "unknown object": (
        ["unknown_object", "relation_without_object"],
        ["cat", "mat"],
        ["cat", "mat"],
        ["cat on mat"],
        lambda data: _classes(data, objects="dog"),
    ),
}


@pytest.mark.parametrize("case", BAD_SCENES)
def test_bad_scenes_are_rejected(data: Dataset, case: str) -> None:
    reason, damage = BAD_SCENES[case]
    np.savez(data.npz, **data.arrays)
    damage(data)
    scenes, rejected = data.load()
    assert not scenes
    (rejection,) = rejected
    assert rejection.reason == reason and reason in REASONS
    assert rejection.entry.startswith("metadata.json: entry 0")
    assert rejection.detail and str(rejection).isprintable() and len(str(rejection)) < 400


@pytest.mark.parametrize("case", PARTLY_BAD)
def test_valid_parts_of_a_scene_are_kept(data: Dataset, case: str) -> None:
    reasons, names, masked, relations, damage = PARTLY_BAD[case]
    damage(data)
    (scene,), rejected = data.load()
    assert sorted({r.reason for r in rejected}) == sorted(reasons)
    assert all(r.entry.startswith("metadata.json: entry 0 (a)") and r.detail for r in rejected)
    assert all(str(r).isprintable() and len(str(r)) < 400 for r in rejected)
    assert [o.name for o in scene.objects] == names
    assert [o.name for o in scene.objects if o.mask is not None] == masked
    assert texts(scene) == relations


def test_boxes_rounded_up_are_clipped(data: Dataset) -> None:
    data.entry["objects"][1][1] = [-0.5, 20, 60.9, 40.4]
    (scene,), rejected = data.load()
    assert not rejected and scene.objects[1].box == (0, 20, 60, 40)


@pytest.mark.parametrize(
    ("suffix", "split"),
    [
        ("_Training", "train"),
        ("-train2017", "train"),
        (".dev", "val"),
        ("_VALID", "val"),
        ("_openpsg_validation_2017", "val"),
        ("_eval", "val"),
        ("-evaluation", "val"),
        ("_testing", "test"),
        ("_test_0", "test"),
        ("_foo", None),
        ("2", None),
        ("_trainval", None),
        ("_test-dev", None),  # two of them: not guessed
        ("_test_clean", None),
    ],
)
def test_aliases_of_splits_and_warnings(
    data: Dataset, suffix: str, split: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    write_split(data, **{suffix: [data.entry]})
    source = PublishedSource(data.directory)
    assert [entry.split for entry in source.entries] == [split]
    shown = suffix.strip("_-.")
    expected = [
        f"metadata{suffix}.json: the suffix '{shown}' does not name one split (train, val or test): its scenes are "
        "split by the hash of their ids"
    ]
    assert source.scan(1, False).warnings == ([] if split else expected)
    assert [scene.split for scene in load_reference(data.directory)] == [split]
    assert [record.message for record in caplog.records] == ([] if split else expected)


def test_plain_metadata_is_no_reason_to_warn(data: Dataset) -> None:
    data.load()
    assert PublishedSource(data.directory).scan(1, False).warnings == []


def test_duplicate_ids(data: Dataset) -> None:
    data.load()
    (data.directory / "metadata.json").write_text(json.dumps({"data": [data.entry, data.entry]}))
    rejected: list[Rejection] = []
    assert len(list(load_reference(data.directory, rejected.append))) == 1
    assert [(r.entry, r.reason) for r in rejected] == [("metadata.json: entry 1 (a)", "duplicate_id")]


def write_split(data: Dataset, **entries: list[dict[str, Any]]) -> None:
    data.load()
    (data.directory / "metadata.json").unlink()
    for name, rows in entries.items():
        (data.directory / f"metadata{name}.json").write_text(json.dumps({"data": rows}))


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_an_assigned_split_overrides_the_hash(data: Dataset, tmp_path: Path, split: str) -> None:
    # The hash of its key would assign the scene to another split.
    shares = {"val": 0.0, "test": 0.0} if split != "train" else {"val": 0.0, "test": 1.0}
    for k, entry in enumerate([data.entry, data.entry | {"image_path": "images/gone.jpg"}]):
        write_split(data, **{"": [data.entry], f"_{split}": [entry]})
        report = pack(data.directory, tmp_path / f"out{k}", progress=False, **shares)  # type: ignore[arg-type]
        assert {name: n["scenes"] for name, n in report.splits.items() if n["scenes"]} == {split: 1}
        assert report.rejected == ({"missing_image": 1} if k else {"duplicate_id": 1})
        assert [scene.split for scene in load_reference(data.directory, lambda _: None)] == [split]


def test_an_id_in_several_splits_stays_in_test_or_val(data: Dataset, tmp_path: Path) -> None:
    other = data.entry | {"id": "b"}
    write_split(data, _train=[data.entry, other, {}], _val=[data.entry], _test=[{}, data.entry])
    rejected: list[Rejection] = []
    assert {s.key: s.split for s in load_reference(data.directory, rejected.append)} == {"a": "test", "b": "train"}
    assert [(r.entry, r.detail) for r in rejected if r.reason == "split_conflict"] == [
        (f"metadata_{name}.json: entry 0 (a)", "the id is also in the test split, where it stays")
        for name in ("train", "val")
    ]
    report = pack(data.directory, tmp_path / "out", progress=False)
    assert [n["scenes"] for n in report.splits.values()] == [1, 0, 1]
    assert report.rejected == dict(sorted(Counter(r.reason for r in rejected).items()))


def test_rejections_are_logged_by_default(data: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    data.load()
    data.image.unlink()
    assert list(load_reference(data.directory)) == []
    assert "metadata.json: entry 0 (a): missing_image" in caplog.text


def test_unusable_directories(tmp_path: Path) -> None:
    def message() -> str:
        with pytest.raises(UserError) as error:
            load_reference(tmp_path / "set")
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "set: no such directory" in message()
    (tmp_path / "set").mkdir()
    assert "no metadata*.json" in message()
    metadata = tmp_path / "set" / "metadata.json"
    for content, expected in {
        '{"data": [': "metadata.json: not readable as JSON",
        "[]": 'metadata.json: got [], expected {"data": [entries]}',
        '{"data": {}}': "metadata.json: got {",
        '{"data": []}': "the data set is empty",
        "[" * 100_000: "metadata.json: not readable as JSON",
        "\udcff": "metadata.json: not readable as JSON",
    }.items():
        metadata.write_text(content, errors="surrogateescape")
        assert expected in message()
    metadata.write_text('{"data": [{}]}')
    (tmp_path / "set" / "classes.json").write_text('{"actions": []}')
    assert "classes.json: expected" in message()


def test_ids_become_safe_keys() -> None:
    assert safe_key("COCO_train2014-000000001") == "COCO_train2014-000000001"
    # A hash keeps distinct ids distinct, and a key is unchanged when packed again.
    changed = {raw: safe_key(raw) for raw in ("a.jpg", "a_jpg", "a b..é", "a b..è", "é" * 90, "è" * 90, "\udce9")}
    assert changed["a.jpg"] == "a_jpg-509b0d46" and changed["a_jpg"] == "a_jpg"
    assert len(set(changed.values())) == len(changed)
    for key in changed.values():
        assert re.fullmatch(r"[A-Za-z0-9_-]{1,90}", key) and safe_key(key) == key
    for bad in ("a/b", "a\\b", "", "a\nb", "a\0b"):
        with pytest.raises(BadEntry):
            safe_key(bad)


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('unpickled')",))


def _npz(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _npy_header(shape: tuple[int, ...], dtype: str) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def test_npz_members_are_not_unpickled(tmp_path: Path) -> None:
    pickled = _npy_header((1,), "|O") + pickle.dumps(np.array([_Bomb()], dtype=object))
    good = _npy(np.ones((1, 1, 4, 4), bool))
    with pytest.raises(ValueError, match="got mask of type object, expected bool"):
        read_masks(_npz(tmp_path / "a.npz", mask=pickled), ["cat"], (4, 4))
    with pytest.raises(ValueError, match="got score of type object"):
        read_masks(_npz(tmp_path / "b.npz", mask=good, score=pickled), ["cat"], (4, 4))
    # Labels only matter if rows are out of order, so pickled ones are ignored.
    (mask,) = read_masks(_npz(tmp_path / "c.npz", mask=good, labels=pickled), ["cat"], (4, 4))
    assert mask.all()


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': (",
        b"{'descr': '|b1'}",
        b"[" * 5000,
        b"(" * 150 + b")" * 150,
        b"-" * 9000 + b"1",
        b"  {\n {\n",
        b"{'descr': ['a'], 'fortran_order': False, 'shape': ()}",
        b"{'descr': {1: 2}, 'fortran_order': False, 'shape': ()}",
        b"'unterminated",
        b"\0",
    ],
)
def test_damaged_npy_headers_are_rejected(tmp_path: Path, header: bytes) -> None:
    npy = b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header
    for path in (_npz(tmp_path / "a.npz", mask=npy), _npz(tmp_path / "b.npz", labels=npy, mask=_npy(np.ones(1)))):
        with pytest.raises(ValueError, match=r"damaged header of (mask|labels)") as error:
            read_masks(path, ["cat"], (4, 4))
        assert len(str(error.value)) < 200 and "\n" not in str(error.value)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damage_anywhere_in_an_npz_is_rejected(save: Callable[..., None], tmp_path: Path) -> None:
    masks = np.stack([box_mask(box) for box in BOXES.values()])[:, None, :8, :8]
    path = tmp_path / "a.npz"
    save(path, mask=masks, score=np.ones((3, 1), np.float32), labels=np.array(list(BOXES)))
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        damaged = np.frombuffer(good, np.uint8).copy()
        at = rng.integers(0, len(damaged), rng.integers(1, 6))
        damaged[at] ^= (1 << rng.integers(0, 8, len(at))).astype(np.uint8)
        path.write_bytes(damaged.tobytes()[: None if rng.random() < 0.8 else rng.integers(len(good))])
        try:
            read_masks(path, list(BOXES), (8, 8))
        except ValueError as error:
            refused += 1
            assert len(str(error)) < 300 and "\n" not in str(error)
    assert refused > 100


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 1 << 15, 1 << 16), "expected at most"),
        ((1, 1 << 40, 4, 4), "expected at most"),
        ((1, 1, 4, -4), "expected"),
        ((1, 64, 4, 4), "ends after 0 of"),
    ],
)
def test_headers_are_checked_before_memory_is_allocated(tmp_path: Path, shape: tuple[int, ...], message: str) -> None:
    assert MAX_MASK_BYTES <= 1 << 30
    path = _npz(tmp_path / "a.npz", mask=_npy_header(shape, "|b1"))
    with pytest.raises(ValueError, match=message):
        read_masks(path, ["cat"], (4, 4))


def test_shapes_are_checked_before_data_is_read(tmp_path: Path) -> None:
    # A gigabyte of zeros compresses to a megabyte; none of it may be decompressed for a 4 x 4 image.
    path = _npz(tmp_path / "a.npz", mask=_npy_header((1, 1, 1 << 15, 1 << 14), "|b1") + bytes(1 << 20))
    read = zipfile.ZipExtFile.read
    sizes: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zipfile.ZipExtFile, "read", lambda file, n=-1: (sizes.append(n), read(file, n))[1])
        with pytest.raises(ValueError, match=r"got mask \[1, 1, 32768, 16384\], expected \[1, k, 4, 4\]"):
            read_masks(path, ["cat"], (4, 4))
    assert sizes and min(sizes) >= 0 and max(sizes) < 1000


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_unbounded_compression_methods_are_rejected(tmp_path: Path, method: int) -> None:
    good = _npy(np.ones((1, 1, 4, 4), bool))
    with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as archive:
        archive.writestr("mask.npy", good)
    with pytest.raises(ValueError, match=f"got mask in zip compression {method}"):
        read_masks(tmp_path / "a.npz", ["cat"], (4, 4))


def test_long_headers_are_rejected(tmp_path: Path) -> None:
    bomb = b"\x93NUMPY\x02\x00" + (1 << 31).to_bytes(4, "little") + b" " * (1 << 16)
    with pytest.raises(ValueError, match=r"npy version \(2, 0\)"):
        read_masks(_npz(tmp_path / "a.npz", mask=bomb), ["cat"], (4, 4))


def test_large_zip_directories_are_rejected(tmp_path: Path) -> None:
    good = _npy(np.ones((1, 1, 4, 4), bool))
    path = _npz(tmp_path / "a.npz", mask=good)
    with zipfile.ZipFile(path, "a") as archive:
        for i in range(12_000):
            archive.writestr(f"a-member-with-quite-a-long-name-{i:030}", b"")
    with pytest.raises(ValueError, match=r"got a zip directory of \d{7} bytes, expected at most"):
        read_masks(path, ["cat"], (4, 4))
    whole = _npz(tmp_path / "b.npz", mask=good).read_bytes()
    for name, end in {"huge": whole[-22:-10] + b"\xff" * 4 + whole[-6:], "other end": whole[-22:]}.items():
        path.write_bytes(whole[:-22] + end + (b"PK\5\6" + b"\xff" * 18) * (name == "other end"))
        with pytest.raises(ValueError, match=r"got a zip directory of 4294967295 bytes"):
            read_masks(path, ["cat"], (4, 4))
    path.write_bytes(whole[:-22] + b"PK\6\7" + bytes(16) + whole[-22:])
    with pytest.raises(ValueError, match="zip64"):
        read_masks(path, ["cat"], (4, 4))


def test_large_files_are_not_read(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(data.npz, **data.arrays)
    monkeypatch.setattr("scenarioclip_fast.data.sources.files.MAX_IMAGE_BYTES", data.image.stat().st_size - 1)
    scenes, (rejection,) = data.load()
    assert not scenes and rejection.reason == "image_too_large" and "bytes, expected at most" in rejection.detail
    monkeypatch.undo()
    monkeypatch.setattr("scenarioclip_fast.data.sources.masks_npz.MAX_MASK_BYTES", data.npz.stat().st_size - 1)
    _, rejected = data.load()
    assert rejected[0].reason == "bad_masks" and "bytes, expected at most" in rejected[0].detail


def test_pipes_do_not_block(data: Dataset) -> None:
    data.image.unlink()
    os.mkfifo(data.image)
    _, (rejection,) = data.load()
    assert rejection.reason == "missing_image" and "got a named pipe" in rejection.detail
    data.image.unlink()
    data.image.write_bytes(jpeg())
    data.npz.unlink()
    os.mkfifo(data.npz)
    _, rejected = data.load()
    assert rejected[0].reason == "bad_masks" and "got a named pipe" in rejected[0].detail


def test_lone_surrogates_are_dropped(data: Dataset) -> None:
    """JSON can contain lone surrogates, which UTF-8 cannot encode."""
    data.entry["action"] = "sit\ud800ting"
    (scene,), rejected = data.load()
    assert scene.action == "sitting" and not rejected
    data.entry["image_path"] = "images/\ud800.jpg"
    _, (rejection,) = data.load()
    assert rejection.reason == "unsafe_path"


def test_damaged_npz_files(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, mask=np.random.default_rng(0).random((2, 1, 40, 40)) > 0.5)
    whole = path.read_bytes()
    assert len(list(read_masks(path, ["cat", "dog"], (40, 40)))) == 2
    rng = np.random.default_rng(1)
    for _ in range(60):
        broken = bytearray(whole)
        at = int(rng.integers(len(whole)))
        broken[at : at + 8] = rng.bytes(8)
        cut = int(rng.integers(len(whole))) if rng.random() < 0.5 else len(whole)
        path.write_bytes(bytes(broken[:cut]))
        try:
            masks = list(read_masks(path, ["cat", "dog"], (40, 40)))
        except ValueError as error:
            assert str(error)
        else:
            assert all(m.shape == (40, 40) for m in masks)
    with pytest.raises(FileNotFoundError):
        read_masks(tmp_path / "none.npz", ["cat"], (4, 4))


def test_real_photos(photos: Path) -> None:
    rejected: list[Rejection] = []
    scenes = list(load_reference(photos, rejected.append))
    assert not rejected
    counts = (len(scenes), sum(len(s.objects) for s in scenes), sum(len(s.relations) for s in scenes))
    assert counts == (128, 642, 343)
    classes = json.loads((photos / "classes.json").read_text())
    assert sorted({s.action for s in scenes}) == classes["actions"]
    assert sorted({o.name for s in scenes for o in s.objects}) == classes["objects"]
    assert sorted({t for s in scenes for t in texts(s)}) == classes["relations"]
    off = []
    for item in (item for scene in scenes for item in scene.objects):
        assert isinstance(item.mask, Tensor)
        rows, columns = np.nonzero(item.mask.numpy())
        off.append(np.subtract((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1), item.box))
    # Boxes come from polygons, whose thin tips cover no pixel centre, but most sides agree to the pixel.
    assert np.median(np.abs(off)) < 0.5 and (np.abs(off) < 1).mean() > 0.9
