"""`scenarioclip-fast eval`: what a trained model knows."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scenarioclip_fast.eval.session import Session
    from scenarioclip_fast.report.page import Report

_Finish = Callable[[], Any]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command and its kinds of evaluation."""
    parser = subparsers.add_parser(
        "eval",
        help="evaluate a trained model; under torchrun on many GPUs",
        description="Prints a table with the level of chance beside each share. `eval KIND --help` lists the options.",
    )
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True, parser_class=type(parser))
    common = _common()
    topk = argparse.ArgumentParser(add_help=False)
    topk.add_argument(
        "--top", type=int, nargs="+", default=[1, 5, 10], metavar="K", help="ranks that count (default: 1 5 10)"
    )
    cached = argparse.ArgumentParser(add_help=False)
    cached.add_argument("--cache", type=Path, metavar="DIR", help="keep embeddings here, and take them from here")

    zeroshot = kinds.add_parser(
        "zeroshot",
        parents=[common, topk],
        help="recognise actions, objects and relations by their texts",
        description="Compares every view with all class texts of its level; prints accuracies beside chance.",
    )
    zeroshot.add_argument(
        "--match",
        choices=("own", "any_in_image", "both"),
        default="both",
        help="what counts as right: the view's own text, any text of its image, or report both (default)",
    )
    kinds.add_parser(
        "retrieval",
        parents=[common, topk],
        help="find texts by views, and views by texts",
        description="Recall at K and median rank at each level, in both directions. A text is found with any view that "
        "carries it.",
    )
    probe = kinds.add_parser(
        "probe",
        parents=[common, topk, cached],
        help="train linear heads on the frozen embeddings",
        description="Trains one linear layer per task on the train split, chooses its moment on the val split where "
        "there is one, and reports on --split.",
    )
    probe.add_argument("--steps", type=int, default=1000, metavar="N", help="of each probe's training (default: 1000)")
    probe.add_argument("--probe-batch", type=int, default=512, metavar="N", help="views per step (default: 512)")
    probe.add_argument(
        "--lr", type=float, default=3e-3, metavar="RATE", help="default: 3e-3, falling to 0 along a cosine"
    )
    probe.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="probes per task, whose mean counts (default: 3)"
    )
    tsne = kinds.add_parser(
        "tsne",
        parents=[common, cached],
        help="draw a map of the embeddings, and views with their nearest texts",
        description="Writes map.png, nearest.png and report.html to --report (default: CHECKPOINT/tsne).",
    )
    tsne.add_argument("--level", choices=("global", "object", "relation"), default="object", help="default: object")
    tsne.add_argument("--classes", type=int, default=20, metavar="N", help="the most frequent ones (default: 20)")
    tsne.add_argument("--views", type=int, default=2000, metavar="N", help="at most so many (default: 2000)")
    tsne.add_argument("--seed", type=int, default=0, metavar="N", help="of the layout (default: 0)")
    negatives = kinds.add_parser(
        "negatives",
        parents=[common],
        help="tell relations from hard negatives",
        description="How often a relation's view prefers its text to one with subject and object swapped, and to one "
        "with another predicate. Guessing scores 50 %.",
    )
    negatives.add_argument("--seed", type=int, default=0, metavar="N", help="of the predicates drawn (default: 0)")


