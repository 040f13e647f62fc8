"""ema_update_ over the trainable weights of one level at ViT-B/32, against a loop over parameters.

Run: make bench, or: pytest benchmarks/bench_ema.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scenarioclip_fast.benchmarks.timing import counted, device_for, sized, timed
from torch import Tensor

from scenarioclip_fast.ops import ema_update_

DECAY = 0.9995
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Widths of the trainable blocks. Each block has four W x W attention matrices, two MLP matrices, biases and two norms.
WIDTHS = sized([768] * 6 + [512] * 2, [32] * 8)


def tensors(device: str, seed: int) -> list[Tensor]:
    g = torch.Generator(device_for(device)).manual_seed(seed)
    shapes = [
        shape
        for w in WIDTHS
        for shape in (
            (3 * w, w),
            (3 * w,),
            (w, w),
            (w,),
            (4 * w, w),
            (4 * w,),
            (w, 4 * w),
            (w,),
            (w,),
            (w,),
            (w,),
            (w,),
        )
    ]
    return [torch.randn(shape, generator=g, device=g.device) for shape in shapes]


def loop(teacher: list[Tensor], student: list[Tensor], decay: float) -> None:
    """As in the published code: parameter by parameter."""
    for average, weight in zip(teacher, student, strict=True):
        average.mul_(decay).add_(weight, alpha=1 - decay)


FORMS: dict[str, Callable[[list[Tensor], list[Tensor], float], None]] = {"loop": loop, "ours: foreach": ema_update_}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS)
def test_update(benchmark: Any, form: str, device: str) -> None:
    teacher, student = tensors(device, 0), tensors(device, 1)
    # Checked before timing, to one rounding of float32.
    expected_values = [DECAY * t.double() + (1 - DECAY) * s.double() for t, s in zip(teacher, student, strict=True)]
    FORMS[form](teacher, student, DECAY)
    for got, expected in zip(teacher, expected_values, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2e-7, atol=2e-7)

    benchmark.group = f"ema update, {sum(t.numel() for t in teacher) / 1e6:.0f} million weights, {device}"
    # Per weight: teacher read and written, student read; two multiplications and an addition.
    weights = sum(t.numel() for t in teacher)
    counted(benchmark, device, bytes=3 * 4 * weights, operations=3 * weights)
    timed(benchmark, lambda: FORMS[form](teacher, student, DECAY), device, rounds=10)
