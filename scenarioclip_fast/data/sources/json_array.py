"""Read a large JSON array element by element, and single elements of it again later."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import open_file
from scenarioclip_fast.parsing import DECODER, parse_json

_CHUNK = 1 << 20  # bytes read at once
_MAX_ELEMENT = 1 << 26  # characters; bounds what is read to find the end of a damaged element
_AFTER = tuple(" \t\r\n,]")  # what may follow an element
_SPACE = re.compile(r"[ \t\r\n]*")


class Extent(NamedTuple):
    """Where an element is in its file, in bytes."""

    offset: int
    size: int


def index_array(path: Path) -> Iterator[tuple[Extent, Any]]:
    """Yield each element of a file that holds a JSON array, and where it is. Only a part of the file is in memory.

    Raises:
        UserError: the file cannot be read, is not a JSON array, or has an element of more than 64 MiB.
    """
    try:
        yield from _Scanner(path).elements()
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as a JSON array: {error}") from None


def read_element(path: Path, extent: Extent) -> Any:
    """Parse the element of a file at an extent that `index_array` found.

    Raises:
        UserError: the file has changed, or can no longer be read.
    """
    try:
        with open_file(path) as file:
            file.seek(extent.offset)
            return parse_json(file.read(extent.size), strict=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: the file was changed while packing: {error}") from None


class _Scanner:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._text, self._at = "", 0  # decoded part of the file, and the position in it
        self._offset = 0  # of that position, in bytes
        self._end = False

    def elements(self) -> Iterator[tuple[Extent, Any]]:
        decoder, utf8 = DECODER, codecs.getincrementaldecoder("utf-8")()
        with open_file(self._path) as file:

            def fill() -> bool:
                if self._end or len(self._text) - self._at > _MAX_ELEMENT:
                    return False
                rest = self._text[self._at :]
                data = file.read(max(_CHUNK, len(rest)))  # doubled, so that a long element takes linear time
                self._end = not data
                self._text, self._at = rest + utf8.decode(data, final=self._end), 0
                return True

            def symbol() -> str:
                """The next character that is not white space; empty at the end of the file."""
                while True:
                    self._skip(_SPACE.match(self._text, self._at).end())  # type: ignore[union-attr]
                    if self._at < len(self._text) or not fill():
                        return self._text[self._at : self._at + 1]

            if symbol() != "[":
                raise ValueError("expected [ at the start")
            self._skip(self._at + 1)
            found = symbol()
            while found != "]":
                symbol()
                while True:
                    try:
                        value, end = decoder.raw_decode(self._text, self._at)
                        # A number may go on: "1" is also read from the start "1." of "1.5".
                        if self._text[end : end + 1] in _AFTER or not fill():
                            break
                    except ValueError:
                        if not fill():
                            raise
                start = self._offset
                self._skip(end)
                yield Extent(start, self._offset - start), value
                if (found := symbol()) not in (",", "]"):
                    raise ValueError(f"expected , or ] at byte {self._offset}, got {found!r}")
                if found == ",":
                    self._skip(self._at + 1)
            self._skip(self._at + 1)
            if found := symbol():
                raise ValueError(f"expected the end of the file at byte {self._offset}, got {found!r}")

    def _skip(self, end: int) -> None:
        part = self._text[self._at : end]
        self._offset += len(part) if part.isascii() else len(part.encode())
        self._at = end
