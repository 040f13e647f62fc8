"""Bytes and operations of the roofline, checked on small cases counted by hand."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from scenarioclip_fast.benchmarks import bench_contrastive, bench_distillation, bench_views
from scenarioclip_fast.kernels.contrastive import reference
from torch.utils.flop_counter import FlopCounterMode

from scenarioclip_fast.data import Relation, Scene, SceneObject, Views, rle


def scene() -> Scene:
    mask = torch.zeros(80, 120, dtype=torch.bool)
    mask[10:30, 20:60] = True
    objects = [
        SceneObject("a", (20, 10, 60, 30), rle.encode(mask)),
        SceneObject("b", (20, 10, 60, 30), rle.encode(mask)),
    ]
    return Scene("x", torch.zeros(80, 120, 3, dtype=torch.uint8), "none", objects, [Relation(0, "on", 1)])


@pytest.mark.parametrize(
    ("kind", "read", "operations"),
    [
        # 80 x 80 of 120 x 80 is visible, at 40 pixels: f = 2, so 8 taps.
        ("global", 3 * 80 * 80, 3 * (2 * 80 * 40 * 8 + 2 * 40 * 40 * 8 + 2 * 40 * 40)),
        # Two boxes of 40 x 20, which are 20 x 10 in the view; pixels outside are neither read nor resized.
        ("object", 3 * 2 * 40 * 20, 2 * 3 * (2 * 20 * 20 * 8 + 2 * 20 * 10 * 8 + 2 * 40 * 40)),
        # Two masks of 1,200 bytes; the blur is two passes of 17 taps over the three colours.
        (
            "relation",
            3 * 80 * 80 + 2 * 80 * 120 // 8,
            3 * (2 * 80 * 40 * 8 + 2 * 40 * 40 * 8 + 2 * 40 * 40) + 20 * 80 * 80 + 3 * 2 * 2 * 17 * 80 * 80,
        ),
    ],
)
def test_views(kind: str, read: int, operations: int) -> None:
    views = Views.of_scenes([scene()])
    views = views.select(views.kind == bench_views.KINDS[kind])
    pixels = 40 * 40 * len(views)
    assert bench_views.bytes_to_move([scene()], views, pixels, 4) == read + pixels * 3 * 4
    assert bench_views.operations(views, 40) == operations


def test_distillation() -> None:
    batch = bench_distillation.batch("cpu")
    s, t, p, d = 1006, 128, 1006, 512
    assert bench_distillation.bytes_to_move(batch) == 4 * (2 * s + t) * d + (8 + 8 + 4) * p
    assert bench_distillation.operations(batch) == 5 * (s + t) * d + 6 * p * d


def test_contrastive() -> None:
    phases = {phase: bench_contrastive.minimum_cost(phase) for phase in ("forward", "backward", "forward + backward")}
    # The minimum in kernels/contrastive/README.md: four products, one forward and three backward.
    assert [products for _, products in phases.values()] == [1, 3, 4]
    assert [numbers for numbers, _ in phases.values()] == [2, 4, 6]


@pytest.mark.parametrize("form", bench_contrastive.PRODUCTS)
def test_bare_products(form: str) -> None:
    """Operations match PyTorch's count of the calls, and 4 x 2 N U D for the four products."""
    counts: dict[str, float] = {}
    case = bench_contrastive.Case("products", form, "cpu", 100, 32)
    benchmark = SimpleNamespace(extra_info=counts, group=None, pedantic=lambda run, **_: run())
    with patch.object(bench_contrastive.Products, "block_side", staticmethod(lambda _: 48)):
        bench_contrastive.measure_products(benchmark, case)
        products = bench_contrastive.Products(torch.ones(100, 32), torch.ones(100, 32))
    with FlopCounterMode(display=False) as counter:
        products.named(form)[1]()
    assert counts["operations"] == counter.get_total_flops()
    if form == bench_contrastive.FOUR:
        assert counts["operations"] == 4 * 2 * 100 * 100 * 32
        assert counts["bytes"] == 6 * 100 * 32 * 4
        assert benchmark.group == "contrastive, forward + backward, 100 x 100 x 32, cpu"
    else:
        assert counts["bytes"] >= (100 * 100 + 2 * 100 * 32) * 4  # both operands and the result
        assert benchmark.group == "contrastive, bare products, 100 x 100 x 32, cpu"


def test_peak_memory_includes_memory_cached_by_the_allocator() -> None:
    """Memory that the allocator kept and reuses counts, too."""

    def run() -> None:
        torch.ones(6 << 20)  # 24 MiB, which glibc caches after a few allocations

    for _ in range(3):
        run()
    peak = bench_contrastive.peak_memory(run, "cpu")
    if peak is None:
        pytest.skip("this system does not report peak memory")
    assert 23 < peak < 40  # other allocations may come and go


@pytest.mark.parametrize("texts", [None, 12])
def test_exact_loss_matches_the_n_by_n_form(texts: int | None) -> None:
    leaves = bench_contrastive.features(70, 16, "cpu", texts=texts)
    image, text, scale = (t.detach().double().requires_grad_() for t in leaves)
    own = bench_contrastive.texts_of(70, texts or 70, "cpu")
    assert len(own.unique()) == len(text)
    loss = reference.naive_loss(image, text[own] if texts else text, scale)
    expected = [loss.detach(), *torch.autograd.grad(loss, (image, text, scale))]
    torch.testing.assert_close(bench_contrastive.exact(70, 16, "cpu", texts=texts), expected)
