"""Registry of the formats that `pack` reads.

Add a format with a line in `_FORMATS`, with a call to `register`, or with an entry point in the group
"scenarioclip_fast.sources" of an installed package.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from importlib.metadata import entry_points
from inspect import isclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from scenarioclip_fast.data.sources.sniff import describe
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import is_url
from scenarioclip_fast.terminal import get_logger

if TYPE_CHECKING:
    from scenarioclip_fast.data.sources.base import Source, SourceFormat, SourceOptions
    from scenarioclip_fast.data.sources.remote_tars import RemoteTarSource

_log = get_logger(__name__)

AUTO = "auto"
_TARS = "webdataset"
ENTRY_POINTS = "scenarioclip_fast.sources"

# name -> the format, or "module:attribute" to import on first use
_FORMATS: dict[str, SourceFormat | str] = {
    "published": "scenarioclip_fast.data.sources.published:PublishedSource",
    "webdataset": "scenarioclip_fast.data.sources.webdataset:WebDatasetSource",
    "psg": "scenarioclip_fast.data.sources.psg:PsgSource",
    "coco-panoptic": "scenarioclip_fast.data.sources.coco_panoptic:CocoPanopticSource",
    "visual-genome": "scenarioclip_fast.data.sources.visual_genome:VisualGenomeSource",
    "swig": "scenarioclip_fast.data.sources.swig:SwigSource",
}


def register(name: str, source_format: SourceFormat | str) -> None:
    """Register a format for `pack(..., format=name)` and for "auto".

    Args:
        name: value of `--format`.
        source_format: a subclass of `Source` with the class members of `SourceFormat`, or "module:attribute".

    Raises:
        ValueError: another format has this name.
        TypeError: `source_format` lacks a member of `SourceFormat`.
    """
    if not isinstance(source_format, str) and (problem := _problem(source_format)):
        raise TypeError(f"format {name!r}: {source_format!r} {problem}")
    if name == AUTO or _location(_FORMATS.get(name, source_format)) != _location(source_format):
        raise ValueError(f"format {name!r} is already registered")
    _FORMATS[name] = source_format


def format_names() -> list[str]:
    """The names of all formats, "auto" first."""
    _load_entry_points()
    return [AUTO, *_FORMATS]


def get_format(name: str) -> SourceFormat:
    """Look up a format by name.

    Raises:
        UserError: no such format, or it cannot be imported.
    """
    check_format(name)
    found = _FORMATS[name]
    if isinstance(found, str):
        module, _, attribute = found.partition(":")
        try:
            loaded = getattr(importlib.import_module(module), attribute)
        except Exception as error:  # of another package: anything
            raise UserError(f"format {name!r}: cannot import {found}: {type(error).__name__}: {error}") from error
        if problem := _problem(loaded):
            raise UserError(f"format {name!r}: {found} {problem}")
        found = _FORMATS[name] = cast("SourceFormat", loaded)
    return found


def check_format(name: str) -> None:
    """Raise UserError unless `name` is "auto" or a registered format."""
    if name not in format_names():
        raise UserError(f"format: got {name!r}, expected one of {', '.join(format_names())}")


def open_source(
    paths: str | Path | Sequence[str | Path], format: str = AUTO, options: SourceOptions | None = None
) -> Source:
    """Open a data set on disk.

    Args:
        paths: path or paths of the data set; most formats expect a single directory.
        format: a registered name, or "auto" to detect the format.
        options: how to read it; None: the defaults.

    Raises:
        UserError: no format or several recognise the paths, the format does not use an option that is given, or the
            data set is unusable.
    """
    from scenarioclip_fast.data.sources.base import SourceOptions

    options = options or SourceOptions()
    paths = [paths] if isinstance(paths, str | Path) else paths
    name = recognise(paths) if format == AUTO else format
    found = get_format(name)
    if unused := [option for option in options.given() if option not in getattr(found, "accepts", ())]:
        raise UserError(f"{unused[0]}: data sets of format {name!r} do not use this option; remove it")
    return found.open(paths, options)


def open_urls(paths: Sequence[str | Path], format: str = AUTO, options: SourceOptions | None = None) -> RemoteTarSource:
    """Open a data set on URLs, which must be one of WebDataset tars; otherwise as `open_source`."""
    from scenarioclip_fast.data.sources.remote_tars import RemoteTarSource

    url = next(str(path) for path in paths if is_url(path))
    if local := [path for path in paths if not is_url(path)]:
        raise UserError(f"{local[0]}: got a local path beside {url}, expected only paths or only URLs, such as file://")
    if format not in (AUTO, _TARS):
        raise UserError(f"{url}: got a URL, expected a local or mounted path: of URLs, only WebDataset tars are read")
    for option in [] if options is None else options.given():
        if option not in RemoteTarSource.accepts:
            raise UserError(f"{option}: data sets of format {_TARS!r} do not use this option; remove it")
    return RemoteTarSource([str(path) for path in paths], options)


def recognise(paths: Sequence[str | Path]) -> str:
    """Return the name of the only format that recognises `paths`.

    Raises:
        UserError: no format or several recognise `paths`.
    """
    formats = _usable_formats()
    found = [name for name, source_format in formats.items() if _recognises(name, source_format, paths)]
    if len(found) == 1:
        return found[0]
    shown = ", ".join(map(str, paths[:3])) + (", ..." if len(paths) > 3 else "")
    if found:
        raise UserError(f"{shown}: recognised as {' and '.join(found)}; choose one with --format")
    for path in paths:
        if not Path(path).exists():
            raise UserError(f"{path}: no such file or directory")
        if what := describe(Path(path)):
            raise UserError(f"{path}: these are {what}, not a data set of scenes")
    known = "; ".join(f"{name}: {source_format.expects}" for name, source_format in formats.items())
    raise UserError(f"{shown}: not a data set of a known format ({known})")


def _usable_formats() -> dict[str, SourceFormat]:
    """All formats but those that cannot be imported: a broken plug-in must not break "auto"."""
    formats = {}
    for name in format_names()[1:]:
        try:
            formats[name] = get_format(name)
        except UserError as error:
            _log.warning("ignored: %s", error)
    return formats


def _recognises(name: str, source_format: SourceFormat, paths: Sequence[str | Path]) -> bool:
    try:
        return source_format.recognises(paths)
    except OSError:  # of the path
        raise
    except Exception as error:  # of another package: anything
        _log.warning("ignored: format %r cannot inspect %s: %s: %s", name, paths[0], type(error).__name__, error)
        return False


def _problem(source_format: object) -> str | None:
    """Return what a format lacks of `SourceFormat`, as a predicate."""
    lacking = [name for name in ("recognises", "open") if not callable(getattr(source_format, name, None))]
    if not isinstance(getattr(source_format, "expects", None), str):
        lacking.insert(0, "expects")
    return f"lacks {', '.join(lacking)}: expected the members of SourceFormat" if lacking else None


def _location(source_format: SourceFormat | str) -> object:
    """Return "module:attribute" of a class, so that it equals its entry point."""
    return f"{source_format.__module__}:{source_format.__qualname__}" if isclass(source_format) else source_format


@functools.cache
def _load_entry_points() -> None:
    for point in entry_points(group=ENTRY_POINTS):
        if point.name == AUTO or _location(_FORMATS.get(point.name, point.value)) != point.value:
            package = point.dist.name if point.dist else point.value
            _log.warning("ignored: format %r of %s, because another format has this name", point.name, package)
        else:
            _FORMATS.setdefault(point.name, point.value)
