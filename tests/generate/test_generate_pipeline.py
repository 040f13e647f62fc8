"""Running stages over units: resuming, changed inputs, rejections."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import simplejpeg

from scenarioclip_fast.data import ShardSet, generate_scenes, load_reference, rle
from scenarioclip_fast.data.scene import Scene, scene_to_json
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.generate import GenerateConfig, Outcome, Work, factory, generate, pipeline
from scenarioclip_fast.generate.records import all_outcomes

N = 30
DRAWN = "scenarioclip_fast.generate.drawn.detector:DrawnDetector"


class Killed(Exception):
    """Stands for a signal."""


class FakeStage:
    """Answers from the truth; calls `on_work` for each image."""

    def __init__(self, name: str, truth: dict[str, Scene], on_work: Callable[[Work], Outcome | None]) -> None:
        self.name, self._truth, self._on_work = name, truth, on_work
        self.counts = {"calls": 0.0}

    def run(self, works: Iterator[Work]) -> Iterator[Outcome]:
        waiting: list[Outcome] = []
        for work in works:
            self.counts["calls"] += 1
            waiting.append(self._on_work(work) or Outcome(work.key, self._result(work)))
            if len(waiting) == 3:  # out of order, as with concurrent requests
                yield from reversed(waiting)
                waiting.clear()
        yield from reversed(waiting)

    def _result(self, work: Work) -> dict[str, Any]:
        scene = self._truth[work.key]
        size = tuple(scene.image.shape[:2])
        record = scene_to_json(scene, size)
        if self.name == "caption":
            names = [o.name for o in scene.objects]
            relations = [[names[r.subject], r.predicate, names[r.object]] for r in scene.relations]
            return {"size": list(size), "action": scene.action, "objects": names, "relations": relations}
        if self.name == "ground":
            return {"objects": [{"name": o.name, "box": list(o.box), "score": 1.0} for o in scene.objects]}
        for entry, o in zip(record["objects"], scene.objects, strict=True):
            entry["mask"] = rle.encode(o.mask)
        assert set(work.records) == set(pipeline.RECORDED[: pipeline.RECORDED.index(self.name)])
        return {"scene": record, "rejected": []} if self.name == "curate" else {"objects": record["objects"]}

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def truth() -> dict[str, Scene]:
    return {scene.key: scene for scene in generate_scenes(N, seed=5)}


@pytest.fixture
def images(truth: dict[str, Scene], tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for key, scene in truth.items():
        (tmp_path / "images" / f"{key}.jpg").write_bytes(simplejpeg.encode_jpeg(scene.image.numpy()))
    return tmp_path / "images"


class Models:
    """The stages of a run: `on_work[name]` is called for each image."""

    def __init__(self, truth: dict[str, Scene]) -> None:
        self.truth = truth
        self.on_work: dict[str, Callable[[Work], Outcome | None]] = {}
        self.made: dict[str, FakeStage] = {}

    def make(self, name: str, config: Any, device: str, context: Any = None) -> FakeStage:
        self.made[name] = FakeStage(name, self.truth, self.on_work.get(name, lambda work: None))
        return self.made[name]

    def calls(self) -> dict[str, int]:
        """Images by stage since the last call, or since the stage was last made."""
        made, self.made = self.made, {}
        return {name: int(made[name].counts["calls"]) if name in made else 0 for name in pipeline.RECORDED}


@pytest.fixture
def models(truth: dict[str, Scene], monkeypatch: pytest.MonkeyPatch) -> Models:
    made = Models(truth)
    monkeypatch.setattr(factory, "make_stage", made.make)
    monkeypatch.setattr(factory, "prepare_context", lambda name, config, out: None)
    monkeypatch.setattr(factory, "check_stage", lambda name, config: None)
    return made


CONFIG: dict[str, Any] = {"caption": {"model": "fake"}, "pack": {"val": 0.1, "test": 0.2}}


def run(images: Path | list[Path], out: Path, config: GenerateConfig | None = None, **options: Any) -> Any:
    options = {"unit_size": 8, "review": 0, "progress": False, "device": "cpu"} | options
    return generate(images, out, config or GenerateConfig.of(CONFIG), **options)


def files(out: Path) -> dict[str, bytes]:
    """The contents that must not depend on how a run went."""
    names = [*out.glob("*/*.jsonl"), *out.glob("shards/*"), out / "images.jsonl", out / "rejected.jsonl"]
    return {str(path.relative_to(out)): path.read_bytes() for path in names if path.is_file()}


def test_a_run_packs_what_the_models_say(images: Path, truth: dict[str, Scene], models: Models, tmp_path: Path) -> None:
    report = run(images, tmp_path / "out")
    assert [(stage.name, stage.images) for stage in report.stages] == [(name, N) for name in pipeline.RECORDED]
    assert sum(report.packed.splits[split]["scenes"] for split in report.packed.splits) == N
    for split in ("train", "val", "test"):
        shards = ShardSet(tmp_path / "out/shards", split)
        for i, key in enumerate(shards.keys):
            scene = shards.read(i)
            assert scene.action == truth[key].action
            assert [o.name for o in scene.objects] == [o.name for o in truth[key].objects]
            assert scene.image == (images / f"{key}.jpg").read_bytes()
    assert set(models.calls().values()) == {N}
    again = run(images, tmp_path / "out")
    assert again.packed.up_to_date and models.calls() == dict.fromkeys(pipeline.RECORDED, 0)


@pytest.mark.parametrize("seed", range(5))
def test_a_killed_run_resumes_to_the_same_bytes(images: Path, models: Models, tmp_path: Path, seed: int) -> None:
    run(images, tmp_path / "whole")
    rng = random.Random(seed)
    left = {name: rng.randrange(1, N) for name in pipeline.RECORDED}

    def dies(work: Work, name: str) -> None:
        left[name] -= 1
        if left[name] == 0:
            raise Killed

    for name in pipeline.RECORDED:
        models.on_work[name] = lambda work, name=name: dies(work, name)  # type: ignore[misc]
    kills = 0
    for _ in range(len(left) + 1):
        try:
            run(images, tmp_path / "killed")
        except Killed:
            kills += 1
            for partial in (tmp_path / "killed").glob("*/*.partial"):  # as if killed while writing
                with partial.open("ab") as file:
                    file.write(b'{"key": "cut')
    assert kills == len(left) and files(tmp_path / "killed") == files(tmp_path / "whole")


def test_finished_images_are_not_processed_again(images: Path, models: Models, tmp_path: Path) -> None:
    seen: list[str] = []

    def dies(work: Work) -> None:
        seen.append(work.key)
        if len(seen) == 20:
            raise Killed

    models.on_work["ground"] = dies
    with pytest.raises(Killed):
        run(images, tmp_path / "out")
    run(images, tmp_path / "out")
    # Two of three outcomes were waiting in the stage when it died.
    assert len(seen) <= N + 2 and set(seen) == set(models.truth)


def test_only_what_changed_is_computed_anew(images: Path, models: Models, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(images, out)
    assert set(models.calls().values()) == {N}
    other = GenerateConfig.of(CONFIG, {"curate": {"min_relations": 2}})
    run(images, out, other)
    assert models.calls() == {"caption": 0, "ground": 0, "segment": 0, "curate": N}
    with pytest.raises(UserError, match=r"ground\.box_threshold: got 0\.5, but .* made with 0\.25; .*--redo ground"):
        run(images, out, GenerateConfig.of(CONFIG, {"ground": {"box_threshold": 0.5}}))
    run(images, out, GenerateConfig.of(CONFIG, {"ground": {"box_threshold": 0.5}}), redo=["ground"])
    assert models.calls() == {"caption": 0, "ground": N, "segment": N, "curate": N}
    run(images, out, GenerateConfig.of(CONFIG, {"ground": {"box_threshold": 0.5, "batch_size": 2}}))
    assert set(models.calls().values()) == {0}


def test_rejections_have_reasons_and_passing_ones_are_tried_again(
    images: Path, truth: dict[str, Scene], models: Models, tmp_path: Path
) -> None:
    keys = sorted(truth)
    failing = {keys[3]: Outcome(keys[3], reason="server_error", detail="500", retry=True)}
    models.on_work["caption"] = lambda work: failing.get(work.key)
    models.on_work["ground"] = lambda work: (
        Outcome(work.key, reason="no_boxes", detail="none of 3 objects") if work.key == keys[4] else None
    )
    report = run(images, tmp_path / "out")
    assert [dict(stage.rejected) for stage in report.stages] == [{"server_error": 1}, {"no_boxes": 1}, {}, {}]
    assert "1 server_error" in str(report)
    listed = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["key"], r["part"], r["reason"]) for r in listed] == [
        ("caption", keys[3], "image", "server_error"),
        ("ground", keys[4], "image", "no_boxes"),
    ]
    failing.clear()
    models.calls()
    report = run(images, tmp_path / "out")
    assert models.calls() == {"caption": 1, "ground": 8, "segment": 7, "curate": 7}  # the unit of 8, less one rejected
    assert sum(n["scenes"] for n in report.packed.splits.values()) == N - 1


def test_stages_run_on_their_own(images: Path, models: Models, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"ground: .*caption/000000\.jsonl does not exist; finish the stage caption"):
        run(images, out, stages=["ground"])
    run(images, out, stages=["caption"])
    assert not (out / "ground").exists()
    with pytest.raises(UserError, match=r"pack: .* has no curated scenes"):
        run([], out, stages=["pack"])
    report = run([], out, stages=["ground", "segment", "curate", "pack"])
    assert [stage.images for stage in report.stages] == [N] * 3


def test_new_images_are_appended(images: Path, truth: dict[str, Scene], models: Models, tmp_path: Path) -> None:
    keys = sorted(truth)
    late = tmp_path / "late"
    late.mkdir()
    for key in keys[:5]:
        (images / f"{key}.jpg").rename(late / f"{key}.jpg")
    run(images, tmp_path / "out")
    before = files(tmp_path / "out")
    report = run([images, late], tmp_path / "out")
    assert [stage.images for stage in report.stages] == [5] * 4
    assert all(
        files(tmp_path / "out")[f"{name}/000000.jsonl"] == before[f"{name}/000000.jsonl"] for name in pipeline.RECORDED
    )


def test_a_stage_that_rejects_everything_ends(images: Path, models: Models, tmp_path: Path) -> None:
    models.on_work["caption"] = lambda work: Outcome(work.key, reason="answer_not_json", detail="got 'hello'")
    message = (
        r"caption: all images were rejected: 30 answer_not_json, for example .*: got 'hello'; see .*/rejected\.jsonl"
    )
    with pytest.raises(UserError, match=message):
        run(images, tmp_path / "out")
    assert len((tmp_path / "out/rejected.jsonl").read_text().splitlines()) == N
    del models.on_work["caption"]
    run(images, tmp_path / "out")
    assert models.calls()["caption"] == N


def test_the_first_rejections_end_a_run(
    images: Path, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_EARLY", 8)
    models.on_work["caption"] = lambda work: Outcome(work.key, reason="answer_not_json", detail="got 'hello'")
    with pytest.raises(UserError, match=r"the first 8 images were all rejected: answer_not_json: got 'hello'"):
        run(images, tmp_path / "out")
    # They are not kept: when the cause is corrected, all images are processed.
    del models.on_work["caption"]
    run(images, tmp_path / "out")
    assert models.calls()["caption"] == N


def test_settings_hold_for_later_runs(
    images: Path, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "detector").mkdir()
    settings = {"ground": {"model": "detector", "nms": 0.5}, "curate": {"min_relations": 2}, "pack": {"val": 0.3}}
    run(images, out, GenerateConfig.of(CONFIG, settings))
    models.calls()
    monkeypatch.chdir("/")
    generate([], out, review=0, progress=False, device="cpu")
    assert set(models.calls().values()) == {0}
    found = GenerateConfig.of(json.loads((out / "generate.json").read_text())["settings"])
    assert found.ground.model == str(tmp_path / "detector") and found.ground.nms == 0.5
    assert found.curate.min_relations == 2 and found.pack.val == 0.3


def test_settings_of_stages_that_do_not_run_are_not_ignored(images: Path, models: Models, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(images, out)
    other = GenerateConfig.of(CONFIG, {"ground": {"nms": 0.5}})
    with pytest.raises(UserError, match=r"ground\.nms: got 0\.5, but .* made with 0\.4, .* --redo ground"):
        run([], out, other, stages=["curate", "pack"])
    run([], out, other, stages=["caption"])  # makes nothing from the boxes
    fewer = GenerateConfig.of(CONFIG, {"curate": {"min_relations": 2}})
    with pytest.raises(UserError, match=r"curate\.min_relations: got 2, .* made with 1, .*; add curate to --stages$"):
        run([], out, fewer, stages=["pack"])


def test_stale_scenes_are_not_packed(images: Path, models: Models, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(images, out)
    key = min(models.truth)
    empty = Outcome(key, {"size": [8, 8], "action": None, "objects": [], "relations": []})
    models.on_work["caption"] = lambda work: empty if work.key == key else None
    run([], out, stages=["caption", "ground", "segment"], redo=["caption"])
    with pytest.raises(UserError, match=r"pack: 1 of 4 units of images are not curated, .*; add curate to --stages"):
        run([], out, stages=["pack"])
    run([], out, stages=["curate", "pack"])
    before = files(out)
    models.on_work.clear()
    run([], out, stages=["caption"], redo=["caption"])
    for stages in (["pack"], ["curate", "pack"], ["segment", "curate"]):  # the boxes are of other captions
        with pytest.raises(
            UserError, match=r"the inputs of the records of ground have changed; run the stage ground again"
        ):
            run([], out, stages=stages)
    assert files(out)["segment/000000.jsonl"] == before["segment/000000.jsonl"]


def test_models_are_checked_before_the_first_stage(
    images: Path, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    for section, name in (("ground", "detektor:Detector"), ("segment", "./sam")):
        config = GenerateConfig.of(CONFIG, {"ground": {"model": DRAWN}}, {section: {"model": name}})
        with pytest.raises(UserError, match=rf"{section}\.model: "):
            run(images, tmp_path / "out", config)
        assert not (tmp_path / "out/caption").exists()


def test_a_damaged_record_is_named(images: Path, models: Models, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(images, out, stages=["caption"])
    path = out / "caption/000001.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"000001\.jsonl: line 9 is damaged \(the line is cut off\)"):
        run(images, out, stages=["ground"])
    path.unlink()
    run(images, out)
    assert sum(1 for _ in all_outcomes(out / "caption")) == N


def test_one_process_at_a_time(images: Path, models: Models, tmp_path: Path) -> None:
    def enters(work: Work) -> None:
        with pytest.raises(UserError, match="another process is generating into this directory"):
            run(images, tmp_path / "out")

    models.on_work["segment"] = enters
    run(images, tmp_path / "out")


def test_foreign_directories_are_left_alone(images: Path, models: Models, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and not written by generate"):
        run(images, tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        run(images, tmp_path / "file")
    (tmp_path / "out/generate.json").write_text("{}")
    with pytest.raises(UserError, match=r"generate\.json: damaged"):
        run(images, tmp_path / "out")
    assert (tmp_path / "out/notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["generate.json", "images.jsonl", "report.html", "caption/000000.jsonl", "shards"])
def test_a_coco_file_replaces_no_file_of_the_run(images: Path, models: Models, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    run(images, out)
    before = files(out)
    with pytest.raises(UserError, match="coco: "):
        run(images, out, coco=out / name)
    assert files(out) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": 2, "settings": {}, "stages": {}}', "got schema 2, expected 1"),
        ('{"schema": 1, "settings": {"ground": {"nms": "x"}}, "stages": {}}', r"generate\.json: ground\.nms: got"),
        ("null", r"generate\.json: damaged"),
    ],
)
def test_damaged_settings_name_their_file(
    images: Path, models: Models, tmp_path: Path, text: str, message: str
) -> None:
    out = tmp_path / "out"
    run(images, out, stages=["caption"])
    (out / "generate.json").write_text(text)
    with pytest.raises(UserError, match=message):
        generate([], out, progress=False)


def test_redo_keeps_foreign_files(images: Path, models: Models, tmp_path: Path) -> None:
    run(images, tmp_path / "out", stages=["caption"])
    (tmp_path / "out/caption/notes.txt").write_text("mine")
    run(images, tmp_path / "out", stages=["caption"], redo=["caption"])
    assert models.calls()["caption"] == N and (tmp_path / "out/caption/notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": ["captoin"]}, r"stage 'captoin': did you mean caption\?"),
        ({"redo": ["all"]}, "stage 'all'"),
        ({"workers": 0}, "workers: got 0"),
        ({"unit_size": 0}, "unit size: got 0"),
        ({"device": "gpu"}, "gpu"),
        ({"config": GenerateConfig()}, r"caption\.model: got nothing, expected a vision-language model: --vlm-url"),
    ],
)
def test_bad_arguments_end_before_anything_is_written(
    images: Path, models: Models, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(images, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_published_layout(images: Path, truth: dict[str, Scene], models: Models, tmp_path: Path) -> None:
    config = GenerateConfig.of(CONFIG, {"pack": {"layout": "both"}})
    run(images, tmp_path / "out", config)
    run(images, tmp_path / "out", config)  # replaces it
    rejected: list[object] = []
    found = {scene.key: scene for scene in load_reference(tmp_path / "out/published", rejected.append)}
    assert not rejected and found.keys() == truth.keys()
    for key, scene in found.items():
        assert scene.relations == truth[key].relations and scene.image == (images / f"{key}.jpg").read_bytes()
        assert all((a.mask == b.mask).all() for a, b in zip(scene.objects, truth[key].objects, strict=True))
    splits = {scene.split for scene in found.values()}
    assert splits == {"train", "val", "test"}


def test_a_directory_inside_the_images_is_not_listed(images: Path, models: Models, tmp_path: Path) -> None:
    config = GenerateConfig.of(CONFIG, {"pack": {"layout": "both"}})
    run(images, images / "out", config)
    before = (images / "out/images.jsonl").read_bytes()
    report = run(images, images / "out", config)
    assert (images / "out/images.jsonl").read_bytes() == before
    assert [stage.images for stage in report.stages] == [0] * 4
    with pytest.raises(UserError, match=r"out: is the output of generate; name .*out/shards for its data set"):
        run(images / "out", tmp_path / "other", config)
    run(images, tmp_path / "other", config)
    assert (tmp_path / "other/images.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": "none"}, "no such file"),
        ({"stages": ["curate", "pack"]}, "redo: got caption, which is not among the stages to run"),
        ({"config": {"ground": {"box_threshold": 0.5}}}, r"ground\.box_threshold: got 0\.5"),
    ],
)
def test_redo_discards_nothing_if_something_else_is_wrong(
    images: Path, models: Models, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    out = tmp_path / "out"
    run(images, out)
    before = files(out)
    options = {"redo": ["caption"], "stages": change.get("stages", pipeline.STAGES)}
    config = GenerateConfig.of(CONFIG, change.get("config", {}))
    with pytest.raises(UserError, match=message):
        run(tmp_path / change["images"] if "images" in change else images, out, config, **options)
    assert files(out) == before


def test_a_temporary_file_of_a_killed_run_is_no_record(images: Path, models: Models, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(images, out, stages=["caption"])
    (out / "ground").mkdir()
    left = out / "ground" / f".000000.jsonl.{'0' * 32}.partial"
    left.touch()
    config = GenerateConfig.of(CONFIG, {"ground": {"box_threshold": 0.5}})
    run(images, out, config, redo=["ground"], stages=["ground"])
    assert not left.exists()
