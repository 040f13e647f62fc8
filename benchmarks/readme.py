"""Write the measured tables and the chart of README.md, docs/benchmarks.md and each record's README from the records.

Run: python benchmarks/readme.py             README.md, docs/ and all committed records (`make record` does this, too)
     python benchmarks/readme.py RECORD...   only the README.md of these records

A row is a claim: two forms of one group in one record, the newest that has both. README.md and docs/benchmarks.md show
measured claims only; a record's own README also names the targets that it does not cover. Generated text stands between
markers, and everything around them is left alone.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from xml.sax.saxutils import escape

from scenarioclip_fast.bench.record import FILE, NOT_MEASURED, Record, Result, read_record, unit_of
from scenarioclip_fast.bench.tables import digits, markdown_table, seconds, times

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks" / "records"
CHART_FILE = "docs/pictures/speedups.svg"


@dataclass(frozen=True)
class Claim:
    """The speed-up of the form `ours` over the form `baseline`, in the group that matches the pattern `group`.

    `as_launched`: compare times with the host's, for a baseline that is bound by its host.
    """

    what: str
    group: str
    baseline: str
    baseline_label: str
    ours: str
    target: float | None = None  # ratio
    as_launched: bool = False


_AS_LAUNCHED = "as launched, ms"  # a field of results on a GPU
_ENCODERS = "six separate encoders and teacher, as published"
_LOADER = "Pillow, precomputed region PNGs, worker processes, as published"
_REGIONS_RENDERED = "Pillow, regions rendered with SciPy, worker processes"
_LOOP = "end to end, whole loop, {preset}, *, {device}"
_STEP = "training step, {preset}, *, {device}"
_VIEWS = "{kind} views, 640 x 480 to 224, one core"
_SCIPY, _PILLOW = "NumPy + SciPy + Pillow", "Pillow"
_ROWS = "contrastive, forward + backward, {n} x {n} x 512, {device}"
_LEVELS = "contrastive, forward + backward, levels of (128, 700, 350) {of}, width 512, {device}"
LARGE = "ours: cuda"  # what "auto" takes for large levels on a Hopper GPU (BACKENDS in dispatch.py)
_KL = "one KLDivLoss call per pair, as published"


def _contrastive(device: str, n: int, ours: str, dtype: str) -> list[Claim]:
    group = _ROWS.format(n=n, device=device)
    what = f"contrastive loss, N = U = {n:,}, D = 512, {dtype}"
    baselines = {"logits.T": "eager logits / logits.T (keeps N x N)", "open_clip": "eager open_clip (keeps N x N)"}
    baselines |= {f"{name} compiled": f"compiled {label.removeprefix('eager ')}" for name, label in baselines.items()}
    # On a CPU: no slower than eager.
    targets = {"logits.T": 1.0, "open_clip": 1.0}
    if device == "cuda":
        targets = {"logits.T compiled": 1.3, "open_clip compiled": 2.0}
    return [Claim(what, group, baseline, label, ours, targets.get(baseline)) for baseline, label in baselines.items()]


CPU = [
    *_contrastive("cpu", 4096, "ours: cpu", "float32"),
    Claim(
        "three levels of 128 scenes, (128, 700, 350) rows, (39, 73, 289) texts",
        _LEVELS.format(of="rows and *", device="cpu"),
        "logits.T",
        "eager logits / logits.T (repeats texts)",
        "ours: cpu",
    ),
    Claim(
        "three levels of 128 scenes, one text per row",
        _LEVELS.format(of="rows", device="cpu"),
        "logits.T",
        "eager logits / logits.T (keeps N x N)",
        "ours: cpu",
    ),
    Claim(
        "distillation, 1,006 pairs, D = 512",
        "distillation forward + backward, 128 scenes, cpu",
        "python loop",
        _KL,
        "ours: cpu",
        200,
    ),
    Claim(
        "the four distillation terms through `DistillationLoss`",
        "all four distillation terms, forward + backward, 128 scenes, cpu",
        "baseline",
        _KL,
        "ours: cpu",
        200,
    ),
    Claim("relation view, one core", _VIEWS.format(kind="relation"), "step by step", _SCIPY, "ours: cpu", 15),
    Claim("global view, one core", _VIEWS.format(kind="global"), "step by step", _PILLOW, "ours: cpu", 4),
    Claim("masked object view, one core", _VIEWS.format(kind="object"), "step by step", _PILLOW, "ours: cpu", 4),
    Claim("cropped object view, one core", _VIEWS.format(kind="crop"), "step by step", _PILLOW, "ours: cpu", 4),
    Claim(
        "whole batches, 224 px", "whole batches, cpu", "published, regions drawn", _REGIONS_RENDERED, "ours, torch", 6
    ),
    Claim("whole batches, 224 px", "whole batches, cpu", "published", _LOADER, "ours, torch", 9),
    Claim(
        "training step, ViT-B/32, 4 scenes, float32",
        _STEP.format(preset="vit-b-32", device="cpu"),
        "baseline, float32",
        _ENCODERS,
        "ours, float32",
        1.7,
    ),
    Claim(
        "training step, ViT-B/32, 4 scenes, bf16",
        _STEP.format(preset="vit-b-32", device="cpu"),
        "baseline, bf16",
        _ENCODERS,
        "ours, bf16",
        1.8,
    ),
    Claim(
        "training step, ViT-B/32, 4 scenes, bf16 against float32",
        _STEP.format(preset="vit-b-32", device="cpu"),
        "baseline, float32",
        _ENCODERS,
        "ours, bf16",
        2,
    ),
    Claim(
        "end to end, ViT-B/32, float32",
        _LOOP.format(preset="vit-b-32", device="cpu"),
        "baseline, float32",
        "published loader and step",
        "ours, float32",
        1.3,
    ),
    Claim(
        "end to end, ViT-B/32, bf16",
        _LOOP.format(preset="vit-b-32", device="cpu"),
        "baseline, bf16",
        "published loader and step",
        "ours, bf16",
    ),
    Claim(
        "end to end, ViT-B/32, bf16 against float32",
        _LOOP.format(preset="vit-b-32", device="cpu"),
        "baseline, float32",
        "published loader and step",
        "ours, bf16",
        2,
    ),
    Claim(
        "end to end, preset tiny, float32",
        _LOOP.format(preset="tiny", device="cpu"),
        "baseline, regions drawn, float32",
        f"{_REGIONS_RENDERED}, and the published step",
        "ours, float32",
        5,
    ),
    Claim(
        "end to end, preset tiny, float32",
        _LOOP.format(preset="tiny", device="cpu"),
        "baseline, float32",
        "published loader and step",
        "ours, float32",
        3.3,
    ),
]
GPU = [
    *_contrastive("cuda", 32768, LARGE, "bf16"),
    Claim(
        "distillation, 1,006 pairs, D = 512",
        "distillation forward + backward, 128 scenes, cuda",
        "python loop",
        _KL,
        "ours: cuda",
        as_launched=True,
    ),
    Claim("whole batches, 224 px", "whole batches, cuda", "published", _LOADER, "ours, torch"),
    Claim(
        "training step, ViT-B/32, 128 scenes",
        _STEP.format(preset="vit-b-32", device="cuda"),
        "baseline, float32",
        f"{_ENCODERS}, TF32",
        "ours, bf16, cuda graphs",
        4.5,
    ),
    Claim(
        "end to end, ViT-B/32, 128 scenes",
        _LOOP.format(preset="vit-b-32", device="cuda"),
        "baseline, float32",
        "published loader and step, TF32",
        "ours, bf16, cuda graphs",
        10,
    ),
]
# Only in the tables of records.
GPU_TARGETS = [
    *(
        Claim(
            f"contrastive loss, N = U = {n:,}, share of the products' speed",
            _ROWS.format(n=n, device="cuda"),
            "four bare products",
            "four bare products",
            LARGE,
            0.85,
        )
        for n in (32768, 65536)
    ),
    Claim(
        "contrastive loss, N = U = 32,768, D = 512, bf16",
        _ROWS.format(n=32768, device="cuda"),
        "inf_cl",
        "inf-cl",
        LARGE,
        10,
    ),
    *(
        Claim(
            "contrastive loss, N = U = 32,768, D = 512, bf16",
            _ROWS.format(n=32768, device="cuda"),
            baseline,
            baseline.replace("_", "-"),
            LARGE,
        )
        for baseline in ("memeff", "cut_cross_entropy", "liger_kernel")
    ),
    Claim(
        "contrastive losses of three levels, batch 128",
        _LEVELS.format(of="rows", device="cuda"),
        "logits.T compiled",
        "compiled logits / logits.T (keeps N x N)",
        "ours: triton",
        5,
    ),
    Claim(
        "training step, ViT-B/32, 128 scenes, bf16",
        _STEP.format(preset="vit-b-32", device="cuda"),
        "baseline, bf16",
        _ENCODERS,
        "ours, bf16, cuda graphs",
        3,
    ),
]


# The bars of README's chart: measured on a CPU.
CHART = [
    Claim(label, group, baseline, "", ours)
    for label, group, baseline, ours in (
        (
            "Distillation loss vs one KLDivLoss call per pair",
            "distillation forward + backward, 128 scenes, cpu",
            "python loop",
            "ours: cpu",
        ),
        ("Relation view vs NumPy + SciPy + Pillow", _VIEWS.format(kind="relation"), "step by step", "ours: cpu"),
        ("Global view vs Pillow", _VIEWS.format(kind="global"), "step by step", "ours: cpu"),
        ("Data loading vs the published loader", "whole batches, cpu", "published", "ours, torch"),
        (
            "Training step, ViT-B/32, vs the published step",
            _STEP.format(preset="vit-b-32", device="cpu"),
            "baseline, float32",
            "ours, float32",
        ),
        (
            "End to end, ViT-B/32, vs published loader + step",
            _LOOP.format(preset="vit-b-32", device="cpu"),
            "baseline, float32",
            "ours, float32",
        ),
        ("Contrastive loss, N = 4,096, vs open_clip", _ROWS.format(n=4096, device="cpu"), "open_clip", "ours: cpu"),
        (
            "Contrastive loss, N = 4,096, vs compiled logits.T",
            _ROWS.format(n=4096, device="cpu"),
            "logits.T compiled",
            "ours: cpu",
        ),
    )
]


@dataclass(frozen=True)
class Found:
    """Both sides of a claim, in one record."""

    record: Record
    baseline: Result
    ours: Result
    unit: str
    as_launched: bool = False

    @property
    def ratio(self) -> float:
        return self._per_unit(self.baseline) / self._per_unit(self.ours)

    def speed(self, result: Result) -> str:
        if self.unit == "scene":
            return f"{digits(1 / self._per_unit(result))} scenes/s"
        return seconds(self._per_unit(result))

    def _per_unit(self, result: Result) -> float:
        return float(result.extra[_AS_LAUNCHED]) / 1e3 if self.as_launched else result.per(self.unit)


def find(claim: Claim, records: Sequence[Record]) -> Found | None:
    """Look the claim up in the newest of `records` that has both sides in one part."""
    for record in sorted(records, key=lambda r: r.latest, reverse=True):
        for part in record.parts:
            for group, results in part.groups().items():
                forms = {r.form: r for r in results}
                if not fnmatchcase(group, claim.group) or not {claim.baseline, claim.ours} <= set(forms):
                    continue
                both = forms[claim.baseline], forms[claim.ours]
                if not claim.as_launched or all(_AS_LAUNCHED in result.extra for result in both):
                    return Found(record, *both, unit_of(results), claim.as_launched)
    return None


def rows(claims: Sequence[Claim], records: Sequence[Record]) -> list[str]:
    """Lines of a table with one row per measured claim."""
    cells = []
    for claim in claims:
        if (found := find(claim, records)) is not None:
            speeds = [found.speed(found.baseline), found.speed(found.ours)]
            cells.append([claim.what, claim.baseline_label, *speeds, f"**{times(found.ratio)}**"])
    return markdown_table(["what", "baseline", "baseline's speed", "this package", "ratio"], cells)


def tables(records: Sequence[Record]) -> str:
    """The tables of docs/benchmarks.md: one per kind of device that has been measured."""
    lines = []
    for title, claims, kind in (("CPU", CPU, "cpu"), ("GPU", GPU, "cuda")):
        if used := _used(claims, own := [r for r in records if r.kind == kind]):
            lines += [f"**{title}**: {_caption(used)}", "", *rows(claims, own), ""]
    return "\n".join(lines).rstrip() or "Nothing has been measured yet."


def chart_block(records: Sequence[Record]) -> str:
    """README's chart with its caption."""
    used = _used(CHART, [r for r in records if r.kind == "cpu"])
    alt = "Measured speed-ups over the baselines; the numbers are in docs/benchmarks.md"
    return f'<img src="{CHART_FILE}" width="560" alt="{alt}">\n\nMeasured on {_caption(used)}'


