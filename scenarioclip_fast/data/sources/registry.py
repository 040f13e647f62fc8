"""The formats that `pack` reads, by name.

A format is added by one line in `_FORMATS`, by a call of `register`, or by an installed package that declares an entry
point in the group "scenarioclip_fast.sources".
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

# name -> the format, or "module:attribute" to import it from when it is first needed
_FORMATS: dict[str, SourceFormat | str] = {
    "published": "scenarioclip_fast.data.sources.published:PublishedSource",
    "webdataset": "scenarioclip_fast.data.sources.webdataset:WebDatasetSource",
}


def register(name: str, source_format: SourceFormat | str) -> None:
    """Add a format that `pack(..., format=name)` reads and "auto" recognises.

    Args:
        name: what users pass as `--format`.
        source_format: a subclass of `Source` with the class members of `SourceFormat`, or "module:attribute".

    Raises:
        ValueError: the name is taken by another format.
    """
    if name == AUTO or _FORMATS.get(name, source_format) != source_format:
        raise ValueError(f"format {name!r} is already registered")
    _FORMATS[name] = source_format


def format_names() -> list[str]:
    """The names of all formats, "auto" first."""
    _load_entry_points()
    return [AUTO, *_FORMATS]


def get_format(name: str) -> SourceFormat:
    """The format of this name.

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
        paths: of the data set; most formats accept one directory.
        format: a registered name, or "auto" for the one format that recognises the paths.
        max_pixels: larger images are rejected.

    Raises:
        UserError: no format or several recognise the paths, or the data set is unusable.
    """
    return get_format(recognise(paths) if format == AUTO else format).open(paths, max_pixels)


def recognise(paths: Sequence[str | Path]) -> str:
    """The name of the one format that recognises `paths`; UserError if there are none or several."""
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
