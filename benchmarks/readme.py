"""Writes the benchmark tables of README.md, and the asked-and-measured table of each record's README, from the records.

Run: python benchmarks/readme.py             README.md and all committed records; make record does it after measuring
     python benchmarks/readme.py RECORD...   the README.md of these records alone

A row is a claim: two forms of one group in one record, the newest that has both. What no record has is "not yet
measured". The tables stand between markers; everything around them is left alone.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from scenarioclip_fast.bench.record import FILE, NOT_MEASURED, Record, Result, read_record, unit_of
from scenarioclip_fast.bench.tables import digits, markdown_table, seconds, times

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks" / "records"


@dataclass(frozen=True)
class Claim:
    """A row: `ours` against `rival` in the group that the pattern `group` names."""

    what: str
    group: str
    rival: str
    about: str  # the rival in words
    ours: str
    asked: float | None = None  # ratio


_ENCODERS = "six separate encoders and teacher, as published"
_LOADER = "Pillow, regions from PNGs drawn beforehand, worker processes, as published"
_DRAWN = "Pillow, regions drawn with SciPy, worker processes"
_LOOP = "end to end, whole loop, {preset}, *, {device}"
_STEP = "training step, {preset}, *, {device}"
_VIEWS = "{kind} views, 640 x 480 to 224, one core"
_SCIPY, _PILLOW = "NumPy + SciPy + Pillow", "Pillow"
_ROWS = "contrastive, forward + backward, {n} x {n} x 512, {device}"
_LEVELS = "contrastive, forward + backward, levels of (128, 700, 350) {of}, width 512, {device}"
_KL = "one KLDivLoss call a pair, as published"


def _contrastive(device: str, n: int, ours: str, dtype: str) -> list[Claim]:
    group = _ROWS.format(n=n, device=device)
    what = f"contrastive loss, N = U = {n:,}, D = 512, {dtype}"
    rivals = {"logits.T": "eager logits / logits.T (keeps N x N)", "open_clip": "eager open_clip (keeps N x N)"}
    rivals |= {f"{name} compiled": f"compiled {about.removeprefix('eager ')}" for name, about in rivals.items()}
    # Asked on a CPU: no slower than eager.
    asked = {"logits.T": 1.0, "open_clip": 1.0}
    if device == "cuda":
        asked = {"logits.T compiled": 1.3, "open_clip compiled": 2.0}
    return [Claim(what, group, rival, about, ours, asked.get(rival)) for rival, about in rivals.items()]


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
        "the same, each row with a text of its own",
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
    Claim("whole batches, 224 px", "whole batches, cpu", "published, regions drawn", _DRAWN, "ours, torch", 6),
    Claim("the same", "whole batches, cpu", "published", _LOADER, "ours, torch"),
    Claim(
        "training step, ViT-B/32, 4 scenes, float32",
        _STEP.format(preset="vit-b-32", device="cpu"),
        "baseline, float32",
        _ENCODERS,
        "ours, float32",
        1.25,
    ),
    Claim(
        "the same, bf16",
        _STEP.format(preset="vit-b-32", device="cpu"),
        "baseline, bf16",
        _ENCODERS,
        "ours, bf16",
    ),
    Claim(
        "the same, bf16 against float32",
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
        "the same, bf16",
        _LOOP.format(preset="vit-b-32", device="cpu"),
        "baseline, bf16",
        "published loader and step",
        "ours, bf16",
    ),
    Claim(
        "the same, bf16 against float32",
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
        f"{_DRAWN}, and the published step",
        "ours, float32",
        5,
    ),
    Claim(
        "the same",
        _LOOP.format(preset="tiny", device="cpu"),
        "baseline, float32",
        "published loader and step",
        "ours, float32",
    ),
]
GPU = [
    *_contrastive("cuda", 32768, "ours: triton", "bf16"),
    Claim(
        "distillation, 1,006 pairs, D = 512",
        "distillation forward + backward, 128 scenes, cuda",
        "python loop",
        _KL,
        "ours: cuda",
    ),
    Claim("whole batches, 224 px", "whole batches, cuda", "published", _LOADER, "ours, torch"),
    Claim(
        "training step, ViT-B/32, 128 scenes",
        _STEP.format(preset="vit-b-32", device="cuda"),
        "baseline, float32",
        f"{_ENCODERS}, TF32",
        "ours, bf16, compiled",
        4.5,
    ),
    Claim(
        "end to end, ViT-B/32, 128 scenes",
        _LOOP.format(preset="vit-b-32", device="cuda"),
        "baseline, float32",
        "published loader and step, TF32",
        "ours, bf16",
        10,
    ),
]
# In the tables of records alone.
GPU_ASKED = [
    *(
        Claim(
            f"contrastive loss, N = U = {n:,}, share of the products' speed",
            _ROWS.format(n=n, device="cuda"),
            "four bare products",
            "four bare products",
            "ours: triton",
            0.85,
        )
        for n in (32768, 65536)
    ),
    Claim(
        "contrastive loss, N = U = 32,768, D = 512, bf16",
        _ROWS.format(n=32768, device="cuda"),
        "inf_cl",
        "inf-cl",
        "ours: triton",
        10,
    ),
    *(
        Claim(
            "contrastive loss, N = U = 32,768, D = 512, bf16",
            _ROWS.format(n=32768, device="cuda"),
            rival,
            rival.replace("_", "-"),
            "ours: triton",
        )
        for rival in ("memeff", "cut_cross_entropy", "liger_kernel")
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
        "ours, bf16, compiled",
        3,
    ),
]


@dataclass(frozen=True)
class Found:
    """Both sides of a claim, in one record."""

    record: Record
    rival: Result
    ours: Result
    unit: str

    @property
    def ratio(self) -> float:
        return self.rival.per(self.unit) / self.ours.per(self.unit)

    def speed(self, result: Result) -> str:
        if self.unit == "scene":
            return f"{digits(1 / result.per('scene'))} scenes/s"
        return seconds(result.per(self.unit))


def find(claim: Claim, records: Sequence[Record]) -> Found | None:
    """In the newest of `records` that has both sides in one part."""
    for record in sorted(records, key=lambda r: r.latest, reverse=True):
        for part in record.parts:
            for group, results in part.groups().items():
                forms = {r.form: r for r in results}
                if fnmatchcase(group, claim.group) and {claim.rival, claim.ours} <= set(forms):
                    return Found(record, forms[claim.rival], forms[claim.ours], unit_of(results))
    return None


def rows(claims: Sequence[Claim], records: Sequence[Record]) -> list[str]:
    """Lines of the README's table, one claim each."""
    cells = []
    for claim in claims:
        found = find(claim, records)
        if found is None:
            cells.append([claim.what, claim.about, NOT_MEASURED, NOT_MEASURED, ""])
        else:
            speeds = [found.speed(found.rival), found.speed(found.ours)]
            cells.append([claim.what, claim.about, *speeds, f"**{times(found.ratio)}**"])
    return markdown_table(["what", "against", "theirs", "ours", ""], cells)


