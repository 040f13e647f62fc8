from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from packs import read_rows

from scenarioclip_fast.data import Scene, SceneLoader, SceneObject, ShardSet, pack, scene_loader
from scenarioclip_fast.data import remote as remote_module
from scenarioclip_fast.data.bad_samples import BadSampleLog
from scenarioclip_fast.data.remote import Store
from scenarioclip_fast.data.shard_cache import ShardCache
from scenarioclip_fast.errors import MissingDependencyError, UserError

pytest.importorskip("fsspec", reason="fsspec is not installed")

SCENES, SHARD = 24, 4


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six shards of four small scenes."""
    folder = tmp_path_factory.mktemp("remote") / "pack"
    pack([make_scene(i) for i in range(SCENES)], folder, shard_size=SHARD, val=0, test=0, progress=False)
    return folder


@pytest.mark.parametrize("url", ["HTTP://host/a.tar?sig=secret", "file:///a/b?c"])
def test_schemes_may_be_upper_case(url: str) -> None:
    fs, path = remote_module.open_url(url)
    assert path.endswith(("host/a.tar?sig=secret", "/a/b?c")) and remote_module.is_server(fs) == url.startswith("HTTP")


def test_signatures_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for raised, expected in ((ImportError("no x"), MissingDependencyError), (ValueError("bad"), UserError)):

        def fail(_: str, error: Exception = raised) -> None:
            raise error

        monkeypatch.setattr("fsspec.core.url_to_fs", fail)
        with pytest.raises(expected, match=r"^HTTPS://host/a\.tar: (not a URL|this kind of storage requires)"):
            remote_module.open_url("HTTPS://host/a.tar?sig=secret")


def make_scene(i: int) -> Scene:
    pixels = torch.randint(0, 255, (40, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
    return Scene(f"s{i:04d}", pixels, "resting", [SceneObject("box", (4.0, 4.0, 30.0, 24.0))])


def shards_of(folder: Path) -> list[dict[str, Any]]:
    shards: list[dict[str, Any]] = json.loads((folder / "manifest.json").read_text())["splits"]["train"]["shards"]
    return shards


class Server:
    """Serves a directory over HTTP with byte ranges.

    `fault(name, count)` decides the count-th response for a file: "" (normal), "error", "cut" (closed midway), "silent"
    (hangs), "gone" or "all" (ignores the range).
    """

    def __init__(self, folder: Path, fault: Callable[[str, int], str]) -> None:
        self.requests: Counter[str] = Counter()
        self.whole: Counter[str] = Counter()  # requests that returned a whole file
        self.silence = threading.Event()
        counting = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(handler) -> None:
                path = folder / handler.path.strip("/")
                with counting:
                    self.requests[path.name] += 1
                    count = self.requests[path.name]
                how = fault(path.name, count)
                if how == "silent":
                    self.silence.wait(30)
                if how == "error":
                    return handler.send_error(503)
                if how == "gone" or not path.is_file():
                    return handler.send_error(404)
                data = path.read_bytes()
                start, end = 0, len(data)
                if (requested := handler.headers.get("Range")) and how != "all":
                    start, end = (int(x) for x in requested.removeprefix("bytes=").split("-"))
                    if start >= len(data):
                        return handler.send_error(416)
                    end = min(end + 1, len(data))
                    handler.send_response(206)
                    handler.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
                else:
                    handler.send_response(200)
                self.whole[path.name] += end - start == len(data)
                handler.send_header("Content-Length", str(end - start))
                handler.end_headers()
                handler.wfile.write(data[start : (start + end) // 2 if how == "cut" else end])
                if how == "cut":
                    handler.close_connection = True

            def log_message(handler, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.silence.set()
        self._http.shutdown()
        self._http.server_close()


@contextmanager
def serving(folder: Path, fault: Callable[[str, int], str] = lambda name, count: "") -> Iterator[Server]:
    pytest.importorskip("aiohttp", reason="fsspec requires aiohttp to read from a server")
    server = Server(folder, fault)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "pause", 0.02)
    monkeypatch.setattr(remote_module, "_POLL_S", 0.05)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def load(source: str | Path, cache: Path, batch_size: int = 5, **options: Any) -> SceneLoader:
    options = {"size": 16, "seed": 1, "epochs": 1, "drop_last": False, "threads": 1, **options}
    return scene_loader(source, batch_size, shard_cache_dir=str(cache), **options)


def keys_of(loader: SceneLoader) -> list[str]:
    with loader:
        return [key for batch in loader for key in batch.keys]


def cached(cache: Path, suffix: str = ".tar") -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.suffix == suffix)


def wait_for(what: Callable[[], bool], seconds: float = 20) -> None:
    give_up = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < give_up, "timed out"
        time.sleep(0.01)


@contextmanager
def source(kind: str, packed: Path) -> Iterator[str]:
    if kind == "memory":
        import fsspec

        fsspec.filesystem("memory").put(str(packed), "/bucket/scenes", recursive=True)
        yield "memory://bucket/scenes"
    elif kind == "file":
        yield packed.as_uri()
    else:
        with serving(packed) as server:
            yield server.url


@pytest.mark.parametrize("kind", ["memory", "file", "http"])
def test_remote_batches_equal_local_ones(packed: Path, cache: Path, kind: str) -> None:
    with source(kind, packed) as url, load(packed, cache, epochs=2) as local, load(url, cache, epochs=2) as remote:
        for x, y in zip(local, remote, strict=True):
            assert x.keys == y.keys and torch.equal(x.pixels, y.pixels)
            assert all(torch.equal(a, b) for a, b in zip(x.tensors, y.tensors, strict=True))
        assert remote.vocabulary == local.vocabulary
        wait_for(lambda: len(cached(cache)) == SCENES // SHARD)
    contents = {hashlib.sha256(path.read_bytes()).hexdigest(): path.stem for path in cached(cache)}
    assert contents == {shard["sha256"]: shard["sha256"] for shard in shards_of(packed)}
    (index,) = cached(cache, ".index")
    assert index.stem == hashlib.sha256((packed / "index.bin").read_bytes()).hexdigest()
    assert sorted(path.name for path in cache.iterdir() if path.suffix != ".tar")[1:] == ["lock"]


def test_cached_shards_are_not_requested_again(packed: Path, cache: Path) -> None:
    with serving(packed) as server:
        with load(server.url, cache) as first:
            next(iter(first))
            wait_for(lambda: len(cached(cache)) == 6)
        server.requests.clear()
        assert len(set(keys_of(load(server.url, cache)))) == SCENES
        assert set(server.requests) == {"manifest.json", "index.bin", "vocabulary.bin"}


def failing_at_first(name: str, count: int) -> str:
    return ("error", "cut", "")[min(count - 1, 2)]


def test_transient_failures_and_truncated_transfers_are_retried(packed: Path, cache: Path) -> None:
    with serving(packed, failing_at_first) as server:
        loader = load(server.url, cache)
        assert sorted(keys_of(loader)) == sorted(ShardSet(packed).keys)
        assert not loader.bad
        assert all(server.requests[shard["name"]] >= 3 for shard in shards_of(packed))


def size_of(path: Path) -> int:
    """Bytes of a file; 0 if it has been moved or removed since it was listed."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize("room", [0.0, 0.5, 1.5])
