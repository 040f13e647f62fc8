"""Parse foreign JSON and YAML: a hostile or damaged text is a ValueError of one line, in bounded time and memory."""

from __future__ import annotations

import functools
import json
import math
from typing import Any

from scenarioclip_fast.requirements import require
from scenarioclip_fast.terminal import short

MAX_YAML = 1 << 18  # characters; a config has a few thousand, and PyYAML reads about 200,000 a second
MAX_DEPTH = 100
_MAX_NODES = 100_000  # of a YAML text with its aliases expanded
_MAX_NUMBER = 100  # characters of a YAML number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        seen: set[str] = set()
        name = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"key {short(name)} occurs twice in an object")
    return record


DECODER = json.JSONDecoder(object_pairs_hook=_unique)
"""Refuses repeated keys, of which Python's own decoder silently keeps the last."""


def parse_json(content: bytes | str, *, strict: bool = True) -> Any:
    """Parse a JSON text; bytes: UTF-8, 16 or 32, with or without a byte order mark.

    Args:
        strict: refuse numbers that are not finite or need more than 64 bits, and more than 100 levels of nesting.
            False: for the scenes of a data set, which are checked one by one.

    Raises:
        ValueError: not such a text, or an object has a key twice.
    """
    if isinstance(content, bytes):
        content = content.decode(json.detect_encoding(content))
    try:
        value = DECODER.decode(content.removeprefix("\ufeff"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if strict:
        _check(value)
    return value


def are_numbers(*values: Any) -> bool:
    """Whether all parsed values are numbers."""
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def is_shallow(value: Any, depth: int = MAX_DEPTH) -> bool:
    """Whether a parsed value is nested at most so many levels deep."""
    level = [value]
    for _ in range(depth):
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return True
    return False


def _check(value: Any) -> None:
    if not is_shallow(value):
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
    rest = [value]
    while rest:
        item = rest.pop()
        if isinstance(item, dict):
            rest += item.values()
        elif isinstance(item, list):
            rest += item
        elif isinstance(item, float) and not math.isfinite(item):
            raise ValueError(f"got the number {item}, expected a finite one")
        elif isinstance(item, int) and item.bit_length() > 64:
            raise ValueError(f"got an integer of {item.bit_length()} bits, expected at most 64")


def parse_yaml(text: str) -> Any:
    """Parse a YAML text: plain values only.

    Raises:
        ValueError: not YAML or malformed, a key that occurs twice, more than 256 KiB, 100 levels or, with aliases
            expanded, 100,000 nodes.
        MissingDependencyError: PyYAML is not installed.
    """
    yaml = require("yaml")
    if len(text) > MAX_YAML:
        raise ValueError(f"got {len(text)} characters of YAML, expected at most {MAX_YAML}")
    try:
        return yaml.load(text, _loader())
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:  # a tag that does not fit its value
        raise ValueError(f"{type(error).__name__}: {error}") from None


@functools.cache
def _loader() -> Any:
    yaml = require("yaml")

    class Loader(yaml.SafeLoader):  # type: ignore[name-defined]
        def get_single_node(self) -> Any:
            node = super().get_single_node()
            if node is not None:
                _measure(node, {}, MAX_DEPTH)
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            lines: dict[str, int] = {}  # PyYAML silently keeps the last value of a repeated key
            for name, line in ((str(key.value), key.start_mark.line + 1) for key, _ in getattr(node, "value", ())):
                if name in lines:
                    raise ValueError(f"key {name!r} occurs in line {lines[name]} and again in line {line}")
                lines[name] = line
            return super().construct_mapping(node, deep)

        def construct_number(self, node: Any) -> Any:
            if len(node.value) > _MAX_NUMBER:
                raise ValueError(f"got a number of {len(node.value)} characters, expected at most {_MAX_NUMBER}")
            name = node.tag.rpartition(":")[2]
            return getattr(self, f"construct_yaml_{name}")(node)

    for name in ("int", "float"):
        Loader.add_constructor(f"tag:yaml.org,2002:{name}", Loader.construct_number)
    return Loader


def _measure(node: Any, measured: dict[int, tuple[int, int]], depth: int) -> tuple[int, int]:
    """The nodes and levels of a node with aliases expanded, which determine the time and memory to use its value."""
    size, height = measured.get(id(node), (0, 0))
    if height > depth or depth == 0:  # also an alias inside its own anchor
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
    if not size:
        inner = node.value if isinstance(node.value, list) else []
        parts = [part for item in inner for part in (item if isinstance(item, tuple) else (item,))]
        sizes, heights = zip((0, 0), *(_measure(part, measured, depth - 1) for part in parts), strict=True)
        size, height = measured[id(node)] = 1 + sum(sizes), 1 + max(heights)
    if size > _MAX_NODES:
        raise ValueError(f"expands to more than {_MAX_NODES} nodes")
    return size, height
