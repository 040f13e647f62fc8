"""The training step against the baseline (baseline.py): same weights, same batch, loss and gradient norm checked first.

A step is forward, loss, backward, clipping, AdamW and the teacher update. On a CPU: four scenes at ViT-B/32 and 16 at
the preset "tiny", from real photos if available (SCENARIOCLIP_FAST_PHOTOS), else random pixels with 6 objects and 3
relations per scene. On a GPU: 128 scenes of random pixels, with peak memory, MFU (model operations relative to the peak
rate) and "host, ms", the time until the host has launched a step. Launches block while about a thousand are queued, so
this is an upper bound of the host's work; if it equals the step time, the step is host-bound.

SCENARIOCLIP_FAST_BENCH_COMPILED=1 adds the forms with torch.compile. With SCENARIOCLIP_FAST_BENCH_WARM=1, `-m gpu -k
graphs` fills Triton's cache with the same steps, unchecked.

Run: make bench, or: pytest benchmarks/bench_step.py. On a shared machine, CPU time on one core is less noisy:
OMP_NUM_THREADS=1 pytest benchmarks/bench_step.py --benchmark-timer=time.process_time
"""

from __future__ import annotations

import functools
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from scenarioclip_fast.benchmarks import timing
from scenarioclip_fast.benchmarks.baseline import LEVELS, BaselineStep, Tokens
from torch import Tensor

from scenarioclip_fast.data import Batch, load_reference, pack, scene_loader
from scenarioclip_fast.losses import ScenarioLoss
from scenarioclip_fast.model import EMATeacher, FreezeConfig, ModelConfig, ScenarioCLIP, TokenTable
from scenarioclip_fast.model.flops import batch_flops, peak_flops
from scenarioclip_fast.model.fp8 import use_fp8
from scenarioclip_fast.model.graphs import graph_vision
from scenarioclip_fast.model.layers import WeightCopies
from scenarioclip_fast.train.config import OptimSection
from scenarioclip_fast.train.optim import build_optimizer, guarded_step
from scenarioclip_fast.train.precision import attention_kernels

PHOTOS = Path(os.environ.get("SCENARIOCLIP_FAST_PHOTOS", Path(__file__).parents[2] / "shared" / "data" / "photos"))
OBJECTS, RELATIONS = 6, 3  # per scene


class FixedVocabulary:
    """Given token ids per level, with the part of `Vocabulary` that the model uses."""

    def __init__(self, tokens: dict[str, Tokens]) -> None:
        self.by_level = tokens

    def tokens(self, level: str) -> Tokens:
        return self.by_level[level]


@dataclass(frozen=True)
class BenchBatch:
    """A batch and the vocabulary that its ids index."""

    batch: Batch
    vocabulary: FixedVocabulary
    source: str


@functools.cache
def synthetic(scenes: int, size: int, device: str = "cpu") -> BenchBatch:
    """Random pixels; text ids follow a power law over a vocabulary of realistic size and text lengths."""
    g = torch.Generator().manual_seed(0)
    sizes = {"global": (300, (3, 6)), "object": (133, (3, 5)), "relation": (4000, (5, 8))}
    tokens, ids = {}, {}
    for level, n in zip(LEVELS, (scenes, scenes * OBJECTS, scenes * RELATIONS), strict=True):
        strings, (low, high) = sizes[level]
        lengths = torch.randint(low, high, (strings,), generator=g).tolist()
        tokens[level] = [[49406, *torch.randint(49406, (k - 2,), generator=g).tolist(), 49407] for k in lengths]
        ids[level] = torch.multinomial(1 / torch.arange(1.0, strings + 1), n, replacement=True, generator=g)
    scene = torch.arange(scenes)
    shape = (scenes * (1 + OBJECTS + RELATIONS), 3, size, size)
    if device != "cpu":  # 200 million random numbers take seconds on a CPU
        g = torch.Generator(device).manual_seed(0)
    batch = Batch(
        torch.randn(shape, generator=g, device=device),
        [f"synthetic {i}" for i in range(scenes)],
        scene.repeat_interleave(OBJECTS),
        scene.repeat_interleave(RELATIONS),
        ids["global"],
        ids["object"],
        ids["relation"],
    )
    return BenchBatch(batch.to(device), FixedVocabulary(tokens), "random pixels")


