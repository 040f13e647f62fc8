"""Links and files of others in the places where `pack`, the shard cache and the demo write and clear up."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from campaign import generator, trials
from special import bounded, make_special, snapshot

from scenarioclip_fast.cli.main import main
from scenarioclip_fast.data import Scene, ShardSet, generate_scenes, pack
from scenarioclip_fast.data.decode import TorchDecoder
from scenarioclip_fast.data.packing.staging import Stage
from scenarioclip_fast.data.shard_cache import ShardCache, verified_time
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import Directory, NotRegularError, open_regular
from scenarioclip_fast.recipes.steps import prepare_directory

KINDS = ["symbolic link", "broken link", "named pipe", "socket", "directory"]
# Every name that a pack writes into its staging directory.
STAGED = [
    *("journal.jsonl", "manifest.tmp", "manifest.json", "index.bin", "vocabulary.bin", "source.json"),
    *("rejected.jsonl", "train-000000.tar", "val-000000.tar", "test-000001.tar"),
]


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [replace(scene, split="train") for scene in generate_scenes(6, seed=3)]


@pytest.fixture(scope="module")
def packed(scenes: list[Scene], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("links") / "packed"
    pack_quietly(scenes, directory)
    return directory


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A directory of somebody else, with files named like those of a pack."""
    directory = tmp_path / "elsewhere" / "victim"
    directory.mkdir(parents=True)
    for name in ("journal.jsonl", "train-000000.tar", "notes.txt"):
        (directory / name).write_text(f"precious {name}")
    return directory


def pack_quietly(scenes: Any, out: Path, **options: Any) -> Any:
    with bounded(60):
        return pack(scenes, out, progress=False, **{"shard_size": 2} | options)


def refused(scenes: Any, out: Path, path: Path, kind: str, **options: Any) -> None:
    """`pack` ends with one line that names the path and what it is."""
    with pytest.raises(UserError) as caught:
        pack_quietly(scenes, out, **options)
    kind = "symbolic link" if kind == "broken link" else kind
    assert str(caught.value).startswith(f"{path}: got a {kind}") and "expected" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["symbolic link", "broken link", "named pipe", "socket", "regular file"])
@pytest.mark.parametrize("before", [False, True])
def test_a_stage_that_is_something_else_is_refused(
    kind: str, before: bool, scenes: list[Scene], packed: Path, victim: Path, tmp_path: Path
) -> None:
    out, stage = tmp_path / "out", tmp_path / ".out.partial"
    if before:
        shutil.copytree(packed, out)
    make_special(stage, kind, victim)
    everything = snapshot(tmp_path)
    refused(scenes, out, stage, kind)
    assert snapshot(tmp_path) == everything


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "symbolic link") for name in STAGED),
        *(("train-000000.tar", kind) for kind in KINDS),
        *(("journal.jsonl", kind) for kind in KINDS),
        *((name, "regular file") for name in ("notes.txt", "train-0.tar", "journal.jsonl.bak", "x.tar", ".hidden")),
        ("images", "directory"),
    ],
)
def test_what_a_pack_does_not_write_is_refused_in_its_stage(
    name: str, kind: str, scenes: list[Scene], victim: Path, tmp_path: Path
) -> None:
    stage = tmp_path / ".out.partial"
    stage.mkdir()
    (stage / "val-000007.tar").write_text("of an interrupted run")
    make_special(stage / name, kind, victim / "train-000000.tar")
    everything = snapshot(tmp_path)
    refused(scenes, tmp_path / "out", stage / name, kind)
    assert snapshot(tmp_path) == everything
    path = stage / name
    path.rename(tmp_path / "moved away")
    pack_quietly(scenes, tmp_path / "out")
    assert not stage.exists()


