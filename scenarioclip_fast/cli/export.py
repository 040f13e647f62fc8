"""`scenarioclip-fast export`: export a trained model's weights for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path


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
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="output directory")


def run(args: argparse.Namespace) -> int:
    """Export the weights, and print the written files."""
    from scenarioclip_fast.eval.checkpoint import open_checkpoint
    from scenarioclip_fast.levels import LEVELS
    from scenarioclip_fast.model.hugging_face import CLIP_INITIAL_SCALE, export_hf

    trained = open_checkpoint(args.checkpoint)
    model, scales = trained.model, trained.scales
    if args.to == "safetensors":
        model.save_pretrained(args.out, scales)
        print(f"wrote {args.out / 'model.safetensors'}")
        return 0
    for level in LEVELS:
        export_hf(model, args.out / level, level, scales.get(level, CLIP_INITIAL_SCALE))
        print(f"wrote {args.out / level}: a CLIPModel, with the rest of its head in projection.safetensors")
    return 0
