"""The report of a generation run: what each stage kept and cost, the vocabulary, distributions, and examples.

Records are read one unit at a time; what is kept of them are counts.
"""

from __future__ import annotations

import tempfile
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from scenarioclip_fast.config_types import to_yaml_text
from scenarioclip_fast.data.check import REASONS as CHECK_REASONS
from scenarioclip_fast.data.check import BadEntry
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import open_file
from scenarioclip_fast.generate.config import STAGES, GenerateConfig
from scenarioclip_fast.generate.examples import Example, ExampleReader, choose, shrink_image, shrink_mask
from scenarioclip_fast.generate.images import read_list
from scenarioclip_fast.generate.records import read_unit, unit_files
from scenarioclip_fast.generate.run_directory import RunDirectory
from scenarioclip_fast.generate.source import CuratedSource
from scenarioclip_fast.generate.stages import REASONS, Outcome
from scenarioclip_fast.parsing import parse_json
from scenarioclip_fast.report.page import Report, Section
from scenarioclip_fast.report.style import COLOURS, GRID, INK, MUTED, canvas, run_colours
from scenarioclip_fast.requirements import require
from scenarioclip_fast.terminal import printable

_EXAMPLES, _REGIONS = 6, 3  # scenes on the sheet, and focused regions per scene
_TOP = 12  # texts per panel
_SIDE = 360  # of images on the sheet, in pixels
_LEVELS = {  # colours as in the other reports
    "actions": COLOURS["global"],
    "objects": COLOURS["object"],
    "predicates": "#7a5ba8",
    "triplets": COLOURS["relation"],
}
_BINS = 20  # of scores


@dataclass
class _Stage:
    """What a stage's records and log say, summed over units and runs."""

    name: str
    images: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    objects: int = 0
    relations: int | None = None
    run_images: int = 0  # including those whose records were discarded later
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)


@dataclass
class _Statistics:
    stages: dict[str, _Stage] = field(default_factory=lambda: {name: _Stage(name) for name in STAGES[:-1]})
    parts: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # (stage, object or relation, reason)
    part_examples: dict[tuple[str, str, str], str] = field(default_factory=dict)
    texts: dict[str, Counter[str]] = field(default_factory=lambda: {level: Counter() for level in _LEVELS})
    per_image: dict[str, Counter[int]] = field(
        default_factory=lambda: {level: Counter() for level in ("objects", "relations")}
    )
    scores: dict[str, Counter[int]] = field(default_factory=lambda: {kind: Counter() for kind in ("boxes", "masks")})

    def add(self, stage: str, outcome: Outcome) -> None:
        found = self.stages[stage]
        found.images += 1
        if outcome.reason:
            found.rejected[outcome.reason] += 1
            return
        result = outcome.result
        for part in result.get("rejected", []):
            kind = (stage, str(part["part"]).partition(" ")[0], str(part["reason"]))
            self.parts[kind] += 1
            if kind not in self.part_examples:
                detail = f": {part['detail']}" if part["detail"] else ""
                self.part_examples[kind] = _line(f"{outcome.key}, {part['part']}{detail}", 90)
        if stage == "curate":
            self._add_scene(result["scene"])
            result = result["scene"]
        objects = result["objects"]
        found.objects += sum(o["mask"] is not None for o in objects) if stage == "segment" else len(objects)
        if "relations" in result:
            found.relations = (found.relations or 0) + len(result["relations"])

    def _add_scene(self, scene: dict[str, Any]) -> None:
        names = [str(entry["name"]) for entry in scene["objects"]]
        if scene.get("action") is not None:
            self.texts["actions"][str(scene["action"])] += 1
        self.texts["objects"].update(names)
        for relation in scene["relations"]:
            predicate = str(relation["predicate"])
            self.texts["predicates"][predicate] += 1
            self.texts["triplets"][f"{names[relation['subject']]} {predicate} {names[relation['object']]}"] += 1
        for level, counter in self.per_image.items():
            counter[len(scene[level])] += 1
        for kind, bins in self.scores.items():
            values = (scene.get("scores") or {}).get(kind) or []
            bins.update(min(_BINS - 1, max(0, int(_BINS * value))) for value in values if value is not None)

    def add_run(self, record: dict[str, Any]) -> None:
        """Add a line of runs.jsonl."""
        if (found := self.stages.get(str(record["stage"]))) is not None:
            found.run_images += int(record["images"])
            found.seconds += float(record["seconds"])
            found.counts.update({str(name): value for name, value in record["counts"].items()})


