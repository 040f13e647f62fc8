"""Texts of all ranks exchanged in chunks: 2 to 4 gloo processes against one process, bytes, memory and overlap."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from scenarioclip_fast.benchmarks.count_collectives import count_collectives, expected_collectives
from test_contrastive_distributed import check_all, kept_by_rank
from test_contrastive_weights import (
    averaged,
    check,
    check_levels_of_ranks,
    check_ranks,
    check_zeros,
    losses_by_hand,
    parameters,
    share,
)
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scenarioclip_fast import dispatch
from scenarioclip_fast.losses import ContrastiveLoss, MultiLevelContrastiveLoss
from scenarioclip_fast.ops import collectives, contrastive_loss, multilevel_contrastive_loss
from scenarioclip_fast.ops.contrastive import chunked, ranks
from scenarioclip_fast.ops.contrastive.chunked import ChunkLayout

# (rows, texts) of each rank: odd sizes, empty shares, a rank with texts but no rows, all texts on one rank.
SHARES = {
    2: [((5, 9), (3, 2)), ((0, 7), (4, 3))],
    3: [((5, 4), (0, 3), (3, 11)), ((6, 13), (0, 0), (0, 0)), ((0, 0), (0, 2), (7, 4))],
    4: [((3, 5), (0, 0), (4, 9), (1, 1)), ((2, 7), (2, 7), (2, 7), (2, 7))],
}
OPTIONS = [
    ("negatives", "mean", True),
    ("negatives", "mean", False),
    ("negatives", "none", False),
    ("positives", "mean", True),
]


def test_layout_has_every_text_once() -> None:
    for kept, chunk in itertools.product([[5, 0, 3], [4, 4, 4], [0, 0, 9], [1]], [1, 4, 6, 100]):
        layouts = [ChunkLayout.of(kept, chunk, rank, torch.device("cpu")) for rank in range(len(kept))]
        texts = [(rank, i) for rank, count in enumerate(kept) for i in range(count)]
        placed = []
        for c, first in enumerate(layouts[0].chunks):
            gathered: list[tuple[int, int] | None] = []
            for rank, layout in enumerate(layouts):
                own = layout.chunks[c].own
                rows = [(rank, i) for i in range(own.start, own.stop)]
                gathered += [*rows, *[None] * (first.padded - len(rows))]
            assert len(gathered) <= max(chunk, len(kept))
            columns = [gathered[row] for row in layouts[0].row[first.columns].tolist()]
            assert first.is_full == (columns == gathered)
            placed += columns
        assert placed == [text for _, text in sorted(zip(layouts[0].column.tolist(), texts, strict=True))]


def check_every_form(group: Any) -> None:
    for shares, (duplicates, reduction, with_ids), (chunk, backend) in itertools.product(
        SHARES[group.size()], OPTIONS, ((1, "cpu"), (7, "reference"), (2 * group.size(), "cpu"))
    ):
        options = {"backend": backend, "with_ids": with_ids, "chunk": chunk}
        check_ranks(shares, duplicates, reduction, options, group)


def check_automatic(group: Any) -> None:
    """Chunks by default from CHUNK texts on, of modules too; with fewer, the same bits."""
    rows, texts, world = 5, 8, group.size()
    parts = [share(rank, rows, texts) for rank in range(world)]
    image, ids, _, index = parts[group.rank()]
    table, _ = parameters()

    def losses(module: Any) -> list[Tensor]:
        loss = module(image, table[ids], index)
        return [loss.detach(), *torch.autograd.grad(loss, (image, table))]

    with log_calls() as calls:
        plain = losses(ContrastiveLoss(group=group))
        assert not calls
        torch.testing.assert_close(losses(ContrastiveLoss(group=group, chunk=world * texts)), plain, rtol=0, atol=0)
        assert not calls
        check(losses(ContrastiveLoss(group=group, chunk=world * texts - 1)), plain)
        assert calls.count("forward") == 2
        with patch.object(ranks, "CHUNK", 2 * world):
            calls.clear()
            check(losses(ContrastiveLoss(group=group)), plain)
            assert calls.count("forward") == texts / 2
            calls.clear()
            module = MultiLevelContrastiveLoss(["a", "b"], group=group)
            both = module([image, image], [table[ids]] * 2, [index] * 2)
            check(both.detach(), plain[0].expand(2))
            assert calls.count("forward") == texts
            check(MultiLevelContrastiveLoss(["a"], group=group, chunk=99)([image], [table[ids]], [index])[0], plain[0])


def check_mismatch(group: Any) -> None:
    features = torch.ones(2, 4)
    chunk = 2 if group.rank() else None
    with pytest.raises(
        ValueError, match=r"^group: got chunk None on rank 0 of the group and 2 on rank 1, expected the"
    ):
        contrastive_loss(features, features, 1.0, group=group, chunk=chunk)


def check_precision(group: Any, dtype: torch.dtype) -> None:
    """About as close to float64 as without chunks."""
    g = torch.Generator().manual_seed(group.rank())
    n, width = 150 + group.rank(), 48
    x, y = (torch.randn(n, width, generator=g).to(dtype).requires_grad_() for _ in range(2))

    def results(*features: Tensor, **options: Any) -> list[Tensor]:
        loss = contrastive_loss(*features, 100.0, group=group, **options)
        return [loss.detach(), *torch.autograd.grad(loss, features)]

    exact = results(x.double(), y.double(), backend="reference")
    whole, parts = results(x, y), results(x, y, chunk=4 * group.size())
    for w, p, e in zip(whole, parts, exact, strict=True):
        # Gradients of images are rounded to the features' dtype twice, as a chunk's, one of which is most of the sum,
        # and as the sum: sqrt(2) of one rounding. And float32 sums in another order.
        assert (p - e).norm() <= 1.6 * (w - e).norm() + 2**-23 * e.norm()


def check_bytes(group: Any) -> None:
    """The formulas of docs/losses.md."""
    world, rank, width = group.size(), group.rank(), 6
    sizes = [[7, 2, 0, 5][:world], [3, 3, 9, 1][:world]]
    # Ids shared between ranks; within a rank they are distinct.
    ids = [[torch.arange(n) + 2 * r for r, n in enumerate(level)] for level in sizes]
    for dtype, with_ids, with_weights, chunk in itertools.product(
        (torch.float32, torch.bfloat16), (True, False), (True, False), (5, 100)
    ):
        texts = [torch.randn(level[rank], width, dtype=dtype).requires_grad_() for level in sizes]
        images = [torch.randn(4, width, dtype=dtype).requires_grad_() if len(t) else t.detach() for t in texts]
        indices = [torch.zeros(len(x), dtype=torch.int64) for x in images]
        with count_collectives() as forward:
            losses = multilevel_contrastive_loss(
                images,
                texts,
                [10.0, 10.0],
                text_indices=indices,
                text_ids=[level[rank] for level in ids] if with_ids else None,
                text_weights=[torch.ones(len(t)) for t in texts] if with_weights else None,
                group=group,
                chunk=chunk,
            )
        with count_collectives() as backward:
            losses.sum().backward()
        expected = expected_collectives(
            sizes,
            [kept_by_rank(level) for level in ids] if with_ids else sizes,
            width,
            dtype.itemsize,
            chunk=chunk,
            with_ids=with_ids,
            with_weights=with_weights,
        )
        assert (forward, backward) == expected, (forward, backward, expected)


def test_kept_texts_are_spread_over_ranks() -> None:
    """Of texts that every rank has, each rank keeps as many, and it sends no more."""
    ids = torch.tensor([5, 5, -3, 8, 0]).repeat(4) + torch.arange(20) // 5 * 0
    sizes, kept, position = ranks._deduplicate_by_rank(ids, [5, 5, 5, 5])
    assert sizes == [2, 2, 0, 0]  # 8 and 0 on rank 0; 5 and -3 on rank 1
    assert kept.tolist() == [3, 4, 5, 7]
    assert torch.equal(ids[kept][position], ids)
    extreme = torch.tensor([2**62, -(2**62), 7, 2**62])  # a range beyond the number of texts
    sizes, kept, position = ranks._deduplicate_by_rank(extreme, [3, 0, 1])
    assert sum(sizes) == len(kept) == 3 and torch.equal(extreme[kept][position], extreme)
    many = torch.arange(1000).repeat(8)
    sizes, kept, position = ranks._deduplicate_by_rank(many, [1000] * 8)
    assert sizes == [125] * 8
    assert torch.equal(many[kept][position], many)


class LiveRows(TorchDispatchMode):
    """The most bytes of new [rows, width] tensors that were alive at the same time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.peak = width, 0
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        self.live = {key: held for key, held in self.live.items() if not held[0].expired()}
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.dim() == 2 and t.shape[1] == self.width:
                storage = t.untyped_storage()
                if storage._cdata not in given:
                    self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.bytes())
        return out

    def bytes(self) -> int:
        return sum(size for reference, size in self.live.values() if not reference.expired())


