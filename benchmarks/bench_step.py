"""The training step against the baseline (baseline.py): same weights, same batch, same loss, then the time.

A step is forward, loss, backward, clipping, AdamW and the teacher's average. On a CPU: four scenes at ViT-B/32's sizes
and 16 at the tiny preset's, real photos through the loader where they are present (SCENARIOCLIP_FAST_PHOTOS), else
random pixels with 6 objects and 3 relations a scene. On a GPU: 128 scenes of random pixels, with peak memory and the
share of the peak rate that the necessary operations make up (MFU).

Run: make bench, or: pytest benchmarks/bench_step.py. Where others use the machine, the processor's time on one core is
the steadier figure: OMP_NUM_THREADS=1 pytest benchmarks/bench_step.py --benchmark-timer=time.process_time
"""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from baseline import LEVELS, BaselineStep, Tokens
from torch import Tensor

from scenarioclip_fast.data import Batch, load_reference, pack, scene_loader
from scenarioclip_fast.losses import ScenarioLoss
from scenarioclip_fast.model import EMATeacher, ModelConfig, ScenarioCLIP, TokenTable
from scenarioclip_fast.model.operations import batch_operations, peak_flops
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
    views = scenes * (1 + OBJECTS + RELATIONS)
    batch = Batch(
        torch.randn(views, 3, size, size, generator=g),
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
    with scene_loader(directory, scenes, size=size, train=False, shuffle=False, epochs=1) as loader:
        batch = next(iter(loader))
        return Work(batch, Words({level: loader.vocabulary.tokens(level) for level in LEVELS}), "photos")


class OurStep:
    """The trainer's step, from the trainer's parts."""

    def __init__(self, model: ScenarioCLIP, device: str, bf16: bool) -> None:
        self.model, self.bf16, self.device = model.to(device).train(), bf16, torch.device(device)
        self.loss_module = ScenarioLoss().to(device)
        self.teacher = EMATeacher(self.model)
        self.optimizer = build_optimizer(self.model, self.loss_module, OptimSection(decay_logit_scale=True))

    def loss(self, batch: Batch) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.loss_module(self.model(batch, teacher=self.teacher))["loss"]

    def step(self, batch: Batch) -> Tensor:
        loss = self.loss(batch)
        loss.backward()
        guarded_step(self.optimizer, loss, clip_norm=1.0)
        self.teacher.update(self.model)
        return loss.detach()


# name -> (ours, bf16, freeze.pre_layernorm, blocks compiled)
WAYS: dict[str, tuple[bool, bool, bool, bool]] = {
    "baseline, float32": (False, False, False, False),
    "baseline, bf16": (False, True, False, False),
    "ours as published (pre_layernorm trains), float32": (True, False, False, False),
    "ours, float32": (True, False, True, False),
    "ours, bf16": (True, True, True, False),
    "ours, bf16, compiled": (True, True, True, True),
}
CPU_WAYS = [name for name in WAYS if "compiled" not in name]
GPU_WAYS = [name for name in WAYS if name != "ours, float32"]


def build(way: str, preset: str, words: Words, device: str) -> OurStep | BaselineStep:
    ours, bf16, pre_layernorm, compiled = WAYS[way]
    config = ModelConfig.preset(preset)
    if preset != "tiny":
        config = replace(config, freeze=replace(config.freeze, pre_layernorm=pre_layernorm))
    torch.manual_seed(0)
    with torch.device(device):  # a GPU draws a billion initial weights at once, a CPU takes seconds
        model = ScenarioCLIP(config)
        if not ours:
            return BaselineStep(config, model, words.by_level, device, bf16)
    model.set_vocabulary(words)  # type: ignore[arg-type]
    step = OurStep(model, device, bf16)
    if compiled:
        step.model.compile_blocks()
        step.teacher.compile_blocks()
    return step


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    yield
    torch.set_float32_matmul_precision(before)


EXPECTED: dict[str, tuple[Tensor, Tensor]] = {}


def check(way: str, step: OurStep | BaselineStep, preset: str, work: Work, device: str) -> None:
    """Loss and the norm of the gradient of the shared trained weights against the baseline in float32."""

    def measure(step: OurStep | BaselineStep) -> tuple[Tensor, Tensor]:
        loss = step.loss(work.batch)
        loss.backward()
        grads = [p.grad for n, p in step.model.named_parameters() if p.grad is not None and "pre_norm" not in n]
        step.optimizer.zero_grad()
        return loss.detach().float(), torch.nn.utils.get_total_norm(grads).detach()

    key = f"{preset} {work.source} {device}"
    if way == "baseline, float32":
        EXPECTED[key] = measure(step)
        return
    if key not in EXPECTED:  # run alone
        EXPECTED[key] = measure(build("baseline, float32", preset, work.words, device))
        gc.collect()
    bf16 = WAYS[way][1]
    # Float32 (TF32 on a GPU) through 12 blocks with other orders of summation; bf16 keeps 8 bits of every activation,
    # and a temperature of 0.07 magnifies a logit's error 14-fold.
    tolerance = 5e-2 if bf16 else 2e-2 if device == "cuda" else 1e-4
    for name, got, expected in zip(("loss", "gradient norm"), measure(step), EXPECTED[key], strict=True):
        error = float((got - expected).abs() / expected)
        assert error < tolerance, f"{way}: {name} {got:.6f}, the baseline's is {expected:.6f}"


def run(benchmark: Any, way: str, preset: str, work: Work, device: str, rounds: int) -> None:
    gc.collect()
    step = build(way, preset, work.words, device)
    check(way, step, preset, work, device)
    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None

    def once() -> None:
        step.step(work.batch)
        wait()

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    benchmark.group = f"training step, {preset}, {work.batch.num_scenes} scenes ({work.source}), {device}"
    benchmark.pedantic(once, rounds=rounds, warmup_rounds=1 if device == "cpu" else 3)
    seconds = benchmark.stats.stats.median
    info = benchmark.extra_info
    info["scenes"] = work.batch.num_scenes
    info["views"] = len(work.batch.pixels)
    info["threads"] = torch.get_num_threads()
    config = step.model.config
    table = TokenTable(work.words, config.text).to(device)  # type: ignore[arg-type]
    needed = batch_operations(config, work.batch, table, teacher=True)
    info["needed_tflop"] = needed / 1e12
    info["needed_tflop_per_s"] = needed / seconds / 1e12
    if device == "cuda":
        info["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        peak = peak_flops(torch.cuda.get_device_name(), "bf16" if WAYS[way][1] else "tf32")
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
    with matmul_precision("high"):
        rounds = 5 if way.startswith("baseline") else 10  # its loop over pairs takes most of a second
        run(benchmark, way, "vit-b-32", drawn(128, 224, "cuda"), "cuda", rounds)
