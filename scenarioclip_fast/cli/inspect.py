"""`scenarioclip-fast inspect`: statistics and sample views of a packed data set."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from scenarioclip_fast.cli.arguments import output_path
from scenarioclip_fast.data.config import Blur, ObjectView, RelationView
from scenarioclip_fast.terminal import echo


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "inspect",
        help="statistics, histograms and sample views of a packed data set",
        description="Prints statistics of a split, and writes DIR/histograms.png and DIR/scenes.png: scenes with their "
        "boxes and masks, and the views as seen by a model.",
    )
    parser.add_argument("shards", metavar="SHARDS", help="directory written by `pack`, or its URL")
    parser.add_argument(
        "--out", type=output_path, default=Path("inspect"), metavar="DIR", help="output directory (default: inspect)"
    )
    parser.add_argument("--split", default="train", choices=("train", "val", "test"), help="default: train")
    parser.add_argument(
        "--scenes", type=_positive, default=6, metavar="N", help="scenes to show, at most 40 (default: 6)"
    )
    parser.add_argument(
        "--size", type=_positive, default=224, metavar="PX", help="view size in pixels, at most 1024 (default: 224)"
    )
    parser.add_argument("--object-view", default="masked", choices=get_args(ObjectView), help="default: masked")
    parser.add_argument("--relation-view", default="focused", choices=get_args(RelationView), help="default: focused")
    parser.add_argument("--blur", default="rgb", choices=get_args(Blur), help="blur of relation views (default: rgb)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="random seed of the selection of scenes (default: 0)"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="check the SHA-256 of every shard; the scenes of a damaged one are unusable, and the exit code is 1",
    )


def run(args: argparse.Namespace) -> int:
    """Print the statistics and draw the figures."""
    from scenarioclip_fast.data.inspect import inspect_shards

    statistics = inspect_shards(
        args.shards,
        args.out,
        split=args.split,
        scenes=args.scenes,
        size=args.size,
        object_view=args.object_view,
        relation_view=args.relation_view,
        blur=args.blur,
        seed=args.seed,
        verify=args.verify,
    )
    echo(statistics, lines=True)
    echo(f"figures    {args.out / 'scenes.png'}, {args.out / 'histograms.png'}")
    return 1 if "damaged_shard" in statistics.bad else 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, expected at least 1")
    return value
