"""Levels whose rows are spread over the ranks of a process group."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scenarioclip_fast.devices import to_device
from scenarioclip_fast.ops import collectives
from scenarioclip_fast.ops.contrastive.chunked import CHUNK, ChunkLayout
from scenarioclip_fast.ops.contrastive.levels import PreparedLevel, arange, count_rows, weight_of
from scenarioclip_fast.ops.contrastive.validate import DTYPES, DUPLICATES, level_name
from scenarioclip_fast.ops.untraced import untraced

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from scenarioclip_fast.ops.contrastive.plan import ExchangePlan


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


@dataclass(frozen=True, slots=True)
class Call:
    """What a rank knows of a call before its features exist, besides sizes and ids."""

    duplicates: str
    chunk: int | None
    dtype: torch.dtype  # of the features
    by_level: list[tuple[int, bool, bool, bool]]  # width; whether there are ids, weights, and gradients of the scale
    image_requires_grad: bool  # of any level
    text_requires_grad: bool

    @staticmethod
    def of(levels: list[PreparedLevel], duplicates: str, chunk: int | None) -> Call:
        grad = torch.is_grad_enabled()
        return Call(
            duplicates,
            chunk,
            levels[0].image.dtype,
            [
                (v.image.shape[1], v.text_id is not None, v.weight is not None, grad and v.scale.requires_grad)
                for v in levels
            ],
            grad and any(level.image.requires_grad for level in levels),
            grad and any(level.text.requires_grad for level in levels),
        )

    def compared(self) -> list[int]:
        """Return what must be equal: ranks that differ in it would hang, crash or return different losses."""
        once = [len(self.by_level), DUPLICATES.index(self.duplicates), self.chunk or 0, DTYPES.index(self.dtype)]
        return once + [int(value) for level in self.by_level for value in level]

    def message(self, rows: list[int], texts: list[int], ids_on_host: bool) -> list[int]:
        flags = [self.image_requires_grad, self.text_requires_grad, ids_on_host]
        sizes = [size for level in zip(rows, texts, strict=True) for size in level]
        message = [*self.compared(), *map(int, flags), *sizes]
        return message + [0] * (-len(message) % _PADDING)


@dataclass(frozen=True, slots=True)
class Shares:
    """Every rank's share of the levels."""

    rows: list[list[int]]  # ranks x levels: N
    texts: list[list[int]]  # ranks x levels: U
    image_requires_grad: bool  # on any rank
    text_requires_grad: bool
    ids_on_host: bool  # on all ranks


@dataclass(frozen=True, slots=True)
class Kept:
    """The texts of a level that are exchanged: all of them, or one of each id."""

    sizes: list[int]  # of each rank
    own: Tensor | None  # int64 positions among this rank's texts; None: all of them
    position: Tensor | None  # [all ranks' U] int64: the kept text of each, both rank by rank; None: the same


# Dynamo would guard on all sizes, which the host has just learnt.
@untraced
def gather_levels(
    levels: list[PreparedLevel], duplicates: str, group: ProcessGroup, chunk: int | None, plan: ExchangePlan | None
) -> list[PreparedLevel]:
    """Return the levels with every rank's texts (equal ids merged), and this rank's image rows pointing into them.

    Where a level has more texts than `chunk`, texts are not gathered, but all levels have a layout for it.
    """
    call = Call.of(levels, duplicates, chunk)
    shares, kept = _exchange(levels, call, group) if plan is None else plan.result(levels, call, group)
    weights = gather_values([level.weight for level in levels], shares, group)
    chunk = chunk_of(kept, chunk, group)
    own = [
        _point_to_kept(replace(level, weight=weight), k, kept[k], duplicates, shares, group, chunk)
        for k, (level, weight) in enumerate(zip(levels, weights, strict=True))
    ]
    texts = None if plan is None else plan.finish_gather()
    if texts is None:
        texts = select_kept([level.text for level in levels], kept, shares)
        if chunk is None:
            texts = _gather_texts(texts, kept, group)
    own = [replace(level, text=text) for level, text in zip(own, texts, strict=True)]
    counts = torch.cat([level.count for level in own if level.count is not None])
    collectives.all_reduce(counts, group)
    split = counts.split([len(level.count) for level in own if level.count is not None])
    return [
        replace(level, count=count, weight=weight_of(level, count, duplicates))
        for level, count in zip(own, split, strict=True)
    ]


