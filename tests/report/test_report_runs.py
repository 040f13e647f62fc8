"""Comparison of run directories: reading, tables, page and command."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scenarioclip_fast.cli.main import main
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.eval.negatives import NegativesAccuracy, NegativesResult
from scenarioclip_fast.eval.probe import ProbeAccuracy, ProbeResult, ProbeSettings
from scenarioclip_fast.eval.retrieval import Recall, RetrievalResult
from scenarioclip_fast.eval.zeroshot import Accuracy, ZeroShotResult
from scenarioclip_fast.report.accuracy import accuracy_comparison
from scenarioclip_fast.report.comparison import (
    accuracy_table,
    compare_runs,
    config_differences,
    score_table,
    summary_table,
)
from scenarioclip_fast.report.curves import run_curves
from scenarioclip_fast.report.runs import find_runs
from scenarioclip_fast.train.config import TrainConfig

LEVELS = ("global", "object", "relation")
MakeRun = Callable[..., Path]


def rows(steps: int, loss: float = 4.0, views: int = 50) -> list[dict[str, Any]]:
    return [
        {
            "step": i,
            "loss": loss / i,
            **{f"contrastive/{level}": loss / i / 3 for level in LEVELS},
            **{f"temperature/{level}": 0.07 for level in LEVELS},
            "distillation": 0.0,
            "grad_norm": None if i == 2 else 1.0,  # null: not finite
            "skipped": int(i == 2),
            "lr": 1e-3,
            "views": views * i,
            "scenes_per_s": 10.0,
            "views_per_s": 100.0 * i,
            "tflop_per_s": 0.125,
            "memory_gib": 1.0 + i // 8,
            "data_wait": 0.25,
            "bad_samples": i // 4,
        }
        for i in range(1, steps + 1)
    ]


def result(share: float, chance: float = 0.125, scenes: int = 8) -> ZeroShotResult:
    made = [
        Accuracy(level, match, subset, 8, 8, {1: share, 5: (1 + share) / 2}, {1: chance, 5: 5 * chance})
        for level in LEVELS
        for match in ("own", "any_in_image")
        for subset in ("all", "held_out")
    ]
    return ZeroShotResult("test", scenes, (1, 5), made)


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """make_run("name", steps, "key=value", ...) creates a run directory below tmp_path."""

    def make(name: str, steps: int = 20, *overrides: str, share: float | None = None, done: bool = False) -> Path:
        run = tmp_path / name
        run.mkdir(parents=True)
        config = TrainConfig.of({}, ["model.preset=tiny", "train.steps=20", *overrides, f"run.dir={run}"])
        config.save(run / "config.yaml")
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(steps)))
        if share is not None:
            (run / "zeroshot.json").write_text(json.dumps(result(share).to_dict()))
        if done:
            (run / "model").mkdir()
            (run / "model" / "model.safetensors").touch()
        return run

    return make


def cells(table: tuple[list[str], list[list[str]]], name: str) -> list[str]:
    (found,) = [row[1:] for row in table[1] if row[0] == name]
    return found


def test_summary_and_state(make_run: MakeRun) -> None:
    done, going, fresh = make_run("a", 20, done=True), make_run("b", 10, "train.steps=2000"), make_run("c", 0)
    with open(going / "metrics.jsonl", "a") as file:
        file.write('{"step": 11, "lo')  # a line that the trainer is still writing
    before = time.time() - 7300
    os.utime(going / "metrics.jsonl", (before, before))
    table = summary_table(find_runs([done, going, fresh]))
    assert table[0] == ["", "a", "b", "c"]
    assert cells(table, "state") == ["finished", "step 10 of 2,000, 2 h ago", "no steps yet"]
    endless = make_run("d", 4, "train.steps=null", "train.views=1000")
    assert find_runs([endless])[0].state == "step 4, 0 s ago"
    assert cells(table, "views seen") == ["1,000", "500", "–"]
    assert cells(table, "loss") == ["0.200", "0.400", "–"]
    assert cells(table, "temperature, object") == ["0.0700", "0.0700", "–"]
    assert cells(table, "views/s, median") == ["1,050", "550", "–"]
    assert cells(table, "TFLOP/s, median") == ["0.125", "0.125", "–"]
    assert cells(table, "peak memory, GiB") == ["3.0", "2.0", "–"]
    assert cells(table, "time waiting for data") == ["25.0 %", "25.0 %", "–"]
    assert cells(table, "skipped steps") == ["1", "1", "0"]
    assert cells(table, "bad samples") == ["5", "2", "0"]
    assert not any(row[0] == "MFU" for row in table[1])  # logged by no run


def test_losses_are_means_over_the_last_twentieth(make_run: MakeRun) -> None:
    table = summary_table(find_runs([make_run("long", 60)]))
    assert cells(table, "loss") == [f"{(4 / 60 + 4 / 59 + 4 / 58) / 3:.3f}"]


def test_names_are_the_shortest_distinct_path_suffixes(make_run: MakeRun, tmp_path: Path) -> None:
    one, other = make_run("x/run"), make_run("y/run")
    assert [run.name for run in find_runs([one, other])] == ["x/run", "y/run"]
    assert [run.name for run in find_runs([one, one, tmp_path / "x" / ".." / "x" / "run"])] == ["run"]
    make_run("y/also")
    assert [run.name for run in find_runs([tmp_path / "y"])] == ["also", "run"]  # a directory of runs


def test_config_differences(make_run: MakeRun) -> None:
    runs = find_runs([make_run("a"), make_run("b", 3, "optim.lr=1e-3", "data.augment=false")])
    assert config_differences({run.name: run.config for run in runs}) == [
        ["data.augment", "true", "false"],
        ["optim.lr", "2e-05", "0.001"],
    ]


def test_accuracy_table() -> None:
    results = {"a": result(0.5), "b": result(0.25, chance=0.0625)}
    del results["b"].rows[0]
    head, table = accuracy_table(results, "own")
    assert head == ["", "chance", "a", "b"]
    assert table[:3] == [
        ["action, top-1", "12.5 %", "50.0 %", "–"],
        ["action, top-5", "62.5 %", "75.0 %", "–"],
        ["object, top-1", "6.2 to 12.5 %", "50.0 %", "25.0 %"],
    ]
    assert len(table) == 6 and accuracy_table(results, "own", ["seen"])[1] == []
    assert accuracy_table(results, "own", ["held_out"])[1][0][0] == "action, held out of training, top-1"


def test_page(make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [make_run("first", share=0.5, done=True), make_run("second<b>", 7, "optim.lr=1e-3", share=0.25)]
    (paths[1] / "other.json").write_text('{"rows": 3}')  # not an evaluation result
    assert main(["report", *map(str, paths), "--out", str(tmp_path / "out"), "--title", "Two & two"]) == 0
    printed = capsys.readouterr().out
    assert "finished" in printed and f"report: {tmp_path / 'out' / 'report.html'}" in printed
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "<h1>Two &amp; two</h1>" in page and "second&lt;b&gt;" in page and "<b>50.0 %</b>" in page
    assert page.count("<details>") == 2  # seen and held-out texts, one table per rule
    assert "optim.lr" in page and "loss.max_scale" not in page


def test_other_evaluations(make_run: MakeRun, tmp_path: Path) -> None:
    recall = Recall("object", "text_to_image", 8, 8, {1: 0.25}, {1: 0.125}, 3.0)
    accuracy = ProbeAccuracy("global", 8, 0, 4, 20, {1: 0.5}, {1: 0.0}, {1: 0.25}, [100])
    made = {
        "retrieval": RetrievalResult("test", 8, (1,), [recall]),
        "probe": ProbeResult("test", (1,), ProbeSettings(), True, [accuracy]),
        "negatives": NegativesResult("test", 8, [NegativesAccuracy("swapped", 0.75, 8)]),
    }
    paths = [make_run("a"), make_run("b")]
    for name, of_a in made.items():
        (paths[0] / f"{name}.json").write_text(json.dumps(of_a.to_dict()))
    (paths[1] / "negatives.json").write_text(
        json.dumps(
            NegativesResult(
                "test", 8, [NegativesAccuracy("swapped", 0.25, 8), NegativesAccuracy("predicate", 1, 8)]
            ).to_dict()
        )
    )
    runs = find_runs(paths)
    tables = {
        title: score_table({run.name: run.other_results[title] for run in runs if title in run.other_results})
        for title in ("Retrieval, test split", "Linear probe, test split", "Hard negatives, test split")
    }
    assert tables["Retrieval, test split"] == (
        ["", "chance", "a"],
        [["object, text to image, R@1", "12.5 %", "25.0 %"]],
    )
    assert tables["Linear probe, test split"][1] == [["action, top-1", "25.0 %", "50.0 %"]]
    assert tables["Hard negatives, test split"][1] == [
        ["subject and object swapped", "50.0 %", "75.0 %", "25.0 %"],
        ["predicate replaced", "50.0 %", "–", "100.0 %"],
    ]
    page = compare_runs(runs, tmp_path / "pictures", "Both").write(tmp_path / "report.html").read_text()
    assert all(title in page for title in tables) and "<b>75.0 %</b>" in page


def test_skipped_scenes(make_run: MakeRun, tmp_path: Path) -> None:
    paths = [make_run("a", share=0.5), make_run("b", share=0.25)]
    made = NegativesResult("test", 8, [NegativesAccuracy("swapped", 0.75, 8)]).to_dict()
    counts = {paths[0] / "zeroshot.json": 1234, paths[0] / "negatives.json": 0, paths[1] / "negatives.json": 7}
    for path, count in counts.items():
        record = json.loads(path.read_text()) if path.exists() else made
        path.write_text(json.dumps(record | {"skipped": {"count": count, "scenes": []}}))
    kinds = {"zeroshot": "Zero-shot accuracy", "negatives": "Hard negatives, test split"}
    title = "Skipped scenes"
    runs = find_runs(paths)
    (both,) = [s for s in compare_runs(runs, tmp_path / "both", "Both").sections if s.title == title]
    assert both.head == ["", "a", "b"]
    assert both.rows == [[kinds["zeroshot"], "1,234", "0"], [kinds["negatives"], "0", "7"]]
    (one,) = [s for s in compare_runs(runs[:1], tmp_path / "one", "One").sections if s.title == title]
    assert one.rows == [[kinds["zeroshot"], "1,234"]]
    clean = find_runs([make_run("c", share=0.5)])
    assert all(s.title != title for s in compare_runs(clean, tmp_path / "clean", "Clean").sections)


def test_page_of_one_run(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run("only", share=0.5)
    assert main(["report", str(run)]) == 0
    page = (run / "report" / "report.html").read_text()
    assert "Zero-shot accuracy, strict" in page and "optim.lr" not in page and "train.steps" in page
    empty = make_run("empty", 0)
    assert main(["report", str(empty)]) == 0
    page = (empty / "report" / "report.html").read_text()
    assert "no steps yet" in page and "data:image" not in page


def test_pictures(tmp_path: Path) -> None:
    def height(picture: Path) -> int:
        return int.from_bytes(picture.read_bytes()[20:24], "big")

    many = {f"run {i}": rows(5 + i, views=50 + 10 * i) for i in range(11)}
    few = {"run": [{"step": 1, "loss": 1.0, "contrastive/object": 1.0}]}
    assert height(run_curves(many, tmp_path / "many.png")) > 2 * height(run_curves(few, tmp_path / "few.png"))
    with pytest.raises(ValueError, match="no logged steps"):
        run_curves({"run": []}, tmp_path / "none.png")
    own = {"a": result(0.0, chance=0.0).only("own"), "b": result(1.0)}
    assert height(accuracy_comparison(own, tmp_path / "bars.png")) > 300


def test_damaged_lines_are_skipped(make_run: MakeRun) -> None:
    run = make_run("run")
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join([lines[0], bytes(40) + b"\n", b"[1]\n", *lines[1:], b'{"step": 99']))
    (found,) = find_runs([run])
    assert [row["step"] for row in found.rows] == list(range(1, len(lines) + 1))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda run: run.rename(run.parent / "moved"), "does not exist; expected a run directory"),
        (lambda run: (run / "metrics.jsonl").unlink(), "contains no runs: expected metrics.jsonl"),
        (lambda run: (run / "metrics.jsonl").write_text("{}\nnonsense\n"), "metrics.jsonl: not the metrics of a run"),
        (lambda run: (run / "metrics.jsonl").write_text("[1, 2]\n"), "metrics.jsonl: not the metrics of a run"),
        (lambda run: (run / "config.yaml").write_text("a: [1"), "config.yaml: not YAML"),
    ],
)
def test_errors(make_run: MakeRun, broken: Callable[[Path], object], message: str) -> None:
    run = make_run("run")
    broken(run)
    with pytest.raises(UserError, match=message):
        find_runs([run])


def test_a_file_is_not_a_run(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run("run")
    assert main(["report", str(run / "metrics.jsonl")]) == 2
    assert capsys.readouterr().err == f"error: {run / 'metrics.jsonl'} is a file; expected a run directory\n"
