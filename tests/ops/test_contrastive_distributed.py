"""contrastive_loss with a group: several gloo processes against a single process with all rows."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from scenarioclip_fast.benchmarks.count_collectives import count_collectives
from scenarioclip_fast.kernels.contrastive import reference
from torch import Tensor

from scenarioclip_fast.losses import ClipLoss
from scenarioclip_fast.ops import contrastive_loss, multilevel_contrastive_loss

D = 12
VOCABULARY = 9
# Rows of each rank: uneven, one empty rank, all rows on one rank, no rows at all.
SHARES = {2: [(5, 8), (0, 6), (7, 0), (0, 0), (4, 4)], 4: [(3, 0, 6, 1), (1, 9, 2, 4)]}


def share(rank: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """A rank's image rows [rows, D], its unique text ids [U], and the index [rows] of each row's text."""
    g = torch.Generator().manual_seed(100 * rank + rows)
    image = torch.randn(rows, D, dtype=torch.float64, generator=g)
    ids, index = torch.unique(torch.randint(VOCABULARY, (rows,), generator=g), return_inverse=True)
    return image, ids, index


def leaves(rank: int, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A rank's images, the text table and the scale, all requiring gradients; and text ids and indices [2, rows]."""
    table = torch.randn(VOCABULARY, D, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).requires_grad_()
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    image, ids, index = share(rank, rows)
    return image.requires_grad_(), table, scale, torch.stack([ids[index], index]) if rows else torch.zeros(2, 0).long()


def one_process(rows: tuple[int, ...], duplicates: str) -> list[Tensor]:
    """[loss, d table, d scale, d image of rank 0, of rank 1, ...]"""
    parts = [leaves(rank, n) for rank, n in enumerate(rows)]
    image = torch.cat([p[0] for p in parts])
    ids = torch.cat([p[3][0] for p in parts])
    _, table, scale, _ = parts[0]
    used, index = torch.unique(ids, return_inverse=True)
    loss = contrastive_loss(image, table[used], scale, text_index=index, duplicates=duplicates, backend="reference")
    return [loss.detach(), *torch.autograd.grad(loss, (table, scale, *(p[0] for p in parts)))]


