"""Horizontal bar charts with baselines as dark marks: retrieval, linear probes, hard negatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scenarioclip_fast.eval.negatives import CHANCE, KINDS, NegativesAccuracy, NegativesResult
from scenarioclip_fast.eval.probe import ProbeResult
from scenarioclip_fast.eval.retrieval import DIRECTIONS, RetrievalResult
from scenarioclip_fast.eval.tables import TASKS
from scenarioclip_fast.report.style import COLOURS, INK, MUTED, canvas, horizontal_percent_axes

_KIND_COLOURS = ("#7a5ba8", "#3b8f9c")
_PREDICATES = 12  # maximum number of predicates shown
_BAR = 0.24  # inches per bar


@dataclass(frozen=True)
class Bar:
    """A value and its baseline, both in [0, 1]; `spread` is shown as an error bar."""

    name: str
    value: float
    baseline: float
    spread: float = 0.0


@dataclass(frozen=True)
class Group:
    """Bars with a common label."""

    label: str
    colour: str
    bars: Sequence[Bar]


def recall_bars(result: RetrievalResult, out: Path) -> Path:
    """Plot recall at k, with one panel per direction and one group of bars per level."""
    panels = {
        f"Recall@k, {words}": [
            Group(
                f"{TASKS[row.level]}\n{row.queries} queries, gallery of {row.gallery}\nmedian rank {row.median_rank:g}",
                COLOURS[row.level],
                [Bar(f"R@{k}", row.recall[k], row.chance[k]) for k in result.topk],
            )
            for row in result.rows
            if row.direction == direction
        ]
        for direction, words in DIRECTIONS.items()
    }
    return score_bars(panels, "chance", out)


def probe_bars(result: ProbeResult, out: Path) -> Path:
    """Plot probe accuracies, with one group of bars per task; error bars: standard deviation over seeds."""
    groups = [
        Group(
            f"{TASKS[row.level]}\n{row.views} views, {row.classes} classes\n{row.train_views} training views",
            COLOURS[row.level],
            [Bar(f"top-{k}", row.top[k], row.baseline[k], row.spread[k]) for k in result.topk],
        )
        for row in result.rows
    ]
    return score_bars({f"Linear-probe accuracy, {result.split} split": groups}, "majority", out)


def negatives_bars(result: NegativesResult, out: Path) -> Path:
    """Plot the accuracy for each kind of negative, and for the most frequent true predicates."""
    colours: dict[str, str] = dict(zip(KINDS, _KIND_COLOURS, strict=True))
    kinds = {str(kind): words for kind, words in KINDS.items()}

    def group(row: NegativesAccuracy, label: str) -> Group:
        return Group(label, colours[row.kind], [Bar("", row.accuracy, CHANCE)])

    panels = {
        "Pairs in which the true text scores higher": [
            group(row, f"{kinds[row.kind]}\n{row.questions} pairs") for row in result.rows
        ]
    }
    for kind, words in kinds.items():
        rows = [row for row in result.predicates if row.kind == kind][:_PREDICATES]
        panels[f"{words.capitalize()}, by true predicate"] = [
            group(row, f"{row.predicate} ({row.questions} pair{'s' * (row.questions != 1)})") for row in rows
        ]
    return score_bars(panels, "chance", out)


def score_bars(panels: dict[str, list[Group]], baseline: str, out: Path) -> Path:
    """Plot `panels` (title -> groups) in a column; `baseline` labels the dark marks."""
    panels = {title: groups for title, groups in panels.items() if groups}
    heights = [0.75 + sum(_height(group) for group in groups) for groups in panels.values()]
    with canvas(out, 9.5, sum(heights), pad=0.1) as figure:
        axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for panel, (title, groups) in zip(axes, panels.items(), strict=True):
            _panel(panel, groups, baseline)
            panel.set_title(title)
    return out


def _height(group: Group) -> float:
    """Height in inches, sufficient for the bars and the label."""
    return max(_BAR * len(group.bars), 0.17 * (1 + group.label.count("\n"))) + 0.1


def _panel(axes: Any, groups: Sequence[Group], baseline: str) -> None:
    top, ticks, labelled = 0.0, [], -1.0
    for group in groups:
        height = _height(group)
        ticks.append(top + height / 2)
        first = top + (height - _BAR * len(group.bars)) / 2
        for slot, bar in enumerate(group.bars):
            y = first + (slot + 0.5) * _BAR
            _bar(axes, bar, y, group.colour, 1 - 0.25 * min(slot, 3))
            if bar.baseline != labelled:
                labelled = bar.baseline
                text = f"{baseline} {100 * labelled:.1f} %"
                axes.text(142, y, text, va="center", ha="right", fontsize=7.5, color=MUTED)
        top += height
    horizontal_percent_axes(axes, [group.label for group in groups], ticks, right=143)
    axes.set_ylim(top, 0)


def _bar(axes: Any, bar: Bar, y: float, colour: str, alpha: float) -> None:
    axes.barh(y, 100 * bar.value, 0.86 * _BAR, color=colour, alpha=alpha)
    axes.plot([100 * bar.baseline] * 2, [y - 0.43 * _BAR, y + 0.43 * _BAR], color=INK, linewidth=2.2)
    label = f"{bar.name}  {100 * bar.value:.1f}".strip()
    if bar.spread:
        axes.errorbar(100 * bar.value, y, xerr=100 * bar.spread, color=INK, linewidth=1, capsize=2)
        label += f" ± {100 * bar.spread:.1f}"
    end = 100 * max(bar.value + bar.spread, bar.baseline)
    axes.text(end + 1, y, f"{label} %", va="center", fontsize=7.5)
