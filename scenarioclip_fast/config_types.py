"""Check and format the values of config dataclasses, whose types Python does not check. Does not import torch."""

from __future__ import annotations

import math
import os
import types
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from scenarioclip_fast.errors import UserError

EXPECTED = {int: "an integer", float: "a finite number", bool: "true or false", str: "text", Path: "a path"}


def check_types(config: Any, prefix: str = "") -> None:
    """Check each field of a config dataclass against its annotation, in `__post_init__`.

    NumPy scalars become Python's, paths become strings unless the field is a Path, and lists become tuples, also in a
    frozen dataclass.

    Raises:
        UserError: the first wrong value; the message gives its name after `prefix`, the value, and what was expected.
    """
    hints = get_type_hints(type(config))
    for name in (f.name for f in fields(config)):
        value = getattr(config, name)
        try:
            checked = _checked(hints[name], value)
        except TypeError as error:
            raise UserError(f"{prefix}{name}: got {value!r}, expected {error}") from None
        if checked is not value:
            object.__setattr__(config, name, checked)


def to_yaml_text(value: object) -> str:
    """Format a default or a choice as in YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(to_yaml_text, value))}]"
    return str(value) if value != "" else '""'


def to_builtin(value: Any) -> Any:
    """Return a NumPy scalar as the type of Python, a path as a string, and any other value as it is."""
    if type(value).__module__ == "numpy" and hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return value.item()
    return os.fsdecode(value) if isinstance(value, os.PathLike) else value


def expand_user(config: Any, name: str) -> None:
    """Expand the home directory in the path `name` of a config dataclass: shells do not, in `key=~/path`."""
    if (path := getattr(config, name)) is not None and path.startswith("~"):
        object.__setattr__(config, name, os.path.expanduser(path))


def _checked(target: Any, value: Any) -> Any:
    """Return `value` as `target`, or raise TypeError with what was expected."""
    value = to_builtin(value)
    origin, inner = get_origin(target), get_args(target)
    if origin in (Union, types.UnionType):
        if type(None) in inner:
            return None if value is None else _or_null(next(a for a in inner if a is not type(None)), value)
        text, items = inner  # such as str | tuple[ShardSource, ...]
        return _checked(items if isinstance(value, list | tuple) else text, value)
    if origin is Literal:
        for choice in inner:
            if choice == value and isinstance(value, type(choice)):  # 1 is not true
                return choice
        raise TypeError(f"one of {', '.join(map(to_yaml_text, inner))}")
    if origin is tuple and inner[-1] is Ellipsis:
        return tuple(_checked(inner[0], item) for item in value)
    if origin is tuple:
        if isinstance(value, list | tuple) and len(value) == len(inner):
            return tuple(map(_checked, inner, value))
        raise TypeError(f"{len(inner)} numbers")
    if is_dataclass(target):
        if isinstance(value, target):  # type: ignore[arg-type]
            return value
        raise TypeError(f"a {target.__name__}")  # type: ignore[union-attr]
    if (converted := _SCALARS[target](value)) is None:
        raise TypeError(EXPECTED[target])
    return converted


def _or_null(target: Any, value: Any) -> Any:
    try:
        return _checked(target, value)
    except TypeError as error:
        raise TypeError(f"{error}, or null") from None


def _integer(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        return None
    return int(value)  # also of a subclass, which YAML could not represent


def _float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return (int(value) if isinstance(value, Integral) else number) if math.isfinite(number) else None


def _bool(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _text(value: Any) -> str | None:
    text = str(os.fsdecode(value)) if isinstance(value, str | os.PathLike) else None
    return text if text is None or _is_file_name(text) else None


def _is_file_name(text: str) -> bool:
    """Whether the operating system accepts the characters of a text, which may be a path: YAML can represent others."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _path(value: Any) -> Path | None:
    return Path(value) if isinstance(value, str) and value and _is_file_name(value) else None


_SCALARS: dict[Any, Callable[[Any], Any]] = {int: _integer, float: _float, bool: _bool, str: _text, Path: _path}
