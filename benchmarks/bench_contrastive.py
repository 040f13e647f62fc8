"""contrastive_loss against eager and compiled PyTorch, the fused losses of others, and four bare matrix products.

Run: make bench, or: pytest benchmarks/bench_contrastive.py --benchmark-only --benchmark-json=OUT.json
Other sizes: SCENARIOCLIP_FAST_BENCH_ROWS=4096,16384 (or "all": 128 to 262,144), SCENARIOCLIP_FAST_BENCH_WIDTHS=512,768
Pictures: python benchmarks/plot_contrastive.py RECORD OUT.png

CASES is the order of a run: on a GPU what matters most comes first, so that a run that is cut off has lost the least.

The others (GPU only): pip install 'scenarioclip-fast[rivals]'. Every form gets the same features, in the same run.
Beside each time stand the errors of loss and gradients against float64 and the peak of memory above inputs and their
gradients. What is wrong is not timed: ours fails, the rest is left out with its error as the reason.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from scenarioclip_fast.benchmarks.timing import (
    REHEARSAL,
    WARM,
    backend_for,
    counted,
    device_for,
    on_gpu,
    sized,
    synchronize,
    timed,
)
from scenarioclip_fast.kernels.contrastive import contrastive_cpu, reference
from torch import Tensor

from scenarioclip_fast.dispatch import unavailable_reason
from scenarioclip_fast.ops import contrastive_loss, multilevel_contrastive_loss
from scenarioclip_fast.ops.contrastive import log_sums

SCALE = 1 / 0.07
LEVELS = (128, 700, 350)  # global, object and relation rows of a batch of 128 scenes
DISTINCT = (39, 73, 289)  # their texts, as 128 photos have them
ROWS = {"cpu": (4096,), "cuda": (8192, 32768, 65536)}
MAIN = 32768  # rows at which a GPU does everything
LARGEST = 262144  # as many rows as a whole cluster's batch, for the memory; ours alone: the others would take minutes
ALL_ROWS = {
    "cpu": (128, 256, 512, 1024, 2048, 4096),
    "cuda": (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144),
}
ASKED = os.environ.get("SCENARIOCLIP_FAST_BENCH_ROWS")
WIDTHS = [int(d) for d in os.environ.get("SCENARIOCLIP_FAST_BENCH_WIDTHS", "512").split(",")]
PARTS = ("loss", "d image", "d text", "d scale")
# Relative error of a gradient above which a result counts as wrong: float32 products, and bfloat16 logits at scale 14.
WRONG = {torch.float32: 1e-4, torch.bfloat16: 0.1}
# Rows up to which every gradient is compared with float64: four products of 262,144 rows would take a GPU 13 s.
WHOLE = sized(65536, 256)
SAMPLE = 256  # rows, and texts, that are compared above
BOTH = "forward + backward"

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def open_clip(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    return reference.open_clip_loss(F.normalize(x, dim=1), F.normalize(y, dim=1), s.to(x.dtype))


def transposed(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """The reference implementation's form: one product, and cross entropy over it and over its transpose."""
    logits = s.to(x.dtype) * F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
    target = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def compiled(loss: Loss) -> Loss:
    return lambda x, y, s: _compiled(loss)(x, y, s)


@functools.cache
def _compiled(loss: Loss) -> Loss:
    # Every size is compiled for itself; above this limit, 8 otherwise, Dynamo silently runs the eager form.
    torch._dynamo.config.recompile_limit = 64
    # A rehearsal traces alone: compiling for the CPU at hand takes long, and says nothing about a GPU.
    return torch.compile(loss, dynamic=False, backend="eager" if REHEARSAL else "inductor")


def ours(backend: str) -> Loss:
    return lambda x, y, s: contrastive_loss(x, y, s, backend=backend_for(backend))


