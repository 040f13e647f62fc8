"""Packing in parts, and merging them. Run as a script, this file is the parent of the killed processes."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from campaign import generator, trials
from interruptions import Decoded, kill_at
from parts_source import SIZE, contents, keys_of, pack_in_parts, pack_part, read_raw, write_tar

from scenarioclip_fast.cli.main import main
from scenarioclip_fast.data import ShardSet, generate_scenes, merge_parts, pack
from scenarioclip_fast.data.packing import merging
from scenarioclip_fast.data.packing import options as pack_options
from scenarioclip_fast.data.packing import parts as parts_module
from scenarioclip_fast.data.packing.parts import lock_parts
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import Directory

KILLS = trials(4, 50)


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The pack of one part."""
    return pack_in_parts(source, tmp_path_factory.mktemp("expected") / "out", 1)


def test_the_parts_hold_what_a_pack_in_one_piece_holds(
    source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "parts"
    assert pack_in_parts(source, out, 3) == expected
    pack(source, tmp_path / "plain", shard_size=SIZE, progress=False)
    plain = contents(tmp_path / "plain")
    for name in ("vocabulary.bin", "rejected.jsonl", "source.json"):
        assert expected[name] == plain[name], name
    assert keys_of(out) == keys_of(tmp_path / "plain")
    reasons = json.loads(expected["manifest.json"])["rejected"]
    assert reasons == json.loads(plain["manifest.json"])["rejected"]
    assert reasons == {"box_outside": 9, "duplicate_id": 24, "image_truncated": 15}
    assert b"copy" not in expected["vocabulary.bin"]
    numbers = re.findall(r"(train|val|test)-(\d+).tar", " ".join(sorted(expected)))
    for split in ("train", "val", "test"):  # no gaps, although units have no shard
        found = [int(number) for name, number in numbers if name == split]
        assert found == list(range(len(found)))
    for split in ("train", "val", "test"):
        shards = ShardSet(out, split=split, verify=True)
        assert [shards.read(i).key for i in range(len(shards))] == keys_of(out)[split]


@pytest.mark.parametrize(("n", "workers"), [(2, 1), (7, 1), (2, 2), (60, 1)])
def test_the_pack_does_not_depend_on_the_parts(
    n: int, workers: int, source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    assert pack_in_parts(source, tmp_path / "out", n, workers=workers) == expected


def test_the_published_layout_with_splits_by_hash(tmp_path: Path) -> None:
    from scenarioclip_fast.data.synthetic import write_published_layout

    write_published_layout(generate_scenes(30, seed=3), tmp_path / "set")
    packs = [pack_in_parts(tmp_path / "set", tmp_path / f"out{n}", n, split="hash") for n in (1, 2, 7)]
    assert packs[0] == packs[1] == packs[2]
    assert keys_of(tmp_path / "out1").keys() == {"train", "val", "test"}


def test_a_part_resumes_and_is_a_no_op_once_complete(
    source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "out"
    command = ["pack", str(source), "--out", str(out), "--shard-size", str(SIZE), "--part"]
    images = Decoded(monkeypatch, 1000)
    assert main([*command, "2/2"]) == 0
    shown = re.search(r"packing: (\d+)/(\d+) scenes", capsys.readouterr().err)
    assert shown is not None and shown[1] == shown[2]
    of_second = images.count
    images.count, images.limit = 0, 13
    assert main([*command, "1/2"]) == 130
    kept = re.search(r"(\d+) finished shards are kept in \S*/\.parts/1-of-2: re-run", capsys.readouterr().err)
    assert kept is not None and 2 <= int(kept[1]) <= 4
    images.count, images.limit = 0, 1000
    assert main([*command, "1/2"]) == 0
    assert f"part 1 of 2: resuming after {kept[1]} finished shards" in capsys.readouterr().err
    assert images.count < of_second, "finished units are not read again"
    images.count = 0
    assert main([*command, "1/2"]) == 0
    assert "part 1 of 2: up to date" in capsys.readouterr().err and images.count == 0
    assert main(["pack", "--merge", str(out)]) == 0
    assert contents(out) == expected and images.count == 0
    # Nothing is left to do, for any of the commands.
    for again in (["pack", "--merge", str(out)], [*command, "1/2"], command[:-1]):
        capsys.readouterr()
        assert main(again) == 0
        assert "up to date" in capsys.readouterr().err and contents(out) == expected and images.count == 0


def shard_of(out: Path, part: str) -> Path:
    return sorted((out / ".parts" / part).glob("*.tar"))[1]


def test_a_damaged_shard_is_packed_again(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for i in (1, 2):
        pack_part(source, out, i, 2)
    damages: list[tuple[Callable[[Path], Any], str]] = [
        (lambda path: os.truncate(path, 512), "got 512 bytes, expected [0-9]+"),
        (lambda path: path.unlink(), "is missing"),
    ]
    for damage, what in damages:
        path = shard_of(out, "2-of-2")
        damage(path)
        again = f"; run pack SOURCE --out {out} --part 2/2, which packs it again$"
        with pytest.raises(UserError, match=f"^{path}: {what}{again}"):
            merge_parts(out, progress=False)
        pack_part(source, out, 2, 2)
    path = shard_of(out, "1-of-2")
    good = path.read_bytes()
    path.write_bytes(good[:700] + b"?" + good[701:])
    with pytest.raises(UserError, match=f"^{path}: damaged, its SHA-256 .* remove it, and run pack .* --part 1/2, whi"):
        merge_parts(out, verify=True, progress=False)
    path.unlink()
    pack_part(source, out, 1, 2)
    assert path.read_bytes() == good
    record = next((out / ".parts" / "1-of-2").glob("unit-*.json"))
    for data in (record.read_bytes()[:50], b"[]", b"{}", b'{"unit": 0, "shards": 3}'):
        record.write_bytes(data)
        with pytest.raises(UserError, match=rf"part 1 of 2 is damaged \({record.name}\): run pack .* --part 1/2$"):
            merge_parts(out, progress=False)
    pack_part(source, out, 1, 2)
    merge_parts(out, verify=True, progress=False)
    assert contents(out) == expected


@pytest.fixture(scope="module")
def parts(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two parts of the pack before they are merged."""
    out = tmp_path_factory.mktemp("parts") / "out"
    for i in (1, 2):
        pack_part(source, out, i, 2)
    return out


DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "shard lost": ("train-000001.tar", lambda path: path.unlink(), "train-000001.tar is missing"),
    "shard cut": ("val-000000.tar", lambda path: os.truncate(path, 512), r"val-000000.tar has 512 bytes, expected \d+"),
    "index lost": ("index.bin", lambda path: path.unlink(), "index.bin is missing"),
    "texts": (
        "vocabulary.bin",
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"),
        "vocabulary.bin has another SHA-256 than in manifest.json",
    ),
    "manifest": (
        "manifest.json",
        lambda path: path.write_text('{"schema": 2, "splits": {}}'),
        "manifest.json is not that of a pack",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_pack_is_merged_again_from_complete_parts(
    damage: str, source: Path, parts: Path, expected: dict[str, bytes], tmp_path: Path, capsys: Any
) -> None:
    name, change, what = DAMAGES[damage]
    out = tmp_path / "out"
    shutil.copytree(parts, out)
    for file, data in expected.items():
        (out / file).write_bytes(data)
    change(out / name)
    shard = shard_of(out, "2-of-2")
    shard.unlink()
    before = sorted(out.rglob("*"))
    with pytest.raises(
        UserError, match=rf"^{out}: the pack is damaged \({what}\), and its .* {shard}: is missing; run"
    ):
        merge_parts(out, progress=False)
    assert sorted(out.rglob("*")) == before, "nothing is removed"
    pack_part(source, out, 2, 2)
    assert main(["pack", "--merge", str(out)]) == 0
    assert re.search(rf"{out}: the pack is damaged \({what}\): merging the parts again", capsys.readouterr().err)
    assert contents(out) == expected and not (out / ".parts").exists()
    change(out / name)  # now without parts
    with pytest.raises(UserError, match=rf"^{out}: the pack is damaged \({what}\), and there are no parts to merge"):
        merge_parts(out, progress=False)
    with pytest.raises(UserError, match=rf"^{out}: contains a pack of this source that is damaged \({what}\); restore"):
        pack_part(source, out, 1, 2)


@pytest.mark.parametrize("header", [None, b"", b"{}", b'{"fingerprint": "a", "options": {}}'])
def test_units_without_a_header_are_packed_again(
    header: bytes | None, source: Path, parts: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """They may be of another source."""
    out, folder = tmp_path / "out", tmp_path / "out" / ".parts" / "1-of-2"
    pack_part(source, tmp_path / "other", 1, 2, split="hash")
    shutil.copytree(parts, out)
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "other" / ".parts" / "1-of-2", folder)
    (folder / "part.json").unlink()
    if header is not None:
        (folder / "part.json").write_bytes(header)
    with pytest.raises(UserError, match=rf"^{out}: part 1 of 2 is unfinished: run pack .* --part 1/2$"):
        merge_parts(out, progress=False)
    assert not pack_part(source, out, 1, 2).up_to_date
    merge_parts(out, verify=True, progress=False)
    assert contents(out) == expected


def drop_item(record: dict[str, Any]) -> None:
    shard = record["shards"][0]
    shard["numbers"].pop()
    shard["rows"].pop()


RECORDS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "nothing": lambda record: record.update(shards=[], rejected=[], boxes=[]),
    "no shard": lambda record: record.update(shards=[]),
    "no item": drop_item,
    "no row": lambda record: record["shards"][0]["rows"].pop(),
    "an item twice": lambda record: record["shards"].append(record["shards"][0]),
    "items of another unit": lambda record: record["shards"][0].update(
        numbers=[number + SIZE for number in record["shards"][0]["numbers"]]
    ),
    "no texts": lambda record: record["shards"][0].pop("texts"),
    "no rejections": lambda record: record.pop("rejected"),
    "another name": lambda record: record["shards"][0].update(name="../1-of-2/train-000000.tar"),
    "a number": lambda record: record.update(shards=[3]),
}


@pytest.mark.parametrize("case", RECORDS)
@pytest.mark.parametrize("last", [False, True])
def test_a_record_that_does_not_account_for_its_items(
    case: str, last: bool, source: Path, parts: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(parts, out)
    found = [(path, json.loads(path.read_bytes())) for path in sorted((out / ".parts").glob("*/unit-*.json"))]
    path, record = sorted((one for one in found if one[1]["shards"]), key=lambda one: one[1]["unit"])[-1 if last else 1]
    RECORDS[case](record)
    path.write_text(json.dumps(record))
    i = int(path.parent.name[0])
    again = rf"^{out}: part {i} of 2 is damaged \({path.name}\): run pack .* --part {i}/2$"
    with pytest.raises(UserError, match=again):
        merge_parts(out, progress=False)
    assert not pack_part(source, out, i, 2).up_to_date
    merge_parts(out, verify=True, progress=False)
    assert contents(out) == expected


@pytest.mark.parametrize("i", [1, 2])
@pytest.mark.parametrize("data", [b"{}", b'{"items": "3"}', b'{"items": 99, "scan": 3, "classes": null}', b"[]", b"{"])
def test_a_damaged_end_of_a_part(
    data: bytes, i: int, source: Path, parts: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(parts, out)
    (out / ".parts" / f"{i}-of-2" / "done.json").write_bytes(data)
    with pytest.raises(UserError, match=rf"^{out}: part {i} of 2 is unfinished: run pack .* --part {i}/2$"):
        merge_parts(out, progress=False)
    assert not pack_part(source, out, i, 2).up_to_date
    assert pack_part(source, out, i, 2).up_to_date
    merge_parts(out, progress=False)
    assert contents(out) == expected


def test_a_part_that_was_copied_under_another_number(
    source: Path, parts: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for i, of in ((1, 2), (2, 1)):
        shutil.copytree(parts / ".parts" / f"{of}-of-2", out / ".parts" / f"{i}-of-2")
    with pytest.raises(UserError, match="part 1 of 2 is unfinished: run"):  # part 1 has what the scan found
        merge_parts(out, progress=False)
    for i in (1, 2):
        assert not pack_part(source, out, i, 2).up_to_date
        assert pack_part(source, out, i, 2).up_to_date
    merge_parts(out, progress=False)
    assert contents(out) == expected


@pytest.mark.parametrize("text", ["0/4", "5/4", "1-4", "1/0", "/", "1/4/2", "-1/4", "1.0/4", "a/b", "1", "²/4"])
def test_a_wrong_form_of_a_part_is_one_line(text: str, source: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["pack", str(source), "--out", str(tmp_path / "out"), f"--part={text}"]) == 2
    assert capsys.readouterr().err == (
        f"error: part: got {text}, expected i/n with i from 1 to n, such as 3/7 for the third of seven parts\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", [(0, 4), (5, 4), (1,), "1/4", (True, 1), (1.0, 4)])
def test_a_wrong_part_from_python(part: Any, source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^part: got .*, expected i/n with i from 1 to n"):
        pack(source, tmp_path / "out", part=part)


def test_a_missing_or_unfinished_part_is_named(
    source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=f"^{out}: contains no parts of a pack, expected those of `pack SOURCE --out"):
        merge_parts(out)
    for i in (1, 4):
        pack_part(source, out, i, 4)
    with pytest.raises(UserError, match=rf"^{out}: part 2 of 4 is missing \(and 1 more\): run pack .* --part 2/4$"):
        merge_parts(out)
    pack_part(source, out, 2, 4)
    with pytest.raises(UserError) as caught:
        merge_parts(out)
    assert str(caught.value) == f"{out}: part 3 of 4 is missing: run pack SOURCE --out {out} --part 3/4"
    with monkeypatch.context() as patch:
        Decoded(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            pack_part(source, out, 3, 4)
    with pytest.raises(UserError, match=rf"^{out}: part 3 of 4 is unfinished: run pack SOURCE --out {out} --part 3/4$"):
        merge_parts(out)
    shutil.rmtree(out / ".parts" / "2-of-4")
    with pytest.raises(UserError, match=r"part 2 of 4 is missing: run"):
        merge_parts(out)
    for i in (2, 3):
        pack_part(source, out, i, 4)
    merge_parts(out, progress=False)
    assert contents(out) == expected


def test_only_one_process_packs_a_part_and_merges(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack_part(source, out, 1, 2)
    header = json.loads((out / ".parts" / "1-of-2" / "part.json").read_text())
    with parts_module.LocalPart(out, (2, 2), header):
        with pytest.raises(UserError, match=r"out: another process is packing part 2 of 2$"):
            pack_part(source, out, 2, 2)
        pack_part(source, out, 1, 2)  # others are not affected
        with pytest.raises(UserError, match=r"out: part 2 of 2 is unfinished: another process is packing it; merge"):
            merge_parts(out)
    held = lock_parts(out, shared=False)
    assert held is not None
    with held:
        for call in (lambda: pack_part(source, out, 2, 2), lambda: merge_parts(out)):
            with pytest.raises(UserError, match=r"out: another process is merging the parts$"):
                call()


def test_parts_that_do_not_belong_together(
    source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, other = tmp_path / "out", tmp_path / "set"
    shutil.copytree(source, other)
    os.utime(other / "val-0.tar", (1, 1))
    pack_part(source, out, 1, 2)
    before = sorted(path.name for path in out.rglob("*"))
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (source, {"shard_size": 5}, "shard size 4, not 5"),
        (source, {"split": "hash"}, "split given, not hash"),
        (source, {"max_pixels": 1 << 20}, f"max pixels {1 << 26}, not {1 << 20}"),
        (other, {}, "another source, or a source that was changed meanwhile"),
    ]
    for i in (1, 2):  # a part of its own, or another one
        for path, options, what in cases:
            with pytest.raises(UserError, match=f"^{out}: contains part 1 of 2 from {what}; remove {out}/.parts, or"):
                pack_part(path, out, i, 2, **options)
    with pytest.raises(UserError, match=f"^{out}: contains part 1 of 2, and this is part 2 of 3; pack all parts with"):
        pack_part(source, out, 2, 3)
    with monkeypatch.context() as patch:
        patch.setattr(pack_options, "VERSION", pack_options.VERSION | {"version": "9.9"})
        with pytest.raises(UserError, match=f"^{out}: contains part 1 of 2 from version [0-9.a-z+]+, not 9.9; remove"):
            pack_part(source, out, 2, 2)
    assert sorted(path.name for path in out.rglob("*")) == before
    # The merge finds what concurrent starts, or a copy, have mixed.
    for path, options, what in cases:
        mixed = tmp_path / "mixed"
        pack_part(path, mixed, 2, 2, **options)
        shutil.copytree(out / ".parts" / "1-of-2", mixed / ".parts" / "1-of-2")
        swapped = re.sub(r"^(\w+ ?\w*) (\S+), not (\S+)$", r"\1 \3, not \2", what)
        with pytest.raises(UserError, match=f"^{mixed}: part 2 of 2 is from {swapped}, as the parts before it: remove"):
            merge_parts(mixed)
        shutil.rmtree(mixed)
    pack_part(source, tmp_path / "three", 2, 3)
    shutil.copytree(tmp_path / "three" / ".parts" / "2-of-3", out / ".parts" / "2-of-3")
    with pytest.raises(UserError, match=f"^{out}: contains part 1 of 2 and part 2 of 3, expected parts of one number"):
        merge_parts(out)
    shutil.rmtree(out / ".parts" / "2-of-3")
    pack_part(source, out, 2, 2)
    with monkeypatch.context() as patch:
        patch.setattr(merging, "VERSION", pack_options.VERSION | {"version": "9.9"})
        with pytest.raises(
            UserError, match=r"part 1 of 2 is from version \S+, not 9.9; merge with the version that pac"
        ):
            merge_parts(out)
    merge_parts(out, progress=False)
    assert contents(out) == expected


def test_a_complete_pack_is_kept(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    pack_in_parts(source, out, 2)
    with pytest.raises(UserError, match=f"^{out}: contains a complete pack of another source or other options; remove"):
        pack_part(source, out, 1, 2, shard_size=5)
    pack_part(source, other, 1, 2, shard_size=5)
    shutil.copytree(other / ".parts", out / ".parts")
    with pytest.raises(UserError, match=f"^{out}: contains a complete pack, and part 1 of 2 of another source or with"):
        merge_parts(out)
    assert contents(out) == expected and (out / ".parts" / "1-of-2" / "done.json").exists()
    shutil.rmtree(out / ".parts")
    # What a merge leaves that was killed while it removed its parts is removed by the next one.
    pack_part(source, tmp_path / "again", 1, 2)
    shutil.copytree(tmp_path / "again" / ".parts", out / ".parts")
    assert merge_parts(out, progress=False).up_to_date
    assert contents(out) == expected and not (out / ".parts").exists()


def test_an_interrupted_merge_is_finished_first(
    source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part that ran now would miss the shards that are in place already, and pack them again."""
    out = tmp_path / "out"
    for i in (1, 2):
        pack_part(source, out, i, 2)
    move, moved = Directory.move, 0

    def interrupted(files: Directory, name: str, to: Directory, new: str | None = None) -> None:
        nonlocal moved
        moved += files.path.name == "2-of-2"
        if moved == 4:
            raise KeyboardInterrupt
        move(files, name, to, new)

    with monkeypatch.context() as patch:
        patch.setattr(Directory, "move", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merge_parts(out, progress=False)
    left = sorted(path.relative_to(out) for path in out.rglob("*"))
    assert len(list(out.glob("*.tar"))) >= 3 and not (out / "manifest.json").exists()
    for i in (1, 2):
        with pytest.raises(
            UserError, match=f"^{out}: the merge of its parts was interrupted; finish it with `pack --m"
        ):
            pack_part(source, out, i, 2)
    assert sorted(path.relative_to(out) for path in out.rglob("*")) == left
    assert not merge_parts(out, progress=False).up_to_date
    assert contents(out) == expected and not (out / ".parts").exists()


def test_a_plain_pack_does_not_replace_parts(source: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    pack_part(source, out, 1, 2)
    assert main(["pack", str(source), "--out", str(out)]) == 2
    assert capsys.readouterr().err == (
        f"error: {out}: contains parts of a pack; finish them with `pack --merge {out}`, remove {out}/.parts, or "
        "choose another directory\n"
    )
    (out / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"not part of a pack \(notes.txt\)"):
        pack_part(source, out, 2, 2)
    pack_part(source, out, 2, 2, force=True)
    merge_parts(out, progress=False)
    assert (out / "notes.txt").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["SET"], "--merge: got SOURCE SET as well, expected only `pack --merge DIR` once all parts are packed"),
        (
            ["--part", "1/2"],
            "--merge: got --part 1/2 as well, expected only `pack --merge DIR` once all parts are packed",
        ),
        (["--out", "x"], "--merge: got --out x as well, expected only `pack --merge DIR` once all parts are packed"),
        (["--shard-size", "5"], "--merge: got --shard-size as well, which is an option of the parts; remove it"),
        (
            ["--boxes", "xywh"],
            "boxes: got 'xywh', expected xyxy: parts are packed with this option, and merged without",
        ),
        ([], "DIR: contains no parts of a pack, expected those of `pack SOURCE --out DIR --part i/n`"),
    ],
)
def test_wrong_options_of_a_merge(options: list[str], message: str, capsys: Any) -> None:
    assert main(["pack", "--merge", "DIR", *options]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_scenes_in_memory_have_no_parts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^part: got a source without a fingerprint, such as scenes in memory, expect"):
        pack(generate_scenes(2, seed=0), tmp_path / "out", part=(1, 2))


def test_foreign_files_are_kept(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    folder = out / ".parts" / "1-of-1"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("kept")
    with pytest.raises(UserError, match=rf"^{folder}/notes.txt: not a file of a part; move it away"):
        pack_part(source, out, 1, 1)
    assert (folder / "notes.txt").read_text() == "kept"
    shutil.rmtree(folder)
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "train-000000.tar").write_text("kept")
    folder.symlink_to(victim)
    refused = (
        "got a symbolic link, expected a directory of parts; links are refused, move the directory itself here, or"
    )
    for link in (folder, folder.parent):
        if link == folder.parent:
            shutil.rmtree(link)
            link.symlink_to(victim)
        for call in (lambda: pack_part(source, out, 1, 1), lambda: merge_parts(out)):
            with pytest.raises(UserError, match=f"^{link}: {refused}"):
                call()
        assert (victim / "train-000000.tar").read_text() == "kept" and len(list(victim.iterdir())) == 1


@pytest.mark.parametrize("n", [1, 3])
def test_boxes_in_another_convention(n: int, tmp_path: Path, capsys: Any) -> None:
    """The merge judges by the first scenes of the data set, whichever parts they are in."""
    pack(generate_scenes(24, seed=1), tmp_path / "good", split="hash", val=0, test=0, progress=False)
    samples = []
    for key in ShardSet(tmp_path / "good").keys:
        image, text = read_raw(tmp_path / "good", key)
        record = json.loads(text)
        for one in record["objects"]:
            x1, y1, x2, y2 = one["box"]
            one["box"] = [x1, y1, x2 - x1, y2 - y1]
        samples.append((key, image, json.dumps(record).encode()))
    boxed = tmp_path / "set"
    boxed.mkdir()
    write_tar(boxed / "train-0.tar", samples)
    out = tmp_path / "out"
    for i in range(1, n + 1):
        pack_part(boxed, out, i, n)
    assert main(["pack", "--merge", str(out)]) == 2
    assert "boxes fit their masks as x, y, width, height" in capsys.readouterr().err
    assert main(["pack", "--merge", str(out), "--boxes", "xyxy", "--allow-empty-level"]) == 0


@pytest.mark.parametrize("n", [1, 3])
def test_a_lost_level_and_no_scenes(n: int, source: Path, tmp_path: Path, capsys: Any) -> None:
    pack(generate_scenes(12, seed=1), tmp_path / "good", split="hash", val=0, test=0, progress=False)
    raw = [(key, *read_raw(tmp_path / "good", key)) for key in ShardSet(tmp_path / "good").keys]
    bad = []
    for key, image, text in raw:
        record = json.loads(text)
        for one in record["relations"]:
            one["object"] = one["subject"]
        bad.append((key, image, json.dumps(record).encode()))
    cases = {"lost": bad, "damaged": [(key, image[:300], text) for key, image, text in raw], "empty": []}
    for name, samples in cases.items():
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "train-0.tar", samples)
        for i in range(1, n + 1):
            pack_part(tmp_path / name, tmp_path / f"{name}-out", i, n)
    capsys.readouterr()
    assert main(["pack", "--merge", str(tmp_path / "lost-out")]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert re.search(
        r"error: all \d+ relations were rejected: .* see \S+/lost-out.rejected.jsonl; --allow-empty", message
    )
    assert (tmp_path / "lost-out.rejected.jsonl").read_text().count("relation_with_itself") > 0
    assert main(["pack", "--merge", str(tmp_path / "lost-out"), "--allow-empty-level"]) == 0
    assert not (tmp_path / "lost-out.rejected.jsonl").exists()
    assert main(["pack", "--merge", str(tmp_path / "damaged-out")]) == 2
    assert "no valid scenes to pack: 12 image_truncated; see" in capsys.readouterr().err
    assert main(["pack", "--merge", str(tmp_path / "empty-out")]) == 2
    assert "no valid scenes to pack: the source is empty; see" in capsys.readouterr().err


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Make writing more than `size` bytes to a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_full_disk(source: Path, expected: dict[str, bytes], tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    command = ["pack", str(source), "--out", str(out), "--shard-size", str(SIZE), "--part"]
    for room in (300, 3_000):  # part.json, a shard
        with file_size_limit(room):
            assert main([*command, "1/2"]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: ") and "File too large" in line and "/.parts/1-of-2" in line
    for part in ("1/2", "2/2"):
        assert main([*command, part]) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    with file_size_limit(2_000):
        assert main(["pack", "--merge", str(out)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and line.endswith("File too large; the parts are kept")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    merge_parts(out, progress=False)
    assert contents(out) == expected


def test_a_disk_that_is_full_when_a_shard_is_closed(source: Path, tmp_path: Path) -> None:
    """Of the largest shard of a part, and of one that the merge writes again, the last bytes are lacking."""
    out = tmp_path / "out"
    for i in (1, 2):
        pack_part(source, out, i, 2)
    shard = max(out.glob(".parts/*/*.tar"), key=lambda path: path.stat().st_size)
    with (
        file_size_limit(shard.stat().st_size - 1),
        pytest.raises(UserError, match=rf"{shard.parent.name}\S*: File too large"),
    ):
        pack_part(source, tmp_path / "again", int(shard.parent.name[0]), 2)
    rewritten = []
    write = merging._Parts._rewrite

    def noted(parts: merging._Parts, stage: Any, *args: Any) -> Any:
        record = write(parts, stage, *args)
        rewritten.append(record["bytes"])
        return record

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging._Parts, "_rewrite", noted)
        shutil.copytree(out, tmp_path / "copy")
        merge_parts(tmp_path / "copy", progress=False)
    with file_size_limit(max(rewritten) - 1), pytest.raises(UserError, match="File too large; the parts are kept"):
        merge_parts(out, progress=False)


def run_children(*arguments: object) -> dict[str, Any]:
    """Run this file as a script, which imports the package once and kills forked children."""
    command = [sys.executable, __file__, *map(str, arguments)]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # of the support modules
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800, env=paths)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("n", [1, 3])
def test_killed_at_random_moments(n: int, source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    result = run_children("random", source, tmp_path, KILLS, n)
    assert result["killed"] == KILLS
    assert contents(tmp_path / "out") == expected
    assert sorted(path.name for path in tmp_path.rglob("*") if path.name not in expected) == ["out"]


def test_a_merge_killed_at_every_disk_operation(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    steps = run_children("steps", source, tmp_path, 1 if KILLS > 4 else 9)["steps"]
    assert steps >= 60, "rewritten shards, journal, other files, moving, cleanup"


def _forked(job: Callable[[], Any]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            job()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return pid


def _was_killed(pid: int) -> bool:
    """Wait for a child; returns whether it was killed."""
    status = os.waitpid(pid, 0)[1]
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0, "the command failed"
    return os.WIFSIGNALED(status)


def _random_kills(source: Path, directory: Path, kills: int, n: int) -> dict[str, Any]:
    """Run all parts at once, then the merge, and kill random ones of these processes."""
    out, trial = directory / "out", directory / "trial"
    rng = generator(f"parts {n}")

    def start(target: Path, i: int) -> int:
        return _forked(lambda: pack_part(source, target, i, n) if i else merge_parts(target, progress=False))

    began = time.monotonic()
    for phase in ([*range(1, n + 1)], [0]):
        for pid in [start(out, i) for i in phase]:
            assert not _was_killed(pid)
    seconds = time.monotonic() - began
    reference = contents(out)
    killed = rounds = 0
    while killed < kills:
        rounds += 1
        for phase in ([*range(1, n + 1)], [0]):
            left = set(phase)
            while left:
                running = {i: start(trial, i) for i in left}
                if killed < kills and rng.random() < 0.8:
                    time.sleep(rng.random() * seconds * (0.05 if phase == [0] else 0.8))
                    os.kill(running[rng.choice(sorted(left))], signal.SIGKILL)
                for i, pid in running.items():
                    if _was_killed(pid):
                        killed += 1
                    else:
                        left.discard(i)
        assert contents(trial) == reference, "scenes were lost"
        assert [path.name for path in trial.iterdir() if path.is_dir()] == []
        shutil.rmtree(trial)
    return {"killed": killed, "rounds": rounds}


def _kill_at_every_step(source: Path, directory: Path, stride: int) -> dict[str, Any]:
    ready, trial = directory / "ready", directory / "trial"
    for i in (1, 2):
        pack_part(source, ready, i, 2)
    shutil.copytree(ready, directory / "whole")
    merge_parts(directory / "whole", progress=False)
    reference = contents(directory / "whole")
    n = 1
    while True:
        shutil.copytree(ready, trial)

        def merge(n: int = n) -> None:
            kill_at(n)
            merge_parts(trial, progress=False)

        killed = _was_killed(_forked(merge))
        assert not (trial / "manifest.json").exists() or contents(trial) == reference, f"step {n}: incomplete pack"
        assert not _was_killed(_forked(lambda: merge_parts(trial, progress=False)))
        assert contents(trial) == reference, f"step {n}"
        assert [path.name for path in trial.iterdir() if path.is_dir()] == [], f"step {n}"
        shutil.rmtree(trial)
        if not killed:
            return {"steps": n}
        n += stride


if __name__ == "__main__":
    mode, source_, directory_, *numbers = sys.argv[1:]
    job: Callable[..., dict[str, Any]] = {"random": _random_kills, "steps": _kill_at_every_step}[mode]
    print(json.dumps(job(Path(source_), Path(directory_), *map(int, numbers))))
