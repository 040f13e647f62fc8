"""Packing WebDataset tars on URLs, and plain packs to URLs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from interruptions import Decoded
from parts_source import SIZE, contents, keys_of, pack_in_parts, pack_part, read_raw, write_source, write_tar
from tar_server import serving

from scenarioclip_fast.cli.main import main
from scenarioclip_fast.data import ShardSet, generate_scenes, merge_parts, pack, remote
from scenarioclip_fast.data.packing.remote_folder import RemoteFolder
from scenarioclip_fast.data.remote import Store
from scenarioclip_fast.data.sources import remote_tars
from scenarioclip_fast.errors import MissingDependencyError, UserError
from scenarioclip_fast.files import Directory

fsspec: Any = pytest.importorskip("fsspec", reason="fsspec is not installed")
pytest.importorskip("aiohttp", reason="fsspec requires aiohttp to read from a server")

pytestmark = pytest.mark.usefixtures("scratch")

Samples = list[tuple[str, bytes, bytes]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As for parts, with conflicts of splits, a tar without scenes, one without anything, and ignored members."""
    folder = tmp_path_factory.mktemp("source") / "set"
    write_source(folder)
    raw = samples_of(folder / "train-0.tar")
    write_tar(folder / "test-1.tar", raw[3:5] + samples_of(folder / "val-0.tar")[2:3])
    write_tar(folder / "other-0.tar", raw[3:4] + samples_of(folder / "val-0.tar")[4:5])
    write_tar(folder / "train-4.tar", [])
    write_tar(folder / "train-5.tar", [("bad", b"no image", b"{}")])
    with tarfile.open(folder / "train-6.tar", "w") as tar:
        for name in ("notes.txt", "more.txt", "lonely.jpg"):
            tar.addfile(tarfile.TarInfo(name))
    return folder


def samples_of(path: Path) -> Samples:
    with tarfile.open(path) as tar:
        names = tar.getnames()[::2]
        found = []
        for name in names:
            image, record = (tar.extractfile(f"{name[:-4]}.{suffix}") for suffix in ("jpg", "json"))
            assert image is not None and record is not None
            found.append((name[:-4], image.read(), record.read()))
        return found


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The pack in one piece."""
    return pack_url(source.as_uri(), tmp_path_factory.mktemp("expected") / "out")


@pytest.fixture(params=["memory", "file", "http"])
def url(request: pytest.FixtureRequest, source: Path) -> Iterator[Any]:
    """The URL or URLs of the source."""
    if request.param == "file":
        yield source.as_uri()
    elif request.param == "memory":
        with in_memory(source) as root:
            yield root
    else:
        with serving(source) as server:
            yield [f"{server.url}/{path.name}" for path in source.iterdir()]


class in_memory:
    """A copy of a directory in memory://."""

    def __init__(self, folder: Path) -> None:
        self._fs = fsspec.filesystem("memory")
        self._root = f"/bucket-{uuid.uuid4().hex}"
        for path in folder.rglob("*"):
            if path.is_file():
                self._fs.pipe_file(f"{self._root}/set/{path.relative_to(folder)}", path.read_bytes())

    def __enter__(self) -> str:
        return f"memory:/{self._root}/set"

    def __exit__(self, *_: object) -> None:
        self._fs.rm(self._root, recursive=True)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "pause", 0.02)


def pack_url(url: Any, out: Path, **options: Any) -> dict[str, bytes]:
    """Pack URLs in one piece."""
    report = pack(url, out, progress=False, **{"shard_size": SIZE} | options)
    assert not report.up_to_date and report.directory == out
    assert not (out / ".parts").exists()
    return contents(out)


def stored(url: str) -> dict[str, bytes]:
    fs, root = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    return {path[len(root) + 1 :]: fs.cat_file(path) for path in fs.find(root)}


def rejected_in(files: dict[str, bytes]) -> list[dict[str, str]]:
    return [json.loads(line) for line in files["rejected.jsonl"].splitlines()]


def sorted_keys(directory: Path) -> dict[str, list[str]]:
    return {split: sorted(keys) for split, keys in keys_of(directory).items()}


