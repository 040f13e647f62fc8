"""contrastive_loss and multilevel_contrastive_loss on every backend, against the paper's N x N form in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from scenarioclip_fast.kernels.contrastive import contrastive_cpu, reference
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from scenarioclip_fast import BackendError, dispatch, requirements, use_backend, use_workspace
from scenarioclip_fast.ops import contrastive_loss, multilevel_contrastive_loss
from scenarioclip_fast.ops.contrastive import DUPLICATES, log_sums
from scenarioclip_fast.ops.contrastive.api import _resolve_backend
from scenarioclip_fast.ops.contrastive.fused import contrastive_losses
from scenarioclip_fast.ops.contrastive.levels import LevelInput
from scenarioclip_fast.ops.contrastive.op import contrastive_forward
from scenarioclip_fast.ops.contrastive.validate import CHECK, assert_values

DEVICES = {"reference": "cpu", "cpu": "cpu", "triton": "cpu" if requirements.triton_interprets() else "cuda"}
BACKENDS = ("reference", "cpu")
# Triton needs a GPU; test_triton_in_the_interpreter runs some of these tests without one.
EVERY_BACKEND = [
    *BACKENDS,
    pytest.param("triton", marks=pytest.mark.gpu),
]
Case = tuple[Tensor, Tensor, Tensor, Tensor]


def run(image: Tensor, text: Tensor, scale: Tensor | float, backend: str, **options: Any) -> Tensor:
    """Run contrastive_loss on the backend's device; return the result on the CPU."""
    device = DEVICES[backend]
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    scale = scale.to(device) if isinstance(scale, Tensor) else scale
    return contrastive_loss(image.to(device), text.to(device), scale, backend=backend, **options).cpu()


def make(n: int, u: int, d: int, s: float, dtype: torch.dtype = torch.float32, seed: int = 0) -> Case:
    """Make image [n, d], close to its texts; text [u, d]; scale []; and index [n], in which every text occurs."""
    g = torch.Generator().manual_seed(seed)
    text = torch.randn(u, d, generator=g, dtype=torch.float64)
    index = torch.cat([torch.arange(u), torch.randint(max(u, 1), (n - u,), generator=g)])[
        torch.randperm(n, generator=g)
    ]
    image = torch.randn(n, d, generator=g, dtype=torch.float64) + text[index]
    image = image * torch.linspace(0.1, 20, n, dtype=torch.float64)[:, None]
    return image.to(dtype), text.to(dtype), torch.tensor(s, dtype=dtype), index


