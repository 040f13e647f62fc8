"""distillation_loss: argument checks, custom op and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scenarioclip_fast import dispatch


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
    """Distillation loss over the embedding's coordinates, for a ragged list of (student row, teacher row) pairs.

    sum_p weight_p T_s^2 KL(softmax(teacher / T_t) || softmax(student / T_s)), where KL is the mean over the D
    coordinates and the teacher's probabilities are clamped to at least 1e-8 (ScenarioCLIP, arXiv 2511.20274;
    formulas in kernels/distillation/README.md). First derivatives only.

    Args:
        student: [S, D], any float dtype; gradients reach it.
        teacher: [T, D] on the same device; gets no gradient.
        student_index, teacher_index: [P] int64, the rows of each pair; a row may occur in any number of pairs.
        weight: [P]; gets no gradient.
        student_temperature: T_s > 0; a 0-d tensor may require a gradient.
        teacher_temperature: T_t > 0.
        backend: "auto", "reference", "cpu", "triton" or "cuda"; float64 is computed by the reference.

    Returns:
        0-d tensor, float32 (float64 for a float64 student). No pairs give 0 with zero gradients.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or temperatures that do not match; checked before anything runs.
    """
    _check(student, teacher, student_index, teacher_index, weight, student_temperature, teacher_temperature)
    float64 = student.dtype == torch.float64
    backend = dispatch.resolve("distillation_loss", backend, student.device.type, dtype="float64" if float64 else "")
    temperature, value = None, 0.0
    if isinstance(student_temperature, Tensor):
        temperature = student_temperature.to(torch.float64 if float64 else torch.float32)
    else:
        value = student_temperature
    loss: Tensor = _forward(
        student,
        teacher.detach(),
        student_index,
        teacher_index,
        weight.detach(),
        temperature,
        value,
        teacher_temperature,
        student.requires_grad and torch.is_grad_enabled(),
        backend,
    )[0]
    return loss


@torch.library.custom_op("scenarioclip_fast::distillation_forward", mutates_args=())
def _forward(
    student: Tensor,  # [S, D]
    teacher: Tensor,  # [T, D]
    student_index: Tensor,  # [P]
    teacher_index: Tensor,  # [P]
    weight: Tensor,  # [P]
    student_temperature: Tensor | None,  # []
    student_temperature_value: float,
    teacher_temperature: float,
    with_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if student.device.type == "cpu":
        # On CUDA the same checks would synchronise with the device.
        _check_range("student_index", student_index, student.shape[0])
        _check_range("teacher_index", teacher_index, teacher.shape[0])
        if student_temperature is not None and student_temperature.item() <= 0:
            raise ValueError(f"student_temperature: got {student_temperature.item():g}, expected a number above 0")
    loss, derivatives = dispatch.implementation("distillation_loss", backend).forward(
        student.contiguous(),
        teacher.contiguous(),
        student_index.contiguous(),
        teacher_index.contiguous(),
        weight.contiguous(),
        student_temperature,
        student_temperature_value,
        teacher_temperature,
        with_gradient,
    )
    return loss, derivatives


@_forward.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    student_index: Tensor,
    teacher_index: Tensor,
    weight: Tensor,
    student_temperature: Tensor | None,
    student_temperature_value: float,
    teacher_temperature: float,
    with_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    rows, width = student.shape
    wide = torch.promote_types(student.dtype, torch.float32)
    return student.new_empty((), dtype=wide), student.new_empty(rows * width + 1 if with_gradient else 1, dtype=wide)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.shape, ctx.dtype = inputs[0].shape, inputs[0].dtype
    # Not differentiable, so that a second derivative raises an error instead of silently missing a term.
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)  # allocate no zeros as the gradient of the derivatives


def _backward(ctx: Any, d_loss: Tensor | None, _d_derivatives: None) -> tuple[Tensor | None, ...]:
    if d_loss is None:
        return (None,) * 10
    # The forward pass has computed all derivatives; only the product with the incoming gradient remains.
    (derivatives,) = ctx.saved_tensors
    scaled = d_loss * derivatives
    student = scaled[:-1].view(ctx.shape).to(ctx.dtype) if ctx.needs_input_grad[0] else None
    temperature = scaled[-1] if ctx.needs_input_grad[5] else None
    return student, None, None, None, None, temperature, None, None, None, None


_forward.register_autograd(_backward, setup_context=_setup_context)


def _check_range(name: str, index: Tensor, rows: int) -> None:
    if index.numel():
        low, high = (int(bound) for bound in index.aminmax())
        if low < 0 or high >= rows:
            raise ValueError(f"{name}: got indices from {low} to {high}, expected 0 to {rows - 1}")


def _check(
    student: Tensor,
    teacher: Tensor,
    student_index: Tensor,
    teacher_index: Tensor,
    weight: Tensor,
    student_temperature: float | Tensor,
    teacher_temperature: float,
) -> None:
    given = {
        "student": student,
        "teacher": teacher,
        "student_index": student_index,
        "teacher_index": teacher_index,
        "weight": weight,
    }
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: got {type(x).__name__}, expected a tensor")
    for name, rows in (("student", student), ("teacher", teacher)):
        if rows.dim() != 2 or not rows.is_floating_point():
            raise TypeError(f"{name}: got {rows.dtype} {list(rows.shape)}, expected floats of shape [rows, D]")
    if student.shape[1] != teacher.shape[1] or student.shape[1] == 0:
        raise ValueError(
            f"student and teacher: got widths {student.shape[1]} and {teacher.shape[1]}, expected one width above 0"
        )
    for name, index in (("student_index", student_index), ("teacher_index", teacher_index)):
        if index.dim() != 1 or index.dtype != torch.int64:
            raise TypeError(f"{name}: got {index.dtype} {list(index.shape)}, expected int64 [P]")
    if weight.dim() != 1 or not weight.is_floating_point():
        raise TypeError(f"weight: got {weight.dtype} {list(weight.shape)}, expected floats of shape [P]")
    if not student_index.shape == teacher_index.shape == weight.shape:
        raise ValueError(
            f"student_index, teacher_index and weight: got lengths {len(student_index)}, {len(teacher_index)} and "
            f"{len(weight)}, expected the same length"
        )
    if isinstance(student_temperature, Tensor):
        given["student_temperature"] = student_temperature
        if student_temperature.dim() != 0:
            raise ValueError(f"student_temperature: got shape {list(student_temperature.shape)}, expected a 0-d tensor")
    elif not isinstance(student_temperature, (int, float)):
        kind = type(student_temperature).__name__
        raise TypeError(f"student_temperature: got {kind}, expected a number or a 0-d tensor")
    elif student_temperature <= 0:
        raise ValueError(f"student_temperature: got {student_temperature}, expected a number above 0")
    if not isinstance(teacher_temperature, (int, float)):
        raise TypeError(f"teacher_temperature: got {type(teacher_temperature).__name__}, expected a number")
    if teacher_temperature <= 0:
        raise ValueError(f"teacher_temperature: got {teacher_temperature}, expected a number above 0")
    for name, tensor in given.items():
        if tensor.device != student.device:
            raise ValueError(
                f"{name}: got a tensor on {tensor.device}, expected {student.device}, the device of student"
            )
