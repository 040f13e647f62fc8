"""Training end to end: the baseline (baseline_data.py, baseline.py) against this package.

Both contenders train on the same scenes in the same order from the same weights. Their losses are compared step by
step, updates included, and a contender whose losses differ is not timed. Three measurements: the loader alone, the step
alone on a batch in memory, and the whole loop of loading and steps.

On a CPU both use all cores: two DataLoader worker processes for the baseline, as many loader threads for this package,
and PyTorch's threads for the step. A loop is one epoch; its losses are compared before timing. The baseline's workers
and this package's loader persist across epochs.

On a GPU, eight worker processes feed the baseline, as published; this package's loader uses all cores. The first steps
of a loop are not timed: they start the loaders, capture CUDA graphs and serve to compare the losses. Each worker makes
whole batches, so eight workers deliver eight batches at a time: the baseline times a multiple of eight steps, since
otherwise the result would depend on where the timing starts and ends.
extra_info["data_wait"] is the share of this package's loop spent waiting for batches, extra_info["decoder"] the decoder
of its loader.

Images are decoded in every epoch. The views are those of evaluation (see baseline_data.py).

Run: make bench, or: pytest benchmarks/bench_end_to_end.py
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from scenarioclip_fast.benchmarks import baseline_data, timing
from scenarioclip_fast.benchmarks.baseline import LEVELS
from scenarioclip_fast.benchmarks.bench_step import (
    OBJECTS,
    PHOTOS,
    RELATIONS,
    FixedVocabulary,
    build,
    matmul_precision,
    release,
)

from scenarioclip_fast.data import Batch, Scene, SceneObject, ShardSet, generate_scenes, load_reference
from scenarioclip_fast.data import pack as pack_scenes
from scenarioclip_fast.data.loader import SceneLoader, scene_loader
from scenarioclip_fast.train.timing import DataWait


@dataclass(frozen=True)
class Setting:
    preset: str
    size: int  # of a view, pixels
    batch: int  # scenes
    batches: int  # per loop of this package
    baseline_batches: int  # per loop of the baseline; the timed ones are a multiple of `workers`
    untimed: int  # batches at the start of either loop
    distinct: int  # scenes, repeated to fill the loop
    workers: int  # of the baseline; on a GPU, as published
    device: str


ON_GPU = "vit-b-32 on a GPU"
SETTINGS = {
    "tiny": Setting("tiny", 64, 32, 4, 4, 0, 32, 2, "cpu"),
    "vit-b-32": Setting("vit-b-32", 224, 4, 2, 2, 0, 8, 2, "cpu"),
    ON_GPU: timing.sized(
        Setting("vit-b-32", 224, 128, 16, 12, 4, 32, 8, "cuda"),
        Setting("vit-b-32", 64, 3, 6, 4, 2, 3, 2, "cuda"),
    ),
}
FLOAT32, BF16 = ("baseline, float32", "ours, float32"), ("baseline, bf16", "ours, bf16")
# Focused regions computed with SciPy in every epoch; the other baselines read precomputed PNGs.
REGIONS_COMPUTED = "baseline, regions drawn, float32"
# "tiny" trains in float32; on a GPU, the published precision (TF32) is compared with bf16.
GRAPHS = "ours, bf16, cuda graphs"
FORMS = {"tiny": (*FLOAT32, REGIONS_COMPUTED), "vit-b-32": FLOAT32 + BF16, ON_GPU: (FLOAT32[0], BF16[1], GRAPHS)}
CPU_CASES = [(setting, form) for setting in SETTINGS if setting != ON_GPU for form in FORMS[setting]]
# Headline figures first: each loop of the baseline takes seconds.
GPU_CASES = [
    ("whole loop", GRAPHS),
    ("whole loop", FLOAT32[0]),
    ("whole loop", BF16[1]),
    ("loader", BF16[1]),
    ("step", GRAPHS),
    ("step", BF16[1]),
    ("step", FLOAT32[0]),
    ("loader", FLOAT32[0]),
]


def typical_scenes(count: int, size: tuple[int, int] = (640, 480)) -> list[Scene]:
    """Photos with about OBJECTS objects and RELATIONS relations; without photos, synthetic scenes of the same size."""
    if PHOTOS.is_dir():
        found = [s for s in load_reference(PHOTOS) if isinstance(s, Scene) and s.relations]
        found.sort(key=lambda s: abs(len(s.objects) - OBJECTS) + abs(len(s.relations) - RELATIONS))
        return found[:count]
    with ThreadPoolExecutor() as pool:
        return list(pool.map(functools.partial(enlarged, size=size), generate_scenes(count, seed=0)))


def enlarged(scene: Scene, size: tuple[int, int]) -> Scene:
    pixels = np.asarray(scene.image)
    scale = np.array(size * 2) / np.array([pixels.shape[1], pixels.shape[0]] * 2)
    objects = []
    for o in scene.objects:
        mask = Image.fromarray(baseline_data.as_array(o.mask)).resize(size, Image.Resampling.NEAREST)
        x1, y1, x2, y2 = (np.array(o.box) * scale).tolist()
        objects.append(SceneObject(o.name, (x1, y1, x2, y2), torch.from_numpy(np.array(mask))))
    image = torch.from_numpy(np.array(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)))
    return Scene(scene.key, baseline_data.encoded(image), scene.action, objects, scene.relations)


class Workload:
    """A setting's scenes in both layouts, and the batches of both contenders."""

    def __init__(self, setting: Setting, folder: Path) -> None:
        self.setting, self.folder = setting, folder
        self.device = timing.device_for(setting.device)
        self.distinct = typical_scenes(setting.distinct)
        # Pack whole batches, over which both contenders iterate repeatedly.
        packed = max(setting.batch, setting.distinct)
        self.scenes = [
            dataclasses.replace(self.distinct[i % len(self.distinct)], key=f"scene {i:05d}", split="train")
            for i in range(packed)
        ]
        self.shards = folder / "shards"
        pack_scenes(self.scenes, self.shards, progress=False)
        self.vocabulary = ShardSet(self.shards).vocabulary
        self.fixed_vocabulary = FixedVocabulary({level: self.vocabulary.tokens(level) for level in LEVELS})
        self.layout = functools.cache(self._layout)

    def _layout(self, regions: Literal["read", "computed"]) -> list[baseline_data.Entry]:
        return baseline_data.write_published(self.distinct, self.folder / regions, regions)

    def published(self, regions: Literal["read", "computed"]) -> baseline_data.PublishedLoader:
        s = self.setting
        entries = list(itertools.islice(itertools.cycle(self.layout(regions)), s.batch * s.baseline_batches))
        return baseline_data.PublishedLoader(entries, s.size, s.batch, s.workers, self.device)

    def batches(self, pixels: Iterable[torch.Tensor]) -> Iterator[Batch]:
        scenes = itertools.cycle(self.scenes)
        for views in pixels:
            yield self.with_texts(views, list(itertools.islice(scenes, self.setting.batch)))

    def with_texts(self, pixels: torch.Tensor, scenes: list[Scene]) -> Batch:
        def ids(level: str, texts: list[str]) -> torch.Tensor:
            return torch.tensor([self.vocabulary.id(level, text) for text in texts], device=pixels.device)

        rows = torch.arange(len(scenes))
        objects, relations = (torch.tensor([len(part(s)) for s in scenes]) for part in (_objects, _relations))
        return Batch(
            pixels,
            [scene.key for scene in scenes],
            rows.repeat_interleave(objects).to(pixels.device),
            rows.repeat_interleave(relations).to(pixels.device),
            ids("global", [s.action or "" for s in scenes]),  # benchmarked scenes have actions
            ids("object", [o.name for s in scenes for o in s.objects]),
            ids("relation", [s.relation_text(k) for s in scenes for k in range(len(s.relations))]),
        )

    @functools.cached_property
    def loader(self) -> SceneLoader:
        """This package's loader. It keeps its threads from loop to loop, like the baseline's workers."""
        s = self.setting
        options: dict[str, Any] = {"augment": False, "shuffle": False, "blur": "reference"}
        options["epochs"] = s.batch * s.batches // len(self.scenes)
        return scene_loader(self.shards, s.batch, size=s.size, device=self.device, **options)

    @functools.cached_property
    def start(self) -> dict[str, int]:
        return self.loader.state_dict()

    def ours(self) -> Iterator[Batch]:
        self.loader.load_state_dict(self.start)  # a previous iteration may have ended early
        return iter(self.loader)


