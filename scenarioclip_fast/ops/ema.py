"""ema_update_: exponential moving average of parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def ema_update_(teacher: Sequence[Tensor], student: Sequence[Tensor], decay: float) -> None:
    """Update teacher <- decay * teacher + (1 - decay) * student in place, in a few launches for the whole list.

    Args:
        teacher, student: lists of float tensors, pairwise of the same shape and on the same device. Dtypes may differ:
            the update is computed in the teacher's, so a float32 teacher can average a bfloat16 student.
        decay: 0 (copy) to 1 (no change).

    Raises:
        ValueError, TypeError: lengths, shapes or devices differ, an argument is not a list of float tensors, or decay
            is outside [0, 1]; nothing is modified.
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay: got {decay}, expected 0 to 1")
    for name, given in (("teacher", teacher), ("student", student)):
        if isinstance(given, Tensor) or not all(isinstance(x, Tensor) for x in given):
            raise TypeError(f"{name}: got {type(given).__name__}, expected a list of tensors")
    if len(teacher) != len(student):
        raise ValueError(f"got {len(teacher)} teacher and {len(student)} student tensors, expected the same number")
    for i, (average, new) in enumerate(zip(teacher, student, strict=True)):
        if average.shape != new.shape or average.device != new.device:
            raise ValueError(
                f"tensor {i}: got a teacher of {list(average.shape)} on {average.device} and a student of "
                f"{list(new.shape)} on {new.device}, expected the same"
            )
        for x in (average, new):
            if not x.is_floating_point():
                raise ValueError(f"tensor {i}: got {x.dtype}, expected a floating-point dtype")
    if not teacher:
        return
    targets = [new.detach().to(average.dtype) for average, new in zip(teacher, student, strict=True)]
    torch._foreach_lerp_([average.detach() for average in teacher], targets, 1 - decay)
