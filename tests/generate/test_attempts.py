"""Several processes may process a unit at once, as when a cluster takes a node for lost; a pass divides a cluster."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stand_in_stages import MODELS, read_records, read_trace, write_images

from scenarioclip_fast import ray_connection
from scenarioclip_fast.errors import MissingDependencyError, UserError
from scenarioclip_fast.generate import ray_run
from scenarioclip_fast.generate.config import GenerateConfig
from scenarioclip_fast.generate.images import Item, Unit
from scenarioclip_fast.generate.pipeline import Job, generate, process_unit
from scenarioclip_fast.generate.ray_run import Pool, StageActor, plan_pools
from scenarioclip_fast.generate.records import UnitFile, clear, is_finished
from scenarioclip_fast.generate.stages import Outcome

KEYS = ["a", "b", "c"]


def job_of(folder: Path, name: str = "caption", attempt: str = "", **sections: Any) -> Job:
    config = GenerateConfig.of(MODELS, sections)
    return Job(folder / "out", name, config, "cpu", factory="stand_in_stages", attempt=attempt)


def unit_of(images: Path) -> Unit:
    paths = sorted(images.iterdir())
    return Unit(0, tuple(Item(p.stem, p.name, str(p), -1, p.stat().st_size) for p in paths))


def attempt(directory: Path, name: str, inputs: str = "inputs") -> UnitFile:
    return UnitFile(directory, 0, inputs, KEYS, name)


def test_two_processes_process_a_unit_at_once(tmp_path: Path) -> None:
    images = write_images(tmp_path, 20)
    unit = unit_of(images)
    process_unit(job_of(tmp_path / "alone"), unit)
    (tmp_path / "trace").unlink()
    (tmp_path / "slow").write_text("0.05")
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=process_unit, args=(job_of(tmp_path, attempt=name), unit)) for name in ("aa", "bb")
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert read_records(tmp_path / "out") == read_records(tmp_path / "alone" / "out")
    writers = [step["pid"] for step in read_trace(tmp_path)]
    assert len(set(writers)) == 2 and writers != sorted(writers), "one began after the other had ended"


def test_the_first_to_finish_wins(tmp_path: Path) -> None:
    slow, fast = attempt(tmp_path, "aa"), attempt(tmp_path, "bb")
    assert slow.resume() == KEYS
    slow.append(Outcome("a", {"by": "slow"}))
    assert fast.resume() == ["b", "c"], "what another process has finished is used"
    assert not fast.append(Outcome("b", {"by": "fast"}))
    assert fast.append(Outcome("c", {"by": "fast"}))
    fast.finish()
    (path,) = tmp_path.iterdir()
    finished = path.read_bytes()
    slow.append(Outcome("b", {"by": "slow"}))
    assert slow.append(Outcome("c", {"by": "slow"}))
    slow.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["000000.jsonl"]
    assert path.read_bytes() == finished


def test_the_first_to_finish_wins_with_images_to_retry(tmp_path: Path) -> None:
    passing = Outcome("a", reason="server_error", detail="503", retry=True)
    slow, fast = attempt(tmp_path, "aa"), attempt(tmp_path, "bb")
    for file in (slow, fast):
        file.resume()
        for outcome in (passing, Outcome("b"), Outcome("c")):
            file.append(outcome)
    fast.finish()
    slow.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["000000.jsonl"]
    # A later attempt repeats the image and replaces the file.
    later = attempt(tmp_path, "cc")
    assert later.resume() == ["a"]
    assert later.append(Outcome("a", {"now": 1}))
    later.finish()
    assert is_finished(later.path, "inputs")
    assert attempt(tmp_path, "").found()["a"].result == {"now": 1}


def test_records_of_other_inputs_are_not_used(tmp_path: Path) -> None:
    old = attempt(tmp_path, "aa", "old")
    old.resume()
    old.append(Outcome("a"))
    assert attempt(tmp_path, "").resume() == KEYS
    assert attempt(tmp_path, "bb").resume() == KEYS
    clear(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_unit_that_kills_its_workers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = write_images(tmp_path, 4)
    row = {"unit": ray_run.pickle.dumps(unit_of(images)), "reports": ray_run.pickle.dumps([]), "error": b""}

    def die(job: Job, unit: Unit) -> Any:
        raise SystemExit

    job = job_of(tmp_path, attempt="12345678", ray={"retries": 2})
    for _ in range(3):
        with pytest.raises(SystemExit):
            StageActor(job, None, die)(row)
    error = ray_run.pickle.loads(StageActor(job, None, die)(row)["error"])
    assert isinstance(error, UserError)
    assert str(error).startswith("caption: the worker of unit 0 (000.jpg, ...) died 3 times, for lack of memory")
    with pytest.raises(SystemExit):  # another run begins anew
        StageActor(replace(job, attempt="87654321"), None, die)(row)


def test_files_of_other_nodes_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_connection, "_VISIBLE_S", 1.0)
    start = time.monotonic()
    ray_connection.await_files([tmp_path])  # no file: until the time is over
    assert 1.0 <= time.monotonic() - start < 10
    (tmp_path / "here").touch()
    start = time.monotonic()
    ray_connection.await_files([tmp_path / "here"] * 3)
    assert time.monotonic() - start < 0.5


def jobs_of(*names: str, device: str = "auto", **sections: Any) -> list[Job]:
    config = GenerateConfig.of(MODELS, sections)
    return [Job(Path("out"), name, config, device) for name in names]


ALL = ("caption", "ground", "segment")
SERVER = {"caption": {"url": "http://host:8000/v1"}}


@pytest.mark.parametrize(
    ("jobs", "cluster", "expected"),
    [
        # 8 GPUs: equal parts, the rest goes to whoever is busy. CPUs are not shared further.
        (jobs_of(*ALL), (64, 8), [Pool(2, 6, 1, 1)] * 3),
        # One GPU, or fewer than stages: shared.
        (jobs_of(*ALL), (8, 1), [Pool(1, 1, 1, 0.33)] * 3),
        (jobs_of(*ALL), (8, 2), [Pool(1, 2, 1, 0.5)] * 3),
        # A server needs no GPU here, and a few actors that share its requests.
        (jobs_of(*ALL, **SERVER), (64, 8), [Pool(4, 4, 1, 0), Pool(4, 7, 1, 1), Pool(4, 7, 1, 1)]),
        (jobs_of("caption", caption={**SERVER["caption"], "concurrency": 2}), (64, 0), [Pool(2, 2, 1, 0)]),
        # CPUs only.
        (jobs_of(*ALL), (12, 0), [Pool(4, 10, 1, 0)] * 3),
        (jobs_of(*ALL, device="cpu"), (12, 8), [Pool(4, 10, 1, 0)] * 3),
        (jobs_of("curate"), (12, 8), [Pool(12, 12, 1, 0)]),
        # Too few CPUs: each actor still finds its place.
        (jobs_of(*ALL), (1, 0), [Pool(1, 1, 0.16, 0)] * 3),
        # What was asked for.
        (jobs_of(*ALL, ray={"caption": 3, "gpus": 0.5}), (64, 8), [Pool(3, 3, 1, 0.5), *[Pool(5, 14, 1, 0.5)] * 2]),
    ],
)
def test_a_cluster_is_divided(jobs: list[Job], cluster: tuple[float, float], expected: list[Pool]) -> None:
    assert plan_pools(jobs, *cluster, units=1000) == expected


def test_no_more_actors_than_units() -> None:
    assert plan_pools(jobs_of(*ALL), 64, 8, units=1) == [Pool(1, 1, 1, 1)] * 3


def test_gpus_that_do_not_exist() -> None:
    with pytest.raises(UserError, match=r"^device: got cuda, but the nodes of the Ray cluster offer no GPUs"):
        plan_pools(jobs_of(*ALL, device="cuda"), 8, 0, units=9)
    with pytest.raises(UserError, match=r"^ray.gpus: got 4, but the nodes of the Ray cluster offer 2 GPUs"):
        plan_pools(jobs_of("ground", ray={"gpus": 4.0}), 8, 2, units=9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:1"}, "device: got 'cuda:1', expected auto, cpu or cuda: Ray assigns the GPUs"),
        ({"config": {"ray": {"ground": -1}}}, "ray.ground: got -1, expected at least 0"),
        ({"config": {"ray": {"cpus": 0}}}, "ray.cpus: got 0, expected above 0"),
    ],
)
def test_wrong_settings(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        config = GenerateConfig.of(MODELS, options.pop("config", {}))
        generate(write_images(tmp_path, 1), tmp_path / "out", config, ray="", **options)


def test_ray_is_needed_only_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    images = write_images(tmp_path, 2)
    stages = ("caption",)
    config = GenerateConfig.of(MODELS)
    generate(images, tmp_path / "out", config, stages=stages, factory="stand_in_stages", progress=False)
    with pytest.raises(MissingDependencyError, match=r"^ray is not installed .*'scenarioclip-fast\[generate-ray\]'$"):
        generate(images, tmp_path / "out", config, stages=stages, ray="")


def test_requests_in_flight_are_divided() -> None:
    (job,) = jobs_of("caption", caption={**SERVER["caption"], "concurrency": 10})
    assert ray_run._share(job, 4).config.caption.concurrency == 3
    (local,) = jobs_of("caption")
    assert ray_run._share(local, 4) is local


def test_errors_arrive_as_they_were_raised() -> None:
    def back(error: Exception) -> Exception:
        found: Exception = ray_run.pickle.loads(ray_connection.dump_error(error))
        return found

    assert repr(back(UserError("no such model"))) == repr(UserError("no such model"))
    assert not getattr(back(UserError("no such model")), "__notes__", ())
    other = back(ZeroDivisionError("division"))
    assert isinstance(other, ZeroDivisionError) and "on node " in other.__notes__[0]

    class Local(Exception):  # cannot be unpickled elsewhere
        pass

    make: Callable[[], Exception] = Local
    assert str(back(make())).splitlines()[1].startswith("on node ")
