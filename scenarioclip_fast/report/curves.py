"""Pictures of a run: loss curves, accuracies against chance, a sheet of scenes with the model's answers.

matplotlib is imported when a picture is drawn, always with the Agg canvas and never through pyplot, so
drawing needs no display and leaves the caller's matplotlib alone.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from scenarioclip_fast.data.vocabulary import LEVELS
from scenarioclip_fast.eval.samples import Answer, SampleScene
from scenarioclip_fast.eval.zeroshot import TASKS, Accuracy, ZeroShotResult
from scenarioclip_fast.requirements import require

COLOURS = {"global": "#3b6ea8", "object": "#cf7a30", "relation": "#3f8f63"}
_RUN_COLOURS = ("#3b6ea8", "#cf7a30", "#3f8f63", "#b3402e", "#7a5ba8", "#4aa3a3", "#c2578f", "#8a6d3b", "#6b7480")
MATCH_TITLES = {"own": "strict", "any_in_image": "any text of the image"}
TICK, CROSS = "\u2713", "\u2717"
INK, MUTED, GRID = "#22272e", "#6b7480", "#e3e7ec"
RIGHT, AMBER, WRONG = "#2b7a4b", "#d9a036", "#b3402e"
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": "#aab2bc",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


def loss_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], out: Path) -> Path:
    """Draws losses and temperatures over the steps, one row of panels per run (or phase of a run).

    `runs` maps a name to the rows of its metrics.jsonl. Panels without data are left out.
    """
    require("matplotlib")
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = {
        "contrastive loss": {f"contrastive/{level}": (TASKS[level], COLOURS[level]) for level in LEVELS},
        "temperature": {f"temperature/{level}": (TASKS[level], COLOURS[level]) for level in LEVELS},
        "distillation loss": {"distillation": ("distillation", "#7a5ba8")},
    }
    logged = {key for rows in runs.values() for row in rows for key in row if row[key]}
    shown = {title: keys for title, keys in panels.items() if logged & set(keys)}
    with rc_context(STYLE):
        figure = Figure(figsize=(3.7 * max(len(shown), 1), 3.0 * len(runs)), layout="constrained")
        parts = figure.subfigures(len(runs), 1, squeeze=False, hspace=0.06)[:, 0]
        for part, (name, rows) in zip(parts, runs.items(), strict=True):
            part.suptitle(name, x=0.01, ha="left", fontsize=11, fontweight="bold")
            for axes, (title, keys) in zip(part.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
                drawn = [_curve(axes, rows, key, *look) for key, look in keys.items()]
                axes.set_visible(any(drawn))
                axes.set_title(title, fontsize=9.5, fontweight="normal")
                axes.set_xlabel("step")
                axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
                axes.set_ylim(bottom=0)
                axes.margins(x=0.01)
                axes.grid(axis="y", color=GRID)
                if sum(drawn) > 1:
                    axes.legend()
        return _save(figure, out)


def run_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], out: Path) -> Path:
    """Draws the metrics of several runs over each other, a panel each: losses and temperatures per level,
    distillation, gradient norm, learning rate, speed, waiting for data and memory (of the GPU; without one, of the
    process).

    `runs` maps a name to the rows of its metrics.jsonl. Panels without data are left out. Runs whose steps see
    different numbers of views are drawn over the views seen.
    """
    require("matplotlib")
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    panels = {
        **{f"contrastive/{level}": f"contrastive loss, {TASKS[level]}" for level in LEVELS},
        **{f"temperature/{level}": f"temperature, {TASKS[level]}" for level in LEVELS},
        "distillation": "distillation loss",
        "grad_norm": "gradient norm",
        "lr": "learning rate",
        "views_per_s": "views per second",
        "data_wait": "time spent waiting for data",
        "mfu": "model FLOP/s utilisation",
        "memory_gib": "peak memory, GiB",
    }
    logged = {key for rows in runs.values() for row in rows for key in row if row[key]}
    shown = {key: title for key, title in panels.items() if key in logged}
    if not shown:
        raise ValueError("runs: got no logged step, expected at least one")
    sizes = [rows[-1]["views"] / rows[-1]["step"] for rows in runs.values() if rows and rows[-1].get("views")]
    over = "views" if sizes and max(sizes) > 1.1 * min(sizes) else "step"
    colours = run_colours(runs)
    lines, columns = -(-len(shown) // 3), min(3, len(shown))
    with rc_context(STYLE):
        figure = Figure(figsize=(3.7 * columns, 2.6 * lines + 0.4 * (len(runs) > 1)))
        figure.set_layout_engine("constrained", h_pad=0.1)
        grid = figure.subplots(lines, columns, squeeze=False)
        for axes in grid.flat[len(shown) :]:
            axes.set_visible(False)
        for axes, (key, title) in zip(grid.flat, shown.items(), strict=False):
            level = COLOURS.get(key.partition("/")[2], INK)
            for name, rows in runs.items():
                _curve(axes, rows, key, name, colours[name] if len(runs) > 1 else level, over)
            axes.set_title(title, fontsize=9.5, fontweight="normal")
            axes.set_xlabel(over if over == "step" else "views seen")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.margins(x=0.01)
            axes.grid(axis="y", color=GRID)
            if key in ("views_per_s", "data_wait", "mfu", "memory_gib", "lr"):
                axes.set_ylim(bottom=0)
            if key in ("data_wait", "mfu"):
                axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        if len(runs) > 1:
            handles = [Line2D([], [], color=colours[name], linewidth=2.5, label=name) for name in runs]
            figure.legend(handles=handles, loc="outside upper left", ncols=min(len(runs), 6), fontsize=9.5)
        return _save(figure, out)


def run_colours(names: Iterable[str]) -> dict[str, str]:
    """The colour of each run, the same in every picture of a page."""
    return {name: _RUN_COLOURS[k % len(_RUN_COLOURS)] for k, name in enumerate(names)}


def _curve(axes: Any, rows: Sequence[Mapping[str, Any]], key: str, label: str, colour: str, over: str = "step") -> bool:
    """One metric as logged (pale) and smoothed over a twentieth of the run; False where it is 0 throughout."""
    points = [(row[over], row[key]) for row in rows if row.get(key) is not None]
    if not any(value for _, value in points):
        return False
    steps, values = map(np.asarray, zip(*points, strict=True))
    # a window that hangs over an end averages what is there
    half, at = len(values) // 40, np.arange(len(values))
    low, high = (at - half).clip(0), (at + half + 1).clip(max=len(values))
    total = np.concatenate([[0.0], np.cumsum(values)])
    axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
    axes.plot(steps, (total[high] - total[low]) / (high - low), color=colour, linewidth=1.8, label=label)
    return True


def accuracy_comparison(results: Mapping[str, ZeroShotResult], out: Path) -> Path:
    """Draws the accuracies of several runs side by side, a panel per matching rule and task, chance as dark marks.

    `results` maps a run's name to its result. The rows of all texts are drawn.
    """
    require("matplotlib")
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    rows = {(name, row.match, row.level): row for name, r in results.items() for row in r.rows if row.subset == "all"}
    matches = [match for match in MATCH_TITLES if any(key[1] == match for key in rows)]
    levels = [level for level in LEVELS if any(key[2] == level for key in rows)]
    colours, width = run_colours(results), 0.84 / len(results)
    # above its bar, and readable where it meets the mark of chance
    small: Any = {"textcoords": "offset points", "ha": "center", "fontsize": 6.5, "color": MUTED}
    small["bbox"] = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.4}
    with rc_context(STYLE):
        figure = Figure(figsize=(3.7 * len(levels), 2.5 * len(matches) + 0.4))
        figure.set_layout_engine("constrained", h_pad=0.1)
        grid = figure.subplots(len(matches), len(levels), squeeze=False)
        for (i, match), (j, level) in product(enumerate(matches), enumerate(levels)):
            axes = grid[i, j]
            topk = sorted({k for name in results if (row := rows.get((name, match, level))) for k in row.top})
            for slot, name in enumerate(results):
                row = rows.get((name, match, level))
                for group, k in enumerate(topk):
                    if row is None or k not in row.top:
                        continue
                    x, value, chance = group - 0.42 + (slot + 0.5) * width, 100 * row.top[k], 100 * row.chance[k]
                    axes.bar(x, value, width * 0.92, color=colours[name])
                    axes.plot([x - 0.46 * width, x + 0.46 * width], [chance, chance], color=INK, linewidth=1.6)
                    axes.annotate(f"{value:.0f}", (x, value), (0, 2), **small)
            axes.set_title(f"{TASKS[level]}, {MATCH_TITLES[match]}", fontsize=9.5, fontweight="normal")
            axes.set_xticks(range(len(topk)), [f"top-{k}" for k in topk])
            axes.yaxis.set_major_formatter(PercentFormatter(decimals=0))
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.set_ylim(0, 1.1 * axes.dataLim.y1)
            axes.tick_params(axis="x", length=0)
            axes.grid(axis="y", color=GRID)
            axes.set_axisbelow(True)
        handles = [Patch(color=colours[name], label=name) for name in results]
        figure.legend(handles=handles, loc="outside upper left", ncols=min(len(results), 6), fontsize=9.5)
        return _save(figure, out)


def accuracy_bars(result: ZeroShotResult, out: Path) -> Path:
    """Draws every accuracy as a bar with the chance level as a dark mark, one panel per matching rule."""
    require("matplotlib")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    titles = {"own": "strict: the view's own text", "any_in_image": "any text of the image counts"}
    with rc_context(STYLE):
        groups = {match: rows for match in titles if (rows := result.only(match).rows)}
        count = max(len(rows) for rows in groups.values())
        figure = Figure(figsize=(9.5, (0.9 + 0.66 * count) * len(groups)))
        figure.set_layout_engine("constrained", h_pad=0.12)
        panels = figure.subplots(len(groups), 1, squeeze=False)[:, 0]
        for axes, (match, rows) in zip(panels, groups.items(), strict=True):
            _bars(axes, rows, result.topk)
            axes.set_title(titles[match])
        return _save(figure, out)


def _bars(axes: Any, rows: Sequence[Accuracy], topk: Sequence[int]) -> None:
    height = 0.8 / len(topk)
    for position, row in enumerate(rows):
        for slot, k in enumerate(topk):
            y = position - 0.4 + (slot + 0.5) * height
            value, chance = 100 * row.top[k], 100 * row.chance[k]
            shade = 1 - 0.3 * slot
            axes.barh(y, value, height * 0.86, color=COLOURS[row.level], alpha=shade)
            axes.plot([chance, chance], [y - height * 0.43, y + height * 0.43], color=INK, linewidth=2.2)
            axes.text(max(value, chance) + 1, y, f"top-{k}  {value:.1f} %", va="center", fontsize=7.5)
            axes.text(137, y, f"chance {chance:.1f} %", va="center", ha="right", fontsize=7.5, color=MUTED)
    names = {"all": "", "seen": "\nseen in training", "held_out": "\nheld out"}
    labels = [f"{TASKS[row.level]}{names[row.subset]}\n{row.views} views, {row.classes} texts" for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.set_xticks(range(0, 101, 20), [f"{tick} %" for tick in range(0, 101, 20)])
    axes.set_xlim(0, 138)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)


def sample_sheet(samples: Sequence[SampleScene], out: Path, *, objects: int = 3, relations: int = 3) -> Path:
    """Draws one row per scene: the global view, then its first object views, then its first relation views.

    Under each view stand its true text and the model's best guesses with their cosine. A green frame: the
    best guess is right; an amber one: a later guess is; a red one: none is.
    """
    require("matplotlib")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    if not samples:
        raise ValueError("samples: got none, expected at least one scene")
    objects = min(objects, max(len(sample.objects) for sample in samples))
    relations = min(relations, max(len(sample.relations) for sample in samples))
    columns = 1 + objects + relations
    side, gap, between, text, head = 2.0, 0.12, 0.2, 0.86, 0.36  # inches
    column_of = {"global": 0, "object": 1, "relation": 1 + objects}
    lefts = [gap + column * (side + gap) + between * ((column > 0) + (column > objects)) for column in range(columns)]
    width, height = lefts[-1] + side + gap, head + len(samples) * (side + text)
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        for row, sample in enumerate(samples):
            top = height - head - row * (side + text)
            views = {
                "global": [sample.action],
                "object": sample.objects[:objects],
                "relation": sample.relations[:relations],
            }
            for level, answers in views.items():
                for left, answer in zip(lefts[column_of[level] :], answers, strict=False):
                    axes = figure.add_axes((left / width, (top - side) / height, side / width, side / height))
                    _tile(axes, answer)
        heads = {
            "global": "action: global view",
            "object": "object views",
            "relation": "relation views",
        }
        for level, words in heads.items():
            if column_of[level] < columns:
                x = lefts[column_of[level]] / width
                figure.text(
                    x,
                    1 - 0.2 / height,
                    words,
                    color=COLOURS[level],
                    fontsize=9.5,
                    fontweight="bold",
                    va="center",
                )
        return _save(figure, out)


def _tile(axes: Any, answer: Answer) -> None:
    axes.imshow(answer.picture.numpy(), interpolation="bicubic")
    axes.set(xticks=[], yticks=[])
    found = any(text == answer.truth for text, _ in answer.guesses)
    for spine in axes.spines.values():
        spine.set(visible=True, color=RIGHT if answer.right else AMBER if found else WRONG, linewidth=2)
    truth = textwrap.shorten(answer.truth, 38, placeholder="\u2026")
    if answer.held_out:
        tag = {"facecolor": AMBER, "edgecolor": "none", "boxstyle": "round,pad=0.25"}
        axes.text(0.97, 0.95, "held out", transform=axes.transAxes, ha="right", va="top", fontsize=6, bbox=tag)
    axes.text(0, -0.035, truth, transform=axes.transAxes, va="top", fontsize=6.9, fontweight="bold")
    for line, (text, score) in enumerate(answer.guesses):
        right = text == answer.truth
        guess = textwrap.shorten(f"{TICK if right else CROSS} {score:.2f} {text}", 40, placeholder="\u2026")
        y = -0.115 - 0.075 * line
        axes.text(0, y, guess, transform=axes.transAxes, va="top", fontsize=6.5, color=RIGHT if right else WRONG)


def _save(figure: Any, out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150, facecolor="white")
    return out
