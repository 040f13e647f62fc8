"""Loaders of several ranks with data sets that know the views of their scenes."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scenarioclip_fast.data import Batch, Relation, Scene, SceneLoader, SceneObject, ShardSet, pack, scene_loader
from scenarioclip_fast.errors import UserError

SCENES, RANKS, BATCH = 60, 3, 5


def make_scenes(n: int, prefix: str = "s") -> list[Scene]:
    """Scenes with 0 to 8 objects, and a relation of each with the next one. Of each 32, two are in val and test."""
    scenes = []
    for i in range(n):
        pixels = torch.randint(0, 255, (32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        objects = [SceneObject("box", (k, k, k + 9.0, k + 12.0)) for k in range(7 * i % 9)]
        relations = [Relation(k, "near", k + 1) for k in range(len(objects) - 1)]
        split = "train" if i % 32 < 30 else ("val", "test")[i % 2]
        scenes.append(Scene(f"{prefix}{i:04d}", pixels, "resting", objects, relations, split=split))
    return scenes


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("balance") / "pack"
    pack(make_scenes(SCENES + 4), folder, shard_size=16, progress=False)
    return folder


def copied(packed: Path, to: Path) -> Path:
    to.mkdir()
    for path in packed.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def without_views(packed: Path, to: Path) -> Path:
    """The data set as an earlier version packed it."""
    manifest = json.loads((copied(packed, to) / "manifest.json").read_text())
    del manifest["sha256"]["views.bin"]
    (to / "manifest.json").write_text(json.dumps(manifest))
    (to / "views.bin").unlink()
    return to


def load(source: Any, rank: int = 0, ranks: int = RANKS, batch: int = BATCH, **options: Any) -> SceneLoader:
    options = {"augment": False, "relation_view": "box", "epochs": 10, "threads": 2, "seed": 4, **options}
    return scene_loader(source, batch, size=16, rank=rank, world_size=ranks, **options)


def batches(source: Any, n: int, state: Any = None, **options: Any) -> list[list[Batch]]:
    """The first batches of each rank."""
    found = []
    for rank in range(options.get("ranks", RANKS)):
        with load(source, rank, **options) as loader:
            if state is not None:
                loader.load_state_dict(state)
            found.append([*islice(loader, n)])
    return found


def keys(found: Sequence[Sequence[Batch]]) -> list[set[str]]:
    """The keys of each global batch."""
    return [{key for batch in step for key in batch.keys} for step in zip(*found, strict=True)]


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_packs_know_the_views_of_their_scenes(packed: Path, split: str) -> None:
    shards = ShardSet(packed, split)
    scenes = [shards.read(i) for i in range(len(shards))]
    assert shards.views is not None and shards.views.dtype == np.uint8
    assert shards.views.tolist() == [len(scene.objects) + len(scene.relations) for scene in scenes]
    again = pickle.loads(pickle.dumps(shards))
    assert "views" not in vars(again) and np.array_equal(again.views, shards.views)


def test_ranks_get_about_the_same_number_of_views(packed: Path) -> None:
    balanced, plain = (batches(packed, 4, balance=balance) for balance in (True, False))
    assert keys(balanced) == keys(plain)

    def spreads(found: list[list[Batch]]) -> list[int]:
        """The difference between the most and the fewest views of a rank, for each global batch."""
        views = np.array([[len(batch.pixels) for batch in of_rank] for of_rank in found])
        return list(views.max(0) - views.min(0))

    assert max(spreads(balanced)) <= 5 and sum(spreads(balanced)) < sum(spreads(plain)) / 3


def test_evaluations_read_every_third_scene(packed: Path) -> None:
    found = batches(packed, 4, shuffle=False, epochs=1, drop_last=False)
    order = ShardSet(packed).keys
    for rank in range(RANKS):
        assert [key for batch in found[rank] for key in batch.keys] == order[rank::RANKS]


def test_a_mix_is_balanced_too(packed: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    pack(make_scenes(20, "t"), other, progress=False)
    mix = [{"path": str(packed), "weight": 0.5}, str(other)]
    balanced, plain = (batches(mix, 3, balance=balance) for balance in (True, False))
    assert keys(balanced) == keys(plain)
    with load(mix) as loader:
        assert loader.order.views is not None and len(loader.order.views) == SCENES + 20
    with load([*mix, str(without_views(packed, tmp_path / "old"))]) as loader:
        assert loader.order.views is None


def test_resumed_runs_continue(packed: Path) -> None:
    """On the same ranks with the same batches, on others with the same global order."""
    expected = batches(packed, 8)
    states = []
    for rank in range(RANKS):
        with load(packed, rank) as loader:
            next(it := iter(loader))
            next(it)
            states.append(json.loads(json.dumps(loader.state_dict())))
    assert states[0]["balance"] is True
    for rank, state in enumerate(states):
        with load(packed, rank) as loader:
            loader.load_state_dict(state)
            for found, batch in zip(islice(loader, 6), expected[rank][2:], strict=True):
                assert found.keys == batch.keys
    assert keys(batches(packed, 6, states[0], ranks=1, batch=RANKS * BATCH)) == keys(expected)[2:]
    assert keys(batches(packed, 6, states[0], ranks=5, batch=RANKS)) == keys(expected)[2:]


def test_a_run_of_an_earlier_version_continues_as_it_was(packed: Path) -> None:
    expected = batches(packed, 3, balance=False)
    with load(packed, 0, balance=False) as loader:
        next(iter(loader))
        state = {name: value for name, value in loader.state_dict().items() if name != "balance"}
    for rank in range(RANKS):
        with load(packed, rank) as loader:
            own = {**state, "rank": rank}
            loader.load_state_dict(own)
            assert [batch.keys for batch in islice(loader, 2)] == [batch.keys for batch in expected[rank][1:]]
            assert loader.state_dict()["balance"] is False
            assert any("data.balance=true has no effect" in note for note in loader.notes())


def test_packs_of_earlier_versions_are_read(packed: Path, tmp_path: Path) -> None:
    old = without_views(packed, tmp_path / "old")
    assert ShardSet(old).views is None
    with load(old) as loader:
        assert any("data.balance=true has no effect: a data set was packed by" in note for note in loader.notes())
    assert keys(batches(old, 4)) == keys(batches(packed, 4))
    for options in ({"balance": False}, {"ranks": 1}):
        with load(old, **options) as loader:
            assert not any("balance" in note for note in loader.notes())


def test_damaged_views_are_named(packed: Path, tmp_path: Path) -> None:
    damaged = copied(packed, tmp_path / "damaged")
    content = (packed / "views.bin").read_bytes()
    for data, message in (
        (content[:-1], rf"views\.bin: damaged \(got {len(content) - 1} bytes, expected {len(content)}\); copy the"),
        (bytes([content[0] ^ 1]) + content[1:], r"views\.bin: damaged \(the checksum differs\); copy the data set"),
        (None, r"views\.bin: no such file; expected the output of"),
    ):
        (damaged / "views.bin").unlink()
        if data is not None:
            (damaged / "views.bin").write_bytes(data)
        with pytest.raises(UserError, match=message):
            load(damaged)
        if data is None:
            (damaged / "views.bin").write_bytes(content)
    (damaged / "views.bin").write_bytes(b"")
    for options in ({"balance": False}, {"ranks": 1}):  # which do not need them
        load(damaged, **options).close()


def test_remote_views(packed: Path, tmp_path: Path) -> None:
    pytest.importorskip("fsspec", reason="fsspec is not installed")
    remote = ShardSet(f"file://{packed}", shard_cache_dir=tmp_path)
    assert np.array_equal(remote.views, ShardSet(packed).views)
    damaged = copied(packed, tmp_path / "damaged")
    (damaged / "views.bin").write_bytes(bytes((packed / "views.bin").stat().st_size))
    with pytest.raises(UserError, match=r"views\.bin: "):
        _ = ShardSet(f"file://{damaged}", shard_cache_dir=tmp_path).views


@pytest.mark.parametrize("change", [{"batch": 3}, {"balance": False}])
def test_no_scene_is_lost_when_shares_change(packed: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    """The scenes that have replaced bad ones are others in the new share."""
    damaged, shards = copied(packed, tmp_path / "damaged"), ShardSet(packed)
    bad = {f"s{i:04d}" for i in (3, 10, 11, 25, 40, 41)}
    for key in bad:
        image = shards.read(shards.find(key) or 0).image
        assert isinstance(image, bytes)
        for path in damaged.glob("train-*.tar"):
            path.write_bytes(path.read_bytes().replace(image, bytes(len(image))))
    for steps in (1, 2):
        seen, states = set[str](), []
        for rank in range(RANKS):
            options: dict[str, Any] = {"epochs": 1, "drop_last": False, "max_bad_fraction": 0.5}
            with load(damaged, rank, **options) as loader:
                seen |= {key for batch in islice(loader, steps) for key in batch.keys}
                states.append(loader.state_dict())
            with load(damaged, rank, **options, **change) as loader:
                loader.load_state_dict(states[-1])
                seen |= {key for batch in loader for key in batch.keys}
        assert any(state["ahead"] for state in states)
        assert seen == set(shards.keys) - bad
