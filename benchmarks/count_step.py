"""Counts the bytes, kernels and casts of a training step at ViT-B/32 with 128 scenes, without a GPU.

    python -m scenarioclip_fast.benchmarks.count_step [--scenes N] [--by-op]

The step runs on fake tensors, which have shapes and dtypes but no data, and every operator that reaches the dispatcher
is counted: an operator that is not a view reads its inputs and writes its outputs once. Matrix products and attention,
which compute rather than move data, count as kernels, but their bytes are kept apart. Operators that launch several
kernels are listed in KERNELS; all others count as one.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
from scenarioclip_fast.benchmarks.bench_step import BenchBatch, build, synthetic
from scenarioclip_fast.kernels.short_attention import reference as attention
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import clip_grad
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from scenarioclip_fast import dispatch
from scenarioclip_fast.data import Batch
from scenarioclip_fast.model import layers
from scenarioclip_fast.model.encoders import Packing
from scenarioclip_fast.model.tokens import TokenTable, UniqueTexts
from scenarioclip_fast.ops.contrastive import validate

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "_scaled_mm")
_ATTENTION = ("_scaled_dot_product", "short_attention")
_CASTS = ("_to_copy", "copy_", "_foreach_copy_")
_READ_BY_INDEX = ("index_select", "embedding", "index", "gather")
_WRITES_ONLY = (
    "zeros_like",
    "new_zeros",
    "fill_",
    "zero_",
    "ones_like",
    "full",
    "zeros",
    "ones",
    "arange",
    "full_like",
)
_VIEWS = ("_unsafe_view", "detach", "alias", "lift_fresh")  # besides those whose schema says so
_NO_KERNEL = (
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "_local_scalar_dense",
    "lift_fresh",
)

# torch's multi-tensor kernels: at most this many tensors and chunks of 65,536 elements per launch, by lists of tensors.
_TENSORS_PER_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
_CHUNKS_PER_LAUNCH, _CHUNK = 320, 65536

# Kernels of operators that launch several on CUDA.
KERNELS: dict[str, int] = {
    "native_layer_norm_backward": 3,  # the input, the weights in two stages
    "_scaled_dot_product_flash_attention_for_cpu_backward": 3,  # FlashAttention-2: row sums, gradients, cast of dQ
    "index_copy": 2,  # a copy, then the rows
    "index_add": 2,
    "embedding_dense_backward": 4,  # sorts the indices
    "repeat_interleave": 3,  # of lengths: a running sum, then the indices
    # The second sums the gradients of weights and biases over the programs; a step's quick-GELUs have biases.
    "add_layer_norm_backward": 2,
    "quick_gelu_backward": 2,
    "contrastive_losses": 3,
    "contrastive_losses_backward": 5,
}


@dataclass
class Counts:
    """What one step does on the device."""

    bytes: float = 0.0  # outside matrix products and attention
    product_bytes: float = 0.0
    kernels: int = 0
    casts: int = 0
    product_flops: float = 0.0
    by_op: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0, 0.0, 0]))

    def add(self, name: str, kernels: int, size: float, cast: bool) -> None:
        is_product = name in PRODUCTS or name.startswith(_ATTENTION)
        self.kernels += kernels
        self.casts += kernels if cast else 0
        if is_product:
            self.product_bytes += size
        else:
            self.bytes += size
        row = self.by_op[name]
        row[0] += kernels
        row[1] += size
        row[2] += kernels if cast else 0


def _size(t: Tensor) -> int:
    """Bytes of the elements of a tensor, each once (an expanded dimension has one element)."""
    return math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride != 0) * t.element_size()


def _launches(lists: Sequence[Sequence[Tensor]]) -> int:
    """Launches of a multi-tensor operator over parallel lists of tensors."""
    tensors = lists[0]
    chunks = sum(max(-(-t.numel() // _CHUNK), 1) for t in tensors)
    return max(-(-len(tensors) // _TENSORS_PER_LAUNCH[min(len(lists), 5)]), -(-chunks // _CHUNKS_PER_LAUNCH), 1)


class Counter(TorchDispatchMode):
    """Adds every operator to `counts`."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._opname if hasattr(func, "_opname") else func.name()
        schema = func._schema
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        written = [
            t
            for argument, value in zip(schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
            for t in tree_leaves(value)
            if isinstance(t, Tensor)
        ]
        if func.namespace == "prim" or not outputs + written or name in _NO_KERNEL:
            return out
        if func.is_view or name in _VIEWS:
            return out
        cast = name in _CASTS and _changes_dtype(name, args, outputs)
        if name in _CASTS:
            source = args[1] if name != "_to_copy" else args[0]
            size = sum(map(_size, tree_leaves(source))) + sum(map(_size, outputs or tree_leaves(args[0])))
        elif name in _WRITES_ONLY:
            size = sum(map(_size, outputs))
        elif name in _READ_BY_INDEX:
            size = 2 * sum(map(_size, outputs)) + sum(_size(t) for t in inputs if not t.is_floating_point())
        else:
            size = sum(map(_size, inputs)) + sum(map(_size, written or outputs))
        if name.startswith(("_foreach", "_fused")):
            lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)]
            kernels = _launches(lists)
        else:
            kernels = KERNELS.get(name, 1)
        self.counts.add(name, kernels, size, cast)
        return out


