"""Every CUDA kernel once, forward and backward, on inputs small enough for compute-sanitizer.

Run: compute-sanitizer --tool memcheck --error-exitcode 9 python benchmarks/sanitize.py    (and --tool racecheck)
"""

from __future__ import annotations

import torch

from scenarioclip_fast.data import Views, generate_scenes
from scenarioclip_fast.ops import distillation_loss, focused_region, render_views


def main() -> None:
    scenes = list(generate_scenes(3, seed=0))
    images = [scene.image.cuda() for scene in scenes]  # type: ignore[union-attr]
    for object_view in ("masked", "crop"):
        for train in (False, True):
            views = Views.of_scenes(scenes, object_view=object_view, train=train)
            render_views(images, views, size=33, dtype=torch.bfloat16, backend="cuda")
    first = scenes[0]
    masks = [o.mask.cuda() for o in first.objects[:2]]  # type: ignore[union-attr]
    focused_region(images[0], *masks, backend="cuda")

    student = torch.randn(37, 123, device="cuda", requires_grad=True)
    temperature = torch.tensor(0.07, device="cuda", requires_grad=True)
    index = torch.arange(37, device="cuda")
    weight = torch.full((37,), 0.1, device="cuda")
    teacher = torch.randn(5, 123, device="cuda")
    loss = distillation_loss(
        student, teacher, index, index % 5, weight, student_temperature=temperature, backend="cuda"
    )
    loss.backward()
    torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    main()
