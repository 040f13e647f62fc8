"""Packing in parts on URLs, and merging them there."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from parts_source import SIZE, contents, keys_of, pack_in_parts, pack_part, write_tar

from scenarioclip_fast.cli.main import main
from scenarioclip_fast.data import ShardSet, merge_parts
from scenarioclip_fast.data.packing import merging, options, remote_parts
from scenarioclip_fast.data.packing.remote_folder import RemoteFolder
from scenarioclip_fast.errors import MissingDependencyError, UserError

fsspec: Any = pytest.importorskip("fsspec", reason="fsspec is not installed")

pytestmark = pytest.mark.usefixtures("scratch")


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The pack that local parts make."""
    return pack_in_parts(source, tmp_path_factory.mktemp("expected") / "out", 2)


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "file":
        yield (tmp_path / "store" / "out").as_uri()
        return
    root = f"/bucket-{uuid.uuid4().hex}"
    yield f"memory:/{root}/out"
    fs = fsspec.filesystem("memory")
    if fs.exists(root):
        fs.rm(root, recursive=True)


def stored(url: str) -> dict[str, bytes]:
    """The files below a URL, by relative path."""
    fs, root = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    return {path[len(root) + 1 :]: fs.cat_file(path) for path in fs.find(root)}


def edit(url: str, name: str, change: Callable[[bytes], bytes | None]) -> None:
    """Change the content of a file; None removes it."""
    fs, root = fsspec.core.url_to_fs(url)
    data = change(fs.cat_file(f"{root}/{name}"))
    if data is None:
        fs.rm_file(f"{root}/{name}")
    else:
        fs.pipe_file(f"{root}/{name}", data)


class Writes:
    """Counts what is written to URLs, and raises KeyboardInterrupt before the write with the number `limit`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
        self.count, self.limit = 0, limit
        self.made: list[str] = []
        for name in ("write", "upload", "copy", "move", "remove"):
            monkeypatch.setattr(RemoteFolder, name, self._counted(name, getattr(RemoteFolder, name)))

    def _counted(self, name: str, method: Callable[..., None]) -> Callable[..., None]:
        def counted(*args: Any, **kwargs: Any) -> None:
            if self.count == self.limit:
                raise KeyboardInterrupt
            self.count += 1
            self.made.append(name)
            method(*args, **kwargs)

        return counted


@pytest.mark.parametrize("n", [1, 3])
def test_the_pack_is_that_of_local_parts(
    n: int, source: Path, expected: dict[str, bytes], url: str, capsys: Any
) -> None:
    for i in range(n, 0, -1):
        report = pack_part(source, url, i, n)
        assert report.directory == url and not report.up_to_date
    assert all(name.startswith(".parts/") for name in stored(url)), "no reader takes it for a pack"
    assert main(["pack", "--merge", url]) == 0
    assert stored(url) == expected
    # Nothing is left to do, for any of the commands.
    capsys.readouterr()
    assert main(["pack", "--merge", url]) == 0
    assert "up to date" in capsys.readouterr().err
    assert pack_part(source, url, 1, n).up_to_date
    assert stored(url) == expected
    assert list(Path.cwd().iterdir()) == []


def test_a_merged_pack_is_read(source: Path, expected: dict[str, bytes], url: str, tmp_path: Path) -> None:
    for i in (1, 2):
        pack_part(source, url, i, 2)
    merge_parts(url, verify=True, progress=False)
    shards = ShardSet(url, split="train", shard_cache_dir=tmp_path / "cache", shard_cache_gib=1)
    (tmp_path / "copy").mkdir()
    for name, data in expected.items():
        (tmp_path / "copy" / name).write_bytes(data)
    assert [shards.read(i).key for i in range(len(shards))] == keys_of(tmp_path / "copy")["train"]
    shards.close()


def test_a_part_resumes_after_the_units_that_are_stored(
    source: Path, url: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Whatever is stored when it is interrupted: nothing, a shard, a shard and its record, all but done.json."""
    pack_part(source, url, 1, 1)
    whole = stored(url)
    fs, root = fsspec.core.url_to_fs(url)
    limit, interrupted = 0, True
    while interrupted:
        fs.rm(root, recursive=True)
        with monkeypatch.context() as patch:
            Writes(patch, limit)
            try:
                pack_part(source, url, 1, 1)
            except KeyboardInterrupt:
                pass
            else:
                interrupted = False
        before = stored(url)
        units = {name for name in before if "unit-" in name}
        for name in units:  # its shards are stored already
            record = json.loads(before[name])
            for shard in record["shards"]:
                assert len(before[f".parts/1-of-1/{shard['name']}"]) == shard["bytes"]
        with monkeypatch.context() as patch:
            writes = Writes(patch, 1000)
            assert pack_part(source, url, 1, 1).up_to_date is not interrupted
            if interrupted:
                left = sum(name.endswith(".tar") for name in whole) - sum(
                    len(json.loads(before[name])["shards"]) for name in units
                )
                assert writes.made.count("upload") == left, "finished units are not uploaded again"
        assert stored(url) == whole
        limit += 7
    assert limit >= 28


