"""`scenarioclip-fast pack`: check and pack a data set."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.terminal import echo, warn

if TYPE_CHECKING:
    from scenarioclip_fast.data.packing.report import PackReport

# The options of a merge, besides those that have a message of their own.
_OF_MERGE = {"merge", "verify", "boxes", "allow_empty_level", "upgrade_index"}
_SHOWN = 10  # causes of rejections with an example; rejected.jsonl lists all rejections


class _Formats:
    """The registered formats, looked up only when the option is used or the help is shown."""

    def __iter__(self) -> Iterator[str]:
        from scenarioclip_fast.data.sources import format_names

        return iter(format_names())

    def __contains__(self, name: object) -> bool:
        return name in list(self)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "pack",
        help="check and pack a data set into shards",
        description="Checks every scene of a data set and packs the valid ones into WebDataset shards. Re-run the "
        "command to resume; packing an up-to-date data set is a no-op. To share the work, run `pack SOURCE --out DIR "
        "--part i/n` for each i from 1 to n, on any machines, and then `pack --merge DIR`.",
        epilog="Format of KEY.json in a tar: "
        '{"schema": 2, "size": [height, width], "action": "riding a bike" or null, '
        '"objects": [{"name": "dog", "box": [x1, y1, x2, y2], "mask": COCO RLE or null}, ...], '
        '"relations": [{"subject": 0, "predicate": "on", "object": 1}, ...]}',
    )
    parser.add_argument(
        "source",
        nargs="*",
        metavar="SOURCE",
        help="directory in the published layout; WebDataset tars of KEY.jpg and KEY.json, or their directory, also as "
        "URLs such as s3://bucket/set or 'https://host/train-{000..127}.tar'; annotations of PSG, COCO panoptic, "
        "Visual Genome or SWiG; or data set in another registered format",
    )
    parser.add_argument("--out", metavar="DIR", help="output directory, or a URL such as s3://bucket/shards")
    parser.add_argument(
        "--part",
        metavar="i/n",
        help="pack only part i of n, with i from 1 to n, into a DIR that all parts have in common",
    )
    parser.add_argument(
        "--merge", metavar="DIR", help="make one pack of the parts in DIR or at a URL, the same for every n; no SOURCE"
    )
    parser.add_argument(
        "--upgrade-index",
        metavar="DIR",
        help="replace the index.json of a pack of an earlier version by index.bin, without reading its shards",
    )
    parser.add_argument(
        "--ray",
        nargs="?",
        const="auto",
        metavar="ADDRESS",
        help="pack the parts on a Ray cluster and merge them: ADDRESS, or the one of this machine, or a new local one",
    )
    parser.add_argument("--parts", type=int, metavar="N", help="with --ray: number of parts (default: one per node)")
    parser.add_argument(
        "--verify", action="store_true", help="with --merge: compare the SHA-256 of all shards, not only their sizes"
    )
    parser.add_argument(
        "--format",
        choices=_Formats(),
        default="auto",
        metavar="FORMAT",
        help="format of SOURCE: one of %(choices)s (default: auto, which detects it)",
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="directory that holds the images of a psg, coco-panoptic, visual-genome or swig data set, and the "
        "panoptic PNGs (default: the places where the data set is usually unpacked, near the annotations)",
    )
    parser.add_argument(
        "--actions",
        type=Path,
        metavar="FILE",
        help="the actions of a psg, coco-panoptic or visual-genome data set, which has none: JSON object of texts by "
        "image id or file name, COCO captions_*.json, or a directory of these (default: scenes without an action)",
    )
    parser.add_argument(
        "--boxes",
        choices=("xyxy", "xywh", "normalised"),
        help="boxes of the published layout and of KEY.json: corners in pixels (xyxy), corner and size in pixels "
        "(xywh), or corners as fractions of the image's size (normalised) (default: xyxy; an error if masks or image "
        "sizes show that this is wrong)",
    )
    parser.add_argument("--shard-size", type=int, default=1000, metavar="N", help="scenes per shard (default: 1000)")
    parser.add_argument(
        "--val",
        type=float,
        default=0.1,
        metavar="FRACTION",
        help="fraction of the scenes without a split that goes to val (default: 0.1)",
    )
    parser.add_argument(
        "--test",
        type=float,
        default=0.2,
        metavar="FRACTION",
        help="fraction of the scenes without a split that goes to test (default: 0.2)",
    )
    parser.add_argument(
        "--split",
        choices=("given", "hash"),
        default="given",
        help="given (default): the split assigned by the data set, otherwise a hash of the key; hash: always the hash",
    )
    parser.add_argument(
        "--max-pixels",
        type=int,
        metavar="N",
        help="reject larger images (default: 67108864; see data.max_pixels for training)",
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="worker processes (default: 1, or all cores for a large data set)"
    )
    parser.add_argument(
        "--allow-empty-level",
        action="store_true",
        help="pack even if all objects or all relations were rejected",
    )
    parser.add_argument(
        "--force", action="store_true", help="write into a directory with other files; pack even if up to date"
    )
    parser.set_defaults(usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    """Pack the data set, and print an example of each cause of rejections, and the counts."""
    if args.upgrade_index is not None:
        return _upgrade(args)
    report = _pack(args) if args.merge is None else _merge(args)
    if report.up_to_date:
        echo(report, lines=True)
        return 0
    for cause in report.causes[:_SHOWN]:
        more = f" (and {cause.count - 1} more)" if cause.count > 1 else ""
        warn(f"rejected: {cause.example}{more}")
    echo(report, lines=True)
    return 0


def _pack(args: argparse.Namespace) -> PackReport:
    from scenarioclip_fast.data.config import MAX_PIXELS
    from scenarioclip_fast.data.packing.packer import pack
    from scenarioclip_fast.data.packing.parts import parse_part

    missing = [name for name, value in (("SOURCE", args.source), ("--out", args.out)) if not value]
    if missing:
        args.usage_error(f"the following arguments are required: {', '.join(missing)}")
    if args.verify:
        raise UserError("--verify: got no --merge, expected `pack --merge DIR --verify`")
    if args.parts is not None and args.ray is None:
        raise UserError("--parts: got no --ray, which runs all parts; expected --part i/n for one of them")
    if args.part is not None and args.ray is not None:
        raise UserError(f"--part: got {args.part} with --ray, which runs all parts; expected --parts N")
    if args.ray is None:
        part = None if args.part is None else parse_part(args.part)
        pack_with = partial(pack, args.source, args.out, part=part)
    else:
        from scenarioclip_fast.data.packing.on_ray import pack_on_ray

        pack_with = partial(pack_on_ray, args.source, args.out, args.ray, parts=args.parts)
    return pack_with(
        format=args.format,
        split=args.split,
        shard_size=args.shard_size,
        val=args.val,
        test=args.test,
        workers=args.workers,
        force=args.force,
        max_pixels=MAX_PIXELS if args.max_pixels is None else args.max_pixels,
        images=args.images,
        actions=args.actions,
        boxes=args.boxes,
        allow_empty_level=args.allow_empty_level,
    )


def _upgrade(args: argparse.Namespace) -> int:
    from scenarioclip_fast.data.packing.upgrade import upgrade_index

    others = {name: default for name, default in _defaults().items() if name != "upgrade_index"}
    for name, default in others.items():
        if getattr(args, name) != default:
            given = "SOURCE" if name == "source" else f"--{name.replace('_', '-')}"
            raise UserError(f"--upgrade-index: got {given} as well, expected only `pack --upgrade-index DIR`")
    changed = upgrade_index(args.upgrade_index)
    echo(f"{args.upgrade_index}: {'index.json replaced by index.bin' if changed else 'has index.bin: nothing to do'}")
    return 0


def _defaults() -> dict[str, Any]:
    """The values of all options that are not given."""
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    return {name: value for name, value in vars(parser.parse_args(["pack"])).items() if name != "usage_error"}


def _merge(args: argparse.Namespace) -> PackReport:
    from scenarioclip_fast.data.packing.merging import merge_parts

    others = ("source", "part", "parts", "ray", "out")
    for name in others:
        if getattr(args, name):
            given = f"--{name} {getattr(args, name)}" if name != "source" else f"SOURCE {args.source[0]}"
            raise UserError(f"--merge: got {given} as well, expected only `pack --merge DIR` once all parts are packed")
    for name, default in _defaults().items():
        if name not in _OF_MERGE.union(others) and getattr(args, name) != default:
            raise UserError(
                f"--merge: got --{name.replace('_', '-')} as well, which is an option of the parts; remove it"
            )
    return merge_parts(args.merge, verify=args.verify, boxes=args.boxes, allow_empty_level=args.allow_empty_level)
