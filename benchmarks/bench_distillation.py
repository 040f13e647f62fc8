"""distillation_loss, forward and backward, at the size of a real batch, against the published implementation.

`test_forward_backward` times the op on the vision terms, `test_all_terms` DistillationLoss on all four terms of a
batch. On a GPU both report device time: in a training step the host runs ahead, so the loss costs its device time. The
host time of the many small launches shows in "as launched". The Python loops over pairs take too long to launch for
that: their samples include the host time.

Run: make bench, or: pytest benchmarks/bench_distillation.py
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scenarioclip_fast.benchmarks import baseline
from scenarioclip_fast.benchmarks.timing import backend_for, counted, device_for, sized, timed
from scenarioclip_fast.kernels.distillation import reference
from torch import Tensor

from scenarioclip_fast.dispatch import unavailable_reason
from scenarioclip_fast.losses import DistillationLoss
from scenarioclip_fast.ops import distillation_loss

SCENES = 128
OBJECTS, RELATIONS, WIDTH = sized((684, 322, 512), (40, 20, 32))
TEMPERATURE = 0.07
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Forms in the README come first, in case the run is cut short.
BACKENDS = ("cuda", "triton", "cpu", "reference")


def batch(device: str) -> dict[str, Tensor]:
    """The vision terms: each object's and relation's image embedding learns from its scene's global one."""
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
    return {name: t.to(device_for(device)) for name, t in tensors.items()}


def python_loop(b: dict[str, Tensor]) -> Tensor:
    """As in the published code: one KLDivLoss call per pair, on 1-D inputs."""
    kl = torch.nn.KLDivLoss(reduction="batchmean")
    total = b["student"].new_zeros(())
    for s, t, w in zip(b["student_index"].tolist(), b["teacher_index"].tolist(), b["weight"].tolist(), strict=True):
        p = (b["teacher"][t] / TEMPERATURE).softmax(-1).clamp_min(reference.SMALLEST_TARGET)
        total = total + w * TEMPERATURE**2 * kl((b["student"][s] / TEMPERATURE).log_softmax(-1), p)
    return total


def batched(b: dict[str, Tensor]) -> Tensor:
    """The same loss vectorised in plain PyTorch."""
    return reference.distillation_loss(
        **b, student_temperature=torch.tensor(TEMPERATURE), teacher_temperature=TEMPERATURE
    )


FORMS: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
    "python loop": python_loop,
    **{
        f"ours: {b}": lambda x, b=b: distillation_loss(**x, backend=backend_for(b))  # type: ignore[misc]
        for b in BACKENDS
    },
    "batched torch": batched,
}


def skip_unavailable(form: str, device: str) -> None:
    """Skip backends that cannot run here."""
    if form.startswith("ours"):
        backend = backend_for(form.removeprefix("ours: "))
        if reason := unavailable_reason("distillation_loss", backend, device_for(device)):
            pytest.skip(reason)


def few_rounds(device: str) -> dict[str, int]:
    """For the loop over pairs: on a GPU some 20,000 launches per call; the check has warmed it up."""
    return {"rounds": 2, "warmup_rounds": 0} if device == "cuda" else {"rounds": 3}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS)
def test_forward_backward(benchmark: Any, form: str, device: str) -> None:
    skip_unavailable(form, device)
    b = batch(device)
    student = b["student"].requires_grad_()

    def run() -> Tensor:
        (gradient,) = torch.autograd.grad(FORMS[form](b), student)
        return gradient

    exact_student = student.detach().double().requires_grad_()
    exact_inputs = {**b, "student": exact_student}
    exact = torch.autograd.grad(batched(exact_inputs), exact_student)[0]
    # Checked before timing. float32 sums of 512 terms: an error of 1e-5 of the largest is expected.
    error = (run().double() - exact).abs().max() / exact.abs().max()
    assert error < 2e-5, f"{form}: the gradient is off by {error:.1e}"

    benchmark.group = f"distillation forward + backward, {SCENES} scenes, {device}"
    counted(benchmark, device, bytes=bytes_to_move(b), operations=operations(b))
    timed(benchmark, run, device, **(few_rounds(device) if form == "python loop" else {"rounds": sized(30, 3)}))