def check(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def averaged(grad: Tensor, group: Any) -> Tensor:
    """Average a parameter's gradient as DistributedDataParallel does."""
    grad = grad.clone()
    dist.all_reduce(grad, group=group)
    return grad / group.size()


def check_mean(rows: tuple[int, ...], duplicates: str, with_ids: bool, backend: str, group: Any) -> None:
    rank, world = group.rank(), group.size()
    image, table, scale, (ids, index) = leaves(rank, rows[rank])
    own = torch.unique(ids)
    loss = contrastive_loss(
        image,
        table[own],
        scale,
        text_index=index,
        text_id=own if with_ids else None,
        duplicates=duplicates,
        group=group,
        backend=backend,
    )
    grads = torch.autograd.grad(loss, (image, table, scale))
    expected = one_process(rows, duplicates)
    check(loss.detach(), expected[0])
    check(averaged(grads[1], group), expected[1])
    check(averaged(grads[2], group), expected[2])
    check(grads[0] / world, expected[3 + rank])


def check_diagonal_and_none(rows: tuple[int, ...], group: Any) -> None:
    """reduction="none", with a weight per rank: the gradient is that of the sum over ranks."""
    rank = group.rank()
    images = [share(r, n)[0].requires_grad_() for r, n in enumerate(rows)]
    texts = [share(r + 10, n)[0].requires_grad_() for r, n in enumerate(rows)]
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    full = contrastive_loss(torch.cat(images), torch.cat(texts), scale, reduction="none", backend="reference")
    weight = torch.repeat_interleave(torch.arange(1.0, len(rows) + 1).double(), torch.tensor(rows))
    expected = torch.autograd.grad((full * weight).sum(), (images[rank], texts[rank], scale))
    found = contrastive_loss(images[rank], texts[rank], scale, reduction="none", group=group)
    check(found.detach(), full.split(rows)[rank].detach())
    grads = torch.autograd.grad((found * (rank + 1)).sum(), (images[rank], texts[rank], scale))
    check(grads[:2], expected[:2])
    total = grads[2].clone()
    dist.all_reduce(total, group=group)
    check(total, expected[2])


def check_levels(shares: list[tuple[int, ...]], group: Any) -> None:
    rank = group.rank()
    parts = [leaves(rank, rows[rank]) for rows in shares]
    losses = multilevel_contrastive_loss(
        [p[0] for p in parts],
        [p[1][torch.unique(p[3][0])] for p in parts],
        [p[2] for p in parts],
        text_indices=[p[3][1] for p in parts],
        text_ids=[torch.unique(p[3][0]) for p in parts],
        group=group,
    )
    losses.sum().backward()
    for (_, table, scale, _), rows, loss in zip(parts, shares, losses, strict=True):
        expected = one_process(rows, "negatives")
        check(loss.detach(), expected[0])
        check(averaged(table.grad, group), expected[1])
        check(averaged(scale.grad, group), expected[2])


def kept_by_rank(ids: list[Tensor]) -> list[int]:
    """Of each id, the text of the first rank from id % ranks on is kept."""
    counts = [0] * len(ids)
    for text in set(torch.cat(ids).tolist()):
        holders = [rank for rank, own in enumerate(ids) if text in own.tolist()]
        counts[min(holders, key=lambda rank: (rank - text) % len(ids))] += 1
    return counts


def check_widths(group: Any) -> None:
    """Levels of equal width share a collective; texts with equal ids on several ranks travel once."""
    rank, world = group.rank(), group.size()
    widths, ids = (12, 5, 12), [torch.arange(4), torch.arange(3) + rank, torch.arange(2 * rank)]
    images = [torch.randn(2, d, dtype=torch.float64) for d in widths]
    images[2] = images[2][:rank]  # rank 0 has neither rows nor texts
    tables = [share(k, 40)[0] @ torch.ones(D, d, dtype=torch.float64).triu() for k, d in enumerate(widths)]
    texts = [table[own].requires_grad_() for table, own in zip(tables, ids, strict=True)]
    indices = [torch.arange(len(x)) for x in images]
    with count_collectives() as forward:
        together = multilevel_contrastive_loss(
            images, texts, [10.0] * 3, text_indices=indices, text_ids=ids, group=group
        )
    with count_collectives() as backward:
        grads = torch.autograd.grad(together @ torch.arange(1.0, 4.0).double(), texts)
    assert forward["all_gather"].calls == 4 and backward["reduce_scatter"].calls == 2  # with sizes and ids
    everyones = [[torch.arange(4)] * world, [torch.arange(3) + r for r in range(world)]]
    everyones.append([torch.arange(2 * r) for r in range(world)])
    first, second, third = (kept_by_rank(level) for level in everyones)
    rows = 12 * max(a + b for a, b in zip(first, third, strict=True)) + 5 * max(second)
    assert backward["reduce_scatter"].bytes == 8 * world * rows
    for k, level in enumerate(zip(images, texts, indices, ids, strict=True)):
        image, text, index, own = level
        alone = contrastive_loss(image, text, 10.0, text_index=index, text_id=own, group=group)
        check(together[k].detach(), alone.detach())
        check(grads[k], (k + 1) * torch.autograd.grad(alone, text)[0])


def check_one_rank_frozen(group: Any) -> None:
    """A rank with an empty share and no gradient participates in the backward pass of the other ranks."""
    rank, rows = group.rank(), (6,) + (0,) * (group.size() - 1)
    image, table, _, (ids, index) = leaves(rank, rows[rank])
    own = torch.unique(ids)
    text = table[own] if rank == 0 else torch.empty(0, D, dtype=torch.float64)
    image = image if rank == 0 else image.detach()
    loss = contrastive_loss(image, text, 20.0, text_index=index, text_id=own, group=group)
    loss.backward()
    if rank == 0:
        check(table.grad / group.size(), one_process(rows, "negatives")[1])


def check_clip_loss(local_loss: bool, gather_with_grad: bool) -> None:
    """Compare with open_clip's formulas over the rows of all ranks."""
    group: Any = dist.group.WORLD
    rank, world, n = group.rank(), group.size(), 5
    images = [share(r, n)[0].requires_grad_() for r in range(world)]
    texts = [share(r + 10, n)[0].requires_grad_() for r in range(world)]
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)

    def formula(own: int) -> Tensor:
        # The loss of rank `own`; without gather_with_grad, features of other ranks are constants.
        x, y = (
            [t if gather_with_grad or (k == own and not local_loss) else t.detach() for k, t in enumerate(ts)]
            for ts in (images, texts)
        )
        if not local_loss:
            return reference.open_clip_loss(torch.cat(x), torch.cat(y), scale)
        target = torch.arange(n) + own * n
        by_image = torch.nn.functional.cross_entropy(scale * images[own] @ torch.cat(y).T, target)
        return (by_image + torch.nn.functional.cross_entropy(scale * texts[own] @ torch.cat(x).T, target)) / 2

    loss = ClipLoss(local_loss, gather_with_grad, rank=rank, world_size=world)(images[rank], texts[rank], scale)
    found = torch.autograd.grad(loss, (images[rank], texts[rank], scale))
    check(loss.detach(), formula(rank).detach())
    # With gather_with_grad, features get gradients from the losses of all ranks.
    total = sum(formula(r) for r in range(world)) if gather_with_grad else formula(rank)
    check(found[:2], torch.autograd.grad(total, (images[rank], texts[rank])))
    own = sum(torch.autograd.grad(formula(r), scale)[0] for r in range(world)) / world
    check(averaged(found[2], group), own)


