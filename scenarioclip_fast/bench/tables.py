"""Renders records as tables and rooflines, and formats their numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from scenarioclip_fast.bench.record import NOT_MEASURED, Part, Record, Result, unit_of

# Fields of `extra` that have their own column or are part of the group name.
_OWN_COLUMN = {"scenes", "views", "bytes", "operations", "precision", "threads", "device", "ceiling"}
_OWN_COLUMN |= {"phase", "rows", "width"}


@dataclass(frozen=True)
class Table:
    """A title, a header, rows of cells, and a note below them."""

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""

    def markdown(self) -> str:
        lines = [f"### {self.title}", ""]
        if self.rows:
            lines += [*markdown_table(self.head, self.rows), ""]
        if self.note:
            lines += [self.note, ""]
        return "\n".join(lines)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table; "|" in cells is escaped."""
    cells = [
        [cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, ["---"] * len(head), *rows)
    ]
    return ["| " + " | ".join(row) + " |" for row in cells]


def seconds(value: float) -> str:
    """Format a duration with three digits and a unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if value * factor >= 1:
            return f"{digits(value * factor)} {unit}"
    return f"{digits(value * 1e6)} µs"


def digits(value: float) -> str:
    """Format with three significant digits, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def si(value: float) -> str:
    """Format with three digits and an SI prefix: 4.4 M."""
    for letter, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{digits(value / size)} {letter}"
    return f"{digits(value)} "


def times(value: float) -> str:
    """Format a ratio: two decimals below 10, none from 10 on."""
    return f"{value:.0f} x" if value >= 10 else f"{value:.2f} x"


def fastest_of_ours(results: Sequence[Result]) -> Result | None:
    """This package's fastest form, to which the others are compared; None if none was measured."""
    unit = unit_of(results)
    return min((r for r in results if r.ours), key=lambda r: r.per(unit), default=None)


def part_table(part: Part) -> Table:
    """All forms of all groups, compared with this package's fastest form."""
    rows = []
    for group, results in part.groups().items():
        ours, unit = fastest_of_ours(results), unit_of(results)
        for i, r in enumerate(sorted(results, key=lambda r: r.per(unit))):
            ratio = "" if ours is None or r is ours else times(r.per(unit) / ours.per(unit))
            low, high = (seconds(r.per(unit) * end / r.median) for end in (min(r.samples), max(r.samples)))
            rates = [f"{digits(r.extra[n] / r.median)} {n}/s" for n in ("scenes", "views") if n in r.extra]
            if kind := r.extra.get("ceiling"):
                rates.append(_rate(kind, r.extra["bytes" if kind == "copy" else "operations"] / r.median))
            # Third-party losses report "not computed" for gradients they lack.
            errors = {k: v for k, v in r.extra.items() if k.startswith("error of ") and isinstance(v, float)}
            details = [f"largest error {_value(max(errors.values()))}"] if errors else []
            details += [
                f"{k.replace('_', ' ')} {_value(v)}" for k, v in r.extra.items() if k not in _OWN_COLUMN | errors.keys()
            ]
            inputs = f"{group} (per {unit})" if i == 0 else ""
            row = [inputs, r.form, seconds(r.per(unit)), f"{low} to {high}", str(len(r.samples)), ratio]
            rows.append([*row, "; ".join(rates + details)])
    head = ["inputs", "form", "median", "range", "samples", "relative to ours", "details"]
    return Table(part.name, head, rows, _caption(part))


def _value(value: Any) -> str:
    return (
        (digits(value) if value == 0 or 1e-3 <= abs(value) < 1e9 else f"{value:.1e}")
        if isinstance(value, float)
        else str(value)
    )


def _caption(part: Part) -> str:
    load = f"load {part.before.get('load', '?')} before, {part.after.get('load', '?')} after"
    lines = [
        f"`{part.command}`, commit {part.commit[:12]}{part.commit[40:]}, {part.started}, {part.seconds:.0f} s, {load}."
    ]
    if any(result.clock == "device" for result in part.results):
        lines.append("Timed by device events, with a cold L2 cache.")
    lines += [f"Failed: {a.name}: {a.reason.splitlines()[0] if a.reason else ''}" for a in part.failed]
    reasons: dict[str, list[str]] = {}
    for skipped in part.left_out:
        reasons.setdefault(skipped.reason, []).append(skipped.name)
    lines += [f"Skipped: {', '.join(names)}: {reason}." for reason, names in reasons.items()]
    return " ".join([*lines, part.note]).strip()


