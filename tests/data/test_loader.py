from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packs import read_rows
from PIL import Image

from scenarioclip_fast.data import LoaderConfig, ShardSet, permutation, rle
from scenarioclip_fast.data.bad_samples import BadSampleLog
from scenarioclip_fast.data.batch import Batch
from scenarioclip_fast.data.decode import DECODERS
from scenarioclip_fast.data.loader import SceneLoader, scene_loader
from scenarioclip_fast.data.packing.packer import pack
from scenarioclip_fast.data.permutation import hash_order
from scenarioclip_fast.data.prefetch import Prefetcher
from scenarioclip_fast.data.scene import Relation, Scene, SceneObject, scene_to_json
from scenarioclip_fast.data.shards import BadSample
from scenarioclip_fast.data.splitmix64 import hash64
from scenarioclip_fast.data.views import Views
from scenarioclip_fast.data.vocabulary import Vocabulary
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.ops import render_views

SIZE = 32
NAMES = ("red box", "blue disc", "cat")
ACTIONS = ("resting", "falling")
LIBRARIES = ("dali", "nvimgcodec")  # decoders that also run on a CPU


def skip_missing(decoder: str) -> None:
    pytest.importorskip(DECODERS[decoder].module, reason=f"{DECODERS[decoder].library} is not installed")


@pytest.fixture(autouse=True)
def no_threads_remain() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = [t.name for t in set(threading.enumerate()) - before if t.name == "load" or t.name.startswith("render")]
    assert not left


