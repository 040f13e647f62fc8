"""What the contrastive losses refuse, and that the message names it: layouts, dtypes, devices, transforms, scales."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from scenarioclip_fast.ops import contrastive_loss, multilevel_contrastive_loss

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
Y, INDEX, WEIGHT = X[:3].flip(1), torch.tensor([0, 1, 2, 2]), torch.ones(3)
GOOD: dict[str, Any] = {"image": X, "text": Y, "logit_scale": 9.0, "text_index": INDEX}


def loss(**change: Any) -> Tensor:
    return contrastive_loss(**{**GOOD, **change})


def nested() -> Tensor:
    with warnings.catch_warnings(action="ignore"):  # "prototype stage"
        return torch.nested.nested_tensor([torch.ones(3), torch.ones(2)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": X.to_sparse()}, r"image: got a sparse_coo tensor, expected a dense one .*: use to_dense\(\)"),
        ({"text": lambda: Y.to_sparse_csr()}, "text: got a sparse_csr tensor"),
        ({"image": X.to_mkldnn()}, "image: got a mkldnn tensor"),
        ({"image": nested}, "image: got a nested tensor, expected a dense one .*: concatenate its rows"),
        ({"text_index": INDEX.to_sparse()}, "text_index: got a sparse_coo tensor"),
        ({"text_id": torch.arange(3).to_sparse()}, "text_id: got a sparse_coo tensor"),
        ({"text_weight": WEIGHT.to_sparse()}, "text_weight: got a sparse_coo tensor"),
        ({"logit_scale": torch.tensor(9.0).to_sparse()}, "logit_scale: got a sparse_coo tensor"),
        ({"image": X.to(torch.float8_e4m3fn)}, r"image: got a tensor of torch.float8_e4m3fn, expected .* \(float16, "),
        ({"image": X.to(torch.complex64)}, "image: got a tensor of torch.complex64, expected a floating-point"),
        ({"text_weight": WEIGHT.to(torch.float8_e5m2)}, "text_weight: got a tensor of torch.float8_e5m2"),
        ({"logit_scale": torch.tensor(9.0).to(torch.float8_e5m2)}, "logit_scale: got a tensor of torch.float8_e5m2"),
        ({"logit_scale": 9j}, "logit_scale: got complex, expected a number or a 0-d tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_layouts_and_dtypes(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        loss(**{name: value() if callable(value) else value for name, value in change.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"image": X.to("meta"), "text": Y.to("meta")},
            "image and text: got device meta, expected tensors with values",
        ),
        ({"logit_scale": torch.tensor(9.0, device="meta")}, "logit_scale: got device meta"),
        ({"text": Y[:0]}, "text: got no texts for 4 image rows, expected at least one"),
        ({"logit_scale": -(10**400)}, "logit_scale: got -inf, expected a positive factor"),
        ({"logit_scale": 10**400}, "logit_scale: got inf, expected a factor in the range of float32"),
        ({"logit_scale": math.inf}, "logit_scale: got inf, expected a factor in the range of float32"),
        ({"logit_scale": torch.tensor(math.inf)}, "logit_scale: got inf, expected a factor in the range of float32"),
        ({"logit_scale": torch.tensor(1e39).double()}, "logit_scale: got inf, expected a factor in the range"),
        ({"logit_scale": torch.tensor(1e39, dtype=torch.float64)}, r"logit_scale: got 1e\+39, expected a factor in"),
    ],
)
def test_values(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss(**change)


@pytest.mark.parametrize("scale", [9, np.float32(9), np.float64(9), np.float16(9), np.int64(9), Fraction(9)])
def test_any_real_number_is_a_scale(scale: Any) -> None:
    assert loss(logit_scale=scale) == loss()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": None}, "images: got NoneType, expected a list with an entry per level"),
        ({"logit_scales": None}, "logit_scales: got NoneType, expected a list"),
        ({"logit_scales": torch.tensor(9.0)}, "logit_scales: got a tensor of torch.float32, expected a list"),
        ({"text_indices": torch.tensor(0)}, "text_indices: got a tensor of torch.int64, expected a list"),
        ({"texts": (y for y in [Y])}, "texts: got generator, expected a list with an entry per level"),
    ],
)
def test_lists(arguments: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"images": [X], "texts": [Y], "logit_scales": [9.0], "text_indices": [INDEX]}
    with pytest.raises(TypeError, match=message):
        multilevel_contrastive_loss(**{**good, **arguments})
    stacked = {name: torch.stack([torch.as_tensor(v) for v in values]) for name, values in good.items()}
    assert multilevel_contrastive_loss(**stacked) == loss(), "one tensor for all levels is a list too"


TRANSFORMS: list[Callable[..., Any]] = [
    lambda f: torch.func.jvp(f, (X,), (X,)),
    lambda f: torch.func.jacfwd(f)(X),
    lambda f: torch.func.grad(f)(X),
    lambda f: torch.func.vmap(f)(torch.stack([X, X])),
]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_transforms(transform: Callable[..., Any], backend: str) -> None:
    message = (
        r"support reverse mode only: got a tensor of a torch\.func transform .*: differentiate with torch\.autograd"
    )
    with pytest.raises(RuntimeError, match=message):
        transform(lambda x: loss(image=x, backend=backend))
    with pytest.raises(RuntimeError, match=message):
        transform(lambda x: loss(logit_scale=x.sum().abs(), backend=backend))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode(requires_grad: bool) -> None:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(X.clone().requires_grad_(requires_grad), X)
        with pytest.raises(RuntimeError, match="reverse mode only: got a dual tensor of forward-mode differentiation"):
            loss(image=dual)


def test_transforms_of_other_tensors() -> None:
    """Inside a transform the losses still take constants."""
    weights = torch.arange(3.0)
    assert torch.equal(torch.func.vmap(lambda w: w * loss())(weights), weights * loss())
    assert torch.func.grad(lambda w: w * loss())(weights[1]) == loss()
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(forward_ad.make_dual(weights[1], weights[2]) * loss()).tangent == 2 * loss()


def test_ids_that_are_not_contiguous() -> None:
    expanded, strided = torch.zeros(1, dtype=torch.int64).expand(3), torch.tensor([4, 9, 5, 9, 4, 9])[::2]
    with warnings.catch_warnings(action="error"):
        for ids in (expanded, strided):
            found = loss(text_id=ids, duplicates="positives")
            assert found == loss(text_id=ids.clone(memory_format=torch.contiguous_format), duplicates="positives")
