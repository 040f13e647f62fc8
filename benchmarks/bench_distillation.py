"""distillation_loss, forward and backward, at the size of a real batch, against the published way of computing it.

Run: make bench, or: pytest benchmarks/bench_distillation.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scenarioclip_fast.kernels.distillation import reference
from torch import Tensor

from scenarioclip_fast.dispatch import why_not
from scenarioclip_fast.ops import distillation_loss

SCENES, OBJECTS, RELATIONS, WIDTH = 128, 684, 322, 512
TEMPERATURE = 0.07
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def batch(device: str) -> dict[str, Tensor]:
    """Each object's and each relation's image embedding is taught by its scene's global one (the vision terms)."""
    g = torch.Generator().manual_seed(0)
    scene = torch.cat([torch.arange(n) % SCENES for n in (OBJECTS, RELATIONS)])
    counts = torch.cat([torch.bincount(part, minlength=SCENES)[part] for part in scene.split([OBJECTS, RELATIONS])])
    tensors = {
        "student": torch.randn(OBJECTS + RELATIONS, WIDTH, generator=g),
        "teacher": torch.randn(SCENES, WIDTH, generator=g),
        "student_index": torch.arange(OBJECTS + RELATIONS),
        "teacher_index": scene,
        "weight": 1 / (counts * SCENES),
    }
    return {name: t.to(device) for name, t in tensors.items()}


def python_loop(b: dict[str, Tensor]) -> Tensor:
    """As published: one KLDivLoss call a pair, on 1-D inputs."""
    kl = torch.nn.KLDivLoss(reduction="batchmean")
    total = b["student"].new_zeros(())
    for s, t, w in zip(b["student_index"].tolist(), b["teacher_index"].tolist(), b["weight"].tolist(), strict=True):
        p = (b["teacher"][t] / TEMPERATURE).softmax(-1).clamp_min(reference.SMALLEST_TARGET)
        total = total + w * TEMPERATURE**2 * kl((b["student"][s] / TEMPERATURE).log_softmax(-1), p)
    return total


def batched(b: dict[str, Tensor]) -> Tensor:
    """The same in a handful of calls: what one would write in plain torch."""
    return reference.distillation_loss(
        **b, student_temperature=torch.tensor(TEMPERATURE), teacher_temperature=TEMPERATURE
    )


WAYS: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
    "python loop": python_loop,
    "batched torch": batched,
    **{
        f"ours: {b}": lambda x, b=b: distillation_loss(**x, backend=b)  # type: ignore[misc]
        for b in ("reference", "cpu", "triton", "cuda")
    },
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", WAYS)
def test_forward_backward(benchmark: Any, way: str, device: str) -> None:
    backend = way.removeprefix("ours: ")
    if way.startswith("ours") and (reason := why_not("distillation_loss", backend, device)):
        pytest.skip(reason)
    b = batch(device)
    student = b["student"].requires_grad_()

    def run() -> Tensor:
        (gradient,) = torch.autograd.grad(WAYS[way](b), student)
        if device == "cuda":
            torch.cuda.synchronize()
        return gradient

    exact_student = student.detach().double().requires_grad_()
    exact_inputs = {**b, "student": exact_student}
    exact = torch.autograd.grad(batched(exact_inputs), exact_student)[0]
    # No time is reported for a wrong result. float32 sums of 512 terms: 1e-5 of the largest is what one must expect.
    error = (run().double() - exact).abs().max() / exact.abs().max()
    assert error < 2e-5, f"{way}: the gradient is off by {error:.1e}"

    benchmark.group = f"distillation forward + backward, {SCENES} scenes, {device}"
    benchmark.pedantic(run, rounds=3 if way == "python loop" else 30, warmup_rounds=1)
