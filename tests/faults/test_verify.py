"""`data.verify`: damaged shards on a local disk."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from campaign import generator, trials

from scenarioclip_fast.cli.main import main
from scenarioclip_fast.data import LoaderConfig, ShardSet, ShardSource, generate_scenes, pack, scene_loader
from scenarioclip_fast.data.open_files import File
from scenarioclip_fast.data.shards import BadSample
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.eval.loading import EvaluationLoader
from scenarioclip_fast.train.config import TrainConfig

SCENES, SHARD = 40, 5


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("verify") / "pack"
    pack(generate_scenes(SCENES, seed=5, val=0, test=0), directory, shard_size=SHARD, progress=False)
    return directory


@pytest.fixture
def damaged(packed: Path, tmp_path: Path) -> Path:
    """A copy in which one bit of the second shard is flipped, in the padding after its last member."""
    copy = shutil.copytree(packed, tmp_path / "damaged")
    shard = copy / "train-000001.tar"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    return copy


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each file, by its inode, is hashed."""
    counts: Counter[int] = Counter()
    sha256 = File.sha256

    def counted(file: Any) -> str:
        counts[file.status().st_ino] += 1
        time.sleep(0.02)  # for other threads to arrive
        return sha256(file)

    monkeypatch.setattr(File, "sha256", counted)
    return counts


def inodes(folder: Path) -> dict[int, int]:
    return {path.stat().st_ino: 1 for path in folder.glob("*.tar")}


def lost(folder: Path, shard: int = 1) -> list[str]:
    return ShardSet(folder).keys[shard * SHARD : (shard + 1) * SHARD]


def test_the_scenes_of_a_damaged_shard_are_bad_samples(packed: Path, damaged: Path) -> None:
    assert len([ShardSet(damaged).read(i) for i in range(SCENES)]) == SCENES, "undetected without data.verify"
    with closing(ShardSet(damaged, verify=True)) as shards:
        for i in range(SCENES):
            if shards.keys[i] not in lost(packed):
                assert shards.read(i).key == shards.keys[i]
                continue
            with pytest.raises(BadSample) as caught:
                shards.read(i)
            advice = "copy the shard again, or pack the data set again"
            detail = f"damaged_shard: train-000001.tar: its checksum differs from the manifest's; {advice}"
            assert str(caught.value) == f"{shards.keys[i]}: {detail}"
    with closing(ShardSet(packed, verify=True)) as shards:
        assert all(shards.read(i) for i in range(SCENES))


