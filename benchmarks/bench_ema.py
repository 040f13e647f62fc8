"""ema_update_ over what ViT-B/32's freezing leaves trainable of one level, against a loop over parameters.

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
# A block of width W: four W x W matrices of the attention, two of the MLP, their biases, two norms.
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
    """As published: parameter by parameter."""
    for mine, theirs in zip(teacher, student, strict=True):
        mine.mul_(decay).add_(theirs, alpha=1 - decay)


WAYS: dict[str, Callable[[list[Tensor], list[Tensor], float], None]] = {"loop": loop, "ours: foreach": ema_update_}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", WAYS)
def test_update(benchmark: Any, way: str, device: str) -> None:
    teacher, student = tensors(device, 0), tensors(device, 1)
    # No time is reported for a wrong result: one rounding of float32 apart.
    expected = [DECAY * t.double() + (1 - DECAY) * s.double() for t, s in zip(teacher, student, strict=True)]
    WAYS[way](teacher, student, DECAY)
    for got, wanted in zip(teacher, expected, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=2e-7, atol=2e-7)

    benchmark.group = f"ema update, {sum(t.numel() for t in teacher) / 1e6:.0f} million weights, {device}"
    # The teacher is read and written, the student read; a multiplication and an addition a weight, one more to
    # weigh the student's.
    weights = sum(t.numel() for t in teacher)
    counted(benchmark, device, bytes=3 * 4 * weights, operations=3 * weights)
    timed(benchmark, lambda: WAYS[way](teacher, student, DECAY), device, rounds=10)
