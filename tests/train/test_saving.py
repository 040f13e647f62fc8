"""When a run saves, and what it can resume from."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from scenarioclip_fast.data import Batch
from scenarioclip_fast.errors import TrainingFailed, UserError
from scenarioclip_fast.eval.checkpoint import open_checkpoint
from scenarioclip_fast.losses import ScenarioLoss
from scenarioclip_fast.model import ScenarioCLIP
from scenarioclip_fast.train import checkpoint
from scenarioclip_fast.train.config import TrainConfig
from scenarioclip_fast.train.export import learned_scales
from scenarioclip_fast.train.metrics import read_metrics
from scenarioclip_fast.train.trainer import Trainer

Make = Callable[..., TrainConfig]


def steps(config: TrainConfig) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in (Path(config.run.dir) / "checkpoints").iterdir())


def meta_file(config: TrainConfig, step: int) -> Path:
    return Path(config.run.dir) / "checkpoints" / f"step-{step:08d}" / "meta.json"


def edit_meta(config: TrainConfig, step: int, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the metadata of a checkpoint, with its checksum."""
    file = meta_file(config, step)
    meta = json.loads(file.read_text())
    del meta["sha256"]
    change(meta)
    file.write_text(json.dumps({**meta, "sha256": checkpoint._digest_of(meta)}))


@pytest.mark.parametrize("ranks", [1, 2])
def test_timed_checkpoints_are_saved_at_log_intervals(small: Make, fork_server: Any, ranks: int) -> None:
    # 6 ms, less than two steps: due at every log interval (rank 0 decides), and never in between
    config = small("train.steps=8", "train.checkpoint_minutes=1e-4", "train.keep_checkpoints=9")
    fork_server.start(config, ranks=ranks).finish()
    assert steps(config) == [3, 6, 8]
    assert len(list(meta_file(config, 8).parent.glob("*.distcp"))) == ranks  # each rank wrote its share


