"""Griffe extension: split `a, b: text` among a docstring's arguments or attributes into one entry per name.

Griffe then finds the type of each name, and warns about a name that is not in the signature.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_SECTION = re.compile(r"^(Args|Attributes):\n(?: .*\n?)+", re.MULTILINE)
_ENTRY = re.compile(
    r"^(?P<indent> +)(?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)+)(?P<text>: .*(?:\n(?P=indent) +.*)*)", re.MULTILINE
)


def split_arguments(docstring: str) -> str:
    """Repeat the text of an entry for each of its names."""

    def split(entry: re.Match[str]) -> str:
        return "\n".join(f"{entry['indent']}{name}{entry['text']}" for name in entry["names"].split(", "))

    return _SECTION.sub(lambda section: _ENTRY.sub(split, section[0]), docstring)


class SplitArguments(Extension):
    """Applies `split_arguments` to every docstring."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = split_arguments(obj.docstring.value)
