from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from packs import read_rows
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from scenarioclip_fast.data import (
    Batch,
    SceneLoader,
    ShardSet,
    Vocabulary,
    generate_scenes,
    load_reference,
    pack,
)
from scenarioclip_fast.distributed import World
from scenarioclip_fast.errors import TrainingFailed, UserError
from scenarioclip_fast.eval.embeddings import embed
from scenarioclip_fast.eval.session import open_session
from scenarioclip_fast.eval.zeroshot import zeroshot
from scenarioclip_fast.levels import LEVELS
from scenarioclip_fast.model import ScenarioCLIP
from scenarioclip_fast.train import signals
from scenarioclip_fast.train.checkpoint import Checkpoints
from scenarioclip_fast.train.config import TrainConfig
from scenarioclip_fast.train.metrics import TIMINGS, read_metrics
from scenarioclip_fast.train.trainer import Trainer

Make = Callable[..., TrainConfig]


class Hooked(Trainer):
    """Calls `before(trainer, batch)` before every step."""

    before: Callable[[Trainer, Batch], None]

    def train_step(self, batch: Batch) -> None:
        self.before(self, batch)
        super().train_step(batch)


def hooked(config: TrainConfig, before: Callable[[Trainer, Batch], None], resume: bool | Path = False) -> Hooked:
    trainer = Hooked(config, resume)
    trainer.before = before
    return trainer


def stop_at(step: int) -> Callable[[Trainer, Batch], None]:
    """Request a stop during step `step` (from 1)."""
    return lambda trainer, _: trainer.stop("the test") if trainer.step == step - 1 else None


def rows(config: TrainConfig) -> list[dict[str, Any]]:
    found = read_metrics(Path(config.run.dir) / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in found]


def weights(config: TrainConfig, file: str = "model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(Path(config.run.dir) / "model" / file)


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.text.layers=2", "model.freeze.text_blocks=1", "model.vision.layers=2", "model.freeze.vision_blocks=1"),
    ],
    ids=["all blocks train", "frozen blocks"],
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(small: Make, overrides: tuple[str, ...]) -> None:
    full, resumed = (small("train.steps=7", *overrides, run=name) for name in ("full", "resumed"))
    Trainer(full).fit()
    first = hooked(resumed, stop_at(4)).fit()
    assert (first.completed, first.step, first.stopped_by) == (False, 4, "the test")
    second = Trainer(resumed, resume=True).fit()
    assert second.completed and second.step == 7
    assert [row["step"] for row in rows(full)] == list(range(1, 8))
    assert rows(resumed) == rows(full)
    assert_same(weights(resumed), weights(full))
    assert_same(weights(resumed, "teacher.safetensors"), weights(full, "teacher.safetensors"))


def test_a_killed_run_resumes_from_its_newest_intact_checkpoint(small: Make) -> None:
    full, resumed = (small("train.steps=7", "train.checkpoint_every=2", run=name) for name in ("full", "resumed"))
    Trainer(full).fit()

    def die(trainer: Trainer, _: Batch) -> None:
        if trainer.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hooked(resumed, die).fit()
    newest, older = Checkpoints(Path(resumed.run.dir) / "checkpoints", keep=2).paths()
    assert (newest.name, older.name) == ("step-00000004", "step-00000002")
    (newest / "__0_0.distcp").write_bytes(b"")  # the newest is damaged
    Trainer(resumed, resume=True).fit()
    assert rows(resumed) == rows(full)
    assert_same(weights(resumed), weights(full))


def test_the_model_directory_is_complete(small: Make) -> None:
    config = small("train.steps=2")
    trainer = Trainer(config)
    result = trainer.fit()
    assert result.model_dir is not None
    model = ScenarioCLIP.from_pretrained(result.model_dir)
    assert model.config == config.model.architecture
    assert_same(dict(model.state_dict()), dict(trainer.model.state_dict()))
    assert Vocabulary.load(result.model_dir / "vocabulary.json") == trainer.vocabulary
    assert TrainConfig.load(result.model_dir / "config.yaml") == config
    assert sorted(p.name for p in Path(config.run.dir).iterdir()) == [
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "model",
    ]


