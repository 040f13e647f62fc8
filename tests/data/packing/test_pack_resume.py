"""Resuming `pack` after it was killed. Run as a script, this file is the parent of the killed processes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from campaign import trials
from interruptions import kill_at

from scenarioclip_fast.cli.main import main
from scenarioclip_fast.data import Relation, Scene, SceneObject, Vocabulary, generate_scenes, pack
from scenarioclip_fast.data.decode import TorchDecoder
from scenarioclip_fast.data.packing import options as pack_options
from scenarioclip_fast.data.synthetic import write_published_layout

# Number of random kills per kind of run; 20 takes minutes.
KILLS = trials(3, 20)
SHARD = 7


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())} if directory.exists() else {}


def pack_quietly(source: Any, out: Path, **options: Any) -> Any:
    return pack(source, out, progress=False, **{"shard_size": SHARD} | options)


@pytest.fixture(scope="module")
def synthetic() -> list[Scene]:
    return [replace(scene, split=None) for scene in generate_scenes(60, seed=2)]


@pytest.fixture(scope="module")
def published(synthetic: list[Scene], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some scenes are entirely or partly bad, so that rejections are compared as well."""
    directory = tmp_path_factory.mktemp("published") / "set"
    write_published_layout(synthetic, directory)
    images = sorted((directory / "images").iterdir())
    for path in images[::9]:
        path.write_bytes(path.read_bytes()[:500])
    for path in sorted((directory / "sam_results").iterdir())[4::9]:
        path.unlink()
    return directory


