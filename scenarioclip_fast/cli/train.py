"""`scenarioclip-fast train`: trains as a config says, on one process or under torchrun."""

from __future__ import annotations

import argparse

# EX_TEMPFAIL: ended by a signal with everything saved, so a batch system may queue it again with --resume.
STOPPED = 75


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "train",
        help="train a model; under torchrun on many GPUs",
        description="Trains as FILE says. Keys: scenarioclip_fast/train/config.py; ready files: configs/.",
        epilog=f"Exit code {STOPPED}: ended early by a signal, state saved; run again with --resume.",
    )
    parser.add_argument("-c", "--config", metavar="FILE", help="YAML file; left out: the defaults")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a key of FILE: optim.lr=1e-4")
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="auto|best|PATH",
        help="go on from the newest good checkpoint of run.dir, if it has one (auto, as without a value), from the one "
        "with the lowest loss (best), or from PATH, a checkpoint or another run's directory",
    )


def run(args: argparse.Namespace) -> int:
    """Trains and prints a summary."""
    from scenarioclip_fast.train.config import TrainConfig

    if isinstance(args.resume, str) and "=" in args.resume:  # `--resume optim.lr=1e-4`: no path, an override
        args.overrides.append(args.resume)
        args.resume = True
    config = TrainConfig.load(args.config, args.overrides) if args.config else TrainConfig.of({}, args.overrides)
    from scenarioclip_fast.train.trainer import Trainer

    trainer = Trainer(config, resume=args.resume)
    result = trainer.fit()
    if trainer.world.is_main_process:
        print(result.summary())
    return 0 if result.completed else STOPPED
