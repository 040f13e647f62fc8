"""Symmetric contrastive softmax over distinct texts, without an N x U matrix (kernels/contrastive/README.md).

Two custom ops do the work for all levels at once: `contrastive_forward` gives row and column log-sums and the
positive logits, `contrastive_backward` turns gradients of those three into gradients of features and scale. The
loss is plain torch on top, and collectives stay outside the ops. Triton on one process has two small ops more,
`contrastive_counts` and `contrastive_means`: plain torch launches some fifty kernels for what two can do.
"""

from __future__ import annotations

import functools
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scenarioclip_fast import dispatch
from scenarioclip_fast.kernels.contrastive import contrastive_cpu, reference
from scenarioclip_fast.ops import collectives

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

DUPLICATES = ("negatives", "positives")
# Set to 1: values on a GPU are looked at too, by assertions on the device that name what is wrong.
CHECK = "SCENARIOCLIP_FAST_CHECK"
_LARGEST_SCALE = torch.finfo(torch.float32).max
_LOOPED = {"reference": reference, "cpu": contrastive_cpu}


def contrastive_loss(
    image: Tensor,  # [N, D]
    text: Tensor,  # [U, D]
    logit_scale: Tensor | float,  # []
    *,
    text_index: Tensor | None = None,  # [N] int64
    text_id: Tensor | None = None,  # [U] int64
    duplicates: str = "negatives",
    reduction: str = "mean",
    group: ProcessGroup | None = None,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> Tensor:  # [], or [N] for reduction="none"
    """Symmetric softmax cross entropy between image rows and texts, as in CLIP (ScenarioCLIP, arXiv 2511.20274).

    Formulas in kernels/contrastive/README.md. First derivatives only.

    Args:
        image, text: features of any floating dtype and any length: rows are normalised here. Sums are float32
            (float64 for float64 input); under autocast, float32 features are cast as for a matrix product.
        logit_scale: positive factor of the cosines, already exponentiated and clamped.
        text_index: the text of each image row, in [0, U). None: U == N, and row i has text i. A text that no
            row has takes no part in "negatives" and is one more negative in "positives".
        text_id: identity of each text across ranks (its vocabulary index), on the features' device or the CPU. Texts
            with equal ids are merged, the first one's features standing for all. "positives" with a group needs it.
        duplicates: "negatives" (the paper: rows with equal texts are each other's negatives) or "positives"
            (equal texts are one class).
        reduction: "mean", or "none": 1/2 (row_i + col_{t_i} - 2 S_{i, t_i}) of each row, for "negatives" only.
        group: rows and texts are this rank's share; shares may differ in size, and may be empty. "mean" is over
            all ranks' rows, the same number on every rank. Gradients are those of the sum of all ranks' results,
            so that averaging them over ranks, as DistributedDataParallel does, gives the gradients of one
            process with all rows, logit_scale's included. On a GPU nothing waits for the device if the group
            reaches the hosts too (`new_group(backend="cpu:gloo,cuda:nccl")`) and text_id is on the CPU.
        deterministic: True asks for sums in a fixed order. Every backend keeps one at no cost, whatever is asked:
            nothing but integers is added by atomics.
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        0-d tensor, or [N] for "none", float32 (float64 for float64 input). No rows give 0 with zero gradients.

    Raises:
        ValueError, TypeError: arguments that do not fit together, before anything runs. The ranges of text_index
            and logit_scale are checked at once on the CPU alone, as a look at a GPU's values would wait for it.
            With SCENARIOCLIP_FAST_CHECK=1 the GPU checks them itself: a device-side assertion that names the
            argument, at the cost of a few launches. Without it the Triton backend makes the loss NaN where a scale
            is not positive or an index is out of range.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction: got {reduction!r}, expected 'mean' or 'none'")
    if reduction == "none" and duplicates != "negatives":
        raise ValueError(f"reduction='none' goes only with duplicates='negatives', got {duplicates!r}: use 'mean'")
    level = _Level(image, text, logit_scale, text_index, text_id)
    return _losses([level], duplicates, reduction, group, backend).squeeze(0)


def log_sums(
    image: Tensor,  # [N, D]
    text: Tensor,  # [U, D]
    logit_scale: Tensor | float,  # []
    *,
    text_index: Tensor | None = None,  # [N] int64
    normalize: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # row_lse [N], col_lse [U], positive [N]
    """What other losses over the same logits are made of, with S = logit_scale * image text^T and t = text_index.

    row_i = log sum_u exp(S_iu), col_u = log sum_i exp(S_iu), positive_i = S_{i, t_i}; arguments as in
    `contrastive_loss`. normalize=False takes the features as they come instead of their directions.
    """
    level = _Level(image, text, logit_scale, text_index, None)
    name = _checked_backend([level], backend)
    rows, columns, positives = _log_sums(_prepared([level]), name, normalize)
    return rows[0], columns[0], positives[0]


def multilevel_contrastive_loss(
    images: Sequence[Tensor],  # levels x [N_l, D]
    texts: Sequence[Tensor],  # levels x [U_l, D]
    logit_scales: Sequence[Tensor | float],  # levels x []
    *,
    text_indices: Sequence[Tensor | None] | None = None,  # levels x [N_l] int64
    text_ids: Sequence[Tensor | None] | None = None,  # levels x [U_l] int64
    duplicates: str = "negatives",
    group: ProcessGroup | None = None,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> Tensor:  # [levels]
    """One `contrastive_loss` per level, in as few launches and collectives as possible; arguments as there,
    in lists."""
    lists: dict[str, Any] = {"images": images, "texts": texts, "logit_scales": logit_scales}
    lists |= {"text_indices": text_indices, "text_ids": text_ids}
    for name, given in lists.items():
        if given is not None and not hasattr(given, "__len__"):
            raise TypeError(f"{name}: got {_kind(given)}, expected a list with an entry per level")
    count = len(images)
    for name, given in lists.items():
        if given is not None and len(given) != count:
            raise ValueError(f"{name}: got {len(given)} levels, expected {count}, as many as images")
    if count == 0:
        raise ValueError("images: got no level, expected at least one")
    indices = text_indices if text_indices is not None else [None] * count
    ids = text_ids if text_ids is not None else [None] * count
    levels = [_Level(*level) for level in zip(images, texts, logit_scales, indices, ids, strict=True)]
    return _losses(levels, duplicates, "mean", group, backend)


def spread_dot_product_loss(
    image: Tensor,  # [N, D]
    text: Tensor,  # [N, D]
    logit_scale: Tensor | float,  # []
    group: ProcessGroup,
) -> Tensor:  # []
    """`contrastive_loss` over a group with row i and text i belonging together, features taken as they come."""
    level = _Level(image, text, logit_scale, None, None)
    return _losses([level], "negatives", "mean", group, "auto", normalize=False).squeeze(0)


@dataclass(frozen=True)
class _Level:
    image: Tensor  # [N, D]
    text: Tensor  # [U, D]
    scale: Any  # [] or float
    index: Tensor | None  # [N]
    id: Tensor | None  # [U]
    rows: int = 0  # over all ranks
    count: Tensor | None = None  # [U] int64 rows of each text over all ranks; None: one each
    weight: Tensor | None = None  # [U] of each text in the row sums; None: ones


def _losses(
    levels: list[_Level],
    duplicates: str,
    reduction: str,
    group: ProcessGroup | None,
    backend: str,
    normalize: bool = True,
) -> Tensor:  # [levels], or [1, N] for reduction="none"
    if duplicates not in DUPLICATES:
        raise ValueError(f"duplicates: got {duplicates!r}, expected one of {', '.join(map(repr, DUPLICATES))}")
    if group is not None and not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(f"group: got {_kind(group)}, expected a process group that this rank belongs to")
    name = _checked_backend(levels, backend)
    levels = _prepared(levels)
    if group is None and reduction == "mean" and name == "triton":
        return _fused_means(levels, duplicates, normalize)
    if group is None:
        levels = [_counted(level, duplicates) for level in levels]
    else:
        levels = _gathered(levels, duplicates, group)

    rows, columns, positives = _log_sums(levels, name, normalize)
    betas, kappas = zip(*(_coefficients(level, duplicates) for level in levels), strict=True)
    dtype = levels[0].scale.dtype
    if reduction == "none":
        if group is not None:
            columns = [collectives.combine_columns(columns[0], columns[0].new_empty(0), group)[0]]
        own = columns[0] if levels[0].index is None else columns[0][levels[0].index]
        return ((rows[0] + own) / 2 - positives[0]).to(dtype)[None]
    sums = [
        row.sum() / max(level.rows, 1) - (positive * beta).sum()
        for level, row, positive, beta in zip(levels, rows, positives, betas, strict=True)
    ]
    if group is not None:
        packed, totals = collectives.combine_columns(torch.cat(columns), torch.stack(sums), group)
        columns, sums = list(packed.split([len(c) for c in columns])), list(totals.unbind())
    losses = [
        # A text without rows has no weight, and its log-sum is -inf where there are no rows at all: 0 * -inf is not 0.
        (total + (torch.where(kappa > 0, column, 0.0) * kappa).sum()) / 2
        for total, column, kappa in zip(sums, columns, kappas, strict=True)
    ]
    return torch.stack(losses).to(dtype)


def _fused_means(levels: list[_Level], duplicates: str, normalize: bool) -> Tensor:  # [levels]
    """The mean losses of one process in few launches."""
    positives = duplicates == "positives"
    levels = [_merged(level) if positives else level for level in levels]
    n, u = _lengths(levels)
    index, weight, count = _joined_indices(levels), _joined_weights(levels), None
    if index is not None:
        count = contrastive_counts(index, n, u)
        weight = weight if positives else count
    sums = contrastive_forward(*_features(levels), index, weight, normalize, "triton")
    losses, _ = contrastive_means(*sums, count, index, n, u, positives)
    return losses


def _checked_backend(levels: list[_Level], backend: str) -> str:
    for i, level in enumerate(levels):
        _check(level, f"level {i}: " if len(levels) > 1 else "")
    devices = {level.image.device for level in levels}
    if len(devices) > 1:
        raise ValueError(f"images: got levels on {sorted(map(str, devices))}, expected one device")
    float64 = any(torch.float64 in (level.image.dtype, level.text.dtype) for level in levels)
    cannot = {"triton": "it has no float64"} if float64 else {}
    return dispatch.resolve("contrastive_loss", backend, levels[0].image.device.type, cannot)


def _coefficients(level: _Level, duplicates: str) -> tuple[Tensor, Tensor]:
    """loss = 1/2 (sum_i row_i / N - sum_i beta_i positive_i + sum_u kappa_u col_u): beta is [N] or [], kappa [U]."""
    rows = max(level.rows, 1)
    dtype = reference.sums_dtype(level.text.device)
    count = torch.ones_like(level.text[:, 0], dtype=dtype) if level.count is None else level.count.to(dtype)
    if duplicates == "negatives" or level.index is None:
        return count.new_full((), 2 / rows), count / rows
    used = (count > 0).to(count.dtype)
    texts = used.sum().clamp_min(1)
    return 1 / rows + 1 / (count[level.index] * texts), used / texts


def _check(level: _Level, where: str) -> None:
    image, text, index = level.image, level.text, level.index
    for name, x in (("image", image), ("text", text)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{where}{name}: got {_kind(x)}, expected a floating-point tensor")
        if x.dim() != 2:
            raise ValueError(f"{where}{name}: got shape {list(x.shape)}, expected [rows, width]")
    if image.shape[1] != text.shape[1]:
        raise ValueError(
            f"{where}image and text: got widths {image.shape[1]} and {text.shape[1]}, expected the same width"
        )
    if image.shape[1] == 0:
        raise ValueError(f"{where}image and text: got width 0, expected at least 1")
    if text.device != image.device:
        raise ValueError(f"{where}text: got device {text.device}, expected {image.device} as for image")
    if index is None and len(image) != len(text):
        raise ValueError(
            f"{where}text: got {len(text)} texts for {len(image)} image rows, expected as many: "
            "pass text_index to say which text belongs to which row"
        )
    for name, labels, rows in (("text_index", index, len(image)), ("text_id", level.id, len(text))):
        if labels is None:
            continue
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
            raise TypeError(f"{where}{name}: got {_kind(labels)}, expected an int64 tensor")
        if labels.dim() != 1 or len(labels) != rows:
            raise ValueError(f"{where}{name}: got shape {list(labels.shape)}, expected [{rows}]")
        if labels.device != image.device and not (name == "text_id" and labels.device.type == "cpu"):
            raise ValueError(f"{where}{name}: got device {labels.device}, expected {image.device} as for image")
    if isinstance(level.scale, Tensor):
        if not level.scale.is_floating_point():
            raise TypeError(f"{where}logit_scale: got {_kind(level.scale)}, expected a floating-point tensor")
        if level.scale.dim() != 0:
            raise ValueError(f"{where}logit_scale: got shape {list(level.scale.shape)}, expected a 0-d tensor")
    elif not isinstance(level.scale, (int, float)):
        raise TypeError(f"{where}logit_scale: got {_kind(level.scale)}, expected a number or a 0-d tensor")
    # Values can be looked at without stopping a device or breaking a graph only here.
    if not torch.compiler.is_compiling():
        _check_values(level, where)


def _check_values(level: _Level, where: str) -> None:
    scale, index, texts = level.scale, level.index, len(level.text)
    on_device = level.image.device.type != "cpu"
    if on_device and os.environ.get(CHECK) == "1":
        _assert_values(level, where)
    if isinstance(scale, Tensor):
        scale = scale.item() if scale.device.type == "cpu" else 1.0
    elif scale > _LARGEST_SCALE:
        raise ValueError(f"{where}logit_scale: got {scale}, expected a factor that float32 can hold")
    _check_numbers(scale, None if on_device else index, texts, where)


def _check_numbers(scale: float, index: Tensor | None, texts: int, where: str) -> None:
    if scale <= 0:
        raise ValueError(f"{where}logit_scale: got {scale:g}, expected a positive factor (exp of the parameter)")
    if index is not None and len(index):
        low, high = (int(v) for v in index.aminmax())
        if low < 0 or high >= texts:
            raise ValueError(f"{where}text_index: got values from {low} to {high}, expected 0 to {texts - 1}")


def _assert_values(level: _Level, where: str) -> None:
    """What `_check_values` asks, without waiting for the answer: a failure stops the device, with its name."""
    if isinstance(level.scale, Tensor):
        torch._assert_async((level.scale <= 0).logical_not(), f"{where}logit_scale: expected a positive factor")
    if level.index is not None:
        low, high = level.index >= 0, level.index < len(level.text)
        torch._assert_async(
            (low & high).all(), f"{where}text_index: got a value outside 0 to {len(level.text) - 1}, the texts given"
        )


def _kind(x: object) -> str:
    return f"a tensor of {x.dtype}" if isinstance(x, Tensor) else f"{type(x).__name__}"


def _prepared(levels: list[_Level]) -> list[_Level]:
    """Features of all levels in one dtype, scales as 0-d tensors in the dtype of the sums."""
    device = levels[0].image.device
    dtype = functools.reduce(torch.promote_types, [x.dtype for level in levels for x in (level.image, level.text)])
    if dtype == torch.float32 and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    wide = reference.compute_dtype(dtype)

    def scale(value: Tensor | float) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(device=device, dtype=wide)
        return torch.full((), value, dtype=wide, device=device)

    return [
        replace(level, image=level.image.to(dtype), text=level.text.to(dtype), scale=scale(level.scale))
        for level in levels
    ]


def _merged(level: _Level) -> _Level:
    """Texts of equal id as one: by renaming. Those after the first of an id stay, without rows and without weight, so
    that no size depends on the data."""
    if level.id is None:
        return level
    first = _uploaded(_first_of(level.id), level.text.device)
    index = first if level.index is None else first[level.index]
    return replace(level, index=index, weight=(first == _arange(level.text)).to(torch.float32))


def _counted(level: _Level, duplicates: str) -> _Level:
    level = replace(_merged(level) if duplicates == "positives" else level, rows=len(level.image))
    if level.index is None:
        return level
    count = _count(level.index, level.text)
    weight = count.to(torch.float32) if duplicates == "negatives" else level.weight
    return replace(level, count=count, weight=weight)


def _first_of(ids: Tensor) -> Tensor:  # [U] -> [U]
    """For each entry, the position of the first entry equal to it."""
    ordered, order = ids.sort(stable=True)
    return order[torch.searchsorted(ordered, ids)] if len(ids) else ids


def _count(index: Tensor, text: Tensor) -> Tensor:  # [N], [U, D] -> [U] int64
    return index.new_zeros(len(text)).index_add_(0, index, torch.ones_like(index))


def _gathered(levels: list[_Level], duplicates: str, group: ProcessGroup) -> list[_Level]:
    """The levels with every rank's texts (equal ids merged), and this rank's image rows pointing into them."""
    if duplicates == "positives" and any(level.id is None for level in levels):
        raise ValueError("text_id: got None, expected an id per text: duplicates='positives' with a group needs them")
    learns = [
        torch.is_grad_enabled() and any(getattr(level, side).requires_grad for level in levels)
        for side in ("image", "text", "scale")
    ]
    sizes = [size for level in levels for size in (len(level.image), len(level.text))]
    on_host = all(level.id is None or level.id.device.type == "cpu" for level in levels)
    # Collectives whose ranks differ in these hang, or end the process.
    alike = [zlib.crc32(str(levels[0].image.dtype).encode())]
    alike += [number for level in levels for number in (level.image.shape[1], level.id is not None)]
    everyone = collectives.exchange([*sizes, *alike, *learns, on_host], levels[0].image.device, group)
    if len({tuple(row[len(sizes) : len(sizes) + len(alike)]) for row in everyone}) > 1:
        raise ValueError(
            "group: got features of one dtype or width here and of another there, or text_id on some ranks alone; "
            "expected the same on all ranks, empty shares included"
        )
    # Backward passes meet in collectives: where any rank's side learns, every rank's must take part, empty shares too.
    *_, image_learns, text_learns, scale_learns, on_hosts = zip(*everyone, strict=True)
    any_learns = [any(column) for column in (image_learns, text_learns, scale_learns)]
    ids = _gathered_ids(levels, everyone, all(on_hosts) and collectives.reaches_hosts(group), group)
    out = []
    for k, level in enumerate(levels):
        image, text = (
            x if x.requires_grad or not any_learns[side] else x.detach().requires_grad_()
            for side, x in enumerate((level.image, level.text))
        )
        texts = [row[2 * k + 1] for row in everyone]
        start = sum(texts[: group.rank()])
        index = _arange(image) if level.index is None else level.index
        index = index + start
        text = torch.cat(collectives.gather_rows(text, texts, group))
        id = ids[k]
        if id is not None:
            kept, place = (_uploaded(part, text.device) for part in _deduplicated(id))
            text, index = text[kept], place[index]
        count = _count(index, text)
        rows = sum(row[2 * k] for row in everyone)
        out.append(replace(level, image=image, text=text, index=index, count=count, rows=rows))
    counts = torch.cat([level.count for level in out if level.count is not None])
    torch.distributed.all_reduce(counts, group=group)
    split = counts.split([len(level.text) for level in out])
    return [
        replace(level, count=count, weight=count.to(torch.float32) if duplicates == "negatives" else None)
        for level, count in zip(out, split, strict=True)
    ]


def _gathered_ids(
    levels: list[_Level], everyone: list[list[int]], by_hosts: bool, group: ProcessGroup
) -> list[Tensor | None]:  # levels x [all ranks' U]
    """Every rank's text ids, of all levels in one collective."""
    having = [k for k, level in enumerate(levels) if level.id is not None]
    out: list[Tensor | None] = [None] * len(levels)
    if having:
        device = torch.device("cpu") if by_hosts else levels[0].text.device
        mine = torch.cat([level.id.to(device) for level in levels if level.id is not None])
        sizes = [[row[2 * k + 1] for k in having] for row in everyone]
        ranks = collectives.gather_rows(mine, [sum(of_rank) for of_rank in sizes], group)
        parts = [ids.split(of_rank) for ids, of_rank in zip(ranks, sizes, strict=True)]
        for k, of_level in zip(having, zip(*parts, strict=True), strict=True):
            out[k] = torch.cat(of_level)
    return out


def _deduplicated(ids: Tensor) -> tuple[Tensor, Tensor]:  # [U] -> kept [V], place [U]
    """The positions of the first entries of each id, and where among those each entry's id stands."""
    first = _first_of(ids)
    kept = (first == _arange(first)).nonzero()[:, 0]
    position = torch.empty_like(first)
    position[kept] = _arange(kept)
    return kept, position[first]


def _uploaded(x: Tensor, device: torch.device) -> Tensor:
    """On `device`, in a copy from the host that nothing waits for."""
    if x.device == device or device.type != "cuda":
        return x.to(device)
    return (x if x.is_cuda else x.pin_memory()).to(device, non_blocking=True)


def _log_sums(levels: list[_Level], backend: str, normalize: bool) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Row log-sums, column log-sums and positive logits of each level."""
    index, weight = _joined_indices(levels), _joined_weights(levels)
    rows, columns, positives = contrastive_forward(*_features(levels), index, weight, normalize, backend)
    n, u = _lengths(levels)
    return list(rows.split(n)), list(columns.split(u)), list(positives.split(n))


def _features(levels: list[_Level]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    return (
        [level.image for level in levels],
        [level.text for level in levels],
        torch.stack([level.scale for level in levels]),
    )


def _lengths(levels: list[_Level]) -> tuple[list[int], list[int]]:
    return [level.image.shape[0] for level in levels], [level.text.shape[0] for level in levels]


def _joined_indices(levels: list[_Level]) -> Tensor | None:  # [sum N]
    if all(level.index is None for level in levels):
        return None
    return _joined([_arange(level.image) if level.index is None else level.index for level in levels])


def _joined_weights(levels: list[_Level]) -> Tensor | None:  # [sum U]
    if all(level.weight is None for level in levels):
        return None
    return _joined(
        [torch.ones_like(v.text[:, 0], dtype=torch.float32) if v.weight is None else v.weight for v in levels]
    )


def _joined(parts: list[Tensor]) -> Tensor:
    # A contiguous one: kernels step through it by ones.
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)


def _arange(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device)


@torch.library.custom_op("scenarioclip_fast::contrastive_forward", mutates_args=())
def contrastive_forward(
    image: Sequence[Tensor],  # levels x [N_l, D_l], one dtype
    text: Sequence[Tensor],  # levels x [U_l, D_l]
    scale: Tensor,  # [levels]
    index: Tensor | None,  # [sum N_l] int64: the text of each row, counted in its level; None: row i has text i
    weight: Tensor | None,  # [sum U_l] float32 or int32; None: ones
    normalize: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # row_lse [sum N_l], col_lse [sum U_l], positive [sum N_l], all float64
    with torch.autocast(scale.device.type, enabled=False):
        if backend == "triton":
            return _triton().forward(image, text, scale, index, weight, normalize)
        n, u = [len(x) for x in image], [len(y) for y in text]
        indices = _per_level(index, n)
        if scale.device.type == "cpu":  # a compiled graph comes here with nothing looked at
            for k, numbers in enumerate(zip(scale.tolist(), indices, u, strict=True)):
                _check_numbers(*numbers, f"level {k}: " if len(n) > 1 else "")
        parts = [
            _LOOPED[backend].forward(*level, normalize)
            for level in zip(image, text, scale, indices, _per_level(weight, u), strict=True)
        ]
    rows, columns, positives = (torch.cat(part) for part in zip(*parts, strict=True))
    return rows, columns, positives


@contrastive_forward.register_fake
def _(
    image: Sequence[Tensor],
    text: Sequence[Tensor],
    scale: Tensor,
    index: Tensor | None,
    weight: Tensor | None,
    normalize: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = scale.new_empty(sum(x.shape[0] for x in image), dtype=reference.sums_dtype(scale.device))
    return rows, rows.new_empty(sum(y.shape[0] for y in text)), torch.empty_like(rows)


@torch.library.custom_op("scenarioclip_fast::contrastive_backward", mutates_args=())
def contrastive_backward(
    image: Sequence[Tensor],  # levels x [N_l, D_l]
    text: Sequence[Tensor],  # levels x [U_l, D_l]
    scale: Tensor,  # [levels]
    index: Tensor | None,  # [sum N_l]
    weight: Tensor | None,  # [sum U_l]
    row_lse: Tensor,  # [sum N_l]
    col_lse: Tensor,  # [sum U_l]
    grad_row: Tensor,  # [sum N_l]
    grad_col: Tensor,  # [sum U_l]
    grad_positive: Tensor,  # [sum N_l]
    normalize: bool,
    need_image: bool,
    need_text: bool,
    backend: str,
) -> tuple[list[Tensor], list[Tensor], Tensor]:  # d_image, d_text (empty tensors where not needed), d_scale [levels]
    with torch.autocast(scale.device.type, enabled=False):
        sums, grads = (row_lse, col_lse), (grad_row, grad_col, grad_positive)
        if backend == "triton":
            return _triton().backward(image, text, scale, index, weight, sums, grads, normalize, need_image, need_text)
        n, u = [len(x) for x in image], [len(y) for y in text]
        levels = zip(image, text, scale, _per_level(index, n), _per_level(weight, u), strict=True)
        vectors = (v.split(size) for v, size in zip((*sums, *grads), (n, u, n, u, n), strict=True))
        parts = [
            _LOOPED[backend].backward(*level, *each, normalize, need_image, need_text)
            for level, each in zip(levels, zip(*vectors, strict=True), strict=True)
        ]
    d_image, d_text, d_scale = zip(*parts, strict=True)
    return list(d_image), list(d_text), torch.stack(d_scale)


@contrastive_backward.register_fake
def _(
    image: Sequence[Tensor],
    text: Sequence[Tensor],
    scale: Tensor,
    index: Tensor | None,
    weight: Tensor | None,
    row_lse: Tensor,
    col_lse: Tensor,
    grad_row: Tensor,
    grad_col: Tensor,
    grad_positive: Tensor,
    normalize: bool,
    need_image: bool,
    need_text: bool,
    backend: str,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    d_image = [x.new_empty(x.shape if need_image else 0) for x in image]
    return d_image, [y.new_empty(y.shape if need_text else 0) for y in text], torch.empty_like(scale)


def _triton() -> ModuleType:
    from scenarioclip_fast.kernels.contrastive import contrastive_triton

    return contrastive_triton


def _per_level(joined: Tensor | None, sizes: list[int]) -> Sequence[Tensor | None]:
    return [None] * len(sizes) if joined is None else joined.split(sizes)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    image, text, scale, index, weight, ctx.normalize, ctx.backend = inputs
    ctx.levels = len(image)
    ctx.save_for_backward(*image, *text, scale, index, weight, *output[:2])


def _backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    levels = ctx.levels
    image, text = ctx.saved_tensors[:levels], ctx.saved_tensors[levels : 2 * levels]
    need_image, need_text = (any(ctx.needs_input_grad[k]) for k in (0, 1))
    d_image, d_text, d_scale = contrastive_backward(
        image,
        text,
        *ctx.saved_tensors[2 * levels :],
        *(grad.contiguous() for grad in grads),
        ctx.normalize,
        need_image,
        need_text,
        ctx.backend,
    )
    nothing = [None] * levels
    return d_image if need_image else nothing, d_text if need_text else nothing, d_scale, None, None, None, None


contrastive_forward.register_autograd(_backward, setup_context=_setup_context)


def _refuse(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    raise RuntimeError("contrastive_loss has first derivatives only: got create_graph=True and a gradient through it")


contrastive_backward.register_autograd(_refuse)


@torch.library.custom_op("scenarioclip_fast::contrastive_counts", mutates_args=())
def contrastive_counts(
    index: Tensor,  # [sum N_l] int64
    rows: Sequence[int],
    texts: Sequence[int],
) -> Tensor:  # [sum U_l] int32: the rows of each text
    counts: Tensor = _triton().counts(index, rows, texts)
    return counts


@contrastive_counts.register_fake
def _(index: Tensor, rows: Sequence[int], texts: Sequence[int]) -> Tensor:
    return index.new_empty(sum(texts), dtype=torch.int32)


@torch.library.custom_op("scenarioclip_fast::contrastive_means", mutates_args=())
def contrastive_means(
    row_lse: Tensor,  # [sum N_l]
    col_lse: Tensor,  # [sum U_l]
    positive: Tensor,  # [sum N_l]
    count: Tensor | None,  # [sum U_l] int32; None: one row each
    index: Tensor | None,  # [sum N_l]
    rows: Sequence[int],
    texts: Sequence[int],
    positives: bool,
) -> tuple[Tensor, Tensor]:  # losses [levels] float32, texts that have rows [levels] float64
    return tuple(_triton().means(row_lse, col_lse, positive, count, index, rows, texts, positives))


@contrastive_means.register_fake
def _(
    row_lse: Tensor,
    col_lse: Tensor,
    positive: Tensor,
    count: Tensor | None,
    index: Tensor | None,
    rows: Sequence[int],
    texts: Sequence[int],
    positives: bool,
) -> tuple[Tensor, Tensor]:
    return row_lse.new_empty(len(rows), dtype=torch.float32), row_lse.new_empty(len(rows))


@torch.library.custom_op("scenarioclip_fast::contrastive_means_backward", mutates_args=())
def contrastive_means_backward(
    grad: Tensor,  # [levels]
    used: Tensor,  # [levels]
    count: Tensor | None,  # [sum U_l]
    index: Tensor | None,  # [sum N_l]
    rows: Sequence[int],
    texts: Sequence[int],
    positives: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # of row_lse, col_lse and positive
    return tuple(_triton().means_backward(grad, used, count, index, rows, texts, positives))


@contrastive_means_backward.register_fake
def _(
    grad: Tensor,
    used: Tensor,
    count: Tensor | None,
    index: Tensor | None,
    rows: Sequence[int],
    texts: Sequence[int],
    positives: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    of_rows = used.new_empty(sum(rows))
    return of_rows, used.new_empty(sum(texts)), torch.empty_like(of_rows)


def _setup_means(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *_, count, index, ctx.rows, ctx.texts, ctx.positives = inputs
    ctx.save_for_backward(output[1], count, index)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for what has no gradient


def _means_backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 8
    used, count, index = ctx.saved_tensors
    grads = contrastive_means_backward(grad, used, count, index, ctx.rows, ctx.texts, ctx.positives)
    return *grads, None, None, None, None, None


contrastive_means.register_autograd(_means_backward, setup_context=_setup_means)
