"""`scenarioclip-fast eval`: what a trained model knows."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command and its kinds of evaluation."""
    parser = subparsers.add_parser("eval", help="evaluate a trained model")
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True, parser_class=type(parser))
    zeroshot = kinds.add_parser(
        "zeroshot",
        help="recognise actions, objects and relations by their texts",
        description="Compares every view with all class texts of its level; prints accuracies beside chance.",
    )
    zeroshot.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's directory, or a saved model's")
    zeroshot.add_argument("shards", metavar="SHARDS", help="directory that `pack` wrote; its texts are the classes")
    zeroshot.add_argument("--split", default="test", help="train, val or test (default: test)")
    zeroshot.add_argument(
        "--match",
        choices=("own", "any_in_image", "both"),
        default="both",
        help="what counts as right: the view's own text, any text of its image, or report both (default)",
    )
    zeroshot.add_argument("--top", type=int, nargs="+", default=[1, 5, 10], metavar="K", help="default: 1 5 10")
    zeroshot.add_argument(
        "--weights",
        choices=("student", "teacher"),
        default="student",
        help="the trained ones (default), or their moving average, where loss.teacher_scope was all",
    )
    zeroshot.add_argument("--object-view", choices=("masked", "crop"), help="default: as the model was trained")
    zeroshot.add_argument(
        "--relation-view", choices=("focused", "box", "scene"), help="default: as the model was trained"
    )
    zeroshot.add_argument("--batch-size", type=int, default=64, metavar="N", help="scenes at a time (default: 64)")
    zeroshot.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    zeroshot.add_argument("--decoder", choices=("auto", "dali", "torch"), default="auto")
    zeroshot.add_argument("--json", type=Path, metavar="FILE", help="also write the accuracies here")
    zeroshot.add_argument(
        "--report", type=Path, metavar="DIR", help="also write report.html with curves, bars and sample scenes here"
    )


def run(args: argparse.Namespace) -> int:
    """Evaluates, prints the table and writes the JSON file that was asked for."""
    from scenarioclip_fast.errors import UserError
    from scenarioclip_fast.eval.checkpoint import open_checkpoint, pick_device
    from scenarioclip_fast.eval.report import Report
    from scenarioclip_fast.eval.samples import answer_samples
    from scenarioclip_fast.eval.zeroshot import evaluation_loader, zeroshot
    from scenarioclip_fast.model import TokenTable
    from scenarioclip_fast.train.metrics import read_metrics

    if min(args.top) < 1:
        raise UserError(f"--top: got {' '.join(map(str, args.top))}, expected numbers from 1 on")
    if args.batch_size < 1:
        raise UserError(f"--batch-size: got {args.batch_size}, expected at least 1")
    device = pick_device(args.device)
    trained = open_checkpoint(args.checkpoint, device, args.weights)
    with evaluation_loader(
        args.shards,
        args.batch_size,
        split=args.split,
        device=device,
        decoder=args.decoder,
        size=trained.model.config.vision.image_size,
        object_view=args.object_view or trained.object_view or "masked",
        relation_view=args.relation_view or trained.relation_view or "focused",
    ) as loader:
        if cut := TokenTable(loader.vocabulary, trained.model.config.text).describe_truncated():
            print(cut, file=sys.stderr)
        result = zeroshot(trained.model, loader, loader.vocabulary, split=args.split, topk=args.top)
        samples = answer_samples(trained.model, loader, loader.vocabulary) if args.report else []
    if args.match != "both":
        result = result.only(args.match)
    print(result)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
    if args.report is not None:
        average = ", EMA teacher" if args.weights == "teacher" else ""
        report = Report(f"{args.checkpoint}{average}, {args.split} split", lead=f"Evaluated on {args.shards}.")
        report.add_zeroshot(result)
        metrics = trained.directory.parent / "metrics.jsonl"
        report.add_pictures(args.report, result, samples, {"": read_metrics(metrics)} if metrics.is_file() else {})
        print(f"report: {report.write(args.report / 'report.html')}")
    return 0
