"""Levels whose rows are spread over the ranks of a process group."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scenarioclip_fast.ops import collectives
from scenarioclip_fast.ops.contrastive.chunked import CHUNK, ChunkLayout
from scenarioclip_fast.ops.contrastive.levels import PreparedLevel, arange, count_rows, first_of, to_device, weight_of
from scenarioclip_fast.ops.contrastive.validate import DTYPES, DUPLICATES, level_name

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


# What ranks compare, in the order of their messages: once, then for each level.
_COMPARED = ("levels", "duplicates", "chunk", "features' dtype")
_COMPARED_BY_LEVEL = ("width", "text_id", "text_weight", "logit_scale")
_NAMES: dict[str, tuple[object, ...]] = {  # of the values that are not numbers
    "duplicates": tuple(map(repr, DUPLICATES)),
    "features' dtype": DTYPES,
    "text_id": ("None", "a tensor"),
    "text_weight": ("None", "a tensor"),
    "logit_scale": ("without a gradient", "with a gradient"),
}
# Messages are padded to a multiple of this, so that ranks with different numbers of levels (up to 4) can be told so.
_PADDING = 32


@dataclass(frozen=True)
class _Shares:
    """Every rank's share of the levels."""

    rows: list[list[int]]  # ranks x levels: N
    texts: list[list[int]]  # ranks x levels: U
    image_requires_grad: bool  # on any rank
    text_requires_grad: bool
    ids_on_host: bool  # on all ranks


def gather_levels(
    levels: list[PreparedLevel], duplicates: str, group: ProcessGroup, chunk: int | None
) -> list[PreparedLevel]:
    """Return the levels with every rank's texts (equal ids merged), and this rank's image rows pointing into them.

    Where a level has more texts than `chunk`, texts are not gathered, but all levels have a layout for it.
    """
    shares = _exchange_shares(levels, duplicates, group, chunk)
    # After the exchange, where ranks that differ in this have all raised: the others would wait for this one.
    if duplicates == "positives" and any(level.text_id is None for level in levels):
        raise ValueError(
            "text_id: got None, expected an id per text: duplicates='positives' with a group requires them"
        )
    on_host = shares.ids_on_host and collectives.has_cpu_backend(group)
    device = torch.device("cpu") if on_host else levels[0].text.device
    ids = _gather_values([None if v.text_id is None else v.text_id.to(device) for v in levels], shares, group)
    weights = _gather_values([level.weight for level in levels], shares, group)
    if chunk is None:  # a single rank has nothing to exchange
        chunk = CHUNK if group.size() > 1 else None
    if chunk is not None and max(map(sum, zip(*shares.texts, strict=True))) <= chunk:
        chunk = None
    gathered = [
        _gather_level(replace(level, weight=weight), k, ids[k], duplicates, shares, group)
        if chunk is None
        else _lay_out_level(replace(level, weight=weight), k, ids[k], duplicates, shares, group, chunk)
        for k, (level, weight) in enumerate(zip(levels, weights, strict=True))
    ]
    counts = torch.cat([level.count for level in gathered if level.count is not None])
    collectives.all_reduce(counts, group)
    split = counts.split([len(level.count) for level in gathered if level.count is not None])
    return [
        replace(level, count=count, weight=weight_of(level, count, duplicates))
        for level, count in zip(gathered, split, strict=True)
    ]


def _exchange_shares(levels: list[PreparedLevel], duplicates: str, group: ProcessGroup, chunk: int | None) -> _Shares:
    """Exchange all ranks' sizes and flags in one message; raise ValueError if ranks disagree."""
    grad = torch.is_grad_enabled()
    # Ranks that differ in these would hang, crash in the collectives or return different losses.
    must_match = [len(levels), DUPLICATES.index(duplicates), chunk or 0, DTYPES.index(levels[0].image.dtype)]
    for level in levels:
        must_match += [level.image.shape[1], level.text_id is not None, level.weight is not None]
        must_match += [grad and level.scale.requires_grad]
    flags = [
        grad and any(level.image.requires_grad for level in levels),
        grad and any(level.text.requires_grad for level in levels),
        all(level.text_id is None or level.text_id.is_cpu for level in levels),
    ]
    sizes = [x.shape[0] for level in levels for x in (level.image, level.text)]  # faster than len
    message = [*must_match, *flags, *sizes]
    message += [0] * (-len(message) % _PADDING)
    all_ranks = collectives.exchange(message, levels[0].image.device, group)
    if len({tuple(row[: len(must_match)]) for row in all_ranks}) > 1:
        raise _disagreement(all_ranks, len(levels))
    first = len(must_match) + len(flags)
    image_grads, text_grads, on_host = zip(*(row[len(must_match) : first] for row in all_ranks), strict=True)
    return _Shares(
        rows=[row[first : first + len(sizes) : 2] for row in all_ranks],
        texts=[row[first + 1 : first + len(sizes) : 2] for row in all_ranks],
        image_requires_grad=any(image_grads),
        text_requires_grad=any(text_grads),
        ids_on_host=all(on_host),
    )


