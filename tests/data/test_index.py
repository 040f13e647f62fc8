"""index.bin: its format, its lookup, its checks, and its cache."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packs import downgrade_index, read_rows, write_rows

from scenarioclip_fast.data import ShardSet, pack, scene_loader
from scenarioclip_fast.data.index import BLOCK, Index, IndexWriter, Keys
from scenarioclip_fast.data.packing.staging import lock
from scenarioclip_fast.data.packing.upgrade import upgrade_index
from scenarioclip_fast.data.remote import Store
from scenarioclip_fast.data.remote_index import CachedIndex
from scenarioclip_fast.data.splitmix64 import hash_text, hash_texts
from scenarioclip_fast.data.synthetic import generate_scenes
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import Directory

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Shard:
    sha256: str
    size: int
    rows: list[list[Any]]


def make_shard(name: str, keys: list[str]) -> Shard:
    rng, rows, at = random.Random(name), [], 0
    for key in keys:
        image, record = rng.randrange(1, 4000), rng.randrange(1, 2000)
        after = at + BLOCK + -(-image // BLOCK) * BLOCK + BLOCK
        rows.append([key, at + BLOCK, image, after, record])
        at = after + -(-record // BLOCK) * BLOCK
    return Shard(name * 64, at + 2 * BLOCK, rows)


SETS = {
    "train": [make_shard("a", [f"a{i}" for i in range(7)]), make_shard("b", ["ü", "", "b" * 90, "日本"])],
    "val": [],
    "test": [make_shard("c", []), make_shard("d", ["d"])],
}
ROWS = [(split, number, row) for split in SPLITS for number, shard in enumerate(SETS[split]) for row in shard.rows]


def write(sets: dict[str, list[Shard]] = SETS, order: tuple[str, ...] = SPLITS) -> bytes:
    file = io.BytesIO()
    writer = IndexWriter(file, SPLITS)
    for split in order:
        for shard in sets[split]:
            writer.add(split, shard.sha256, shard.rows)
    writer.finish()
    return file.getvalue()


def opened(data: bytes, sets: dict[str, list[Shard]] = SETS, **options: Any) -> Index:
    view = memoryview(data)
    return Index(lambda start, stop, crc: view[start:stop], len(data), sets, "index.bin", **options)


def test_the_rows_are_those_that_were_added() -> None:
    index = opened(write())
    assert [list(index.numbers(split)) for split in SPLITS] == [[*range(11)], [], [11]]
    assert [list(index.shards(split)) for split in SPLITS] == [[0, 1], [], [2, 3]]
    for i, (split, number, row) in enumerate(ROWS):
        found = index.locate(i)
        assert list(found) == [row[0], index.shards(split).start + number, *row[1:]]
    for split in SPLITS:
        keys = [row[0] for of, _, row in ROWS if of == split]
        assert index.keys_crc(split) == zlib.crc32("".join(keys).encode())
        assert Keys(lambda: index, index.numbers(split)) == keys
    assert len(write()) - sum(len(row[0].encode()) for *_, row in ROWS) == 64 + (16 + 6) * 12 + 4 * 3 + 24 * 4 + 4
    assert [*opened(write(order=("test", "train", "val"))).first] == [*index.first], "shards come in any order"


def test_every_key_is_found_and_no_other() -> None:
    index = opened(write())
    for i, (_, _, row) in enumerate(ROWS):
        assert index.find(row[0], range(12)) == i
    for absent in ("a", "a7", "x" * 1000, "\0", "\ud800"):
        assert index.find(absent, range(12)) is None
    train = Keys(lambda: index, index.numbers("train"))
    assert (train.find("a3"), train.find("d")) == (3, None)
    assert "日本" in train and "d" not in train and 3 not in train
    assert train.index("ü") == 7 and train[-1] == "日本" and train[1:3] == ["a1", "a2"] and list(train) == train[:]
    with pytest.raises(ValueError, match="'d' is not in the list"):
        train.index("d")


@pytest.mark.parametrize("bits", [2, 64])
def test_keys_whose_hashes_collide_are_found(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = 2**bits - 1
    monkeypatch.setattr("scenarioclip_fast.data.index._hash", lambda key: hash_text(key.encode()) & mask)
    monkeypatch.setattr("scenarioclip_fast.data.index.hash_texts", lambda *texts: hash_texts(*texts) & np.uint64(mask))
    keys = [f"{i:04d}" for i in range(300)]
    sets = {"train": [make_shard("a", keys)], "val": [], "test": []}
    index = opened(write(sets), sets)
    assert [index.find(key, range(300)) for key in keys] == list(range(300))
    assert index.find("0300", range(300)) is None


def test_the_last_bucket_may_be_empty_where_the_last_piece_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with 76,458 scenes, whose lookup fills its pieces."""
    monkeypatch.setattr("scenarioclip_fast.data.index._PIECE", 2)
    monkeypatch.setattr("scenarioclip_fast.data.index.hash_texts", lambda *texts: hash_texts(*texts) >> np.uint64(32))
    index = opened(write())
    assert {index.find(f"absent {i}", range(12)) for i in range(20)} == {None}


