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
    parser = subparsers.add_parser(
        "pack",
        help="check and pack a data set into shards",
        description="Checks every scene of a data set and packs the sound ones into WebDataset shards. After a kill "
        "the same command goes on from the last finished shard; where the pack is up to date it does nothing.",
        epilog="A record KEY.json of a tar: "
        '{"schema": 1, "size": [height, width], "action": "riding a bike", '
        '"objects": [{"name": "dog", "box": [x1, y1, x2, y2], "mask": COCO run lengths or null}, ...], '
        '"relations": [{"subject": 0, "predicate": "on", "object": 1}, ...]}',
    )
    parser.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help="a directory in the published layout; or WebDataset tars of KEY.jpg and KEY.json, or their directory",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the pack goes")
    parser.add_argument(
        "--format", choices=("auto", "published", "webdataset"), default="auto", help="of SOURCE (default: look)"
    )
    parser.add_argument("--shard-size", type=int, default=1000, metavar="N", help="scenes per shard (default: 1000)")
    parser.add_argument(
        "--val", type=float, default=0.1, metavar="SHARE", help="of val among scenes of no split (default: 0.1)"
    )
    parser.add_argument(
        "--test", type=float, default=0.2, metavar="SHARE", help="of test among scenes of no split (default: 0.2)"
    )
    parser.add_argument(
        "--split",
        choices=("given", "hash"),
        default="given",
        help="given (default): what metadata_SPLIT.json or SPLIT-*.tar says, else as hash; hash: from the key alone",
    )
    parser.add_argument(
        "--max-pixels",
        type=int,
        metavar="N",
        help="larger images are rejected by their header (default: 67108864; for training, see data.max_pixels)",
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes (default: one, or all cores for a large data set)"
    )
    parser.add_argument("--force", action="store_true", help="write beside other things; pack even what is up to date")


def run(args: argparse.Namespace) -> int:
    """Packs, names the first things that were rejected, and prints the counts."""
    from scenarioclip_fast.data.config import MAX_PIXELS
    from scenarioclip_fast.data.packing import pack

    report = pack(
        args.source,
        args.out,
        format=args.format,
        split=args.split,
        shard_size=args.shard_size,
        val=args.val,
        test=args.test,
        workers=args.workers,
        force=args.force,
        max_pixels=MAX_PIXELS if args.max_pixels is None else args.max_pixels,
    )
    if report.up_to_date:
        print(report)
        return 0
    rejected = sum(report.rejected.values())
    with (args.out / "rejected.jsonl").open(encoding="utf-8") as lines:
        for row in map(json.loads, itertools.islice(lines, _SHOWN)):
            print(f"rejected: {row['entry']}: {row['reason']}: {row['detail']}", file=sys.stderr)
    if rejected > _SHOWN:
        print(f"rejected: {rejected - _SHOWN} more in {args.out / 'rejected.jsonl'}", file=sys.stderr)
    print(report)
    return 0
