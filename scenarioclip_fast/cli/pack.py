"""`scenarioclip-fast pack`: checks and packs a data set."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

_SHOWN = 10  # rejections printed; all are in the report


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser("pack", help="check and pack a data set into shards")
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a directory in the published layout")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the pack goes")
    parser.add_argument("--shard-size", type=int, default=1000, metavar="N", help="scenes per shard (default 1000)")
    parser.add_argument("--val", type=float, default=0.1, help="share of val among scenes of no split (default 0.1)")
    parser.add_argument("--test", type=float, default=0.2, help="share of test among scenes of no split (default 0.2)")
    parser.add_argument("--workers", type=int, help="processes (default: one, or all cores for a large data set)")
    parser.add_argument("--force", action="store_true", help="write into a directory that holds other things")


def run(args: argparse.Namespace) -> int:
    """Packs, names the first things that were rejected, and prints the counts."""
    from scenarioclip_fast.data.packing import pack

    report = pack(
        args.source,
        args.out,
        shard_size=args.shard_size,
        val=args.val,
        test=args.test,
        workers=args.workers,
        force=args.force,
    )
    rejected = sum(report.rejected.values())
    with (args.out / "rejected.jsonl").open(encoding="utf-8") as lines:
        for row in map(json.loads, itertools.islice(lines, _SHOWN)):
            print(f"rejected: {row['entry']}: {row['reason']}: {row['detail']}", file=sys.stderr)
    if rejected > _SHOWN:
        print(f"rejected: {rejected - _SHOWN} more in {args.out / 'rejected.jsonl'}", file=sys.stderr)
    print(report)
    return 0
