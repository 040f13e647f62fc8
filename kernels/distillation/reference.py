"""The distillation loss in plain torch: the law that the other backends are held to."""

from __future__ import annotations

import torch
from torch import Tensor

# The published clamp of the teacher's probabilities; they are not normalised again afterwards.
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


def forward_rows(
    student: Tensor,  # [S, D]
    teacher: Tensor,  # [T, D]
    student_index: Tensor,  # [P] int64
    teacher_index: Tensor,  # [P] int64
    weight: Tensor,  # [P]
    student_temperature: Tensor,  # []
    teacher_temperature: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each student row's loss [S], its gradient [S, D] (or [0, D]) and its derivative by the temperature [S]."""
    wide = _wide(student)
    rows, width = student.shape
    s, temperature = student.to(wide), student_temperature.to(wide)
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
    # Written as sums over pairs grouped by student row; a row without pairs gets zero.
    loss = s.new_zeros(rows).index_add(0, student_index, weight * kl * temperature**2)
    by_temperature = weight * temperature * (2 * kl + cross - mass[teacher_index] * mean)
    d_temperature = s.new_zeros(rows).index_add(0, student_index, by_temperature)
    if not with_gradient:
        return loss, s.new_empty(0, width), d_temperature
    pull = s.new_zeros(rows, width).index_add(0, student_index, weight[:, None] * p)
    push = s.new_zeros(rows).index_add(0, student_index, weight * mass[teacher_index])
    # A row without pairs may hold anything, infinities too: it must not turn 0 x NaN into a gradient.
    q = torch.where(push[:, None] == 0, 0, log_q.exp())
    return loss, temperature * (push[:, None] * q - pull), d_temperature


def _targets(teacher: Tensor, temperature: float) -> Tensor:
    return (teacher / temperature).softmax(-1).clamp_min(SMALLEST_TARGET)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
