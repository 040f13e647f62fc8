"""`scenarioclip-fast doctor`: versions, devices and available backends."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    subparsers.add_parser(
        "doctor",
        help="check versions, devices and available backends",
        description="Prints versions, devices, compiled extensions and the available backends of each op, with the "
        "reason for each unavailable one.",
    )


def run(args: argparse.Namespace) -> int:
    """Print the table of scenarioclip_fast.env."""
    from scenarioclip_fast import env

    env.report()
    return 0