def test_a_file_that_appears_in_the_stage_meanwhile_is_kept(
    scenes: list[Scene], packed: Path, victim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, install = tmp_path / ".out.partial", Stage.install

    def late(self: Stage) -> None:
        (stage / "notes.txt").write_text("precious")
        (stage / "test-000009.tar").symlink_to(victim / "train-000000.tar")
        install(self)

    monkeypatch.setattr(Stage, "install", late)
    before = snapshot(victim)
    pack_quietly(scenes, tmp_path / "out")
    assert snapshot(victim) == before and snapshot(tmp_path / "out") == snapshot(packed)
    assert os.listdir(stage) == ["notes.txt"]


def test_a_stage_that_is_replaced_by_a_link_meanwhile_is_not_followed(
    scenes: list[Scene], packed: Path, victim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, install = tmp_path / ".out.partial", Stage.install

    def replaced(self: Stage) -> None:
        stage.rename(tmp_path / "moved")
        stage.symlink_to(victim)
        install(self)

    monkeypatch.setattr(Stage, "install", replaced)
    before = snapshot(victim)
    pack_quietly(scenes, tmp_path / "out")
    assert snapshot(victim) == before and stage.is_symlink() and snapshot(tmp_path / "out") == snapshot(packed)


@pytest.mark.parametrize("exists", [False, True])
def test_the_target_may_be_a_link_to_a_directory(
    exists: bool, scenes: list[Scene], packed: Path, tmp_path: Path
) -> None:
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    out.symlink_to(disk / "shards")
    if exists:
        (disk / "shards").mkdir()
    pack_quietly(scenes, out)
    pack_quietly(scenes[:3], out)  # replaces it
    pack_quietly(scenes, out)
    assert out.is_symlink() and snapshot(disk / "shards") == snapshot(packed)
    assert sorted(os.listdir(tmp_path)) == ["disk", "out"] and os.listdir(disk) == ["shards"]


def test_links_in_the_target_are_replaced_and_their_targets_kept(
    scenes: list[Scene], packed: Path, tmp_path: Path
) -> None:
    """Users move shards to other disks and leave links."""
    out, disk = tmp_path / "out", tmp_path / "disk"
    shutil.copytree(packed, out)
    shutil.copytree(packed, disk)
    for name in os.listdir(out):
        (out / name).unlink()
        (out / name).symlink_to(disk / name)
    assert len(ShardSet(out)) == len(scenes) and ShardSet(out).read(0).key
    pack_quietly(scenes[:2], out)
    assert len(ShardSet(out)) == 2 and not any(path.is_symlink() for path in out.iterdir())
    assert not (out / "train-000001.tar").exists(), "of the replaced pack"
    assert snapshot(disk) == snapshot(packed)


@pytest.mark.parametrize("kind", ["directory", "named pipe", "socket"])
@pytest.mark.parametrize("name", ["manifest.json", "source.json", "val-000003.tar"])
@pytest.mark.parametrize("force", [False, True])
def test_names_of_a_pack_in_the_target_are_checked(
    kind: str, name: str, force: bool, scenes: list[Scene], packed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(packed, out)
    (out / name).unlink(missing_ok=True)
    make_special(out / name, kind, tmp_path)
    everything = snapshot(tmp_path)
    refused(scenes, out, out / name, kind, force=force)
    assert snapshot(tmp_path) == everything


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fails", [False, True])
def test_the_listing_of_rejections_replaces_nothing_else(
    kind: str, fails: bool, scenes: list[Scene], victim: Path, tmp_path: Path
) -> None:
    listing = tmp_path / "out.rejected.jsonl"
    make_special(listing, kind, victim / "notes.txt")
    everything = snapshot(tmp_path)
    refused([Scene("bad", b"no image", "resting", [])] if fails else scenes, tmp_path / "out", listing, kind)
    assert snapshot(tmp_path) == everything


def test_an_interrupted_run_resumes_through_a_link_to_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: Path
) -> None:
    decoded, decode = 0, TorchDecoder.decode

    def interrupted(decoder: TorchDecoder, images: Any) -> Any:
        nonlocal decoded
        decoded += 1
        if decoded == 6:
            raise KeyboardInterrupt
        return decode(decoder, images)

    monkeypatch.setattr(TorchDecoder, "decode", interrupted)
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    command = ["pack", str(packed), "--out", str(tmp_path / "out"), "--shard-size", "2", "--workers", "1"]
    assert main(command) == 130
    kept = tmp_path / ".disk.partial" / "train-000000.tar"
    status = kept.stat()
    assert main(command) == 0 and decoded < 12
    assert os.path.samestat(status, (tmp_path / "disk" / kept.name).stat()), "the finished shard was moved"
    assert len(ShardSet(tmp_path / "out")) == 6


def test_hostile_surroundings_lose_nothing(scenes: list[Scene], tmp_path: Path) -> None:
    """Random links, pipes and files around the target: `pack` succeeds or refuses, and removes none of them."""
    rng = generator("links")
    outcomes = {"packed": 0, "refused": 0}
    for trial in range(trials(25, 600)):
        root = tmp_path / str(trial)
        out, stage, victim = root / "out", root / ".out.partial", root / "victim"
        for folder in (victim, *rng.sample([out, stage], rng.randint(0, 2))):
            folder.mkdir(parents=True)
        (victim / "train-000000.tar").write_text("precious")
        placed = []
        for _ in range(rng.randint(1, 3)):
            folder = rng.choice([root, *(folder for folder in (out, stage) if folder.is_dir())])
            names = [".out.partial", "out.rejected.jsonl", "other"] if folder == root else [*STAGED, "notes.txt"]
            path = folder / rng.choice(names)
            if os.path.lexists(path):
                continue
            make_special(path, rng.choice([*KINDS, "regular file"]), rng.choice([victim, victim / "train-000000.tar"]))
            placed.append(path)
        before = snapshot(root)
        try:
            pack_quietly(scenes[:2], out, force=rng.random() < 0.5)
            outcomes["packed"] += 1
        except UserError as error:
            outcomes["refused"] += 1
            assert "\n" not in str(error)
            assert {k: v for k, v in snapshot(root).items() if k in before} == before
        after = snapshot(root)
        for name, found in before.items():
            ours = name.startswith(("out/", ".out.partial")) and os.path.basename(name) in (*STAGED, ".out.partial")
            assert ours or name == "out.rejected.jsonl" or after.get(name) == found, (trial, name)
    assert min(outcomes.values()) > 0, outcomes


def fill(cache: ShardCache, content: bytes, digest: str) -> None:
    descriptor = cache.reserve(digest, len(content))
    assert descriptor is not None
    os.pwrite(descriptor, content, 0)
    cache.commit(digest, descriptor)


def test_the_cache_evicts_only_its_own_files(victim: Path, tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    directory.mkdir()
    foreign = {
        "photos.tar": "regular file",
        "half.part": "regular file",
        "mine.claims": "regular file",
        f"{'1' * 64}.tar": "symbolic link",
        f"{'2' * 64}.tar": "directory",
        f"{'3' * 64}.part": "symbolic link",
        f"{'4' * 64}.part": "named pipe",
        f"{'5' * 32}.claims": "symbolic link",
        f"{'6' * 32}.claims": "named pipe",
        f"{'7' * 32}.claims": "directory",
    }
    for name, kind in foreign.items():
        make_special(directory / name, kind, victim / "notes.txt")
    before = snapshot(tmp_path)
    with bounded():
        cache = ShardCache(directory, 100)
        fill(cache, b"a" * 100, "a" * 64)
        cache.close()
        cache = ShardCache(directory, 100)
        fill(cache, b"b" * 100, "b" * 64)  # evicts the other
        cache.trim()
        cache.close()
    after = snapshot(tmp_path)
    assert after.keys() - before.keys() == {f"cache/{'b' * 64}.tar", "cache/lock"}
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("kind", ["symbolic link", "broken link", "named pipe", "socket", "directory"])
def test_a_lock_of_the_cache_that_is_something_else_is_refused(kind: str, victim: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    lock = tmp_path / "cache" / "lock"
    make_special(lock, kind, victim / "notes.txt")
    before = snapshot(tmp_path)
    expected = "symbolic link" if kind == "broken link" else kind
    message = rf"{re.escape(str(lock))}: cannot be used as shard cache \(got a {expected}, expected a regular file\)"
    with bounded(30, *[lock] * (kind == "named pipe")), pytest.raises(UserError, match=message):
        ShardCache(tmp_path / "cache", 100)
    assert snapshot(tmp_path) == before


def test_links_in_place_of_cached_shards_are_removed_and_not_followed(victim: Path, tmp_path: Path) -> None:
    directory, digest = tmp_path / "cache", "a" * 64
    cache = ShardCache(directory, 1000)
    target = victim / "notes.txt"
    os.utime(target, ns=(0, verified_time(digest)))  # even if the link's target looks verified
    before = target.stat()
    for suffix in ("tar", "part"):
        (directory / f"{digest}.{suffix}").symlink_to(target)
    assert cache.claim({digest: target.stat().st_size}) == {}
    fill(cache, b"x" * 10, digest)
    assert cache.claim({digest: 10}) == {digest: True}
    cache.close()
    after = target.stat()
    assert (before.st_mtime_ns, before.st_atime_ns) == (after.st_mtime_ns, after.st_atime_ns)
    assert target.read_text() == "precious notes.txt"


def test_the_cache_directory_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "disk")
    cache = ShardCache(tmp_path / "cache", 100)
    fill(cache, b"a", "a" * 64)
    cache.close()
    assert (tmp_path / "disk" / f"{'a' * 64}.tar").read_bytes() == b"a"


@pytest.mark.parametrize("kind", ["symbolic link", "regular file", "named pipe"])
def test_the_demo_clears_only_its_own_folders(kind: str, victim: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    prepare = partial(prepare_directory, out, "demo.json", ("scenes", "shards"), {"seed": 0})
    prepare()
    (out / "scenes").mkdir()
    make_special(out / "shards", kind, victim)
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=f"shards: got a {kind}, expected a directory of an earlier demo"):
        prepare()
    assert snapshot(tmp_path) == before
    (out / "shards").unlink()
    (out / "shards").mkdir()
    (out / "shards" / "linked").symlink_to(victim)
    prepare()
    assert sorted(os.listdir(out)) == ["demo.json"] and len(os.listdir(victim)) == 3
    (out / "demo.json").unlink()
    (out / "demo.json").symlink_to(victim / "notes.txt")
    with pytest.raises(UserError, match="not written by a demo"):
        prepare()
    assert (victim / "notes.txt").read_text() == "precious notes.txt"


@pytest.mark.parametrize("mode", ["rb", "wb", "ab", "xb"])
@pytest.mark.parametrize("kind", KINDS)
def test_files_of_a_directory_are_not_reached_through_links(mode: str, kind: str, victim: Path, tmp_path: Path) -> None:
    make_special(tmp_path / "name", kind, victim / "notes.txt")
    before = snapshot(tmp_path)
    expected = "symbolic link" if kind == "broken link" else kind
    with Directory(tmp_path) as directory, bounded(10, *[tmp_path / "name"] * (kind == "named pipe")):
        with pytest.raises(NotRegularError, match=f"got a {expected}, expected a regular file") as caught:
            directory.open("name", mode)
        assert caught.value.filename == str(tmp_path / "name") and snapshot(tmp_path) == before
        if kind != "directory":
            directory.unlink("name")
    assert snapshot(victim).keys() == {"journal.jsonl", "train-000000.tar", "notes.txt"}


def test_a_link_that_replaces_a_checked_file_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the check and `open`: O_NOFOLLOW and fstat decide."""
    path, pipe = tmp_path / "file", tmp_path / "pipe"
    path.write_text("regular")
    os.mkfifo(pipe)
    checked = os.stat(path)
    path.unlink()
    path.symlink_to(pipe)
    monkeypatch.setattr(os, "stat", lambda *_, **__: checked)
    with bounded(10, pipe), pytest.raises(OSError, match="symbolic link"):  # ELOOP
        open_regular(path, follow=False)
    with bounded(10, pipe), pytest.raises(NotRegularError, match="got a named pipe, expected a regular file"):
        open_regular(path)
