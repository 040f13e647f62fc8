"""The CPU backend of contrastive_loss with and without kept exponentials, with passes in C++ and in PyTorch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scenarioclip_fast.kernels.contrastive import contrastive_cpu, contrastive_cpu_native, reference
from scenarioclip_fast.kernels.contrastive.workspace import kept_levels, kept_size
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from scenarioclip_fast import native, use_workspace, workspace
from scenarioclip_fast.ops import contrastive_loss, multilevel_contrastive_loss
from scenarioclip_fast.ops.contrastive import log_sums
from scenarioclip_fast.ops.contrastive.op import contrastive_backward, contrastive_forward

needs_library = pytest.mark.skipif(native.unavailable_reason("cpu") is not None, reason="no compiled library")
PASSES = [pytest.param("C++", marks=needs_library), "PyTorch"]
GIB = 2.0**-30  # times bytes


@pytest.fixture(params=PASSES)
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with both implementations of the element-wise passes."""
    if request.param == "PyTorch":
        monkeypatch.setattr(contrastive_cpu_native, "_compiled", lambda scale: False)
    return str(request.param)


def features(n: int, u: int, d: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:  # [n, d], [u, d]
    g = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(n, d, generator=g), torch.randn(u, d, generator=g)


def gradients(loss: Callable[..., Tensor], *tensors: Tensor, upstream: float = 1.0) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value.sum() * upstream, leaves)]


def assert_near(found: list[Tensor], expected: list[Tensor], rtol: float) -> None:
    """Compare each tensor relative to its norm."""
    for f, e in zip(found, expected, strict=True):
        assert (f.double() - e.double()).norm() <= rtol * e.double().norm().clamp_min(1e-30)


def saved_sizes(call: Callable[[], Any]) -> list[int]:
    """The numbers of elements that autograd saves."""
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        call()
    return sizes


