"""The public functions, for one or several levels, in one process or over a group of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scenarioclip_fast import dispatch, workspace
from scenarioclip_fast.ops import collectives
from scenarioclip_fast.ops.contrastive.chunked import chunked_log_sums
from scenarioclip_fast.ops.contrastive.fused import has_fused_losses, mean_losses
from scenarioclip_fast.ops.contrastive.levels import (
    LevelInput,
    PreparedLevel,
    coefficients,
    count_texts,
    features,
    features_dtype,
    joined_indices,
    joined_weights,
    lengths,
    merge_equal_texts,
    prepare,
)
from scenarioclip_fast.ops.contrastive.op import contrastive_forward, keeps_exponentials
from scenarioclip_fast.ops.contrastive.ranks import gather_levels
from scenarioclip_fast.ops.contrastive.validate import (
    check_chunk,
    check_group,
    check_levels,
    check_lists,
    check_options,
    check_plan,
    check_total_weights,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from scenarioclip_fast.ops.contrastive.plan import ExchangePlan


def contrastive_loss(
    image: Tensor,  # [N, D]
    text: Tensor,  # [U, D]
    logit_scale: Tensor | float,  # []
    *,
    text_index: Tensor | None = None,  # [N] int64
    text_id: Tensor | None = None,  # [U] int64
    text_weight: Tensor | None = None,  # [U]
    duplicates: str = "negatives",
    reduction: str = "mean",
    group: ProcessGroup | None = None,
    chunk: int | None = None,
    plan: ExchangePlan | None = None,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> Tensor:  # [], or [N] for reduction="none"
    """Symmetric softmax cross entropy between image rows and texts, as in CLIP (ScenarioCLIP, arXiv 2511.20274).

    Formulas in kernels/contrastive/README.md. First derivatives only; torch.func transforms and forward-mode
    derivatives are not supported.

    Texts are equal if they share a row of `text`, through `text_index`, or a `text_id`; features are not compared.

    Args:
        image, text: features of any floating dtype and any norm: rows are normalised here. Two dtypes are promoted to
            one. float32 rows of norm above about 1.8e19 count as zero rows, as in F.normalize. Sums are float32
            (float64 for float64 input); under autocast, float32 features are cast as for a matrix product.
        logit_scale: positive factor of the cosines, already exponentiated and clamped.
        text_index: the text of each image row, in [0, U). None: needs U == N; row i has text i. A text without rows
            never gets a column term. It is a negative for every row with "positives"; with "negatives" only if
            `text_weight` gives it a weight.
        text_id: identity of each text across ranks, on the features' device or the CPU: any int64 that is equal on all
            ranks and unique to the text, such as its vocabulary index. Texts with equal ids are merged into one, with a
            group before they travel, into that of a rank that depends on the id. Required for "positives" with a group;
            with "negatives" it changes no result, but saves work.
        text_weight: finite weight w_u >= 0 of each text in the row sums, row_i = log sum_u w_u exp(S_iu), as with hard
            negatives appended to `text`; 0 leaves a text out. None: the number of its rows with "negatives", 1 with
            "positives". The column sums and their coefficients do not depend on it, and it gets no gradient. When
            texts are merged, weights add with "negatives", so the loss is unchanged; with "positives" the largest is
            kept. A row's loss can be negative if its own text weighs less than by default. With a group, pass weights
            on all ranks or none. Unless there are no rows, some weight must be positive, on any rank.
        duplicates: "negatives" (as in the paper: rows with equal texts are each other's negatives) or "positives"
            (equal texts are one class).
        reduction: "mean", or "none": 1/2 (row_i + col_{t_i} - 2 S_{i, t_i}) of each row, for "negatives" only.
        group: rows and texts are this rank's share; shares may differ in size and may be empty. "mean" is over
            all ranks' rows, the same value on every rank. Each rank's gradient is that of the sum of all ranks'
            results, so averaging over ranks (as DDP does) gives the gradient of a single process with all rows. Other
            options must agree on all ranks; an argument error on one rank leaves the others waiting in a collective. On
            a GPU the host does not synchronise if the group also has a CPU backend
            (`new_group(backend="cpu:gloo,cuda:nccl")`) and text_id is on the CPU.
        chunk: with a group, the merged texts of all ranks per exchange, for each level. Where a level has more, texts
            are gathered in chunks, each while the one before is compared, and only two chunks' gradients exist at
            once; the results differ by rounding only (docs/losses.md). None: 65,536, and no chunks on a single rank.
            Without a group it has no effect.
        plan: of `plan_exchange` for this call, on all ranks or none: sizes and ids are on their way already.
        deterministic: No effect: all backends sum in a fixed order. On the CPU, the matrix library may round
            differently with another number of threads.
        backend: "auto", "reference", "cpu", "triton", or "cuda" (bfloat16 on compute capability 9.0; chosen by
            "auto" from 16,384 x 16,384 logits on).

    Returns:
        0-d tensor, or [N] for "none", float32 (float64 for float64 input). No rows give 0 with zero gradients.

    Raises:
        ValueError, TypeError: invalid or inconsistent arguments; checked before anything runs. The values of
            text_index, text_weight and logit_scale are checked on the CPU only, since reading them from a GPU would
            synchronise. With SCENARIOCLIP_FAST_CHECK=1 the GPU checks them by device-side assertions that name the
            argument, at the cost of a few launches. Without it the triton and cuda backends return NaN for a scale that
            is not positive or an index that is out of range. text_weight is not checked in a compiled graph either; if
            all weights are 0, the loss is then -inf and its gradients NaN.
        BackendError: the named backend cannot run here or does not take these features.
        RuntimeError: a second derivative is taken.
    """
    level = LevelInput(image, text, logit_scale, text_index, text_id, text_weight)
    return _losses([level], duplicates, reduction, group, chunk, plan, backend).squeeze(0)


def log_sums(
    image: Tensor,  # [N, D]
    text: Tensor,  # [U, D]
    logit_scale: Tensor | float,  # []
    *,
    text_index: Tensor | None = None,  # [N] int64
    normalize: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # row_lse [N], col_lse [U], positive [N]
    """Return the terms of softmax losses over the logits S = logit_scale * image text^T, with t = text_index; internal.

    row_i = log sum_u exp(S_iu), col_u = log sum_i exp(S_iu), positive_i = S_{i, t_i}; arguments as in
    `contrastive_loss`. normalize=False: do not normalise the rows.
    """
    level = LevelInput(image, text, logit_scale, text_index)
    name = _resolve_backend([level], backend)
    rows, columns, positives = _log_sums(prepare([level]), name, normalize)
    return rows[0], columns[0], positives[0]


def multilevel_contrastive_loss(
    images: Sequence[Tensor],  # levels x [N_l, D]
    texts: Sequence[Tensor],  # levels x [U_l, D]
    logit_scales: Sequence[Tensor | float],  # levels x []
    *,
    text_indices: Sequence[Tensor | None] | None = None,  # levels x [N_l] int64
    text_ids: Sequence[Tensor | None] | None = None,  # levels x [U_l] int64
    text_weights: Sequence[Tensor | None] | None = None,  # levels x [U_l]
    duplicates: str = "negatives",
    group: ProcessGroup | None = None,
    chunk: int | None = None,
    plan: ExchangePlan | None = None,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> Tensor:  # [levels]
    """One `contrastive_loss` per level.

    Each argument is a list with one entry per level; levels share launches and collectives where possible. The options
    from `duplicates` on hold for all levels. Features of all levels are on one device and promoted to one dtype.

    Returns:
        [levels], in the dtype of `contrastive_loss`.

    Raises:
        ValueError, TypeError, BackendError, RuntimeError: as in `contrastive_loss`; lists of different lengths, or no
            levels.
    """
    lists: dict[str, Any] = {"images": images, "texts": texts, "logit_scales": logit_scales}
    lists |= {"text_indices": text_indices, "text_ids": text_ids, "text_weights": text_weights}
    check_lists(lists)
    columns = [[None] * len(images) if given is None else given for given in lists.values()]
    levels = [LevelInput(*level) for level in zip(*columns, strict=True)]
    return _losses(levels, duplicates, "mean", group, chunk, plan, backend)


def distributed_dot_product_loss(
    image: Tensor,  # [N, D]
    text: Tensor,  # [N, D]
    logit_scale: Tensor | float,  # []
    group: ProcessGroup,
) -> Tensor:  # []
    """`contrastive_loss` over a group where row i has text i, without normalisation of the rows."""
    level = LevelInput(image, text, logit_scale)
    return _losses([level], "negatives", "mean", group, None, None, "auto", normalize=False).squeeze(0)


def _losses(
    inputs: list[LevelInput],
    duplicates: str,
    reduction: str,
    group: ProcessGroup | None,
    chunk: int | None,
    plan: ExchangePlan | None,
    backend: str,
    normalize: bool = True,
) -> Tensor:  # [levels], or [1, N] for reduction="none"
    check_options(duplicates, reduction)
    check_group(group)
    check_chunk(chunk)
    check_plan(plan, group)
    if plan is not None:
        plan.check_call([level.text for level in inputs])
    name = _resolve_backend(inputs, backend, 1 if group is None else group.size())
    levels = prepare(inputs)
    if group is not None:
        levels = gather_levels(levels, duplicates, group, chunk, plan)
    check_total_weights(levels)
    if group is None and reduction == "mean" and has_fused_losses(name):
        return _fused_losses(levels, duplicates, name, normalize)
    if group is None:
        levels = [count_texts(level, duplicates) for level in levels]
    if group is not None and levels[0].layout is not None:
        rows, columns, positives = chunked_log_sums(levels, name, normalize, group)
    else:
        rows, columns, positives = _log_sums(levels, name, normalize)
    dtype = levels[0].scale.dtype
    if reduction == "none":
        return _row_losses(levels[0], rows[0], columns[0], positives[0], group).to(dtype)[None]
    return _mean_losses(levels, duplicates, rows, columns, positives, group).to(dtype)


def _resolve_backend(levels: list[LevelInput], backend: str, ranks: int = 1) -> str:
    check_levels(levels)
    dtype = str(features_dtype(levels)).removeprefix("torch.")
    sizes = [(*level.image.shape, level.text.shape[0]) for level in levels]
    # A rank's rows meet the texts of all ranks, whose shares are not known yet: about as many as here.
    # A sum rather than the largest level's, since comparing levels would be guards of a graph with symbolic sizes.
    logits, width = sum([n * u for n, _, u in sizes]) * ranks, max([d for _, d, _ in sizes])
    device = levels[0].image.device.type
    return dispatch.resolve("contrastive_loss", backend, device, dtype=dtype, work=logits, width=width)


def _log_sums(
    levels: list[PreparedLevel], backend: str, normalize: bool
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return row log-sums, column log-sums and positive logits of each level."""
    index, weight = joined_indices(levels), joined_weights(levels)
    budget = _budget(levels, backend)
    rows, columns, positives, *_ = contrastive_forward(*features(levels), index, weight, normalize, budget, backend)
    n, u = lengths(levels)
    return list(rows.split(n)), list(columns.split(u)), list(positives.split(n))


def _budget(levels: list[PreparedLevel], backend: str) -> int:
    """Return how many bytes of exponentials may be kept for the backward pass, if there is one."""
    if not keeps_exponentials(backend) or not torch.is_grad_enabled():
        return 0
    inputs = [x for level in levels for x in (level.image, level.text, level.scale)]
    return workspace.budget(inputs[0].device.type) if any(x.requires_grad for x in inputs) else 0


def _row_losses(
    level: PreparedLevel, row: Tensor, column: Tensor, positive: Tensor, group: ProcessGroup | None
) -> Tensor:  # [N]
    if group is not None:
        column = collectives.combine_columns(column, column.new_empty(0), group)[0]
    own = column if level.text_index is None else column[level.text_index]
    return (row + own) / 2 - positive


def _mean_losses(
    levels: list[PreparedLevel],
    duplicates: str,
    rows: list[Tensor],
    columns: list[Tensor],
    positives: list[Tensor],
    group: ProcessGroup | None,
) -> Tensor:  # [levels]
    betas, kappas = zip(*(coefficients(level, duplicates) for level in levels), strict=True)
    sums = [
        row.sum() / max(level.rows, 1) - (positive * beta).sum()
        for level, row, positive, beta in zip(levels, rows, positives, betas, strict=True)
    ]
    if group is not None:
        packed, totals = collectives.combine_columns(torch.cat(columns), torch.stack(sums), group)
        columns, sums = list(packed.split([len(c) for c in columns])), list(totals.unbind())
    losses = [
        # kappa is 0 for a text without rows, whose log-sum is -inf if there are no rows at all: 0 * -inf is not 0.
        (total + (torch.where(kappa > 0, column, 0.0) * kappa).sum()) / 2
        for total, column, kappa in zip(sums, columns, kappas, strict=True)
    ]
    return torch.stack(losses)


def _fused_losses(levels: list[PreparedLevel], duplicates: str, backend: str, normalize: bool) -> Tensor:  # [levels]
    """Compute the mean losses of one process in few launches, for backends that implement this."""
    positives = duplicates == "positives"
    if positives:
        levels = [merge_equal_texts(level) for level in levels]
    return mean_losses(
        [level.image for level in levels],
        [level.text for level in levels],
        [level.scale for level in levels],
        [level.text_index for level in levels],
        [level.weight for level in levels],
        positives,
        normalize,
        backend,
    )
