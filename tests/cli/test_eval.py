"""`scenarioclip-fast eval`: every kind on a small model, its files, its cache, two ranks, and one line a mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scenarioclip_fast.cli.main import main
from scenarioclip_fast.data import generate_scenes, pack
from scenarioclip_fast.model import FreezeConfig, ModelConfig, ScenarioCLIP, TextConfig, VisionConfig

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
    """shards/: 36 drawn scenes; model/: random weights, which tell views apart."""
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


def command(place: Path, kind: str, *options: str) -> list[str]:
    quick = ["--steps", "20", "--seeds", "2"] if kind == "probe" else []
    return ["eval", kind, str(place / "model"), str(place / "shards"), "--device", "cpu", *quick, *options]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_writes_what_it_says(
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


def test_map_goes_beside_the_checkpoint(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    assert main(command(place, "tsne", "--level", "global", "--split", "train")) == 0
    assert "action" in capsys.readouterr().out
    assert (place / "model" / "tsne" / "map.png").is_file()


def test_features_are_kept_and_found_again(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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

    # another way to render is another file
    assert main(command(place, "probe", "--cache", str(cache), "--object-view", "crop")) == 0
    assert "read from" not in capsys.readouterr().err
    assert len(list(cache.iterdir())) == 6

    # a damaged file is made anew, once
    damaged = cache / files[0]
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])
    assert main(command(place, "probe", "--cache", str(cache))) == 0
    again = capsys.readouterr()
    assert f"{damaged}: not readable" in again.err and again.out == runs[0].out
    assert damaged.read_bytes() == whole


def test_other_weights_are_other_features(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ScenarioCLIP.from_pretrained(place / "model")
    with torch.no_grad():
        model.vision["object"].head.projection.weight[0, 0] += 1e-3
    model.save_pretrained(tmp_path / "model")
    for checkpoint in (place / "model", tmp_path / "model"):
        arguments = ["eval", "probe", str(checkpoint), str(place / "shards"), "--steps", "1", "--device", "cpu"]
        assert main([*arguments, "--cache", str(tmp_path / "cache")]) == 0
        assert "read from" not in capsys.readouterr().err


def test_two_ranks_say_what_one_process_says(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for kind in ("zeroshot", "retrieval"):
        one, two = tmp_path / f"{kind}-1.json", tmp_path / f"{kind}-2.json"
        # batches that neither share out evenly nor end together
        assert main(command(place, kind, "--json", str(one), "--batch-size", "3")) == 0
        done = subprocess.run(
            [
                *torchrun,
                "-m",
                "scenarioclip_fast.cli.main",
                *command(place, kind, "--json", str(two), "--batch-size", "4"),
            ],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == capsys.readouterr().out
        assert json.loads(two.read_text()) == json.loads(one.read_text())


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("retrieval", ["--split", "tset"], "split: got 'tset', expected one of train, val, test"),
        ("retrieval", ["--top", "0"], "--top: got 0"),
        ("retrieval", ["--weights", "teacher"], "this run had no teacher"),
        ("retrieval", ["--device", "gpu"], "device: got 'gpu'"),
        ("probe", ["--split", "train"], "--split: got 'train', which the probe is trained on"),
        ("probe", ["--steps", "0"], "steps: got 0, expected at least 1"),
        ("probe", ["--seeds", "0"], "seeds: got none"),
        ("tsne", ["--classes", "1"], "classes: got 1, expected at least 2"),
        ("tsne", ["--views", "1"], "views: got 1, expected at least 10"),
        ("negatives", ["--batch-size", "0"], "--batch-size: got 0"),
        ("retrieval", ["--report", "{place}/model/config.json"], "config.json is a file; name a directory"),
        ("probe", ["--cache", "{place}/model/config.json"], "config.json is a file; name a directory"),
        ("retrieval", ["--json", "{place}/model"], "model is a directory; name a file"),
    ],
)
def test_mistakes_are_one_line(
    place: Path, kind: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "tsne":
        pytest.importorskip("sklearn")
    assert main(command(place, kind, *(option.format(place=place) for option in options))) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("error: ") and message in errors[0]


@pytest.mark.parametrize("kind", ["retrieval", "negatives", "probe"])
def test_an_empty_split(kind: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack(generate_scenes(4, seed=0, val=0, test=0), tmp_path / "shards")
    assert main(["eval", kind, str(place / "model"), str(tmp_path / "shards"), "--device", "cpu"]) == 2
    assert "split 'test' has 0 scenes" in capsys.readouterr().err
