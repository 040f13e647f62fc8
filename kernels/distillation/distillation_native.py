"""The compiled backends, C++ on a CPU and CUDA on a GPU; torch picks one by the device of the tensors.

Import only after the compiled libraries are loaded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .counter import counter


def forward(
    student: Tensor,  # [S, D]
    teacher: Tensor,  # [T, D]
    student_index: Tensor,  # [P] int64
    teacher_index: Tensor,  # [P] int64
    weight: Tensor,  # [P]
    student_temperature: Tensor | None,  # []
    student_temperature_value: float,
    teacher_temperature: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """As in reference.py, for contiguous inputs of any float dtype but float64."""
    # The compiled code accepts float32 only; the rows are few, so a cast costs next to nothing.
    loss, derivatives = torch.ops.scenarioclip_fast_C.distillation_forward(
        student.float(),
        teacher.float(),
        student_index,
        teacher_index,
        weight.float(),
        student_temperature,
        student_temperature_value,
        teacher_temperature,
        with_gradient,
        None if student.device.type == "cpu" else counter(student.device),
    )
    return loss, derivatives
