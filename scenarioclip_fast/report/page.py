"""report.html of a run: one file with its pictures inside, so that it can be mailed and opened anywhere."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from scenarioclip_fast.eval.samples import SampleScene
from scenarioclip_fast.eval.zeroshot import TASKS, ZeroShotResult
from scenarioclip_fast.report.curves import accuracy_bars, loss_curves, sample_sheet

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #22272e;
       background: #f5f6f8; margin: 0; padding: 2rem 1rem; }
main { max-width: 1120px; margin: auto; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 0 0 .6rem; }
p.lead { color: #55606c; margin: 0 0 1.4rem; }
section { background: #fff; border: 1px solid #e3e7ec; border-radius: 10px; padding: 1.2rem 1.4rem;
          margin: 0 0 1.2rem; }
img { max-width: 100%; height: auto; display: block; }
.scroll + img { margin-top: 1rem; }
table { border-collapse: collapse; min-width: 55%; font-variant-numeric: tabular-nums; }
th { text-align: left; color: #6b7480; font-weight: 600; font-size: .85rem; }
th, td { padding: .32rem 1.1rem .32rem 0; border-bottom: 1px solid #edf0f3; vertical-align: top; }
td.n, th.n { text-align: right; white-space: nowrap; }
p.note { color: #55606c; font-size: .9rem; margin: .6rem 0 0; }
.scroll { overflow-x: auto; }
summary { cursor: pointer; } summary h2 { display: inline; }
details[open] summary { margin-bottom: .6rem; }
"""


@dataclass(frozen=True)
class Section:
    """One card of the report: a heading, then any of a table (head and rows), a picture and a note.

    strong: the cells (row, column) of the table that stand out. folded: shown when its heading is clicked.
    """

    title: str
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    picture: Path | None = None
    note: str = ""
    strong: Set[tuple[int, int]] = frozenset()
    folded: bool = False


@dataclass
class Report:
    """Sections in the order they are added; `write` puts them in one HTML file, pictures inlined."""

    title: str
    lead: str = ""
    sections: list[Section] = field(default_factory=list)

    def add_zeroshot(self, result: ZeroShotResult) -> None:
        """A table per matching rule: each accuracy with its chance level beside it."""
        subsets = {"all": "all", "seen": "seen in training", "held_out": "held out of training"}
        titles = {
            "own": "Zero-shot accuracy, strict: right is the view's own text",
            "any_in_image": "Zero-shot accuracy, published rule: right is any text of the image",
        }
        head = ["task", "texts", "views", "classes", *(f"top-{k} (chance)" for k in result.topk)]
        note = (
            f"{result.scenes:,} scenes of the {result.split} split, every view compared with all class texts of its "
            "level. In brackets: what a random ranking scores on the same views."
        )
        for match, title in titles.items():
            rows = [
                [TASKS[row.level], subsets[row.subset], f"{row.views:,}", f"{row.classes:,}"]
                + [f"{100 * row.top[k]:.1f} % ({100 * row.chance[k]:.1f} %)" for k in result.topk]
                for row in result.only(match).rows
            ]
            if rows:
                self.sections.append(Section(title, head, rows, note=note))

    def add_facts(self, title: str, facts: Mapping[str, object]) -> None:
        """A two-column table of names and values."""
        self.sections.append(Section(title, rows=[[name, str(value)] for name, value in facts.items()]))

    def add_pictures(
        self,
        directory: Path,
        result: ZeroShotResult,
        samples: Sequence[SampleScene],
        runs: Mapping[str, Sequence[Mapping[str, Any]]],
        about_runs: str = "",
    ) -> None:
        """Draws accuracies, sample scenes and the curves of `runs` (name -> rows of metrics.jsonl) into `directory`
        and shows them."""
        self.sections.append(
            Section(
                "Accuracies against chance",
                picture=accuracy_bars(result, directory / "accuracy.png"),
                note="Dark marks: chance. Held out: texts that never occur in training.",
            )
        )
        if samples:
            self.sections.append(
                Section(
                    "What the model saw and what it answered",
                    picture=sample_sheet(samples, directory / "scenes.png"),
                    note="Views as the model gets them. Bold: the truth; below it the best guesses with their cosine. "
                    "Green frame: the best guess is right; amber: a later one is.",
                )
            )
        if runs:
            note = f"Pale: every step. Strong: the mean around it, over a twentieth of the run. {about_runs}"
            picture = loss_curves(runs, directory / "losses.png")
            self.sections.append(Section("Training", picture=picture, note=note.strip()))

    def write(self, path: Path) -> Path:
        cards = "\n".join(map(_card, self.sections))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f"<title>{escape(self.title)}</title>"
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<style>{_STYLE}</style></head>\n<body><main>\n<h1>{escape(self.title)}</h1>"
            f'<p class="lead">{escape(self.lead)}</p>\n{cards}\n</main></body></html>\n',
            encoding="utf-8",
        )
        return path


def _card(section: Section) -> str:
    heading = f"<h2>{escape(section.title)}</h2>"
    parts = [f"<details><summary>{heading}</summary>" if section.folded else heading]
    if section.rows:
        columns = len(section.rows[0])
        # names are read from the left, numbers compared at the right edge
        filled = [[row[i] for row in section.rows if row[i]] for i in range(columns)]
        numeric = [2 * sum(map(_is_number, cells)) > len(cells) for cells in filled]
        parts.append('<div class="scroll"><table>')
        if section.head:
            parts.append(_row("th", section.head, numeric))
        for i, row in enumerate(section.rows):
            parts.append(_row("td", row, numeric, {column for line, column in section.strong if line == i}))
        parts.append("</table></div>")
    if section.picture is not None:
        data = base64.b64encode(section.picture.read_bytes()).decode("ascii")
        parts.append(f'<img alt="{escape(section.title)}" src="data:image/png;base64,{data}">')
    if section.note:
        note = re.sub("`([^`]+)`", r"<code>\1</code>", escape(section.note))
        parts.append(f'<p class="note">{note}</p>')
    if section.folded:
        parts.append("</details>")
    return "<section>" + "\n".join(parts) + "</section>"


def _is_number(cell: str) -> bool:
    several = re.search("[;,] ", cell)  # values, which are read like a text
    return cell.removeprefix("-")[:1].isdigit() and not several


def _row(tag: str, cells: Sequence[str], numeric: Sequence[bool], strong: Set[int] = frozenset()) -> str:
    marked = []
    for column, (cell, right) in enumerate(zip(cells, numeric, strict=True)):
        text = f"<b>{escape(cell)}</b>" if column in strong else escape(cell)
        edge = ' class="n"' if right else ""
        marked.append(f"<{tag}{edge}>{text}</{tag}>")
    return f"<tr>{''.join(marked)}</tr>"
