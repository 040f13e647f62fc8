"""Rejections are grouped by cause, with a remedy, and a level that loses its entries is reported."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scenarioclip_fast.cli.main import main
from scenarioclip_fast.data import PackReport, generate_scenes, pack
from scenarioclip_fast.data.check import REASONS
from scenarioclip_fast.data.synthetic import write_published_layout
from scenarioclip_fast.errors import UserError

N = 10


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Ten scenes in the published layout, without splits; ids are "1" to "10"."""
    scenes = list(generate_scenes(N, seed=11))
    for i, scene in enumerate(scenes, 1):
        scene.key, scene.split = str(i), None
    write_published_layout(scenes, tmp_path / "set")
    return tmp_path / "set"


def edit(source: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Apply `change` to the entries."""
    path = source / "metadata.json"
    record = json.loads(path.read_text())
    for entry in record["data"]:
        change(entry)
    path.write_text(json.dumps(record))


def packed(source: Path, **options: Any) -> PackReport:
    options = {"allow_empty_level": True, "progress": False, "val": 0.0, "test": 0.0} | options
    return pack(source, source.parent / "out", **options)


def pad_masks(source: Path) -> None:
    for path in (source / "sam_results").iterdir():
        number, _, rest = path.name.partition("_")
        path.rename(path.with_name(f"{int(number):06d}_{rest}"))


def integer_ids(source: Path) -> None:
    pad_masks(source)
    edit(source, lambda entry: entry.update(id=int(entry["id"])))


def move_images(source: Path) -> None:
    edit(source, lambda entry: entry.update(image_path=Path(entry["image_path"]).name))


def dicts(source: Path) -> None:
    edit(source, lambda e: e.update(objects=[{"name": name, "bbox": box} for name, box in e["objects"]], relations=[]))


def by_index(source: Path) -> None:
    edit(source, lambda e: e.update(relations=[[path, [0, "on", 1]] for path, _ in e["relations"]]))


def relation_dicts(source: Path) -> None:
    def change(entry: dict[str, Any]) -> None:
        entry["relations"] = [{"subject": s, "predicate": p, "object": o} for _, (s, p, o) in entry["relations"]]

    edit(source, change)


def bare_triples(source: Path) -> None:
    edit(source, lambda e: e.update(relations=[triple for _, triple in e["relations"]]))


def other_labels(source: Path) -> None:
    edit(source, lambda e: e.update(relations=[[path, [f"the {s}", p, o]] for path, (s, p, o) in e["relations"]]))


def fewer_classes(source: Path) -> None:
    (source / "classes.json").write_text(json.dumps({"actions": ["swimming"], "objects": [], "relations": []}))


# cause -> (the damage, reason, remedy, part of the scenes that is rejected as a whole)
CAUSES: dict[str, tuple[Callable[[Path], Any], str, str, bool]] = {
    "padded mask files": (pad_masks, "missing_masks", "differ in leading zeros", False),
    "integer ids": (integer_ids, "missing_masks", "differ in leading zeros", False),
    "no folder": (move_images, "missing_image", 'lacks the folder: write "images/0001.jpg"', True),
    "backslashes": (
        lambda s: edit(s, lambda e: e.update(image_path=e["image_path"].replace("/", "\\"))),
        "unsafe_path",
        "file names have backslashes",
        True,
    ),
    "absolute paths": (
        lambda s: edit(s, lambda e: e.update(image_path=f"/data/{e['image_path']}")),
        "unsafe_path",
        "file names are absolute",
        True,
    ),
    "objects as dicts": (dicts, "malformed_object", "objects are JSON objects: write [name,", False),
    "relations by index": (by_index, "malformed_relation", "relations refer to objects by position", False),
    "relations as dicts": (relation_dicts, "malformed_relation", "relations are JSON objects", False),
    "bare triples": (bare_triples, "malformed_relation", "relations lack the path of their PNG", False),
    "other labels": (other_labels, "relation_unknown_label", "by their names", False),
    "classes.json": (fewer_classes, "unknown_action", "add it, or remove classes.json", True),
}


@pytest.mark.parametrize("name", CAUSES)
def test_a_cause_is_named_once_with_its_remedy(name: str, source: Path) -> None:
    damage, reason, remedy, whole = CAUSES[name]
    damage(source)
    if whole:  # no scene is left
        with pytest.raises(UserError, match=rf"no valid scenes to pack: {N} {reason} \(.*{re.escape(remedy)}"):
            packed(source)
        return
    report = packed(source)
    first = report.causes[0]
    assert first.reason == reason and remedy in first.hint and first.count == report.rejected[reason]
    assert first.example.startswith("metadata.json: entry ")
    assert remedy in str(report) and f"{first.count}  {reason}: " in str(report)
    rows = [json.loads(line) for line in (source.parent / "out" / "rejected.jsonl").read_text().splitlines()]
    assert {row["hint"] for row in rows if row["reason"] == reason} == {first.hint}
    again = packed(source)
    assert again.up_to_date and (again.causes, again.warnings) == (report.causes, report.warnings)


def test_consequences_follow_their_causes(source: Path) -> None:
    pad_masks(source)
    causes = packed(source).causes
    assert [cause.reason for cause in causes] == ["missing_masks", "relation_without_mask"]
    assert causes[1].count > causes[0].count, "sorted by kind, not by number"
    assert causes[1].explanation == "follows from other rejections"
    assert {cause.reason for cause in causes} <= REASONS.keys()


def test_a_level_that_is_lost(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pad_masks(source)
    out = source.parent / "out"
    arguments = ["pack", str(source), "--out", str(out), "--val", "0", "--test", "0"]
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert re.search(
        r"all \d+ relations were rejected: 10 missing_masks \(the ids and the names of the mask files differ", line
    )
    assert "see " in line and "--allow-empty-level packs what is left" in line
    listing = source.parent / "out.rejected.jsonl"
    assert len(listing.read_text().splitlines()) > N and not out.exists()
    assert main([*arguments, "--allow-empty-level"]) == 0
    assert not listing.exists(), "rejected.jsonl in the pack replaces it"
    assert "warning: all" in capsys.readouterr().out


def test_a_lost_level_names_the_causes_of_its_own_entries(source: Path) -> None:
    """Not those of whole scenes, whose entries are not counted."""
    edit(source, lambda entry: entry.update(id="1"))
    (source / "sam_results" / "1_grounding_sam.npz").unlink()
    with pytest.raises(UserError, match=r"all \d+ relations were rejected: 1 missing_masks \([^;]*; see"):
        packed(source, allow_empty_level=False)


def test_a_level_that_loses_much(source: Path) -> None:
    masks = sorted((source / "sam_results").iterdir())
    for path in masks[: N // 2]:
        path.unlink()
    (warning,) = packed(source, allow_empty_level=False).warnings
    assert re.match(r"\d+ of \d+ relations \(\d+ %\) were rejected: 5 missing_masks \(", warning)
    for path in source.joinpath("images").iterdir():
        if path.stem in ("1", "2", "3"):
            path.write_bytes(b"")
    warnings = packed(source, allow_empty_level=False).warnings
    assert warnings[0].startswith("3 of 10 scenes (30 %) were rejected: 3 image_not_an_image (")


def test_a_level_without_entries_is_not_lost(source: Path) -> None:
    edit(source, lambda entry: entry.update(relations=[]))
    report = packed(source, allow_empty_level=False)
    assert report.warnings == [] and report.splits["train"]["relations"] == 0


def test_a_lost_level_ends_a_large_pack_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scenarioclip_fast.data.packing.review._EARLY", 40)
    monkeypatch.setattr("scenarioclip_fast.data.packing.review._EARLY_ENTRIES", 20)
    write_published_layout(list(generate_scenes(150, seed=1)), tmp_path / "set")
    for path in (tmp_path / "set" / "sam_results").iterdir():
        path.write_bytes(b"no npz")
    with pytest.raises(UserError, match=r"all \d\d relations were rejected: 40 bad_masks"):
        pack(tmp_path / "set", tmp_path / "out", progress=False)
