"""Read classes.json, which lists the texts that a data set may contain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scenarioclip_fast.data.texts import normalise
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import read_regular
from scenarioclip_fast.parsing import parse_json


def load_json(path: Path, *, strict: bool = True) -> tuple[bytes, Any]:
    """Return the content of a JSON file, raw and parsed; UTF-8, 16 or 32, with or without a byte order mark.

    strict: see `parse_json`; False: for scenes.

    Raises:
        UserError: the file cannot be read or parsed.
    """
    try:
        content = read_regular(path)
        return content, parse_json(content, strict=strict)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from None


def load_classes(path: Path) -> dict[str, list[str]] | None:
    """Read the normalised texts of a classes.json by "actions", "objects" and "relations"; None if the file is missing.

    Texts that are empty once normalised are left out.

    Raises:
        UserError: the file is malformed.
    """
    if not path.exists():
        return None
    _, record = load_json(path)
    levels = ("actions", "objects", "relations")
    if not isinstance(record, dict) or not all(
        isinstance(record.get(level), list) and all(isinstance(text, str) for text in record[level]) for level in levels
    ):
        raise UserError(f"{path}: expected {{{', '.join(f'{level!r}: [texts]' for level in levels)}}}")
    return {level: sorted({normalise(text) for text in record[level]} - {""}) for level in levels}
