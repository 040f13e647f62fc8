"""distillation_loss, forward and backward, at the size of a real batch, against the published way of computing it.

`test_forward_backward` times the op on the vision terms, `test_all_terms` DistillationLoss on all four of a batch.

Run: make bench, or: pytest benchmarks/bench_distillation.py
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import baseline
import pytest
import torch
from scenarioclip_fast.kernels.distillation import reference
from timing import counted, timed
from torch import Tensor

from scenarioclip_fast.dispatch import why_not
from scenarioclip_fast.losses import DistillationLoss
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
    counted(benchmark, device, bytes=bytes_to_move(b), operations=operations(b))
    timed(benchmark, run, device, rounds=3 if way == "python loop" else 30)


def bytes_to_move(b: dict[str, Tensor]) -> int:
    """Student, teacher, indices and weights once, the gradient of the student once: (2 S + T) D numbers and 3 P."""
    return b["student"].nbytes + sum(t.nbytes for t in b.values())


def operations(b: dict[str, Tensor]) -> int:
    """A coordinate of a row takes 5 for its softmax (scale, exponential counted as one, sum, division, clamp), and of a
    pair 6 (entropy, product with the student's, and two terms of the gradient, a multiplication and an addition each).
    """
    rows, pairs = len(b["student"]) + len(b["teacher"]), len(b["student_index"])
    return WIDTH * (5 * rows + 6 * pairs)


TEXTS = (100, 130, 300)  # distinct ones of a batch: captions, object names, relations


def embeddings(device: str) -> SimpleNamespace:
    """What the model hands to the loss: rows as layernorms leave them, as many items a scene as scenes have."""
    g = torch.Generator().manual_seed(0)

    def rows(n: int) -> Tensor:
        return torch.nn.functional.layer_norm(torch.randn(n, WIDTH, generator=g), (WIDTH,)).to(device)

    items = (SCENES, OBJECTS, RELATIONS)
    scenes = [torch.randint(SCENES, (n,), generator=g).sort().values.to(device) for n in items[1:]]
    return SimpleNamespace(
        image=[rows(n).requires_grad_() for n in items],
        text=[rows(n).requires_grad_() for n in TEXTS],
        text_index=[torch.randint(u, (n,), generator=g).to(device) for n, u in zip(items, TEXTS, strict=True)],
        object_scene=scenes[0],
        relation_scene=scenes[1],
        teacher_image=rows(SCENES),
        teacher_object_text=rows(TEXTS[1]),
        teacher_relation_text=rows(TEXTS[2]),
        logit_scale=torch.tensor(1 / TEMPERATURE, device=device).log().requires_grad_(),
    )


def scene_by_scene(e: SimpleNamespace) -> Tensor:
    """The baseline has a row for each item's text, since it embeds every text every time."""
    return baseline.distillation(
        dict(zip(baseline.LEVELS, e.image, strict=True)),
        e.text[0][e.text_index[0]],
        e.teacher_image,
        {"object": e.teacher_object_text[e.text_index[1]], "relation": e.teacher_relation_text[e.text_index[2]]},
        {
            level: torch.bincount(scene, minlength=SCENES).tolist()
            for level, scene in (("object", e.object_scene), ("relation", e.relation_scene))
        },
        e.logit_scale,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", ["baseline", "ours: reference", "ours: cpu", "ours: triton", "ours: cuda"])
def test_all_terms(benchmark: Any, way: str, device: str) -> None:
    backend = way.removeprefix("ours: ")
    if way.startswith("ours") and (reason := why_not("distillation_loss", backend, device)):
        pytest.skip(reason)
    e = embeddings(device)
    loss: Callable[[Any], Tensor] = scene_by_scene
    scale = e.logit_scale
    if way != "baseline":
        loss = module = DistillationLoss(learn_temperature=True, backend=backend).to(device)
        scale = module.logit_scale

    def run(loss: Callable[[Any], Tensor] = loss, scale: Tensor = scale) -> tuple[Tensor, ...]:
        value = loss(e)
        gradients = torch.autograd.grad(value, [e.image[1], e.image[2], e.text[0], scale])
        if device == "cuda":
            torch.cuda.synchronize()
        return value.detach(), *gradients

    # No time is reported for a wrong result. Sums of 2,012 pairs and 512 terms in float32, in another order.
    for got, expected in zip(run(), run(scene_by_scene, e.logit_scale), strict=True):
        error = (got - expected).abs().max() / expected.abs().max()
        assert error < 5e-5, f"{way}: off by {error:.1e}"

    benchmark.group = f"all four distillation terms, forward + backward, {SCENES} scenes, {device}"
    benchmark.pedantic(run, rounds=3 if way == "baseline" else 50, warmup_rounds=1)
