"""The chunks and blocks of a large level, with the kernels in plain PyTorch, against float64."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from scenarioclip_fast.kernels.contrastive import contrastive_cuda, large, reference
from scenarioclip_fast.kernels.contrastive.contrastive_cuda import NativeKernels
from scenarioclip_fast.kernels.contrastive.large import Factors, Positives, RowsByText, Side
from torch import Tensor

from scenarioclip_fast import dispatch

LOG2E = math.log2(math.e)


class PlainKernels:
    """What `large.Kernels` promises, in float64, on operands that are not normalised."""

    sum_tile = (4, 8)
    block_multiple = 8

    def __init__(self, folds: bool = True) -> None:
        self.folds = folds
        self.blocks: list[tuple[int, int]] = []

    def side(self, features: Tensor, inverse: Tensor | None, normalize: bool) -> Side:
        if inverse is None:
            inverse = reference.inverse_norms(features, normalize)
        fold = inverse if self.folds else torch.ones_like(inverse)
        operand = features if self.folds else reference.unit_rows(features, inverse)
        return Side(features, torch.nn.functional.pad(operand, [0, -features.shape[1] % 8]), fold, inverse)

    def logits(self, x: Side, y: Side, scale: Tensor) -> Tensor:  # [N, U] in base 2
        unit_x, unit_y = (side.operand.double() * side.fold.double()[:, None] for side in (x, y))
        return unit_x @ unit_y.T * scale.double() * LOG2E

    def columns(self, positives: Positives, rows: int) -> Tensor:  # [N]
        return (torch.arange(rows) if positives.index is None else positives.index) + positives.shift

    def at_positives(self, positives: Positives, rows: int, texts: int) -> Tensor:  # [N, U] bool
        return self.columns(positives, rows)[:, None] == torch.arange(texts)

    def sums(
        self,
        x: Side,
        y: Side,
        scale: Tensor,
        positives: Positives,
        weight: Tensor | None,
        row_parts: Tensor,
        text_parts: Tensor,
        own: Tensor,
    ) -> None:
        logits = self.logits(x, y, scale)
        e = torch.exp2(logits - (scale.double() * LOG2E - 100).clamp_min(0))
        weighted = e if weight is None else e * weight
        for j, part in enumerate(weighted.split(self.sum_tile[1], 1)):
            row_parts[j] = part.sum(1)
        for i, part in enumerate(e.split(self.sum_tile[0])):
            text_parts[i] = part.sum(0)
        rows, columns = self.at_positives(positives, len(x), len(y)).nonzero(as_tuple=True)
        own[rows] = logits[rows, columns].float()

    def log_sums(
        self,
        parts: Tensor,
        x: Side,
        y: Side,
        scale: Tensor,
        weight: Tensor | None,
        log_sum: Tensor,
        own: Tensor | None = None,
        positive: Tensor | None = None,
    ) -> None:
        if own is not None and positive is not None:
            positive[:] = own.double() / LOG2E
        log_sum[:] = (parts.double().sum(0).log2() + (scale.double() * LOG2E - 100).clamp_min(0)) / LOG2E

    def factors(
        self,
        x: Side,
        y: Side,
        scale: Tensor,
        index: Tensor | None,
        weight: Tensor | None,
        sums: tuple[Tensor, Tensor, Tensor],
        grads: tuple[Tensor, Tensor, Tensor],
        shift: int,
    ) -> Factors:
        texts = self.columns(Positives(index), len(x))
        w = torch.ones(len(y)) if weight is None else weight
        row_lse, text_lse, positive = sums
        by_row, by_text, by_positive = (2.0**shift * g for g in grads)
        total = by_row * w[texts] * (positive - row_lse).exp() + by_text[texts] * (positive - text_lse[texts]).exp()
        h = (total + by_positive) * x.fold * y.fold[texts]
        return Factors((row_lse * LOG2E, by_row), (text_lse * LOG2E, by_text, w * y.fold), h.float(), shift)

    def gradients(
        self,
        x: Side,
        y: Side,
        scale: Tensor,
        positives: Positives,
        factors: Factors,
        out: Tensor,
    ) -> None:
        self.blocks.append((len(x), len(y)))
        logits = self.logits(x, y, scale)
        (row_log, by_row), (text_log, by_text, weight) = factors.rows, factors.texts
        h = torch.exp2(logits - row_log[:, None]) * by_row[:, None] * weight
        h += torch.exp2(logits - text_log) * by_text * y.fold
        h[self.at_positives(positives, len(x), len(y))] = 0
        out.copy_(h * x.fold[:, None])

    def finish(
        self,
        side: Side,
        product: Tensor,
        other: Side,
        partners: Positives | RowsByText,
        positive: Tensor,
        scale: Tensor,
        shift: int,
        normalize: bool,
        out: Tensor | None,
        dots: Tensor,
    ) -> None:
        total = product.double()
        if isinstance(partners, Positives):
            total += positive[:, None] * other.operand[self.columns(partners, len(side))].double()
        else:
            rows, start = partners.order, partners.start
            texts = torch.repeat_interleave(torch.arange(len(side)), start.diff())
            total.index_add_(0, texts, positive[rows, None].double() * other.operand[rows].double())
        operand = side.operand.double()
        dot = (operand * total).sum(1)
        dots[:] = dot * 2.0**-shift
        if out is not None:
            if normalize:
                total -= operand * (side.fold.double() ** 2 * dot)[:, None]
            gain = scale.double() * 2.0**-shift * (side.inverse / side.fold).double()[:, None]
            out.copy_((total * gain)[:, : out.shape[1]])


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(large, "FORWARD_ROWS", 12)
    monkeypatch.setattr(large, "BLOCK_BYTES", 16 * 16 * 4)  # blocks of 16 x 16 in float32
    yield


def make(rows: int, texts: int, with_index: bool) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(rows * 100 + texts)
    image, text = (3 * torch.randn(k, 13, generator=generator) for k in (rows, texts))
    index = torch.randint(texts, (rows,), generator=generator) if with_index else None
    weight = torch.randint(4, (texts,), generator=generator).float() if with_index else None
    if index is not None and weight is not None:
        weight[index[0]] = 2.0
    grads = [torch.randn(k, generator=generator, dtype=torch.float64) / rows for k in (rows, texts, rows)]
    return image, text, index, weight, grads  # type: ignore[return-value]


SIZES = [(1, 1), (12, 12), (13, 13), (16, 16), (17, 17), (40, 40)]
RAGGED = [(1, 5), (40, 3), (7, 33), (33, 47), (12, 1)]
CASES = [*product(SIZES, [False]), *product([*SIZES, *RAGGED], [True])]


@pytest.mark.parametrize("folds", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("size", "with_index"), CASES)
def test_a_level_in_blocks(size: tuple[int, int], with_index: bool, normalize: bool, folds: bool) -> None:
    image, text, index, weight, grads = make(*size, with_index)
    if not normalize:  # cosines of the order of one, as the plain kernels do not recompute sums out of range
        image, text = image / 10, text / 10
    scale = torch.tensor(2.5)
    kernels = PlainKernels(folds)
    found = large.forward(kernels, image, text, scale, index, weight, normalize)
    exact: list[Any] = [
        t if t is None or t.dtype == torch.int64 else t.double() for t in (image, text, scale, index, weight)
    ]
    expected = reference.level_forward(*exact, normalize)
    # Sums and cosines are rounded to float32.
    for ours, theirs in zip(found[:3], expected[:3], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    d_exact = reference.level_backward(*exact, *expected, *grads, None, normalize)
    for need_image, need_text in product([True, False], repeat=2):
        d_found = large.backward(
            kernels, image, text, scale, index, weight, *found, *grads, None, normalize, need_image, need_text
        )
        for ours, theirs, needed in zip(d_found, d_exact, (need_image, need_text, True), strict=True):
            if needed:
                # H and the products are rounded to float32, relative to the largest entries.
                torch.testing.assert_close(ours.double().view_as(theirs), theirs, rtol=1e-4, atol=2e-6)
            else:
                assert ours.numel() == 0
    assert all(max(block) <= 16 for block in kernels.blocks)


@pytest.mark.parametrize("size", [(0, 0), (0, 4), (3, 0)])
def test_empty_levels(size: tuple[int, int]) -> None:
    image, text = (torch.randn(k, 8) for k in size)
    index = torch.zeros(size[0], dtype=torch.int64)
    scale = torch.ones(())
    saved = large.forward(PlainKernels(), image, text, scale, index, None, True)
    assert saved[0].tolist() == [-math.inf] * size[0] and saved[1].tolist() == [-math.inf] * size[1]
    grads = tuple(torch.ones(k, dtype=torch.float64) for k in (*size, size[0]))
    d_image, d_text, d_scale = large.backward(PlainKernels(), image, text, scale, index, None, *saved, *grads)
    assert not d_image.any() and not d_text.any() and d_scale == 0
    assert d_image.shape == image.shape and d_text.shape == text.shape


def test_rows_by_text() -> None:
    by_text = RowsByText.of(torch.tensor([3, 0, 3, 1, 3]), 5)
    parts = by_text.order.tensor_split(by_text.start[1:-1])
    assert [part.tolist() for part in parts] == [[1], [3], [], [0, 2, 4], []]


class PlainOps:
    """The compiled ops of the backend "cuda" in plain PyTorch, as csrc/library.cpp declares them."""

    plain = PlainKernels()
    plain.sum_tile = (128, 128)

    def op(self, name: str) -> Any:
        return getattr(self, name)

    @staticmethod
    def sides(x: Tensor, y: Tensor, fold_x: Tensor, fold_y: Tensor) -> tuple[Side, Side]:
        for operand in (x, y):  # what TMA requires
            assert operand.stride(1) == 1 and operand.shape[1] % 8 == 0 and operand.data_ptr() % 16 == 0
            assert len(operand) == 1 or operand.stride(0) % 8 == 0
        return Side(x, x, fold_x, fold_x), Side(y, y, fold_y, fold_y)

    def inverse_norms(self, x: Tensor, normalize: bool, out: Tensor) -> None:
        assert x.dtype == torch.bfloat16 and x.stride(1) == 1
        out.copy_(reference.inverse_norms(x, normalize))

    def sums(
        self, x: Tensor, y: Tensor, fold_x: Tensor, fold_y: Tensor, scale: Tensor, index: Tensor | None, first: int,
        weight: Tensor | None, row_parts: Tensor, text_parts: Tensor, own: Tensor,
    ) -> None:  # fmt: skip
        sides = self.sides(x, y, fold_x, fold_y)
        self.plain.sums(*sides, scale[0], Positives(index, first), weight, row_parts, text_parts, own)

    def finish_sums(
        self, parts: Tensor, x: Tensor, y: Tensor, fold_x: Tensor, fold_y: Tensor, scale: Tensor,
        weight: Tensor | None, own: Tensor | None, lse: Tensor, positive: Tensor | None,
    ) -> None:  # fmt: skip
        self.plain.log_sums(parts, *self.sides(x, y, fold_x, fold_y), scale[0], weight, lse, own, positive)

    def factors(
        self, row_lse: Tensor, text_lse: Tensor, positive: Tensor, grad_row: Tensor, grad_text: Tensor,
        grad_positive: Tensor, fold_x: Tensor, fold_y: Tensor, scale: Tensor, index: Tensor | None, first: int,
        weight: Tensor | None, exponent: int, rows: Tensor, texts: Tensor, gain: Tensor,
    ) -> None:  # fmt: skip
        x, y = (Side(f[:, None], f[:, None], f, f) for f in (fold_x, fold_y))
        assert first == 0
        sums, grads = (row_lse, text_lse, positive), (grad_row, grad_text, grad_positive)
        found = self.plain.factors(x, y, scale[0], index, weight, sums, grads, exponent)
        gain.copy_(found.positive)
        for out, vectors in ((rows, (*found.rows, fold_x)), (texts, (*found.texts, fold_y))):
            for k, vector in enumerate(vectors):
                out[:, k] = vector
        texts[:, 6] = scale

    def gradients(
        self, x: Tensor, y: Tensor, index: Tensor | None, first: int, rows: Tensor, texts: Tensor, out: Tensor
    ) -> None:
        assert out.stride(0) % 8 == 0 and out.data_ptr() % 16 == 0
        sides = self.sides(x, y, rows[:, 2], texts[:, 3])
        factors = Factors((rows[:, 0], rows[:, 1]), (texts[:, 0], texts[:, 1], texts[:, 2]), rows[:, 0], 0)
        self.plain.gradients(*sides, texts[0, 6], Positives(index, first), factors, out)

    def finish_rows(
        self, features: Tensor, inverse: Tensor, product: Tensor, partners: Tensor, index: Tensor | None, first: int,
        gain: Tensor, scale: Tensor, exponent: int, normalize: bool, out: Tensor, dots: Tensor,
    ) -> None:  # fmt: skip
        self.finish(
            features, inverse, product, partners, Positives(index, first), gain, scale, exponent, normalize, out, dots
        )

    def finish_texts(
        self, features: Tensor, inverse: Tensor, product: Tensor, partners: Tensor, order: Tensor, offsets: Tensor,
        first: int, gain: Tensor, scale: Tensor, exponent: int, normalize: bool, out: Tensor, dots: Tensor,
    ) -> None:  # fmt: skip
        rows = RowsByText(order, offsets)
        self.finish(features, inverse, product, partners, rows, gain, scale, exponent, normalize, out, dots)

    def finish(
        self, features: Tensor, inverse: Tensor, product: Tensor, partners: Tensor, pointers: Positives | RowsByText,
        gain: Tensor, scale: Tensor, exponent: int, normalize: bool, out: Tensor, dots: Tensor,
    ) -> None:  # fmt: skip
        assert out.is_contiguous() and product.is_contiguous() and out.shape == features.shape
        side, other = self.sides(features, partners, inverse, torch.ones(len(partners)))
        self.plain.finish(side, product, other, pointers, gain, scale[0], exponent, normalize, out, dots)


def test_the_calls_of_the_compiled_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend "cuda", with its ops in plain PyTorch: blocks, layouts and arguments."""
    monkeypatch.setattr(contrastive_cuda, "_op", PlainOps().op)
    check_levels(lambda _: NativeKernels(), torch.bfloat16)
    check_rows_of_any_layout(lambda _: NativeKernels(), dtypes=(torch.bfloat16,))


