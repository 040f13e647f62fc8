"""The custom op of the mean losses of one process, for backends that define `losses` and `losses_backward`.

The other ops (op.py) return log-sums, and plain PyTorch turns them into losses. Here the backend computes the losses
of all levels itself, in a few launches. For a few hundred rows the host is expected to be the limit. So the op is
registered directly with the dispatcher: `torch.library.custom_op` would flatten the lists of every call with pytrees
and compare the storages of all arguments and results. And where nothing but autograd would see the op, `mean_losses`
leaves out the dispatcher, which converts all lists of tensors three times in each direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scenarioclip_fast import dispatch
from scenarioclip_fast.ops.contrastive.validate import check_numbers, level_name
from scenarioclip_fast.ops.plain import is_plain_call

_ARGUMENTS = (
    "Tensor[] image, "  # levels x [N_l, D_l], one dtype
    "Tensor[] text, "  # levels x [U_l, D_l]
    "Tensor[] scale, "  # levels x [], in the dtype of the sums
    "Tensor?[] index, "  # levels x [N_l] int64: the text of each row; None: row i has text i
    "Tensor?[] weight, "  # levels x [U_l] in the row sums; None: the rows of each text for "negatives", else ones
)
_OPTIONS = "bool positives, bool normalize, "

_library = torch.library.Library("scenarioclip_fast", "FRAGMENT")
_library.define(
    # The losses [levels], and what the backward pass needs.
    f"contrastive_losses({_ARGUMENTS}{_OPTIONS}str backend) -> (Tensor, Tensor[])",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    # d_image, d_text (empty tensors where not needed) and d_scale [levels], for the gradient [levels] of the losses.
    f"contrastive_losses_backward({_ARGUMENTS}Tensor[] saved, Tensor grad, {_OPTIONS}"
    "bool need_image, bool need_text, str backend) -> (Tensor[], Tensor[], Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
contrastive_losses = torch.ops.scenarioclip_fast.contrastive_losses.default
contrastive_losses_backward = torch.ops.scenarioclip_fast.contrastive_losses_backward.default

Levels = Sequence[Tensor]
OptionalLevels = Sequence[Tensor | None]


def mean_losses(
    image: Levels,
    text: Levels,
    scale: Levels,
    index: OptionalLevels,
    weight: OptionalLevels,
    positives: bool,
    normalize: bool,
    backend: str,
) -> Tensor:  # [levels]
    """The op `contrastive_losses` without what the backward pass needs."""
    options = (positives, normalize, backend)
    losses: Tensor
    if not is_plain_call(*image, *text, *scale):
        losses = contrastive_losses(image, text, scale, index, weight, *options)[0]
    elif torch.is_grad_enabled():
        losses = _Losses.apply(None, index, weight, options, *image, *text, *scale)[0]
    else:
        losses = _losses(image, text, scale, index, weight, *options)[0]
    return losses


def has_fused_losses(backend: str) -> bool:
    return dispatch.offers("contrastive_loss", backend, "losses")


def _check_values(scale: Levels, index: OptionalLevels, text: Levels) -> None:
    """On the CPU; in a compiled graph, argument values can first be read here."""
    for k, numbers in enumerate(zip(scale, index, text, strict=True)):
        check_numbers(numbers[0].item(), numbers[1], len(numbers[2]), level_name(k, len(text)))


def _losses(
    image: Levels,
    text: Levels,
    scale: Levels,
    index: OptionalLevels,
    weight: OptionalLevels,
    positives: bool,
    normalize: bool,
    backend: str,
) -> tuple[Tensor, list[Tensor]]:
    if image[0].device.type == "cpu":
        _check_values(scale, index, text)
    implementation = dispatch.implementation("contrastive_loss", backend)
    out: tuple[Tensor, list[Tensor]] = implementation.losses(image, text, scale, index, weight, positives, normalize)
    return out


def _losses_backward(*arguments: Any) -> tuple[list[Tensor], list[Tensor], Tensor]:
    implementation = dispatch.implementation("contrastive_loss", arguments[-1])
    out: tuple[list[Tensor], list[Tensor], Tensor] = implementation.losses_backward(*arguments[:-1])
    return out


_library.impl("contrastive_losses", _losses, "CompositeExplicitAutograd")
_library.impl("contrastive_losses_backward", _losses_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("scenarioclip_fast::contrastive_losses", lib=_library)
def _(
    image: Levels,
    text: Levels,
    scale: Levels,
    index: OptionalLevels,
    weight: OptionalLevels,
    positives: bool,
    normalize: bool,
    backend: str,
) -> tuple[Tensor, list[Tensor]]:
    saved = dispatch.implementation("contrastive_loss", backend).losses_saved(image, text, index)
    return scale[0].new_empty(len(image)), saved


@torch.library.register_fake("scenarioclip_fast::contrastive_losses_backward", lib=_library)
def _(image: Levels, text: Levels, scale: Levels, *arguments: Any) -> tuple[list[Tensor], list[Tensor], Tensor]:
    *_, need_image, need_text, _backend = arguments
    d_image = [x.new_empty(x.shape if need_image else 0) for x in image]
    return d_image, [y.new_empty(y.shape if need_text else 0) for y in text], scale[0].new_empty(len(image))


class _Losses(torch.autograd.Function):
    """The features and scales are single arguments, as autograd does not look into lists."""

    @staticmethod
    def forward(ctx: Any, keys: Any, index: Any, weight: Any, options: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        levels = len(tensors) // 3
        image, text, scale = tensors[:levels], tensors[levels : 2 * levels], tensors[2 * levels :]
        if keys is None:
            losses, saved = _losses(image, text, scale, index, weight, *options)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                losses, saved = contrastive_losses.redispatch(keys, image, text, scale, index, weight, *options)
        ctx.save_for_backward(*tensors, *index, *weight, *saved)
        ctx.options = options
        ctx.set_materialize_grads(False)  # do not allocate zeros for outputs without a gradient
        if keys is None:
            return (losses,)
        ctx.mark_non_differentiable(*saved)
        return losses, *saved

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Any, ...]:
        needed, held = ctx.needs_input_grad[4:], ctx.saved_tensors
        levels = len(needed) // 3
        if grad is None:
            return (None,) * (4 + 3 * levels)
        need_image, need_text = any(needed[:levels]), any(needed[levels : 2 * levels])
        positives, normalize, backend = ctx.options
        # The op raises the error of second derivatives.
        direct = not torch.is_grad_enabled() and is_plain_call(*held[:levels])
        d_image, d_text, d_scale = (_losses_backward if direct else contrastive_losses_backward)(
            held[:levels],
            held[levels : 2 * levels],
            held[2 * levels : 3 * levels],
            held[3 * levels : 4 * levels],
            held[4 * levels : 5 * levels],
            held[5 * levels :],
            grad,
            positives,
            normalize,
            need_image,
            need_text,
            backend,
        )
        nothing = (None,) * levels
        return (
            *(None,) * 4,
            *(d_image if need_image else nothing),
            *(d_text if need_text else nothing),
            *(d_scale.unbind() if any(needed[2 * levels :]) else nothing),
        )


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keys: Any, arguments: Any, *_: Tensor) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            d_image, d_text, d_scale = contrastive_losses_backward.redispatch(keys, *arguments)
        return *d_image, *d_text, d_scale

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Any, ...]:
        raise RuntimeError(
            "contrastive_loss supports first derivatives only: got a gradient of its gradient (create_graph=True)"
        )


def _with_gradient(keyset: Any, image: Levels, text: Levels, scale: Levels, *rest: Any) -> tuple[Tensor, list[Tensor]]:
    keys = keyset & torch._C._after_autograd_keyset
    if torch.is_grad_enabled() and torch._C._any_requires_grad(image, text, scale):
        index, weight, *options = rest
        losses, *saved = _Losses.apply(keys, index, weight, options, *image, *text, *scale)
        return losses, saved
    with torch._C._AutoDispatchBelowAutograd():
        out: tuple[Tensor, list[Tensor]] = contrastive_losses.redispatch(keys, image, text, scale, *rest)
    return out


def _backward_with_gradient(keyset: Any, *arguments: Any) -> tuple[Any, ...]:
    keys = keyset & torch._C._after_autograd_keyset
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
        image, text, scale, *_, grad = arguments[:7]
        levels = len(image)
        flat = _NoSecondDerivative.apply(keys, arguments, *image, *text, *scale, grad)
        return list(flat[:levels]), list(flat[levels : 2 * levels]), flat[-1]
    with torch._C._AutoDispatchBelowAutograd():
        out: tuple[Any, ...] = contrastive_losses_backward.redispatch(keys, *arguments)
    return out


_library.impl("contrastive_losses", _with_gradient, "Autograd", with_keyset=True)
_library.impl("contrastive_losses_backward", _backward_with_gradient, "Autograd", with_keyset=True)