def bytes_to_move(b: dict[str, Tensor]) -> int:
    """Student, teacher, indices, weights and the student's gradient once: (2 S + T) D numbers and 3 P."""
    return b["student"].nbytes + sum(t.nbytes for t in b.values())


def operations(b: dict[str, Tensor]) -> int:
    """Per coordinate of a row, 5 for the softmax (scale, exponential, sum, division, clamp); per coordinate of a pair,
    6 (entropy, cross term and two gradient terms, counted as multiply-adds).
    """
    rows, pairs = len(b["student"]) + len(b["teacher"]), len(b["student_index"])
    return WIDTH * (5 * rows + 6 * pairs)


TEXTS = sized((100, 130, 300), (10, 12, 14))  # distinct texts of a batch: captions, object names, relations


def embeddings(device: str) -> SimpleNamespace:
    """Inputs as from the model: layernormed rows, and a realistic number of items per scene."""
    g = torch.Generator().manual_seed(0)

    def rows(n: int) -> Tensor:
        return torch.nn.functional.layer_norm(torch.randn(n, WIDTH, generator=g), (WIDTH,)).to(there)

    there = device_for(device)
    items = (SCENES, OBJECTS, RELATIONS)
    scenes = [torch.randint(SCENES, (n,), generator=g).sort().values.to(there) for n in items[1:]]
    return SimpleNamespace(
        image=[rows(n).requires_grad_() for n in items],
        text=[rows(n).requires_grad_() for n in TEXTS],
        text_index=[torch.randint(u, (n,), generator=g).to(there) for n, u in zip(items, TEXTS, strict=True)],
        object_scene=scenes[0],
        relation_scene=scenes[1],
        action_scene=None,
        teacher_image=rows(SCENES),
        teacher_object_text=rows(TEXTS[1]),
        teacher_relation_text=rows(TEXTS[2]),
        logit_scale=torch.tensor(1 / TEMPERATURE, device=there).log().requires_grad_(),
    )


def scene_by_scene(e: SimpleNamespace) -> Tensor:
    """The baseline's loss, with one text row per item: it embeds repeated texts again."""
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


def value_and_gradients(
    loss: Callable[[SimpleNamespace], Tensor], e: SimpleNamespace, scale: Tensor
) -> tuple[Tensor, ...]:
    value = loss(e)
    return value.detach(), *torch.autograd.grad(value, [e.image[1], e.image[2], e.text[0], scale])


@functools.cache
def expected_for_all_terms(device: str) -> tuple[Tensor, ...]:
    e = embeddings(device)
    return value_and_gradients(scene_by_scene, e, e.logit_scale)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["baseline", *(f"ours: {b}" for b in BACKENDS)])
def test_all_terms(benchmark: Any, form: str, device: str) -> None:
    skip_unavailable(form, device)
    e = embeddings(device)
    loss: Callable[[Any], Tensor] = scene_by_scene
    scale = e.logit_scale
    if form != "baseline":
        backend = backend_for(form.removeprefix("ours: "))
        loss = module = DistillationLoss(learn_temperature=True, backend=backend).to(device_for(device))
        scale = module.logit_scale

    # Checked before timing. float32 sums of 2,012 pairs and 512 terms, in another order.
    for got, expected in zip(value_and_gradients(loss, e, scale), expected_for_all_terms(device), strict=True):
        error = (got - expected).abs().max() / expected.abs().max()
        assert error < 5e-5, f"{form}: off by {error:.1e}"

    benchmark.group = f"all four distillation terms, forward + backward, {SCENES} scenes, {device}"
    rounds = few_rounds(device) if form == "baseline" else {"rounds": sized(50, 3)}
    timed(benchmark, lambda: value_and_gradients(loss, e, scale), device, **rounds)
