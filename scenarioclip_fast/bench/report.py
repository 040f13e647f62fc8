"""Renders any set of records as Markdown, and as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scenarioclip_fast.bench.plots import plot_record
from scenarioclip_fast.bench.record import Record
from scenarioclip_fast.bench.tables import across, facts, tables


def markdown(records: Sequence[Record]) -> str:
    """All tables of all records, as Markdown."""
    lines = []
    if (table := across(records)) is not None:
        lines.append(table.markdown())
    for record in records:
        lines += [f"## {record.name}", "", *(f"- {name}: {value}" for name, value in facts(record).items()), ""]
        lines += [table.markdown() for table in tables(record)]
    return "\n".join(lines).rstrip() + "\n"


def write_report(records: Sequence[Record], out: Path) -> Path:
    """Write OUT/report.md, then the plots and OUT/report.html, which need matplotlib; return the page's path."""
    from scenarioclip_fast.report.page import Report, Section

    out.mkdir(parents=True, exist_ok=True)
    (out / "report.md").write_text(markdown(records), encoding="utf-8")
    names = ", ".join(record.name for record in records)
    page = Report(f"Benchmarks: {names}", lead="Within a group, all forms ran on the same inputs in the same run.")
    if (table := across(records)) is not None:
        page.sections.append(Section(table.title, table.head, table.rows, note=table.note))
    for i, record in enumerate(records):
        prefix = f"{record.name}: " if len(records) > 1 else ""
        page.add_facts(f"{prefix}environment", facts(record))
        # Records of the same name must not overwrite each other's plots.
        again = sum(r.name == record.name for r in records[:i])
        folder = out / (f"{record.name}-{again + 1}" if again else record.name)
        plots = plot_record(record, folder if len(records) > 1 else out)
        for table in tables(record):
            title = prefix + table.title
            page.sections.append(Section(title, table.head, table.rows, plots.get(table.title), table.note))
    return page.write(out / "report.html")