def _exchange(levels: list[PreparedLevel], call: Call, group: ProcessGroup) -> tuple[Shares, list[Kept]]:
    """Exchange all ranks' sizes and flags in one message, then the ids; raise ValueError if ranks disagree."""
    # Not len(tensor), which takes a microsecond.
    rows, texts = [v.image.shape[0] for v in levels], [v.text.shape[0] for v in levels]
    on_host = all(level.text_id is None or level.text_id.is_cpu for level in levels)
    device = levels[0].image.device
    shares = read_shares(collectives.exchange(call.message(rows, texts, on_host), device, group), call)
    # After the exchange, where ranks that differ in this have all raised: the others would wait for this one.
    if call.duplicates == "positives" and any(level.text_id is None for level in levels):
        raise ValueError(
            "text_id: got None, expected an id per text: duplicates='positives' with a group requires them"
        )
    if shares.ids_on_host and collectives.has_cpu_backend(group):
        device = torch.device("cpu")
    ids = gather_values([None if v.text_id is None else v.text_id.to(device) for v in levels], shares, group)
    return shares, keep_texts(ids, shares, group.rank())


def read_shares(all_ranks: list[list[int]], call: Call) -> Shares:
    """Return the contents of every rank's `Call.message`; raise ValueError if the calls differ."""
    compared, levels = len(call.compared()), len(call.by_level)
    if len({tuple(row[:compared]) for row in all_ranks}) > 1:
        raise _disagreement(all_ranks, levels)
    first = compared + 3
    image_grads, text_grads, on_host = zip(*(row[compared:first] for row in all_ranks), strict=True)
    return Shares(
        rows=[row[first : first + 2 * levels : 2] for row in all_ranks],
        texts=[row[first + 1 : first + 2 * levels : 2] for row in all_ranks],
        image_requires_grad=any(image_grads),
        text_requires_grad=any(text_grads),
        ids_on_host=all(on_host),
    )


def _disagreement(all_ranks: list[list[int]], levels: int) -> ValueError:
    """Return the error that names the first difference, the same one on every rank."""
    k, values = next((k, values) for k, values in enumerate(zip(*all_ranks, strict=True)) if len(set(values)) > 1)
    where, name = compared_name(k, levels)
    rank = next(r for r, value in enumerate(values) if value != values[0])
    first, other = (shown(name, v) for v in (values[0], values[rank]))
    return ValueError(
        f"group: {where}got {name} {first} on rank 0 of the group and {other} on rank {rank}, expected the same on "
        "all ranks, empty shares included"
    )


def compared_name(k: int, levels: int) -> tuple[str, str]:
    """Return the level, if there are several, and the name of the number at `k` of `Call.compared`."""
    if k < len(_COMPARED):
        return "", _COMPARED[k]
    level, k = divmod(k - len(_COMPARED), len(_COMPARED_BY_LEVEL))
    return level_name(level, levels), _COMPARED_BY_LEVEL[k]


def shown(name: str, value: int) -> object:
    if name == "chunk" and not value:
        return None
    return _NAMES[name][value] if name in _NAMES else value


def keep_texts(ids: Sequence[Tensor | None], shares: Shares, rank: int) -> list[Kept]:  # ids: levels x [all ranks' U]
    return [_keep(of_level, [counts[k] for counts in shares.texts], rank) for k, of_level in enumerate(ids)]


def _keep(ids: Tensor | None, sizes: list[int], rank: int) -> Kept:  # ids: [all ranks' U]
    if ids is None:
        return Kept(sizes, None, None)
    of_rank, kept, position = _deduplicate_by_rank(ids, sizes)
    before = sum(sizes[:rank])
    return Kept(of_rank, kept[sum(of_rank[:rank]) :][: of_rank[rank]] - before, position)


def chunk_of(kept: list[Kept], chunk: int | None, group: ProcessGroup) -> int | None:
    """Return the texts of a chunk; None: all texts are exchanged at once."""
    if chunk is None:  # a single rank has nothing to exchange
        chunk = CHUNK if group.size() > 1 else None
    return chunk if chunk is not None and max(sum(of_level.sizes) for of_level in kept) > chunk else None


def select_kept(texts: Sequence[Tensor], kept: list[Kept], shares: Shares) -> list[Tensor]:
    """Return those of this rank's own texts, levels x [U, D], that are kept."""
    # Backward passes run collectives: if any rank's features require a gradient, every rank's must, empty shares too.
    texts = [_requiring_grad(text, shares.text_requires_grad) for text in texts]
    return [
        text if of_level.own is None else text.index_select(0, to_device(of_level.own, text.device))
        for text, of_level in zip(texts, kept, strict=True)
    ]


