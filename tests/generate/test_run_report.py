"""The report of a generation run against counts of the records that were written."""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from generated_runs import Records, write_run

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.generate.config import GenerateConfig
from scenarioclip_fast.generate.run_directory import RunDirectory
from scenarioclip_fast.generate.run_report import _number, write_run_report
from scenarioclip_fast.generate.source import CuratedSource


def tables(page: str) -> dict[str, list[list[str]]]:
    """The rows of each section's table, without the headings."""
    found = {}
    for section in re.findall(r"<section>(.*?)</section>", page, re.DOTALL):
        title = html.unescape(re.search(r"<h2>(.*?)</h2>", section)[1])
        rows = re.findall(r"<tr>(.*?)</tr>", section)
        cells = [[html.unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)] for row in rows]
        found[title] = [row for row in cells if row]
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], str]:
    """The directory, the curated records and the page of a run of 12 images in three units."""
    directory = tmp_path_factory.mktemp("report") / "run"
    units = write_run(directory, 12, unit_size=5)
    scenes = [scene.read() for scene in CuratedSource(directory, units).scenes]
    page = write_run_report(directory, directory.parent / "deep" / "report.html").read_text("utf-8")
    return directory, scenes, page


def test_stages(run: tuple[Path, list[dict[str, Any]], str]) -> None:
    directory, scenes, page = run
    found = tables(page)
    records = {
        stage: [
            record["result"]
            for path in sorted((directory / stage).glob("*.jsonl"))
            for record in map(json.loads, path.read_text().splitlines()[1:])
            if "result" in record
        ]
        for stage in ("caption", "ground", "segment")
    }
    names = sum(len(record["objects"]) for record in records["caption"])
    boxes = sum(len(record["objects"]) for record in records["ground"])
    masks = sum(entry["mask"] is not None for record in records["segment"] for entry in record["objects"])
    kept = sum(len(scene["objects"]) for scene in scenes)
    relations = str(sum(len(scene["relations"]) for scene in scenes))
    assert boxes > masks == kept  # the helper drops objects
    assert found["Stages"] == [
        ["caption", "12", "11", "1", str(names), relations, "3", "4"],
        ["ground", "11", "11", "0", str(boxes), "", "4", "3"],
        ["segment", "11", "11", "0", str(masks), "", "1.5", "8"],
        ["curate", "11", "11", "0", str(kept), relations, "24", "0.5"],
    ]
    assert found["Counts"] == [
        ["caption", "requests", "14", "1.17"],
        ["caption", "retries", "2", "0.167"],
        ["caption", "cost", "0.0125", "0.00104"],
        ["ground", "boxes", "14", "1.17"],
    ]
    assert (
        page.count("<h1>Generation report: run</h1>") == 1 and '<th class="n">of the stage&#x27;s images</th>' in page
    )
    (row,) = found["Rejected images"]
    assert row == ["caption", "answer_not_json", "1", "8.3 %", "the answer contains no JSON object"]
    (row,) = found["Rejected objects and relations"]
    assert row[:5] == ["curate", "object", "no_mask", str(boxes - kept), "the object has no mask"]
    assert re.fullmatch(r"\d+, object \d \(.+\): the segmenter found none", row[5])


def test_counts_of_curate_are_those_of_its_records(tmp_path: Path) -> None:
    """Each run curates all units again: the sums over runs would be multiples."""

    def change(i: int, records: Records) -> None:
        records["curate"]["rejected"] = [{"part": "object 9 (cat)", "reason": "unused_object", "detail": ""}]

    write_run(tmp_path, 4, change=change)
    with open(tmp_path / "runs.jsonl", "a") as file:
        for _ in range(2):
            file.write('{"stage": "curate", "images": 3, "seconds": 1, "counts": {"objects": 9}}\n')
    found = tables(write_run_report(tmp_path, tmp_path / "report.html").read_text("utf-8"))
    assert {row[0] for row in found["Counts"]} == {"caption", "ground"}
    (row,) = found["Rejected objects and relations"]
    assert row[4] == "no relation uses the object" and re.fullmatch(r"\d+, object 9 \(cat\)", row[5])


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (0.0123456, "0.0123"),
        (3.14159, "3.14"),
        (60000.0, "60,000"),
        (1234567, "1,234,567"),
        (1307.69, "1,308"),
    ],
)
def test_numbers_have_few_digits(value: float, shown: str) -> None:
    assert _number(value) == shown


def test_a_link_in_place_of_the_page_is_replaced(tmp_path: Path) -> None:
    write_run(tmp_path, 2)
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "report.html").symlink_to(tmp_path / "victim")
    write_run_report(tmp_path, tmp_path / "report.html")
    assert (tmp_path / "victim").read_text() == "precious" and not (tmp_path / "report.html").is_symlink()


