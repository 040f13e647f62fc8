"""Sizes and text ids of all ranks, exchanged on the host before the features of a call exist."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scenarioclip_fast.ops import collectives
from scenarioclip_fast.ops.contrastive.levels import PreparedLevel
from scenarioclip_fast.ops.contrastive.ranks import (
    Call,
    Kept,
    Shares,
    compared_name,
    gather_values,
    keep_texts,
    read_shares,
    shown,
)
from scenarioclip_fast.ops.contrastive.validate import check_chunk, check_group, check_options, level_name

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

CAPACITY = 2048


@cache
def _worker() -> ThreadPoolExecutor:
    # One thread: each would have its own pool of threads for tensor operations. It runs no collectives itself, whose
    # order has to be the same on all ranks.
    return ThreadPoolExecutor(1, "exchange plan")


class ExchangePlan:
    """What a rank will know of the other ranks' texts, on its way; made by `plan_exchange`, for one call."""

    def __init__(self, call: Call, text_ids: list[Tensor], rows: list[int], group: ProcessGroup, capacity: int) -> None:
        self.call, self.text_ids, self.rows, self.group = call, text_ids, rows, group
        ids = torch.cat(text_ids)
        header = torch.tensor(call.message(rows, [len(of_level) for of_level in text_ids], ids_on_host=True))
        message = torch.cat([header, ids if len(ids) <= capacity else ids[:0]])
        self._header, self._capacity = len(header), capacity
        in_flight = collectives.start_gather(message, self._header + capacity, group)
        self._shares: Future[tuple[Shares, list[Kept] | None]] = _worker().submit(self._receive, in_flight)

    def _receive(self, in_flight: collectives.InFlight) -> tuple[Shares, list[Kept] | None]:
        messages = in_flight.wait().view(self.group.size(), -1)
        shares = read_shares(messages[:, : self._header].tolist(), self.call)
        if max(map(sum, shares.texts)) > self._capacity:
            return shares, None
        sizes = torch.tensor(shares.texts)  # [ranks, levels]
        ids = messages[:, self._header :]
        level = torch.arange(self._capacity) - sizes.cumsum(1)[:, :, None]  # negative up to a level's last id
        of_level = [ids[(level[:, k] < 0) & (level[:, k] >= -sizes[:, k, None])] for k in range(len(self.rows))]
        return shares, keep_texts(of_level, shares, self.group.rank())

    def result(self, levels: list[PreparedLevel], call: Call, group: ProcessGroup) -> tuple[Shares, list[Kept]]:
        """Wait for the exchange; the arguments are those of the call that uses it.

        Raises:
            ValueError: the call is not the one that was planned, or the ranks planned different calls.
        """
        self._check(levels, call, group)
        shares, kept = self._shares.result()
        if kept is None:
            ids: list[Tensor | None] = list(self.text_ids)
            kept = keep_texts(gather_values(ids, shares, self.group), shares, self.group.rank())
        return shares, kept

    def _check(self, levels: list[PreparedLevel], call: Call, group: ProcessGroup) -> None:
        if group is not self.group:
            raise ValueError("plan: got the plan of another group, expected one of the call's group")
        for k, (found, planned) in enumerate(zip(call.compared(), self.call.compared(), strict=False)):
            if found != planned:
                where, name = compared_name(k, len(levels))
                raise ValueError(
                    f"plan: {where}got {name} {shown(name, found)}, but planned was {shown(name, planned)}"
                )
        if (call.image_requires_grad or call.text_requires_grad) and not self.call.image_requires_grad:
            raise ValueError("plan: got features that require a gradient, but gradients=False was planned")
        for k, (level, rows, ids) in enumerate(zip(levels, self.rows, self.text_ids, strict=True)):
            where = level_name(k, len(levels))
            if level.image.shape[0] != rows:
                raise ValueError(f"plan: {where}got {level.image.shape[0]} image rows, but planned were {rows}")
            given = level.text_id
            if given is not ids and (given is None or not given.is_cpu or not torch.equal(given, ids)):
                raise ValueError(f"plan: {where}got other text ids than were planned: pass the same ones, on the CPU")


def plan_exchange(
    text_ids: Sequence[Tensor],  # levels x [U_l] int64
    rows: Sequence[int],  # levels: N_l
    *,
    group: ProcessGroup,
    width: int,
    dtype: torch.dtype,
    duplicates: str = "negatives",
    chunk: int | None = None,
    text_weights: bool = False,
    gradients: bool = True,
    scale_gradients: bool = True,
    capacity: int = CAPACITY,
) -> ExchangePlan:
    """Start to exchange the sizes and text ids of one later call of a contrastive loss over a group.

    Pass the result as `plan` to the call, which otherwise exchanges them itself while the GPU may wait. They travel
    over the group's CPU backend, and equal ids are merged in a thread, while the caller launches the encoders.

    All ranks plan the same calls, and make them in the same order, each with its plan.

    Args:
        text_ids, rows: ids of the texts, on the CPU, and the number of image rows of each level.
        group, duplicates, chunk: those of the call.
        width: of the features of all levels.
        dtype: of the features, as the loss uses them: under autocast, that of autocast instead of float32.
        text_weights: whether the call has weights of texts.
        gradients: whether any rank needs gradients of the features.
        scale_gradients: whether the scales require gradients.
        capacity: numbers of ids of all levels that fit into the message, equal on all ranks. If any rank has more, the
            call exchanges the ids itself.

    Raises:
        ValueError, TypeError: invalid arguments; the group has no CPU backend. A disagreement between the ranks is an
            error of the call that uses the plan.
    """
    check_options(duplicates, "mean")
    check_group(group)
    check_chunk(chunk)
    ids = list(text_ids)
    for i, of_level in enumerate(ids):
        if not isinstance(of_level, Tensor) or of_level.dtype != torch.int64 or of_level.dim() != 1:
            raise TypeError(f"text_ids: level {i}: got {type(of_level).__name__}, expected an int64 tensor [texts]")
        if not of_level.is_cpu:
            raise ValueError(f"text_ids: level {i}: got device {of_level.device}, expected cpu")
    if not ids or len(rows) != len(ids):
        raise ValueError(f"rows: got {len(rows)} levels, expected {max(len(ids), 1)}, as many as text_ids")
    if not collectives.has_cpu_backend(group):
        raise ValueError(
            'group: got a group without a CPU backend, expected one of new_group(backend="cpu:gloo,cuda:nccl")'
        )
    call = Call(
        duplicates, chunk, dtype, [(width, True, text_weights, scale_gradients)] * len(ids), gradients, gradients
    )
    return ExchangePlan(call, ids, list(rows), group, capacity)
