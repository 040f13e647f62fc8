"""Finding and downloading tars on URLs."""

from __future__ import annotations

import json
import os
import shutil
import threading
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from parts_source import read_raw, write_tar
from tar_server import serving

from scenarioclip_fast.data import ShardSet, generate_scenes, pack, remote
from scenarioclip_fast.data.remote import Store
from scenarioclip_fast.data.sources import remote_tars
from scenarioclip_fast.data.sources.base import SourceOptions
from scenarioclip_fast.data.sources.remote_tars import RemoteTarSource
from scenarioclip_fast.data.sources.webdataset import WebDatasetSource
from scenarioclip_fast.errors import UserError

fsspec: Any = pytest.importorskip("fsspec", reason="fsspec is not installed")

NAMES = ("b.tar", "val-0.tar", "test/b.tar", "dev/a-1.tar", "a/deep.tar", "train/more/deep.tar", "notes.txt")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "pause", 0.02)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, bytes, bytes]]:
    folder = tmp_path_factory.mktemp("scenes") / "pack"
    pack(generate_scenes(4, seed=1), folder, split="hash", val=0, test=0, progress=False)
    return [(key, *read_raw(folder, key)) for key in ShardSet(folder).keys]


@pytest.fixture
def folder(tmp_path: Path, samples: list[tuple[str, bytes, bytes]]) -> Path:
    root = tmp_path / "root" / "set"
    for name in NAMES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_tar(root / name, samples[: len(name) % 4])
    return root


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, folder: Path) -> Iterator[str]:
    if request.param == "file":
        yield folder.as_uri()
        return
    fs = fsspec.filesystem("memory")
    root = f"/bucket-{uuid.uuid4().hex}"
    for path in folder.rglob("*"):
        if path.is_file():
            fs.pipe_file(f"{root}/{path.relative_to(folder)}", path.read_bytes())
    yield f"memory:/{root}"
    fs.rm(root, recursive=True)


def found(*urls: str) -> list[tuple[str, str | None]]:
    return [(tar.name, tar.split) for tar in RemoteTarSource(urls).tars]


IN_DIRECTORY = [("b.tar", None), ("dev/a-1.tar", "val"), ("test/b.tar", "test"), ("val-0.tar", "val")]


def test_directories_patterns_and_lists(url: str, folder: Path) -> None:
    assert found(url) == found(f"{url}/") == IN_DIRECTORY
    local = WebDatasetSource(folder)
    assert [(tar.name, tar.split) for tar in local._tars] == IN_DIRECTORY, "in the order of a local data set"
    assert found(f"{url}/*.tar") == found(f"{url}/{{b,val-0}}.tar") == [("b.tar", None), ("val-0.tar", "val")]
    assert found(f"{url}/*/*.tar") == [("a/deep.tar", None), *IN_DIRECTORY[1:3]]
    assert found(f"{url}/val-{{0..0}}.tar") == found(f"{url}/val-[0-9].ta?") == [("val-0.tar", "val")]
    assert found(f"{url}/dev/", f"{url}/test/b.tar", f"{url}/test/b.tar", f"{url}/test") == IN_DIRECTORY[1:3]
    assert found(f"{url}/test/b.tar") == [("b.tar", None)]
    assert found(url, f"{url}/*.tar") == IN_DIRECTORY


def test_a_directory_with_the_name_of_a_tar(url: str, folder: Path) -> None:
    fs, root = fsspec.core.url_to_fs(url)
    fs.makedirs(f"{root}/dir.tar", exist_ok=True)
    fs.pipe_file(f"{root}/dir.tar/test-7.tar", b"")
    assert found(f"{url}/dir.tar") == [("test-7.tar", "test")]
    assert found(url) == IN_DIRECTORY