def _objects(scene: Scene) -> list[Any]:
    return scene.objects


def _relations(scene: Scene) -> list[Any]:
    return scene.relations


class Contender:
    """One form of training: its batches and its step."""

    def __init__(self, workload: Workload, form: str) -> None:
        self.workload, self.form, self.on_gpu = workload, form, workload.setting.device == "cuda"
        regions: Literal["read", "computed"] = "computed" if form == REGIONS_COMPUTED else "read"
        self.published = None if form.startswith("ours") else workload.published(regions)
        self.ours = self.published is None
        release()
        name = form.replace("regions drawn, ", "")
        self.step = build(name, workload.setting.preset, workload.fixed_vocabulary, workload.device)
        self.wait = DataWait(torch.device(workload.device))
        self.waits: list[float] = []  # per loop, as a share of its timed part
        self.losses: list[list[float]] = []  # of the untimed steps, per loop
        self.error: str | None = None  # message of the failed check

    @property
    def timed_scenes(self) -> int:
        s = self.workload.setting
        return s.batch * ((s.batches if self.ours else s.baseline_batches) - s.untimed)

    def batches(self) -> Iterator[Batch]:
        return self.workload.ours() if self.published is None else self.workload.batches(self.published)

    def one_step(self, batch: Batch) -> torch.Tensor:
        with matmul_precision("high") if self.on_gpu else nullcontext():
            return self.step.step(batch)

    def steps(self) -> Iterator[torch.Tensor]:
        """Run the whole loop, yielding the loss of each step."""
        requested = time.perf_counter()
        for batch in self.batches():
            self.wait.begin_step(time.perf_counter() - requested)
            loss = self.one_step(batch)
            self.wait.end_step()
            yield loss
            requested = time.perf_counter()

    def begin_loop(self) -> None:
        self.running_steps = self.steps()
        self.losses.append(to_floats(itertools.islice(self.running_steps, self.workload.setting.untimed)))

    def finish_loop(self) -> list[float]:
        """Run the rest of the loop and return its losses."""
        self.wait.pop()
        start = time.perf_counter()
        losses = to_floats(self.running_steps)
        self.waits.append(self.wait.pop() / (time.perf_counter() - start))
        return losses

    def begin_loading(self) -> None:
        self.loading = self.batches()
        for batch in itertools.islice(self.loading, self.workload.setting.untimed):
            wait_for(batch)

    def finish_loading(self) -> None:
        for batch in self.loading:
            wait_for(batch)


