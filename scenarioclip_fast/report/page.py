"""Reports as single self-contained HTML files with embedded images."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

from scenarioclip_fast.files import write_text
from scenarioclip_fast.terminal import printable

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
.scroll + .scroll { margin-top: 1rem; }
table { border-collapse: collapse; min-width: 55%; font-variant-numeric: tabular-nums; }
th { text-align: left; color: #6b7480; font-weight: 600; font-size: .85rem; }
th, td { padding: .32rem 1.1rem .32rem 0; border-bottom: 1px solid #edf0f3; vertical-align: top; }
td.n, th.n { text-align: right; white-space: nowrap; }
p.note { color: #55606c; font-size: .9rem; margin: .6rem 0 0; } a { color: #2a62a3; }
/* Shadows at the edges beyond which a table goes on. */
.scroll { overflow-x: auto; background:
          linear-gradient(90deg, #fff 50%, transparent) 0 0 / 2rem 100% no-repeat local,
          linear-gradient(270deg, #fff 50%, transparent) 100% 0 / 2rem 100% no-repeat local,
          linear-gradient(90deg, #d5dbe2, transparent) 0 0 / .7rem 100% no-repeat,
          linear-gradient(270deg, #d5dbe2, transparent) 100% 0 / .7rem 100% no-repeat; }
summary { cursor: pointer; } summary h2 { display: inline; }
details[open] summary { margin-bottom: .6rem; }
@media (max-width: 640px) {
  body { padding: 1rem .5rem; } section { padding: .9rem; }
  /* Multiplied, the shadows are visible through the white of pictures. */
  .scroll img { max-width: none; width: 760px; mix-blend-mode: multiply; }
  table { min-width: 100%; } th.n { white-space: normal; }
  th, td { padding-right: .7rem; } th:last-child, td:last-child { padding-right: 0; }
  /* Long texts wrap, but not into tall rows of narrow cells; first columns leave room for numbers. */
  td.t { min-width: 18rem; overflow-wrap: anywhere; } td.t:first-child { min-width: 8rem; }
}
"""

_LONG = 32  # characters of a cell, beyond which its column may wrap on a narrow screen


@dataclass(frozen=True)
class Section:
    """One card of a report: a heading, and optionally a table, a picture and a note.

    Attributes:
        title: heading.
        head: column headings of the table.
        rows: cells of the table.
        picture: a PNG file, embedded when the report is written.
        note: caption; text in backquotes is formatted as code, and `[text](path)` as a link to a relative path.
        strong: (row, column) of bold cells.
        folded: collapsed until the heading is clicked.
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
    """A title, a lead paragraph and sections, in order."""

    title: str
    lead: str = ""
    sections: list[Section] = field(default_factory=list)

    def add_facts(self, title: str, facts: Mapping[str, object]) -> None:
        """Append a two-column table of names and values."""
        self.sections.append(Section(title, rows=[[name, str(value)] for name, value in facts.items()]))

    def write(self, path: Path) -> Path:
        """Write the page to `path`, with the pictures embedded; see `files.replacing` for what is there."""
        cards = "\n".join(map(_card, self.sections))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(
            path,
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f"<title>{_escape(self.title)}</title>"
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<style>{_STYLE}</style></head>\n<body><main>\n<h1>{_escape(self.title)}</h1>"
            f'<p class="lead">{_escape(self.lead)}</p>\n{cards}\n</main></body></html>\n',
        )
        return path


def _card(section: Section) -> str:
    heading = f"<h2>{_escape(section.title)}</h2>"
    parts = [f"<details><summary>{heading}</summary>" if section.folded else heading]
    if section.rows:
        parts.append(_table(section))
    if section.picture is not None:
        data = base64.b64encode(section.picture.read_bytes()).decode("ascii")
        image = f'<img alt="{_escape(section.title)}" src="data:image/png;base64,{data}">'
        parts.append(f'<div class="scroll">{image}</div>')
    if section.note:
        note = re.sub("`([^`]+)`", r"<code>\1</code>", _escape(section.note))
        note = re.sub(r"\[([^\]]+)\]\((\w[\w./-]*)\)", r'<a href="\2">\1</a>', note)  # no scheme, no host
        parts.append(f'<p class="note">{note}</p>')
    if section.folded:
        parts.append("</details>")
    return "<section>" + "\n".join(parts) + "</section>"


def _table(section: Section) -> str:
    kinds = [_kind([row[i] for row in section.rows if row[i]]) for i in range(len(section.rows[0]))]
    lines = [_row("th", section.head, kinds)] if section.head else []
    for i, row in enumerate(section.rows):
        lines.append(_row("td", row, kinds, {column for line, column in section.strong if line == i}))
    # With a tab index, keys scroll it in every browser.
    label = f'role="region" aria-label="{_escape(section.title)}" tabindex="0"'
    return "\n".join([f'<div class="scroll" {label}><table>', *lines, "</table></div>"])


def _kind(cells: Sequence[str]) -> str:
    """The class of a column: n of numbers, right-aligned; t of long texts, which wrap; or none."""
    if 2 * sum(map(_is_number, cells)) > len(cells):
        return "n"
    return "t" if max(map(len, cells), default=0) > _LONG else ""


def _is_number(cell: str) -> bool:
    is_list = re.search("[;,] ", cell)
    return cell.removeprefix("-")[:1].isdigit() and not is_list


def _row(tag: str, cells: Sequence[str], kinds: Sequence[str], strong: Set[int] = frozenset()) -> str:
    marked = []
    for column, (cell, kind) in enumerate(zip(cells, kinds, strict=True)):
        text = f"<b>{_escape(cell)}</b>" if column in strong else _escape(cell)
        attribute = f' class="{kind}"' if kind else ""
        marked.append(f"<{tag}{attribute}>{text}</{tag}>")
    return f"<tr>{''.join(marked)}</tr>"


def _escape(text: str) -> str:
    return html.escape(printable(text, lines=True))  # browsers obey overrides of the text direction too
