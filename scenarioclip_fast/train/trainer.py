"""The trainer: typed parts made in a fixed order, and one readable step."""

from __future__ import annotations

import inspect
import json
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scenarioclip_fast.data import Batch, SceneLoader, scene_loader
from scenarioclip_fast.dispatch import use_backend
from scenarioclip_fast.distributed import join_world
from scenarioclip_fast.errors import TrainingFailed, UserError
from scenarioclip_fast.losses import ScenarioLoss
from scenarioclip_fast.model import EMATeacher, ScenarioCLIP
from scenarioclip_fast.model.flops import peak_flops, step_flops
from scenarioclip_fast.model.tokens import UniqueTexts
from scenarioclip_fast.train.accumulate import StepModule, backward_in_pieces
from scenarioclip_fast.train.config import TrainConfig
from scenarioclip_fast.train.metrics import DataWait, MetricsLog, PendingSteps, StepProfile, Verdict, readable
from scenarioclip_fast.train.optim import build_optimizer, guarded_step, learning_rate
from scenarioclip_fast.train.saving import FEW, Progress, Resume, RunState, Saver, run_dir_of
from scenarioclip_fast.train.sharding import shard
from scenarioclip_fast.train.warning_filters import expected_warnings_ignored
from scenarioclip_fast.train.weights import load_initial_weights

_FEW_KEYS = 10  # in a message
_SKIPPED, _BAD_SAMPLES = "skipped.jsonl", "bad_samples.jsonl"
_ENDLESS = 2**31  # epochs: the budget ends a run, not the loader
# Launchers pass on a signal that the system has sent to every process already: what comes so soon is the same call.
_ECHO_S = 2.0


@dataclass(frozen=True)
class FitResult:
    """How a run ended. `completed` is False when a signal or `Trainer.stop` ended it early."""

    run_dir: Path
    model_dir: Path | None  # the trained model, once completed
    step: int
    total_steps: int
    completed: bool
    first_loss: float  # mean over the first steps of this process
    last_loss: float  # mean over its last steps
    scenes: int
    views: int
    seconds: float  # of this process
    views_per_s: float  # of this process, checkpoints and start-up left aside
    skipped: int  # steps without an update, because the loss or a gradient was not finite
    stopped_by: str | None

    def summary(self) -> str:
        """A few lines for people."""
        end = "trained" if self.completed else f"stopped by {self.stopped_by}"
        lines = [
            f"{end}: step {self.step} of {self.total_steps}, {self.scenes} scenes, {self.views} views; "
            f"{self.seconds:.0f} s, {self.views_per_s:.0f} views/s",
            # Of few steps both means are of all of them.
            f"loss {self.first_loss:.4f}" + f" -> {self.last_loss:.4f}" * (self.first_loss != self.last_loss),
        ]
        if self.skipped:
            lines.append(
                f"steps skipped: {self.skipped}, as loss or gradient was not finite: {self.run_dir / _SKIPPED}"
            )
        if self.model_dir is not None:
            lines.append(f"model: {self.model_dir}")
        else:
            lines.append("run the same command with --resume to go on")
        return "\n".join(lines)


