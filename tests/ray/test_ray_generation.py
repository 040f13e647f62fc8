"""Generation on a Ray cluster of two nodes on this machine: the records are those of a local run, whatever dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import stand_in_stages
from stand_in_stages import MODELS, read_records, read_trace, write_images

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.generate.config import GenerateConfig
from scenarioclip_fast.generate.pipeline import RECORDED, GenerateReport, generate

ray = pytest.importorskip("ray", reason="Ray is not installed: make test-ray")
from ray.cluster_utils import Cluster  # noqa: E402

# Every actor is a process of 300 MB that imports torch; stages of two actors show that units are divided.
ACTORS = {"ray": {"caption": 1, "ground": 2, "segment": 1, "curate": 1, "cpus": 0.5}}
CONFIG = GenerateConfig.of(MODELS, ACTORS)
TWO = ("caption", "ground")
NODE = {"num_cpus": 3, "object_store_memory": 100 << 20}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head and one node with a GPU in name only."""
    support = str(Path(stand_in_stages.__file__).parent)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([support, before] if before else [support])
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # A dead node is noticed in 2 s instead of 15.
    options = {"health_check_period_ms": 500, "health_check_failure_threshold": 3, "health_check_initial_delay_ms": 0}
    started = Cluster(initialize_head=True, head_node_args={**NODE, "_system_config": options})
    started.add_node(**NODE, num_gpus=1)
    started.wait_for_nodes()
    yield started
    ray.shutdown()
    started.shutdown()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def run(images: Path, out: Path, address: str | None = None, config: GenerateConfig = CONFIG, **options: Any) -> Any:
    options = {"device": "cpu", "stages": RECORDED, "unit_size": 4, **options}
    return generate(images, out, config, ray=address, factory="stand_in_stages", progress=False, **options)


