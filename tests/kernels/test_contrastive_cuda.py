"""The ops of the backend "cuda" of contrastive_loss on a device, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from scenarioclip_fast import native

pytestmark = pytest.mark.gpu

TILE = 128
# The unit of the last place of float32, times what is multiplied and added one after another.
FLOAT = 2.0**-24


@pytest.fixture(autouse=True)
def library() -> None:
    if reason := native.unavailable_reason("hopper"):
        pytest.skip(reason)
    if torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("these kernels need compute capability 9.0")


def features(rows: int, width: int, seed: int, size: float = 1.0) -> Tensor:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * size
    return x.to("cuda", torch.bfloat16)


def inverse_norms(x: Tensor, normalize: bool = True) -> Tensor:
    out = torch.empty(len(x), device="cuda")
    torch.ops.scenarioclip_fast_C.contrastive_inverse_norms(x, normalize, out)
    return out


class Problem:
    """Features, an index whose positives lie anywhere, weights, and the logits in float64."""

    def __init__(self, rows: int, texts: int, width: int, scale: float, index: bool, weight: str) -> None:
        self.x, self.y = features(rows, width, 1, 3.0), features(texts, width, 2, 0.2)
        self.scale = torch.tensor([scale], device="cuda")
        generator = torch.Generator().manual_seed(3)
        self.index = torch.randint(texts, (rows,), generator=generator).cuda() if index else None
        numbers = torch.rand(texts, generator=generator).mul(4).sub(0.5).clamp(min=0)
        weights = {"numbers": numbers.cuda(), "counts": numbers.int().cuda(), "ones": None}
        self.weight = weights[weight]
        self.inv_x, self.inv_y = inverse_norms(self.x), inverse_norms(self.y)
        unit_x = torch.nn.functional.normalize(self.x.double(), dim=1)
        unit_y = torch.nn.functional.normalize(self.y.double(), dim=1)
        self.logits = scale * (unit_x @ unit_y.T)
        self.own = torch.arange(rows, device="cuda") if self.index is None else self.index
        self.w = torch.ones(texts, device="cuda").double() if self.weight is None else self.weight.double()
        self.tolerance = FLOAT * (8 * scale + 64 + width)

    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        rows, texts = self.logits.shape
        row_parts = torch.full((-(-texts // TILE), rows), math.nan, device="cuda")
        col_parts = torch.full((-(-rows // TILE), texts), math.nan, device="cuda")
        exponent = torch.full((rows,), math.nan, device="cuda")
        torch.ops.scenarioclip_fast_C.contrastive_sums(
            self.x,
            self.y,
            self.inv_x,
            self.inv_y,
            self.scale,
            self.index,
            0,
            self.weight,
            row_parts,
            col_parts,
            exponent,
        )
        return row_parts, col_parts, exponent

    def log_sums(self) -> tuple[Tensor, Tensor]:
        return (self.logits + self.w.log()).logsumexp(1), self.logits.logsumexp(0)


PROBLEMS = [
    (300, 333, 136, 20.0, True, "numbers"),
    (129, 640, 512, 100.0, False, "ones"),  # rows that have a text each, and more texts
    (1, 1, 8, 5.0, False, "ones"),
    (1100, 257, 64, 60.0, True, "counts"),
]


@pytest.mark.parametrize("case", PROBLEMS)
def test_sums(case: tuple[int, int, int, float, bool, str]) -> None:
    p = Problem(*case)
    row_parts, col_parts, exponent = p.sums()
    rows, texts = p.logits.shape
    offset = max(p.scale.item() * math.log2(math.e) - 100, 0) * math.log(2)
    e = (p.logits - offset).exp()
    for tile, part in enumerate((e * p.w).split(TILE, 1)):
        torch.testing.assert_close(row_parts[tile].double(), part.sum(1), rtol=p.tolerance, atol=1e-30)
    for tile, part in enumerate(e.split(TILE, 0)):
        torch.testing.assert_close(col_parts[tile].double(), part.sum(0), rtol=p.tolerance, atol=1e-30)
    own = p.logits[torch.arange(rows, device="cuda"), p.own.clamp(max=texts - 1)] - offset
    torch.testing.assert_close(exponent.double() * math.log(2), own, rtol=0, atol=p.tolerance)

    lse, positive = (torch.empty(rows, device="cuda", dtype=torch.float64) for _ in range(2))
    col_lse = torch.empty(texts, device="cuda", dtype=torch.float64)
    finish = torch.ops.scenarioclip_fast_C.contrastive_finish_sums
    finish(row_parts, p.x, p.y, p.inv_x, p.inv_y, p.scale, p.weight, exponent, lse, positive)
    finish(col_parts, p.y, p.x, p.inv_y, p.inv_x, p.scale, None, None, col_lse, None)
    want_row, want_col = p.log_sums()
    torch.testing.assert_close(lse, want_row, rtol=0, atol=p.tolerance)
    torch.testing.assert_close(col_lse, want_col, rtol=0, atol=p.tolerance)
    torch.testing.assert_close(positive, p.scale.item() * own, rtol=0, atol=p.tolerance)
    # The same from sums that are out of range, by a running maximum.
    for wrong in (0.0, math.inf, math.nan):
        lse.fill_(-1)
        finish(torch.full_like(row_parts, wrong), p.x, p.y, p.inv_x, p.inv_y, p.scale, p.weight, None, lse, None)
        torch.testing.assert_close(lse, want_row, rtol=0, atol=p.tolerance)


@pytest.mark.parametrize("case", PROBLEMS)
@pytest.mark.parametrize("steep", [False, True])
def test_gradients(case: tuple[int, int, int, float, bool, str], steep: bool) -> None:
    p = Problem(*case)
    rows, texts = p.logits.shape
    ops, exponent = torch.ops.scenarioclip_fast_C, 6
    row_lse, col_lse = p.log_sums()
    if steep:  # as if the texts of other ranks had far larger log-sums: two exponentials
        row_lse, col_lse = row_lse + 70 * (torch.arange(rows, device="cuda") % 3 == 1), col_lse + 65
    generator = torch.Generator(device="cuda").manual_seed(4)
    grad_row, grad_positive = torch.randn(2, rows, device="cuda", dtype=torch.float64, generator=generator) / 64
    grad_col = torch.randn(texts, device="cuda", dtype=torch.float64, generator=generator) / 64
    inside = p.own < texts
    at = torch.arange(rows, device="cuda")[inside], p.own[inside]
    positive = torch.full((rows,), math.nan, device="cuda", dtype=torch.float64)
    positive[inside] = p.logits[at]
    row_data, text_data = torch.empty(rows, 8, device="cuda"), torch.empty(texts, 8, device="cuda")
    gain = torch.empty(rows, device="cuda")
    ops.contrastive_factors(
        row_lse, col_lse, positive, grad_row, grad_col, grad_positive, p.inv_x, p.inv_y, p.scale, p.index, 0, p.weight,
        exponent, row_data, text_data, gain,
    )  # fmt: skip
    by_row = grad_row[:, None] * p.w * (p.logits - row_lse[:, None]).exp()
    by_col = grad_col * (p.logits - col_lse).exp()
    inverse = 2.0**exponent * p.inv_x.double()[:, None] * p.inv_y.double()
    h = (by_row + by_col) * inverse
    want_gain = torch.zeros_like(grad_row)
    want_gain[inside] = h[at] + (grad_positive[:, None] * inverse)[at]
    torch.testing.assert_close(gain.double(), want_gain, rtol=1e-5, atol=1e-6 * inverse.max().item())
    h[at] = 0
    stride = -(-texts // 8) * 8 + 8
    out = torch.full((rows, stride), 7.0, device="cuda", dtype=torch.bfloat16)
    ops.contrastive_gradients(p.x, p.y, p.index, 0, row_data, text_data, out)
    size = (by_row.abs() + by_col.abs()) * inverse
    # bfloat16 rounds to half of 2^-8; terms below 2^-26 of their sums may be lost.
    lost = 2.0**-26 * (grad_row.abs()[:, None] * p.w + grad_col.abs()) * inverse
    assert ((out[:, :texts].double() - h).abs() <= 2.0**-8 * h.abs() + p.tolerance * size + lost).all()
    assert (out[:, texts:] == 7).all() and (out[:, :texts][at] == 0).all()
    # A block of rows and texts within the whole.
    if rows > 200 and texts > 200:
        part = torch.zeros(rows - 130, 200, device="cuda", dtype=torch.bfloat16)
        first = -56 + (130 if p.index is None else 0)
        block = p.y[56:256].clone()
        ops.contrastive_gradients(
            p.x[130:].clone(), block, None if p.index is None else p.index[130:].clone(), first,
            row_data[130:], text_data[56:256], part,
        )  # fmt: skip
        assert torch.equal(part, out[130:, 56:256])


@pytest.mark.parametrize("width", [5, 64, 520, 1000])
@pytest.mark.parametrize("normalize", [False, True])
def test_finish(width: int, normalize: bool) -> None:
    rows, texts, exponent = 70, 33, 6
    x, y = features(rows + 1, width + 1, 5)[1:, 1:], features(texts, width, 6)
    scale = torch.tensor([14.0], device="cuda")
    generator = torch.Generator().manual_seed(7)
    index = torch.randint(-1, texts + 1, (rows,), generator=generator)
    gain = torch.randn(rows, generator=generator).cuda()
    order = torch.sort(torch.where(index < 0, texts, index), stable=True).indices.cuda()
    offsets = torch.tensor([int((index < t).sum() - (index < 0).sum()) for t in range(texts + 1)]).cuda()
    index = index.cuda()
    inside = (index >= 0) & (index < texts)
    positives = torch.zeros(rows, texts, device="cuda", dtype=torch.float64)
    positives[inside.nonzero()[:, 0], index[inside]] = gain.double()[inside]
    ops = torch.ops.scenarioclip_fast_C

    def check(call: str, f: Tensor, other: Tensor, h: Tensor, gain: Tensor, *arguments: object) -> None:
        inverse = inverse_norms(f, normalize)
        product = torch.randn(f.shape, generator=generator).cuda()
        out, dots = torch.empty(f.shape, device="cuda", dtype=torch.bfloat16), torch.empty(len(f), device="cuda")
        getattr(ops, call)(f, inverse, product, other, *arguments, gain, scale, exponent, normalize, out, dots)
        p = product.double() + h @ other.double()
        dot = (f.double() * p).sum(1)
        want = p - f.double() * (inverse.double() ** 2 * dot)[:, None] if normalize else p
        want *= scale.item() / 2**exponent
        magnitude = p.abs() + f.double().abs() * (inverse.double() ** 2 * dot).abs()[:, None]
        error = (out.double() - want).abs()
        assert (error <= 2.0**-8 * want.abs() + 1e-5 * magnitude).all()
        torch.testing.assert_close(dots.double(), dot / 2**exponent, rtol=1e-5, atol=1e-4 * width**0.5)

    check("contrastive_finish_rows", x, y, positives, gain, index, 0)
    check("contrastive_finish_texts", y, x, positives.T.contiguous(), gain, order, offsets, 0)
    # Without an index: row i has text i - 4, if it exists.
    positives.zero_()
    positives[torch.arange(texts) + 4, torch.arange(texts)] = gain.double()[4 : texts + 4]
    check("contrastive_finish_rows", x, y, positives, gain, None, -4)
    check("contrastive_finish_texts", y, x, positives.T.contiguous(), gain, None, None, 4)


def test_inverse_norms() -> None:
    x = features(200, 203, 8)[:, 1:]
    torch.testing.assert_close(inverse_norms(x).double(), 1 / x.double().norm(dim=1), rtol=1e-6, atol=0)
    x = features(9, 64, 9)
    x[0], x[1, 0], x[2, 0] = 0, math.nan, math.inf
    x[3:] = 0
    x[3, 5], x[4, 5], x[5, 5], x[6, 5], x[7, 5] = 2.0**20, 2.0**-20, 2.0**21, 2.0**-21, 2.0**-100
    inverse = inverse_norms(x)
    want = torch.tensor([1e12, math.nan, math.nan, 2.0**-20, 2.0**20, math.nan, math.nan, math.nan, 1e12])
    torch.testing.assert_close(inverse.cpu(), want, rtol=1e-6, atol=0, equal_nan=True)
    assert (inverse_norms(x, False) == 1).all()


def test_poison() -> None:
    """NaN reaches the sums of its row and of all columns, and nothing else; a scale that is not positive gives NaN."""
    p = Problem(130, 260, 64, 10.0, True, "counts")
    p.x[17, 3] = math.nan
    p.inv_x = inverse_norms(p.x)
    row_parts, col_parts, exponent = p.sums()
    bad = torch.arange(130, device="cuda") == 17
    assert row_parts[:, bad].isnan().all() and row_parts[:, ~bad].isfinite().all()
    assert col_parts[0].isnan().all() and col_parts[1].isfinite().all()
    assert torch.equal(exponent.isnan(), bad)
    lse = torch.empty(130, device="cuda", dtype=torch.float64)
    finish = torch.ops.scenarioclip_fast_C.contrastive_finish_sums
    finish(row_parts, p.x, p.y, p.inv_x, p.inv_y, p.scale, p.weight, None, lse, None)
    assert torch.equal(lse.isnan(), bad)
    finish(row_parts, p.x, p.y, p.inv_x, p.inv_y, -p.scale, p.weight, None, lse, None)
    assert lse.isnan().all()


def test_errors() -> None:
    p = Problem(16, 24, 64, 10.0, False, "ones")
    p.x = features(16, 65, 1)[:, :64]
    with pytest.raises(RuntimeError, match="contrastive_sums: x: got rows 65 entries apart, expected a multiple of 8"):
        p.sums()
    with pytest.raises(RuntimeError, match="out: got a tensor on the CPU, expected a CUDA device"):
        torch.ops.scenarioclip_fast_C.contrastive_inverse_norms(p.x, True, torch.empty(16))


def test_graph() -> None:
    """The ops can be captured, and replayed with other features."""
    p = Problem(300, 333, 136, 20.0, True, "numbers")
    p.sums()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = p.sums()
    p.x.copy_(p.x.flip(0).clone())
    p.inv_x.copy_(p.inv_x.flip(0).clone())
    graph.replay()
    for got, want in zip(captured, p.sums(), strict=True):
        assert torch.equal(got, want)
