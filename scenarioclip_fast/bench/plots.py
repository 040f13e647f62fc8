"""Plots of a record: bar charts per group, and the roofline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scenarioclip_fast.bench.record import Part, Record, Result, unit_of
from scenarioclip_fast.bench.tables import Roof, ceilings, fastest_of_ours, roofs, seconds, si, times
from scenarioclip_fast.report.style import COLOURS, GRID, INK, MUTED, STYLE
from scenarioclip_fast.requirements import require

OURS, REFERENCE, OTHERS = "#2f6db5", "#9dbde3", "#b9c1ca"
_MARKERS = "osD^vP*Xp<>hd8"


def plot_record(record: Record, out: Path) -> dict[str, Path]:
    """Plot each part and the roofline into `out`; return the path of each plot by the title of its table."""
    out.mkdir(parents=True, exist_ok=True)
    plots = {part.name: bars(part, out / f"{part.name}.png") for part in record.parts if part.results}
    bounded = [roof for roof in roofs(record) if roof.floor is not None]
    if bounded:
        plots["Roofline"] = roofline(bounded, record, out / "roofline.png")
    return plots


def bars(part: Part, out: Path) -> Path:
    """Plot medians and the range of their samples, one panel per group."""
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
            axes.set_title(f"{group} (per {unit})", fontsize=9.5)
        figure.savefig(out, dpi=110)
    return out


def _panel(axes: Any, results: Sequence[Result], unit: str) -> None:
    amounts = [r.median / r.per(unit) for r in results]
    ends = [(min(r.samples) / n, max(r.samples) / n) for r, n in zip(results, amounts, strict=True)]
    shortest, longest = min(low for low, _ in ends), max(high for _, high in ends)
    log = longest > 30 * shortest  # on a linear axis, short bars would be indistinguishable
    ours = fastest_of_ours(results)
    for y, (r, (low, high)) in enumerate(zip(results, ends, strict=True)):
        colour = OTHERS if not r.ours else REFERENCE if "reference" in r.form else OURS
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


def roofline(kernels: Sequence[Roof], record: Record, out: Path) -> Path:
    """Plot operations per second over operations per byte, below the measured ceilings."""
    require("matplotlib")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(10, 6.2), layout="constrained")
        axes = figure.subplots()
        xs = [_intensity(roof.result) for roof in kernels]
        low, high = min(xs) / 3, max(*xs, 30) * 6
        measured = ceilings(record)
        _plot_ceilings(axes, measured, low, high)
        _plot_kernels(axes, kernels)
        axes.set_xscale("log")
        axes.set_yscale("log")
        bottom = min(roof.result.extra["operations"] / roof.result.median for roof in kernels)
        axes.set_ylim(bottom / 4, max(v for (kind, *_), v in measured.items() if kind == "product") * 2)
        axes.set_xlim(low, high)
        axes.set_xlabel("arithmetic intensity (operations per byte)")
        axes.set_ylabel("operations per second")
        axes.yaxis.set_major_formatter(lambda value, _: si(value))
        axes.grid(color=GRID)
        columns = 1 if len(kernels) <= 12 else 2
        figure.legend(loc="outside lower center", ncols=columns, fontsize=7.5, title="share of roofline in parentheses")
        figure.set_size_inches(10, 5.4 + 0.19 * math.ceil(len(kernels) / columns))
        figure.savefig(out, dpi=110)
    return out


def _plot_ceilings(axes: Any, measured: dict[tuple[str, str, str, int], float], low: float, high: float) -> None:
    styles = {"float32": "-", "tf32": "-.", "bfloat16": "--"}
    for (kind, precision, device, threads), peak in measured.items():
        copy = measured.get(("copy", "", device, threads))
        if kind != "product" or copy is None:
            continue
        points = [low, peak / copy, high]
        axes.plot(points, [min(copy * x, peak) for x in points], styles[precision], color=MUTED, linewidth=1.1)
        where = "GPU" if device == "cuda" else f"{threads} thread{'s' * (threads > 1)}"
        text = f"{precision}, {where}"
        axes.annotate(text, (high, peak), xytext=(0, 3), textcoords="offset points", ha="right", fontsize=7.5)


def _plot_kernels(axes: Any, kernels: Sequence[Roof]) -> None:
    colours = [*COLOURS.values(), "#7a5ba8", "#b3402e", "#2b8c8c"]
    names = list(dict.fromkeys(_kernel_name(roof.result) for roof in kernels))
    for i, roof in enumerate(kernels):
        r = roof.result
        share = 100 * (roof.floor or 0) / r.median
        label = f"{r.group}: {r.form} ({share:.0f} %)"
        colour = colours[names.index(_kernel_name(r)) % len(colours)]
        marker = _MARKERS[i % len(_MARKERS)]
        face = colour if r.ours else "none"
        y = r.extra["operations"] / r.median
        axes.scatter(_intensity(r), y, 46, marker=marker, edgecolors=colour, facecolors=face, label=label, zorder=3)


def _intensity(r: Result) -> float:
    return float(r.extra["operations"] / r.extra["bytes"])


def _kernel_name(r: Result) -> str:
    return r.group.partition(",")[0]