def write_run_report(directory: Path, out: Path) -> Path:
    """Write the report of a run as one HTML file.

    Args:
        directory: of the run, whose finished units are counted.
        out: the HTML file, replaced if it exists.

    Returns:
        out.

    Raises:
        UserError: the directory holds no records, or a damaged one.
    """
    require("matplotlib")
    found = _collect(directory)
    if not found.stages["caption"].images:
        raise UserError(f"{directory}: no records of finished units; run `scenarioclip-fast generate` first")
    kept = sum(found.per_image["objects"].values())
    counts = ", ".join(f"{len(counter):,} {level}" for level, counter in found.texts.items())
    lead = f"{found.stages['caption'].images:,} images, {kept:,} scenes; {counts}, counted as distinct texts."
    report = Report(f"Generation report: {directory.resolve().name}", lead)
    report.sections += [_stages(found), *_costs(found), *_rejections(found)]
    with tempfile.TemporaryDirectory() as folder:
        if kept:
            report.sections += _figures(found, directory, Path(folder))
        report.sections += _settings(RunDirectory(directory).settings())
        return report.write(out)


def _collect(directory: Path) -> _Statistics:
    found = _Statistics()
    for stage in found.stages:
        for path in unit_files(directory / stage):
            for number, outcome in enumerate(read_unit(path, complete=True)[1], start=2):
                try:
                    found.add(stage, outcome)
                except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                    raise UserError(
                        f"{path}: line {number} is damaged ({type(error).__name__}: {error}); remove the file and "
                        "re-run the command"
                    ) from None
    for record in _runs(directory / "runs.jsonl"):
        found.add_run(record)
    return found


