"""Triton's kernels through its compiler and launcher for sm_90, up to the driver; no GPU is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# A fake driver for CPU tensors: it checks the arguments of each launch and runs nothing.
FAKE_DRIVER = """
import collections, dataclasses, torch, triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import make_tensordesc_arg
from triton.compiler.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

class Utils:
    def fill_tma_descriptor(self, *_): return object()
    fill_tma_descriptor_tiled = fill_tma_descriptor

class Driver:
    utils = Utils()
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

triton.runtime.driver.set_active(Driver())
TYPES = {"*fp32": torch.float32, "*fp64": torch.float64, "*bf16": torch.bfloat16, "*fp16": torch.float16}
NAMES = {dtype: kind[1:] for kind, dtype in TYPES.items()}
TYPES |= {"*i32": torch.int32, "*i64": torch.int64}
compiled, launched, ptx = collections.Counter(), collections.Counter(), {}

def launcher(kernel):
    def launch(x, y, z, *rest):
        assert 0 < x < 2**31 and max(y, z) < 65536, (x, y, z)
        arguments, number = rest[6:], 0  # after stream, function, two of metadata, two hooks
        assumed = kernel.src.attrs  # a launch may have found its form by a key of its own: see contrastive/launch.py
        for at, (name, kind) in enumerate(kernel.src.signature.items()):
            value, divisible = arguments[at], ["tt.divisibility", 16] in assumed.get((at,), [])
            if kind == "constexpr":
                assert kernel.src.constants[(at,)] == value, (name, value)
            elif kind == "i32":
                assert type(value) is int and -2**31 <= value < 2**31, (name, value)
                assert not divisible or value % 16 == 0, (name, value)
            elif kind == "fp32":
                assert type(value) is float, (name, value)
            elif kind.startswith("*"):
                assert value.dtype == TYPES[kind], (name, kind, value.dtype)
                assert not divisible or value.data_ptr() % 16 == 0, name
            else:
                block = ", ".join(map(str, value.block_shape))
                assert kind.startswith(f"tensordesc<{NAMES[value.base.dtype]}[{block}]"), (name, kind, block)
        for kind, argument in zip(kernel.src.signature.values(), arguments, strict=True):
            if kind.startswith("tensordesc"):
                make_tensordesc_arg(argument, kernel.metadata.tensordesc_meta[number])
                assert argument.base.data_ptr() % 16 == 0, "a descriptor's base"
                assert all(s * argument.base.element_size() % 16 == 0 for s in argument.strides[:-1]), "its strides"
                number += 1
        launched[kernel.metadata.name] += 1
        ptx[kernel.metadata.name] = kernel.asm["ptx"]
    return launch

def compile(self, *arguments, original=JITFunction._do_compile):
    compiled[self.fn.__name__] += 1
    return original(self, *arguments)

JITFunction._do_compile = compile
CompiledKernel._init_handles = lambda self: None
CompiledKernel.launch_metadata = lambda self, *_: None
CompiledKernel.run = property(launcher)
"""

FEATURES = """
def features(n, width, dtype, shifted):
    whole = torch.randn(n * width + 8).to(dtype)
    return whole[1 if shifted else 0 :][: n * width].view(n, width)
"""

CONTRASTIVE = """
from torch.utils._python_dispatch import TorchDispatchMode

from scenarioclip_fast import dispatch
from scenarioclip_fast.kernels.contrastive import contrastive_triton as t, large, plan as plans
from scenarioclip_fast.ops import multilevel_contrastive_loss
from scenarioclip_fast.ops.contrastive import fused, validate

plans._plan = lambda *given, plan=plans._plan: dataclasses.replace(plan(*given), tma=True)
large.multiply = lambda *_, **__: None  # the matrix library's: out of a CPU's reach
dispatch.unavailable_reason = lambda *_: None
validate._check_values = fused._check_values = lambda *_: None  # on a GPU, no value is read

class Recorded(TorchDispatchMode):
    names = collections.Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names[function.overloadpacket.__name__] += 1
        return function(*arguments, **(options or {}))

def both(sizes, dtype=torch.bfloat16, width=512, shifted=(), given=lambda k: True, duplicates="negatives", offset=0):
    rows, texts = zip(*sizes, strict=True)
    levels = range(len(sizes))
    images = [features(rows[k], width, dtype, 2 * k in shifted).requires_grad_() for k in levels]
    of_levels = [features(texts[k], width, dtype, 2 * k + 1 in shifted).requires_grad_() for k in levels]
    # Scales, indices and gradients that begin anywhere.
    scales = torch.full((len(sizes) + offset,), 10.0)[offset:].requires_grad_().unbind()
    indices = [torch.zeros(rows[k] + offset, dtype=torch.int64)[offset:] if given(k) else None for k in levels]
    upstream = torch.ones(len(sizes) + offset)[offset:]
    losses = multilevel_contrastive_loss(
        images, of_levels, scales, text_indices=indices, duplicates=duplicates, backend="triton"
    )
    torch.autograd.grad(losses, [*images, *of_levels, *scales], upstream)