@pytest.mark.parametrize("variant", ["scenarioclip0", "pyramidclip"])
def test_variants_without_a_teacher(small: Make, variant: str) -> None:
    config = small("train.steps=2", f"model.variant={variant}")
    assert Trainer(config).fit().completed
    assert not (Path(config.run.dir) / "model" / "teacher.safetensors").exists()


def test_bf16_follows_float32(small: Make) -> None:
    curves = []
    for precision in ("float32", "bf16"):
        config = small("train.steps=6", f"run.precision={precision}", run=precision)
        Trainer(config).fit()
        curves.append(torch.tensor([row["loss"] for row in rows(config)]))
    assert not torch.equal(*curves)
    # bf16 has 8 bits of mantissa, and a temperature of 0.07 amplifies the errors of the logits 14-fold
    torch.testing.assert_close(curves[1], curves[0], rtol=0.05, atol=0)


@pytest.mark.parametrize("every", [2, 1])
def test_scenes_without_an_action(small: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], every: int) -> None:
    """Half of the scenes, or all, train the object and relation levels alone; evaluations leave them out, too."""
    scenes = list(generate_scenes(24, seed=0))
    scenes = [replace(s, action=None if i % every == 0 else s.action, split=None) for i, s in enumerate(scenes)]
    pack(scenes, tmp_path / "incomplete", val=0.0, test=0.3, progress=False)
    config = small(f"data.shards={tmp_path / 'incomplete'}", "train.steps=4")
    Trainer(config).fit()
    note = "no scene of the train split has an action" if every == 1 else "of the train split have no action"
    assert note in capsys.readouterr().err
    losses = [row for row in rows(config) if "loss" in row]
    assert losses and all((row["contrastive/global"] > 0) == (every == 2) for row in losses)
    assert all(row["contrastive/object"] > 0 and row["contrastive/relation"] > 0 for row in losses)
    biases = {level: weights(config)[f"vision.{level}.head.norm.bias"] for level in LEVELS}  # 0 at the start
    assert {level: bool(bias.any()) for level, bias in biases.items()} == {
        "global": every == 2,
        "object": True,
        "relation": True,
    }
    with open_session(config.run.dir, tmp_path / "incomplete", device="cpu") as session:
        with session.loader("test") as loader:
            result = zeroshot(session.model, loader, session.vocabulary, show_progress=False)
        views = {row.level: row.views for row in result.rows if row.match == "own" and row.subset == "all"}
    shards = ShardSet(tmp_path / "incomplete", "test")
    expected = {
        "global": shards.count("actions"),
        "object": shards.count("objects"),
        "relation": shards.count("relations"),
    }
    assert views == {level: n for level, n in expected.items() if n}
    table = embed(config.run.dir, tmp_path / "incomplete", device="cpu")
    assert len(table.keys) == len(shards) and (table.text_ids == -1).sum() == len(shards) - shards.count("actions")


def test_a_non_finite_step_is_skipped_counted_and_logged(small: Make, capsys: pytest.CaptureFixture[str]) -> None:
    config = small("train.steps=6")
    keys: list[str] = []
    kept: dict[str, torch.Tensor] = {}

    def poison(trainer: Trainer, batch: Batch) -> None:
        if trainer.step == 2:
            batch.pixels[1].fill_(float("nan"))
            keys.extend(batch.keys)
            kept.update({k: v.clone() for k, v in trainer.model.state_dict().items()})
        if trainer.step == 3:
            assert_same(kept, dict(trainer.model.state_dict()))

    result = hooked(config, poison).fit()
    assert result.completed and result.skipped == 1
    found = rows(config)
    assert [row["skipped"] for row in found] == [0, 0, 1, 0, 0, 0]
    assert found[2]["loss"] is None
    assert all(row["loss"] is not None for row in found[3:])
    assert f"step 3 skipped: loss nan, gradient norm nan; scenes {keys[0]}" in capsys.readouterr().err
    assert all(torch.isfinite(w).all() for w in weights(config).values())
    assert all(torch.isfinite(w).all() for w in weights(config, "teacher.safetensors").values())


