"""`scenarioclip-fast generate`: scenes from raw images."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scenarioclip_fast.cli.arguments import output_path
from scenarioclip_fast.config_parse import merge, parse_override, plain, read_yaml, set_value
from scenarioclip_fast.config_types import to_yaml_text
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.terminal import echo, warn

if TYPE_CHECKING:
    from scenarioclip_fast.generate.config import GenerateConfig

_STAGES = ("caption", "ground", "segment", "curate", "pack")  # generate.config.STAGES, which imports torch


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "generate",
        help="turn raw images into a packed data set of scenes",
        description="Asks a vision-language model for the action, objects and relations of each image, finds boxes and "
        "masks, curates them and packs the scenes into DIR/shards. Re-run the command to resume.",
        epilog="DIR keeps the settings, and a later run uses them unless told otherwise. --print-config shows all of "
        "them; docs/generation.md explains them.",
    )
    parser.add_argument(
        "images",
        nargs="*",
        metavar="IMAGES",
        help="folders, image files, tars, text files with a path per line, or packed data sets; none: the images of "
        "an earlier run in DIR",
    )
    parser.add_argument("--out", type=output_path, metavar="DIR", help="output directory")
    parser.add_argument(
        "--stages", metavar="LIST", help=f"stages to run, separated by commas (default: {','.join(_STAGES)})"
    )
    parser.add_argument("--redo", metavar="LIST", help="stages whose records are discarded first, separated by commas")
    models = parser.add_argument_group("models, by path or hub id")
    models.add_argument("--vlm-url", metavar="URL", help="OpenAI-compatible server, such as http://localhost:8000/v1")
    models.add_argument(
        "--vlm-model",
        metavar="NAME",
        help="model on the server; without --vlm-url, a Qwen2.5-VL or Qwen3-VL checkpoint; given: the annotations "
        "of a packed data set",
    )
    models.add_argument(
        "--detector",
        metavar="NAME",
        help="GroundingDINO, MM-GroundingDINO or OWLv2 checkpoint, MODULE:CLASS, or given "
        "(default: IDEA-Research/grounding-dino-base)",
    )
    models.add_argument(
        "--segmenter", metavar="NAME", help="SAM or SAM 2 checkpoint, or MODULE:CLASS (default: facebook/sam-vit-huge)"
    )
    parser.add_argument("--published", action="store_true", help="the published prompt, thresholds and rules")
    parser.add_argument(
        "--invert-colours", action="store_true", help="show the detector and segmenter inverted images, as published"
    )
    parser.add_argument(
        "--decisions",
        action="append",
        metavar="FILE",
        help="decisions.json of the review page, or corrected COCO annotations; repeat it for one of each",
    )
    parser.add_argument(
        "--layout", choices=("packed", "published", "both"), help="layout of the data set (default: packed)"
    )
    parser.add_argument("--coco", type=output_path, metavar="FILE", help="write the scenes as COCO annotations as well")
    parser.add_argument(
        "--review", type=int, default=50, metavar="N", help="scenes on the page DIR/review.html (default: 50)"
    )
    parser.add_argument("-c", "--config", type=Path, metavar="FILE", help="YAML file of settings")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting, such as ground.box_threshold=0.3"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resulting settings as YAML, and exit")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="worker processes (default: 1)")
    parser.add_argument(
        "--unit-size", type=int, default=128, metavar="N", help="images that are stored together (default: 128)"
    )
    parser.add_argument(
        "--ray",
        nargs="?",
        const="auto",
        metavar="ADDRESS",
        help="run on a Ray cluster: ADDRESS, or the one of this machine, or a new local one",
    )


def run(args: argparse.Namespace) -> int:
    """Run the stages, write the pages and print the counts."""
    config = _config(args)
    if args.print_config:
        echo(config.to_yaml().rstrip("\n"), lines=True)
        return 0
    if args.out is None:
        raise UserError("--out: got nothing, expected the output directory")
    stages = _names(args.stages) if args.stages is not None else _STAGES
    if args.decisions is not None and "curate" not in stages:
        raise UserError("--decisions: applied by the stage curate, which does not run; add curate to --stages")
    from scenarioclip_fast.generate import generate

    report = generate(
        args.images,
        args.out,
        config,
        stages=stages,
        device=args.device,
        workers=args.workers,
        unit_size=args.unit_size,
        redo=_names(args.redo or ""),
        review=args.review,
        coco=args.coco,
        ray=args.ray,
    )
    echo(report, lines=True)
    return 0


def _config(args: argparse.Namespace) -> GenerateConfig:
    """The settings of the last run in DIR, with those of the preset, the file, the options and --set, in this order."""
    from scenarioclip_fast.generate.config import PUBLISHED, GenerateConfig

    saved: dict[str, Any] = {}
    if args.out is not None:
        from scenarioclip_fast.generate.run_directory import RunDirectory

        saved = RunDirectory(args.out).settings()
    given: dict[str, Any] = {}
    for tree in (PUBLISHED if args.published else {}, read_yaml(args.config) if args.config else {}, _settings(args)):
        given = merge(given, plain(tree))
    if args.vlm_model is not None and args.vlm_url is None and args.vlm_model != saved.get("caption", {}).get("model"):
        given = merge({"caption": {"url": ""}}, given)  # a model in this process, not on the server of the last run
    config = GenerateConfig.of(saved, given, overrides=args.set)
    if saved:
        for text in args.set:
            set_value(given, *parse_override(text))
        defaults = asdict(GenerateConfig())
        kept = [
            f"{section}.{name}={to_yaml_text(value)}"
            for section, values in asdict(config).items()
            for name, value in values.items()
            if name not in given.get(section, {}) and value != defaults[section][name]
        ]
        if kept:
            warn(f"settings of the last run in {args.out}: {' '.join(kept)}")
    return config


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that have an option of their own."""
    given: list[tuple[str, str, Any]] = [
        ("caption", "url", args.vlm_url),
        ("caption", "model", args.vlm_model),
        ("ground", "model", args.detector),
        ("segment", "model", args.segmenter),
        ("pack", "layout", args.layout),
        ("ground", "invert", args.invert_colours or None),
        ("segment", "invert", args.invert_colours or None),
    ]
    from scenarioclip_fast.generate.coco import is_coco_file

    tree: dict[str, Any] = {}
    for file in args.decisions or []:
        name = "coco" if is_coco_file(file) else "decisions"
        if any(one[:2] == ("curate", name) for one in given):
            raise UserError(f"--decisions: got two files of one kind, the second {file}; expected at most one of each")
        given.append(("curate", name, file))
    for section, name, value in given:
        if value is not None:
            tree.setdefault(section, {})[name] = value
    return tree


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
