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
compiled, launched, ptx = collections.Counter(), collections.Counter(), {}

def launcher(kernel):
    def launch(x, y, z, *rest):
        assert 0 < x < 2**31 and max(y, z) < 65536, (x, y, z)
        arguments, number = rest[6:], 0  # after stream, function, two of metadata, two hooks
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

CONTRASTIVE = """
from scenarioclip_fast.kernels.contrastive import contrastive_triton as t, large

plan = t.Plan.of
t.Plan.of = staticmethod(lambda features: dataclasses.replace(plan(features), tma=True))
large.multiply = lambda *_, **__: None  # the matrix library's: out of a CPU's reach

def features(n, width, dtype, shifted):
    whole = torch.randn(n * width + 8).to(dtype)
    return whole[1 if shifted else 0 :][: n * width].view(n, width)

def both(sizes, dtype=torch.bfloat16, width=512, shifted=()):
    rows, texts = zip(*sizes, strict=True)
    levels = range(len(sizes))
    image = [features(rows[k], width, dtype, 2 * k in shifted) for k in levels]
    text = [features(texts[k], width, dtype, 2 * k + 1 in shifted) for k in levels]
    index, scale = torch.zeros(sum(rows), dtype=torch.int64), torch.full((len(sizes),), 10.0)
    count = t.counts(index, rows, texts)
    saved = t.forward(image, text, scale, index, count, True, 0)
    sums = saved[:3]
    _, used = t.means(*sums, count, index, rows, texts, False)
    upstream = torch.ones(len(sizes) + 1)[len(sizes) % 2 :][: len(sizes)]
    grads = t.means_backward(upstream, used, count, index, rows, texts, False)
    t.backward(image, text, scale, index, count, saved, grads, True, True, True)

both([(128, 101), (700, 133), (350, 290)])
# The losses' sum and its gradient aside.
assert sum(launched.values()) <= 18, launched
# As launched, too, and not in the compiler's tests alone: bfloat16 is read 16 bytes at once.
assert not any("ld.global.b16" in ptx[name] for name in ("unit_rows", "finish_rows", "products"))
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
assert compiled - before == {"unit_rows": 2, "finish_rows": 1}, compiled - before
assert "ld.global.b16" in ptx["unit_rows"]
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


@pytest.mark.parametrize("kernels", [CONTRASTIVE, DISTILLATION], ids=["contrastive", "distillation"])
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