def benchmarks(records: Sequence[Record]) -> str:
    """The README's tables."""
    lines = []
    for title, claims, kind in (("CPU", CPU, "cpu"), ("GPU", GPU, "cuda")):
        own = [r for r in records if r.kind == kind]
        used = list(dict.fromkeys(f.record.name for c in claims if (f := find(c, own)) is not None))
        devices = dict.fromkeys(r.machine["device"] for r in own if r.name in used)
        links = ", ".join(f"[{name}](benchmarks/records/{name})" for name in used)
        caption = f"{', '.join(devices)}; medians ({links})." if used else f"{NOT_MEASURED.capitalize()}."
        lines += [f"**{title}**: {caption}", "", *rows(claims, own), ""]
    return "\n".join(lines).rstrip()


def asked_and_measured(record: Record) -> str:
    """A record's table: every claim of its device."""
    cells = []
    for claim in CPU if record.kind == "cpu" else [*GPU, *GPU_ASKED]:
        found = find(claim, [record])
        asked = "" if claim.asked is None else f"at least {claim.asked:g} x"
        if found is None:
            cells.append([claim.what, claim.about, asked, NOT_MEASURED, ""])
            continue
        verdict = "" if claim.asked is None else "met" if found.ratio >= claim.asked else "**missed**"
        speeds = f"{times(found.ratio)} ({found.speed(found.rival)}, ours {found.speed(found.ours)})"
        cells.append([claim.what, claim.about, asked, speeds, verdict])
    return "\n".join(markdown_table(["what", "against", "asked", "measured", ""], cells))


def replaced(text: str, name: str, content: str) -> str:
    """`text` with what stands between the markers of `name` replaced."""
    begin, end = f"<!-- generated: {name} -->", f"<!-- end of generated: {name} -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"error: no markers {begin} ... {end} to write between")
    return pattern.sub(lambda _: f"{begin}\n{content}\n{end}", text)


def record_readme(folder: Path) -> str:
    """A record's README with its table as it should be; a first one where there is none."""
    record = read_record(folder)
    path = folder / "README.md"
    if path.exists():
        text = path.read_text(encoding="utf-8")
    else:
        markers = "\n".join(f"<!-- {end}generated: asked and measured -->" for end in ("", "end of "))
        text = f"# {record.date}, {record.machine['device']}\n\n{markers}\n"
    text = replaced(text, "asked and measured", asked_and_measured(record))
    if not (sections := folder / "sections.csv").exists():
        return text
    # Of `make gpu`, which writes it after every section.
    head, *lines = [line.split(",") for line in sections.read_text(encoding="utf-8").splitlines()]
    if "<!-- generated: sections -->" not in text:
        text += "\n<!-- generated: sections -->\n<!-- end of generated: sections -->\n"
    return replaced(text, "sections", "\n".join(markdown_table(head, lines)))


def rendered() -> dict[Path, str]:
    """README.md and those of the committed records, as they should be."""
    folders = sorted(path.parent for path in RECORDS.glob(f"*/{FILE}"))
    readme = ROOT / "README.md"
    tables = benchmarks([read_record(folder) for folder in folders])
    out = {readme: replaced(readme.read_text(encoding="utf-8"), "benchmarks", tables)}
    return out | {folder / "README.md": record_readme(folder) for folder in folders}


def main() -> None:
    folders = [Path(word) for word in sys.argv[1:]]
    files = {folder / "README.md": record_readme(folder) for folder in folders} if folders else rendered()
    for path, text in files.items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