class Dispatched(TorchDispatchMode):
    """Records the names of the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def gradients(loss: Callable[..., Tensor], tensors: tuple[Tensor, ...], upstream: float = 1.0) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value * upstream, leaves)]


def errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [
        ((f.double() - w.double()).norm() / w.double().norm().clamp_min(1e-30)).item()
        for f, w in zip(found, expected, strict=True)
    ]


def assert_as_good_as_eager(
    fused: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    tensors: tuple[Tensor, Tensor, Tensor],
    upstream: float = 1.0,
    device: str = "cpu",  # of the fused form; eager PyTorch runs on the CPU
) -> None:
    """Assert that errors of loss and gradients are at most twice those of eager PyTorch in the same dtype."""
    image, text, scale = (t.double() for t in tensors)
    exact = gradients(eager, (image, text, scale), upstream)
    found, baseline = gradients(fused, tensors, upstream), gradients(eager, tensors, upstream)
    # Losses and gradients are differences of numbers of these magnitudes: allow a few roundings (6e-8) of them, since
    # eager may happen to be exact.
    sizes = [
        scale,
        upstream * scale / len(image) / image.norm(dim=1),
        upstream * scale / len(text) / text.norm(dim=1),
        upstream,
    ]
    for name, f, b, x, size in zip(
        ("loss", "d image", "d text", "d scale"), found, baseline, exact, sizes, strict=True
    ):
        rtol = 1e-6
        if device == "cuda" and name != "loss":
            # A probability is one power of 2 there, with an exponent of the order of the scale: rounded to float32 it
            # is off by up to 2^-24 of that, and so, relatively, is the probability. (Eager divides by a sum of terms
            # with the same errors.) A quarter of it, as errors of many entries average.
            rtol += 2**-26 * scale.item()
        error, allowed = (f - x).norm(), 2 * (b - x).norm() + rtol * (x.norm() + torch.as_tensor(size).norm())
        assert error <= allowed, (name, error, allowed)


SHAPES = [(1, 1, 8), (2, 2, 3), (3, 2, 123), (127, 127, 64), (129, 40, 123), (600, 600, 64), (1000, 300, 512)]


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize(("n", "u", "d"), SHAPES)
@pytest.mark.parametrize("s", [1.0, 14.3, 100.0])
def test_negatives(backend: str, n: int, u: int, d: int, s: float) -> None:
    image, text, scale, index = make(n, u, d, s)
    assert_as_good_as_eager(
        lambda x, y, s: run(x, y, s, text_index=index, backend=backend),
        lambda x, y, s: reference.naive_loss(x, y[index], s),
        (image, text, scale),
        upstream=3.0,
    )


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize(("n", "u", "d"), [(5, 5, 4), (129, 40, 123), (1000, 300, 64)])
@pytest.mark.parametrize("s", [1.0, 80.0])
def test_positives(backend: str, n: int, u: int, d: int, s: float) -> None:
    image, text, scale, index = make(n, u, d, s)

    def eager(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        return reference.naive_positives_loss(x, y, s, index)

    tensors = (image, text, scale)
    assert_as_good_as_eager(
        lambda x, y, s: run(x, y, s, text_index=index, duplicates="positives", backend=backend),
        eager,
        tensors,
        device=DEVICES[backend],
    )
    # The same classes by id: one text per row, equal ids merged.
    assert_as_good_as_eager(
        lambda x, y, s: run(x, y[index], s, text_id=index, duplicates="positives", backend=backend),
        eager,
        tensors,
        device=DEVICES[backend],
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_index_means_the_diagonal(backend: str) -> None:
    image, text, scale, _ = make(65, 65, 32, 20.0, torch.float64)
    same = torch.arange(65)
    for duplicates in ("negatives", "positives"):
        plain = contrastive_loss(image, text, scale, duplicates=duplicates, backend=backend)
        torch.testing.assert_close(
            plain, contrastive_loss(image, text, scale, text_index=same, duplicates=duplicates, backend=backend)
        )
        torch.testing.assert_close(plain, reference.naive_loss(image, text, scale))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("s", [20.0, 2000.0])
def test_texts_without_rows(backend: str, s: float) -> None:
    """Ignored with "negatives"; an extra negative for every image row with "positives"."""
    image, text, scale, index = make(40, 10, 16, s, torch.float64)
    extended = torch.cat([text, image[:7]])  # hard negatives
    expected = gradients(lambda x, y, s: reference.naive_loss(x, y[:10][index], s), (image, extended, scale))
    found = gradients(
        lambda x, y, s: contrastive_loss(x, y, s, text_index=index, backend=backend), (image, extended, scale)
    )
    torch.testing.assert_close(found, expected)
    found = contrastive_loss(image, extended, scale, text_index=index, duplicates="positives", backend=backend)
    logits = scale * F.normalize(image, dim=1) @ F.normalize(extended, dim=1).T
    owns = F.one_hot(index, 17)[:, :10].double()
    columns = F.cross_entropy(logits[:, :10].T, (owns / owns.sum(0)).T)
    torch.testing.assert_close(found, (F.cross_entropy(logits, index) + columns) / 2)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_reduction_none(backend: str) -> None:
    image, text, scale, index = make(300, 90, 24, 30.0)
    weight = torch.rand(300)

    def eager(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        logits = s * F.normalize(x, dim=1) @ F.normalize(y[index], dim=1).T
        target = torch.arange(300)
        rows = F.cross_entropy(logits, target, reduction="none") + F.cross_entropy(logits.T, target, reduction="none")
        return (rows / 2 * weight).sum()

    def fused(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        rows = run(x, y, s, text_index=index, reduction="none", backend=backend)
        assert rows.shape == (300,)
        return (rows * weight).sum()

    assert_as_good_as_eager(fused, eager, (image, text, scale))


EXTREMES = (
    "equal",
    "opposite",
    "nearly opposite",
    "one row opposite",
    "one text opposite",
    "orthogonal",
    "matched",
)


def extreme(case: str, n: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    one, noise = torch.randn(1, 48, generator=g), torch.randn(n, 48, generator=g)
    near, odd = torch.cat([0.05 * noise[1:] + one, one]), torch.cat([noise[1:], -one])
    axes = torch.eye(48)
    pairs = {
        "equal": (one.repeat(n, 1), one.repeat(n, 1)),
        "opposite": (one.repeat(n, 1), -one.repeat(n, 1)),
        "nearly opposite": (one + 0.2 * noise, 0.2 * noise.flip(0) - one),
        "one row opposite": (odd, near),
        "one text opposite": (near, odd),
        "orthogonal": (axes[torch.arange(n) % 24], axes[24 + torch.arange(n) % 24]),
        "matched": (noise, noise * 3),
    }
    return pairs[case]


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("case", EXTREMES)
@pytest.mark.parametrize("s", [100.0, 1000.0])
def test_extreme_features(backend: str, case: str, s: float, n: int = 200) -> None:
    """Sums without a running maximum underflow in most cases; in the last ones the loss is nearly 0."""
    assert_as_good_as_eager(
        lambda x, y, s: run(x, y, s, backend=backend),
        reference.naive_loss,
        (*extreme(case, n), torch.tensor(s)),
        device=DEVICES[backend],
    )


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_random_units_at_high_scale(backend: str) -> None:
    """The largest cosine of a row is below 1 - 87/s: with the scale as the offset every term would underflow."""
    g = torch.Generator().manual_seed(2)
    image, text = torch.randn(300, 1024, generator=g), torch.randn(200, 1024, generator=g)
    assert (F.normalize(image, dim=1) @ F.normalize(text, dim=1).T).max() < 0.15
    index = torch.randint(200, (300,), generator=g)
    assert_as_good_as_eager(
        lambda x, y, s: run(x, y, s, text_index=index, backend=backend),
        lambda x, y, s: reference.naive_loss(x, y[index], s),
        (image, text, torch.tensor(100.0)),
    )


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("where", ["image", "text"])
def test_nan_stays_nan(backend: str, where: str) -> None:
    image, text, scale, index = make(70, 30, 16, 100.0)
    (image if where == "image" else text)[3, 5] = float("nan")
    for duplicates in ("negatives", "positives"):
        loss = run(image, text, scale, text_index=index, duplicates=duplicates, backend=backend)
        assert loss.isnan()


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_nan_in_a_text_without_rows(backend: str, n: int = 70) -> None:
    """Its weight is 0 with "negatives", but the NaN must not be hidden."""
    image, text, scale, index = make(n, 12, 16, 20.0)
    text = torch.cat([text, torch.full((1, 16), torch.nan)])
    assert run(image, text, scale, text_index=index, backend=backend).isnan()


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_no_rows(backend: str) -> None:
    for texts in (0, 5):
        image = torch.empty(0, 8, requires_grad=True)
        text = torch.ones(texts, 8, requires_grad=True)
        scale = torch.tensor(10.0, requires_grad=True)
        for duplicates in ("negatives", "positives"):
            loss = run(
                image, text, scale, text_index=torch.empty(0, dtype=torch.int64), duplicates=duplicates, backend=backend
            )
            found = torch.autograd.grad(loss, (image, text, scale))
            assert loss == 0
            assert [g.abs().sum() for g in found] == [0, 0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", ["image", "text", "scale", "image text", "image scale", "text scale"])
def test_partly_frozen(backend: str, trained: str) -> None:
    tensors = dict(zip(("image", "text", "scale"), make(60, 60, 16, 20.0, torch.float64)[:3], strict=True))
    for name in trained.split():
        tensors[name].requires_grad_()
    expected = torch.autograd.grad(reference.naive_loss(**tensors), [tensors[k] for k in trained.split()])
    loss = contrastive_loss(tensors["image"], tensors["text"], tensors["scale"], backend=backend)
    found = torch.autograd.grad(loss, [tensors[k] for k in trained.split()])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_float_scale(backend: str) -> None:
    image, text, _, index = make(80, 30, 16, 20.0, torch.float64)
    wide = torch.zeros(80, 40, dtype=torch.float64)
    wide[:, 3:35:2] = image
    strided = wide[:, 3:35:2].requires_grad_()
    columns = text.T.contiguous().T.requires_grad_()
    found = torch.autograd.grad(
        contrastive_loss(strided, columns, 20.0, text_index=index, backend=backend), (strided, columns)
    )
    expected = gradients(lambda x, y: reference.naive_loss(x, y[index], 20.0), (image, text))[1:]
    torch.testing.assert_close(list(found), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("duplicates", ["negatives", "positives"])
def test_gradcheck(backend: str, duplicates: str) -> None:
    image, text, scale, index = (t.clone() for t in make(7, 4, 5, 3.0, torch.float64))
    leaves = [t.requires_grad_() for t in (image, text, scale)]
    assert torch.autograd.gradcheck(
        lambda x, y, s: contrastive_loss(x, y, s, text_index=index, duplicates=duplicates, backend=backend), leaves
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_input(backend: str, dtype: torch.dtype, n: int = 200) -> None:
    """Sums are float32: only the input and the returned gradients are rounded."""
    image, text, scale, index = make(n, 30, 64, 14.3)
    rounded = (image.to(dtype), text.to(dtype), scale)
    exact = gradients(lambda x, y, s: reference.naive_loss(x, y[index], s), tuple(t.double() for t in rounded))
    found = gradients(lambda x, y, s: contrastive_loss(x, y, s, text_index=index, backend=backend), rounded)
    assert [f.dtype for f in found] == [torch.float32, dtype, dtype, torch.float32]
    eps = torch.finfo(dtype).eps
    assert all(e < limit for e, limit in zip(errors(found, exact), [1e-6, eps, eps, 1e-5], strict=True))


def test_mixed_dtypes_and_autocast() -> None:
    image, text, scale, _ = make(50, 50, 32, 14.3)
    x, y = image.bfloat16().requires_grad_(), text.clone().requires_grad_()
    loss = contrastive_loss(x, y, scale)
    loss.backward()
    assert (loss.dtype, x.grad.dtype, y.grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    torch.testing.assert_close(loss, contrastive_loss(x.float(), y, scale))
    with torch.autocast("cpu", torch.bfloat16):
        cast = contrastive_loss(image, text, scale)
    assert cast.dtype == torch.float32
    torch.testing.assert_close(cast, contrastive_loss(image.bfloat16(), text.bfloat16(), scale))


def test_grad_scaler() -> None:
    image, text, scale, _ = make(40, 40, 16, 14.3)
    expected = gradients(lambda x, y, s: contrastive_loss(x, y, s), (image, text, scale))[1:]
    found = gradients(lambda x, y, s: contrastive_loss(x, y, s), (image, text, scale), upstream=2.0**16)[1:]
    torch.testing.assert_close([f / 2.0**16 for f in found], expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_grad_scaler_steps_and_skips(device: str) -> None:
    """The scaler unscales the gradients of the scaled loss; an overflow skips the step and lowers the scale."""
    image, text, scale, _ = (t.to(device) for t in make(40, 40, 16, 14.3))
    weight = torch.eye(16, device=device).requires_grad_()
    (expected,) = torch.autograd.grad(contrastive_loss(image @ weight, text, scale), weight)
    optimizer, scaler = torch.optim.SGD([weight], lr=1.0), torch.amp.GradScaler(device, init_scale=2.0**16)
    scaler.scale(contrastive_loss(image @ weight, text, scale)).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(torch.eye(16, device=device) - weight.detach(), expected, rtol=1e-4, atol=1e-6)
    optimizer.zero_grad()
    before = weight.detach().clone()
    scaler.scale(contrastive_loss(image @ weight, text, scale) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(weight.detach(), before) and scaler.get_scale() == 2.0**15


def test_second_derivatives_raise() -> None:
    image = X.clone().requires_grad_()
    (grad,) = torch.autograd.grad(contrastive_loss(image, Y, 10.0, text_index=INDEX), image, create_graph=True)
    with pytest.raises(RuntimeError, match="contrastive_loss supports first derivatives only"):
        grad.sum().backward()


def test_loss_is_not_negative() -> None:
    """Perfect matches at a high scale: the loss is 0 up to rounding."""
    image = F.normalize(torch.randn(64, 32, generator=torch.Generator().manual_seed(3)), dim=1)
    rows = contrastive_loss(image, image, 100.0, reduction="none")
    assert rows.min() > -2e-5  # one rounding of a float32 logit of 100


@pytest.mark.parametrize("backend", BACKENDS)
def test_partial_tiles(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that are smaller than the matrix and do not divide it, in both dimensions."""
    monkeypatch.setattr(contrastive_cpu, "ROWS", 32)
    monkeypatch.setattr(contrastive_cpu, "COLUMNS", 48)
    for s in (14.3, 2000.0):  # 2000: the path with running maxima
        image, text, scale, index = make(150, 101, 16, s, torch.float64)
        expected = gradients(lambda x, y, s, i=index: reference.naive_loss(x, y[i], s), (image, text, scale))
        found = gradients(
            lambda x, y, s, i=index: contrastive_loss(x, y, s, text_index=i, backend=backend), (image, text, scale)
        )
        torch.testing.assert_close(found, expected)


