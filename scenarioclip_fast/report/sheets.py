"""Sheets of sample scenes: the views of the model, and its predictions."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scenarioclip_fast.eval.samples import Prediction, SampleScene
from scenarioclip_fast.eval.tables import TASKS
from scenarioclip_fast.report.style import AMBER, COLOURS, CORRECT, CROSS, MUTED, TICK, WRONG, canvas
from scenarioclip_fast.terminal import printable

_HEADINGS = {"global": "Action: global view", "object": "Object views", "relation": "Relation views"}


def sample_sheet(samples: Sequence[SampleScene], out: Path, *, objects: int = 3, relations: int = 3) -> Path:
    """Draw one row per scene: its global view, then its first object and relation views.

    Below each view are its true text and the top predictions with their cosine similarities. Frame colour: green if the
    top prediction is correct, amber if a lower one is, red otherwise.

    Raises:
        ValueError: no samples.
    """
    _require_samples(samples)
    objects = min(objects, max(len(sample.objects) for sample in samples))
    relations = min(relations, max(len(sample.relations) for sample in samples))
    columns = 1 + objects + relations
    side, gap, between, text, head = 2.0, 0.12, 0.2, 0.86, 0.36  # inches
    first_column = {"global": 0, "object": 1, "relation": 1 + objects}
    lefts = [gap + column * (side + gap) + between * ((column > 0) + (column > objects)) for column in range(columns)]
    width, height = lefts[-1] + side + gap, head + len(samples) * (side + text)
    with canvas(out, width, height) as figure:
        for row, sample in enumerate(samples):
            bottom = height - head - row * (side + text) - side
            views = {
                "global": [sample.action] if sample.action else [],
                "object": sample.objects[:objects],
                "relation": sample.relations[:relations],
            }
            for level, predictions in views.items():
                for left, prediction in zip(lefts[first_column[level] :], predictions, strict=False):
                    axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
                    _view(axes, prediction)
                    _caption_below(axes, prediction)
        for level, words in _HEADINGS.items():
            if first_column[level] < columns:
                _heading(figure, lefts[first_column[level]] / width, 1 - 0.2 / height, words, COLOURS[level])
    return out


def nearest_sheet(samples: Sequence[SampleScene], out: Path) -> Path:
    """Draw one row per scene: its global, first object and first relation view, each with its nearest texts.

    The true text is highlighted; if it is not among the nearest texts, it is shown below them with its rank.

    Raises:
        ValueError: no samples.
    """
    _require_samples(samples)
    rows = [{"global": [s.action] if s.action else [], "object": s.objects, "relation": s.relations} for s in samples]
    levels = [level for level in rows[0] if any(row[level] for row in rows)]
    side, words, gap, head = 1.5, 2.75, 0.2, 0.4  # inches
    width, height = gap + len(levels) * (side + words + gap), head + len(rows) * (side + gap)
    with canvas(out, width, height) as figure:
        for column, level in enumerate(levels):
            left = gap + column * (side + words + gap)
            title = f"{TASKS[level].capitalize()}: nearest texts by cosine similarity"
            _heading(figure, left / width, 1 - 0.2 / height, title, COLOURS[level])
            for line, row in enumerate(rows):
                if not row[level]:
                    continue
                bottom = (height - head - line * (side + gap) - side) / height
                view = figure.add_axes((left / width, bottom, side / width, side / height))
                bars = figure.add_axes(((left + side + 0.08) / width, bottom, words / width, side / height))
                _view(view, row[level][0])
                _caption_beside(bars, row[level][0], COLOURS[level])
    return out


def _require_samples(samples: Sequence[SampleScene]) -> None:
    if not samples:
        raise ValueError("samples: got none, expected at least one scene")


def _heading(figure: Any, x: float, y: float, words: str, colour: str) -> None:
    figure.text(x, y, words, color=colour, fontsize=9.5, fontweight="bold", va="center")


def _view(axes: Any, prediction: Prediction) -> None:
    axes.imshow(prediction.picture.numpy(), interpolation="bicubic")
    axes.set(xticks=[], yticks=[])
    found = any(text == prediction.truth for text, _ in prediction.top_texts)
    for spine in axes.spines.values():
        spine.set(visible=True, color=CORRECT if prediction.correct else AMBER if found else WRONG, linewidth=2)


def _caption_below(axes: Any, prediction: Prediction) -> None:
    if prediction.held_out:
        tag = {"facecolor": AMBER, "edgecolor": "none", "boxstyle": "round,pad=0.25"}
        axes.text(0.97, 0.95, "held out", transform=axes.transAxes, ha="right", va="top", fontsize=6, bbox=tag)
    truth = textwrap.shorten(printable(prediction.truth), 38, placeholder="\u2026")
    axes.text(0, -0.035, truth, transform=axes.transAxes, va="top", fontsize=6.9, fontweight="bold")
    for line, (text, score) in enumerate(prediction.top_texts):
        correct = text == prediction.truth
        guess = textwrap.shorten(
            printable(f"{TICK if correct else CROSS} {score:.2f} {text}"), 40, placeholder="\u2026"
        )
        y = -0.115 - 0.075 * line
        axes.text(0, y, guess, transform=axes.transAxes, va="top", fontsize=6.5, color=CORRECT if correct else WRONG)


def _caption_beside(axes: Any, prediction: Prediction, colour: str) -> None:
    lines = [(text, score, rank) for rank, (text, score) in enumerate(prediction.top_texts, start=1)]
    if prediction.truth_rank > len(lines):
        lines.append((prediction.truth, prediction.truth_score, prediction.truth_rank))
    for y, (text, score, rank) in enumerate(lines):
        true = text == prediction.truth
        axes.barh(y, max(score, 0.0), 0.8, color=CORRECT if true else colour, alpha=0.45 if true else 0.18)
        name = textwrap.shorten(printable(f"{rank}. {text}"), 38, placeholder="…")
        mark = TICK if true and rank == 1 else CROSS if rank == 1 else ""
        weight = "bold" if true else "normal"
        axes.text(0.01, y, f"{mark} {name}".strip(), va="center", fontsize=7, fontweight=weight)
        axes.text(1.12, y, f"{score:.2f}", va="center", ha="right", fontsize=6.5, color=MUTED)
    axes.set_xlim(0, 1.12)
    axes.set_ylim(5.6, -0.6)
    axes.axis("off")
