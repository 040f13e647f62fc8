"""Plots the results of bench_contrastive.py: time over rows, and the launch-bound sizes.

Run: SCENARIOCLIP_FAST_BENCH_ROWS=all scenarioclip-fast bench contrastive --out RECORD
     python benchmarks/plot_contrastive.py RECORD OUT.png
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes

from scenarioclip_fast.bench.record import Result, read_record
from scenarioclip_fast.errors import UserError

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LAUNCH_BOUND_ROWS = 2048  # up to which a GPU waits for launches
Series = dict[str, dict[int, float]]  # form -> rows -> milliseconds


def series(runs: Sequence[Result], phase: str, device: str, width: int) -> Series:
    out: Series = defaultdict(dict)
    for run in runs:
        info = run.extra
        if (info["phase"], info["device"], info["width"]) == (phase, device, width):
            # The minimum is least affected by other load on the machine.
            out[run.form][info["rows"]] = min(run.samples) * 1e3
    return out


def style(form: str) -> dict[str, Any]:
    """The line style of a form, the same in every plot; this package stands out."""
    if form == "four bare products":
        return {"color": "black", "linestyle": "--"}
    linestyle = ":" if form.endswith("compiled") else "-"
    colours = {"ours: cuda": "darkred", "ours: triton": "C3", "ours: cpu": "C3", "ours: reference": "C8"}
    colours |= {"open_clip": "C0", "logits.T": "C2"}
    colours |= {"inf_cl": "C1", "memeff": "C4", "cut_cross_entropy": "C5", "liger_kernel": "C6", "quack": "C9"}
    colours |= {"siglip-kernel (sigmoid loss)": "C7"}
    bold = 2.5 if form in ("ours: cuda", "ours: triton", "ours: cpu") else 1.5
    if form.endswith(", no workspace"):
        linestyle = "--"
    return {
        "color": colours[form.removesuffix(" compiled").removesuffix(", no workspace")],
        "linestyle": linestyle,
        "linewidth": bold,
    }


def lines(axes: Axes, forms: Series, title: str) -> None:
    for form, times in forms.items():
        rows = sorted(times)
        axes.plot(rows, [times[n] for n in rows], marker="o", markersize=3, label=form, **style(form))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(title=title, xlabel="rows", ylabel="milliseconds")
    axes.grid(alpha=0.3)


def bars(axes: Axes, forms: Series, title: str) -> None:
    times = {form: next(iter(by_rows.values())) for form, by_rows in forms.items()}
    axes.barh(list(times), list(times.values()), color=[style(form)["color"] for form in times])
    axes.invert_yaxis()
    axes.set(title=title, xlabel="milliseconds")


def plot(runs: Sequence[Result], out: Path) -> None:
    settings = sorted({(run.extra["device"], run.extra["width"]) for run in runs})
    figure, axes = plt.subplots(len(settings), 6, figsize=(31, 5 * len(settings)), squeeze=False)
    for row, (device, width) in zip(axes, settings, strict=True):
        for place, phase in zip(row, ("forward", "backward", "forward + backward"), strict=False):
            lines(place, series(runs, phase, device, width), f"{phase}, D = {width}, {device}")
        both = series(runs, "forward + backward", device, width)
        small = {form: {n: t for n, t in times.items() if n <= LAUNCH_BOUND_ROWS} for form, times in both.items()}
        small = {form: times for form, times in small.items() if times}  # an empty axis cannot be logarithmic
        lines(row[3], small, f"launch-bound, both passes, D = {width}, {device}")
        title = "three levels of a batch, both passes,\n"
        bars(row[4], series(runs, "levels", device, width), f"{title}one text per row")
        bars(row[5], series(runs, "levels, distinct texts", device, width), f"{title}distinct texts as in 128 photos")
        row[2].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="directory of a record, or its record.json")
    parser.add_argument("out", type=Path, help="image file to write")
    args = parser.parse_args()
    try:
        parts = read_record(args.record).parts
    except UserError as error:
        parser.error(str(error))
    runs = [run for part in parts if part.name == "contrastive" for run in part.results]
    if not runs:
        parser.error(f"{args.record}: no run of bench_contrastive.py in this record")
    plot(runs, args.out)


if __name__ == "__main__":
    main()