def test_hashes_of_texts_are_those_of_each_text() -> None:
    texts = [b"", b"a", b"12345678", b"123456789", *(b"x" * n for n in range(40))]
    ends = np.cumsum([len(text) for text in texts])
    assert hash_texts(b"".join(texts), ends).tolist() == [hash_text(text) for text in texts]
    assert len({*map(hash_text, [*texts, b"a\0"])}) == len({*texts}) + 1


def test_a_lookup_reads_one_bucket_and_one_block() -> None:
    """And opening only the header and the table."""
    count, size = 200, 100
    sets = {"train": [make_shard(chr(33 + k), [f"{k}-{i}" for i in range(size)]) for k in range(count)]}
    sets |= {"val": [], "test": []}
    data, read = memoryview(write(sets)), []

    def reader(start: int, stop: int, crc: int | None) -> memoryview:
        read.append(stop - start)
        return data[start:stop]

    index = Index(reader, len(data), sets, "index.bin", eager=False)
    assert sum(read) < 25 * count + 200
    for k in range(0, count, 7):
        read.clear()
        assert index.find(f"{k}-55", range(20000)) == k * size + 55
        assert len(read) <= 6, "where the bucket starts and the bucket, in at most two pieces each, and the key's block"
        read.clear()
        assert index.find(f"{k}-{size}", range(20000)) is None and len(read) <= 5


