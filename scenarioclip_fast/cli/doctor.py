"""`scenarioclip-fast doctor`: what works here, and why the rest does not."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    subparsers.add_parser("doctor", help="what works here, and why not")


def run(args: argparse.Namespace) -> int:
    """Prints the table of scenarioclip_fast.env."""
    from scenarioclip_fast import env

    env.report()
    return 0