def test_training_continues_while_a_checkpoint_is_written(small: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    finish, two_steps_later = FileSystemWriter.finish, threading.Event()

    def slow(self: FileSystemWriter, *args: Any) -> None:
        assert two_steps_later.wait(timeout=60)
        finish(self, *args)

    class Signalling(Trainer):
        def train_step(self, batch: Batch) -> None:
            super().train_step(batch)
            if self.step == 5:
                two_steps_later.set()

    monkeypatch.setattr(FileSystemWriter, "finish", slow)
    config = small("train.steps=6", "train.checkpoint_every=3")
    assert Signalling(config).fit().completed
    assert steps(config) == [3, 6]


def test_a_full_disk_on_one_rank(small: Make, fork_server: Any) -> None:
    config = small("train.steps=4", "train.checkpoint_every=2")
    running = fork_server.start(config, ranks=2, file_limit=100_000)
    assert running.wait() == [1, 1]
    out = running.text()
    assert out.count("checkpoint of step 2 not written: [Errno 27] File too large (rank 1); training continues") == 1
    assert (
        out.count("step 4 not written: [Errno 27] File too large (rank 1); the newest complete checkpoint is none") == 2
    )
    assert list((Path(config.run.dir) / "checkpoints").iterdir()) == []


def test_a_disk_too_full_for_the_model(small: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small("train.steps=2")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with (
        monkeypatch.context() as patch,
        pytest.raises(TrainingFailed, match=r"model not written: .*No space .*--resume"),
    ):
        patch.setattr(ScenarioCLIP, "save_pretrained", full)
        Trainer(config).fit()
    assert not list(Path(config.run.dir).glob(".writing*"))
    assert Trainer(config, resume=True).fit().model_dir is not None


def test_a_whole_run_on_a_full_disk(small: Make, fork_server: Any) -> None:
    config = small("train.steps=20", "train.log_every=1", "train.checkpoint_every=10")
    out = fork_server.start(config, poisoned=[18], file_limit=3000).finish(code=1)  # bytes; applies to the log too
    assert "metrics.jsonl not written: [Errno 27] File too large; training continues" in out
    assert "checkpoint of step 10 not written" in out and "Traceback" not in out


def test_a_checkpoint_records_the_mean_loss_so_far(small: Make) -> None:
    config = small("train.steps=4", "train.checkpoint_every=2")
    Trainer(config).fit()
    losses = [row["loss"] for row in read_metrics(Path(config.run.dir) / "metrics.jsonl")]
    for step in (2, 4):
        assert json.loads(meta_file(config, step).read_text())["loss"] == pytest.approx(sum(losses[:step]) / step)


def test_only_learned_scales_are_saved_with_the_model() -> None:
    loss: Any = ScenarioLoss(init_temperature=0.1)
    assert learned_scales(loss) == pytest.approx({"global": 10.0, "object": 10.0, "relation": 10.0})
    loss.learned_scalars = lambda: {"logit_scale": {"object": torch.tensor(2.0)}, "margin": {"object": torch.ones(())}}
    assert learned_scales(loss) == {"object": 2.0}
    loss.learned_scalars = lambda: {}
    assert learned_scales(loss) == {}


def test_resume_from_the_best(small: Make, capsys: pytest.CaptureFixture[str]) -> None:
    config = small("train.steps=6", "train.checkpoint_every=2", "train.keep_checkpoints=3")
    Trainer(config).fit()
    edit_meta(config, 2, lambda meta: meta.update(loss=0.0))
    assert Trainer(config, resume="best").fit().completed
    assert "step-00000002 at step 2" in capsys.readouterr().err
    assert steps(config) == [2, 4, 6]


def test_resume_from_another_run(small: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Trainer(small("train.steps=2")).fit()
    result = Trainer(small("train.steps=3", run="other"), resume=tmp_path / "run").fit()
    assert result.step == 3
    assert "run/checkpoints/step-00000002 at step 2" in capsys.readouterr().err


def test_a_run_with_only_damaged_checkpoints_does_not_start_over(small: Make) -> None:
    config = small("train.steps=4", "train.checkpoint_every=2")
    Trainer(config).fit()
    for step in (2, 4):
        meta_file(config, step).unlink()
    with pytest.raises(
        UserError, match=r"step-00000004: not a checkpoint.*step-00000002: not.*set another run\.dir to start over"
    ):
        Trainer(config, resume="auto").fit()
    assert steps(config) == [2, 4]


def test_settings_that_an_earlier_version_lacked_have_not_changed(
    small: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small("train.steps=2")
    Trainer(config).fit()
    edit_meta(config, 2, lambda meta: meta["config"]["data"].pop("verify"))
    assert Trainer(small("train.steps=3"), resume=True).fit().completed
    assert "settings changed since the checkpoint: train.steps was 2, is now 3\n" in capsys.readouterr().err


def test_resume_with_and_without_a_teacher(small: Make) -> None:
    config = small("train.steps=2", "loss.distillation_scale=0")
    Trainer(config).fit()
    assert Trainer(small("train.steps=3"), resume=True).fit().completed  # now with a teacher
    with pytest.raises(UserError, match=r"lacks \d+ tensors of this run, such as teacher/"):
        Trainer(small("train.steps=4", "loss.teacher_scope=all"), resume=True).fit()
    assert Trainer(small("train.steps=4", "loss.distillation_scale=0"), resume=True).fit().completed


def test_a_new_teacher_starts_from_the_student(small: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    Trainer(small("train.steps=2", "loss.distillation_scale=0")).fit()
    train_step, apart = Trainer.train_step, []

    def compare(self: Trainer, batch: Batch) -> None:
        assert self.teacher is not None
        student = dict(self.model.named_parameters())
        averaged = self.teacher.state_dict()["tensors"]
        apart.append(max(float((t - student[name]).detach().abs().max()) for name, t in averaged.items()))
        train_step(self, batch)

    monkeypatch.setattr(Trainer, "train_step", compare)
    Trainer(small("train.steps=3", "loss.teacher_warmup=0"), resume=True).fit()
    assert apart == [0]


@pytest.mark.gpu
def test_resume_on_a_gpu(small: Make) -> None:
    def losses(config: TrainConfig) -> list[float]:
        return [row["loss"] for row in read_metrics(Path(config.run.dir) / "metrics.jsonl")]

    full, resumed = (small("train.steps=4", "train.checkpoint_every=2", "run.device=cuda", run=r) for r in ("a", "b"))
    Trainer(full).fit()
    Trainer(resumed, resume=meta_file(full, 2).parent).fit()
    # the order of float32 sums varies from run to run, and steps amplify the difference
    assert losses(resumed) == pytest.approx(losses(full)[2:], rel=1e-3)


def test_an_export_keeps_files_of_others(small: Make, tmp_path: Path) -> None:
    config = small("train.steps=1", "loss.distillation_scale=0")
    run = Path(config.run.dir)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "model.safetensors").touch()
    run.mkdir()
    (run / ".writing-model").symlink_to(elsewhere)  # as if left by a killed export
    Trainer(config).fit()
    (run / "model" / "notes.txt").touch()
    (run / "model" / "teacher.safetensors").touch()
    Trainer(small("train.steps=2", "loss.distillation_scale=0"), resume=True).fit()
    assert sorted(path.name for path in (run / "model").iterdir()) == [
        "SHA256SUMS",
        "config.json",
        "config.yaml",
        "model.safetensors",
        "notes.txt",
        "vocabulary.json",
    ]
    assert not os.path.lexists(run / ".writing-model") and (elsewhere / "model.safetensors").exists()
    open_checkpoint(run)
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=run / "model", check=True)
    assert {path.stat().st_mode for path in (run / "model").iterdir()} == {(run / "config.yaml").stat().st_mode}


def test_an_export_that_is_killed_halfway_is_not_loaded(small: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small("train.steps=1")
    Trainer(config).fit()
    replace, done = os.replace, []

    def die_late(source: Any, target: Any) -> None:
        if Path(target).parent.name == "model":
            if done:
                raise SystemExit
            done.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", die_late)
    with pytest.raises(SystemExit):
        Trainer(small("train.steps=2"), resume=True).fit()
    monkeypatch.undo()
    with pytest.raises(UserError, match="damaged or changed"):
        open_checkpoint(Path(config.run.dir))
    Trainer(small("train.steps=2"), resume=True).fit()
    open_checkpoint(Path(config.run.dir))
