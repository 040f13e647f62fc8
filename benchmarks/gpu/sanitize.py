"""Runs every kernel once, forward and backward, on inputs small enough for compute-sanitizer.

Run: export PYTHONPATH=benchmarks
     compute-sanitizer --tool memcheck --error-exitcode 9 python -m gpu.sanitize cuda triton
     compute-sanitizer --tool racecheck --kernel-name-exclude kns=nvjet --error-exitcode 9 python -m gpu.sanitize cuda

racecheck covers only the handwritten kernels: Triton inserts its barriers itself, and cuBLAS's kernels, in which it
reports hazards on Hopper, are not ours.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from gpu import start_up
from scenarioclip_fast.benchmarks.timing import backend_for, device_for, synchronize

from scenarioclip_fast.data import Views, generate_scenes
from scenarioclip_fast.dispatch import unavailable_reason
from scenarioclip_fast.ops import (
    add_layer_norm,
    contrastive_loss,
    distillation_loss,
    focused_region,
    layer_norm,
    quick_gelu,
    render_views,
    short_attention,
)

DEVICE = device_for("cuda")


def cuda() -> None:
    scenes = list(generate_scenes(3, seed=0))
    images = [scene.image.to(DEVICE) for scene in scenes]  # type: ignore[union-attr]
    for object_view in ("masked", "crop"):
        for train in (False, True):
            views = Views.of_scenes(scenes, object_view=object_view, train=train)
            render_views(images, views, size=33, dtype=torch.bfloat16, backend=backend_for("cuda"))
    first = scenes[0]
    masks = [o.mask.to(DEVICE) for o in first.objects[:2]]  # type: ignore[union-attr]
    focused_region(images[0], *masks, backend=backend_for("cuda"))

    distillation("cuda")
    if reason := unavailable_reason("contrastive_loss", backend_for("cuda"), DEVICE, "bfloat16"):
        print(f"contrastive_loss: left out: {reason}")
    else:
        contrastive("cuda", ((137, 70), (137, 137), (600, 8600)))
    synchronize("cuda")
    print("cuda: done")


def distillation(backend: str) -> None:
    student = torch.randn(37, 123, device=DEVICE, requires_grad=True)
    temperature = torch.tensor(0.07, device=DEVICE, requires_grad=True)
    index = torch.arange(37, device=DEVICE)
    weight = torch.full((37,), 0.1, device=DEVICE)
    teacher = torch.randn(5, 123, device=DEVICE)
    loss = distillation_loss(
        student,
        teacher,
        index,
        index % 5,
        weight,
        student_temperature=temperature,
        backend=backend_for(backend),
    )
    loss.backward()


def layers(backend: str) -> None:
    x, branch = (torch.randn(301, 123, device=DEVICE).bfloat16().requires_grad_() for _ in range(2))
    weight, bias, extra = (torch.randn(123, device=DEVICE, requires_grad=True) for _ in range(3))
    total, normed = add_layer_norm(x, branch, weight, bias, branch_bias=extra, backend=backend_for(backend))
    y = layer_norm(normed, weight, bias, dtype=torch.float32, backend=backend_for(backend))
    for given in (None, extra):
        total = total + quick_gelu(x, given, backend=backend_for(backend))
    (total.float() + y).sum().backward()
    qkv = torch.randn(500, 3 * 160, device=DEVICE).bfloat16().requires_grad_()
    short_attention(qkv, 2, length=50, backend=backend_for(backend)).float().square().sum().backward()
    starts = torch.tensor([0, 3, 3, 20, 21], device=DEVICE)
    z = short_attention(qkv[:21], 2, starts=starts, longest=17, causal=True, backend=backend_for(backend))
    z.float().square().sum().backward()


def contrastive(backend: str, sizes: Sequence[tuple[int, int]]) -> None:
    """With and without text indices; sizes that fit no tile; mean losses and losses per row, whose kernels differ."""
    for rows, texts in sizes:
        image, text = (
            torch.randn(n, 96, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for n in (rows, texts)
        )
        scale = torch.tensor(14.3, device=DEVICE, requires_grad=True)
        index = None if rows == texts else torch.randint(texts, (rows,), device=DEVICE)
        for reduction in ("mean", "none"):
            loss = contrastive_loss(
                image, text, scale, text_index=index, reduction=reduction, backend=backend_for(backend)
            )
            loss.sum().backward()
        synchronize("cuda")
        print(f"{backend}, {rows} x {texts}: done")


def triton() -> None:
    contrastive("triton", ((137, 70), (137, 137), (4500, 4300)))  # shared launches, and one large level by blocks
    distillation("triton")
    layers("triton")
    synchronize("cuda")
    print("triton: done")


def main() -> None:
    start_up.note()
    for part in sys.argv[1:] or ["cuda", "triton"]:
        {"cuda": cuda, "triton": triton}[part]()


if __name__ == "__main__":
    main()
