"""SHA-256 of files: of whole files, listed in a directory's SHA256SUMS, and of the pieces of large ones.

SHA-256, since it needs no further package and is computed by CPU instructions, at 1.2 to 1.9 GB/s per core, outside the
GIL. It detects damage; it does not authenticate, since whoever changes a file can change its checksum.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import open_file, open_regular, read_regular, sha256_of

PIECE = 64 << 20  # bytes, so that several cores, or ranks, verify one file
SUMS = "SHA256SUMS"
_BLOCK = 1 << 20  # bytes per read: fits in a core's cache
_LINE = re.compile(r"([0-9a-f]{64})  ([^/\0\n]+)")


class PieceHash:
    """The SHA-256 of each piece of a stream; a file of at most one piece has one, the usual SHA-256."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._hash, self._left = hashlib.sha256(), PIECE

    def update(self, data: Any) -> None:
        """Add the bytes of a buffer."""
        view = memoryview(data).cast("B")
        while len(view):
            if not self._left:
                self._pieces.append(self._hash.hexdigest())
                self._hash, self._left = hashlib.sha256(), PIECE
            part, view = view[: self._left], view[self._left :]
            self._hash.update(part)
            self._left -= len(part)

    def digests(self) -> list[str]:
        return [*self._pieces, self._hash.hexdigest()]


def piece_digest(path: Path, piece: int) -> str:
    """The SHA-256 of piece number `piece` of a file."""
    digest, buffer = hashlib.sha256(), bytearray(_BLOCK)
    view = memoryview(buffer)
    at, end = piece * PIECE, (piece + 1) * PIECE
    descriptor = open_regular(path)
    try:
        while at < end and (read := os.preadv(descriptor, [view[: end - at]], at)):
            digest.update(view[:read])
            at += read
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with open_file(path) as file:
        return sha256_of(file)


def write_sums(directory: Path, names: Iterable[str]) -> None:
    """Write SHA256SUMS, as sha256sum does, for the named files of `directory` but not for itself."""
    lines = [f"{file_digest(directory / name)}  {name}\n" for name in sorted({*names} - {SUMS})]
    (directory / SUMS).write_text("".join(lines), "utf-8")


def verify_sums(directory: Path, names: Iterable[str]) -> bool:
    """Compare those of the named files that exist with SHA256SUMS; return False if there is no such list.

    Raises:
        UserError: a file differs or is not listed, or the list is malformed.
    """
    sums = directory / SUMS
    try:
        lines = read_regular(sums).decode("utf-8").splitlines()
    except FileNotFoundError:
        return False
    except ValueError:
        raise UserError(f"{sums}: damaged: not UTF-8; copy the directory again") from None
    matches = [_LINE.fullmatch(line) for line in lines]
    listed = {match[2]: match[1] for match in matches if match is not None}
    if len(listed) != len(lines):
        raise UserError(
            f"{sums}: damaged, or not in the format of sha256sum: expected lines of a SHA-256, two spaces and a file "
            "name; copy the directory again, or remove this file"
        )
    for name in names:
        path = directory / name
        if name in listed and not path.exists():
            raise UserError(f"{path}: missing, although {SUMS} lists it; copy the directory again")
        if path.exists() and file_digest(path) != listed.get(name):
            raise UserError(
                f"{path}: damaged or changed: its SHA-256 is not the one in {SUMS}; copy the directory again or, if "
                f"the change is intended, remove {SUMS}"
            )
    return True