def test_a_merge_interrupted_at_every_write(
    source: Path, expected: dict[str, bytes], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_parts, "_STEP", 5)
    for i in (1, 2):
        pack_part(source, url, i, 2)
    fs, root = fsspec.core.url_to_fs(url)
    parts = stored(url)
    limit, steps, interrupted = 0, 0, True
    while interrupted:
        if fs.exists(root):
            fs.rm(root, recursive=True)
        for name, data in parts.items():
            fs.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
            fs.pipe_file(f"{root}/{name}", data)
        with monkeypatch.context() as patch:
            writes = Writes(patch, limit)
            try:
                merge_parts(url, progress=False)
            except KeyboardInterrupt:
                copied = writes.made.count("copy")
            else:
                interrupted = False
        found = stored(url)
        complete = "manifest.json" in found
        assert not complete or {name: found[name] for name in expected} == expected, "half a pack"
        assert complete or {name: found[name] for name in parts} == parts, "parts are kept until the pack is complete"
        with monkeypatch.context() as patch:
            writes = Writes(patch, 1000)
            merge_parts(url, progress=False)
            if limit == 0:
                steps = writes.made.count("copy")
            elif interrupted and not complete:  # a step is made twice if it has not been noted
                assert copied + writes.made.count("copy") in (steps, steps + 1)
        assert stored(url) == expected
        limit += 1
    assert limit >= 20 and steps >= 4


