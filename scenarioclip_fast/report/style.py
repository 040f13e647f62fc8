"""Common style of all figures: colours, Matplotlib settings, and a canvas that requires no display.

Matplotlib is imported on first use, always with the Agg canvas and never through pyplot, so the caller's Matplotlib
state is not changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scenarioclip_fast.files import replacing
from scenarioclip_fast.requirements import require

COLOURS = {"global": "#3b6ea8", "object": "#cf7a30", "relation": "#3f8f63"}
DISTILLATION = "#7a5ba8"
TICK, CROSS = "\u2713", "\u2717"
INK, MUTED, GRID = "#22272e", "#6b7480", "#e3e7ec"
CORRECT, AMBER, WRONG = "#2b7a4b", "#d9a036", "#b3402e"
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
_RUN_COLOURS = ("#3b6ea8", "#cf7a30", "#3f8f63", "#b3402e", "#7a5ba8", "#4aa3a3", "#c2578f", "#8a6d3b", "#6b7480")


@contextmanager
def canvas(out: Path, width: float, height: float, *, pad: float | None = None) -> Iterator[Any]:
    """Yield a Matplotlib figure of `width` x `height` inches, and save it to `out` on exit.

    Args:
        out: the PNG to write.
        width, height: figure size in inches.
        pad: vertical padding of a constrained layout, in inches; None: the caller places the axes.
    """
    require("matplotlib")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        if pad is not None:
            figure.set_layout_engine("constrained", h_pad=pad)
        yield figure
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as new:
            figure.savefig(new, dpi=150, facecolor="white", format="png")


def run_colours(names: Iterable[str]) -> dict[str, str]:
    """Assign one colour per run, the same in all figures of a page."""
    return {name: _RUN_COLOURS[k % len(_RUN_COLOURS)] for k, name in enumerate(names)}


def run_legend(figure: Any, names: Sequence[str]) -> None:
    """Add a legend of the runs above the panels."""
    from matplotlib.patches import Patch

    colours = run_colours(names)
    handles = [Patch(color=colours[name], label=name) for name in names]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(len(names), 6), fontsize=9.5)


def horizontal_percent_axes(axes: Any, labels: Sequence[str], ticks: Sequence[float], right: float) -> None:
    """Set up axes for horizontal bars of percentages: a label per tick, and room for text up to x = `right`."""
    axes.set_yticks(ticks, labels, fontsize=8)
    axes.set_xticks(range(0, 101, 20), [f"{tick} %" for tick in range(0, 101, 20)])
    axes.set_xlim(0, right)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
