"""When a run saves, and what it can be taken up from."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from scenarioclip_fast.data import Batch
from scenarioclip_fast.errors import TrainingFailed, UserError
from scenarioclip_fast.model import ScenarioCLIP
from scenarioclip_fast.train.config import TrainConfig
from scenarioclip_fast.train.metrics import read_metrics
from scenarioclip_fast.train.trainer import Trainer

Make = Callable[..., TrainConfig]


def steps(config: TrainConfig) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in (Path(config.run.dir) / "checkpoints").iterdir())


def meta_file(config: TrainConfig, step: int) -> Path:
    return Path(config.run.dir) / "checkpoints" / f"step-{step:08d}" / "meta.json"


@pytest.mark.parametrize("ranks", [1, 2])
def test_by_the_clock_at_log_intervals(small: Make, fork_server: Any, ranks: int) -> None:
    # 6 ms, which two steps take: every log interval, on the leading rank's word, and no step in between
    config = small("train.steps=8", "train.checkpoint_minutes=1e-4", "train.keep_checkpoints=9")
    fork_server.start(config, ranks=ranks).finish()
    assert steps(config) == [3, 6, 8]
    assert len(list(meta_file(config, 8).parent.glob("*.distcp"))) == ranks  # each has written its share


def test_the_run_goes_on_while_a_checkpoint_is_written(small: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    finish, two_steps_on = FileSystemWriter.finish, threading.Event()

    def slow(self: FileSystemWriter, *args: Any) -> None:
        assert two_steps_on.wait(timeout=60)
        finish(self, *args)

    class Told(Trainer):
        def train_step(self, batch: Batch) -> None:
            super().train_step(batch)
            if self.step == 5:
                two_steps_on.set()

    monkeypatch.setattr(FileSystemWriter, "finish", slow)
    config = small("train.steps=6", "train.checkpoint_every=3")
    assert Told(config).fit().completed
    assert steps(config) == [3, 6]


def test_a_disk_that_is_full_for_one_rank(small: Make, fork_server: Any) -> None:
    config = small("train.steps=4", "train.checkpoint_every=2")
    running = fork_server.start(config, ranks=2, file_limit=100_000)
    assert running.wait() == [1, 1]
    out = running.text()
    assert out.count("checkpoint of step 2 not written: [Errno 27] File too large (rank 1); training continues") == 1
    assert (
        out.count("step 4 not written: [Errno 27] File too large (rank 1); the newest complete checkpoint is none") == 2
    )
    assert list((Path(config.run.dir) / "checkpoints").iterdir()) == []


def test_a_model_that_has_no_room(small: Make, monkeypatch: pytest.MonkeyPatch) -> None:
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
    out = fork_server.start(config, poisoned=[18], file_limit=3000).finish(code=1)  # bytes, for its log, too
    assert "metrics.jsonl not written: [Errno 27] File too large; training continues" in out
    assert "checkpoint of step 10 not written" in out and "Traceback" not in out


def test_the_mean_loss_is_that_of_the_steps_before(small: Make) -> None:
    config = small("train.steps=4", "train.checkpoint_every=2")
    Trainer(config).fit()
    losses = [row["loss"] for row in read_metrics(Path(config.run.dir) / "metrics.jsonl")]
    for step in (2, 4):
        assert json.loads(meta_file(config, step).read_text())["loss"] == pytest.approx(sum(losses[:step]) / step)


def test_resume_from_the_best(small: Make, capsys: pytest.CaptureFixture[str]) -> None:
    config = small("train.steps=6", "train.checkpoint_every=2", "train.keep_checkpoints=3")
    Trainer(config).fit()
    file = meta_file(config, 2)
    file.write_text(json.dumps({**json.loads(file.read_text()), "loss": 0.0}))
    assert Trainer(config, resume="best").fit().completed
    assert "step-00000002 at step 2" in capsys.readouterr().err
    assert steps(config) == [2, 4, 6]


def test_resume_from_another_run(small: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Trainer(small("train.steps=2")).fit()
    result = Trainer(small("train.steps=3", run="other"), resume=tmp_path / "run").fit()
    assert result.step == 3
    assert "run/checkpoints/step-00000002 at step 2" in capsys.readouterr().err


def test_a_run_with_nothing_but_damage_does_not_start_anew(small: Make) -> None:
    config = small("train.steps=4", "train.checkpoint_every=2")
    Trainer(config).fit()
    for step in (2, 4):
        meta_file(config, step).unlink()
    with pytest.raises(UserError, match=r"step-00000004: not a checkpoint.*step-00000002: not.*set another run\.dir"):
        Trainer(config, resume="auto").fit()
    assert steps(config) == [2, 4]


def test_teachers_come_and_go(small: Make) -> None:
    config = small("train.steps=2", "loss.distillation_scale=0")
    Trainer(config).fit()
    assert Trainer(small("train.steps=3"), resume=True).fit().completed  # with one from now on
    with pytest.raises(UserError, match=r"lacks \d+ tensors of this run, such as teacher/"):
        Trainer(small("train.steps=4", "loss.teacher_scope=all"), resume=True).fit()
    assert Trainer(small("train.steps=4", "loss.distillation_scale=0"), resume=True).fit().completed


def test_a_teacher_that_comes_starts_from_the_student(small: Make, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_a_run_on_a_gpu_is_taken_up_again(small: Make) -> None:
    def losses(config: TrainConfig) -> list[float]:
        return [row["loss"] for row in read_metrics(Path(config.run.dir) / "metrics.jsonl")]

    whole, parts = (small("train.steps=4", "train.checkpoint_every=2", "run.device=cuda", run=r) for r in ("a", "b"))
    Trainer(whole).fit()
    Trainer(parts, resume=meta_file(whole, 2).parent).fit()
    # float32 sums in an order that varies from run to run, and three steps that carry it on
    assert losses(parts) == pytest.approx(losses(whole)[2:], rel=1e-3)
