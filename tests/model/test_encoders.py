from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from scenarioclip_fast.kernels.short_attention import reference
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from scenarioclip_fast.model.encoders import Attention, Packing


class CountOps(TorchDispatchMode):
    """Counts the calls of each op, except views."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not op.is_view:
            self.ops[op.overloadpacket.__name__] += 1
        return op(*args, **(kwargs or {}))


def _permuted_heads_of(*rows: Tensor) -> list[Tensor]:
    parts = [x.permute(2, 0, 3, 1, 4) for x in rows]
    return [part for x in parts for part in (x.unbind(0) if len(x) > 1 else (x.squeeze(0),))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_queries_keys_and_values_are_stacked_once(
    packed: bool, pooled: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They equal those of unbinding a permuted tensor bit for bit, with one copy less."""
    torch.manual_seed(0)
    attention = Attention(32, 4).to(dtype)
    packing = Packing.of_lengths(np.array([3, 5, 2, 7]), torch.device("cpu")) if packed else None
    x = torch.randn(17, 32) if packed else torch.randn(6, 10, 32)

    def run() -> tuple[list[Tensor], Counter[str]]:
        leaf = x.to(dtype).requires_grad_()
        y = attention(leaf, packing, pooled)
        upstream = torch.linspace(-1, 1, y.numel()).view_as(y).to(dtype)
        with CountOps() as backward:
            leaves = [leaf, *attention.qkv.parameters(), attention.out.weight]  # whose bias the caller adds
            gradients = torch.autograd.grad(y, leaves, upstream)
        return [y, *gradients], backward.ops

    found, ops = run()
    monkeypatch.setattr(reference, "_heads_of", _permuted_heads_of)
    expected, expected_ops = run()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    copies = ("stack", "clone", "copy_", "_to_copy")
    # On a CPU, attention in bfloat16 is computed in float32: one cast of the output, and one of each of the rows.
    casts = 0 if dtype == torch.float32 else 3 if pooled and not packed else 2
    once = {"stack": 1, **({"_to_copy": casts} if casts else {})}
    assert {name: ops[name] for name in copies if ops[name]} == once
    assert {name: expected_ops[name] for name in copies if expected_ops[name]} == {**once, "clone": 1}