@pytest.mark.parametrize("n,u", [(1, 1), (33, 17), (150, 101), (64, 200)])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0, 2000.0])
def test_kept_and_recomputed_agree(passes: str, n: int, u: int, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With several partial tiles, and against float64; at scale 2000 sums underflow, and nothing kept can be used."""
    monkeypatch.setattr(contrastive_cpu, "ROWS", 48)
    monkeypatch.setattr(contrastive_cpu, "COLUMNS", 80)
    image, text = features(n, u)
    index = torch.arange(n) * 7 % u
    s = torch.tensor(scale)

    def loss(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        return contrastive_loss(x, y, s, text_index=index, backend="cpu")

    with use_workspace(0):
        recomputed = gradients(loss, image, text, s)
    with use_workspace(1):
        kept = gradients(loss, image, text, s)
    exact = gradients(lambda x, y, s: reference.naive_loss(x, y[index], s), image.double(), text.double(), s.double())
    # A float32 logit is off by its rounding, 6e-8 of the scale, and so is each exponential relative to itself. The loss
    # and gradients of single elements can be 0 up to that.
    limit = 1e-6 * max(scale, 10.0)
    sizes = [s, scale / n / image.norm(dim=1).min(), scale / n / text.norm(dim=1).min(), torch.tensor(1.0)]
    for one, other, x, size in zip(kept, recomputed, exact, sizes, strict=True):
        bound = limit * (x.norm() + (size if n == 1 or u == 1 else 0))
        assert (one - x).norm() <= bound and (other - x).norm() <= bound
        assert (one - other).norm() <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_budgets_choose_levels(passes: str, dtype: torch.dtype) -> None:
    """Levels of 4,000, 2,100 and 400 logits, for budgets that fit none, the last, the first and last, or all."""
    sizes = [(80, 50), (30, 70), (20, 20)]
    pairs = [features(n, u, seed=k) for k, (n, u) in enumerate(sizes)]
    images, texts = ([pair[k].to(dtype).requires_grad_() for pair in pairs] for k in range(2))
    indices = [torch.arange(n) % u for n, u in sizes]
    scales = [torch.tensor(s, requires_grad=True) for s in (5.0, 14.3, 90.0)]
    leaves = [*images, *texts, *scales]

    def losses() -> Tensor:
        return multilevel_contrastive_loss(images, texts, scales, text_indices=indices, backend="cpu")

    itemsize = 8 if dtype == torch.float64 else 4
    expected = None
    for logits, kept in ((0, 0), (399, 0), (400, 400), (4399, 4000), (4400, 4400), (6500, 6500), (10**6, 6500)):
        with use_workspace(logits * itemsize * GIB):
            assert kept == 0 or kept in saved_sizes(losses)
            assert max(saved_sizes(losses)) == max(kept, 80 * 24)
            value = losses()
            found = [value.detach(), *torch.autograd.grad(value.sum(), leaves)]
        expected = expected or found
        # Rounding of float32 logits, 6e-8 of a scale of 90, or of bfloat16 gradients.
        assert_near(found, expected, 1e-2 if dtype == torch.bfloat16 else 2e-5)


def test_kept_levels() -> None:
    assert kept_levels([10, 20, 5], [10, 20, 5], 4, 500) == [True, False, True]
    assert kept_levels([10, 20, 5], [10, 20, 5], 4, 0) == [False] * 3
    assert kept_levels([0, 3], [7, 3], 4, 36) == [True, True]
    assert kept_size([10, 20, 5], [10, 20, 5], 4, 500) == 125
    assert kept_size([10**6], [10**6], 4, 2**42) == 10**12


def test_use_workspace_nests_and_holds_in_every_thread() -> None:
    automatic = workspace.budget("cpu")
    assert automatic == 2**28
    seen: list[int] = []
    with use_workspace(1):
        with use_workspace(0.5):
            thread = threading.Thread(target=lambda: seen.append(workspace.budget("cpu")))
            thread.start()
            thread.join()
            assert seen == [2**29]
            assert workspace.budget("cuda") == 2**29
        assert workspace.budget("cpu") == 2**30
        with pytest.raises(KeyError), use_workspace(0):
            assert workspace.budget("cpu") == 0
            raise KeyError
        assert workspace.budget("cpu") == 2**30
    assert workspace.budget("cpu") == automatic


def test_contexts_of_threads_may_overlap() -> None:
    """The latest context that has not ended applies, in whichever order they end."""
    before = workspace.budget("cpu")
    first, second, third = use_workspace(0), use_workspace(1), use_workspace(0)
    for context in (first, second, third):
        context.__enter__()
    first.__exit__(None, None, None)
    assert workspace.budget("cpu") == 0
    third.__exit__(None, None, None)
    assert workspace.budget("cpu") == 2**30
    second.__exit__(None, None, None)
    assert workspace.budget("cpu") == before


@pytest.mark.parametrize("gib", [1e10, 1e300, 10**400])
def test_a_workspace_larger_than_any_memory(gib: float) -> None:
    image, text = features(5, 5)
    with use_workspace(gib):
        assert contrastive_loss(image.requires_grad_(), text, 5.0, backend="cpu").isfinite()


@pytest.mark.parametrize("bad", [-1, -0.1, float("nan"), float("inf"), -float("inf"), "1", None, True, [1], 1j])
def test_bad_workspace(bad: Any) -> None:
    before = workspace.budget("cpu")
    message = r"use_workspace: got .*, expected a number of GiB, at least 0"
    with pytest.raises(ValueError, match=message), use_workspace(bad):
        pass
    assert workspace.budget("cpu") == before


@pytest.mark.parametrize("gib", [0, 1])
def test_a_second_backward_pass(passes: str, gib: float) -> None:
    """The kept exponentials must survive the first one."""
    image, text = (t.requires_grad_() for t in features(70, 70))
    with use_workspace(gib):
        loss = contrastive_loss(image, text, 20.0, backend="cpu")
    first = torch.autograd.grad(loss, (image, text), retain_graph=True)
    second = torch.autograd.grad(loss, (image, text), retain_graph=True)
    halved = torch.autograd.grad(loss / 2, (image, text))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert_near([2 * h for h in halved], list(first), 1e-6)


def test_products_of_unit_rows_keep_their_digits(passes: str) -> None:
    """Without normalisation the offset follows from the norms: it must be the same number in all passes."""
    g = torch.Generator().manual_seed(3)
    rows = F.normalize(torch.randn(40, 512, generator=g), dim=1)

    def loss(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        row, column, positive = log_sums(x, y, s, normalize=False, backend="cpu")
        return (row + column - 2 * positive).mean() / 2

    value, *grads = gradients(loss, rows, rows, torch.tensor(100.0))
    exact, *wanted = gradients(loss, rows.double(), rows.double(), torch.tensor(100.0, dtype=torch.float64))
    # The rounding of the offset of 40, 2e-6, cancels; that of differences of logits of 100 in float32 remains.
    assert abs(value.item() - exact.item()) < 1e-7
    for found, expected in zip(grads, wanted, strict=True):
        assert (found.double() - expected).abs().max() < 2e-7, (found.double() - expected).abs().max()


def test_no_rows_without_normalisation(passes: str) -> None:
    image, text = features(0, 5)
    row, column, positive = log_sums(
        image, text, 3.0, text_index=torch.empty(0, dtype=torch.int64), normalize=False, backend="cpu"
    )
    assert len(row) == len(positive) == 0
    assert column.eq(-torch.inf).all()


def test_compile_with_transposed_features(passes: str) -> None:
    """Gradients are contiguous whatever the strides of the features, as a compiled graph expects."""
    image, text = features(40, 40, 8)
    image[0] = 0
    transposed = image.T.contiguous().bfloat16().T.requires_grad_()
    torch.compile(lambda x: contrastive_loss(x * 2, text.bfloat16(), 9.0, backend="cpu"))(transposed).backward()
    assert transposed.grad is not None


def test_nothing_is_kept_without_gradients() -> None:
    """Kept exponentials would be 40,000 elements: no allocation is as large."""
    image, text = features(200, 200)

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func.overloadpacket.__name__ == "contrastive_forward":
                self.numel = max(t.numel() for t in out)
            return out

    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context(), Largest() as largest:
            contrastive_loss(image, text, 14.3, backend="cpu")
        assert 0 < largest.numel <= 400
    for trained in (image, text):  # the same call does keep them when one side is trained
        trained.requires_grad_()
        with Largest() as largest:
            contrastive_loss(image, text, 14.3, backend="cpu")
        trained.requires_grad_(False)
        assert largest.numel == 40000


def test_memory_is_bounded_by_the_budget(passes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No single allocation exceeds the larger of the budget and two tiles."""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                self.numel = max(self.numel, t.numel() if isinstance(t, Tensor) else 0)
            return out

    monkeypatch.setattr(contrastive_cpu, "ROWS", 128)
    monkeypatch.setattr(contrastive_cpu, "COLUMNS", 256)
    image, text = features(1000, 900)
    index, scale = torch.arange(1000) % 900, torch.tensor([14.3])
    for budget, kept in ((0, 0), (4 * 900_000 - 1, 0), (4 * 900_000, 900_000)):
        with Largest() as largest:
            saved = contrastive_cpu_native.forward([image], [text], scale, index, None, True, budget)
            upstream = tuple(torch.ones_like(v) for v in saved[:3])
            contrastive_cpu_native.backward([image], [text], scale, index, None, saved, upstream, True, True, True)
        assert saved[4].numel() == kept
        assert largest.numel <= max(kept, 2 * 128 * 256)


def test_opcheck(passes: str) -> None:
    image, text = (t.requires_grad_() for t in features(6, 4, 5))
    index, weight = torch.tensor([0, 1, 2, 3, 3, 0]), torch.rand(4) + 0.5
    scale = torch.tensor([14.3], requires_grad=True)
    for budget in (95, 96, 10**6):  # 24 logits of 4 bytes
        sample = ([image], [text], scale, index, weight, True, budget, "cpu")
        torch.library.opcheck(contrastive_forward, sample)
        saved = contrastive_forward(*(t.detach() if isinstance(t, Tensor) else t for t in sample))
        assert saved[4].numel() == (0 if budget == 95 else 24)
        upstream = [torch.ones_like(v) for v in saved[:3]]
        torch.library.opcheck(
            contrastive_backward,
            ([image], [text], scale, index, weight, *saved, *upstream, True, True, True, "cpu"),
            # It has no derivative.
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("gib", [0, 40 * 40 * 4 * GIB, 1])
def test_compile_with_dynamic_sizes(gib: float) -> None:
    """Also with sizes on both sides of the budget."""
    torch._dynamo.reset()
    compiled = torch.compile(contrastive_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, u in ((20, 8), (33, 21), (50, 50), (33, 21)):
        image, text = features(n, u, 16)
        index = torch.arange(n) % u

        def call(f: Callable[..., Tensor], index: Tensor = index) -> Callable[..., Tensor]:
            return lambda x, y: f(x, y, 20.0, text_index=index, backend="cpu")

        with use_workspace(gib):
            torch.testing.assert_close(
                gradients(call(compiled), image, text), gradients(call(contrastive_loss), image, text)
            )


@pytest.mark.parametrize("norm", [0.0, 1e-30, 1e-11, 2.0**-11, 2.0**-10, 2.0**10, 2.0**11, 1e15])
@pytest.mark.parametrize("where", ["image", "text"])
def test_norms(passes: str, norm: float, where: str) -> None:
    """One row of any norm among ordinary ones: the loss does not depend on it, and gradients are over the norm."""
    image, text = (torch.nn.functional.normalize(t, dim=1) for t in features(40, 40))
    odd = image if where == "image" else text
    odd[3] *= norm
    found = gradients(lambda x, y: contrastive_loss(x, y, 14.3, backend="cpu"), image, text)
    exact = gradients(lambda x, y: reference.naive_loss(x, y, 14.3), image.double(), text.double())
    for k, (f, e) in enumerate(zip(found, exact, strict=True)):
        f, e = f.double().clone(), e.clone()
        if k == ("loss", "image", "text").index(where):
            f[3] *= max(norm, 1e-12)
            e[3] *= max(norm, 1e-12)
        # The rounding of float32 logits and unit rows: gradients are differences of numbers of up to 14.3 / 40.
        assert (f - e).norm() <= 1e-5 * e.norm()


@pytest.mark.parametrize("gib", [0, 1])
@pytest.mark.parametrize("upstream", [2.0**-100, 2.0**-60, 2.0**60, 2.0**100])
def test_upstream_gradients_of_any_size(passes: str, gib: float, upstream: float) -> None:
    """Gradients are proportional to it, also where sums are close to the end of the range of float32."""
    image, text = features(60, 60, 64)
    for scale in (14.3, 100.0):
        with use_workspace(gib):
            calls = [
                gradients(lambda x, y, s=scale: contrastive_loss(x, y, s, backend="cpu"), image, text, upstream=factor)
                for factor in (1.0, upstream)
            ]
        # Only powers of two are divided out: nothing is rounded differently.
        assert_near([g / upstream for g in calls[1][1:]], calls[0][1:], 0.0)


@pytest.mark.parametrize("gib", [0, 1])
def test_a_text_of_weight_zero_above_all_others(passes: str, gib: float) -> None:
    """It is left out of the row sums, whose exponentials it exceeds by far: no 0 * inf."""
    g = torch.Generator().manual_seed(5)
    image = torch.nn.functional.normalize(torch.randn(1, 32, generator=g), dim=1) + 0.02 * torch.randn(
        30, 32, generator=g
    )
    text = torch.cat([-image[:20] + 0.1 * torch.randn(20, 32, generator=g), image[:1]])
    index, weight = torch.arange(30) % 20, torch.cat([torch.ones(20), torch.zeros(1)])
    for s in (20.0, 100.0):
        scale = torch.tensor([s])
        upstream = (
            torch.randn(30, generator=g).double(),
            torch.randn(21, generator=g).double(),
            torch.randn(30).double(),
        )
        results = []
        for dtype, backend in ((torch.float32, "cpu"), (torch.float64, "reference")):
            x, y, sc = image.to(dtype), text.to(dtype), scale.to(dtype)
            saved = contrastive_forward([x], [y], sc, index, weight, True, int(gib * 2**30), backend)
            d_x, d_y, d_s = contrastive_backward(
                [x], [y], sc, index, weight, *saved, *upstream, True, True, True, backend
            )
            results.append([*saved[:3], d_x[0], d_y[0], d_s])
        # The rounding of float32 logits: 6e-8 of the scale, in probabilities of up to 1.
        assert_near(results[0], results[1], 1e-6 * s)


@needs_library
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    """Of the C++ passes; 700 x 351 is more than one thread's share, and no multiple of a vector."""
    ops, n, u = torch.ops.scenarioclip_fast_C, 700, 351
    g = torch.Generator().manual_seed(6)
    products, x = torch.randn(n, u, generator=g), torch.randn(n, 100, generator=g)
    by_row, by_text = torch.rand(n, generator=g) + 0.5, torch.rand(u, generator=g) + 0.5
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            e, d = products.clone(), x.clone()
            sums = [torch.zeros(k, dtype=torch.float64) for k in (n, u, n)]
            index = torch.arange(n) % u
            ops.contrastive_cpu_exponentials(e, by_row, by_text, None, index, 0, 0, 5.0, 0.0, *sums)
            factors, magnitude, in_range = ops.contrastive_cpu_factors(
                sums[0].log(), sums[1].log(), sums[0], sums[1], sums[2], by_row, by_text, None, 0.0
            )
            assert in_range
            grad = torch.empty_like(e)
            ops.contrastive_cpu_gradients(e, True, factors, by_row, by_text, index, 0, 0, 5.0, 0.0, grad)
            dot = ops.contrastive_cpu_finish(x.flip(0).contiguous(), by_row, 2.0, True, d)
            inverse = ops.contrastive_cpu_inverse([x, products], True)
            results.append([e, *sums, factors, torch.tensor([magnitude, dot]), grad, d, inverse])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    expected = (products.double() * by_row[:, None] * by_text * 5).exp()
    # Eight roundings of an exponent of up to 40.
    torch.testing.assert_close(results[0][1], expected.sum(1), rtol=2e-5, atol=0)
    torch.testing.assert_close(results[0][2], expected.sum(0), rtol=2e-5, atol=0)


@needs_library
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.ones(4, 3).T}, "values: expected rows of stride 1"),
        ({"values": torch.ones(3, 4).double()}, "values: expected a float32 matrix"),
        ({"values": torch.ones(4, 4)}, "values: got a tile outside the level"),
        ({"first_text": 1}, "values: got a tile outside the level"),
        ({"first_row": -1}, "values: got a tile outside the level"),
        ({"weight": torch.ones(3)}, "weight: got size 3"),
        ({"index": torch.zeros(3, dtype=torch.int32)}, "index: got dtype"),
        ({"col_sum": torch.zeros(4)}, "col_sum: got dtype"),
        ({"positive": torch.zeros(4, dtype=torch.float64)}, "positive: got size 4"),
    ],
)
def test_compiled_passes_check_their_arguments(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "values": torch.ones(3, 4), "by_row": torch.ones(3), "by_text": torch.ones(4), "weight": None, "index": None,
        "first_row": 0, "first_text": 0, "scale": 1.0, "offset": 0.0, "row_sum": torch.zeros(3, dtype=torch.float64),
        "col_sum": torch.zeros(4, dtype=torch.float64), "positive": torch.zeros(3, dtype=torch.float64),
    }  # fmt: skip
    torch.ops.scenarioclip_fast_C.contrastive_cpu_exponentials(**good)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.scenarioclip_fast_C.contrastive_cpu_exponentials(**{**good, **change})


