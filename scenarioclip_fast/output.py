"""Prepare output paths, so that an invalid one fails before the work and not after it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from scenarioclip_fast.errors import UserError


def prepare_directory(directory: Path, setting: str) -> None:
    """Create an output directory.

    Raises:
        UserError: it is a file or cannot be written; the message begins with `setting`.
    """
    _prepare(directory, directory, setting)


def prepare_file(path: Path, setting: str) -> None:
    """Create the parent directory of an output file; raises UserError like `prepare_directory`."""
    if path.is_dir():
        raise UserError(f"{setting}: {path} is a directory, expected a file")
    _prepare(path.parent, path, setting)


def _prepare(directory: Path, path: Path, setting: str) -> None:
    blocking = next((parent for parent in (directory, *directory.parents) if parent.exists()), None)
    if blocking is not None and not blocking.is_dir():
        raise UserError(f"{setting}: {blocking} is a file, expected a directory")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
        if path.is_file():
            path.open("ab").close()
    except OSError as error:
        raise UserError(f"{setting}: {path} cannot be written ({error.strerror})") from None