def _runs(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    with open_file(path) as file:
        for line in file:
            try:
                record = parse_json(line)
                assert (
                    isinstance(record["counts"], dict) and float(record["seconds"]) >= 0 and int(record["images"]) >= 0
                )
                yield record
            except (AssertionError, KeyError, TypeError, ValueError):
                continue  # the end of a run that was killed


# ---- tables


def _stages(found: _Statistics) -> Section:
    head = ["stage", "images", "kept", "rejected", "objects", "relations", "images/s", "seconds"]
    rows = []
    for stage in found.stages.values():
        rejected = stage.rejected.total()
        rate = _number(stage.run_images / stage.seconds) if stage.run_images and stage.seconds else ""
        relations = "" if stage.relations is None else f"{stage.relations:,}"
        numbers = [f"{n:,}" for n in (stage.images, stage.images - rejected, rejected, stage.objects)]
        rows.append([stage.name, *numbers, relations, rate, _number(stage.seconds)])
    note = (
        "Images, objects and relations are those in the records of finished units. Objects are names in `caption`, "
        "boxes in `ground`, and masks in `segment`. Times are summed over all runs, also of records discarded later."
    )
    return Section("Stages", head, rows, note=note)


def _number(value: float) -> str:
    """Whole numbers in full, others to three digits."""
    return f"{value:,.0f}" if value == round(value) or abs(value) >= 100 else f"{value:.3g}"


def _costs(found: _Statistics) -> list[Section]:
    rows = [
        [stage.name, printable(name), _number(value), _number(value / stage.run_images) if stage.run_images else ""]
        for stage in found.stages.values()
        # Every run curates again, from the beginning: its counts, summed over runs, are not those of the records.
        if stage.name != "curate"
        for name, value in stage.counts.items()
        if value
    ]
    return [Section("Counts", ["stage", "what", "total", "per image"], rows)] if rows else []


def _rejections(found: _Statistics) -> list[Section]:
    known = CHECK_REASONS | REASONS
    images = [
        [stage.name, printable(reason), f"{n:,}", f"{100 * n / stage.images:.1f} %", known.get(reason, "")]
        for stage in found.stages.values()
        for reason, n in stage.rejected.most_common()
    ]
    parts = [
        [
            *(stage, printable(kind), printable(reason), f"{n:,}"),
            *(known.get(reason, ""), found.part_examples[stage, kind, reason]),
        ]
        for (stage, kind, reason), n in found.parts.most_common()
    ]
    sections = []
    if images:
        head = ["stage", "reason", "images", "of the stage's images", "meaning"]
        sections.append(Section("Rejected images", head, images))
    if parts:
        head = ["stage", "part", "reason", "number", "meaning", "example"]
        sections.append(Section("Rejected objects and relations", head, parts))
    return sections


def _settings(saved: Mapping[str, Mapping[str, Any]]) -> list[Section]:
    """The models, and the other settings that are not the defaults."""
    rows = [
        [f"{section}.{name}", printable(to_yaml_text(value)), to_yaml_text(default)]
        for section, defaults in asdict(GenerateConfig()).items()
        for name, default in defaults.items()
        if (value := saved.get(section, {}).get(name, default)) != default or (name == "model" and saved)
    ]
    note = "Models, and settings that are not the defaults; generate.json has all of them."
    return [Section("Settings of the last run", ["key", "value", "default"], rows, note=note)] if rows else []


# ---- figures


def _figures(found: _Statistics, directory: Path, folder: Path) -> list[Section]:
    texts = {level: len(counter) for level, counter in found.texts.items()}
    distinct = ", ".join(f"{n:,} distinct {level}" for level, n in texts.items())
    sections = [
        Section(
            "Vocabulary",
            picture=_draw_vocabulary(found, folder / "vocabulary.png"),
            note=f"The most frequent of {distinct}.",
        ),
        Section(
            "Long tail",
            picture=_draw_tail(found, folder / "tail.png"),
            note="Occurrences of each text by rank. " + " ".join(_tail_notes(found)),
        ),
        Section(
            "Distributions",
            picture=_draw_distributions(found, folder / "distributions.png"),
            note="Of the curated scenes. The score of a box is the detector's, that of a mask its predicted IoU.",
        ),
    ]
    examples = _examples(directory)
    if examples:
        note = (
            f"{len(examples)} scenes, chosen by a hash of their keys: the image, boxes, masks, and the focused regions "
            f"of the first {_REGIONS} relations as the model sees them, cropped to their centre."
        )
        sections.append(Section("Examples", picture=_draw_examples(examples, folder / "examples.png"), note=note))
    return sections


def _draw_vocabulary(found: _Statistics, out: Path) -> Path:
    panels = {level: counter.most_common() for level, counter in found.texts.items()}
    # Of equally frequent texts, the first in the alphabet.
    top = {level: sorted(rows, key=lambda row: (-row[1], row[0]))[:_TOP] for level, rows in panels.items()}
    heights = [max(len(top[a]), len(top[b]), 1) for a, b in (("actions", "objects"), ("predicates", "triplets"))]
    with canvas(out, 11, 1.5 + 0.23 * sum(heights), pad=0.08) as figure:
        grid = figure.subplots(2, 2, height_ratios=[n + 1.5 for n in heights])
        for axes, (level, rows) in zip(grid.flat, top.items(), strict=True):
            axes.set_title(f"{level} ({len(panels[level]):,} distinct)")
            axes.barh(range(len(rows)), [n for _, n in rows], color=_LEVELS[level], height=0.68)
            axes.set_yticks(range(len(rows)), [_plain(_line(text, 34)) for text, _ in rows], fontsize=8)
            # As thick in both panels of a row.
            axes.set_ylim(heights[level in ("predicates", "triplets")] - 0.4, -0.6)
            for k, (_, n) in enumerate(rows):
                axes.text(n, k, f" {n:,}", va="center", fontsize=7.5, color=MUTED)
            axes.margins(x=0.1)
            axes.tick_params(axis="y", length=0, labelcolor=INK)
            axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
            axes.grid(axis="x", color=GRID)
            axes.set_axisbelow(True)
    return out


def _draw_tail(found: _Statistics, out: Path) -> Path:
    with canvas(out, 11, 3.4, pad=0.08) as figure:
        axes = figure.subplots()
        for level, counter in found.texts.items():
            counts = np.sort(np.fromiter(counter.values(), np.int64, len(counter)))[::-1]
            if len(counts):
                keep = np.unique(np.geomspace(1, len(counts), 400).round().astype(np.int64))  # of up to millions
                axes.plot(
                    keep, counts[keep - 1], color=_LEVELS[level], label=level, linewidth=1.8, marker=".", markersize=4
                )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("rank")
        axes.set_ylabel("occurrences")
        axes.grid(color=GRID)
        if axes.lines:
            axes.legend(loc="upper right")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else "")
            axis.set_minor_formatter(lambda value, _: "")
    return out


def _tail_notes(found: _Statistics) -> Iterator[str]:
    for level, counter in found.texts.items():
        once = sum(n == 1 for n in counter.values())
        if counter:
            yield f"{100 * once / len(counter):.0f} % of the {level} occur once."


def _draw_distributions(found: _Statistics, out: Path) -> Path:
    with canvas(out, 11, 2.7, pad=0.08) as figure:
        panels = figure.subplots(1, 4)
        for axes, (level, counter) in zip(panels[:2], found.per_image.items(), strict=True):
            mean = sum(k * n for k, n in counter.items()) / counter.total()
            axes.bar(list(counter), list(counter.values()), width=0.85, color=_LEVELS.get(level, COLOURS["relation"]))
            axes.set_title(f"{level} per image, mean {mean:.1f}")
            axes.set_xlim(-0.6, max(*counter, 3) + 0.6)
            axes.xaxis.get_major_locator().set_params(integer=True)
        for axes, (kind, bins) in zip(panels[2:], found.scores.items(), strict=True):
            axes.set_title(f"scores of {kind}")
            axes.bar([(b + 0.5) / _BINS for b in bins], list(bins.values()), width=0.9 / _BINS, color=COLOURS["object"])
            axes.set_xlim(0, 1)
            if not bins:
                axes.text(0.5, 0.5, "none recorded", transform=axes.transAxes, ha="center", color=MUTED)
                axes.set_yticks([])
        for axes in panels:
            if len(axes.get_yticks()):
                axes.yaxis.get_major_locator().set_params(integer=True)
            axes.grid(axis="y", color=GRID)
            axes.set_axisbelow(True)
            axes.tick_params(labelsize=8)
        panels[0].set_ylabel("images")
        panels[2].set_ylabel("objects")
    return out


