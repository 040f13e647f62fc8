from __future__ import annotations

import hashlib
import io
import itertools
import json
import pickle
import random
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vocabularies import use_json_vocabulary

from scenarioclip_fast.data import ShardSet, Vocabulary, generate_scenes, pack
from scenarioclip_fast.data.vocabulary import VocabularyWriter, tokenize
from scenarioclip_fast.data.vocabulary_file import HEADER_BYTES, MAGIC, LevelBuilder, write_levels
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.levels import LEVELS

FILE = "scenarioclip_fast.data.vocabulary_file"
ALPHABET = ["a", "b", " ", "\0", "~", "\x7f", "é", "ÿ", "Ā", "中", "\uffff", "😀", "\U0010ffff"]


def random_texts(n: int, seed: int) -> list[str]:
    """Distinct texts, many of which begin alike, from all ranges of UTF-8."""
    rng = random.Random(seed)
    return sorted({"".join(rng.choices(ALPHABET, k=rng.randrange(20))) for _ in range(n)})


def example(n: int = 300) -> Vocabulary:
    parts = [random_texts(n, seed) for seed in range(3)]
    rng = random.Random(9)
    counts = {level: {t: rng.randrange(2**40) for t in texts} for level, texts in zip(LEVELS, parts, strict=True)}
    return Vocabulary(*parts, counts)


