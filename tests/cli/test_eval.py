"""`scenarioclip-fast eval`: every kind on a small model, output files, feature cache, two ranks, and errors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from packs import read_rows
from safetensors import SafetensorError

from scenarioclip_fast.cli.main import main
from scenarioclip_fast.data import LoaderConfig, ShardSet, generate_scenes, pack
from scenarioclip_fast.distributed import World
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.eval.loading import EvaluationLoader, SkippedScene
from scenarioclip_fast.eval.session import open_session
from scenarioclip_fast.model import FreezeConfig, ModelConfig, ScenarioCLIP, TextConfig, VisionConfig
from scenarioclip_fast.train.config import TrainConfig

KINDS = ["zeroshot", "retrieval", "probe", "tsne", "negatives"]
PICTURES = {
    "zeroshot": {"accuracy.png", "scenes.png"},
    "retrieval": {"retrieval.png"},
    "probe": {"probe.png"},
    "tsne": {"map.png", "nearest.png"},
    "negatives": {"negatives.png"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shards/: 36 synthetic scenes; model/: random weights, large enough to distinguish views."""
    place = tmp_path_factory.mktemp("eval")
    pack(generate_scenes(36, seed=0, val=0.2, test=0.4), place / "shards")
    torch.manual_seed(0)
    model = ScenarioCLIP(
        ModelConfig(
            embed_dim=12,
            vision=VisionConfig(16, 8, 24, 1, 3),
            text=TextConfig(16, width=16, layers=1, heads=2),
            freeze=FreezeConfig.nothing(),
        )
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(place / "model")
    return place


@pytest.fixture(scope="module")
def damaged(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shards, with damaged images in the second scene of the test and train splits."""
    folder = shutil.copytree(place / "shards", tmp_path_factory.mktemp("damaged") / "shards")
    for name, rows in read_rows(folder).items():
        if not name.startswith("val"):
            with (folder / name).open("r+b") as file:
                file.seek(rows[1][1])
                file.write(b"no JPEG")
    return folder


def second(shards: Path, split: str) -> str:
    return ShardSet(shards, split).keys[1]


def command(place: Path, kind: str, *options: str, shards: Path | str | None = None) -> list[str]:
    quick = ["--steps", "20", "--seeds", "2"] if kind == "probe" else []
    return ["eval", kind, str(place / "model"), str(shards or place / "shards"), "--device", "cpu", *quick, *options]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_writes_its_files(
    place: Path, kind: str, device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "tsne":
        pytest.importorskip("sklearn")
    report, file = tmp_path / "deep" / "report", tmp_path / "other" / "result.json"
    assert main([*command(place, kind, "--report", str(report), "--json", str(file)), "--device", device]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == f"report: {report / 'report.html'}"
    assert set(out[1]) == {"-", " "}
    result = json.loads(file.read_text())
    assert result["split"] == "test"
    assert {path.name for path in report.glob("*.png")} == PICTURES[kind]
    page = (report / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(PICTURES[kind])


def test_map_is_written_to_the_checkpoint_by_default(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    assert main(command(place, "tsne", "--level", "global", "--split", "train")) == 0
    assert "action" in capsys.readouterr().out
    assert (place / "model" / "tsne" / "map.png").is_file()


def test_features_are_cached(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "cache"
    runs = []
    for _ in range(3):
        assert main(command(place, "probe", "--cache", str(cache))) == 0
        runs.append(capsys.readouterr())
    assert runs[0].out == runs[1].out == runs[2].out
    assert "embedding, train" in runs[0].err and "read from" not in runs[0].err
    assert runs[1].err.count("features read from") == 3 and "embedding" not in runs[1].err
    files = sorted(path.name for path in cache.iterdir())
    assert [name.split("-")[0] for name in files] == ["test", "train", "val"]

    # Other view settings use other files.
    assert main(command(place, "probe", "--cache", str(cache), "--object-view", "crop")) == 0
    assert "read from" not in capsys.readouterr().err
    assert len(list(cache.iterdir())) == 6

    # A damaged file is replaced.
    damaged = cache / files[0]
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])
    assert main(command(place, "probe", "--cache", str(cache))) == 0
    again = capsys.readouterr()
    assert f"{damaged}: not readable" in again.err and again.out == runs[0].out
    assert damaged.read_bytes() == whole


def test_a_full_disk_only_disables_the_cache(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    assert main(command(place, "probe", "--cache", str(tmp_path / "cache"))) == 0
    assert capsys.readouterr().err.count("features not cached: No space left on device") == 3
    assert not list((tmp_path / "cache").iterdir())


def test_other_weights_use_other_features(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ScenarioCLIP.from_pretrained(place / "model")
    with torch.no_grad():
        model.vision["object"].head.projection.weight[0, 0] += 1e-3
    model.save_pretrained(tmp_path / "model")
    for checkpoint in (place / "model", tmp_path / "model"):
        arguments = ["eval", "probe", str(checkpoint), str(place / "shards"), "--steps", "1", "--device", "cpu"]
        assert main([*arguments, "--cache", str(tmp_path / "cache")]) == 0
        assert "read from" not in capsys.readouterr().err


def test_two_ranks_equal_one_process(
    place: Path, damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for kind, shards in {"zeroshot": damaged, "retrieval": place / "shards"}.items():
        one, two = tmp_path / f"{kind}-1.json", tmp_path / f"{kind}-2.json"
        # Batches are not divided evenly among ranks.
        assert main(command(place, kind, "--json", str(one), "--batch-size", "3", shards=shards)) == 0
        alone = capsys.readouterr()
        done = subprocess.run(
            [
                *torchrun,
                "-m",
                "scenarioclip_fast",
                *command(place, kind, "--json", str(two), "--batch-size", "4", shards=shards),
            ],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == alone.out
        warnings = [[line for line in text.splitlines() if "warning: " in line] for text in (alone.err, done.stderr)]
        assert warnings[0] == warnings[1] and len(warnings[0]) == (kind == "zeroshot")
        assert json.loads(two.read_text()) == json.loads(one.read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_skipped_scenes_are_reported_and_incomplete_features_not_cached(
    place: Path, damaged: Path, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "tsne":
        pytest.importorskip("sklearn")
    cached = ["--cache", str(tmp_path / "cache")] if kind in ("probe", "tsne") else []
    file, report = tmp_path / "result.json", tmp_path / "report"
    options = ["--json", str(file), "--report", str(report), *cached]
    assert main(command(place, kind, *options, shards=damaged)) == 0
    splits = ["test", "train"] if kind == "probe" else ["test"]
    names = {split: second(damaged, split) for split in splits}
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    for split, line in zip(splits, warnings, strict=True):  # the pass for sample scenes does not repeat the warning
        number = len(ShardSet(damaged, split))
        about = f"1 of the {number} scenes of the {split} split cannot be used and are skipped: {names[split]}"
        assert line.startswith(f"warning: {about} (not_an_image: ")
    skipped = json.loads(file.read_text())["skipped"]
    assert skipped["count"] == len(splits)
    assert [(scene["split"], scene["scene"], scene["reason"]) for scene in skipped["scenes"]] == [
        (split, names[split], "not_an_image") for split in splits
    ]
    page = (report / "report.html").read_text()
    assert f"Unusable scenes skipped: {len(splits)}." in page
    if cached:
        kept = [path.name.split("-")[0] for path in (tmp_path / "cache").iterdir()]
        assert kept == (["val"] if kind == "probe" else [])


def test_too_many_bad_scenes_are_counted_over_all_ranks(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scenes = len(ShardSet(damaged, "test"))
    found: list[SkippedScene] = []
    for rank in range(5):  # the bad scene is more than a tenth of its rank's share
        world = World(rank, 5, torch.device("cpu"), None)
        with EvaluationLoader(damaged, 2, world=world, skipped=found, size=16) as loader:
            seen = [key for batch in loader for key in batch.keys]
            assert len(seen) + (rank == 1) == len(range(rank, scenes, 5)) < 10
    assert [scene.scene for scene in found] == [second(damaged, "test")]
    few = rf"^1 of the {scenes} scenes of the test split cannot be used, more than max_bad_fraction = 0.05: \w+ \(not"
    with (
        EvaluationLoader(damaged, 8, LoaderConfig(max_bad_fraction=0.05), size=16) as loader,
        pytest.raises(UserError, match=few),
    ):
        list(loader)


def test_data_settings_of_the_run_are_used(
    place: Path, damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "model", run / "model")
    data = {"blur": "reference", "relation_view": "focused", "object_view": "crop", "decoder": "torch"}
    data |= {"shard_cache_dir": str(tmp_path / "near"), "shard_cache_gib": 1.0, "max_bad_fraction": 0.02}
    (run / "model" / "SHA256SUMS").unlink()
    TrainConfig.of({"data": data}).save(run / "model" / "config.yaml")
    pixels = {}
    for blur in (None, "reference", "rgb"):
        with open_session(run, place / "shards", device="cpu", blur=blur) as session:
            assert {key: getattr(session.data, key) for key in data} == data | {"blur": blur or "reference"}
            with session.loader("test") as loader:
                pixels[blur] = next(iter(loader)).pixels
    assert torch.equal(pixels[None], pixels["reference"]) and not torch.equal(pixels[None], pixels["rgb"])

    # The feature cache distinguishes them.
    cache = ["--steps", "1", "--seeds", "1", "--cache", str(tmp_path / "cache")]
    probe = ["eval", "probe", str(run), str(place / "shards"), "--device", "cpu", *cache]
    for options, files in (([], 3), (["--blur", "rgb"], 6), (["--blur", "reference"], 6)):
        assert main([*probe, *options]) == 0
        assert len(list((tmp_path / "cache").iterdir())) == files
    assert capsys.readouterr().err.count("features read from") == 3

    # The run's max_bad_fraction applies.
    assert main(["eval", "zeroshot", str(run), str(damaged), "--device", "cpu"]) == 2
    assert "max_bad_fraction = 0.02" in capsys.readouterr().err


def test_remote_shards_use_the_configured_cache(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("fsspec", reason="fsspec is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    run, near, nearer = (tmp_path / name for name in ("run", "near", "nearer"))
    shutil.copytree(place / "model", run / "model")
    (run / "model" / "SHA256SUMS").unlink()
    TrainConfig.of({"data": {"shard_cache_dir": str(near)}}).save(run / "model" / "config.yaml")
    features = tmp_path / "features"
    probe = ["eval", "probe", str(run), (place / "shards").as_uri(), "--device", "cpu", "--cache", str(features)]
    assert main([*probe, "--steps", "1"]) == 0
    assert near.is_dir() and not (tmp_path / "home").exists()
    # With cached features, no shards are read.
    assert main([*probe, "--steps", "1", "--shard-cache-dir", str(nearer)]) == 0
    assert not nearer.exists()
    assert main(["eval", "retrieval", *probe[2:6], "--shard-cache-dir", str(nearer), "--shard-cache-gib", "0"]) == 0
    assert [path.name for path in nearer.iterdir()] == ["lock"], "a cache of size 0 stays empty"
    capsys.readouterr()
    for option, value, message in (
        ("--shard-cache-dir", str(place / "model" / "config.json"), "cannot be used as shard cache"),
        ("--shard-cache-gib", "inf", "shard_cache_gib: got inf, expected a finite number"),
        ("--shard-cache-gib", "-1", "shard_cache_gib: got -1.0, expected at least 0"),
    ):
        assert main(["eval", "retrieval", *probe[2:6], option, value]) == 2
        (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert message in error


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("retrieval", ["--split", "tset"], "split: got 'tset', expected one of train, val, test"),
        ("retrieval", ["--top", "0"], "--top: got 0"),
        ("retrieval", ["--weights", "teacher"], "this run had no teacher"),
        ("retrieval", ["--device", "gpu"], "device: got 'gpu'"),
        ("probe", ["--split", "tset"], "split: got 'tset', expected one of train, val, test"),  # before any computation
        ("probe", ["--split", "train"], "--split: got 'train', the split on which probes are trained"),
        ("probe", ["--steps", "0"], "steps: got 0, expected at least 1"),
        ("probe", ["--seeds", "0"], "seeds: got none"),
        ("tsne", ["--classes", "1"], "classes: got 1, expected at least 2"),
        ("tsne", ["--views", "1"], "views: got 1, expected at least 10"),
        ("tsne", ["--seed", "-1"], "seed: got -1"),
        ("negatives", ["--batch-size", "0"], "--batch-size: got 0"),
        ("retrieval", ["--report", "{place}/model/config.json"], "config.json is a file, expected a directory"),
        ("probe", ["--cache", "{place}/model/config.json"], "config.json is a file, expected a directory"),
        ("retrieval", ["--json", "{place}/model"], "model is a directory, expected a file"),
        # not writable even for root
        ("retrieval", ["--json", "/proc/a.json"], "--json: /proc/a.json cannot be written (No such file"),
        ("retrieval", ["--json", "/proc/version"], "--json: /proc/version cannot be written ("),
        ("retrieval", ["--report", "/proc"], "--report: /proc cannot be written (No such file"),
        ("probe", ["--cache", "/proc/features"], "--cache: /proc/features cannot be written (No such file"),
        ("retrieval", ["--json", "{place}/model/config.json/a.json"], "config.json is a file, expected a directory"),
    ],
)
def test_errors_are_one_line(
    place: Path, kind: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "tsne":
        pytest.importorskip("sklearn")
    assert main(command(place, kind, *(option.format(place=place) for option in options))) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("error: ") and message in errors[0]


def test_no_model(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    for checkpoint, message in (
        (tmp_path / "none", "none does not exist; expected a run directory"),
        (place / "model" / "config.json", "config.json is a file; expected a run directory"),
        (tmp_path / "empty", "empty has no trained model"),
        (tmp_path / "begun", "begun is an unfinished run: resume it with `train --resume`"),
    ):
        assert main(["eval", "retrieval", str(checkpoint), str(place / "shards"), "--device", "cpu"]) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert error.startswith("error: ") and message in error


@pytest.mark.parametrize("kind", ["retrieval", "negatives", "probe"])
def test_an_empty_split(kind: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack(generate_scenes(4, seed=0, val=0, test=0), tmp_path / "shards")
    assert main(["eval", kind, str(place / "model"), str(tmp_path / "shards"), "--device", "cpu"]) == 2
    assert "the test split has no scenes" in capsys.readouterr().err
