"""`scenarioclip-fast demo`: a whole pipeline on synthetic scenes."""

from __future__ import annotations

import argparse

from scenarioclip_fast.cli.arguments import output_path
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.terminal import echo

_ONLY = {"training": ("views", "device"), "generation": ("workers",)}  # options that the other demo does not have


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "demo",
        help="run the whole pipeline on synthetic scenes: generate, pack, train, evaluate, report",
        description="training: generates synthetic scenes, packs them, trains, evaluates and writes DIR/report.html. "
        "Uses a GPU if available; takes about three minutes on two cores. generation: draws scenes, runs `generate` "
        "on the pictures, with a local server in place of a vision-language model, and scores the result against the "
        "truth; takes about half a minute on an idle core.",
    )
    parser.add_argument(
        "what", nargs="?", choices=("training", "generation"), default="training", help="default: training"
    )
    parser.add_argument(
        "--out", type=output_path, metavar="DIR", help="default: runs/demo, or runs/generation-demo for generation"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (default: 0)")
    parser.add_argument(
        "--scenes", type=int, metavar="N", help="scenes to draw (default: 3500, or 1000 for generation)"
    )
    parser.add_argument(
        "--views", type=int, metavar="N", help="training budget in views (default: 120000); training only"
    )
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: auto); training only")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: 1); generation only")


def run(args: argparse.Namespace) -> int:
    """Run the demo and print its accuracies."""
    for what, names in _ONLY.items():
        for name in names:
            if what != args.what and getattr(args, name) is not None:
                raise UserError(f"--{name}: an option of `demo {what}`, got `demo {args.what}`")
    names = ("out", "seed", "scenes", *_ONLY[args.what])
    options = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.what == "generation":
        from scenarioclip_fast.recipes.generation_demo import GenerationDemoConfig, run_generation_demo

        echo(run_generation_demo(GenerationDemoConfig(**options)), lines=True)
    else:
        from scenarioclip_fast.recipes.demo import DemoConfig, run_demo

        echo(run_demo(DemoConfig(**options)), lines=True)
    return 0
