"""Collectives with exact adjoints, for losses whose rows are spread over ranks.

Convention of every function here: the gradient of a rank's tensors is that of the sum of all ranks' results. If every
rank returns the same loss, this is the loss's gradient times the number of ranks; averaging gradients over ranks, as
DistributedDataParallel does, then gives the gradient of one process with all rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from scenarioclip_fast.devices import to_device

# The old names are deprecated from torch 2.13 on; torch 2.11 has no others.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce(x: Tensor, group: dist.ProcessGroup, op: Any = dist.ReduceOp.SUM) -> None:
    """Reduce x over the ranks in place; no gradient."""
    dist.all_reduce(x, op, group=group)


@dataclass(frozen=True, slots=True)
class InFlight:
    """A collective that may still be running; it has no gradient.

    Its result is valid in the current stream after `wait`, which with NCCL makes that stream wait, not the host. With
    gloo the host waits. The tensors have to live until then.
    """

    result: Tensor
    source: Tensor
    work: dist.Work

    def wait(self) -> Tensor:
        self.work.wait()
        return self.result


def start_gather(x: Tensor, rows: int, group: dist.ProcessGroup) -> InFlight:
    """Start to gather every rank's x, padded with zeros from at most `rows` rows: [ranks * rows, ...]."""
    padded = _pad(x, rows).contiguous()
    out = x.new_empty((group.size() * rows, *x.shape[1:]))
    return InFlight(out, padded, _all_gather(out, padded, group=group, async_op=True))


