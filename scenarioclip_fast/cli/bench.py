"""`scenarioclip-fast bench`: time this package against its reference and other packages, and report the records."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from scenarioclip_fast.cli.arguments import output_path
from scenarioclip_fast.terminal import echo, warn

_MOST_SCENES = 10**9  # the keys have nine digits; some 40 GB


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "bench",
        help="run the benchmarks, or report their records",
        description="Run the benchmarks of this package, its reference and other packages, on the GPU where there is "
        "one. Each result is checked against the reference before it is timed. Writes record.json, plots, report.html "
        "and report.md to DIR.",
    )
    parser.add_argument(
        "what",
        nargs="*",
        metavar="WHAT",
        help="kernels, data, step, or one benchmark, such as index; an unknown name lists all (default: everything)",
    )
    parser.add_argument(
        "--out",
        type=output_path,
        default=Path("runs/bench"),
        metavar="DIR",
        help="output directory; {date} and {device} are replaced (default: runs/bench)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument(
        "--limit", type=float, metavar="S", help="time limit of each benchmark file, in seconds (default: none)"
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="run the GPU benchmarks on the CPU at toy sizes: checks that they run; the figures mean nothing",
    )
    parser.add_argument(
        "--scenes", type=int, metavar="N", help="scenes of the synthetic data set of `index` (default: 1000000)"
    )
    parser.add_argument(
        "--report",
        type=Path,
        nargs="+",
        metavar="RECORD",
        help="report existing records (directories or record.json files) on one page, and run nothing",
    )


def run(args: argparse.Namespace) -> int:
    """Run or report the benchmarks; return 1 if one failed."""
    from scenarioclip_fast.bench.record import FILE, read_record
    from scenarioclip_fast.bench.report import markdown, write_report
    from scenarioclip_fast.bench.runner import measure
    from scenarioclip_fast.errors import MissingDependencyError, UserError
    from scenarioclip_fast.requirements import require

    if args.report and args.what:
        raise UserError(f"bench: got {' '.join(args.what)} and --report, expected only one of them")
    given = {"--rehearse": args.rehearse, "--device": args.device != "auto", "--limit": args.limit is not None}
    given["--scenes"] = args.scenes is not None
    if args.report and any(given.values()):
        option = next(name for name, is_given in given.items() if is_given)
        raise UserError(f"bench: got {option} and --report, which measures nothing: expected only one of them")
    if args.rehearse and args.device != "auto":
        raise UserError("bench: got --device and --rehearse, which always runs on the CPU: expected only one of them")
    if args.limit is not None and not args.limit > 0:
        raise UserError(f"--limit: got {args.limit:g}, expected seconds above 0")
    if args.scenes is not None:
        if "index" not in args.what:
            raise UserError("--scenes: only the benchmark `index` uses it: scenarioclip-fast bench index --scenes N")
        if not 1 <= args.scenes <= _MOST_SCENES:
            raise UserError(f"--scenes: got {args.scenes}, expected from 1 to {_MOST_SCENES}")
        os.environ["SCENARIOCLIP_FAST_BENCH_SCENES"] = str(args.scenes)  # read by the benchmark's process
    if args.report and "{" in args.out.name:
        raise UserError(
            f"--out: got {args.out}, but {{date}} and {{device}} are replaced only when something is measured"
        )
    if args.report:
        records = [read_record(path) for path in args.report]
        echo(f"report: {write_report(records, args.out)}")
        return 0
    require("pytest")
    record, out = measure(args.what, args.out, device=args.device, limit=args.limit, rehearse=args.rehearse)
    echo(markdown([record]), lines=True)
    echo(f"record: {out / FILE}")
    try:
        echo(f"report: {write_report([record], out)}")
    except MissingDependencyError as error:  # the record is written
        warn(f"no report: {error}")
    failed = [part.name for part in record.parts if not part.ok]
    if failed:
        warn(f"error: benchmarks failed: {', '.join(failed)} (reasons: {out / FILE})")
    return int(bool(failed))