def test_deterministic() -> None:
    image, text, scale, index = make(700, 200, 64, 50.0)
    runs = [
        gradients(lambda x, y, s: contrastive_loss(x, y, s, text_index=index, deterministic=True), (image, text, scale))
        for _ in range(3)
    ]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("duplicates", ["negatives", "positives"])
def test_levels(backend: str, duplicates: str) -> None:
    """A multilevel call equals one call per level; one level is empty, widths differ, and only some have an index."""
    device = DEVICES[backend]
    cases = [make(20, 20, 16, 10.0), make(50, 12, 16, 30.0), make(0, 0, 16, 5.0), make(9, 9, 24, 5.0)]
    indices = [None, cases[1][3].to(device), cases[2][3].to(device), None]
    images, texts, scales = ([c[k].to(device).requires_grad_() for c in cases] for k in range(3))
    options: dict[str, Any] = {"duplicates": duplicates, "backend": backend}
    combined = multilevel_contrastive_loss(images, texts, scales, text_indices=indices, **options)
    separate = [
        contrastive_loss(x, y, s, text_index=i, **options)
        for x, y, s, i in zip(images, texts, scales, indices, strict=True)
    ]
    assert combined.shape == (4,)
    torch.testing.assert_close(combined, torch.stack(separate))
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0], device=device)
    leaves = [*images, *texts, *scales]
    found = torch.autograd.grad(combined @ weights, leaves)
    torch.testing.assert_close(found, torch.autograd.grad(torch.stack(separate) @ weights, leaves))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    image, text, scale, index = (t.clone() for t in make(6, 4, 5, 3.0))
    leaves = [t.requires_grad_() for t in (image, text, scale)]
    weight = torch.rand(4) + 0.5
    sample = ([leaves[0]], [leaves[1]], leaves[2][None], index, weight, True, 0, backend)
    torch.library.opcheck(contrastive_forward, sample)
    sample = ([leaves[0], leaves[1]], [leaves[0], leaves[1]], torch.ones(2), None, None, True, 0, backend)
    torch.library.opcheck(contrastive_forward, sample)


@pytest.mark.parametrize("duplicates", ["negatives", "positives"])
def test_compile_without_graph_break_for_all_sizes(duplicates: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(contrastive_loss, fullgraph=True, dynamic=True, backend=counter)
    for n, u in ((20, 8), (33, 21), (50, 50)):
        image, text, scale, index = make(n, u, 16, 20.0)

        def call(f: Callable[..., Tensor], index: Tensor = index) -> Callable[..., Tensor]:
            return lambda x, y, s: f(x, y, s, text_index=index, duplicates=duplicates)

        found, expected = (
            gradients(call(compiled), (image, text, scale)),
            gradients(call(contrastive_loss), (image, text, scale)),
        )
        torch.testing.assert_close(found, expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_loss_checks_values(backend: str) -> None:
    torch._dynamo.reset()
    image, text, _, _ = make(5, 3, 8, 1.0)
    index = torch.tensor([0, 1, 2, 2, 2])
    for compiler in ("aot_eager", "inductor"):
        compiled = torch.compile(contrastive_loss, fullgraph=True, dynamic=True, backend=compiler)
        for scale in (torch.tensor(-3.0), torch.tensor(0.0), -3.0):
            with pytest.raises(ValueError, match=r"logit_scale: got (-3|0), expected a positive factor"):
                compiled(image, text, scale, text_index=index, backend=backend)
    # Compiled code may wrap negative indices before the op rejects them.
    with pytest.raises((ValueError, IndexError, RuntimeError), match=r"text_index: got values from -1 to 2|out of"):
        compiled(image, text, torch.tensor(3.0), text_index=torch.tensor([-1, 1, 2, 2, 2]), backend=backend)


def test_no_matrix_is_saved_for_backward() -> None:
    """Without a workspace, autograd saves the features and a few numbers per row."""
    image, text, scale, index = (t.clone() for t in make(300, 200, 8, 10.0))
    held: list[int] = []
    with use_workspace(0), torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.numel()) or t, lambda t: t):
        contrastive_loss(image.requires_grad_(), text.requires_grad_(), scale.requires_grad_(), text_index=index)
    assert max(held) == image.numel()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "u"), [(700, 350), (5000, 5000), (17000, 1100)])
