"""The trainer: builds the parts of a run in a fixed order and runs the training loop."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scenarioclip_fast.data import Batch, SceneLoader, scene_loader
from scenarioclip_fast.data.bad_samples import BadSampleLog
from scenarioclip_fast.dispatch import use_backend
from scenarioclip_fast.distributed import join_world
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.model.flops import peak_flops, step_flops
from scenarioclip_fast.model.fp8 import requantize
from scenarioclip_fast.model.tokens import UniqueTexts
from scenarioclip_fast.terminal import printable
from scenarioclip_fast.train import agreement
from scenarioclip_fast.train.accumulate import GradCache
from scenarioclip_fast.train.build import build_copies, build_loss, build_model, build_teacher, wrap
from scenarioclip_fast.train.config import TrainConfig
from scenarioclip_fast.train.converters import all_encoders, convert
from scenarioclip_fast.train.export import export
from scenarioclip_fast.train.metrics import MetricsLog
from scenarioclip_fast.train.optim import (
    build_optimizer,
    guarded_step,
    learning_rate,
    optimizer_factory,
    set_learning_rate,
)
from scenarioclip_fast.train.precision import attention_kernels, autocast, describe_attention, matmul_precision
from scenarioclip_fast.train.run_dir import open_run_dir
from scenarioclip_fast.train.saving import Resume, Saver
from scenarioclip_fast.train.signals import stop_on_signals
from scenarioclip_fast.train.state import Progress, RunState
from scenarioclip_fast.train.step import Phase, StepModule, plan_texts
from scenarioclip_fast.train.step_log import SKIPPED_FILE, Status, StepLog
from scenarioclip_fast.train.timing import StepProfile
from scenarioclip_fast.train.warning_filters import expected_warnings_ignored

_BAD_SAMPLES = "bad_samples.jsonl"
_UNLIMITED_EPOCHS = 2**31  # the budget ends a run, not the loader


@dataclass(frozen=True)
class FitResult:
    """The outcome of a run. `completed` is False if a signal or `Trainer.stop` ended it early."""

    run_dir: Path
    model_dir: Path | None  # the trained model, once completed
    step: int
    total_steps: int
    completed: bool
    first_loss: float  # mean of the run's first steps
    last_loss: float  # mean of its last steps
    scenes: int
    views: int
    seconds: float  # of this process
    views_per_s: float  # of this process, start-up and checkpoints excluded
    skipped: int  # steps without an update, because of a non-finite loss or gradient
    stopped_by: str | None

    def summary(self) -> str:
        """A few lines for the terminal."""
        end = "trained" if self.completed else f"stopped by {self.stopped_by}"
        lines = [
            f"{end}: step {self.step} of {self.total_steps}, {self.scenes} scenes, {self.views} views; "
            f"{self.seconds:.0f} s, {self.views_per_s:.0f} views/s",
            # In a short run both means are over all steps.
            f"mean loss {self.first_loss:.4f}" + f" -> {self.last_loss:.4f}" * (self.first_loss != self.last_loss),
        ]
        if self.skipped:
            where = printable(self.run_dir / SKIPPED_FILE)
            lines.append(f"skipped steps: {self.skipped} with a non-finite loss or gradient, see {where}")
        if self.model_dir is not None:
            lines.append(printable(f"model: {self.model_dir}"))
        else:
            lines.append("run the same command with --resume to continue")
        return "\n".join(lines)


class Trainer:
    """Train a model as `config` describes.

    Args:
        config: a TrainConfig.
        resume: True or "auto" to resume from the newest readable checkpoint of config.run.dir (or to start, if there is
            none), "best" from the one with the lowest loss, or the path of a checkpoint.

    With several ranks, each rank creates the same Trainer and calls `fit`; batch sizes, losses and metrics cover all
    ranks.
    """

    def __init__(self, config: TrainConfig, resume: Resume = False) -> None:
        self.config = config
        self.resume = resume
        self.run_dir = Path(config.run.dir)
        self.progress = Progress()
        self._stop: str | None = None
        self._save_due = False  # by train.checkpoint_minutes
        self._metrics: MetricsLog | None = None

    @property
    def step(self) -> int:
        """Number of optimizer steps done."""
        return self.progress.step

    def fit(self) -> FitResult:
        """Train until the budget is spent, a signal arrives or `stop` is called; save the state in each case.

        Raises:
            UserError: the config, the data or the checkpoint is invalid.
            TrainingFailed: train.max_skipped steps in a row had a non-finite loss or gradient, or the last checkpoint
                or the model cannot be written.
        """
        with ExitStack() as stack:
            run, same = self.config.run, agreement.settings(self.config, self.resume)
            self.world = stack.enter_context(join_world(run.device, run.timeout_s, setting="run.device", same=same))
            stack.enter_context(use_backend(self.config.run.backend))
            stack.enter_context(matmul_precision(self.config.run.precision))
            stack.enter_context(attention_kernels())
            stack.enter_context(expected_warnings_ignored())
            stack.enter_context(stop_on_signals(self.stop))
            self._build(stack)
            return self._run()

    def stop(self, reason: str = "a call of stop()") -> None:
        """Make the run save and end: after the current step, or with several ranks at the next log interval."""
        self._stop = reason

    def log(self, text: str) -> None:
        """Log a line on the main process."""
        if self._metrics is not None:
            self._metrics.log(text)

    def train_step(self, batch: Batch) -> None:
        """Run one optimizer step. The host waits for the device only if the loss's collectives require it."""
        rate = learning_rate(self.step, self.total_steps, self.config.optim)
        set_learning_rate(self.optimizer, rate)
        assert self.model.tokens is not None
        texts = self.model.tokens.unique_texts(batch.host_ids)
        scenes = self.config.data.batch_size // self.world.size
        plan = plan_texts(self.loss, texts, scenes, self.config.model.embed_dim, self.config.run.precision)
        texts = replace(texts, plan=plan)
        terms = self._backward(batch, texts)
        values = dict(zip(terms, self._mean_over_ranks(terms), strict=True))
        norm, skipped = guarded_step(self.optimizer, values["loss"], self.config.optim.clip_norm)
        if self.teacher is not None:
            self.teacher.update(self.model)
        self.progress.step += 1
        flops = self._flops(batch, texts)
        self._steps.add(self.step, batch, flops, rate, {**values, "grad_norm": norm, "skipped": skipped})

    def _backward(self, batch: Batch, texts: UniqueTexts) -> dict[str, Tensor]:
        """Accumulate the gradients of the batch's loss in the parameters; return the loss's terms."""
        if self.copies is not None:
            self.copies.refresh()
        if self.grad_cache is not None:
            return self.grad_cache.backward(batch, texts, self.teacher)
        with self._autocast():
            terms: dict[str, Tensor] = self.parallel(Phase.LOSS, batch, texts, self.teacher)
        terms["loss"].backward()
        return terms

    def _mean_over_ranks(self, terms: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return self.world.mean_(torch.stack([term.detach().float() for term in terms.values()])).unbind()

    def _flops(self, batch: Batch, texts: UniqueTexts) -> float:
        views = [len(ids) for ids in batch.host_ids]
        lengths = [level_lengths.tolist() for level_lengths in texts.lengths]  # on the host
        without_action = batch.num_scenes - views[0]
        return step_flops(
            self.model.config, views, lengths, teacher=self.teacher is not None, without_action=without_action
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.config.run.precision, self.world.device)

    def _build(self, stack: ExitStack) -> None:
        """Build all parts, restore the checkpoint to resume from, and log what will be trained."""
        config, world = self.config, self.world
        optimizer_factory(config.optim.name)  # fail early on an unknown name
        if config.train.cuda_graphs and world.device.type != "cuda":
            raise UserError(
                f"train.cuda_graphs: got true on {world.device}, expected a GPU: set train.cuda_graphs=false"
            )
        stack.enter_context(open_run_dir(config, world, bool(self.resume)))
        torch.manual_seed(config.run.seed)
        self.loader = stack.enter_context(self._make_loader())
        self.vocabulary = self.loader.vocabulary
        if world.size > 1:
            self._compare_ranks()

        self.model = build_model(config.model, self.vocabulary, world.device)
        if config.model.init is not None and world.size > 1:
            world.check_same(agreement.weights(self.model), f"model.init: {agreement.SAME_WEIGHTS}")
        self.loss = build_loss(config.loss, world)
        self.teacher = build_teacher(config, self.model)
        notes = convert(self.model, self.teacher, config, world)
        self.copies = build_copies(self.model, self.teacher, config, world)
        if self.copies is not None:
            stack.callback(self.copies.close)
        self.module = StepModule(self.model, self.loss).train()
        self.parallel = wrap(self.module, self.teacher, config, world)
        self.optimizer = build_optimizer(self.model, self.loss, config.optim)
        self.grad_cache: GradCache | None = None
        if config.train.accumulate > 1:
            self.grad_cache = GradCache(self.module, self.parallel, config.train.accumulate, self._autocast)

        self.total_steps = self._count_steps()
        self._profile = self._make_profile()
        self.state = RunState(self.model, self.loss, self.teacher, self.optimizer, self.loader, self.progress)
        self.saver = Saver(config, world, self.state, self.total_steps, self.log)
        attention = describe_attention(config.model.vision, config.run.precision, world.device)
        decoder = f"decoder: {self.loader.decoder}"
        missing = self.loader.notes()
        notes = [*self.saver.restore(self.resume), attention, decoder, *missing, *notes, *self._warnings()]
        requantize(all_encoders(self.model, self.teacher))
        self._metrics = self._make_metrics_log(stack)
        self._steps = StepLog(config, world, self.progress, self._metrics, self._peak_flops(), self.log)
        stack.callback(self.saver.close)
        for note in (self._describe(), *self.loader.shards.describe(), *notes):
            self.log(note)

    def _make_loader(self) -> SceneLoader:
        data, world = self.config.data, self.world
        if not data.shards:
            raise UserError("data.shards is not set: expected the directory that `scenarioclip-fast pack` wrote")
        if data.batch_size % world.size:
            raise UserError(
                f"data.batch_size: got {data.batch_size}, expected a multiple of the number of ranks, {world.size}"
            )
        per_rank, microbatches = data.batch_size // world.size, self.config.train.accumulate
        if per_rank % microbatches:
            raise UserError(
                f"train.accumulate: got {microbatches}, expected a divisor of the {per_rank} scenes per rank "
                "(data.batch_size / ranks)"
            )
        return scene_loader(
            data.shards,
            per_rank,
            data,
            device=world.device,
            seed=self.config.run.seed,
            rank=world.rank,
            world_size=world.size,
            size=self.config.model.vision.image_size,
            epochs=_UNLIMITED_EPOCHS,
            dtype=torch.bfloat16 if self.config.run.precision == "bf16" else torch.float32,
            on_bad=BadSampleLog(self.run_dir / _BAD_SAMPLES),
        )

    def _compare_ranks(self) -> None:
        """Compare what the config does not determine: the data behind data.shards, and the choices of "auto"."""
        balanced = {"whether data.shards have views.bin": self.loader.order.views is not None}
        self.world.check_same(agreement.data_sets(self.loader.shards) | balanced, agreement.SAME_DATA)
        dtype = "bfloat16" if self.config.run.precision == "bf16" else "float32"
        chosen = {**agreement.backends(self.world.device.type, dtype), "the decoder": self.loader.decoder.name}
        self.world.check_same(chosen, agreement.SAME_BACKENDS)

    def _make_profile(self) -> StepProfile | None:
        """Create the profiler of train.profile, on the main process."""
        steps = self.config.train.profile
        if steps is None:
            return None
        if steps[0] > self.total_steps:
            raise UserError(
                f"train.profile: got {list(steps)}, expected steps of the run, which has {self.total_steps}"
            )
        return StepProfile(self.run_dir / "profile", *steps) if self.world.is_main_process else None

    def _make_metrics_log(self, stack: ExitStack) -> MetricsLog | None:
        """Save the config and open the metrics log, on the main process."""
        if not self.world.is_main_process:
            return None
        try:
            self.config.save(self.run_dir / "config.yaml")
            metrics = MetricsLog(self.run_dir, self.step, self.total_steps, self.config.train.tensorboard)
        except OSError as error:
            raise UserError(f"run.dir: cannot write to {self.run_dir}: {error.strerror}") from None
        stack.callback(metrics.close)
        return metrics

    def _peak_flops(self) -> float | None:
        """Return the peak FLOP/s of all ranks' GPUs, or None if unknown."""
        if self.world.device.type != "cuda":
            return None
        peak = peak_flops(torch.cuda.get_device_name(self.world.device), self.config.run.precision)
        return peak and peak * self.world.size

    def _count_steps(self) -> int:
        budget = self.config.train
        if budget.steps is not None:
            return budget.steps
        if budget.epochs is not None:
            return ceil(budget.epochs * len(self.loader))
        if budget.views is not None:
            data = self.config.data
            views = self.loader.shards.views_per_scene(need_masks=data.relation_view == "focused")
            return ceil(budget.views / (views * data.batch_size))
        raise UserError("no budget: set one of train.steps, train.epochs and train.views")

    def _warnings(self) -> list[str]:
        config = self.config.model
        lines = []
        if config.init is None and (config.freeze.vision_blocks or config.freeze.text_blocks):
            lines.append("model.init is null, so the frozen blocks keep random weights: set model.init or model.freeze")
        assert self.model.tokens is not None
        if truncated := self.model.tokens.describe_truncated():
            lines.append(truncated)
        return lines

    def _describe(self) -> str:
        parameters = [*self.model.parameters(), *self.loss.parameters()]
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        total = sum(p.numel() for p in parameters)
        ranks = f" x {self.world.size} ranks" if self.world.size > 1 else ""
        return (
            f"{self.config.model.variant}: {trained / 1e6:.1f} of {total / 1e6:.1f} M parameters trainable, "
            f"{self.config.run.precision} on {self.world.device}{ranks}; {self.total_steps} steps of "
            f"{self.config.data.batch_size} scenes, {len(self.loader)} per epoch"
        )

    def _run(self) -> FitResult:
        """Train, save, and export the model if the budget is spent."""
        started = time.perf_counter()
        stopped_by = self._train()
        completed = self.step == self.total_steps
        if self._profile is not None and (line := self._profile.close()):
            self.log(line)
        if self._steps.bottleneck.seconds:
            self.log(str(self._steps.bottleneck))
        self._save(last=True)
        model_dir = None
        if completed:
            model_dir = self.run_dir / "model"
            export(model_dir, self.state, self.vocabulary, self.config, self.world)
        else:
            self.log(f"stopped by {stopped_by} after step {self.step} of {self.total_steps}; continue with --resume")
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
            views_per_s=self._steps.views_per_s,
            skipped=self.progress.skipped,
            stopped_by=stopped_by,
        )

    def _train(self) -> str | None:
        """Train until the budget is spent or a stop is requested; return the reason for the stop."""
        train, steps = self.config.train, self._steps
        batches = iter(self.loader)
        first = self.step
        stopped_by: str | None = None
        while self.step < self.total_steps and stopped_by is None:
            requested = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - requested
            if self.step == first:  # exclude the loader's start-up from the speed
                steps.start_clock()
                waited = 0.0
            if self._profile is not None:
                self._profile.before(self.step + 1)
            steps.wait.begin_step(waited)
            self.train_step(batch)
            steps.wait.end_step()
            self._write_profile()
            save = self.step % train.checkpoint_every == 0
            stop = self.world.size == 1 and self._stop is not None  # several ranks agree at log intervals
            if save or stop or self.step % train.log_every == 0 or self.step == self.total_steps:
                stopped_by = self._flush()
            if save or self._save_due:
                self._save()
        return stopped_by

    def _write_profile(self) -> None:
        ended = time.perf_counter()
        if self._profile is not None and (line := self._profile.after(self.step)):
            self.log(line)
            self._steps.exclude(time.perf_counter() - ended)

    def _flush(self) -> str | None:
        """Write the steps since the last flush; return the reason if the run must stop."""
        if not self._steps.has_steps:
            return self._stop if self.world.size == 1 else None
        bad_samples = sum(self.loader.bad.values())
        totals = self._steps.flush(Status(self._stop is not None, self.saver.due(), bad_samples))
        self._save_due = totals.save > 0
        self.saver.poll()
        if not self.progress.scenes:  # possible with data.max_bad_fraction=1
            raise UserError(
                f"{self.loader.shards.source}: no scene of the train split is usable; see "
                f"{self.run_dir / _BAD_SAMPLES} for the reasons"
            )
        self._steps.check_skipped()
        return next(filter(None, self.world.gather(self._stop))) if totals.stop else None

    def _save(self, last: bool = False) -> None:
        started = time.perf_counter()
        self.saver.save(last)
        self._save_due = False
        self._steps.exclude(time.perf_counter() - started)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
