"""The contrastive softmax in plain PyTorch: the reference for every backend.

With unit rows x_i (images) and y_u (distinct texts), S = s x y^T, the text t_i of image row i and a weight
w_u >= 0 of each text:

    row_i = log sum_u w_u exp(S_iu)        col_u = log sum_i exp(S_iu)        positive_i = S_{i, t_i}

Everything a symmetric contrastive loss needs is a plain function of these three. The N x U matrix is materialised
here; the other backends hold at most a bounded part of it. Source: ScenarioCLIP (arXiv 2511.20274).

Products are float32 (float64 for float64 input). The three results are float64 in every backend: a loss is the small
difference of a log-sum and a logit, and a gradient the exponential of one, where float32 near s = 100 is 4e-6 off.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from . import per_level

EPS = 1e-12  # minimum norm of a row, as in torch.nn.functional.normalize


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def sums_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64


def inverse_norms(x: Tensor, normalize: bool = True) -> Tensor:  # [N, D] -> [N]
    """One over the norm of each row, as torch.nn.functional.normalize clamps it; ones with normalize=False."""
    x = x.to(compute_dtype(x.dtype))
    return x.norm(dim=-1).clamp_min(EPS).reciprocal() if normalize else x.new_ones(len(x))


def unit_rows(x: Tensor, inverse: Tensor) -> Tensor:  # [N, D], [N] -> [N, D]
    return x.to(inverse.dtype) * inverse[:, None]


def unit_rows_backward(
    x: Tensor,  # [N, D]
    inverse: Tensor,  # [N]
    grad_unit: Tensor,  # [N, D]
    normalize: bool = True,
) -> Tensor:  # [N, D]
    """Gradient of `unit_rows`: the component of grad_unit orthogonal to the row, divided by the row's norm."""
    if not normalize:
        return grad_unit.to(x.dtype)
    inverse = inverse.to(grad_unit.dtype)
    unit = unit_rows(x, inverse)
    return ((grad_unit - unit * (unit * grad_unit).sum(-1, keepdim=True)) * inverse[:, None]).to(x.dtype)


def level_forward(
    image: Tensor,  # [N, D]
    text: Tensor,  # [U, D] distinct texts
    scale: Tensor,  # [] multiplies the cosines
    index: Tensor | None = None,  # [N] int64 text of each image row; None: row i has text i, U == N
    weight: Tensor | None = None,  # [U] weight of each text in the row sums; None: ones
    normalize: bool = True,
    kept: Tensor | None = None,  # not used: nothing is kept
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # row_lse [N], col_lse [U], positive [N], inverse norms [N], [U]
    by_row, by_text = inverse_norms(image, normalize), inverse_norms(text, normalize)
    x, y = unit_rows(image, by_row), unit_rows(text, by_text)
    scale = torch.where(scale > 0, scale, torch.nan)  # not checked on a GPU, which would synchronise
    logits = ((scale.to(x.dtype) * x) @ y.T).to(sums_dtype(x.device))
    weighted = logits if weight is None else logits + weight.to(logits.dtype).log()
    positive = logits.diagonal() if index is None else logits.gather(1, index[:, None])[:, 0]
    return weighted.logsumexp(1), logits.logsumexp(0), positive.clone(), by_row, by_text


def level_backward(
    image: Tensor,  # [N, D]
    text: Tensor,  # [U, D]
    scale: Tensor,  # []
    index: Tensor | None,  # [N]
    weight: Tensor | None,  # [U]
    row_lse: Tensor,  # [N]
    col_lse: Tensor,  # [U]
    positive: Tensor,  # [N]
    by_row: Tensor,  # [N] one over the norm of each image row
    by_text: Tensor,  # [U]
    grad_row: Tensor,  # [N]
    grad_col: Tensor,  # [U]
    grad_positive: Tensor,  # [N]
    kept: Tensor | None = None,
    normalize: bool = True,
    need_image: bool = True,
    need_text: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # d_image [N, D], d_text [U, D] (empty where not needed), d_scale []
    """dS_iu = g^row_i w_u exp(S_iu - row_i) + g^col_u exp(S_iu - col_u) + g^pos_i [u = t_i], and the chain rule."""
    x, y = unit_rows(image, by_row), unit_rows(text, by_text)
    scaled = scale.to(x.dtype) * x
    logits = (scaled @ y.T).to(sums_dtype(x.device))
    weighted = logits if weight is None else logits + weight.to(logits.dtype).log()
    grad = (weighted - row_lse[:, None]).exp() * grad_row[:, None] + (logits - col_lse).exp() * grad_col
    rows = torch.arange(len(x), device=x.device)
    columns = rows if index is None else index
    grad[rows, columns] += grad_positive
    d_scale = (grad * logits).sum() / scale
    grad = grad.to(x.dtype)
    return (
        unit_rows_backward(image, by_row, grad @ (scale.to(x.dtype) * y), normalize)
        if need_image
        else image.new_empty(0),
        unit_rows_backward(text, by_text, grad.T @ scaled, normalize) if need_text else text.new_empty(0),
        d_scale.to(scale.dtype),
    )


# Over all levels of a call, as in every backend: see per_level.py for the arguments.
forward = partial(per_level.forward, level_forward)
backward = partial(per_level.backward, level_backward)


def naive_loss(
    image: Tensor,  # [N, D]
    text: Tensor,  # [N, D] one text per image row, repeats included
    scale: Tensor | float,
) -> Tensor:  # []
    """The paper's form: one N x N matrix, cross entropy over its rows and over its columns, targets on the diagonal."""
    logits = scale * (F.normalize(image, dim=-1, eps=EPS) @ F.normalize(text, dim=-1, eps=EPS).T)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def naive_positives_loss(
    image: Tensor,  # [N, D]
    text: Tensor,  # [U, D] distinct texts, each with at least one image
    scale: Tensor | float,
    index: Tensor,  # [N] int64
) -> Tensor:  # []
    """Equal texts as one class: cross entropy over rows, and over columns with the mean over a text's images."""
    logits = scale * (F.normalize(image, dim=-1, eps=EPS) @ F.normalize(text, dim=-1, eps=EPS).T)
    one_hot = F.one_hot(index, len(text)).to(logits.dtype)
    target = one_hot / one_hot.sum(0)
    return (F.cross_entropy(logits, index) + F.cross_entropy(logits.T, target.T)) / 2


def open_clip_loss(
    image: Tensor,  # [N, D] already of unit length
    text: Tensor,  # [N, D] already of unit length
    scale: Tensor | float,
) -> Tensor:  # []
    """open_clip's ClipLoss on one process: two products, and features used as they are."""
    target = torch.arange(len(image), device=image.device)
    by_image = F.cross_entropy(scale * image @ text.T, target)
    return (by_image + F.cross_entropy(scale * text @ image.T, target)) / 2
