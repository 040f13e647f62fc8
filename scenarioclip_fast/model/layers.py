"""The layers of a block, in float32 or in the low precision of autocast.

Under autocast the residual stream and all activations are in its dtype. Weights stay float32: products read a copy in
that dtype, made per use, or once per step by `WeightCopies`, and the gradients of weights are float32 products.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scenarioclip_fast.ops import add_layer_norm, layer_norm


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of autocast on this device; None outside of it."""
    # Meta tensors have no autocast. torch.compile cannot trace is_autocast_available before PyTorch 2.12.
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def products_to_float32(x: Tensor) -> bool:
    """Whether a product of low-precision matrices like x can be written in float32."""
    return x.is_cuda


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:  # [T, out], [T, in]
    """grad^T x in float32: [out, in]."""
    if products_to_float32(x):
        return torch.mm(grad.T, x, out_dtype=torch.float32)
    return (grad.T @ x).float()


class _LowLinear(torch.autograd.Function):
    """x W^T + b for copies of W and b in x's dtype, or x W^T; the gradients of W and b are computed in float32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, low_weight: Tensor, low_bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, low_weight)
        return F.linear(x, low_weight, low_bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # [*, out]
        x, low_weight = ctx.saved_tensors
        dx = grad @ low_weight if ctx.needs_input_grad[0] else None
        d_weight = d_bias = None
        if ctx.needs_input_grad[1]:
            d_weight = weight_gradient(grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]))
        if ctx.needs_input_grad[2]:
            d_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32)
        return dx, d_weight, d_bias, None, None


class Linear(nn.Linear):
    """nn.Linear with float32 gradients of its weights under autocast.

    `copies`: weight and bias in the dtype of autocast, which `WeightCopies` keeps up to date; None: made per use.
    """

    copies: tuple[Tensor, Tensor] | None = None
    reads_copies = True

    def forward(self, x: Tensor) -> Tensor:  # [*, in]
        return self.parts([x], [self.out_features])[0]

    def derived(self) -> Sequence[Tensor]:
        """The tensors made of the weights that products read."""
        return self.copies or ()

    def product(self, x: Tensor) -> Tensor:  # [*, in]
        """x W^T without the bias, which the next operation adds and whose gradient it sums: [*, out].

        Unlike a call of the module, this runs no hooks.
        """
        return self.parts([x], [self.out_features], with_bias=False)[0]

    def parts(
        self, inputs: Sequence[Tensor], sizes: Sequence[int], with_bias: bool = True
    ) -> list[Tensor]:  # [*, in] each
        """Apply consecutive ranges of the outputs, of these sizes, to one input each: [*, size] each."""
        weight, bias = self.weight, self.bias if with_bias else None
        dtype = autocast_dtype(weight.device.type)
        if dtype is None:
            ranges = zip(inputs, *split_rows(sizes, weight, bias), strict=True)
            return [F.linear(*arguments) for arguments in ranges]
        given = (weight, bias)
        copies = self.copies or [None if t is None else t.detach().to(dtype) for t in given]
        copies = [None if t is None else copy for t, copy in zip(given, copies, strict=True)]
        ranges = zip([x.to(dtype) for x in inputs], *split_rows(sizes, *given, *copies), strict=True)
        return [_LowLinear.apply(*arguments) for arguments in ranges]


def split_rows(sizes: Sequence[int], *tensors: Tensor | None) -> list[Sequence[Any]]:
    """Split the first dimension of each tensor; None stays None. A split's backward pass is one concatenation."""
    if len(sizes) == 1:
        return [[t] for t in tensors]
    return [[None] * len(sizes) if t is None else t.split(list(sizes)) for t in tensors]


class LayerNorm(nn.LayerNorm):
    """LayerNorm that reads x's dtype and writes `dtype`, or by default x's, with float32 statistics."""

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:  # [*, W]
        return layer_norm(x, self.weight, self.bias, eps=self.eps, dtype=dtype)


class AddLayerNorm(nn.LayerNorm):
    """A residual addition, unless `branch` is None, and the LayerNorm of its result: returns both."""

    def forward(  # type: ignore[override]
        self, x: Tensor, branch: Tensor | None = None, branch_bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:  # [*, W], [*, W], [W]
        if branch is None:
            return x, layer_norm(x, self.weight, self.bias, eps=self.eps)
        return add_layer_norm(x, branch.to(x.dtype), self.weight, self.bias, branch_bias=branch_bias, eps=self.eps)


class WeightCopies:
    """Copies of the weights of `Linear` layers in the dtype of autocast, made once per step in a few launches.

    The layers read the copies until `close`, so `refresh` must be called between a change of the weights and their
    use: at the start of each step. Frozen weights are copied again only if their version changes. The versions of
    trained and averaged ones are not reliable, because fused optimizers do not count.

    Args:
        model: its `Linear` layers, on their device; a weight that several layers share is copied once.
        averaged: modules of averages, such as a teacher's encoders, which share the model's frozen weights.
        dtype: of the copies.
    """

    def __init__(self, model: nn.Module, averaged: Iterable[nn.Module], dtype: torch.dtype) -> None:
        self._layers = [
            m for module in (model, *averaged) for m in module.modules() if isinstance(m, Linear) and m.reads_copies
        ]
        self._copied: list[tuple[Linear, str, Tensor]] = []
        self._frozen = {id(p) for p in model.parameters() if not p.requires_grad}
        self._versions: dict[int, int] = {}
        made: dict[int, Tensor] = {}
        for layer in self._layers:
            for name, p in (("weight", layer.weight), ("bias", layer.bias)):
                if id(p) not in made:
                    made[id(p)] = torch.empty_like(p, dtype=dtype, requires_grad=False)
                    self._copied.append((layer, name, made[id(p)]))
            layer.copies = made[id(layer.weight)], made[id(layer.bias)]

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy all weights that may have changed since the last call."""
        copies, weights = [], []
        for layer, name, copy in self._copied:
            weight = getattr(layer, name)
            if id(weight) in self._frozen:
                version = weight._version
                if self._versions.get(id(weight)) == version:
                    continue
                self._versions[id(weight)] = version
            copies.append(copy)
            weights.append(weight)
        torch._foreach_copy_(copies, weights)

    def close(self) -> None:
        """Let the layers make copies per use again."""
        for layer in self._layers:
            layer.copies = None