def test_a_small_cache_neither_overflows_nor_thrashes(packed: Path, cache: Path, room: float) -> None:
    size = max(shard["bytes"] for shard in shards_of(packed))
    with serving(packed) as server, load(server.url, cache, shard_cache_gib=room * size / 2**30, epochs=3) as loader:
        keys, most = Counter[str](), 0
        for batch in loader:
            keys.update(batch.keys)
            most = max(most, sum(size_of(path) for suffix in (".tar", ".part") for path in cached(cache, suffix)))
        wait_for(lambda: len(cached(cache)) == int(room))
        assert most <= room * size
        assert sum(server.whole[shard["name"]] for shard in shards_of(packed)) == int(room)
    assert set(keys.values()) == {3} and len(keys) == SCENES


def test_two_processes_share_a_cache_and_fetch_each_shard_once(packed: Path, cache: Path) -> None:
    code = (  # does not import torch, which would take longer than the test
        "import hashlib, json, sys; from pathlib import Path\n"
        "from scenarioclip_fast.data.remote import RemoteShard, RemoteShards, Store\n"
        "url, cache, shards = sys.argv[1], Path(sys.argv[2]), [RemoteShard(*x) for x in json.loads(sys.argv[3])]\n"
        "remote = RemoteShards(Store(url), shards, cache, 1 << 30)\n"
        "remote.store.read('manifest.json')\n"
        "digests = [hashlib.sha256(remote.read(i, 1, shard.size)).hexdigest() for i, shard in enumerate(shards)]\n"
        "for thread in remote._fetchers: thread.join(60); assert not thread.is_alive()\n"
        "local = [hashlib.sha256(remote.path(i).read_bytes()[1:]).hexdigest() for i in range(len(shards))]\n"
        "remote.close(); print('same' if digests == local else 'different')"
    )
    shards = [(shard["name"], shard["sha256"], shard["bytes"]) for shard in shards_of(packed)]
    both_started = threading.Event()

    def hold_shards_back(name: str, count: int) -> str:
        if name == "manifest.json" and count == 2:
            both_started.set()
        return "" if name == "manifest.json" or both_started.wait(60) else "gone"

    with serving(packed, hold_shards_back) as server:
        command = [sys.executable, "-c", code, server.url, str(cache), json.dumps(shards)]
        both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        assert [process.communicate(timeout=120)[0] for process in both] == ["same\n", "same\n"]
        assert [server.whole[name] for name, _, _ in shards] == [1] * 6
    assert len(cached(cache)) == 6 and not cached(cache, ".part") and not cached(cache, ".claims")