def test_features_that_are_too_wide_for_cuda() -> None:
    with pytest.raises(ValueError, match="got features of width 8193, expected at most 8192: use backend 'triton'"):
        NativeKernels().side(torch.zeros(1, 8193, dtype=torch.bfloat16), None, True)


@pytest.mark.parametrize("normalize", [True, False])
def test_levels_of_the_native_backend(monkeypatch: pytest.MonkeyPatch, normalize: bool) -> None:
    """Several levels, empty ones too, against the reference."""
    monkeypatch.setattr(contrastive_cuda, "_op", PlainOps().op)
    cases = [drawn(n, u, 20, torch.bfloat16, True, "cpu") for n, u in ((13, 7), (0, 3), (20, 30))]
    images, texts, indices, _, _ = zip(*cases, strict=True)
    images, texts = ([t if normalize else t / 10 for t in side] for side in (images, texts))
    inputs = (images, texts, torch.tensor([2.0, 3.0, 4.0]), torch.cat(indices), None, normalize)
    ours, theirs = contrastive_cuda.forward(*inputs, 0), reference.forward(*inputs, 0)
    torch.testing.assert_close(ours[:4], theirs[:4], rtol=1e-6, atol=1e-5, equal_nan=True)
    grads = [torch.full_like(t, 1 / 33) for t in ours[:3]]
    found = contrastive_cuda.backward(*inputs[:5], ours, grads, normalize, True, True)
    expected = reference.backward(*inputs[:5], theirs, grads, normalize, True, True)
    for side in (0, 1):  # H and the gradients are rounded to bfloat16
        torch.testing.assert_close(found[side], expected[side], rtol=2**-6, atol=2e-4)
    torch.testing.assert_close(found[2], expected[2], rtol=2**-6, atol=1e-3)


