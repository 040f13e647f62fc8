"""text_weight and texts that no row points to, on every backend and over ranks, against loops in float64."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from scenarioclip_fast.kernels.contrastive import contrastive_cpu
from test_contrastive import (
    BACKENDS,
    DEVICES,
    EVERY_BACKEND,
    assert_as_good_as_eager,
    extreme,
    gradients,
    make,
    run,
)
from torch import Tensor

from scenarioclip_fast import use_backend  # noqa: F401  for the interpreter
from scenarioclip_fast.ops import contrastive_loss, multilevel_contrastive_loss
from scenarioclip_fast.ops.contrastive import DUPLICATES
from scenarioclip_fast.ops.contrastive.levels import LevelInput, prepare
from scenarioclip_fast.ops.contrastive.op import contrastive_forward
from scenarioclip_fast.ops.contrastive.validate import assert_values, check_total_weights

Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def weighted(n: int, u: int, extra: int, d: int, s: float, dtype: torch.dtype = torch.float32) -> Case:
    """Make image [n, d]; text [u + extra, d], the last ones close to images; scale []; index [n]; weight [u + extra].

    The weights are no multiples of powers of two, and every third one is 0.
    """
    image, text, scale, index = make(n, u, d, s, dtype)
    g = torch.Generator().manual_seed(5)
    hard = image[torch.arange(extra) % n] * 0.5 + torch.randn(extra, d, generator=g, dtype=dtype)
    weight = torch.rand(u + extra, generator=g, dtype=torch.float64) * 3 + 0.1
    weight[2::3] = 0
    return image, torch.cat([text, hard]), scale, index, weight.to(dtype)


def by_hand(
    image: Tensor, text: Tensor, scale: Tensor, index: Tensor, weight: Tensor, duplicates: str = "negatives"
) -> Tensor:  # [N] for "negatives", whose mean is the loss; [] for "positives"
    """Each row's log-sum over the texts with a weight, and a column for each text that has rows."""
    logits = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    rows, columns = [], []
    for i, own in enumerate(index.tolist()):
        terms = [logits[i, u] + math.log(w) for u, w in enumerate(weight.tolist()) if w > 0]
        rows.append(torch.stack(terms).logsumexp(0) - logits[i, own])
        columns.append(logits[:, own].logsumexp(0) - logits[i, own])
    if duplicates == "negatives":
        return (torch.stack(rows) + torch.stack(columns)) / 2
    classes = [[c for c, t in zip(columns, index.tolist(), strict=True) if t == u] for u in set(index.tolist())]
    return (torch.stack(rows).mean() + torch.stack([torch.stack(members).mean() for members in classes]).mean()) / 2