@pytest.mark.parametrize("how", ["gone", "error", "silent"])
def test_an_unreachable_shard_loses_only_its_scenes(
    packed: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(Store, "timeout", 0.3)
    lost = shards_of(packed)[2]["name"]
    with serving(packed, lambda name, count: how if name == lost else "") as server:
        loader = load(server.url, cache, max_bad_fraction=0.5, on_bad=BadSampleLog(tmp_path / "bad.jsonl"))
        seen = keys_of(loader)
    assert sorted(seen) == sorted(set(ShardSet(packed).keys) - set(ShardSet(packed).keys[2 * SHARD : 3 * SHARD]))
    assert loader.bad == {"unreadable_shard": SHARD}
    details = {json.loads(line)["detail"] for line in (tmp_path / "bad.jsonl").read_text().splitlines()}
    assert all(lost in detail for detail in details)
    if how != "gone":
        assert any("not reachable" in detail for detail in details)


def test_failed_files_fail_fast_until_the_next_attempt(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    down = True
    with serving(packed, lambda name, count: "error" if down else "") as server:
        store = Store(server.url)
        with pytest.raises(OSError, match=r"not reachable in 4 attempts: .*503"):
            store.read("train-000000.tar", 0, 10)
        with pytest.raises(OSError, match="the next attempt is at most 60 s away"):
            store.read("train-000000.tar", 0, 10)
        with pytest.raises(OSError, match="in one attempt"):  # until a read succeeds
            store.read("train-000001.tar", 0, 10)
        assert server.requests == {"train-000000.tar": 4, "train-000001.tar": 1}
        down = False
        assert len(store.read("train-000002.tar", 0, 10)) == 10
        clock = time.monotonic
        monkeypatch.setattr(time, "monotonic", lambda: clock() + 61)
        assert len(store.read("train-000000.tar", 0, 10)) == 10


def test_a_server_without_byte_ranges_is_rejected(packed: Path, cache: Path) -> None:
    with (
        serving(packed, lambda name, count: "all") as server,
        pytest.raises(
            UserError,
            match=r"does not support byte ranges \(got \d+ bytes for a range of 1\), which",
        ),
    ):
        ShardSet(server.url, shard_cache_dir=cache)
    assert not cache.exists()


def test_a_shard_with_a_wrong_checksum_is_not_cached_but_its_valid_scenes_are_used(
    packed: Path, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = shutil.copytree(packed, tmp_path / "damaged")
    index = read_rows(damaged)
    corrupt, short = (damaged / shard["name"] for shard in shards_of(packed)[:2])
    content = bytearray(corrupt.read_bytes())
    content[index[corrupt.name][1][1]] ^= 0xFF  # the first byte of a JPEG
    corrupt.write_bytes(content)
    os.truncate(short, index[short.name][3][1])  # before the last of its scenes
    lost = {index[corrupt.name][1][0]: "not_an_image", index[short.name][3][0]: "short_shard"}
    with serving(damaged) as server, caplog.at_level(logging.WARNING):
        loader = load(server.url, cache, max_bad_fraction=0.5)
        with loader:
            keys = [key for batch in loader for key in batch.keys]
            wait_for(lambda: caplog.text.count("its checksum differs from the manifest's") == 2)
            wait_for(lambda: len(cached(cache)) == 4)
    assert sorted(keys) == sorted(set(ShardSet(packed).keys) - lost.keys())
    assert loader.bad == Counter(lost.values())
    assert not {path.stem for path in cached(cache)} & {shard["sha256"] for shard in shards_of(packed)[:2]}


def test_closing_does_not_wait_for_a_hanging_server(packed: Path, cache: Path) -> None:
    scenes: list[str] = []

    def silent_from_the_fourth_batch_on(name: str, count: int) -> str:
        scenes.extend([name] * name.endswith("tar"))
        return "silent" if len(scenes) > 6 else ""

    with serving(packed, silent_from_the_fourth_batch_on) as server:
        loader = load(server.url, cache, batch_size=2, shard_cache_gib=0, prefetch=1)
        batches = iter(loader)
        next(batches)
        next(batches)
        wait_for(lambda: len(scenes) > 6)
        start = time.monotonic()
        loader.close()
        assert time.monotonic() - start < 5  # the timeout of an attempt is 30 s
        loader.close()
        with pytest.raises(RuntimeError, match="is closed"):
            iter(loader)


def put(cache: ShardCache, content: bytes) -> str | None:
    digest = hashlib.sha256(content).hexdigest()
    descriptor = cache.reserve(digest, len(content))
    if descriptor is None:
        return None
    os.pwrite(descriptor, content, 0)
    cache.commit(digest, descriptor)
    return digest


def test_eviction_is_lru_and_spares_files_in_use(cache: Path) -> None:
    first = ShardCache(cache, 300)
    names = [put(first, bytes([i]) * 100) for i in range(3)]
    assert put(first, b"x" * 100) is None, "all files are in use"
    first.close()
    for age, i in ((30, 1), (20, 0), (10, 2)):
        os.utime(cache / f"{names[i]}.tar", (time.time() - age,) * 2)
    second, third = ShardCache(cache, 300), ShardCache(cache, 300)
    assert second.claim({str(names[1]): 100, "0" * 64: 100}).keys() == {names[1]}
    newest = put(third, b"y" * 100)
    assert {path.stem for path in cached(cache)} == {names[1], names[2], newest}
    assert put(third, b"z" * 250) is None, "nothing is evicted if there would still not be enough room"
    assert len(cached(cache)) == 3
    second.close()
    time.sleep(0.02)  # longer than the resolution of file times
    third.close()
    smaller = ShardCache(cache, 100)
    smaller.trim()
    assert [path.stem for path in cached(cache)] == [newest]
    smaller.close()
    smaller.close()


def test_full_disk(cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    shards = ShardCache(cache, 1000)
    assert put(shards, b"x") is None
    assert "cannot allocate space for a shard: No space left on device" in caplog.text
    shards.close()
    assert [path.name for path in cache.iterdir()] == ["lock"]


def test_files_of_a_killed_process_are_removed(cache: Path) -> None:
    code = (
        "import os, sys, signal; from pathlib import Path; from scenarioclip_fast.data.shard_cache import ShardCache\n"
        "cache = ShardCache(Path(sys.argv[1]), 300)\n"
        "fd = cache.reserve('a' * 64, 100); cache.commit('a' * 64, fd)\n"
        "fd = cache.reserve('b' * 64, 200)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(cache)], check=False, timeout=60).returncode == -9
    assert len(cached(cache, ".part")) == len(cached(cache, ".claims")) == 1
    after = ShardCache(cache, 300)
    assert put(after, b"c" * 200) is not None
    assert [path.stem for path in cached(cache, ".tar") if path.stem == "a" * 64], "the partial file was evicted"
    assert put(after, b"d" * 100) is not None
    assert not cached(cache, ".part") and len(cached(cache, ".claims")) == 1 and len(cached(cache)) == 2
    again = ShardCache(cache, 300)
    descriptor = again.reserve("e" * 64, 0)
    assert descriptor is not None
    for busy in ("e" * 64, cached(cache)[0].stem):  # being fetched, and cached
        with pytest.raises(BlockingIOError):
            after.reserve(busy, 0)
    again.drop("e" * 64, descriptor)
    again.close()
    after.close()


def test_nothing_is_fetched_or_evicted_before_the_first_read(packed: Path, cache: Path) -> None:
    filled = ShardCache(cache, 1 << 20)
    put(filled, b"of another data set")
    filled.close()
    before = cached(cache)
    with serving(packed) as server:
        shards = ShardSet(server.url, shard_cache_dir=cache, shard_cache_gib=1e-9)  # no room for any shard
        assert len(shards) == SCENES and shards.vocabulary.actions == ["resting"]
        loader = load(server.url, cache)
        assert len(loader) == 5
        loader.close()
        assert set(server.requests) == {"manifest.json", "index.bin", "vocabulary.bin"}
        assert cached(cache) == before
        shards.read(0)
        assert not cached(cache)
        shards.close()


@pytest.mark.parametrize("broken", [False, True])
def test_a_fetched_shard_is_synced_before_it_is_renamed(
    packed: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        done.append("directory" if path == cache else path.suffix)
        if broken and path != cache:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    def renamed(old: Path, new: Path) -> None:
        done.append("renamed")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    monkeypatch.setattr(remote_module, "_FETCHERS", 1)
    shards = shards_of(packed)
    each = 1 if broken else 3
    with closing(ShardSet(packed.as_uri(), shard_cache_dir=cache)) as source:
        source.read(0)
        wait_for(lambda: len(done) == each * len(shards) and not cached(cache, ".part"))
        expected = [".part"] if broken else [".part", "renamed", "directory"]
        assert done == expected * len(shards), "once per shard"
        assert len(cached(cache)) == (0 if broken else len(shards))
    targets = map(_target, os.listdir("/proc/self/fd"))
    assert not [path for path in targets if ".part" in path and str(cache) in path]


def _target(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except FileNotFoundError:
        return ""


def test_pickled_copies_can_read(packed: Path, cache: Path) -> None:
    shards = ShardSet(packed.as_uri(), shard_cache_dir=cache)
    copy = pickle.loads(pickle.dumps(shards))
    assert [copy.read(i).key for i in range(SCENES)] == shards.keys
    copy.close()
    assert copy.read(3).key == shards.keys[3], "a closed set can be reopened"
    copy.close()
    shards.close()


def test_a_file_system_with_versions(packed: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of s3:// reads (path, version_id, start, end)."""
    memory = pytest.importorskip("fsspec.implementations.memory").MemoryFileSystem
    read = memory.cat_file

    def cat_file(fs: Any, path: str, version_id: Any = None, start: Any = None, end: Any = None) -> Any:
        assert version_id is None, f"got a version: {version_id!r}"
        return read(fs, path, start=start, end=end)

    monkeypatch.setattr(memory, "cat_file", cat_file)
    with source("memory", packed) as url:
        shards = ShardSet(url, shard_cache_dir=cache, shard_cache_gib=1)
        assert [shards.read(i).key for i in range(SCENES)] == shards.keys
        shards.close()


def test_user_errors(packed: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="nope://x: not a URL that fsspec can open"):
        ShardSet("nope://x")
    with pytest.raises(UserError, match=r"memory://nothing/manifest.json: no such file; expected the output of"):
        ShardSet("memory://nothing")
    with serving(packed) as server:
        gone = server.url
    with pytest.raises(UserError, match=r"manifest.json: not readable \(not reachable in 4 attempts: .*onnect"):
        ShardSet(gone)
    for size in (-1.0, float("inf"), float("nan")):
        with pytest.raises(UserError, match=f"shard_cache_gib: got {size:g}, expected a finite number of at least 0"):
            ShardSet(packed.as_uri(), shard_cache_gib=size)
    changed = shutil.copytree(packed, tmp_path / "changed")
    content = bytearray((changed / "vocabulary.bin").read_bytes())
    content[-40] ^= 1
    (changed / "vocabulary.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"vocabulary.bin: damaged: the checksum differs from the manifest's"):
        _ = ShardSet(changed.as_uri()).vocabulary
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: cannot be used as shard cache"):
        ShardSet(packed.as_uri(), shard_cache_dir=tmp_path / "file").read(0)
    # not counted as bad samples
    with (
        pytest.raises(UserError, match="file: cannot be used as shard cache"),
        load(packed.as_uri(), tmp_path / "file", max_bad_fraction=1.0) as loader,
    ):
        next(iter(loader))
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(MissingDependencyError, match=r"s3://bucket/dir: this kind of storage requires another .*s3fs"):
        ShardSet("s3://bucket/dir")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'scenarioclip-fast\[remote\]'"):
        ShardSet("s3://bucket/dir")


def test_a_missing_file_is_named_once(packed: Path, tmp_path: Path) -> None:
    """The message of fsspec's exceptions is the path, and nothing else."""
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(packed), "/without-index", recursive=True)
    memory.rm("/without-index/index.bin")
    try:
        with pytest.raises(UserError, match=r"^memory://without-index/index\.bin: not readable \(No such file"):
            ShardSet("memory://without-index", shard_cache_dir=tmp_path)
    finally:
        memory.rm("/without-index", recursive=True)


@pytest.fixture
def large_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat the vocabulary like one of many texts."""
    monkeypatch.setattr("scenarioclip_fast.data.shards.IN_MEMORY", 0)
    monkeypatch.setattr(remote_module, "_CHUNK", 100)


def vocabulary_requests(server: Server) -> int:
    return server.requests["vocabulary.bin"]


def test_a_large_vocabulary_is_fetched_once_and_mapped(packed: Path, cache: Path, large_vocabulary: None) -> None:
    digest = hashlib.sha256((packed / "vocabulary.bin").read_bytes()).hexdigest()
    with serving(packed) as server, ThreadPoolExecutor(4) as pool:
        sets = [ShardSet(server.url, shard_cache_dir=cache) for _ in range(4)]
        server.requests.clear()
        found = [*pool.map(lambda shards: shards.vocabulary, sets)]
        assert found == [ShardSet(packed).vocabulary] * 4
        size = (packed / "vocabulary.bin").stat().st_size
        assert [path.name for path in cached(cache)] == [f"{digest}.tar"]
        # Each reads the header, and one of them the file.
        assert vocabulary_requests(server) == 4 + -(-size // 100)
        assert Path("/proc/self/maps").read_text().count(f"{digest}.tar") >= 4
        other = ShardCache(cache, size)
        assert put(other, b"another file") is None, "in use, not evicted"
        for shards in sets:
            shards.close()
        assert put(other, b"another file") is not None
        assert found[0] == ShardSet(packed).vocabulary, "still mapped"
        other.close()


@pytest.mark.parametrize("gib", [0, 1e-9])
def test_a_large_vocabulary_without_a_cache_is_held_in_memory(
    gib: float, packed: Path, cache: Path, large_vocabulary: None, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(packed) as server:
        shards = ShardSet(server.url, shard_cache_dir=cache, shard_cache_gib=gib)
        assert shards.vocabulary == ShardSet(packed).vocabulary
    assert "vocabulary.bin: not in the shard cache: each process holds its 0 MiB in memory" in caplog.text
    assert not cache.exists() or cached(cache) == []


def test_a_large_vocabulary_and_a_cache_that_cannot_hold_it(
    packed: Path, cache: Path, large_vocabulary: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory in the file's place; and a cache that is removed, which must not be waited for forever."""
    digest = hashlib.sha256((packed / "vocabulary.bin").read_bytes()).hexdigest()
    (cache / f"{digest}.tar").mkdir(parents=True)
    with pytest.raises(UserError, match=rf"{digest}\.tar: got a directory, expected a cached file, or none; remove it"):
        _ = ShardSet(packed.as_uri(), shard_cache_dir=cache).vocabulary
    claim, calls = ShardCache.claim, iter(range(3))

    def claim_removed(self: ShardCache, sizes: dict[str, int]) -> dict[str, bool]:
        next(calls)
        shutil.rmtree(cache, ignore_errors=True)
        return claim(self, sizes)

    monkeypatch.setattr(ShardCache, "claim", claim_removed)
    with pytest.raises(UserError, match="the shard cache was removed while it was in use"):
        _ = ShardSet(packed.as_uri(), shard_cache_dir=cache).vocabulary


def test_a_full_disk_leaves_a_large_vocabulary_in_memory(
    packed: Path, cache: Path, large_vocabulary: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for function in ("posix_fallocate", "pwrite"):
        with monkeypatch.context() as patch, serving(packed) as server:
            patch.setattr(os, function, full)
            shards = ShardSet(server.url, shard_cache_dir=cache)
            assert shards.vocabulary == ShardSet(packed).vocabulary
        assert "No space left on device" in caplog.text and "in memory" in caplog.text
        caplog.clear()
        assert sorted(path.name for path in cache.iterdir()) == ["lock"]


def test_a_damaged_large_vocabulary(packed: Path, cache: Path, tmp_path: Path, large_vocabulary: None) -> None:
    damaged = shutil.copytree(packed, tmp_path / "damaged")
    content = bytearray((damaged / "vocabulary.bin").read_bytes())
    for offset, message in (
        (-40, "the checksum differs from the manifest's"),
        (17, "damaged: got"),
        (0, "begins with"),
    ):
        changed = content.copy()
        changed[offset] ^= 1
        (damaged / "vocabulary.bin").write_bytes(changed)
        with serving(damaged) as server, pytest.raises(UserError, match=f"vocabulary.bin: .*{message}"):
            _ = ShardSet(server.url, shard_cache_dir=cache).vocabulary
        assert not cached(cache)
    # A damaged cached file is fetched again.
    with serving(packed) as server:
        first = ShardSet(server.url, shard_cache_dir=cache)
        expected = first.vocabulary
        (path,) = cached(cache)
        first.close()
        content[-40] ^= 1
        path.write_bytes(content)
        assert ShardSet(server.url, shard_cache_dir=cache).vocabulary == expected
