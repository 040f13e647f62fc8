"""`scenarioclip-fast ablate`: train the method and its ablations, and compare them."""

from __future__ import annotations

import argparse
from pathlib import Path

from scenarioclip_fast.cli.train import add_config_argument
from scenarioclip_fast.terminal import echo


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "ablate",
        help="train the method and its ablations, and compare them",
        description="Trains every variant with the same seed, data and budget in RUN/VARIANT (RUN: run.dir), evaluates "
        "it zero-shot, prints a table, and writes RUN/ablation.json and RUN/report.html. Re-run the command to resume "
        "an interrupted ablation; finished variants are kept.",
        epilog="Variants: full (the method); no-distillation or scenarioclip0 (six encoders, contrastive losses only); "
        "no-focused-regions (relation views show the whole scene); relation-boxes (relation views are crops around "
        "the two boxes); pyramidclip (one pair of encoders for all levels). Exit code 75: stopped by a signal, state "
        "saved.",
    )
    add_config_argument(parser)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="SHARDS|key=value",
        help="data set (default: data.shards of FILE), and config overrides for all variants",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        metavar="NAME",
        help="default: full no-distillation no-focused-regions pyramidclip",
    )
    parser.add_argument(
        "--variant",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "key=value"),
        help="custom variant: full with these overrides; can be repeated",
    )
    parser.add_argument(
        "--split", default="test", choices=("train", "val", "test"), help="evaluation split (default: test)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="scenes per batch of the evaluation (default: 64)"
    )


def run(args: argparse.Namespace) -> int:
    """Train, evaluate, and print the table."""
    from scenarioclip_fast.cli.train import STOPPED
    from scenarioclip_fast.errors import UserError
    from scenarioclip_fast.recipes.ablation import run_ablation
    from scenarioclip_fast.recipes.variants import DEFAULT_VARIANTS, VARIANTS, plan_ablation

    # argparse assigns everything after `--variants a b` to the variants, including the data set and overrides.
    listed = [name for text in args.variants or () for name in ([text] if "=" in text else text.split(","))]
    names = [text for text in listed if text in VARIANTS or not ("=" in text or Path(text).is_dir())]
    others = [text for text in [*args.overrides, *listed] if text not in names]
    overrides = [text for text in others if "=" in text and not Path(text).is_dir()]
    paths = [text for text in others if text not in overrides]
    if len(paths) > 1:
        raise UserError(f"got {' and '.join(paths)}, expected one SHARDS directory; overrides have the form key=value")
    if args.batch_size < 1:
        raise UserError(f"--batch-size: got {args.batch_size}, expected at least 1")
    overrides += [f"data.shards={path}" for path in paths]
    custom = {name: changes for name, *changes in args.variant}
    variants = plan_ablation(args.config, overrides, names or DEFAULT_VARIANTS, custom)
    ablation = run_ablation(variants, args.split, args.batch_size)
    if ablation.is_main_process:
        echo(ablation, lines=True)
        echo(f"report: {ablation.report}")
        if ablation.stopped_by:
            echo(f"stopped by {ablation.stopped_by}: re-run the command to resume")
    return STOPPED if ablation.stopped_by else 1 if ablation.failures else 0