def check_weights(backend: str, sizes: tuple[int, int, int, int], s: float, duplicates: str) -> None:
    image, text, scale, index, weight = weighted(*sizes, s)
    n, u, extra, _ = sizes
    for given in [index] if u + extra != n else [index, None]:
        own = torch.arange(n) if given is None else index
        options = {"text_weight": weight, "duplicates": duplicates, "backend": backend}
        options |= {} if given is None else {"text_index": given}
        assert_as_good_as_eager(
            lambda x, y, s, options=options: run(x, y, s, **options),
            lambda x, y, s, own=own: by_hand(x, y, s, own, weight, duplicates).mean(),
            (image, text, scale),
            upstream=3.0,
        )


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("sizes", [(1, 1, 0, 8), (5, 3, 2, 123), (129, 40, 7, 33), (90, 90, 0, 64), (60, 20, 150, 16)])
@pytest.mark.parametrize("s", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("duplicates", DUPLICATES)
def test_weights(backend: str, sizes: tuple[int, int, int, int], s: float, duplicates: str) -> None:
    """Texts with and without rows, and rows whose own text has weight 0; text_index given and None."""
    check_weights(backend, sizes, s, duplicates)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_reduction_none(backend: str) -> None:
    image, text, scale, index, weight = weighted(50, 20, 8, 24, 30.0)
    upstream = torch.rand(50)
    assert_as_good_as_eager(
        lambda x, y, s: (
            run(x, y, s, text_index=index, text_weight=weight, reduction="none", backend=backend) * upstream
        ).sum(),
        lambda x, y, s: (by_hand(x, y, s, index, weight) * upstream).sum(),
        (image, text, scale),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("s", [14.3, 2000.0])
@pytest.mark.parametrize("duplicates", DUPLICATES)
def test_float64(backend: str, s: float, duplicates: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float64 weights are not rounded; several tiles; 2000: the path with running maxima."""
    monkeypatch.setattr(contrastive_cpu, "ROWS", 16)
    monkeypatch.setattr(contrastive_cpu, "COLUMNS", 24)
    *tensors, index, weight = weighted(40, 30, 25, 16, s, torch.float64)
    options: dict[str, Any] = {"text_index": index, "text_weight": weight, "duplicates": duplicates, "backend": backend}
    found = gradients(lambda *leaves: contrastive_loss(*leaves, **options), tuple(tensors))
    expected = gradients(lambda *leaves: by_hand(*leaves, index, weight, duplicates).mean(), tuple(tensors))
    # Logits up to 2000, whose float64 rounding is 2e-13. Weights rounded to float32 would be 1e-8 off.
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("duplicates", DUPLICATES)
def test_integer_weights_repeat_columns(backend: str, duplicates: str) -> None:
    """Weight w_u is w_u copies of text u among the columns of each row; the default weights are such a case."""
    image, text, scale, index = make(30, 8, 12, 20.0, torch.float64)
    text = torch.cat([text, image[:4]])
    x, y = F.normalize(image, dim=1), F.normalize(text, dim=1)
    counts = index.bincount(minlength=12)
    default = counts if duplicates == "negatives" else torch.ones_like(counts)
    logits = scale * x @ y.T
    positive = logits[torch.arange(30), index]
    column_mean = {
        "negatives": (logits.logsumexp(0)[index] - positive).mean(),
        "positives": (logits.logsumexp(0)[:8] - (positive * F.one_hot(index).T).sum(1) / counts[:8]).mean(),
    }
    for weight in (default, torch.arange(12) % 4, torch.tensor([0] * 8 + [1] * 4)):
        repeated = logits[:, torch.arange(12).repeat_interleave(weight)]
        expected = ((repeated.logsumexp(1) - positive).mean() + column_mean[duplicates]) / 2
        options: dict[str, Any] = {"text_index": index, "duplicates": duplicates, "backend": backend}
        found = contrastive_loss(image, text, scale, text_weight=weight.double(), **options)
        torch.testing.assert_close(found, expected)
        if weight is default:
            torch.testing.assert_close(contrastive_loss(image, text, scale, **options), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("duplicates", DUPLICATES)
@pytest.mark.parametrize("s", [3.0, 90.0])
def test_gradcheck(backend: str, duplicates: str, s: float) -> None:
    *leaves, index, weight = weighted(7, 4, 3, 5, s, torch.float64)
    options: dict[str, Any] = {"text_index": index, "text_weight": weight, "duplicates": duplicates, "backend": backend}
    assert torch.autograd.gradcheck(
        lambda *leaves: contrastive_loss(*leaves, **options), [t.requires_grad_() for t in leaves]
    )


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_equal_ids(backend: str) -> None:
    """Merged for "positives", with the largest of their weights; separate negatives for "negatives"."""
    image, text, scale, index = make(20, 10, 12, 14.3)
    ids = torch.tensor([3, 1, 3, 4, 1, 9, 7, 3, 8, 5])
    table = torch.cat([text[ids.tolist().index(k)][None] if k in ids else text[:1] for k in range(10)])
    weight = torch.tensor([0.5, 2.0, 0.0, 0.3, 1.0, 0.0, 0.0, 4.0, 1.7, 0.2])
    largest = torch.tensor([0.0, 2.0, 0.0, 4.0, 0.3, 0.2, 0.0, 0.0, 1.7, 0.0])
    for given in (index % 7, None):  # with index: some texts have no rows
        rows = image if given is not None else image[:10]
        own = torch.arange(10) if given is None else given
        options = {"text_id": ids, "text_weight": weight, "backend": backend}
        options |= {} if given is None else {"text_index": given}
        for duplicates, merged in (
            ("negatives", lambda x, y, s, own=own: by_hand(x, y[ids], s, own, weight).mean()),
            ("positives", lambda x, y, s, own=own: by_hand(x, y, s, ids[own], largest, "positives")),
        ):
            assert_as_good_as_eager(
                lambda x, y, s, options=options, kind=duplicates: run(x, y[ids], s, duplicates=kind, **options),
                merged,
                (rows, table, scale),
            )


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("duplicates", DUPLICATES)
def test_levels(backend: str, duplicates: str) -> None:
    """A multilevel call equals one reference call per level: weights on some levels, an empty level, equal ids."""
    check_levels(backend, duplicates, [None, torch.arange(30) % 7, None, None])
    if duplicates == "negatives":  # no level has an index
        check_levels(backend, duplicates, [None] * 4, indexed=False)


def check_levels(backend: str, duplicates: str, ids: list[Tensor | None], indexed: bool = True) -> None:
    device = DEVICES[backend]
    cases = [weighted(12, 7, 5, 16, 10.0), weighted(40, 15, 15, 16, 30.0), weighted(6, 6, 0, 24, 5.0)]
    cases += [(torch.empty(0, 16), torch.ones(2, 16), torch.tensor(5.0), torch.empty(0).long(), torch.zeros(2))]
    cases = [tuple(t.to(device) for t in case) for case in cases]
    if not indexed:
        cases = [(x, y[: len(x)], s, i, w[: len(x)]) for x, y, s, i, w in (cases[0], cases[2], cases[0], cases[2])]
    images, texts, scales = ([case[k].clone().requires_grad_() for case in cases] for k in range(3))
    indices = [case[3] if indexed and k != 2 else None for k, case in enumerate(cases)]
    weights = [case[4] if k != 0 else None for k, case in enumerate(cases)]
    lists: dict[str, Any] = {"text_indices": indices, "text_ids": ids, "text_weights": weights}
    combined = multilevel_contrastive_loss(images, texts, scales, duplicates=duplicates, backend=backend, **lists)
    options: dict[str, Any] = {"duplicates": duplicates, "backend": "reference"}
    separate = torch.stack(
        [
            contrastive_loss(x, y, s, text_index=i, text_id=d, text_weight=w, **options)
            for x, y, s, i, d, w in zip(images, texts, scales, indices, ids, weights, strict=True)
        ]
    )
    close = {"rtol": 1e-4, "atol": 1e-6}  # float32 on both sides, in another order
    torch.testing.assert_close(combined, separate, **close)
    upstream = torch.arange(1.0, 5.0, device=device)
    leaves = [*images, *texts, *scales]
    found = torch.autograd.grad(combined @ upstream, leaves)
    torch.testing.assert_close(found, torch.autograd.grad(separate @ upstream, leaves), **close)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_own_text_without_weight(backend: str) -> None:
    """The own text is left out of the row sum: the loss is finite and may be negative."""
    image, text, scale, index = make(30, 30, 32, 50.0)
    weight = (torch.arange(30) >= 29).float()  # every row sums over one text, which is most rows' negative
    assert_as_good_as_eager(
        lambda x, y, s: run(x, y, s, text_index=index, text_weight=weight, backend=backend),
        lambda x, y, s: by_hand(x, y, s, index, weight).mean(),
        (image, text, scale),
    )
    assert -50 < run(image, text, scale, text_index=index, text_weight=weight, backend=backend) < -5


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("case", ["equal", "opposite", "one text opposite", "matched"])
@pytest.mark.parametrize("s", [100.0, 1000.0])
def test_extreme_features(backend: str, case: str, s: float, n: int = 60) -> None:
    """Weights over twelve orders of magnitude. A text of weight 0 may exceed its rows' log-sums by 2 s."""
    image, text = extreme(case, n)
    text = torch.cat([text, image[:3], -image[:3]])
    weight = 10.0 ** (torch.arange(n + 6) % 13 - 6)
    weight[1::4] = 0
    for own in (weight, weight * (torch.arange(n + 6) >= n + 3)):  # the second one: only the last three count
        assert_as_good_as_eager(
            lambda x, y, s, w=own: run(x, y, s, text_index=torch.arange(n), text_weight=w, backend=backend),
            lambda x, y, s, w=own: by_hand(x, y, s, torch.arange(n), w).mean(),
            (image, text, torch.tensor(s)),
            device=DEVICES[backend],
        )


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_nan_in_a_text_of_weight_0(backend: str) -> None:
    image, text, scale, index, weight = weighted(20, 6, 3, 16, 20.0)
    text[8, 3] = torch.nan
    assert weight[8] == 0
    for duplicates in DUPLICATES:
        options: dict[str, Any] = {"text_index": index, "text_weight": weight, "duplicates": duplicates}
        assert run(image, text, scale, backend=backend, **options).isnan()


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_no_rows(backend: str) -> None:
    """Extra texts alone, of any weight: 0 with zero gradients."""
    for weight, duplicates in itertools.product((torch.zeros(3), torch.ones(3)), DUPLICATES):
        leaves = [t.requires_grad_() for t in (torch.empty(0, 8), torch.ones(3, 8), torch.tensor(10.0))]
        options = {"text_index": torch.empty(0).long(), "text_weight": weight, "duplicates": duplicates}
        loss = run(*leaves, backend=backend, **options)
        assert loss == 0
        assert [g.abs().sum() for g in torch.autograd.grad(loss, leaves)] == [0, 0, 0]


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_layouts_and_dtypes_of_weights(backend: str) -> None:
    image, text, scale, index, weight = weighted(40, 12, 6, 16, 14.3)
    weight = weight.bfloat16().float()  # the same numbers in every dtype but float16

    def loss(given: Tensor) -> Tensor:
        return run(image, text, scale, text_index=index, text_weight=given, backend=backend)

    expected = loss(weight)
    others = [torch.stack([weight, weight + 1], 1)[:, 0], torch.cat([weight[:1], weight])[1:]]
    for given in [*others, weight.bfloat16(), weight.double()]:
        assert torch.equal(loss(given), expected)
    assert torch.equal(loss(weight.half()), loss(weight.half().float()))
    assert torch.equal(loss(torch.tensor(0.3).expand(18)), loss(torch.full((18,), 0.3)))


def test_autocast() -> None:
    image, text, scale, index, weight = weighted(40, 12, 6, 16, 14.3)
    with torch.autocast("cpu", torch.bfloat16):
        found = contrastive_loss(image, text, scale, text_index=index, text_weight=weight)
    assert found.dtype == torch.float32
    expected = contrastive_loss(image.bfloat16(), text.bfloat16(), scale, text_index=index, text_weight=weight)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    *leaves, index, weight = weighted(6, 4, 3, 5, 3.0, torch.float64)
    image, text, scale = (t.requires_grad_() for t in leaves)
    torch.library.opcheck(contrastive_forward, ([image], [text], scale[None], index, weight, True, 0, backend))


@pytest.mark.parametrize("duplicates", DUPLICATES)
def test_compile_without_graph_break_for_all_sizes(duplicates: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(contrastive_loss, fullgraph=True, dynamic=True, backend=counter)
    for n, u, extra in ((20, 8, 3), (33, 21, 9), (50, 45, 5)):
        *tensors, index, weight = weighted(n, u, extra, 16, 20.0)
        ids = torch.arange(u + extra) % (u + 2)

        def call(f: Callable[..., Tensor], options: dict[str, Any]) -> Callable[..., Tensor]:
            return lambda *leaves: f(*leaves, duplicates=duplicates, **options)

        options = {"text_index": index, "text_id": ids, "text_weight": weight}
        found = gradients(call(compiled, options), tuple(tensors))
        torch.testing.assert_close(found, gradients(call(contrastive_loss, options), tuple(tensors)))
    assert counter.frame_count == 1
    # Values are not checked in a compiled graph.
    assert compiled(*tensors, duplicates=duplicates, **{**options, "text_weight": weight * 0}) == -torch.inf


def test_weights_that_require_a_gradient() -> None:
    image, text, scale, index, weight = weighted(9, 5, 3, 8, 10.0)
    options = {"text_index": index, "text_weight": weight.clone().requires_grad_()}
    with pytest.raises(ValueError, match=r"text_weight: got a tensor that requires a gradient, expected one that does"):
        contrastive_loss(image, text, scale, **options)
    expected = contrastive_loss(image, text, scale, text_index=index, text_weight=weight)
    with torch.no_grad():
        assert torch.equal(contrastive_loss(image, text, scale, **options), expected)


X, Y, INDEX, WEIGHT = torch.ones(4, 8), torch.ones(3, 8), torch.tensor([0, 1, 2, 2]), torch.tensor([1.0, 0.0, 3.0])


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        ([1.0, 1.0, 1.0], TypeError, "text_weight: got list, expected a floating-point tensor"),
        (INDEX[:3], TypeError, "text_weight: got a tensor of torch.int64, expected a floating-point tensor"),
        (WEIGHT[:2], ValueError, r"text_weight: got shape \[2\], expected \[3\]"),
        (WEIGHT[:, None], ValueError, r"text_weight: got shape \[3, 1\], expected \[3\]"),
        (WEIGHT.to("meta"), ValueError, "text_weight: got device meta, expected cpu, the device of text"),
        (WEIGHT - 1, ValueError, "text_weight: got values from -1 to 2, expected finite weights of at least 0"),
        (WEIGHT / 0, ValueError, "text_weight: got values from nan to nan, expected finite weights"),
        (WEIGHT + torch.inf, ValueError, "text_weight: got values from inf to inf, expected finite weights"),
        (WEIGHT.double() * 1e300, ValueError, r"text_weight: got values from 0 to 3e\+300, expected finite weights"),
        (WEIGHT * 0, ValueError, "text_weight: got only zeros, expected at least one weight above 0"),
        # 0 in float32, the dtype of the sums
        (WEIGHT.double() * 1e-60, ValueError, "text_weight: got only zeros, expected at least one weight above 0"),
    ],
)
def test_bad_weights(weight: Any, error: type[Exception], message: str) -> None:
    for backend in BACKENDS:
        options: dict[str, Any] = {"text_index": INDEX, "backend": backend}
        contrastive_loss(X, Y, 10.0, text_weight=WEIGHT, **options)
        with pytest.raises(error, match=message):
            contrastive_loss(X, Y, 10.0, text_weight=weight, **options)
    with pytest.raises(error, match="level 1: " + message):
        multilevel_contrastive_loss([Y, X], [Y, Y], [1.0, 1.0], text_indices=[None, INDEX], text_weights=[None, weight])


def test_bad_lists_of_weights() -> None:
    with pytest.raises(ValueError, match="text_weights: got 1 levels, expected 2, as many as images"):
        multilevel_contrastive_loss([Y, Y], [Y, Y], [1.0, 1.0], text_weights=[WEIGHT])


@pytest.mark.parametrize("weight", [WEIGHT - 1, WEIGHT / 0, WEIGHT + torch.inf, WEIGHT])
def test_device_assertions(weight: Tensor) -> None:
    """The checks of SCENARIOCLIP_FAST_CHECK=1 on a GPU; on a CPU the same assertions raise."""
    message = "text_weight: expected finite weights of at least 0"
    with nullcontext() if weight is WEIGHT else pytest.raises(RuntimeError, match=message):
        assert_values(LevelInput(X, Y, 10.0, INDEX, text_weight=weight), "")


@pytest.mark.gpu
@pytest.mark.parametrize("check", ["0", "1"])
def test_bad_weights_on_a_gpu(check: str) -> None:
    """In a separate process: with the flag, a device-side assertion names the argument; without it the loss is -inf."""
    code = """
import torch
from scenarioclip_fast.ops import contrastive_loss
x = torch.ones(4, 64, device="cuda")
print(contrastive_loss(x, x, 10.0, text_weight=torch.zeros(4, device="cuda")).item())
"""
    environment = {**os.environ, "SCENARIOCLIP_FAST_CHECK": check}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if check == "0":
        assert done.returncode == 0 and done.stdout.strip() == "-inf", done.stderr
    else:
        assert done.returncode != 0 and "text_weight: got only zeros" in done.stderr + done.stdout


def test_triton_in_the_interpreter() -> None:
    """In a separate process: Triton reads TRITON_INTERPRET when a kernel is defined."""
    pytest.importorskip("triton", reason="Triton is not installed")
    code = """
import warnings; warnings.simplefilter("ignore", RuntimeWarning)  # logarithms of sums that are then summed again
import test_contrastive_weights as t, torch._dynamo.testing
for duplicates in t.DUPLICATES:
    t.check_weights("triton", (5, 3, 2, 123), 100.0, duplicates)
    t.test_levels("triton", duplicates)
t.check_weights("triton", (131, 40, 7, 33), 14.3, "negatives")
t.check_weights("triton", (20, 20, 0, 16), 1.0, "positives")
t.test_reduction_none("triton")
t.test_equal_ids("triton")
t.test_own_text_without_weight("triton")
for case in ("opposite", "one text opposite"):
    t.test_extreme_features("triton", case, 100.0, n=24)
t.test_nan_in_a_text_of_weight_0("triton")
t.test_no_rows("triton")
t.test_layouts_and_dtypes_of_weights("triton")
t.check_chunks()
with t.use_backend("triton"):
    t.test_compile_without_graph_break_for_all_sizes("positives")
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


def check_chunks() -> None:
    """A level too large for the grouped launches: forward by chunks of rows, backward by blocks."""
    from scenarioclip_fast.kernels.contrastive import contrastive_triton, large

    with (
        patch.object(contrastive_triton, "GROUPED", 100),
        patch.multiple(large, FORWARD_ROWS=128, BLOCK_BYTES=128 * 128 * 4),
    ):
        check_weights("triton", (140, 100, 35, 16), 20.0, "negatives")


# Over ranks: (rows, texts) of each rank; texts are ids below VOCABULARY, repeated within and across ranks.
SHARES = [((5, 4), (0, 3), (3, 5)), ((6, 3), (0, 0), (1, 9)), ((0, 4), (0, 0), (0, 2)), ((0, 0), (0, 2), (7, 4))]
VOCABULARY, D = 6, 10


def share(rank: int, rows: int, texts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A rank's image rows [rows, D], the ids and weights of its texts [texts], and the index [rows] into those."""
    g = torch.Generator().manual_seed(100 * rank + rows + texts)
    ids = torch.randint(VOCABULARY, (texts,), generator=g)
    weight = torch.rand(texts, dtype=torch.float64, generator=g) * 2
    weight[1::3] = 0
    image = torch.randn(rows, D, dtype=torch.float64, generator=g)
    index = torch.randint(max(texts // 2, 1), (rows,), generator=g)  # the last texts have no rows on this rank
    return image.requires_grad_(), ids, weight, index


def parameters() -> tuple[Tensor, Tensor]:
    table = torch.randn(VOCABULARY, D, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    return table.requires_grad_(), torch.tensor(15.0, dtype=torch.float64).requires_grad_()


def losses_by_hand(parts: list[Any], table: Tensor, scale: Tensor, duplicates: str) -> Tensor:  # [N], or []
    """The loss over the rows and texts of all ranks, with one text per id."""
    weight = torch.zeros(VOCABULARY, dtype=torch.float64)
    for _, ids, weights, _ in parts:
        for k, w in zip(ids.tolist(), weights.tolist(), strict=True):
            weight[k] = weight[k] + w if duplicates == "negatives" else max(weight[k].item(), w)
    image = torch.cat([part[0] for part in parts])
    index = torch.cat([ids[index] for _, ids, _, index in parts])
    if not len(image):
        return (table.sum() + scale + image.sum()) * 0
    return by_hand(image, table, scale, index, weight, duplicates)


def check(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def averaged(grad: Tensor, group: Any) -> Tensor:
    grad = grad.clone()
    dist.all_reduce(grad, group=group)
    return grad / group.size()


def check_ranks(shares: tuple[tuple[int, int], ...], duplicates: str, reduction: str, options: Any, group: Any) -> None:
    parts = [share(rank, *sizes) for rank, sizes in enumerate(shares)]
    image, ids, weight, index = parts[group.rank()]
    table, scale = parameters()
    expected = losses_by_hand(parts, table, scale, duplicates)
    options = {**options, "text_index": index, "text_weight": weight, "duplicates": duplicates, "reduction": reduction}
    options["text_id"] = ids if options.pop("with_ids") else None
    found = contrastive_loss(image, table[ids], scale, group=group, **options)
    if reduction == "none":
        rows = [part[0].shape[0] for part in parts]
        own = expected.split(rows)[group.rank()] if sum(rows) else found.detach()
        check(found.detach(), own.detach())
        # The gradient is that of the sum of all ranks' results.
        found, expected = found.sum() * group.size(), expected.sum()
    else:
        expected = expected.mean()
        check(found.detach(), expected.detach())
    d_image, d_table, d_scale = torch.autograd.grad(found, (image, table, scale))
    wanted = torch.autograd.grad(expected, (image, table, scale))
    check(d_image / group.size(), wanted[0])
    check([averaged(d_table, group), averaged(d_scale, group)], list(wanted[1:]))


def check_levels_of_ranks(group: Any) -> None:
    """A level with ids and weights, one with weights only, and one with neither."""
    parts = [[share(rank, *sizes) for rank, sizes in enumerate(SHARES[k])] for k in range(3)]
    table, scale = parameters()
    own = [levels[group.rank()] for levels in parts]
    losses = multilevel_contrastive_loss(
        [part[0] for part in own],
        [table[part[1]] for part in own],
        [scale] * 3,
        text_indices=[part[3] for part in own],
        text_ids=[own[0][1], None, None],
        text_weights=[own[0][2], own[1][2], None],
        group=group,
    )
    expected = [losses_by_hand(parts[k], table, scale, "negatives").mean() for k in range(3)]  # no rows on level 2
    check(losses.detach(), torch.stack(expected).detach())
    (found,) = torch.autograd.grad(losses.sum(), table)
    check(averaged(found, group), torch.autograd.grad(sum(expected), table)[0])


def check_zeros(group: Any) -> None:
    """Weights of 0 on one rank are valid, and the texts may be another rank's rows; zeros on all ranks are not."""
    features = torch.randn(2, D, generator=torch.Generator().manual_seed(group.rank()))
    weight = torch.full((2,), float(group.rank()))
    assert contrastive_loss(features, features, 10.0, text_weight=weight, group=group).isfinite()
    with pytest.raises(ValueError, match="text_weight: got only zeros, expected at least one weight above 0"):
        contrastive_loss(features, features, 10.0, text_weight=weight * 0, group=group)
    some = None if group.rank() else weight
    for own in (features, features[:0] if group.rank() else features):
        with pytest.raises(ValueError, match=r"group: got text_weight a tensor on rank 0 .* and None on rank 1"):
            contrastive_loss(own, own, 10.0, text_weight=some, group=group)


def run_rank(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    try:
        group: Any = dist.group.WORLD
        for shares, backend in itertools.product(SHARES, BACKENDS):
            for duplicates, reduction, with_ids in (
                ("negatives", "mean", True),
                ("negatives", "mean", False),  # merging changes nothing
                ("negatives", "none", True),
                ("positives", "mean", True),
            ):
                check_ranks(shares, duplicates, reduction, {"backend": backend, "with_ids": with_ids}, group)
        check_levels_of_ranks(group)
        check_zeros(group)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def test_ranks_equal_one_process(tmp_path: Path) -> None:
    mp.spawn(run_rank, (str(tmp_path / "store"),), nprocs=3)


@pytest.mark.gpu
@pytest.mark.parametrize("duplicates", DUPLICATES)
def test_group_on_a_gpu(duplicates: str) -> None:
    """One rank runs all collectives and merges weights, without synchronising."""
    image, table, scale, index, weight = weighted(60, 20, 10, 16, 14.3)
    ids = torch.arange(30) % 23
    # Equal ids have equal features: without a group, "negatives" merges nothing and would use both features. Leaves are
    # distinct texts, because a merged text has the gradients of all its copies.
    tensors = (image, table[:23], scale)

    def loss(image: Tensor, table: Tensor, scale: Tensor, **options: Any) -> Tensor:
        text = torch.cat([table, table[:7]])  # table[ids]
        return contrastive_loss(image, text, scale, duplicates=duplicates, **options)

    device = torch.device("cuda", 0)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=device)
    try:
        options: dict[str, Any] = {"text_index": index.cuda(), "text_id": ids, "text_weight": weight.cuda()}
        options["group"] = dist.group.WORLD
        leaves = tuple(t.cuda() for t in tensors)
        found = gradients(lambda *leaves: loss(*leaves, **options), leaves)
        torch.cuda.set_sync_debug_mode("error")
        try:
            gradients(lambda *leaves: loss(*leaves, **options), leaves)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    finally:
        dist.destroy_process_group()
    options = {"text_index": index, "text_id": ids, "text_weight": weight}
    expected = gradients(lambda *leaves: loss(*leaves, **options), tensors)
    # float32 on both sides, in another order
    torch.testing.assert_close([f.cpu() for f in found], expected, rtol=1e-4, atol=1e-6)


def test_total_weights_of_prepared_levels() -> None:
    """Levels without rows need no weight."""
    empty = LevelInput(X[:0], Y, 10.0, INDEX[:0], text_weight=WEIGHT * 0)
    good = LevelInput(X, Y, 10.0, INDEX, text_weight=WEIGHT)
    check_total_weights(prepare([empty, good]))
    bad = LevelInput(X, Y, 10.0, INDEX, text_weight=WEIGHT * 0)
    with pytest.raises(ValueError, match="level 1: text_weight: got only zeros"):
        check_total_weights(prepare([empty, bad]))
