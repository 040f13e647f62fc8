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
    chunk_of,
    compared_name,
    gather_values,
    keep_texts,
    read_shares,
    select_kept,
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
        self._texts: list[Tensor] | None = None  # that are gathered
        self._gather: collectives.StartedGather | None = None
        self._gathered_ids: list[Kept] | None = None  # of those that the message had no room for
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

    def start_gather(self, texts: Sequence[Tensor]) -> None:
        """Start to gather the texts' features, which then travel while the caller launches the image encoders.

        In the backward pass, the gradients of the texts travel beside that of whatever is launched between this and
        the call. Texts that are exchanged in chunks are left to the call. All ranks start, or none.

        Args:
            texts: levels x [U_l, D], which the call gets, too. If they require a gradient, gradients are enabled.

        Raises:
            ValueError: called twice, other shapes than were planned, or the ranks planned different calls.
        """
        self._check_texts(texts)
        shares, kept = self._settled()
        self._texts = list(texts)
        if chunk_of(kept, self.call.chunk, self.group) is None and max(sum(of.sizes) for of in kept):
            own = select_kept([text.to(self.call.dtype) for text in texts], kept, shares)
            sizes = list(zip(*(of_level.sizes for of_level in kept), strict=True))
            self._gather = collectives.StartedGather(own, sizes, self.group)

    def finish_gather(self) -> list[Tensor] | None:
        """Return all ranks' kept texts, levels x [V, D], once; None if their gather was not started."""
        gather, self._gather = self._gather, None
        return None if gather is None else gather.finish()

    def check_call(self, texts: Sequence[Tensor]) -> None:
        """Raise ValueError if `start_gather` was called with other texts than a call has: levels x [U_l, D].

        Also if it was called without gradients, which the texts would silently lack.
        """
        if self._texts is None:
            return
        started, self._texts = self._texts, []  # no call after this one gets them
        if len(texts) != len(started) or any(a is not b for a, b in zip(texts, started, strict=True)):
            raise ValueError("plan: got other texts than were passed to start_gather: pass the same tensors, once")
        lost = torch.is_grad_enabled() and self._gather is not None and not self._gather.requires_grad
        if lost and any(text.requires_grad for text in texts):
            raise ValueError(
                "plan: got texts that require a gradient, but start_gather was called under torch.no_grad: call it "
                "where gradients are enabled"
            )

    def _check_texts(self, texts: Sequence[Tensor]) -> None:
        if self._texts is not None:
            raise ValueError("texts: got a plan that gathers texts already, expected a new plan for each call")
        if len(texts) != len(self.text_ids):
            raise ValueError(f"texts: got {len(texts)} levels, but planned were {len(self.text_ids)}")
        for k, (text, ids, (width, *_)) in enumerate(zip(texts, self.text_ids, self.call.by_level, strict=True)):
            if tuple(text.shape) != (len(ids), width):
                where = level_name(k, len(texts))
                raise ValueError(f"texts: {where}got shape {list(text.shape)}, but planned was {[len(ids), width]}")

    def _settled(self) -> tuple[Shares, list[Kept]]:
        """Wait for the exchange of sizes and ids."""
        shares, kept = self._shares.result()
        if kept is None:
            if self._gathered_ids is None:
                ids: list[Tensor | None] = list(self.text_ids)
                self._gathered_ids = keep_texts(gather_values(ids, shares, self.group), shares, self.group.rank())
            kept = self._gathered_ids
        return shares, kept

    def result(self, levels: list[PreparedLevel], call: Call, group: ProcessGroup) -> tuple[Shares, list[Kept]]:
        """Wait for the exchange; the arguments are those of the call that uses it.

        Raises:
            ValueError: the call is not the one that was planned, or the ranks planned different calls.
        """
        self._check(levels, call, group)
        return self._settled()

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
    over the group's CPU backend, and equal ids are merged in a thread, while the caller launches the encoders. With
    `start_gather` of the result, the features travel early, too:

        plan = plan_exchange(text_ids, rows, group=group, width=512, dtype=torch.bfloat16)
        texts = [encoder(tokens) for encoder, tokens in ...]
        plan.start_gather(texts)
        images = [encoder(views) for encoder, views in ...]  # beside the gather
        loss = multilevel_contrastive_loss(images, texts, ..., text_ids=text_ids, group=group, plan=plan)

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