def to_floats(losses: Iterable[torch.Tensor]) -> list[float]:
    """Losses as floats; waits for the device."""
    found = list(losses)
    return torch.stack(found).tolist() if found else []


def wait_for(batch: Batch) -> None:
    batch.pixels[-1, -1, -1, -1].item()


def check(contender: Contender, got: list[float], expected: list[float]) -> None:
    """Fail this and all later benchmarks of the contender if its losses differ."""
    # Pixels may differ by one and sums run in another order: relative errors of 5e-7 in float32 and 4e-4 in bf16, of
    # which the tolerances are 20 and 10 times. A GPU rounds products to TF32 or bf16 and may decode with nvJPEG.
    tolerance = 2e-2 if contender.on_gpu else 4e-3 if "bf16" in contender.form else 1e-5
    for i, (loss, reference) in enumerate(zip(got, expected, strict=True)):
        if not abs(loss - reference) < tolerance * reference:
            contender.error = f"{contender.form}, step {i}: loss {loss}, the baseline's is {reference}"
            pytest.fail(contender.error)


EXPECTED: dict[str, list[float]] = {}


def check_epoch(setting: str, contender: Contender) -> None:
    """Compare an epoch with the float32 baseline's, which also warms up."""

    def epoch(contender: Contender) -> list[float]:
        contender.begin_loop()
        return contender.finish_loop()

    losses, baseline = epoch(contender), FLOAT32[0]
    if setting not in EXPECTED:
        EXPECTED[setting] = losses if contender.form == baseline else epoch(Contender(contender.workload, baseline))
    check(contender, losses, EXPECTED[setting])


def expected_on_gpu(workload: Workload) -> list[float]:
    """The baseline's first losses, on batches of this package's loader: its own would take seconds."""
    if ON_GPU not in EXPECTED:
        baseline = Contender(workload, FLOAT32[0])
        batches = itertools.islice(workload.ours(), workload.setting.untimed)
        EXPECTED[ON_GPU] = to_floats(baseline.one_step(batch) for batch in batches)
    return EXPECTED[ON_GPU]


