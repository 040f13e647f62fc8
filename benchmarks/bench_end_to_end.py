"""Training from end to end: the published way (baseline_data.py, baseline.py) against this package.

Both sides see the same scenes in the same order, begin with the same weights and make the same steps; their losses are
compared at every step, updates included, before anything is timed. Then the loader alone, the step alone on a batch in
memory, and the whole loop: an epoch with loading and steps, which is what a run is made of. The baseline's workers live
through all epochs. Of our loop on a GPU, extra_info["data_wait"] is the share of time that steps waited for batches,
after the first.

On a CPU both sides have all cores: two worker processes of torch's DataLoader there, as many loader threads here, and
torch's threads for the step. A GPU's host feeds the baseline with eight processes, as published, and ours with all
cores. Images are decoded anew in every epoch. Evaluation's views (see baseline_data.py).

Run: make bench, or: pytest benchmarks/bench_end_to_end.py
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import baseline_data
import numpy as np
import pytest
import torch
from baseline import LEVELS
from bench_step import OBJECTS, PHOTOS, RELATIONS, Words, build, matmul_precision
from PIL import Image

from scenarioclip_fast.data import Batch, Scene, SceneObject, Vocabulary, generate_scenes, load_reference
from scenarioclip_fast.data import pack as pack_scenes
from scenarioclip_fast.data.loader import scene_loader
from scenarioclip_fast.train.metrics import DataWait


@dataclass(frozen=True)
class Setting:
    preset: str
    size: int  # of a view
    batch: int  # scenes
    batches: int  # of the loop: for each worker as many
    distinct: int  # scenes; they come again until the loop is full
    workers: int  # of the baseline; on a GPU as many as in the published jobs
    device: str


SETTINGS = {
    "tiny": Setting("tiny", 64, 32, 4, 32, 2, "cpu"),
    "vit-b-32": Setting("vit-b-32", 224, 4, 2, 8, 2, "cpu"),
    "vit-b-32 on a GPU": Setting("vit-b-32", 224, 128, 16, 32, 8, "cuda"),
}
FLOAT32, BF16 = ("baseline, float32", "ours, float32"), ("baseline, bf16", "ours, bf16")
DRAWN = "baseline, regions drawn, float32"  # with SciPy in every epoch, where others read PNGs made beforehand
# The tiny preset is trained in float32; on a GPU the published precision (TF32) stands against ours.
WAYS = {"tiny": (*FLOAT32, DRAWN), "vit-b-32": FLOAT32 + BF16, "vit-b-32 on a GPU": (FLOAT32[0], BF16[1])}
CASES = [
    pytest.param((setting, way), id=f"{setting}-{way}", marks=[pytest.mark.gpu] if s.device == "cuda" else [])
    for setting, s in SETTINGS.items()
    for way in WAYS[setting]
]


def usual_scenes(count: int, size: tuple[int, int] = (640, 480)) -> list[Scene]:
    """Photos with about as many objects and relations as scenes have; where there are none, drawings as large."""
    if PHOTOS.is_dir():
        found = [s for s in load_reference(PHOTOS) if isinstance(s, Scene) and s.relations]
        found.sort(key=lambda s: abs(len(s.objects) - OBJECTS) + abs(len(s.relations) - RELATIONS))
        return found[:count]
    return [enlarged(scene, size) for scene in generate_scenes(count, seed=0)]


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


class World:
    """A setting's scenes in both layouts, and each side's batches."""

    def __init__(self, setting: Setting, folder: Path) -> None:
        self.setting = setting
        distinct = usual_scenes(setting.distinct)
        self.count = setting.batch * setting.batches
        # Packed are whole batches, which both sides go through again and again.
        packed = max(setting.batch, setting.distinct)
        self.scenes = [
            dataclasses.replace(distinct[i % len(distinct)], key=f"scene {i:05d}", split="train") for i in range(packed)
        ]
        self.shards = folder / "shards"
        pack_scenes(self.scenes, self.shards, progress=False)
        self.layouts = {
            regions: baseline_data.write_published(distinct, folder / regions, regions)  # type: ignore[arg-type]
            for regions in ("read", "drawn")
        }
        self.vocabulary = Vocabulary.load(self.shards / "vocabulary.json")
        self.words = Words({level: self.vocabulary.tokens(level) for level in LEVELS})

    def published(self, regions: str) -> baseline_data.Published:
        s = self.setting
        entries = list(itertools.islice(itertools.cycle(self.layouts[regions]), self.count))
        return baseline_data.Published(entries, s.size, s.batch, s.workers, s.device)

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
            ids("global", [s.action for s in scenes]),
            ids("object", [o.name for s in scenes for o in s.objects]),
            ids("relation", [s.relation_text(k) for s in scenes for k in range(len(s.relations))]),
        )

    def ours(self) -> Iterator[Batch]:
        s = self.setting
        options: dict[str, Any] = {"train": False, "shuffle": False, "blur": "reference"}
        options["epochs"] = self.count // len(self.scenes)
        with scene_loader(self.shards, s.batch, size=s.size, device=s.device, **options) as loader:
            yield from loader


def _objects(scene: Scene) -> list[Any]:
    return scene.objects


def _relations(scene: Scene) -> list[Any]:
    return scene.relations


class Side:
    """One way to train: its batches and its step, checked against the baseline in float32."""

    def __init__(self, world: World, way: str) -> None:
        self.world, self.way, self.device = world, way, world.setting.device
        self.published = None if way.startswith("ours") else world.published("drawn" if way == DRAWN else "read")
        gc.collect()
        self.step = build(way.replace("regions drawn, ", ""), world.setting.preset, world.words, self.device)
        self.waits: list[float] = []  # of each epoch, as a share of its time

    def batches(self) -> Iterator[Batch]:
        return self.world.ours() if self.published is None else self.world.batches(self.published)

    def precision(self) -> Any:
        return matmul_precision("high") if self.device == "cuda" else nullcontext()

    def loop(self) -> list[float]:
        """An epoch; the loss of every step."""
        wait = DataWait(torch.device(self.device))
        losses: list[torch.Tensor] = []
        with self.precision():
            asked = time.perf_counter()
            for batch in self.batches():
                came = time.perf_counter()
                if not losses:  # the start of the loader says nothing about the pace
                    started = asked = came
                wait.step_begins(came - asked)
                losses.append(self.step.step(batch))
                wait.step_ends()
                asked = time.perf_counter()
            values: list[float] = torch.stack(losses).tolist()  # waits for the device
        self.waits.append(wait.take() / (time.perf_counter() - started))
        return values

    def load(self) -> None:
        for batch in self.batches():
            batch.pixels[-1, -1, -1, -1].item()

    def one_step(self, batch: Batch) -> None:
        with self.precision():
            self.step.step(batch).item()


EXPECTED: dict[str, list[float]] = {}


def check(setting: str, side: Side) -> None:
    """The first epoch's losses, which also warms up."""
    losses = side.loop()
    baseline = FLOAT32[0]
    if setting not in EXPECTED:
        EXPECTED[setting] = losses if side.way == baseline else Side(side.world, baseline).loop()
    # Pixels may be a byte apart and sums run in another order: 5e-7 of the loss in float32, and 4e-4 in bf16,
    # which keeps 8 bits; twenty and ten times that. A GPU rounds products to TF32 or bf16 and may decode with nvJPEG.
    tolerance = 2e-2 if side.device == "cuda" else 4e-3 if "bf16" in side.way else 1e-5
    for i, (got, expected) in enumerate(zip(losses, EXPECTED[setting], strict=True)):
        assert abs(got - expected) < tolerance * expected, f"{side.way}, step {i}: {got}, the baseline's is {expected}"


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], World]:
    made: dict[str, World] = {}

    def make(setting: str) -> World:
        if setting not in made:
            made[setting] = World(SETTINGS[setting], tmp_path_factory.mktemp("worlds"))
        return made[setting]

    return make


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, worlds: Callable[[str], World]) -> tuple[str, Side]:
    """A side at a time, for all three measurements."""
    setting, way = request.param
    side = Side(worlds(setting), way)
    check(setting, side)
    return setting, side