def test_vocabulary(run: tuple[Path, list[dict[str, Any]], str]) -> None:
    _, scenes, page = run
    texts: dict[str, Counter[str]] = {level: Counter() for level in ("actions", "objects", "predicates", "triplets")}
    for scene in scenes:
        names = [entry["name"] for entry in scene["objects"]]
        texts["actions"][scene["action"]] += 1
        texts["objects"].update(names)
        for r in scene["relations"]:
            texts["predicates"][r["predicate"]] += 1
            texts["triplets"][f"{names[r['subject']]} {r['predicate']} {names[r['object']]}"] += 1
    counts = ", ".join(f"{len(counter)} {level}" for level, counter in texts.items())
    assert f"12 images, 11 scenes; {counts}, counted as distinct texts." in page
    for level, counter in texts.items():
        once = 100 * sum(n == 1 for n in counter.values()) / len(counter)
        assert f"{once:.0f} % of the {level} occur once." in page
    assert page.count("data:image/png;base64,") == 4
    assert "6 scenes, chosen by a hash" in page and not re.search(r"https?://", page)


def test_hostile_texts_and_sparse_records(tmp_path: Path) -> None:
    """Mathtext, markup, long texts, no scores, no masks, no action, no caption, no relations."""
    evil = "$\\frac{1}</section><script>alert(1)</script>\x1b[2J\u202e" + "x" * 5000

    def change(i: int, records: Records) -> None:
        record = records["curate"]
        scene = record["scene"]
        scene["action"], scene["caption"] = [(evil, evil), (None, None), ("", "$")][i % 3]
        scene["objects"][0]["name"] = scene["relations"][0]["predicate"] = evil
        record["rejected"] = [{"part": f"object 9 ({evil})", "reason": evil, "detail": evil}]
        if i == 1:
            scene["relations"] = []
            del scene["scores"]
        if i == 2:
            scene["objects"][0]["mask"] = None
            scene["scores"] = {"boxes": [None, 2.0], "masks": None}

    write_run(tmp_path, 7, change=change)
    page = write_run_report(tmp_path, tmp_path / "report.html").read_text("utf-8")
    assert "<script" not in page and "\x1b" not in page and "\u202e" not in page
    assert "object 9" in page


def test_without_scenes(tmp_path: Path) -> None:
    """A run whose images were all rejected, or are still being captioned, has tables and no figures."""
    write_run(tmp_path, 5)
    for stage in ("ground", "segment", "curate"):
        for path in (tmp_path / stage).iterdir():
            path.unlink()
    page = write_run_report(tmp_path, tmp_path / "report.html").read_text("utf-8")
    assert "data:image" not in page and tables(page)["Stages"][3][:5] == ["curate", "0", "0", "0", "0"]


def test_damaged_files(tmp_path: Path) -> None:
    write_run(tmp_path, 3)
    with open(tmp_path / "runs.jsonl", "a") as file:
        file.write('{"stage": "curate", "ima')  # killed while writing
    write_run_report(tmp_path, tmp_path / "report.html")
    path = tmp_path / "curate" / "000000.jsonl"
    path.write_bytes(
        path.read_bytes().replace(b'"objects":[{"id"', b'"objects":[{"od"', 1).replace(b'"name"', b'"nome"', 1)
    )
    with pytest.raises(UserError, match=r"000000.jsonl: line 2 is damaged \(KeyError: 'name'\); remove the file"):
        write_run_report(tmp_path, tmp_path / "report.html")
    with pytest.raises(UserError, match="no records of finished units"):
        write_run_report(tmp_path / "photos", tmp_path / "report.html")


def test_counts_do_not_depend_on_units(tmp_path: Path) -> None:
    pages = []
    for size in (2, 8):
        write_run(tmp_path / str(size) / "run", 9, unit_size=size)
        pages.append(write_run_report(tmp_path / str(size) / "run", tmp_path / f"{size}.html").read_bytes())
    assert pages[0] == pages[1]


def test_settings(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 3)
    config = GenerateConfig.of({"caption": {"model": "qwen"}, "curate": {"min_relations": 2, "decisions": "d.json"}})
    RunDirectory(tmp_path / "run").save(config, [])
    page = write_run_report(tmp_path / "run", tmp_path / "report.html").read_text("utf-8")
    assert tables(page)["Settings of the last run"] == [
        ["caption.model", "qwen", '""'],
        ["ground.model", config.ground.model, config.ground.model],
        ["segment.model", config.segment.model, config.segment.model],
        ["curate.min_relations", "2", "1"],
        ["curate.decisions", "d.json", '""'],
    ]