three = [(128, 101), (700, 133), (350, 290)]
both(three)
kernels = [
    "prepare_levels", "level_sums", "level_losses", "level_gradients", "level_products", "finish_levels"
]
assert launched == dict.fromkeys(kernels, 1), launched
# What torch runs besides: outside the op, and in its implementation.
with Recorded():
    both(three)
assert {name: Recorded.names.pop(name) for name in ("contrastive_losses", "contrastive_losses_backward")} == {
    "contrastive_losses": 1, "contrastive_losses_backward": 1
}

def recorded(function):
    def run(*arguments):
        with Recorded():
            return function(*arguments)
    return run

plain = Recorded.names.copy()
fused._losses, fused._losses_backward = recorded(fused._losses), recorded(fused._losses_backward)
setup = {"randn", "_to_copy", "ones", "full", "zeros"}  # of the test
allocations, views = {"empty", "empty_like"}, {"slice", "view", "unbind", "detach", "select", "stack"}
Recorded.names.clear()
both(three)
assert set(plain) <= setup | allocations | views | {"promote_types"}, plain
assert set(Recorded.names) == allocations, Recorded.names
# As launched, too, and not in the compiler's tests alone: bfloat16 is read 16 bytes at once.
assert not any("ld.global.b16" in ptx[name] for name in kernels)

# Forms: with an index for no level, and the other kind of duplicates.
both([(64, 64)], given=lambda k: False)
both(three, duplicates="positives")
before = compiled.copy()
for sizes in (
    [(127, 100), (701, 131), (353, 291)], [(16, 1), (1, 16)], [(1, 1)], [(128, 128), (640, 256)], [(4095, 300)],
    # Several groups, which begin anywhere in the buffers of all levels.
    [(5, 3), (7, 1), (1, 1), (3, 3), (9, 7), (11, 2), (13, 5), (2, 1), (3, 1)], [(9, 3), (0, 0), (33, 5)],
):
    for offset in range(4):
        both(sizes, offset=offset)
both([(16, 16), (128, 128), (30, 20)], given=lambda k: k == 2)
assert compiled == before, compiled - before
# Features that do not begin at 16 bytes: one form more of what reads them, whichever these are.
for shifted in ((0, 1), (1, 2, 3), (5,), (4,), range(6)):
    both(three, shifted=shifted)
assert compiled - before == {"prepare_levels": 1, "finish_levels": 1}, compiled - before
assert "ld.global.b16" in ptx["prepare_levels"]
both([(128, 128)], torch.float32)

# A large level, which is processed alone.
t.GROUPED = 2**20
both([(1025, 1030), (70, 60)])
before = compiled.copy()
for sizes in ([(4097, 300)], [(9, 3), (1025, 1030), (127, 101), (33, 5)], [(3000, 2999)]):
    both(sizes)
both([(2000, 1999)], offset=1)
assert compiled == before, compiled - before
print("checked")
"""

LOG_SUMS = """
from scenarioclip_fast.kernels.contrastive import contrastive_triton as t, large, plan as plans

plans._plan = lambda *given, plan=plans._plan: dataclasses.replace(plan(*given), tma=True)
large.multiply = lambda *_, **__: None  # the matrix library's: out of a CPU's reach

def both(sizes, dtype=torch.bfloat16, width=512, shifted=()):
    rows, texts = zip(*sizes, strict=True)
    levels = range(len(sizes))
    image = [features(rows[k], width, dtype, 2 * k in shifted) for k in levels]
    text = [features(texts[k], width, dtype, 2 * k + 1 in shifted) for k in levels]
    index, scale = torch.zeros(sum(rows), dtype=torch.int64), torch.full((len(sizes),), 10.0)
    weight = torch.ones(sum(texts))
    saved = t.forward(image, text, scale, index, weight, True, 0)
    grads = [torch.ones_like(v) for v in saved[:3]]
    t.backward(image, text, scale, index, weight, saved, grads, True, True, True)