def start_reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> InFlight:
    """Start to sum x [ranks * rows, ...] over ranks, of which each rank gets its block [rows, ...]."""
    source = x.contiguous()
    out = x.new_empty((len(x) // group.size(), *x.shape[1:]))
    return InFlight(out, source, _reduce_scatter(out, source, group=group, async_op=True))


def has_cpu_backend(group: dist.ProcessGroup) -> bool:
    """Whether the group also has a backend for CPU tensors, as with "cpu:gloo,cuda:nccl"."""
    return "cpu:" in dist.get_backend_config(group)


def exchange(values: Sequence[int], device: torch.device, group: dist.ProcessGroup) -> list[list[int]]:
    """Return every rank's integers, rank by rank; synchronises with the device if the group has no CPU backend."""
    local = torch.tensor(values, dtype=torch.int64, device="cpu" if has_cpu_backend(group) else device)
    out = local.new_empty(group.size() * len(local))
    _all_gather(out, local, group=group)
    rows: list[list[int]] = rearrange(out, "(rank value) -> rank value", rank=group.size()).tolist()
    return rows


def gather_rows(x: Tensor, sizes: Sequence[int], group: dist.ProcessGroup) -> list[Tensor]:
    """Return every rank's rows: x is [sizes[rank], ...], the result one tensor [sizes[r], ...] per rank r."""
    (rows,) = gather_lists([x], [[size] for size in sizes], group)
    return list(rows.split(list(sizes)))


def gather_lists(xs: Sequence[Tensor], sizes: Sequence[Sequence[int]], group: dist.ProcessGroup) -> list[Tensor]:
    """Gather every rank's rows of several tensors in one collective.

    Args:
        xs: each [sizes[rank][k], ...], of one dtype and one shape of rows.
        sizes: ranks x tensors.

    Returns:
        For each tensor the rows of all ranks, rank by rank: [sum of sizes[r][k], ...].
    """
    if max(map(sum, sizes)) == 0:
        return [x[:0] for x in xs]
    return list(_GatherLists.apply(sizes, group, *xs))


class _GatherLists(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sizes: Sequence[Sequence[int]], group: dist.ProcessGroup, *xs: Tensor) -> tuple[Tensor, ...]:
        own = _packed(xs, sizes)
        out = own.new_empty((len(sizes) * len(own), *own.shape[1:]))
        _all_gather(out, own, group=group)
        ctx.sizes, ctx.group = sizes, group
        ctx.rows = _gathered_rows(sizes, out.device)
        return _unpacked(out, ctx.rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        packed = _packed_gradients(grads, ctx.rows, ctx.sizes)
        out = packed.new_empty((len(packed) // len(ctx.sizes), *packed.shape[1:]))
        _reduce_scatter(out, packed, group=ctx.group)
        return None, None, *_own_gradients(out, ctx.sizes, ctx.group, grads[0].dtype)


class StartedGather:
    """A `gather_lists` that runs beside what the caller launches until `finish`.

    In the backward pass, the reduce-scatter starts where the caller used the rows, and is waited for where the gather
    started: it runs beside the backward pass of what was launched in between.
    """

    def __init__(self, xs: Sequence[Tensor], sizes: Sequence[Sequence[int]], group: dist.ProcessGroup) -> None:
        self._travel = _Travel(sizes, group)
        # Without rows, it only ties the two ends together: autograd runs later nodes first, so those between them are
        # between them in the backward pass, too.
        self._link = _StartGather.apply(self._travel, *xs)

    @property
    def requires_grad(self) -> bool:
        """Whether gradients of the rows will reach the tensors."""
        return self._link.requires_grad

    def finish(self) -> list[Tensor]:
        """Return the rows of all ranks, as `gather_lists` does; only once."""
        return list(_FinishGather.apply(self._travel, self._link))


class _Travel:
    """What both ends of a `StartedGather` know; `in_flight` is its collective that runs."""

    def __init__(self, sizes: Sequence[Sequence[int]], group: dist.ProcessGroup) -> None:
        self.sizes, self.group = sizes, group
        self.in_flight: InFlight | None = None

    def arrive(self) -> Tensor:
        assert self.in_flight is not None
        result, self.in_flight = self.in_flight.wait(), None
        return result


class _StartGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, travel: _Travel, *xs: Tensor) -> Tensor:
        own = _packed(xs, travel.sizes)
        travel.in_flight = start_gather(own, len(own), travel.group)
        ctx.travel, ctx.dtype = travel, own.dtype
        return own.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        travel: _Travel = ctx.travel
        return None, *_own_gradients(travel.arrive(), travel.sizes, travel.group, ctx.dtype)


class _FinishGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, travel: _Travel, link: Tensor) -> tuple[Tensor, ...]:
        out = travel.arrive()
        ctx.travel, ctx.rows = travel, _gathered_rows(travel.sizes, out.device)
        return _unpacked(out, ctx.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        travel: _Travel = ctx.travel
        travel.in_flight = start_reduce_scatter(_packed_gradients(grads, ctx.rows, travel.sizes), travel.group)
        return None, grads[0].new_empty(0)


def _packed(xs: Sequence[Tensor], sizes: Sequence[Sequence[int]]) -> Tensor:
    """Concatenate this rank's tensors, padded to the rows of the rank that has most."""
    return _pad(xs[0] if len(xs) == 1 else torch.cat(list(xs)), max(map(sum, sizes))).contiguous()


def _unpacked(out: Tensor, rows: list[Tensor] | None) -> tuple[Tensor, ...]:
    return (out,) if rows is None else tuple(out.index_select(0, of_tensor) for of_tensor in rows)


def _packed_gradients(
    grads: Sequence[Tensor], rows: list[Tensor] | None, sizes: Sequence[Sequence[int]]
) -> Tensor:  # [ranks * padded, ...]
    # Sum over ranks in float32: low-precision partial sums lose one bit per doubling of the ranks.
    wide = torch.promote_types(grads[0].dtype, torch.float32)
    if rows is None:
        return grads[0].to(wide).contiguous()
    packed = grads[0].new_zeros((len(sizes) * max(map(sum, sizes)), *grads[0].shape[1:]), dtype=wide)
    for of_tensor, grad in zip(rows, grads, strict=True):
        packed.index_copy_(0, of_tensor, grad.to(wide))
    return packed


def _own_gradients(
    out: Tensor, sizes: Sequence[Sequence[int]], group: dist.ProcessGroup, dtype: torch.dtype
) -> Iterator[Tensor]:
    own = sizes[group.rank()]
    return (part.to(dtype) for part in out[: sum(own)].split(list(own)))


def _gathered_rows(sizes: Sequence[Sequence[int]], device: torch.device) -> list[Tensor] | None:
    """Return where each tensor's rows are among the gathered ones; None: of a single tensor, in order."""
    padded = max(map(sum, sizes))
    if all(list(counts) == [padded] for counts in sizes):
        return None
    counts = torch.tensor(sizes)  # [ranks, tensors]
    first = torch.arange(len(sizes))[:, None] * padded + counts.cumsum(1) - counts
    shift = first - (counts.cumsum(0) - counts)  # of a row, from where it is in the result
    totals = counts.sum(0).tolist()
    counts, shift = to_device(torch.stack([counts, shift]), device)
    return [
        torch.repeat_interleave(shift[:, k], counts[:, k], output_size=total) + torch.arange(total, device=device)
        for k, total in enumerate(totals)
    ]


def _pad(x: Tensor, rows: int) -> Tensor:
    return F.pad(x, [0, 0] * (x.dim() - 1) + [0, rows - len(x)])


def combine_columns(
    columns: Tensor,  # [U] this rank's log-sums over its own rows; -inf where it has none
    sums: Tensor,  # [L] this rank's share of sums
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor]:  # [U], [L] over all ranks
    combined, totals = _CombineColumns.apply(columns, sums, group)
    return combined, totals


class _CombineColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, columns: Tensor, sums: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        highest = columns.clone()
        all_reduce(highest, group, dist.ReduceOp.MAX)
        shift = highest.masked_fill(highest.isneginf(), 0)
        packed = torch.cat([(columns - shift).exp(), sums])
        all_reduce(packed, group)
        combined = packed[: len(columns)].log() + shift
        ctx.save_for_backward(columns, combined)
        ctx.group = group
        return combined, packed[len(columns) :].clone()

    @staticmethod
    def backward(ctx: Any, grad_combined: Tensor, grad_totals: Tensor) -> tuple[Tensor, Tensor, None]:
        columns, combined = ctx.saved_tensors
        packed = torch.cat([grad_combined, grad_totals])
        all_reduce(packed, ctx.group)
        share = (columns - combined).exp().masked_fill(columns.isneginf(), 0)
        return packed[: len(columns)] * share, packed[len(columns) :].clone(), None
