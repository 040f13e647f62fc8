from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packs import read_rows

from scenarioclip_fast.cli.main import main
from scenarioclip_fast.data import Scene, ShardSet, generate_scenes, pack
from scenarioclip_fast.data.check import REASONS, safe_key
from scenarioclip_fast.data.packing.report import PackReport
from scenarioclip_fast.data.sources.tar_index import MAX_RECORD_BYTES
from scenarioclip_fast.data.sources.webdataset import WebDatasetSource
from scenarioclip_fast.errors import UserError

HEIGHT, WIDTH = 40, 60
Member = tuple[str, bytes] | tarfile.TarInfo


def jpeg(height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> bytes:
    import simplejpeg

    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    return bytes(simplejpeg.encode_jpeg(pixels))


def record(**change: Any) -> dict[str, Any]:
    """A cat (left half) on a mat (all but the first column), with uncompressed RLE."""
    half = [0, HEIGHT * WIDTH // 2, HEIGHT * WIDTH // 2]
    rest = [HEIGHT, HEIGHT * (WIDTH - 1)]
    size = [HEIGHT, WIDTH]
    return {
        "schema": 1,
        "size": size,
        "action": "Sleeping  in",
        "objects": [
            {"name": "Cat", "box": [0, 0, 30, 40], "mask": {"size": size, "counts": half}},
            {"name": "mat", "box": [1, 0, 60, 40], "mask": {"size": size, "counts": rest}},
        ],
        "relations": [{"subject": 0, "predicate": "on", "object": 1}],
    } | change


def sample(key: str, seed: int = 0, **change: Any) -> list[Member]:
    return [(f"{key}.jpg", jpeg(seed=seed)), (f"{key}.json", json.dumps(record(**change)).encode())]


def write(path: Path, members: Iterable[Member], format: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                header = tarfile.TarInfo(member[0])
                header.size = len(member[1])
                tar.addfile(header, io.BytesIO(member[1]))
    return path


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.type, header.linkname = kind, link
    return header


def packed(source: Any, out: Path, **options: Any) -> tuple[PackReport, list[dict[str, str]]]:
    report = pack(source, out, progress=False, **{"val": 0.0, "test": 0.0, "allow_empty_level": True} | options)
    return report, [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]


def scenes(out: Path, split: str = "train") -> list[Scene]:
    shards = ShardSet(out, split)
    return [shards.read(i) for i in range(len(shards))]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_a_tar_from_another_writer(tmp_path: Path) -> None:
    image = jpeg(seed=1)
    members: list[Member] = [
        special("./", tarfile.DIRTYPE),
        ("./first.cls", b"7"),
        ("./first.json", json.dumps(record()).encode()),
        ("./first.jpg", image),
        ("more/deep/2nd.JPEG", jpeg(seed=2)),
        ("more/deep/2nd.seg.jpg", b"not for us"),
        ("more/deep/2nd.json", json.dumps(record()).encode()),
        ("README", b"hello"),
    ]
    report, rejected = packed(write(tmp_path / "a.tar", members), tmp_path / "out")
    assert not rejected and report.ignored == {".*.jpg": 1, ".cls": 1, "no suffix": 1}
    assert "ignored: 1 .*.jpg, 1 .cls, 1 no suffix" in str(report)
    first, second = scenes(tmp_path / "out")
    assert (first.key, second.key) == ("first", safe_key("more_deep_2nd", raw="more/deep/2nd"))
    assert first.image == image and first.action == "sleeping in" and first.relation_text(0) == "cat on mat"
    assert all(isinstance(o.mask["counts"], str) for o in first.objects)  # type: ignore[index]
    from scenarioclip_fast.data.rle import decode

    cat, mat = (decode(o.mask).numpy() for o in first.objects)  # type: ignore[arg-type]
    assert cat[:, :30].all() and not cat[:, 30:].any() and mat[:, 1:].all() and not mat[:, 0].any()


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_in_every_tar_format(tmp_path: Path, format: int) -> None:
    key = "-".join(["directory"] * 6) + "/" + "k" * 28
    write(tmp_path / "a.tar", sample(key), format)
    packed(tmp_path, tmp_path / "out")
    (scene,) = scenes(tmp_path / "out")
    assert scene.key.startswith(key.replace("/", "_")[:80]) and len(scene.key) <= 90


def test_interoperability_with_webdataset(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="WebDataset is not installed")
    (tmp_path / "tars").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "tars" / "val-%03d.tar"), maxcount=2, verbose=0) as writer:
        for i in range(5):
            writer.write({"__key__": f"scene{i}", "jpg": jpeg(seed=i), "json": record(), "__url__": "x"})
    report, rejected = packed(tmp_path / "tars", tmp_path / "out")
    assert not rejected and report.splits["val"]["scenes"] == 5
    assert [scene.image for scene in scenes(tmp_path / "out", "val")] == [jpeg(seed=i) for i in range(5)]
    # Conversely, WebDataset reads our shards.
    (shard,) = (tmp_path / "out").glob("val-*.tar")
    read = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert [row["__key__"] for row in read] == [f"scene{i}" for i in range(5)]
    assert json.loads(read[0]["json"])["action"] == "sleeping in"


def test_packing_a_pack_reproduces_it(tmp_path: Path) -> None:
    synthetic = list(generate_scenes(30, seed=4))
    pack(synthetic, tmp_path / "a", shard_size=8, progress=False)
    packed(tmp_path / "a", tmp_path / "b", shard_size=8)
    one, two = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert two.pop("source.json")
    assert one.keys() == two.keys()
    # Shards are listed in order of completion, which differs for scenes in memory.
    assert {name for name in one if one[name] != two[name]} <= {"index.bin", "manifest.json"}
    assert read_rows(tmp_path / "a") == read_rows(tmp_path / "b")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("many")
    for t, name in enumerate(("train-0.tar", "test-0.tar", "other.tar")):
        write(directory / name, [m for i in range(12) for m in sample(f"{t}-{i}", seed=i)])
    return directory


def test_splits(many: Path, tmp_path: Path) -> None:
    packed(many, tmp_path / "given", val=0.3, test=0.3)
    keys = {split: ShardSet(tmp_path / "given", split).keys for split in ("train", "val", "test")}
    assert [k for k in keys["train"] if k[0] == "0"] == [f"0-{i}" for i in range(12)], "in the order of the tar"
    assert {k for k in keys["test"] if k[0] != "2"} == {f"1-{i}" for i in range(12)}
    assert all(any(k[0] == "2" for k in keys[split]) for split in keys), "without a prefix, the hash assigns the split"
    assert main(["pack", str(many), "--out", str(tmp_path / "hash"), "--split", "hash", "--val", "0.3"]) == 0
    by_hash = {k: split for split in keys for k in ShardSet(tmp_path / "hash", split).keys}
    assert {by_hash[f"0-{i}"] for i in range(12)} > {"train"}


def test_aliases_of_splits(tmp_path: Path) -> None:
    names = {
        "Training-0.tar": "train",
        "train2017_0.tar": "train",
        "dev-0.tar": "val",
        "VALID.0.tar": "val",
        "eval-0.tar": "val",
        "testing_0.tar": "test",
        "validation/0.tar": "val",
        "test2015/part-0.tar": "test",
        "test/val-0.tar": "val",  # the name of the tar goes before that of its folder
        "cc3m-0.tar": None,
        "trains-0.tar": None,
    }
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, sample(safe_key(name.replace("/", "_"))))
    (tmp_path / "images").mkdir()
    write(tmp_path / "images" / "train-1.tar", [])
    source = WebDatasetSource(tmp_path)
    scan = source.scan(1, False)
    found = {item.name: item.split for item in source.items(lambda _, split: split or "train")}
    assert found == names, "tars in other folders are not part of a directory"
    assert scan.warnings == [
        "2 of 11 tars have a prefix that names no split ('cc3m', 'trains'), unlike 'Training-0.tar': their scenes are "
        "split by the hash of their keys"
    ]
    of_list = WebDatasetSource([tmp_path / name for name in names])
    of_list.scan(1, False)
    assert {item.name: item.split for item in of_list.items(lambda _, split: split or "train")} == names


