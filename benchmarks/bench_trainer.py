"""What the trainer adds to its own bare step: the same modules, the same batch, the same thread, in turns.

The bare step is model, loss, backward pass, clipping, AdamW and the teacher's average. The trainer has all that and
the rest of its loop: operations counted, schedule, metrics read from the device and written every ten steps. Loader
and checkpoints are left out. A sample is ten steps. Before each of the trainer's, ten bare ones are timed, by the same
clock; extra_info["overhead"] is the median of what the trainer's take longer than those, as a share.

Run: make bench, or: pytest benchmarks/bench_trainer.py. Where others use the machine, the processor's time on one core
is the steadier figure: OMP_NUM_THREADS=1 pytest benchmarks/bench_trainer.py --benchmark-timer=time.process_time
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

STEPS = sized(10, 2)  # a sample, and a log interval
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


class Ended(Exception):
    """The benchmark is over: the trainer is left without its last checkpoint."""


class OneBatch:
    """A loader but for its batches."""

    def __init__(self, loader: SceneLoader, batches: Callable[[], Iterator[Batch]]) -> None:
        self.bad, self._batches = loader.bad, batches

    def __iter__(self) -> Iterator[Batch]:
        return self._batches()


class Driven(Trainer):
    """A trainer whose loader gives one batch over and over, as many times as it is told to, and which takes bare steps
    in between."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.orders: queue.Queue[str] = queue.Queue()
        self.done: queue.Queue[BaseException | None] = queue.Queue()

    def run(self, what: str) -> None:
        """STEPS steps, "bare" or by the "trainer"."""
        self.orders.put(what)
        if (error := self.done.get()) is not None:
            raise error

    def work(self) -> None:
        """What the thread does."""
        try:
            self.fit()
        except BaseException as error:
            self.done.put(None if isinstance(error, Ended) else error)

    def _build(self, stack: ExitStack) -> None:
        super()._build(stack)
        self.batch = next(iter(self.loader))
        self.loader = OneBatch(self.loader, self._batches)  # type: ignore[assignment]

    def _batches(self) -> Iterator[Batch]:
        wait: Callable[[], None] = torch.cuda.synchronize if self.world.device.type == "cuda" else lambda: None
        while (order := self.orders.get()) != "end":
            for _ in range(STEPS):
                if order == "trainer":
                    yield self.batch
                else:
                    self._bare_step()
            wait()
            self.done.put(None)
        raise Ended

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
    # Not compiled: that takes a minute, and what the loop adds to a step is the same.
    overrides += ["train.checkpoint_every=1000000", f"train.log_every={STEPS}", "train.compile=false"]
    config = TrainConfig.of({}, [*SETTINGS[device], *overrides])
    pack(generate_scenes(config.data.batch_size, seed=0, val=0.0, test=0.0), folder / "shards", progress=False)
    trainer = Driven(config)
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
        trainer.orders.put("end")
        thread.join()
    info = benchmark.extra_info
    info["form"] = "ours, trainer"
    info["scenes"] = STEPS * config.data.batch_size
    info["threads"] = torch.get_num_threads()
    bare = bare[-rounds:]  # without the warm-up's
    info["seconds of a bare step"] = statistics.median(bare) / STEPS
    pairs = zip(benchmark.stats.stats.data, bare, strict=True)
    info["overhead"] = statistics.median(trainers / theirs for trainers, theirs in pairs) - 1


def test_tiny(benchmark: Any, tmp_path: Path) -> None:
    run(benchmark, "cpu", 5, tmp_path)


@pytest.mark.gpu
def test_vit_b_32_on_a_gpu(benchmark: Any, tmp_path: Path) -> None:
    run(benchmark, "cuda", sized(3, 1), tmp_path)
