"""Compare a step in microbatches with the whole step: loss, terms and all gradients, on one and two ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small_steps import gradients, make_batch, make_step, make_teacher
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scenarioclip_fast.data import Batch
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.losses import MultiLevelContrastiveLoss, ScenarioLoss
from scenarioclip_fast.model import EMATeacher, FreezeConfig
from scenarioclip_fast.train.accumulate import GradCache
from scenarioclip_fast.train.config import TrainConfig
from scenarioclip_fast.train.metrics import read_metrics
from scenarioclip_fast.train.step import Phase, StepModule
from scenarioclip_fast.train.trainer import Trainer

Make = Callable[..., TrainConfig]


def compare(step: StepModule, wrapped: nn.Module, batch: Batch, teacher: EMATeacher | None, microbatches: int) -> None:
    """Compare the step in microbatches with the whole step."""
    assert step.model.tokens is not None
    expected = wrapped(Phase.LOSS, batch, step.model.tokens.unique_texts(batch.host_ids), teacher)
    expected["loss"].backward()
    expected_gradients = gradients(step)
    texts = step.model.tokens.unique_texts(batch.host_ids)
    # On several ranks, sizes and ids ahead.
    assert isinstance(step.loss, ScenarioLoss) and isinstance(step.loss.contrastive, MultiLevelContrastiveLoss)
    rows = [len(index) for index in texts.index]
    plan = step.loss.contrastive.plan(texts.id, rows, width=12, dtype=torch.float64, capacity=36)
    texts = replace(texts, plan=plan)
    terms = GradCache(step, wrapped, microbatches, nullcontext).backward(batch, texts, teacher)
    found = gradients(step)
    assert terms.keys() == expected.keys()
    for name, term in expected.items():
        torch.testing.assert_close(terms[name], term.detach(), rtol=1e-12, atol=1e-12)
    trained = {name for name, p in step.named_parameters() if p.requires_grad}
    assert found.keys() == expected_gradients.keys() == trained
    assert expected_gradients["loss.contrastive.logit_scale.object"].any() or batch.num_objects < 3
    for name in trained:
        torch.testing.assert_close(found[name], expected_gradients[name], rtol=1e-10, atol=1e-12, msg=name)


BATCHES = {
    "ragged": ([3, 0, 2, 5, 1], [2, 1, 0, 4, 1]),
    "no relations": ([1, 2, 0], [0, 0, 0]),
    "one scene": ([2], [3]),
    "scenes without an action": ([3, 0, 2, 5, 1], [2, 1, 0, 4, 1], (0, 3)),
    "no actions": ([3, 0, 2], [2, 1, 0], (0, 1, 2)),
}


@pytest.mark.parametrize("sizes", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize(
    ("variant", "freeze", "duplicates"),
    [
        ("scenarioclip1", FreezeConfig(1, 1), "negatives"),
        ("scenarioclip1", FreezeConfig.nothing(), "positives"),
        ("pyramidclip", FreezeConfig(1, 1, pre_layernorm=False), "negatives"),
    ],
)
def test_microbatches_do_not_change_the_gradients(
    variant: str, freeze: FreezeConfig, duplicates: str, sizes: tuple[Any, ...]
) -> None:
    step = make_step(variant, freeze, duplicates)
    teacher = make_teacher(step)
    for microbatches in (1, 2, 3, 7):  # 7 exceeds the number of scenes: some are empty
        compare(step, step, make_batch(*sizes), teacher, microbatches)


def on_a_rank(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        step = make_step("scenarioclip1", FreezeConfig(1, 1), "negatives", dist.new_group())
        teacher = make_teacher(step)
        wrapped = DistributedDataParallel(step, gradient_as_bucket_view=True)
        for objects, relations in [([3, 0, 2], [2, 1, 0]), ([5, 1], [4, 1])][:: 1 - 2 * rank]:  # ranks differ
            for microbatches in (2, 3):
                compare(step, wrapped, make_batch(objects, relations, seed=rank), teacher, microbatches)
        # All ranks end up with the same, averaged gradient.
        assert step.model.tokens is not None
        batch = make_batch([2, 1], [1, 1], seed=rank)
        texts = step.model.tokens.unique_texts(batch.host_ids)
        GradCache(step, wrapped, 2, nullcontext).backward(batch, texts, teacher)
        own = torch.cat([g.flatten() for g in gradients(step).values()])
        of_rank_0 = own.clone()
        dist.broadcast(of_rank_0, 0)
        torch.testing.assert_close(own, of_rank_0, rtol=0, atol=0)
    finally:
        dist.destroy_process_group()


def test_microbatches_do_not_change_the_gradients_on_two_ranks(tmp_path: Path) -> None:
    mp.spawn(on_a_rank, (str(tmp_path / "store"),), nprocs=2)


class SavedActivations:
    """Measure the bytes that autograd saves for the backward pass: current and peak."""

    def __init__(self, module: nn.Module) -> None:
        self.weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.now = self.peak = 0

    def pack(self, x: Tensor) -> Any:
        outer = self

        class Held:
            def __init__(self) -> None:
                self.bytes = 0 if x.untyped_storage().data_ptr() in outer.weights else x.nbytes
                outer.now += self.bytes
                outer.peak = max(outer.peak, outer.now)
                self.x = x

            def __del__(self) -> None:
                outer.now -= self.bytes

        return Held()


def test_activation_memory_is_that_of_one_microbatch() -> None:
    step = make_step("scenarioclip0", FreezeConfig.nothing(), "negatives")
    batch = make_batch([3] * 16, [2] * 16)
    assert step.model.tokens is not None
    texts = step.model.tokens.unique_texts(batch.host_ids)
    peaks = []
    for microbatches in (1, 8):
        saved = SavedActivations(step)
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.x):
            GradCache(step, step, microbatches, nullcontext).backward(batch, texts, None)
        peaks.append(saved.peak)
    # An eighth, plus the loss's own share.
    assert peaks[1] < 0.2 * peaks[0]


def test_a_run_in_microbatches_matches_the_whole_run(small: Make) -> None:
    curves = []
    for microbatches in (1, 4):
        config = small("train.steps=4", f"train.accumulate={microbatches}", run=f"in {microbatches}")
        Trainer(config).fit()
        rows = read_metrics(Path(config.run.dir) / "metrics.jsonl")
        curves.append(torch.tensor([[row[name] for name in ("loss", "grad_norm", "distillation")] for row in rows]))
    # float32 sums in another order; AdamW's first steps, which normalise gradients, amplify the
    # difference.
    torch.testing.assert_close(curves[1][0], curves[0][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-3, atol=0)


def test_bf16_in_microbatches(small: Make) -> None:
    config = small("train.steps=2", "train.accumulate=2", "run.precision=bf16")
    result = Trainer(config).fit()
    assert result.completed and result.skipped == 0


@pytest.mark.parametrize("microbatches", [3, 16])
def test_microbatches_must_divide_the_batch(small: Make, microbatches: int) -> None:
    with pytest.raises(UserError, match=rf"train\.accumulate: got {microbatches}, expected a divisor of the 8 scenes"):
        Trainer(small("train.steps=1", f"train.accumulate={microbatches}")).fit()