def name(benchmark: Any, what: str, setting: str, side: Side, scenes: int) -> None:
    source = "photos" if PHOTOS.is_dir() else "drawn scenes"
    benchmark.group = f"end to end, {what}, {side.world.setting.preset}, {source}, {side.device}"
    benchmark.extra_info.update(form=side.way, scenes=scenes, threads=torch.get_num_threads())


def rounds(side: Side) -> int:
    """Each side has gone through an epoch by then, and the slowest take half a minute for one."""
    if side.device == "cuda":
        return 5 if side.published is None else 1
    return 5 if side.world.setting.preset == "tiny" and side.published is None else 2


def test_loader(benchmark: Any, case: tuple[str, Side]) -> None:
    setting, side = case
    if side.device == "cpu" and "bf16" in side.way:
        pytest.skip("the loader is that of float32")
    if side.way == DRAWN:
        pytest.skip("bench_data.py measures this loader")
    name(benchmark, "loader", setting, side, side.world.count)
    benchmark.pedantic(side.load, rounds=rounds(side))


def test_step(benchmark: Any, case: tuple[str, Side]) -> None:
    setting, side = case
    if side.world.setting.preset == "vit-b-32":
        pytest.skip("bench_step.py measures the step on as many scenes")
    if side.way == DRAWN:
        pytest.skip("the step is that of the other baseline")
    batch = next(iter(side.batches()))
    name(benchmark, "step", setting, side, batch.num_scenes)
    benchmark.pedantic(lambda: side.one_step(batch), rounds=5)


def test_whole_loop(benchmark: Any, case: tuple[str, Side]) -> None:
    setting, side = case
    name(benchmark, "whole loop", setting, side, side.world.count)
    side.waits.clear()
    benchmark.pedantic(side.loop, rounds=rounds(side))
    if side.published is None and side.device == "cuda":  # elsewhere all of so short an epoch is prefetched
        benchmark.extra_info["data_wait"] = statistics.median(side.waits)
