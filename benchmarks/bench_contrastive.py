"""contrastive_loss against eager and compiled PyTorch, the fused losses of others, and four bare matrix products.

Run: make bench, or: pytest benchmarks/bench_contrastive.py --benchmark-only --benchmark-json=OUT.json
Other sizes: SCENARIOCLIP_FAST_BENCH_ROWS=4096,16384 (or "all": 128 to 262,144), SCENARIOCLIP_FAST_BENCH_WIDTHS=512,768
Pictures: python benchmarks/plot_contrastive.py RECORD OUT.png

The others (GPU only): pip install 'scenarioclip-fast[bench]'. Every form gets the same features, in the same run.
Beside each time stand the errors of loss and gradients against float64 and the peak of memory above inputs and their
gradients. What is wrong is not timed: ours fails, the rest is left out with its error as the reason.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from scenarioclip_fast.kernels.contrastive import contrastive_cpu, reference
from timing import counted, timed
from torch import Tensor

from scenarioclip_fast.dispatch import why_not
from scenarioclip_fast.ops import contrastive_loss, multilevel_contrastive_loss

SCALE = 1 / 0.07
LEVELS = (128, 700, 350)  # global, object and relation rows of a batch of 128 scenes
DISTINCT = (39, 73, 289)  # their texts, as 128 photos have them
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ROWS = {"cpu": (4096,), "cuda": (8192, 32768, 65536)}
LARGEST = 262144
ALL_ROWS = {
    "cpu": (128, 256, 512, 1024, 2048, 4096),
    "cuda": (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144),
}
WIDTHS = [int(d) for d in os.environ.get("SCENARIOCLIP_FAST_BENCH_WIDTHS", "512").split(",")]
PARTS = ("loss", "d image", "d text", "d scale")
# Relative error of a gradient above which a result counts as wrong: float32 products, and bfloat16 logits at scale 14.
WRONG = {torch.float32: 1e-4, torch.bfloat16: 0.1}

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def open_clip(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    return reference.open_clip_loss(F.normalize(x, dim=1), F.normalize(y, dim=1), s.to(x.dtype))


def transposed(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """The reference implementation's form: one product, and cross entropy over it and over its transpose."""
    logits = s.to(x.dtype) * F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
    target = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def ours(backend: str) -> Loss:
    return lambda x, y, s: contrastive_loss(x, y, s, backend=backend)