def test_too_many_skipped_steps_in_a_row_end_the_run(small: Make) -> None:
    config = small("train.steps=20", "train.max_skipped=4", "train.checkpoint_every=2")

    def poison(trainer: Trainer, batch: Batch) -> None:
        if trainer.step >= 3:
            batch.pixels.fill_(float("inf"))

    with pytest.raises(TrainingFailed, match=r"[456] steps in a row .* non-finite"):
        hooked(config, poison).fit()
    assert len((Path(config.run.dir) / "skipped.jsonl").read_text().splitlines()) in (4, 5, 6)
    assert hooked(config, lambda *_: None, resume=True).fit().completed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_and_ends_the_run(
    small: Make, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small("train.steps=20")
    before = signal.getsignal(number)
    result = hooked(config, lambda t, _: os.kill(os.getpid(), number) if t.step == 1 else None).fit()
    assert (result.completed, result.step, result.stopped_by) == (False, 2, number.name)
    assert signal.getsignal(number) is before
    assert f"stopped by {number.name} after step 2 of 20" in capsys.readouterr().err
    assert [row["step"] for row in rows(config)] == [1, 2]
    assert [p.name for p in (Path(config.run.dir) / "checkpoints").iterdir()] == ["step-00000002"]


def test_an_echo_of_a_signal_is_ignored(small: Make) -> None:
    def twice(t: Trainer, _: Batch) -> None:
        if t.step == 1:
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)

    result = hooked(small("train.steps=20"), twice).fit()
    assert (result.completed, result.step, result.stopped_by) == (False, 2, "SIGINT")


def test_a_later_repeat_of_a_signal_acts_immediately(small: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_ECHO_S", 0.05)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it

    def twice(t: Trainer, _: Batch) -> None:
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.1)
        signal.raise_signal(signal.SIGINT)

    config = small("train.steps=20")
    with pytest.raises(KeyboardInterrupt):
        hooked(config, twice).fit()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not (Path(config.run.dir) / "checkpoints").exists()


def test_a_full_disk_only_fails_the_last_checkpoint(
    small: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small("train.steps=4", "train.checkpoint_every=2")
    finish, tried = FileSystemWriter.finish, []

    def full(self: FileSystemWriter, *args: Any) -> None:
        step = int(Path(self.path).name.split("-")[2])
        tried.append(step)
        if step in refused:
            raise OSError(28, "No space left on device")
        finish(self, *args)

    monkeypatch.setattr(FileSystemWriter, "finish", full)
    refused = {2}
    assert Trainer(config).fit().completed
    assert tried == [2, 4]
    assert (
        "checkpoint of step 2 not written: [Errno 28] No space left on device; training continues"
        in capsys.readouterr().err
    )
    assert [p.name for p in (Path(config.run.dir) / "checkpoints").iterdir()] == ["step-00000004"]
    refused = {3}
    with pytest.raises(TrainingFailed, match=r"step 3 not written: .*No space left"):
        hooked(small("train.steps=9", run="other"), stop_at(3)).fit()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data.shards=",), r"data\.shards is not set"),
        (("data.shards=/nowhere",), r"/nowhere"),
        (("data.batch_size=1000",), r"batch"),
        (("data.max_pixels=99",), r"cannot be used, .*too_large: \d+ x \d+ pixels, the limit is 99"),
        (
            ("data.max_pixels=99", "data.max_bad_fraction=1"),
            r"no scene .* is usable; see .*bad_samples\.jsonl for the reasons",
        ),
        (("run.device=cuda:77",), r"run\.device"),
        (("run.device=abacus",), r"run\.device: got 'abacus'"),
        (("model.init=/nowhere",), r"model\.init: /nowhere does not exist"),
        (("run.dir=/proc/nowhere",), r"run\.dir: cannot write"),
        (("train.profile=[3, 4]",), r"train\.profile: got \[3, 4\], expected steps of the run, which has 2"),
        ((), r"no budget: set one of train\.steps"),
    ],
)
def test_user_errors_are_one_line(small: Make, overrides: tuple[str, ...], message: str) -> None:
    budget = ("train.steps=2",) if overrides else ()
    with pytest.raises(UserError, match=message) as caught:
        Trainer(small(*budget, *overrides)).fit()
    assert "\n" not in str(caught.value)


