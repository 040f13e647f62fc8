"""The levels of a call: as passed, then prepared for the op, with duplicate texts merged and counted."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scenarioclip_fast.devices import to_device
from scenarioclip_fast.kernels.contrastive import reference

if TYPE_CHECKING:
    from scenarioclip_fast.ops.contrastive.chunked import ChunkLayout


# Not frozen: that would take a microsecond a field, and the host is expected to be the limit for a few hundred rows.
@dataclass(slots=True)
class LevelInput:
    """One level as the caller passed it."""

    image: Tensor  # [N, D]
    text: Tensor  # [U, D]
    scale: Tensor | float  # []
    text_index: Tensor | None = None  # [N] int64
    text_id: Tensor | None = None  # [U] int64
    text_weight: Tensor | None = None  # [U]


@dataclass(slots=True)
class PreparedLevel:
    """One level with features in the dtype that all levels share, and its scale as a tensor."""

    image: Tensor  # [N, D]
    text: Tensor  # [U, D]; with a layout, this rank's only, while U elsewhere is all ranks'
    scale: Tensor  # [] in the dtype of the sums
    text_index: Tensor | None  # [N] int64; None: row i has text i
    text_id: Tensor | None  # [U] int64
    rows: int  # over all ranks
    count: Tensor | None = None  # [U] int64 rows of each text over all ranks; None: one each
    weight: Tensor | None = None  # [U] of each text in the row sums; None: the default
    layout: ChunkLayout | None = None  # if texts are exchanged in chunks


def features_dtype(levels: list[LevelInput]) -> torch.dtype:
    """Return the dtype that the features of all levels are cast to."""
    dtype = functools.reduce(torch.promote_types, {x.dtype for level in levels for x in (level.image, level.text)})
    device_type = levels[0].image.device.type
    if dtype == torch.float32 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return dtype


def prepare(levels: list[LevelInput]) -> list[PreparedLevel]:
    """Cast the features of all levels to one dtype, and make the scales 0-d tensors in the dtype of the sums."""
    device, dtype = levels[0].image.device, features_dtype(levels)
    wide = reference.compute_dtype(dtype)

    def scale(value: Tensor | float) -> Tensor:
        if isinstance(value, Tensor):
            return value if value.dtype == wide and value.device == device else value.to(device=device, dtype=wide)
        return torch.full((), float(value), dtype=wide, device=device)

    return [
        PreparedLevel(
            image=level.image if level.image.dtype == dtype else level.image.to(dtype),
            text=level.text if level.text.dtype == dtype else level.text.to(dtype),
            scale=scale(level.scale),
            text_index=level.text_index,
            text_id=level.text_id,
            rows=level.image.shape[0],
            weight=None if level.text_weight is None else level.text_weight.to(wide),
        )
        for level in levels
    ]


def merge_equal_texts(level: PreparedLevel) -> PreparedLevel:
    """Point all rows of equal text ids at the first text of that id.

    It gets the largest of their weights, 1 by default. The duplicates are kept, without rows and with weight 0, so that
    no shape depends on the data.
    """
    if level.text_id is None:
        return level
    first = to_device(first_of(level.text_id), level.text.device)
    index = first if level.text_index is None else first[level.text_index]
    weight = torch.ones_like(first, dtype=torch.float32) if level.weight is None else level.weight
    return replace(level, text_index=index, weight=torch.zeros_like(weight).scatter_reduce_(0, first, weight, "amax"))


def count_texts(level: PreparedLevel, duplicates: str) -> PreparedLevel:
    """Fill in the count and weight of each text, for one process."""
    level = merge_equal_texts(level) if duplicates == "positives" else level
    if level.text_index is None:
        return level
    count = count_rows(level.text_index, level.text.shape[0])
    return replace(level, count=count, weight=weight_of(level, count, duplicates))


def weight_of(level: PreparedLevel, count: Tensor, duplicates: str) -> Tensor | None:  # [U]
    return count.to(torch.float32) if level.weight is None and duplicates == "negatives" else level.weight


def coefficients(level: PreparedLevel, duplicates: str) -> tuple[Tensor, Tensor]:  # beta [N] or [], kappa [U]
    """Return beta and kappa of loss = 1/2 (sum_i row_i / N - sum_i beta_i positive_i + sum_u kappa_u col_u)."""
    rows = max(level.rows, 1)
    dtype = reference.sums_dtype(level.text.device)
    count = torch.ones_like(level.text[:, 0], dtype=dtype) if level.count is None else level.count.to(dtype)
    if duplicates == "negatives" or level.text_index is None:
        return count.new_full((), 2 / rows), count / rows
    used = (count > 0).to(count.dtype)
    texts = used.sum().clamp_min(1)
    return 1 / rows + 1 / (count[level.text_index] * texts), used / texts


def first_of(ids: Tensor) -> Tensor:  # [U] -> [U]
    """Return, for each entry, the position of the first entry equal to it."""
    ids = ids.contiguous()  # searchsorted warns about others
    ordered, order = ids.sort(stable=True)
    return order[torch.searchsorted(ordered, ids)] if len(ids) else ids


def count_rows(index: Tensor, texts: int) -> Tensor:  # [N] -> [texts] int64
    return index.new_zeros(texts).index_add_(0, index, torch.ones_like(index))


def arange(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device)


def features(levels: list[PreparedLevel]) -> tuple[list[Tensor], list[Tensor], Tensor]:  # images, texts, [levels]
    return (
        [level.image for level in levels],
        [level.text for level in levels],
        torch.stack([level.scale for level in levels]),
    )


def lengths(levels: list[PreparedLevel]) -> tuple[list[int], list[int]]:
    return [level.image.shape[0] for level in levels], [level.text.shape[0] for level in levels]


def joined_indices(levels: list[PreparedLevel]) -> Tensor | None:  # [sum N]
    if all(level.text_index is None for level in levels):
        return None
    return _joined([arange(level.image) if level.text_index is None else level.text_index for level in levels])


def joined_weights(levels: list[PreparedLevel]) -> Tensor | None:  # [sum U]
    if all(level.weight is None for level in levels):
        return None
    return _joined(
        [torch.ones_like(v.text[:, 0], dtype=torch.float32) if v.weight is None else v.weight for v in levels]
    )


def _joined(parts: list[Tensor]) -> Tensor:
    # Kernels require stride 1.
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)
