"""Ablations end to end on synthetic scenes with a tiny model: training, resuming, comparison."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from scenarioclip_fast.cli.main import main
from scenarioclip_fast.data import ShardSet, generate_scenes, pack
from scenarioclip_fast.errors import TrainingFailed, UserError
from scenarioclip_fast.eval.session import open_session
from scenarioclip_fast.eval.zeroshot import ZeroShotResult
from scenarioclip_fast.recipes.variants import DEFAULT_VARIANTS, VARIANTS, plan_ablation
from scenarioclip_fast.train.trainer import FitResult, Trainer

SMALL = [
    "model.preset=tiny",
    "model.embed_dim=32",
    "model.vision.image_size=32",
    "model.vision.width=32",
    "model.vision.layers=1",
    "model.text.width=32",
    "model.text.layers=1",
    "model.freeze.embeddings=true",
    "optim.lr=1e-3",
    "data.batch_size=8",
    "data.threads=1",
    "data.decoder=torch",
    "run.device=cpu",
    "train.steps=4",
    "train.log_every=1",
    "train.checkpoint_every=2",
    "train.tensorboard=false",
]
CHOSEN = ["--variants", "full", "no-distillation", "scenarioclip0", "no-focused-regions"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shards")
    pack(generate_scenes(24, seed=0, val=0.0, test=0.25), directory)
    return directory


@pytest.fixture(scope="module")
def ablation(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("ablation") / "run"
    assert main(["ablate", str(shards), *SMALL, f"run.dir={run}", *CHOSEN]) == 0
    return run


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def test_everything_is_written(ablation: Path) -> None:
    assert {path.name for path in ablation.iterdir()} == {
        *("full", "no-distillation", "no-focused-regions"),  # scenarioclip0 is no-distillation
        *("ablation.json", "report.html", "pictures"),
    }
    record = json.loads((ablation / "ablation.json").read_text())
    assert list(record["variants"]) == ["full", "no-distillation", "no-focused-regions"]
    for name, entry in record["variants"].items():
        assert entry["state"] == "finished"
        stored = json.loads((ablation / name / "zeroshot.json").read_text())
        assert entry["zeroshot"] == stored
        skipped = {"skipped": {"count": 0, "scenes": []}}
        assert stored == json.loads(json.dumps(ZeroShotResult.from_dict(stored).to_dict())) | skipped
        assert {row["match"] for row in stored["rows"]} == {"own", "any_in_image"}
    page = (ablation / "report.html").read_text()
    assert "3 of 3 variants" in page and page.count("data:image/png;base64,") == 2
    assert "data.relation_view" in page and "model.variant" in page


def test_variants_differ_in_one_part_only(ablation: Path) -> None:
    full, contrastive, scene = (
        metrics(ablation / name)[0] for name in ("full", "no-distillation", "no-focused-regions")
    )
    levels = [f"contrastive/{level}" for level in ("global", "object", "relation")]
    # The same scenes, augmentation and initial weights give bitwise equal first losses.
    assert [full[level] for level in levels] == [contrastive[level] for level in levels]
    assert full["distillation"] > 0 == contrastive["distillation"]
    assert [full[level] for level in levels[:2]] == [scene[level] for level in levels[:2]]
    assert full[levels[2]] != scene[levels[2]]
    assert full["views"] == scene["views"] == contrastive["views"]


def test_evaluation_uses_the_views_of_training(ablation: Path, shards: Path) -> None:
    for name, view in {"full": "focused", "no-focused-regions": "scene"}.items():
        with open_session(ablation / name, shards, device="cpu") as session, session.loader("test") as loader:
            assert session.data.relation_view == view
            (batch,) = loader
        scene_views = batch.pixels[batch.relation_scene]
        assert torch.equal(batch.pixels[-batch.num_relations :], scene_views) == (view == "scene")


def test_a_second_call_repeats_no_work(
    ablation: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Trainer, "fit", lambda self: pytest.fail("trained again"))
    monkeypatch.setattr("scenarioclip_fast.recipes.ablation.zeroshot", lambda *_, **__: pytest.fail("evaluated again"))
    # Threads and checkpoints do not affect the weights.
    changed = [*SMALL, "data.threads=2", "train.checkpoint_every=1"]
    assert main(["ablate", str(shards), *changed, f"run.dir={ablation}", *CHOSEN]) == 0
    out, err = capsys.readouterr()
    assert "scenarioclip0 is the same as no-distillation" in err
    assert "[3/3] no-focused-regions: already evaluated" in err
    head = out.splitlines()[0].split()
    assert head == ["chance", "full", "no-distillation", "no-focused-regions"]
    for line in ("action, top-1, strict", "relation, top-5, any text of the image", "contrastive loss, object"):
        assert sum(row.startswith(line) for row in out.splitlines()) == 1


def test_results_with_skipped_scenes_are_evaluated_again(
    ablation: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["full", "no-distillation"]
    for name in names:
        shutil.copytree(ablation / name, tmp_path / name)
    file = tmp_path / "full" / "zeroshot.json"
    whole = json.loads(file.read_text())
    lost = [{"split": "test", "scene": "a", "reason": "unreadable_shard", "detail": "not reachable"}]
    file.write_text(json.dumps(whole | {"skipped": {"count": 1, "scenes": lost}}))
    assert main(["ablate", str(shards), *SMALL, f"run.dir={tmp_path}", "--variants", *names]) == 0
    err = capsys.readouterr().err
    assert "[1/2] full: evaluating on" in err and "[2/2] no-distillation: already evaluated" in err
    assert json.loads(file.read_text()) == whole


def test_other_settings_are_rejected(ablation: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ablate", str(shards), *SMALL, "optim.lr=2e-3", f"run.dir={ablation}", *CHOSEN]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "full contains a run with another config (optim.lr was 0.001, is 0.002)" in error


class Killed(BaseException):
    """Not caught by anything, like SIGKILL."""


@pytest.mark.parametrize("how", ["kill", "signal"])
def test_resumes_after_interruption(
    how: str,
    ablation: Path,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    step, variants = Trainer.train_step, ["--variants", "full", "no-distillation"]

    def fatal(self: Trainer, *batch: Any) -> None:
        step(self, *batch)
        if self.config.model.variant == "scenarioclip0" and self.step == 3:
            if how == "kill":
                raise Killed
            os.kill(os.getpid(), signal.SIGTERM)

    command = ["ablate", str(shards), *SMALL, f"run.dir={tmp_path}", *variants]
    shutil.copytree(ablation / "full", tmp_path / "full")
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", fatal)
        if how == "kill":
            with pytest.raises(Killed):
                main(command)
        else:
            assert main(command) == 75
            assert "stopped by SIGTERM: re-run the command" in capsys.readouterr().out
    record = json.loads((tmp_path / "ablation.json").read_text())["variants"]
    assert record["full"]["state"] == "finished" and record["no-distillation"]["zeroshot"] is None
    assert main(command) == 0
    err = capsys.readouterr().err
    assert "[1/2] full: already trained" in err and "[2/2] no-distillation: resuming" in err
    one, other = (weights(root / "no-distillation") for root in (tmp_path, ablation))
    assert all(torch.equal(one[key], other[key]) for key in other)
    assert [row["step"] for row in metrics(tmp_path / "no-distillation")] == [1, 2, 3, 4]


def test_a_failing_variant_is_reported_and_the_others_continue(
    ablation: Path,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fit = Trainer.fit

    def fail(self: Trainer) -> FitResult:
        if self.config.optim.lr == 5:
            raise TrainingFailed("the loss is not finite")
        return fit(self)

    monkeypatch.setattr(Trainer, "fit", fail)
    shutil.copytree(ablation / "full", tmp_path / "full")
    own = ["--variant", "hot", "optim.lr=5", "--variant", "warm", "optim.lr=2e-3", "train.steps=2"]
    # A path and overrides may follow --variants.
    command = ["ablate", "--variants", "full", str(shards), *SMALL, f"run.dir={tmp_path}"]
    assert main([*command, *own]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["chance", "full", "warm"]
    assert "hot failed: the loss is not finite" in out
    record = json.loads((tmp_path / "ablation.json").read_text())["variants"]
    assert "not finite" in record["hot"]["state"] and record["hot"]["zeroshot"] is None
    assert record["warm"]["config"]["optim"]["lr"] == 2e-3


def test_planned_variants() -> None:
    assert set(DEFAULT_VARIANTS) <= set(VARIANTS)
    plan = plan_ablation(None, [*SMALL, "run.dir=here"])
    assert [variant.name for variant in plan] == list(DEFAULT_VARIANTS)
    assert [variant.directory for variant in plan] == [Path("here") / name for name in DEFAULT_VARIANTS]
    assert len({variant.config.run.seed for variant in plan}) == 1
    every = plan_ablation(None, [*SMALL, "run.dir=here"], VARIANTS)
    views = {variant.name: (variant.config.model.variant, variant.config.data.relation_view) for variant in every}
    assert views == {
        "full": ("scenarioclip1", "focused"),
        "no-distillation": ("scenarioclip0", "focused"),
        "no-focused-regions": ("scenarioclip1", "scene"),
        "relation-boxes": ("scenarioclip1", "box"),
        "pyramidclip": ("pyramidclip", "focused"),
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants", "full", "no-distilation"], "variant 'no-distilation': expected one of full, no-distillation"),
        (["--variants", "full", "scenarioclip1"], "got 1 variant, expected at least 2"),
        (["{shards}", "elsewhere"], "expected one SHARDS directory"),
        (["{shards}", "model.variant=pyramidclip"], "model.variant is set by the variants"),
        (["{shards}", "optim.rate=1"], "did you mean optim.lr"),
        (["{shards}", "--variant", "full", "optim.lr=1"], "is built in"),
        (["{shards}", "--variant", "a/b", "optim.lr=1"], "is not a valid directory name"),
        (["{shards}", "--variant", "a", "optim.lr"], "expected key=value"),
        (["{shards}", "--variant", "a"], "variant 'a': got no changes"),
        (["{shards}", "--variants", "full,nothing"], "variant 'nothing': expected one of"),
        (["{shards}", "--batch-size", "0"], "--batch-size: got 0"),
        (["{shards}", "--split", "val"], "the val split has no scenes"),
        (["-c", "nowhere.yaml", "{shards}"], "nowhere.yaml"),
        (["nowhere"], "nowhere"),
        ([], "pass SHARDS"),
    ],
)
def test_errors_are_one_line_and_nothing_is_trained(
    arguments: list[str], message: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [argument.format(shards=shards) for argument in arguments]
    assert main(["ablate", *SMALL, f"run.dir={tmp_path / 'run'}", *given]) == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "run").exists()


def test_keys_of_custom_variants_are_checked() -> None:
    with pytest.raises(UserError, match="unknown config key"):
        plan_ablation(None, SMALL, ["full"], {"mine": ["data.no_such_key=1"]})


def test_overrides_may_precede_and_follow_options(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "ablate"):
        assert main([command, "optim.lr=1", "-c", "nowhere.yaml", "run.seed=3"]) == 2
        assert "nowhere.yaml" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            main([command, "optim.lr=1", "--no-such-option", "run.seed=3"])
        assert "unrecognized arguments: --no-such-option" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["doctor", "optim.lr=1"])
    assert "unrecognized arguments: optim.lr=1" in capsys.readouterr().err


def test_data_without_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The published relation view needs masks: the ablation ends before it trains anything."""
    scenes = list(generate_scenes(12, seed=1))
    for entry in (entry for scene in scenes for entry in scene.objects):
        entry.mask = None
    pack(scenes, tmp_path / "bare", progress=False)
    assert main(["ablate", *SMALL, f"run.dir={tmp_path / 'run'}", str(tmp_path / "bare")]) == 2
    assert "has masks, which data.relation_view=focused needs" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_ablation_on_several_data_sets(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack(generate_scenes(12, seed=1, val=0.0, test=0.0), tmp_path / "other", progress=False)
    data = f"data.shards=[{{path: {tmp_path / 'other'}, weight: 2}}, {shards}]"
    options = [*SMALL, "train.steps=1", f"run.dir={tmp_path / 'run'}", "--variants", "full", "no-distillation"]
    assert main(["ablate", data, *options]) == 0
    result = json.loads((tmp_path / "run" / "full" / "zeroshot.json").read_text())
    assert result["scenes"] == len(ShardSet(shards, "test"))  # the first set has no test split
    assert main(["ablate", data, *options, "--split", "val"]) == 2
    assert f"{tmp_path / 'other'}, {shards}: the val split has no scenes" in capsys.readouterr().err
