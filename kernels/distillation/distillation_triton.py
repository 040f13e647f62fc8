"""The distillation loss in Triton: one program per student row, which finds its own pairs (no sort, no atomics)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from scenarioclip_fast.kernels.distillation.reference import SMALLEST_TARGET
from torch import Tensor

# Pair indices looked through at once.
SCAN = 1024


@triton.jit
def _softmax(row, temperature, inside):
    z = row / temperature
    # Infinities in a row would leave NaN in the softmax here as in torch; NaN itself passes through the sum.
    largest = tl.max(tl.where(inside, z, -float("inf")), 0)
    e = tl.where(inside, tl.exp(z - largest), 0.0)
    total = tl.sum(e, 0)
    return e / total, largest + tl.log(total)


@triton.jit
def distillation_rows(
    student,  # [S, D]
    teacher,  # [T, D]
    student_index,  # [P]
    teacher_index,  # [P]
    weight,  # [P]
    student_temperature,  # []
    loss_out,  # [S]
    gradient_out,  # [S, D]
    d_temperature_out,  # [S]
    teacher_temperature,
    pairs,
    width,
    smallest: tl.constexpr,
    with_gradient: tl.constexpr,
    WIDTH: tl.constexpr,
    SCAN: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    temperature = tl.load(student_temperature).to(tl.float32)
    row = tl.load(student + s * width + columns, mask=inside, other=0.0).to(tl.float32)
    q, log_sum = _softmax(row, temperature, inside)
    mean = tl.sum(tl.where(inside, q * row, 0.0), 0) / temperature

    loss = temperature * 0.0
    d_temperature = temperature * 0.0
    gradient = tl.zeros([WIDTH], tl.float32)
    for first in range(0, pairs, SCAN):
        own = first + tl.arange(0, SCAN)
        mine = tl.load(student_index + own, mask=own < pairs, other=-1) == s
        count = tl.sum(mine.to(tl.int32), 0)
        last = first - 1
        for _ in range(count):
            pair = tl.min(tl.where(mine & (own > last), own, pairs), 0)
            last = pair
            t = tl.load(teacher_index + pair)
            scale = tl.load(weight + pair).to(tl.float32) / width
            target = tl.load(teacher + t * width + columns, mask=inside, other=0.0).to(tl.float32)
            p, _ignored = _softmax(target, teacher_temperature, inside)
            # A comparison, not a maximum: NaN has to stay NaN.
            p = tl.where(inside, tl.where(p < smallest, smallest, p), 0.0)
            mass = tl.sum(p, 0)
            entropy = tl.sum(tl.where(inside, p * tl.log(tl.where(inside, p, 1.0)), 0.0), 0)
            cross = tl.sum(tl.where(inside, p * row, 0.0), 0) / temperature
            kl = entropy - cross + mass * log_sum
            loss += scale * temperature * temperature * kl
            d_temperature += scale * temperature * (2 * kl + cross - mass * mean)
            gradient += scale * temperature * (mass * q - p)
    tl.store(loss_out + s, loss)
    tl.store(d_temperature_out + s, d_temperature)
    if with_gradient:
        tl.store(gradient_out + s * width + columns, gradient, mask=inside)


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
    """As in reference.py; contiguous inputs."""
    rows, width = student.shape
    loss = torch.empty(rows, dtype=torch.float32, device=student.device)
    d_temperature = torch.empty_like(loss)
    d_student = torch.empty(rows if with_gradient else 0, width, dtype=torch.float32, device=student.device)
    if rows:
        distillation_rows[(rows,)](
            student,
            teacher,
            student_index,
            teacher_index,
            weight,
            student_temperature,
            loss,
            d_student,
            d_temperature,
            teacher_temperature,
            student_index.shape[0],
            width,
            smallest=SMALLEST_TARGET,
            with_gradient=with_gradient,
            WIDTH=triton.next_power_of_2(width),
            SCAN=SCAN,
            num_warps=4,
        )
    return loss, d_student, d_temperature
