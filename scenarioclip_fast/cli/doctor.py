"""`scenarioclip-fast doctor`: versions, devices and available backends."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    subparsers.add_parser(
        "doctor",
        help="check versions, devices and available backends",
        description="Print versions, devices, compiled parts and the backends that each op can use here, with the "
        "reason for each that it cannot.",
    )


def run(args: argparse.Namespace) -> int:
    """Print the table of scenarioclip_fast.env."""
    from scenarioclip_fast import env

    env.report()
    return 0
