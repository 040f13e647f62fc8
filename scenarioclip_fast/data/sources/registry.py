"""Registry of the formats that `pack` reads.

Add a format with a line in `_FORMATS`, with a call to `register`, or with an entry point in the group
"scenarioclip_fast.sources" of an installed package.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, cast

from scenarioclip_fast.errors import UserError

if TYPE_CHECKING:
    from scenarioclip_fast.data.sources.base import Source, SourceFormat

AUTO = "auto"
ENTRY_POINTS = "scenarioclip_fast.sources"

# name -> the format, or "module:attribute" to import on first use
_FORMATS: dict[str, SourceFormat | str] = {
    "published": "scenarioclip_fast.data.sources.published:PublishedSource",
    "webdataset": "scenarioclip_fast.data.sources.webdataset:WebDatasetSource",
}


def register(name: str, source_format: SourceFormat | str) -> None:
    """Register a format for `pack(..., format=name)` and for "auto".

    Args:
        name: value of `--format`.
        source_format: a subclass of `Source` with the class members of `SourceFormat`, or "module:attribute".

    Raises:
        ValueError: another format has this name.
    """
    if name == AUTO or _FORMATS.get(name, source_format) != source_format:
        raise ValueError(f"format {name!r} is already registered")
    _FORMATS[name] = source_format


def format_names() -> list[str]:
    """The names of all formats, "auto" first."""
    _load_entry_points()
    return [AUTO, *_FORMATS]


def get_format(name: str) -> SourceFormat:
    """Look up a format by name.

    Raises:
        UserError: no such format, or its module cannot be imported.
    """
    check_format(name)
    found = _FORMATS[name]
    if isinstance(found, str):
        module, _, attribute = found.partition(":")
        try:
            found = _FORMATS[name] = cast("SourceFormat", getattr(importlib.import_module(module), attribute))
        except (ImportError, AttributeError) as error:
            raise UserError(f"format {name!r}: cannot import {found}: {error}") from error
    return found


def check_format(name: str) -> None:
    """Raise UserError unless `name` is "auto" or a registered format."""
    if name not in format_names():
        raise UserError(f"format: got {name!r}, expected one of {', '.join(format_names())}")


def open_source(paths: Sequence[str | Path], format: str = AUTO, *, max_pixels: int) -> Source:
    """Open a data set on disk.

    Args:
        paths: paths of the data set; most formats expect a single directory.
        format: a registered name, or "auto" to detect the format.
        max_pixels: larger images are rejected.

    Raises:
        UserError: no format or several recognise the paths, or the data set is unusable.
    """
    return get_format(recognise(paths) if format == AUTO else format).open(paths, max_pixels)


def recognise(paths: Sequence[str | Path]) -> str:
    """Return the name of the only format that recognises `paths`.

    Raises:
        UserError: no format or several recognise `paths`.
    """
    names = [name for name in format_names() if name != AUTO]
    found = [name for name in names if get_format(name).recognises(paths)]
    if len(found) == 1:
        return found[0]
    shown = ", ".join(map(str, paths[:3])) + (", ..." if len(paths) > 3 else "")
    if found:
        raise UserError(f"{shown}: recognised as {' and '.join(found)}; choose one with --format")
    for path in paths:
        if not Path(path).exists():
            raise UserError(f"{path}: no such file or directory")
    known = "; ".join(f"{name}: {get_format(name).expects}" for name in names)
    raise UserError(f"{shown}: not a data set of a known format ({known})")


@functools.cache
def _load_entry_points() -> None:
    for point in entry_points(group=ENTRY_POINTS):
        _FORMATS.setdefault(point.name, point.value)
