"""The demo end to end with a few scenes, and `eval` on its outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from scenarioclip_fast.cli.main import main
from scenarioclip_fast.data import ShardSet
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.eval.zeroshot import ZeroShotResult
from scenarioclip_fast.model import ScenarioCLIP
from scenarioclip_fast.recipes.demo import DemoConfig, run_demo, train_config


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "runs"
    assert main(["demo", "--out", str(out), "--scenes", "48", "--views", "700", "--seed", "3", "--device", "cpu"]) == 0
    return out


def test_everything_is_written(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads((demo / "result.json").read_text())
    trained = ZeroShotResult.from_dict(result["trained"])
    assert (trained.split, trained.scenes) == ("test", len(ShardSet(demo / "shards", "test")))
    assert {(row.level, row.match) for row in trained.rows if row.subset == "all"} == {
        (level, match) for level in ("global", "object", "relation") for match in ("own", "any_in_image")
    }
    assert ZeroShotResult.from_dict(result["pretrained"]) != trained
    assert len(result["seconds"]) == 6
    page = (demo / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "--seed 3 --scenes 48 --views 700" in page
    assert {"losses.png", "accuracy.png", "scenes.png"} <= {path.name for path in demo.iterdir()}


def test_second_phase_is_initialised_as_in_the_paper(demo: Path) -> None:
    first, second = (train_config(name, 10, 48).model for name in ("pretrain", "train"))
    assert (first.variant, second.variant) == ("pyramidclip", "scenarioclip1")
    assert not first.freeze.embeddings
    assert second.freeze.embeddings and second.freeze.vision_blocks and second.freeze.text_blocks
    rows = [
        [json.loads(line) for line in (demo / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("pretrain", "train")
    ]
    assert all(row["distillation"] == 0 for row in rows[0])
    assert all(row["distillation"] > 0 for row in rows[1])
    pretrained, trained = (ScenarioCLIP.from_pretrained(demo / name / "model") for name in ("pretrain", "train"))
    start = pretrained.text["global"].state_dict()
    levels = {level: trained.text[level].state_dict() for level in ("global", "object", "relation")}
    frozen = [name for name in start if all(torch.equal(start[name], levels[level][name]) for level in levels)]
    assert any(name.startswith("blocks.0") for name in frozen) and not any(
        name.startswith("blocks.3") for name in frozen
    )
    # Each level has moved a few small steps from the initial weights, in a different direction.
    moved = [levels[level]["head.projection.weight"] - start["head.projection.weight"] for level in levels]
    assert all(0 < step.abs().max() < 0.01 for step in moved)
    assert not torch.equal(moved[0], moved[1])


def test_splits_are_disjoint_and_hold_out_relations(demo: Path) -> None:
    shards = {split: ShardSet(demo / "shards", split) for split in ("train", "val", "test")}
    keys = [key for split in shards.values() for key in split.keys]
    assert len(keys) == len(set(keys)) == 48
    vocabulary = shards["test"].vocabulary
    unseen = {
        text
        for text, count in zip(vocabulary.relations, vocabulary.train_counts("relation"), strict=True)
        if count == 0
    }
    scenes = [shards["train"].read(i) for i in range(len(shards["train"]))]
    assert not unseen & {scene.relation_text(k) for scene in scenes for k in range(len(scene.relations))}


def test_eval_reproduces_the_demo(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = ZeroShotResult.from_dict(json.loads((demo / "result.json").read_text())["trained"])
    for checkpoint in (demo / "train", demo / "train" / "model"):
        file = tmp_path / "deep" / "result.json"
        command = ["eval", "zeroshot", str(checkpoint), str(demo / "shards"), "--json", str(file), "--device", "cpu"]
        # Batches of 1 instead of 64 sum in a different order, which should not change a rank among 10 classes.
        assert main([*command, "--batch-size", "1"]) == 0
        got = ZeroShotResult.from_dict(json.loads(file.read_text()))
        assert [(r.level, r.match, r.subset, r.views, r.chance) for r in got.rows] == [
            (r.level, r.match, r.subset, r.views, r.chance) for r in expected.rows
        ]
        for row, other in zip(got.rows, expected.rows, strict=True):
            # Allow for one view.
            assert row.top == pytest.approx(other.top, abs=1.01 / row.views)
        assert str(got) in capsys.readouterr().out
    command = ["eval", "zeroshot", str(demo / "train"), str(demo / "shards"), "--match", "own", "--top", "2"]
    assert main([*command, "--report", str(tmp_path / "report")]) == 0
    assert (tmp_path / "report" / "report.html").read_text().count("data:image/png;base64,") == 3
    out = capsys.readouterr().out
    assert "any_in_image" not in out
    assert "top-2" in out and "top-5" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{demo}/none", "{demo}/shards"], "none"),
        (["{demo}/scenes", "{demo}/shards"], "no trained model"),
        (["{demo}/train", "{demo}/none"], "none"),
        (["{demo}/train", "{demo}/shards", "--split", "tset"], "tset"),
        (["{demo}/train", "{demo}/shards", "--device", "gpu"], "gpu"),
        (["{demo}/train", "{demo}/shards", "--top", "0"], "--top"),
        (["{demo}/train", "{demo}/shards", "--batch-size", "0"], "--batch-size"),
    ],
)
def test_eval_errors_are_one_line(
    demo: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "zeroshot", *(argument.format(demo=demo) for argument in arguments)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ") and message in lines[0]


def test_demo_removes_only_files_of_a_demo(tmp_path: Path, demo: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="not written by a demo"):
        run_demo(DemoConfig(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match="is a file"):
        run_demo(DemoConfig(tmp_path / "mine.txt"))


@pytest.mark.parametrize("wrong", [{"scenes": 10}, {"views": 0}, {"seed": -1}])
def test_invalid_options(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        DemoConfig(**wrong)  # type: ignore[arg-type]
