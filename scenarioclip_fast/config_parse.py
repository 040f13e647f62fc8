"""Convert YAML values and `key=value` overrides to config dataclasses.

Every error (an unknown key, a wrong type) is a UserError that names the dotted key. The dataclasses are known only
by their type hints, so a new field needs no change here.
"""

from __future__ import annotations

import importlib.resources
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from scenarioclip_fast.config_types import EXPECTED, to_builtin, to_yaml_text
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.parsing import parse_yaml
from scenarioclip_fast.suggest import nearest
from scenarioclip_fast.terminal import short

C = TypeVar("C")

# Keys of other trainers -> keys of this one.
ALIASES = {
    "learning_rate": "optim.lr",
    "rate": "optim.lr",
    "max_steps": "train.steps",
    "max_epochs": "train.epochs",
    "output_dir": "run.dir",
    "gradient_accumulation_steps": "train.accumulate",
    "accumulate_grad_batches": "train.accumulate",
    "accum_freq": "train.accumulate",
}


class RawValue(str):
    """The text of an override, to be parsed as the type of its key."""


def packaged_configs() -> dict[str, Path]:
    """Return name -> file of the configs shipped with the package, such as "tiny"."""
    folder = Path(str(importlib.resources.files("scenarioclip_fast.configs")))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def find_config(path: str | Path) -> Path:
    """Return `path` if it exists or looks like a path, otherwise the packaged config of that name."""
    if Path(path).is_file() or Path(path).name != str(path) or Path(path).suffix:
        return Path(path)
    packaged = packaged_configs()
    if str(path) not in packaged:
        near = nearest(str(path), packaged)
        hint = f"did you mean {near}? " if near else ""
        raise UserError(f"config {str(path)!r}: {hint}expected a YAML file, or one of {', '.join(packaged)}")
    return packaged[str(path)]


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read the nested mapping of a YAML file; an empty file is an empty mapping.

    Raises:
        UserError: the file cannot be read, is not UTF-8 or YAML, or is not a mapping.
    """
    try:
        values = parse_yaml(Path(path).read_text(encoding="utf-8"))
        if isinstance(values, dict):
            values = plain(values)
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read the config {path}: byte {error.start} is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror or error}") from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(values, dict | None):
        raise UserError(f"{path}: got {_kind(values)}, expected a mapping of config sections")
    return values or {}


def parse_override(text: str, example: str = "optim.lr=1e-4") -> tuple[list[str], RawValue]:
    """Split `dotted.key=value` into the path of the key and its value; errors show `example`."""
    key, equals, value = text.partition("=")
    if not equals and Path(text).suffix in (".yaml", ".yml"):
        raise UserError(f"got {text!r}, expected key=value: did you mean -c {text}?")
    if not equals and text.endswith((",", "]", "}")):
        raise UserError(f"got {text!r}, expected key=value: quote a list that contains spaces, 'train.profile=[3, 5]'")
    if not equals or not key.strip():
        raise UserError(f"got {text!r}, expected key=value, for example {example}")
    return key.strip().split("."), RawValue(value.strip())


def set_value(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Set a leaf of a nested mapping, creating or replacing the mappings on its path."""
    for part in path[:-1]:
        inner = tree.setdefault(part, {})
        if not isinstance(inner, dict):
            inner = tree[part] = {}
        tree = inner
    tree[path[-1]] = value