def test_every_change_is_found(packed: Path, tmp_path: Path) -> None:
    rng = generator("verify")
    for trial in range(trials(20, 400)):
        copy = shutil.copytree(packed, tmp_path / str(trial))
        shard = rng.randrange(SCENES // SHARD)
        path = copy / f"train-{shard:06d}.tar"
        data = bytearray(path.read_bytes())
        at = rng.randrange(len(data))
        how = rng.choice(["flip", "cut", "insert", "zeros", "other shard"])
        if how == "flip":
            data[at] ^= 1 << rng.randrange(8)
        elif how == "cut":
            del data[at:]
        elif how == "insert":
            data[at:at] = b"?"
        elif how == "zeros":
            end = min(len(data), at + 4096)
            zeros = bytes(end - at)
            data[at:end] = zeros if data[at:end] != zeros else b"\1" * len(zeros)
        else:
            data = bytearray((copy / f"train-{(shard + 1) % (SCENES // SHARD):06d}.tar").read_bytes())
        path.write_bytes(data)
        with closing(ShardSet(copy, verify=True)) as shards:
            for i in range(0, SCENES, SHARD):
                if i // SHARD == shard:
                    with pytest.raises(BadSample, match="damaged_shard"):
                        shards.read(i + rng.randrange(SHARD))
                else:
                    assert shards.read(i + rng.randrange(SHARD)).image is not None
        shutil.rmtree(copy)


def test_a_shard_is_hashed_once_per_process(packed: Path, hashed: Counter[int]) -> None:
    with closing(ShardSet(packed, verify=True)) as shards, ThreadPoolExecutor(8) as pool:
        assert not hashed, "not before the first read"
        shards.read(0)
        assert len(hashed) == 1
        start = threading.Barrier(8)

        def read(i: int) -> None:
            start.wait(20)
            for k in range(SCENES):
                shards.read((k + i) % SCENES)

        list(pool.map(read, range(8)))
        assert hashed == inodes(packed)
        shards.close()  # the next read opens the files again
        shards.read(0)
        assert hashed == inodes(packed)
        copy = pickle.loads(pickle.dumps(shards))  # for another process
        copy.read(0)
        assert hashed.total() == len(inodes(packed)) + 1
        copy.close()
    hashed.clear()
    with closing(ShardSet(packed)) as shards:
        assert all(shards.read(i) for i in range(SCENES)) and not hashed


def test_hashing_does_not_block_other_shards(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashing, done = threading.Event(), threading.Event()
    sha256, first = File.sha256, (packed / "train-000000.tar").stat().st_ino

    def slow(file: Any) -> str:
        if file.status().st_ino == first:
            hashing.set()
            assert done.wait(20)
        return sha256(file)

    monkeypatch.setattr(File, "sha256", slow)
    with closing(ShardSet(packed, verify=True)) as shards, ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(shards.read, i) for i in range(2)]
        assert hashing.wait(20)
        assert shards.read(SHARD).key == shards.keys[SHARD]
        assert not any(future.done() for future in waiting)
        done.set()
        assert [future.result(20).key for future in waiting] == shards.keys[:2]


def test_a_bad_block_is_no_damaged_shard(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading may succeed later, on a network file system, so the shard is not given up."""
    failures, pread = 1, os.pread

    def failing(descriptor: int, size: int, offset: int) -> bytes:
        nonlocal failures
        if failures:
            failures -= 1
            raise OSError(5, "Input/output error")
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", failing)
    with closing(ShardSet(packed, verify=True)) as shards:
        with pytest.raises(BadSample, match=r"unreadable_shard: train-000000.tar: Input/output error"):
            shards.read(0)
        assert shards.read(0).key == shards.keys[0]


@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_loaders_replace_the_scenes_of_damaged_shards(
    packed: Path, damaged: Path, tmp_path: Path, weight: float
) -> None:
    """In a mix, only those of the damaged set."""
    bad: list[BadSample] = []

    def on_bad(_: int, samples: Sequence[BadSample]) -> None:
        bad.extend(samples)

    options: dict[str, Any] = {"size": 16, "epochs": 1, "drop_last": False, "augment": False, "max_bad_fraction": 1.0}
    mix = [ShardSource(str(packed)), {"path": str(damaged), "weight": weight}]
    with scene_loader(mix, 8, verify=True, on_bad=on_bad, **options) as loader:
        keys = Counter(key for batch in loader for key in batch.keys)
    assert loader.bad == {"damaged_shard": SHARD * weight}
    assert Counter(sample.key for sample in bad) == dict.fromkeys(lost(packed), weight)
    assert {sample.source for sample in bad} == {str(damaged)}
    assert keys == {key: 1 + weight * (key not in lost(packed)) for key in ShardSet(packed).keys}
    with scene_loader(mix, 8, **options) as loader:
        assert sum(len(batch.keys) for batch in loader) == SCENES * (1 + weight) and not loader.bad


def test_a_run_ends_above_max_bad_fraction(damaged: Path) -> None:
    config = LoaderConfig(verify=True, augment=False, max_bad_fraction=0.1)
    message = (
        r"^\d of the \d+ scenes read in epoch 0 cannot be used, more than max_bad_fraction = 0.1; last: .*checksum"
    )
    with (
        scene_loader(damaged, 5, config, size=16, drop_last=False) as loader,
        pytest.raises(UserError, match=message),
    ):
        list(loader)


def test_evaluations_verify_like_the_run(damaged: Path, packed: Path) -> None:
    config = LoaderConfig(verify=True, max_bad_fraction=0.5)
    with EvaluationLoader(damaged, 8, config, split="train", size=16) as loader:
        keys = [key for batch in loader for key in batch.keys]
    assert sorted(keys) == sorted(set(ShardSet(packed).keys) - set(lost(packed)))
    assert {scene.reason for scene in loader.skipped} == {"damaged_shard"}


def test_it_is_a_key_of_the_configuration(packed: Path) -> None:
    assert not TrainConfig.of({}, [f"data.shards={packed}"]).data.verify
    assert TrainConfig.of({}, [f"data.shards={packed}", "data.verify=true"]).data.verify
    with pytest.raises(UserError, match="verify"):
        TrainConfig.of({}, [f"data.shards={packed}", "data.verify=perhaps"])


def test_inspect_counts_the_scenes_of_damaged_shards(damaged: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    command = ["inspect", str(damaged), "--out", str(tmp_path / "figures"), "--scenes", "1", "--size", "16"]
    assert main(command) == 0
    assert "unusable" not in capsys.readouterr().out
    assert main([*command, "--verify"]) == 1
    assert f"unusable   {SHARD} damaged_shard" in capsys.readouterr().out


def test_remote_shards_are_verified_by_the_cache(damaged: Path, tmp_path: Path) -> None:
    """A shard that is damaged in the store is not cached; its scenes are read one by one, and not verified."""
    pytest.importorskip("fsspec", reason="fsspec is not installed")
    with closing(ShardSet(damaged.as_uri(), shard_cache_dir=tmp_path / "cache", verify=True)) as shards:
        assert [shards.read(i).key for i in range(SCENES)] == shards.keys
        give_up = time.monotonic() + 20
        while len(cached := {path.stem for path in (tmp_path / "cache").glob("*.tar")}) < SCENES // SHARD - 1:
            assert time.monotonic() < give_up
            time.sleep(0.01)
    listed = json.loads((damaged / "manifest.json").read_text())["splits"]["train"]["shards"]
    assert cached == {shard["sha256"] for shard in listed} - {listed[1]["sha256"]}
