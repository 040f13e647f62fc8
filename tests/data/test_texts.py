from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path

import pytest

from scenarioclip_fast.data.sources.classes import load_classes
from scenarioclip_fast.data.texts import normalise


@pytest.mark.parametrize(
    ("text", "expected"),
    {
        "  Riding\ta \n Bike ": "riding a bike",
        "a\xa0b\u3000c\u2028d\x1ce\x85f": "a b c d e f",
        "cafe\u0301": "café",
        "E\u0301T\u00c9": "été",
        "\u212bngstro\u0308m": "ångström",
        "\u1112\u1161\u11ab": "한",
        "\u0130": "i\u0307",
        "\u0130\u0316": "i\u0316\u0307",  # lower-casing leaves the marks in another order
        "\u039f\u0394\u039f\u03a3": "\u03bf\u03b4\u03bf\u03c2",  # a final sigma
        "red\x00 c\x1bar\x7f\x9f": "red car",
        "\ufeffre\xadd\u200b \u200ecar\u202c": "red car",
        "e\u200d\u0301": "é",
        "sit\ud800ting": "sitting",
        "\u200b \x07\ud800": "",
        "<|endoftext|>": "<|endoftext|>",
        "a\u0378b\U000e0fffb": "a\u0378b\U000e0fffb",  # unassigned
        "I\u2764\ufe0fDOGS": "i\u2764\ufe0fdogs",
    }.items(),
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected


def test_every_character() -> None:
    for c in map(chr, (*range(0x33480), *range(0xE0000, 0xE0200))):  # the rest is unassigned or private
        text = normalise(f"A{c}\u0301\u03a3")
        assert normalise(text) == text
        visible = unicodedata.category(c) not in ("Cc", "Cf", "Cs")
        assert visible or c.isspace() or text == "á\u03c2"


def test_random_texts() -> None:
    """Idempotent, the same for equivalent texts, and encodable."""
    rng = random.Random(0)
    marks = [c for c in map(chr, range(0x110000)) if unicodedata.combining(c)]
    pools = [marks, [*"aEß\u0130ıſΣσςΑά \t\n"], [*"\x00\xad\u200b\u200d\ufeff\ud800"], [*map(chr, range(0x110000))]]
    for _ in range(20_000):
        text = "".join(rng.choice(rng.choice(pools)) for _ in range(rng.randrange(10)))
        once = normalise(text)
        assert normalise(once) == once == unicodedata.normalize("NFC", once)
        assert normalise(unicodedata.normalize("NFD", text)) == once == normalise(unicodedata.normalize("NFC", text))
        once.encode()


def test_spellings_of_a_class_are_one_class(tmp_path: Path) -> None:
    classes = {"actions": ["cafe\u0301", "Caf\xe9 "], "objects": ["\u200b", " "], "relations": []}
    (tmp_path / "classes.json").write_text(json.dumps(classes))
    assert load_classes(tmp_path / "classes.json") == {"actions": ["caf\xe9"], "objects": [], "relations": []}