# ---- examples


def _examples(directory: Path) -> list[Example]:
    """The first scenes of a sample that can be read."""
    scenes = CuratedSource(directory, read_list(directory / "images.jsonl")).scenes
    reader, found = ExampleReader(), list[Example]()
    for item in choose(scenes, 4 * _EXAMPLES, 0):
        try:
            example = reader.read(item)
        except BadEntry:
            continue
        if any(region is not None for region in example.regions):
            found.append(example)
        if len(found) == _EXAMPLES:
            break
    return found


def _draw_examples(examples: Sequence[Example], out: Path) -> Path:
    columns = max(len(list(_panels(example))) for example in examples)
    height = 2.75
    with canvas(out, 2.2 * columns, height * len(examples)) as figure:
        for row, example in enumerate(examples):
            top = 1 - row / len(examples)
            for column, (title, picture, boxes) in enumerate(_panels(example)):
                # Pictures in cells of equal size; the title is one line above, the texts of the row are below.
                cell = (
                    (column + 0.03) / columns,
                    top - 2.25 / height / len(examples),
                    0.94 / columns,
                    1.9 / height / len(examples),
                )
                axes = figure.add_axes(cell, anchor="NW")
                axes.imshow(picture)
                axes.set_axis_off()
                axes.set_title(_plain(_line(title, 30)), fontsize=8, color=MUTED, fontweight="normal", pad=4)
                for name, box, colour in boxes:
                    _draw_box(axes, name, box, colour, picture.shape)
            lines = [_line(example.scene.action or "(no action)", 60), _line(example.scene.caption or "", 150)]
            triplets = "; ".join(example.scene.relation_text(k) for k in range(len(example.scene.relations)))
            lines += [_line(triplets, 150)]
            bottom = top - 2.32 / height / len(examples)
            figure.text(0.005, bottom, _plain(lines[0]), fontsize=9, fontweight="bold", va="top")
            figure.text(
                0.17,
                bottom,
                _plain("\n".join(filter(None, lines[1:]))),
                fontsize=8,
                va="top",
                color=INK,
                linespacing=1.4,
            )
    return out


def _panels(example: Example) -> Iterator[tuple[str, Any, Sequence[tuple[str, Any, str]]]]:
    """The title, the picture and the boxes of each column."""
    from matplotlib.colors import to_rgb

    image = np.asarray(shrink_image(example.image, _SIDE))
    objects = example.scene.objects
    colours = list(run_colours(map(str, range(len(objects)))).values())
    scale = image.shape[1] / example.image.shape[1]
    yield "image", image, ()
    boxes = [(o.name, [scale * v for v in o.box], colour) for o, colour in zip(objects, colours, strict=True)]
    yield f"{len(boxes)} boxes", image, boxes
    tinted = image.astype(np.float32) / 255
    for entry, colour in zip(objects, colours, strict=True):
        if entry.mask is not None:
            mask = shrink_mask(entry.mask, _SIDE).numpy()
            tinted[mask] = 0.35 * tinted[mask] + 0.65 * np.array(to_rgb(colour), np.float32)
    yield f"{sum(o.mask is not None for o in objects)} masks", tinted, ()
    regions = [(k, region) for k, region in enumerate(example.regions) if region is not None]
    for k, region in regions[:_REGIONS]:
        yield example.scene.relation_text(k), region.numpy(), ()


def _draw_box(axes: Any, name: str, box: Sequence[float], colour: str, shape: Sequence[int]) -> None:
    from matplotlib.patches import Rectangle

    x1, y1, x2, y2 = box
    axes.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, color=colour, linewidth=1.4))
    # Above the box, or inside it at the upper edge; right-aligned in the right half, so that it is never clipped.
    x, edge = (x2 - 1, "right") if x1 + x2 > shape[1] else (x1, "left")
    side = "top" if y1 < 0.1 * shape[0] else "bottom"
    label = {"facecolor": colour, "edgecolor": "none", "pad": 0.8}
    text = _plain(_line(name, 24))
    axes.text(x, y1, text, color="white", fontsize=5.5, ha=edge, va=side, bbox=label, clip_on=True)


def _line(text: str, width: int) -> str:
    return textwrap.shorten(printable(text[: 4 * width]), width, placeholder=" ...") or printable(text)[:width]


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # an unescaped dollar sign starts Matplotlib's mathtext
