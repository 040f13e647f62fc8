"""Bar charts of zero-shot accuracies, with chance levels as dark marks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from scenarioclip_fast.eval.tables import TASKS
from scenarioclip_fast.eval.zeroshot import Accuracy, ZeroShotResult
from scenarioclip_fast.levels import LEVELS
from scenarioclip_fast.report.style import (
    COLOURS,
    GRID,
    INK,
    MUTED,
    canvas,
    horizontal_percent_axes,
    run_colours,
    run_legend,
)

MATCH_TITLES = {"own": "strict", "any_in_image": "any text of the image"}
_PANEL_TITLES = {"own": "Strict: only the view's own text counts", "any_in_image": "Any text of the image counts"}
_SUBSETS = {"all": "", "seen": "\nseen in training", "held_out": "\nheld out"}


def accuracy_bars(result: ZeroShotResult, out: Path) -> Path:
    """Plot all accuracies of one evaluation, with one panel per matching rule."""
    groups = {match: rows for match in _PANEL_TITLES if (rows := result.only(match).rows)}
    count = max(len(rows) for rows in groups.values())
    row = max(0.66, 0.06 + 0.18 * len(result.topk))  # inches, leaving room for the labels
    with canvas(out, 9.5, (0.9 + row * count) * len(groups), pad=0.12) as figure:
        panels = figure.subplots(len(groups), 1, squeeze=False)[:, 0]
        for axes, (match, rows) in zip(panels, groups.items(), strict=True):
            _bars(axes, rows, result.topk)
            axes.set_title(_PANEL_TITLES[match])
    return out


def _bars(axes: Any, rows: Sequence[Accuracy], topk: Sequence[int]) -> None:
    height = 0.8 / len(topk)
    for position, row in enumerate(rows):
        for slot, k in enumerate(topk):
            y = position - 0.4 + (slot + 0.5) * height
            value, chance = 100 * row.top[k], 100 * row.chance[k]
            axes.barh(y, value, height * 0.86, color=COLOURS[row.level], alpha=1 - 0.3 * min(slot, 2))
            axes.plot([chance, chance], [y - height * 0.43, y + height * 0.43], color=INK, linewidth=2.2)
            axes.text(max(value, chance) + 1, y, f"top-{k}  {value:.1f} %", va="center", fontsize=7.5)
            axes.text(137, y, f"chance {chance:.1f} %", va="center", ha="right", fontsize=7.5, color=MUTED)
    labels = [f"{TASKS[row.level]}{_SUBSETS[row.subset]}\n{row.views} views, {row.classes} texts" for row in rows]
    horizontal_percent_axes(axes, labels, range(len(rows)), right=138)
    axes.set_ylim(len(rows) - 0.45, -0.55)


def accuracy_comparison(results: Mapping[str, ZeroShotResult], out: Path) -> Path:
    """Plot the accuracies of several runs side by side, with one panel per matching rule and task.

    Args:
        results: run -> result. Only rows over all texts are shown, not those over seen or held-out texts.
        out: the PNG to write.
    """
    rows = {(name, row.match, row.level): row for name, r in results.items() for row in r.rows if row.subset == "all"}
    matches = [match for match in MATCH_TITLES if any(key[1] == match for key in rows)]
    levels = [level for level in LEVELS if any(key[2] == level for key in rows)]
    with canvas(out, 3.7 * len(levels), 2.5 * len(matches) + 0.4, pad=0.1) as figure:
        grid = figure.subplots(len(matches), len(levels), squeeze=False)
        for (i, match), (j, level) in product(enumerate(matches), enumerate(levels)):
            _comparison_panel(grid[i, j], {name: rows.get((name, match, level)) for name in results})
            grid[i, j].set_title(f"{TASKS[level]}, {MATCH_TITLES[match]}", fontsize=9.5, fontweight="normal")
        run_legend(figure, [*results])
    return out


def _comparison_panel(axes: Any, rows: Mapping[str, Accuracy | None]) -> None:
    """Draw one group of bars per k, with one bar per run."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    colours, width = run_colours(rows), 0.84 / len(rows)
    # The white box keeps the value readable where it overlaps the chance mark.
    small: Any = {"textcoords": "offset points", "ha": "center", "fontsize": 6.5, "color": MUTED}
    small["bbox"] = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.4}
    topk = sorted({k for row in rows.values() if row for k in row.top})
    for slot, (name, row) in enumerate(rows.items()):
        for group, k in enumerate(topk):
            if row is None or k not in row.top:
                continue
            x, value, chance = group - 0.42 + (slot + 0.5) * width, 100 * row.top[k], 100 * row.chance[k]
            axes.bar(x, value, width * 0.92, color=colours[name])
            axes.plot([x - 0.46 * width, x + 0.46 * width], [chance, chance], color=INK, linewidth=1.6)
            axes.annotate(f"{value:.0f}", (x, value), (0, 2), **small)
    axes.set_xticks(range(len(topk)), [f"top-{k}" for k in topk])
    axes.yaxis.set_major_formatter(PercentFormatter(decimals=0, symbol=" %"))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.set_ylim(0, 1.1 * axes.dataLim.y1)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
