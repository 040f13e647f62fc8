"""The demo of the generation pipeline, end to end."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scenarioclip_fast.cli.main import main
from scenarioclip_fast.data import ShardSet, rle
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.generate.drawn.vlm_server import KINDS
from scenarioclip_fast.recipes.generation_demo import _MEANINGS, GenerationDemoConfig, draw, run_generation_demo

for package in ("simplejpeg", "scipy", "openai", "inflect", "rapidfuzz"):
    pytest.importorskip(package)

SCENES = 200


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "runs"
    assert (
        main(["demo", "generation", "--out", str(out), "--scenes", str(SCENES), "--seed", "5", "--workers", "1"]) == 0
    )
    return out


@pytest.fixture(scope="module")
def result(demo: Path) -> Any:
    return json.loads((demo / "result.json").read_text())


def truth(demo: Path) -> Iterator[dict[str, Any]]:
    yield from map(json.loads, (demo / "truth.jsonl").read_text().splitlines())


def test_everything_is_written(demo: Path, result: dict[str, Any]) -> None:
    keys = {path.stem for path in (demo / "images").iterdir()}
    assert len(keys) == SCENES and {record["key"] for record in truth(demo)} == keys
    assert result["config"] == {"out": str(demo), "seed": 5, "scenes": SCENES, "workers": 1}
    assert list(result["seconds"]) == ["drawing", "generating", "scoring"]
    assert list(result["stages"]) == ["caption", "ground", "segment", "curate"]
    packed = [ShardSet(demo / "data" / "shards", split) for split in ("train", "val", "test")]
    assert {key for shards in packed for key in shards.keys} < keys
    assert all((demo / page).is_file() for page in ("report.html", "data/report.html", "data/review.html"))
    page = (demo / "report.html").read_text()
    for name in ("precision of objects", "recall of relations"):
        cells = [f"{100 * result[when][name]:.1f} %" for when in ("before", "after")]
        assert f'<td class="t">{name}</td><td class="n">{cells[0]}</td><td class="n">{cells[1]}</td>' in page


def test_the_page_explains_corruptions_and_links_to_the_run(demo: Path, result: dict[str, Any]) -> None:
    assert set(_MEANINGS) == set(KINDS)
    page = (demo / "report.html").read_text()
    for kind, n in result["corrupted"].items():
        assert f'<td>{kind}</td><td class="n">{n}</td><td class="t">{_MEANINGS[kind]}</td>' in page
    links = re.findall('<a href="(.*?)">', page)
    assert links == ["data/report.html", "data/review.html"] and all((demo / link).is_file() for link in links)


def test_scores(result: dict[str, Any]) -> None:
    before, after = result["before"], result["after"]
    assert before["images"] == after["images"] == SCENES
    # The targets. With 200 scenes the fractions have a standard error of about 1.5 %; the seed fixes them.
    assert after["precision of relations"] >= 0.95 and after["recall of relations answered rightly"] >= 0.9
    # Curation mends wordings, which exact matching loses, without lowering precision.
    for name in ("precision of objects", "recall of objects", "precision of relations", "recall of relations"):
        assert after[name] > before[name] + 0.05, name
    assert after["masks with an IoU of at least 0.75"] >= 0.95


def test_corruption_is_counted(demo: Path, result: dict[str, Any]) -> None:
    corrupted = result["corrupted"]
    # A binomial count of 200 with .2: 40 with a standard deviation of 5.7.
    assert 20 <= sum(corrupted.values()) <= 60
    assert set(corrupted) <= {"bad_json", "wrong_name", "extra_object", "false_relation", "absent_relation"}
    records = list(truth(demo))
    without = sum(not record["relations"] for record in records)
    assert result["without_relations"] == without > 0
    lost = [r for r in records if len(r["answered"]) < len(r["relations"])]
    assert 0 < len(lost) <= corrupted["bad_json"] + corrupted["wrong_name"]
    assert sum(len(r["answered"]) for r in records) == result["after"]["relations_answered"]


def test_the_truth_is_exact(demo: Path) -> None:
    (drawing,) = draw(1, demo.parent / "one", seed=5)
    record = next(truth(demo))
    assert record["key"] == drawing.key
    assert [one["name"] for one in record["objects"]] == drawing.answer["objects"]
    for one in record["objects"]:
        assert rle.bounds(one["mask"], tuple(one["mask"]["size"])) == one["box"]  # type: ignore[arg-type]
    assert (demo.parent / "one" / f"{drawing.key}.jpg").read_bytes() == (
        demo / "images" / f"{drawing.key}.jpg"
    ).read_bytes()


def test_the_table_and_another_run(demo: Path, result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """In two processes, over the first run: the same scenes and scores."""
    shards = {path.name: path.read_bytes() for path in (demo / "data" / "shards").iterdir()}
    command = ["demo", "generation", "--out", str(demo), "--scenes", str(SCENES), "--seed", "5", "--workers", "2"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    for name in ("precision of relations", "recall of relations answered rightly"):
        line = next(line for line in shown.splitlines() if line.startswith(name))
        assert f"{100 * result['before'][name]:.1f} %" in line and f"{100 * result['after'][name]:.1f} %" in line
    again = json.loads((demo / "result.json").read_text())
    assert (again["before"], again["after"]) == (result["before"], result["after"])
    assert {path.name: path.read_bytes() for path in (demo / "data" / "shards").iterdir()} == shards


def test_only_files_of_the_demo_are_removed(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "mine.jpg").write_text("precious")
    with pytest.raises(UserError, match="not written by a demo"):
        run_generation_demo(GenerationDemoConfig(tmp_path))
    (tmp_path / "demo.json").write_text("{}")  # of the other demo
    with pytest.raises(UserError, match="not written by a demo"):
        run_generation_demo(GenerationDemoConfig(tmp_path))
    assert (tmp_path / "images" / "mine.jpg").read_text() == "precious"


@pytest.mark.parametrize("wrong", [{"scenes": 9}, {"seed": -1}, {"workers": 0}])
def test_invalid_options(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        GenerationDemoConfig(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generation", "--views", "10"], "--views: an option of `demo training`"),
        (["generation", "--device", "cpu"], "--device: an option of `demo training`"),
        (["--workers", "2"], "--workers: an option of `demo generation`"),
        (["training", "--workers", "2"], "--workers: an option of `demo generation`"),
        (["generation", "--scenes", "3"], "scenes: got 3"),
    ],
)
def test_options_of_the_other_demo(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
