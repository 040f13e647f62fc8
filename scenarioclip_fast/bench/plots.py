"""Pictures of a record: bars per group, and the roofline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scenarioclip_fast.bench.record import Part, Record, Result, unit_of
from scenarioclip_fast.bench.tables import Roof, ceilings, fastest_of_ours, roofs, seconds, si, times
from scenarioclip_fast.report.style import COLOURS, GRID, INK, MUTED, STYLE
from scenarioclip_fast.requirements import require

OURS, LAW, OTHERS = "#2f6db5", "#9dbde3", "#b9c1ca"
_MARKERS = "osD^vP*Xp<>hd8"


def draw(record: Record, out: Path) -> dict[str, Path]:
    """Draws a picture a part and the roofline into `out`; the title of the table that each belongs to -> its path."""
    out.mkdir(parents=True, exist_ok=True)
    pictures = {part.name: bars(part, out / f"{part.name}.png") for part in record.parts if part.results}
    drawn = [roof for roof in roofs(record) if roof.floor is not None]
    if drawn:
        pictures["Roofline"] = roofline(drawn, record, out / "roofline.png")
    return pictures


def bars(part: Part, out: Path) -> Path:
    """Medians with the spread of their samples, a panel per group."""
    require("matplotlib")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    groups = part.groups()
    with rc_context(STYLE):
        heights = [0.75 + 0.27 * len(results) for results in groups.values()]
        figure = Figure(figsize=(10, sum(heights)))
        figure.set_layout_engine("constrained", h_pad=0.09)
        panels = figure.subplots(len(groups), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
        for axes, (group, results) in zip(panels, groups.items(), strict=True):
            unit = unit_of(results)
            _panel(axes, sorted(results, key=lambda r: r.per(unit)), unit)
            axes.set_title(f"{group}, a {unit}", fontsize=9.5)
        figure.savefig(out, dpi=110)
    return out


def _panel(axes: Any, results: Sequence[Result], unit: str) -> None:
    amounts = [r.median / r.per(unit) for r in results]
    ends = [(min(r.samples) / n, max(r.samples) / n) for r, n in zip(results, amounts, strict=True)]
    shortest, longest = min(low for low, _ in ends), max(high for _, high in ends)
    log = longest > 30 * shortest  # else the short bars could not be told apart
    ours = fastest_of_ours(results)
    for y, (r, (low, high)) in enumerate(zip(results, ends, strict=True)):
        colour = OTHERS if not r.ours else LAW if "reference" in r.form else OURS
        axes.barh(y, r.per(unit), 0.66, color=colour)
        axes.plot([low, high], [y, y], color=INK, linewidth=1.2)
        label = seconds(r.per(unit))
        if ours is not None and r is not ours:
            label += f"   {times(r.per(unit) / ours.per(unit))}"
        axes.annotate(label, (high, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8, color=INK)
    if log:
        axes.set_xscale("log")
        axes.set_xlim(shortest / 3, longest * (longest / shortest) ** 0.3)
    else:
        axes.set_xlim(0, longest * 1.3)
    axes.set_yticks(range(len(results)), [r.form for r in results], fontsize=8)
    axes.set_ylim(len(results) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(lambda value, _: seconds(value).replace(".0 ", " ") if value > 0 else "0")
    axes.tick_params(axis="x", labelsize=7.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)


def roofline(drawn: Sequence[Roof], record: Record, out: Path) -> Path:
    """Operations a second against operations a byte, under the measured ceilings."""
    require("matplotlib")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    def intensity(r: Result) -> float:
        return float(r.extra["operations"] / r.extra["bytes"])

    with rc_context(STYLE):
        figure = Figure(figsize=(10, 6.2), layout="constrained")
        axes = figure.subplots()
        xs = [intensity(roof.result) for roof in drawn]
        low, high = min(xs) / 3, max(*xs, 30) * 6
        measured = ceilings(record)
        styles = {"float32": "-", "tf32": "-.", "bfloat16": "--"}
        for (kind, precision, device, threads), peak in measured.items():
            copy = measured.get(("copy", "", device, threads))
            if kind != "product" or copy is None:
                continue
            points = [low, peak / copy, high]
            axes.plot(points, [min(copy * x, peak) for x in points], styles[precision], color=MUTED, linewidth=1.1)
            where = "GPU" if device == "cuda" else f"{threads} thread{'s' * (threads > 1)}"
            axes.annotate(
                f"{precision}, {where}",
                (high, peak),
                xytext=(0, 3),
                textcoords="offset points",
                ha="right",
                fontsize=7.5,
            )
        colours = [*COLOURS.values(), "#7a5ba8", "#b3402e", "#2b8c8c"]
        kernels = list(dict.fromkeys(_kernel(roof.result) for roof in drawn))
        for i, roof in enumerate(drawn):
            r = roof.result
            share = 100 * (roof.floor or 0) / r.median
            label = f"{r.group}: {r.form} ({share:.0f} %)"
            colour = colours[kernels.index(_kernel(r)) % len(colours)]
            marker = _MARKERS[i % len(_MARKERS)]
            face = colour if r.ours else "none"
            y = r.extra["operations"] / r.median
            axes.scatter(intensity(r), y, 46, marker=marker, edgecolors=colour, facecolors=face, label=label, zorder=3)
        axes.set_xscale("log")
        axes.set_yscale("log")
        bottom = min(roof.result.extra["operations"] / roof.result.median for roof in drawn)
        axes.set_ylim(bottom / 4, max(v for (kind, *_), v in measured.items() if kind == "product") * 2)
        axes.set_xlim(low, high)
        axes.set_xlabel("operations per byte that must move")
        axes.set_ylabel("operations a second")
        axes.yaxis.set_major_formatter(lambda value, _: si(value))
        axes.grid(color=GRID)
        columns = 1 if len(drawn) <= 12 else 2
        figure.legend(loc="outside lower center", ncols=columns, fontsize=7.5, title="share of the ceiling in brackets")
        figure.set_size_inches(10, 5.4 + 0.19 * math.ceil(len(drawn) / columns))
        figure.savefig(out, dpi=110)
    return out


def _kernel(r: Result) -> str:
    return r.group.partition(",")[0]
