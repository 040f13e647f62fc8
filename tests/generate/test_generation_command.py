"""`scenarioclip-fast generate` as a whole: killed processes, worker processes, and the real model classes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_detectors
from tiny_detectors import one_thread  # noqa: F401  # a fixture

from scenarioclip_fast.cli.main import main
from scenarioclip_fast.data import ShardSet
from scenarioclip_fast.generate.config import GenerateConfig
from scenarioclip_fast.generate.drawn.vlm_server import StubServer
from scenarioclip_fast.generate.records import all_outcomes
from scenarioclip_fast.parsing import parse_yaml
from scenarioclip_fast.recipes.generation_demo import answers, draw

N = 48
DRAWN = [
    *("--detector", "scenarioclip_fast.generate.drawn.detector:DrawnDetector"),
    *("--segmenter", "scenarioclip_fast.generate.drawn.segmenter:DrawnSegmenter"),
    *("--set", "ground.nms=0.8", "--unit-size", "16", "--review", "0", "--device", "cpu"),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, StubServer]]:
    """A folder of drawn scenes, and a server that knows them and takes its time."""
    folder = tmp_path_factory.mktemp("drawn") / "images"
    with StubServer(answers(draw(N, folder, seed=3)), vary=True) as server:
        yield folder, server


def arguments(images: Path, server: StubServer, out: Path, *options: str) -> list[str]:
    return ["generate", str(images), "--out", str(out), "--vlm-url", server.url, "--vlm-model", server.model, *options]


def shards(out: Path) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in (out / "shards").iterdir()}
    assert {"train-000000.tar", "index.bin", "manifest.json", "vocabulary.bin"} <= files.keys()
    return files


def lines(out: Path) -> int:
    """The records so far, finished or not."""
    count = 0
    for path in out.glob("*/*.jsonl*"):
        with contextlib.suppress(FileNotFoundError):  # just renamed
            count += path.read_bytes().count(b"\n")
    return count


@pytest.fixture(scope="module")
def whole(images: tuple[Path, StubServer], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main(arguments(*images, out, *DRAWN)) == 0
    return out


def test_killed_processes_resume_to_the_same_shards(
    images: tuple[Path, StubServer], whole: Path, tmp_path: Path
) -> None:
    out, rng = tmp_path / "out", random.Random(0)
    command = [sys.executable, "-m", "scenarioclip_fast", *arguments(*images, out, *DRAWN)]
    points = sorted(rng.sample(range(1, lines(whole)), 5))
    for point in points:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while process.poll() is None and (not out.is_dir() or lines(out) < point):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert main(command[3:]) == 0
    assert shards(out) == shards(whole)


def test_worker_processes_write_the_same_shards(
    images: tuple[Path, StubServer], whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(*images, tmp_path / "out", *DRAWN, "--workers", "2")) == 0
    assert shards(tmp_path / "out") == shards(whole)
    assert "segment: 3/3 units" in capfd.readouterr().err


def test_a_second_run_is_a_no_op(
    images: tuple[Path, StubServer], whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, requests = shards(whole), images[1].requests
    assert main(arguments(*images, whole, *DRAWN)) == 0
    assert shards(whole) == before and images[1].requests == requests
    assert "up to date" in capsys.readouterr().err


def test_a_later_run_keeps_the_settings(
    images: tuple[Path, StubServer],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    assert main(arguments(*images, out, *DRAWN, "--stages", "caption,ground,segment,curate")) == 0
    found = [one for one in all_outcomes(out / "curate") if not one.reason]
    key = next(one.key for one in found if len(one.result["scene"]["relations"]) >= 2)
    Path("decisions.json").write_text(json.dumps({"schema": 1, "scenes": {key: {"scene": "reject"}}}))
    assert main(["generate", "--out", "out", "--stages", "curate,pack", "--decisions", "decisions.json"]) == 0
    scenes = [one.key for one in all_outcomes(out / "curate") if not one.reason]
    assert scenes and key not in scenes
    capsys.readouterr()
    monkeypatch.chdir("/")
    assert main(["generate", "--out", str(out), "--set", "curate.min_relations=2"]) == 0
    told = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("settings of the last run"))
    assert f"curate.decisions={tmp_path}/decisions.json" in told and "min_relations" not in told
    assert "ground.nms=0.8" in told and "ground.box_threshold" not in told  # which is the default
    assert key not in [one.key for one in all_outcomes(out / "curate") if not one.reason]
    assert main(["generate", "--out", str(out), "--set", "curate.decisions="]) == 0
    assert key in [one.key for one in all_outcomes(out / "curate") if not one.reason]


def test_settings_that_do_not_work_are_not_kept(
    images: tuple[Path, StubServer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(arguments(*images, out, *DRAWN)) == 0
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"schema": 1, "scenes": {"none": {}}}')
    for option in (["--decisions", "none.json"], ["--decisions", str(wrong)], ["--set", "curate.min_relations=99"]):
        assert main(["generate", "--out", str(out), *option]) == 2
        assert main(["generate", "--out", str(out)]) == 0, capsys.readouterr().err
        assert main(["generate", "--out", str(out), "--stages", "pack"]) == 0
    assert main(["generate", "--out", str(tmp_path / "none")]) == 2
    assert "none: holds no earlier run; name the images" in capsys.readouterr().err


def test_redo_discards_captions_only_for_a_model_that_exists(
    images: tuple[Path, StubServer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, server = tmp_path / "out", images[1]
    assert main(arguments(*images, out, *DRAWN, "--stages", "caption")) == 0
    before = {path.name: path.read_bytes() for path in (out / "caption").iterdir()}
    redo = ["generate", "--out", str(out), "--stages", "caption", "--redo", "caption", "--vlm-model"]
    for model, url, message in (
        ("other", server.url, f"caption.model: got 'other', but {server.url} has {server.model}"),
        (server.model, "http://127.0.0.1:1/v1", "caption: cannot reach http://127.0.0.1:1/v1"),
        (str(tmp_path / "none"), "", "caption.model: cannot load"),
    ):
        assert main([*redo, model, "--set", f"caption.url={url}"]) == 2
        assert message in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (out / "caption").iterdir()} == before
    # Without records, settings may change.
    for name in before:
        (out / "caption" / name).write_bytes(before[name].partition(b"\n")[0] + b"\n")
        (out / "caption" / name).rename(out / "caption" / f"{name}.partial")
    assert main(["generate", "--out", str(out), "--stages", "caption", "--set", "caption.max_tokens=999"]) == 0


def test_decisions_and_coco_corrections_are_both_applied(
    images: tuple[Path, StubServer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, coco, decisions = tmp_path / "out", tmp_path / "coco.json", tmp_path / "decisions.json"
    assert main(arguments(*images, out, *DRAWN, "--coco", str(coco))) == 0
    content = json.loads(coco.read_text())
    image = content["images"][0]
    key, width = Path(image["file_name"]).stem, image["width"]
    content["categories"].append({"id": 999, "name": "cloud"})
    square = [0, 0, 20, 0, 20, 20, 0, 20]
    added = {"id": 10**8, "image_id": image["id"], "category_id": 999, "bbox": [0, 0, 20, 20], "area": 400}
    assert width > 20
    content["annotations"].append({**added, "segmentation": [square], "iscrowd": 0})
    coco.write_text(json.dumps(content))
    command = ["generate", "--out", str(out), "--set", "curate.max_overlap=1", "--stages", "curate,pack"]
    assert main([*command, "--decisions", str(coco)]) == 0, capsys.readouterr().err

    def names() -> dict[int, str]:
        (scene,) = [one.result["scene"] for one in all_outcomes(out / "curate") if one.key == key]
        return {one["id"]: one["name"] for one in scene["objects"]}

    (number,) = [number for number, name in names().items() if name == "cloud"]
    decided = {"schema": 1, "scenes": {key: {"objects": {str(number): {"name": "big cloud"}}}}}
    decisions.write_text(json.dumps(decided))
    assert main([*command, "--decisions", str(decisions)]) == 0, capsys.readouterr().err
    assert names()[number] == "big cloud"
    two = ["--decisions", str(decisions), "--decisions", str(decisions)]
    assert main([*command, *two]) == 2 and "two files of one kind" in capsys.readouterr().err
    assert main([*command, "--decisions", str(decisions), "--decisions", str(coco)]) == 0
    assert names()[number] == "big cloud"


def test_settings_take_precedence_in_order(
    images: tuple[Path, StubServer], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "settings.yaml").write_text("ground: {nms: 0.5, box_threshold: 0.3}\ncurate: {match: 0.5}\n")
    options = ["--published", "-c", str(tmp_path / "settings.yaml"), "--set", "curate.match=0.6"]
    assert main(["generate", "--out", str(whole), "--print-config", *options]) == 0
    found = GenerateConfig.of(parse_yaml(capsys.readouterr().out))
    assert found.caption.model == images[1].model and found.caption.url == images[1].url
    assert found.ground.nms == 0.5 and found.ground.box_threshold == 0.3
    assert found.curate.match == 0.6 and found.curate.min_relations == 3
    # A model without a URL is one in this process, unless it is that of the last run.
    for model, url in (("other", ""), (images[1].model, images[1].url)):
        assert main(["generate", "--out", str(whole), "--print-config", "--vlm-model", model]) == 0
        assert GenerateConfig.of(parse_yaml(capsys.readouterr().out)).caption.url == url
    assert main(["generate", "--print-config"]) == 0
    assert GenerateConfig.of(parse_yaml(capsys.readouterr().out)) == GenerateConfig()


def test_the_real_classes_work_together(
    images: tuple[Path, StubServer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random weights find boxes and masks of no meaning, so that nothing may be dropped for what they are."""
    detector, segmenter = tiny_detectors.grounding_dino(tmp_path / "dino"), tiny_detectors.sam(tmp_path / "sam")
    settings = ["ground.box_threshold=0", "ground.text_threshold=0", "ground.nms=0.99", "curate.min_agreement=0"]
    settings += ["curate.match=0.3", "curate.max_overlap=1", "curate.min_mask_pixels=1"]
    options = [word for setting in settings for word in ("--set", setting)]
    models = ["--detector", str(detector), "--segmenter", str(segmenter), "--device", "cpu", "--review", "3"]
    assert main(arguments(*images, tmp_path / "out", *models, *options, "--layout", "both")) == 0
    out = capsys.readouterr().out
    assert "boxes" in out and "masks" in out and (tmp_path / "out/review.html").is_file()
    assert sum(len(ShardSet(tmp_path / "out/shards", split)) for split in ("train", "val", "test")) > 0
    assert main(["pack", str(tmp_path / "out/published"), "--out", str(tmp_path / "again")]) == 0


