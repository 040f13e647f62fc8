"""Ranks that were not started alike end before the first step, with the reason."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from campaign import LONG
from packs import read_rows, write_rows
from torch.distributed import HashStore, TCPStore
from training_runs import SMALL

from scenarioclip_fast.data import Scene, generate_scenes, pack
from scenarioclip_fast.distributed import RankComparison
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.train.config import TrainConfig

Make = Callable[..., TrainConfig]
SHORT_S = 30  # far below run.timeout_s: ranks must not end by a timeout
# The options of the last rank, and the named difference.
SETTINGS: list[tuple[list[str], str]] = [
    (["optim.lr=1e-2"], "optim.lr is 0.001 on rank 0 and 0.01 on rank 1"),
    (["train.accumulate=2"], "train.accumulate is 1 on rank 0 and 2 on rank 1"),
    (["model.text.width=64", "model.embed_dim=48"], "model.embed_dim is 32 on rank 0 and 48 on rank 1; model.text"),
    (["train.parallel=fsdp"], "train.parallel is ddp on rank 0 and fsdp on rank 1"),
    (["--resume"], "--resume is no on rank 0 and auto on rank 1"),
]
MORE_SETTINGS: list[tuple[list[str], str]] = [
    (["run.seed=1"], "run.seed is 0 on rank 0 and 1 on rank 1"),
    (["run.backend=reference"], "run.backend is auto on rank 0 and reference on rank 1"),
    (["run.precision=bf16"], "run.precision is float32 on rank 0 and bf16 on rank 1"),
    (["run.timeout_s=5"], "run.timeout_s is 600.0 on rank 0 and 5.0 on rank 1"),
    (["run.dir=elsewhere"], "run.dir is "),
    (["data.batch_size=16"], "data.batch_size is 8 on rank 0 and 16 on rank 1"),
    (["data.relation_view=box"], "data.relation_view is focused on rank 0 and box on rank 1"),
    (["model.vision.layers=2"], "model.vision.layers is 1 on rank 0 and 2 on rank 1"),
    (["loss.distillation_scale=0"], "loss.distillation_scale is 1.0 on rank 0 and 0.0 on rank 1"),
    (["optim.name=sgd"], "optim.name is adamw on rank 0 and sgd on rank 1"),
    (["train.log_every=2"], "train.log_every is 3 on rank 0 and 2 on rank 1"),
    (["train.checkpoint_every=2"], "train.checkpoint_every is 1000 on rank 0 and 2 on rank 1"),
    (["train.steps=9"], "train.steps is 4 on rank 0 and 9 on rank 1"),
    (["--resume", "best"], "--resume is no on rank 0 and best on rank 1"),
    (["--resume", "absent/step-00000001"], "--resume is no on rank 0 and absent/step-00000001 on rank 1"),
]


def errors(running: Any, ranks: int = 2) -> list[str]:
    """The error lines of a run that must end at once, on every rank, before the first step."""
    started = time.monotonic()
    codes = running.wait(SHORT_S)
    text = running.text()
    assert codes == [2] * ranks, (codes, text)
    assert time.monotonic() - started < SHORT_S
    assert "Traceback" not in text and "step 1/" not in text, text
    return [line for line in text.splitlines() if line.startswith("error")]


def assert_all_name(running: Any, difference: str, ranks: int = 2) -> None:
    lines = errors(running, ranks)
    assert len(lines) == ranks and len(set(lines)) == 1, lines
    assert lines[0].startswith(f"error: ranks disagree: {difference}"), lines[0]


@pytest.mark.parametrize(("options", "difference"), SETTINGS + MORE_SETTINGS * LONG)
def test_ranks_with_different_settings(small: Make, fork_server: Any, options: list[str], difference: str) -> None:
    config = small("train.steps=4")
    assert_all_name(fork_server.start(config, ranks=2, last_rank=options), difference)
    assert not (Path(config.run.dir) / "metrics.jsonl").exists()


def test_ranks_that_resume_from_different_checkpoints(small: Make, fork_server: Any) -> None:
    running = fork_server.start(small("train.steps=4"), "--resume", ranks=2, last_rank=["--resume", "best"])
    assert_all_name(running, "--resume is auto on rank 0 and best on rank 1")


def test_every_rank_names_the_one_of_three_that_differs(small: Make, fork_server: Any) -> None:
    config = small("train.steps=4", "data.batch_size=9")
    running = fork_server.start(config, ranks=3, last_rank=["optim.lr=1"])
    assert_all_name(running, "optim.lr is 0.001 on rank 0 and 1.0 on rank 2: start all ranks with", ranks=3)


def test_many_differences_are_counted(small: Make, fork_server: Any) -> None:
    options = ["run.seed=1", "optim.lr=1", "optim.eps=1", "optim.warmup=0", "optim.clip_norm=2"]
    (line, _) = errors(fork_server.start(small("train.steps=4"), ranks=2, last_rank=options))
    assert line.count(" on rank 0 and ") == 3 and "; and 2 more: start all ranks" in line


def test_resources_of_a_rank_may_differ(small: Make, fork_server: Any, tmp_path: Path, shards: Path) -> None:
    (tmp_path / "link").symlink_to(shards)
    own = ["data.threads=2", "data.prefetch=1", "data.cache_gib=1", f"data.shard_cache_dir={tmp_path}/cache"]
    own += ["data.shard_cache_gib=1", f"data.shards={tmp_path / 'link'}", "run.device=auto"]
    fork_server.start(small("train.steps=2"), ranks=2, last_rank=own).finish()


def test_copies_with_and_without_views(small: Make, fork_server: Any, tmp_path: Path, shards: Path) -> None:
    """By which scenes are distributed over the ranks."""
    old = Path(shutil.copytree(shards, tmp_path / "old"))
    manifest = json.loads((old / "manifest.json").read_text())
    del manifest["sha256"]["views.bin"]
    (old / "manifest.json").write_text(json.dumps(manifest))
    options = [f"data.shards={old}"]
    running = fork_server.start(small("train.steps=4"), ranks=2, last_rank=options)
    assert_all_name(running, "whether data.shards have views.bin is true on rank 0 and false on rank 1")
    config = small("train.steps=2", "data.balance=false", run="unbalanced")
    fork_server.start(config, ranks=2, last_rank=options).finish()


def scenes(number: int) -> list[Scene]:
    return [*generate_scenes(number, seed=0, val=0.0, test=0.0)]


def packed(directory: Path, contents: Sequence[Scene]) -> Path:
    pack(contents, directory)
    return directory


def reordered(directory: Path, shards: Path) -> None:
    """The same scenes in another order of the index."""
    directory.mkdir()
    for path in shards.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    write_rows(directory, {name: rows[::-1] for name, rows in read_rows(directory).items()})


@pytest.mark.parametrize("kind", ["scenes", "order", "contents"])
def test_ranks_with_different_data(small: Make, fork_server: Any, tmp_path: Path, shards: Path, kind: str) -> None:
    other, difference = tmp_path / "other", "checksum of the keys"
    if kind == "order":
        reordered(other, shards)
    elif kind == "scenes":
        packed(other, scenes(18))
        difference = "number of scenes"
    else:
        packed(other, [replace(scene, image=255 - scene.image) for scene in scenes(20)])
        difference = "checksum of the contents"
    running = fork_server.start(small("train.steps=4"), ranks=2, last_rank=[f"data.shards={other}"])
    assert_all_name(running, f"the {difference}")


def test_ranks_with_different_mixes(small: Make, fork_server: Any, tmp_path: Path, shards: Path) -> None:
    other = packed(tmp_path / "other", scenes(12))
    config = small("train.steps=4", f"data.shards=[{{path: {shards}}}, {{path: {other}, weight: 2}}]")
    weights = [f"data.shards=[{{path: {shards}}}, {{path: {other}, weight: 3}}]"]
    running = fork_server.start(config, ranks=2, last_rank=weights)
    assert_all_name(running, "the weights in data.shards is [1.0, 2.0] on rank 0 and [1.0, 3.0] on rank 1")


def test_ranks_with_different_backends(small: Make, fork_server: Any) -> None:
    config = small("train.steps=4")
    running = fork_server.start(config, ranks=2, last_env={"SCENARIOCLIP_FAST_BACKEND": "reference"})
    lines = errors(running)
    assert len(set(lines)) == 1 and re.search(r"the backend of \w+ is cpu on rank 0 and reference on rank 1", lines[0])


def test_ranks_with_different_weights_to_start_from(small: Make, fork_server: Any, tmp_path: Path) -> None:
    models = []
    for seed in (0, 1):
        config = small("train.steps=1", f"run.seed={seed}", run=f"seed-{seed}")
        fork_server.start(config).finish()
        models.append(Path(config.run.dir) / "model")
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    # The same relative path in two working directories, as with local copies on two hosts.
    for name, model in zip("ab", models, strict=True):
        (tmp_path / name / "model").symlink_to(model)
    config = small("train.steps=2", "model.init=model")
    running = fork_server.start(config, ranks=2, directory=tmp_path / "a", last_directory=tmp_path / "b")
    assert_all_name(running, "the checksum of the weights is ")


# Rank 0 of 3 keeps its store for some seconds for the third.
@pytest.mark.parametrize(("first", "last"), [(2, 3), *[(3, 2)] * LONG])
def test_ranks_with_different_world_sizes(small: Make, fork_server: Any, first: int, last: int) -> None:
    environment = {"WORLD_SIZE": str(last)}
    config = small("train.steps=4", "data.batch_size=12")
    running = fork_server.start(config, ranks=2, env={"WORLD_SIZE": str(first)}, last_env=environment)
    assert_all_name(running, f"WORLD_SIZE is {first} on rank 0 and {last} on rank 1")


def test_two_processes_with_the_same_rank(small: Make, fork_server: Any) -> None:
    config = small("train.steps=4", "data.batch_size=12")
    running = fork_server.start(config, ranks=3, last_env={"RANK": "1"})
    codes = running.wait(SHORT_S)
    assert sorted(codes) == [1, 1, 2], running.text()
    assert "error: two processes have RANK=1" in running.text()


@pytest.mark.parametrize(("rank", "name"), [("2", "2"), ("-1", "-1"), ("abc", "-1"), ("1.0", "-1")])
def test_a_rank_outside_the_world(small: Make, fork_server: Any, rank: str, name: str) -> None:
    running = fork_server.start(small("train.steps=4"), ranks=2, last_env={"RANK": rank})
    assert running.wait(SHORT_S) == [1, 2]
    message = f"RANK: got {rank}, expected 0 to 1, as WORLD_SIZE is 2"
    assert f"error: {message}" in running.text()
    assert f"rank 0 cannot continue: rank {name} ended with UserError: {message}" in running.text()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MASTER_PORT": "abc"}, "MASTER_PORT: got 'abc', expected a number, as torchrun sets it"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT: got 70000, expected at most 65535"),
        ({"MASTER_PORT": ""}, "WORLD_SIZE is 2, but MASTER_PORT is not set: start the ranks with torchrun"),
        ({"MASTER_ADDR": ""}, "WORLD_SIZE is 2, but MASTER_ADDR is not set: start the ranks with torchrun"),
        ({"RANK": ""}, "WORLD_SIZE is 2, but RANK is not set: start the ranks with torchrun"),
    ],
)
def test_an_invalid_rendezvous(small: Make, fork_server: Any, variables: dict[str, str], message: str) -> None:
    place = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    running = fork_server.start(small("train.steps=4"), env={**place, **variables})
    assert running.wait(SHORT_S) == [2], running.text()
    assert running.text() == f"error: {message}\n"


def test_a_rendezvous_that_nobody_hosts(small: Make, fork_server: Any) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # without listening
        place = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": unused.getsockname()[1]}
        config = small("train.steps=4", "run.timeout_s=2")
        running = fork_server.start(config, env={name: str(value) for name, value in place.items()})
        assert running.wait(SHORT_S) == [1], running.text()
    (line,) = [line for line in running.text().splitlines() if line.startswith("error")]
    assert line.startswith(f"error: the rendezvous of 2 ranks at 127.0.0.1:{place['MASTER_PORT']} failed: ")


def test_keys_of_ranks_that_have_ended(tmp_path: Path) -> None:
    """A store that outlives the ranks, as under torchrun, when they are started again."""
    host = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(host.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for size in (2, 3, 2):
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", STARTED_AGAIN],
                env={**os.environ, **place, "WORLD_SIZE": str(size), "RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(size)
        ]
        outputs = [process.communicate(timeout=60)[0] for process in ranks]
        assert outputs == [f"sum {size}\n"] * size
        assert [process.returncode for process in ranks] == [-signal.SIGKILL] * size  # no rank cleans up


def test_a_run_directory_that_is_not_shared(small: Make, fork_server: Any, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    # The same absolute path, but another directory for each rank, like local disks of two hosts.
    config = small("train.steps=4", "run.dir=/proc/self/cwd/local")
    running = fork_server.start(
        config, ranks=2, directory=tmp_path / "a", last_directory=tmp_path / "b", output=tmp_path / "run"
    )
    lines = errors(running)
    assert len(set(lines)) == 1 and len(lines) == 2, lines
    assert lines[0] == (
        f"error: run.dir: rank 1 on {socket.gethostname()} does not see what rank 0 writes to /proc/self/cwd/local: "
        "expected a directory on a file system shared by all hosts"
    )
    assert list((tmp_path / "a" / "local").iterdir()) == []


def test_a_world_without_ranks(small: Make, fork_server: Any) -> None:
    running = fork_server.start(small("train.steps=4"), env={"WORLD_SIZE": "0"})
    assert "error: WORLD_SIZE: got 0, expected a number above 0" in running.finish(2)


def test_an_ablation_with_different_variants(small: Make, fork_server: Any) -> None:
    command = ["ablate", "-c", "{config}", "--split", "train"]
    variants = ["--variants", "full", "no-distillation"]
    running = fork_server.start(
        small("train.steps=1"), *variants, ranks=2, command=command, last_rank=["relation-boxes"]
    )
    assert_all_name(running, 'the variants is ["full", "no-distillation"] on rank 0 and ["full", "no-distillation", ')


def test_an_ablation_does_not_wait_longer_than_its_runs(small: Make, fork_server: Any) -> None:
    command = ["ablate", "-c", "{config}", "--split", "train"]
    config = small("train.steps=1", "run.timeout_s=4")
    running = fork_server.start(config, ranks=2, command=command, last_rank=["--variants", "unknown"])
    assert running.wait(SHORT_S) == [1, 2]
    text = running.text()
    assert "error: rank 0 cannot continue: rank 1 has" in text and "waitForInput" not in text


def test_a_demo_of_several_ranks(small: Make, fork_server: Any, tmp_path: Path) -> None:
    command = ["demo", "--out", str(tmp_path / "demo")]
    running = fork_server.start(small(), ranks=2, command=command)
    assert running.finish(2).count("error: the demo runs in one process") == 2


def test_ranks_in_different_directories_resume_from_the_same_path(
    small: Make, fork_server: Any, tmp_path: Path
) -> None:
    fork_server.start(small("train.steps=1", run="first")).finish()
    path = "first/checkpoints/step-00000001"
    running = fork_server.start(
        small("train.steps=2"), "--resume", path, ranks=2, directory=tmp_path, last_directory=Path("/")
    )
    assert f"resumed from {tmp_path / path} at step 1" in running.finish()


def test_a_rank_that_never_joins(small: Make, fork_server: Any) -> None:
    config = small("train.steps=4", "data.batch_size=12", "run.timeout_s=4")
    running = fork_server.start(config, ranks=2, env={"WORLD_SIZE": "3"})
    assert running.wait(SHORT_S) == [1, 1]
    lines = [line for line in running.text().splitlines() if line.startswith("error")]
    assert len(lines) == 2 and all("rank 2 has" in line for line in lines), lines


def test_a_rank_without_its_device_ends_the_others(small: Make, fork_server: Any) -> None:
    running = fork_server.start(small("train.steps=4"), ranks=2, last_rank=["run.device=nowhere"])
    assert running.wait(SHORT_S) == [1, 2]
    assert "error: rank 0 cannot continue: rank 1 ended with UserError: run.device: got 'nowhere'" in running.text()


EVALUATIONS: list[tuple[list[str], str]] = [
    (["--batch-size", "3"], "the batch size is 64 on rank 0 and 3 on rank 1"),
    (["--top", "2"], "--top is [1, 5, 10] on rank 0 and [2] on rank 1"),
    (["--blur", "reference"], "data.blur is null on rank 0 and reference on rank 1"),
]


@pytest.fixture(scope="module")
def trained(shards: Path, fork_server: Any, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A trained model."""
    run = tmp_path_factory.mktemp("trained") / "run"
    config = TrainConfig.of({}, [*SMALL, f"data.shards={shards}", f"run.dir={run}", "train.steps=1"])
    fork_server.start(config).finish()
    return config


