"""contrastive_loss against eager and compiled PyTorch, third-party fused losses, and the four bare matrix products.

Run: make bench, or: pytest benchmarks/bench_contrastive.py --benchmark-only --benchmark-json=OUT.json
Other sizes: SCENARIOCLIP_FAST_BENCH_ROWS=4096,16384 (or "all": 128 to 262,144), SCENARIOCLIP_FAST_BENCH_WIDTHS=512,768
Plots: python benchmarks/plot_contrastive.py RECORD OUT.png

CASES is in the order of a run. On a GPU the headline cases come first, so that a run that is cut short still has them.

Third-party losses (GPU only): pip install 'scenarioclip-fast[rivals]'. All forms get the same features in the same run.
Each result also has the errors of loss and gradients against float64, and the peak memory above inputs and gradients.
A result that fails its check is not timed: this package's forms fail, the others are skipped with the error as reason.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
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
from scenarioclip_fast.kernels.contrastive import contrastive_cpu, large, reference
from torch import Tensor

from scenarioclip_fast import dispatch, requirements, use_workspace
from scenarioclip_fast.dispatch import unavailable_reason
from scenarioclip_fast.ops import contrastive_loss, multilevel_contrastive_loss
from scenarioclip_fast.ops.contrastive import fused, log_sums, validate

SCALE = 1 / 0.07
LEVELS = (128, 700, 350)  # global, object and relation rows of a batch of 128 scenes
DISTINCT_TEXTS = (39, 73, 289)  # per level, as in 128 photos
ROWS = {"cpu": (4096,), "cuda": (8192, 32768, 65536)}
MAIN_ROWS = 32768  # on a GPU, the size at which all forms run
LARGEST_ROWS = 262144  # a whole cluster's batch, to show memory; this package only: the others would take minutes
ALL_ROWS = {
    "cpu": (128, 256, 512, 1024, 2048, 4096),
    "cuda": (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144),
}
REQUESTED_ROWS = os.environ.get("SCENARIOCLIP_FAST_BENCH_ROWS")
WIDTHS = [int(d) for d in os.environ.get("SCENARIOCLIP_FAST_BENCH_WIDTHS", "512").split(",")]
OUTPUTS = ("loss", "d image", "d text", "d scale")
# Largest accepted relative error of loss and gradients: float32 products, and bfloat16 logits at scale 14.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
# Up to this many rows, all gradients are compared with float64: four products of 262,144 rows would take a GPU 13 s.
FULL_CHECK_ROWS = sized(65536, 256)
SAMPLE = 256  # above that, the number of rows and of texts compared
BOTH = "forward + backward"

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def open_clip(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    return reference.open_clip_loss(F.normalize(x, dim=1), F.normalize(y, dim=1), s.to(x.dtype))


def transposed(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """As in the published code: one product, and cross entropy over the logits and over their transpose."""
    logits = s.to(x.dtype) * F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
    target = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def compiled(loss: Loss) -> Loss:
    return lambda x, y, s: _compiled(loss)(x, y, s)


@functools.cache
def _compiled(loss: Loss) -> Loss:
    # Each size is compiled separately. Beyond the default limit of 8, Dynamo would silently run the eager form.
    torch._dynamo.config.recompile_limit = 64
    # A rehearsal only traces: compiling for the CPU is slow and shows nothing about the GPU.
    return torch.compile(loss, dynamic=False, backend="eager" if REHEARSAL else "inductor")


NO_WORKSPACE = ", no workspace"  # suffix of a form: nothing is kept from the forward to the backward pass


def ours(form: str) -> Loss:
    def loss(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        with workspace_of(form):
            return contrastive_loss(x, y, s, backend=backend_of(form))

    return loss


def backend_of(form: str) -> str:
    return backend_for(form.removeprefix("ours: ").removesuffix(NO_WORKSPACE))


def workspace_of(form: str) -> AbstractContextManager[None]:
    return use_workspace(0) if form.endswith(NO_WORKSPACE) else nullcontext()


def inf_cl(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """One direction per call, in TF32; called for images and for texts."""
    from inf_cl import cal_flash_loss

    x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    return (cal_flash_loss(x, y, scale=s).mean() + cal_flash_loss(y, x, scale=s).mean()) / 2


def memeff(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """Both directions in one pass; its temperature is a constant."""
    from memeff import MemoryEfficientCLIPLoss

    return MemoryEfficientCLIPLoss(temperature=1 / SCALE, stable=False)(x, y)


def _both_directions(one_direction: Loss) -> Loss:
    """Symmetrise a loss of (x, y, target) that covers one direction."""

    def loss(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
        target = torch.arange(len(x), device=x.device)
        s = s.to(x.dtype)
        return (one_direction(s * x, y, target) + one_direction(s * y, x, target)) / 2

    return loss


@_both_directions
def cut_cross_entropy(x: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """With its default gradient filter, which drops small values."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x, y, target)


