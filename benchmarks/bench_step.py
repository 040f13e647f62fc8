"""The training step against the baseline (baseline.py): same weights, same batch, same loss, then the time.

A step is forward, loss, backward, clipping, AdamW and the teacher's average. On a CPU: four scenes at ViT-B/32's sizes
and 16 at the tiny preset's, real photos through the loader where they are present (SCENARIOCLIP_FAST_PHOTOS), else
random pixels with 6 objects and 3 relations a scene. On a GPU: 128 scenes of random pixels, with peak memory, the
share of the peak rate that the necessary operations make up (MFU), and "host, ms": the time until the host has
launched a step. Launches wait while about a thousand others are queued, so this is an upper bound of what the host
needs; where it equals the step's time, the host is the bound.

With SCENARIOCLIP_FAST_BENCH_WARM=1, `-m gpu -k compiled` fills the caches of Inductor and Triton: the same steps, but
unchecked.

Run: make bench, or: pytest benchmarks/bench_step.py. Where others use the machine, the processor's time on one core is
the steadier figure: OMP_NUM_THREADS=1 pytest benchmarks/bench_step.py --benchmark-timer=time.process_time
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
from typing import Any

import pytest
import torch
from scenarioclip_fast.benchmarks import timing
from scenarioclip_fast.benchmarks.baseline import LEVELS, BaselineStep, Tokens
from torch import Tensor

from scenarioclip_fast.data import Batch, load_reference, pack, scene_loader
from scenarioclip_fast.losses import ScenarioLoss
from scenarioclip_fast.model import EMATeacher, FreezeConfig, ModelConfig, ScenarioCLIP, TokenTable
from scenarioclip_fast.model.flops import batch_flops, peak_flops
from scenarioclip_fast.train.config import OptimSection
from scenarioclip_fast.train.optim import build_optimizer, guarded_step

PHOTOS = Path(os.environ.get("SCENARIOCLIP_FAST_PHOTOS", Path(__file__).parents[2] / "shared" / "data" / "photos"))
OBJECTS, RELATIONS = 6, 3  # of a scene


class Words:
    """Token ids of a vocabulary: what the model asks of a `Vocabulary`."""

    def __init__(self, tokens: dict[str, Tokens]) -> None:
        self.by_level = tokens

    def tokens(self, level: str) -> Tokens:
        return self.by_level[level]


@dataclass(frozen=True)
class Work:
    """A batch and the texts that its ids speak of."""

    batch: Batch
    words: Words
    source: str


@functools.cache
def drawn(scenes: int, size: int, device: str = "cpu") -> Work:
    """Random pixels; names follow a power law over as many texts and tokens as scene graphs have."""
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
    if device != "cpu":  # a CPU takes seconds for 200 million numbers
        g = torch.Generator(device).manual_seed(0)
    batch = Batch(
        torch.randn(shape, generator=g, device=device),
        [f"drawn {i}" for i in range(scenes)],
        scene.repeat_interleave(OBJECTS),
        scene.repeat_interleave(RELATIONS),
        ids["global"],
        ids["object"],
        ids["relation"],
    )
    return Work(batch.to(device), Words(tokens), "random pixels")


def photographed(scenes: int, size: int, directory: Path) -> Work:
    """The photos whose numbers of objects and relations are nearest to the usual ones, packed and loaded."""
    found = [s for s in load_reference(PHOTOS) if s.relations]  # type: ignore[union-attr]
    found.sort(key=lambda s: abs(len(s.objects) - OBJECTS) + abs(len(s.relations) - RELATIONS))
    pack(found[:scenes], directory, val=0.0, test=0.0)
    with scene_loader(directory, scenes, size=size, augment=False, shuffle=False, epochs=1) as loader:
        batch = next(iter(loader))
        return Work(batch, Words({level: loader.vocabulary.tokens(level) for level in LEVELS}), "photos")


class OurStep:
    """The trainer's step, from the trainer's parts."""

    def __init__(self, model: ScenarioCLIP, device: str, bf16: bool, cuda_graphs: bool = False) -> None:
        self.model, self.bf16, self.device = model.to(device).train(), bf16, torch.device(device)
        self.cuda_graphs = cuda_graphs
        self.loss_module = ScenarioLoss().to(device)
        self.teacher = EMATeacher(self.model)
        self.optimizer = build_optimizer(self.model, self.loss_module, OptimSection(decay_logit_scale=True))

    def loss(self, batch: Batch) -> Tensor:
        if self.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.loss_module(self.model(batch, teacher=self.teacher))["loss"]

    def step(self, batch: Batch) -> Tensor:
        loss = self.loss(batch)
        loss.backward()
        guarded_step(self.optimizer, loss, clip_norm=1.0)
        self.teacher.update(self.model)
        return loss.detach()


@dataclass(frozen=True)
class Way:
    ours: bool
    bf16: bool
    pre_layernorm: bool = True  # frozen
    compiled: bool = False
    cuda_graphs: bool = False


REFERENCE = "baseline, float32"  # of the check; TF32 on a GPU
WAYS = {
    REFERENCE: Way(ours=False, bf16=False, pre_layernorm=False),
    "baseline, bf16": Way(ours=False, bf16=True, pre_layernorm=False),
    "ours as published (pre_layernorm trains), float32": Way(ours=True, bf16=False, pre_layernorm=False),
    "ours, float32": Way(ours=True, bf16=False),
    "ours, bf16": Way(ours=True, bf16=True),
    "ours, bf16, compiled": Way(ours=True, bf16=True, compiled=True),
    "ours, bf16, compiled, cuda graphs": Way(ours=True, bf16=True, compiled=True, cuda_graphs=True),
}
CPU_WAYS = [name for name, way in WAYS.items() if not way.compiled]
# Headline figures first; last what has never run and may take longest to compile.
GPU_WAYS = [
    "ours, bf16",
    "ours, bf16, compiled",
    "baseline, bf16",
    REFERENCE,
    "ours as published (pre_layernorm trains), float32",
    "ours, bf16, compiled, cuda graphs",
]


def config_of(preset: str, pre_layernorm: bool) -> ModelConfig:
    config = ModelConfig.preset("tiny" if timing.REHEARSAL else preset)
    if timing.REHEARSAL:  # small, but with every kind of stage: frozen, trained, and last
        vision, text = replace(config.vision, layers=3), replace(config.text, layers=3)
        config = replace(config, vision=vision, text=text, freeze=FreezeConfig(1, 1))
    if preset == "tiny":
        return config
    return replace(config, freeze=replace(config.freeze, pre_layernorm=pre_layernorm))


def build(name: str, preset: str, words: Words, device: str) -> OurStep | BaselineStep:
    way = WAYS[name]
    config = config_of(preset, way.pre_layernorm)
    torch.manual_seed(0)
    with torch.device(device):  # a GPU draws a billion initial weights at once, a CPU takes seconds
        model = ScenarioCLIP(config)
        if not way.ours:
            return BaselineStep(config, model, words.by_level, device, way.bf16)
    model.set_vocabulary(words)  # type: ignore[arg-type]
    step = OurStep(model, device, way.bf16, way.cuda_graphs)
    if way.compiled:
        # Inductor takes minutes on a CPU; Dynamo, which decides what is compiled, runs in a rehearsal, too.
        options: dict[str, Any] = {"backend": "eager", "options": None} if timing.REHEARSAL else {}
        step.model.compile_blocks(way.cuda_graphs, **options)
        step.teacher.compile_blocks(way.cuda_graphs, **options)
    return step


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    yield
    torch.set_float32_matmul_precision(before)


EXPECTED: dict[str, tuple[Tensor, Tensor]] = {}


def release() -> None:
    """Gives back what the model before has held."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def expected(preset: str, work: Work, device: str, step: BaselineStep | None = None) -> tuple[Tensor, Tensor]:
    """The baseline's loss and gradient norm in float32, measured once. `step`: of the baseline, before any update."""
    key = f"{preset} {work.source} {device}"
    if key not in EXPECTED:
        EXPECTED[key] = measure(step or build(REFERENCE, preset, work.words, device), work)
        release()
    return EXPECTED[key]


