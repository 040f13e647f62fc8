"""`scenarioclip-fast demo`: the whole pipeline on synthetic scenes."""

from __future__ import annotations

import argparse
from pathlib import Path

from scenarioclip_fast.terminal import echo


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "demo",
        help="run the whole pipeline on synthetic scenes: generate, pack, train, evaluate, report",
        description="Generates synthetic scenes, packs them, trains, evaluates and writes DIR/report.html. Uses a GPU "
        "if available; takes about three minutes on two CPU cores.",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: runs/demo")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (default: 0)")
    parser.add_argument("--scenes", type=int, default=3500, metavar="N", help="scenes to generate (default: 3500)")
    parser.add_argument(
        "--views", type=int, default=120_000, metavar="N", help="training budget in views (default: 120000)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")


def run(args: argparse.Namespace) -> int:
    """Run the demo and print its accuracies."""
    from scenarioclip_fast.recipes.demo import DemoConfig, run_demo

    echo(run_demo(DemoConfig(args.out, args.seed, args.scenes, args.views, args.device)), lines=True)
    return 0