def replaced(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def with_header(data: bytes, at: int, new: bytes) -> bytes:
    """Change the header and correct its checksum."""
    header = replaced(data[:60], at, new)
    return header + struct.pack("<I", zlib.crc32(header)) + data[64:]


def with_table(data: bytes, at: int, new: bytes) -> bytes:
    """Change the table and correct its checksum."""
    table = replaced(data[TABLE:], at, new)
    return with_header(data, 56, struct.pack("<I", zlib.crc32(table)))[:TABLE] + table


TABLE = struct.unpack_from("<Q", write(), 32)[0]
DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "got 0 bytes, expected at least 64"),
    "other file": (lambda data: b"{" + data[1:], "it is not an index"),
    "later version": (lambda data: with_header(data, 8, b"\2"), "got version 2, expected 1"),
    "header": (lambda data: replaced(data, 20, b"\1"), "its header has another checksum"),
    "truncated": (lambda data: data[:-20], "it is truncated, or has been extended: 533 bytes"),
    "truncated table": (lambda data: data[: TABLE + 5], "it is truncated"),
    "table": (lambda data: replaced(data, TABLE, b"\7"), "its table has another checksum"),
    "scenes": (lambda data: with_header(data, 16, b"\xff" * 8), "its parts do not fit together"),
    "lookup": (lambda data: with_header(data, 24, struct.pack("<Q", TABLE - 44)), "its parts do not fit together"),
    "offset": (lambda data: with_table(data, 0, struct.pack("<Q", 2**63 + 64)), "its parts do not fit together"),
    "overlap": (lambda data: with_table(data, 0, struct.pack("<Q", TABLE)), "its parts do not fit together"),
    "split": (lambda data: with_table(data, 20, b"\1"), "its parts do not fit together"),
    "count": (lambda data: with_table(data, 8, b"\x08"), "its parts do not fit together"),
    "row": (lambda data: replaced(data, 66, b"\xff"), "its block of shard 0 has another checksum"),
    "key": (lambda data: replaced(data, 64 + 16 * 7, b"A"), "its block of shard 0 has another checksum"),
    "order": (lambda data: replaced(data, TABLE - 1, b"\xff"), "piece 0 of its lookup has another checksum"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(case: str) -> None:
    damage, message = DAMAGE[case]
    with pytest.raises(UserError, match=rf"^index\.bin: damaged index: {message}.*; copy the data set again, or"):
        opened(damage(write()))


def test_every_damaged_byte_is_noticed() -> None:
    data = write()
    for at in range(len(data)):
        with pytest.raises(UserError, match="damaged index"):
            opened(replaced(data, at, bytes([data[at] ^ 1])))


def test_an_index_of_other_shards_is_rejected() -> None:
    other = {**SETS, "test": SETS["test"][::-1]}
    with pytest.raises(UserError, match="it belongs to other shards than the manifest"):
        opened(write(), other)
    short = {**SETS, "train": [Shard(shard.sha256, shard.size - 5 * BLOCK, shard.rows) for shard in SETS["train"]]}
    with pytest.raises(UserError, match="a6 extends past the end of its shard"):
        opened(write(), short)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["k", 512, 10, 1536, -1], "negative"),
        (["k", 513, 10, 1537, 5], "k: the image and the record are not consecutive"),
        (["k", 512, 10, 2048, 5], "k: the image and the record are not consecutive"),
        (["\ud800", 512, 10, 1536, 5], "surrogates not allowed"),
        (["k", 2**42, 10, 2**42 + 1024, 5], "image: got 8589934592, expected at most 4294967295"),
    ],
)
def test_rows_that_no_pack_has_are_not_written(row: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IndexWriter(io.BytesIO(), SPLITS).add("train", "0" * 64, [row])


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("index") / "pack"
    pack(list(generate_scenes(24, seed=3)), out, shard_size=5, progress=False)
    return out


def test_index_json_of_earlier_versions_gives_the_same_scenes(packed: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(packed, tmp_path / "old"))
    downgrade_index(old)
    assert not (old / "index.bin").exists() and read_rows(old) == read_rows(packed)
    for split in SPLITS:
        one, two = ShardSet(packed, split), ShardSet(old, split)
        assert (one.keys, one.digest, one.content_digest) == (two.keys, two.digest, two.content_digest)
        assert [two.read(i).image for i in range(len(two))] == [one.read(i).image for i in range(len(one))]
    copy = pickle.loads(pickle.dumps(ShardSet(old)))
    shutil.rmtree(old)
    assert copy.keys == ShardSet(packed).keys, "a pickled copy has the converted index"
    with pytest.raises(UserError, match=r"index\.bin: no such file"):
        (tmp_path / "new").mkdir()
        shutil.copy(packed / "manifest.json", tmp_path / "new")
        ShardSet(tmp_path / "new")


def test_an_old_index_is_upgraded_in_place(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Path(shutil.copytree(packed, tmp_path / "copy"))
    expected: dict[str, Any] = {path.name: path.read_bytes() for path in copy.iterdir()}
    downgrade_index(copy)
    tars = {path.name: path.stat() for path in copy.glob("*.tar")}
    replace, unlink = os.replace, Path.unlink
    for name in ("index.bin", "manifest.json", "index.json"):  # killed before each change

        def die_before(path: object, name: str = name) -> None:
            if Path(str(path)).name == name:
                raise KeyboardInterrupt

        def dying_replace(old: Any, new: Any, die_before: Callable[[object], None] = die_before) -> None:
            die_before(new)
            replace(old, new)

        def dying_unlink(path: Path, die_before: Callable[[object], None] = die_before, **options: bool) -> None:
            die_before(path)
            unlink(path, **options)

        with monkeypatch.context() as patch:
            patch.setattr("scenarioclip_fast.files.os.replace", dying_replace)
            patch.setattr(Path, "unlink", dying_unlink)
            with pytest.raises(KeyboardInterrupt):
                upgrade_index(copy)
        assert ShardSet(copy).keys == ShardSet(packed).keys
    assert upgrade_index(copy) is False and not (copy / "index.json").exists()
    downgrade_index(copy)
    assert upgrade_index(copy) is True and upgrade_index(copy) is False
    found: dict[str, Any] = {path.name: path.read_bytes() for path in copy.iterdir()}
    for files in (expected, found):
        del files["index.bin"]  # the blocks are in the order of completion in one, of the splits in the other
        manifest = json.loads(files.pop("manifest.json"))
        digest = manifest["sha256"].pop("index.bin")
        files["manifest"] = manifest
    assert found == expected and digest == hashlib.sha256((copy / "index.bin").read_bytes()).hexdigest()
    assert read_rows(copy) == read_rows(packed)
    assert tars == {path.name: path.stat() for path in copy.glob("*.tar")}
    with pytest.raises(UserError, match="only a local data set can be upgraded"):
        upgrade_index(packed.as_uri())
    with pytest.raises(UserError, match="no such directory"):
        upgrade_index(tmp_path / "none")


def test_upgrades_exclude_each_other_and_tidy_up(packed: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(packed, tmp_path / "copy"))
    downgrade_index(copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["sha256"]["index.json"]  # which the first versions did not list
    (copy / "manifest.json").write_text(json.dumps(manifest))
    left = copy / f".index.bin.{'0' * 32}.partial"
    left.write_bytes(b"of a killed call")
    with Directory(copy) as files:
        assert lock(files.fd)
        with pytest.raises(UserError, match=r"copy: another process upgrades the index: wait for it$"):
            upgrade_index(copy)
    assert left.exists() and upgrade_index(copy) is True and not left.exists()
    assert read_rows(copy) == read_rows(packed)


def test_an_index_that_does_not_fit_its_tars_is_named(packed: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    pack(list(generate_scenes(24, seed=4)), other, shard_size=5, progress=False)
    copy = Path(shutil.copytree(packed, tmp_path / "copy"))
    shutil.copy(other / "index.bin", copy)
    with pytest.raises(UserError, match=r"copy/index\.bin: damaged index: it belongs to other shards than the man"):
        ShardSet(copy)
    rows = read_rows(packed)
    first = next(iter(rows))
    rows[first][-1][4] += 1 << 20
    shutil.copy(packed / "index.bin", copy)
    write_rows(copy, rows)
    with pytest.raises(UserError, match=f"{rows[first][-1][0]} extends past the end of its shard"):
        ShardSet(copy)


def test_parts_are_fetched_once_by_all_processes_of_a_host(packed: Path, tmp_path: Path) -> None:
    fetched: list[tuple[int | None, int | None]] = []

    class Counting(Store):
        def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
            fetched.append((start, end))
            return super().read(name, start, end)

    size = (packed / "index.bin").stat().st_size
    content = (packed / "index.bin").read_bytes()
    digest = json.loads((packed / "manifest.json").read_text())["sha256"]["index.bin"]

    def part(cached: CachedIndex, start: int, stop: int) -> bytes:
        return bytes(cached.read(start, stop, zlib.crc32(content[start:stop])))

    one, two = (CachedIndex(Counting(packed.as_uri()), digest, size, tmp_path, 1 << 30) for _ in range(2))
    assert not list(tmp_path.iterdir()), "nothing is written before the first use"
    for _ in range(2):
        for cached in (one, two):
            assert part(cached, 100, 200) == content[100:200]
    assert fetched == [(100, 200)]
    file = tmp_path / f"{digest}.index"
    with file.open("r+b") as damaged:
        damaged.seek(150)
        damaged.write(b"\xff\xff")
    three = CachedIndex(Counting(packed.as_uri()), digest, size, tmp_path, 1 << 30)
    assert part(three, 100, 200) == content[100:200] and len(fetched) == 2, "damage in the cache is fetched again"
    for cached in (one, two, three):
        cached.close()


def test_a_remote_set_leaves_no_file_open_and_no_thread_waiting(packed: Path, tmp_path: Path) -> None:
    """Neither when it is closed and used again, nor when the program ends without closing it."""
    remote = ShardSet(packed.as_uri(), shard_cache_dir=tmp_path / "cache", shard_cache_gib=1)
    keys = remote.keys
    for _ in range(5):
        assert remote.read(0).key == keys[0]
        remote.close()
    links = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
    # The map of an index that is still referenced keeps its own descriptor.
    assert sum(link.endswith(".index") for link in links) <= 1
    code = "import sys; from scenarioclip_fast.data import ShardSet; ShardSet.kept = s = ShardSet(sys.argv[1], "
    code += "shard_cache_dir=sys.argv[2], shard_cache_gib=1); print(s.read(3).key)"
    command = [sys.executable, "-c", code, packed.as_uri(), str(tmp_path / "other")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == f"{keys[3]}\n" and done.stderr == ""


def test_keys_are_read_after_a_fork(packed: Path, tmp_path: Path) -> None:
    remote = ShardSet(packed.as_uri(), shard_cache_dir=tmp_path / "cache", shard_cache_gib=1)
    keys = remote.keys
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.write(writer, keys[5].encode())
        remote.close()
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        assert pipe.read().decode() == ShardSet(packed).keys[5]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    remote.close()


def test_a_vocabulary_of_another_pack_is_named(packed: Path, tmp_path: Path) -> None:
    other, copy = tmp_path / "other", Path(shutil.copytree(packed, tmp_path / "copy"))
    pack(list(generate_scenes(24, seed=5)), other, progress=False)
    shutil.copy(other / "vocabulary.bin", copy)
    with pytest.raises(UserError, match=r"copy/vocabulary\.bin: damaged: the checksum differs from the manifest's"):
        _ = ShardSet(copy).vocabulary


def test_a_damaged_old_index_is_not_upgraded(packed: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(packed, tmp_path / "copy"))
    downgrade_index(copy)
    old = (copy / "index.json").read_bytes()
    key = ShardSet(packed).keys[0].encode()
    (copy / "index.json").write_bytes(old.replace(key, b"x" * len(key)))
    with pytest.raises(UserError, match=r"copy/index\.json: the checksum differs from the manifest's"):
        upgrade_index(copy)
    assert (copy / "index.json").exists() and not (copy / "index.bin").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": {"index.bin": "../outside"}}, "index.bin has no valid SHA-256"),
        ({"sha256": {}}, "malformed index .*sha256 of index.bin"),
        ({"index": {"bytes": "many"}}, "malformed index"),
        ({"index": {"bytes": 10**12}}, r"index\.bin: damaged index: it is truncated, or has been extended"),
        ({"index": {"bytes": 10**15}}, "malformed index"),
    ],
)
def test_a_manifest_that_does_not_fit_a_remote_index(
    packed: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    copy = Path(shutil.copytree(packed, tmp_path / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(UserError, match=message):
        _ = ShardSet(copy.as_uri(), shard_cache_dir=tmp_path / "cache").keys[0]
    assert not (tmp_path / "outside.index").exists()


def test_without_a_cache_parts_are_kept_in_memory(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"shard_cache_dir": tmp_path / "cache", "shard_cache_gib": 0}
    remote = ShardSet(packed.as_uri(), **options)
    assert remote.keys == ShardSet(packed).keys and remote.read(3).key == remote.keys[3]
    assert not [*tmp_path.glob("cache/*.index")]
    remote.close()

    def full(*arguments: object) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("scenarioclip_fast.data.remote_index.os.pwrite", full)
    remote = ShardSet(packed.as_uri(), shard_cache_dir=tmp_path / "full", shard_cache_gib=1)
    assert remote.keys == ShardSet(packed).keys
    assert caplog.text.count("an index cannot be cached: No space left on device") == 1
    remote.close()


def test_an_index_that_changes_on_the_server_is_noticed(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a process that has checked a part before, and reads it again because it could not keep it."""
    copy = Path(shutil.copytree(packed, tmp_path / "copy"))
    monkeypatch.setattr("scenarioclip_fast.data.remote_index._KEPT", 1)
    remote = ShardSet(copy.as_uri(), shard_cache_dir=tmp_path / "cache", shard_cache_gib=0)
    keys = list(remote.keys)
    content = (copy / "index.bin").read_bytes()
    (copy / "index.bin").write_bytes(content.replace(keys[0].encode(), b"x" * len(keys[0])))
    assert remote.keys[-1] == keys[-1], "the part that is kept"
    with pytest.raises(UserError, match=r"index\.bin: damaged index: the \d+ bytes at \d+ have another checksum"):
        _ = remote.keys[0]
    remote.close()


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("shards", 0, "bytes"), -1, r"train-000000\.tar: got a size of -1 bytes, expected at least 0"),
        (("shards", 0, "bytes"), 1e30, r"train-000000\.tar: got a size of \d+ bytes"),
        (("shards", 0, "bytes"), 2**60, r"train-000000\.tar: got a size of \d+ bytes"),
        (("shards", 0, "name"), "\0", "shard name .* is no name of a file"),
        (("shards", 0, "name"), "\ud800", "shard name .* is no name of a file"),
        (("relations",), None, "relations of train: got None, expected a number of at least 0"),
        (("actions",), "x", "actions of train: got 'x', expected a number"),
        (("masked_relations",), -1, "masked_relations of train: got -1, expected a number"),
    ],
)
def test_impossible_values_of_a_manifest_are_named(
    packed: Path, tmp_path: Path, where: tuple[Any, ...], value: Any, message: str
) -> None:
    copy = Path(shutil.copytree(packed, tmp_path / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text())
    entry = manifest["splits"]["train"]
    for key in where[:-1]:
        entry = entry[key]
    entry[where[-1]] = value
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=rf"manifest\.json: {message}"):
        scene_loader(copy, 1).notes()