def test_a_batch_smaller_than_the_number_of_ranks(small: Make) -> None:
    trainer = Trainer(small("data.batch_size=1"))
    trainer.world = World(0, 2, torch.device("cpu"), None)
    with pytest.raises(UserError, match=r"data\.batch_size: got 1, expected a multiple of the number of ranks, 2"):
        trainer._make_loader()


def test_bad_samples_are_counted_across_resumes(small: Make, shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "damaged")
    for name, scenes in read_rows(tmp_path / "damaged").items():
        with open(tmp_path / "damaged" / name, "r+b") as shard:
            shard.seek(scenes[0][1])
            shard.write(b"not a picture")
    data = (f"data.shards={tmp_path / 'damaged'}", "train.steps=6")
    full, resumed = small(*data, run="full"), small(*data, run="resumed")
    Trainer(full).fit()
    hooked(resumed, stop_at(4)).fit()
    Trainer(resumed, resume=True).fit()
    assert rows(resumed) == rows(full) and rows(full)[-1]["bad_samples"] >= 2


def test_a_mix_of_data_sets(small: Make, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack(generate_scenes(12, seed=1, val=0.3, test=0.0), tmp_path / "other", progress=False)
    other = ShardSet(tmp_path / "other")
    count = round(0.5 * len(other))
    data = f"data.shards=[{{path: {shards}, weight: 1.5}}, {{path: {tmp_path / 'other'}, weight: 0.5}}]"
    full, resumed = (small(data, "train.steps=7", run=name) for name in ("full", "resumed"))
    trainer = Trainer(full)
    assert trainer.fit().completed
    log = capsys.readouterr().err
    assert f"data: {shards}: 20 scenes, weight 1.5, 30 per epoch" in log
    assert f"data: {tmp_path / 'other'}: {len(other)} scenes, weight 0.5, {count} per epoch" in log
    assert f"{(30 + count) // 8} per epoch" in log
    hooked(resumed, stop_at(5)).fit()  # in the second epoch
    with pytest.raises(
        UserError, match=rf"{tmp_path / 'other'}: the saved loader state has weight 0\.5, this run has 1"
    ):
        Trainer(small(data.replace("0.5", "1"), "train.steps=7", run="resumed"), resume=True).fit()
    with pytest.raises(UserError, match=r"the saved loader state has 2 data sets .*, this run has one data set"):
        Trainer(small("train.steps=7", run="resumed"), resume=True).fit()
    assert Trainer(resumed, resume=True).fit().completed
    assert rows(resumed) == rows(full)
    assert_same(weights(resumed), weights(full))

    texts = {text for data_set in (ShardSet(shards), other) for text in data_set.vocabulary.relations}
    saved = Vocabulary.load(Path(full.run.dir) / "model" / "vocabulary.json")
    assert saved == trainer.vocabulary and saved.relations == sorted(texts)
    with open_session(full.run.dir, full.data.shards, device="cpu") as session:
        assert session.scenes("train") == 20 + len(other) and session.vocabulary.relations == saved.relations
        with session.loader("val") as loader:  # only in the second set
            assert [key for batch in loader for key in batch.keys] == ShardSet(tmp_path / "other", "val").keys


def test_a_run_directory_is_not_overwritten_by_accident(small: Make) -> None:
    config = small("train.steps=2")
    Trainer(config).fit()
    with pytest.raises(UserError, match=r"--resume"):
        Trainer(config).fit()


def test_a_packed_data_set_is_no_run_directory(small: Make, shards: Path) -> None:
    with pytest.raises(UserError, match=r"run\.dir: .* is a packed data set: choose another directory"):
        Trainer(small("train.steps=1", f"run.dir={shards}")).fit()
    assert not (shards / "checkpoints").exists()


def test_a_run_directory_is_locked(small: Make) -> None:
    config = small("train.steps=2")

    def start_another(trainer: Trainer, _: Batch) -> None:
        with pytest.raises(UserError, match="another process is training in"):
            Trainer(config, resume=True).fit()

    assert hooked(config, start_another).fit().completed
    assert Trainer(config, resume=True).fit().completed  # the lock ends with the run


def test_the_log_names_the_decoder_once(small: Make, capsys: pytest.CaptureFixture[str]) -> None:
    Trainer(small("train.steps=1")).fit()
    assert capsys.readouterr().err.count("decoder: torch (libjpeg-turbo on one thread)") == 1


def test_resume_in_an_empty_directory_starts(small: Make, capsys: pytest.CaptureFixture[str]) -> None:
    assert Trainer(small("train.steps=1"), resume=True).fit().completed
    assert "nothing to resume" in capsys.readouterr().err


def test_resume_accepts_changed_settings_but_not_another_model(small: Make, capsys: pytest.CaptureFixture[str]) -> None:
    Trainer(small("train.steps=2")).fit()
    with pytest.raises(UserError, match=r"a different model: model\.vision\.layers was 1, is now 2"):
        Trainer(small("train.steps=4", "model.vision.layers=2"), resume=True).fit()
    result = Trainer(small("train.steps=4", "optim.weight_decay=0.1"), resume=True).fit()
    assert result.completed and result.step == 4
    assert "optim.weight_decay was 0.2, is now 0.1" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"is at step 4, beyond the budget of 3 steps"):
        Trainer(small("train.steps=3"), resume=True).fit()