def _point_to_kept(
    level: PreparedLevel,  # with the weights of every rank's texts
    k: int,
    kept: Kept,
    duplicates: str,
    shares: Shares,
    group: ProcessGroup,
    chunk: int | None,
) -> PreparedLevel:
    """Return level `k` with rows that point into all ranks' kept texts, which are to replace its texts.

    The counts are those of this rank's rows. With `chunk`, there is a layout, whose columns the rows point to.
    """
    image = _requiring_grad(level.image, shares.image_requires_grad)  # as for texts, see `select_kept`
    sizes, rank, device = [counts[k] for counts in shares.texts], group.rank(), image.device
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    total = sum(kept.sizes)
    layout = None if chunk is None else ChunkLayout.of(kept.sizes, chunk, rank, device)
    column: Tensor | None = None  # [all ranks' U], as far as it is needed
    if kept.position is not None:
        column = to_device(kept.position if level.weight is not None else kept.position[mine], device)
        if layout is not None:
            column = layout.column[column]
    elif layout is not None:
        column = layout.column
    own = None if column is None else column if len(column) == mine.stop - mine.start else column[mine]
    index = arange(image) if level.text_index is None else level.text_index
    index = index + mine.start if own is None else own[index]
    weight = level.weight
    if weight is not None and column is not None:
        weight = _merge_weights(weight, column, total, duplicates)
    return replace(
        level,
        image=image,
        text_index=index,
        weight=weight,
        count=count_rows(index, total),
        rows=sum(counts[k] for counts in shares.rows),
        layout=layout,
    )


def _gather_texts(texts: list[Tensor], kept: list[Kept], group: ProcessGroup) -> list[Tensor]:
    """Replace this rank's texts by those of all ranks: one collective for all levels of a width."""
    out = list(texts)
    for width in dict.fromkeys(text.shape[1] for text in texts):
        same = [k for k, text in enumerate(texts) if text.shape[1] == width]
        sizes = list(zip(*(kept[k].sizes for k in same), strict=True))
        gathered = collectives.gather_lists([texts[k] for k in same], sizes, group)
        for k, rows in zip(same, gathered, strict=True):
            out[k] = rows
    return out


def _requiring_grad(x: Tensor, required: bool) -> Tensor:
    return x if x.requires_grad or not required else x.detach().requires_grad_()


def gather_values(
    values: list[Tensor | None],  # levels x [U]
    shares: Shares,
    group: ProcessGroup,
) -> list[Tensor | None]:  # levels x [all ranks' U]
    """Gather one value for each text of every rank, of all levels in one collective."""
    given = [k for k, value in enumerate(values) if value is not None]
    out: list[Tensor | None] = [None] * len(values)
    if given:
        sizes = [[counts[k] for k in given] for counts in shares.texts]
        own = [value for value in values if value is not None]
        for k, gathered in zip(given, collectives.gather_lists(own, sizes, group), strict=True):
            out[k] = gathered
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


def _deduplicate_by_rank(ids: Tensor, sizes: list[int]) -> tuple[list[int], Tensor, Tensor]:
    """Return how many entries of each rank are kept, their positions [V], and each entry's [U] index into those.

    The entry that is kept of an id is on its first rank counted from rank `id`, modulo the ranks: rank 0 would keep all
    of its texts, and every rank sends as many rows as the one with the most. On a GPU the host waits once, for the
    sizes.
    """
    stops = to_device(torch.tensor(sizes).cumsum(0), ids.device)
    position = arange(ids)
    rank = torch.searchsorted(stops, position, right=True)
    order = (rank - ids) % len(sizes) * len(ids) + position  # of the entry to keep, the lowest among equal ids
    slot = _slots(ids)
    lowest = torch.full_like(slot, torch.iinfo(torch.int64).max).scatter_reduce_(0, slot, order, "amin")[slot]
    is_kept = lowest == order
    ends = [0, *torch.cat([slot.new_zeros(1), is_kept.cumsum(0)])[stops].tolist()]
    kept = torch.nonzero_static(is_kept, size=ends[-1])[:, 0]
    place = torch.empty_like(slot).scatter_(0, slot[kept], arange(kept))
    return [b - a for a, b in itertools.pairwise(ends)], kept, place[slot]


def _slots(ids: Tensor) -> Tensor:  # [U] -> [U] int64 below U
    """Return equal numbers for equal ids: without sorting, which takes most of the time, where their range is small."""
    if ids.is_cpu and len(ids):
        low, high = (int(v) for v in ids.aminmax())
        if high - low < len(ids):
            return ids - low
    return torch.searchsorted(ids.sort().values, ids)
