"""The command `scenarioclip-fast`: finds the subcommand, and turns a user's mistake into one line.

Exit codes: 0 done, 2 wrong usage or input, 1 anything else.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from typing import NoReturn

from scenarioclip_fast import __version__
from scenarioclip_fast.errors import MissingDependencyError, TrainingFailed, UserError

# Each module has add_parser(subparsers) and run(args) -> exit code, and imports what is heavy inside run.
COMMANDS = (
    "demo",
    "scenes",
    "pack",
    "inspect",
    "train",
    "eval",
    "embed",
    "ablate",
    "report",
    "bench",
    "export",
    "doctor",
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see `{self.prog} --help`)", file=sys.stderr)
        sys.exit(2)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = _Parser(prog="scenarioclip-fast", description="High-throughput ScenarioCLIP: data, training, evaluation.")
    parser.add_argument("--version", action="version", version=f"scenarioclip-fast {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    for name in COMMANDS:
        importlib.import_module(f"scenarioclip_fast.cli.{name}").add_parser(subparsers)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(args, "overrides") or any(text.startswith("-") for text in rest)):
        parser.prog += f" {args.command}"
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # `train a=1 -c FILE b=2`: argparse takes the first stretch of positional arguments alone
        args.overrides += rest
    command = importlib.import_module(f"scenarioclip_fast.cli.{args.command}")
    try:
        code: int = command.run(args)
        return code
    except (UserError, MissingDependencyError) as error:
        return _fail(str(error))
    except TrainingFailed as error:
        return _fail(str(error), 1)
    except (
        FileNotFoundError,
        NotADirectoryError,
        IsADirectoryError,
        PermissionError,
        FileExistsError,
    ) as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has gone: nothing is wrong, and nothing more may be written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        return _fail(f"{error.filename or 'while writing'}: {error.strerror}", 1)


def _fail(message: str, code: int = 2) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