both([(128, 101), (700, 133), (350, 290)])
once = ("level_sums", "level_log_sums", "level_factors", "level_gradients", "level_products", "finish_levels")
assert launched == {**dict.fromkeys(once, 1), "prepare_levels": 2}, launched
# As launched, too, and not in the compiler's tests alone: bfloat16 is read 16 bytes at once.
assert not any("ld.global.b16" in ptx[name] for name in launched)
t.GROUPED = 2**20
both([(1025, 1030)])  # alone
before = compiled.copy()
for sizes in (
    [(127, 100), (701, 131), (353, 291)], [(16, 1), (1, 16)], [(1, 1)], [(128, 128), (640, 256)], [(4097, 300)],
    # Several batches, which begin anywhere in the buffers of all levels.
    [(9, 3), (1025, 1030), (127, 101), (33, 5)],
    [(5, 3), (7, 1), (1, 1), (3, 3), (9, 7), (11, 2), (13, 5), (2, 1), (3, 1)],
):
    both(sizes)
assert compiled == before, compiled - before
# Features that do not begin at 16 bytes: one form more of what reads them, whichever these are.
three = [(128, 101), (700, 133), (350, 290)]
for shifted in ((0, 1), (1, 2, 3), (5,), (4,), range(6)):
    both(three, shifted=shifted)
assert compiled - before == {"prepare_levels": 1, "finish_levels": 1}, compiled - before
assert "ld.global.b16" in ptx["prepare_levels"]
both([(128, 128)], torch.float32)
print("checked")
"""

DISTILLATION = """
from scenarioclip_fast.kernels.distillation import distillation_triton as t

def forward(students, pairs):
    index, zero = torch.zeros(pairs, dtype=torch.int64), torch.zeros((), dtype=torch.int32)
    teacher, student = torch.randn(5, 512), torch.randn(students, 512)
    t.forward(student, teacher, index, index, torch.ones(pairs), torch.ones(()), 0.0, 0.07, True, zero)

forward(70, 300)
for sizes in ((1, 1), (16, 32), (1006, 1006), (0, 0)):
    forward(*sizes)
assert compiled == {"distillation": 1} and launched == {"distillation": 5}, (compiled, launched)
print("checked")
"""

LAYERS = """
from scenarioclip_fast.kernels.add_layer_norm import add_layer_norm_triton as norm
from scenarioclip_fast.kernels.quick_gelu import quick_gelu_triton as gelu

norm._multiprocessors = gelu._multiprocessors = lambda _: 132

def both(rows):
    x, branch = (torch.randn(rows, 768).bfloat16() for _ in range(2))
    weight, bias = torch.ones(768), torch.zeros(768)
    total, normed, statistics = norm.forward(x, branch, weight, bias, bias, 1e-5, torch.bfloat16)
    norm.backward(total, normed, total, weight, statistics, 3)
    gelu.backward(gelu.forward(x, None), x, None, False)
    gelu.backward(gelu.forward(x, bias), x, bias, True)

both(64)
for rows in (1, 17, 4321):
    both(rows)
gelus = ("quick_gelu_forward", "quick_gelu_backward", "quick_gelu_bias_forward", "quick_gelu_bias_backward")
names = ("add_layer_norm_forward", "add_layer_norm_backward", *gelus)
assert compiled == dict.fromkeys(names, 1) and launched == dict.fromkeys(names, 4), (compiled, launched)
assert not any("ld.global.b16" in ptx[name] for name in names), [n for n in names if "ld.global.b16" in ptx[n]]
print("checked")
"""

ATTENTION = """
from scenarioclip_fast.kernels.short_attention import short_attention_triton as attention

def both(total, longest, starts=None, dtype=torch.bfloat16):
    qkv = torch.randn(total, 3 * 768).to(dtype)
    y = attention.forward(qkv, 12, longest, starts, starts is not None)
    attention.backward(y, qkv, 12, longest, starts, starts is not None)

names = ("short_attention_forward", "short_attention_backward")
for n in (64, 1, 17, 1280, 0):
    both(50 * n, 50)
both(64 * 49, 49)
assert compiled == dict.fromkeys(names, 1) and launched == dict.fromkeys(names, 5), (compiled, launched)
# Starts that begin anywhere in a buffer.
for offset in range(3):
    for lengths in ([9, 1, 8, 3], [1], [2] * 100):
        starts = torch.tensor([0] * (offset + 1) + lengths).cumsum(0)[offset:]
        both(sum(lengths), max(lengths), starts)
assert compiled == dict.fromkeys(names, 2), compiled
assert not any(f"ld.global.b{size}" in ptx[name] for name in names for size in (16, 32))
print("checked")
"""


@pytest.mark.parametrize(
    "kernels",
    [FEATURES + CONTRASTIVE, FEATURES + LOG_SUMS, DISTILLATION, LAYERS, ATTENTION],
    ids=["contrastive", "log_sums", "distillation", "layers", "attention"],
)
def test_sizes_compile_nothing_anew(kernels: str, tmp_path: Path) -> None:
    """In a separate process, because the fake driver stays active."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", FAKE_DRIVER + kernels],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "checked", done.stderr
