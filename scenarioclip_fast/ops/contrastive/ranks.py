"""Levels whose rows are spread over the ranks of a process group."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scenarioclip_fast.ops import collectives
from scenarioclip_fast.ops.contrastive.levels import PreparedLevel, arange, count_rows, first_of, to_device, weight_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class _Shares:
    """Every rank's share of the levels."""

    rows: list[list[int]]  # ranks x levels: N
    texts: list[list[int]]  # ranks x levels: U
    image_requires_grad: bool  # on any rank
    text_requires_grad: bool
    ids_on_host: bool  # on all ranks


def gather_levels(levels: list[PreparedLevel], duplicates: str, group: ProcessGroup) -> list[PreparedLevel]:
    """Return the levels with every rank's texts (equal ids merged), and this rank's image rows pointing into them."""
    if duplicates == "positives" and any(level.text_id is None for level in levels):
        raise ValueError(
            "text_id: got None, expected an id per text: duplicates='positives' with a group requires them"
        )
    shares = _exchange_shares(levels, group)
    on_host = shares.ids_on_host and collectives.has_cpu_backend(group)
    device = torch.device("cpu") if on_host else levels[0].text.device
    ids = _gather_values([None if v.text_id is None else v.text_id.to(device) for v in levels], shares, group)
    weights = _gather_values([level.weight for level in levels], shares, group)
    gathered = [
        _gather_level(replace(level, weight=weight), k, ids[k], duplicates, shares, group)
        for k, (level, weight) in enumerate(zip(levels, weights, strict=True))
    ]
    counts = torch.cat([level.count for level in gathered if level.count is not None])
    torch.distributed.all_reduce(counts, group=group)
    split = counts.split([len(level.text) for level in gathered])
    return [
        replace(level, count=count, weight=weight_of(level, count, duplicates))
        for level, count in zip(gathered, split, strict=True)
    ]


def _exchange_shares(levels: list[PreparedLevel], group: ProcessGroup) -> _Shares:
    """Exchange all ranks' sizes and flags in one message; raise ValueError if ranks disagree."""
    sizes = [size for level in levels for size in (len(level.image), len(level.text))]
    # Ranks that differ in these would hang or crash in the collectives.
    must_match = [zlib.crc32(str(levels[0].image.dtype).encode())]
    for level in levels:
        must_match += [level.image.shape[1], level.text_id is not None, level.weight is not None]
    grad = torch.is_grad_enabled()
    flags = [
        grad and any(level.image.requires_grad for level in levels),
        grad and any(level.text.requires_grad for level in levels),
        all(level.text_id is None or level.text_id.device.type == "cpu" for level in levels),
    ]
    all_ranks = collectives.exchange([*sizes, *must_match, *flags], levels[0].image.device, group)
    if len({tuple(row[len(sizes) : len(sizes) + len(must_match)]) for row in all_ranks}) > 1:
        raise ValueError(
            "group: got features of different dtypes or widths on different ranks, or text_id or text_weight on some "
            "ranks only; expected the same on all ranks, empty shares included"
        )
    *_, image_grads, text_grads, on_host = zip(*all_ranks, strict=True)
    return _Shares(
        rows=[row[: len(sizes) : 2] for row in all_ranks],
        texts=[row[1 : len(sizes) : 2] for row in all_ranks],
        image_requires_grad=any(image_grads),
        text_requires_grad=any(text_grads),
        ids_on_host=all(on_host),
    )


def _gather_level(
    level: PreparedLevel,  # with the weights of every rank's texts
    k: int,
    ids: Tensor | None,  # [all ranks' U]
    duplicates: str,
    shares: _Shares,
    group: ProcessGroup,
) -> PreparedLevel:
    """Gather the texts of level `k`; the counts are those of this rank's rows."""
    # Backward passes run collectives: if any rank's features require a gradient, every rank's must, empty shares too.
    image = _requiring_grad(level.image, shares.image_requires_grad)
    text = _requiring_grad(level.text, shares.text_requires_grad)
    sizes = [counts[k] for counts in shares.texts]
    text = torch.cat(collectives.gather_rows(text, sizes, group))
    index = arange(image) if level.text_index is None else level.text_index
    index = index + sum(sizes[: group.rank()])
    weight = level.weight
    if ids is not None:
        kept, position = (to_device(part, text.device) for part in _deduplicate(ids))
        text, index = text[kept], position[index]
        weight = None if weight is None else _merge_weights(weight, position, text, duplicates)
    return replace(
        level,
        image=image,
        text=text,
        text_index=index,
        weight=weight,
        count=count_rows(index, text),
        rows=sum(counts[k] for counts in shares.rows),
    )


def _requiring_grad(x: Tensor, required: bool) -> Tensor:
    return x if x.requires_grad or not required else x.detach().requires_grad_()


def _gather_values(
    values: list[Tensor | None],  # levels x [U]
    shares: _Shares,
    group: ProcessGroup,
) -> list[Tensor | None]:  # levels x [all ranks' U]
    """Gather one value for each text of every rank, of all levels in one collective."""
    given = [k for k, value in enumerate(values) if value is not None]
    out: list[Tensor | None] = [None] * len(values)
    if given:
        own = torch.cat([value for value in values if value is not None])
        sizes = [[counts[k] for k in given] for counts in shares.texts]
        ranks = collectives.gather_rows(own, [sum(rank_sizes) for rank_sizes in sizes], group)
        parts = [value.split(rank_sizes) for value, rank_sizes in zip(ranks, sizes, strict=True)]
        for k, level_values in zip(given, zip(*parts, strict=True), strict=True):
            out[k] = torch.cat(level_values)
    return out


def _merge_weights(
    weight: Tensor,  # [U]
    position: Tensor,  # [U] int64: the merged text of each text
    text: Tensor,  # [V, D]
    duplicates: str,
) -> Tensor:  # [V]
    """Add the weights of merged texts in a fixed order; with "positives", where they are one text, take the largest."""
    order, sizes = position.argsort(stable=True), count_rows(position, text)
    reduce = "sum" if duplicates == "negatives" else "max"
    # unsafe: the sizes are not checked, which would synchronise with a GPU.
    return torch.segment_reduce(weight[order], reduce, lengths=sizes, unsafe=True)


def _deduplicate(ids: Tensor) -> tuple[Tensor, Tensor]:  # [U] -> kept [V], position [U]
    """Return the positions of the first entry of each id, and each entry's index into those."""
    first = first_of(ids)
    kept = (first == arange(first)).nonzero()[:, 0]
    position = torch.empty_like(first)
    position[kept] = arange(kept)
    return kept, position[first]
