"""`scenarioclip-fast bench`: this package against reference and rivals, same inputs, same run; and what records say."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "bench",
        help="measure against reference and rivals, or report records",
        description="Runs the benchmarks, compares each result with the reference before timing it, and writes "
        "DIR/record.json, pictures, report.html and report.md. Runs on the GPU if there is one.",
    )
    parser.add_argument(
        "what", nargs="*", metavar="WHAT", help="kernels, data, step, or a benchmark's name (default: everything)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/bench"),
        metavar="DIR",
        help="where record and report go; {date} and {device} are filled in (default: runs/bench)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument(
        "--limit", type=float, metavar="S", help="seconds a benchmark file may take (default: no limit)"
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="run the GPU benchmarks on the CPU at toy sizes: checks that they run; the figures mean nothing",
    )
    parser.add_argument(
        "--report",
        type=Path,
        nargs="+",
        metavar="RECORD",
        help="measure nothing: report these records, directories or record.json files, on one page",
    )


def run(args: argparse.Namespace) -> int:
    """Measures, or only reports; 1 where a benchmark failed."""
    from scenarioclip_fast.bench.record import FILE, read_record
    from scenarioclip_fast.bench.report import markdown, write_report
    from scenarioclip_fast.bench.runner import measure
    from scenarioclip_fast.errors import MissingDependencyError, UserError
    from scenarioclip_fast.requirements import require

    if args.report and args.what:
        raise UserError(f"bench: got {' '.join(args.what)} and --report: either measure or report")
    if args.limit is not None and not args.limit > 0:
        raise UserError(f"--limit: got {args.limit:g}, expected seconds above 0")
    if args.report:
        records = [read_record(path) for path in args.report]
        print(f"report: {write_report(records, args.out)}")
        return 0
    require("pytest")
    record, out = measure(args.what, args.out, device=args.device, limit=args.limit, rehearse=args.rehearse)
    print(markdown([record]))
    print(f"record: {out / FILE}")
    try:
        print(f"report: {write_report([record], out)}")
    except MissingDependencyError as error:  # what was measured is safe
        print(f"no pictures: {error}", file=sys.stderr)
    bad = [part.name for part in record.parts if not part.ok]
    if bad:
        print(f"error: not everything was measured: {', '.join(bad)} (the record says why)", file=sys.stderr)
    return int(bool(bad))
