from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packs import downgrade_index, read_rows

from scenarioclip_fast.cli.main import main
from scenarioclip_fast.data import Relation, Scene, ShardSet, Vocabulary, generate_scenes, pack
from scenarioclip_fast.data.rle import decode
from scenarioclip_fast.data.scene import scene_from_json, scene_to_json
from scenarioclip_fast.data.synthetic import vocabulary, write_published_layout
from scenarioclip_fast.errors import UserError


def pack_quietly(source: Any, out: Path, **options: Any) -> Any:
    return pack(source, out, progress=False, **options)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def synthetic() -> list[Scene]:
    return list(generate_scenes(40, seed=11))


@pytest.fixture(scope="module")
def source(synthetic: list[Scene], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source") / "set"
    write_published_layout(synthetic, directory, classes=vocabulary())
    return directory


@pytest.fixture
def small_source(synthetic: list[Scene], tmp_path: Path) -> Path:
    """A small source that a test may damage."""
    write_published_layout([replace(scene, split=None) for scene in synthetic[:6]], tmp_path / "set")
    return tmp_path / "set"


def test_pack_contents(source: Path, synthetic: list[Scene], tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = pack_quietly(source, out, shard_size=12)
    splits = Counter(s.split for s in synthetic)
    assert {split: n["scenes"] for split, n in report.splits.items()} == splits
    assert sum(n["objects"] for n in report.splits.values()) == sum(len(s.objects) for s in synthetic)
    assert sum(n["relations"] for n in report.splits.values()) == sum(len(s.relations) for s in synthetic)
    assert report.rejected == {} and (out / "rejected.jsonl").read_bytes() == b""
    manifest = json.loads((out / "manifest.json").read_text())
    index = read_rows(out)
    shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    assert len(shards) == sum(-(-n // 12) for n in splits.values())
    for shard in shards:
        path = out / shard["name"]
        assert shard["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert shard["bytes"] == path.stat().st_size and shard["scenes"] == len(index[shard["name"]]) <= 12
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        assert [m.name for m in members] == [
            f"{row[0]}.{suffix}" for row in index[shard["name"]] for suffix in ("jpg", "json")
        ]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in members} == {(0, 0, 0, "", 0o644)}
    for name, digest in manifest["sha256"].items():
        assert digest == hashlib.sha256((out / name).read_bytes()).hexdigest()
    assert not list(tmp_path.glob(".*")), "no temporary files remain"


def test_image_bytes_are_copied(source: Path, tmp_path: Path) -> None:
    pack_quietly(source, tmp_path / "out")
    shards = ShardSet(tmp_path / "out")
    for i, key in enumerate(shards.keys):
        assert shards.read(i).image == (source / "images" / f"{key}.jpg").read_bytes()


def test_shards_are_webdataset_tars(source: Path, tmp_path: Path) -> None:
    pack_quietly(source, tmp_path / "out")
    groups: dict[str, set[str]] = {}
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        for member in tar:
            key, suffix = member.name.split(".", 1)
            groups.setdefault(key, set()).add(suffix)
    assert groups and set(map(frozenset, groups.values())) == {frozenset({"jpg", "json"})}


def test_vocabulary_contains_all_classes_and_train_counts(source: Path, tmp_path: Path) -> None:
    pack_quietly(source, tmp_path / "out")
    words = Vocabulary.load(tmp_path / "out" / "vocabulary.bin")
    assert {"actions": words.actions, "objects": words.objects, "relations": words.relations} == vocabulary()
    train = ShardSet(tmp_path / "out")
    scenes = [train.read(i) for i in range(len(train))]
    counts = {
        "global": Counter(s.action for s in scenes),
        "object": Counter(o.name for s in scenes for o in s.objects),
        "relation": Counter(s.relation_text(k) for s in scenes for k in range(len(s.relations))),
    }
    for level, counter in counts.items():
        assert words.train_counts(level) == [counter[text] for text in words.texts(level)]


def test_packing_is_deterministic(source: Path, tmp_path: Path) -> None:
    pack_quietly(source, tmp_path / "a", shard_size=7)
    first = contents(tmp_path / "a")
    pack_quietly(source, tmp_path / "a", shard_size=7)
    assert contents(tmp_path / "a") == first
    pack_quietly(source, tmp_path / "b", shard_size=7, workers=2)
    assert contents(tmp_path / "b") == first
    pack_quietly(source, tmp_path / "a", shard_size=100)
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert "train-000001.tar" not in names, "shards of the replaced pack are removed"


def test_concurrent_runs_are_rejected(source: Path, tmp_path: Path) -> None:
    import fcntl

    stage = tmp_path / ".out.partial"
    stage.mkdir()
    lock = os.open(stage, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another process is packing into it"):
        pack_quietly(source, tmp_path / "out")
    os.close(lock)
    pack_quietly(source, tmp_path / "out")


def test_splits_by_hash_of_the_key(synthetic: list[Scene], tmp_path: Path) -> None:
    bare = [replace(scene, split=None) for scene in synthetic]
    pack_quietly(bare, tmp_path / "a", val=0.2, test=0.3)
    pack_quietly(bare[::-1][:25], tmp_path / "b", val=0.2, test=0.3)
    split = {key: s for s in ("train", "val", "test") for key in ShardSet(tmp_path / "a", s).keys}
    assert Counter(split.values()).keys() == {"train", "val", "test"}
    for s in ("train", "val", "test"):
        assert all(split[key] == s for key in ShardSet(tmp_path / "b", s).keys)
    pack_quietly(bare, tmp_path / "c", val=0.0, test=0.0)
    assert len(ShardSet(tmp_path / "c")) == len(bare)
    with pytest.raises(UserError, match=r"got fractions val=0\.7 and test=0\.6"):
        pack_quietly(bare, tmp_path / "d", val=0.7, test=0.6)
    with pytest.raises(UserError, match="workers: got 0, expected at least 1"):
        pack_quietly(bare, tmp_path / "d", workers=0)
    (tmp_path / "notes.txt").write_text("no tar")
    with pytest.raises(UserError, match=r"notes\.txt: not a data set of a known format"):
        pack_quietly(tmp_path / "notes.txt", tmp_path / "d")


def test_scenes_in_memory_are_checked(synthetic: list[Scene], tmp_path: Path) -> None:
    first = replace(synthetic[0], split="train")
    scenes = [
        first,
        replace(first, key="again/and/again"),
        first,
        replace(first, key="b", image=b"no image"),
        replace(first, key="c", split="valid"),
        replace(first, key="d", relations=[Relation(0, "near", 9), Relation(0, "near", 0)]),
        replace(first, key="e", objects=[replace(o, mask=torch.zeros(3, 3) > 0) for o in first.objects]),
    ]
    report = pack_quietly(scenes, tmp_path / "out")
    assert report.splits["train"]["scenes"] == 3
    assert report.rejected == {
        "bad_mask": len(first.objects),
        "duplicate_id": 1,
        "image_not_an_image": 1,
        "malformed_entry": 1,
        "relation_unknown_label": 1,
        "relation_with_itself": 1,
        "unsafe_id": 1,
        **({"relation_without_mask": len(first.relations)} if first.relations else {}),
    }


def _of_one_object(scene: Scene, **change: Any) -> Scene:
    return replace(scene, objects=[replace(scene.objects[0], **change)], relations=[])


# Scenes with malformed fields: the expected reason (None: valid) and the change.
MALFORMED: dict[str, tuple[str | None, Callable[[Scene], Any]]] = {
    "no scene": ("malformed_entry", lambda s: None),
    "key with line breaks": ("unsafe_id", lambda s: replace(s, key="a\nb" * 1000)),
    "key is a number": ("malformed_entry", lambda s: replace(s, key=7)),
    "no image": ("image_not_an_image", lambda s: replace(s, image=None)),
    "float image": ("image_not_an_image", lambda s: replace(s, image=torch.zeros(8, 8, 3))),
    "channels first": ("image_not_an_image", lambda s: replace(s, image=torch.zeros(3, 8, 8, dtype=torch.uint8))),
    "image without pixels": ("image_not_an_image", lambda s: replace(s, image=torch.zeros(0, 8, 3, dtype=torch.uint8))),
    "empty action": ("malformed_entry", lambda s: replace(s, action=" ")),
    "empty name": ("malformed_entry", lambda s: _of_one_object(s, name="")),
    "empty predicate": ("malformed_entry", lambda s: replace(s, relations=[Relation(0, "", 0)])),
    "too many objects": ("malformed_entry", lambda s: replace(s, objects=s.objects * 1024)),
    "objects is None": ("malformed_entry", lambda s: replace(s, objects=None)),
    "box with three numbers": ("malformed_entry", lambda s: _of_one_object(s, box=(0, 0, 5))),
    "mask of floats": ("bad_mask", lambda s: _of_one_object(s, mask=np.ones((64, 64)))),
    "mask of another size": ("bad_mask", lambda s: _of_one_object(s, mask=np.ones((8, 8), bool))),
    "mask is a list": ("bad_mask", lambda s: _of_one_object(s, mask=[[True]])),
    "mask with three values": ("bad_mask", lambda s: _of_one_object(s, mask=torch.arange(3, dtype=torch.uint8)[None])),
    "NumPy box": (None, lambda s: _of_one_object(s, box=tuple(np.float32([0, 0, 5.5, 5])))),
    "image with permuted axes": (
        None,
        lambda s: replace(
            s, image=torch.zeros(3, 64, 64, dtype=torch.uint8).permute(1, 2, 0), objects=[], relations=[]
        ),
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_scene_in_memory_does_not_affect_others(synthetic: list[Scene], tmp_path: Path, case: str) -> None:
    reason, change = MALFORMED[case]
    first, second = (replace(scene, split="train") for scene in synthetic[:2])
    report = pack_quietly([second, change(first), replace(second, key="last")], tmp_path / "out")
    assert report.splits["train"]["scenes"] == 2 + (reason in (None, "bad_mask"))
    assert report.rejected == ({reason: 1} if reason else {})
    for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["entry"].startswith("scene 1") and row["detail"] and len(line) < 400
        assert (row["entry"] + row["detail"]).isprintable()


def test_masks_as_pixels_of_every_type(synthetic: list[Scene], tmp_path: Path) -> None:
    convert: list[Callable[[np.ndarray], Any]] = [
        lambda mask: mask,
        lambda mask: np.asfortranarray(mask),
        lambda mask: mask[::-1].copy()[::-1],  # negative strides
        lambda mask: mask.astype(np.uint8),
        lambda mask: mask.astype(np.uint8) * 255,
        lambda mask: torch.from_numpy(mask),
        lambda mask: torch.from_numpy(mask.astype(np.uint8) * 255),
    ]
    scene = replace(synthetic[0], split="train")
    assert scene.objects

    def of(k: int) -> Scene:
        objects = [replace(item, mask=convert[k](np.asarray(item.mask))) for item in scene.objects]
        return replace(scene, key=f"s{k}", objects=objects)

    report = pack_quietly(map(of, range(len(convert))), tmp_path / "out")
    assert not report.rejected
    shards = ShardSet(tmp_path / "out")
    assert len(shards) == len(convert)
    for i in range(len(convert)):
        for item, original in zip(shards.read(i).objects, scene.objects, strict=True):
            assert isinstance(item.mask, dict) and isinstance(original.mask, torch.Tensor)
            assert torch.equal(decode(item.mask), original.mask)


def test_bad_entries_are_rejected_and_counted(small_source: Path, tmp_path: Path, capsys: Any) -> None:
    metadata = json.loads((small_source / "metadata.json").read_text())
    keys = [entry["id"] for entry in metadata["data"]]
    (small_source / "images" / f"{keys[0]}.jpg").unlink()
    truncated = small_source / "images" / f"{keys[1]}.jpg"
    truncated.write_bytes(truncated.read_bytes()[:2000])
    metadata["data"][2]["objects"][0][1] = [0, 0, 9999, 20]
    metadata["data"].append("nonsense")
    (small_source / "metadata.json").write_text(json.dumps(metadata))
    assert main(["pack", str(small_source), "--out", str(tmp_path / "out"), "--val", "0", "--test", "0"]) == 0
    printed = capsys.readouterr()
    assert f"rejected: metadata.json: entry 0 ({keys[0]}): missing_image: images/{keys[0]}.jpg" in printed.err
    assert re.search(r"^train +4 ", printed.out, re.MULTILINE) and "missing_image" in printed.out
    rows = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    reasons = Counter(row["reason"] for row in rows)
    assert {r: reasons[r] for r in ("missing_image", "image_truncated", "box_outside", "malformed_entry")} == {
        "missing_image": 1,
        "image_truncated": 1,
        "box_outside": 1,
        "malformed_entry": 1,
    }
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["rejected"] == dict(sorted(reasons.items()))


def test_an_entry_nested_too_deeply_to_be_pickled(small_source: Path, tmp_path: Path) -> None:
    """JSON can be shallow enough to parse, but too deep to pickle."""
    text = (small_source / "metadata.json").read_text()
    for depth in range(1000, 0, -2):
        nested = text.replace('"objects":', f'"relations": {"[" * depth}{"]" * depth}, "objects":', 1)
        nested = nested.replace('"relations":', '"others":', 2).replace('"others":', '"relations":', 1)
        (small_source / "metadata.json").write_text(nested)
        try:
            report = pack_quietly(small_source, tmp_path / "out", workers=2)
            break
        except UserError as error:
            assert "not readable as JSON" in str(error)
    assert report.rejected == {"malformed_relation": 1}
    assert sum(n["scenes"] for n in report.splits.values()) == 6


def test_no_valid_scenes(small_source: Path, tmp_path: Path, capsys: Any) -> None:
    for path in (small_source / "images").iterdir():
        path.unlink()
    out = tmp_path / "out"
    assert main(["pack", str(small_source), "--out", str(out)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error:") and "no valid scenes to pack: 6 missing_image" in error
    assert not out.exists()
    assert len((tmp_path / "out.rejected.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda d: None, "no such file or directory"),
        (lambda d: d.mkdir(), "not a data set of a known format"),
        (lambda d: (d.mkdir(), (d / "metadata.json").write_text('{"data": []}')), "the data set is empty"),
        (lambda d: (d.mkdir(), (d / "metadata.json").write_text('{"data": [')), "metadata.json: not readable as JSON"),
    ],
)
def test_unusable_sources_are_reported_in_one_line(tmp_path: Path, capsys: Any, prepare: Any, message: str) -> None:
    prepare(tmp_path / "set")
    assert main(["pack", str(tmp_path / "set"), "--out", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert not (tmp_path / "out").exists()


def test_foreign_files_are_kept(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"not part of a pack \(thesis\.tex\)"):
        pack_quietly(source, out)
    pack_quietly(source, out, force=True)
    assert (out / "thesis.tex").read_text() == "years of work" and len(ShardSet(out)) > 0
    with pytest.raises(UserError, match="is a file"):
        pack_quietly(source, out / "thesis.tex")


def test_the_source_is_never_overwritten(source: Path, tmp_path: Path) -> None:
    pack_quietly(source, tmp_path / "out")
    for directory, found in ((source, "not part of a pack"), (tmp_path / "out", "this directory holds the source")):
        with pytest.raises(UserError, match=found):
            pack_quietly(directory, directory)
        with pytest.raises(UserError, match="this directory holds the source"):
            pack_quietly(directory, directory / ".." / directory.name, force=True)
    (tmp_path / "out" / "manifest.json").unlink()
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=r"contains an incomplete pack \(test-000000\.tar\)"):
        pack_quietly(source, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_a_pack_with_another_schema_is_not_replaced(source: Path, tmp_path: Path) -> None:
    pack_quietly(source, tmp_path / "out")
    (tmp_path / "out" / "manifest.json").write_text('{"schema": 7}')
    with pytest.raises(UserError, match="contains a pack with schema 7"):
        pack_quietly(source, tmp_path / "out")
    pack_quietly(source, tmp_path / "out", force=True)
    assert len(ShardSet(tmp_path / "out")) > 0


def test_a_failed_run_keeps_the_old_pack(source: Path, small_source: Path, tmp_path: Path) -> None:
    pack_quietly(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    for path in (small_source / "images").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="no valid scenes"):
        pack_quietly(small_source, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_command_line_from_scenes_to_shards(tmp_path: Path, capsys: Any) -> None:
    assert main(["scenes", "--out", str(tmp_path / "set"), "-n", "20", "--seed", "5"]) == 0
    assert "metadata_train.json: 15 scenes" in capsys.readouterr().out
    assert main(["pack", str(tmp_path / "set"), "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    assert len(ShardSet(tmp_path / "out")) == 15
    assert main(["scenes", "--out", str(tmp_path / "set"), "-n", "20"]) == 2
    assert "not an empty directory" in capsys.readouterr().err
    for option in ("--shard-size", "--max-pixels"):
        assert main(["pack", str(tmp_path / "set"), "--out", str(tmp_path / "x"), option, "0"]) == 2
    capsys.readouterr()
    assert main(["pack", str(tmp_path / "set"), "--out", str(tmp_path / "x"), "--max-pixels", "99"]) == 2
    assert re.search(r"no valid scenes to pack: \d+ image_too_large", capsys.readouterr().err)


def test_lone_surrogates_in_texts(small_source: Path, tmp_path: Path) -> None:
    metadata = json.loads((small_source / "metadata.json").read_text())
    metadata["data"][0]["action"] = "half a \ud800 character"
    metadata["data"][1]["id"] = "\ud800"
    metadata["data"][2]["objects"][0][0] = "\udfff"
    (small_source / "metadata.json").write_text(json.dumps(metadata))
    (small_source / "classes.json").unlink()
    pack_quietly(small_source, tmp_path / "out", val=0, test=0)
    assert "half a character" in Vocabulary.load(tmp_path / "out" / "vocabulary.bin").actions
    rows = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text("utf-8").splitlines()]
    assert r"(\ud800)" in "".join(row["entry"] for row in rows)


def test_real_photos(photos: Path, tmp_path: Path) -> None:
    report = pack_quietly(photos, tmp_path / "out")
    assert report.rejected == {}
    totals = {what: sum(n[what] for n in report.splits.values()) for what in ("scenes", "objects", "relations")}
    assert totals == {"scenes": 128, "objects": 642, "relations": 343}
    assert report.vocabulary == {"global": 39, "object": 73, "relation": 289}
    shards = ShardSet(tmp_path / "out")
    for i in range(0, len(shards), 9):
        scene = shards.read(i)
        assert isinstance(scene.image, bytes)
        assert scene.image == (photos / "images" / f"{scene.key}.jpg").read_bytes()
        assert all(decode(o.mask).any() for o in scene.objects)  # type: ignore[arg-type]


def without_actions(scenes: list[Scene], keys: set[str]) -> list[Scene]:
    return [replace(scene, action=None) if scene.key in keys else scene for scene in scenes]


def without_masks(scenes: list[Scene], keys: set[str]) -> list[Scene]:
    return [
        replace(scene, objects=[replace(o, mask=None) for o in scene.objects]) if scene.key in keys else scene
        for scene in scenes
    ]


def test_scenes_without_action_or_masks(synthetic: list[Scene], tmp_path: Path) -> None:
    scenes = [replace(scene, split=None) for scene in synthetic[:8]]
    keys = [scene.key for scene in scenes]
    relations = sum(len(scene.relations) for scene in scenes)
    unmasked = sum(len(scene.relations) for scene in scenes[2:4])
    assert 0 < unmasked < relations
    scenes = without_masks(without_actions(scenes, set(keys[:3])), set(keys[2:4]))
    report = pack_quietly(scenes, tmp_path / "out", val=0.0, test=0.0)
    assert report.rejected == {}
    counts = report.splits["train"]
    assert (counts["scenes"], counts["actions"]) == (8, 5)
    assert (counts["relations"], counts["masked_relations"]) == (relations, relations - unmasked)
    assert "3 of 8 scenes have no action" in str(report)
    assert f"{unmasked} of {relations} relations have no masks" in str(report)
    shards = ShardSet(tmp_path / "out")
    for i, key in enumerate(shards.keys):
        scene, original = shards.read(i), scenes[keys.index(key)]
        assert scene.action == original.action and len(scene.relations) == len(original.relations)
        assert [o.mask is None for o in scene.objects] == [o.mask is None for o in original.objects]
    pack_quietly(tmp_path / "out", tmp_path / "again", val=0.0, test=0.0)
    assert (tmp_path / "again" / "train-000000.tar").read_bytes() == (
        tmp_path / "out" / "train-000000.tar"
    ).read_bytes()


def test_scenes_of_the_published_layout_without_masks(small_source: Path, tmp_path: Path) -> None:
    """Without sam_results, the set has no masks; with it, a scene without its file lost its masks."""
    whole = pack_quietly(small_source, tmp_path / "whole", val=0.0, test=0.0).splits["train"]
    file = next((small_source / "sam_results").iterdir())
    file.unlink()
    some = pack_quietly(small_source, tmp_path / "some", val=0.0, test=0.0)
    lost = some.rejected["relation_without_mask"]
    assert some.rejected == {"missing_masks": 1, "relation_without_mask": lost}
    assert some.splits["train"]["relations"] == whole["relations"] - lost == some.splits["train"]["masked_relations"]
    shutil.rmtree(small_source / "sam_results")
    none = pack_quietly(small_source, tmp_path / "none", val=0.0, test=0.0)
    assert none.rejected == {}
    assert none.splits["train"] == whole | {"masked_relations": 0}


def test_captions_scores_and_negatives_are_kept(small_source: Path, tmp_path: Path) -> None:
    metadata = next(small_source.glob("metadata*.json"))
    record = json.loads(metadata.read_text())
    entry = next(entry for entry in record["data"] if entry["relations"])
    entry["dense_caption"] = "A Dog sits. "
    subject, predicate, _ = entry["relations"][0][1]
    entry["relations"][0].append([["Cat", predicate, subject], "dog  under cat", 7])
    metadata.write_text(json.dumps(record))
    pack_quietly(small_source, tmp_path / "out", val=0.0, test=0.0)
    pack_quietly(tmp_path / "out", tmp_path / "again", val=0.0, test=0.0)
    for directory in (tmp_path / "out", tmp_path / "again"):
        shards = ShardSet(directory)
        scene = next(s for i in range(len(shards)) if (s := shards.read(i)).caption)
        assert scene.caption == "A Dog sits."
        assert scene.relations[0].negatives == [f"cat {predicate} {subject}", "dog under cat"]
    assert scene_from_json("a", b"", scene_to_json(Scene("a", b"", scores={"dog": 0.5}), (1, 1))).scores == {"dog": 0.5}


def test_packs_of_schema_1_are_read(source: Path, tmp_path: Path) -> None:
    """As released in 0.1: neither counts of actions and masked relations nor schema 2 in any file."""
    out = tmp_path / "out"
    pack_quietly(source, out)
    before = [ShardSet(out).read(i) for i in range(3)]
    for tar in out.glob("*.tar"):
        tar.write_bytes(tar.read_bytes().replace(b'{"schema":2,', b'{"schema":1,'))
    downgrade_index(out, schema=1)
    manifest = json.loads((out / "manifest.json").read_text()) | {"schema": 1}
    for split in manifest["splits"].values():
        del split["actions"], split["masked_relations"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    shards = ShardSet(out)
    assert [shards.read(i).action for i in range(3)] == [scene.action for scene in before]
    assert shards.count("actions") == len(shards)
    assert shards.count("masked_relations") == shards.count("relations") > 0
    pack_quietly(source, out, shard_size=7)
    assert json.loads((out / "manifest.json").read_text())["schema"] == 2, "replaced without --force"
