"""The exchange of texts between ranks, beside the vision encoders: in the model, and in the trainer's step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small_steps import gradients, make_batch, make_step, make_teacher
from torch.nn.parallel import DistributedDataParallel

from scenarioclip_fast.losses import MultiLevelContrastiveLoss, ScenarioLoss
from scenarioclip_fast.model import FreezeConfig, ScenarioCLIP
from scenarioclip_fast.ops import collectives
from scenarioclip_fast.train.config import TrainConfig
from scenarioclip_fast.train.step import Phase
from scenarioclip_fast.train.trainer import Trainer

Make = Callable[..., TrainConfig]
VARIANTS = [
    ("scenarioclip1", FreezeConfig(1, 1), "negatives"),
    ("scenarioclip1", FreezeConfig.nothing(), "positives"),
    ("pyramidclip", FreezeConfig(1, 1, pre_layernorm=False), "negatives"),
]
BATCHES = [([3, 0, 2], [2, 1, 0]), ([5, 1], [0, 0])]


@contextmanager
def recorded(model: ScenarioCLIP) -> Iterator[list[str]]:
    """Record when the relation level's encoders run, and when collectives of texts start."""
    events: list[str] = []

    def before(function: Callable[..., Any], event: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            events.append(event)
            return function(*arguments)

        return call

    with pytest.MonkeyPatch.context() as patch, ExitStack() as hooks:
        for name in ("start_gather", "start_reduce_scatter"):
            patch.setattr(collectives, name, before(getattr(collectives, name), name))
        for name, encoders in (("vision", model.vision), ("text", model.text)):
            block = encoders["relation"].blocks[1]
            hooks.enter_context(block.register_forward_hook(before(lambda *_: None, name)))
            hooks.enter_context(block.register_full_backward_hook(before(lambda *_: None, f"backward of {name}")))
        yield events


def compare_with_unplanned(rank: int, group: Any) -> None:
    for variant, freeze, duplicates in VARIANTS:
        step = make_step(variant, freeze, duplicates, group)
        teacher = make_teacher(step)
        wrapped = DistributedDataParallel(step, gradient_as_bucket_view=True)
        assert isinstance(step.loss, ScenarioLoss) and isinstance(step.loss.contrastive, MultiLevelContrastiveLoss)
        assert step.model.tokens is not None
        for objects, relations in BATCHES[:: 1 - 2 * rank]:  # ranks differ
            batch = make_batch(objects, relations, seed=rank)
            texts = step.model.tokens.unique_texts(batch.host_ids)
            expected = wrapped(Phase.LOSS, batch, texts, teacher)
            expected["loss"].backward()
            expected_gradients = gradients(step)
            rows = [len(index) for index in texts.index]
            plan = step.loss.contrastive.plan(texts.id, rows, width=12, dtype=torch.float64, capacity=36)
            with recorded(step.model) as events:
                terms = wrapped(Phase.LOSS, batch, replace(texts, plan=plan), teacher)
                terms["loss"].backward()
            order = list(dict.fromkeys(events))
            assert order[:3] == ["text", "start_gather", "vision"], events
            assert order[3:] == ["start_reduce_scatter", "backward of vision", "backward of text"], events
            torch.testing.assert_close(terms, expected, rtol=0, atol=0)
            torch.testing.assert_close(gradients(step), expected_gradients, rtol=0, atol=0)


def on_a_rank(rank: int, store: str, config: TrainConfig) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        compare_with_unplanned(rank, dist.new_group())
        started = 0
        init = collectives.StartedGather.__init__

        def counted(*arguments: Any) -> None:
            nonlocal started
            started += 1
            init(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(collectives.StartedGather, "__init__", counted)
            assert Trainer(config).fit().completed
        assert started == config.train.steps
    finally:
        dist.destroy_process_group()


def test_texts_travel_beside_the_vision_encoders(small: Make, tmp_path: Path) -> None:
    """Gradients and terms have the same bits as without a plan; the trainer plans and starts every step."""
    mp.spawn(on_a_rank, (str(tmp_path / "store"), small("train.steps=3")), nprocs=2)
