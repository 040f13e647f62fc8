"""Scores as horizontal bars, each with a dark mark at its baseline: retrieval, linear probes, hard negatives."""

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
_PREDICATES = 12  # shown by name
_BAR = 0.24  # inches


@dataclass(frozen=True)
class Bar:
    """A share and its baseline, both in [0, 1]; `spread` is drawn as an error bar."""

    name: str
    share: float
    baseline: float
    spread: float = 0.0


@dataclass(frozen=True)
class Group:
    """Bars under one label."""

    label: str
    colour: str
    bars: Sequence[Bar]


def recall_bars(result: RetrievalResult, out: Path) -> Path:
    """Draw recall at k: one panel per direction, one group of bars per level."""
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
    """Draw probe accuracies: one group of bars per task; error bars are the standard deviation over seeds."""
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
    """Draw the accuracy on each kind of negative, then on the most frequent true predicates."""
    colours: dict[str, str] = dict(zip(KINDS, _KIND_COLOURS, strict=True))
    kinds = {str(kind): words for kind, words in KINDS.items()}

    def group(row: NegativesAccuracy, label: str) -> Group:
        return Group(label, colours[row.kind], [Bar("", row.accuracy, CHANCE)])

    panels = {
        "Share of pairs with the true text scored higher": [
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
    """Draw `panels` (title -> groups) below each other; `baseline` names the dark marks."""
    panels = {title: groups for title, groups in panels.items() if groups}
    heights = [0.75 + sum(_height(group) for group in groups) for groups in panels.values()]
    with canvas(out, 9.5, sum(heights), pad=0.1) as figure:
        axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for panel, (title, groups) in zip(axes, panels.items(), strict=True):
            _panel(panel, groups, baseline)
            panel.set_title(title)
    return out


def _height(group: Group) -> float:
    """Inches: as high as its bars or its label need."""
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
    axes.barh(y, 100 * bar.share, 0.86 * _BAR, color=colour, alpha=alpha)
    axes.plot([100 * bar.baseline] * 2, [y - 0.43 * _BAR, y + 0.43 * _BAR], color=INK, linewidth=2.2)
    label = f"{bar.name}  {100 * bar.share:.1f}".strip()
    if bar.spread:
        axes.errorbar(100 * bar.share, y, xerr=100 * bar.spread, color=INK, linewidth=1, capsize=2)
        label += f" ± {100 * bar.spread:.1f}"
    end = 100 * max(bar.share + bar.spread, bar.baseline)
    axes.text(end + 1, y, f"{label} %", va="center", fontsize=7.5)