def test_links_are_followed(folder: Path, tmp_path: Path) -> None:
    links = tmp_path / "links"
    links.mkdir()
    (links / "a.tar").symlink_to(folder / "b.tar")
    (links / "test").symlink_to(folder / "test")
    (links / "notes.txt").symlink_to(folder / "missing")
    assert found(links.as_uri()) == [("a.tar", None), ("test/b.tar", "test")]
    assert found(f"{links.as_uri()}/*") == [("a.tar", None)]
    with closing(RemoteTarSource([links.as_uri()]).fetch([0], tmp_path)) as fetched:
        assert next(fetched).tar.size == (folder / "b.tar").stat().st_size
    (links / "c.tar").symlink_to(folder / "missing.tar")
    for pattern in ("", "/*.tar"):
        with pytest.raises(UserError, match=r"/links/c.tar: got a broken link or a special file, expected a regular"):
            found(f"{links.as_uri()}{pattern}")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("{8..11}.tar", ["8.tar", "9.tar", "10.tar", "11.tar"]),
        ("{008..011}.tar", ["008.tar", "009.tar", "010.tar", "011.tar"]),
        ("{a,b}-{0..1}.tar", ["a-0.tar", "a-1.tar", "b-0.tar", "b-1.tar"]),
        ("{a,b{1..2},}.tar", ["a.tar", "b1.tar", ".tar", "a.tar", "b2.tar", ".tar"]),
    ],
)
def test_brace_patterns(pattern: str, names: list[str]) -> None:
    assert list(remote_tars._expanded(pattern)) == names


def test_too_many_tars(monkeypatch: pytest.MonkeyPatch) -> None:
    for pattern in ("{0..9999999}", "{0..999}{0..999}{0..9}"):
        with pytest.raises(UserError, match=r"^memory://x/\S*: got .* 1000000 tars"):
            RemoteTarSource([f"memory://x/{pattern}.tar"])


def test_tars_of_a_server_are_asked_for_concurrently_and_signatures_stay_secret(folder: Path) -> None:
    pytest.importorskip("aiohttp", reason="fsspec requires aiohttp to read from a server")
    for i in range(20):
        shutil.copy(folder / "b.tar", folder / f"train-{i:03}.tar")
    with serving(folder.parent) as server:
        signed = f"{server.url}/set/train-{{000..019}}.tar?key=secret/x"
        source = RemoteTarSource([signed])
        assert [(tar.name, tar.split) for tar in source.tars] == [(f"train-{i:03}.tar", "train") for i in range(20)]
        assert str(source.tars[0]) == f"{server.url}/set/train-000.tar"
        assert set(server.queries) == {"key=secret/x"} and not server.gets.total()
        again = RemoteTarSource([f"{server.url}/set/train-{{000..019}}.tar?key={key}" for key in ("one", "another")])
        assert again.fingerprint() == source.fingerprint()
        (folder / "train-007.tar").write_bytes(bytes((folder / "train-007.tar").stat().st_size))
        assert RemoteTarSource([signed]).fingerprint() != source.fingerprint()
    with (
        serving(folder, size=False) as server,
        pytest.raises(UserError, match=r"/b\.tar: the server does not say"),
    ):
        RemoteTarSource([f"{server.url}/b.tar"])


def test_the_fingerprint(url: str) -> None:
    before = RemoteTarSource([url]).fingerprint()
    assert RemoteTarSource([f"{url}/"]).fingerprint() == before
    fs, root = fsspec.core.url_to_fs(url)
    data = fs.cat_file(f"{root}/b.tar")
    seen = {before}
    for change in (data + b"\0", data, None):
        if change is None:
            fs.rm_file(f"{root}/b.tar")
        else:
            fs.pipe_file(f"{root}/b.tar", change)
        now = RemoteTarSource([url]).fingerprint()
        assert now not in seen, "times count"
        seen.add(now)


