"""A data set of many scenes: opening its index, the order of an epoch, and where a scene lies.

The index is synthetic: shards of 1,000 scenes with keys of 16 bytes, no tars. The baselines are the forms of earlier
versions: index.json, at most of a million scenes, and an order that sorts all scenes.

Run: make bench, or: scenarioclip-fast bench index --scenes 100000000 (4 GB below $TMPDIR, about two minutes to write)
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scenarioclip_fast.benchmarks.timing import WARM, sized

from scenarioclip_fast.data.index import IndexWriter
from scenarioclip_fast.data.order import Kind, Mix, Order
from scenarioclip_fast.data.permutation import permutation
from scenarioclip_fast.data.shards import SPLITS, ShardSet
from scenarioclip_fast.terminal import echo

SCENES = int(os.environ.get("SCENARIOCLIP_FAST_BENCH_SCENES", sized(1_000_000, 5_000)))
SHARD, KEY_BYTES = 1000, 16
JSON_SCENES = min(SCENES, 1_000_000)
BATCH, POSITIONS, LOOKUPS = 128, 4096, 1000
WINDOW = 64
WORLD = 8  # the order is that of one of these ranks


def write(folder: Path, scenes: int, *, binary: bool = True) -> Path:
    """Write the index and the manifest of a data set."""
    folder.mkdir()
    digits = 10 ** np.arange(KEY_BYTES - 7, dtype=np.int64)[::-1]
    image_size = np.full(SHARD, 100_000)
    image = 1 + np.arange(SHARD, dtype=np.int64) * 200
    shards, rows = [], {}
    with (folder / "index.bin").open("wb") as file:
        writer = IndexWriter(file, SPLITS)
        for first in range(0, scenes, SHARD):
            n = min(SHARD, scenes - first)
            keys = np.full((n, KEY_BYTES), ord("-"), np.uint8)
            keys[:, :5] = np.frombuffer(b"scene", np.uint8)
            keys[:, 7:] = (first + np.arange(n)[:, None]) // digits % 10 + ord("0")
            name = f"train-{first // SHARD:06d}.tar"
            sha256 = hashlib.sha256(name.encode()).hexdigest()
            shards.append({"name": name, "sha256": sha256, "bytes": 200 * 512 * (n + 1), "scenes": n})
            ends = KEY_BYTES * np.arange(1, n + 1)
            if binary:
                writer.add_arrays("train", sha256, keys.tobytes(), ends, image[:n], image_size[:n], np.full(n, 900))
            else:
                texts = [bytes(key).decode() for key in keys]
                at = (512 * image).tolist()
                rows[name] = [[text, o, 100_000, o + 100_864, 900] for text, o in zip(texts, at, strict=False)]
        writer.finish()
    splits = {split: {"scenes": 0, "shards": []} for split in SPLITS}
    splits["train"] = {"scenes": scenes, "shards": shards}
    manifest: dict[str, Any] = {"schema": 2, "splits": splits}
    if binary:
        manifest["index"] = {"bytes": (folder / "index.bin").stat().st_size}
    else:
        (folder / "index.bin").unlink()
        (folder / "index.json").write_text(json.dumps({"schema": 2, "shards": rows}, separators=(",", ":")))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("index") / "binary", SCENES)


def measure(benchmark: Any, run: Callable[[], Any], *, group: str, form: str, rounds: int = 20, **extra: Any) -> None:
    benchmark.group, benchmark.extra_info["form"] = group, form
    benchmark.pedantic(run, rounds=1 if WARM else sized(rounds, 1), warmup_rounds=0 if WARM else 1)
    benchmark.extra_info |= extra


def in_a_process(folder: Path, scenes: int) -> dict[str, float]:
    """Memory of a process that opens the data set and locates random scenes, in MiB: see `memory`."""
    command = [sys.executable, "-m", "scenarioclip_fast.benchmarks.bench_index", str(folder), str(scenes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_open(folder: Path, benchmark: Any) -> None:
    """And check that each key is found where it is."""
    shards = ShardSet(folder)
    for i in np.random.default_rng(0).integers(0, SCENES, 100).tolist():
        assert shards.keys[i] == f"scene--{i:09d}" and shards.find(shards.keys[i]) == i
    size = (folder / "index.bin").stat().st_size - KEY_BYTES * SCENES
    extra: dict[str, Any] = {
        "bytes per scene, without its key": round(size / SCENES, 3),
        **in_a_process(folder, SCENES),
    }
    measure(benchmark, lambda: ShardSet(folder), group=f"index of {SCENES:,} scenes, open", form="index.bin", **extra)
    report(benchmark, 1, "to open")


def test_open_json(tmp_path: Path, benchmark: Any) -> None:
    old = write(tmp_path / "json", JSON_SCENES, binary=False)
    size = (old / "index.json").stat().st_size - KEY_BYTES * JSON_SCENES
    extra: dict[str, Any] = {"bytes per scene, without its key": round(size / JSON_SCENES, 3)}
    extra |= in_a_process(old, JSON_SCENES)
    group = f"index of {JSON_SCENES:,} scenes, open"
    measure(benchmark, lambda: ShardSet(old), group=group, form="index.json", rounds=3, **extra)
    report(benchmark, 1, "to open")


def order_of(kind: Kind) -> Order:
    sizes = np.full(-(-SCENES // SHARD), SHARD)
    sizes[-1] = SCENES - SHARD * (len(sizes) - 1)
    return Order(Mix((SCENES,), (1.0,)), BATCH, 1, 3, WORLD, kind, shards=(sizes,), window=WINDOW)


@pytest.mark.parametrize("kind", ["scenes", "shards", "sorted"])
def test_first_batch(kind: Kind, benchmark: Any) -> None:
    """Nothing of the order is there before."""

    def run() -> Any:
        permutation.cache_clear()
        return order_of(kind).share(5)[:BATCH]

    group = f"order of {SCENES:,} scenes, first batch of {BATCH}"
    measure(benchmark, run, group=group, form=kind, rounds=3 if kind == "sorted" else 20)
    report(benchmark, 1, "to the first batch")


@pytest.mark.parametrize("kind", ["scenes", "shards", "sorted"])
def test_positions(kind: Kind, benchmark: Any) -> None:
    share = order_of(kind).share(5)
    positions = min(POSITIONS, len(share))
    # How many shards a global batch and a window's worth of scenes touch.
    everything = order_of(kind).epoch(5)
    touched = {}
    for count in (BATCH * WORLD, WINDOW * SHARD // 2):
        at = everything(np.arange(min(count, SCENES)))
        touched[f"shards of {count:,} consecutive scenes"] = len(np.unique(at // SHARD))
    group = f"order of {SCENES:,} scenes, {positions:,} positions"
    measure(benchmark, lambda: share[:positions], group=group, form=kind, **touched)
    report(benchmark, max(positions, 1), "a position")  # of fewer scenes than ranks, this one may have none


@pytest.mark.parametrize("what", ["locate", "find"])
def test_lookup(folder: Path, what: str, benchmark: Any) -> None:
    shards = ShardSet(folder)
    numbers = np.random.default_rng(1).integers(0, SCENES, LOOKUPS).tolist()
    keys = [shards.keys[i] for i in numbers]

    def run() -> Any:
        return [shards.keys[i] for i in numbers] if what == "locate" else [shards.find(key) for key in keys]

    measure(benchmark, run, group=f"index of {SCENES:,} scenes, {LOOKUPS:,} lookups", form=what)
    report(benchmark, LOOKUPS, "a lookup")


def report(benchmark: Any, count: int, what: str) -> None:
    if benchmark.stats is not None:  # None with --benchmark-disable
        seconds = benchmark.stats.stats.median / count
        time = f"{seconds:.3g} s" if seconds > 0.1 else f"{1e6 * seconds:.3g} us"
        extra = ", ".join(f"{name} {value}" for name, value in benchmark.extra_info.items() if name != "form")
        echo(f"{benchmark.name}: {time} {what}{f' ({extra})' if extra else ''}")


def memory(folder: Path, scenes: int) -> dict[str, float]:
    """Open a data set and locate 1,000 random scenes; return what that adds to this process, in MiB.

    `private` is its own memory; `resident` includes the pages of the index, which the processes of a host share.
    """

    def now() -> dict[str, int]:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
        sizes = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)}
        return {"resident": sizes["Rss"], "private": sizes["Anonymous"]}

    before = now()
    shards = ShardSet(folder)
    for i in np.random.default_rng(2).integers(0, scenes, 1000).tolist():
        assert shards.keys[i]
    return {f"{name}, MiB": round((size - before[name]) / 1024, 1) for name, size in now().items()}


if __name__ == "__main__":
    print(json.dumps(memory(Path(sys.argv[1]), int(sys.argv[2]))))
