"""`scenarioclip-fast inspect`: what is in a packed data set, in numbers and pictures."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "inspect",
        help="counts, histograms and sample views of a packed data set",
        description="Prints what a split holds, and draws DIR/histograms.png and DIR/scenes.png: scenes with their "
        "boxes and masks, and the views that a model would see.",
    )
    parser.add_argument("shards", metavar="SHARDS", help="a directory that `pack` wrote, or its URL")
    parser.add_argument(
        "--out", type=Path, default=Path("inspect"), metavar="DIR", help="for the PNGs (default: inspect)"
    )
    parser.add_argument("--split", default="train", choices=("train", "val", "test"), help="default: train")
    parser.add_argument(
        "--scenes", type=_positive, default=6, metavar="N", help="scenes on the sheet, at most 40 (default: 6)"
    )
    parser.add_argument(
        "--size", type=_positive, default=224, metavar="PX", help="side of a view, at most 1024 (default: 224)"
    )
    parser.add_argument("--object-view", default="masked", choices=("masked", "crop"), help="default: masked")
    parser.add_argument(
        "--relation-view", default="focused", choices=("focused", "box", "scene"), help="default: focused"
    )
    parser.add_argument(
        "--blur", default="rgb", choices=("rgb", "reference"), help="of the relation views (default: rgb)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="which scenes are shown (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Prints the counts and writes the pictures."""
    from scenarioclip_fast.data.inspect import inspect_shards

    census = inspect_shards(
        args.shards,
        args.out,
        split=args.split,
        scenes=args.scenes,
        size=args.size,
        object_view=args.object_view,
        relation_view=args.relation_view,
        blur=args.blur,
        seed=args.seed,
    )
    print(census)
    print(f"pictures   {args.out / 'scenes.png'}, {args.out / 'histograms.png'}")
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, expected at least 1")
    return value
