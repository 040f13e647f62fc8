"""Pictures of an embedding: the t-SNE map of a level, and views with their nearest texts."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scenarioclip_fast.eval.samples import Answer, SampleScene
from scenarioclip_fast.eval.tsne import EmbeddingMap
from scenarioclip_fast.eval.zeroshot import TASKS
from scenarioclip_fast.report.curves import AMBER, COLOURS, CROSS, GRID, MUTED, RIGHT, STYLE, TICK, WRONG
from scenarioclip_fast.requirements import require

_MARKERS = "os^Dv"  # one for each ten colours


def map_picture(found: EmbeddingMap, out: Path) -> Path:
    """Scatters the views, a colour and a marker per class, the legend in the order of frequency."""
    require("matplotlib")
    from matplotlib import colormaps, rc_context
    from matplotlib.figure import Figure

    colours = colormaps["tab10"].colors  # type: ignore[attr-defined]
    x, y, label = np.asarray(found.x), np.asarray(found.y), np.asarray(found.label)
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 7), layout="constrained")
        axes = figure.add_subplot()
        for i, name in enumerate(found.classes):
            own = label == i
            axes.scatter(
                x[own],
                y[own],
                s=min(40, max(10, 12_000 / len(x))),
                color=colours[i % 10],
                marker=_MARKERS[i // 10 % len(_MARKERS)],
                edgecolor="white",
                linewidth=0.4,
                label=f"{textwrap.shorten(name, 34, placeholder='…')}  ({own.sum()})",
            )
        axes.set(xticks=[], yticks=[])
        axes.set_aspect("equal", adjustable="datalim")
        for spine in axes.spines.values():
            spine.set(visible=True, color=GRID)
        axes.set_title(f"t-SNE of {len(x)} {TASKS[found.level]} embeddings, {found.split} split")
        axes.set_xlabel(
            f"nearest neighbour of the same class: {100 * found.agreement:.0f} % (chance {100 * found.chance:.0f} %)"
        )
        figure.legend(loc="outside right upper", ncols=1 + (len(found.classes) - 1) // 32, markerscale=1.4)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=150, facecolor="white")
    return out


def nearest_sheet(samples: Sequence[SampleScene], out: Path) -> Path:
    """One row per scene: its global view, its first object and its first relation view, each with its nearest texts.

    The true text is marked; where it is not among the nearest it follows below, with its rank.
    """
    require("matplotlib")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    if not samples:
        raise ValueError("samples: got none, expected at least one scene")
    rows = [{"global": [s.action], "object": s.objects, "relation": s.relations} for s in samples]
    levels = [level for level in rows[0] if any(row[level] for row in rows)]
    side, words, gap, head = 1.5, 2.35, 0.2, 0.4  # inches
    width, height = gap + len(levels) * (side + words + gap), head + len(rows) * (side + gap)
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        for column, level in enumerate(levels):
            left = gap + column * (side + words + gap)
            figure.text(
                left / width,
                1 - 0.2 / height,
                f"{TASKS[level]}: nearest texts by cosine",
                color=COLOURS[level],
                fontsize=9.5,
                fontweight="bold",
                va="center",
            )
            for line, row in enumerate(rows):
                if not row[level]:
                    continue
                bottom = height - head - line * (side + gap) - side
                view = figure.add_axes((left / width, bottom / height, side / width, side / height))
                bars = figure.add_axes(((left + side + 0.08) / width, bottom / height, words / width, side / height))
                _view(view, row[level][0])
                _texts(bars, row[level][0], COLOURS[level])
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=150, facecolor="white")
    return out


def _view(axes: Any, answer: Answer) -> None:
    axes.imshow(answer.picture.numpy(), interpolation="bicubic")
    axes.set(xticks=[], yticks=[])
    near = answer.truth_rank <= len(answer.guesses)
    for spine in axes.spines.values():
        spine.set(visible=True, color=RIGHT if answer.right else AMBER if near else WRONG, linewidth=2)


def _texts(axes: Any, answer: Answer, colour: str) -> None:
    lines = [(text, score, rank) for rank, (text, score) in enumerate(answer.guesses, start=1)]
    if answer.truth_rank > len(lines):
        lines.append((answer.truth, answer.truth_score, answer.truth_rank))
    for y, (text, score, rank) in enumerate(lines):
        true = text == answer.truth
        axes.barh(y, max(score, 0.0), 0.8, color=RIGHT if true else colour, alpha=0.45 if true else 0.18)
        name = textwrap.shorten(f"{rank}. {text}", 36, placeholder="…")
        mark = TICK if true and rank == 1 else CROSS if rank == 1 else ""
        weight = "bold" if true else "normal"
        axes.text(0.01, y, f"{mark} {name}".strip(), va="center", fontsize=7, fontweight=weight)
        axes.text(1.12, y, f"{score:.2f}", va="center", ha="right", fontsize=6.5, color=MUTED)
    axes.set_xlim(0, 1.12)
    axes.set_ylim(5.6, -0.6)
    axes.axis("off")