def _disagreement(all_ranks: list[list[int]], levels: int) -> ValueError:
    """Return the error that names the first difference, the same one on every rank."""
    compared = [("", name) for name in _COMPARED]
    compared += [(level_name(i, levels), name) for i in range(levels) for name in _COMPARED_BY_LEVEL]
    k, values = next((k, values) for k, values in enumerate(zip(*all_ranks, strict=True)) if len(set(values)) > 1)
    where, name = compared[k]
    rank = next(r for r, value in enumerate(values) if value != values[0])
    first, other = (_shown(name, v) for v in (values[0], values[rank]))
    return ValueError(
        f"group: {where}got {name} {first} on rank 0 of the group and {other} on rank {rank}, expected the same on "
        "all ranks, empty shares included"
    )


def _shown(name: str, value: int) -> object:
    if name == "chunk" and not value:
        return None
    return _NAMES[name][value] if name in _NAMES else value


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
        weight = None if weight is None else _merge_weights(weight, position, len(text), duplicates)
    return replace(
        level,
        image=image,
        text=text,
        text_index=index,
        weight=weight,
        count=count_rows(index, len(text)),
        rows=sum(counts[k] for counts in shares.rows),
    )


def _lay_out_level(
    level: PreparedLevel,  # with the weights of every rank's texts
    k: int,
    ids: Tensor | None,  # [all ranks' U]
    duplicates: str,
    shares: _Shares,
    group: ProcessGroup,
    chunk: int,
) -> PreparedLevel:
    """As `_gather_level`, with those of this rank's own texts that are kept and the layout of all ranks' in chunks."""
    image = _requiring_grad(level.image, shares.image_requires_grad)
    text = _requiring_grad(level.text, shares.text_requires_grad)
    sizes, rank, device = [counts[k] for counts in shares.texts], group.rank(), text.device
    before = sum(sizes[:rank])
    index = (arange(image) if level.text_index is None else level.text_index) + before
    weight = level.weight
    if ids is None:
        layout = ChunkLayout.of(sizes, chunk, rank, device)
        column = layout.column
        weight = None if weight is None else torch.empty_like(weight).scatter_(0, column, weight)
    else:
        sizes, kept, position = _deduplicate_by_rank(ids, sizes)
        own = kept[sum(sizes[:rank]) :][: sizes[rank]] - before
        text = text.index_select(0, to_device(own, device))
        layout = ChunkLayout.of(sizes, chunk, rank, device)
        column = layout.column[to_device(position, device)]
        weight = None if weight is None else _merge_weights(weight, column, sum(sizes), duplicates)
    index = column[index]
    return replace(
        level,
        image=image,
        text=text,
        text_index=index,
        weight=weight,
        count=count_rows(index, sum(sizes)),
        rows=sum(counts[k] for counts in shares.rows),
        layout=layout,
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
    texts: int,  # V
    duplicates: str,
) -> Tensor:  # [V]
    """Add the weights of merged texts in a fixed order; with "positives", where they are one text, take the largest."""
    order, sizes = position.argsort(stable=True), count_rows(position, texts)
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


def _deduplicate_by_rank(ids: Tensor, sizes: list[int]) -> tuple[list[int], Tensor, Tensor]:
    """Return how many entries of each rank are kept, and then as `_deduplicate`.

    The entry that is kept of an id is on its first rank counted from rank `id`, modulo the ranks: rank 0 would keep all
    of its texts, and every rank sends as many rows as the one with the most. On a GPU the host waits once, as for the
    sizes in `_deduplicate`.
    """
    stops = torch.tensor(sizes).cumsum(0)
    rank = torch.searchsorted(to_device(stops, ids.device), arange(ids), right=True)
    order = ((rank - ids) % len(sizes)).argsort(stable=True)
    first = torch.empty_like(order).scatter_(0, order, order[first_of(ids[order])])
    is_kept = first == arange(first)
    through = is_kept.cumsum(0)  # entries kept up to and including each
    position = (through - 1)[first]
    ends = [0, *torch.cat([through.new_zeros(1), through])[to_device(stops, ids.device)].tolist()]
    # Entries that are dropped are written behind the end.
    kept = through.new_empty(ends[-1] + 1).scatter_(0, torch.where(is_kept, position, ends[-1]), arange(ids))
    return [b - a for a, b in itertools.pairwise(ends)], kept[:-1], position
