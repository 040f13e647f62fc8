"""distillation_loss: checks, choice of backend, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scenarioclip_fast.dispatch import resolve
from scenarioclip_fast.kernels.distillation import reference

_NO_FLOAT64 = dict.fromkeys(("cpu", "triton", "cuda"), "it computes in float32, and float64 came")


def distillation_loss(
    student: Tensor,  # [S, D]
    teacher: Tensor,  # [T, D]
    student_index: Tensor,  # [P] int64
    teacher_index: Tensor,  # [P] int64
    weight: Tensor,  # [P]
    *,
    student_temperature: float | Tensor = 0.07,
    teacher_temperature: float = 0.07,
    backend: str = "auto",
) -> Tensor:  # []
    """Distillation over the embedding's coordinates, for a ragged list of (student row, teacher row) pairs.

    sum_p weight_p T_s^2 KL(softmax(teacher / T_t) || softmax(student / T_s)), where KL is the mean over the D
    coordinates and the teacher's probabilities are clamped to at least 1e-8 (ScenarioCLIP, arXiv 2511.20274;
    formulas in kernels/distillation/README.md). First derivatives only.

    Args:
        student: [S, D], any float dtype; gradients reach it.
        teacher: [T, D] on the same device; takes no gradient.
        student_index, teacher_index: [P] int64, the rows of each pair; a row may be in any number of pairs.
        weight: [P]; takes no gradient.
        student_temperature: T_s > 0; a 0-d tensor may want a gradient.
        teacher_temperature: T_t > 0.
        backend: "auto", "reference", "cpu", "triton" or "cuda"; float64 is computed by the reference.

    Returns:
        0-d tensor, float32 (float64 for a float64 student). No pairs give 0 with zero gradients.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or temperatures that do not fit, before anything runs.
    """
    _check(student, teacher, student_index, teacher_index, weight, student_temperature, teacher_temperature)
    float64 = student.dtype == torch.float64
    backend = resolve("distillation_loss", backend, student.device.type, cannot=_NO_FLOAT64 if float64 else {})
    wide = torch.float64 if float64 else torch.float32
    if not isinstance(student_temperature, Tensor):
        student_temperature = torch.full((), student_temperature, dtype=wide, device=student.device)
    rows: Tensor = _forward(
        student,
        teacher.detach(),
        student_index,
        teacher_index,
        weight.detach(),
        student_temperature.to(wide),
        teacher_temperature,
        student.requires_grad and torch.is_grad_enabled(),
        backend,
    )[0]
    return rows.sum()


@torch.library.custom_op("scenarioclip_fast::distillation_forward", mutates_args=())
def _forward(
    student: Tensor,  # [S, D]
    teacher: Tensor,  # [T, D]
    student_index: Tensor,  # [P]
    teacher_index: Tensor,  # [P]
    weight: Tensor,  # [P]
    student_temperature: Tensor,  # []
    teacher_temperature: float,
    with_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if student.device.type == "cpu":
        # On CUDA the same check would wait for the device.
        _check_range("student_index", student_index, student.shape[0])
        _check_range("teacher_index", teacher_index, teacher.shape[0])
    if backend == "reference":
        forward = reference.forward_rows
    elif backend == "triton":
        from scenarioclip_fast.kernels.distillation import distillation_triton

        forward = distillation_triton.forward_rows
    else:
        # The native form knows float32 alone; the rows are few, so a cast costs next to nothing.
        student, teacher, weight = student.float(), teacher.float(), weight.float()
        forward = torch.ops.scenarioclip_fast_C.distillation_forward
    return forward(
        student.contiguous(),
        teacher.contiguous(),
        student_index.contiguous(),
        teacher_index.contiguous(),
        weight.contiguous(),
        student_temperature,
        teacher_temperature,
        with_gradient,
    )


@_forward.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    student_index: Tensor,
    teacher_index: Tensor,
    weight: Tensor,
    student_temperature: Tensor,
    teacher_temperature: float,
    with_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = student.shape
    wide = student_temperature.dtype
    row = student.new_empty(rows, dtype=wide)
    return row, student.new_empty(rows if with_gradient else 0, width, dtype=wide), torch.empty_like(row)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[1], output[2])


def _backward(ctx: Any, d_loss: Tensor, _d_gradient: Tensor, _d_temperature: Tensor) -> tuple[Tensor | None, ...]:
    # The forward pass has left both derivatives: here they are only scaled by what comes from above.
    gradient, by_temperature = ctx.saved_tensors
    student = (d_loss[:, None] * gradient).to(ctx.dtype) if ctx.needs_input_grad[0] else None
    temperature = (d_loss * by_temperature).sum() if ctx.needs_input_grad[5] else None
    return student, None, None, None, None, temperature, None, None, None


_forward.register_autograd(_backward, setup_context=_setup_context)


def _check_range(name: str, index: Tensor, rows: int) -> None:
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= rows):
        raise ValueError(f"{name}: got indices from {int(index.min())} to {int(index.max())}, expected 0 to {rows - 1}")


def _check(
    student: Tensor,
    teacher: Tensor,
    student_index: Tensor,
    teacher_index: Tensor,
    weight: Tensor,
    student_temperature: float | Tensor,
    teacher_temperature: float,
) -> None:
    for name, rows in (("student", student), ("teacher", teacher)):
        if rows.dim() != 2 or not rows.is_floating_point():
            raise TypeError(f"{name}: got {rows.dtype} {list(rows.shape)}, expected floats of shape [rows, D]")
    if student.shape[1] != teacher.shape[1] or student.shape[1] == 0:
        raise ValueError(
            f"student and teacher: got widths {student.shape[1]} and {teacher.shape[1]}, expected the same, above 0"
        )
    for name, index in (("student_index", student_index), ("teacher_index", teacher_index)):
        if index.dim() != 1 or index.dtype != torch.int64:
            raise TypeError(f"{name}: got {index.dtype} {list(index.shape)}, expected int64 [P]")
    if weight.dim() != 1 or not weight.is_floating_point():
        raise TypeError(f"weight: got {weight.dtype} {list(weight.shape)}, expected floats of shape [P]")
    if not student_index.shape == teacher_index.shape == weight.shape:
        raise ValueError(
            f"got {len(student_index)} student indices, {len(teacher_index)} teacher indices and {len(weight)} "
            "weights, expected as many of each"
        )
    tensors = {
        "teacher": teacher,
        "student_index": student_index,
        "teacher_index": teacher_index,
        "weight": weight,
    }
    if isinstance(student_temperature, Tensor):
        tensors["student_temperature"] = student_temperature
        if student_temperature.dim() != 0:
            raise ValueError(f"student_temperature: got shape {list(student_temperature.shape)}, expected a 0-d tensor")
    elif student_temperature <= 0:
        raise ValueError(f"student_temperature: got {student_temperature}, expected a number above 0")
    if teacher_temperature <= 0:
        raise ValueError(f"teacher_temperature: got {teacher_temperature}, expected a number above 0")
    for name, tensor in tensors.items():
        if tensor.device != student.device:
            raise ValueError(f"{name}: got a tensor on {tensor.device}, expected {student.device} like student")
