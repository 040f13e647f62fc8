from __future__ import annotations

import json
import random
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from scenarioclip_fast.data import Vocabulary
from scenarioclip_fast.data.texts import normalise
from scenarioclip_fast.data.vocabulary import tokenize
from scenarioclip_fast.errors import UserError


def example() -> Vocabulary:
    counts = {"object": {"red car": 3}, "relation": {"red car on mat": 1}}
    return Vocabulary(["running", "eating"], ["red car", "mat", "mat"], ["red car on mat", "mat on red car"], counts)


def test_ids_are_positions_in_sorted_texts() -> None:
    vocabulary = example()
    assert vocabulary.actions == ["eating", "running"]
    assert vocabulary.objects == ["mat", "red car"]
    assert [vocabulary.action_id(t) for t in vocabulary.actions] == [0, 1]
    assert [vocabulary.object_id(t) for t in vocabulary.objects] == [0, 1]
    assert [vocabulary.relation_id(t) for t in vocabulary.relations] == [0, 1]
    assert vocabulary.train_counts("object") == [0, 3]
    assert vocabulary.train_counts("relation") == [0, 1]
    assert vocabulary.train_counts("global") == [0, 0]


def test_merging_takes_the_union_and_weights_the_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Vocabulary(["sleeping", "eating"], ["dog", "mat"], [], {"object": {"dog": 1, "mat": 4}})
    record = {"first": example().to_json(), "second": other.to_json()}
    sets = [Vocabulary.from_json(r, name) for name, r in record.items()]
    monkeypatch.setitem(sys.modules, "instant_clip_tokenizer", None)  # token ids come from the sets
    merged = Vocabulary.merge(sets, [2, 0.2])
    assert merged.actions == ["eating", "running", "sleeping"] and merged.objects == ["dog", "mat", "red car"]
    assert merged.relations == example().relations
    # "dog": 0.2 would round to 0, which means held out of training.
    assert merged.train_counts("object") == [1, 1, 6] and merged.train_counts("global") == [0, 0, 0]
    assert merged.tokens("object") == [sets[1].tokens("object")[0], *sets[0].tokens("object")]
    assert Vocabulary.merge(sets[:1], [1]) is sets[0]
    record["second"]["object"]["tokens"][1] = [49406, 5, 49407]
    sets[1] = Vocabulary.from_json(record["second"], "second")
    with pytest.raises(UserError, match="disagree on the token ids of the object text 'mat': pack them with the same"):
        Vocabulary.merge(sets, [1, 1])


def test_unknown_texts_and_levels() -> None:
    with pytest.raises(UserError, match=r"unknown object text 'dog'.*2 in the vocabulary"):
        example().object_id("dog")
    with pytest.raises(ValueError, match="got 'objects', expected one of global, object, relation"):
        example().tokens("objects")


def test_tokens_match_clip() -> None:
    # Ids of the original CLIP tokenizer.
    assert tokenize("a photo of a cat") == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenize("a diagram") == [49406, 320, 22697, 49407]
    assert tokenize("a dog") == [49406, 320, 1929, 49407]
    assert tokenize("Hello World!") == [49406, 3306, 1002, 256, 49407]
    assert tokenize("  A  Photo\tof a CAT ") == tokenize("a photo of a cat")


# What texts are made of. The letters of Unicode 3.2, since tokenizers differ on those newer than their own tables.
LETTERS = [c for c in map(chr, range(0x110000)) if unicodedata.ucd_3_2_0.category(c) not in ("Cn", "Co", "Cs")]
PIECES: list[list[str]] = [
    [chr(c) for c in range(33, 127)],
    LETTERS,
    [*"0123456789²½①٣"],
    [*"éÈüñçøåßæœÀÎÕẞıİſǅﬁΣΑ", "e\u0301", "A\u030a", "o\u0323\u0308", "\u0345", "\u212b", "ΟΔΟΣ", "Ελλάδα", "Привет"],
    ["中文字", "日本のカタカナ", "한국어", "\u1112\u1161\u11ab", "नमस्ते", "ไทย", "שלום", "مرحبا"],
    ["😀", "👩\u200d🚀", "🏳\ufe0f\u200d🌈", "❤\ufe0f", "🇩🇪", "👍🏽"],
    [*" \t\n\v\f\r\x1c\x85\xa0\u1680\u2003\u2028\u3000"],
    ["'s", "'S", "'t", "'RE", "'ve", "'ll", "'m", "'d", "''", "’s", "ʼ", "`", "'ſ"],
    ["&amp;", "&lt;", "&#39;", "<br/>", " <|endoftext|> ", " <|startoftext|> ", "<|", "|>"],
    ["a photo of", "Cat", "RED", "running", "on the", "internationalization"],
    [*"\x00\x07\x1b\x7f\x9f\xad\u200b\u200d\u200e\u202e\ufeff\ud800"],
]