@pytest.fixture(scope="module")
def tars(synthetic: list[Scene], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tars")
    pack(synthetic, directory / "pack", shard_size=20, progress=False)
    (directory / "set").mkdir()
    for i, path in enumerate(sorted((directory / "pack").glob("*.tar"))):
        damaged = bytearray(path.read_bytes())
        damaged[3000:3100] = b"?" * 100
        (directory / "set" / f"{i}.tar").write_bytes(damaged)
    return directory / "set"


class Interrupted:
    """Counts decoded images and raises KeyboardInterrupt after `n` of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
        self.left, self.decoded = n, 0
        decode = TorchDecoder.decode

        def counted(decoder: TorchDecoder, images: Any) -> Any:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left, self.decoded = self.left - 1, self.decoded + 1
            return decode(decoder, images)

        monkeypatch.setattr(TorchDecoder, "decode", counted)


@pytest.mark.parametrize("kind", ["published", "tars"])
def test_resume_after_the_last_finished_shard(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    source, out = request.getfixturevalue(kind), tmp_path / "out"
    pack_quietly(source, tmp_path / "undisturbed")
    command = ["pack", str(source), "--out", str(out), "--shard-size", str(SHARD)]
    images = Interrupted(monkeypatch, 40)
    assert main(command) == 130
    message = re.search(
        r"(\d) finished shards are kept in \S*\.out\.partial: re-run the command", capsys.readouterr().err
    )
    assert message is not None and not out.exists()
    kept = int(message[1])
    assert kept >= 3 and len(list((tmp_path / ".out.partial").glob("*.tar"))) - kept in (0, 1)
    images.left, images.decoded = 1000, 0
    assert main(command) == 0
    assert f"resuming after {kept} finished shards" in capsys.readouterr().err
    assert images.decoded <= 60 - (kept - 1) * SHARD, "finished shards are not read again"
    assert contents(out) == contents(tmp_path / "undisturbed")
    assert not (tmp_path / ".out.partial").exists()


def interrupted(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, n: int = 40) -> Path:
    with monkeypatch.context() as patch:
        Interrupted(patch, n)
        with pytest.raises(KeyboardInterrupt):
            pack_quietly(source, out)
    return out.parent / f".{out.name}.partial"


def test_a_changed_source_or_option_packs_from_the_start(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    source, out = tmp_path / "set", tmp_path / "out"
    shutil.copytree(published, source)
    stage = interrupted(source, out, monkeypatch)
    mended = sorted((source / "images").iterdir())[0]
    mended.write_bytes(sorted((source / "images").iterdir())[1].read_bytes())
    assert len(list(stage.glob("*.tar"))) >= 3
    pack(source, out, shard_size=SHARD)
    assert "(no finished shard, or another source or options): packing from the start" in capsys.readouterr().err
    pack_quietly(source, tmp_path / "undisturbed")
    assert contents(out) == contents(tmp_path / "undisturbed")
    for options in ({"shard_size": 5}, {"val": 0.4}, {"split": "hash"}, {"max_pixels": 1 << 20}):
        shutil.rmtree(out)
        interrupted(source, out, monkeypatch)
        pack(source, out, **{"shard_size": SHARD} | options)
        assert "packing from the start" in capsys.readouterr().err
        pack_quietly(source, tmp_path / str(options), **options)
        assert contents(out) == contents(tmp_path / str(options))


def _tear_last_line(stage: Path) -> None:
    journal = stage / "journal.jsonl"
    os.truncate(journal, journal.stat().st_size - 30)


def _append_zeros(stage: Path) -> None:
    journal = stage / "journal.jsonl"
    journal.write_bytes(journal.read_bytes() + bytes(4096))


def _truncate_shard(stage: Path) -> None:
    os.truncate(sorted(stage.glob("train-*.tar"))[1], 1024)


# Damage, and the usable shards: their number, or if <= 0, relative to the existing ones; None: no resume.
DAMAGED_STAGES: dict[str, tuple[Callable[[Path], Any], int | None]] = {
    "torn line": (_tear_last_line, -1),
    "trailing zeros": (_append_zeros, 0),
    "missing shard": (lambda stage: sorted(stage.glob("train-*.tar"))[2].unlink(), 2),
    "truncated shard": (_truncate_shard, 1),
    "missing journal": (lambda stage: (stage / "journal.jsonl").unlink(), None),
    "malformed journal": (lambda stage: (stage / "journal.jsonl").write_bytes(b"[]\n\n"), None),
    "foreign file": (lambda stage: (stage / "index.json").write_bytes(b"{"), 0),
}


@pytest.mark.parametrize("case", DAMAGED_STAGES)
def test_the_journal_is_verified(
    case: str, tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    damage, kept = DAMAGED_STAGES[case]
    stage = interrupted(tars, tmp_path / "out", monkeypatch)
    if kept is not None and kept <= 0:
        kept += len((stage / "journal.jsonl").read_bytes().splitlines()) - 1
    damage(stage)
    pack(tars, tmp_path / "out", shard_size=SHARD)
    message = capsys.readouterr().err
    assert kept is None or f"resuming after {kept} finished shards" in message
    assert kept is not None or "resuming" not in message
    pack_quietly(tars, tmp_path / "undisturbed")
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("kind", ["published", "tars"])
def test_an_up_to_date_pack_is_unchanged(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    source, out = tmp_path / "set", tmp_path / "out"
    shutil.copytree(request.getfixturevalue(kind), source)
    command = ["pack", str(source), "--out", str(out)]
    images = Interrupted(monkeypatch, 1000)
    assert main(command) == 0
    first, before = images.decoded, contents(out)
    table = capsys.readouterr().out
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "up to date" in printed.err and printed.out == table and images.decoded == first
    assert pack_quietly(source, out, shard_size=1000).up_to_date and not (tmp_path / ".out.partial").exists()
    assert main([*command, "--force"]) == 0
    assert images.decoded == 2 * first and contents(out) == before, "packing again gives the same bytes"
    for damage in (
        lambda: os.truncate(out / "train-000000.tar", 512),
        lambda: (out / "index.bin").write_text("{}"),
        lambda: (out / "source.json").unlink(),
        lambda: os.utime(next(path for path in sorted(source.rglob("*.[jt][pa][gr]"))), (1, 1)),
    ):
        damage()
        assert not pack_quietly(source, out, shard_size=1000).up_to_date
        assert contents(out).keys() == before.keys()
        assert all(data == before[name] for name, data in contents(out).items() if name != "source.json")


@pytest.mark.parametrize("kind", ["published", "tars"])
def test_a_pack_of_another_version_is_rebuilt(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = request.getfixturevalue(kind), tmp_path / "out"
    pack_quietly(source, out)
    assert pack_quietly(source, out).up_to_date
    monkeypatch.setattr(pack_options, "_PACK_VERSION", pack_options._PACK_VERSION + 1)
    assert not pack_quietly(source, out).up_to_date


def test_output_of_the_pack_version(tmp_path: Path) -> None:
    """If this fails, the output of `pack` has changed: increment `options._PACK_VERSION` and update the digest."""
    box = torch.zeros(24, 40, dtype=torch.bool)
    box[3:9, 5:30] = True
    objects = [SceneObject("Dining  Table", (5.0, 3.0, 30.25, 9.0), box), SceneObject("cat", (-0.5, 2, 39, 7), ~box)]
    # of the same name: resolved by position when the published layout is read
    objects.append(SceneObject("cat", (1.5, 1.0, 4.0, 20.0), box.flip(1)))
    scenes = [
        Scene(key, torch.full((24, 40, 3), 90, dtype=torch.uint8), " Sit\u00adting Down", objects, relations)
        for key, relations in (
            ("a", [Relation(1, "ON", 0)]),
            ("b", []),
            ("c.d", [Relation(0, "under", 1), Relation(2, "beside", 1)]),
        )
    ]
    digest = hashlib.sha256()
    write_published_layout(scenes, tmp_path / "set")
    (tmp_path / "set/images/a.jpg").write_bytes(b"")
    pack_quietly(tmp_path / "set", tmp_path / "published", split="hash", shard_size=1)
    pack_quietly(tmp_path / "published", tmp_path / "tars", split="hash", val=0.5, test=0.5)
    for out in (tmp_path / "published", tmp_path / "tars"):
        for path in sorted(out.glob("*.tar")):
            digest.update(path.name.encode())
            with tarfile.open(path) as tar:
                for member in tar:
                    digest.update(member.name.encode())
                    if member.name.endswith(".json"):  # image bytes depend on the encoder version
                        digest.update(cast(Any, tar.extractfile(member)).read())
        Vocabulary.load(out / "vocabulary.bin").save(out / "vocabulary.json")
        digest.update((out / "vocabulary.json").read_bytes())
        digest.update((out / "views.bin").read_bytes())
        rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
        digest.update(repr([(r["entry"], r["reason"]) for r in rejected]).encode())
    assert (pack_options._PACK_VERSION, digest.hexdigest()[:16]) == (3, "c6468fd95d65f0d1")


def test_scenes_in_memory_are_packed_from_the_start(
    synthetic: list[Scene], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        Interrupted(patch, 40)
        with pytest.raises(KeyboardInterrupt):
            pack_quietly(synthetic, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [], "no files remain, since the run cannot be resumed"
    pack_quietly(synthetic, tmp_path / "out")
    assert not pack_quietly(synthetic, tmp_path / "out").up_to_date


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Make writing more than `size` bytes to a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("room", [20_000, 130_000])
def test_full_disk(room: int, tars: Path, tmp_path: Path, capsys: Any) -> None:
    pack_quietly(tars, tmp_path / "undisturbed")
    largest = max(path.stat().st_size for path in (tmp_path / "undisturbed").iterdir())
    assert largest > room
    command = ["pack", str(tars), "--out", str(tmp_path / "out"), "--shard-size", str(SHARD)]
    with file_size_limit(room):
        assert main(command) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ") and "File too large" in lines[-1] and ".out.partial" in lines[-1]
    assert not (tmp_path / "out").exists()
    assert main(command) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def _other_mount(monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
    """Simulate that `out` is a mount point, into which nothing can be moved."""

    def across(move: Any) -> Any:
        def moved(old: Any, new: Any, **directories: int) -> None:
            if (out in Path(old).parents) != (out in Path(new).parents):
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(old))
            move(old, new, **directories)

        return moved

    monkeypatch.setattr(os, "rename", across(os.rename))
    monkeypatch.setattr(os, "replace", across(os.replace))


def _parent_not_writable(monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
    """Simulate an unwritable parent directory, also for root."""
    access, mkdir = os.access, os.mkdir

    def refused(path: Any, *args: Any, **kwargs: Any) -> None:
        if Path(path).parent == out.parent:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != out.parent and access(path, mode))
    monkeypatch.setattr(os, "mkdir", refused)


@pytest.mark.parametrize("closed", [_other_mount, _parent_not_writable])
def test_staging_inside_the_target_directory(
    closed: Callable[[pytest.MonkeyPatch, Path], None], tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack_quietly(tars, tmp_path / "undisturbed")
    out = tmp_path / "out"
    out.mkdir()
    closed(monkeypatch, out)
    with monkeypatch.context() as patch:
        images = Interrupted(patch, 40)
        with pytest.raises(KeyboardInterrupt):
            pack_quietly(tars, out)
        assert [path.name for path in out.iterdir()] == [".partial"]
        images.left, images.decoded = 1000, 0
        pack_quietly(tars, out)
        assert images.decoded < 40, "the run resumes"
    assert contents(out) == contents(tmp_path / "undisturbed")
    assert pack_quietly(tars, out).up_to_date and not (out / ".partial").exists()


def test_symlinked_target(tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk/pack")
    _other_mount(monkeypatch, tmp_path / "disk")
    pack_quietly(tars, tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "pack" / "manifest.json").exists()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_dir()) == ["disk", "out", "pack"]


def test_unwritable_targets_are_detected_first(
    tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "out").mkdir()
    images = Interrupted(monkeypatch, 0)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "out")
    assert main(["pack", str(tars), "--out", str(tmp_path / "out")]) == 2
    assert (
        capsys.readouterr().err == f"error: {tmp_path / 'out'}: not writable; choose another directory for the pack\n"
    )
    assert images.decoded == 0


def run_children(*arguments: object) -> dict[str, Any]:
    """Run this file as a script, which imports the package once and kills forked children while they pack."""
    command = [sys.executable, __file__, *map(str, arguments)]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # of the support modules
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800, env=paths)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


# Starting worker processes takes seconds, so by default one such run is killed once.
RUNS = [("published", 1, KILLS), ("tars", 1, KILLS), ("tars", 2, KILLS if KILLS > 3 else 1)]


@pytest.mark.parametrize(("kind", "workers", "kills"), [*RUNS, ("published", 2, KILLS)] if KILLS > 3 else RUNS)
def test_killed_at_random_moments(
    kind: str, workers: int, kills: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    result = run_children("random", request.getfixturevalue(kind), tmp_path, kills, workers)
    print(kind, workers, result)
    assert sum(result["killed"].values()) == kills and result["orphans"] == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed") != {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "undisturbed"], "no temporary files remain"


def test_killed_at_every_disk_operation(tars: Path, tmp_path: Path) -> None:
    steps = run_children("steps", tars, tmp_path, 1 if KILLS > 3 else 5)["steps"]
    assert steps >= 49, "shards, journal, other files, moving, cleanup"


def _forked(source: str, out: Path, **options: Any) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            pack_quietly(source, out, **options)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return pid


def _wait_for_exit(pid: int) -> bool:
    """Wait for a child; returns whether it was killed."""
    status = os.waitpid(pid, 0)[1]
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0, "packing failed"
    return os.WIFSIGNALED(status)


def _phase(out: Path) -> str:
    stage = out.parent / f".{out.name}.partial"
    if (out / "source.json").exists() or (stage / "manifest.json").exists():
        return "moving"
    return "packing" if _tars(stage) else "starting"


def _tars(stage: Path) -> int:
    try:
        return sum(name.endswith(".tar") for name in os.listdir(stage))
    except FileNotFoundError:  # not created yet, or just removed
        return 0


def _wait_for_a_shard(pid: int, out: Path) -> None:
    """Wait until a new shard is being written or the process has exited."""
    stage = out.parent / f".{out.name}.partial"
    before = _tars(stage)
    while _tars(stage) <= before and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.001)


def _random_kills(source: str, directory: Path, kills: int, workers: int) -> dict[str, Any]:
    undisturbed, out = directory / "undisturbed", directory / "out"
    start = time.monotonic()
    pid = _forked(source, undisturbed, workers=workers)
    _wait_for_a_shard(pid, undisturbed)
    first_shard = time.monotonic()
    assert not _wait_for_exit(pid)
    starting, writing = first_shard - start, time.monotonic() - first_shard
    killed: Counter[str] = Counter()
    orphans: set[int] = set()
    rng = random.Random(kills + workers)
    while killed.total() < kills:
        pid = _forked(source, out, workers=workers)
        if rng.random() < 0.2:
            time.sleep(rng.uniform(0, starting))
        else:
            _wait_for_a_shard(pid, out)
            time.sleep(rng.uniform(0, writing))
        with suppress(FileNotFoundError):
            orphans |= {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
        os.kill(pid, signal.SIGKILL)
        if _wait_for_exit(pid):
            killed[_phase(out)] += 1
        else:
            assert contents(out) == contents(undisturbed)
            shutil.rmtree(out)
    assert not _wait_for_exit(_forked(source, out, workers=workers))
    limit = time.monotonic() + 60
    while time.monotonic() < limit and (orphans := {pid for pid in orphans if Path(f"/proc/{pid}").exists()}):
        time.sleep(0.1)
    return {"killed": dict(killed), "orphans": len(orphans)}


def _kill_at_every_step(source: str, directory: Path, stride: int) -> dict[str, Any]:
    old, new, out = directory / "old", directory / "new", directory / "out"
    pack_quietly(source, old, shard_size=4)
    pack_quietly(source, new, shard_size=20)
    complete = [contents(old), contents(new)]
    n = 1
    while True:
        shutil.copytree(old, out)
        pid = os.fork()
        if pid == 0:
            kill_at(n)
            pack_quietly(source, out, shard_size=20)
            os._exit(0)
        killed = _wait_for_exit(pid)
        assert not (out / "manifest.json").exists() or contents(out) in complete, f"step {n}: incomplete pack"
        assert not _wait_for_exit(_forked(source, out, shard_size=20))
        assert contents(out) == complete[1], f"step {n}"
        assert sorted(path.name for path in directory.iterdir()) == ["new", "old", "out"], f"step {n}"
        shutil.rmtree(out)
        if not killed:
            return {"steps": n}
        n += stride


if __name__ == "__main__":
    mode, source_, directory_, *numbers = sys.argv[1:]
    job = {"random": _random_kills, "steps": _kill_at_every_step}[mode]
    print(json.dumps(job(source_, Path(directory_), *map(int, numbers))))
