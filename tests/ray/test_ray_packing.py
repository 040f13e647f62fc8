"""Packing on a Ray cluster of two nodes on this machine: the pack is that of any other number of parts."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scenarioclip_fast.cli.main import main
from scenarioclip_fast.data import generate_scenes, merge_parts, pack, pack_on_ray
from scenarioclip_fast.data.synthetic import write_published_layout

ray = pytest.importorskip("ray", reason="Ray is not installed: make test-ray")
from ray.cluster_utils import Cluster  # noqa: E402

NODE = {"num_cpus": 1, "object_store_memory": 100 << 20}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    started = Cluster(initialize_head=True, head_node_args=NODE)
    started.add_node(**NODE)
    started.wait_for_nodes()
    yield started
    ray.shutdown()
    started.shutdown()


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def kill_the_first_worker(out: Path, killed: list[int]) -> None:
    """Kill the process that holds a part, once it has finished a unit."""
    while not killed:
        for lock in out.glob(".parts/*/lock"):
            if list(lock.parent.glob("unit-*.json")) and not (lock.parent / "done.json").exists():
                for process in Path("/proc").glob("[0-9]*"):
                    try:
                        held = any(os.path.realpath(fd) == str(lock) for fd in (process / "fd").iterdir())
                    except OSError:
                        continue
                    if held and int(process.name) != os.getpid():
                        os.kill(int(process.name), signal.SIGKILL)
                        killed.append(int(process.name))
                        return
        time.sleep(0.002)


def test_the_pack_is_that_of_any_number_of_parts(cluster: Cluster, tmp_path: Path, capfd: Any) -> None:
    scenes, options = 400, {"shard_size": 10, "split": "hash"}
    write_published_layout(generate_scenes(scenes, seed=3), tmp_path / "set")
    bad = tmp_path / "set" / "images"
    for path in sorted(bad.iterdir())[::9]:
        path.write_bytes(path.read_bytes()[:400])
    pack(tmp_path / "set", tmp_path / "one", part=(1, 1), progress=False, **options)
    merge_parts(tmp_path / "one", progress=False)
    expected = contents(tmp_path / "one")
    out = tmp_path / "out"
    killed: list[int] = []
    thread = threading.Thread(target=kill_the_first_worker, args=(out, killed), daemon=True)
    thread.start()
    report = pack_on_ray(tmp_path / "set", out, cluster.address, progress=False, **options)
    assert killed, "no worker was killed while it packed"
    assert contents(out) == expected
    assert sum(counts["scenes"] for counts in report.splits.values()) == scenes - len(range(0, scenes, 9))
    # Nothing is left to do; another number of parts gives the same; an error of a part is one line.
    command = ["pack", str(tmp_path / "set"), "--ray", cluster.address, "--split", "hash", "--shard-size", "10"]
    capfd.readouterr()
    assert main([*command, "--out", str(out)]) == 0
    assert "up to date" in capfd.readouterr().err and contents(out) == expected
    assert main([*command, "--out", str(tmp_path / "five"), "--parts", "5", "--workers", "2"]) == 0
    assert contents(tmp_path / "five") == expected
    metadata = next((tmp_path / "set").glob("metadata*.json"))
    metadata.write_text(json.dumps({"data": 3}))
    capfd.readouterr()
    assert main([*command, "--out", str(tmp_path / "bad")]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("packing")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and "metadata" in lines[0]


def test_tars_on_urls(cluster: Cluster, tmp_path: Path) -> None:
    for name in ("train-0", "val-0", "test-0"):
        pack(generate_scenes(6, seed=len(name)), tmp_path / name, split="hash", val=0, test=0, progress=False)
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / name / "train-000000.tar").rename(tmp_path / "set" / f"{name}.tar")
    urls = [path.as_uri() for path in (tmp_path / "set").iterdir()]
    pack(urls, tmp_path / "one", progress=False)
    pack_on_ray(urls, tmp_path / "out", cluster.address, progress=False)
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
    assert pack_on_ray(urls, tmp_path / "out", cluster.address, progress=False).up_to_date
    out = (tmp_path / "stored").as_uri()
    assert pack_on_ray(urls, out, cluster.address, parts=2, progress=False).directory == out
    assert contents(tmp_path / "stored") == contents(tmp_path / "one")
    assert pack_on_ray(urls, out, cluster.address, progress=False).up_to_date