def check_all(group: Any) -> None:
    shares = SHARES[group.size()]
    for rows in shares:
        for duplicates, backend in itertools.product(("negatives", "positives"), ("reference", "cpu")):
            check_mean(rows, duplicates, True, backend, group)
        check_mean(rows, "negatives", False, "auto", group)
        check_diagonal_and_none(rows, group)
    check_levels(shares, group)
    check_one_rank_frozen(group)
    with pytest.raises(ValueError, match="text_id: got None, expected an id per text"):
        contrastive_loss(torch.ones(1, 2), torch.ones(1, 2), 1.0, duplicates="positives", group=group)


def check_mismatches(group: Any) -> None:
    """Differences with which collectives would hang, crash or return different losses are errors on every rank."""
    first, features = group.rank() == 0, torch.ones(2, D)
    scale, ids, weights = torch.tensor(1.0), torch.arange(2), torch.ones(2)

    def options(own: Tensor = features, **given: Any) -> dict[str, Any]:
        return {"image": own, "text": own, "logit_scale": scale, "group": group, **given}

    for on_first, elsewhere, message in (
        (options(features.double()), options(), "features' dtype torch.float64 on rank 0 .* torch.float32 on rank 1"),
        (options(features[:, 1:]), options(), f"width {D - 1} on rank 0 of the group and {D} on rank 1, expected the"),
        (options(text_id=ids), options(features[:0]), "text_id a tensor on rank 0 of the group and None on rank 1"),
        (options(), options(text_weight=weights), "text_weight None on rank 0 of the group and a tensor on rank 1"),
        (
            options(text_id=ids),
            options(text_id=ids, duplicates="positives"),
            "duplicates 'negatives' on rank 0 of the group and 'positives' on rank 1",
        ),
        (options(), options(duplicates="positives"), "duplicates 'negatives' on rank 0 .* 'positives' on rank 1"),
        (
            options(logit_scale=scale.clone().requires_grad_()),
            options(),
            "logit_scale with a gradient on rank 0 of the group and without a gradient on rank 1",
        ),
    ):
        with pytest.raises(ValueError, match=f"^group: got {message}"):
            contrastive_loss(**(on_first if first else elsewhere))
    with torch.no_grad():
        contrastive_loss(**options(logit_scale=scale.clone().requires_grad_(first)))
    count = 3 if first else 1
    with pytest.raises(ValueError, match=r"^group: got levels 3 on rank 0 of the group and 1 on rank 1"):
        multilevel_contrastive_loss([features] * count, [features] * count, [1.0] * count, group=group)
    widths = [features, features[:, 1:] if first else features]
    with pytest.raises(ValueError, match=f"^group: level 1: got width {D - 1} on rank 0 of the group and {D} on rank"):
        multilevel_contrastive_loss(widths, widths, [1.0, 1.0], group=group)


def run(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=4)
    try:
        check_all(dist.group.WORLD)
        check_widths(dist.group.WORLD)
        for local_loss, gather_with_grad in itertools.product((False, True), repeat=2):
            check_clip_loss(local_loss, gather_with_grad)
        # Subgroups, where ranks differ from the global ranks.
        pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
        check_all(pairs[rank // 2])
        check_mismatches(pairs[rank // 2])
        dist.barrier()
    finally:
        dist.destroy_process_group()


def test_ranks_equal_one_process(tmp_path: Path) -> None:
    mp.spawn(run, (str(tmp_path / "store"),), nprocs=4)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["nccl", "cpu:gloo,cuda:nccl"])
@pytest.mark.parametrize("duplicates", ["negatives", "positives"])
def test_group_on_a_gpu(backend: str, duplicates: str) -> None:
    """One rank runs all collectives, without synchronising if the group has a CPU backend."""
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0))
    try:
        g = torch.Generator("cuda").manual_seed(0)
        image, text = (torch.randn(n, 64, generator=g, device="cuda").bfloat16().requires_grad_() for n in (300, 40))
        index = torch.randint(40, (300,), generator=g, device="cuda")
        ids = torch.arange(40) % 30  # some texts twice
        scale = torch.tensor(14.0, device="cuda", requires_grad=True)

        def grads(group: Any) -> tuple[Tensor, ...]:
            loss = contrastive_loss(
                image, text, scale, text_index=index, text_id=ids, duplicates=duplicates, group=group
            )
            return loss.detach(), *torch.autograd.grad(loss, (image, text, scale))

        group = dist.group.WORLD
        found = grads(group)
        if "gloo" in backend:
            torch.cuda.set_sync_debug_mode("error")
            try:
                grads(group)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        first = torch.arange(30, device="cuda")
        expected_loss = contrastive_loss(image, text[first], scale, text_index=index % 30, duplicates=duplicates)
        expected = expected_loss.detach(), *torch.autograd.grad(expected_loss, (image, text, scale))
        # Merged texts are dropped before or after tiling, which changes the order of sums; gradients are bfloat16.
        for f, w in zip(found, expected, strict=True):
            torch.testing.assert_close(f, w, rtol=2e-2, atol=1e-5)
    finally:
        dist.destroy_process_group()