def inf_cl(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """Rows only, in TF32: once for images and once for texts."""
    from inf_cl import cal_flash_loss

    x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    return (cal_flash_loss(x, y, scale=s).mean() + cal_flash_loss(y, x, scale=s).mean()) / 2


def memeff(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """Both sides in one pass; its temperature is a constant."""
    from memeff import MemoryEfficientCLIPLoss

    return MemoryEfficientCLIPLoss(temperature=1 / SCALE, stable=False)(x, y)


def _both_sides(rows_only: Loss) -> Loss:
    """A loss of x, y and target that knows rows alone: once for images and once for texts."""

    def loss(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
        target = torch.arange(len(x), device=x.device)
        s = s.to(x.dtype)
        return (rows_only(s * x, y, target) + rows_only(s * y, x, target)) / 2

    return loss


@_both_sides
def cut_cross_entropy(x: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Leaves out what is small of a gradient, as it does by default."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x, y, target)


@_both_sides
def liger_kernel(x: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Sums in float32, and 256 MiB for logits at a time, as ours: with its default of N D logits products are small."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    logits = max(2**28 // x.element_size() // x.numel(), 1)  # in units of N D
    return liger_fused_linear_cross_entropy(x, y, target, accum_dtype=torch.float32, chunk_mem_const=logits)


@_both_sides
def quack(x: Tensor, y: Tensor, target: Tensor) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(x, y, target)


SIGMOID = "siglip-kernel (sigmoid loss)"
SIGMOID_BIAS = -10.0  # where such a loss begins: most pairs do not match
SIGMOID_ROWS = 4096  # of N float64 logits at a time


def siglip_kernel(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """Another loss with the same products, three of them; held to `exact_sigmoid`. Its bias is a constant here."""
    from siglip_kernel import fused_siglip_loss

    bias = torch.tensor(SIGMOID_BIAS, device=x.device)
    return fused_siglip_loss(F.normalize(x, dim=1), F.normalize(y, dim=1), s.log(), bias)


WAYS: dict[str, Loss] = {
    **{f"ours: {backend}": ours(backend) for backend in ("triton", "cpu", "reference")},
    "logits.T": transposed,
    "logits.T compiled": compiled(transposed),
    "open_clip": open_clip,
    "open_clip compiled": compiled(open_clip),
    "inf_cl": inf_cl,
    "cut_cross_entropy": cut_cross_entropy,
    "memeff": memeff,
    "liger_kernel": liger_kernel,
    SIGMOID: siglip_kernel,
    "quack": quack,
}
# Form -> module and package, in the order of a run. quack-kernels brings a compiler that takes 20 s a kernel.
RIVALS = {
    "inf_cl": ("inf_cl", "inf-cl"),
    "cut_cross_entropy": ("cut_cross_entropy", "cut-cross-entropy"),
    "memeff": ("memeff", "memeff"),
    "liger_kernel": ("liger_kernel", "liger-kernel"),
    SIGMOID: ("siglip_kernel", "siglip-kernel"),
    "quack": ("quack", "quack-kernels"),
}
PLAIN = [way for way in WAYS if way not in RIVALS and not way.endswith("compiled")]
# Bytes per logit that a form holds at its highest point, about: rows beyond memory are left out.
HELD = {"open_clip": 12, "open_clip compiled": 12, "logits.T": 12, "logits.T compiled": 12, "ours: reference": 40}

# The products that the loss is made of, apart. "K" is what is summed over.
FOUR = "four bare products"
PRODUCTS = (FOUR, "K = width", "K = side", "K = side, added", "K = side, transposed, added")


@dataclass(frozen=True)
class Case:
    """A benchmark. `rows` is that of a real run: a rehearsal takes fewer."""

    kind: str  # "products", "rows" or "levels"
    way: str  # of PRODUCTS or WAYS
    device: str
    rows: int
    width: int
    phase: str = BOTH
    distinct: bool = False  # levels with texts as scenes have them, which the other forms repeat

    @property
    def id(self) -> str:
        if self.kind == "levels":
            return f"{self.way}-{'distinct texts' if self.distinct else 'a text a row'}-{self.width}-{self.device}"
        return f"{self.way}-{self.device}-{self.rows}-{self.width}" + f"-{self.phase}" * (self.kind == "rows")

    @property
    def size(self) -> int:
        """Rows of this run."""
        return sized(self.rows, max(self.rows // 512, 32))


def gpu_cases(width: int) -> list[Case]:
    def rows(way: str, n: int, phase: str = BOTH) -> Case:
        return Case("rows", way, "cuda", n, width, phase)

    def products(way: str, n: int) -> Case:
        return Case("products", way, "cuda", n, width)

    def levels(way: str) -> list[Case]:
        return [Case("levels", way, "cuda", max(LEVELS), width, distinct=distinct) for distinct in (False, True)]

    return [
        products(FOUR, MAIN),
        *(rows(way, MAIN) for way in ("ours: triton", "logits.T compiled", "logits.T")),
        *(products(way, MAIN) for way in PRODUCTS if way != FOUR),
        rows("ours: triton", 65536),
        products(FOUR, 65536),
        *(case for way in ("ours: triton", "logits.T compiled", "logits.T") for case in levels(way)),
        products(FOUR, 8192),
        *(rows(way, 8192) for way in ("ours: triton", "logits.T")),
        *(rows(way, MAIN, phase) for way in ("ours: triton", "logits.T") for phase in ("forward", "backward")),
        *(rows(way, MAIN) for way in ("open_clip", "open_clip compiled")),
        *levels("open_clip"),
        rows("ours: triton", LARGEST),
        # Code of others: an illegal memory access in it would end the CUDA context for what comes after.
        *(rows(way, n) for way in RIVALS for n in (MAIN, 8192)),
    ]


def cpu_cases(width: int) -> list[Case]:
    ways = [way for way in WAYS if way != "ours: triton" and way not in RIVALS]
    apart = ("ours: cpu", "logits.T")
    return [
        *(Case("products", FOUR, "cpu", n, width) for n in ROWS["cpu"]),
        *(Case("levels", way, "cpu", max(LEVELS), width, distinct=d) for way in ways for d in (False, True)),
        *(
            Case("rows", way, "cpu", n, width, phase)
            for way in ways
            for n in ROWS["cpu"]
            for phase in ("forward", "backward", BOTH)
            if phase == BOTH or way in apart
        ),
    ]


def asked_cases(device: str, sizes: Sequence[int], width: int) -> list[Case]:
    """Everything at sizes that were asked for."""
    others = ("ours: triton", *RIVALS) if device == "cpu" else ("ours: cpu",)
    ways = [way for way in WAYS if way not in others]
    products = PRODUCTS if device == "cuda" else [FOUR]
    return [
        *(Case("products", way, device, n, width) for n in sizes for way in products),
        *(
            Case("levels", way, device, max(LEVELS), width, distinct=d)
            for way in ways
            if way != SIGMOID
            for d in (False, True)
        ),
        *(
            Case("rows", way, device, n, width, phase)
            for way in ways
            for n in sizes
            for phase in ("forward", "backward", BOTH)
            if phase == BOTH or way in PLAIN
        ),
    ]


def cases() -> Iterator[Case]:
    for width in WIDTHS:
        for device, usual in (("cuda", gpu_cases), ("cpu", cpu_cases)):
            if ASKED is None:
                yield from usual(width)
            else:
                sizes = ALL_ROWS[device] if ASKED == "all" else [int(n) for n in ASKED.split(",")]
                yield from asked_cases(device, sizes, width)


def compiles(case: Case) -> bool:
    """Whether a compiler has anything to do that it has not done for an earlier case."""
    fused = case.way == "ours: triton" or case.way in RIVALS or case.way.endswith("compiled")
    return fused and case.phase == BOTH and case.rows <= MAIN


CASES = [case for case in cases() if compiles(case) or not WARM]


def texts_of(rows: int, texts: int, device: str) -> Tensor:  # [rows]
    """The text of each row: every one of them, and some again."""
    return torch.arange(rows, device=device_for(device)) * 7919 % texts  # a prime: neighbours differ


def features(
    rows: int, width: int, device: str, seed: int = 0, texts: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Matching pairs with noise, as in training; bfloat16 for a GPU. A text a row, or `texts` distinct ones."""
    where = device_for(device)
    g = torch.Generator(where).manual_seed(seed)
    text = torch.randn(texts or rows, width, generator=g, device=where)
    own = text[texts_of(rows, texts, device)] if texts else text
    image = own + 2 * torch.randn(rows, width, generator=g, device=where)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    leaves = (image.to(dtype), text.to(dtype), torch.tensor(SCALE, device=where))
    return tuple(t.requires_grad_() for t in leaves)  # type: ignore[return-value]


@functools.lru_cache(maxsize=16)
def exact(rows: int, width: int, device: str, seed: int = 0, texts: int | None = None) -> list[Tensor]:
    """Loss and gradients in float64, tile by tile: the N x N form in float64 would not fit at the larger sizes.

    Rows of equal text count as often as they are there, as where each has its own copy.
    """
    image, text, scale = (t.detach().double() for t in features(rows, width, device, seed, texts))
    index = texts_of(rows, texts, device) if texts else None
    count = None if index is None else torch.bincount(index).double()
    # A GPU spends most of its time waiting for launches on tiles that are made for a CPU.
    side = 16384 if on_gpu(device) else contrastive_cpu.ROWS
    with patch.multiple(contrastive_cpu, ROWS=side, COLUMNS=side):
        row, column, positive = contrastive_cpu.level_forward(image, text, scale, index, count)
        share = torch.full_like(row, 0.5 / len(row))
        by_column = share if count is None else count * share[0]
        grads = contrastive_cpu.level_backward(
            image, text, scale, index, count, row, column, share, by_column, -2 * share
        )
    return [((row + (column if index is None else column[index])) / 2 - positive).mean(), *grads]


@functools.lru_cache(maxsize=2)
def exact_sigmoid(rows: int, width: int, device: str) -> list[Tensor]:
    """The same of the sigmoid loss, -sum log sigmoid(+-(S + bias)) / N with plus for the pairs: torch in float64, by
    rows."""
    leaves = [t.detach().double().requires_grad_() for t in features(rows, width, device)]
    image, text, scale = leaves
    total = torch.zeros_like(scale)
    for part in torch.arange(rows, device=image.device).split(SIGMOID_ROWS):
        logits = scale * F.normalize(image[part], dim=1) @ F.normalize(text, dim=1).T + SIGMOID_BIAS
        sign = torch.full_like(logits, -1.0)
        sign[part - part[0], part] = 1.0
        loss = -F.logsigmoid(sign * logits).sum() / rows
        loss.backward()
        total += loss.detach()
    return [total, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def sampled(leaves: Sequence[Tensor], found: Sequence[Tensor | None]) -> dict[str, tuple[Tensor, Tensor]]:
    """What was found and what is wanted: for the loss, and for some random rows and texts, in float64.

    The gradient of a row needs the sums of all columns. They are ours, held to float64 for the sample as well.
    """
    image, text, scale = (t.detach() for t in leaves)
    n = len(image)
    backend = "triton" if image.is_cuda else "cpu"
    by_row, by_column, _ = log_sums(image, text, scale, backend=backend)
    picked = torch.randperm(n, generator=torch.Generator().manual_seed(0))[: min(SAMPLE, n // 4)].to(image.device)
    x, y = (F.normalize(t.double(), dim=1) for t in (image, text))
    loss = ((by_row + by_column) / 2 - scale.double() * (x * y).sum(1)).mean()
    out = {}
    if found[0] is not None:
        out["loss"] = (found[0], loss)
    sides = (
        ("image", image, x, y, by_row, by_column, found[1]),
        ("text", text, y, x, by_column, by_row, found[2]),
    )
    for name, raw, own, others, own_sums, other_sums, grad in sides:
        logits = scale.double() * own[picked] @ others.T
        sums = logits.logsumexp(1)
        # Of the sums, not of their logarithms: an error of a tenth is no more than 0.1 there, of 15 and more.
        out[f"sums of each {name}"] = ((own_sums[picked] - sums).exp(), torch.ones_like(sums))
        g = ((logits - sums[:, None]).exp() + (logits - other_sums).exp()) / (2 * n)
        g[torch.arange(len(picked), device=g.device), picked] -= 1 / n
        wanted = reference.unit_rows_backward(raw[picked].double(), scale.double() * g @ others)
        if grad is not None:
            out[f"d {name}"] = (grad[picked], wanted)
    return out


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item()


def judged(way: str, errors: dict[str, float], dtype: torch.dtype) -> dict[str, Any]:
    """The errors as a record has them; what is wrong is not timed."""
    for part, error in errors.items():
        if not error < WRONG[dtype]:
            (pytest.fail if way.startswith("ours") else pytest.skip)(f"{way}: {part} is off by {error:.1e}, not timed")
    return {f"error of {part}": error for part, error in errors.items()}


def checked(way: str, found: Sequence[Tensor | None], wanted: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """Relative errors; what a form does not compute has none."""
    pairs = list(zip(PARTS, found, wanted, strict=True))
    errors = judged(way, {part: relative_error(f, w) for part, f, w in pairs if f is not None}, dtype)
    return errors | {f"error of {part}": "not computed" for part, f, _ in pairs if f is None}


def checked_by_sample(way: str, found: Sequence[Tensor | None], leaves: Sequence[Tensor]) -> dict[str, Any]:
    """Relative errors of a sample, where comparing everything would take too long."""
    pairs = sampled(leaves, found)
    errors = judged(way, {part: relative_error(f, w) for part, (f, w) in pairs.items()}, leaves[0].dtype)
    of = f"{len(pairs['d image'][0])} random rows and as many texts of {len(leaves[0])}, and the loss"
    return errors | {"compared with float64": of, "error of d scale": "not compared at this size"}


def peak_memory(run: Callable[[], Any], device: str) -> float | None:
    """MiB above what was held before, at the highest point; None where the system does not tell."""
    if on_gpu(device):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        # What the allocator kept of earlier calls would be used again unseen.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    except (OSError, AttributeError):
        return None
    status = Path("/proc/self/status")
    before = int(re.findall(r"VmRSS:\s+(\d+)", status.read_text())[0])
    run()
    return (int(re.findall(r"VmHWM:\s+(\d+)", status.read_text())[0]) - before) / 2**10


def free_bytes(device: str) -> int:
    if on_gpu(device):  # the allocator gives back what it keeps before it fails
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + kept
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def skip_without(way: str, device: str, rows: int) -> None:
    if way.startswith("ours"):
        backend = backend_for(way.removeprefix("ours: "))
        if reason := unavailable_reason("contrastive_loss", backend, device_for(device)):
            pytest.skip(reason)
    if way in RIVALS:
        module, package = RIVALS[way]
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{way} is not installed: pip install {package}")
    if (needed := HELD.get(way, 0) * rows * rows) > 0.8 * (free := free_bytes(device)):
        pytest.skip(f"{way} keeps the N x N logits: about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free")


def rounds(run: Callable[[], Any], device: str, rows: int) -> dict[str, int]:
    """On a GPU as many as half a second allows; `run` has run before."""
    if not on_gpu(device):
        return {"rounds": sized(5 if rows < 4096 else 3, 1), "warmup_rounds": 1}
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    seconds = time.perf_counter() - start
    return {"rounds": max(3, min(20, int(0.5 / seconds))), "warmup_rounds": 1 if seconds < 0.1 else 0}


def differentiated(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor | None]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves, allow_unused=True)]


def needed(phase: str) -> tuple[int, int]:
    """Without N x U storage: how often N D numbers are read or written, and products of 2 N U D operations.

    Forward reads both sides and takes one product, backward reads them, writes both gradients and takes three.
    """
    forward, backward = (2, 1), (4, 3)
    both = (forward[0] + backward[0], forward[1] + backward[1])
    return {"forward": forward, "backward": backward, BOTH: both}[phase]


class Products:
    """The matrix products that the loss is made of, block by block as it takes them, and nothing else.

    Of K = width, to operands' precision: S, once forward and once more backward. Of K = a block's side, to float32: G
    and its transpose times features, the first block of a row or column written, the others added.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:  # [N, D], [U, D]
        self.x, self.y = x, y
        self.side = self.block_side(x)
        high, wide = min(self.side, len(x)), min(self.side, len(y))
        self.block = x.new_empty(high * wide)
        self.d_x = torch.zeros(high, x.shape[1], dtype=torch.float32, device=x.device)
        self.d_y = torch.zeros(len(y), x.shape[1], dtype=torch.float32, device=x.device)
        self.logits()  # so that what the others multiply are numbers as they come

    @staticmethod
    def block_side(x: Tensor) -> int:
        if x.is_cuda:
            from scenarioclip_fast.kernels.contrastive.contrastive_triton import Plan

            return Plan.of(x).block_side(x.device)
        return sized(contrastive_cpu.ROWS, 48)  # a rehearsal has several blocks, too

    def blocks(self) -> Iterator[tuple[slice, slice, Tensor]]:  # rows, texts, [rows, texts]
        for i in range(0, len(self.x), self.side):
            for j in range(0, len(self.y), self.side):
                rows, texts = slice(i, min(i + self.side, len(self.x))), slice(j, min(j + self.side, len(self.y)))
                high, wide = rows.stop - rows.start, texts.stop - texts.start
                yield rows, texts, self.block[: high * wide].view(high, wide)

    def logits(self) -> None:
        for rows, texts, block in self.blocks():
            torch.mm(self.x[rows], self.y[texts].T, out=block)

    def by_rows(self, added: bool) -> None:
        for _, texts, block in self.blocks():
            product(block, self.y[texts], self.d_x[: len(block)], added)

    def by_texts(self) -> None:
        for rows, texts, block in self.blocks():
            product(block.T, self.x[rows], self.d_y[texts], True)

    def four(self) -> None:
        self.logits()
        for rows, texts, block in self.blocks():
            torch.mm(self.x[rows], self.y[texts].T, out=block)
            product(block, self.y[texts], self.d_x[: len(block)], texts.start > 0)
            product(block.T, self.x[rows], self.d_y[texts], rows.start > 0)

    def named(self, way: str) -> tuple[str, Callable[[], None], int]:
        """The form of one of PRODUCTS, the call, and the bytes that it must read and write."""
        (n, d), u, size = self.x.shape, len(self.y), self.x.element_size()
        to = str(self.x.dtype).removeprefix("torch.").replace("bfloat16", "bf16")
        summed = f"K = {min(self.side, u)}"
        operands, sums = (n * u + n * d) * size, 4 * n * d
        return {
            FOUR: (FOUR, self.four, needed(BOTH)[0] * n * d * size),
            "K = width": (f"bare product, K = {d}, {to} out", self.logits, (n * d + u * d + n * u) * size),
            "K = side": (f"bare product, {summed}, float32 out", lambda: self.by_rows(False), operands + sums),
            "K = side, added": (
                f"bare product, {summed}, added to float32",
                lambda: self.by_rows(True),
                operands + 2 * sums,
            ),
            "K = side, transposed, added": (
                f"bare product, {summed}, transposed, added to float32",
                self.by_texts,
                operands + 2 * sums,
            ),
        }[way]


def product(a: Tensor, b: Tensor, out: Tensor, added: bool) -> None:
    """out (+)= a b with float32 sums, as the backward pass calls it."""
    if a.is_cuda:
        from scenarioclip_fast.kernels.contrastive.contrastive_triton import _product

        _product(a, b, out, added)
    else:  # torch multiplies low precision to float32 on GPUs alone
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=float(added), out=out)


def measure_products(benchmark: Any, case: Case) -> None:
    """The floor without N x N storage: one product forward, three backward."""
    n, width, device = case.size, case.width, case.device
    x, y, _ = (t.detach() for t in features(n, width, device))
    form, run, bytes_ = Products(x, y).named(case.way)
    phase = BOTH if case.way == FOUR else "bare products"
    benchmark.extra_info.update(form=form, phase=phase, rows=n, width=width)
    benchmark.group = f"contrastive, {phase}, {n} x {n} x {width}, {device}"
    products = needed(BOTH)[1] if case.way == FOUR else 1
    precision = str(x.dtype).removeprefix("torch.")
    counted(benchmark, device, bytes=bytes_, operations=products * 2 * n * n * width, precision=precision)
    run()
    timed(benchmark, run, device, **rounds(run, device, n))


def measure_rows(benchmark: Any, case: Case) -> None:
    way, n, width, device, phase = case.way, case.size, case.width, case.device, case.phase
    skip_without(way, device, n)
    leaves = features(n, width, device)

    def forward() -> Tensor:
        return WAYS[way](*leaves)

    def both() -> list[Tensor | None]:
        return differentiated(forward(), leaves)

    benchmark.extra_info.update(form=way, phase=phase, rows=n, width=width)
    benchmark.group = f"contrastive, {phase}, {n} x {n} x {width}, {device}"
    if not WARM:
        if n > WHOLE and way != SIGMOID:
            errors = checked_by_sample(way, both(), leaves)
        else:
            law = exact_sigmoid if way == SIGMOID else exact
            errors = checked(way, both(), law(n, width, device), leaves[0].dtype)
        benchmark.extra_info.update(errors)
    numbers, products = needed(phase)
    precision = str(leaves[0].dtype).removeprefix("torch.")
    count = {"bytes": numbers * leaves[0].nbytes, "operations": products * 2 * n * n * width}
    counted(benchmark, device, **count, precision=precision)
    run: Callable[[], Any] = {"forward": forward, BOTH: both}.get(phase, both)
    if phase == "backward":
        loss = forward()
        run = functools.partial(torch.autograd.grad, loss, leaves, retain_graph=True)
    elif (peak := peak_memory(run, device)) is not None:
        gradients = sum(t.nbytes for t in leaves) / 2**20 if phase != "forward" else 0.0
        benchmark.extra_info["MiB above inputs and gradients"] = round(peak - gradients, 1)
    timed(benchmark, run, device, **rounds(run, device, n))


def level_sizes(distinct: bool) -> list[tuple[int, int | None]]:
    """Rows and texts of each level."""
    rows, texts = sized((LEVELS, DISTINCT), ((64, 120, 96), (20, 30, 70)))
    return list(zip(rows, texts if distinct else [None] * len(rows), strict=True))


def level_call(way: str, distinct: bool, width: int, device: str) -> tuple[list[Tensor], Callable[[], Tensor]]:
    """Leaves (images, texts and scales, level by level), and the losses [levels] of a batch by one of WAYS."""
    sizes = level_sizes(distinct)
    levels = [features(rows, width, device, seed, texts) for seed, (rows, texts) in enumerate(sizes)]
    indices = [texts_of(rows, texts, device) if texts else None for rows, texts in sizes]

    def loss() -> Tensor:
        if not way.startswith("ours"):
            return torch.stack(
                [WAYS[way](x, y if own is None else y[own], s) for (x, y, s), own in zip(levels, indices, strict=True)]
            )
        images, texts, scales = ([level[k] for level in levels] for k in range(3))
        backend = backend_for(way.removeprefix("ours: "))
        return multilevel_contrastive_loss(images, texts, scales, text_indices=indices, backend=backend)

    return [leaf for level in zip(*levels, strict=True) for leaf in level], loss


def gpu_microseconds(run: Callable[[], Any], calls: int = 20) -> float:
    """Time that the GPU's own work takes, without the gaps between launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / calls


def measure_levels(benchmark: Any, case: Case) -> None:
    """The three levels of one batch, where the launches are the cost: with a text a row, and with texts as scenes have
    them, which the other forms repeat."""
    way, width, device = case.way, case.width, case.device
    sizes = level_sizes(case.distinct)
    rows, texts = zip(*sizes, strict=True)
    skip_without(way, device, max(rows))
    leaves, loss = level_call(way, case.distinct, width, device)

    def both() -> list[Tensor | None]:
        value = loss()
        return [value.detach(), *torch.autograd.grad(value.sum(), leaves, allow_unused=True)]

    phase = "levels, distinct texts" if case.distinct else "levels"
    benchmark.extra_info.update(form=way, phase=phase, rows=sum(rows), width=width, device=device)
    losses, *grads = both()
    assert losses is not None
    for seed, (size, value) in enumerate(zip(sizes, losses, strict=True)):
        found = [value, *grads[seed :: len(sizes)]]
        errors = {} if WARM else checked(way, found, exact(size[0], width, device, seed, size[1]), leaves[0].dtype)
        benchmark.extra_info.update({f"{name}, {size[0]} rows": error for name, error in errors.items()})
    of = f"{rows} rows" + f" and {texts} texts" * case.distinct
    benchmark.group = f"contrastive, {BOTH}, levels of {of}, width {width}, {device}"
    timed(benchmark, both, device, **rounds(both, device, max(rows)))
    if on_gpu(device) and way.startswith("ours") and not WARM:  # afterwards: a profiler may slow down launches
        try:
            benchmark.extra_info["GPU microseconds"] = gpu_microseconds(both)
        except Exception as error:  # the times are taken, whatever the profiler says
            benchmark.extra_info["the profiler failed"] = f"{type(error).__name__}: {error}".splitlines()[0]


MEASURE = {"products": measure_products, "rows": measure_rows, "levels": measure_levels}


def _marks(case: Case) -> list[pytest.MarkDecorator]:
    return [pytest.mark.gpu] if case.device == "cuda" else []


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id, marks=_marks(case)) for case in CASES])
def test_contrastive(benchmark: Any, case: Case) -> None:
    try:
        MEASURE[case.kind](benchmark, case)
    except Exception as error:
        # A rival that fails costs only itself, as does a form of torch's without memory; else a failure is one.
        full = isinstance(error, torch.OutOfMemoryError) and not case.way.startswith("ours")
        if case.way in RIVALS or full:
            pytest.skip(f"{case.way} failed: {type(error).__name__}: {str(error)[:300]}")
        raise
