"""`scenarioclip-fast embed`: write embeddings of images to a file."""

from __future__ import annotations

import argparse
from typing import get_args

from scenarioclip_fast.cli.arguments import output_path
from scenarioclip_fast.data.config import DecoderName
from scenarioclip_fast.levels import LEVELS
from scenarioclip_fast.terminal import echo


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "embed",
        help="write embeddings of images",
        description="Embeds the images of a folder (searched recursively), of tars or of packed shards, and writes "
        "keys and embeddings (float32, not normalised) as .npz or .parquet. Unreadable images are skipped and listed.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="run directory, or directory of a saved model")
    parser.add_argument("images", metavar="IMAGES", help="image, folder, tar, or directory written by `pack`")
    parser.add_argument("--out", type=output_path, required=True, metavar="FILE", help=".npz or .parquet file to write")
    parser.add_argument(
        "--level",
        choices=LEVELS,
        default="global",
        help="object and relation require packed shards (default: global)",
    )
    parser.add_argument("--split", metavar="NAME", help="split of packed shards (default: test)")
    parser.add_argument(
        "--weights",
        choices=("student", "teacher"),
        default="student",
        help="teacher: the EMA weights of a run with loss.teacher_scope=all (default: student)",
    )
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images per batch (default: 64)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--decoder", choices=get_args(DecoderName), help="default: as in training")
    parser.add_argument("--force", action="store_true", help="overwrite FILE")


def run(args: argparse.Namespace) -> int:
    """Embed the images, write the file and print a summary."""
    from scenarioclip_fast.eval.embeddings import embed

    table = embed(
        args.checkpoint,
        args.images,
        args.out,
        level=args.level,
        split=args.split,
        weights=args.weights,
        batch_size=args.batch_size,
        device=args.device,
        decoder=args.decoder,
        force=args.force,
    )
    if table.keys:
        images = len(set(table.keys))
        rows, width = table.embeddings.shape
        echo(
            f"wrote {args.out}: {rows} {table.level} embeddings of width {width} from {images} images, "
            f"{len(table.skipped)} skipped; {images / max(table.seconds, 1e-9):.1f} images/s"
        )
    return 0