@pytest.fixture(scope="module")
def workloads(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Workload]:
    return functools.cache(lambda setting: Workload(SETTINGS[setting], tmp_path_factory.mktemp("workload")))


@pytest.fixture(scope="module", params=CPU_CASES, ids=["-".join(case) for case in CPU_CASES])
def cpu_contender(request: pytest.FixtureRequest, workloads: Callable[[str], Workload]) -> Contender:
    """One contender at a time, shared by all three measurements."""
    setting, form = request.param
    contender = Contender(workloads(setting), form)
    check_epoch(setting, contender)
    return contender


@pytest.fixture(scope="module")
def gpu_contenders(workloads: Callable[[str], Workload]) -> Callable[[str], Contender]:
    """Both contenders on the GPU, by form."""
    return functools.cache(lambda form: Contender(workloads(ON_GPU), form))


def describe(benchmark: Any, what: str, contender: Contender, scenes: int) -> None:
    source, setting = "photos" if PHOTOS.is_dir() else "synthetic scenes", contender.workload.setting
    benchmark.group = f"end to end, {what}, {setting.preset}, {source}, {setting.device}"
    benchmark.extra_info.update(form=contender.form, scenes=scenes, threads=torch.get_num_threads())


def rounds(contender: Contender) -> int:
    """Few rounds suffice: each contender is warm, and the slowest take half a minute per epoch."""
    if timing.WARM:
        return 1
    if contender.on_gpu:
        return timing.sized(5, 2) if contender.ours else 1
    return 5 if contender.workload.setting.preset == "tiny" and contender.ours else 2


def time_loops(benchmark: Any, what: str, contender: Contender, rounds: int) -> None:
    """Time the loader alone or the whole loop, without their untimed batches."""
    describe(benchmark, what, contender, contender.timed_scenes)
    loader = what == "loader"
    begin = contender.begin_loading if loader else contender.begin_loop
    finish: Callable[[], object] = contender.finish_loading if loader else contender.finish_loop
    benchmark.pedantic(finish, setup=begin, rounds=rounds)
    if contender.ours:
        benchmark.extra_info["decoder"] = str(contender.workload.loader.decoder)


def test_loader(benchmark: Any, cpu_contender: Contender) -> None:
    if "bf16" in cpu_contender.form:
        pytest.skip("same loader as float32")
    if cpu_contender.form == REGIONS_COMPUTED:
        pytest.skip("bench_data.py measures this loader")
    time_loops(benchmark, "loader", cpu_contender, rounds(cpu_contender))


def test_step(benchmark: Any, cpu_contender: Contender) -> None:
    if cpu_contender.workload.setting.preset == "vit-b-32":
        pytest.skip("bench_step.py measures the step at this size")
    if cpu_contender.form == REGIONS_COMPUTED:
        pytest.skip("same step as the other baseline")
    batch = next(iter(cpu_contender.batches()))
    describe(benchmark, "step", cpu_contender, batch.num_scenes)
    benchmark.pedantic(lambda: cpu_contender.one_step(batch).item(), rounds=5)


def test_whole_loop(benchmark: Any, cpu_contender: Contender) -> None:
    time_loops(benchmark, "whole loop", cpu_contender, rounds(cpu_contender))


@pytest.mark.gpu
@pytest.mark.parametrize(("what", "form"), GPU_CASES)
def test_vit_b_32_on_a_gpu(benchmark: Any, what: str, form: str, gpu_contenders: Callable[[str], Contender]) -> None:
    contender = gpu_contenders(form)
    if contender.error is not None:
        pytest.fail(contender.error)
    if what == "step":
        batch = next(contender.workload.ours())
        describe(benchmark, what, contender, batch.num_scenes)
        benchmark.pedantic(lambda: contender.one_step(batch).item(), rounds=3, warmup_rounds=1)
        return
    if what == "loader":
        time_loops(benchmark, what, contender, min(rounds(contender), 3))
        return
    time_loops(benchmark, what, contender, rounds(contender))
    if contender.ours:
        benchmark.extra_info["data_wait"] = statistics.median(contender.waits)
    if not timing.WARM:
        check(contender, contender.losses[0], expected_on_gpu(contender.workload))