def _changes_dtype(name: str, args: Sequence[Any], outputs: Sequence[Tensor]) -> bool:
    if name == "_to_copy":
        return bool(args[0].dtype != outputs[0].dtype)
    to, source = tree_leaves(args[0])[0], tree_leaves(args[1])[0]
    return bool(to.dtype != source.dtype)


def fake_batch(inputs: BenchBatch, size: int, mode: FakeTensorMode) -> Batch:
    """The batch on fake tensors, with bfloat16 pixels, as the loader renders them for run.precision=bf16."""
    batch = inputs.batch
    pixels = torch.empty(len(batch.pixels), 3, size, size, dtype=torch.bfloat16)
    return Batch(pixels, batch.keys, *map(mode.from_tensor, batch.tensors[1:]), host=batch.host)


@contextmanager
def without_data() -> Iterator[FakeTensorMode]:
    """Tensors are fake, and code that needs data is skipped."""
    with ExitStack() as stack:
        # The model is built on its device: fake parameters cannot be swapped for copies.
        stack.enter_context(patch.object(nn.Module, "to", lambda module, *_: module))
        stack.enter_context(patch.object(TokenTable, "_invalidate_if_stale", lambda *_: None))  # compares addresses
        stack.enter_context(patch.object(validate, "_check_values", lambda *_: None))
        mode = FakeTensorMode(allow_non_fake_inputs=True, allow_fallback_kernels=False)
        unique_texts = TokenTable.unique_texts

        def on_the_host(table: TokenTable, ids: Sequence[Tensor]) -> UniqueTexts:
            with _disable_current_modes():
                texts = unique_texts(table, ids)
            return replace(texts, index=[mode.from_tensor(t) for t in texts.index])

        stack.enter_context(patch.object(TokenTable, "unique_texts", on_the_host))
        with_rows = Packing.with_rows

        def uploaded(*arguments: Any) -> tuple[Packing, Tensor]:
            with _disable_current_modes():
                packing, place = with_rows(*arguments)
            tensors: dict[str, Any] = {
                name: mode.from_tensor(t) for name, t in vars(packing).items() if isinstance(t, Tensor)
            }
            return replace(packing, **tensors), mode.from_tensor(place)

        stack.enter_context(patch.object(Packing, "with_rows", uploaded))
        # On a GPU: backends, and multi-tensor kernels.
        backends = {"contrastive_loss": "triton", "distillation_loss": "cuda"}
        stack.enter_context(patch.object(dispatch, "resolve", lambda op, *_, **__: backends.get(op, "triton")))
        stack.enter_context(patch.object(clip_grad, "_has_foreach_support", lambda *_: True))
        stack.enter_context(patch.object(layers, "products_to_float32", lambda _: True))
        stack.enter_context(patch.object(attention, "needs_float32", lambda _: False))
        yield stack.enter_context(mode)


def count(form: str = "ours, bf16", preset: str = "vit-b-32", scenes: int = 128, size: int = 224) -> Counts:
    """Count one step of a form of bench_step.py after a first one, which creates the optimizer's state."""
    inputs = synthetic(scenes, 1)
    with without_data() as mode:
        batch = fake_batch(inputs, size, mode)
        step: Any = build(form, preset, inputs.vocabulary, "cpu")
        step.step(batch)
        with Counter() as counter:
            step.step(batch)
    return counter.counts


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--scenes", type=int, default=128)
    parser.add_argument("--by-op", action="store_true", help="a line per operator")
    args = parser.parse_args(arguments)
    counts = count(scenes=args.scenes)
    print(f"{counts.bytes / 1e9:.1f} GB outside products and attention, {counts.kernels} kernels, {counts.casts} casts")
    if args.by_op:
        for name, (kernels, size, casts) in sorted(counts.by_op.items(), key=lambda item: -item[1][1]):
            print(f"  {name:60} {kernels:6.0f} kernels {size / 1e9:8.2f} GB {casts:5.0f} casts")
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # Not through the end of the interpreter, where PyTorch can free weak references to fake storages twice.
    os._exit(status)
