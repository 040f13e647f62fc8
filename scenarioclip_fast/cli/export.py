"""`scenarioclip-fast export`: export a trained model's weights for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path

from scenarioclip_fast.cli.arguments import output_path
from scenarioclip_fast.terminal import echo


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "export",
        help="export weights for other programs",
        description="Writes a trained model's student weights in a format that other programs load.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="run directory, or RUN/model")
    parser.add_argument(
        "--to",
        choices=("hf", "safetensors"),
        required=True,
        help="hf: one transformers CLIPModel per level, in DIR/global, DIR/object and DIR/relation; "
        "safetensors: the whole model in one file",
    )
    parser.add_argument("--out", type=output_path, required=True, metavar="DIR", help="output directory")
    parser.add_argument("--force", action="store_true", help="overwrite the files of an earlier export")


def run(args: argparse.Namespace) -> int:
    """Export the weights, and print the written files."""
    from scenarioclip_fast.errors import UserError
    from scenarioclip_fast.eval.checkpoint import open_checkpoint
    from scenarioclip_fast.levels import LEVELS
    from scenarioclip_fast.model.hugging_face import CLIP_INITIAL_SCALE, export_hf
    from scenarioclip_fast.output import prepare_directory, prepare_file
    from scenarioclip_fast.requirements import require

    folders = [args.out] if args.to == "safetensors" else [args.out / level for level in LEVELS]
    files = [folder / name for folder in folders for name in ("model.safetensors", "config.json")]
    existing = [path for path in files if path.exists()]
    if existing and not args.force:
        raise UserError(f"{existing[0]} exists: pass --force to overwrite it, or choose another directory")
    for folder in folders:
        prepare_directory(folder, "--out")
    for path in files:
        prepare_file(path, "--out")
    trained = open_checkpoint(args.checkpoint)
    try:
        if args.to == "safetensors":
            trained.model.save_pretrained(args.out, trained.scales)
            echo(f"wrote {args.out / 'model.safetensors'}")
        else:
            for level, folder in zip(LEVELS, folders, strict=True):
                export_hf(trained.model, folder, level, trained.scales.get(level, CLIP_INITIAL_SCALE))
                echo(f"wrote {folder}: a CLIPModel, with the rest of its head in projection.safetensors")
    except require("safetensors").SafetensorError as error:
        raise UserError(f"{args.out} not written: {error}") from None
    return 0
