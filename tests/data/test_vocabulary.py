from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from scenarioclip_fast.data import Vocabulary
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
        (lambda r: r["object"]["tokens"].pop(), "numbers of texts and token lists differ"),
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