def test_triton_in_low_precision(n: int, u: int, dtype: torch.dtype) -> None:
    """Grouped launches, several blocks of dS, and several chunks of rows, against eager in the same dtype."""
    image, text, scale, index = (t.cuda() for t in make(n, u, 512, 14.3))
    rounded = (image.to(dtype), text.to(dtype), scale)

    def eager(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        logits = s.to(x.dtype) * F.normalize(x, dim=1) @ F.normalize(y, dim=1)[index].T
        target = torch.arange(n, device="cuda")
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    given = {} if n == u else {"text_index": index}
    if n == u:
        index = torch.arange(n, device="cuda")
    wide = tuple(t.double() for t in rounded)
    exact = gradients(lambda x, y, s: contrastive_loss(x, y, s, text_index=index, backend="reference"), wide)
    found = errors(gradients(lambda x, y, s: contrastive_loss(x, y, s, backend="triton", **given), rounded), exact)
    baseline = errors(gradients(eager, rounded), exact)
    # Beyond eager's error, one rounding of the result.
    assert all(a <= 2 * b + torch.finfo(dtype).eps / 2 for a, b in zip(found, baseline, strict=True)), (found, baseline)


def test_no_matrix_is_allocated_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither pass allocates more than a buffer of two tiles, where the matrix has nine."""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                self.numel = max(self.numel, t.numel() if isinstance(t, Tensor) else 0)
            return out

    monkeypatch.setattr(contrastive_cpu, "ROWS", 512)
    monkeypatch.setattr(contrastive_cpu, "COLUMNS", 2048)
    image, text, scale, index = make(3000, 3000, 8, 14.3)
    for s in (scale, scale * 100):  # the second one takes the path with running maxima
        with Largest() as largest:
            saved = contrastive_cpu.level_forward(image, text, s, index)
            grads = [torch.ones_like(v) for v in saved[:3]]
            contrastive_cpu.level_backward(image, text, s, index, None, *saved, *grads)
        tile = contrastive_cpu.ROWS * contrastive_cpu.COLUMNS
        assert largest.numel <= 2 * tile < image.shape[0] * text.shape[0] / 4


X, Y, INDEX = torch.ones(4, 8), torch.ones(3, 8), torch.tensor([0, 1, 2, 2])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image": X[0]}, ValueError, r"image: got shape \[8\], expected \[rows, width\]"),
        ({"image": X.long()}, TypeError, "image: got a tensor of torch.int64, expected a floating-point"),
        ({"text": [1.0]}, TypeError, "text: got list, expected a floating-point"),
        ({"text": Y[:, :5]}, ValueError, "widths 8 and 5"),
        ({"text": Y.to("meta")}, ValueError, "text: got device meta, expected cpu"),
        ({"text_index": None}, ValueError, "3 texts for 4 image rows, expected equal numbers, or text_index"),
        ({"text_index": INDEX.int()}, TypeError, "text_index: got a tensor of torch.int32, expected an int64"),
        ({"text_index": INDEX[:3]}, ValueError, r"text_index: got shape \[3\], expected \[4\]"),
        ({"text_index": INDEX + 1}, ValueError, "text_index: got values from 1 to 3, expected 0 to 2"),
        ({"text_index": INDEX - 1}, ValueError, "text_index: got values from -1 to 1, expected 0 to 2"),
        ({"text_id": INDEX}, ValueError, r"text_id: got shape \[4\], expected \[3\]"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale: got 0, expected a positive"),
        ({"logit_scale": torch.tensor(-2.0)}, ValueError, "logit_scale: got -2, expected a positive"),
        ({"logit_scale": torch.ones(1)}, ValueError, r"logit_scale: got shape \[1\], expected a 0-d"),
        ({"logit_scale": torch.tensor(3)}, TypeError, "logit_scale: got a tensor of torch.int64"),
        ({"logit_scale": "3"}, TypeError, "logit_scale: got str"),
        ({"logit_scale": 1e300}, ValueError, r"logit_scale: got 1e\+300, expected a factor in the range of float32"),
        ({"image": X[:, :0], "text": Y[:, :0]}, ValueError, "got width 0, expected at least 1"),
        # What new_group returns on ranks outside the group.
        ({"group": -100}, TypeError, "group: got int, expected a process group that this rank belongs to"),
        ({"duplicates": "ignore"}, ValueError, "duplicates: got 'ignore', expected one of 'negatives', 'positives'"),
        ({"reduction": "sum"}, ValueError, "reduction: got 'sum', expected 'mean' or 'none'"),
        ({"reduction": "none", "duplicates": "positives"}, ValueError, "reduction='none' requires"),
        ({"backend": "fast"}, ValueError, "backend=: got 'fast'"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good: dict[str, Any] = {"image": X, "text": Y, "logit_scale": 10.0, "text_index": INDEX}
    contrastive_loss(**good)
    with pytest.raises(error, match=message):
        contrastive_loss(**{**good, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_index": INDEX + 1}, "text_index: got a value outside 0 to 2, the texts given"),
        ({"text_index": INDEX - 1}, "text_index: got a value outside 0 to 2, the texts given"),
        ({"logit_scale": torch.tensor(0.0)}, "logit_scale: expected a positive factor"),
    ],
)
def test_device_assertions_name_the_argument(change: dict[str, Any], message: str) -> None:
    """The checks of SCENARIOCLIP_FAST_CHECK=1 on a GPU; on a CPU the same assertions raise."""
    good: dict[str, Any] = {"logit_scale": torch.tensor(10.0), "text_index": INDEX}
    for given, expectation in ((good, nullcontext()), ({**good, **change}, pytest.raises(RuntimeError, match=message))):
        with expectation:
            assert_values(LevelInput(X, Y, given["logit_scale"], given["text_index"]), "")


@pytest.mark.gpu
@pytest.mark.parametrize("check", ["0", "1"])
def test_index_out_of_range_on_a_gpu(check: str) -> None:
    """In a separate process: with the flag, a device-side assertion names the argument; without it the loss is NaN."""
    code = """
import torch
from scenarioclip_fast.ops import contrastive_loss
x = torch.ones(4, 64, device="cuda")
loss = contrastive_loss(x, x, 10.0, text_index=torch.tensor([0, 1, 2, 4], device="cuda"))
print(loss.item())
"""
    environment = {**os.environ, CHECK: check}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if check == "0":
        assert done.returncode == 0 and done.stdout.strip() == "nan", done.stderr
    else:
        assert done.returncode != 0 and "device-side assert" in done.stderr
        assert "text_index: got a value outside 0 to 3" in done.stderr + done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_non_positive_scale_on_a_gpu(backend: str) -> None:
    image, text, _, index = (t.cuda() for t in make(70, 30, 16, 20.0))
    for scale in (0.0, -1.0):
        on_device = torch.tensor(scale, device="cuda")
        assert contrastive_loss(image, text, on_device, text_index=index, backend=backend).isnan()


def test_the_reference_with_a_non_positive_scale() -> None:
    """NaN, as on a GPU, where the value is not checked."""
    for scale in (0.0, -1.0):
        for sums in reference.level_forward(X, Y, torch.tensor(scale))[:3]:
            assert sums.isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [(128, 700, 350), (5000,)])
def test_cuda_graph_capture(rows: tuple[int, ...]) -> None:
    """Capture both passes; a replay with other features equals an eager call."""

    def inputs(seed: int) -> list[Tensor]:
        return [t.cuda() for n in rows for t in make(n, max(n // 2, 1), 512, 14.3 + seed, seed=seed)]

    static = [t.requires_grad_() if t.is_floating_point() else t for t in inputs(0)]
    leaves = [t for t in static if t.is_floating_point()]

    def both(tensors: list[Tensor]) -> list[Tensor]:
        images, texts, scales, indices = (tensors[k::4] for k in range(4))
        losses = multilevel_contrastive_loss(images, texts, scales, text_indices=indices, backend="triton")
        return [losses.detach(), *torch.autograd.grad(losses.sum(), [t for t in tensors if t.is_floating_point()])]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both(static)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = both(static)
    other = inputs(1)
    with torch.no_grad():
        for kept, new in zip(static, other, strict=True):
            kept.copy_(new)
    graph.replay()
    expected = both([t.requires_grad_() if t.is_floating_point() else t for t in other])
    assert len(found) == 1 + len(leaves)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)  # the same kernels, sums in a fixed order


@pytest.mark.gpu
@pytest.mark.parametrize("duplicates", DUPLICATES)
def test_graphed_callables(duplicates: str) -> None:
    """Both passes as separate graphs, with autograd between them and a layer before the loss."""

    def inputs(seed: int) -> list[Tensor]:  # images, texts, scales, indices
        sizes = ((128, 39), (700, 73), (350, 289))
        cases = [[t.cuda() for t in make(n, u, 64, 14.3 + seed, seed=seed)] for n, u in sizes]
        return [t for column in zip(*cases, strict=True) for t in column]

    def losses(*tensors: Tensor) -> Tensor:
        images, texts, scales, indices = (tensors[3 * k : 3 * k + 3] for k in range(4))
        return multilevel_contrastive_loss(
            images, texts, scales, text_indices=indices, duplicates=duplicates, backend="triton"
        )

    samples = tuple(t.requires_grad_(t.is_floating_point()) for t in inputs(0))
    graphed = torch.cuda.make_graphed_callables(losses, samples)
    weight = torch.randn(64, 64, device="cuda").requires_grad_()

    def total(call: Callable[..., Tensor], tensors: list[Tensor], weight: Tensor) -> Tensor:
        return call(*(x @ weight for x in tensors[:3]), *tensors[3:]) @ torch.arange(1.0, 4.0, device="cuda")

    for seed in range(3):
        tensors = inputs(seed)
        found, expected = (gradients(partial(total, call, tensors), (weight,)) for call in (graphed, losses))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)  # the same kernels, sums in a fixed order


@pytest.mark.gpu
def test_launches_of_three_levels() -> None:
    """Launches dominate the time at typical batch sizes: 6, plus the sum over the levels."""
    cases = [[t.cuda() for t in make(n, u, 512, 14.3)] for n, u in ((128, 128), (700, 250), (350, 340))]
    images, texts, scales, indices = (list(column) for column in zip(*cases, strict=True))
    leaves = [t.requires_grad_() for t in (*images, *texts, *scales)]

    def both() -> None:
        losses = multilevel_contrastive_loss(images, texts, scales, text_indices=indices, backend="triton")
        torch.autograd.grad(losses.sum(), leaves)

    both()  # compiles
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        both()
        torch.cuda.synchronize()
    launched = {event.key: event.count for event in profile.key_averages() if event.self_device_time_total > 0}
    assert sum(launched.values()) <= 8, launched


def test_bad_levels() -> None:
    with pytest.raises(ValueError, match="texts: got 1 levels, expected 2"):
        multilevel_contrastive_loss([X, X], [X], [1.0, 1.0])
    with pytest.raises(ValueError, match="level 1: logit_scale: got -1"):
        multilevel_contrastive_loss([X, X], [X, X], [1.0, -1.0])
    with pytest.raises(ValueError, match="images: got no levels"):
        multilevel_contrastive_loss([], [], [])
    with pytest.raises(TypeError, match="logit_scales: got float, expected a list with an entry per level"):
        multilevel_contrastive_loss([X, X], [X, X], 1.0)  # type: ignore[arg-type]


def test_a_named_backend_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match=r"'triton'.*cannot run on cpu"):
        contrastive_loss(X, X, 1.0, backend="triton")
    with use_backend("cuda"), pytest.raises(BackendError, match=r"'cuda'.*cannot run on cpu"):
        contrastive_loss(X, X, 1.0)


def test_backends_of_threads_may_overlap() -> None:
    """The latest context that has not ended applies, in whichever order they end."""
    first, second = use_backend("cpu"), use_backend("reference")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert dispatch.resolve("contrastive_loss", "auto", "cpu") == "reference"
    second.__exit__(None, None, None)
    assert dispatch.resolve("contrastive_loss", "auto", "cpu") == "cpu"


@pytest.mark.parametrize(
    ("rows", "width", "dtype", "chosen"),
    [
        ([32768], 512, torch.bfloat16, "cuda"),
        ([16384], 512, torch.bfloat16, "cuda"),
        ([32768, 128], 512, torch.bfloat16, "cuda"),
        ([16383], 512, torch.bfloat16, "triton"),
        ([128, 700, 350], 512, torch.bfloat16, "triton"),
        ([32768], 512, torch.float32, "triton"),  # the rest is what cuda does not support
        ([32768], 8200, torch.bfloat16, "triton"),
        ([32768], 512, torch.float64, "reference"),
    ],
)
def test_auto_takes_what_is_fastest_for_the_size(
    rows: list[int], width: int, dtype: torch.dtype, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "_missing", lambda _: None)
    resolve = dispatch.resolve
    monkeypatch.setattr(dispatch, "resolve", lambda op, name, device, **sizes: resolve(op, name, "cuda", **sizes))
    levels = [LevelInput(*(torch.ones((), dtype=dtype).expand(n, width) for _ in range(2)), 10.0) for n in rows]
    assert _resolve_backend(levels, "auto") == chosen
    if chosen == "cuda":
        monkeypatch.setattr(dispatch, "_missing", {"triton": None, "native-hopper": "no headers"}.get)
        assert _resolve_backend(levels, "auto") == "triton"
    if width > 8192:
        with pytest.raises(BackendError, match="it takes rows of width up to 8192, but the input has 8200"):
            _resolve_backend(levels, "cuda")


def test_auto_counts_the_texts_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    monkeypatch.setattr(dispatch, "resolve", lambda *_, work, **__: found.append(work) or "cpu")
    level = LevelInput(torch.ones(20, 8), torch.ones(30, 8), 10.0, torch.zeros(20).long())
    _resolve_backend([level, level], "auto", 4)
    assert found == [2 * 20 * 30 * 4]


def test_triton_in_the_interpreter() -> None:
    """In a separate process: Triton reads TRITON_INTERPRET when a kernel is defined."""
    pytest.importorskip("triton", reason="Triton is not installed")
    code = """
import warnings; warnings.simplefilter("ignore", RuntimeWarning)  # logarithms of sums that are then summed again
import test_contrastive as t, torch, torch._dynamo.testing
for n, u, d, s in ((1, 1, 8, 1.0), (3, 2, 123, 100.0), (131, 40, 33, 14.3)):
    t.test_negatives("triton", n, u, d, s)
t.test_positives("triton", 20, 15, 24, 80.0)
for case in ("opposite", "matched", "one row opposite", "one text opposite"):
    t.test_extreme_features("triton", case, 100.0, n=24)
t.test_nan_stays_nan("triton", "image")
t.test_no_rows("triton")
t.check_no_rows_for_many_texts()
t.test_levels("triton", "positives")
t.check_texts_without_weight("triton")
t.check_chunks()
t.check_rectangular_tiles()
t.check_padding_of_gradients()
t.check_unaligned_features()
for dtype in (torch.bfloat16, torch.float16):
    t.test_low_precision_input("triton", dtype, n=40)
t.check_without_normalization("triton")
t.test_nan_in_a_text_without_rows("triton", n=20)
t.check_scale_not_positive()
t.check_index_out_of_range()
t.check_five_levels()
t.check_given_gradients()
t.check_heavy_texts_in_triton()
t.check_fused_op()
t.check_text_weights()
t.check_pieces_of_positives()
t.check_upstream_gradients()
t.check_rounding_to_tf32()
with t.use_backend("triton"):
    t.test_compile_without_graph_break_for_all_sizes("negatives")
print("checked")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.path.dirname(__file__)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "checked", done.stderr


def check_no_rows_for_many_texts() -> None:
    """Texts that a small level's kernels would not take."""
    from scenarioclip_fast.kernels.contrastive import contrastive_triton

    with patch.object(contrastive_triton, "LONGEST", 4):
        test_no_rows("triton")


def check_chunks() -> None:
    """A level too large for the grouped launches: forward by chunks of rows, backward by blocks."""
    from scenarioclip_fast.kernels.contrastive import contrastive_triton, large, large_triton

    with (
        patch.object(contrastive_triton, "GROUPED", 100),
        patch.multiple(large, FORWARD_ROWS=128, BLOCK_BYTES=128 * 128 * 4),
        patch.object(large_triton, "PARTNER_ENTRIES", 128),  # of a text, four rows at a time
    ):
        check_large_levels()


def check_large_levels() -> None:
    for n, u in ((130, 130), (140, 135), (50, 3)):
        image, text, scale, index = make(n, u, 16, 20.0)
        given = {} if n == u else {"text_index": index}
        own = torch.arange(n) if n == u else index
        assert_as_good_as_eager(
            lambda x, y, s, given=given: run(x, y, s, "triton", **given),
            lambda x, y, s, own=own: reference.naive_loss(x, y[own], s),
            (image, text, scale),
        )
        for frozen in (image, text):  # only one of the two products
            leaves = [t.clone().requires_grad_(t is not frozen) for t in (image, text, scale)]
            trained = [t for t in leaves if t.requires_grad]
            found = torch.autograd.grad(run(*leaves, "triton", **given), trained)
            torch.testing.assert_close(found, torch.autograd.grad(run(*leaves, "cpu", **given), trained))


def check_rectangular_tiles() -> None:
    """Gradient tiles of a large level that are not square."""
    from scenarioclip_fast.kernels.contrastive import contrastive_triton, large
    from scenarioclip_fast.kernels.contrastive.plan import Plan, Tile

    with (
        patch.object(Plan, "gradient_tile", lambda _: Tile(128, 64, 8)),
        patch.object(contrastive_triton, "GROUPED", 100),
        patch.object(large, "BLOCK_BYTES", 1),
    ):
        assert large.block_side(torch.device("cpu"), 8, 4, 128) == 128
        check_levels([(140, 130)], ["negatives"])


def grouped_form(dtype: torch.dtype, width: int, precision: str) -> Any:
    from scenarioclip_fast.kernels.contrastive import grouped

    options = {"rounds": False, "positives": False, "given": False, "normalize": True}
    return grouped.Form(dtype, precision, width, -(-width // 32) * 32, 32, **options)


def check_padding_of_gradients() -> None:
    """The products ignore the padding of dS tiles past the ends of a level."""
    from scenarioclip_fast.kernels.contrastive import grouped
    from scenarioclip_fast.kernels.contrastive.grouped_kernels import level_products

    rows, texts = [70, 3], [33, 5]
    units = torch.randn(73 + 38, 32)
    x, y = units.split([73, 38])
    tiles, by_row, by_text = [], [], []
    for n, u, own, other in zip(rows, texts, x.split(rows), y.split(texts), strict=True):
        grad = torch.randn(n, u)
        by_row.append(grad @ other)
        by_text.append(grad.T @ own)
        tiles.append(F.pad(grad, (0, 64 - u, 0, 128 - n), value=torch.inf).flatten())
    vectors = torch.full((grouped.vectors_size(111),), torch.nan)
    scratch = torch.full((111 * 33 + 74,), torch.nan)
    sizes = (*rows, 0, 0, *texts, 0, 0)
    form = grouped_form(torch.float32, 32, "tf32x3")
    grad = torch.cat(tiles)
    level_products.run(
        grad, units, vectors, scratch, *sizes, FIRST_SIDE=0, grid=(3, 1, 2), warmup=False, **form.products
    )
    found = scratch[: 111 * 32].view(111, 32)
    torch.testing.assert_close(found, torch.cat([*by_row, *by_text]), rtol=1e-4, atol=1e-4)


def check_unaligned_features() -> None:
    """Features with and without the alignment and stride required by 16-byte reads."""
    from scenarioclip_fast.kernels.contrastive.plan import are_aligned

    g = torch.Generator().manual_seed(4)

    def spaced(n: int, d: int, *, first: int, stride: int) -> Tensor:
        return torch.randn(first + n * stride + d, generator=g)[first:].as_strided((n, d), (stride, 1))

    good = {"first": 4, "stride": 20}
    layouts = [
        (16, good, True),
        (16, {**good, "first": 5}, False),
        (16, {**good, "stride": 21}, False),
        (16, {**good, "stride": 1}, False),  # rows that overlap
        (13, good, False),
    ]
    for width, layout, aligned in layouts:
        images, texts = ([spaced(n, width, **kind) for n, kind in ((9, good), (6, layout))] for _ in range(2))
        assert are_aligned(images) == aligned
        leaves = [x.requires_grad_() for x in (*images, *texts)]
        results = []
        for backend in ("triton", "cpu"):
            losses = multilevel_contrastive_loss(images, texts, [10.0, 20.0], backend=backend)
            results.append([losses, *torch.autograd.grad(losses.sum(), leaves)])
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def check_rounding_to_tf32() -> None:
    """Unit rows for TF32 tensor cores are already rounded to the nearest TF32."""
    from scenarioclip_fast.kernels.contrastive import grouped

    image = make(40, 12, 33, 1.0)[0].half()
    image[7, 3] = torch.nan
    form = replace(grouped_form(torch.float32, 33, "tf32"), rounds=True)
    unit, _ = grouped.losses(
        form, grouped.Levels([image], [image]), [torch.tensor(1.0)], [None], [None], torch.empty(1)
    )
    unit = unit[:40]
    exact = F.normalize(image.double(), dim=1)
    good = torch.arange(40) != 7
    assert unit[7].isnan().any() and unit[:, 33:].abs().nan_to_num().sum() == 0
    assert (unit[good].view(torch.int32) & 0x1FFF == 0).all()
    error = (unit[good, :33] - exact[good]).abs() / exact[good].abs().clamp_min(1e-30)
    assert 2**-13 < error.max() <= 2**-11 * 1.001  # half a unit in the last place, after float32's own rounding


def check_fused_op() -> None:
    cases = [make(n, u, 8, 10.0) for n, u in ((5, 3), (2, 2))]
    images, texts, scales, indices = (list(column) for column in zip(*cases, strict=True))
    leaves = [t.requires_grad_() for t in (*images, *texts, *scales)]
    weights = [None, torch.rand(2)]
    for given in ([indices[0], None], [None, None]):
        texts = [leaves[2] if given[0] is not None else torch.randn(5, 8, requires_grad=True), leaves[3]]
        arguments = (images, texts, scales, given, weights, True, True, "triton")
        torch.library.opcheck(contrastive_losses, arguments)
    losses = contrastive_losses(*arguments)[0]
    with Dispatched() as dispatched:
        torch.autograd.grad(losses, [*images, *texts, *scales], torch.ones_like(losses))
    # No zeros are allocated as the gradients of what is saved: that would be a launch.
    assert dispatched.names == ["ones_like", "contrastive_losses_backward", "unbind"]


def check_text_weights() -> None:
    """Weights of the texts, with texts that no row points to, against plain PyTorch in float64; grouped and alone."""
    from scenarioclip_fast.kernels.contrastive import contrastive_triton

    image, text, scale, index = make(30, 9, 16, 20.0)
    text = torch.cat([text, image[:4]])  # hard negatives
    weight = torch.cat([torch.rand(9), torch.tensor([0.0, 0.5, 2.0, 30.0])])
    count = torch.bincount(index, minlength=13)

    def expected(x: Tensor, y: Tensor, s: Tensor, positives: bool) -> Tensor:
        logits = s * F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
        rows, columns = (logits + weight.double().log()).logsumexp(1), logits.logsumexp(0)
        own = logits.gather(1, index[:, None])[:, 0]
        if positives:
            by_text = columns[:9].sum() - (own / count[index]).sum()
            return ((rows - own).mean() + by_text / 9) / 2
        return (rows + columns[index] - 2 * own).mean() / 2

    for positives in (False, True):
        exact = gradients(lambda *t, p=positives: expected(*t, p), (image.double(), text.double(), scale.double()))
        for largest in (contrastive_triton.GROUPED, 100):
            with patch.object(contrastive_triton, "GROUPED", largest):
                found = gradients(
                    lambda x, y, s, p=positives: contrastive_losses(
                        [x], [y], [s], [index], [weight], p, True, "triton"
                    )[0].squeeze(0),
                    (image, text, scale),
                )
            # float32 sums and products at a scale of 20
            assert max(errors(found, exact)) < 3e-6, (positives, errors(found, exact))


def check_pieces_of_positives() -> None:
    """The coefficient of a positive near 1 keeps the digits that the type of dS has no room for.

    In float16, since bfloat16 is wrong in the interpreter: one piece keeps 2^-11 of it, two keep 2^-22.
    """
    from scenarioclip_fast.kernels.contrastive import grouped

    n = 70
    units = torch.eye(n, 96).half()  # exact in float16
    found = {}
    for precision in ("tf32", "tf32x3"):  # with two pieces, and with one
        form = grouped_form(torch.float16, 96, precision)
        loss, d_image, d_scale = torch.empty(1), torch.empty(n, 96, dtype=torch.float16), torch.empty(1)
        levels = grouped.Levels([units], [units])
        saved = grouped.losses(form, levels, [torch.tensor(8.0)], [None], [None], loss)
        buffers = []

        def kept(*sizes: Any, original: Any = torch.empty, buffers: list[Tensor] = buffers, **options: Any) -> Tensor:
            buffers.append(original(*sizes, **options))
            return buffers[-1]

        with patch.object(torch, "empty", kept):
            grouped.losses_backward(form, levels, *saved, torch.ones(1), [d_image], None, d_scale)
        found[precision] = buffers[0][: n * 96].view(n, 96)[:, :n].diagonal().double()  # of d_units
    p = 1 / (1 + (n - 1) * torch.tensor(-8.0).double().exp())
    exact = torch.full((n,), 2 * (p - 1), dtype=torch.float64)
    one, two = ((found[k] / exact - 1).abs().max().item() for k in ("tf32x3", "tf32"))
    # p - 1 is about -0.02 and comes from float32 exponentials: 6e-8 * 12 for the exponent, relative to 0.02.
    assert two < 2**-14 < one, (one, two)


def check_upstream_gradients() -> None:
    """Zero gives zeros, and what is not finite stays so, for its own level only."""
    cases = [make(6, 4, 8, 10.0, seed=k) for k in range(4)]
    images, texts, scales, indices = (list(column) for column in zip(*cases, strict=True))
    leaves = [t.requires_grad_() for t in (*images, *texts, *scales)]
    losses = multilevel_contrastive_loss(images, texts, scales, text_indices=indices, backend="triton")
    upstream = torch.tensor([0.0, torch.nan, torch.inf, 1.0])
    found = torch.autograd.grad(losses, leaves, upstream, retain_graph=True)
    once = torch.autograd.grad(losses, leaves, torch.ones(4))
    for side in range(3):
        zero, nan, infinite, one = found[4 * side : 4 * side + 4]
        assert zero.eq(0).all() and nan.isnan().all() and not infinite.isfinite().any()
        assert torch.equal(one, once[4 * side + 3])


def check_given_gradients() -> None:
    """Log-sums of several levels, two groups of them, with given gradients of any size and kind."""
    sizes = [(70, 65), (3, 9), (0, 4), (1, 1), (130, 20)]
    n, u = sum(a for a, _ in sizes), sum(b for _, b in sizes)
    g = torch.Generator().manual_seed(5)
    images, texts = ([torch.randn(pair[side], 24, generator=g) for pair in sizes] for side in (0, 1))
    scales = [torch.tensor(s) for s in (1.0, 100.0, 5.0, 2.0, 20.0)]
    indices = [torch.randint(b, (a,), generator=g) for a, b in sizes]
    weight = torch.rand(u, generator=g) * 3
    upstream = [torch.randn(size, generator=g).double() for size in (n, u, n)]
    for factor in (1.0, 1e-12, 1e12):
        results = []
        for backend, leaves in (
            ("triton", [t.clone().requires_grad_() for t in (*images, *texts, *scales)]),
            ("reference", [t.double().requires_grad_() for t in (*images, *texts, *scales)]),
        ):
            x, y, s = leaves[:5], leaves[5:10], torch.stack(leaves[10:])
            given = weight.to(leaves[0].dtype)
            sums = contrastive_forward(x, y, s, torch.cat(indices), given, True, 0, backend)[:3]
            defined = [torch.where(v.isfinite(), v, 0.0) for v in sums]
            loss = sum((v.double() * w * factor).sum() for v, w in zip(defined, upstream, strict=True))
            results.append([*defined, *torch.autograd.grad(loss, leaves)])
        for found, exact in zip(*results, strict=True):
            largest = exact.abs().max().item() if exact.numel() else 0.0
            # float32 exponents of up to 144, and sums of 130 products
            torch.testing.assert_close(found.double(), exact.double(), rtol=1e-4, atol=3e-5 * largest)


def check_heavy_texts(backend: str) -> None:
    """Weights whose products with an exponential overflow, and exponentials that count only with their weight."""
    index = torch.arange(20) % 8
    cases = [(10.0, 1e38, -0.5, 0.25), (100.0, 1e30, 0.4, 0.3), (100.0, 1e20, -0.5, -0.3)]
    cases += [
        (200.0, 1e25, 0.1, 0.33),
        (200.0, 1e25, 0.25, 0.5),
        (100.0, 1e20, -0.6, -0.2),
    ]  # what is flushed weighs more than the rest
    for s, heavy, cosine, others in cases:
        # Texts along the axes, the heavy one along axis 8; the rest of an image is along the last axis.
        text, image = torch.eye(9, 16), torch.zeros(20, 16)
        image[:, :3] = others
        image[:, 8] = cosine
        image[:, 15] = (1 - image.square().sum(1)).clamp_min(0).sqrt()
        image[19, 8] = 0.3  # so that the sum of the text's column is not out of range as well
        image += 0.01 * torch.randn(image.shape, generator=torch.Generator().manual_seed(1))
        scale, weight = torch.tensor(s), torch.ones(9)
        weight[8] = heavy

        def exact(x: Tensor, y: Tensor, t: Tensor, weight: Tensor = weight) -> Tensor:
            logits = t * F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
            rows, columns = (logits + weight.double().log()).logsumexp(1), logits.logsumexp(0)
            return (rows + columns[index] - 2 * logits.gather(1, index[:, None])[:, 0]).mean() / 2

        wanted = gradients(exact, (image.double(), text.double(), scale.double()))
        found = gradients(lambda *t, w=weight: run(*t, backend, text_index=index, text_weight=w), (image, text, scale))
        # Logits of up to 200 in float32 are rounded by 200 * 2^-24, which is also the relative error of a probability.
        assert max(errors(found, wanted)) < 5e-5, (s, heavy, errors(found, wanted))


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_heavy_texts(backend: str) -> None:
    check_heavy_texts(backend)


def check_heavy_texts_in_triton() -> None:
    from scenarioclip_fast.kernels.contrastive import contrastive_triton

    for largest in (contrastive_triton.GROUPED, 1):  # grouped, and alone
        with patch.object(contrastive_triton, "GROUPED", largest):
            check_heavy_texts("triton")


def check_five_levels() -> None:
    """More levels than fit in one launch, with both kinds of duplicates."""
    check_levels([(3, 2), (5, 5), (0, 0), (7, 1), (9, 4)], DUPLICATES)


def check_levels(sizes: list[tuple[int, int]], duplicates: Sequence[str]) -> None:
    """Compare losses and gradients of levels of these (rows, texts) between Triton and the CPU backend."""
    cases = [make(n, u, 8, 10.0, seed=n) for n, u in sizes]
    images, texts, scales, indices = (list(column) for column in zip(*cases, strict=True))
    leaves = [t.requires_grad_() for t in (*images, *texts, *scales)]
    for kind in duplicates:
        results = []
        for backend in ("triton", "cpu"):
            losses = multilevel_contrastive_loss(
                images, texts, scales, text_indices=indices, duplicates=kind, backend=backend
            )
            results.append([losses, *torch.autograd.grad(losses @ torch.arange(1.0, 1 + len(sizes)), leaves)])
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def check_texts_without_weight(backend: str) -> None:
    image, text, scale, index = make(20, 6, 16, 200.0)
    assert_as_good_as_eager(
        lambda x, y, s: run(x, torch.cat([y, image[:3]]), s, backend, text_index=index),
        lambda x, y, s: reference.naive_loss(x, y[index], s),
        (image, text, scale),
    )


def check_index_out_of_range() -> None:
    """Call the kernels directly, because the ops check the index on the interpreter's device, the CPU."""
    from scenarioclip_fast.kernels.contrastive import contrastive_triton as triton

    image, text, scale, _ = make(5, 5, 16, 10.0)
    for bad in (5, -1):
        index = torch.tensor([0, 1, 2, 3, bad])
        for largest in (triton.GROUPED, 1):  # grouped, and alone
            with patch.object(triton, "GROUPED", largest):
                for positives in (False, True):
                    loss, saved = triton.losses([image], [text], [scale], [index], [None], positives, True)
                    assert loss.isnan().all()
            count = saved[-2] if largest == 1 else saved[1][20 + 5 : 30]  # `extra` of the texts
            assert count.tolist() == [1, 1, 1, 1, 0]


def check_scale_not_positive() -> None:
    """On a GPU the value is not checked before the kernels run."""
    from scenarioclip_fast.kernels.contrastive import contrastive_triton

    image, text, _, _ = make(5, 5, 16, 1.0)
    for s in (-3.0, 0.0, torch.nan):
        row, column, *_ = contrastive_triton.forward([image], [text], torch.tensor([s]), None, None, True, 0)
        assert row.isnan().all() and column.isnan().all()
        assert contrastive_triton.losses([image], [text], [torch.tensor(s)], [None], [None], False, True)[0].isnan()


def check_without_normalization(backend: str) -> None:
    image, text, scale, _ = make(30, 30, 8, 1.0)
    for length in (0.1, 20.0):  # 20: logits far above the scale
        x, y = (F.normalize(v, dim=1) * length for v in (image, text))
        row, column, positive = log_sums(x, y, scale, normalize=False, backend=backend)
        logits = x.double() @ y.double().T
        torch.testing.assert_close(row, logits.logsumexp(1), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(column, logits.logsumexp(0), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(positive, logits.diagonal(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_normalization(backend: str) -> None:
    check_without_normalization(backend)