def check_memory(group: Any, dtype: torch.dtype) -> None:
    """Backward, text gradients take this rank's own and two chunks, whatever the number of texts (docs/losses.md)."""
    world, rank, n, width, chunk = group.size(), group.rank(), 3, 40, 32
    for per_rank, missing in ((80, 0), (160, 0), (80, 71)):
        texts = per_rank - missing * (rank == 1)
        image, text = (torch.ones(k, width, dtype=dtype).requires_grad_() for k in (n, texts))

        def peak(chunk: int, image: Tensor = image, text: Tensor = text) -> int:
            loss = contrastive_loss(image, text, 10.0, text_index=torch.arange(n), group=group, chunk=chunk)
            with LiveRows(width) as rows:
                torch.autograd.grad(loss, (image, text))
            return rows.peak

        size = dtype.itemsize
        # Two chunks in float32, and in the features' dtype as the kernels write it; this rank's share of one; its own
        # texts; the images' sum in float32 and a chunk's share of it.
        narrow = size * chunk if size < 4 else 0
        most = (8 * chunk + narrow + 4 * chunk // world + size * texts + (4 + size) * n) * width
        assert peak(chunk) <= most, (per_rank, missing, peak(chunk) / width, most / width)
        assert peak(chunk) >= (4 * chunk + size * texts) * width  # the tensors are seen
        assert peak(10**6) >= 4 * (world * per_rank - missing) * width


class LoggedWork:
    def __init__(self, work: Any, log: Callable[[str], None], name: str) -> None:
        self.work, self.log, self.name = work, log, name

    def wait(self) -> None:
        self.log(f"wait {self.name}")
        self.work.wait()


@contextmanager
def log_calls() -> Iterator[list[str]]:
    """The asynchronous collectives and the kernels of calls in chunks, in order."""
    calls: list[str] = []

    def asynchronous(name: str, start: Any) -> Any:
        def started(*tensors: Tensor, async_op: bool = False, **options: Any) -> Any:
            if not async_op:
                return start(*tensors, **options)
            calls.append(name)
            return LoggedWork(start(*tensors, async_op=True, **options), calls.append, name)

        return started

    def logged(name: str, kernels: Any) -> Any:
        def call(*arguments: Any) -> Any:
            calls.append(name)
            return kernels(*arguments)

        return call

    with (
        patch.object(collectives, "_all_gather", asynchronous("gather", collectives._all_gather)),
        patch.object(collectives, "_reduce_scatter", asynchronous("scatter", collectives._reduce_scatter)),
        patch.object(chunked, "contrastive_forward", logged("forward", chunked.contrastive_forward)),
        patch.object(chunked, "contrastive_backward", logged("backward", chunked.contrastive_backward)),
    ):
        yield calls


def check_overlap(group: Any) -> None:
    """While kernels run, the next chunk's texts, or the gradients of the last chunk, are on their way."""
    x, y = (torch.randn(3, 4).requires_grad_() for _ in range(2))
    with log_calls() as calls:
        contrastive_loss(x, y, 1.0, group=group, chunk=group.size()).backward()
    forward = [
        "gather",
        "gather",
        "wait gather",
        "forward",
        "gather",
        "wait gather",
        "forward",
        "wait gather",
        "forward",
    ]
    step = ["backward", "wait scatter", "scatter"]
    assert calls == [*forward, "backward", "scatter", *step, *step, "wait scatter"]


def check_gradients_of_some(group: Any) -> None:
    """Only images, only texts, or only the scale; a graph kept for a second pass; no second derivative; no graph."""
    parts = [share(rank, 4, 5) for rank in range(group.size())]
    image, ids, _, index = parts[group.rank()]
    table, scale = parameters()
    weights = [(x, ids, torch.ones(5).double(), index) for x, ids, _, index in parts]
    wanted = torch.autograd.grad(losses_by_hand(weights, table, scale, "positives"), (image, table, scale))

    def loss(*leaves: Tensor) -> Tensor:
        image, table, scale = leaves
        options: dict[str, Any] = {"text_index": index, "text_id": ids, "duplicates": "positives"}
        return contrastive_loss(image, table[ids], scale, group=group, chunk=group.size(), **options)

    leaves = (image, table, scale)
    for k in range(3):
        given = [leaf if i == k else leaf.detach() for i, leaf in enumerate(leaves)]
        value = loss(*given)
        for _ in range(2):
            (grad,) = torch.autograd.grad(value, given[k], retain_graph=True)
            check(grad / group.size() if k == 0 else averaged(grad, group), wanted[k])
    (grad,) = torch.autograd.grad(loss(*leaves), image, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    with torch.no_grad():
        assert not loss(*leaves).requires_grad


def run(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=4)
    try:
        everyone: Any = dist.group.WORLD
        pairs = [dist.new_group(pair) for pair in ([0, 1], [2, 3])]
        trio = dist.new_group([1, 2, 3])  # ranks differ from the global ones
        for group in (everyone, pairs[rank // 2], *([trio] if rank else [])):
            check_every_form(group)
            check_bytes(group)
            check_overlap(group)
            check_gradients_of_some(group)
            check_mismatch(group)
            for dtype in (torch.float32, torch.bfloat16):
                check_precision(group, dtype)
                check_memory(group, dtype)
            check_automatic(group)
        with patch.object(ranks, "CHUNK", 4):
            check_all(pairs[rank // 2])  # every check of the exchange in one piece
            if rank:
                check_levels_of_ranks(trio)
                check_zeros(trio)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def test_ranks_equal_one_process(tmp_path: Path) -> None:
    mp.spawn(run, (str(tmp_path / "store"),), nprocs=4)


def test_chunk_is_a_positive_number() -> None:
    x = torch.ones(2, 3)
    assert contrastive_loss(x, x, 1.0, chunk=1) == contrastive_loss(x, x, 1.0)
    for chunk in (True, 2.0):
        with pytest.raises(TypeError, match=r"chunk: got (bool|float), expected a number of texts or None"):
            contrastive_loss(x, x, 1.0, chunk=chunk)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="chunk: got 0, expected at least 1 text, or None"):
        contrastive_loss(x, x, 1.0, chunk=0)


@contextmanager
def single_rank(backend: str = "gloo") -> Iterator[Any]:
    device = None if backend == "gloo" else torch.device("cuda", 0)
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, device_id=device)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def check_backend(backend: str, group: Any, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    """One rank with chunks against one process: rows without a text in a chunk, for every kernel of a backend."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 40, generator=g).to(dtype).requires_grad_() for n in (40, 30))
    index = torch.randint(30, (40,), generator=g)
    for duplicates in ("negatives", "positives"):
        expected = contrastive_loss(
            x.double(), y.double(), 20.0, text_index=index, duplicates=duplicates, backend="reference"
        )
        wanted = [expected.detach(), *torch.autograd.grad(expected, (x, y))]
        options: dict[str, Any] = {"text_id": torch.arange(30), "duplicates": duplicates, "backend": backend}
        loss = contrastive_loss(
            x.to(device), y.to(device), 20.0, text_index=index.to(device), group=group, chunk=11, **options
        )
        for found, want in zip([loss.detach(), *torch.autograd.grad(loss, (x, y))], wanted, strict=True):
            # float32 sums of 30 to 40 terms at a scale of 20; in bfloat16, H and each chunk's gradient are rounded.
            error = 1e-5 if dtype == torch.float32 else 2e-2
            assert (found.cpu() - want).norm() <= error * want.norm()


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "dtype"), [("triton", torch.float32), ("auto", torch.bfloat16)])
def test_backends_on_a_gpu(backend: str, dtype: torch.dtype) -> None:
    with single_rank("cpu:gloo,cuda:nccl") as group:
        check_backend(backend, group, "cuda", dtype)
        torch.cuda.set_sync_debug_mode("error")
        try:
            leaves = [torch.ones(n, 40, device="cuda", dtype=dtype, requires_grad=True) for n in (40, 30)]
            index = torch.zeros(40, dtype=torch.int64, device="cuda")
            options: dict[str, Any] = {"text_id": torch.arange(30) % 20, "text_index": index, "backend": backend}
            scale = torch.ones((), device="cuda")
            contrastive_loss(*leaves, scale, group=group, chunk=7, **options).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_native_kernels_on_a_gpu() -> None:
    if problem := dispatch.unavailable_reason("contrastive_loss", "cuda", "cuda", "bfloat16"):
        pytest.skip(problem)
    with single_rank("cpu:gloo,cuda:nccl") as group:
        check_backend("cuda", group, "cuda", torch.bfloat16)


def test_compiled_equals_eager() -> None:
    """The exchange of sizes breaks the graph, with and without chunks; the result is the same."""
    x, y = (torch.randn(n, 8, dtype=torch.float64).requires_grad_() for n in (6, 9))
    options: dict[str, Any] = {"text_index": torch.arange(6), "text_id": torch.arange(9) // 2, "backend": "cpu"}

    def gradients(loss: Callable[..., Tensor]) -> list[Tensor]:
        value = loss(x, y)
        return [value.detach(), *torch.autograd.grad(value, (x, y))]

    with single_rank() as group:
        options |= {"group": group, "chunk": 2}

        def loss(x: Tensor, y: Tensor) -> Tensor:
            return contrastive_loss(2 * x, y.sin(), 10.0, **options)

        torch.testing.assert_close(gradients(torch.compile(loss, backend="eager")), gradients(loss))


def test_triton_in_the_interpreter() -> None:
    """In a separate process: Triton reads TRITON_INTERPRET when a kernel is defined."""
    pytest.importorskip("triton", reason="Triton is not installed")
    code = """
import test_contrastive_chunked as t
from unittest.mock import patch
from scenarioclip_fast.kernels.contrastive import contrastive_triton
with t.single_rank() as group:
    t.check_backend("triton", group)
    with patch.object(contrastive_triton, "GROUPED", 100):  # each chunk as a large level
        t.check_backend("triton", group)
print("checked")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.path.dirname(__file__)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "checked", done.stderr