def assert_silent(capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing is printed, but for messages that a thread of Ray prints at any time, which cannot be switched off."""
    out, err = capfd.readouterr()
    assert [line for line in out.splitlines() if "(raylet)" not in line] == [] and err == ""


def local_records(folder: Path, images: Path, **options: Any) -> tuple[dict[str, bytes], GenerateReport]:
    report = run(images, folder / "local", **options)
    (folder / "trace").unlink()
    return read_records(folder / "local"), report


def as_counts(report: GenerateReport) -> list[tuple[Any, ...]]:
    return [(stage.name, stage.images, stage.rejected) for stage in report.stages]


def when(condition: Callable[[], bool], action: Callable[[], None]) -> threading.Thread:
    def watch() -> None:
        while not condition():
            time.sleep(0.1)
        action()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_the_records_are_those_of_a_local_run(
    cluster: Cluster, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images = write_images(tmp_path, 40)
    expected, local = local_records(tmp_path, images)
    capfd.readouterr()
    report = run(images, tmp_path / "out", cluster.address)
    assert read_records(tmp_path / "out") == expected
    assert as_counts(report) == as_counts(local)
    assert [stage.counts for stage in report.stages] == [stage.counts for stage in local.stages]
    assert_silent(capfd)
    trace = read_trace(tmp_path)
    assert len(trace) == sum(stage.images for stage in report.stages), "an image was processed twice"
    assert len({step["pid"] for step in trace}) == 5
    # Nothing is left to do.
    again = run(images, tmp_path / "out", cluster.address)
    assert [stage.images for stage in again.stages] == [0, 0, 0, 0]
    assert read_records(tmp_path / "out") == expected


def test_killed_workers(cluster: Cluster, tmp_path: Path) -> None:
    images = write_images(tmp_path, 16)
    expected, local = local_records(tmp_path, images, stages=TWO)
    for stage in TWO:
        (tmp_path / f"kill-{stage}").touch()
    report = run(images, tmp_path / "out", cluster.address, stages=TWO)
    assert not list(tmp_path.glob("kill-*"))
    assert read_records(tmp_path / "out") == expected
    assert as_counts(report) == as_counts(local)


def test_a_lost_node(cluster: Cluster, tmp_path: Path) -> None:
    images = write_images(tmp_path, 40)
    expected, local = local_records(tmp_path, images, stages=TWO)
    (tmp_path / "slow").write_text("0.2")
    node = cluster.add_node(num_cpus=1, object_store_memory=100 << 20, resources={"away": 1})
    cluster.wait_for_nodes()
    config = GenerateConfig.of(MODELS, {"ray": {"caption": 4, "ground": 3, "segment": 0, "cpus": 1}})

    def works_there() -> bool:
        return any(step["node"] == node.node_id for step in read_trace(tmp_path))

    thread = when(works_there, lambda: cluster.remove_node(node, allow_graceful=False))
    report = run(images, tmp_path / "out", cluster.address, config, stages=TWO)
    thread.join(timeout=1)
    assert not thread.is_alive(), "no stage ran on the node"
    assert read_records(tmp_path / "out") == expected
    assert as_counts(report) == as_counts(local)


def test_an_error_of_a_stage_ends_the_run_in_one_line(
    cluster: Cluster, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images = write_images(tmp_path, 16)
    expected, _ = local_records(tmp_path, images, stages=TWO)
    (tmp_path / "fail-ground").touch()
    capfd.readouterr()
    with pytest.raises(UserError) as caught:
        run(images, tmp_path / "out", cluster.address, stages=TWO)
    assert str(caught.value) == "ground: the server is down\\n"
    assert_silent(capfd)
    (tmp_path / "fail-ground").unlink()
    assert any(name.startswith("caption/") for name in read_records(tmp_path / "out"))
    run(images, tmp_path / "out", cluster.address, stages=TWO)
    assert read_records(tmp_path / "out") == expected


def test_a_killed_driver(cluster: Cluster, tmp_path: Path) -> None:
    images = write_images(tmp_path, 16)
    expected, _ = local_records(tmp_path, images, stages=TWO)
    (tmp_path / "slow").write_text("0.3")
    script = (
        "import sys; from pathlib import Path; from test_ray_generation import TWO, run\n"
        "run(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], stages=TWO)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{os.environ['PYTHONPATH']}"}
    command = [sys.executable, "-c", script, images, tmp_path / "out", cluster.address]
    driver = subprocess.Popen(command, env=environment, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out" / "ground").glob("*.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    done = read_records(tmp_path / "out")
    assert any(name.startswith("ground/") for name in done), "the driver was killed before anything was finished"
    assert done != expected, "the driver was killed too late"
    (tmp_path / "slow").unlink()
    run(images, tmp_path / "out", cluster.address, stages=TWO)
    assert read_records(tmp_path / "out") == expected


def test_gpus_are_assigned_by_ray(cluster: Cluster, tmp_path: Path) -> None:
    """The cluster's only GPU exists in name, so that the stages find no CUDA and use the CPU."""
    images = write_images(tmp_path, 4)
    run(
        images,
        tmp_path / "out",
        cluster.address,
        GenerateConfig.of(MODELS),
        device="auto",
        stages=TWO,
    )
    trace = read_trace(tmp_path)
    assert {step["stage"]: step["visible"] for step in trace} == {"caption": "0", "ground": "0"}
    assert {step["device"] for step in trace} == {"cpu"}
    assert len({step["node"] for step in trace}) == 1


def test_a_directory_that_not_all_nodes_see(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = write_images(tmp_path, 4)
    monkeypatch.chdir(tmp_path)
    out = Path("/proc/self/cwd/out")  # another folder in every process
    with pytest.raises(UserError, match=r"^ray: node [0-9.]+ does not see /proc/self/cwd/out; DIR and the images must"):
        run(images, out, cluster.address)
    assert not list((tmp_path / "out").glob(".*"))


def test_a_worker_that_always_dies(cluster: Cluster, tmp_path: Path) -> None:
    images = write_images(tmp_path, 4)
    config = GenerateConfig.of(MODELS, ACTORS, {"ray": {"retries": 0}})
    (tmp_path / "kill-caption").touch()
    with pytest.raises(UserError, match=r"^caption: the worker of unit 0 \(000.jpg, ...\) died 1 times, for lack of"):
        run(images, tmp_path / "out", cluster.address, config, stages=("caption",))
    report = run(images, tmp_path / "out", cluster.address, config, stages=("caption",))  # earlier runs do not count
    assert report.stages[0].images == 4


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:port", "ray://127.0.0.1:10001"])
def test_no_cluster(tmp_path: Path, address: str) -> None:
    with pytest.raises(UserError, match=r"^ray: (cannot connect to a Ray cluster at 127|got ray://127.* Ray Client)"):
        run(write_images(tmp_path, 1), tmp_path / "out", address)