def test_resume_from_a_named_checkpoint(small: Make, tmp_path: Path) -> None:
    Trainer(small("train.steps=4", "train.checkpoint_every=2")).fit()
    other = small("train.steps=4", run="other")
    result = Trainer(other, resume=tmp_path / "run" / "checkpoints" / "step-00000002").fit()
    assert result.step == 4
    assert_same(weights(other), weights(small()))
    with pytest.raises(UserError, match=r"--resume: .*absent"):
        Trainer(other, resume=tmp_path / "absent").fit()


@pytest.mark.parametrize(("budget", "steps"), [("train.steps=3", 3), ("train.epochs=1.5", 3), ("train.epochs=0.5", 1)])
def test_the_budget_in_steps(small: Make, budget: str, steps: int) -> None:
    assert Trainer(small(budget)).fit().total_steps == steps  # 20 scenes, 8 per step: 2 steps per epoch


def test_the_budget_in_views(small: Make) -> None:
    result = Trainer(small("train.views=600")).fit()
    assert result.completed
    # rounded up to full steps, whose views differ from the mean
    assert result.views == pytest.approx(600, rel=0.3)


def test_initial_weights(small: Make, tmp_path: Path) -> None:
    source = small("train.steps=1", "optim.lr=0.1", "optim.warmup=0", run="source")
    Trainer(source).fit()
    init = f"model.init={tmp_path / 'source' / 'model'}"
    start = Hooked(small("train.steps=1", init, run="same"))
    start.before = lambda t, _: assert_same(dict(t.model.state_dict()), weights(source))
    start.fit()

    def check_pair(trainer: Trainer, _: Batch) -> None:
        initial = weights(source)
        for name, p in trainer.model.named_parameters(remove_duplicate=False):
            kind, _, rest = name.split(".", 2)
            assert torch.equal(p, initial[f"{kind}.global.{rest}"])

    other = hooked(small("train.steps=1", init, "model.variant=pyramidclip", run="pyramid"), check_pair)
    other.fit()
    with pytest.raises(UserError, match=r"vision\.width: 64 and 32"):
        Trainer(small("train.steps=1", init, "model.vision.width=64", run="wider")).fit()