def inf_cl(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """Rows only, in TF32: once for images and once for texts."""
    from inf_cl import cal_flash_loss

    x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    return (cal_flash_loss(x, y, scale=s).mean() + cal_flash_loss(y, x, scale=s).mean()) / 2


def memeff(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """Both sides in one pass; its temperature is a constant."""
    from memeff import MemoryEfficientCLIPLoss

    return MemoryEfficientCLIPLoss(temperature=1 / SCALE, stable=False)(x, y)


def cut_cross_entropy(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """Rows only: once for images and once for texts."""
    from cut_cross_entropy import linear_cross_entropy

    x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    target = torch.arange(len(x), device=x.device)
    s = s.to(x.dtype)
    return (linear_cross_entropy(s * x, y, target) + linear_cross_entropy(s * y, x, target)) / 2


# In the order of a run: one that is cut off has lost what takes long to compile.
WAYS: dict[str, Loss] = {
    **{f"ours: {backend}": ours(backend) for backend in ("triton", "cpu", "reference")},
    "logits.T": transposed,
    "open_clip": open_clip,
    "inf_cl": inf_cl,
    "memeff": memeff,
    "cut_cross_entropy": cut_cross_entropy,
    "logits.T compiled": torch.compile(transposed, dynamic=False),
    "open_clip compiled": torch.compile(open_clip, dynamic=False),
}
RIVALS = ("inf_cl", "memeff", "cut_cross_entropy")
# Bytes per logit that a form holds at its highest point, about: rows beyond memory are left out.
HELD = {"open_clip": 12, "open_clip compiled": 12, "logits.T": 12, "logits.T compiled": 12, "ours: reference": 40}


ASKED = os.environ.get("SCENARIOCLIP_FAST_BENCH_ROWS")
# Without sizes asked for, a GPU does here alone what takes long: the passes apart, and the compiled forms.
THOROUGH = 32768


def sizes(device: str) -> Sequence[int]:
    if ASKED == "all":
        return ALL_ROWS[device]
    return [int(n) for n in ASKED.split(",")] if ASKED else ROWS[device]


CASES = [
    pytest.param(device, n, width, marks=[pytest.mark.gpu] if device == "cuda" else [], id=f"{device}-{n}-{width}")
    for device in ROWS
    for n in sizes(device)
    for width in WIDTHS
]


def texts_of(rows: int, texts: int, device: str) -> Tensor:  # [rows]
    """The text of each row: every one of them, and some again."""
    return torch.arange(rows, device=device) * 7919 % texts  # a prime: neighbours differ


def features(
    rows: int, width: int, device: str, seed: int = 0, texts: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Matching pairs with noise, as in training; bfloat16 on a GPU. A text a row, or `texts` distinct ones."""
    g = torch.Generator(device).manual_seed(seed)
    text = torch.randn(texts or rows, width, generator=g, device=device)
    own = text[texts_of(rows, texts, device)] if texts else text
    image = own + 2 * torch.randn(rows, width, generator=g, device=device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    leaves = (image.to(dtype), text.to(dtype), torch.tensor(SCALE, device=device))
    return tuple(t.requires_grad_() for t in leaves)  # type: ignore[return-value]


@functools.lru_cache(maxsize=6)
def exact(rows: int, width: int, device: str, seed: int = 0, texts: int | None = None) -> list[Tensor]:
    """Loss and gradients in float64, tile by tile: the N x N form in float64 would not fit at the larger sizes.

    Rows of equal text count as often as they are there, as where each has its own copy.
    """
    image, text, scale = (t.detach().double() for t in features(rows, width, device, seed, texts))
    index = texts_of(rows, texts, device) if texts else None
    count = None if index is None else torch.bincount(index).double()
    # A GPU spends most of its time waiting for launches on tiles that are made for a CPU.
    side = 16384 if device == "cuda" else contrastive_cpu.ROWS
    with patch.multiple(contrastive_cpu, ROWS=side, COLUMNS=side):
        row, column, positive = contrastive_cpu.forward(image, text, scale, index, count)
        share = torch.full_like(row, 0.5 / len(row))
        by_column = share if count is None else count * share[0]
        grads = contrastive_cpu.backward(image, text, scale, index, count, row, column, share, by_column, -2 * share)
    return [((row + (column if index is None else column[index])) / 2 - positive).mean(), *grads]


def checked(way: str, found: Sequence[Tensor | None], wanted: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """Relative errors; what a form does not compute has none."""
    errors: dict[str, Any] = {}
    for part, f, w in zip(PARTS, found, wanted, strict=True):
        if f is None:
            errors[f"error of {part}"] = "not computed"
            continue
        error = ((f.double() - w).norm() / w.norm()).item()
        errors[f"error of {part}"] = error
        if not error < WRONG[dtype]:
            (pytest.fail if way.startswith("ours") else pytest.skip)(f"{way}: {part} is off by {error:.1e}, not timed")
    return errors


def peak_memory(run: Callable[[], Any], device: str) -> float | None:
    """MiB above what was held before, at the highest point; None where the system does not tell."""
    if device == "cuda":
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


def skip_without(way: str, device: str, rows: int) -> None:
    if way.startswith("ours") and (reason := why_not("contrastive_loss", way.removeprefix("ours: "), device)):
        pytest.skip(reason)
    if way in RIVALS and device != "cuda":
        pytest.skip(f"{way} runs on GPUs alone")
    if way in RIVALS and importlib.util.find_spec(way) is None:
        pytest.skip(f"{way} is not installed: pip install 'scenarioclip-fast[bench]'")
    if device == "cuda" and way.endswith("compiled") and ASKED is None and rows not in (THOROUGH, max(LEVELS)):
        pytest.skip("compiled forms at this size: ask for it with SCENARIOCLIP_FAST_BENCH_ROWS")
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else pages
    if (needed := HELD.get(way, 0) * rows * rows) > 0.8 * free:
        pytest.skip(f"{way} keeps the N x N logits: about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free")


def synchronized(run: Callable[..., Any], device: str) -> Callable[..., Any]:
    def waited(*args: Any) -> Any:
        out = run(*args)
        if device == "cuda":
            torch.cuda.synchronize()
        return out

    return waited


def rounds(device: str, rows: int) -> dict[str, int]:
    if device == "cuda":
        return {"rounds": 20 if rows <= 65536 else 5, "warmup_rounds": 2}
    return {"rounds": 5 if rows < 4096 else 3, "warmup_rounds": 1}


def differentiated(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor | None]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves, allow_unused=True)]


def needed(phase: str) -> tuple[int, int]:
    """Without N x U storage: how often N D numbers are read or written, and products of 2 N U D operations.

    Forward reads both sides and takes one product, backward reads them, writes both gradients and takes three.
    """
    forward, backward = (2, 1), (4, 3)
    both = (forward[0] + backward[0], forward[1] + backward[1])
    return {"forward": forward, "backward": backward, "forward + backward": both}[phase]


@pytest.mark.parametrize(("device", "rows", "width"), CASES)
def test_four_products(benchmark: Any, device: str, rows: int, width: int) -> None:
    """The floor without N x N storage: one product forward, three backward."""
    x, y, _ = (t.detach() for t in features(rows, width, device))
    out = x.new_empty(rows, min(rows, 16384))

    def run() -> None:
        for part in y.split(out.shape[1]):
            for _ in range(4):
                torch.mm(x, part.T, out=out[:, : len(part)])

    phase = "forward + backward"
    benchmark.extra_info.update(form="four bare products", phase=phase, rows=rows, width=width, device=device)
    benchmark.group = f"contrastive, {phase}, {rows} x {rows} x {width}, {device}"
    timed(benchmark, run, device, **rounds(device, rows))


@pytest.mark.gpu
@pytest.mark.parametrize("width", WIDTHS)
def test_largest(benchmark: Any, width: int) -> None:
    """As many rows as a whole cluster's batch, for the memory. Ours alone: the others would take minutes."""
    skip_without("ours: triton", "cuda", LARGEST)
    leaves = features(LARGEST, width, "cuda")

    def both() -> list[Tensor | None]:
        return differentiated(contrastive_loss(*leaves, backend="triton"), leaves)

    benchmark.extra_info.update(
        form="ours: triton", phase="forward + backward", rows=LARGEST, width=width, device="cuda"
    )
    benchmark.extra_info.update(checked("ours: triton", both(), exact(LARGEST, width, "cuda"), leaves[0].dtype))
    exact.cache_clear()
    gradients = sum(t.nbytes for t in leaves) / 2**20
    benchmark.extra_info["MiB above inputs and gradients"] = round((peak_memory(both, "cuda") or 0) - gradients, 1)
    benchmark.group = f"contrastive, forward + backward, {LARGEST} x {LARGEST} x {width}, cuda"
    timed(benchmark, both, "cuda", rounds=3, warmup_rounds=0)


def gpu_microseconds(run: Callable[[], Any], calls: int = 20) -> float:
    """Time that the GPU's own work takes, without the gaps between launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / calls


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("texts", [None, DISTINCT], ids=["a text a row", "distinct texts"])
@pytest.mark.parametrize("way", WAYS)
def test_levels(benchmark: Any, way: str, texts: Sequence[int] | None, width: int, device: str) -> None:
    """The three levels of one batch, where the launches are the cost: with a text a row, and with texts as scenes have
    them, which the other forms repeat."""
    skip_without(way, device, max(LEVELS))
    if device == "cuda" and way == "open_clip compiled" and ASKED is None:
        pytest.skip("half a minute of compiling: ask for it with SCENARIOCLIP_FAST_BENCH_ROWS")
    if texts and way in RIVALS and ASKED is None:
        pytest.skip("its time is that with a text a row: ask for it with SCENARIOCLIP_FAST_BENCH_ROWS")
    counts = texts or (None,) * len(LEVELS)
    cases = list(zip(LEVELS, counts, strict=True))
    levels = [features(rows, width, device, seed, count) for seed, (rows, count) in enumerate(cases)]
    indices = [texts_of(rows, count, device) if count else None for rows, count in cases]
    leaves = [leaf for level in zip(*levels, strict=True) for leaf in level]

    def loss() -> Tensor:
        if not way.startswith("ours"):
            return torch.stack(
                [WAYS[way](x, y if own is None else y[own], s) for (x, y, s), own in zip(levels, indices, strict=True)]
            )
        images, distinct, scales = ([level[k] for level in levels] for k in range(3))
        backend = way.removeprefix("ours: ")
        return multilevel_contrastive_loss(images, distinct, scales, text_indices=indices, backend=backend)

    def both() -> list[Tensor | None]:
        value = loss()
        return [value.detach(), *torch.autograd.grad(value.sum(), leaves, allow_unused=True)]

    phase = "levels, distinct texts" if texts else "levels"
    benchmark.extra_info.update(form=way, phase=phase, rows=sum(LEVELS), width=width, device=device)
    losses, *grads = both()
    assert losses is not None
    for seed, ((rows, count), value) in enumerate(zip(cases, losses, strict=True)):
        wanted = exact(rows, width, device, seed, count)
        errors = checked(way, [value, *grads[seed :: len(LEVELS)]], wanted, levels[0][0].dtype)
        benchmark.extra_info.update({f"{name}, {rows} rows": error for name, error in errors.items()})
    if device == "cuda":
        benchmark.extra_info["GPU microseconds"] = gpu_microseconds(both)
    of = f"{LEVELS} rows" + f" and {texts} texts" * (texts is not None)
    benchmark.group = f"contrastive, forward + backward, levels of {of}, width {width}, {device}"
    timed(benchmark, both, device, **rounds(device, max(LEVELS)))


@pytest.mark.parametrize("phase", ["forward", "backward", "forward + backward"])
@pytest.mark.parametrize(("device", "rows", "width"), CASES)
@pytest.mark.parametrize("way", WAYS)
def test_rows(benchmark: Any, way: str, device: str, rows: int, width: int, phase: str) -> None:
    skip_without(way, device, rows)
    if device == "cuda" and ASKED is None and phase != "forward + backward" and rows != THOROUGH:
        pytest.skip("the passes apart at this size: ask for it with SCENARIOCLIP_FAST_BENCH_ROWS")
    if device == "cpu" and ASKED is None and phase != "forward + backward" and way not in ("ours: cpu", "logits.T"):
        pytest.skip("this form's passes apart: ask for them with SCENARIOCLIP_FAST_BENCH_ROWS")
    leaves = features(rows, width, device)

    def forward() -> Tensor:
        return WAYS[way](*leaves)

    def both() -> list[Tensor | None]:
        return differentiated(forward(), leaves)

    benchmark.extra_info.update(form=way, phase=phase, rows=rows, width=width, device=device)
    benchmark.extra_info.update(checked(way, both(), exact(rows, width, device), leaves[0].dtype))
    benchmark.group = f"contrastive, {phase}, {rows} x {rows} x {width}, {device}"
    numbers, products = needed(phase)
    precision = str(leaves[0].dtype).removeprefix("torch.")
    count = {"bytes": numbers * leaves[0].nbytes, "operations": products * 2 * rows * rows * width}
    counted(benchmark, device, **count, precision=precision)
    if phase == "backward":

        def graph() -> tuple[tuple[Tensor, Sequence[Tensor]], dict[str, Any]]:
            return (synchronized(forward, device)(), leaves), {}

        options = {**rounds(device, rows), "warmup_rounds": 0}  # a graph serves one backward pass; both() warmed up
        benchmark.pedantic(synchronized(differentiated, device), setup=graph, **options)
        return
    run: Callable[[], Any] = both if phase != "forward" else forward
    peak = peak_memory(run, device)
    if peak is not None:
        gradients = sum(t.nbytes for t in leaves) / 2**20 if phase != "forward" else 0.0
        benchmark.extra_info["MiB above inputs and gradients"] = round(peak - gradients, 1)
    timed(benchmark, run, device, **rounds(device, rows))
