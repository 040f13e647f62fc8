"""The distillation loss in Triton: one program per student row, which finds the row's pairs without a sort."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .counter import counter
from .reference import SMALLEST_TARGET

# Pair indices scanned at a time.
SCAN = 1024
# Without a limit ptxas rounds the number of registers and spills one.
OPTIONS = {"num_warps": 4, "maxnreg": 128}


@triton.jit
def _softmax(row, inverse_temperature, inside):
    z = row * inverse_temperature
    # Infinities in a row give NaN in the softmax, as in torch; NaN propagates through the sum.
    largest = tl.max(tl.where(inside, z, -float("inf")), 0)
    e = tl.where(inside, tl.exp(z - largest), 0.0)
    total = tl.sum(e, 0)
    return e / total, largest + tl.log(total)


@triton.jit(do_not_specialize=["students", "pairs"])
def distillation(
    student,  # [S, D]
    teacher,  # [T, D]
    student_index,  # [P]
    teacher_index,  # [P]
    weight,  # [P]
    student_temperature,  # [], or None: use student_temperature_value
    loss_out,  # []
    derivatives_out,  # [S * D + 1], or [1] without the gradient
    shares,  # [2, S] scratch: contribution of each row to the loss and to d loss / d temperature
    finished,  # [] number of finished programs; 0 before and after the kernel
    student_temperature_value,
    teacher_temperature,
    students,
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
    temperature = student_temperature_value
    if student_temperature is not None:
        temperature = tl.load(student_temperature).to(tl.float32)
    inverse_temperature = 1 / temperature
    inverse_teacher_temperature = 1 / teacher_temperature
    # One program runs even without rows, to write zeros.
    inside = inside & (s < students)
    row = tl.load(student + s * width + columns, mask=inside, other=0.0).to(tl.float32)

    # Sums over the row's pairs, each weighted by w / D; factors of the row itself are applied at the end.
    mass = temperature * 0.0
    entropy = temperature * 0.0
    cross = temperature * 0.0
    targets = tl.zeros([WIDTH], tl.float32)
    found = 0
    for first in range(0, pairs, SCAN):
        candidates = first + tl.arange(0, SCAN)
        matches = tl.load(student_index + candidates, mask=candidates < pairs, other=-1) == s
        count = tl.sum(matches.to(tl.int32), 0)
        found += count
        last = first - 1
        for _ in range(count):
            pair = tl.min(tl.where(matches & (candidates > last), candidates, pairs), 0)
            last = pair
            t = tl.load(teacher_index + pair)
            scale = tl.load(weight + pair).to(tl.float32) / width
            target = tl.load(teacher + t * width + columns, mask=inside, other=0.0).to(tl.float32)
            p, _log_sum = _softmax(target, inverse_teacher_temperature, inside)
            # A comparison, not a maximum, so that NaN propagates.
            p = tl.where(inside, tl.where(p < smallest, smallest, p), 0.0)
            mass += scale * tl.sum(p, 0)
            entropy += scale * tl.sum(tl.where(inside, p * tl.log(tl.where(inside, p, 1.0)), 0.0), 0)
            cross += scale * tl.sum(tl.where(inside, p * row, 0.0), 0) * inverse_temperature
            targets += scale * p
    q, log_sum = _softmax(row, inverse_temperature, inside)
    mean = tl.sum(tl.where(inside, q * row, 0.0), 0) * inverse_temperature
    divergence = entropy - cross + mass * log_sum
    # A row without pairs may hold any values, including infinities.
    if with_gradient:
        gradient = tl.where(found > 0, temperature * (mass * q - targets), 0.0)
        tl.store(derivatives_out + s * width + columns, gradient, mask=inside)
    loss = tl.where(found > 0, temperature * temperature * divergence, 0.0)
    d_temperature = tl.where(found > 0, temperature * (2 * divergence + cross - mass * mean), 0.0)
    tl.store(shares + s, loss, mask=s < students)
    tl.store(shares + students + s, d_temperature, mask=s < students)

    # The last program to finish adds up the contributions in row order.
    tl.debug_barrier()  # the atomic publishes the stores of the whole program
    programs = tl.num_programs(0)
    if tl.atomic_add(finished, 1) == programs - 1:
        total = tl.zeros([SCAN], tl.float64)
        d_total = tl.zeros([SCAN], tl.float64)
        for first in range(0, students, SCAN):
            rows = first + tl.arange(0, SCAN)
            # From L2: other programs have written them.
            total += tl.load(shares + rows, mask=rows < students, other=0.0, cache_modifier=".cg")
            d_total += tl.load(shares + students + rows, mask=rows < students, other=0.0, cache_modifier=".cg")
        last_derivative = derivatives_out
        if with_gradient:
            last_derivative += students.to(tl.int64) * width
        tl.store(loss_out, tl.sum(total, 0).to(tl.float32))
        tl.store(last_derivative, tl.sum(d_total, 0).to(tl.float32))
        tl.store(finished, 0)


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
    finished: Tensor | None = None,  # [] int32, 0 before and after; None: the counter of the current stream
) -> tuple[Tensor, Tensor]:
    """As in reference.py, for contiguous inputs."""
    finished = counter(student.device) if finished is None else finished
    rows, width = student.shape
    loss = torch.empty((), dtype=torch.float32, device=student.device)
    derivatives = loss.new_empty(rows * width + 1 if with_gradient else 1)
    with torch.cuda.device_of(student):  # Triton launches on the current device, not on that of its arguments
        distillation[(max(rows, 1),)](
            student,
            teacher,
            student_index,
            teacher_index,
            weight,
            student_temperature,
            loss,
            derivatives,
            loss.new_empty(2 * rows),
            finished,
            student_temperature_value,
            teacher_temperature,
            rows,
            student_index.shape[0],
            width,
            smallest=SMALLEST_TARGET,
            with_gradient=with_gradient,
            WIDTH=triton.next_power_of_2(width),
            SCAN=SCAN,
            **OPTIONS,
        )
    return loss, derivatives
