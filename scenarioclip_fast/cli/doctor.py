"""`scenarioclip-fast doctor`: what works here, and why the rest does not."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    subparsers.add_parser(
        "doctor",
        help="what works here, and why not",
        description="Versions, devices, compiled parts, and the backends that each op has here, with the reason for "
        "each that it has not.",
    )


def run(args: argparse.Namespace) -> int:
    """Prints the table of scenarioclip_fast.env."""
    from scenarioclip_fast import env

    env.report()
    return 0
