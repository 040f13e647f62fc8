"""`scenarioclip-fast train`: train a model from a config, in one process or under torchrun."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.suggest import nearest
from scenarioclip_fast.terminal import echo

# EX_TEMPFAIL: stopped by a signal with all state saved, so a batch system can requeue the run with --resume.
STOPPED = 75


class _Once(argparse.Action):
    """Stores the value of an option that may be given only once; argparse would keep the last one."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, option: str | None = None
    ) -> None:
        if getattr(namespace, self.dest) is not None:
            parser.error(f"got {option} twice: name one config, and override its keys with key=value")
        setattr(namespace, self.dest, value)


class _Help(argparse.Action):
    """Prints the usage and all config keys."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        from scenarioclip_fast.train.config_reference import text

        echo(f"{parser.format_help()}\n{text()}", lines=True)
        parser.exit()


def add_config_argument(parser: argparse.ArgumentParser) -> None:
    """Add the option that names a config."""
    parser.add_argument(
        "-c",
        "--config",
        action=_Once,
        metavar="FILE",
        help="YAML file, or tiny, fast or reference (default: built-in defaults)",
    )


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "train",
        help="train a model, on several GPUs under torchrun",
        description="Trains the model described by FILE and the overrides. The package has three configs: tiny (from "
        "scratch, on a CPU), fast (the method, from CLIP weights) and reference (the published run).",
        epilog=f"Exit code {STOPPED}: stopped by a signal, state saved; rerun with --resume.",
        add_help=False,
    )
    parser.add_argument("-h", "--help", action=_Help, nargs=0, help="show this message and all config keys, and exit")
    add_config_argument(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of FILE: optim.lr=1e-4")
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="auto|best|PATH",
        help="resume from the newest intact checkpoint in run.dir, or start a new run if there is none (auto, the "
        "default without a value); from the checkpoint with the lowest loss (best); or from PATH, a checkpoint or "
        "another run directory",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resulting config as YAML, and exit")


def run(args: argparse.Namespace) -> int:
    """Train and print a summary."""
    from scenarioclip_fast.train.config import OptimSection, TrainConfig

    if (
        isinstance(args.resume, str) and "=" in args.resume and not Path(args.resume).exists()
    ):  # `--resume optim.lr=1e-4`: an override, not a path
        args.overrides.append(args.resume)
        args.resume = True
    _check_resume(args.resume)
    config = (
        TrainConfig.load(args.config, args.overrides) if args.config is not None else TrainConfig.of({}, args.overrides)
    )
    if args.print_config:
        if config.optim.name != OptimSection.name:  # checked here, because train.optim imports torch
            from scenarioclip_fast.train.optim import optimizer_factory

            optimizer_factory(config.optim.name)
        echo(config.to_yaml().rstrip("\n"), lines=True)
        return 0
    from scenarioclip_fast.train.trainer import Trainer

    trainer = Trainer(config, resume=args.resume)
    result = trainer.fit()
    if trainer.world.is_main_process:
        echo(result.summary(), lines=True)
    return 0 if result.completed else STOPPED


def _check_resume(resume: str | bool) -> None:
    words = ("auto", "best")
    if isinstance(resume, bool) or resume in words or Path(resume).exists():
        return
    if near := nearest(resume, words):
        raise UserError(f"--resume: got {resume!r}, which does not exist: did you mean {near}?")
