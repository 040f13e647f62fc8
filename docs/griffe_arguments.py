"""Griffe extension: split `a, b: text` in a docstring's arguments into one entry per name.

Griffe then finds the type of each, and an entry that names no argument of the signature is a warning.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_ENTRY = re.compile(
    r"^(?P<indent> +)(?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)+)(?P<text>: .*(?:\n(?P=indent) +.*)*)", re.MULTILINE
)


def split_arguments(docstring: str) -> str:
    """Repeat the text of an entry for each of its names."""
    before, heading, after = docstring.partition("\nArgs:\n")
    section, blank, rest = after.partition("\n\n")

    def split(entry: re.Match[str]) -> str:
        return "\n".join(f"{entry['indent']}{name}{entry['text']}" for name in entry["names"].split(", "))

    return before + heading + _ENTRY.sub(split, section) + blank + rest


class SplitArguments(Extension):
    """Applies `split_arguments` to every docstring."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = split_arguments(obj.docstring.value)