def random_texts(n: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choice(rng.choice(PIECES)) for _ in range(rng.randrange(16))) for _ in range(n)]


@pytest.fixture(scope="module")
def clip_tokenizer() -> Any:
    """CLIPTokenizer with CLIP's merges, which instant_clip_tokenizer contains as text."""
    instant_clip_tokenizer = pytest.importorskip("instant_clip_tokenizer")
    transformers = pytest.importorskip("transformers")
    (library,) = Path(instant_clip_tokenizer.__file__).parent.glob("instant_clip_tokenizer.*")
    text = library.read_bytes().partition(b"bpe_simple_vocab_16e6.txt#version: 0.2\n")[2]
    merges = [tuple(line.decode().split()) for line in text.split(b"\n", 48894)[:48894]]
    # Printable bytes stand for themselves, the others for the characters from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]
    tokens = [*symbols, *(s + "</w>" for s in symbols), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    assert len(set(tokens)) == 49408
    return transformers.CLIPTokenizer({token: i for i, token in enumerate(tokens)}, merges)


def test_tokens_equal_those_of_transformers(clip_tokenizer: Any) -> None:
    texts = random_texts(10_000, seed=0)
    expected = clip_tokenizer([normalise(text) for text in texts], split_special_tokens=True)["input_ids"]
    assert [tokenize(text, None) for text in texts] == expected
    truncated = clip_tokenizer(texts[0] * 50, max_length=77, truncation=True)["input_ids"]
    assert len(truncated) == 77 and tokenize(texts[0] * 50) == truncated


def test_tokens_of_texts_as_they_are_equal_those_of_transformers(clip_tokenizer: Any) -> None:
    """Without the exceptions that `tokenize` lists, `normalise` does not make a difference."""
    texts = [t for t in random_texts(10_000, seed=1) if "Σ" not in t and "<|" not in t]
    texts = ["".join(c for c in t if c in "\t\n\v\f\r\x85" or unicodedata.category(c)[0] != "C") for t in texts]
    assert len(texts) > 5000
    assert [tokenize(text, None) for text in texts] == clip_tokenizer(texts)["input_ids"]


def test_special_tokens_in_a_text_are_text() -> None:
    ids = tokenize("a <|endoftext|> b <|startoftext|>")
    assert (ids.index(49407), ids.count(49407), ids.count(49406)) == (len(ids) - 1, 1, 1)
    assert ids[-2] != 49406 and tokenize("b")[1] in ids


def test_spellings_of_a_text_have_the_same_tokens() -> None:
    assert tokenize("Cafe\u0301\u200b ") == tokenize("café") != tokenize("cafe")


def test_tokens_are_truncated_to_the_context() -> None:
    ids = tokenize("cat " * 100)
    assert (len(ids), ids[0], ids[-1]) == (77, 49406, 49407)
    assert len(tokenize("cat " * 75)) == 77
    # The vocabulary stores all tokens; the model truncates them to its context.
    assert len(Vocabulary(["cat " * 100], [], []).tokens("global")[0]) == 102


def test_file_round_trip_needs_no_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = example()
    vocabulary.save(tmp_path / "v.json")
    monkeypatch.setitem(sys.modules, "instant_clip_tokenizer", None)
    back = Vocabulary.load(tmp_path / "v.json")
    assert back == vocabulary
    assert all(back.tokens(level) == vocabulary.tokens(level) for level in ("global", "object", "relation"))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda r: r.update(schema=9), "got schema 9, expected 1"),
        (lambda r: r.pop("object"), "malformed vocabulary"),
        (lambda r: r["object"]["train_counts"].pop(), "malformed vocabulary"),
        (lambda r: r["object"]["tokens"].pop(), "numbers of texts, token lists and train counts differ"),
        (lambda r: r["object"]["texts"].reverse(), "unsorted or not distinct"),
    ],
)
def test_malformed_files(tmp_path: Path, break_it: object, message: str) -> None:
    record = example().to_json()
    break_it(record)  # type: ignore[operator]
    path = tmp_path / "v.json"
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=message):
        Vocabulary.load(path)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"v\.json: no such file"):
        Vocabulary.load(tmp_path / "v.json")
    (tmp_path / "v.json").write_text("{")
    with pytest.raises(UserError, match=r"v\.json: not a readable vocabulary"):
        Vocabulary.load(tmp_path / "v.json")
