"""Text for terminals and logs, in which keys, names, paths and messages of others must not act as control sequences."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, cast

# C0 except the line feed, DEL and C1, marks and overrides of the text direction, line and paragraph separators, byte
# order marks; and lone surrogates, which no encoding can represent.
_UNPRINTABLE = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def printable(text: object, *, lines: bool = False) -> str:
    r"""Escape the control characters of a text as in its repr; other Unicode stays as it is. Idempotent.

    lines: keep line feeds, for a text of several lines whose foreign parts have been escaped.

    >>> printable("caf\u00e9 \x1b[2J\n\u202e")
    'café \\x1b[2J\\n\\u202e'
    """
    escaped = _UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], str(text))
    return escaped if lines else escaped.replace("\n", "\\n")


def short(value: object) -> str:
    """The repr of a value for error messages, truncated to 80 characters."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # the latter: Python formats no integer of more than 4,300 digits
        text = f"a {type(value).__name__} {'of too many digits' if isinstance(value, int) else 'nested too deeply'}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def one_line(text: object) -> str:
    """A text of several lines as one of at most 300 characters, for error messages."""
    line = " ".join(str(text).split())
    return line if len(line) <= 300 else f"{line[:297]}..."


def echo(text: object = "", *, file: TextIO | None = None, lines: bool = False) -> None:
    """Print a line, `printable` and in the encoding of the stream; all output of the package to a terminal passes here.

    Args:
        file: the stream (default: standard output).
        lines: `text` has several lines.
    """
    out = sys.stdout if file is None else file
    out.write(_representable(printable(text, lines=lines), out) + "\n")
    out.flush()


def warn(text: object) -> None:
    """Print a line to standard error."""
    echo(text, file=sys.stderr)


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module; its messages are single lines without control characters."""
    logger = logging.getLogger(name)
    logger.addFilter(_escape_record)
    return logger


def unguarded(stream: TextIO) -> TextIO:
    """The stream behind a guarded one, for progress bars, which move the cursor."""
    return stream.unguarded if isinstance(stream, _GuardedStream) else stream


@contextlib.contextmanager
def guarded_streams() -> Iterator[None]:
    """Escape control characters in everything that is written to standard output and error: warnings and logs too.

    This includes the traceback of an exception that ends the process.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _GuardedStream(stream)) for stream in before)
    try:
        yield
    except Exception:
        sys.excepthook = _print_exception  # it is called when the streams have been restored
        raise
    finally:
        sys.stdout, sys.stderr = before


class _GuardedStream:
    def __init__(self, stream: TextIO) -> None:
        self.unguarded = stream

    def write(self, text: str) -> int:
        self.unguarded.write(_representable(printable(text, lines=True), self.unguarded))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unguarded, name)


def _representable(text: str, stream: TextIO) -> str:
    """Escape what the encoding of a stream lacks: LC_ALL=C or PYTHONIOENCODING=ascii is no reason to fail."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _escape_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(record.getMessage()), None
    return True


def _print_exception(*error: Any) -> None:
    echo("".join(traceback.format_exception(*error)).rstrip("\n"), file=sys.stderr, lines=True)
