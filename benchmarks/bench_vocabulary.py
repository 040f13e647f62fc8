"""Opening, searching and merging a vocabulary.bin, in one process; the file is in the page cache.

The texts are relations of a subject, a predicate and an object, each of up to three words; they are distinct, and each
occurs a few times. Memory is that which the process does not share: mapped pages of the file are not part of it.

Run: make bench, or: pytest benchmarks/bench_vocabulary.py
Of any number of texts, with memory: python benchmarks/bench_vocabulary.py 10000000
"""

from __future__ import annotations

import itertools
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from scenarioclip_fast.benchmarks.timing import WARM, sized

from scenarioclip_fast.data import Vocabulary
from scenarioclip_fast.data.vocabulary import VocabularyWriter
from scenarioclip_fast.requirements import import_problem

TEXTS = sized(100_000, 2_000)
LOOKUPS = sized(100_000, 1_000)
SHARD = 20_000  # distinct texts
_TEXT = """
man woman child dog horse bird car bus train tree table chair cup bottle ball house window door street field river
riding holding eating beside under above behind carrying pushing watching red blue small large wooden old
"""
WORDS = _TEXT.split()


def texts(n: int) -> Iterator[str]:
    """Yield n distinct texts in a random order."""
    rng = random.Random(0)
    names = [f"{a} {b}" for a, b in itertools.product(WORDS, WORDS)]
    for i in range(n):
        rest, k = divmod(i * 7919 % n if n % 7919 else i, len(names))
        rest, j = divmod(rest, len(WORDS))
        yield f"{names[k]} {WORDS[j]} {rng.choice(WORDS)} {names[rest % len(names)]}{' ' + str(rest) if rest else ''}"


def write(path: Path, n: int, split: str = "train") -> None:
    writer = VocabularyWriter(path.parent)
    source = texts(n)
    while some := list(itertools.islice(source, SHARD)):
        writer.add(split, {"global": {}, "object": {}, "relation": dict.fromkeys(some, 3)})
    with open(path, "wb") as file:
        writer.write(file)


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if problem := import_problem("instant_clip_tokenizer"):
        pytest.skip(problem)
    path = tmp_path_factory.mktemp("vocabulary") / "vocabulary.bin"
    write(path, TEXTS)
    return path


def search(vocabulary: Vocabulary, some: list[str]) -> int:
    return sum(vocabulary.relation_id(text) for text in some)


def run(benchmark: Any, what: str, function: Callable[[], Any]) -> None:
    benchmark.group = f"vocabulary of {TEXTS} texts"
    benchmark.extra_info["texts"] = TEXTS
    benchmark.extra_info["form"] = what
    benchmark.pedantic(function, rounds=1 if WARM else sized(5, 1), warmup_rounds=0 if WARM else sized(1, 0))


def test_open(benchmark: Any, path: Path) -> None:
    run(benchmark, "open", lambda: Vocabulary.load(path))


@pytest.mark.parametrize("form", ["dict", "search"])
def test_look_up(benchmark: Any, path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random texts: in the dict of a small vocabulary, and by searching, as in a large one."""
    if form == "search":
        monkeypatch.setattr("scenarioclip_fast.data.vocabulary_file._DICT_TEXTS", 0)
        monkeypatch.setattr("scenarioclip_fast.data.vocabulary_file._CACHED_IDS", 0)
    vocabulary = Vocabulary.load(path)
    some = random.Random(1).choices(vocabulary.relations[:], k=LOOKUPS)
    search(vocabulary, some[:1])
    run(benchmark, f"{LOOKUPS} look-ups, {form}", lambda: search(vocabulary, some))


def test_merge(benchmark: Any, path: Path) -> None:
    vocabulary = Vocabulary.load(path)
    run(benchmark, "merge two", lambda: Vocabulary.merge([vocabulary, vocabulary], [1.0, 1.0]))


def private_mib() -> float:
    """Memory of this process that is neither a file's nor shared."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def main(n: int) -> None:
    """Print the figures of n texts, each measured once."""
    from scenarioclip_fast.data.vocabulary import tokenize

    def timed(what: str, function: Callable[[], Any], each: int = 1, unit: str = "s") -> Any:
        start, cpu = time.perf_counter(), time.process_time()
        result = function()
        scale = (1e6 if unit == "us" else 1) / each
        took, cpu = (time.perf_counter() - start) * scale, (time.process_time() - cpu) * scale
        print(f"{what}: {took:.3g} {unit}, {cpu:.3g} of a CPU; {private_mib():.0f} MiB private", flush=True)
        return result

    some = list(itertools.islice(texts(n), 100_000))
    timed("tokenize one text", lambda: [tokenize(text, None) for text in some], len(some), "us")
    with TemporaryDirectory() as folder:
        path = Path(folder, "vocabulary.bin")
        timed(f"write {n} texts", lambda: write(path, n))
        print(f"file: {path.stat().st_size / 2**20:.0f} MiB")
        vocabulary = timed("open", lambda: Vocabulary.load(path))
        timed("first look-up", lambda: vocabulary.relation_id(some[0]))
        rng = random.Random(1)
        rows = [rng.randrange(n) for _ in range(100_000)]
        chosen = timed("read a text", lambda: [vocabulary.relations[i] for i in rows], len(rows), "us")
        assert search(vocabulary, chosen[:1000]) == sum(rows[:1000])
        timed("look up, not cached", lambda: search(vocabulary, chosen[1000:]), len(rows) - 1000, "us")
        timed("look up, cached", lambda: search(vocabulary, chosen), len(rows), "us")
        timed("checksum", vocabulary.checksum)
        merged = timed("merge two", lambda: Vocabulary.merge([vocabulary, vocabulary], [1.0, 1.0]))
        assert len(merged.relations) == n and merged.relations[n // 2] == vocabulary.relations[n // 2]
        timed("save as JSON", lambda: vocabulary.save(Path(folder, "vocabulary.json")))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else TEXTS)