def plain(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Copy a nested mapping to dicts; an empty section of a file (None) becomes an empty mapping."""
    copy: dict[str, Any] = {}
    for key, value in values.items():
        if not isinstance(key, str):
            raise UserError(f"{prefix}{key!r}: got a key of type {type(key).__name__}, expected a name")
        if value is None and not prefix:
            value = {}
        copy[key] = plain(value, f"{prefix}{key}.") if isinstance(value, Mapping) else value
    return copy


def merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Overlay one nested mapping on another."""
    merged = dict(base)
    for key, value in over.items():
        current = merged.get(key)
        merged[key] = merge(current, value) if isinstance(current, dict) and isinstance(value, Mapping) else value
    return merged


def with_lists(values: dict[str, Any]) -> dict[str, Any]:
    """Replace tuples by lists, as YAML and JSON load them."""
    return {
        name: with_lists(v) if isinstance(v, dict) else list(v) if isinstance(v, tuple) else v
        for name, v in values.items()
    }


def dotted_keys(cls: Any, prefix: str = "") -> Iterator[str]:
    """Yield all dotted keys of a config dataclass, sections included."""
    hints = get_type_hints(cls)
    for f in fields(cls):
        yield prefix + f.name
        if is_dataclass(hints[f.name]):
            yield from dotted_keys(hints[f.name], f"{prefix}{f.name}.")


def build(cls: type[C], tree: Mapping[str, Any], extra_keys: Iterable[str] = ()) -> C:
    """Build the config dataclass `cls` from a nested mapping.

    Args:
        extra_keys: valid dotted keys that are not fields, for "did you mean".
    """
    return _section("", cls, tree, [*dotted_keys(cls), *extra_keys])


def convert(key: str, target: Any, value: Any, known: Sequence[str] = ()) -> Any:
    """Convert `value` to the type `target`, or raise a UserError that names `key`."""
    if is_dataclass(target) and isinstance(target, type):
        return _section(key, target, value, known)
    value = to_builtin(value)
    origin = get_origin(target)
    if origin in (Union, types.UnionType) and type(None) not in get_args(target):
        # Text, or a list whose items the section itself converts.
        listed = isinstance(value, RawValue) and value.startswith(("[", "{"))
        value = _scalar(key, value) if listed else value
        return str(value) if isinstance(value, str) else value
    if origin in (Union, types.UnionType):
        if value is None or (isinstance(value, RawValue) and value.lower() in ("null", "none", "~", "")):
            return None
        return convert(key, next(a for a in get_args(target) if a is not type(None)), value)
    if origin is Literal:
        return _choice(key, get_args(target), value)
    if target is str:
        if isinstance(value, str):
            return str(value)
        raise _wrong_type(key, target, value)
    if isinstance(value, RawValue):
        value = _scalar(key, value)
    if origin is tuple:
        inner = get_args(target)
        if not isinstance(value, list | tuple) or len(value) != len(inner):
            raise _wrong_type(key, target, value)
        return tuple(convert(f"{key}[{i}]", t, v) for i, (t, v) in enumerate(zip(inner, value, strict=True)))
    number = _number(value)
    if target is bool and isinstance(value, bool):
        return value
    if target is float and number is not None:
        return number
    if target is int and number is not None and number.is_integer():
        exact = str(value).strip().removeprefix("+")  # a float would round a large integer
        return int(exact) if exact.removeprefix("-").isdecimal() else int(number)
    raise _wrong_type(key, target, value)


def _section(key: str, cls: type[C], value: Any, known: Sequence[str]) -> C:
    hints = get_type_hints(cls)
    if not isinstance(value, Mapping):
        raise UserError(f"{key}: got {_describe(value)}, expected a section with {', '.join(hints)}")
    prefix = f"{key}." if key else ""
    for name in value:
        if name not in hints:
            raise _unknown(prefix + name, [prefix + n for n in hints], known)
    converted = {name: convert(prefix + name, hints[name], v, known) for name, v in value.items()}
    try:
        return cls(**converted)
    except UserError as error:
        # A class that is also used outside a config names its fields relative to its section, or to the one around it.
        section, field = key.partition(".")[0], re.split(r"[:. \[]", str(error), maxsplit=1)[0]
        if f"{section}.{field}" in known:
            raise UserError(f"{section}.{error}") from None
        raise


def _unknown(key: str, siblings: list[str], known: Sequence[str]) -> UserError:
    # Either the last part is right and the section wrong (train.lr), or vice versa (optim.decay).
    name = key.rpartition(".")[2]
    if key in known:  # `run.seed: 1` in a file
        section = key.rpartition(".")[0]
        return UserError(f"unknown config key {key!r}: write it as {name} in the section {section}")
    near = [ALIASES[name]] if ALIASES.get(name) in known else [k for k in known if k.rpartition(".")[2] == name]
    if found := near[0] if near else nearest(key, known):
        return UserError(f"unknown config key {key}: did you mean {found}?")
    return UserError(
        f"unknown config key {key}: the nearest is {nearest(key, siblings, 0.0)}; expected one of {', '.join(siblings)}"
    )


def _choice(key: str, choices: Sequence[Any], value: Any) -> Any:
    if isinstance(value, RawValue) and bool in map(type, choices):
        value = _scalar(key, value)
    for choice in choices:
        if choice == value and isinstance(value, type(choice)):  # 1 is not true
            return choice
    raise UserError(f"{key}: got {_describe(value)}, expected one of {', '.join(map(to_yaml_text, choices))}")


def _scalar(key: str, text: str) -> Any:
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise UserError(f"{key}: got {short(str(text))}, which is not a YAML value: {error}") from None


def _number(value: Any) -> float | None:
    """Return a finite number, also from a string, because YAML 1.1 reads 1e-3 as a string; otherwise None."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) != float("inf") and number == number else None


def _wrong_type(key: str, target: Any, value: Any) -> UserError:
    expected = EXPECTED.get(target) or f"a list of {len(get_args(target))} numbers"
    return UserError(f"{key}: got {_describe(value)}, expected {expected}")


def _describe(value: Any) -> str:
    return short(str(value)) if isinstance(value, str) else f"{short(value)} ({_kind(value)})"


def _kind(value: Any) -> str:
    return {"dict": "a mapping", "list": "a list", "NoneType": "null"}.get(type(value).__name__, type(value).__name__)