@_both_directions
def liger_kernel(x: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """With float32 sums and 256 MiB of logits per chunk, as this package; its default chunks are small."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    logits = max(2**28 // x.element_size() // x.numel(), 1)  # in units of N D
    return liger_fused_linear_cross_entropy(x, y, target, accum_dtype=torch.float32, chunk_mem_const=logits)


@_both_directions
def quack(x: Tensor, y: Tensor, target: Tensor) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(x, y, target)


SIGMOID = "siglip-kernel (sigmoid loss)"
SIGMOID_BIAS = -10.0  # the usual initial value: most pairs do not match
SIGMOID_ROWS = 4096  # rows of float64 logits held at a time


def siglip_kernel(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """A different loss with three of the same products; checked against `exact_sigmoid`. Its bias is constant here."""
    from siglip_kernel import fused_siglip_loss

    bias = torch.tensor(SIGMOID_BIAS, device=x.device)
    return fused_siglip_loss(F.normalize(x, dim=1), F.normalize(y, dim=1), s.log(), bias)


FORMS: dict[str, Loss] = {
    **{
        f"ours: {backend}": ours(f"ours: {backend}")
        for backend in ("cuda", "triton", "cpu", f"cpu{NO_WORKSPACE}", "reference")
    },
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
# Form -> module and package, in the order of a run. The compiler of quack-kernels takes 20 s per kernel.
THIRD_PARTY = {
    "inf_cl": ("inf_cl", "inf-cl"),
    "cut_cross_entropy": ("cut_cross_entropy", "cut-cross-entropy"),
    "memeff": ("memeff", "memeff"),
    "liger_kernel": ("liger_kernel", "liger-kernel"),
    SIGMOID: ("siglip_kernel", "siglip-kernel"),
    "quack": ("quack", "quack-kernels"),
}
LARGE = ("ours: cuda", "ours: triton")  # this package's forms for large levels on a GPU
EAGER = [form for form in FORMS if form not in THIRD_PARTY and not form.endswith("compiled")]
# Approximate peak bytes per logit of each form: sizes that would exceed memory are skipped.
BYTES_PER_LOGIT = {
    "open_clip": 12,
    "open_clip compiled": 12,
    "logits.T": 12,
    "logits.T compiled": 12,
    "ours: reference": 40,
}

# The matrix products of the loss, timed separately. K is the summed dimension.
FOUR = "four bare products"
PRODUCTS = (FOUR, "K = width", "K = side", "K = side, added", "K = side, transposed, added")


@dataclass(frozen=True)
class Case:
    """A benchmark case. `rows` is for a real run; a rehearsal uses fewer."""

    kind: str  # "products", "rows" or "levels"
    form: str  # a key of PRODUCTS or FORMS
    device: str
    rows: int
    width: int
    phase: str = BOTH
    distinct: bool = False  # for "levels": distinct texts with indices, which other forms expand

    @property
    def id(self) -> str:
        if self.kind == "levels":
            return f"{self.form}-{'distinct texts' if self.distinct else 'one text per row'}-{self.width}-{self.device}"
        return f"{self.form}-{self.device}-{self.rows}-{self.width}" + f"-{self.phase}" * (self.kind == "rows")

    @property
    def size(self) -> int:
        """Number of rows in this run."""
        return sized(self.rows, max(self.rows // 512, 32))


def gpu_cases(width: int) -> list[Case]:
    def rows(form: str, n: int, phase: str = BOTH) -> Case:
        return Case("rows", form, "cuda", n, width, phase)

    def products(form: str, n: int) -> Case:
        return Case("products", form, "cuda", n, width)

    def levels(form: str) -> list[Case]:
        return [Case("levels", form, "cuda", max(LEVELS), width, distinct=distinct) for distinct in (False, True)]

    return [
        products(FOUR, MAIN_ROWS),
        *(rows(form, MAIN_ROWS) for form in (*LARGE, "logits.T compiled", "logits.T")),
        *(products(form, MAIN_ROWS) for form in PRODUCTS if form != FOUR),
        *(rows(form, 65536) for form in LARGE),
        products(FOUR, 65536),
        *(case for form in ("ours: triton", "logits.T compiled", "logits.T") for case in levels(form)),
        products(FOUR, 8192),
        *(rows(form, 8192) for form in (*LARGE, "logits.T")),
        *(rows(form, MAIN_ROWS, phase) for form in (*LARGE, "logits.T") for phase in ("forward", "backward")),
        *(rows(form, MAIN_ROWS) for form in ("open_clip", "open_clip compiled")),
        *levels("open_clip"),
        *(rows(form, LARGEST_ROWS) for form in LARGE),
        # Third-party code last: an illegal memory access would break the CUDA context for later cases.
        *(rows(form, n) for form in THIRD_PARTY for n in (MAIN_ROWS, 8192)),
    ]


def cpu_cases(width: int) -> list[Case]:
    forms = [form for form in FORMS if form not in LARGE and form not in THIRD_PARTY]
    with_phases = ("ours: cpu", "logits.T")  # also timed forward and backward separately
    return [
        *(Case("products", FOUR, "cpu", n, width) for n in ROWS["cpu"]),
        *(Case("levels", form, "cpu", max(LEVELS), width, distinct=d) for form in forms for d in (False, True)),
        *(
            Case("rows", form, "cpu", n, width, phase)
            for form in forms
            for n in ROWS["cpu"]
            for phase in ("forward", "backward", BOTH)
            if phase == BOTH or form in with_phases
        ),
    ]


def requested_cases(device: str, sizes: Sequence[int], width: int) -> list[Case]:
    """All forms at the requested sizes."""
    unavailable = (*LARGE, *THIRD_PARTY) if device == "cpu" else ("ours: cpu", f"ours: cpu{NO_WORKSPACE}")
    forms = [form for form in FORMS if form not in unavailable]
    products = PRODUCTS if device == "cuda" else [FOUR]
    return [
        *(Case("products", form, device, n, width) for n in sizes for form in products),
        *(
            Case("levels", form, device, max(LEVELS), width, distinct=d)
            for form in forms
            if form != SIGMOID
            for d in (False, True)
        ),
        *(
            Case("rows", form, device, n, width, phase)
            for form in forms
            for n in sizes
            for phase in ("forward", "backward", BOTH)
            if phase == BOTH or form in EAGER
        ),
    ]


def cases() -> Iterator[Case]:
    for width in WIDTHS:
        for device, default_cases in (("cuda", gpu_cases), ("cpu", cpu_cases)):
            if REQUESTED_ROWS is None:
                yield from default_cases(width)
            else:
                sizes = ALL_ROWS[device] if REQUESTED_ROWS == "all" else [int(n) for n in REQUESTED_ROWS.split(",")]
                yield from requested_cases(device, sizes, width)


def compiles(case: Case) -> bool:
    """Whether a case compiles something that no earlier case has compiled."""
    fused = case.form == "ours: triton" or case.form in THIRD_PARTY or case.form.endswith("compiled")
    return fused and case.phase == BOTH and case.rows <= MAIN_ROWS


CASES = [case for case in cases() if compiles(case) or not WARM]


def texts_of(rows: int, texts: int, device: str) -> Tensor:  # [rows]
    """The text index of each row; every text occurs, some repeatedly."""
    return torch.arange(rows, device=device_for(device)) * 7919 % texts  # a prime: neighbours differ


def features_dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def features(
    rows: int, width: int, device: str, seed: int = 0, texts: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Image, text and scale leaves: noisy matching pairs, as in training; bfloat16 on a GPU.

    Each row has its own text, or shares `texts` distinct ones.
    """
    where = device_for(device)
    g = torch.Generator(where).manual_seed(seed)
    text = torch.randn(texts or rows, width, generator=g, device=where)
    own = text[texts_of(rows, texts, device)] if texts else text
    image = own + 2 * torch.randn(rows, width, generator=g, device=where)
    dtype = features_dtype(device)
    leaves = (image.to(dtype), text.to(dtype), torch.tensor(SCALE, device=where))
    return tuple(t.requires_grad_() for t in leaves)  # type: ignore[return-value]


@functools.lru_cache(maxsize=16)
def exact(rows: int, width: int, device: str, seed: int = 0, texts: int | None = None) -> list[Tensor]:
    """Loss and gradients in float64, tile by tile: the larger sizes do not fit as N x N in float64.

    A shared text counts once per row, as if each row had its own copy.
    """
    image, text, scale = (t.detach().double() for t in features(rows, width, device, seed, texts))
    index = texts_of(rows, texts, device) if texts else None
    count = None if index is None else torch.bincount(index).double()
    # On a GPU, tiles of the CPU's size would be launch-bound.
    side = 16384 if on_gpu(device) else contrastive_cpu.ROWS
    with patch.multiple(contrastive_cpu, ROWS=side, COLUMNS=side):
        saved = contrastive_cpu.level_forward(image, text, scale, index, count)
        row, column, positive, *_ = saved
        share = torch.full_like(row, 0.5 / len(row))
        by_column = share if count is None else count * share[0]
        grads = contrastive_cpu.level_backward(image, text, scale, index, count, *saved, share, by_column, -2 * share)
    return [((row + (column if index is None else column[index])) / 2 - positive).mean(), *grads]


@functools.lru_cache(maxsize=2)
def exact_sigmoid(rows: int, width: int, device: str) -> list[Tensor]:
    """Float64 loss and gradients of the sigmoid loss -sum log sigmoid(+-(S + bias)) / N, plus for matching pairs."""
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
    """Pairs of (found, expected in float64): the loss, and the gradients of some random rows and texts.

    The gradient of a row needs the sums of all columns. They are this package's, checked in float64 for the sample.
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
    for name, raw, own, other, own_sums, other_sums, grad in sides:
        logits = scale.double() * own[picked] @ other.T
        sums = logits.logsumexp(1)
        # Compare the sums, not their logarithms: of a logarithm above 15, an error of 10 % would be below 0.1.
        out[f"sums of each {name}"] = ((own_sums[picked] - sums).exp(), torch.ones_like(sums))
        g = ((logits - sums[:, None]).exp() + (logits - other_sums).exp()) / (2 * n)
        g[torch.arange(len(picked), device=g.device), picked] -= 1 / n
        chosen = raw[picked].double()
        expected = reference.unit_rows_backward(chosen, reference.inverse_norms(chosen), scale.double() * g @ other)
        if grad is not None:
            out[f"d {name}"] = (grad[picked], expected)
    return out


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def check_errors(form: str, errors: dict[str, float], dtype: torch.dtype) -> dict[str, Any]:
    """The errors as fields of the record; fails or skips the benchmark if one is too large."""
    for output, error in errors.items():
        if not error < TOLERANCE[dtype]:
            reject = pytest.fail if form.startswith("ours") else pytest.skip
            reject(f"{form}: {output} is off by {error:.1e}, not timed")
    return {f"error of {output}": error for output, error in errors.items()}


def check(form: str, found: Sequence[Tensor | None], expected: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """Relative errors of the outputs that a form computes."""
    triples = list(zip(OUTPUTS, found, expected, strict=True))
    errors = check_errors(form, {output: relative_error(f, e) for output, f, e in triples if f is not None}, dtype)
    return errors | {f"error of {output}": "not computed" for output, f, _ in triples if f is None}


def check_sample(form: str, found: Sequence[Tensor | None], leaves: Sequence[Tensor]) -> dict[str, Any]:
    """Relative errors of a sample, where comparing all rows would take too long."""
    pairs = sampled(leaves, found)
    errors = check_errors(form, {output: relative_error(f, e) for output, (f, e) in pairs.items()}, leaves[0].dtype)
    of = f"{len(pairs['d image'][0])} random rows and as many texts of {len(leaves[0])}, and the loss"
    return errors | {"compared with float64": of, "error of d scale": "not compared at this size"}


def peak_memory(run: Callable[[], Any], device: str) -> float | None:
    """Peak MiB that `run` allocates on top of what is held already; None if the system does not report it."""
    if on_gpu(device):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        # Memory that the allocator kept from earlier calls would be reused without showing up.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    except (OSError, AttributeError):
        return None
    status = Path("/proc/self/status")
    before = int(re.findall(r"VmRSS:\s+(\d+)", status.read_text())[0])
    run()
    return (int(re.findall(r"VmHWM:\s+(\d+)", status.read_text())[0]) - before) / 2**10


def free_bytes(device: str) -> int:
    if on_gpu(device):  # the allocator releases its cache before it fails
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + cached
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def skip_unavailable(form: str, device: str, rows: int) -> None:
    if form.startswith("ours"):
        dtype = str(features_dtype(device)).removeprefix("torch.")
        if reason := unavailable_reason("contrastive_loss", backend_of(form), device_for(device), dtype):
            pytest.skip(reason)
    if form in THIRD_PARTY:
        module, package = THIRD_PARTY[form]
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{form} is not installed: pip install {package}")
    if (required := BYTES_PER_LOGIT.get(form, 0) * rows * rows) > 0.8 * (free := free_bytes(device)):
        pytest.skip(f"{form} keeps the N x N logits: about {required / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free")


def rounds(run: Callable[[], Any], device: str, rows: int) -> dict[str, int]:
    """On a GPU, as many rounds as fit half a second; `run` must be warm."""
    if not on_gpu(device):
        return {"rounds": sized(15 if rows < 4096 else 9, 1), "warmup_rounds": 1}
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    seconds = time.perf_counter() - start
    return {"rounds": max(3, min(20, int(0.5 / seconds))), "warmup_rounds": 1 if seconds < 0.1 else 0}


def differentiated(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor | None]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves, allow_unused=True)]


def minimum_cost(phase: str) -> tuple[int, int]:
    """Minimum cost without N x U storage: passes over N D numbers, and products of 2 N U D operations.

    Forward reads images and texts and takes one product; backward reads them, writes both gradients and takes three.
    """
    forward, backward = (2, 1), (4, 3)
    both = (forward[0] + backward[0], forward[1] + backward[1])
    return {"forward": forward, "backward": backward, BOTH: both}[phase]


class Products:
    """The matrix products of the loss and nothing else, block by block as the Triton backend computes them.

    K = width, in the operands' precision: the logits S, once forward and again backward. K = side of a block, to
    float32: G and its transpose times features; the first block of a row or column is written, the others are added.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:  # [N, D], [U, D]
        self.x, self.y = x, y
        self.side = self.block_side(x)
        high, wide = min(self.side, len(x)), min(self.side, len(y))
        self.block = x.new_empty(high * wide)
        self.d_x = torch.zeros(high, x.shape[1], dtype=torch.float32, device=x.device)
        self.d_y = torch.zeros(len(y), x.shape[1], dtype=torch.float32, device=x.device)
        self.logits()  # realistic operands for the other products

    @staticmethod
    def block_side(x: Tensor) -> int:
        if x.is_cuda:
            return large.block_side(x.device, x.shape[1], x.element_size(), 128)
        return sized(contrastive_cpu.ROWS, 48)  # several blocks in a rehearsal, too

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
            large.multiply(block, self.y[texts], self.d_x[: len(block)], added)

    def by_texts(self) -> None:
        for rows, texts, block in self.blocks():
            large.multiply(block.T, self.x[rows], self.d_y[texts], True)

    def four(self) -> None:
        self.logits()
        for rows, texts, block in self.blocks():
            torch.mm(self.x[rows], self.y[texts].T, out=block)
            large.multiply(block, self.y[texts], self.d_x[: len(block)], texts.start > 0)
            large.multiply(block.T, self.x[rows], self.d_y[texts], rows.start > 0)

    def named(self, product: str) -> tuple[str, Callable[[], None], int]:
        """The form name of one of PRODUCTS, its call, and the bytes that it must read and write."""
        (n, d), u, size = self.x.shape, len(self.y), self.x.element_size()
        output = str(self.x.dtype).removeprefix("torch.").replace("bfloat16", "bf16")
        summed = f"K = {min(self.side, u)}"
        operands, sums = (n * u + n * d) * size, 4 * n * d
        return {
            FOUR: (FOUR, self.four, minimum_cost(BOTH)[0] * n * d * size),
            "K = width": (f"bare product, K = {d}, {output} out", self.logits, (n * d + u * d + n * u) * size),
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
        }[product]


def measure_products(benchmark: Any, case: Case) -> None:
    """The minimum without N x N storage: one product forward, three backward."""
    n, width, device = case.size, case.width, case.device
    x, y, _ = (t.detach() for t in features(n, width, device))
    form, run, bytes_ = Products(x, y).named(case.form)
    phase = BOTH if case.form == FOUR else "bare products"
    benchmark.extra_info.update(form=form, phase=phase, rows=n, width=width)
    benchmark.group = f"contrastive, {phase}, {n} x {n} x {width}, {device}"
    products = minimum_cost(BOTH)[1] if case.form == FOUR else 1
    precision = str(x.dtype).removeprefix("torch.")
    counted(benchmark, device, bytes=bytes_, operations=products * 2 * n * n * width, precision=precision)
    run()
    timed(benchmark, run, device, **rounds(run, device, n))


def measure_rows(benchmark: Any, case: Case) -> None:
    form, n, width, device, phase = case.form, case.size, case.width, case.device, case.phase
    skip_unavailable(form, device, n)
    leaves = features(n, width, device)

    def forward() -> Tensor:
        return FORMS[form](*leaves)

    def both() -> list[Tensor | None]:
        return differentiated(forward(), leaves)

    benchmark.extra_info.update(form=form, phase=phase, rows=n, width=width)
    benchmark.group = f"contrastive, {phase}, {n} x {n} x {width}, {device}"
    if not WARM:
        if n > FULL_CHECK_ROWS and form != SIGMOID:
            errors = check_sample(form, both(), leaves)
        else:
            expected = (exact_sigmoid if form == SIGMOID else exact)(n, width, device)
            errors = check(form, both(), expected, leaves[0].dtype)
        benchmark.extra_info.update(errors)
    passes, products = minimum_cost(phase)
    precision = str(leaves[0].dtype).removeprefix("torch.")
    count = {"bytes": passes * leaves[0].nbytes, "operations": products * 2 * n * n * width}
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
    """(rows, texts) of each level; texts is None if each row has its own."""
    rows, texts = sized((LEVELS, DISTINCT_TEXTS), ((64, 120, 96), (20, 30, 70)))
    return list(zip(rows, texts if distinct else [None] * len(rows), strict=True))


def level_call(form: str, distinct: bool, width: int, device: str) -> tuple[list[Tensor], Callable[[], Tensor]]:
    """The leaves (all images, all texts, all scales), and a call that returns the losses [levels] of a batch."""
    sizes = level_sizes(distinct)
    levels = [features(rows, width, device, seed, texts) for seed, (rows, texts) in enumerate(sizes)]
    indices = [texts_of(rows, texts, device) if texts else None for rows, texts in sizes]

    def loss() -> Tensor:
        if not form.startswith("ours"):
            return torch.stack(
                [
                    FORMS[form](x, y if own is None else y[own], s)
                    for (x, y, s), own in zip(levels, indices, strict=True)
                ]
            )
        images, texts, scales = ([level[k] for level in levels] for k in range(3))
        with workspace_of(form):
            return multilevel_contrastive_loss(images, texts, scales, text_indices=indices, backend=backend_of(form))

    return [leaf for level in zip(*levels, strict=True) for leaf in level], loss


def gpu_microseconds(run: Callable[[], Any], calls: int = 20) -> float:
    """Sum of the kernel times of a call, without the gaps between launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / calls


def measure_levels(benchmark: Any, case: Case) -> None:
    """The three levels of one batch, which are launch-bound: one text per row, or distinct texts that repeat."""
    form, width, device = case.form, case.width, case.device
    sizes = level_sizes(case.distinct)
    rows, texts = zip(*sizes, strict=True)
    skip_unavailable(form, device, max(rows))
    leaves, loss = level_call(form, case.distinct, width, device)

    def both() -> list[Tensor | None]:
        value = loss()
        return [value.detach(), *torch.autograd.grad(value.sum(), leaves, allow_unused=True)]

    phase = "levels, distinct texts" if case.distinct else "levels"
    benchmark.extra_info.update(form=form, phase=phase, rows=sum(rows), width=width, device=device)
    losses, *grads = both()
    assert losses is not None
    for seed, (size, value) in enumerate(zip(sizes, losses, strict=True)):
        found = [value, *grads[seed :: len(sizes)]]
        errors = {} if WARM else check(form, found, exact(size[0], width, device, seed, size[1]), leaves[0].dtype)
        benchmark.extra_info.update({f"{name}, {size[0]} rows": error for name, error in errors.items()})
    of = f"{rows} rows" + f" and {texts} texts" * case.distinct
    benchmark.group = f"contrastive, {BOTH}, levels of {of}, width {width}, {device}"
    timed(benchmark, both, device, **rounds(both, device, max(rows)))
    if on_gpu(device) and form.startswith("ours") and not WARM:  # last: a profiler may slow down launches
        try:
            benchmark.extra_info["GPU microseconds"] = gpu_microseconds(both)
        except Exception as error:  # the timing does not depend on the profiler
            benchmark.extra_info["the profiler failed"] = f"{type(error).__name__}: {error}".splitlines()[0]


HOST_LEVELS = ((16, 9), (24, 13), (20, 17))  # rows and texts: allocating larger ones takes longer on a CPU only


def test_host_time_of_three_levels(benchmark: Any) -> None:
    """The Triton backend's Python on the host, autograd's included: on CPU tensors, and without its launches.

    Values are not read, as on a GPU. A CUDA graph does without all of this.
    """
    jit = pytest.importorskip("triton.runtime.jit", reason="Triton is not installed")
    if requirements.triton_interprets():
        pytest.skip("kernels are interpreted in this process")
    width, launches = 64, 0
    levels = [features(rows, width, "cpu", texts=texts) for rows, texts in HOST_LEVELS]
    images, texts, scales = ([level[k] for level in levels] for k in range(3))
    images, texts = ([x.detach().bfloat16().requires_grad_() for x in side] for side in (images, texts))
    indices = [texts_of(*level, "cpu") for level in HOST_LEVELS]
    leaves, upstream = [*images, *texts, *scales], torch.ones(len(levels))

    def launch(*_: Any, **__: Any) -> None:
        nonlocal launches
        launches += 1

    def both() -> None:
        losses = multilevel_contrastive_loss(images, texts, scales, text_indices=indices, backend="triton")
        torch.autograd.grad(losses, leaves, upstream)

    rows = sum(rows for rows, _ in HOST_LEVELS)
    phase = "levels, host time without launches"
    benchmark.extra_info.update(form="ours: triton", phase=phase, rows=rows, width=width, device="cpu")
    benchmark.group = f"contrastive, {BOTH}, {phase}"
    with (
        patch.object(jit.JITFunction, "run", launch),
        patch.object(dispatch, "unavailable_reason", lambda *_: None),
        patch.object(validate, "_check_values", lambda *_: None),
        patch.object(fused, "_check_values", lambda *_: None),
    ):
        both()
        benchmark.extra_info["launches"] = launches
        calls = 1 if WARM else sized(2000, 3)
        benchmark.pedantic(both, rounds=calls, warmup_rounds=min(calls, 100))


MEASURE = {"products": measure_products, "rows": measure_rows, "levels": measure_levels}


def _marks(case: Case) -> list[pytest.MarkDecorator]:
    return [pytest.mark.gpu] if case.device == "cuda" else []


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id, marks=_marks(case)) for case in CASES])
def test_contrastive(benchmark: Any, case: Case) -> None:
    try:
        MEASURE[case.kind](benchmark, case)
    except Exception as error:
        # Errors of third-party losses, and of PyTorch forms that run out of memory, only skip that case.
        out_of_memory = isinstance(error, torch.OutOfMemoryError) and not case.form.startswith("ours")
        if case.form in THIRD_PARTY or out_of_memory:
            pytest.skip(f"{case.form} failed: {type(error).__name__}: {str(error)[:300]}")
        raise
