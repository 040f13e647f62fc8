"""Listing the images of a generation run."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from scenarioclip_fast.data import generate_scenes, pack
from scenarioclip_fast.data.check import safe_key
from scenarioclip_fast.data.images import SkippedImage
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.generate.images import Item, Unit, divide, list_images, read_list, write_list


def items(*sources: Path, known: tuple[Item, ...] = ()) -> list[Item]:
    found = list(list_images(sources, known))
    assert all(isinstance(one, Item) for one in found), found
    return [one for one in found if isinstance(one, Item)]


def add(path: Path, content: bytes = b"jpeg") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def make_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_folders_are_searched_in_order(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.png", "sub/a.jpg", "sub/notes.txt", ".hidden.jpg"):
        add(tmp_path / name, name.encode())
    found = items(tmp_path)
    assert [one.name for one in found] == ["a.png", "b.jpg", "sub/a.jpg"]
    assert [one.read() for one in found] == [b"a.png", b"b.jpg", b"sub/a.jpg"]
    assert found[1].key == "b" and found[2].key.startswith("sub_a-")


def test_keys_are_unique_and_valid(tmp_path: Path) -> None:
    names = ["1.jpg", "1.png", "a/1.jpg", "a_1.jpg", "\u00e9 \u202e.jpg", "x" * 200 + ".jpg", "e\u0301.jpg"]
    for name in names:
        add(tmp_path / name)
    found = items(tmp_path)
    keys = [one.key for one in found]
    assert len(found) == len(names) and len(set(keys)) == len(names)
    assert all(safe_key(key) == key for key in keys)


def test_a_key_does_not_depend_on_the_other_images_of_other_names(tmp_path: Path) -> None:
    add(tmp_path / "one/a/1.jpg")
    add(tmp_path / "two/a/1.jpg")
    add(tmp_path / "two/a_1.jpg")
    assert items(tmp_path / "one")[0].key == items(tmp_path / "two")[0].key


def test_tars_and_lists(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "data/0.tar", {"x/1.jpg": b"first", "x/1.json": b"{}", "2.png": b"second"})
    add(tmp_path / "data/3.jpg", b"third")
    listing = tmp_path / "list.txt"
    listing.write_text("# comment\ndata/3.jpg\n\ndata/0.tar\n", encoding="utf-8")
    assert [one.read() for one in items(tar)] == [b"first", b"second"]
    assert [one.read() for one in items(listing)] == [b"third", b"first", b"second"]
    assert [one.read() for one in items(tmp_path / "data")] == [b"first", b"second", b"third"]


def test_what_cannot_be_listed_is_named(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "0.tar", {"1.jpg": b"x" * 2000, "2.jpg": b"y" * 2000})
    tar.write_bytes(tar.read_bytes()[:3000])
    os.mkfifo(tmp_path / "pipe.jpg")
    listing = tmp_path / "list.lst"
    listing.write_text("missing.jpg\n0.tar\n", encoding="utf-8")
    skipped = [one for one in list_images([listing]) if isinstance(one, SkippedImage)]
    assert skipped[0] == SkippedImage("missing.jpg", "No such file or directory")
    assert skipped[1].reason.startswith("damaged tar: ")
    folder = list(list_images([tmp_path]))
    assert SkippedImage("pipe.jpg", "got a named pipe, expected a regular file") in folder


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none", None, "no such file or directory"),
        ("empty.txt", b"# nothing\n", "the list is empty"),
        ("latin.txt", b"\xff.jpg\n", "byte 0 is not UTF-8"),
        ("folder/notes.md", b"", "no images found"),
    ],
)
def test_bad_sources(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        add(path, content)
    with pytest.raises(UserError, match=message):
        list(list_images([path.parent if "/" in name else path]))


def test_packed_data_sets_keep_keys_splits_and_records(tmp_path: Path) -> None:
    pack(generate_scenes(12, seed=3), tmp_path / "packed", progress=False)
    found = items(tmp_path / "packed")
    assert len(found) == 12 and {one.split for one in found} >= {"train", "test"}
    record = found[0].read_record()
    assert record is not None and record["objects"] and found[0].read().startswith(b"\xff\xd8")


def test_known_images_are_left_out(tmp_path: Path) -> None:
    add(tmp_path / "a.jpg")
    first = items(tmp_path)
    add(tmp_path / "0.jpg")
    assert [one.name for one in items(tmp_path, known=tuple(first))] == ["0.jpg"]
    assert items(tmp_path, tmp_path / "a.jpg") == items(tmp_path)


def test_changed_images_are_refused(tmp_path: Path) -> None:
    path = add(tmp_path / "a.jpg")
    item = items(tmp_path)[0]
    path.write_bytes(b"another image")
    with pytest.raises(OSError, match="got 13 bytes, expected 4"):
        item.read()
    tar = make_tar(tmp_path / "b/0.tar", {"1.jpg": b"x" * 2000})
    member = items(tmp_path / "b")[0]
    tar.write_bytes(tar.read_bytes()[:1000])
    with pytest.raises(OSError, match="got 488 of 2000 bytes"):
        member.read()


def test_lists_round_trip(tmp_path: Path) -> None:
    made = [
        Item(str(i), f"n\u00e9{i}\\x80", "/p", i - 1, 5, "val" if i % 2 else None, (1, 2) if i else None)
        for i in range(5)
    ]
    units = divide(made, 2, first=3)
    assert [unit.number for unit in units] == [3, 4, 5] and [len(unit.items) for unit in units] == [2, 2, 1]
    write_list(units, tmp_path / "list")
    assert read_list(tmp_path / "list") == units
    assert read_list(tmp_path / "none") == []


@pytest.mark.parametrize("line", [b"{", b"[]", b'{"unit": 0}', b"\xff", b'{"unit": 0, "key": "a", "record": 5}'])
def test_damaged_lists_are_refused(tmp_path: Path, line: bytes) -> None:
    write_list([Unit(0, (Item("a", "a", "/a", -1, 1),))], tmp_path / "list")
    with (tmp_path / "list").open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(UserError, match=r"list: line 2: got "):
        read_list(tmp_path / "list")