def test_stale_shards_are_replaced(
    source: Path, expected: dict[str, bytes], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of the right size, in a merge that is interrupted and continued."""
    pack_part(source, url, 1, 1)
    monkeypatch.setattr(remote_parts, "_STEP", 2)
    fs, root = fsspec.core.url_to_fs(url)
    names = [name for name in expected if name.endswith(".tar")]
    for name in names:
        fs.pipe_file(f"{root}/{name}", bytes(len(expected[name])))
    fs.pipe_file(f"{root}/val-000099.tar", b"of another pack")
    with monkeypatch.context() as patch:
        Writes(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            merge_parts(url, progress=False)
    merge_parts(url, progress=False)
    assert stored(url) == expected


def test_two_processes_that_pack_the_same_part(source: Path, expected: dict[str, bytes], url: str) -> None:
    """One starts while the other has stored a shard without its record: both finish, with the same bytes."""
    pack_part(source, url, 1, 1)
    whole = stored(url)
    records = sorted(name for name in whole if "unit-" in name)
    for name in (*records[3:], ".parts/1-of-1/done.json"):
        edit(url, name, lambda _: None)
    between: list[dict[str, bytes]] = []
    create = remote_parts.RemotePart.create

    def nested(part: remote_parts.RemotePart, name: str) -> Any:
        if not between:
            between.append({})
            pack_part(source, url, 1, 1)
            between[0] = stored(url)
        return create(part, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote_parts.RemotePart, "create", nested)
        pack_part(source, url, 1, 1)
    assert between == [whole] and stored(url) == whole
    merge_parts(url, progress=False)
    assert stored(url) == expected


@pytest.mark.parametrize(
    ("kind", "step", "message"),
    [
        (remote_parts.RemoteMergeStage, "install", "another process has merged the parts meanwhile; the pack is comp"),
        (RemoteFolder, "copy", "FileNotFoundError: "),
        (RemoteFolder, "move", "FileNotFoundError: "),
    ],
)
def test_a_merge_that_another_one_overtakes(
    kind: type,
    step: str,
    message: str,
    source: Path,
    expected: dict[str, bytes],
    url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for i in (1, 2):
        pack_part(source, url, i, 2)
    method, started = getattr(kind, step), []

    def overtaken(*args: Any) -> None:
        if not started:
            started.append(True)
            merge_parts(url, progress=False)
        method(*args)

    monkeypatch.setattr(kind, step, overtaken)
    with pytest.raises(UserError, match=rf"^{url}\S*: {message}"):
        merge_parts(url, progress=False)
    assert {name: data for name, data in stored(url).items() if ".parts" not in name} == expected
    assert merge_parts(url, progress=False).up_to_date
    assert stored(url) == expected


def test_what_is_missing_or_damaged_is_named(source: Path, expected: dict[str, bytes], url: str) -> None:
    with pytest.raises(UserError, match=f"^{url}: contains no parts of a pack, expected those of `pack"):
        merge_parts(url)
    pack_part(source, url, 1, 2)
    with pytest.raises(UserError) as caught:
        merge_parts(url)
    assert str(caught.value) == f"{url}: part 2 of 2 is missing: run pack SOURCE --out {url} --part 2/2"
    pack_part(source, url, 2, 2)
    part = ".parts/2-of-2"
    edit(url, f"{part}/done.json", lambda _: None)
    with pytest.raises(UserError, match=rf"^{url}: part 2 of 2 is unfinished: run pack SOURCE --out {url} --part 2/2$"):
        merge_parts(url)
    pack_part(source, url, 2, 2)
    shard = sorted(name for name in stored(url) if name.startswith(part) and name.endswith(".tar"))[1]
    again = f"; run pack SOURCE --out {url} --part 2/2, which packs it again$"
    for change, what in (
        (lambda data: data[:512], "got 512 bytes, expected [0-9]+"),
        (lambda data: None, "is missing"),
    ):
        edit(url, shard, change)
        with pytest.raises(UserError, match=f"^{url}/{shard}: {what}{again}"):
            merge_parts(url, progress=False)
        pack_part(source, url, 2, 2)
    good = stored(url)[shard]
    edit(url, shard, lambda data: data[:700] + b"?" + data[701:])
    with pytest.raises(
        UserError, match=f"^{url}/{shard}: damaged, its SHA-256 .* remove it, and run pack .* --part 2/2"
    ):
        merge_parts(url, verify=True, progress=False)
    edit(url, shard, lambda _: None)
    pack_part(source, url, 2, 2)
    assert stored(url)[shard] == good
    record = min(name for name in stored(url) if name.startswith(f"{part}/unit-"))
    for data in (b"", b"[]", b'{"unit": 0, "shards": 3}'):
        edit(url, record, lambda _, data=data: data)
        with pytest.raises(UserError, match=r"part 2 of 2 is damaged \(unit-\d+.json\): run pack .* --part 2/2$"):
            merge_parts(url, progress=False)
    pack_part(source, url, 2, 2)
    merge_parts(url, progress=False)
    assert stored(url) == expected


@pytest.mark.parametrize(
    ("name", "change", "what"),
    [
        ("train-000001.tar", lambda _: None, "train-000001.tar is missing"),
        ("train-000001.tar", lambda data: data[:512], "train-000001.tar has 512 bytes, expected [0-9]+"),
        ("index.bin", lambda data: data[:-1] + b"?", "index.bin has another SHA-256 than in manifest.json"),
        ("vocabulary.bin", lambda _: None, "vocabulary.bin is missing"),
        ("manifest.json", lambda _: b"{}", "manifest.json is not that of a pack"),
    ],
)
def test_a_damaged_pack_is_merged_again_from_complete_parts(
    name: str,
    change: Callable[[bytes], bytes | None],
    what: str,
    source: Path,
    expected: dict[str, bytes],
    url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also if a merge had noted its copies, and if the new one is interrupted."""
    monkeypatch.setattr(remote_parts, "_STEP", 5)
    pack_part(source, url, 1, 1)
    with monkeypatch.context() as patch:
        patch.setattr(merging, "remove_parts", lambda _: None)
        merge_parts(url, progress=False)
    edit(url, name, change)
    assert ".parts/merge/copied.json" in stored(url)
    done = stored(url)[".parts/1-of-1/done.json"]
    edit(url, ".parts/1-of-1/done.json", lambda _: None)
    before = stored(url)
    with pytest.raises(UserError, match=rf"^{url}: the pack is damaged \({what}\), and its parts cannot replace it: "):
        merge_parts(url, progress=False)
    assert stored(url) == before, "nothing is removed"
    assert not pack_part(source, url, 1, 1).up_to_date
    assert stored(url)[".parts/1-of-1/done.json"] == done
    with monkeypatch.context() as patch:
        Writes(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            merge_parts(url, progress=False)
    assert not merge_parts(url, progress=False).up_to_date
    assert stored(url) == expected
    edit(url, name, change)  # now without parts
    with pytest.raises(UserError, match=rf"^{url}: the pack is damaged \({what}\), and there are no parts to merge"):
        merge_parts(url, progress=False)
    with pytest.raises(UserError, match=rf"^{url}: contains a pack of this source that is damaged \({what}\); restore"):
        pack_part(source, url, 1, 1)


def test_files_of_unknown_origin_are_packed_again(source: Path, expected: dict[str, bytes], url: str) -> None:
    """Units without part.json, records that lack items, and what another part has packed."""
    for i in (1, 2):
        pack_part(source, url, i, 2)
    whole = stored(url)
    record = min(name for name in whole if name.startswith(".parts/1-of-2/unit-"))
    damages: dict[str, bytes | None] = {
        ".parts/1-of-2/part.json": None,
        ".parts/1-of-2/done.json": b"{}",
        record: b'{"unit": 0, "shards": [], "rejected": [], "boxes": []}',
    }
    for name, data in damages.items():
        edit(url, name, lambda _, data=data: data)
        with pytest.raises(UserError, match=r"part 1 of 2 is (unfinished|damaged)"):
            merge_parts(url, progress=False)
        if data is None:  # a merge must not find done.json while the units are packed again
            with pytest.MonkeyPatch.context() as patch:
                Writes(patch, 3)
                with pytest.raises(KeyboardInterrupt):
                    pack_part(source, url, 1, 2)
            assert ".parts/1-of-2/done.json" not in stored(url)
        assert not pack_part(source, url, 1, 2).up_to_date
        assert stored(url) == whole
    fs, root = fsspec.core.url_to_fs(url)
    foreign = min(name for name in whole if name.startswith(".parts/2-of-2/unit-"))
    fs.pipe_file(f"{root}/{foreign.replace('2-of-2', '1-of-2')}", whole[foreign])
    assert pack_part(source, url, 1, 2).up_to_date
    merge_parts(url, verify=True, progress=False)
    assert stored(url) == expected


def test_parts_that_do_not_belong_together(source: Path, expected: dict[str, bytes], url: str) -> None:
    pack_part(source, url, 1, 2)
    before = stored(url)
    for i in (1, 2):
        with pytest.raises(UserError, match=f"^{url}: contains part 1 of 2 from shard size 4, not 5; remove {url}"):
            pack_part(source, url, i, 2, shard_size=5)
    with pytest.raises(UserError, match=f"^{url}: contains part 1 of 2, and this is part 2 of 3; pack all"):
        pack_part(source, url, 2, 3)
    assert stored(url) == before
    pack_part(source, url, 2, 2)
    parts = stored(url)
    merge_parts(url, progress=False)
    with pytest.raises(UserError, match=f"^{url}: contains a complete pack of another source or other options"):
        pack_part(source, url, 1, 2, shard_size=5)
    fs, root = fsspec.core.url_to_fs(url)
    header = json.loads(parts[".parts/1-of-2/part.json"]) | {"fingerprint": "another"}
    fs.makedirs(f"{root}/.parts/1-of-2", exist_ok=True)
    fs.pipe_file(f"{root}/.parts/1-of-2/part.json", json.dumps(header).encode())
    with pytest.raises(UserError, match=f"^{url}: contains a complete pack, and part 1 of 2 of another source or with"):
        merge_parts(url)
    assert {name: data for name, data in stored(url).items() if ".parts" not in name} == expected


def test_other_files_at_the_url(source: Path, url: str) -> None:
    fs, root = fsspec.core.url_to_fs(url)
    fs.makedirs(root, exist_ok=True)
    fs.pipe_file(f"{root}/train-000000.tar", b"")
    with pytest.raises(UserError, match=rf"^{url}: contains an incomplete pack \(train-000000.tar\)"):
        pack_part(source, url, 1, 1)
    fs.pipe_file(f"{root}/notes.txt", b"kept")
    with pytest.raises(UserError, match=rf"^{url}: contains files that are not part of a pack \(notes.txt\)"):
        pack_part(source, url, 1, 1)
    pack_part(source, url, 1, 1, force=True)
    merge_parts(url, progress=False)
    assert stored(url)["notes.txt"] == b"kept"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "http://localhost:1/out",
            "http://localhost:1/out: got a URL that packs cannot be written to, expected",
        ),
        ("zip://out::memory://no.zip", "zip://out::memory://no.zip: not a URL that fsspec can open"),
        ("nothing://bucket/out", "nothing://bucket/out: not a URL that fsspec can open"),
        ("memory://", "memory://: got a URL without a path, expected that of a directory"),
        ("memory://bucket/*", "memory://bucket/*: got a pattern, expected the URL of one directory"),
    ],
)
def test_urls_that_cannot_be_written(url: str, message: str, source: Path, capsys: Any) -> None:
    for command in ([str(source), "--out", url, "--part", "1/2"], ["--merge", url]):
        assert main(["pack", *command]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {message}") and error.count("\n") == 1, error
    assert list(Path.cwd().iterdir()) == []


def test_a_protocol_whose_package_is_not_installed(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    for call in (lambda: pack_part(source, "s3://b/c", 1, 2), lambda: merge_parts("s3://b/c")):
        with pytest.raises(MissingDependencyError, match=r"^s3://b/c: this kind of storage requires another package"):
            call()


def test_a_failure_of_the_storage_is_one_line(
    source: Path, expected: dict[str, bytes], url: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """It is neither taken for a missing file, nor for a damaged one."""
    fs, _ = fsspec.core.url_to_fs(url)

    def failing(*_: Any, **__: Any) -> Any:
        raise RuntimeError("503:\n slow down")

    command = ["pack", str(source), "--out", url, "--shard-size", str(SIZE), "--part", "1/1"]
    merge = ["pack", "--merge", url]
    for name in ("ls", "pipe_file", "put_file"):
        with monkeypatch.context() as patch:
            patch.setattr(type(fs), name, failing)
            assert main(command) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert re.fullmatch(rf"error: {url}\S*: RuntimeError: 503: slow down", line), name
    assert main(command) == 0
    for name in ("ls", "info", "cat_file", "cp_file"):
        with monkeypatch.context() as patch:
            patch.setattr(type(fs), name, failing)
            assert main(merge) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert re.fullmatch(rf"error: {url}\S*: RuntimeError: 503: slow down", line), name
    assert main(merge) == 0
    assert stored(url) == expected


def test_rejections_of_a_merge_that_fails_are_listed_here(url: str, tmp_path: Path, source: Path, capsys: Any) -> None:
    (tmp_path / "empty").mkdir()
    write_tar(tmp_path / "empty" / "train-0.tar", [("a", b"no image", b"{}")])
    pack_part(tmp_path / "empty", url, 1, 1)
    assert main(["pack", "--merge", url]) == 2
    listing = Path.cwd() / "out.rejected.jsonl"
    assert re.search(rf"{url}: no valid scenes to pack: 1 .*; see {listing}$", capsys.readouterr().err.strip())
    assert json.loads(listing.read_text())["entry"]


def test_a_source_is_not_overwritten(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "set")
    with pytest.raises(UserError, match="this directory holds the source; choose another directory for the pack"):
        pack_part(tmp_path / "set", (tmp_path / "set").as_uri(), 1, 1, force=True)


_KILLED = """
import os, signal, sys
from scenarioclip_fast.data import merge_parts, pack
from scenarioclip_fast.data.packing.remote_folder import RemoteFolder

source, url, part, limit = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

def counted(method):
    def wrapped(*args, **kwargs):
        global limit
        limit -= 1
        if limit == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*args, **kwargs)
    return wrapped

for name in ("write", "upload", "copy", "move", "remove"):
    setattr(RemoteFolder, name, counted(getattr(RemoteFolder, name)))
if part:
    pack(source, url, part=(part, 2), shard_size=4, progress=False)
else:
    merge_parts(url, progress=False)
"""


def test_killed_processes(source: Path, expected: dict[str, bytes], tmp_path: Path, scratch: Path) -> None:
    url = (tmp_path / "out").as_uri()
    for part, limit in ((1, 5), (1, 9), (1, 0), (2, 12), (2, 0), (0, 3), (0, 6), (0, 0)):
        command = [sys.executable, "-c", _KILLED, str(source), url, str(part), str(limit)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=300, env=os.environ | {"TMPDIR": str(scratch)}
        )
        assert done.returncode == (-signal.SIGKILL if limit else 0), done.stderr[-2000:]
        if not limit:
            continue
        assert not (tmp_path / "out" / "manifest.json").exists()
        for left in scratch.iterdir():  # nothing can remove these but the user
            assert left.name.startswith("scenarioclip-pack-")
            shutil.rmtree(left)
    assert contents(tmp_path / "out") == expected
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_dir()) == ["here", "out", "scratch"]


def test_options_are_compared_with_the_version(source: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pack_part(source, url, 1, 1)
    monkeypatch.setattr(merging, "VERSION", options.VERSION | {"version": "9.9"})
    with pytest.raises(UserError, match=r"part 1 of 1 is from version \S+, not 9.9; merge with"):
        merge_parts(url)