@dataclass(frozen=True)
class Roof:
    """A kernel and the ceilings that apply to it."""

    result: Result
    copy: float | None  # bytes per second; None if not measured
    product: float | None  # operations per second

    @property
    def floor(self) -> float | None:
        """Lower bound of the time in seconds, by the roofline model."""
        if self.copy is None or self.product is None:
            return None
        return max(self.result.extra["bytes"] / self.copy, self.result.extra["operations"] / self.product)


def ceilings(record: Record) -> dict[tuple[str, str, str, int], float]:
    """Map (copy or product, precision or "", device, threads) to the best bytes or operations per second."""
    out = {}
    for r in record.results():
        if kind := r.extra.get("ceiling"):
            amount = r.extra["bytes" if kind == "copy" else "operations"]
            out[_key(record, r, kind)] = amount / min(r.samples)
    return out


def _key(record: Record, r: Result, kind: str) -> tuple[str, str, str, int]:
    precision = "" if kind == "copy" else str(r.extra.get("precision", "float32"))
    return kind, precision, str(r.extra.get("device", record.kind)), int(r.extra.get("threads", 0))


def roofs(record: Record) -> list[Roof]:
    """This package's forms that report bytes and operations."""
    found = ceilings(record)
    return [
        Roof(r, found.get(_key(record, r, "copy")), found.get(_key(record, r, "product")))
        for r in record.results()
        if r.ours and "bytes" in r.extra and "operations" in r.extra
    ]


def roofline_table(record: Record) -> Table:
    """The lower bound from the measured ceilings, and the share achieved, per kernel."""
    rows = []
    for roof in roofs(record):
        r, floor = roof.result, roof.floor
        moved, computed = r.extra["bytes"], r.extra["operations"]
        bound = ""
        if floor is not None and roof.copy is not None:
            bound = "copy" if moved / roof.copy >= floor else "product"
        rows.append(
            [
                r.group,
                r.form,
                f"{si(moved)}B",
                si(computed),
                NOT_MEASURED if floor is None else f"{seconds(floor)} ({bound})",
                seconds(r.median),
                NOT_MEASURED if floor is None else f"{100 * floor / r.median:.0f} %",
            ]
        )
    parts = [
        f"{kind}{' ' * bool(precision)}{precision} on {_place(device, threads)} " + _rate(kind, value)
        for (kind, precision, device, threads), value in ceilings(record).items()
    ]
    note = f"Ceilings (best samples of the same record): {'; '.join(parts) or NOT_MEASURED}. " + (
        "Bytes: each tensor read or written once; operations: additions and multiplications. Lower bound: the larger "
        "of bytes / copy rate and operations / product rate. On a CPU, part of the data may come from caches."
    )
    head = ["inputs", "form", "bytes", "operations", "lower bound", "median", "share of roofline"]
    return Table("Roofline", head, rows, note)


def _rate(ceiling: str, value: float) -> str:
    return f"{value / 1e9:,.1f} GB/s" if ceiling == "copy" else f"{value / 1e12:.3g} TFLOP/s"


def _place(device: str, threads: int) -> str:
    return f"{threads} thread{'s' * (threads != 1)}" if device == "cpu" else "the GPU"


def facts(record: Record) -> dict[str, str]:
    """The environment of a record as label -> value."""
    machine = record.machine
    out = {
        key.replace("_gib", ", GiB").replace("_", " "): str(value)
        for key, value in machine.items()
        if key not in ("versions", "kind")
    }
    out["versions"] = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    out["commits"] = ", ".join(dict.fromkeys(part.commit for part in record.parts))
    out["measured"] = ", ".join(dict.fromkeys(part.started[:10] for part in record.parts))
    if gpu := next((part.after["gpu"] for part in record.parts if "gpu" in part.after), None):
        out["clocks"] = ", ".join(f"{name} {value}" for name, value in gpu.items())
    return out


def across(records: Sequence[Record]) -> Table | None:
    """The medians of forms that occur in more than one record; None if there are none."""
    by_key: dict[tuple[str, str], dict[int, float]] = {}
    for i, record in enumerate(records):
        for r in record.results():
            by_key.setdefault((r.group, r.form), {})[i] = r.median
    rows = [
        [group, form, *(seconds(found[i]) if i in found else NOT_MEASURED for i in range(len(records)))]
        for (group, form), found in by_key.items()
        if len(found) > 1
    ]
    return Table("Across records", ["inputs", "form", *(r.name for r in records)], rows) if rows else None


def tables(record: Record) -> Iterator[Table]:
    """One table per part, then the roofline."""
    yield from map(part_table, record.parts)
    roof = roofline_table(record)
    if roof.rows:
        yield roof
