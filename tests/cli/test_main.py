import argparse
import errno
import os

import pytest

from scenarioclip_fast.cli import doctor
from scenarioclip_fast.cli.main import COMMANDS, build_parser, main


def fail_with(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    def run(args: object) -> int:
        raise error

    monkeypatch.setattr(doctor, "run", run)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_is_one_line(
    code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, OSError(code, os.strerror(code), "out.json"))
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err == f"error: out.json: {os.strerror(code)}\n"
    fail_with(monkeypatch, OSError(code, os.strerror(code)))  # from a write, which knows no name
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err == f"error: while writing: {os.strerror(code)}\n"


def test_other_errors_of_the_system_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, OSError(errno.EIO, "Input/output error"))
    with pytest.raises(OSError, match="Input/output error"):
        main(["doctor"])


def test_every_command_says_what_it_does_and_writes_defaults_alike() -> None:
    def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
        found = [a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        return {name: sub for choices in found for name, sub in (choices or {}).items()}

    parsers = subcommands(build_parser())
    assert tuple(parsers) == COMMANDS
    for name, parser in {**parsers, **subcommands(parsers["eval"])}.items():
        assert parser.description, name
        text = " ".join(parser.format_help().split())
        assert "%%" not in text
        assert "(default " not in text.replace("(default)", ""), f"{name}: write (default: VALUE)"