def binary(vocabulary: Vocabulary) -> bytes:
    file = io.BytesIO()
    vocabulary.write(file)
    return file.getvalue()


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat small vocabularies like large ones."""
    monkeypatch.setattr(f"{FILE}._DICT_TEXTS", 0)
    monkeypatch.setattr(f"{FILE}._BLOCK", 7)
    monkeypatch.setattr(f"{FILE}._CHECKED", 5)
    monkeypatch.setattr(f"{FILE}._WORDS_BYTES", 16)


@pytest.mark.parametrize("n", [0, 1, 300])
def test_both_forms_are_equal(n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, search: None) -> None:
    vocabulary = example(n)
    vocabulary.save(tmp_path / "v.json")
    vocabulary.save(tmp_path / "v.bin")
    # Written bit by bit, as one call would.
    text = json.dumps(vocabulary.to_json(), ensure_ascii=False, separators=(",", ":"))
    assert (tmp_path / "v.json").read_text("utf-8") == text + "\n"
    monkeypatch.setitem(sys.modules, "instant_clip_tokenizer", None)  # token ids come from the files
    from_json, mapped = Vocabulary.load(tmp_path / "v.json"), Vocabulary.load(tmp_path / "v.bin")
    assert from_json == mapped == vocabulary and from_json.to_json() == mapped.to_json() == vocabulary.to_json()
    assert from_json.checksum() == mapped.checksum()
    assert binary(from_json) == binary(mapped) == (tmp_path / "v.bin").read_bytes()


def test_checksum_covers_texts_and_tokens() -> None:
    record = Vocabulary(["ab"], ["c"], []).to_json()
    found = {Vocabulary.from_json(record, "").checksum()}
    record["object"]["tokens"] = [[49406, 49407]]
    found.add(Vocabulary.from_json(record, "").checksum())
    found |= {Vocabulary(["ab"], [], ["c"]).checksum(), Vocabulary(["a", "b"], ["c"], []).checksum()}
    assert len(found) == 4


def test_every_text_is_found_and_no_other(tmp_path: Path, search: None) -> None:
    example().save(tmp_path / "v.bin")
    vocabulary = Vocabulary.load(tmp_path / "v.bin")
    for level in LEVELS:
        texts = example().texts(level)[:]
        assert len(texts) > 200
        assert [vocabulary.id(level, text) for text in texts] == list(range(len(texts)))
        others = {text + c for text in texts for c in ("", *ALPHABET)} | {text[:-1] for text in texts}
        for text in ["\ud800", "a\udfff", *(others - set(texts))]:
            for _ in range(2):  # the second one from the cache
                with pytest.raises(UserError, match=f"unknown {level} text"):
                    vocabulary.id(level, text)


def test_sequences_are_like_lists(tmp_path: Path, search: None) -> None:
    example().save(tmp_path / "v.bin")
    vocabulary = Vocabulary.load(tmp_path / "v.bin")
    texts = random_texts(300, 1)
    tokens = [tokenize(text, None) for text in texts]
    counts = example().train_counts("object")[:]
    for found, expected in (
        (vocabulary.objects, texts),
        (vocabulary.tokens("object"), tokens),
        (vocabulary.train_counts("object"), counts),
    ):
        n = len(expected)
        assert found == expected and expected == found and [*found] == expected and len(found) == n
        assert found != expected[:-1] and found != [*expected[:-1], None] and found != "text"
        assert [found[i] for i in range(-n, n)] == expected + expected
        for s in itertools.starmap(slice, itertools.product((None, 0, 3, -5, n + 9), (None, 0, 8, -2), (None, 2, -3))):
            assert found[s] == expected[s], s
        assert found[np.int64(3)] == expected[3] and expected[5] in found and found.index(expected[5]) <= 5
        for i in (n, -n - 1):
            with pytest.raises(IndexError, match=f"got index {i}"):
                found[i]
        assert pickle.loads(pickle.dumps(found)) == expected
    assert vocabulary.id("object", texts[3]) == 3  # a search, which a copy must make anew
    copy = pickle.loads(pickle.dumps(vocabulary))
    assert copy == vocabulary and copy.id("object", texts[4]) == 4


def counted(splits: list[tuple[str, dict[str, Counter[str]]]]) -> Vocabulary:
    texts: dict[str, set[str]] = {level: set() for level in LEVELS}
    train: dict[str, Counter[str]] = {level: Counter() for level in LEVELS}
    for split, found in splits:
        for level in LEVELS:
            texts[level].update(found[level])
            train[level].update(found[level] if split == "train" else {})
    return Vocabulary(*(texts[level] for level in LEVELS), train)


@pytest.mark.parametrize("limits", [{}, {"_RUN_TEXTS": 40, "_MAX_RUNS": 3}])
def test_a_pack_is_written_from_sorted_runs(
    limits: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, search: None
) -> None:
    for name, value in limits.items():
        monkeypatch.setattr(f"scenarioclip_fast.data.vocabulary.{name}", value)
        monkeypatch.setattr(f"{FILE}._SPOOL", 100)  # bytes: runs and sections are in files
    rng = random.Random(0)
    known = random_texts(200, 5)
    shards = [
        (split, {level: Counter(rng.choices(known, k=30)) for level in LEVELS})
        for split in ("train", "val", "train", "test", "train", "train")
    ]
    expected = counted(shards)
    classes = {name: known[k :: 2 + k] + known[:3] for k, name in enumerate(("actions", "objects", "relations"))}
    counts = {level: dict(zip(expected.texts(level), expected.train_counts(level), strict=True)) for level in LEVELS}
    for order in range(3):
        for chosen, wanted in ((None, expected), (classes, Vocabulary(*classes.values(), counts))):
            writer = VocabularyWriter(tmp_path)
            for split, texts in shards:
                writer.add(split, texts)
            file = io.BytesIO()
            assert writer.write(file, chosen) == {level: len(wanted.texts(level)) for level in LEVELS}
            assert file.getvalue() == binary(wanted)
        random.Random(order).shuffle(shards)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("spool", [1 << 20, 100])
def test_merging_in_any_order_gives_equal_bytes(spool: int, monkeypatch: pytest.MonkeyPatch, search: None) -> None:
    monkeypatch.setattr(f"{FILE}._SPOOL", spool)
    rng = random.Random(0)
    sets = []
    for seed in range(4):
        parts = [random_texts(60, seed % 2), random_texts(80, seed), random_texts(0, seed)]
        counts = {level: {text: rng.randrange(3) for text in texts} for level, texts in zip(LEVELS, parts, strict=True)}
        sets.append((Vocabulary(*parts, counts), rng.choice([0.1, 0.3, 1.7])))
    merged = [Vocabulary.merge(*zip(*order, strict=True)) for order in itertools.permutations(sets)]  # type: ignore[arg-type]
    assert len({binary(found) for found in merged}) == 1
    sums = {level: Counter[str]() for level in LEVELS}
    for vocabulary, weight in sets:
        for level in LEVELS:
            for text, count in zip(vocabulary.texts(level), vocabulary.train_counts(level), strict=True):
                sums[level][text] += weight * count  # type: ignore[assignment]
    for level in LEVELS:
        assert merged[0].texts(level) == sorted(sums[level])
        rounded = [max(1, round(sums[level][text])) if sums[level][text] else 0 for text in merged[0].texts(level)]
        # 1.5 may become 1.4999999999999998 in sums of floats, which `merge` rounds only once.
        assert np.abs(np.array(rounded) - np.array(merged[0].train_counts(level))).max(initial=0) <= 1
        assert merged[0].tokens(level) == [tokenize(text, None) for text in merged[0].texts(level)]


def signed(data: bytes) -> bytes:
    """Replace the checksum at the end by that of the content."""
    return data[:-32] + hashlib.sha256(data[:-32]).digest()


def at(data: bytes, offset: int, new: bytes) -> bytes:
    return data[:offset] + new + data[offset + len(new) :]


SMALL = Vocabulary(["bé", "da", "fee"], [], [], {"global": {"da": 7}})
# Offsets of the action level: ends of 3 texts, ends of 3 token lists, 3 counts, then 8 bytes of text.
ENDS, TOKEN_ENDS, COUNTS, TEXT = (HEADER_BYTES + 24 * k for k in range(4))
DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda d: b"", "damaged: got 0 bytes, expected at least"),
    "half a header": (lambda d: d[:50], "damaged: got 50 bytes, expected at least"),
    "truncated": (lambda d: d[:-1], r"damaged: got \d+ bytes, expected \d+ by its header"),
    "longer": (lambda d: d + b"\0", r"damaged: got \d+ bytes, expected \d+ by its header"),
    "magic": (lambda d: at(d, 0, b"SQLite 3"), "got a file that begins with b'SQLite 3', expected a vocabulary.bin"),
    "version": (lambda d: signed(at(d, 8, struct.pack("<I", 2))), "got version 2, expected 1"),
    "checksum": (lambda d: at(d, len(d) - 1, bytes([d[-1] ^ 1])), "the checksum differs from the one at its end"),
    "content": (lambda d: at(d, COUNTS, b"\1"), "the checksum differs from the one at its end"),
    "huge count": (
        lambda d: signed(at(d, 16, b"\xff" * 8)),
        r"damaged: got \d+ bytes, expected 4427218577690292389\d\d",
    ),
    "ends descend": (lambda d: signed(at(d, ENDS + 8, b"\1")), "ends of the global texts are out of order"),
    "end outside": (lambda d: signed(at(d, ENDS + 16, b"\x09")), "the global texts end at 9, expected 8"),
    "end far outside": (lambda d: signed(at(d, ENDS + 8, b"\xff" * 8)), "ends of the global texts are out of order"),
    "token ends": (lambda d: signed(at(d, TOKEN_ENDS, b"\xff")), "ends of the global token ids are out of order"),
    "token end": (lambda d: signed(at(d, TOKEN_ENDS + 16, b"\xff")), "the global token ids end at 255, expected"),
    "count": (lambda d: signed(at(d, COUNTS, b"\xff" * 8)), "a train count of the global texts is negative"),
    "unsorted": (lambda d: signed(at(d, TEXT, b"e")), "global level: the texts are unsorted or not distinct"),
    "equal": (lambda d: signed(at(at(d, TEXT, b"bbbbbbb"), ENDS, b"\2\0\0\0\0\0\0\0\4")), "unsorted or not distinct"),
    "latin-1": (lambda d: signed(at(d, TEXT + 1, b"\xe9")), "the global texts are not UTF-8"),
    "surrogate": (lambda d: signed(at(d, TEXT + 5, b"\xed\xa0\x80")), "the global texts are not UTF-8"),
    "half a character": (lambda d: signed(at(d, ENDS, b"\2")), "global level: a text begins inside a character"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files(name: str, tmp_path: Path) -> None:
    change, message = DAMAGE[name]
    data = binary(SMALL)
    assert data[:8] == MAGIC and data[TEXT : TEXT + 8] == "bédafee".encode() and signed(data) == data
    path = tmp_path / "v.bin"
    path.write_bytes(change(data))
    with pytest.raises(UserError, match=message) as caught:
        Vocabulary.load(path)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(path))


def test_every_bit_is_checked() -> None:
    data = binary(SMALL)
    rng = random.Random(0)
    for byte in range(len(data)):
        with pytest.raises(UserError, match=r"damaged|begins with|got version"):
            Vocabulary.from_bytes(at(data, byte, bytes([data[byte] ^ 1 << rng.randrange(8)])), "v.bin")


def test_random_contents_are_read_or_refused() -> None:
    """With a right checksum, too: a file that is accepted has texts that can be read and found."""
    data, rng = binary(example(20)), random.Random(0)
    accepted = 0
    for _ in range(500):
        offset = rng.randrange(8, len(data) - 32)
        changed = signed(at(data, offset, bytes([rng.randrange(256)])))
        try:
            vocabulary = Vocabulary.from_bytes(changed, "v.bin")
        except UserError:
            continue
        accepted += 1
        for level in LEVELS:
            texts = vocabulary.texts(level)[:]
            assert texts == sorted(set(texts)) and [vocabulary.id(level, t) for t in texts] == [*range(len(texts))]
            assert len(vocabulary.tokens(level)[:]) == len(vocabulary.train_counts(level)[:]) == len(texts)
    assert 0 < accepted < 500


@pytest.mark.parametrize("bad", ["same", "swapped", "shorter"])
def test_order_is_checked_beyond_the_first_words(bad: str) -> None:
    """Texts are compared in words of eight bytes."""
    for length in [*range(27), *range(120, 140), 1000]:
        stem = "x" * length
        first, second = {
            "same": (stem, stem),
            "swapped": (f"{stem}b", f"{stem}a"),
            "shorter": (f"{stem}\0", stem),
        }[bad]
        for texts, good in (((first, second), False), ((second, first), bad != "same"), ((stem, stem + "\0"), True)):
            builders = [LevelBuilder(None) for _ in LEVELS]
            for text in texts:
                builders[0].add(text.encode(), b"", 0)
            file = io.BytesIO()
            write_levels(file, builders)
            if good:
                assert Vocabulary.from_bytes(file.getvalue(), "").actions == [*texts]
            else:
                with pytest.raises(UserError, match="unsorted or not distinct"):
                    Vocabulary.from_bytes(file.getvalue(), "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["tokens"].__setitem__(0, [70_000]), "OverflowError"),
        (lambda r: r["tokens"].__setitem__(0, ["a"]), "TypeError"),
        (lambda r: r["train_counts"].__setitem__(0, -1), "train_counts: got -1, expected at least 0"),
        (lambda r: r["train_counts"].__setitem__(0, 1.5), "TypeError"),
        (lambda r: r["train_counts"].__setitem__(0, 10**30), "OverflowError"),
        (lambda r: r["texts"].__setitem__(0, "\ud800"), "unsorted|UnicodeEncodeError"),
    ],
)
def test_values_that_json_could_hold(change: Callable[[Any], Any], message: str) -> None:
    record = SMALL.to_json()
    change(record["global"])
    with pytest.raises(UserError, match=f"v.json: malformed vocabulary .*({message})"):
        Vocabulary.from_json(record, "v.json")


def test_packs_of_earlier_versions_have_json(tmp_path: Path) -> None:
    pack(generate_scenes(8, seed=0, val=0.0, test=0.25), tmp_path / "new", progress=False)
    new = ShardSet(tmp_path / "new")
    found = new.vocabulary
    assert not (tmp_path / "new" / "vocabulary.json").exists()
    use_json_vocabulary(tmp_path / "new")
    old = ShardSet(tmp_path / "new")
    assert old.vocabulary == found and old.vocabulary.to_json() == found.to_json()
    # `pack` reads the known texts from either form.
    pack(tmp_path / "new", tmp_path / "again", progress=False)
    pack(tmp_path / "again", tmp_path / "third", progress=False)
    assert ShardSet(tmp_path / "again").vocabulary == ShardSet(tmp_path / "third").vocabulary == found


MEMORY = """
import sys
from pathlib import Path
from scenarioclip_fast.data import Vocabulary
def private():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024
before = private()
vocabulary = Vocabulary.load(sys.argv[1])
n = len(vocabulary.relations)
assert [vocabulary.relation_id(vocabulary.relations[i]) for i in range(0, n, n // 100)] == [*range(0, n, n // 100)]
print(private() - before)
"""


def test_memory_of_a_million_texts(tmp_path: Path) -> None:
    builders = [LevelBuilder(tmp_path) for _ in LEVELS]
    ids = np.array([49406, 1, 2, 3, 49407], "<u2").tobytes()
    for i in range(1_000_000):
        builders[2].add(b"a text of a relation number %07d" % i, ids, i)
    with open(tmp_path / "v.bin", "wb") as file:
        write_levels(file, builders)
    done = subprocess.run([sys.executable, "-c", MEMORY, tmp_path / "v.bin"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # MiB; 20 measured, mostly parts of the file while it is checked. Lists and a dict would take over 300.
    assert float(done.stdout) < 60
