"""The output of `make gpu`: a short table per part, and the headline figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu.jobs import PASSED, Row
from scenarioclip_fast.benchmarks import readme

from scenarioclip_fast.bench.record import FILE, Part, Record, Result, read_record, unit_of
from scenarioclip_fast.bench.tables import digits, fastest_of_ours, seconds, times

# Fields of a result that are printed beside its time.
_PRINTED_FIELDS = {
    "mfu": lambda v: f"MFU {100 * v:.1f} %",
    "host, ms": lambda v: f"host {digits(v)} ms per step",
    "as launched, ms": lambda v: f"as launched {digits(v)} ms",
    "GPU microseconds": lambda v: f"kernels {digits(v)} µs",
    "peak_memory_gib": lambda v: f"peak {digits(v)} GiB",
    "MiB above inputs and gradients": lambda v: f"extra memory {digits(v)} MiB",
    "data_wait": lambda v: f"data wait {100 * v:.0f} %",
    "overhead": lambda v: f"overhead {100 * v:.1f} %",
}


def short_table(part: Part) -> list[str]:
    """One row per form, fastest first: time, rate, and time relative to this package's fastest form."""
    lines = []
    for group, results in part.groups().items():
        unit, ours = unit_of(results), fastest_of_ours(results)
        lines += [group, f"  {'':52} {f'per {unit}':>9}  {'rate':>16}  {'time / ours':>11}"]
        for result in sorted(results, key=lambda r: r.per(unit)):
            ratio = "" if ours is None else f"{result.per(unit) / ours.per(unit):.2f}"
            figures = f"{seconds(result.per(unit)):>9}  {_rate(result):>16}  {ratio:>11}  {', '.join(_details(result))}"
            lines.append(f"  {result.form:52} {figures}".rstrip())
    lines += [f"failed: {failure.name}: {failure.reason.partition(chr(10))[0][:150]}" for failure in part.failed]
    reasons = Counter(skipped.reason for skipped in part.left_out)
    lines += [f"skipped, {count}: {reason[:150]}" for reason, count in reasons.items()]
    return [*lines, *([part.note] if part.note else [])]


def _details(result: Result) -> list[str]:
    return [show(result.extra[key]) for key, show in _PRINTED_FIELDS.items() if _is_number(result.extra.get(key))]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _rate(result: Result) -> str:
    if kind := result.extra.get("ceiling"):
        amount = result.extra["bytes" if kind == "copy" else "operations"] / result.median
        return f"{amount / 1e12:.3g} {'TB/s' if kind == 'copy' else 'TFLOP/s'}"
    for unit in ("scenes", "views"):
        if unit in result.extra:
            return f"{digits(result.extra[unit] / result.median)} {unit}/s"
    if "operations" in result.extra and result.extra["operations"] > 1e12:
        return f"{result.extra['operations'] / result.median / 1e12:.3g} TFLOP/s"
    return ""


def lines(out: Path, machine: Mapping[str, Any], rows: Sequence[Row], commit: str) -> list[str]:
    """The last lines of the output: device, each claim with its target, this package's rates, and failures."""
    record = read_record(out) if (out / FILE).exists() else Record(dict(machine))
    header = [f"{machine.get('device', 'unknown device')}, commit {commit[:12]}{commit[40:]}"]
    claims = list(_claims(record))
    if record.kind == "rehearsal":
        claims = [f"a rehearsal, times are meaningless; {len(claims)} claims of benchmarks/readme.py have both results"]
    bad = [f"{row.section} ({row.result})" for row in rows if row.result != PASSED]
    return [*header, *claims, *_ours(record), f"failed or skipped: {', '.join(bad)}" if bad else "all sections passed"]


def _claims(record: Record) -> Iterator[str]:
    for claim in [*readme.GPU, *readme.GPU_TARGETS]:
        if (found := readme.find(claim, [record])) is None:
            continue
        met = claim.target is not None and found.ratio >= claim.target
        target = "" if claim.target is None else f", target {claim.target:g} x: {'met' if met else 'missed'}"
        speeds = f"{found.speed(found.ours)} vs. {found.speed(found.baseline)}"
        yield f"{claim.what}, ours vs. {claim.baseline}: {times(found.ratio)} ({speeds}){target}"


def _ours(record: Record) -> Iterator[str]:
    """This package's fastest form in each group of the headline parts."""
    for part in record.parts:
        if part.name not in ("step", "contrastive", "views", "end_to_end", "data"):
            continue
        for group, results in part.groups().items():
            if (best := fastest_of_ours(results)) is not None:
                figures = [seconds(best.per(unit_of(results))), _rate(best), *_details(best)]
                yield f"{group}: {best.form}: {', '.join(filter(None, figures))}"


def write_readme(out: Path) -> None:
    """Write the README.md of the record in `out`, if there is a record."""
    if (out / FILE).exists():
        (out / "README.md").write_text(readme.record_readme(out), encoding="utf-8")