@needs_library
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"row_lse": 40 - 66.0}, True),
        ({"row_lse": 40 - 67.0}, False),
        ({"row_lse": 40 + 67.0}, False),
        ({"col_lse": 40 - 67.0}, False),
        ({"col_lse": 40 + 67.0}, False),
        ({"row_lse": torch.nan}, False),
        ({"col_lse": -torch.inf}, False),
        ({"weight": 1e9}, True),
        ({"row_lse": 40 - 66.0, "weight": 1e12}, False),  # their product is out of range
        ({"grad_col": torch.inf}, False),
        ({"grad_row": 1e300, "grad_col": 1e300, "grad_logit": 1e300}, True),
        ({"grad_row": 1e-310, "grad_col": 1e-310, "grad_logit": 1e-310}, True),
    ],
)
def test_range_of_factors(change: dict[str, float], expected: bool) -> None:
    """Relative to an offset of 40; a level out of range takes the passes in PyTorch."""
    values = {"row_lse": 41.0, "col_lse": 39.0, "grad_row": 0.1, "grad_col": 0.2, "grad_logit": -0.3, **change}
    sums = [torch.full((5,), values[k], dtype=torch.float64) for k in ("row_lse", "col_lse")]
    upstream = [torch.full((5,), values[k], dtype=torch.float64) for k in ("grad_row", "grad_col", "grad_logit")]
    by, weight = torch.full((5,), 0.5), torch.full((5,), values.get("weight", 1.0))
    factors, magnitude, in_range = torch.ops.scenarioclip_fast_C.contrastive_cpu_factors(
        *sums, *upstream, by, by, weight, 40.0
    )
    assert in_range == expected
    if expected:
        rows, _, positives, texts, columns, _ = factors.double().view(6, 5)
        lse = [(40 - s).exp() / 2 for s in sums]
        found = [rows * magnitude, columns * magnitude, positives * magnitude, texts]
        exact = [upstream[0] * lse[0], upstream[1] * lse[1], upstream[2] / 2, weight.double() / 2]
        # One rounding to float32; relative to the largest of 1e-310, denormals round as well.
        torch.testing.assert_close(found, exact, rtol=1e-7 if values["grad_row"] > 1e-300 else 1e-3, atol=0)
