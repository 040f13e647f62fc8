"""Argument checks of the contrastive losses."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from scenarioclip_fast.ops.contrastive.levels import LevelInput, PreparedLevel

DUPLICATES = ("negatives", "positives")
# If set to 1, values on a GPU are checked too, by device-side assertions that name the argument.
CHECK = "SCENARIOCLIP_FAST_CHECK"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FLOATING = "expected a floating-point tensor (float16, bfloat16, float32 or float64)"
_OPTIONAL_LISTS = ("text_indices", "text_ids", "text_weights")
_LARGEST = torch.finfo(torch.float32).max


def check_options(duplicates: str, reduction: str) -> None:
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction: got {reduction!r}, expected 'mean' or 'none'")
    if reduction == "none" and duplicates != "negatives":
        raise ValueError(f"reduction='none' requires duplicates='negatives', got {duplicates!r}: use reduction='mean'")
    if duplicates not in DUPLICATES:
        raise ValueError(f"duplicates: got {duplicates!r}, expected one of {', '.join(map(repr, DUPLICATES))}")


def check_group(group: object) -> None:
    if group is not None and not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(f"group: got {_kind(group)}, expected a process group that this rank belongs to")


def check_chunk(chunk: object) -> None:
    if chunk is None:
        return
    if not isinstance(chunk, int) or isinstance(chunk, bool):
        raise TypeError(f"chunk: got {_kind(chunk)}, expected a number of texts or None")
    if chunk < 1:
        raise ValueError(f"chunk: got {chunk}, expected at least 1 text, or None")


def check_plan(plan: object, group: object) -> None:
    if plan is not None and group is None:
        raise ValueError("plan: got a plan without a group, expected the group that it was made for")


def check_lists(lists: Mapping[str, Any]) -> None:
    """Check that all lists of a multilevel call have as many entries as the first; the optional ones may be None."""
    counts: dict[str, int] = {}
    for name, given in lists.items():
        if given is None and name in _OPTIONAL_LISTS:
            continue
        try:
            counts[name] = len(given)
        except TypeError:  # also of a 0-d tensor, which has __len__
            raise TypeError(f"{name}: got {_kind(given)}, expected a list with an entry per level") from None
    first, expected = next(iter(counts.items()))
    for name, count in counts.items():
        if count != expected:
            raise ValueError(f"{name}: got {count} levels, expected {expected}, as many as {first}")
    if expected == 0:
        raise ValueError(f"{first}: got no levels, expected at least one")


def check_levels(levels: Sequence[LevelInput]) -> None:
    # In a compiled graph, reading values would break the graph.
    reads_values = not torch.compiler.is_compiling()
    # Look at the tensors only inside a transform; it may be one of other tensors, which is no problem.
    if reads_values and (forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None):
        _check_transforms(levels)
    for i, level in enumerate(levels):
        where = level_name(i, len(levels))
        _check_features(level, where)
        _check_labels(level, where)
        _check_weight(level, where)
        _check_scale(level, where)
        if reads_values:
            _check_values(level, where)
    device = levels[0].image.device
    if any(level.image.device != device for level in levels):
        devices = {level.image.device for level in levels}
        raise ValueError(f"images: got levels on {sorted(map(str, devices))}, expected one device")


def level_name(i: int, count: int) -> str:
    """Return the prefix of an error message."""
    return f"level {i}: " if count > 1 else ""


def _check_transforms(levels: Sequence[LevelInput]) -> None:
    for level in levels:
        for x in (level.image, level.text, level.scale, level.text_index, level.text_id, level.text_weight):
            if not isinstance(x, Tensor):
                continue
            if torch._C._functorch.is_functorch_wrapped_tensor(x):
                got = "a tensor of a torch.func transform (grad, jvp, vmap, ...)"
            elif forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
                got = "a dual tensor of forward-mode differentiation"
            else:
                continue
            raise RuntimeError(
                f"contrastive losses support reverse mode only: got {got}, expected plain tensors: differentiate with "
                "torch.autograd.grad or backward()"
            )


def _check_features(level: LevelInput, where: str) -> None:
    image, text = level.image, level.text
    for name, x in (("image", image), ("text", text)):
        if not isinstance(x, Tensor) or x.dtype not in DTYPES:
            raise TypeError(f"{where}{name}: got {_kind(x)}, {_FLOATING}")
        if x.layout is not torch.strided or x.is_nested:
            raise _not_dense(x, where + name)
        if x.dim() != 2:
            raise ValueError(f"{where}{name}: got shape {list(x.shape)}, expected [rows, width]")
    width, text_width = image.shape[1], text.shape[1]
    if width != text_width:
        raise ValueError(f"{where}image and text: got widths {width} and {text_width}, expected the same width")
    if width == 0:
        raise ValueError(f"{where}image and text: got width 0, expected at least 1")
    if text.device != image.device:
        raise ValueError(f"{where}text: got device {text.device}, expected {image.device}, the device of image")
    if image.is_meta:
        raise ValueError(f"{where}image and text: got device meta, expected tensors with values, on a CPU or GPU")


def _check_labels(level: LevelInput, where: str) -> None:
    # Not len(tensor), which takes a microsecond.
    n, u, device = level.image.shape[0], level.text.shape[0], level.image.device
    if level.text_index is None and n != u:
        raise ValueError(
            f"{where}text: got {u} texts for {n} image rows, expected equal numbers, "
            "or text_index, the text of each row"
        )
    for name, labels, rows in (("text_index", level.text_index, n), ("text_id", level.text_id, u)):
        if labels is None:
            continue
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
            raise TypeError(f"{where}{name}: got {_kind(labels)}, expected an int64 tensor")
        if labels.layout is not torch.strided:
            raise _not_dense(labels, where + name)
        if labels.dim() != 1 or labels.shape[0] != rows:
            raise ValueError(f"{where}{name}: got shape {list(labels.shape)}, expected [{rows}]")
        if labels.device != device and not (name == "text_id" and labels.device.type == "cpu"):
            raise ValueError(f"{where}{name}: got device {labels.device}, expected {device}, the device of image")


def _check_weight(level: LevelInput, where: str) -> None:
    weight, text = level.text_weight, level.text
    if weight is None:
        return
    if not isinstance(weight, Tensor) or weight.dtype not in DTYPES:
        raise TypeError(f"{where}text_weight: got {_kind(weight)}, {_FLOATING}")
    if weight.layout is not torch.strided:
        raise _not_dense(weight, f"{where}text_weight")
    if weight.shape != text.shape[:1]:
        raise ValueError(f"{where}text_weight: got shape {list(weight.shape)}, expected [{len(text)}]")
    if weight.device != text.device:
        raise ValueError(f"{where}text_weight: got device {weight.device}, expected {text.device}, the device of text")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{where}text_weight: got a tensor that requires a gradient, expected one that does not "
            "(text_weight.detach()): the weights have no gradient"
        )


def _check_scale(level: LevelInput, where: str) -> None:
    scale = level.scale
    if isinstance(scale, Tensor):
        if scale.dtype not in DTYPES:
            raise TypeError(f"{where}logit_scale: got {_kind(scale)}, {_FLOATING}")
        if scale.layout is not torch.strided:
            raise _not_dense(scale, f"{where}logit_scale")
        if scale.dim() != 0:
            raise ValueError(f"{where}logit_scale: got shape {list(scale.shape)}, expected a 0-d tensor")
        if scale.is_meta:
            raise ValueError(f"{where}logit_scale: got device meta, expected a tensor with a value")
    elif not isinstance(scale, (int, float)) and not isinstance(scale, Real):  # Real: NumPy's scalars, but slower
        raise TypeError(f"{where}logit_scale: got {_kind(scale)}, expected a number or a 0-d tensor")


def _check_values(level: LevelInput, where: str) -> None:
    index, texts = level.text_index, level.text.shape[0]
    on_device = not level.image.is_cpu
    if on_device and os.environ.get(CHECK) == "1":
        assert_values(level, where)
    if texts == 0 and level.image.shape[0]:
        raise ValueError(f"{where}text: got no texts for {level.image.shape[0]} image rows, expected at least one")
    check_numbers(_scale_value(level.scale), None if on_device else index, texts, where)
    weight = level.text_weight
    if weight is not None and len(weight) and not on_device:
        lowest, highest = (v.item() for v in weight.aminmax())
        if not (lowest >= 0 and highest <= _LARGEST):
            raise ValueError(
                f"{where}text_weight: got values from {lowest:g} to {highest:g}, expected finite weights of at least 0"
            )


def check_total_weights(levels: Sequence[PreparedLevel]) -> None:
    """Check that the row sums have terms; with a group, after the exchange of the weights, equally on all ranks."""
    for i, level in enumerate(levels):
        if level.weight is None or not level.rows or torch.compiler.is_compiling():
            continue
        message = f"{level_name(i, len(levels))}text_weight: got only zeros, expected at least one weight above 0"
        if level.weight.device.type == "cpu":
            if not level.weight.any():
                raise ValueError(message)
        elif os.environ.get(CHECK) == "1":
            torch._assert_async(level.weight.any(), message)


def check_numbers(scale: float, index: Tensor | None, texts: int, where: str) -> None:
    """Check the values of one level on the CPU."""
    if scale <= 0:
        raise ValueError(f"{where}logit_scale: got {scale:g}, expected a positive factor (exp of the parameter)")
    if scale > _LARGEST:
        raise ValueError(f"{where}logit_scale: got {scale:g}, expected a factor in the range of float32")
    if index is not None and len(index):
        low, high = (int(v) for v in index.aminmax())
        if low < 0 or high >= texts:
            raise ValueError(f"{where}text_index: got values from {low} to {high}, expected 0 to {texts - 1}")


def assert_values(level: LevelInput, where: str) -> None:
    """Check the values of one level on a GPU without synchronising: a failure is a device-side assertion."""
    if isinstance(level.scale, Tensor):
        torch._assert_async((level.scale <= 0).logical_not(), f"{where}logit_scale: expected a positive factor")
    if level.text_index is not None:
        low, high = level.text_index >= 0, level.text_index < len(level.text)
        torch._assert_async(
            (low & high).all(), f"{where}text_index: got a value outside 0 to {len(level.text) - 1}, the texts given"
        )
    if level.text_weight is not None:
        low, high = level.text_weight >= 0, level.text_weight <= _LARGEST
        torch._assert_async((low & high).all(), f"{where}text_weight: expected finite weights of at least 0")


def _scale_value(scale: Tensor | float) -> float:
    """Return the value of a scale, or 1 if reading it would synchronise with a GPU."""
    if isinstance(scale, Tensor):
        return scale.item() if scale.is_cpu else 1.0
    try:
        return float(scale)
    except OverflowError:  # an int beyond every float
        return math.inf if scale > 0 else -math.inf


def _not_dense(x: Tensor, name: str) -> TypeError:
    layout = "nested" if x.is_nested else str(x.layout).removeprefix("torch.").removeprefix("_")
    convert = "concatenate its rows" if x.is_nested else "use to_dense()"
    return TypeError(f"{name}: got a {layout} tensor, expected a dense one (layout torch.strided): {convert}")


def _kind(x: object) -> str:
    return f"a tensor of {x.dtype}" if isinstance(x, Tensor) else f"{type(x).__name__}"
