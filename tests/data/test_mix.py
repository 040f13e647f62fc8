"""Loading several packed data sets with weights."""

from __future__ import annotations

import io
import json
import pickle
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packs import read_rows
from PIL import Image

from scenarioclip_fast.data import (
    BadSample,
    Batch,
    Scene,
    SceneLoader,
    ShardMix,
    ShardSource,
    generate_scenes,
    pack,
    scene_loader,
)
from scenarioclip_fast.data.bad_samples import BadSampleLog
from scenarioclip_fast.data.scene import SceneObject
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.eval.loading import EvaluationLoader

SIZE = 16


def make_scene(key: str, action: str, name: str) -> Scene:
    out = io.BytesIO()
    pixels = np.random.default_rng(list(f"{action} {key}".encode())).integers(0, 255, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).resize((40, 32)).save(out, "JPEG")
    objects = [SceneObject(name, (2.0, 2.0, 30.0, 30.0), None)] if name else []
    return Scene(key, out.getvalue(), action, objects, [])


def packed(folder: Path, keys: Sequence[str], action: str, name: str, **splits: float) -> str:
    pack([make_scene(key, action, name) for key in keys], folder, progress=False, **{"val": 0.0, "test": 0.0, **splits})
    return str(folder)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> str:
    """12 scenes a00, a01, ... of the action "running"."""
    return packed(tmp_path_factory.mktemp("mix") / "first", [f"a{i:02d}" for i in range(12)], "running", "dog")


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> str:
    """8 scenes b00, b01, ... of the action "eating", which has the id that "running" has in the first set."""
    return packed(tmp_path_factory.mktemp("mix") / "second", [f"b{i:02d}" for i in range(8)], "eating", "dog")


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The keys of the first set, with other images."""
    return packed(tmp_path_factory.mktemp("mix") / "twin", [f"a{i:02d}" for i in range(12)], "jumping", "cat")


def load(shards: Any, batch_size: int = 4, **options: Any) -> SceneLoader:
    return scene_loader(shards, batch_size, **{"size": SIZE, "threads": 2, "seed": 5, **options})


def mix(*weighted: tuple[str, float]) -> list[ShardSource]:
    return [ShardSource(path, weight) for path, weight in weighted]


def assert_same(a: Batch, b: Batch) -> None:
    assert a.keys == b.keys
    assert all(torch.equal(x, y) for x, y in zip(a.tensors, b.tensors, strict=True))


def keys_of(batches: Iterator[Batch] | Sequence[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


def views_by_key(batches: Sequence[Batch]) -> dict[str, list[torch.Tensor]]:
    """The global views of each key, in their order."""
    found: dict[str, list[torch.Tensor]] = {}
    for batch in batches:
        for key, pixels in zip(batch.keys, batch.pixels, strict=False):
            found.setdefault(key, []).append(pixels)
    return found


def test_scenes_occur_as_often_as_the_weights_say(first: str, second: str) -> None:
    with load(mix((first, 2), (second, 0.5)), epochs=2) as loader:
        assert len(loader) == 7  # 24 + 4 scenes
        epochs = [keys_of(list(islice(loader, 7))) for _ in range(2)]
    for keys in epochs:
        counts = Counter(keys)
        assert {key: n for key, n in counts.items() if key.startswith("a")} == {f"a{i:02d}": 2 for i in range(12)}
        assert sum(key.startswith("b") for key in counts) == 4
    assert {key for keys in epochs for key in keys if key.startswith("b")} == {f"b{i:02d}" for i in range(8)}
    assert epochs[0] != epochs[1]


def test_all_forms_of_the_argument_load_the_same_batches(first: str, second: str) -> None:
    forms = [[first, {"path": Path(second)}], (ShardSource(first), second), [{"path": first, "weight": 1.0}, second]]
    loaded = []
    for form in forms:
        with load(form, epochs=1) as loader:
            loaded.append(list(loader))
    for batches in loaded[1:]:
        for x, y in zip(loaded[0], batches, strict=True):
            assert_same(x, y)
    with load(first, epochs=1) as loader, load([first], epochs=1) as listed:
        assert loader.state_dict() == listed.state_dict()
        assert loader.state_dict().keys() == {
            *("epoch", "position", "ahead"),
            *("rank", "world_size", "seed", "scenes", "keys", "shuffle", "balance", "balanced_batch_size"),
        }
        for x, y in zip(loader, listed, strict=True):
            assert_same(x, y)


def test_ids_are_those_of_the_merged_vocabulary(first: str, second: str, twin: str) -> None:
    with load(mix((first, 2), (second, 0.5), (twin, 1)), epochs=1, augment=False) as loader:
        vocabulary = loader.vocabulary
        assert vocabulary.actions == ["eating", "jumping", "running"] and vocabulary.objects == ["cat", "dog"]
        assert vocabulary.train_counts("global") == [4, 12, 24] and vocabulary.train_counts("object") == [12, 28]
        actions = Counter(vocabulary.actions[i] for batch in loader for i in batch.action_id)
    assert actions == {"eating": 4, "jumping": 12, "running": 24}


def test_occurrences_of_a_scene_differ_and_the_first_is_as_without_weight(first: str, twin: str) -> None:
    with load(first, epochs=1, batch_size=12) as loader:
        alone = {key: views[0] for key, views in views_by_key(list(loader)).items()}
    with load([ShardSource(first, 3)], epochs=1, batch_size=12, cache_gib=1.0) as loader:
        repeated = views_by_key(list(loader))
    for key, views in repeated.items():
        assert len(views) == 3
        assert sum(torch.equal(view, alone[key]) for view in views) == 1
        assert len({view.numpy().tobytes() for view in views}) == 3
    # Also if the scene is in several sets: here, of the same images.
    with load([first, twin], epochs=1, drop_last=False) as loader:
        found = [loader.shards.repetition(i, n) for i in (3, 15) for n in range(2)]
    assert sorted(found) == [0, 1, 2, 3] and found[0] == 0


def test_an_image_of_several_occurrences_is_decoded_once(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with load([ShardSource(first, 3)], 36, epochs=2, cache_gib=1.0) as loader:
        decoded: list[int] = []
        decode = loader._decoder.decoder.decode
        monkeypatch.setattr(loader._decoder.decoder, "decode", lambda x: (decoded.append(len(x)), decode(x))[1])  # type: ignore[func-returns-value]
        left = loader._decoder._cache_left
        list(loader)
        cache = loader._decoder.cache
        assert left - loader._decoder._cache_left == sum(image.numel() for image in cache.values())
    assert decoded[0] == 12 == sum(decoded)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_together_load_the_same_scenes(first: str, second: str, world: int) -> None:
    sources = mix((first, 1.5), (second, 0.5))  # 18 + 4 scenes
    with load(sources, 1, epochs=2, drop_last=False) as loader:
        expected = keys_of(iter(loader))
    shares = []
    for rank in range(world):
        with load(sources, 1, epochs=2, drop_last=False, rank=rank, world_size=world) as loader:
            shares.append([batch.keys for batch in loader])
    assert [key for step in zip(*shares, strict=True) for keys in step for key in keys] == expected


@pytest.mark.parametrize("prefetch", [0, 2])
def test_resume_is_bitwise_exact(first: str, second: str, prefetch: int) -> None:
    sources = mix((first, 1.5), (second, 0.5))
    with load(sources, prefetch=prefetch) as whole:
        expected = list(islice(whole, 12))  # 5 per epoch
    for stop in (1, 4, 5, 7):
        with load(sources, prefetch=prefetch) as before:
            list(islice(before, stop))
            state = json.loads(json.dumps(before.state_dict()))
        with load(sources, prefetch=prefetch) as after:
            after.load_state_dict(state)
            for x, y in zip(expected[stop:], islice(after, 12 - stop), strict=True):
                assert_same(x, y)


def test_a_state_of_other_data_is_refused(first: str, second: str, twin: str, tmp_path: Path) -> None:
    def refusal(saved: Any, current: Any, **options: Any) -> str:
        with load(saved) as loader:
            state = json.loads(json.dumps(loader.state_dict()))
        with load(current, **options) as loader, pytest.raises(UserError) as caught:
            loader.load_state_dict(state)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    remedy = "resume with the same data sets, in the same order and with the same weights, or start a new run"
    both = mix((first, 2), (second, 1))
    assert refusal(both, mix((first, 2), (second, 0.5))) == (
        f"{second}: the saved loader state has weight 1, this run has 0.5: {remedy}"
    )
    assert refusal(both, mix((second, 1), (first, 2))) == (
        f"the saved loader state has the data sets in the order {first}, {second}, this run has {second}, {first}: "
        f"{remedy}"
    )
    assert refusal(both, mix((first, 2))) == (
        f"the saved loader state has 2 data sets ({first}, {second}), this run has one data set ({first}): {remedy}"
    )
    assert refusal(first, both) == (
        f"the saved loader state has one data set, this run has 2 data sets ({first}, {second}): {remedy}"
    )
    assert "in the order" in refusal([first, twin], [twin, first])  # which have the same keys
    assert refusal(both, mix((twin, 2), (second, 1))).startswith(
        f"{twin}: the saved loader state belongs to other scenes"
    )
    few = packed(tmp_path / "few", ["c0", "c1", "c2", "c3"], "running", "dog")
    assert f"{few}: the saved loader state has 8 scenes, this run has 4" in refusal(both, mix((first, 2), (few, 1)))
    assert "the saved loader state has weight 1, this run has 2" in refusal(first, mix((first, 2)))
    assert "has seed 5, this run has 6" in refusal(both, both, seed=6)


def test_states_of_one_data_set_from_before_mixes_load(first: str) -> None:
    with load(first) as loader:
        list(islice(loader, 2))
        state = {"epoch": 0, "position": 8, "ahead": 0, "rank": 0, "world_size": 1, "seed": 5, "scenes": 12}
        state |= {"keys": loader.shards.sets[0].digest}
        assert loader.state_dict() == state | {"shuffle": "scenes", "balance": True, "balanced_batch_size": None}
        rest = list(islice(loader, 2))
    with load([first]) as loader:  # `scenes` is the order of earlier versions for a few scenes
        loader.load_state_dict(state)
        assert loader.state_dict() == state | {"shuffle": "sorted", "balance": False, "balanced_batch_size": None}
        for x, y in zip(rest, islice(loader, 2), strict=True):
            assert_same(x, y)


def test_bad_samples_name_their_data_set(first: str, second: str, tmp_path: Path) -> None:
    broken = packed(tmp_path / "broken", [f"a{i:02d}" for i in range(4)], "running", "dog")
    entries = read_rows(tmp_path / "broken")["train-000000.tar"]
    with open(tmp_path / "broken" / "train-000000.tar", "r+b") as shard:
        for offset in (entries[0][1], entries[1][3]):  # an image and a record
            shard.seek(offset)
            shard.write(b"not readable")
    seen: list[BadSample] = []
    log = BadSampleLog(tmp_path / "bad.jsonl")
    with load([first, broken, second], epochs=1, on_bad=lambda e, bad: (seen.extend(bad), log(e, bad))[0]) as loader:  # type: ignore[func-returns-value]
        list(loader)
    assert {(bad.key, bad.reason, bad.source) for bad in seen} == {
        ("a00", "not_an_image", broken),
        ("a01", "bad_json", broken),
    }
    assert str(seen[0]).startswith(f"{seen[0].key} of {broken}: ")
    assert str(pickle.loads(pickle.dumps(seen[0]))) == str(seen[0])
    records = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [record["source"] for record in records] == [broken, broken]
    with load(broken, 2, epochs=1, max_bad_fraction=1.0, on_bad=BadSampleLog(tmp_path / "alone.jsonl")) as loader:
        list(loader)
    alone = [json.loads(line) for line in (tmp_path / "alone.jsonl").read_text().splitlines()]
    assert all(record.keys() == {"epoch", "key", "reason", "detail"} for record in alone) and len(alone) == 2

    found = EvaluationLoader([first, broken], 4, split="train", size=SIZE)
    with found as loader, pytest.raises(UserError, match=rf"a00 of {broken}"):
        list(loader)


def test_the_mean_number_of_views_is_that_of_an_epoch(first: str, tmp_path: Path) -> None:
    bare = packed(tmp_path / "bare", ["c0", "c1", "c2", "c3"], "running", "")  # without objects: one view per scene
    with load(mix((first, 1), (bare, 3)), epochs=1) as loader:
        views = sum(len(batch.pixels) for batch in loader)
        assert loader.shards.views_per_scene() == views / 24 == 1.5


def test_the_mean_number_of_views_counts_relations_with_masks_where_they_are_needed(tmp_path: Path) -> None:
    scenes = [replace(scene, split=None) for scene in generate_scenes(12, seed=0)]
    bare = [replace(s, objects=[replace(o, mask=None) for o in s.objects]) for s in scenes]
    for name, of_set in (("masked", scenes), ("bare", bare)):
        pack(of_set, tmp_path / name, val=0.0, test=0.0, progress=False)
    sets = mix((str(tmp_path / "masked"), 1), (str(tmp_path / "bare"), 2))
    means = {}
    for view in ("focused", "box"):
        with load(sets, epochs=1, relation_view=view) as loader:
            means[view] = loader.shards.views_per_scene(need_masks=view == "focused")
            assert means[view] * 36 == pytest.approx(sum(len(batch.pixels) for batch in loader), rel=1e-12)  # exact
    assert means["focused"] < means["box"]


def test_evaluation_loads_every_scene_once_whatever_the_weights(first: str, tmp_path: Path) -> None:
    keys = [f"v{i:02d}" for i in range(6)]
    val = packed(tmp_path / "val", keys, "eating", "cat", val=1.0)
    with EvaluationLoader(mix((first, 2), (val, 0.001)), 4, split="val", size=SIZE) as loader:
        assert keys_of(iter(loader)) == keys  # a set without scenes in this split is allowed
        assert loader.vocabulary.actions == ["eating", "running"]
    with EvaluationLoader(mix((first, 2)), 5, split="train", size=SIZE) as loader:
        assert keys_of(iter(loader)) == [f"a{i:02d}" for i in range(12)]


def test_sets_without_scenes_are_refused(first: str, tmp_path: Path) -> None:
    val = packed(tmp_path / "val", ["v0", "v1", "v2"], "eating", "cat", val=1.0)
    with pytest.raises(UserError, match=rf"^{val}: the train split has no scenes"):
        load([first, val])
    with pytest.raises(UserError, match=rf"^{first}, {val}: the test split has no scenes"):
        load([first, val], split="test")
    with pytest.raises(
        UserError, match=rf"^{first}: a weight of 0\.01 leaves none of the 12 scenes of the train split"
    ):
        load(mix((first, 0.01)))
    with pytest.raises(
        UserError, match=rf"^{first}: the train split has 6 scenes per epoch, expected at least 8 \(one"
    ):
        load(mix((first, 0.5)), 8)
    with pytest.raises(UserError, match=r"nothing: no such directory"):
        load([first, str(tmp_path / "nothing")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty/manifest\.json: no such file"):
        load([first, str(tmp_path / "empty")])


def test_a_mix_is_closed_pickled_and_read_from_urls(first: str, second: str, tmp_path: Path) -> None:
    url = Path(second).as_uri()
    cache = tmp_path / "cache"
    shards = ShardMix(mix((first, 1), (url, 2)), shard_cache_dir=cache)
    assert shards.is_remote and len(shards) == 20
    copy = pickle.loads(pickle.dumps(shards))
    assert [copy.read(i).key for i in range(20)] == [shards.key(i) for i in range(20)]
    assert copy.digest == shards.digest and copy.identities() == shards.identities()
    copy.close()
    assert copy.read(15).key == "b03", "a closed mix can be reopened"
    copy.close()
    shards.close()
    with load([first, url], epochs=1, shard_cache_dir=str(cache)) as remote, load([first, second], epochs=1) as local:
        for x, y in zip(remote, local, strict=True):
            assert_same(x, y)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("shards", "read"))]
