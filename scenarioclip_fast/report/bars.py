"""Shares as bars, each with a dark mark at what would be had without the model: recalls, probes, preferences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scenarioclip_fast.eval.negatives import CHANCE, KINDS, NegativesResult, Preference
from scenarioclip_fast.eval.probe import ProbeResult
from scenarioclip_fast.eval.retrieval import DIRECTIONS, RetrievalResult
from scenarioclip_fast.eval.zeroshot import TASKS
from scenarioclip_fast.report.curves import COLOURS, GRID, INK, MUTED, STYLE
from scenarioclip_fast.requirements import require

_SHADES = ("#7a5ba8", "#3b8f9c")
_PREDICATES = 12  # shown by name


@dataclass(frozen=True)
class Bar:
    """One share and the mark beside it, both in [0, 1]; `spread` is drawn as a whisker."""

    name: str
    share: float
    mark: float
    spread: float = 0.0


@dataclass(frozen=True)
class Group:
    """Bars that belong together, under one label."""

    label: str
    colour: str
    bars: Sequence[Bar]


def recall_bars(result: RetrievalResult, out: Path) -> Path:
    """One panel per direction, one group of bars per level."""
    panels = {
        f"{words}: is {'the right text' if direction == 'image_to_text' else 'a right view'} among the first k?": [
            Group(
                f"{TASKS[row.level]}\n{row.queries} queries, gallery {row.gallery}\nmedian rank {row.median_rank:g}",
                COLOURS[row.level],
                [Bar(f"R@{k}", row.recall[k], row.chance[k]) for k in result.topk],
            )
            for row in result.rows
            if row.direction == direction
        ]
        for direction, words in DIRECTIONS.items()
    }
    return share_bars(panels, "chance", out)


def probe_bars(result: ProbeResult, out: Path) -> Path:
    """One group of bars per task; whiskers are the standard deviation over seeds."""
    groups = [
        Group(
            f"{TASKS[row.level]}\n{row.views} views, {row.classes} classes\n{row.train_views} to train on",
            COLOURS[row.level],
            [Bar(f"top-{k}", row.top[k], row.baseline[k], row.spread[k]) for k in result.topk],
        )
        for row in result.rows
    ]
    return share_bars({"linear probes": groups}, "most frequent", out)


def preference_bars(result: NegativesResult, out: Path) -> Path:
    """The accuracy of each kind, then those of the most frequent true predicates."""
    colour = dict(zip(KINDS, _SHADES, strict=True))

    def group(row: Preference, label: str) -> Group:
        return Group(label, colour[row.kind], [Bar("", row.accuracy, CHANCE)])  # type: ignore[index]

    panels = {
        "true text preferred to a hard negative": [
            group(row, f"{KINDS[row.kind]}\n{row.questions} questions")  # type: ignore[index]
            for row in result.rows
        ]
    }
    for kind, words in KINDS.items():
        rows = [row for row in result.predicates if row.kind == kind][:_PREDICATES]
        panels[f"{words}: by true predicate, and the number of questions"] = [
            group(row, f"{row.predicate}: {row.questions}") for row in rows
        ]
    return share_bars(panels, "chance", out)


def share_bars(panels: dict[str, list[Group]], mark: str, out: Path) -> Path:
    """Draws `panels` (title -> groups) below each other; `mark` is the word for the dark marks."""
    require("matplotlib")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    panels = {title: groups for title, groups in panels.items() if groups}
    heights = [0.75 + sum(_height(group) for group in groups) for groups in panels.values()]
    with rc_context(STYLE):
        figure = Figure(figsize=(9.5, sum(heights)))
        figure.set_layout_engine("constrained", h_pad=0.1)
        axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for one, (title, groups) in zip(axes, panels.items(), strict=True):
            _draw(one, groups, mark)
            one.set_title(title)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=150, facecolor="white")
    return out


def _height(group: Group) -> float:
    """Inches: as high as its bars or its label need."""
    return max(0.24 * len(group.bars), 0.17 * (1 + group.label.count("\n"))) + 0.1


def _draw(axes: Any, groups: Sequence[Group], mark: str) -> None:
    top, ticks, said = 0.0, [], -1.0
    for group in groups:
        height, bar = _height(group), 0.24
        ticks.append(top + height / 2)
        first = top + (height - bar * len(group.bars)) / 2
        for slot, one in enumerate(group.bars):
            y = first + (slot + 0.5) * bar
            axes.barh(y, 100 * one.share, 0.86 * bar, color=group.colour, alpha=1 - 0.25 * min(slot, 3))
            axes.plot([100 * one.mark] * 2, [y - 0.43 * bar, y + 0.43 * bar], color=INK, linewidth=2.2)
            end = 100 * max(one.share + one.spread, one.mark)
            words = f"{one.name}  {100 * one.share:.1f}".strip()
            if one.spread:
                axes.errorbar(100 * one.share, y, xerr=100 * one.spread, color=INK, linewidth=1, capsize=2)
                words += f" ± {100 * one.spread:.1f}"
            axes.text(end + 1, y, f"{words} %", va="center", fontsize=7.5)
            if one.mark != said:
                said = one.mark
                axes.text(142, y, f"{mark} {100 * said:.1f} %", va="center", ha="right", fontsize=7.5, color=MUTED)
        top += height
    axes.set_yticks(ticks, [group.label for group in groups], fontsize=8)
    axes.set_xticks(range(0, 101, 20), [f"{tick} %" for tick in range(0, 101, 20)])
    axes.set_xlim(0, 143)
    axes.set_ylim(top, 0)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
