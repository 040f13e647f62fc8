"""`scenarioclip-fast eval`: evaluate a trained model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from scenarioclip_fast.cli.arguments import output_path
from scenarioclip_fast.data.config import Blur, DecoderName, ObjectView, RelationView
from scenarioclip_fast.levels import LEVELS
from scenarioclip_fast.output import prepare_directory, prepare_file
from scenarioclip_fast.terminal import echo

if TYPE_CHECKING:
    from scenarioclip_fast.eval.session import Session
    from scenarioclip_fast.report.page import Section

# A result (with to_dict(), and a table as str()), and its sections of the report.
_Outcome = tuple[Any, "list[Section]"]
# Evaluations do the work shared by all ranks, and return a function that the main process calls after the others exit.
_Finish = Callable[[], _Outcome]
# Options of rank 0 alone, and those that `open_session` compares between ranks.
_NOT_COMPARED = ("checkpoint", "shards", "device", "json", "report", "cache", "batch_size", "weights")
# Options that override fields of the run's LoaderConfig.
_LOADER_OPTIONS = ("decoder", "object_view", "relation_view", "blur", "shard_cache_dir", "shard_cache_gib", "verify")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command with one subcommand per kind of evaluation."""
    parser = subparsers.add_parser(
        "eval",
        help="evaluate a trained model, on several GPUs under torchrun",
        description="Prints a table of scores and their chance levels. `eval KIND --help` lists the options.",
    )
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True, parser_class=type(parser))
    common = _common()
    topk = argparse.ArgumentParser(add_help=False)
    topk.add_argument(
        "--top", type=int, nargs="+", default=[1, 5, 10], metavar="K", help="values of k to report (default: 1 5 10)"
    )
    cached = argparse.ArgumentParser(add_help=False)
    cached.add_argument("--cache", type=output_path, metavar="DIR", help="cache embeddings in this directory")

    zeroshot = kinds.add_parser(
        "zeroshot",
        parents=[common, topk],
        help="zero-shot recognition of actions, objects and relations",
        description="Compares each view with all class texts of its level, and reports top-k accuracy.",
    )
    zeroshot.add_argument(
        "--match",
        choices=("own", "any_in_image", "both"),
        default="both",
        help="what counts as correct: the view's own text, any text of its image, or report both (default)",
    )
    kinds.add_parser(
        "retrieval",
        parents=[common, topk],
        help="image-to-text and text-to-image retrieval",
        description="Reports recall@K and median rank per level, in both directions. For a text query, any view "
        "with that text is correct.",
    )
    _add_probe(kinds, [common, topk, cached])
    _add_tsne(kinds, [common, cached])
    negatives = kinds.add_parser(
        "negatives",
        parents=[common],
        help="accuracy of relations against hard negatives",
        description="Reports how often a relation view scores its text above the same text with subject and object "
        "swapped, and above the same text with another predicate. Chance is 50 %.",
    )
    negatives.add_argument(
        "--seed", type=int, default=0, metavar="N", help="random seed of the predicates (default: 0)"
    )


def _add_probe(kinds: Any, parents: list[argparse.ArgumentParser]) -> None:
    parser = kinds.add_parser(
        "probe",
        parents=parents,
        help="linear probes on frozen embeddings",
        description="Trains one linear layer per task on the train split, selects its weights on the val split, if "
        "any, and reports accuracy on --split.",
    )
    parser.add_argument("--steps", type=int, default=1000, metavar="N", help="training steps per probe (default: 1000)")
    parser.add_argument("--probe-batch", type=int, default=512, metavar="N", help="views per step (default: 512)")
    parser.add_argument(
        "--lr",
        type=float,
        default=3e-3,
        metavar="RATE",
        help="initial learning rate of a cosine schedule (default: 3e-3)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=3,
        metavar="N",
        help="probes per task, with seeds 0 to N - 1; reports the mean (default: 3)",
    )


