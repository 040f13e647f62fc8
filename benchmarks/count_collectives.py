"""Counts the collectives of the contrastive losses on one rank, and predicts them (docs/losses.md).

    with count_collectives() as counts:
        loss.backward()
    counts["reduce_scatter"].bytes

Bytes are those of the whole tensor: the gathered one, or the one to be reduced. With R ranks, an algorithm that moves
no more than necessary sends and receives (R - 1) / R of them on each rank, and twice that for all_reduce.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from torch import Tensor

from scenarioclip_fast.ops import collectives
from scenarioclip_fast.ops.contrastive.chunked import CHUNK

MESSAGE = 32 * 8  # bytes of a rank's sizes and flags, for up to four levels


@dataclass
class Collective:
    """How often a rank called a collective, and with how many bytes in all."""

    calls: int = 0
    bytes: int = 0

    def add(self, size: int, calls: int = 1) -> None:
        self.calls += calls
        self.bytes += size


Counts = dict[str, Collective]


def _none() -> Counts:
    return {name: Collective() for name in ("all_gather", "reduce_scatter", "all_reduce")}


@contextmanager
def count_collectives() -> Iterator[Counts]:
    """Count all collectives of `ops.collectives` in this process, those of backward passes included."""
    counts = _none()
    all_gather, reduce_scatter, all_reduce = (
        collectives._all_gather,
        collectives._reduce_scatter,
        collectives.all_reduce,
    )

    def counted_gather(out: Tensor, own: Tensor, **options: Any) -> Any:
        counts["all_gather"].add(out.nbytes)
        return all_gather(out, own, **options)

    def counted_scatter(out: Tensor, source: Tensor, **options: Any) -> Any:
        counts["reduce_scatter"].add(source.nbytes)
        return reduce_scatter(out, source, **options)

    def counted_reduce(x: Tensor, *arguments: Any) -> None:
        counts["all_reduce"].add(x.nbytes)
        all_reduce(x, *arguments)

    with ExitStack() as stack:
        stack.enter_context(patch.object(collectives, "_all_gather", counted_gather))
        stack.enter_context(patch.object(collectives, "_reduce_scatter", counted_scatter))
        stack.enter_context(patch.object(collectives, "all_reduce", counted_reduce))
        yield counts


def expected_collectives(
    texts: Sequence[Sequence[int]],  # levels x ranks: U
    kept: Sequence[Sequence[int]],  # levels x ranks: one of each id; U without ids
    width: int,  # D
    itemsize: int,  # bytes of a feature
    *,
    chunk: int = CHUNK,
    with_ids: bool = True,
    with_weights: bool = False,
) -> tuple[Counts, Counts]:
    """Return what a mean loss with gradients of the texts calls on each rank, forward and backward.

    For up to four levels of one width, ids and weights on all or no levels, and not all of them empty.
    """
    forward, backward = _none(), _none()
    levels, ranks = len(texts), len(texts[0])
    # Without chunks, one collective for all levels.
    sent = kept if max(map(sum, kept)) > chunk else [list(map(sum, zip(*kept, strict=True)))]
    step = max(chunk // ranks, 1) if sent is kept else max(map(max, sent))
    forward["all_gather"].add(ranks * MESSAGE)
    largest = max(map(sum, zip(*texts, strict=True)))
    if with_ids:
        forward["all_gather"].add(ranks * largest * 8)
    if with_weights:
        forward["all_gather"].add(ranks * largest * max(itemsize, 4))
    for level in sent:
        rows, calls = ranks * max(level), -(-max(level) // step)
        forward["all_gather"].add(rows * width * itemsize, calls)
        backward["reduce_scatter"].add(rows * width * max(itemsize, 4), calls)
    columns = sum(map(sum, kept))
    forward["all_reduce"].add(8 * (3 * columns + levels), 3)  # rows of each text; maxima and sums of columns
    backward["all_reduce"].add(8 * (columns + levels))
    return forward, backward