def _used(claims: Sequence[Claim], records: Sequence[Record]) -> list[Record]:
    found = {f.record.name: f.record for claim in claims if (f := find(claim, records)) is not None}
    return list(found.values())


def _caption(records: Sequence[Record]) -> str:
    devices = ", ".join(dict.fromkeys(r.machine["device"] for r in records))
    names = ", ".join(f"`benchmarks/records/{r.name}`" for r in records)
    return f"{devices}; medians; record {names}."


def chart(records: Sequence[Record]) -> str:
    """An SVG with one bar per measured claim of CHART: the ratio on a logarithmic axis, starting at 1 x.

    Written by hand, so that the same record gives the same bytes everywhere; 480 units wide, so that its text can be
    read on a phone.
    """
    own = [r for r in records if r.kind == "cpu"]
    bars = [(claim.what, found.ratio) for claim in CHART if (found := find(claim, own)) is not None]
    bars.sort(key=lambda bar: -bar[1])
    width, left, right, top, pitch = 480, 16, 56, 48, 46
    low, high = min([0.7, *(r for _, r in bars)]), max([10.0, *(r for _, r in bars)])
    bottom = top + pitch * len(bars)

    def x(ratio: float) -> float:
        return left + (width - left - right) * math.log(ratio / low) / math.log(high / low)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + 30}" width="{width}" '
        f'height="{bottom + 30}" font-family="system-ui, sans-serif" font-size="15" fill="#1f2328">',
        "<title>Speed-up over the baseline</title>",
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="{left}" y="24" font-size="17" font-weight="600">Speed-up over the baseline (log scale)</text>',
    ]
    for tick in (1, 10, 100):
        if low <= tick <= high:
            stroke = "#57606a" if tick == 1 else "#d0d7de"
            lines.append(f'<path d="M{x(tick):.1f} {top - 8}V{bottom}" stroke="{stroke}"/>')
            anchor = f'x="{x(tick):.1f}" y="{bottom + 18}" text-anchor="middle" font-size="13" fill="#57606a"'
            lines.append(f"<text {anchor}>{tick} x</text>")
    for i, (label, ratio) in enumerate(bars):
        y, (start, end) = top + pitch * i, sorted((x(1), x(ratio)))
        colour = "#2f6db5" if ratio >= 1 else "#b35900"
        # A white outline keeps the label readable where a grid line crosses it.
        outline = 'stroke="#ffffff" stroke-width="4" paint-order="stroke"'
        lines += [
            f'<text x="{left}" y="{y + 12}" {outline}>{escape(label)}</text>',
            f'<rect x="{start:.1f}" y="{y + 19}" width="{end - start:.1f}" height="15" fill="{colour}"/>',
            f'<text x="{end + 6:.1f}" y="{y + 32}" font-weight="600" {outline}>{times(ratio)}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])


def targets_and_results(record: Record) -> str:
    """A record's table: every claim of its device, with its target where there is one."""
    cells = []
    for claim in CPU if record.kind == "cpu" else [*GPU, *GPU_TARGETS]:
        found = find(claim, [record])
        target = "" if claim.target is None else f"at least {claim.target:g} x"
        if found is None:
            cells.append([claim.what, claim.baseline_label, target, NOT_MEASURED, ""])
            continue
        result = "" if claim.target is None else "met" if found.ratio >= claim.target else "**missed**"
        speeds = f"{times(found.ratio)} ({found.speed(found.baseline)}, this package {found.speed(found.ours)})"
        cells.append([claim.what, claim.baseline_label, target, speeds, result])
    return "\n".join(markdown_table(["what", "baseline", "target", "measured", "result"], cells))


def replaced(text: str, name: str, content: str) -> str:
    """Return `text` with `content` between the markers of `name`."""
    begin, end = f"<!-- generated: {name} -->", f"<!-- end of generated: {name} -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"error: no markers {begin} ... {end} to write between")
    return pattern.sub(lambda _: f"{begin}\n{content}\n{end}", text)


def record_readme(folder: Path) -> str:
    """A record's README with its tables brought up to date; a new one where there is none."""
    record = read_record(folder)
    path = folder / "README.md"
    if path.exists():
        text = path.read_text(encoding="utf-8")
    else:
        markers = "\n".join(f"<!-- {end}generated: targets and results -->" for end in ("", "end of "))
        text = f"# {record.date}, {record.machine['device']}\n\n{markers}\n"
    text = replaced(text, "targets and results", targets_and_results(record))
    if not (sections := folder / "sections.csv").exists():
        return text
    # `make gpu` writes this file after every section.
    head, *lines = [line.split(",") for line in sections.read_text(encoding="utf-8").splitlines()]
    if "<!-- generated: sections -->" not in text:
        text += "\n<!-- generated: sections -->\n<!-- end of generated: sections -->\n"
    return replaced(text, "sections", "\n".join(markdown_table(head, lines)))


def rendered() -> dict[Path, str]:
    """Every generated file, up to date: README.md, its chart, docs/benchmarks.md and the records' READMEs."""
    folders = sorted(path.parent for path in RECORDS.glob(f"*/{FILE}"))
    records = [read_record(folder) for folder in folders]
    readme, page = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
    out = {
        readme: replaced(readme.read_text(encoding="utf-8"), "chart", chart_block(records)),
        page: replaced(page.read_text(encoding="utf-8"), "benchmarks", tables(records)),
        ROOT / CHART_FILE: chart(records),
    }
    return out | {folder / "README.md": record_readme(folder) for folder in folders}


def main() -> None:
    folders = [Path(word) for word in sys.argv[1:]]
    files = {folder / "README.md": record_readme(folder) for folder in folders} if folders else rendered()
    for path, text in files.items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