def test_the_pack_has_the_scenes_of_a_local_one(
    source: Path, expected: dict[str, bytes], url: Any, tmp_path: Path
) -> None:
    assert pack_url(url, tmp_path / "out") == {**expected, "source.json": (tmp_path / "out/source.json").read_bytes()}
    pack(source, tmp_path / "local", shard_size=SIZE, progress=False)
    assert sorted_keys(tmp_path / "out") == sorted_keys(tmp_path / "local")
    local = contents(tmp_path / "local")
    assert expected["vocabulary.bin"] == local["vocabulary.bin"]
    for name in ("rejected", "ignored", "warnings"):
        found, other = (json.loads(files["manifest.json"])[name] for files in (expected, local))
        assert found == other, name
    assert json.loads(expected["manifest.json"])["ignored"] == {".txt": 2}
    lines = [sorted(map(str, rejected_in(files))) for files in (expected, local)]
    assert lines[0] == lines[1]
    for split, keys in keys_of(tmp_path / "out").items():
        shards = ShardSet(tmp_path / "out", split=split, verify=True)
        assert [shards.read(i).key for i in range(len(shards))] == keys


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_the_pack_does_not_depend_on_the_parts(
    n: int, expected: dict[str, bytes], url: Any, source: Path, tmp_path: Path
) -> None:
    found = pack_in_parts(url, tmp_path / "out", n)
    assert found == expected | {"source.json": found["source.json"]}


