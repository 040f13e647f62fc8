from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from curation import records, write_run

from scenarioclip_fast.data.shards import ShardSet
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.generate.config import GenerateConfig
from scenarioclip_fast.generate.curate import stage as module
from scenarioclip_fast.generate.curate.stage import make, prepare
from scenarioclip_fast.generate.pipeline import generate
from scenarioclip_fast.generate.records import all_outcomes

MAN, HORSE, TREE = ("man", (0, 0, 20, 40)), ("horse", (10, 20, 50, 60)), ("tree", (60, 0, 80, 60))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    scenes = {
        f"k{i}": records([MAN, HORSE, TREE], [("man", predicate, "horse"), ("tree", "behind", "man")], action=action)
        for i, (predicate, action) in enumerate(
            [("riding", "jogged"), ("riding", "jogging"), ("mounting", "running"), ("on", "eating"), ("on", "eating")]
        )
    }
    scenes["k5"] = records([MAN], [])
    return write_run(tmp_path, scenes)


def curated(run: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    config = GenerateConfig.of(overrides=[f"curate.{one}" for one in overrides])
    generate([], run, config, stages=("curate",), progress=False, **options)
    return {one.key: one.result.get("scene") for one in all_outcomes(run / "curate")}


def test_curate_and_pack(run: Path) -> None:
    report = generate([], run, GenerateConfig(), stages=("curate", "pack"), progress=False)
    assert report.stages[0].images == 6 and report.stages[0].rejected == {"no_relations": 1}
    assert report.stages[0].counts["relations"] == 10
    scenes = {}
    for split in ("train", "val", "test"):
        shards = ShardSet(run / "shards", split)
        scenes |= {scene.key: scene for scene in map(shards.read, range(len(shards)))}
    assert sorted(scenes) == ["k0", "k1", "k2", "k3", "k4"]
    assert scenes["k0"].action == "jogging" and scenes["k0"].relation_text(0) == "man riding horse"
    assert scenes["k0"].relations[0].negatives[0] == "man dismounting horse"
    assert scenes["k0"].scores == {"boxes": [0.9] * 3, "masks": [0.8] * 3}


def test_records_do_not_depend_on_workers_or_interruptions(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curated(run)
    first = [path.read_bytes() for path in sorted((run / "curate").iterdir())]
    curated(run, redo=("curate",), workers=2)
    assert [path.read_bytes() for path in sorted((run / "curate").iterdir())] == first
    (run / "curate" / "000001.jsonl").unlink()
    partial = run / "curate" / "000000.jsonl"
    partial.rename(partial.with_name("000000.jsonl.partial"))
    curated(run)
    assert [path.read_bytes() for path in sorted((run / "curate").iterdir())] == first


def test_a_change_of_the_files_curates_anew(run: Path, tmp_path: Path) -> None:
    antonyms = tmp_path / "antonyms.json"
    for opposite in ("leaving", "losing"):
        antonyms.write_text(json.dumps({"riding": opposite}))
        scenes = curated(run, f"antonyms={antonyms}")
        assert scenes["k0"]["relations"][0]["negatives"][0] == f"man {opposite} horse"
    decisions = tmp_path / "decisions.json"
    for name in ("boy", "girl"):
        decisions.write_text(json.dumps({"schema": 1, "scenes": {"k0": {"objects": {"0": {"name": name}}}}}))
        assert curated(run, f"decisions={decisions}")["k0"]["objects"][0]["name"] == name


def test_a_new_version_of_the_rules_curates_anew(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curated(run)
    config = GenerateConfig()
    assert generate([], run, config, stages=("curate",), progress=False).stages[0].images == 0
    monkeypatch.setattr(module, "_VERSION", module._VERSION + 1)
    assert generate([], run, config, stages=("curate",), progress=False).stages[0].images == 6


def test_decisions_that_change_under_the_stage(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "decisions.json"
    path.write_text('{"schema": 1, "scenes": {}}')
    config = GenerateConfig.of(overrides=[f"curate.decisions={path}"])
    stage = pickle.loads(pickle.dumps(make(config, "cpu", prepare(config, run))))
    path.write_text('{"schema": 1, "scenes": {"k0": {}}}')
    with pytest.raises(UserError, match="has changed since the stage began"):
        next(stage.run(iter([])))


def test_classes_are_merged_over_all_units(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The counts are those of all records, after names were corrected."""
    angle = {"jogging": 0, "running": 10, "eating": 90, "playing": 180, "riding": 0, "mounting": 20, "on": 90}
    angle |= {"behind": 180, "man": 0, "horse": 90, "tree": 180}

    class Fake:
        def __init__(self, name: str) -> None:
            assert name == "some/encoder"

        def __call__(self, texts: list[str]) -> np.ndarray:
            degrees = np.deg2rad([angle[text] for text in texts])
            return np.stack([np.cos(degrees), np.sin(degrees)], 1)

    monkeypatch.setattr(module, "Embedder", Fake)
    options = ["merge_actions=0.98", "merge_predicates=0.93", "embedder=some/encoder"]
    context = prepare(GenerateConfig.of(overrides=[f"curate.{one}" for one in options]), run)
    assert context["merged"] == {"actions": {"running": "jogging"}, "predicates": {"mounting": "riding"}}
    scenes = curated(run, *options)
    assert scenes["k2"]["action"] == "jogging" and scenes["k2"]["relations"][0]["predicate"] == "riding"
    assert scenes["k3"]["action"] == "eating"


def test_one_scene_of_an_unfinished_stage(tmp_path: Path) -> None:
    run = write_run(tmp_path, {"k0": records([MAN, HORSE], [("man", "on", "horse")])})
    (run / "segment" / "000000.jsonl").unlink()
    with pytest.raises(UserError, match="finish the stage segment first"):
        curated(run)
