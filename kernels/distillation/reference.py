"""The distillation loss in plain PyTorch: the reference for the other backends."""

from __future__ import annotations

import torch
from torch import Tensor

# The published clamp of the teacher's probabilities, without renormalisation.
SMALLEST_TARGET = 1e-8


def distillation_loss(
    student: Tensor,  # [S, D]
    teacher: Tensor,  # [T, D]
    student_index: Tensor,  # [P] int64
    teacher_index: Tensor,  # [P] int64
    weight: Tensor,  # [P]
    student_temperature: Tensor,  # []
    teacher_temperature: float,
) -> Tensor:  # []
    """sum_p weight_p T_s^2 / D sum_j p_j (ln p_j - ln q_j), differentiable, from the definition."""
    wide = _wide(student)
    target = _targets(teacher.detach().to(wide), teacher_temperature)
    log_q = (student.to(wide) / student_temperature).log_softmax(-1)
    p, q = target[teacher_index], log_q[student_index]
    kl = (p * (p.log() - q)).mean(-1)
    return (weight.to(wide) * kl).sum() * student_temperature.to(wide) ** 2


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
    """The loss [] and its derivatives in one tensor: d student [S * D], if requested, then d T_s [1].

    T_s is `student_temperature` or, where that is None, `student_temperature_value`.
    """
    wide = _wide(student)
    rows, width = student.shape
    s = student.to(wide)
    if student_temperature is None:
        temperature = s.new_tensor(student_temperature_value)
    else:
        temperature = student_temperature.to(wide)
    target = _targets(teacher.to(wide), teacher_temperature)
    z = s / temperature
    log_q = z.log_softmax(-1)
    mass = target.sum(-1)
    entropy = (target * target.log()).sum(-1)

    p, weight = target[teacher_index], weight.to(wide) / width
    cross = (p * z[student_index]).sum(-1)
    log_sum = z.logsumexp(-1)[student_index]
    mean = (log_q.exp() * z).sum(-1)[student_index]
    kl = entropy[teacher_index] - cross + mass[teacher_index] * log_sum
    loss = (weight * kl).sum() * temperature**2
    d_temperature = (weight * temperature * (2 * kl + cross - mass[teacher_index] * mean)).sum()
    if not with_gradient:
        return loss, d_temperature[None]
    # Sums over pairs grouped by student row; a row without pairs gets zero.
    target_sums = s.new_zeros(rows, width).index_add(0, student_index, weight[:, None] * p)
    mass_sums = s.new_zeros(rows).index_add(0, student_index, weight * mass[teacher_index])
    # A row without pairs may hold any values, including infinities, and 0 x NaN must not become a gradient.
    q = torch.where(mass_sums[:, None] == 0, 0, log_q.exp())
    d_student = temperature * (mass_sums[:, None] * q - target_sums)
    return loss, torch.cat([d_student.flatten(), d_temperature[None]])


def _targets(teacher: Tensor, temperature: float) -> Tensor:
    return (teacher / temperature).softmax(-1).clamp_min(SMALLEST_TARGET)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