def make_scene(i: int) -> Scene:
    """Scene i has i % 4 objects and, if there are at least two, one or two relations."""
    rng = np.random.default_rng(i)
    height, width = 40 + i % 5, 52 - i % 7
    out = io.BytesIO()
    pixels = rng.integers(0, 255, (height // 4, width // 4, 3), np.uint8)
    Image.fromarray(pixels).resize((width, height)).save(out, "JPEG")
    objects = []
    for k in range(i % 4):
        mask = torch.zeros(height, width, dtype=torch.bool)
        mask[4 * k : 4 * k + 12, 6 * k : 6 * k + 15] = True
        box = (6.0 * k, 4.0 * k, 6.0 * k + 15, 4.0 * k + 12)
        objects.append(SceneObject(NAMES[(i + k) % 3], box, rle.encode(mask)))
    relations = [Relation(k, "near", k + 1) for k in range(len(objects) - 1)]
    return Scene(f"s{i:04d}", out.getvalue(), ACTIONS[i % 2], objects, relations)


def vocabulary_of(scenes: list[Scene]) -> Vocabulary:
    return Vocabulary(
        [s.action for s in scenes],
        [o.name for s in scenes for o in s.objects],
        [s.relation_text(k) for s in scenes for k in range(len(s.relations))],
    )


def write_shards(folder: Path, scenes: list[Scene], damage: dict[int, Callable[[Scene, dict[str, Any]], Any]]) -> Path:
    """Write a packed data set, letting `damage[i](scene, record)` modify scene i before it is written: `pack` itself
    would reject such scenes. If the function returns bytes, they replace the JSON record."""
    folder.mkdir()
    vocabulary_of(scenes).save(folder / "vocabulary.json")
    index: dict[str, list[list[Any]]] = {}
    per_shard = 16
    for shard, start in enumerate(range(0, len(scenes), per_shard)):
        name = f"train-{shard:06d}.tar"
        index[name] = []
        with tarfile.open(folder / name, "w") as tar:
            for i in range(start, min(start + per_shard, len(scenes))):
                scene = scenes[i]
                with Image.open(io.BytesIO(scene.image)) as image:  # type: ignore[arg-type]
                    record = scene_to_json(scene, (image.height, image.width))
                text = damage[i](scene, record) if i in damage else None
                row: list[Any] = [scene.key]
                for suffix, data in (("jpg", scene.image), ("json", text or json.dumps(record).encode())):
                    member = tarfile.TarInfo(f"{scene.key}.{suffix}")
                    assert isinstance(data, bytes)
                    member.size = len(data)
                    row += [tar.offset + 512, len(data)]
                    tar.addfile(member, io.BytesIO(data))
                index[name].append(row)
    shards = [
        {
            "name": name,
            "scenes": len(rows),
            "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
            "bytes": (folder / name).stat().st_size,
        }
        for name, rows in index.items()
    ]
    splits = {"train": {"scenes": len(scenes), "shards": shards}, "val": {"scenes": 0, "shards": []}}
    (folder / "manifest.json").write_text(json.dumps({"schema": 1, "splits": splits}))
    (folder / "index.json").write_text(json.dumps({"schema": 1, "shards": index}))
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("loader") / "data", [make_scene(i) for i in range(30)])


def packed(folder: Path, scenes: list[Scene]) -> Path:
    pack(scenes, folder, shard_size=16, val=0, test=0, progress=False)
    return folder


def load(shards: Path, batch_size: int = 4, **options: Any) -> SceneLoader:
    return scene_loader(shards, batch_size, **{"size": SIZE, "threads": 2, "prefetch": 2, "seed": 5, **options})


def assert_same(a: Batch, b: Batch) -> None:
    assert a.keys == b.keys
    for field, x, y in zip(fields(Batch)[0:1] + fields(Batch)[2:7], a.tensors, b.tensors, strict=True):
        assert torch.equal(x, y), field.name


def take(loader: SceneLoader, n: int) -> list[Batch]:
    batches = []
    for batch in loader:
        batches.append(batch)
        if len(batches) == n:
            break
    return batches


def test_a_batch_contains_the_rendered_scenes(shards: Path) -> None:
    with load(shards, augment=False, shuffle=False, drop_last=False) as loader:
        batches = list(loader)
    assert len(batches) == len(loader) == 8
    assert [key for batch in batches for key in batch.keys] == [f"s{i:04d}" for i in range(30)]
    vocabulary = ShardSet(shards).vocabulary
    for k, batch in enumerate(batches):
        scenes = [make_scene(i) for i in range(4 * k, min(4 * k + 4, 30))]
        images = [torch.from_numpy(np.array(Image.open(io.BytesIO(s.image)))) for s in scenes]  # type: ignore[arg-type]
        assert torch.equal(batch.pixels, render_views(images, Views.of_scenes(scenes), size=SIZE))
        assert batch.num_scenes == len(scenes)
        assert [vocabulary.actions[i] for i in batch.action_id] == [s.action for s in scenes]
        assert [vocabulary.objects[i] for i in batch.object_id] == [o.name for s in scenes for o in s.objects]
        assert batch.object_scene.tolist() == [i for i, s in enumerate(scenes) for _ in s.objects]
        texts = [s.relation_text(r) for s in scenes for r in range(len(s.relations))]
        assert [vocabulary.relations[i] for i in batch.relation_id] == texts
        assert batch.relation_scene.tolist() == [i for i, s in enumerate(scenes) for _ in s.relations]
        assert batch.num_objects == len(batch.object_scene) and batch.num_relations == len(batch.relation_scene)
        assert all(t.dtype == torch.int64 for t in batch.tensors[1:])
        assert_same(batch.to("cpu"), batch)


@pytest.mark.parametrize(
    "options",
    [
        {"prefetch": 0},
        {"prefetch": 5},
        {"threads": 1},
        {"cache_gib": 40_000 / 2**30},
        *({"decoder": d} for d in LIBRARIES),
    ],
    ids=str,
)
def test_batches_depend_only_on_seed_and_epoch(shards: Path, options: dict[str, Any]) -> None:
    skip_missing(options.get("decoder", "torch"))
    with load(shards, epochs=2) as plain, load(shards, epochs=2, **options) as other:
        a, b = list(plain), list(other)
    assert len(a) == len(b) == 14
    for x, y in zip(a, b, strict=True):
        assert_same(x, y)
    epochs = [[key for batch in a[i : i + 7] for key in batch.keys] for i in (0, 7)]
    assert len(set(epochs[0])) == len(set(epochs[1])) == 28 and epochs[0] != epochs[1]
    assert epochs[1] == [f"s{i:04d}" for i in hash_order(30, hash64(5, 1))[:28]]


def test_augmentation_depends_on_the_epoch_and_not_on_the_batch(shards: Path) -> None:
    def globals_by_key(epoch: int, **options: Any) -> dict[str, torch.Tensor]:
        with load(shards, **options) as loader:
            loader.load_state_dict({**loader.state_dict(), "epoch": epoch})
            batches = take(loader, len(loader))
        return {key: pixels for b in batches for key, pixels in zip(b.keys, b.pixels, strict=False)}

    one, other = globals_by_key(0, drop_last=False), globals_by_key(0, batch_size=7, shuffle=False, drop_last=False)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    later = globals_by_key(1, drop_last=False)
    assert not any(torch.equal(one[key], later[key]) for key in one)


def test_resume_is_bitwise_exact(shards: Path) -> None:
    with load(shards) as whole:
        expected = take(whole, 17)
        assert whole.state_dict()["epoch"] == 2 and whole.state_dict()["position"] == 12
    for stop in (1, 6, 7, 9):
        with load(shards, prefetch=3) as first:
            iterator = iter(first)
            for _ in range(stop):
                next(iterator)
            time.sleep(0.02)  # the threads run ahead; the state must not
            state = json.loads(json.dumps(first.state_dict()))
        with load(shards) as second:
            second.load_state_dict(state)
            for x, y in zip(expected[stop:], take(second, 17 - stop), strict=True):
                assert_same(x, y)


def test_a_position_of_a_shuffled_epoch_is_not_one_of_the_index(shards: Path) -> None:
    with load(shards, 6, augment=False) as shuffled, load(shards, 6, augment=False, shuffle=False) as plain:
        for one, other, then in ((shuffled, plain, "with"), (plain, shuffled, "without")):
            with pytest.raises(UserError, match=f"the saved loader state is of a loader {then} shuffle, this one is"):
                other.load_state_dict(one.state_dict())
            one.load_state_dict(one.state_dict())
        plain.load_state_dict({k: v for k, v in plain.state_dict().items() if k != "shuffle"})  # of version 0.0


@pytest.mark.parametrize("shuffle", ["scenes", "shards", "sorted"])
def test_orders_resume_exactly(shards: Path, shuffle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a resumed run does not say which order it has, and with another number of ranks."""
    monkeypatch.setattr(permutation, "_SORTED", 0)
    permutation.permutation.cache_clear()
    options: dict[str, Any] = {"shuffle": shuffle, "shuffle_window": 2, "augment": False, "drop_last": False}
    with load(shards, 6, **options) as whole:
        expected = [set(batch.keys) for batch in take(whole, 5)]
        assert set.union(*expected) == {f"s{i:04d}" for i in range(30)}
    with load(shards, 6, **options) as first:
        take(first, 2)
        state = json.loads(json.dumps(first.state_dict()))
        assert state["shuffle"] == shuffle
    for form in (options, options | {"shuffle": None, "shuffle_window": 64}):
        found: list[set[str]] = [set(), set(), set()]
        for rank in range(3):
            with load(shards, 2, rank=rank, world_size=3, **form) as second:
                second.load_state_dict(state)
                assert second.state_dict()["shuffle"] == shuffle
                for keys, batch in zip(found, take(second, 3), strict=True):
                    keys.update(batch.keys)
        assert found == expected[2:]
    for other in {"scenes", "shards", "sorted"} - {shuffle}:
        with (
            load(shards, 6, **options | {"shuffle": other}) as third,
            pytest.raises(UserError, match=rf"has data\.shuffle={shuffle}, this run has {other}: resume with data\.s"),
        ):
            third.load_state_dict(state)
    if shuffle == "shards":
        with (
            load(shards, 6, **options | {"shuffle_window": 3}) as third,
            pytest.raises(UserError, match=r"has data\.shuffle_window=2, this run has 3: resume with"),
        ):
            third.load_state_dict(state)


def test_shuffle_is_a_switch_or_an_order(shards: Path) -> None:
    with load(shards, 5, shuffle=False, epochs=1, augment=False) as plain:
        assert [key for batch in plain for key in batch.keys] == [f"s{i:04d}" for i in range(30)]
    with load(shards, 5, shuffle=True) as default, load(shards, 5, shuffle="scenes") as named:
        assert default.order == named.order and named.config.shuffle == "scenes"
    with pytest.raises(UserError, match="shuffle: got 'shard', expected one of scenes, shards, sorted"):
        load(shards, 5, shuffle="shard")


def test_a_new_iteration_continues_the_previous_one(shards: Path) -> None:
    with load(shards) as whole, load(shards) as parts:
        expected = take(whole, 5)
        for x, y in zip(expected, take(parts, 2) + take(parts, 3), strict=True):
            assert_same(x, y)


def test_ranks_share_the_order_and_another_world_size_continues_it(shards: Path) -> None:
    order = [f"s{i:04d}" for i in hash_order(30, hash64(5, 0))]

    def global_batches(
        world: int, batch_size: int, state: dict[str, int] | None, steps: int
    ) -> tuple[list[set[str]], Any]:
        per_rank, states = [], []
        for rank in range(world):
            with load(shards, batch_size, rank=rank, world_size=world) as loader:
                if state is not None:
                    loader.load_state_dict(state)
                per_rank.append([set(b.keys) for b in take(loader, steps)])
                states.append(loader.state_dict())
        assert len({len(batches) for batches in per_rank}) == 1
        return [set().union(*batches) for batches in zip(*per_rank, strict=True)], states[0]

    first, state = global_batches(2, 3, None, 2)
    assert first == [set(order[:6]), set(order[6:12])]
    second, _ = global_batches(3, 2, state, 3)
    assert second == [set(order[12:18]), set(order[18:24]), set(order[24:30])]


def test_evaluation_yields_every_scene_once_over_all_ranks(shards: Path) -> None:
    seen: list[str] = []
    for rank in range(4):
        with load(shards, 7, rank=rank, world_size=4, augment=False, drop_last=False) as loader:
            assert len(loader) == 2
            for _ in range(2):  # each iteration is one epoch
                batches = list(loader)
                assert len(batches) == 2
        seen += [key for batch in batches for key in batch.keys]
    assert sorted(seen) == [f"s{i:04d}" for i in range(30)]


def test_a_rank_without_scenes_gets_an_empty_batch(tmp_path: Path) -> None:
    shards = packed(tmp_path / "data", [make_scene(i) for i in range(5)])
    with load(shards, 1, rank=3, world_size=4, drop_last=False, augment=False) as loader:
        full, empty = loader
    assert full.num_scenes == 1
    assert empty.num_scenes == empty.num_objects == empty.num_relations == 0
    assert empty.pixels.shape == (0, 3, SIZE, SIZE)


# Kinds of damage to a stored scene, and the expected reason.


def damaged_image(change: Callable[[bytes], bytes]) -> Callable[[Scene, dict[str, Any]], None]:
    def damage(scene: Scene, record: dict[str, Any]) -> None:
        assert isinstance(scene.image, bytes)
        scene.image = change(scene.image)

    return damage


def damaged_record(**changes: Any) -> Callable[[Scene, dict[str, Any]], None]:
    return lambda scene, record: record.update(changes)


def empty_mask(scene: Scene, record: dict[str, Any]) -> None:
    height, width = record["size"]
    record["objects"][0]["mask"] = rle.encode(torch.zeros(height, width, dtype=torch.bool))


def other_size(scene: Scene, record: dict[str, Any]) -> None:
    out = io.BytesIO()
    Image.new("RGB", (20, 20)).save(out, "JPEG")
    scene.image = out.getvalue()


def bomb(data: bytes) -> bytes:
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + (20000).to_bytes(2, "big") * 2 + data[at + 4 :]


DAMAGE: dict[int, tuple[str, Callable[[Scene, dict[str, Any]], Any]]] = {
    0: ("truncated", damaged_image(lambda data: data[: len(data) // 2])),
    3: ("not_an_image", damaged_image(lambda data: b"not a picture")),
    7: ("too_large", damaged_image(bomb)),
    10: ("bad_json", lambda scene, record: b"{'oops"),
    11: ("bad_json", damaged_record(schema=99)),
    15: ("bad_scene", empty_mask),
    18: ("bad_scene", other_size),
    22: ("bad_json", damaged_record(relations=[{"subject": 0, "predicate": "near", "object": 9}])),
    23: ("unknown_text", damaged_record(action="dancing")),
}


def recoded(mode: str, kind: str = "JPEG", **options: Any) -> Callable[[Scene, dict[str, Any]], None]:
    def change(data: bytes) -> bytes:
        out = io.BytesIO()
        Image.open(io.BytesIO(data)).convert(mode).save(out, kind, **options)
        return out.getvalue()

    return damaged_image(change)


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif.tobytes()


# Unusual but valid.
HARMLESS = {
    1: recoded("CMYK"),
    2: recoded("L"),
    5: recoded("RGB", "PNG"),
    6: recoded("RGB", exif=rotated()),
    9: recoded("RGB", progressive=True),
}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 scenes: nine damaged as in DAMAGE, the last shard (2 scenes) missing, the one before truncated by a scene."""
    scenes = [make_scene(i) for i in range(50)]
    folder = write_shards(
        tmp_path_factory.mktemp("damaged") / "data", scenes, HARMLESS | {i: d for i, (_, d) in DAMAGE.items()}
    )
    (folder / "train-000003.tar").unlink()
    start = read_rows(folder)["train-000002.tar"][-1][1]
    os.truncate(folder / "train-000002.tar", start + 100)
    return folder


@pytest.mark.parametrize(("width", "limit"), [(2000, "a ratio of the sides"), (40_000, "sides")])
def test_scenes_that_cannot_be_rendered_do_not_end_the_run(tmp_path: Path, width: int, limit: str) -> None:
    """Packs of other writers may contain them."""

    def narrow(scene: Scene, record: dict[str, Any]) -> None:
        out = io.BytesIO()
        Image.new("RGB", (width, 1)).save(out, "JPEG")
        scene.image, record["size"] = out.getvalue(), [1, width]

    # Scenes 0, 4, ... have no objects.
    shards = write_shards(tmp_path / "data", [make_scene(i) for i in range(20)], {4: narrow, 8: narrow})
    found: list[BadSample] = []
    with load(shards, 3, epochs=1, drop_last=False, max_bad_fraction=0.5, on_bad=lambda _, bad: found.extend(bad)) as s:
        keys = [key for batch in s for key in batch.keys]
    assert sorted(keys) == [f"s{i:04d}" for i in range(20) if i not in (4, 8)]
    assert sorted((bad.key, bad.reason) for bad in found) == [("s0004", "bad_scene"), ("s0008", "bad_scene")]
    assert f"got an image of {width} x 1, expected {limit} of at most" in found[0].detail


REASONS = (
    {"s0047": "short_shard"}
    | {f"s{i:04d}": reason for i, (reason, _) in DAMAGE.items()}
    | dict.fromkeys(("s0048", "s0049"), "unreadable_shard")
)
GOOD = {f"s{i:04d}" for i in range(50)} - REASONS.keys()


@pytest.mark.parametrize("decoder", ["torch", *LIBRARIES])
@pytest.mark.parametrize("world", [1, 3])
def test_bad_scenes_are_replaced_counted_and_logged(damaged: Path, tmp_path: Path, decoder: str, world: int) -> None:
    skip_missing(decoder)
    seen, bad, counts = [], [], set()
    for rank in range(world):
        path = tmp_path / f"new folder {rank}" / "bad_samples.jsonl"
        options = {"rank": rank, "world_size": world, "decoder": decoder, "drop_last": False, "epochs": 1}
        with load(damaged, 4, max_bad_fraction=0.5, on_bad=BadSampleLog(path), **options) as loader:
            batches = list(loader)
            counts.add(len(batches))
            assert all(
                batch.num_scenes == 4 for batch in batches[:-4]
            )  # bad scenes are replaced: only the last batches are smaller
        records = [json.loads(line) for line in path.read_text().splitlines()]
        assert loader.bad == {r: sum(x["reason"] == r for x in records) for r in {x["reason"] for x in records}}
        assert all(set(x) == {"epoch", "key", "reason", "detail"} and x["epoch"] == 0 for x in records)
        bad += [(x["key"], x["reason"]) for x in records]
        seen += [key for batch in batches for key in batch.keys]
    assert counts == {-(-50 // (4 * world))}
    assert sorted(seen) == sorted(GOOD)
    assert sorted(bad) == sorted(REASONS.items())


# Only the decoder detects this: the header is intact.
without_tables = damaged_image(lambda data: data.replace(b"\xff\xdb", b"\xff\xfe"))


def without_height(data: bytes) -> bytes:
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + bytes(2) + data[at + 2 :]


EVERY_DAMAGE = [
    *DAMAGE.values(),
    ("truncated", damaged_image(lambda data: data[:60])),
    ("corrupt", damaged_image(without_height)),
    ("undecodable", damaged_image(lambda data: data[:20] + bytes(20) + data[40:])),
    ("too_large", damaged_image(lambda data: b"\x89PNG\r\n\x1a\n" + bytes(8) + (20000).to_bytes(4, "big") * 2)),
    ("not_an_image", damaged_image(lambda data: b"")),
    ("undecodable", without_tables),
    ("decoder_failed", lambda scene, record: None),
]
THOUSAND, DAMAGED = 1000, 50


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """1,000 scenes, 5 % with all kinds of damage, and the reasons; some of the others are unusual but valid."""
    scenes = [make_scene(i) for i in range(THOUSAND)]
    damage: dict[int, Callable[[Scene, dict[str, Any]], Any]] = {}
    reasons = dict.fromkeys((scenes[i].key for i in range(992, 1000)), "unreadable_shard")
    reasons |= dict.fromkeys((scenes[i].key for i in (990, 991)), "short_shard")
    odd = list(HARMLESS.values())
    for n in range(DAMAGED - len(reasons)):
        i = 6 + 24 * n  # two objects
        reasons[scenes[i].key], damage[i] = EVERY_DAMAGE[n % len(EVERY_DAMAGE)]
        damage[i + 9] = odd[n % len(odd)]
    folder = write_shards(tmp_path_factory.mktemp("thousand") / "data", scenes, damage)
    (folder / "train-000062.tar").unlink()
    rows = read_rows(folder)["train-000061.tar"]
    os.truncate(folder / "train-000061.tar", rows[14][1] + 100)
    return folder, reasons


@pytest.mark.parametrize("decoder", ["torch", *LIBRARIES])
def test_an_epoch_of_a_thousand_scenes_survives_all_kinds_of_damage(
    thousand: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoder: str
) -> None:
    skip_missing(decoder)
    folder, reasons = thousand
    assert len(reasons) == DAMAGED and set(reasons.values()) >= {reason for reason, _ in EVERY_DAMAGE}
    if decoder == "torch":  # reports libjpeg-turbo's warning
        reasons = {key: "corrupt" if reason == "undecodable" else reason for key, reason in reasons.items()}
    poison = {make_scene(int(key[1:])).image for key, reason in reasons.items() if reason == "decoder_failed"}
    options = {"decoder": decoder, "on_bad": BadSampleLog(tmp_path / "bad.jsonl")}
    with load(folder, 32, drop_last=False, epochs=1, **options) as loader:
        decode = loader._decoder.decoder.decode

        def failing(images: Any) -> Any:
            if not poison.isdisjoint(images):
                raise RuntimeError("lost the device")
            return decode(images)

        monkeypatch.setattr(loader._decoder.decoder, "decode", failing)
        batches = list(loader)
        assert len(batches) == len(loader) == 32
    keys = [key for batch in batches for key in batch.keys]
    assert len(keys) == THOUSAND - DAMAGED
    assert set(keys) == {f"s{i:04d}" for i in range(THOUSAND)} - reasons.keys()
    records = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert sorted((x["key"], x["reason"]) for x in records) == sorted(reasons.items())
    assert loader.bad.total() == DAMAGED


def test_resume_is_exact_among_bad_scenes(damaged: Path) -> None:
    options = {"max_bad_fraction": 0.5, "rank": 1, "world_size": 2}
    with load(damaged, 3, **options) as whole:
        expected = take(whole, 12)
    for stop in range(1, 12, 2):
        with load(damaged, 3, **options) as first:
            before = take(first, stop)
            state, bad = first.state_dict(), first.bad.copy()
        with load(damaged, 3, **options) as second:
            second.load_state_dict(state)
            after = take(second, 12 - stop)
        for x, y in zip(expected, before + after, strict=True):
            assert_same(x, y)
        assert bad + second.bad == whole.bad  # none is counted twice


def test_too_many_bad_scenes_stop_the_run(damaged: Path, tmp_path: Path) -> None:
    message = r"\d of the 4 scenes read in epoch 0 cannot be used.*s00\d\d: "
    loader = load(damaged, 4, max_bad_fraction=0.0, on_bad=BadSampleLog(tmp_path / "bad.jsonl"))
    with loader, pytest.raises(UserError, match=message):
        take(loader, 100)
    assert 1 <= sum(loader.bad.values()) == len((tmp_path / "bad.jsonl").read_text().splitlines())
    with load(damaged, 4, max_bad_fraction=0.5) as loader:
        take(loader, 6)
        state = loader.state_dict()
    with load(damaged, 4, max_bad_fraction=0.0) as loader, pytest.raises(UserError, match=r"max_bad_fraction = 0$"):
        loader.load_state_dict(state)
        next(iter(loader))
    with load(damaged, 4, max_bad_fraction=0.25, epochs=3, prefetch=0) as loader:  # 12 of 50 are bad
        list(loader)
    with (
        load(damaged, 4, max_bad_fraction=0.2, epochs=3) as loader,
        pytest.raises(UserError, match=r"max_bad_fraction = 0\.2"),
    ):
        list(loader)


def test_a_full_disk_does_not_stop_the_run(damaged: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "full").mkdir()  # opening a directory raises OSError, like a full disk
    with load(damaged, 4, max_bad_fraction=0.5, on_bad=BadSampleLog(tmp_path / "full"), epochs=1) as loader:
        keys = {key for batch in loader for key in batch.keys}
    assert keys <= GOOD and loader.bad.total() == caplog.text.count('"reason": ')
    assert "full: [Errno 21] Is a directory" in caplog.text


def test_a_deleted_data_set_stops_the_run(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "data", [make_scene(0) for _ in range(600)], {})
    for shard in shards.glob("*.tar"):
        shard.unlink()
    with load(shards, 4) as loader, pytest.raises(UserError, match="unreadable_shard"):
        next(iter(loader))
    assert sum(loader.bad.values()) < 50


def test_a_failed_batch_is_decoded_again_image_by_image(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison = make_scene(4).image
    with load(shards, epochs=1, drop_last=False) as loader:
        decode = loader._decoder.decoder.decode

        def failing(images: Any) -> Any:
            if poison in images:
                raise RuntimeError("lost the device")
            return decode(images)

        monkeypatch.setattr(loader._decoder.decoder, "decode", failing)
        keys = {key for batch in loader for key in batch.keys}
    assert keys == {f"s{i:04d}" for i in range(30)} - {"s0004"}
    assert loader.bad == {"decoder_failed": 1}


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("where", ["_gather", "_build"])
def test_errors_in_threads_are_raised_in_the_consumer(
    shards: Path, monkeypatch: pytest.MonkeyPatch, where: str, prefetch: int
) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("a bug")

    with load(shards, prefetch=prefetch) as loader:
        monkeypatch.setattr(loader, where, broken)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError, match="a bug"):
                next(iter(loader))


def test_a_dead_thread_is_reported(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Prefetcher, "_run", lambda self, steps: None)
    with load(shards) as loader, pytest.raises(RuntimeError, match="thread died"):
        next(iter(loader))


@pytest.mark.parametrize("prefetch", [0, 2])
def test_closing_twice_is_allowed(shards: Path, prefetch: int) -> None:
    loader = load(shards, prefetch=prefetch)
    batches = iter(loader)
    next(batches)
    for _ in range(2):
        loader.close()
    assert next(batches, None) is None
    with pytest.raises(RuntimeError, match="this loader is closed: create a new one"):
        iter(loader)


@settings(max_examples=25, deadline=None)  # each example loads a few batches of small images
@given(data=st.data())
def test_ranks_get_the_same_number_of_batches_and_resume_exactly(
    shards: Path, damaged: Path, data: st.DataObject
) -> None:
    draw = data.draw
    world, batch_size = draw(st.integers(1, 4), "ranks"), draw(st.integers(1, 6), "batch size")
    options = {"drop_last": draw(st.booleans(), "drop_last"), "epochs": 2, "size": 8, "threads": 1}
    options |= {"max_bad_fraction": 1.0, "seed": draw(st.integers(0, 9), "seed")}
    folder = draw(st.sampled_from((shards, damaged)), "shards")
    counts = set()
    for rank in range(world):
        options |= {"rank": rank, "world_size": world, "prefetch": draw(st.integers(0, 2), "prefetch")}
        with load(folder, batch_size, **options) as whole:
            expected = list(whole)
        counts.add(len(expected))
        assert len(expected) == 2 * len(whole)
        stop = draw(st.integers(0, len(expected) - 1), "resumed at")
        with load(folder, batch_size, **options) as first, load(folder, batch_size, **options) as second:
            before = take(first, stop) if stop else []
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
            after = list(second)
            assert first.bad + second.bad == whole.bad
        for x, y in zip(expected, before + after, strict=True):
            assert_same(x, y)
    assert len(counts) == 1


def test_prefetching_is_bounded_and_ends_with_the_iteration(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    build = SceneLoader._build
    monkeypatch.setattr(SceneLoader, "_build", lambda *a: (built.append(0), build(*a))[1])  # type: ignore[func-returns-value]
    loader = load(shards, prefetch=2)
    iterator = iter(loader)
    next(iterator)
    time.sleep(0.5)
    assert len(built) <= 1 + 2 + 1  # consumed, queued, and one waiting for space
    second = iter(loader)  # ends the first
    assert len(list(iterator)) == 0
    assert next(second).num_scenes == 4
    loader.close()


def test_a_cpu_prepares_each_batch_on_request(shards: Path) -> None:
    """Unless told otherwise: a step uses all cores."""
    with load(shards, prefetch=None) as loader, load(shards, prefetch=2) as ahead:
        for batch, expected in zip(islice(loader, 3), ahead, strict=False):
            assert_same(batch, expected)
    with load(shards, prefetch=None) as loader:
        next(iter(loader))
        assert not any(thread.name == "load" for thread in threading.enumerate())


def test_abandoning_an_iteration_stops_its_threads(shards: Path) -> None:
    loader = load(shards)
    for _ in loader:
        assert any(thread.name == "load" for thread in threading.enumerate())
        break
    assert not any(thread.name == "load" for thread in threading.enumerate())


def test_a_process_exits_without_closing_the_loader(shards: Path) -> None:
    code = (
        "from scenarioclip_fast.data import scene_loader\n"
        f"batches = iter(scene_loader({str(shards)!r}, 2, size={SIZE}, threads=1))\n"
        "next(batches)\n"
        "raise SystemExit(5)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 5


def test_the_image_cache_is_bounded(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(shards, drop_last=False, epochs=3, cache_gib=60_000 / 2**30, prefetch=0) as loader:
        decoded: list[int] = []
        decode = loader._decoder.decoder.decode
        monkeypatch.setattr(loader._decoder.decoder, "decode", lambda x: (decoded.append(len(x)), decode(x))[1])  # type: ignore[func-returns-value]
        list(loader)
        cached = len(loader._decoder.cache)
        assert 0 < sum(image.numel() for image in loader._decoder.cache.values()) <= 60_000
    assert 5 < cached < 30
    assert sum(decoded) == 30 + 2 * (30 - cached)


def test_invalid_arguments(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        load(tmp_path / "nothing")
    with pytest.raises(UserError, match="the val split has no scenes"):
        load(shards, split="val")
    with pytest.raises(
        UserError, match=r"has 30 scenes, expected at least 32 \(one global batch\): pack more scenes, or reduce"
    ):
        load(shards, 16, world_size=2)
    with pytest.raises(ValueError, match="epochs: got 0"):
        load(shards, epochs=0)
    with pytest.raises(ValueError, match="prefetch: got -1"):
        load(shards, prefetch=-1)
    with load(shards) as loader:
        with pytest.raises(UserError, match=r"has seed 6, this run has 5: resume with the same seed"):
            loader.load_state_dict({**loader.state_dict(), "seed": 6})
        with pytest.raises(UserError, match="belongs to other scenes or to another order"):
            loader.load_state_dict({**loader.state_dict(), "keys": 1})
        assert loader.vocabulary.actions == sorted(ACTIONS)


def test_config_fields_as_keywords(shards: Path) -> None:
    config = LoaderConfig(object_view="crop", threads=1)
    with scene_loader(shards, 4, config, size=SIZE, blur="reference") as loader:
        assert loader.config == replace(config, blur="reference")
    with pytest.raises(
        TypeError, match=r"scene_loader\(\) got an unexpected keyword argument 'blurr': did you mean blur\?"
    ):
        scene_loader(shards, 4, blurr="reference")


def test_on_bad_receives_the_bad_scenes_of_each_batch(damaged: Path) -> None:
    received: list[tuple[int, str]] = []

    def on_bad(epoch: int, samples: Sequence[BadSample]) -> None:
        received.extend((epoch, sample.key) for sample in samples)

    with load(damaged, 4, max_bad_fraction=0.5, epochs=2, drop_last=False, on_bad=on_bad) as loader:
        list(loader)
    assert sorted(received) == [(epoch, key) for epoch in (0, 1) for key in sorted(REASONS)]


def incomplete(masked: int) -> list[Scene]:
    """Eight scenes of which the odd ones have no action, and only the first `masked` have masks."""
    scenes = [make_scene(i) for i in range(8)]
    for i, scene in enumerate(scenes):
        scene.action = None if i % 2 else scene.action
        for entry in scene.objects:
            entry.mask = entry.mask if i < masked else None
    return scenes


def test_scenes_without_action_or_masks(tmp_path: Path) -> None:
    pack(
        incomplete(4), tmp_path, val=0.0, test=0.0, progress=False
    )  # 3 relations with masks in scenes 2 and 3, 3 without
    options: dict[str, Any] = {"size": SIZE, "decoder": "torch", "shuffle": False, "augment": False}
    with scene_loader(tmp_path, 8, **options) as loader:
        assert loader.notes() == [
            "4 of 8 scenes of the train split have no action: they have no global text",
            "3 of 6 relations of the train split have no masks: they are left out, because data.relation_view=focused "
            "needs masks",
        ]
        (batch,) = loader
        texts = loader.vocabulary
    assert batch.action_id.tolist() == [texts.action_id("resting") if i % 2 == 0 else -1 for i in range(8)]
    assert batch.action_scene is not None and batch.action_scene.tolist() == [0, 2, 4, 6]
    assert batch.host_ids[0].tolist() == [0, 0, 0, 0]
    assert batch.relation_scene.tolist() == [2, 3, 3]
    with scene_loader(tmp_path, 8, relation_view="box", **options) as loader:
        assert len(loader.notes()) == 1
        (batch,) = loader
    assert batch.relation_scene.tolist() == [2, 3, 3, 6, 7, 7]


def test_masks_that_no_relation_has(tmp_path: Path) -> None:
    pack(incomplete(0), tmp_path, val=0.0, test=0.0, progress=False)
    with pytest.raises(UserError, match=r"none of the 6 relations of the train split has masks.*: --relation-view"):
        scene_loader(tmp_path, 4)
    scene_loader(tmp_path, 4, relation_view="scene").close()


def test_pixel_format(shards: Path) -> None:
    with load(shards, dtype=torch.bfloat16, memory_format=torch.channels_last, size=24, object_view="crop") as loader:
        batch = next(iter(loader))
    assert batch.pixels.dtype == torch.bfloat16 and batch.pixels.shape[1:] == (3, 24, 24)
    assert batch.pixels.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"pixels: got 3 views"):
        Batch(batch.pixels[:3], *[getattr(batch, f.name) for f in fields(Batch)[1:7]])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_of_the_pixels_is_reused_after_the_batch(shards: Path, memory_format: torch.memory_format) -> None:
    options: dict[str, Any] = {"epochs": 3, "memory_format": memory_format}
    with load(shards, **options) as loader:
        kept = list(loader)  # batches that are kept keep their pixels
    addresses = set()
    with load(shards, **options) as loader:
        for i, batch in enumerate(loader):
            assert torch.equal(batch.pixels, kept[i].pixels)
            addresses.add(batch.pixels.data_ptr())
            del batch
    assert len({batch.pixels.data_ptr() for batch in kept}) == len(kept) > 12
    assert len(addresses) < len(kept) / 2


@pytest.mark.gpu
@pytest.mark.parametrize("decoder", DECODERS)
def test_batches_on_a_gpu(shards: Path, decoder: str) -> None:
    skip_missing(decoder)
    with load(shards, epochs=2) as on_cpu, load(shards, epochs=2, device="cuda", decoder=decoder) as on_gpu:
        for x, y in zip(on_cpu, on_gpu, strict=True):
            assert x.keys == y.keys and y.pixels.is_cuda
            # One level of rounding in nvJPEG is 0.015 here, and bicubic weights can double it. torchvision does not
            # interpolate chroma.
            assert (x.pixels - y.pixels.cpu()).abs().mean() < (0.2 if decoder == "torchvision" else 0.02)
