"""Calls whose sizes and ids were exchanged ahead: equal to other calls, in fewer collectives, and checked."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from scenarioclip_fast.benchmarks.count_collectives import count_collectives
from torch import Tensor

from scenarioclip_fast.losses import ContrastiveLoss, MultiLevelContrastiveLoss
from scenarioclip_fast.ops import collectives, multilevel_contrastive_loss, plan_exchange
from scenarioclip_fast.ops.contrastive import DUPLICATES

D = 6
# (rows, texts) of each rank at two levels: an empty share, a rank with texts only, all texts on one rank.
SIZES = [
    [[(5, 4), (0, 0), (3, 7)], [(2, 2), (0, 3), (6, 1)]],
    [[(0, 0), (4, 9), (0, 0)], [(1, 1), (1, 1), (1, 1)]],
]


def inputs(sizes: list[list[tuple[int, int]]], rank: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(rank)
    own = [level[rank] for level in sizes]
    tables = [torch.randn(20, D, generator=torch.Generator().manual_seed(9)) for _ in own]
    ids = [torch.randperm(20, generator=g)[:u] for _, u in own]
    return {
        "images": [torch.randn(n, D, generator=g).requires_grad_() for n, _ in own],
        "texts": [table[i].requires_grad_() for table, i in zip(tables, ids, strict=True)],
        "logit_scales": [torch.tensor(10.0).requires_grad_() for _ in own],
        "text_indices": [torch.randint(max(u, 1), (n,), generator=g) for n, u in own],
        "text_ids": ids,
    }


def results(given: dict[str, Any], **options: Any) -> list[Tensor]:
    losses = multilevel_contrastive_loss(**given, **options)
    leaves = [*given["images"], *given["texts"], *given["logit_scales"]]
    return [losses.detach(), *torch.autograd.grad(losses.sum(), leaves)]


def plan(given: dict[str, Any], group: Any, **options: Any) -> Any:
    rows = [len(x) for x in given["images"]]
    return plan_exchange(given["text_ids"], rows, **{"group": group, "width": D, "dtype": torch.float32, **options})


def check_equal(group: Any) -> None:
    """The same bits as without a plan; with a capacity below, at and above the number of ids."""
    cases = list(itertools.product(SIZES, DUPLICATES, (None, 3), (1, 10, 64), (False, True)))
    planned = []
    for sizes, duplicates, chunk, capacity, with_weights in cases:  # all of them ahead
        given = inputs(sizes, group.rank())
        options = {"group": group, "duplicates": duplicates, "chunk": chunk}
        planned.append((given, options, plan(given, **options, capacity=capacity, text_weights=with_weights)))
        dist.barrier(group=group)  # other collectives in between
    for (given, options, made), case in zip(planned, cases, strict=True):
        if case[-1]:
            given["text_weights"] = [torch.rand(len(t)) + 0.5 for t in given["texts"]]
        expected = results(given, **options)
        torch.testing.assert_close(results(given, **options, plan=made), expected, rtol=0, atol=0)
        made = plan(given, **options, capacity=case[3], text_weights=case[-1])
        made.start_gather(given["texts"])
        torch.testing.assert_close(results(given, **options, plan=made), expected, rtol=0, atol=0)


def check_collectives(group: Any) -> None:
    """One message ahead; the call itself gathers only the texts."""
    given = inputs(SIZES[0], group.rank())
    with count_collectives() as ahead:
        made = plan(given, group, capacity=40)
    assert (ahead["all_gather"].calls, ahead["all_gather"].bytes) == (1, 8 * group.size() * (32 + 40))
    with count_collectives() as call:
        results(given, group=group, plan=made)
    assert call["all_gather"].calls == call["reduce_scatter"].calls == 1
    with count_collectives() as call:
        results(given, group=group, plan=plan(given, group, capacity=3))
    assert call["all_gather"].calls == 3  # with the plan's own, and the ids, which did not fit


def check_order(group: Any) -> None:
    """Texts travel beside what is launched after them, forward and backward."""
    given = inputs(SIZES[0], group.rank())
    events: list[str] = []

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            events.append(name)
            return function(*arguments)

        return call

    def encode(name: str, leaves: list[Tensor]) -> list[Tensor]:
        events.append(name)
        out = [(2 * x).tanh() for x in leaves]
        out[0].register_hook(lambda _: events.append(f"backward of {name}"))
        return out

    made = plan(given, group)
    made._shares.result()  # a thread waits for the ids, at any time
    with pytest.MonkeyPatch.context() as patch:
        for name in ("start_gather", "start_reduce_scatter"):
            patch.setattr(collectives, name, noted(name, getattr(collectives, name)))
        patch.setattr(collectives.InFlight, "wait", noted("wait", collectives.InFlight.wait))
        texts = encode("texts", given["texts"])
        made.start_gather(texts)
        images = encode("images", given["images"])
        losses = multilevel_contrastive_loss(**{**given, "images": images, "texts": texts}, group=group, plan=made)
        forward = [*events]
        losses.sum().backward()
    assert forward == ["texts", "start_gather", "images", "wait"]
    backward = events[len(forward) :]
    assert backward == ["start_reduce_scatter", "backward of images", "wait", "backward of texts"]


def check_started_texts(group: Any) -> None:
    """Only the texts whose gather was started may be passed to the call, and only to one."""
    given = inputs(SIZES[0], group.rank())
    made = plan(given, group)
    with pytest.raises(ValueError, match=r"^texts: got 1 levels, but planned were 2$"):
        made.start_gather(given["texts"][:1])
    wider = torch.zeros(len(given["texts"][1]), D + 1)
    expected = [len(wider), D]
    message = f"texts: level 1: got shape {[len(wider), D + 1]}, but planned was {expected}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        made.start_gather([given["texts"][0], wider])
    made.start_gather(given["texts"])
    with pytest.raises(
        ValueError, match=r"^texts: got a plan that gathers texts already, expected a new plan for each"
    ):
        made.start_gather(given["texts"])
    results(given, group=group, plan=made)
    with pytest.raises(ValueError, match=r"^plan: got other texts than were passed to start_gather: pass the same"):
        results(given, group=group, plan=made)
    made = plan(given, group)
    made.start_gather(given["texts"])
    others = {**given, "texts": [text.detach().clone().requires_grad_() for text in given["texts"]]}
    with pytest.raises(ValueError, match=r"^plan: got other texts than were passed to start_gather: pass the same"):
        results(others, group=group, plan=made)
    made = plan(given, group)
    with torch.no_grad():
        made.start_gather(given["texts"])
    with pytest.raises(ValueError, match=r"^plan: got texts that require a gradient, but start_gather was called"):
        results(given, group=group, plan=made)


def check_frozen_texts_started_without_gradients(group: Any) -> None:
    given = inputs(SIZES[0], group.rank())
    given["texts"] = [text.detach() for text in given["texts"]]
    made = plan(given, group)
    with torch.no_grad():
        made.start_gather(given["texts"])
    losses = multilevel_contrastive_loss(**given, group=group, plan=made)
    losses.sum().backward()
    assert all(image.grad is not None for image in given["images"])


def check_disagreements(group: Any) -> None:
    """Ranks that plan different calls fail on every rank, in the call."""
    first = group.rank() == 0
    given = inputs(SIZES[1], group.rank())
    on_first = "on rank 0 of the group and"
    for options, message in (
        (
            {"dtype": torch.float64 if first else torch.float32},
            f"features' dtype torch.float64 {on_first}",
        ),
        ({"width": D + first}, f"width {D + 1} {on_first} {D} on rank 1"),
        ({"text_weights": first}, f"text_weight a tensor {on_first} None on rank 1"),
        ({"duplicates": DUPLICATES[first]}, f"duplicates 'positives' {on_first} 'negatives' on rank 1"),
        ({"chunk": 4 if first else None}, f"chunk 4 {on_first} None on rank 1"),
        ({"scale_gradients": first}, f"logit_scale with a gradient {on_first} without a gradient on rank 1"),
    ):
        made = plan(given, group, **options)
        with pytest.raises(ValueError, match=f"^group: (level 0: )?got {message}"):
            made._shares.result()
    levels = 3 if first else 2
    made = plan_exchange([torch.arange(2)] * levels, [1] * levels, group=group, width=D, dtype=torch.float32)
    with pytest.raises(ValueError, match=rf"^group: got levels 3 {on_first} 2 on rank 1"):
        made._shares.result()
    # In a call, in which each rank keeps to its own plan.
    made = plan(given, group, chunk=4 if first else None)
    with pytest.raises(ValueError, match=rf"^group: got chunk 4 {on_first} None on rank 1"):
        results(given, group=group, chunk=4 if first else None, plan=made)


def check_other_calls(group: Any) -> None:
    """A call that is not the planned one fails before any collective."""
    given = inputs(SIZES[1], 1)  # the same on every rank, so that none waits for another

    def wrong(message: str, change: dict[str, Any], **options: Any) -> None:
        made = plan(given, group)
        with pytest.raises(ValueError, match=f"^plan: {message}"):
            results({**given, **change}, **{"group": group, "plan": made, **options})

    double = {name: [x.detach().double().requires_grad_() for x in given[name]] for name in ("images", "texts")}
    wrong("got features' dtype torch.float64, but planned was torch.float32", double)
    index = [given["text_indices"][0], torch.zeros(2).long()]
    more = {"images": [given["images"][0], torch.ones(2, D)], "text_indices": index}
    wrong("level 1: got 2 image rows, but planned were 1", more)
    others = [ids + 1 for ids in given["text_ids"]]
    wrong("level 0: got other text ids than were planned", {"text_ids": others})
    wrong("level 0: got text_id None, but planned was a tensor", {"text_ids": None})
    weights = [torch.ones(len(t)) for t in given["texts"]]
    wrong("level 0: got text_weight a tensor, but planned was None", {"text_weights": weights})
    wrong("got duplicates 'positives', but planned was 'negatives'", {}, duplicates="positives")
    wrong("got a plan without a group", {}, group=None)
    wrong("got the plan of another group", {}, group=dist.new_group())
    made = plan(given, group, gradients=False)
    with pytest.raises(ValueError, match="plan: got features that require a gradient, but gradients=False was planned"):
        results(given, group=group, plan=made)
    with torch.no_grad():
        made = plan(given, group, gradients=False, scale_gradients=False)
        multilevel_contrastive_loss(**given, group=group, plan=made)


def check_frozen_ranks(group: Any) -> None:
    """Ranks whose features need no gradient take part in the backward pass of the others."""
    given = inputs(SIZES[0], group.rank())
    if group.rank():
        given |= {name: [x.detach() for x in given[name]] for name in ("images", "texts")}
    found = []
    for way in ("without a plan", "planned", "started"):
        made = None if way == "without a plan" else plan(given, group)
        if made is not None and way == "started":
            made.start_gather(given["texts"])
        multilevel_contrastive_loss(**given, group=group, plan=made).sum().backward()
        if group.rank() == 0:
            assert all(x.grad is not None and x.grad.any() for x in given["images"])
            leaves = [*given["images"], *given["texts"]]
            found.append([x.grad for x in leaves])
            for x in leaves:
                x.grad = None
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))


def check_module(group: Any) -> None:
    given = inputs(SIZES[0], group.rank())
    module = MultiLevelContrastiveLoss(["a", "b"], group=group)
    arguments = [given[name] for name in ("images", "texts", "text_indices", "text_ids")]
    made = module.plan(given["text_ids"], [len(x) for x in given["images"]], width=D, dtype=torch.float32, capacity=16)
    assert made is not None
    assert torch.equal(module(*arguments, plan=made), module(*arguments))
    alone = MultiLevelContrastiveLoss(["a"])
    assert alone.plan([torch.arange(2)], [1], width=D, dtype=torch.float32, capacity=2) is None
    one = plan({"images": given["images"][:1], "text_ids": given["text_ids"][:1]}, group)
    loss = ContrastiveLoss(group=group)(*(tensors[0] for tensors in arguments), plan=one)
    # Alone, the level is the same sum: in another collective, whose rows are the same.
    torch.testing.assert_close(loss, module(*arguments)[0])


def check_arguments(group: Any) -> None:
    options: dict[str, Any] = {"group": group, "width": D, "dtype": torch.float32}
    with pytest.raises(TypeError, match="text_ids: level 1: got list, expected an int64 tensor"):
        plan_exchange([torch.arange(2), [1, 2]], [1, 1], **options)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="text_ids: level 0: got device meta, expected cpu"):
        plan_exchange([torch.arange(2, device="meta")], [1], **options)
    with pytest.raises(ValueError, match="rows: got 1 levels, expected 2, as many as text_ids"):
        plan_exchange([torch.arange(2)] * 2, [1], **options)


CHECKS: list[Callable[[Any], None]] = [
    check_equal,
    check_collectives,
    check_order,
    check_started_texts,
    check_frozen_texts_started_without_gradients,
    check_disagreements,
    check_other_calls,
    check_frozen_ranks,
    check_module,
    check_arguments,
]


def run(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    try:
        for check in CHECKS:
            check(dist.group.WORLD)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def test_plans_of_three_ranks(tmp_path: Path) -> None:
    mp.spawn(run, (str(tmp_path / "store"),), nprocs=3)


@pytest.mark.gpu
def test_no_synchronisation_on_a_gpu() -> None:
    device = torch.device("cuda", 0)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=device)
    try:
        group, ids = dist.group.WORLD, [torch.arange(30) % 20, torch.arange(9)]
        leaves = [torch.ones(len(i), D, device=device, requires_grad=True) for i in ids]
        scales = [torch.ones((), device=device, requires_grad=True) for _ in ids]
        for attempt in range(2):  # kernels are compiled in the first
            torch.cuda.set_sync_debug_mode("error" if attempt else "default")
            made = plan_exchange(ids, [len(i) for i in ids], group=group, width=D, dtype=torch.float32)
            made.start_gather(leaves)
            losses = multilevel_contrastive_loss(leaves, leaves, scales, text_ids=ids, group=group, plan=made)
            losses.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        dist.destroy_process_group()