def test_initial_weights_that_conflict_with_the_freezing(small: Make, tmp_path: Path) -> None:
    Trainer(small("train.steps=1", "optim.lr=0.1", "optim.warmup=0", run="source")).fit()
    init = f"model.init={tmp_path / 'source' / 'model'}"
    with pytest.raises(UserError, match=r"set model\.freeze as in that model"):
        Trainer(small("train.steps=1", init, "model.freeze.text_blocks=1", run="frozen")).fit()


def test_speed_and_bottleneck_are_logged(
    small: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = small("train.steps=4", "data.cache_gib=0.1", run="fast")
    Trainer(fast).fit()
    found = read_metrics(Path(fast.run.dir) / "metrics.jsonl")
    assert all(row["tflop_per_s"] > 0 and "mfu" not in row for row in found)  # a CPU has no known peak
    assert all(0.05 < row["memory_gib"] < 64 for row in found)  # torch alone uses more
    assert capsys.readouterr().err.count("-bound: the step") == 1

    iterate = SceneLoader.__iter__

    def slowly(loader: SceneLoader) -> Iterator[Batch]:
        for batch in iterate(loader):
            time.sleep(0.2)
            yield batch

    monkeypatch.setattr(SceneLoader, "__iter__", slowly)
    Trainer(small("train.steps=4", run="slow")).fit()
    assert "data-bound: the step waited for data" in capsys.readouterr().err


def test_a_profile_of_some_steps(small: Make, capsys: pytest.CaptureFixture[str]) -> None:
    config = small("train.steps=4", "train.profile=[2, 3]")
    Trainer(config).fit()
    path = Path(config.run.dir) / "profile" / "steps-2-3.json.gz"
    assert f"profile of steps 2 to 3: {path}" in capsys.readouterr().err
    names = [event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]
    assert names.count("Optimizer.step#AdamW.step") == 2


class FailOnSync(Trainer):
    """Steps fail at a host synchronisation, except the first three, which fill caches."""

    def train_step(self, batch: Batch) -> None:
        torch.cuda.set_sync_debug_mode("error" if self.step >= 3 else "default")
        try:
            super().train_step(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_step_does_not_synchronise_on_a_gpu(small: Make) -> None:
    """test_waits.py has a check that needs no GPU."""
    # The mode is process-wide, so no thread may prepare batches meanwhile, because that synchronises.
    options = ("data.prefetch=0", "run.device=cuda", "run.precision=bf16")
    assert FailOnSync(small("train.steps=8", "train.log_every=100", *options)).fit().completed


PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "photos"


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the sample photos are not next to the checkout")
def test_the_loss_falls_on_real_photos(tmp_path: Path) -> None:
    scenes = islice(load_reference(PHOTOS), 24)
    pack(scenes, tmp_path / "shards")
    overrides = [
        f"data.shards={tmp_path / 'shards'}",
        f"run.dir={tmp_path / 'run'}",
        "data.batch_size=8",
        "model.vision.layers=2",
        "model.text.layers=2",
        "train.views=2400",
    ]
    tiny = Path(__file__).parents[2] / "configs" / "tiny.yaml"
    result = Trainer(TrainConfig.load(tiny, overrides)).fit()
    assert result.last_loss < 0.8 * result.first_loss
