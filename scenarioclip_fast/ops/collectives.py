"""Collectives with exact adjoints, for losses whose rows are spread over ranks.

Convention of every function here: the gradient of a rank's tensors is that of the sum of all ranks' results. If every
rank returns the same loss, this is the loss's gradient times the number of ranks; averaging gradients over ranks, as
DistributedDataParallel does, then gives the gradient of one process with all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

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
        padded = max(map(sum, sizes))
        own = _pad(xs[0] if len(xs) == 1 else torch.cat(xs), padded).contiguous()
        out = own.new_empty((len(sizes) * padded, *own.shape[1:]))
        _all_gather(out, own, group=group)
        ctx.sizes, ctx.group, ctx.padded = sizes, group, padded
        ctx.rows = _gathered_rows(sizes, padded, out.device)
        return (out,) if ctx.rows is None else tuple(out.index_select(0, rows) for rows in ctx.rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dtype = grads[0].dtype
        # Sum over ranks in float32: low-precision partial sums lose one bit per doubling of the ranks.
        wide = torch.promote_types(dtype, torch.float32)
        if ctx.rows is None:
            padded = grads[0].to(wide).contiguous()
        else:
            padded = grads[0].new_zeros((len(ctx.sizes) * ctx.padded, *grads[0].shape[1:]), dtype=wide)
            for rows, grad in zip(ctx.rows, grads, strict=True):
                padded.index_copy_(0, rows, grad.to(wide))
        out = padded.new_empty((ctx.padded, *padded.shape[1:]))
        _reduce_scatter(out, padded, group=ctx.group)
        own = ctx.sizes[ctx.group.rank()]
        return None, None, *(part.to(dtype) for part in out[: sum(own)].split(list(own)))


def _gathered_rows(sizes: Sequence[Sequence[int]], padded: int, device: torch.device) -> list[Tensor] | None:
    """Return where each tensor's rows are among the gathered ones; None: of a single tensor, in order."""
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