class Trainer:
    """Trains as `config` says.

    Args:
        config: a TrainConfig.
        resume: True or "auto" to go on from the newest good checkpoint of config.run.dir (or to start, when it has
            none), "best" from the one with the lowest loss, or the path of one checkpoint.

    On several ranks, every rank makes the same Trainer and calls `fit`; batch sizes, losses and metrics are those of
    all ranks together.
    """

    def __init__(self, config: TrainConfig, resume: Resume = False) -> None:
        self.config = config
        self.resume = resume
        self.run_dir = Path(config.run.dir)
        self.progress = Progress()
        self._timed_views, self._timed_seconds = 0, 0.0
        self._stop: str | None = None
        self._due = False  # a checkpoint, by the clock

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self.progress.step

    def fit(self) -> FitResult:
        """Trains until the budget is spent, or until a signal or `stop`; the state is saved either way.

        Raises UserError for a mistake in the config, the data or the checkpoint, and RuntimeError when
        train.max_skipped steps in a row had a loss or a gradient that is not finite.
        """
        with ExitStack() as stack:
            self.world = stack.enter_context(join_world(self.config.run.device, self.config.run.timeout_s))
            stack.enter_context(use_backend(self.config.run.backend))
            stack.enter_context(_matmul_precision(self.config.run.precision))
            stack.enter_context(expected_warnings_ignored())
            stack.enter_context(self._signals())
            self._build(stack)
            return self._run()

    def stop(self, reason: str = "a call of stop()") -> None:
        """Asks the run to save and end: after the step under way, or on several ranks at the next log interval."""
        self._stop = reason

    def train_step(self, batch: Batch) -> None:
        """One optimiser step. Nothing in it waits for the device, but for what ranks tell one another in the loss."""
        rate = learning_rate(self.step, self.total_steps, self.config.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        assert self.model.tokens is not None
        distinct = self.model.tokens.distinct(batch.host_ids)
        terms = self._backward(batch, distinct)
        values = self.world.mean_(torch.stack([term.detach().float() for term in terms.values()]))
        norm, skipped = guarded_step(self.optimizer, values[list(terms).index("loss")], self.config.optim.clip_norm)
        if self.teacher is not None:
            self.teacher.update(self.model)
        self.progress.step += 1
        views = [batch.num_scenes, batch.num_objects, batch.num_relations]
        lengths = [of_texts.tolist() for of_texts in distinct.lengths]
        operations = step_flops(self.model.config, views, lengths, teacher=self.teacher is not None)
        names = [*terms, "grad_norm", "skipped"]
        self._pending.add(self.step, batch, operations, rate, names, (*values, norm, skipped))

    def _backward(self, batch: Batch, distinct: UniqueTexts) -> dict[str, Tensor]:
        """Leaves the gradients of the batch's loss in the parameters; returns its terms."""
        if self.config.train.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # the graphs' memory of the step before is free again
        pieces = self.config.train.accumulate
        if pieces > 1:
            return backward_in_pieces(self.module, self.parallel, batch, distinct, self.teacher, pieces, self._autocast)
        with self._autocast():
            terms = self.parallel(lambda step: step.loss(step.model(batch, self.teacher, distinct)))
        terms["loss"].backward()
        return terms

    def _build(self, stack: ExitStack) -> None:
        config, world = self.config, self.world
        if config.train.cuda_graphs and world.device.type != "cuda":
            raise UserError(
                f"train.cuda_graphs: got true on {world.device}, expected a GPU: set train.cuda_graphs=false"
            )
        stack.enter_context(run_dir_of(config, world, self.resume))
        torch.manual_seed(config.run.seed)
        self.loader = stack.enter_context(self._make_loader())
        self.vocabulary = self.loader.vocabulary
        self.model = self._make_model().to(world.device)
        self.loss = ScenarioLoss(
            init_temperature=config.loss.init_temperature,
            max_scale=config.loss.max_scale,
            duplicates=config.loss.duplicates,
            distillation_scale=config.loss.distillation_scale,
            group=world.group,
        ).to(world.device)
        self.module = StepModule(self.model, self.loss).train()
        self.parallel: nn.Module = self.module
        if world.size > 1 and config.train.parallel == "ddp":
            self.parallel = _data_parallel(self.module)
        self.teacher: EMATeacher | None = None
        if config.model.variant == "scenarioclip1" and config.loss.distillation_scale > 0:
            self.teacher = EMATeacher(
                self.model,
                decay=config.loss.teacher_decay,
                warmup=config.loss.teacher_warmup,
                scope=config.loss.teacher_scope,
            )
        self.model.set_checkpointing(config.train.activation_checkpointing)
        if config.train.compiles_on(world.device.type):
            self.model.compile_blocks(config.train.cuda_graphs)
            if self.teacher is not None:
                self.teacher.compile_blocks(config.train.cuda_graphs)
        if world.size > 1 and config.train.parallel == "fsdp":
            self.parallel = shard(self.module, self.teacher, world)
        self.optimizer = build_optimizer(self.model, self.loss, config.optim)
        self.total_steps = self._count_steps()
        traced = config.train.profile
        if traced is not None and traced[0] > self.total_steps:
            raise UserError(
                f"train.profile: got {list(traced)}, expected steps of the run, which has {self.total_steps}"
            )
        self._peak: float | None = None
        if world.device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(world.device), config.run.precision)
            self._peak = peak and peak * world.size
        state = RunState(self.model, self.loss, self.teacher, self.optimizer, self.loader, self.progress)
        self.saver = Saver(config, world, state, self.total_steps, self._say)
        notes = self.saver.restore(self.resume)
        self._log: MetricsLog | None = None
        if world.is_main_process:
            try:
                config.save(self.run_dir / "config.yaml")
                self._log = MetricsLog(self.run_dir, self.step, self.total_steps, config.train.tensorboard)
            except OSError as error:
                raise UserError(f"run.dir: cannot write to {self.run_dir}: {error.strerror}") from None
            stack.callback(self._log.close)
        stack.callback(self.saver.close)
        freeze = config.model.freeze
        if config.model.init is None and (freeze.vision_blocks or freeze.text_blocks):
            notes.append("model.init is null, so the frozen blocks keep random weights: set model.init or model.freeze")
        if config.train.compiles_on(world.device.type):
            notes.append("the transformer blocks are compiled: the first steps may take a minute or more")
        assert self.model.tokens is not None
        notes += filter(None, [self.model.tokens.describe_truncated()])
        for note in (self._describe(), *notes):
            self._say(note)

    def _make_loader(self) -> SceneLoader:
        data, world = self.config.data, self.world
        if not data.shards:
            raise UserError("data.shards is not set: expected the directory that `scenarioclip-fast pack` wrote")
        if data.batch_size % world.size:
            raise UserError(
                f"data.batch_size: got {data.batch_size}, expected a multiple of the {world.size} ranks, which share it"
            )
        share, pieces = data.batch_size // world.size, self.config.train.accumulate
        if share % pieces:
            raise UserError(
                f"train.accumulate: got {pieces}, expected a divisor of the {share} scenes that a rank has of a batch "
                "(data.batch_size over the ranks)"
            )
        return scene_loader(
            data.shards,
            share,
            split="train",
            device=world.device,
            decoder=data.decoder,
            seed=self.config.run.seed,
            rank=world.rank,
            world_size=world.size,
            size=self.config.model.vision.image_size,
            object_view=data.object_view,
            relation_view=data.relation_view,
            blur=data.blur,
            train=data.augment,
            epochs=_ENDLESS,
            prefetch=data.prefetch,
            dtype=torch.bfloat16 if self.config.run.precision == "bf16" else torch.float32,
            threads=data.threads,
            cache_bytes=int(data.cache_gib * 2**30),
            shard_cache_dir=data.shard_cache_dir,
            shard_cache_gib=data.shard_cache_gib,
            max_pixels=data.max_pixels,
            max_bad_fraction=data.max_bad_fraction,
            bad_samples=self.run_dir / _BAD_SAMPLES,
        )

    def _make_model(self) -> ScenarioCLIP:
        section = self.config.model
        model = ScenarioCLIP(section.architecture)
        if section.init is not None:
            load_initial_weights(model, section.init)
        model.set_vocabulary(self.vocabulary)
        return model

    def _count_steps(self) -> int:
        budget = self.config.train
        if budget.steps is not None:
            return budget.steps
        if budget.epochs is not None:
            return ceil(budget.epochs * len(self.loader))
        if budget.views is not None:
            split = self.loader.shards.manifest["splits"]["train"]
            per_scene = 1 + (split["objects"] + split["relations"]) / split["scenes"]
            return ceil(budget.views / (per_scene * self.config.data.batch_size))
        raise UserError("no budget: set one of train.steps, train.epochs and train.views")

    def _describe(self) -> str:
        parameters = [*self.model.parameters(), *self.loss.parameters()]
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        total = sum(p.numel() for p in parameters)
        ranks = f" x {self.world.size} ranks" if self.world.size > 1 else ""
        return (
            f"{self.config.model.variant}: {trained / 1e6:.1f} of {total / 1e6:.1f} M parameters train, "
            f"{self.config.run.precision} on {self.world.device}{ranks}; {self.total_steps} steps of "
            f"{self.config.data.batch_size} scenes, {len(self.loader)} to an epoch"
        )

    def _run(self) -> FitResult:
        started = time.perf_counter()
        train = self.config.train
        batches = iter(self.loader)
        profile = (
            StepProfile(self.run_dir / "profile", *train.profile)
            if train.profile and self.world.is_main_process
            else None
        )
        self._bad_before = self.progress.bad_samples
        self._wait, self._pace = DataWait(self.world.device), Verdict()
        self._pending = PendingSteps()
        first = self.step
        ended_by: str | None = None
        while self.step < self.total_steps and ended_by is None:
            asked = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - asked
            if self.step == first:  # the start of the loader says nothing about the pace
                self._pending.started, waited = time.perf_counter(), 0.0
            if profile is not None:
                profile.before(self.step + 1)
            self._wait.step_begins(waited)
            self.train_step(batch)
            self._wait.step_ends()
            ended = time.perf_counter()
            if profile is not None and (written := profile.after(self.step)):
                self._say(written)
                self._pending.started += time.perf_counter() - ended
            save = self.step % train.checkpoint_every == 0
            alone = self.world.size == 1 and self._stop is not None
            if save or alone or self.step % train.log_every == 0 or self.step == self.total_steps:
                ended_by = self._flush()
            if save or self._due:
                self._save()
        completed = self.step == self.total_steps
        if profile is not None and (written := profile.close()):
            self._say(written)
        if self._pace.seconds:
            self._say(str(self._pace))
        self._save(last=True)
        model_dir = None
        if completed:
            model_dir = self.run_dir / "model"
            self.saver.export(model_dir, self.vocabulary)
        else:
            self._say(
                f"stopped by {ended_by} after step {self.step} of {self.total_steps}; --resume goes on from there"
            )
        return FitResult(
            run_dir=self.run_dir,
            model_dir=model_dir,
            step=self.step,
            total_steps=self.total_steps,
            completed=completed,
            first_loss=_mean(self.progress.first_losses),
            last_loss=_mean(self.progress.last_losses),
            scenes=self.progress.scenes,
            views=self.progress.views,
            seconds=time.perf_counter() - started,
            views_per_s=self._timed_views / self._timed_seconds if self._timed_seconds else 0.0,
            skipped=self.progress.skipped,
            stopped_by=ended_by,
        )

    def _flush(self) -> str | None:
        """Reads the steps since the last flush from the device and logs them; returns why the run must end, if so."""
        pending, self._pending = self._pending, PendingSteps()
        if not pending.rows:
            return self._stop if self.world.size == 1 else None
        table = torch.stack(pending.rows).tolist()  # here the host waits for the device
        seconds = time.perf_counter() - pending.started
        waits = [(0, 0, 0)] * self.world.size
        waits[self.world.rank] = (round(1e6 * self._wait.take()), 0, 0)
        told = (self._stop is not None, self.saver.due(), sum(self.loader.bad.values()))
        counts = torch.tensor([*pending.counts, *waits, told], device=self.world.device)
        *counted, (stops, due, bad) = self.world.sum_(counts).tolist()
        counted, waits = counted[: len(table)], counted[len(table) :]
        waited = max(micros for micros, *_ in waits) / 1e6  # ranks wait for the slowest
        scenes, views, operations = (sum(column) / seconds for column in zip(*counted, strict=True))
        speed: dict[str, float] = {
            "scenes_per_s": scenes,
            "views_per_s": views,
            "tflop_per_s": operations / 1e12,
            "data_wait": waited / seconds,
            "bad_samples": self._bad_before + bad,
        }
        self.progress.bad_samples = self._bad_before + bad
        if self._peak is not None:
            speed["mfu"] = operations / self._peak
        if self.world.device.type == "cuda":
            speed["memory_gib"] = torch.cuda.max_memory_allocated(self.world.device) / 2**30
        else:
            speed["memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        self._due = due > 0
        self.saver.poll()
        self._timed_views += sum(views for _, views, _ in counted)
        self._timed_seconds += seconds
        if self._pace.add(seconds, waited):
            self._say(str(self._pace))
        rows: list[dict[str, Any]] = []
        for k, values in enumerate(table):
            self.progress.scenes += counted[k][0]
            self.progress.views += counted[k][1]
            row = dict(readable(name, v) for name, v in zip(pending.names, values, strict=True))
            row |= {"step": pending.steps[k], "skipped": int(row["skipped"]), "lr": pending.rates[k]}
            rows.append({"step": row.pop("step"), **row, "views": self.progress.views, **speed})
            if row["skipped"]:
                self._note_skipped(row, rows[-1]["step"], pending.keys[k])
            else:
                self.progress.skipped_in_row = 0
                self.progress.recent_losses.append(row["loss"])
                if len(self.progress.first_losses) < FEW:
                    self.progress.first_losses.append(row["loss"])
        if self._log is not None:
            self._log.write(rows)
        if not self.progress.scenes:  # data.max_bad_fraction=1 has let it come so far
            raise UserError(
                f"{self.config.data.shards}: no scene of the train split can be used; {self.run_dir / _BAD_SAMPLES} "
                "says why"
            )
        if self.progress.skipped_in_row >= self.config.train.max_skipped:
            raise TrainingFailed(
                f"{self.progress.skipped_in_row} steps in a row had a loss or a gradient that is not finite (the last: "
                f"step {self.step}); the weights are those before them. Their scenes are in {self.run_dir / _SKIPPED}. "
                "Lower optim.lr, or set run.precision=float32; --resume starts from the last checkpoint"
            )
        return next(filter(None, self.world.gather(self._stop))) if stops else None

    def _note_skipped(self, row: dict[str, Any], step: int, keys: list[str]) -> None:
        self.progress.skipped += 1
        self.progress.skipped_in_row += 1
        keys = [key for share in self.world.gather(keys) for key in share]
        self._say(
            f"step {step} skipped: loss {row['loss']:g}, gradient norm {row['grad_norm']:g}; "
            f"scenes {', '.join(keys[:_FEW_KEYS])}{' ...' if len(keys) > _FEW_KEYS else ''}"
        )
        if self.world.is_main_process:
            try:
                with open(self.run_dir / _SKIPPED, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": step, "scenes": keys}) + "\n")
            except OSError as error:
                self._say(f"{self.run_dir / _SKIPPED} not written: {error}; the run goes on")

    def _save(self, last: bool = False) -> None:
        began = time.perf_counter()
        self.saver.save(last)
        self._due = False
        self._pending.started += time.perf_counter() - began

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.run.precision == "bf16":
            return torch.autocast(self.world.device.type, torch.bfloat16)
        return nullcontext()

    def _say(self, text: str) -> None:
        if self._log is not None:
            self._log.say(text)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM, SIGUSR1 and SIGINT ask the run to save and end; one that is sent again later acts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        asked: dict[int, float] = {}

        def handle(number: int, frame: FrameType | None) -> None:
            now = time.monotonic()
            if now - asked.setdefault(number, now) <= _ECHO_S:
                self.stop(signal.Signals(number).name)
            else:
                signal.signal(number, before[signal.Signals(number)])
                signal.raise_signal(number)

        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
        for number in before:
            signal.signal(number, handle)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    """TF32 for float32 products under "tf32", full float32 otherwise; the old settings come back at the end."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def _data_parallel(module: nn.Module) -> DistributedDataParallel:
    # The model's buffers are caches, which each rank fills for itself. torch has renamed the switch on the way.
    names = inspect.signature(DistributedDataParallel).parameters
    switch = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    options: dict[str, Any] = {"gradient_as_bucket_view": True, switch: False}
    return DistributedDataParallel(module, **options)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
