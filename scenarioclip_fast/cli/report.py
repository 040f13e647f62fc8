"""`scenarioclip-fast report`: one page for one run, or for several side by side."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "report",
        help="curves, speed, accuracies and configs of runs, side by side",
        description="Writes report.html, a page with its pictures inside, from what runs have logged so far: losses, "
        "temperatures, speed, waiting for data, differences of their configs. Accuracies are shown where "
        "`eval zeroshot ... --json RUN/zeroshot.json` has left them; so are those of retrieval, probe and negatives.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run's directory, going on or finished, or a directory of runs"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="for report.html (default: report, in RUN where there is only one)"
    )
    parser.add_argument("--title", default="", help="of the page (default: the names of the runs)")


def run(args: argparse.Namespace) -> int:
    """Writes the page and prints the summary."""
    from scenarioclip_fast.eval.tables import text_table
    from scenarioclip_fast.report.runs import compare_runs, find_runs, summary_table

    runs = find_runs(args.runs)
    out: Path = args.out or (Path(args.runs[0]) / "report" if len(args.runs) == 1 else Path("report"))
    title = args.title or ", ".join(run.name for run in runs)
    report = compare_runs(runs, out, title, f"Read from {', '.join(map(str, args.runs))}.")
    print(text_table(*summary_table(runs), names=1))
    print(f"report: {report.write(out / 'report.html')}")
    return 0
