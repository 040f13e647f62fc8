"""`scenarioclip-fast scenes`: generate synthetic scenes in the published layout."""

from __future__ import annotations

import argparse

from scenarioclip_fast.cli.arguments import output_path
from scenarioclip_fast.terminal import echo


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "scenes",
        help="generate synthetic scenes in the published layout",
        description="Generates scenes with exact boxes, masks and relations, in a layout that `pack` reads.",
    )
    parser.add_argument("--out", type=output_path, required=True, metavar="DIR", help="new or empty directory")
    parser.add_argument("-n", type=int, default=2500, metavar="N", help="number of scenes (default: 2500)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (default: 0)")
    parser.add_argument(
        "--val", type=float, default=0.05, metavar="FRACTION", help="fraction of scenes in val (default: 0.05)"
    )
    parser.add_argument(
        "--test", type=float, default=0.15, metavar="FRACTION", help="fraction of scenes in test (default: 0.15)"
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="worker processes (default: 1)")


def run(args: argparse.Namespace) -> int:
    """Generate scenes, and print the number of scenes per metadata file."""
    from scenarioclip_fast.data.synthetic.write import generate_published_layout

    counts = generate_published_layout(
        args.n, args.out, seed=args.seed, val=args.val, test=args.test, workers=args.workers
    )
    for name, scenes in counts.items():
        echo(f"{args.out / name}: {scenes} scene{'s' * (scenes != 1)}")
    return 0
