"""ema_update_: the teacher's step towards the student."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def ema_update_(teacher: Sequence[Tensor], student: Sequence[Tensor], decay: float) -> None:
    """teacher <- decay * teacher + (1 - decay) * student, in place, in a few launches for the whole list.

    Args:
        teacher, student: lists of float tensors, pairwise of one shape and on one device. Dtypes may differ: the sum is
            formed in the teacher's, so a float32 teacher can follow a bfloat16 student.
        decay: 0 (copy) to 1 (stand still).

    Raises:
        ValueError, TypeError: lengths, shapes or devices that differ, what is no list of float tensors, or a decay
            outside [0, 1]; nothing is changed then.
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay: got {decay}, expected 0 to 1")
    for name, given in (("teacher", teacher), ("student", student)):
        if isinstance(given, Tensor) or not all(isinstance(x, Tensor) for x in given):
            raise TypeError(f"{name}: got {type(given).__name__}, expected a list of tensors and nothing else")
    if len(teacher) != len(student):
        raise ValueError(f"got {len(teacher)} teacher and {len(student)} student tensors, expected as many of each")
    for i, (mine, theirs) in enumerate(zip(teacher, student, strict=True)):
        if mine.shape != theirs.shape or mine.device != theirs.device:
            raise ValueError(
                f"tensor {i}: got a teacher of {list(mine.shape)} on {mine.device} and a student of "
                f"{list(theirs.shape)} on {theirs.device}, expected the same"
            )
        for x in (mine, theirs):
            if not x.is_floating_point():
                raise ValueError(f"tensor {i}: got {x.dtype}, expected floats (an integer cannot move by a fraction)")
    if not teacher:
        return
    followed = [theirs.detach().to(mine.dtype) for mine, theirs in zip(teacher, student, strict=True)]
    torch._foreach_lerp_([mine.detach() for mine in teacher], followed, 1 - decay)
