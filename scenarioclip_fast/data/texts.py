"""The form in which texts are compared, counted and tokenized."""

from __future__ import annotations

import unicodedata

# Cc: control characters. Cf: format characters, such as zero-width spaces and joiners, byte order marks, soft hyphens
# and bidirectional marks. Cs: lone surrogates, which JSON can contain and UTF-8 cannot. Unassigned characters stay:
# they may be visible characters of a newer Unicode than Python's.
_REMOVED = ("Cc", "Cf", "Cs")


def normalise(text: str) -> str:
    """Return the one spelling of all texts that differ only in case, white space, control characters and composition.

    Removes control and format characters other than white space, lower-cases, composes accents (Unicode NFC), and
    separates words by single spaces. Idempotent. The result can be empty.
    """
    if text.isascii() and text.isprintable():  # most texts: nothing to remove or compose
        return " ".join(text.lower().split())
    text = "".join(c for c in text if c.isspace() or unicodedata.category(c) not in _REMOVED)
    # Composed last, because lower-casing decomposes: it turns a dotted capital I into two characters.
    return " ".join(unicodedata.normalize("NFC", text.lower()).split())
