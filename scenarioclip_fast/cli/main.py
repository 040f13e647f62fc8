"""The command `scenarioclip-fast`: parses the arguments, runs one command, and reports user errors in one line.

Exit codes: 0 success; 2 invalid usage or input; 75 training stopped by a signal, state saved; 130 interrupted; 1 any
other failure.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from scenarioclip_fast import __version__
from scenarioclip_fast.cli.completion import SHELLS
from scenarioclip_fast.dispatch import BackendError
from scenarioclip_fast.errors import InstallationError, MissingDependencyError, TrainingFailed, UserError
from scenarioclip_fast.requirements import check_installed, missing_dependency
from scenarioclip_fast.suggest import nearest
from scenarioclip_fast.terminal import echo, guarded_streams, warn

# Each module has add_parser(subparsers) and run(args) -> exit code, and imports heavy packages inside run.
COMMANDS = (
    "demo",
    "scenes",
    "generate",
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
PROGRAM = "scenarioclip-fast"


class _Parser(argparse.ArgumentParser):
    """Reports invalid usage in one line, with the closest valid choice."""

    def error(self, message: str) -> NoReturn:
        warn(f"error: {message} (see `{self.prog} --help`)")
        sys.exit(2)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            hint = _did_you_mean(str(value), choices) or f", expected one of {', '.join(choices)}"
            raise argparse.ArgumentError(action, f"got {value!r}{hint}")


class _PrintCompletion(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, _: object, shell: Any, option_string: str | None = None
    ) -> None:
        from scenarioclip_fast.cli.completion import script

        echo(script(build_parser(), shell), lines=True)
        parser.exit()


def build_parser(prog: str = PROGRAM, commands: Iterable[str] = COMMANDS) -> argparse.ArgumentParser:
    """Build the parser with these subcommands; imports their modules."""
    parser = _Parser(
        prog=prog,
        description="High-throughput ScenarioCLIP: data, training, evaluation.",
        epilog=f"Shell completion: `source <({PROGRAM} --print-completion bash)`; requires shtab.",
    )
    parser.add_argument("--version", action="version", version=f"scenarioclip-fast {__version__}")
    parser.add_argument(
        "--print-completion", action=_PrintCompletion, choices=SHELLS, help="print a completion script for this shell"
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    for name in commands:
        importlib.import_module(f"scenarioclip_fast.cli.{name}").add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Run one command and return its exit code.

    Args:
        argv: command-line arguments; None: sys.argv[1:].
        prog: program name in usage messages.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller: `command >&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    os.environ["MPLBACKEND"] = "agg"  # figures are files; matplotlib's import fails on an unknown name, as in notebooks
    with guarded_streams(), _plain_warnings():
        return _run_reporting(sys.argv[1:] if argv is None else argv, prog)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Print warnings of this package as one line, without the line of code that they are about."""
    package, default = str(Path(__file__).parents[1]), warnings.formatwarning

    def format_warning(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        ours = filename.startswith(package)
        return f"warning: {message}\n" if ours else default(message, category, filename, lineno, line)

    warnings.formatwarning = format_warning
    try:
        yield
    finally:
        warnings.formatwarning = default


def _run_reporting(argv: Sequence[str], prog: str) -> int:
    """Run one command, and report its errors."""
    try:
        try:
            return _run(argv, prog)
        finally:
            sys.stdout.flush()  # raises BrokenPipeError here, not while Python exits
    except (UserError, BackendError, MissingDependencyError, InstallationError) as error:
        return _fail(str(error))
    except TrainingFailed as error:
        return _fail(str(error), 1)
    except ModuleNotFoundError as error:
        if (message := missing_dependency(error)) is None:
            raise
        return _fail(message)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError, FileExistsError) as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except KeyboardInterrupt:
        warn("interrupted")
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has exited: not an error, but nothing more can be written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return _fail(f"{error.filename}: {error.strerror}")
        if error.errno in (errno.EMFILE, errno.ENFILE):
            return _fail(
                f"{error.filename or 'while reading'}: {error.strerror}: raise the limit with `ulimit -n 4096`"
            )
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        return _fail(f"{error.filename or 'while writing'}: {error.strerror}", 1)


def _run(argv: Sequence[str], prog: str) -> int:
    # Import only the module of the requested command, to start fast.
    parser = build_parser(prog, argv[:1] if argv and argv[0] in COMMANDS else COMMANDS)
    for text in argv:
        if text == "" or (text.startswith("-") and text.endswith("=")):
            parser.error(f"got an empty value{f' in {text}' if text else ''}: is a shell variable unset?")
    args, rest = parser.parse_known_args([_expand_user(text) for text in argv])
    accepts_overrides = hasattr(args, "overrides")
    if rest and (not accepts_overrides or any(text.startswith("-") for text in rest)):
        parser.prog += f" {args.command}"
        parser.error(
            f"unrecognized arguments: {' '.join(rest)}{_hint(rest, _options(parser, args), accepts_overrides)}"
        )
    if rest:  # `train a=1 -c FILE b=2`: argparse accepts only the first group of positional arguments
        args.overrides += rest
    check_installed()
    code: int = importlib.import_module(f"scenarioclip_fast.cli.{args.command}").run(args)
    return code


def _expand_user(argument: str) -> str:
    """Expand the home directory in `--option=~/path`, which shells leave as it is."""
    option, equals, value = argument.partition("=")
    return option + equals + os.path.expanduser(value) if option.startswith("-") and value.startswith("~") else argument


def _options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[str]:
    """The option strings of a parser and of the given subcommands."""
    options: list[str] = []
    for action in parser._actions:
        options += action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            options += _options(action.choices[getattr(args, action.dest)], args)
    return options


def _hint(arguments: Sequence[str], options: Sequence[str], accepts_overrides: bool) -> str:
    option = next((text for text in arguments if text.startswith("-")), "")
    key = option.lstrip("-")
    if accepts_overrides and "." in key.partition("=")[0]:
        return f": did you mean {key}{'' if '=' in key else '=VALUE'}, without dashes?"
    return _did_you_mean(option.partition("=")[0], options)


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    near = nearest(word, known)
    return f": did you mean {near}?" if near else ""


def _fail(message: str, code: int = 2) -> int:
    warn(f"error: {message}")
    return code


if __name__ == "__main__":
    sys.exit(main(prog="python -m scenarioclip_fast.cli.main"))
