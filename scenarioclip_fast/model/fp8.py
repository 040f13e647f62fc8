"""Block products in FP8 (E4M3), for GPUs of compute capability 8.9 and above.

x [M, K] times w^T [K, N] becomes (q_x q_w^T) s_x s_w, where q = x / s in E4M3 (4 significant bits, up to 448) and s is
the largest magnitude of a row divided by 448, computed for every product. With one scale per row,

- a row's result does not depend on the other rows, so that batches, microbatches and padding do not change a view's
  embedding;
- the scale needs no pass over the whole tensor: the kernel that writes x, such as a layernorm, can also quantise it;
- an outlier costs precision only in its own token or output feature.

The gradient of the input is such a product, too: of the output's gradient, also E4M3, since a row spans less than its
18 binades, with w quantised by column. The gradient of the weight sums over tokens, so it would need scales by column
of both factors, and its error would go straight into the optimizer: it stays a bfloat16 product.

On other devices than GPUs the products are emulated: the same rounding and scales, then a float32 product. Tensor cores
keep fewer bits than float32 in sums; that is the only difference.

Products go through `torch._scaled_mm`: its public form, `torch.nn.functional.scaled_mm`, cannot be compiled with torch
2.11. It replaces `_scaled_mm` when the lower bound of torch is 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.model.encoders import Block, Encoder, TextEncoder
from scenarioclip_fast.model.layers import Linear, autocast_dtype, split_rows, weight_gradient

E4M3 = torch.float8_e4m3fn
_MULTIPLE = 16  # of both sides of a weight, in bytes: the alignment that FP8 tensor cores require


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:  # [M, K]
    """Round the rows of x to E4M3: values [M, K], scales [M, 1] float32, with x close to values * scales.

    A row with an infinity or NaN has a NaN among its values, so that non-finite results stay visible.
    """
    largest = torch.finfo(E4M3).max  # 448; not a global, which Dynamo would take for an input that varies
    x = x.float()
    # A smallest scale avoids 0 / 0 in rows of zeros.
    scale = (x.abs().amax(-1, keepdim=True) / largest).clamp(min=torch.finfo(torch.float32).tiny)
    # Torch 2.11 converts values beyond the largest to NaN.
    return (x / scale).clamp(-largest, largest).to(E4M3).contiguous(), scale


def product(
    x: tuple[Tensor, Tensor], weight: tuple[Tensor, Tensor], bias: Tensor | None, fast_sum: bool
) -> Tensor:  # [M, K], [N, K], [N]
    """Multiply quantised x with quantised weight^T and add the bias: bfloat16 [M, N].

    fast_sum: let Hopper's tensor cores sum in fewer bits, which is faster and common for forward products.
    """
    (values, scale), (weight_values, weight_scale) = x, weight
    if not values.is_cuda:
        y = (values.float() @ weight_values.float().t()) * scale * weight_scale.t()
        return (y if bias is None else y + bias.float()).bfloat16()
    return torch._scaled_mm(
        values,
        weight_values.t(),
        scale,
        weight_scale.t(),
        bias=None if bias is None else bias.bfloat16(),
        out_dtype=torch.bfloat16,
        use_fast_accum=fast_sum,
    )


class _Product(torch.autograd.Function):
    """x weight^T + bias, or without bias, in FP8; `values` and `scale`: the quantised weight, if it is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [M, K]
        weight: Tensor,  # [N, K]
        bias: Tensor | None,  # [N]
        values: Tensor | None,  # [N, K]
        scale: Tensor | None,  # [N, 1]
        fp8_gradient: bool,
    ) -> Tensor:
        _, weight_needs_grad, ctx.bias_needs_grad, *_ = ctx.needs_input_grad
        # For the gradient of the weight, x as autocast would save it.
        ctx.save_for_backward(weight, x.bfloat16() if weight_needs_grad else None)
        ctx.dtypes, ctx.fp8_gradient = (x.dtype, weight.dtype, None if bias is None else bias.dtype), fp8_gradient
        quantised = quantize(weight) if values is None or scale is None else (values, scale)
        return product(quantize(x), quantised, bias, fast_sum=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # [M, N]
        weight, x = ctx.saved_tensors
        dtype, weight_dtype, bias_dtype = ctx.dtypes
        x_grad = weight_grad = bias_grad = None
        if ctx.needs_input_grad[0] and ctx.fp8_gradient:
            x_grad = product(quantize(grad), quantize(weight.t()), None, fast_sum=False).to(dtype)
        elif ctx.needs_input_grad[0]:
            x_grad = (grad @ weight.to(grad.dtype)).to(dtype)
        if x is not None:
            weight_grad = weight_gradient(grad, x).to(weight_dtype)
        if ctx.bias_needs_grad:
            bias_grad = grad.sum(0, dtype=torch.float32).to(bias_dtype)
        return x_grad, weight_grad, bias_grad, None, None, None


class Float8Linear(Linear):
    """A Linear with FP8 products on the same float32 parameters.

    Args:
        linear: whose parameters to use.
        fp8_gradient: compute the gradient of the input in FP8, too, and not in bfloat16.
        quantised: the weight's quantised rows, if the weight is frozen; None: quantise it for every product.
    """

    reads_copies = False

    def __init__(self, linear: Linear, fp8_gradient: bool, quantised: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.fp8_gradient, self.quantised = fp8_gradient, quantised

    def parts(self, inputs: Sequence[Tensor], sizes: Sequence[int], with_bias: bool = True) -> list[Tensor]:
        values, scale = self.quantised or (None, None)
        weights = split_rows(sizes, self.weight, self.bias if with_bias else None, values, scale)
        return [self._product(x, *rows) for x, *rows in zip(inputs, *weights, strict=True)]

    def _product(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor | None, scale: Tensor | None
    ) -> Tensor:  # [*, in_features]
        flat = x.reshape(-1, x.shape[-1])
        y = cast(Tensor, _Product.apply(flat, weight, bias, values, scale, self.fp8_gradient))
        return y.to(autocast_dtype(x.device.type) or x.dtype).view(*x.shape[:-1], len(weight))

    def derived(self) -> Sequence[Tensor]:
        return self.quantised or ()

    def refresh(self) -> None:
        """Quantise a frozen weight again, after its values have changed."""
        if self.quantised is not None:
            found = _quantised(self.weight)
            if self.quantised[0].device != found[0].device:
                self.quantised = found
                return
            for old, new in zip(self.quantised, found, strict=True):  # in place: layers share it, CUDA graphs read it
                old.view(torch.uint8).copy_(new.view(torch.uint8))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Float8Linear:
        super()._apply(fn, recurse)
        self.refresh()  # on the device to which the weight has moved
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.refresh()


def use_fp8(encoders: Iterable[Encoder], frozen: Iterable[Tensor], mode: Literal["frozen", "all"]) -> int:
    """Make blocks of `encoders` compute in FP8, in place; parameters stay the same objects under the same names.

    Texts' frozen features are computed once and cached, so the blocks before the first trained text block stay as they
    are: FP8 would cost accuracy there and save nothing.

    Args:
        encoders: of the student and its teacher.
        frozen: the parameters that are never trained, and are quantised once.
        mode: "frozen": only the forward pass of frozen vision blocks; "all": the forward pass of all blocks, and the
            gradients of their inputs.

    Returns:
        The number of blocks with FP8 products.

    Raises:
        UserError: a weight whose sides are not multiples of 16.
    """
    ids = {id(p) for p in frozen}
    quantised: dict[int, tuple[Tensor, Tensor]] = {}  # levels and teacher share frozen weights
    count = 0
    for encoder in encoders:
        for block in _fp8_blocks(encoder, ids, mode):
            count += 1
            for parent, name in (
                (block.attention, "qkv"),
                (block.attention, "out"),
                (block, "expand"),
                (block, "contract"),
            ):
                linear = getattr(parent, name)
                _check_sizes(encoder, linear)
                weight = linear.weight
                if id(weight) in ids and id(weight) not in quantised:
                    quantised[id(weight)] = _quantised(weight)
                setattr(parent, name, Float8Linear(linear, mode == "all", quantised.get(id(weight))))
    return count


def requantize(encoders: Iterable[Encoder]) -> None:
    """Quantise the frozen weights again, after a checkpoint was loaded into them."""
    for encoder in encoders:
        for module in encoder.modules():
            if isinstance(module, Float8Linear):
                module.refresh()


def _fp8_blocks(encoder: Encoder, frozen: set[int], mode: str) -> Iterator[Block]:
    leading = True  # only frozen stages so far
    for stage in encoder.stages:
        is_frozen = all(id(p) in frozen for p in stage.parameters())
        leading = leading and is_frozen
        cached = leading and isinstance(encoder, TextEncoder) and stage is not encoder.blocks[-1]
        chosen = mode == "all" or (is_frozen and not isinstance(encoder, TextEncoder))
        if isinstance(stage, Block) and chosen and not cached:
            yield stage


def _check_sizes(encoder: Encoder, linear: Linear) -> None:
    width = min(linear.in_features, linear.out_features)
    if width % _MULTIPLE:
        part = "text" if isinstance(encoder, TextEncoder) else "vision"
        raise UserError(f"{part}.width: got {width}, expected a multiple of {_MULTIPLE}, which FP8 products require")


@torch.no_grad()
def _quantised(weight: Tensor) -> tuple[Tensor, Tensor]:  # [N, K]
    return quantize(weight)