def test_worker_processes_and_more_parts_than_tars(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    assert pack_in_parts(source.as_uri(), tmp_path / "two", 2, workers=2) == expected
    assert pack_in_parts(source.as_uri(), tmp_path / "many", 15) == expected


def test_splits_by_hash(source: Path, tmp_path: Path) -> None:
    found = [pack_in_parts(source.as_uri(), tmp_path / f"{n}", n, split="hash") for n in (1, 3)]
    assert found[0] == found[1]
    pack(source, tmp_path / "local", split="hash", progress=False)
    assert sorted_keys(tmp_path / "1") == sorted_keys(tmp_path / "local")


def test_each_tar_is_fetched_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_CHUNK", 10_000)
    with serving(source) as server:
        urls = [f"{server.url}/{path.name}" for path in source.iterdir()]
        for i in (2, 3, 1):
            pack_part(urls, tmp_path / "out", i, 3)
        merge_parts(tmp_path / "out", progress=False)
        assert server.sent == {path.name: path.stat().st_size for path in source.iterdir()}
        assert pack(urls, tmp_path / "out", shard_size=SIZE, progress=False).up_to_date
        assert pack_part(urls, tmp_path / "out", 1, 3).up_to_date
        assert server.sent == {path.name: path.stat().st_size for path in source.iterdir()}


def test_finished_tars_are_not_fetched_again(
    source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Wherever a plain pack is interrupted, and by the same command."""
    out, limit, interrupted = tmp_path / "out", 3, True
    while interrupted:
        with serving(source) as server:
            urls = [f"{server.url}/{path.name}" for path in source.iterdir()]
            command = ["pack", *urls, "--out", str(out), "--shard-size", str(SIZE)]
            with monkeypatch.context() as patch:
                Decoded(patch, limit)
                interrupted = main(command) == 130
            done = {json.loads(path.read_bytes())["tar"] for path in out.glob(".parts/*/unit-*.json")}
            before = Counter(server.sent)
            error = capsys.readouterr().err
            assert not done or f"{len(done)} finished tars are kept in {out}/.parts/1-of-1: re-run" in error
            assert main(command) == 0
            error = capsys.readouterr().err
            assert not done or f"resuming after {len(done)} finished tars" in error
            assert ("up to date" in error) is not interrupted and "--merge" not in error
            fetched = {name for name, size in server.sent.items() if size != before[name]}
            assert fetched.isdisjoint(done)
            assert len(fetched) == (len(urls) - len(done) if interrupted else 0)
        found = contents(out)
        assert found == expected | {"source.json": found["source.json"]}
        shutil.rmtree(out)
        limit += 19
    assert limit > 100


def test_a_plain_pack_is_interrupted_while_it_is_merged(
    source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it renames a file."""
    out, limit, interrupted = tmp_path / "out", 0, True
    while interrupted:
        with monkeypatch.context() as patch:
            moved = Moves(patch, limit)
            try:
                pack(source.as_uri(), out, shard_size=SIZE, progress=False)
            except KeyboardInterrupt:
                assert not (out / "manifest.json").exists()
            else:
                interrupted = False
        pack(source.as_uri(), out, shard_size=SIZE, progress=False)
        assert contents(out) == expected and not (out / ".parts").exists()
        shutil.rmtree(out)
        limit += 5
    assert limit > 40 and moved.count > 35


class Moves:
    """Raises KeyboardInterrupt before the file number `limit` is renamed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
        self.count = 0
        move = Directory.move

        def counted(*args: Any) -> None:
            if self.count == limit:
                raise KeyboardInterrupt
            self.count += 1
            move(*args)

        monkeypatch.setattr(Directory, "move", counted)


_KILLED = """
import os, signal, sys
from scenarioclip_fast.data import merge_parts, pack
from scenarioclip_fast.data.decode import TorchDecoder

source, out, part, limit = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
decode = TorchDecoder.decode

def counted(*args):
    global limit
    limit -= 1
    if limit == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return decode(*args)

TorchDecoder.decode = counted
if part:
    pack(source, out, part=(part, 2), shard_size=4, progress=False)
else:
    pack(source, out, shard_size=4, progress=False)
"""


@pytest.mark.parametrize("steps", [((0, 9), (0, 33), (0, 0)), ((1, 7), (1, 20), (1, 0), (2, 11), (2, 0))])
def test_killed_processes(
    steps: tuple[tuple[int, int], ...], source: Path, expected: dict[str, bytes], tmp_path: Path, scratch: Path
) -> None:
    out = tmp_path / "out"
    for part, limit in steps:
        command = [sys.executable, "-c", _KILLED, source.as_uri(), str(out), str(part), str(limit)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=300, env=os.environ | {"TMPDIR": str(scratch)}
        )
        assert done.returncode == (-signal.SIGKILL if limit else 0), done.stderr[-2000:]
        for left in scratch.iterdir() if limit else ():  # nothing can remove these but the user
            assert left.name.startswith("scenarioclip-pack-") and len(list(left.iterdir())) <= 2
            shutil.rmtree(left)
    if steps[-1][0]:
        merge_parts(out, progress=False)
    assert contents(out) == expected and not (out / ".parts").exists()


def good_samples(folder: Path, count: int) -> Samples:
    pack(generate_scenes(count, seed=7), folder, split="hash", val=0, test=0, progress=False)
    return [(key, *read_raw(folder, key)) for key in sorted(ShardSet(folder).keys)]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_conflicts_between_tars(n: int, tmp_path: Path) -> None:
    """A key stays in test, else val, else train, else in the first tar; the losers are rejected as in a local pack."""
    samples = dict(zip("abcdefgh", good_samples(tmp_path / "good", 8), strict=True))
    (tmp_path / "set").mkdir()
    tars = {
        "aaa": "abg",
        "bbb": "g",
        "dev-0": "bce",
        "test-0": "de",
        "train-0": "acdef",
        "train-1": "fh",
    }
    for name, letters in tars.items():
        write_tar(
            tmp_path / "set" / f"{name}.tar", [(letter, samples[letter][1], samples[letter][2]) for letter in letters]
        )
    found = pack_in_parts((tmp_path / "set").as_uri(), tmp_path / "out", n, val=0, test=0)
    assert sorted_keys(tmp_path / "out") == {
        "train": ["a", "f", "g", "h"],
        "val": ["b", "c"],
        "test": ["d", "e"],
    }
    assert sorted((one["entry"], one["reason"]) for one in rejected_in(found)) == [
        ("a", "duplicate_id"),
        ("b", "duplicate_id"),
        ("dev-0.tar: e", "split_conflict"),
        ("f", "duplicate_id"),
        ("g", "duplicate_id"),
        ("train-0.tar: c", "split_conflict"),
        ("train-0.tar: d", "split_conflict"),
        ("train-0.tar: e", "split_conflict"),
    ]
    pack(tmp_path / "set", tmp_path / "local", progress=False, val=0, test=0)
    assert sorted_keys(tmp_path / "local") == sorted_keys(tmp_path / "out")
    assert (tmp_path / "local/rejected.jsonl").read_text().count("\n") == len(rejected_in(found))


def test_shards_of_a_large_tar_are_bounded(tmp_path: Path) -> None:
    samples = good_samples(tmp_path / "good", 23)
    (tmp_path / "set").mkdir()
    write_tar(tmp_path / "set" / "a.tar", samples[:20] + samples[:3])
    write_tar(tmp_path / "set" / "b.tar", samples[20:])
    url = (tmp_path / "set").as_uri()
    found = [pack_in_parts(url, tmp_path / f"{n}", n, shard_size=3, split="hash") for n in (1, 2)]
    assert found[0] == found[1]
    manifest = json.loads(found[0]["manifest.json"])
    sizes = [shard["scenes"] for split in manifest["splits"].values() for shard in split["shards"]]
    assert sum(sizes) == 23 and max(sizes) == 3
    assert manifest["rejected"] == {"duplicate_id": 6}, "images and records"


def test_damaged_and_empty_tars(tmp_path: Path) -> None:
    samples = good_samples(tmp_path / "good", 9)
    folder = tmp_path / "set"
    folder.mkdir()
    for name, some in (("a", samples[:3]), ("b", samples[3:6]), ("c", samples[6:]), ("d", [])):
        write_tar(folder / f"{name}.tar", some)
    data = (folder / "b.tar").read_bytes()
    (folder / "b.tar").write_bytes(data[: len(data) * 2 // 3])
    (folder / "e.tar").write_bytes(b"")
    (folder / "f.tar").write_bytes(b"?" * 20480)
    found = [pack_in_parts(folder.as_uri(), tmp_path / f"{n}", n) for n in (1, 2, 7)]
    assert found[0] == found[1] == found[2]
    pack(folder, tmp_path / "local", shard_size=SIZE, progress=False)
    local = contents(tmp_path / "local")
    assert sorted(map(str, rejected_in(found[0]))) == sorted(map(str, rejected_in(local)))
    assert [one["entry"] for one in rejected_in(found[0]) if one["reason"] == "damaged_tar"] == [
        f"{name}.tar: the tar" for name in "bef"
    ]
    assert sorted_keys(tmp_path / "1") == sorted_keys(tmp_path / "local")


def test_nothing_to_pack(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "set").mkdir()
    write_tar(tmp_path / "set" / "a.tar", [("bad", b"no image", b"{}")])
    write_tar(tmp_path / "set" / "b.tar", [])
    assert main(["pack", (tmp_path / "set").as_uri(), "--out", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"error: \S+/out: no valid scenes to pack: 1 malformed_entry; see \S+out.rejected.jsonl$", line)


def test_a_tar_that_changes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Before it is downloaded, while it is, or between two parts."""
    folder = tmp_path / "set"
    shutil.copytree(source, folder)
    good = (folder / "train-1.tar").read_bytes()
    changes: list[bytes | None] = [good[:-1] + b"?", good + bytes(512), good[: len(good) // 2], None]
    copy = remote_tars._copy
    for change in changes:

        def changed(store: Store, name: str, size: int, path: Path, change: bytes | None = change) -> None:
            if name == "train-1.tar" and change is None:
                (folder / name).unlink()
            elif name == "train-1.tar" and change is not None:
                (folder / name).write_bytes(change)
            copy(store, name, size, path)

        for protocol in ("http", "file"):
            (folder / "train-1.tar").write_bytes(good)
            with serving(folder) as server, monkeypatch.context() as patch:
                urls = [f"{server.url}/{path.name}" for path in folder.iterdir()]
                patch.setattr(remote_tars, "_copy", changed)
                out = tmp_path / "out"
                named = urls if protocol == "http" else [folder.as_uri()]
                assert main(["pack", *named, "--out", str(out), "--shard-size", str(SIZE)]) == 2
                last = capsys.readouterr().err.splitlines()[-1]
                what = "no such file" if change is None else ".*changed while packing: pack it again, from the start"
                assert re.match(rf"error: {named[0].rpartition('/')[0]}\S*/train-1.tar: {what}", last), last
                assert len(list(out.glob(".parts/1-of-1/unit-*.json"))) >= 3, "what precedes it is kept"
                shutil.rmtree(out)
    pack_part(folder.as_uri(), tmp_path / "out", 1, 2)
    write_tar(folder / "train-1.tar", [])
    with pytest.raises(UserError, match="contains part 1 of 2 from another source, or a source that was changed mean"):
        pack_part(folder.as_uri(), tmp_path / "out", 2, 2)


def test_transient_failures_are_retried(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    with serving(source, lambda name, count: {1: "error", 2: "cut"}.get(count, "")) as server:
        urls = [f"{server.url}/{path.name}" for path in source.iterdir()]
        found = pack_url(urls, tmp_path / "out")
    assert found == expected | {"source.json": found["source.json"]}


def test_an_interrupt_ends_a_download(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first tar, which the command waits for, although it would take forever."""

    def stuck(store: Store, name: str, start: int | None, end: int | None) -> bytes:
        os.kill(os.getpid(), signal.SIGINT)
        store._with_timeout(threading.Event().wait)
        raise AssertionError

    monkeypatch.setattr(Store, "timeout", 1e6)
    monkeypatch.setattr(Store, "_read_once", stuck)
    assert main(["pack", source.as_uri(), "--out", str(tmp_path / "out")]) == 130


def test_a_tar_that_cannot_be_read(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(remote, "_CHUNK", 10_000)
    faults = {"error": "not reachable in 4 attempts: .*503", "all": "the server ignores byte ranges, in which tars are"}
    for fault, what in faults.items():
        with serving(source, lambda name, count, fault=fault: fault if name == "train-1.tar" else "") as server:
            urls = [f"{server.url}/{path.name}?signature=secret" for path in source.iterdir()]
            out = tmp_path / fault
            assert main(["pack", *urls, "--out", str(out), "--shard-size", str(SIZE)]) == 2
            error = capsys.readouterr().err
            assert re.match(rf"error: {server.url}/train-1.tar: {what}", error.splitlines()[-1])
            assert "secret" not in error
            assert "signature=secret" in server.queries


def test_a_plain_pack_to_a_url(
    source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """From a path and from a URL; interrupted, repeated, and repeated once complete."""
    local = pack_in_parts(source, tmp_path / "parts", 1)
    with in_memory(source) as url:
        for number, (named, packed) in enumerate(((str(source), local), (url, expected))):
            out = f"{url}-out-{number}"
            command = ["pack", named, "--out", out, "--shard-size", str(SIZE)]
            with monkeypatch.context() as patch:
                Decoded(patch, 30)
                assert main(command) == 130
            assert "manifest.json" not in stored(out)
            with monkeypatch.context() as patch:
                patch.setattr(RemoteFolder, "copy", interrupt)
                assert main(command) == 130
            assert main(command) == 0
            found = stored(out)
            assert found == packed | {"source.json": found["source.json"]}
            capsys.readouterr()
            assert main(command) == 0
            assert capsys.readouterr().err.count("up to date") == 1 and stored(out) == found
            with pytest.raises(UserError, match="contains a complete pack of another source or other options; remove"):
                pack(named, out, shard_size=SIZE + 1, progress=False)


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_scenes_in_memory_are_not_packed_to_a_url() -> None:
    with pytest.raises(UserError, match=r"^memory://x/out: got a source without a fingerprint, such as scenes in mem"):
        pack(generate_scenes(2, seed=0), "memory://x/out", progress=False)


def test_a_plain_pack_beside_parts(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack_part(source.as_uri(), out, 1, 2)
    with pytest.raises(UserError, match="contains part 1 of 2, and this is part 1 of 1; pack all parts with the same"):
        pack(source.as_uri(), out, shard_size=SIZE, progress=False)


def test_boxes_in_another_convention_and_other_options(tmp_path: Path, capsys: Any) -> None:
    samples = []
    for key, image, text in good_samples(tmp_path / "good", 24):
        record = json.loads(text)
        for one in record["objects"]:
            x1, y1, x2, y2 = one["box"]
            one["box"] = [x1, y1, x2 - x1, y2 - y1]
        samples.append((key, image, json.dumps(record).encode()))
    (tmp_path / "set").mkdir()
    write_tar(tmp_path / "set" / "train-0.tar", samples[:12])
    write_tar(tmp_path / "set" / "train-1.tar", samples[12:])
    command = ["pack", (tmp_path / "set").as_uri(), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "boxes fit their masks as x, y, width, height" in capsys.readouterr().err
    assert main([*command[:-1], str(tmp_path / "xywh"), "--boxes", "xywh"]) == 0
    assert main([*command[:-1], str(tmp_path / "asis"), "--boxes", "xyxy", "--allow-empty-level"]) == 0


def test_a_source_is_not_overwritten(source: Path, tmp_path: Path) -> None:
    with in_memory(source) as url:
        for out in (url, f"{url}/"):
            with pytest.raises(UserError, match="this directory holds the source; choose another directory for the pa"):
                pack(f"{url}/*.tar", out, force=True, progress=False)
    shutil.copytree(source, tmp_path / "set")
    for out in (str(tmp_path / "set"), (tmp_path / "set").as_uri()):
        with pytest.raises(UserError, match="this directory holds the source; choose another directory for the pack"):
            pack((tmp_path / "set").as_uri(), out, force=True, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["SERVER/none.tar"], "SERVER/none.tar: no such file or directory"),
        (["SERVER/train-{0..9}.tar"], "SERVER/train-7.tar: no such file or directory"),
        (["SERVER"], "SERVER: got no URL of a .tar, and servers list no files; give the URLs of the tars, or all in o"),
        (["SERVER/set/"], "SERVER/set/: got no URL of a .tar, and servers list no files; give the URLs"),
        (["SERVER/*.tar"], r"SERVER/*.tar: got no URL of a .tar, and servers list no files; give the URLs"),
        (["http://127.0.0.1:1/a.tar"], "http://127.0.0.1:1/a.tar: not reachable in 4 attempts: ClientConnectorError"),
        (["nothing://bucket/set"], "nothing://bucket/set: not a URL that fsspec can open"),
        (["memory://none/set"], "memory://none/set: no such file or directory"),
        (["memory://none/a.tar"], "memory://none/a.tar: no such file or directory"),
        (["memory://none/*.tar"], "memory://none/*.tar: found no .tar, expected .tar files of KEY.jpg and KEY.json"),
        (["memory://none/{a}.tar"], "memory://none/{a}.tar: got {a}, expected numbers such as {000..127}, or words"),
        (["memory://none/{9..1}.tar"], "memory://none/{9..1}.tar: got {9..1}, expected the smaller number first, and"),
        (["SET", "memory://none/a.tar"], "SET: got a local path beside memory://none/a.tar, expected only paths or"),
        (["memory://none/a.tar", "SET"], "SET: got a local path beside memory://none/a.tar, expected only paths or"),
        (
            ["memory://none/set", "--format", "psg"],
            "memory://none/set: got a URL, expected a local or mounted path: of URLs, only WebDataset tars are read",
        ),
        (["memory://none/set", "--images", "."], "images: data sets of format 'webdataset' do not use this option; re"),
        (
            ["SERVER/train-0.tar", "--part", "1-2"],
            "part: got 1-2, expected i/n with i from 1 to n, such as 3/7 for the",
        ),
    ],
)
def test_what_cannot_be_packed(arguments: list[str], message: str, source: Path, tmp_path: Path, capsys: Any) -> None:
    with serving(source) as server:
        named = [text.replace("SERVER", server.url).replace("SET", str(source)) for text in arguments]
        assert main(["pack", *named, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        expected = message.replace("SERVER", server.url).replace("SET", str(source))
        assert error.startswith(f"error: {expected}") and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists() and list(Path.cwd().iterdir()) == []


def test_a_protocol_whose_package_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(MissingDependencyError, match=r"^s3://b/c: this kind of storage requires another package"):
        pack("s3://b/c", tmp_path / "out")


def test_compressed_tars(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "set")
    name = tmp_path / "set" / "zzz.tar.gz"
    name.write_bytes(b"")
    with pytest.raises(UserError, match=r"^file://\S*/zzz.tar.gz: compressed \(.gz\), which prevents random access"):
        pack((tmp_path / "set").as_uri(), tmp_path / "out")
    name.unlink()
    (tmp_path / "set" / "zzz.tar").write_bytes(b"\x1f\x8b" + bytes(1000))
    with pytest.raises(UserError, match=r"^file://\S*/zzz.tar: compressed \(gzip\), which prevents random access"):
        pack((tmp_path / "set").as_uri(), tmp_path / "out", progress=False)


def test_no_room(source: Path, tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """For a tar; or only for one at a time, which is no error."""
    usage = shutil.disk_usage
    command = ["pack", source.as_uri(), "--out", str(tmp_path / "out"), "--shard-size", str(SIZE)]
    largest = max(path.stat().st_size for path in source.iterdir())
    most: list[int] = []

    def limited(path: Any, room: int) -> Any:
        used = [file.stat().st_size for file in scratch.rglob("*.tar")]
        most.append(len(used))
        return usage(path)._replace(free=room - sum(used))

    monkeypatch.setattr(remote_tars.shutil, "disk_usage", lambda path: limited(path, largest - 1))
    assert main(command) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.match(
        rf"error: {scratch}/\S+: no room for file://\S+ of {largest} bytes \(\d+ bytes are free\); set TMPDIR", line
    )
    monkeypatch.setattr(remote_tars.shutil, "disk_usage", lambda path: limited(path, largest))
    assert main(command) == 0
    most.clear()
    monkeypatch.setattr(remote_tars.shutil, "disk_usage", lambda path: limited(path, largest * 100))
    assert main([*command[:2], "--out", str(tmp_path / "again")]) == 0
    assert max(most) == 1, "one more than the one that is packed is fetched ahead"


RECORDS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "more items": lambda record: record.update(items=record["items"] + 1),
    "countless items": lambda record: record.update(items=10**30),
    "no items": lambda record: record.pop("items"),
    "no name": lambda record: record.pop("tar"),
    "no split": lambda record: record.pop("assigned"),
    "another split": lambda record: record.update(assigned="dev"),
    "no scan": lambda record: record.pop("scan"),
    "a strange scan": lambda record: record.update(scan={"rejected": [], "ignored": 3, "warnings": []}),
    "a shard twice": lambda record: record["shards"].append(record["shards"][-1]),
    "shards swapped": lambda record: record["shards"].reverse(),
    "a shard lost": lambda record: record["shards"].pop(),
}


@pytest.mark.parametrize("case", RECORDS)
def test_a_damaged_record_of_a_tar(case: str, source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for i in (1, 2):
        pack_part(source.as_uri(), out, i, 2)
    paths = out.glob(".parts/*/unit-*.json")
    path, record = max(((path, json.loads(path.read_bytes())) for path in paths), key=lambda one: len(one[1]["shards"]))
    assert len(record["shards"]) > 2
    RECORDS[case](record)
    path.write_text(json.dumps(record))
    i = int(path.parent.name[0])
    with pytest.raises(UserError, match=rf"^{out}: part {i} of 2 is damaged \({path.name}\): run pack "):
        merge_parts(out, progress=False)
    assert not pack_part(source.as_uri(), out, i, 2).up_to_date
    merge_parts(out, verify=True, progress=False)
    assert contents(out) == expected


def test_the_report_of_a_part(source: Path, tmp_path: Path) -> None:
    report = pack_part(source.as_uri(), tmp_path / "out", 1, 1)
    assert report.ignored == {".txt": 2} and report.rejected["missing_record"] == 1
    assert len(report.warnings) == 1 and "1 of 12 tars have a prefix that names no split" in report.warnings[0]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 bucket of a server on this machine."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    moto = pytest.importorskip("moto.server", reason="moto is not installed")
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (
        ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    s3 = fsspec.get_filesystem_class("s3")
    s3.clear_instance_cache()
    fsspec.filesystem("s3").mkdir("bucket")
    yield "s3://bucket"
    s3.clear_instance_cache()
    server.stop()


def test_s3(bucket: str, source: Path, expected: dict[str, bytes], tmp_path: Path, capsys: Any) -> None:
    fs = fsspec.filesystem("s3")
    for path in source.iterdir():
        fs.put_file(str(path), f"bucket/set/{path.name}")
    names = ",".join(path.stem for path in source.iterdir())
    for number, url in enumerate((f"{bucket}/set", f"{bucket}/set/*.tar", f"{bucket}/set/{{{names}}}.tar")):
        found = pack_in_parts(url, tmp_path / f"{number}", 2)
        assert found == expected | {"source.json": found["source.json"]}
    command = ["pack", f"{bucket}/set/", "--out", f"{bucket}/out", "--shard-size", str(SIZE)]
    assert main(command) == 0
    found = stored(f"{bucket}/out")
    assert found == expected | {"source.json": found["source.json"]}
    capsys.readouterr()
    assert main(command) == 0
    assert "up to date" in capsys.readouterr().err
    fs.pipe_file("bucket/set/train-1.tar", (source / "train-1.tar").read_bytes()[:-512])
    assert main(command) == 2
    assert "contains a complete pack of another source" in capsys.readouterr().err
    for name, what in (("bucket/none", "no such file or directory"), ("none/set", "no such file or directory")):
        assert main(["pack", f"s3://{name}", "--out", str(tmp_path / "none")]) == 2
        assert capsys.readouterr().err == f"error: s3://{name}: {what}\n"