def test_triton_in_the_interpreter() -> None:
    """In a separate process: Triton reads TRITON_INTERPRET when a kernel is defined."""
    pytest.importorskip("triton", reason="Triton is not installed")
    code = """
import warnings; warnings.simplefilter("ignore", RuntimeWarning)  # exponentials of flagged logits, which are not used
import test_contrastive_large as t, torch
from scenarioclip_fast.kernels.contrastive.large_triton import TritonKernels
t.check_levels(TritonKernels.of, torch.float32)
t.check_levels(TritonKernels.of, torch.bfloat16)
t.check_extremes(TritonKernels.of)
t.check_rows_of_any_layout(TritonKernels.of)
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


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_kernels_on_a_gpu(backend: str) -> None:
    if reason := dispatch.unavailable_reason("contrastive_loss", backend, "cuda", "bfloat16"):
        pytest.skip(reason)
    if backend == "cuda":
        make_kernels: Make = lambda _: NativeKernels()  # noqa: E731
    else:
        from scenarioclip_fast.kernels.contrastive.large_triton import TritonKernels

        make_kernels = TritonKernels.of
        check_levels(make_kernels, torch.float32, "cuda")
    check_levels(make_kernels, torch.bfloat16, "cuda")
    check_extremes(make_kernels, "cuda")
    dtypes = (torch.bfloat16,) if backend == "cuda" else (torch.bfloat16, torch.float32)
    check_rows_of_any_layout(make_kernels, "cuda", dtypes)


# What follows takes the kernels of a backend: on a GPU, or in Triton's interpreter.

Make = Any  # features -> Kernels


def compare(
    make_kernels: Make,
    image: Tensor,  # [N, D]
    text: Tensor,  # [U, D]
    scale: float,
    index: Tensor | None,
    weight: Tensor | None,
    grads: list[Tensor],
    normalize: bool = True,
    needed: tuple[tuple[bool, bool], ...] = ((True, True),),  # gradients of image and text
) -> None:
    """Against float64 on the same rounded features."""
    device = image.device
    s = torch.tensor(scale, device=device)
    kernels = make_kernels(image)
    found = large.forward(kernels, image, text, s, index, weight, normalize)
    exact = [t if t is None or t.dtype == torch.int64 else t.double() for t in (image, text, s, index, weight)]
    expected = reference.level_forward(*exact, normalize)  # type: ignore[arg-type]
    for ours, theirs in zip(found[:3], expected[:3], strict=True):
        # An exponent of up to 200 in float32 is off by 8e-6, in base 2; so is each of the terms.
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=2e-5)
    d_exact = reference.level_backward(*exact, *expected, *grads, None, normalize)  # type: ignore[arg-type]
    # bfloat16: H is rounded to 2^-9 of each entry on a GPU, and the gradients are rounded once more.
    rtol = 2**-7 if image.dtype == torch.bfloat16 else 1e-4
    for need_image, need_text in needed:
        d_found = large.backward(
            kernels, image, text, s, index, weight, *found, *grads, None, normalize, need_image, need_text
        )
        for ours, theirs, compared in zip(d_found, d_exact, (need_image, need_text, True), strict=True):
            if compared:
                allowed = rtol * theirs.norm().clamp_min(1e-12)
                if theirs.dim() == 0 and image.dtype == torch.bfloat16 and device.type == "cuda":
                    allowed += scale_error(exact, expected, grads, normalize)
                error = (ours.double() - theirs).norm()
                assert error <= allowed, (error, allowed, image.shape, text.shape)


def scale_error(exact: list[Any], sums: tuple[Tensor, ...], grads: list[Tensor], normalize: bool) -> Tensor:
    """What rounding each entry of H to bfloat16 does to the gradient of the scale, sum_iu H_iu cos_iu.

    Its terms cancel, while their errors of at most 2^-9 add up at random. For the rows of lengths 1e-5 to 1e5 below,
    this rounding alone, with everything else in float64, changes it by 0.9 %.
    """
    image, text, s, index, weight = exact
    x, y = (F.normalize(side, dim=1) if normalize else side for side in (image, text))
    cosine, row, column = x @ y.T, sums[0][:, None], sums[1]
    w = torch.ones_like(column) if weight is None else weight
    h = grads[0][:, None] * w * (s * cosine - row).exp() + grads[1] * (s * cosine - column).exp()
    h[torch.arange(len(x)), torch.arange(len(x)) if index is None else index] = 0  # added in float32
    return 2**-9 * (h * cosine).norm()


def drawn(rows: int, texts: int, width: int, dtype: torch.dtype, with_index: bool, device: str) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(rows * 100 + texts)
    image, text = (torch.randn(k, width, generator=generator).to(device, dtype) for k in (rows, texts))
    index = torch.randint(texts, (rows,), generator=generator).to(device) if with_index else None
    weight = None if index is None else torch.bincount(index, minlength=texts).float()
    grads = [torch.randn(k, generator=generator, dtype=torch.float64).to(device) / rows for k in (rows, texts, rows)]
    return image, text, index, weight, grads


def check_levels(make_kernels: Make, dtype: torch.dtype, device: str = "cpu") -> None:
    sizes = [(1, 1, False), (129, 129, False), (131, 40, True), (1, 5, True), (3, 129, True), (135, 130, True)]
    with patch.multiple(large, FORWARD_ROWS=128, BLOCK_BYTES=128 * 128 * 4):
        for rows, texts, with_index in sizes:
            image, text, index, weight, grads = drawn(rows, texts, 72, dtype, with_index, device)
            compare(make_kernels, image, text, 14.3, index, weight, grads)
        sides = tuple(product((True, False), repeat=2))
        compare(make_kernels, image / 10, text / 10, 1.0, index, weight, grads, normalize=False, needed=sides)


def check_extremes(make_kernels: Make, device: str = "cpu") -> None:
    """Log-sums far from the middle, norms far from one, rows of zeros, NaN, texts of weight 0, skewed texts."""
    with patch.multiple(large, FORWARD_ROWS=128, BLOCK_BYTES=128 * 128 * 4):
        image, text, index, weight, grads = drawn(40, 30, 64, torch.bfloat16, True, device)
        one = torch.randn(64, generator=torch.Generator().manual_seed(0)).to(device)
        opposite = (-one + 0.05 * text.float()).bfloat16()
        for rows in ((one + 0.05 * image.float()).bfloat16(), image):  # all cosines near -1, or those of one row alone
            rows = rows.clone()
            rows[3] = one
            compare(make_kernels, rows, opposite, 100.0, index, weight, grads)
        near = [(one + 0.05 * side.float()).bfloat16() for side in (image, text)]
        compare(make_kernels, *near, 100.0, index, weight, grads)
        lengths = torch.logspace(-5, 5, 40).to(device)[:, None]
        compare(make_kernels, (image * lengths).bfloat16(), text * 1e-4, 50.0, index, weight, grads)
        # A text without weight that exceeds the row's log-sum by far more than a float32 can hold.
        weight = weight.clone()
        weight[index[0]] = 0
        far = opposite.clone()
        far[index[0]] = one
        compare(make_kernels, near[0], far, 100.0, index, weight, grads)
        compare(make_kernels, image, text, 20.0, torch.zeros_like(index), None, grads)  # all rows have one text
        zeros = image.clone()
        zeros[5] = 0
        compare(make_kernels, zeros, text, 5.0, index, None, grads)
        scale = torch.tensor(5.0, device=device)
        for bad in (torch.nan, torch.inf, 1e-8, 1e8):  # not exact on this path: NaN, never a wrong number
            poisoned = image.clone()
            poisoned[5] = bad
            row, column, positive, *_ = large.forward(make_kernels(image), poisoned, text, scale, index, None, True)
            assert row[5].isnan() and positive[5].isnan() and column.isnan().all()
            assert row.isnan().sum() == 1 and positive.isnan().sum() == 1


def check_rows_of_any_layout(
    make_kernels: Make, device: str = "cpu", dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
) -> None:
    """Widths, strides and offsets that matrix kernels cannot read are copied."""
    layouts = ((33, 0, 33), (64, 0, 96), (64, 0, 65), (64, 3, 64), (64, 0, 8), (1030, 0, 1030))  # 8: rows overlap
    for width, first, stride in layouts:
        for dtype in dtypes if width == 33 else dtypes[:1]:
            sides = [
                torch.randn(first + 40 * stride + width, generator=torch.Generator().manual_seed(k))
                .to(device, dtype)[first:]
                .as_strided((40, width), (stride, 1))
                for k in range(2)
            ]
            grads = [torch.full((40,), 1 / 40, dtype=torch.float64, device=device) for _ in range(3)]
            compare(make_kernels, *sides, 10.0, None, None, grads)
    g = torch.Generator().manual_seed(2)
    one = torch.randn(1, 72, generator=g).to(device, torch.bfloat16)[:, 3:67]  # a single row, which may begin anywhere
    index = torch.tensor([2], device=device)
    texts = torch.randn(40, 64, generator=g).to(device, torch.bfloat16)
    compare(make_kernels, one, texts, 10.0, index, None, [grads[0][:1], grads[1], grads[2][:1]])
    columns = torch.randn(64, 40, generator=g).to(device, torch.bfloat16).T
    compare(make_kernels, columns, columns, 10.0, None, None, grads)
