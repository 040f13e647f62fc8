"""The overhead of the trainer's loop over its bare step: same modules, same batch, same thread, in alternation.

The bare step is model, loss, backward pass, clipping, AdamW and the teacher's update. The trainer adds the rest of its
loop: operation counts, schedule, metrics read from the device and logged every ten steps. Loader and checkpoints are
excluded. A sample is ten steps. Ten bare steps are timed by the same clock before each sample of the trainer;
extra_info["overhead"] is the median relative excess over them.

Run: make bench, or: pytest benchmarks/bench_trainer.py. On a shared machine, CPU time on one core is less noisy:
OMP_NUM_THREADS=1 pytest benchmarks/bench_trainer.py --benchmark-timer=time.process_time
"""

from __future__ import annotations

import queue
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from scenarioclip_fast.benchmarks.timing import WARM, device_for, sized

from scenarioclip_fast.data import Batch, SceneLoader, generate_scenes, pack
from scenarioclip_fast.requirements import import_problem
from scenarioclip_fast.train.config import TrainConfig
from scenarioclip_fast.train.optim import guarded_step
from scenarioclip_fast.train.trainer import Trainer

STEPS = sized(10, 2)  # per sample and per log interval
SETTINGS = {
    "cpu": ["model.preset=tiny", "data.batch_size=16", "optim.lr=1e-5"],
    "cuda": [
        *sized(
            ["model.preset=vit-b-32", "data.batch_size=64", "run.precision=bf16"],
            ["model.preset=tiny", "data.batch_size=2"],
        ),
        f"run.device={device_for('cuda')}",
    ],
}


class BenchmarkEnd(Exception):
    """Ends the trainer's loop without a final checkpoint."""


class OneBatchLoader:
    """Replaces a loader's batches."""

    def __init__(self, loader: SceneLoader, batches: Callable[[], Iterator[Batch]]) -> None:
        self.bad, self._batches = loader.bad, batches

    def __iter__(self) -> Iterator[Batch]:
        return self._batches()


class SteppedTrainer(Trainer):
    """A trainer, run in a thread, that takes a commanded number of steps on one batch, or bare steps instead."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.commands: queue.Queue[str] = queue.Queue()
        self.done: queue.Queue[BaseException | None] = queue.Queue()

    def run(self, kind: str) -> None:
        """Take STEPS steps; `kind`: "bare" or "trainer"."""
        self.commands.put(kind)
        if (error := self.done.get()) is not None:
            raise error

    def work(self) -> None:
        """The thread's target."""
        try:
            self.fit()
        except BaseException as error:
            self.done.put(None if isinstance(error, BenchmarkEnd) else error)

    def _build(self, stack: ExitStack) -> None:
        super()._build(stack)
        self.batch = next(iter(self.loader))
        self.loader = OneBatchLoader(self.loader, self._batches)  # type: ignore[assignment]

    def _batches(self) -> Iterator[Batch]:
        synchronize: Callable[[], None] = torch.cuda.synchronize if self.world.device.type == "cuda" else lambda: None
        while (command := self.commands.get()) != "end":
            for _ in range(STEPS):
                if command == "trainer":
                    yield self.batch
                else:
                    self._bare_step()
            synchronize()
            self.done.put(None)
        raise BenchmarkEnd

    def _bare_step(self) -> None:
        with self._autocast():
            loss = self.loss(self.model(self.batch, self.teacher))["loss"]
        loss.backward()
        guarded_step(self.optimizer, loss.detach(), self.config.optim.clip_norm)
        if self.teacher is not None:
            self.teacher.update(self.model)


def run(benchmark: Any, device: str, rounds: int, folder: Path) -> None:
    for module in ("simplejpeg", "instant_clip_tokenizer"):
        if problem := import_problem(module):
            pytest.skip(problem)
    overrides = [f"data.shards={folder / 'shards'}", f"run.dir={folder / 'run'}", "train.steps=1000000"]
    # Not compiled: that takes a minute and does not change the overhead.
    overrides += ["train.checkpoint_every=1000000", f"train.log_every={STEPS}", "train.compile=false"]
    config = TrainConfig.of({}, [*SETTINGS[device], *overrides])
    pack(generate_scenes(config.data.batch_size, seed=0, val=0.0, test=0.0), folder / "shards", progress=False)
    trainer = SteppedTrainer(config)
    thread = threading.Thread(target=trainer.work)
    thread.start()
    bare: list[float] = []
    rounds = 1 if WARM else rounds
    clock = getattr(benchmark, "_timer", time.perf_counter)  # --benchmark-timer's

    def bare_steps() -> None:
        start = clock()
        trainer.run("bare")
        bare.append(clock() - start)

    try:
        benchmark.group = f"trainer, {config.data.batch_size} scenes, {device}"
        benchmark.pedantic(lambda: trainer.run("trainer"), setup=bare_steps, rounds=rounds, warmup_rounds=int(not WARM))
    finally:
        trainer.commands.put("end")
        thread.join()
    info = benchmark.extra_info
    info["form"] = "ours, trainer"
    info["scenes"] = STEPS * config.data.batch_size
    info["threads"] = torch.get_num_threads()
    bare = bare[-rounds:]  # without the warm-up
    info["seconds of a bare step"] = statistics.median(bare) / STEPS
    pairs = zip(benchmark.stats.stats.data, bare, strict=True)
    info["overhead"] = statistics.median(trainer_s / bare_s for trainer_s, bare_s in pairs) - 1


def test_tiny(benchmark: Any, tmp_path: Path) -> None:
    run(benchmark, "cpu", 5, tmp_path)


@pytest.mark.gpu
def test_vit_b_32_on_a_gpu(benchmark: Any, tmp_path: Path) -> None:
    run(benchmark, "cuda", sized(3, 1), tmp_path)
