"""The generation pipeline on drawn scenes, scored against exact truth, without downloads.

Draws scenes, keeps their annotations aside, and runs all stages on the pictures alone: a local server that answers with
the truth, a fraction of it corrupted, in place of a vision-language model, and a detector and a segmenter of
`generate.drawn` in place of networks. Then it scores what the stages found, before and after curation.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from scenarioclip_fast.data.parallel import ordered_map
from scenarioclip_fast.data.synthetic.scenes import render_scene, split_of
from scenarioclip_fast.data.synthetic.write import QUALITY
from scenarioclip_fast.distributed import world_size
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import naming, replacing, write_text
from scenarioclip_fast.generate.config import GenerateConfig
from scenarioclip_fast.generate.drawn.scores import Annotations, Scores, Truth, annotations_of, score_run
from scenarioclip_fast.generate.drawn.vlm_server import Corruption, Kind, StubServer
from scenarioclip_fast.generate.pipeline import GenerateReport, generate
from scenarioclip_fast.progress import progress
from scenarioclip_fast.recipes.steps import StepTimer, prepare_directory
from scenarioclip_fast.report.page import Report, Section
from scenarioclip_fast.requirements import require
from scenarioclip_fast.terminal import printable

MIN_SCENES = 10  # with fewer, splits may be empty
CORRUPT = 0.2  # fraction of the answers
_MARKER = "generation-demo.json"  # marks a directory that this demo may clear
_FOLDERS = ("images", "data")
_MEANINGS: dict[Kind, str] = {
    "bad_json": "the answer cannot be parsed",
    "wrong_name": "an object has the name of something else, also in its relations",
    "extra_object": "an object is named that is not in the picture",
    "false_relation": "a relation is named that does not hold between its two objects",
    "absent_relation": "a relation is named with an object that is not in the picture",
}

# Drawn objects are in front of each other, so that boxes overlap more than those of the published settings may.
SETTINGS: dict[str, Any] = {
    "ground": {
        "model": "scenarioclip_fast.generate.drawn.detector:DrawnDetector",
        "box_threshold": 0.2,
        "nms": 0.8,
        "batch_size": 8,
    },
    "segment": {"model": "scenarioclip_fast.generate.drawn.segmenter:DrawnSegmenter", "batch_size": 8},
}


@dataclass(frozen=True)
class GenerationDemoConfig:
    """Options of the demo."""

    out: Path = Path("runs/generation-demo")
    seed: int = 0
    scenes: int = 1000
    workers: int = 1  # more pay off with several thousand scenes: starting them takes seconds per stage

    def __post_init__(self) -> None:
        if self.scenes < MIN_SCENES:
            raise UserError(f"scenes: got {self.scenes}, expected at least {MIN_SCENES}")
        if self.seed < 0:
            raise UserError(f"seed: got {self.seed}, expected at least 0")
        if self.workers < 1:
            raise UserError(f"workers: got {self.workers}, expected at least 1")


@dataclass
class GenerationDemoResult:
    """Scores before and after curation, and what the stages did.

    Attributes:
        corrupted: answers by the kind of their corruption.
        without_relations: images that have none; they are rejected, and their objects count as not found.
        seconds: per step of the demo.
    """

    out: Path
    before: Scores
    after: Scores
    report: GenerateReport
    corrupted: Counter[Kind]
    without_relations: int
    seconds: dict[str, float]

    @property
    def images_per_s(self) -> float:
        """Through all stages."""
        return self.before.images / self.seconds["generating"]

    def __str__(self) -> str:
        corrupted = ", ".join(f"{n} {kind}" for kind, n in sorted(self.corrupted.items()))
        rows = [["", "before curation", "after"]]
        after = self.after.measures()
        rows += [[name, _percent(value), _percent(after[name])] for name, value in self.before.measures().items()]
        width = max(len(row[0]) for row in rows)
        table = "\n".join(f"{name:<{width}}  {before:>15}  {after:>6}" for name, before, after in rows)
        return (
            f"{self.report}\n\n{table}\n\n"
            f"{self.before.images} images, of which {self.without_relations} have no relations and are rejected\n"
            f"{self.corrupted.total()} answers corrupted: {corrupted or 'none'}\n"
            f"{self.images_per_s:.0f} images/s through all stages: {printable(self.out / 'report.html')}"
        )

    def page(self) -> Report:
        """The scores as a page."""
        after = self.after.measures()
        rows = [[name, _percent(value), _percent(after[name])] for name, value in self.before.measures().items()]
        lead = (
            f"{self.before.images:,} drawn scenes through all stages, scored against exact annotations; "
            f"{self.corrupted.total():,} of the answers were corrupted."
        )
        note = (
            "Before curation, the ends of relations are matched to names exactly. Relations answered rightly are true "
            "relations that the server named in an answer that can be parsed; the pipeline cannot know others. The run "
            "of `generate` has its own pages: [report](data/report.html) and [review](data/review.html)."
        )
        report = Report("Generation demo", lead)
        report.sections.append(Section("Scores", ["", "before curation", "after"], rows, note=note))
        corrupted = [[kind, f"{n:,}", _MEANINGS[kind]] for kind, n in sorted(self.corrupted.items())]
        report.sections.append(Section("Corrupted answers", ["kind", "answers", "meaning"], corrupted))
        steps = {f"{step}, s": f"{seconds:.3g}" for step, seconds in self.seconds.items()}
        report.add_facts("Times", {**steps, "images/s through all stages": f"{self.images_per_s:.3g}"})
        return report

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "corrupted": dict(sorted(self.corrupted.items())),
            "without_relations": self.without_relations,
            "images_per_s": self.images_per_s,
            "stages": {stage.name: {"images": stage.images, "seconds": stage.seconds} for stage in self.report.stages},
            "seconds": self.seconds,
        }


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def run_generation_demo(config: GenerationDemoConfig) -> GenerationDemoResult:
    """Run the demo.

    Writes, to `config.out`: `images/`, `truth.jsonl` with their annotations, `data/` with the run and its pages, and
    the scores as `report.html` and `result.json`.

    Raises:
        UserError: `config.out` is not empty and was not written by this demo, or there are several ranks.
    """
    if world_size() > 1:
        raise UserError(f"the demo runs in one process: got WORLD_SIZE={world_size()}; start it without torchrun")
    for package in ("simplejpeg", "scipy.ndimage", "openai", "inflect", "rapidfuzz"):  # before any work
        require(package)
    out = prepare_directory(config.out, _MARKER, _FOLDERS, {"seed": config.seed, "scenes": config.scenes})
    timer = StepTimer(3)
    with timer.step("drawing", f"{config.scenes:,} scenes"):
        drawings = draw(config.scenes, out / "images", seed=config.seed, workers=config.workers)
    with timer.step("generating", f"all stages on the pictures; {CORRUPT:.0%} of the answers are corrupted"):
        server = StubServer(answers(drawings), corrupt=CORRUPT, seed=config.seed, vary=True)
        with server:
            models = settings(server.url, server.model)
            report = generate(out / "images", out / "data", models, device="cpu", workers=config.workers)
    with timer.step("scoring", "against the exact annotations"):
        corruptions = {one.key: server.corruption_of(one.sha) for one in drawings}
        truth = {one.key: one.truth(corruptions[one.key]) for one in drawings}
        _write_truth(truth, out / "truth.jsonl")
        before, after = score_run(out / "data", truth)
    result = GenerationDemoResult(
        out,
        before,
        after,
        report,
        Counter(one.kind for one in corruptions.values() if one is not None),
        sum(not one.annotations.relations for one in drawings),
        timer.seconds,
    )
    record = {"config": {**asdict(config), "out": str(config.out)}, **result.to_dict()}
    write_text(out / "result.json", json.dumps(record, indent=2) + "\n")
    result.page().write(out / "report.html")
    return result


def settings(url: str, model: str) -> GenerateConfig:
    """The settings of the pipeline for drawn scenes, with a model on a server."""
    return GenerateConfig.of(SETTINGS, {"caption": {"url": url, "model": model}})


@dataclass(frozen=True)
class Drawing:
    """A scene that was drawn.

    Attributes:
        sha: SHA-256 of the JPEG.
    """

    key: str
    sha: str
    action: str
    annotations: Annotations

    @property
    def answer(self) -> dict[str, Any]:
        """What a perfect model answers."""
        names = [thing.name for thing in self.annotations.objects]
        return {
            "caption": f"A drawing with {', '.join(f'a {name}' for name in names)}.",
            "action": self.action,
            "objects": names,
            "relations": [list(self.annotations.triplet(one)) for one in self.annotations.relations],
        }

    def truth(self, corruption: Corruption | None) -> Truth:
        """The annotations, and what was answered rightly."""
        triplets = enumerate(map(self.annotations.triplet, self.annotations.relations))
        wrong = set(corruption.before) if corruption is not None and corruption.kind == "wrong_name" else set()
        readable = corruption is None or corruption.kind != "bad_json"
        answered = (k for k, (subject, _, object_) in triplets if readable and not {subject, object_} & wrong)
        return Truth(self.annotations, frozenset(answered))


def draw(scenes: int, folder: Path, *, seed: int = 0, workers: int = 1) -> list[Drawing]:
    """Draw scenes as JPEGs in a new folder, KEY.jpg each, in `workers` processes, whose number does not matter."""
    folder.mkdir()
    jobs = ordered_map(partial(_draw, seed=seed, folder=folder), range(scenes), workers)
    return list(progress(jobs, scenes, "drawing", "scenes"))


def _draw(index: int, *, seed: int, folder: Path) -> Drawing:
    scene = render_scene(seed, index, split_of(index))
    jpeg = require("simplejpeg").encode_jpeg(
        scene.image.numpy(),  # type: ignore[union-attr]
        quality=QUALITY,
        colorspace="RGB",
        colorsubsampling="444",
    )
    with naming(path := folder / f"{scene.key}.jpg"):
        path.write_bytes(jpeg)
    return Drawing(scene.key, hashlib.sha256(jpeg).hexdigest(), str(scene.action), annotations_of(scene))


def answers(drawings: Sequence[Drawing]) -> dict[str, dict[str, Any]]:
    """The perfect answers by the SHA-256 of the pictures."""
    return {one.sha: one.answer for one in drawings}


def _write_truth(truth: dict[str, Truth], path: Path) -> None:
    with replacing(path) as new, new.open("x", encoding="ascii") as file:
        for key, (annotations, answered) in truth.items():
            objects = [{"name": one.name, "box": one.box, "mask": one.mask} for one in annotations.objects]
            record = {"key": key, "objects": objects, "relations": annotations.relations, "answered": sorted(answered)}
            file.write(json.dumps(record, separators=(",", ":")) + "\n")