def evaluation(config: TrainConfig, kind: str = "zeroshot") -> list[str]:
    return ["eval", kind, config.run.dir, str(config.data.shards), "--split", "train", "--device", "cpu"]


@pytest.mark.parametrize(("options", "difference"), EVALUATIONS)
def test_evaluations_with_different_options(
    trained: TrainConfig, fork_server: Any, options: list[str], difference: str
) -> None:
    running = fork_server.start(trained, ranks=2, command=evaluation(trained), last_rank=options)
    assert_all_name(running, difference)


def test_evaluations_of_different_models_and_data(
    trained: TrainConfig, small: Make, fork_server: Any, tmp_path: Path, shards: Path
) -> None:
    other = small("train.steps=1", "run.seed=1", run="other")
    fork_server.start(other).finish()
    for name, model, data in (("a", trained.run.dir, shards), ("b", other.run.dir, shards)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run").symlink_to(model)
        (tmp_path / name / "shards").symlink_to(data)
    command = ["eval", "zeroshot", "run", "shards", "--split", "train", "--device", "cpu"]
    places = {"directory": tmp_path / "a", "last_directory": tmp_path / "b"}
    assert_all_name(fork_server.start(other, ranks=2, command=command, **places), "the checksum of the weights is ")
    for name, target in (("run", trained.run.dir), ("shards", packed(tmp_path / "pack", scenes(9)))):
        (tmp_path / "b" / name).unlink()
        (tmp_path / "b" / name).symlink_to(target)
    running = fork_server.start(other, ranks=2, command=command, **places)
    assert_all_name(running, "the checksum of the contents of SHARDS is ")


def test_embeddings_of_different_splits(trained: TrainConfig, fork_server: Any, tmp_path: Path) -> None:
    command = ["embed", trained.run.dir, str(trained.data.shards), "--device", "cpu", "--out", str(tmp_path / "x.npz")]
    running = fork_server.start(trained, "--split", "train", ranks=2, command=command, last_rank=["--split", "val"])
    assert_all_name(running, "--split is train on rank 0 and val on rank 1")
    assert not (tmp_path / "x.npz").exists()


LAUNCHED = """
import os, sys
import torch.distributed as dist
from scenarioclip_fast.distributed import join_world
os.environ["RANK"] = "0" if os.fork() else "1"
dist.init_process_group("gloo")
for same in ({"lr": 1}, {"lr": int(os.environ["RANK"])}):
    try:
        with join_world("cpu", 30, same=same) as world:
            world.barrier()
            sys.stdout.write("agreed\\n")
    except ValueError as error:
        sys.stdout.write(f"{error}\\n")
sys.stdout.flush()
dist.barrier()  # rank 0 hosts the store
"""


STARTED_AGAIN = """
import os, signal, sys, time
import torch
from scenarioclip_fast.distributed import join_world
with join_world("cpu", 30, same={"a": 1}) as world:
    sys.stdout.write(f"sum {int(world.sum_(torch.ones(1)))}\\n")
    sys.stdout.flush()
    world.barrier()
    time.sleep(1)  # until all have left the barrier
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_ranks_whose_process_group_exists_already() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHED], env={**os.environ, **place}, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.count("agreed\n") == 2, done.stderr
    assert done.stdout.count("ranks disagree: lr is 0 on rank 0 and 1 on rank 1") == 2, done.stdout + done.stderr


def test_versions_of_the_package_that_compare_different_keys() -> None:
    store = HashStore()
    store.set_timeout(timedelta(seconds=SHORT_S))
    values: list[dict[str, Any]] = [
        {"version": "0.1.0", "old": 1},
        {"version": "0.2.0", "new": [2]},
    ]

    def compare(rank: int) -> str:
        with pytest.raises(UserError) as raised:
            RankComparison(store, rank, 2, SHORT_S).check(values[rank], "install one version")
        return str(raised.value)

    with ThreadPoolExecutor(2) as pool:
        found = set(pool.map(compare, range(2)))
    assert found == {
        "ranks disagree: version is 0.1.0 on rank 0 and 0.2.0 on rank 1; old is 1 on rank 0 and absent on rank 1; "
        "new is absent on rank 0 and [2] on rank 1: install one version"
    }