def test_known_texts(url: str, tmp_path: Path) -> None:
    fs, root = fsspec.core.url_to_fs(url)
    before = RemoteTarSource([url])
    assert before.classes is None
    pack(generate_scenes(4, seed=1), tmp_path / "pack", split="hash", val=0, test=0, progress=False)
    for name in ("vocabulary.bin", "manifest.json"):
        fs.pipe_file(f"{root}/{name}", (tmp_path / "pack" / name).read_bytes())
    of_pack = RemoteTarSource([url])
    assert of_pack.classes == WebDatasetSource(tmp_path / "pack").classes
    fs.pipe_file(f"{root}/classes.json", json.dumps({"actions": ["A"], "objects": ["b"], "relations": []}).encode())
    source = RemoteTarSource([url])
    assert source.classes == {"actions": ["a"], "objects": ["b"], "relations": []}
    assert len({one.fingerprint() for one in (before, of_pack, source)}) == 3
    assert RemoteTarSource([f"{url}/*.tar"]).classes is None
    fs.pipe_file(f"{root}/classes.json", b"[]")
    with pytest.raises(UserError, match=f"^{url}/classes.json: expected "):
        RemoteTarSource([url])


def test_tars_are_fetched_one_ahead_and_removed(url: str, tmp_path: Path, samples: list[Any]) -> None:
    source = RemoteTarSource([url])
    folder = tmp_path / "fetched"
    folder.mkdir()
    numbers = [3, 0, 2]
    with closing(source.fetch(numbers, folder)) as fetched:
        for at, one in enumerate(fetched):
            tar = source.tars[numbers[at]]
            assert one.tar == tar and one.count == len(tar.name) % 4
            assert [sample.key for sample in one.samples()] == [key for key, *_ in samples[: one.count]]
            for sample in one.samples():
                assert one.reader.read(sample).scene.split == tar.split
            there = {path.name for path in folder.iterdir()}
            assert f"{numbers[at]:06d}.tar" in there
            assert there <= {f"{number:06d}.tar" for number in numbers[at : at + 2]}
    assert list(folder.iterdir()) == []


def test_a_download_ends_with_its_iterator(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although the next tar would take forever."""
    reading = threading.Event()
    read = Store._read_once

    def slow(store: Store, name: str, start: int | None, end: int | None) -> bytes:
        if name != "b.tar":
            reading.set()
            store._with_timeout(threading.Event().wait)
        return read(store, name, start, end)

    monkeypatch.setattr(Store, "_read_once", slow)
    monkeypatch.setattr(Store, "timeout", 1e6)
    source = RemoteTarSource([folder.as_uri()])
    (tmp_path / "fetched").mkdir()
    with closing(source.fetch([0, 1], tmp_path / "fetched")) as fetched:
        next(fetched)
        assert reading.wait(30)
    assert list((tmp_path / "fetched").iterdir()) == []


def test_a_full_disk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tar that does not fit while another one is there is downloaded later; then it is an error."""
    source = RemoteTarSource([folder.as_uri()])
    (tmp_path / "fetched").mkdir()
    failures = {"a-1.tar": 1, "val-0.tar": 2}
    download = remote.download

    def full(store: Store, name: str, size: int, descriptor: int) -> None:
        download(store, name, size // 2, descriptor)
        if failures.get(name, 0) > 0:
            failures[name] -= 1
            raise OSError(28, os.strerror(28))
        download(store, name, size, descriptor)

    monkeypatch.setattr(remote_tars, "download", full)
    seen: list[str] = []
    with (
        pytest.raises(UserError, match=r"/fetched: no room for file://\S*/val-0.tar of \d+ bytes \(No space left on d"),
        closing(source.fetch(range(4), tmp_path / "fetched")) as fetched,
    ):
        seen.extend(one.tar.name for one in fetched)
    assert seen == [name for name, _ in IN_DIRECTORY[:3]] and failures == {"a-1.tar": 0, "val-0.tar": 0}
    assert list((tmp_path / "fetched").iterdir()) == []


def test_options(folder: Path, tmp_path: Path) -> None:
    source = RemoteTarSource([f"{folder.as_uri()}/b.tar"], SourceOptions(max_pixels=10))
    (tmp_path / "fetched").mkdir()
    with closing(source.fetch([0], tmp_path / "fetched")) as fetched:
        one = next(fetched)
        with pytest.raises(ValueError, match="image_too_large"):
            one.reader.read(next(one.samples()))
    assert not source.large and source.directories == {folder, folder.as_uri()}