@pytest.mark.parametrize("names", [["cc3m-0", "other"], ["train-0", "val-0"], ["train-0"]])
def test_ordinary_prefixes_are_no_reason_to_warn(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        write(tmp_path / f"{name}.tar", sample(name))
    assert WebDatasetSource(tmp_path).scan(1, False).warnings == []


def test_a_directory_of_folders_of_splits(tmp_path: Path) -> None:
    for split in ("train", "Validation"):
        (tmp_path / "set" / split).mkdir(parents=True)
        write(tmp_path / "set" / split / "000.tar", sample(split))
    report, rejected = packed(tmp_path / "set", tmp_path / "out", test=1.0)
    assert not rejected and [n["scenes"] for n in report.splits.values()] == [1, 1, 0]
    (tmp_path / "set" / "train" / "000.tar").unlink()
    report, _ = packed(tmp_path / "set", tmp_path / "val", test=1.0)
    assert [n["scenes"] for n in report.splits.values()] == [0, 1, 0], "the folder counts without others beside it"


def test_output_is_independent_of_workers(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed(many, tmp_path / "1", shard_size=5, workers=1)
    monkeypatch.setattr(WebDatasetSource, "large", True)  # so that several processes read the headers
    packed(many, tmp_path / "2", shard_size=5, workers=2)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_images_are_paired_with_their_records(tmp_path: Path) -> None:
    names = ["a/b_c", "a_b/c", "a_b_c", "a b_c", "a-b", "é", "è", "ü/é", "caf\udce9"]
    images = {name: jpeg(seed=i) for i, name in enumerate(names)}
    members = [(f"{name}.jpg", image) for name, image in images.items()]
    # In a different order; one record has no image.
    members += [(f"{n}.json", json.dumps(record(action=f"scene {i}")).encode()) for i, n in enumerate(names)][::-1]
    del members[1]
    _, rejected = packed(write(tmp_path / "a.tar", members), tmp_path / "out")
    assert [(row["entry"], row["reason"]) for row in rejected] == [("a.tar: a_b/c", "missing_image")]
    found = {scene.action: scene for scene in scenes(tmp_path / "out")}
    assert len(found) == len(names) - 1
    for i, name in enumerate(names):
        assert i == 1 or found[f"scene {i}"].image == images[name]
    assert found["scene 2"].key == "a_b_c" and found["scene 4"].key == "a-b", "valid keys are unchanged"
    _, again = packed(tmp_path / "out", tmp_path / "again")
    assert not again and ShardSet(tmp_path / "again").keys == ShardSet(tmp_path / "out").keys


def test_a_key_in_several_splits_stays_in_test_or_val(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for name, keys in {"train-0": "ab", "val-0": "bc", "test-0": "cd", "other": "abcde"}.items():
        write(tmp_path / "set" / f"{name}.tar", [m for key in keys for m in sample(key)])
    packs = [packed(tmp_path / "set", tmp_path / f"{test}", test=test) for test in (0.0, 1.0)]
    for test, (report, rejected) in enumerate(packs):
        keys = {split: ShardSet(tmp_path / f"{test:.1f}", split).keys for split in ("train", "val", "test")}
        assert keys == {"train": ["a"] + ["e"] * (1 - test), "val": ["b"], "test": ["c", "d"] + ["e"] * test}
        assert report.rejected == {"duplicate_id": 4, "split_conflict": 2}
        conflicts = {row["entry"]: row["detail"] for row in rejected if row["reason"] == "split_conflict"}
        assert conflicts == {
            "train-0.tar: b": "the id is also in the val split, where it stays",
            "val-0.tar: c": "the id is also in the test split, where it stays",
        }


def test_directories_globs_and_lists_of_tars(many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed(many / "train-0.tar", tmp_path / "file")
    packed(str(many / "t*.tar"), tmp_path / "pattern")
    packed([many / "train-0.tar", str(many / "test-0.tar")], tmp_path / "list")
    assert len(ShardSet(tmp_path / "file")) == 12
    assert contents(tmp_path / "pattern") == contents(tmp_path / "list")
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    write(tmp_path / "x" / "0.tar", sample("a"))
    write(tmp_path / "y" / "0.tar", [*sample("b"), ("c.jpg", b"")])
    tars = [str(tmp_path / name / "0.tar") for name in ("x", "y")]
    assert main(["pack", *tars, "--out", str(tmp_path / "two"), "--val=0", "--test=0"]) == 0
    assert ShardSet(tmp_path / "two").keys == ["a", "b"]
    assert "rejected: y/0.tar: c: missing_record" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_encodings_of_json(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "set").mkdir()
    content = json.dumps(record(action="née"), ensure_ascii=False).encode(encoding)
    write(tmp_path / "set" / "a.tar", [("a.jpg", jpeg()), ("a.json", content)])
    classes = {"actions": ["née"], "objects": ["Cat", "mat"], "relations": ["cat on mat"]}
    (tmp_path / "set" / "classes.json").write_text(json.dumps(classes), encoding)
    report, rejected = packed(tmp_path / "set", tmp_path / "out")
    assert not rejected and report.vocabulary == {"global": 1, "object": 2, "relation": 1}
    assert [scene.action for scene in scenes(tmp_path / "out")] == ["née"]


def test_classes_of_a_directory(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", [*sample("a"), *sample("b", action="jumping")])
    classes = {"actions": ["sleeping in", "flying"], "objects": ["Cat"], "relations": ["cat on mat"]}
    (tmp_path / "classes.json").write_text(json.dumps(classes))
    report, rejected = packed(tmp_path, tmp_path / "out")
    assert [row["reason"] for row in rejected] == ["unknown_object", "relation_without_object", "unknown_action"]
    assert report.vocabulary == {"global": 2, "object": 1, "relation": 1}


def test_every_image_is_decoded_once(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scenarioclip_fast.data.decode import TorchDecoder

    decode, images = TorchDecoder.decode, []
    monkeypatch.setattr(TorchDecoder, "decode", lambda self, data: images.extend(data) or decode(self, data))
    packed(many, tmp_path / "out")
    assert len(images) == 36


BIG = tarfile.TarInfo("big.json")
BIG.size = MAX_RECORD_BYTES + 1
SPARSE = special("s.jpg", tarfile.GNUTYPE_SPARSE)

BAD_SAMPLES: dict[str, tuple[str, list[Member]]] = {
    "absolute path": ("unsafe_member", sample("/etc/a")),
    "path that escapes": ("unsafe_member", sample("../../a")),
    "path that escapes from a subdirectory": ("unsafe_member", sample("a/../../b")),
    "other file whose path escapes": ("unsafe_member", [("../../.bashrc", b"rm")]),
    "symbolic link": ("unsafe_member", [special("a.jpg", tarfile.SYMTYPE, "/etc/passwd")]),
    "hard link": ("unsafe_member", [special("a.json", tarfile.LNKTYPE, "good.json")]),
    "device": ("unsafe_member", [special("a.jpg", tarfile.CHRTYPE)]),
    "pipe": ("unsafe_member", [special("a.jpg", tarfile.FIFOTYPE)]),
    "sparse file": ("unsafe_member", [SPARSE]),
    "control character": ("unsafe_id", sample("a\x07b")),
    "long key": ("unsafe_id", sample("a" * 95)),
    "empty key": ("unsafe_id", [(".jpg", b"")]),
    "duplicate key": ("duplicate_id", sample("good")),
    "two images": ("duplicate_id", [("good.jpeg", jpeg())]),
    "image alone": ("missing_record", sample("a")[:1]),
    "record without an image": ("missing_image", sample("a")[1:]),
    "truncated image": ("image_truncated", [("a.jpg", jpeg()[:-400]), sample("a")[1]]),
    "text instead of an image": ("image_not_an_image", [("a.jpg", b"hello"), sample("a")[1]]),
    "image with a different size": ("other_size", [("a.jpg", jpeg(20, 30)), sample("a")[1]]),
    "no JSON": ("malformed_entry", [sample("a")[0], ("a.json", b"{")]),
    "no UTF-8": ("malformed_entry", [sample("a")[0], ("a.json", b'"\xff"')]),
    "nested JSON": ("malformed_entry", [sample("a")[0], ("a.json", b"[" * 200_000)]),
    "a list": ("malformed_entry", [sample("a")[0], ("a.json", b"[]")]),
    "JSON in another format": ("malformed_entry", [sample("a")[0], ("a.json", b'{"caption": "a dog"}')]),
    "an action that is no text": ("malformed_entry", sample("a", schema=2, action=0)),
    "another schema": ("malformed_entry", sample("a", schema=3)),
    "infinite size": ("malformed_entry", sample("a", size=[float("inf"), WIDTH])),
    "huge number": ("malformed_entry", sample("a", size=[10**400, WIDTH])),
    "no action": ("malformed_entry", sample("a", action=None)),
    "empty action": ("malformed_entry", sample("a", action=" ")),
    "lone surrogate": ("malformed_entry", sample("a", action="\ud800")),
    "objects is a string": ("malformed_entry", sample("a", objects="cat")),
    "name is a number": ("malformed_entry", sample("a", objects=[{"name": 3, "box": [0, 0, 9, 9], "mask": None}])),
    "too many objects": (
        "malformed_entry",
        sample("a", objects=[{"name": "cat", "box": [0, 0, 9, 9], "mask": None}] * 2000, relations=[]),
    ),
    "relation with a missing object": (
        "malformed_entry",
        sample("a", relations=[{"subject": 0, "predicate": "on", "object": 9}]),
    ),
}


@pytest.mark.parametrize("case", BAD_SAMPLES)
def test_bad_samples_are_rejected(tmp_path: Path, case: str) -> None:
    reason, members = BAD_SAMPLES[case]
    write(tmp_path / "a.tar", [*sample("good"), *members, *sample("last")])
    report, rejected = packed(tmp_path, tmp_path / "out")
    assert [scene.key for scene in scenes(tmp_path / "out")] == ["good", "last"], "other samples are unaffected"
    assert {row["reason"] for row in rejected} - {"missing_image", "missing_record"} <= {reason}
    assert reason in report.rejected and reason in REASONS
    for row in rejected:
        assert (
            row["entry"].startswith("a.tar: ") and row["detail"] and len(str(row)) < 600 and row["entry"].isprintable()
        )


MASK = {"size": [HEIGHT, WIDTH], "counts": [0, 1200, 1200]}
PARTLY_BAD: dict[str, tuple[list[str], Any]] = {
    "box outside": (["box_outside", "relation_without_object"], {"box": [0, 0, 600, 40]}),
    "box that is not a number": (["box_outside", "relation_without_object"], {"box": [float("nan"), 0, 30, 40]}),
    "empty mask": (["empty_mask", "relation_without_mask"], {"mask": MASK | {"counts": [2400]}}),
    "mask too short": (["bad_mask", "relation_without_mask"], {"mask": MASK | {"counts": [0, 3]}}),
    "malformed mask": (["bad_mask", "relation_without_mask"], {"mask": MASK | {"counts": "~~~~"}}),
    "mask with a huge run": (["bad_mask", "relation_without_mask"], {"mask": MASK | {"counts": [0, 1 << 60]}}),
}


@pytest.mark.parametrize("case", PARTLY_BAD)
def test_valid_parts_of_a_sample_are_kept(tmp_path: Path, case: str) -> None:
    reasons, change = PARTLY_BAD[case]
    objects = record()["objects"]
    objects[0] |= change
    write(tmp_path / "a.tar", sample("a", objects=objects))
    _, rejected = packed(tmp_path, tmp_path / "out")
    assert [row["reason"] for row in rejected] == reasons
    (scene,) = scenes(tmp_path / "out")
    assert scene.relations == [] and scene.objects[-1].name == "mat"


def test_sizes_in_headers_are_checked(tmp_path: Path) -> None:
    """A huge size in a header causes no read or allocation of that size."""
    members = sample("good")
    with tarfile.open(write(tmp_path / "a.tar", members), "a") as tar:
        header = tarfile.TarInfo("big.json")
        header.size = MAX_RECORD_BYTES + 1
        tar.addfile(header, io.BytesIO(b" " * header.size))
    report, _ = packed(tmp_path, tmp_path / "out")
    assert report.rejected == {"malformed_entry": 1} and len(ShardSet(tmp_path / "out")) == 1


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.size = abs(size)
    data = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if size < 0:
        data[124:136] = (256**12 + size).to_bytes(12, "big")
        data[148:156] = b" " * 8
        data[148:156] = b"%06o\0 " % sum(data)
    return bytes(data)


DAMAGED: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "truncated in a member": ("unexpected end of data|extends past the end", lambda good: good[:-1500]),
    "truncated in a header": ("no header|truncated|unexpected end", lambda good: good + header("b.jpg", 9)[:100]),
    "trailing garbage": (r"byte \d+: no header", lambda good: good + b"rubbish" * 200),
    "member longer than the file": ("past the end", lambda good: good + header("b.jpg", 1 << 20)),
    "negative size": ("negative size", lambda good: good + header("b.jpg", -4096)),
    "attributes of 4 GiB": ("header of 4294967296 bytes", lambda good: good + header("x", 1 << 32, tarfile.XHDTYPE)),
    "name of 4 GiB": (
        "header of 4294967296 bytes",
        lambda good: good + header("x", 1 << 32, tarfile.GNUTYPE_LONGNAME),
    ),
    "name with a line break": ("two.nlines.jpg extends past", lambda good: good + header("two\nlines.jpg", 1 << 20)),
    "attributes with a negative size": ("header of -", lambda good: good + header("x", -4096, tarfile.XHDTYPE)),
    "attributes of attributes": (
        "recursion",
        lambda good: good + (header("x", 12, tarfile.XHDTYPE) + b"12 path=ab\n\n".ljust(512, b"\0")) * 5000,
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_tars(tmp_path: Path, case: str) -> None:
    message, damage = DAMAGED[case]
    good = write(tmp_path / "a.tar", [*sample("good"), *sample("last")]).read_bytes()
    body = good[: len(good.rstrip(b"\0")) // 512 * 512 + 512]
    (tmp_path / "a.tar").write_bytes(damage(body))
    _, rejected = packed(tmp_path, tmp_path / "out")
    (row,) = (row for row in rejected if row["reason"] == "damaged_tar")
    assert row["entry"] == "a.tar: the tar" and re.search(message, row["detail"]), row
    assert row["detail"].isprintable() and len(row["detail"]) < 400
    assert "good" in ShardSet(tmp_path / "out").keys


def test_a_tar_without_end_marker_is_read_and_reported(tmp_path: Path) -> None:
    good = write(tmp_path / "a.tar", sample("good")).read_bytes()
    end = len(good.rstrip(b"\0")) // 512 * 512 + 512
    (tmp_path / "a.tar").write_bytes(good[:end])
    _, (row,) = packed(tmp_path, tmp_path / "out")
    assert row["reason"] == "damaged_tar"
    assert row["detail"] == f"byte {end}: the file ends without an end marker; 1 samples precede the damage"
    assert ShardSet(tmp_path / "out").keys == ["good"]


def test_concatenated_tars(tmp_path: Path) -> None:
    tars = [write(tmp_path / "a", sample(key, seed), format=seed).read_bytes() for seed, key in enumerate("abc")]
    (tmp_path / "a.tar").write_bytes(b"".join(tars))
    _, rejected = packed(tmp_path, tmp_path / "out")
    assert not rejected and sorted(ShardSet(tmp_path / "out").keys) == ["a", "b", "c"]
    assert [scene.image for scene in scenes(tmp_path / "out")] == [jpeg(seed=seed) for seed in range(3)]


def test_a_zeroed_header_is_reported(tmp_path: Path) -> None:
    good = bytearray(write(tmp_path / "a.tar", [*sample("a"), *sample("b"), *sample("c")]).read_bytes())
    at = good.index(b"b.jpg")
    good[at : at + 512] = bytes(512)
    (tmp_path / "a.tar").write_bytes(good)
    _, (row,) = packed(tmp_path, tmp_path / "out")
    assert (row["reason"], row["detail"]) == (
        "damaged_tar",
        f"byte {at + 512}: no header; 1 samples precede the damage",
    )
    assert ShardSet(tmp_path / "out").keys == ["a"]


def test_unusable_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*args: str) -> str:
        assert main(["pack", *args, "--out", str(tmp_path / "out")]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1].startswith("error: ")
        assert not list(tmp_path.glob(".*")) and not (tmp_path / "out").exists()
        return lines[-1]

    source = tmp_path / "set"
    assert "no such file or directory" in error(str(source))
    assert "no such file or directory" in error(str(source / "*.tar"))
    source.mkdir()
    assert "not a data set of a known format (published: a directory with metadata*.json; " in error(str(source))
    assert "found no .tar" in error(str(source), "--format", "webdataset")
    good = write(source / "a.tar", sample("a"))
    assert "contains no metadata*.json" in error(str(source), "--format", "published")
    (source / "b.tar.gz").write_bytes(b"\x1f\x8b")
    assert "b.tar.gz: compressed" in error(str(source))
    (source / "b.tar.gz").rename(source / "b.tar")
    assert "b.tar: compressed (gzip)" in error(str(source))
    (source / "b.tar").unlink()
    (source / "metadata.json").write_text("{}")
    assert "recognised as published and webdataset; choose one with --format" in error(str(source))
    assert "got 2 sources, expected one directory" in error(str(good), str(good), "--format", "published")
    (source / "metadata.json").unlink()
    assert "gone.tar: no such file or directory" in error(str(good), str(source / "gone.tar"))
    (source / "d.tar").mkdir()
    assert "d.tar: got a directory, expected a regular file" in error(str(source))
    (source / "d.tar").rmdir()
    good.write_bytes(b"")
    assert "no valid scenes to pack: 1 damaged_tar" in error(str(source))
    write(good, [("a.png", b""), ("a.txt", b"")])
    assert "no valid scenes to pack: 1 .png ignored, 1 .txt ignored" in error(str(source))


def test_a_tar_that_changes_while_packing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", sample("a"))
    source = WebDatasetSource(path)
    source.scan(1, False)
    (item,) = source.items(lambda key, given: "train")
    os.truncate(path, 600)
    with pytest.raises(UserError, match="the file was changed while packing"):
        source.reader().read(item)
    path.unlink()
    with pytest.raises(UserError, match="No such file"):
        source.reader().read(item)
