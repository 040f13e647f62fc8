"""Training curves of one or several runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scenarioclip_fast.eval.tables import TASKS
from scenarioclip_fast.levels import LEVELS
from scenarioclip_fast.report.style import COLOURS, DISTILLATION, GRID, INK, canvas, run_colours, run_legend

CURVES_NOTE = "Pale: logged values. Solid: moving average over 5 % of the run."
Metrics = Mapping[str, Sequence[Mapping[str, Any]]]  # run -> rows of its metrics.jsonl

_RUN_PANELS = {
    **{f"contrastive/{level}": f"contrastive loss, {TASKS[level]}" for level in LEVELS},
    **{f"temperature/{level}": f"temperature, {TASKS[level]}" for level in LEVELS},
    "distillation": "distillation loss",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "views_per_s": "views per second",
    "data_wait": "time waiting for data",
    "mfu": "model FLOPs utilisation",
    "memory_gib": "peak memory, GiB",
}
_FROM_ZERO = ("views_per_s", "data_wait", "mfu", "memory_gib", "lr")
_FRACTIONS = ("data_wait", "mfu")


def loss_curves(runs: Metrics, out: Path) -> Path:
    """Plot losses and temperatures over the steps, with one row of panels per run (or phase of a run).

    Args:
        runs: name -> rows of metrics.jsonl. Panels without data are omitted.
    """
    panels = {
        "contrastive loss": {f"contrastive/{level}": (TASKS[level], COLOURS[level]) for level in LEVELS},
        "temperature": {f"temperature/{level}": (TASKS[level], COLOURS[level]) for level in LEVELS},
        "distillation loss": {"distillation": ("distillation", DISTILLATION)},
    }
    logged = _logged(runs)
    shown = {title: keys for title, keys in panels.items() if logged & set(keys)}
    with canvas(out, 3.7 * max(len(shown), 1), 3.0 * len(runs), pad=0.05) as figure:
        rows_of_panels = figure.subfigures(len(runs), 1, squeeze=False, hspace=0.06)[:, 0]
        for part, (name, rows) in zip(rows_of_panels, runs.items(), strict=True):
            part.suptitle(name, x=0.01, ha="left", fontsize=11, fontweight="bold")
            for axes, (title, keys) in zip(part.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
                plotted = [_curve(axes, rows, key, *look) for key, look in keys.items()]
                axes.set_visible(any(plotted))
                _step_axis(axes, title, "step", ticks=6)
                axes.set_ylim(bottom=0)
                if sum(plotted) > 1:
                    axes.legend()
    return out


def run_curves(runs: Metrics, out: Path) -> Path:
    """Overlay the metrics of several runs, one panel per metric.

    The metrics are losses and temperatures per level, distillation, gradient norm, learning rate, throughput, time
    waiting for data, and peak memory (of the GPU, or else of the process). Runs with different numbers of views per
    step are plotted against the views seen.

    Args:
        runs: name -> rows of metrics.jsonl. Panels without data are omitted.

    Raises:
        ValueError: no run has logged any step.
    """
    logged = _logged(runs)
    shown = {key: title for key, title in _RUN_PANELS.items() if key in logged}
    if not shown:
        raise ValueError("runs: got no logged steps, expected at least one")
    x_key = _x_axis(runs)
    colours, several = run_colours(runs), len(runs) > 1
    lines, columns = -(-len(shown) // 3), min(3, len(shown))
    with canvas(out, 3.7 * columns, 2.6 * lines + 0.4 * several, pad=0.1) as figure:
        from matplotlib.ticker import PercentFormatter

        grid = figure.subplots(lines, columns, squeeze=False)
        for axes in grid.flat[len(shown) :]:
            axes.set_visible(False)
        for axes, (key, title) in zip(grid.flat, shown.items(), strict=False):
            level_colour = COLOURS.get(key.partition("/")[2], INK)
            for name, rows in runs.items():
                _curve(axes, rows, key, name, colours[name] if several else level_colour, x_key)
            _step_axis(axes, title, "step" if x_key == "step" else "views seen", ticks=5)
            if key in _FROM_ZERO:
                axes.set_ylim(bottom=0)
            if key in _FRACTIONS:
                axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None, symbol=" %"))
        if several:
            run_legend(figure, [*runs])
    return out


def _logged(runs: Metrics) -> set[str]:
    """The metrics with any non-zero value."""
    return {key for rows in runs.values() for row in rows for key in row if row[key]}


def _x_axis(runs: Metrics) -> str:
    """The key of the x axis: "views" if the batch sizes of the runs differ, else "step"."""
    sizes = [rows[-1]["views"] / rows[-1]["step"] for rows in runs.values() if rows and rows[-1].get("views")]
    return "views" if sizes and max(sizes) > 1.1 * min(sizes) else "step"


def _step_axis(axes: Any, title: str, label: str, ticks: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, fontsize=9.5, fontweight="normal")
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=True))
    axes.margins(x=0.01)
    axes.grid(axis="y", color=GRID)


def _curve(
    axes: Any, rows: Sequence[Mapping[str, Any]], key: str, label: str, colour: str, x_key: str = "step"
) -> bool:
    """Plot one metric as logged (pale) and as a moving average; return False if it is 0 throughout."""
    points = [(row[x_key], row[key]) for row in rows if row.get(key) is not None]
    if not any(value for _, value in points):
        return False
    steps, values = map(np.asarray, zip(*points, strict=True))
    # Windows are clipped at both ends.
    half, at = len(values) // 40, np.arange(len(values))
    low, high = (at - half).clip(0), (at + half + 1).clip(max=len(values))
    total = np.concatenate([[0.0], np.cumsum(values)])
    axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
    axes.plot(steps, (total[high] - total[low]) / (high - low), color=colour, linewidth=1.8, label=label)
    return True
