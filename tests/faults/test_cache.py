"""Damaged shards in the cache of remote shards: no scene is lost or wrong, and the cache is repaired."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from campaign import generator, trials
from packs import read_rows, write_rows

from scenarioclip_fast.data import Scene, ShardSet, generate_scenes, pack, scene_loader
from scenarioclip_fast.data import remote as remote_module
from scenarioclip_fast.data.remote import RemoteShards
from scenarioclip_fast.data.shard_cache import ShardCache, verified_time
from scenarioclip_fast.data.shards import BadSample

pytest.importorskip("fsspec", reason="fsspec is not installed")

SCENES, SHARD = 18, 3


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("remote") / "pack"
    pack(generate_scenes(SCENES, seed=4, val=0, test=0), directory, shard_size=SHARD, progress=False)
    return directory


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "_POLL_S", 0.02)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each cached file is hashed."""
    counts: Counter[str] = Counter()
    verify = ShardCache.verify

    def counted(cache: ShardCache, digest: str) -> int | None:
        found = verify(cache, digest)  # raises while another thread hashes it
        counts[digest] += 1
        return found

    monkeypatch.setattr(ShardCache, "verify", counted)
    return counts


@pytest.fixture
def ranges(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The shards of the scenes that are read from the store."""
    found: list[int] = []
    read = RemoteShards.read

    def counted(remote: RemoteShards, shard: int, start: int, end: int) -> bytes:
        found.append(shard)
        return read(remote, shard, start, end)

    monkeypatch.setattr(RemoteShards, "read", counted)
    return found


def digests(folder: Path) -> list[str]:
    manifest = json.loads((folder / "manifest.json").read_text())
    return [shard["sha256"] for shard in manifest["splits"]["train"]["shards"]]


def is_intact(path: Path) -> bool:
    return not path.is_symlink() and path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == path.stem


def wait_for(what: Callable[[], bool], seconds: float = 30) -> None:
    give_up = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < give_up, "timed out"
        time.sleep(0.005)


def wait_until_cached(packed: Path, cache: Path) -> None:
    """Wait until every shard is cached, intact and known to be so."""
    paths = {digest: cache / f"{digest}.tar" for digest in digests(packed)}
    wait_for(lambda: all(is_intact(p) and p.stat().st_mtime_ns == verified_time(digest) for digest, p in paths.items()))


def open_remote(packed: Path, cache: Path, **options: Any) -> Any:
    return closing(ShardSet(packed.as_uri(), shard_cache_dir=cache, **options))


@pytest.fixture
def filled(packed: Path, cache: Path) -> Iterator[list[Path]]:
    """The files of a complete cache."""
    with open_remote(packed, cache) as shards:
        shards.read(0)
        wait_until_cached(packed, cache)
    yield [cache / f"{digest}.tar" for digest in digests(packed)]


def assert_same_scenes(shards: ShardSet, packed: Path, order: list[int] | None = None, threads: int = 1) -> None:
    local = ShardSet(packed)
    indices = list(range(len(local))) if order is None else order

    def content(scene: Scene) -> tuple[Any, ...]:
        return scene.key, scene.image, scene.action, repr(scene.objects), repr(scene.relations)

    with closing(local), ThreadPoolExecutor(threads) as pool:
        assert len(shards) == len(local) == SCENES
        for i, scene in zip(indices, pool.map(shards.read, indices), strict=True):
            assert content(scene) == content(local.read(i))


def write_at(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def flip(path: Path, rng: random.Random) -> None:
    offset = rng.randrange(path.stat().st_size)
    write_at(path, offset, bytes([path.read_bytes()[offset] ^ (1 << rng.randrange(8))]))


def truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def append(path: Path, rng: random.Random) -> None:
    with path.open("ab") as file:
        file.write(bytes(rng.randint(1, 5000)))


def zero(path: Path, rng: random.Random) -> None:
    """As after a power failure; some file systems keep the size."""
    start = rng.choice([0, rng.randrange(path.stat().st_size)])
    write_at(path, start, bytes(path.stat().st_size - start))


def replace_by(content: Callable[[bytes, random.Random], bytes]) -> Callable[[Path, random.Random], None]:
    def replaced(path: Path, rng: random.Random) -> None:
        other = path.with_name("other")
        other.write_bytes(content(path.read_bytes(), rng))
        other.rename(path)

    return replaced


def link(path: Path, rng: random.Random) -> None:
    """To a copy with the time of a verified file, damaged or intact."""
    target = path.with_name(f"copy of {path.name}")
    shutil.copyfile(path, target)
    path.unlink()
    if rng.random() < 0.5:
        flip(target, rng)
    os.utime(target, ns=(0, verified_time(path.stem)))
    path.symlink_to(target)


def pipe(path: Path, rng: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


IN_PLACE = {"bit flip": flip, "truncated": truncate, "longer": append, "zeros": zero}
DAMAGE = IN_PLACE | {
    "replaced": replace_by(lambda data, rng: rng.randbytes(len(data))),
    "other size": replace_by(lambda data, rng: data[: rng.randrange(len(data))]),
    "link": link,
    "pipe": pipe,
    "removed": remove,
}


def damage(path: Path, how: str, rng: random.Random) -> None:
    """Damage a cached file, unless it is just being replaced."""
    with suppress(FileNotFoundError):
        if path.is_file() and not path.is_symlink() and path.stat().st_size:
            DAMAGE[how](path, rng)


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_before_the_start(
    how: str, packed: Path, cache: Path, filled: list[Path], hashed: Counter[str], ranges: list[int]
) -> None:
    rng = generator(f"before {how}")
    for _ in range(trials(2, 20)):
        hashed.clear()
        ranges.clear()
        victims = rng.sample(range(len(filled)), rng.randint(1, 3))
        for victim in victims:
            damage(filled[victim], how, rng)
        with open_remote(packed, cache) as shards:
            assert_same_scenes(shards, packed, threads=3)
            wait_until_cached(packed, cache)
            assert set(ranges) <= set(victims), "other shards are read from the cache"
            assert hashed.keys() <= {filled[victim].stem for victim in victims}
            ranges.clear()
            wait_for(lambda: all(shards._remote().path(i) is not None for i in range(len(filled))))
            assert_same_scenes(shards, packed)
            assert not ranges, "the repaired cache is used"


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_while_the_shards_are_open(
    how: str, packed: Path, cache: Path, filled: list[Path], hashed: Counter[str], ranges: list[int]
) -> None:
    rng = generator(f"while {how}")
    with open_remote(packed, cache) as shards:
        assert_same_scenes(shards, packed)
        assert not ranges and not hashed, "a verified cache is used at once"
        for _ in range(trials(2, 20)):
            victims = rng.sample(range(len(filled)), rng.randint(1, 3))
            for victim in victims:
                damage(filled[victim], how, rng)
            order = rng.sample(range(SCENES), SCENES)
            assert_same_scenes(shards, packed, order, threads=3)
            wait_until_cached(packed, cache)
            wait_for(lambda: all(shards._remote().path(i) is not None for i in range(len(filled))))
            ranges.clear()
            assert_same_scenes(shards, packed)
            assert not ranges, "the repaired cache is used"


@pytest.mark.parametrize("part", ["record", "header of a JPEG"])
def test_bits_that_rot_on_the_disk(
    part: str, packed: Path, cache: Path, filled: list[Path], hashed: Counter[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Without a write, the file's times do not change: only a record that does not parse tells, or data.verify."""
    index = read_rows(packed)["train-000001.tar"]
    _, jpg_offset, _, json_offset, _ = index[1]
    write_at(filled[1], json_offset if part == "record" else jpg_offset, b"?")
    os.utime(filled[1], ns=(0, verified_time(filled[1].stem)))
    with open_remote(packed, cache, verify=part != "record") as shards:
        assert_same_scenes(shards, packed)
        wait_until_cached(packed, cache)
    assert hashed[filled[1].stem] >= 1 and "damaged, removed from the cache" in caplog.text
    assert len(hashed) == (1 if part == "record" else len(filled)), "data.verify hashes every shard"


def test_a_shard_is_hashed_once_and_not_by_later_processes(
    packed: Path, cache: Path, filled: list[Path], hashed: Counter[str], ranges: list[int]
) -> None:
    for path in filled[:2]:
        os.utime(path)  # as after a copy of the cache
    for expected in ({path.stem: 1 for path in filled[:2]}, {}):
        with open_remote(packed, cache) as shards:
            assert_same_scenes(shards, packed, threads=3)
            wait_until_cached(packed, cache)
        assert hashed == expected
        hashed.clear()
    with open_remote(packed, cache, verify=True) as shards:
        shards.read(0)
        wait_for(lambda: len(hashed) == len(filled))
        wait_for(lambda: all(shards._remote().path(i) is not None for i in range(len(filled))))
        ranges.clear()
        assert_same_scenes(shards, packed, threads=3)
    assert not ranges and set(hashed.values()) == {1}


def test_two_users_of_a_cache_do_not_hash_a_shard_at_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scenarioclip_fast.data import shard_cache

    content = b"content"
    digest = hashlib.sha256(content).hexdigest()
    caches = [ShardCache(cache, 1000), ShardCache(cache, 1000)]
    (cache / f"{digest}.tar").write_bytes(content)
    hashing, done = threading.Event(), threading.Event()
    sha256_of = shard_cache.sha256_of

    def slow(file: Any) -> str:
        hashing.set()
        assert done.wait(20)
        return sha256_of(file)

    monkeypatch.setattr(shard_cache, "sha256_of", slow)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(caches[0].verify, digest)
        assert hashing.wait(20)
        with pytest.raises(BlockingIOError):
            caches[1].verify(digest)
        done.set()
        assert first.result() == verified_time(digest)
    assert caches[1].claim({digest: len(content)}) == {digest: True}
    for each in caches:
        each.close()


def test_a_file_written_while_it_is_hashed_is_removed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scenarioclip_fast.data import shard_cache

    content = b"content"
    digest = hashlib.sha256(content).hexdigest()
    shards, path = ShardCache(cache, 1000), cache / f"{digest}.tar"
    path.write_bytes(content)
    os.utime(path, (1e9, 1e9))
    sha256_of = shard_cache.sha256_of

    def late(file: Any) -> str:
        found = sha256_of(file)
        write_at(path, 3, b"?")
        return found

    monkeypatch.setattr(shard_cache, "sha256_of", late)
    assert shards.verify(digest) is None and not path.exists()
    shards.close()


def test_a_scene_that_is_bad_in_the_store_costs_one_hash(
    packed: Path, cache: Path, tmp_path: Path, hashed: Counter[str], ranges: list[int]
) -> None:
    source = shutil.copytree(packed, tmp_path / "source")
    shard = source / "train-000001.tar"
    rows = read_rows(source)
    write_at(shard, rows[shard.name][1][3], b"?")
    old, new = digests(packed)[1], hashlib.sha256(shard.read_bytes()).hexdigest()
    (source / "manifest.json").write_text((source / "manifest.json").read_text().replace(old, new))
    write_rows(source, rows)
    with open_remote(source, cache) as shards:
        shards.read(0)
        wait_until_cached(source, cache)
        wait_for(lambda: shards._remote().path(1) is not None)
        for _ in range(5):
            with pytest.raises(BadSample, match="bad_json"):
                shards.read(SHARD + 1)
            wait_for(lambda: shards._remote().path(1) is not None)
    assert hashed == {new: 1}
    assert len(ranges) <= 3, "the first scene, while its shard was fetched, and the bad one, while it was hashed"


def test_a_directory_in_place_of_a_cached_shard_is_left_alone(
    packed: Path, cache: Path, filled: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    filled[0].unlink()
    filled[0].mkdir()
    with open_remote(packed, cache) as shards:
        assert_same_scenes(shards, packed)
        wait_for(lambda: "not fetched: [Errno 21] Is a directory" in caplog.text)
        assert_same_scenes(shards, packed)
    assert filled[0].is_dir()


def test_a_loader_trains_on_while_its_cache_is_damaged(packed: Path, cache: Path, filled: list[Path]) -> None:
    rng, stop = generator("loader"), threading.Event()
    count = 0

    def vandal() -> None:
        nonlocal count
        while not stop.wait(rng.random() * 0.05):
            damage(rng.choice(filled), rng.choice(list(DAMAGE)), rng)
            count += 1

    options: dict[str, Any] = {"size": 16, "seed": 1, "threads": 2, "prefetch": 2, "epochs": trials(6, 100)}
    worker = threading.Thread(target=vandal)
    with (
        scene_loader(packed, 3, **options) as local,
        scene_loader(packed.as_uri(), 3, shard_cache_dir=str(cache), **options) as remote,
    ):
        worker.start()
        try:
            for x, y in zip(local, remote, strict=True):
                assert x.keys == y.keys and torch.equal(x.pixels, y.pixels)
        finally:
            stop.set()
            worker.join()
        assert not remote.bad and count >= 3
    with open_remote(packed, cache) as shards:
        assert_same_scenes(shards, packed)
        wait_until_cached(packed, cache)
