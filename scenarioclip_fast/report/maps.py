"""Scatter plot of a t-SNE map."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np

from scenarioclip_fast.eval.tables import TASKS
from scenarioclip_fast.eval.tsne import EmbeddingMap
from scenarioclip_fast.report.style import GRID, canvas
from scenarioclip_fast.terminal import printable

_MARKERS = "os^Dv"  # one for every ten colours


def scatter_map(found: EmbeddingMap, out: Path) -> Path:
    """Plot the views, with one colour and marker per class; the legend is sorted by frequency."""
    x, y, label = np.asarray(found.x), np.asarray(found.y), np.asarray(found.label)
    with canvas(out, 10, 7, pad=0.05) as figure:
        from matplotlib import colormaps

        colours = colormaps["tab10"].colors  # type: ignore[attr-defined]
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
                label=f"{textwrap.shorten(printable(name), 34, placeholder='…')}  ({own.sum()})",
            )
        axes.set(xticks=[], yticks=[])
        axes.set_aspect("equal", adjustable="datalim")
        for spine in axes.spines.values():
            spine.set(visible=True, color=GRID)
        axes.set_title(f"t-SNE of {len(x)} {TASKS[found.level]} embeddings, {found.split} split")
        axes.set_xlabel(f"1-NN accuracy {100 * found.agreement:.0f} % (chance {100 * found.chance:.0f} %)")
        figure.legend(loc="outside right upper", ncols=1 + (len(found.classes) - 1) // 32, markerscale=1.4)
    return out
