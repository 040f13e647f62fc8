"""Figures and the HTML page: complete, and self-contained."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from scenarioclip_fast.eval.samples import Prediction, SampleScene
from scenarioclip_fast.eval.zeroshot import Accuracy, ZeroShotResult
from scenarioclip_fast.report.accuracy import accuracy_bars
from scenarioclip_fast.report.curves import loss_curves
from scenarioclip_fast.report.evaluation import zeroshot_tables
from scenarioclip_fast.report.page import Report, Section
from scenarioclip_fast.report.sheets import sample_sheet


def result() -> ZeroShotResult:
    rows = [
        Accuracy(level, match, subset, 40, classes, {1: 0.5, 5: 0.75}, {1: 1 / classes, 5: 5 / classes})
        for match in ("own", "any_in_image")
        for level, classes, subset in (("global", 9, "all"), ("relation", 50, "all"), ("relation", 50, "held_out"))
    ]
    return ZeroShotResult("test", 40, (1, 5), rows)


def samples(count: int, relations: int) -> list[SampleScene]:
    def prediction(truth: str, best: str) -> Prediction:
        return Prediction(torch.full((8, 8, 3), 90, dtype=torch.uint8), truth, [(best, 0.5), ("x", 0.1)], truth == "z")

    return [
        SampleScene(str(i), prediction("a", "a"), [prediction("b", "c")] * (i % 3), [prediction("z", "z")] * relations)
        for i in range(count)
    ]


def size(picture: Path) -> tuple[int, int]:
    data = picture.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_loss_curves(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"step": i, "contrastive/global": 4 / (i + 1)} for i in range(30)]
    narrow = size(loss_curves({"run": rows}, tmp_path / "a" / "narrow.png"))
    second = [{**row, "distillation": 0.1, "contrastive/object": None, "temperature/object": 0.07} for row in rows]
    wide = size(loss_curves({"first": rows, "second": second}, tmp_path / "wide.png"))
    assert wide[0] > narrow[0]
    assert wide[1] > narrow[1]


def test_bars_and_sheet(tmp_path: Path) -> None:
    assert min(size(accuracy_bars(result(), tmp_path / "bars.png"))) > 200
    few, many = (size(sample_sheet(samples(n, 2), tmp_path / f"{n}.png")) for n in (1, 3))
    assert many[1] > 2 * few[1]
    without = size(sample_sheet(samples(3, 0), tmp_path / "none.png"))
    assert without[0] < many[0]
    with pytest.raises(ValueError, match="at least one"):
        sample_sheet([], tmp_path / "empty.png")


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.text, self.sources, self.open = "", [], []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_report_is_self_contained(tmp_path: Path) -> None:
    picture = accuracy_bars(result(), tmp_path / "bars.png")
    report = Report("A run", lead="some <scenes> & more")
    report.sections += zeroshot_tables(result())
    report.add_facts("How", {"views": 12_000, "lr": 1e-3})
    report.sections.append(Section("Bars", picture=picture, note="a note"))
    page = report.write(tmp_path / "deep" / "report.html").read_text("utf-8")
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert all(part in reader.text for part in ("A run", "some <scenes> & more", "50.0 % (11.1 %)", "12000", "a note"))
    assert len(reader.sources) == 1
    kind, data = reader.sources[0].split(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == picture.read_bytes()
    assert not re.search(r"https?://", page)


@pytest.mark.parametrize(
    ("package", "absent"),
    [("report", "matplotlib"), ("eval", "matplotlib"), ("eval", "scenarioclip_fast.report")],
)
def test_imports_are_lazy(package: str, absent: str) -> None:
    """Matplotlib is imported only for figures, and evaluations never import reports."""
    code = (
        f"import sys, pkgutil, scenarioclip_fast.{package} as package\n"
        "for module in pkgutil.iter_modules(package.__path__, package.__name__ + '.'): __import__(module.name)\n"
        f"sys.exit({absent!r} in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_tables_fit_the_page(tmp_path: Path) -> None:
    """Numbers are right-aligned and do not wrap, even in columns with blanks; text and lists may wrap."""
    rows = [["a", "", "1.0 ms; 2 %"], ["b", "", "3.0 ms; 4 %"], ["c", "1.5 x", "5 ms"]]
    section = Section("S", ["form", "against", "also"], rows, note="run `pytest -m x` & wait")
    page = Report("R", sections=[section]).write(tmp_path / "report.html").read_text("utf-8")
    assert '<th>form</th><th class="n">against</th><th>also</th>' in page
    assert '<td class="n">1.5 x</td><td>5 ms</td>' in page
    assert "run <code>pytest -m x</code> &amp; wait" in page


def test_links_in_notes_are_relative(tmp_path: Path) -> None:
    note = "[one](data/a-b.html) [two](https://x.y) [three](//x.y) [four](javascript:f) [five](a.html'x)"
    page = Report("R", sections=[Section("S", note=note)]).write(tmp_path / "report.html").read_text("utf-8")
    assert re.findall("<a .*?</a>", page) == ['<a href="data/a-b.html">one</a>']


def test_columns_of_long_texts_are_marked(tmp_path: Path) -> None:
    """They alone get a width on narrow screens."""
    section = Section("S", ["key", "meaning"], [["a", "m" * 33], ["b", "short"]])
    page = Report("R", sections=[section]).write(tmp_path / "report.html").read_text("utf-8")
    assert '<tr><td>b</td><td class="t">short</td></tr>' in page and '<th class="t">meaning</th>' in page


def test_lists_of_facts_are_left_aligned(tmp_path: Path) -> None:
    report = Report("R")
    report.add_facts("How", {"train": "2,799 scenes, 7,930 objects", "val": "176 scenes, 513 objects"})
    assert "<td>2,799 scenes, 7,930 objects</td>" in report.write(tmp_path / "report.html").read_text("utf-8")