def _common() -> argparse.ArgumentParser:
    """The arguments of every kind."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's directory, or a saved model's")
    parser.add_argument("shards", metavar="SHARDS", help="directory that `pack` wrote; its texts are the classes")
    parser.add_argument("--split", default="test", metavar="NAME", help="train, val or test (default: test)")
    parser.add_argument(
        "--weights",
        choices=("student", "teacher"),
        default="student",
        help="the trained ones (default), or their moving average, where loss.teacher_scope was all",
    )
    parser.add_argument("--object-view", choices=("masked", "crop"), help="default: as the model was trained")
    parser.add_argument(
        "--relation-view", choices=("focused", "box", "scene"), help="default: as the model was trained"
    )
    parser.add_argument(
        "--blur", choices=("rgb", "reference"), help="of the relation views; default: as the model was trained"
    )
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="scenes at a time (default: 64)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--decoder", choices=("auto", "dali", "torch"), help="default: as the model was trained")
    parser.add_argument(
        "--shard-cache-dir", metavar="DIR", help="for shards from a URL; default: that of the model's run"
    )
    parser.add_argument(
        "--shard-cache-gib", type=float, metavar="GIB", help="of that disk; default: as much as the model's run took"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    parser.add_argument("--report", type=Path, metavar="DIR", help="also write report.html and its pictures here")
    return parser


def run(args: argparse.Namespace) -> int:
    """Evaluates, prints the table and writes the files that were asked for; of several ranks, the first one does."""
    from scenarioclip_fast.errors import UserError
    from scenarioclip_fast.eval.loading import left_out_record
    from scenarioclip_fast.eval.session import open_session
    from scenarioclip_fast.report.page import Report

    if min(getattr(args, "top", [1])) < 1:
        raise UserError(f"--top: got {' '.join(map(str, args.top))}, expected numbers from 1 on")
    if args.batch_size < 1:
        raise UserError(f"--batch-size: got {args.batch_size}, expected at least 1")
    if args.kind == "tsne" and args.report is None:
        args.report = Path(args.checkpoint) / "tsne"
    with open_session(
        args.checkpoint,
        args.shards,
        weights=args.weights,
        device=args.device,
        batch_size=args.batch_size,
        decoder=args.decoder,
        object_view=args.object_view,
        relation_view=args.relation_view,
        blur=args.blur,
        shard_cache_dir=args.shard_cache_dir,
        shard_cache_gib=args.shard_cache_gib,
    ) as session:
        if session.world.is_main_process:
            _make_places(args)
        average = ", EMA teacher" if args.weights == "teacher" else ""
        report = Report(f"{args.checkpoint}{average}, {args.split} split", lead=f"Evaluated on {args.shards}.")
        finish = _KINDS[args.kind](args, session, report)
    if not session.world.is_main_process:
        return 0
    result = finish()
    print(result)
    if args.json is not None:
        record = {**result.to_dict(), "left_out": left_out_record(session.left_out)}
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if args.report is not None:
        if session.left_out:
            report.lead += f" Scenes that could not be used and are left out: {len(session.left_out)}."
        print(f"report: {report.write(args.report / 'report.html')}")
    return 0


def _make_places(args: argparse.Namespace) -> None:
    """Directories for what will be written: what is wrong with them is said before the work."""
    from scenarioclip_fast.errors import UserError

    for option in ("report", "cache"):
        if (directory := getattr(args, option, None)) is not None:
            _make_place(option, directory, directory)
    if args.json is not None:
        if args.json.is_dir():
            raise UserError(f"--json: {args.json} is a directory; name a file")
        _make_place("json", args.json, args.json.parent)


def _make_place(option: str, asked: Path, directory: Path) -> None:
    from scenarioclip_fast.errors import UserError

    if directory.exists() and not directory.is_dir():
        raise UserError(f"--{option}: {directory} is a file, expected a directory")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
        if asked.is_file():
            asked.open("a").close()
    except OSError as error:
        raise UserError(f"--{option}: {asked} cannot be written ({error.strerror})") from None


# Each kind does what all ranks share, and returns what the leading one does when the others have left: the result,
# which has to_dict() and prints as a table, and its part of the report.


def _zeroshot(args: argparse.Namespace, session: Session, report: Report) -> _Finish:
    from scenarioclip_fast.eval.samples import answer_samples
    from scenarioclip_fast.eval.zeroshot import zeroshot
    from scenarioclip_fast.train.metrics import read_metrics

    with session.loader(args.split) as loader:
        found = zeroshot(
            session.model, loader, session.vocabulary, split=args.split, topk=args.top, world=session.world
        )
    result = found if args.match == "both" else found.only(args.match)

    def finish() -> Any:
        if args.report is not None:
            report.add_zeroshot(result)
            with session.loader(args.split, whole=True) as loader:
                samples = answer_samples(session.model, loader, session.vocabulary)
            metrics = session.trained.directory.parent / "metrics.jsonl"
            report.add_pictures(args.report, result, samples, {"": read_metrics(metrics)} if metrics.is_file() else {})
        return result

    return finish


def _retrieval(args: argparse.Namespace, session: Session, report: Report) -> _Finish:
    from scenarioclip_fast.eval.retrieval import retrieval
    from scenarioclip_fast.report.bars import recall_bars
    from scenarioclip_fast.report.page import Section

    with session.loader(args.split) as loader:
        result = retrieval(
            session.model, loader, session.vocabulary, split=args.split, topk=args.top, world=session.world
        )

    def finish() -> Any:
        if args.report is not None:
            note = (
                f"{result.scenes:,} scenes. The texts are the distinct ones of the split. A view asks for its own "
                "text; a text, once however many views carry it, for any of these. Dark marks, and brackets: a random "
                "ranking."
            )
            picture = recall_bars(result, args.report / "retrieval.png")
            report.sections.append(Section("Retrieval between views and texts", *result.table(), picture, note))
        return result

    return finish


def _probe(args: argparse.Namespace, session: Session, report: Report) -> _Finish:
    from scenarioclip_fast.errors import UserError
    from scenarioclip_fast.eval.features import split_features
    from scenarioclip_fast.eval.probe import ProbeSettings, linear_probe
    from scenarioclip_fast.report.bars import probe_bars
    from scenarioclip_fast.report.page import Section

    if args.split == "train":
        raise UserError("--split: got 'train', which the probe is trained on; expected test or val")
    settings = ProbeSettings(args.steps, args.probe_batch, args.lr, tuple(range(args.seeds)))
    splits = [split for split in ("train", "val") if split != args.split and session.scenes(split)]
    if "train" not in splits:
        raise UserError(f"{args.shards}: the train split holds no scenes: nothing to train the probe on")
    # the one that may be mistyped comes first, and mostly is the smallest
    found = {split: split_features(session, split, cache=args.cache) for split in (args.split, *splits)}

    def finish() -> Any:
        result = linear_probe(
            found["train"],
            found[args.split],
            session.vocabulary,
            val=found["val"] if "val" in splits else None,
            split=args.split,
            topk=args.top,
            settings=settings,
            device=session.world.device,
        )
        if args.report is not None:
            note = (
                f"One linear layer on frozen embeddings, {settings.steps} steps of AdamW; mean and standard deviation "
                f"over {len(settings.seeds)} seeds. "
                + ("The weights are those of the best moment on the val split. " if result.chosen_on_val else "")
                + "Dark marks, and brackets: always naming the most frequent classes of the train split."
            )
            picture = probe_bars(result, args.report / "probe.png")
            report.sections.append(Section("Linear probes", *result.table(), picture, note))
        return result

    return finish


def _tsne(args: argparse.Namespace, session: Session, report: Report) -> _Finish:
    from scenarioclip_fast.eval.features import split_features
    from scenarioclip_fast.eval.samples import answer_samples
    from scenarioclip_fast.eval.tsne import check_settings, embedding_map
    from scenarioclip_fast.report.maps import map_picture, nearest_sheet
    from scenarioclip_fast.report.page import Section
    from scenarioclip_fast.requirements import require

    # before a large split is embedded
    require("sklearn.manifold")
    check_settings(args.classes, args.views, args.seed)
    features = split_features(session, args.split, [args.level], cache=args.cache)

    def finish() -> Any:
        found = embedding_map(
            features,
            session.vocabulary,
            split=args.split,
            level=args.level,
            classes=args.classes,
            views=args.views,
            seed=args.seed,
        )
        with session.loader(args.split, whole=True) as loader:
            samples = answer_samples(session.model, loader, session.vocabulary, guesses=5)
        note = (
            "Each point is a view, coloured by its class. Neighbourhoods are what to look at: distances between groups "
            "and their sizes mean nothing."
        )
        picture = map_picture(found, args.report / "map.png")
        report.sections.append(Section(f"Map of the {args.level} embeddings", *found.table(), picture, note))
        note = (
            "Green: the true text; where it is not among the nearest it stands below, with its rank among all texts. A "
            "frame is green where the nearest text is the true one, amber where a later one is."
        )
        picture = nearest_sheet(samples, args.report / "nearest.png")
        report.sections.append(Section("Nearest texts", picture=picture, note=note))
        return found

    return finish


def _negatives(args: argparse.Namespace, session: Session, report: Report) -> _Finish:
    from scenarioclip_fast.eval.negatives import hard_negatives
    from scenarioclip_fast.report.bars import preference_bars
    from scenarioclip_fast.report.page import Section

    with session.loader(args.split) as loader:
        result = hard_negatives(
            session.model, loader, session.vocabulary, split=args.split, seed=args.seed, world=session.world
        )

    def finish() -> Any:
        if args.report is not None:
            note = (
                f"{result.relations:,} relations. No negative is a text that any relation of its image carries. A "
                "focused region shows both objects alike and does not say which is the subject; of a symmetric "
                "predicate the swapped text holds as well."
            )
            picture = preference_bars(result, args.report / "negatives.png")
            report.sections.append(Section("Hard negatives", *result.table(), picture, note))
        return result

    return finish


_KINDS = {"zeroshot": _zeroshot, "retrieval": _retrieval, "probe": _probe, "tsne": _tsne, "negatives": _negatives}