def from_photos(scenes: int, size: int, directory: Path) -> BenchBatch:
    """The photos whose numbers of objects and relations are closest to OBJECTS and RELATIONS, packed and loaded."""
    found = [s for s in load_reference(PHOTOS) if s.relations]
    found.sort(key=lambda s: abs(len(s.objects) - OBJECTS) + abs(len(s.relations) - RELATIONS))
    pack(found[:scenes], directory, val=0.0, test=0.0)
    with scene_loader(directory, scenes, size=size, augment=False, shuffle=False, epochs=1) as loader:
        batch = next(iter(loader))
        tokens = {level: loader.vocabulary.tokens(level) for level in LEVELS}
        return BenchBatch(batch, FixedVocabulary(tokens), "photos")


class OurStep:
    """The trainer's step, assembled from the trainer's modules."""

    def __init__(self, model: ScenarioCLIP, device: str, bf16: bool) -> None:
        self.model, self.bf16, self.device = model.to(device).train(), bf16, torch.device(device)
        self.loss_module = ScenarioLoss().to(device)
        self.teacher = EMATeacher(self.model)
        self.optimizer = build_optimizer(self.model, self.loss_module, OptimSection(decay_logit_scale=True))
        self.copies: WeightCopies | None = None

    def loss(self, batch: Batch) -> Tensor:
        if self.copies is not None:
            self.copies.refresh()
        with attention_kernels(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.loss_module(self.model(batch, teacher=self.teacher))["loss"]

    def step(self, batch: Batch) -> Tensor:
        loss = self.loss(batch)
        loss.backward()
        guarded_step(self.optimizer, loss, clip_norm=1.0)
        self.teacher.update(self.model)
        return loss.detach()


@dataclass(frozen=True)
class Variant:
    ours: bool
    bf16: bool
    pre_layernorm: bool = True  # frozen, as in FreezeConfig
    compiled: bool = False
    cuda_graphs: bool = False
    fp8: Literal["none", "frozen", "all"] = "none"


REFERENCE = "baseline, float32"  # all forms are checked against it; TF32 on a GPU
FORMS = {
    REFERENCE: Variant(ours=False, bf16=False, pre_layernorm=False),
    "baseline, bf16": Variant(ours=False, bf16=True, pre_layernorm=False),
    "ours as published (pre_layernorm trains), float32": Variant(ours=True, bf16=False, pre_layernorm=False),
    "ours, float32": Variant(ours=True, bf16=False),
    "ours, bf16": Variant(ours=True, bf16=True),
    "ours, bf16, compiled": Variant(ours=True, bf16=True, compiled=True),
    "ours, bf16, cuda graphs": Variant(ours=True, bf16=True, cuda_graphs=True),
    "ours, bf16, cuda graphs, fp8": Variant(ours=True, bf16=True, cuda_graphs=True, fp8="all"),
    "ours, bf16, compiled, cuda graphs": Variant(ours=True, bf16=True, compiled=True, cuda_graphs=True),
    "ours, bf16, compiled, fp8": Variant(ours=True, bf16=True, compiled=True, fp8="all"),
    "ours, bf16, compiled, fp8 frozen": Variant(ours=True, bf16=True, compiled=True, fp8="frozen"),
}
CPU_FORMS = [name for name, variant in FORMS.items() if not variant.compiled and not variant.cuda_graphs]
# Headline figures first. Compiled forms take minutes to compile: only if they are requested.
GPU_FORMS = [
    "ours, bf16",
    "ours, bf16, cuda graphs",
    "baseline, bf16",
    REFERENCE,
    "ours as published (pre_layernorm trains), float32",
    "ours, bf16, cuda graphs, fp8",
]
if os.environ.get("SCENARIOCLIP_FAST_BENCH_COMPILED") == "1":
    GPU_FORMS += [name for name, variant in FORMS.items() if variant.compiled]


def config_of(preset: str, pre_layernorm: bool) -> ModelConfig:
    config = ModelConfig.preset("tiny" if timing.REHEARSAL else preset)
    if timing.REHEARSAL:  # small, but with every kind of stage: frozen, trainable and last
        vision, text = replace(config.vision, layers=3), replace(config.text, layers=3)
        config = replace(config, vision=vision, text=text, freeze=FreezeConfig(1, 1))
    if preset == "tiny":
        return config
    return replace(config, freeze=replace(config.freeze, pre_layernorm=pre_layernorm))


def build(name: str, preset: str, vocabulary: FixedVocabulary, device: str) -> OurStep | BaselineStep:
    variant = FORMS[name]
    config = config_of(preset, variant.pre_layernorm)
    torch.manual_seed(0)
    with torch.device(device):  # initialising a billion weights takes seconds on a CPU
        model = ScenarioCLIP(config)
        if not variant.ours:
            return BaselineStep(config, model, vocabulary.by_level, device, variant.bf16)
    model.set_vocabulary(vocabulary)  # type: ignore[arg-type]
    step = OurStep(model, device, variant.bf16)
    if variant.fp8 != "none":
        encoders = [*step.model.encoders(), *step.teacher.encoders.values()]
        use_fp8(encoders, [p for p in step.model.parameters() if not p.requires_grad], variant.fp8)
    if variant.bf16:
        step.copies = WeightCopies(step.model, step.teacher.encoders.values(), torch.bfloat16)
    if variant.compiled:
        # Inductor takes minutes on a CPU; a rehearsal runs only Dynamo, which traces the graphs.
        options: dict[str, Any] = {"backend": "eager", "options": None} if timing.REHEARSAL else {}
        step.model.compile_blocks(**options)
        step.teacher.compile_blocks(**options)
    if variant.cuda_graphs and timing.on_gpu(device):  # a rehearsal has none to capture
        graph_vision([*step.model.encoders(), *step.teacher.encoders.values()])
    return step


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    yield
    torch.set_float32_matmul_precision(before)


EXPECTED: dict[str, tuple[Tensor, Tensor]] = {}


def release() -> None:
    """Free the memory of the previous model."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def expected(preset: str, inputs: BenchBatch, device: str, step: BaselineStep | None = None) -> tuple[Tensor, Tensor]:
    """The baseline's loss and gradient norm in float32, cached. `step`: the baseline's, before any update."""
    key = f"{preset} {inputs.source} {device}"
    if key not in EXPECTED:
        EXPECTED[key] = measure(step or build(REFERENCE, preset, inputs.vocabulary, device), inputs)
        release()
    return EXPECTED[key]


def measure(step: OurStep | BaselineStep, inputs: BenchBatch) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient norm over the weights that all forms train."""
    loss = step.loss(inputs.batch)
    loss.backward()
    grads = [p.grad for n, p in step.model.named_parameters() if p.grad is not None and "pre_norm" not in n]
    norm = torch.nn.utils.get_total_norm(grads).detach()
    step.optimizer.zero_grad()
    return loss.detach().float(), norm


def check(name: str, step: OurStep, expected: tuple[Tensor, Tensor], inputs: BenchBatch) -> None:
    """Compare loss and gradient norm with the baseline's."""
    # Float32 (TF32 on a GPU) through 12 blocks with other summation orders; bf16 keeps 8 bits per activation, and a
    # temperature of 0.07 magnifies errors of the logits 14-fold.
    tolerance = 5e-2 if FORMS[name].bf16 else 2e-2 if step.device.type == "cuda" else 1e-4
    for what, got, reference in zip(("loss", "gradient norm"), measure(step, inputs), expected, strict=True):
        error = float((got - reference).abs() / reference)
        assert error < tolerance, f"{name}: {what} {got:.6f}, the baseline's is {reference:.6f}"


def run(benchmark: Any, name: str, preset: str, inputs: BenchBatch, device: str, rounds: int, warmup: int = 1) -> None:
    where = timing.device_for(device)
    release()
    if timing.WARM:
        rounds, warmup = 1, 1
    elif name != REFERENCE:
        expected(preset, inputs, where)  # before another model takes memory
    step = build(name, preset, inputs.vocabulary, where)
    if not timing.WARM:
        if name == REFERENCE:
            expected(preset, inputs, where, step)
        else:
            check(name, step, expected(preset, inputs, where), inputs)
    host: list[float] = []

    def once() -> None:
        begin = time.perf_counter()
        step.step(inputs.batch)
        host.append(time.perf_counter() - begin)
        timing.synchronize(device)

    if timing.on_gpu(device):
        torch.cuda.reset_peak_memory_stats()
    benchmark.group = f"training step, {preset}, {inputs.batch.num_scenes} scenes ({inputs.source}), {device}"
    benchmark.pedantic(once, rounds=rounds, warmup_rounds=warmup)
    if FORMS[name].compiled:
        # A graph break is no error, but costs minutes of compilation and most of the gain.
        breaks = dict(torch._dynamo.utils.counters["graph_break"])
        assert not breaks, f"{name}: torch.compile split the blocks: {breaks}"
    record_figures(benchmark, name, step, inputs, device, host[-rounds:])


def record_figures(
    benchmark: Any, name: str, step: OurStep | BaselineStep, inputs: BenchBatch, device: str, host_seconds: list[float]
) -> None:
    """Record sizes, model operations, host time, peak memory and MFU."""
    seconds = benchmark.stats.stats.median
    info = benchmark.extra_info
    info["scenes"] = inputs.batch.num_scenes
    info["views"] = len(inputs.batch.pixels)
    info["threads"] = torch.get_num_threads()
    config = step.model.config
    table = TokenTable(inputs.vocabulary, config.text).to(timing.device_for(device))  # type: ignore[arg-type]
    needed = batch_flops(config, inputs.batch, table, teacher=True)
    info["needed_tflop"] = needed / 1e12
    info["needed_tflop_per_s"] = needed / seconds / 1e12
    if device == "cuda":
        info["host, ms"] = round(1e3 * statistics.median(host_seconds), 3)
    if timing.on_gpu(device):
        info["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        peak = peak_flops(torch.cuda.get_device_name(), "bf16" if FORMS[name].bf16 else "tf32")
        if peak is not None:
            info["mfu"] = needed / seconds / peak


@pytest.fixture(scope="module")
def cpu_batch(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], BenchBatch]:
    @functools.cache
    def make(scenes: int, size: int) -> BenchBatch:
        folder = tmp_path_factory.mktemp("shards")
        return from_photos(scenes, size, folder) if PHOTOS.is_dir() else synthetic(scenes, size)

    return make


@pytest.mark.parametrize("form", CPU_FORMS)
def test_vit_b_32(benchmark: Any, form: str, cpu_batch: Callable[[int, int], BenchBatch]) -> None:
    run(benchmark, form, "vit-b-32", cpu_batch(4, 224), "cpu", rounds=2 if "published" in form else 3)


@pytest.mark.parametrize("form", [form for form in CPU_FORMS if form.endswith("float32") and "published" not in form])
def test_tiny(benchmark: Any, form: str, cpu_batch: Callable[[int, int], BenchBatch]) -> None:
    run(benchmark, form, "tiny", cpu_batch(16, 64), "cpu", rounds=7)


@pytest.mark.gpu
@pytest.mark.parametrize("form", GPU_FORMS)
def test_vit_b_32_on_a_gpu(benchmark: Any, form: str) -> None:
    scenes, size = timing.sized((128, 224), (3, 64))
    # Fewer rounds for the baseline: its loop over pairs takes most of a second.
    rounds, warmup = timing.sized((10, 3) if FORMS[form].ours else (3, 1), (2, 1))
    inputs = synthetic(scenes, size, timing.device_for("cuda"))
    with matmul_precision("high"):
        run(benchmark, form, "vit-b-32", inputs, "cuda", rounds, warmup)