def test_boxes_of_a_packed_data_set_get_masks(images: tuple[Path, StubServer], whole: Path, tmp_path: Path) -> None:
    shards_ = str(whole / "shards")
    given = ["--vlm-model", "given", "--detector", "given", *DRAWN[2:], "--out", str(tmp_path / "out")]
    assert main(["generate", shards_, *given]) == 0
    segmented = {one.key: one.result for one in all_outcomes(tmp_path / "out/segment")}
    packed = {}
    for split in ("train", "val", "test"):
        for set_ in (ShardSet(shards_, split),):
            packed |= {key: set_.read(i) for i, key in enumerate(set_.keys)}
    assert segmented.keys() == packed.keys()
    for key, scene in packed.items():
        assert [one["mask"] is not None for one in segmented[key]["objects"]] == [True] * len(scene.objects)
    again = ShardSet(tmp_path / "out/shards", "train")
    scene = again.read(0)
    assert scene.relations == packed[scene.key].relations and scene.split == packed[scene.key].split


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vlm-model", "other", "--stages", "caption"], "caption.model: got 'other'"),
        (["--set", "ground.treshold=1"], "unknown config key ground.treshold"),
        (["--set", "ground.nms=2"], "ground.nms: got 2, expected 0 to 1"),
        (["--stages", "caption,detect"], "stage 'detect'"),
        (["--decisions", "none.json", "--stages", "curate"], "none.json"),
        (["--decisions", "none.json", "--stages", "pack"], "--decisions: applied by the stage curate"),
        (["--set", "ground.nms"], "expected key=value, for example ground.box_threshold=0.3"),
        (["--detector", "no.module:Detector", "--redo", "caption,ground"], "ground.model: cannot import"),
        (["-c", "none.yaml"], "none.yaml"),
        (["--set", "ground.nms=0.7"], "keep 0.8, choose another --out, or discard the records with --redo ground"),
        (["--workers", "0"], "workers: got 0"),
    ],
)
def test_mistakes_are_one_line(
    images: tuple[Path, StubServer],
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    os.symlink(whole, tmp_path / "out")
    assert main(["generate", str(images[0]), "--out", str(tmp_path / "out"), *options]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]


def test_a_run_says_what_it_rejected(images: tuple[Path, StubServer], whole: Path) -> None:
    listed = [json.loads(line) for line in (whole / "rejected.jsonl").read_text().splitlines()]
    assert listed and all(one.keys() == {"stage", "key", "part", "reason", "detail"} for one in listed)
