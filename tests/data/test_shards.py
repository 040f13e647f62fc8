from __future__ import annotations

import json
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from packs import downgrade_index, read_rows

from scenarioclip_fast.data import BadSample, Scene, ShardSet, generate_scenes, open_files, pack
from scenarioclip_fast.data.rle import decode
from scenarioclip_fast.errors import UserError


@pytest.fixture(scope="module")
def synthetic() -> dict[str, Scene]:
    return {scene.key: scene for scene in generate_scenes(30, seed=7)}


@pytest.fixture
def packed(synthetic: dict[str, Scene], tmp_path: Path) -> Path:
    pack(list(synthetic.values()), tmp_path / "pack", shard_size=10, progress=False)
    return tmp_path / "pack"


def test_round_trip(packed: Path, synthetic: dict[str, Scene]) -> None:
    keys = []
    for split in ("train", "val", "test"):
        shards = ShardSet(packed, split)
        assert len(shards) == len(shards.keys) == shards.manifest["splits"][split]["scenes"]
        keys += shards.keys
        for i, key in enumerate(shards.keys):
            scene, original = shards.read(i), synthetic[key]
            assert (scene.key, scene.split, scene.action) == (key, original.split, original.action)
            assert scene.split == split and scene.relations == original.relations
            assert [(o.name, o.box) for o in scene.objects] == [(o.name, o.box) for o in original.objects]
            for item, other in zip(scene.objects, original.objects, strict=True):
                assert torch.equal(decode(item.mask), other.mask)  # type: ignore[arg-type]
    assert sorted(keys) == sorted(synthetic)


def test_offsets_match_the_tar(packed: Path) -> None:
    shards = ShardSet(packed)
    name = shards.manifest["splits"]["train"]["shards"][0]["name"]
    with tarfile.open(packed / name) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    for i, key in enumerate(shards.keys[:10]):
        assert shards.read(i).image == members[f"{key}.jpg"]


def test_threads_and_pickled_copies_can_read(packed: Path) -> None:
    shards = ShardSet(packed)
    expected = [shards.read(i).image for i in range(len(shards))]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: shards.read(i).image, range(len(shards)))) == expected
    copy = pickle.loads(pickle.dumps(shards))
    shards.close()
    assert [copy.read(i).image for i in range(len(copy))] == expected
    assert shards.read(0).image == expected[0], "a closed set opens its files again"
    assert copy.vocabulary == shards.vocabulary


def test_the_number_of_open_files_is_bounded(
    synthetic: dict[str, Scene], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_files, "_MOST", 3)
    monkeypatch.setattr(open_files.OPEN_FILES, "most", 3)
    pack(list(synthetic.values()), tmp_path / "many", shard_size=2, val=0, test=0, progress=False)
    shards = ShardSet(tmp_path / "many")

    def open_now() -> int:
        links = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
        return sum(link.startswith(str(tmp_path / "many")) and link.endswith(".tar") for link in links)

    expected = [shards.read(i).image for i in range(len(shards))]
    assert open_now() == 3
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: shards.read(i % len(shards)).image, range(10 * len(shards)))) == expected * 10
    assert open_now() == 3
    shards.close()
    assert open_now() == 0


def test_truncated_shard(packed: Path) -> None:
    shards = ShardSet(packed)
    path = packed / "train-000000.tar"
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(BadSample) as error:
        shards.read(9)
    assert (error.value.key, error.value.reason) == (shards.keys[9], "short_shard")
    assert shards.read(10).key == shards.keys[10], "other shards are still readable"


def test_missing_shard(packed: Path) -> None:
    (packed / "train-000000.tar").unlink()
    with pytest.raises(BadSample, match=r"unreadable_shard: train-000000\.tar: No such file"):
        ShardSet(packed).read(0)


def test_damaged_record(packed: Path) -> None:
    shards = ShardSet(packed)
    index = read_rows(packed)["train-000000.tar"]
    path = packed / "train-000000.tar"
    content = bytearray(path.read_bytes())
    content[index[3][3] : index[3][3] + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    with pytest.raises(BadSample) as error:
        shards.read(3)
    assert error.value.reason == "bad_json"
    assert pickle.loads(pickle.dumps(error.value)).detail == error.value.detail


def test_unusable_directories(packed: Path, tmp_path: Path) -> None:
    for directory, split, message in (
        (tmp_path / "none", "train", "no such directory"),
        (tmp_path, "train", "manifest.json: no such file"),
        (packed, "valid", "split: got 'valid', expected one of train, val, test"),
    ):
        with pytest.raises(UserError, match=message):
            ShardSet(directory, split)


def manifest_of(name: str, sha256: str = "0" * 64, size: int = 2048) -> str:
    shard = {"name": name, "sha256": sha256, "bytes": size}
    return json.dumps({"schema": 1, "splits": {"train": {"shards": [shard]}}})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("manifest.json", "{", "manifest.json: not readable"),
        ("manifest.json", '{"schema": 3}', "got schema 3, expected 1 or 2"),
        ("manifest.json", '{"schema": 1}', "malformed index"),
        ("index.json", '{"schema": 1, "shards": {}}', "malformed index"),
        ("index.json", '{"schema": 1, "shards": 3}', "malformed index"),
        ("index.json", "[]", "index.json: got schema 'list', expected 1 or 2"),
        ("manifest.json", manifest_of("../x.tar"), "escapes the directory"),
        ("manifest.json", manifest_of("x.tar", sha256="../x"), "x.tar has no valid SHA-256"),
        ("manifest.json", manifest_of("x.tar", size=2047), "damaged index: a extends past the end of its shard"),
    ],
)
def test_malformed_files(packed: Path, name: str, content: str, message: str) -> None:
    downgrade_index(packed)
    (packed / name).write_text(content)
    if "x.tar" in content:
        shards = {"x.tar": [["a", 512, 500, 1536, 512]], "../x.tar": []}
        (packed / "index.json").write_text(json.dumps({"schema": 1, "shards": shards}))
    with pytest.raises(UserError, match=message):
        ShardSet(packed)
