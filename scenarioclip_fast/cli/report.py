"""`scenarioclip-fast report`: one page for one or several runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from scenarioclip_fast.cli.arguments import output_path
from scenarioclip_fast.terminal import echo


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "report",
        help="compare runs: curves, throughput, accuracies and configs on one page",
        description="Writes report.html, a self-contained page, from the logs of finished or active runs: losses, "
        "temperatures, throughput, time waiting for data, config differences. Accuracies are included if saved by "
        "`eval KIND ... --json RUN/KIND.json`.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="directory of a run, finished or not, or of several runs"
    )
    parser.add_argument(
        "--out",
        type=output_path,
        metavar="DIR",
        help="output directory (default: RUN/report for one RUN, otherwise report)",
    )
    parser.add_argument("--title", default="", help="page title (default: the names of the runs)")


def run(args: argparse.Namespace) -> int:
    """Write the page and print the summary."""
    from scenarioclip_fast.eval.tables import text_table
    from scenarioclip_fast.report.comparison import compare_runs, summary_table
    from scenarioclip_fast.report.runs import find_runs

    runs = find_runs(args.runs)
    out: Path = args.out or (Path(args.runs[0]) / "report" if len(args.runs) == 1 else Path("report"))
    title = args.title or ", ".join(run.name for run in runs)
    report = compare_runs(runs, out, title, f"Source: {', '.join(map(str, args.runs))}.")
    echo(text_table(*summary_table(runs), names=1), lines=True)
    echo(f"report: {report.write(out / 'report.html')}")
    return 0