def _add_tsne(kinds: Any, parents: list[argparse.ArgumentParser]) -> None:
    parser = kinds.add_parser(
        "tsne",
        parents=parents,
        help="t-SNE map of embeddings, and views with their nearest texts",
        description="Writes map.png, nearest.png and report.html to --report (default: CHECKPOINT/tsne).",
    )
    parser.add_argument("--level", choices=LEVELS, default="object", help="default: object")
    parser.add_argument(
        "--classes", type=int, default=20, metavar="N", help="number of classes, the most frequent ones (default: 20)"
    )
    parser.add_argument("--views", type=int, default=2000, metavar="N", help="maximum number of views (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed of t-SNE (default: 0)")


def _common() -> argparse.ArgumentParser:
    """The arguments common to all kinds."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="run directory, or directory of a saved model")
    parser.add_argument("shards", metavar="SHARDS", help="directory written by `pack`; its texts are the classes")
    parser.add_argument("--split", default="test", metavar="NAME", help="train, val or test (default: test)")
    parser.add_argument(
        "--weights",
        choices=("student", "teacher"),
        default="student",
        help="student (default), or the EMA teacher of a run with loss.teacher_scope=all",
    )
    parser.add_argument("--object-view", choices=get_args(ObjectView), help="default: as in training")
    parser.add_argument("--relation-view", choices=get_args(RelationView), help="default: as in training")
    parser.add_argument("--blur", choices=get_args(Blur), help="blur of relation views (default: as in training)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="scenes per batch (default: 64)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--decoder", choices=get_args(DecoderName), help="default: as in training")
    parser.add_argument(
        "--shard-cache-dir", metavar="DIR", help="local cache of remote shards (default: as in training)"
    )
    parser.add_argument(
        "--shard-cache-gib", type=float, metavar="GIB", help="size limit of that cache (default: as in training)"
    )
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="check the SHA-256 of every shard (default: as in training)",
    )
    parser.add_argument("--json", type=output_path, metavar="FILE", help="also write the result as JSON")
    parser.add_argument("--report", type=output_path, metavar="DIR", help="also write report.html and its figures")
    return parser


def run(args: argparse.Namespace) -> int:
    """Evaluate on all ranks; the main process prints the table and writes the requested files."""
    from scenarioclip_fast.errors import UserError
    from scenarioclip_fast.eval.session import open_session
    from scenarioclip_fast.requirements import require

    if min(getattr(args, "top", [1])) < 1:
        raise UserError(f"--top: got {' '.join(map(str, args.top))}, expected numbers >= 1")
    if args.batch_size < 1:
        raise UserError(f"--batch-size: got {args.batch_size}, expected at least 1")
    if args.kind == "tsne" and args.report is None:
        args.report = Path(args.checkpoint) / "tsne"
    if args.report is not None:
        require("matplotlib")  # before the evaluation
    with open_session(
        args.checkpoint,
        args.shards,
        weights=args.weights,
        device=args.device,
        batch_size=args.batch_size,
        **{name: getattr(args, name) for name in _LOADER_OPTIONS},
    ) as session:
        compared = {k: v for k, v in vars(args).items() if k not in (*_NOT_COMPARED, *_LOADER_OPTIONS)}
        session.world.check_same({f"--{name.replace('_', '-')}": value for name, value in compared.items()})
        if session.world.is_main_process:
            _prepare_outputs(args)
        finish = _KINDS[args.kind](args, session)
    if session.world.is_main_process:
        _write(args, session, *finish())
    return 0


def _write(args: argparse.Namespace, session: Session, result: Any, sections: list[Section]) -> None:
    from scenarioclip_fast.eval.loading import skipped_record
    from scenarioclip_fast.report.page import Report

    echo(result, lines=True)
    if args.json is not None:
        record = {**result.to_dict(), "skipped": skipped_record(session.skipped)}
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if args.report is not None:
        teacher = ", EMA teacher" if args.weights == "teacher" else ""
        lead = f"Evaluated on {args.shards}."
        if session.skipped:
            lead += f" Unusable scenes skipped: {len(session.skipped)}."
        page = Report(f"{args.checkpoint}{teacher}, {args.split} split", lead, sections)
        echo(f"report: {page.write(args.report / 'report.html')}")


def _prepare_outputs(args: argparse.Namespace) -> None:
    for option in ("report", "cache"):
        if (directory := getattr(args, option, None)) is not None:
            prepare_directory(directory, f"--{option}")
    if args.json is not None:
        prepare_file(args.json, "--json")


def _zeroshot(args: argparse.Namespace, session: Session) -> _Finish:
    from scenarioclip_fast.eval.samples import predict_samples
    from scenarioclip_fast.eval.zeroshot import zeroshot
    from scenarioclip_fast.report.evaluation import training_section, zeroshot_figures, zeroshot_tables
    from scenarioclip_fast.train.metrics import read_metrics

    with session.loader(args.split) as loader:
        found = zeroshot(
            session.model, loader, session.vocabulary, split=args.split, topk=args.top, world=session.world
        )
    result = found if args.match == "both" else found.only(args.match)

    def finish() -> _Outcome:
        if args.report is None:
            return result, []
        with session.loader(args.split, whole=True) as loader:
            samples = predict_samples(session.model, loader, session.vocabulary)
        sections = zeroshot_tables(result) + zeroshot_figures(result, samples, args.report)
        metrics = session.trained.directory.parent / "metrics.jsonl"
        if metrics.is_file():
            sections.append(training_section({"": read_metrics(metrics)}, args.report))
        return result, sections

    return finish


def _retrieval(args: argparse.Namespace, session: Session) -> _Finish:
    from scenarioclip_fast.eval.retrieval import retrieval
    from scenarioclip_fast.report.evaluation import retrieval_section

    with session.loader(args.split) as loader:
        result = retrieval(
            session.model, loader, session.vocabulary, split=args.split, topk=args.top, world=session.world
        )
    return lambda: (result, [retrieval_section(result, args.report)] if args.report else [])


def _probe(args: argparse.Namespace, session: Session) -> _Finish:
    from scenarioclip_fast.errors import UserError
    from scenarioclip_fast.eval.features import split_features
    from scenarioclip_fast.eval.probe import ProbeSettings, linear_probe
    from scenarioclip_fast.report.evaluation import probe_section

    if args.split == "train":
        raise UserError("--split: got 'train', the split on which probes are trained; expected test or val")
    settings = ProbeSettings(args.steps, args.probe_batch, args.lr, tuple(range(args.seeds)))
    splits = [split for split in ("train", "val") if split != args.split and session.scenes(split)]
    if "train" not in splits:
        raise UserError(f"{args.shards}: the train split has no scenes to train the probes on")
    # --split first: it may be misspelt, and it is usually the smallest.
    found = {split: split_features(session, split, cache=args.cache) for split in (args.split, *splits)}

    def finish() -> _Outcome:
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
        return result, [probe_section(result, args.report)] if args.report else []

    return finish


def _tsne(args: argparse.Namespace, session: Session) -> _Finish:
    from scenarioclip_fast.eval.features import split_features
    from scenarioclip_fast.eval.samples import predict_samples
    from scenarioclip_fast.eval.tsne import check_settings, embedding_map
    from scenarioclip_fast.report.evaluation import map_sections
    from scenarioclip_fast.requirements import require

    # Fail before embedding a large split.
    require("sklearn.manifold")
    check_settings(args.classes, args.views, args.seed)
    features = split_features(session, args.split, [args.level], cache=args.cache)

    def finish() -> _Outcome:
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
            samples = predict_samples(session.model, loader, session.vocabulary, topk=5)
        return found, map_sections(found, samples, args.report)

    return finish


def _negatives(args: argparse.Namespace, session: Session) -> _Finish:
    from scenarioclip_fast.eval.negatives import hard_negatives
    from scenarioclip_fast.report.evaluation import negatives_section

    with session.loader(args.split) as loader:
        result = hard_negatives(
            session.model, loader, session.vocabulary, split=args.split, seed=args.seed, world=session.world
        )
    return lambda: (result, [negatives_section(result, args.report)] if args.report else [])


_KINDS = {"zeroshot": _zeroshot, "retrieval": _retrieval, "probe": _probe, "tsne": _tsne, "negatives": _negatives}