def measure(step: OurStep | BaselineStep, work: Work) -> tuple[Tensor, Tensor]:
    """Loss and the norm of the gradient of the weights that all ways train."""
    loss = step.loss(work.batch)
    loss.backward()
    grads = [p.grad for n, p in step.model.named_parameters() if p.grad is not None and "pre_norm" not in n]
    norm = torch.nn.utils.get_total_norm(grads).detach()
    step.optimizer.zero_grad()
    return loss.detach().float(), norm


def check(name: str, step: OurStep, wanted: tuple[Tensor, Tensor], work: Work) -> None:
    """Loss and gradient norm against the baseline's."""
    # Float32 (TF32 on a GPU) through 12 blocks with other orders of summation; bf16 keeps 8 bits of every activation,
    # and a temperature of 0.07 magnifies a logit's error 14-fold.
    tolerance = 5e-2 if WAYS[name].bf16 else 2e-2 if step.device.type == "cuda" else 1e-4
    for what, got, reference in zip(("loss", "gradient norm"), measure(step, work), wanted, strict=True):
        error = float((got - reference).abs() / reference)
        assert error < tolerance, f"{name}: {what} {got:.6f}, the baseline's is {reference:.6f}"


def run(benchmark: Any, name: str, preset: str, work: Work, device: str, rounds: int, warmup: int = 1) -> None:
    way, where = WAYS[name], timing.device_for(device)
    release()
    if timing.WARM:
        rounds, warmup = 1, 1
    elif name != REFERENCE:
        expected(preset, work, where)  # before another model takes memory
    step = build(name, preset, work.words, where)
    if not timing.WARM:
        if name == REFERENCE:
            expected(preset, work, where, step)
        else:
            check(name, step, expected(preset, work, where), work)
    host: list[float] = []

    def once() -> None:
        begin = time.perf_counter()
        step.step(work.batch)
        host.append(time.perf_counter() - begin)
        timing.synchronize(device)

    if timing.on_gpu(device):
        torch.cuda.reset_peak_memory_stats()
    benchmark.group = f"training step, {preset}, {work.batch.num_scenes} scenes ({work.source}), {device}"
    benchmark.pedantic(once, rounds=rounds, warmup_rounds=warmup)
    seconds = benchmark.stats.stats.median
    info = benchmark.extra_info
    info["scenes"] = work.batch.num_scenes
    info["views"] = len(work.batch.pixels)
    info["threads"] = torch.get_num_threads()
    config = step.model.config
    table = TokenTable(work.words, config.text).to(where)  # type: ignore[arg-type]
    needed = batch_flops(config, work.batch, table, teacher=True)
    info["needed_tflop"] = needed / 1e12
    info["needed_tflop_per_s"] = needed / seconds / 1e12
    if device == "cuda":
        info["host, ms"] = round(1e3 * statistics.median(host[-rounds:]), 3)
    if timing.on_gpu(device):
        info["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        peak = peak_flops(torch.cuda.get_device_name(), "bf16" if way.bf16 else "tf32")
        if peak is not None:
            info["mfu"] = needed / seconds / peak


@pytest.fixture(scope="module")
def works(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Work]:
    made: dict[tuple[int, int], Work] = {}

    def make(scenes: int, size: int) -> Work:
        if (scenes, size) not in made:
            folder = tmp_path_factory.mktemp("shards")
            made[scenes, size] = photographed(scenes, size, folder) if PHOTOS.is_dir() else drawn(scenes, size)
        return made[scenes, size]

    return make


@pytest.mark.parametrize("way", CPU_WAYS)
def test_vit_b_32(benchmark: Any, way: str, works: Callable[[int, int], Work]) -> None:
    run(benchmark, way, "vit-b-32", works(4, 224), "cpu", rounds=2 if "published" in way else 3)


@pytest.mark.parametrize("way", [way for way in CPU_WAYS if way.endswith("float32") and "published" not in way])
def test_tiny(benchmark: Any, way: str, works: Callable[[int, int], Work]) -> None:
    run(benchmark, way, "tiny", works(16, 64), "cpu", rounds=7)


@pytest.mark.gpu
@pytest.mark.parametrize("way", GPU_WAYS)
def test_vit_b_32_on_a_gpu(benchmark: Any, way: str) -> None:
    scenes, size = timing.sized((128, 224), (3, 64))
    # The baseline's loop over pairs takes most of a second.
    rounds, warmup = timing.sized((10, 3) if WAYS[way].ours else (3, 1), (2, 1))
    work = drawn(scenes, size, timing.device_for("cuda"))
    with matmul_precision("high"):
        run(benchmark, way, "vit-b-32", work, "cuda", rounds, warmup)
