"""The whole job on drawn scenes, by the doors that a user's own data takes.

Draws scenes in the published layout, packs them, trains one pair of towers from scratch on all three kinds of views
(it plays the part of the pretrained CLIP), starts ScenarioCLIP from it as the paper starts from CLIP (lower blocks
frozen and shared, six encoders, EMA teacher, distillation), evaluates on scenes that training never saw, and writes a
report.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import torch

from scenarioclip_fast import __version__
from scenarioclip_fast.data.packing import pack
from scenarioclip_fast.data.synthetic.write import draw_reference_layout
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.eval.checkpoint import open_checkpoint, pick_device
from scenarioclip_fast.eval.loading import EvaluationLoader
from scenarioclip_fast.eval.samples import SampleScene, answer_samples
from scenarioclip_fast.eval.zeroshot import TASKS, ZeroShotResult, zeroshot
from scenarioclip_fast.report.page import Report, Section
from scenarioclip_fast.train.config import TrainConfig
from scenarioclip_fast.train.metrics import read_metrics
from scenarioclip_fast.train.trainer import FitResult, Trainer

MIN_SCENES = 40  # fewer leave splits empty
PRETRAIN_SHARE = 5 / 12  # of the views, for the shared pair of towers
PRETRAINED, METHOD = "First phase: PyramidCLIP from scratch", "Second phase: ScenarioCLIP from it"
_MARK = "demo.json"
_FOLDERS = ("scenes", "shards", "pretrain", "train")

# What the two phases have in common: tiny towers on 64-pixel views, all decoded images in memory. Equal texts of a
# batch are one class, for with ten actions every batch has some.
_COMMON: dict[str, Any] = {
    "data": {"object_view": "crop", "cache_gib": 1.0},
    "model": {"preset": "tiny"},
    "loss": {"duplicates": "positives", "teacher_decay": 0.99, "teacher_warmup": 50},
    "optim": {"lr": 1e-3, "weight_decay": 0.1, "betas": [0.9, 0.98]},
    "train": {"checkpoint_every": 1_000_000, "tensorboard": False},
}
# Small batches first, for many steps; then larger ones, whose texts are harder to tell apart.
_PRETRAIN: dict[str, Any] = {"data": {"batch_size": 16}, "model": {"variant": "pyramidclip"}}
_TRAIN: dict[str, Any] = {
    "data": {"batch_size": 64},
    "model": {
        "variant": "scenarioclip1",
        "freeze": {"vision_blocks": 2, "text_blocks": 2, "embeddings": True, "pre_layernorm": True},
    },
}


@dataclass(frozen=True)
class DemoConfig:
    """What the demo may be asked for; `views` is the budget of both training phases together."""

    out: Path = Path("runs/demo")
    seed: int = 0
    scenes: int = 3500
    views: int = 120_000
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.scenes < MIN_SCENES:
            raise UserError(f"scenes: got {self.scenes}, expected at least {MIN_SCENES}")
        if self.views < 2:
            raise UserError(f"views: got {self.views}, expected at least 2")
        if self.seed < 0:
            raise UserError(f"seed: got {self.seed}, expected at least 0")


@dataclass
class DemoResult:
    """Accuracies on the test split after each phase, and where the time went."""

    report: Path
    pretrained: ZeroShotResult
    trained: ZeroShotResult
    seconds: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items())
        total = sum(self.seconds.values())
        return f"{self.trained.only('own')}\n\n{total:.0f} s in all: {spent}\nreport: {self.report}"


def run_demo(config: DemoConfig) -> DemoResult:
    """Does everything and writes `report.html`, PNGs and `result.json` below `config.out`.

    Raises UserError where `config.out` holds something that no demo wrote, KeyboardInterrupt when a signal ended the
    training.
    """
    device = pick_device(config.device)
    out = _prepare(config.out, config)
    watch = _Watch(6)
    with watch.step("drawing", f"{config.scenes:,} scenes in the published layout"):
        draw_reference_layout(config.scenes, out / "scenes", seed=config.seed, workers=_cores())
    with watch.step("packing", "checks, run-length masks, shards"):
        packed = pack(out / "scenes", out / "shards")
    first, scenes = ceil(config.views * PRETRAIN_SHARE), packed.splits["train"]["scenes"]
    with watch.step("training from scratch", "one pair of towers on all views: the part of the pretrained CLIP"):
        pretrained = _fit(config, device, "pretrain", first, scenes)
    with watch.step("training ScenarioCLIP", "six encoders, EMA teacher and distillation, started from it"):
        trained = _fit(config, device, "train", config.views - first, scenes, pretrained.model_dir)
    with watch.step("evaluating", "scenes of the test split against all class texts"):
        before, _ = _evaluate(config, device, pretrained, samples=0)
        after, samples = _evaluate(config, device, trained, samples=6)
    result = DemoResult(out / "report.html", before, after, watch.seconds)
    with watch.step("reporting", f"{result.report}"):
        runs = {PRETRAINED: pretrained, METHOD: trained}
        _write_report(config, result, runs, packed.splits, samples)
    record = {"config": {**asdict(config), "out": str(config.out)}, "seconds": watch.seconds}
    record |= {"pretrained": before.to_dict(), "trained": after.to_dict()}
    (out / "result.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return result


def train_config(name: str, views: int, scenes: int, **sections: dict[str, Any]) -> TrainConfig:
    """The config of phase "pretrain" or "train" for so many scenes to train on; `sections` add to it."""
    tree: dict[str, Any] = {"train": {"views": views}}
    for part in (_COMMON, _PRETRAIN if name == "pretrain" else _TRAIN, sections):
        for section, values in part.items():
            tree[section] = {**tree.get(section, {}), **values}
    tree["data"]["batch_size"] = min(tree["data"]["batch_size"], scenes)
    return TrainConfig.of(tree)


def _fit(
    config: DemoConfig, device: torch.device, name: str, views: int, scenes: int, init: Path | None = None
) -> FitResult:
    result = Trainer(
        train_config(
            name,
            views,
            scenes,
            run={"dir": str(config.out / name), "seed": config.seed, "device": str(device)},
            data={"shards": str(config.out / "shards")},
            model={"init": None if init is None else str(init)},
        )
    ).fit()
    if not result.completed:
        raise KeyboardInterrupt
    return result


def _evaluate(
    config: DemoConfig, device: torch.device, run: FitResult, samples: int
) -> tuple[ZeroShotResult, list[SampleScene]]:
    trained = open_checkpoint(run.run_dir, device)
    size, view = trained.model.config.vision.image_size, trained.data.object_view
    with EvaluationLoader(config.out / "shards", 64, device=device, size=size, object_view=view) as loader:
        result = zeroshot(trained.model, loader, loader.vocabulary)
        answers = answer_samples(trained.model, loader, loader.vocabulary, scenes=samples) if samples else []
    return result, answers


def _write_report(
    config: DemoConfig,
    result: DemoResult,
    runs: dict[str, FitResult],
    splits: dict[str, dict[str, int]],
    samples: list[SampleScene],
) -> None:
    report = Report(
        "ScenarioCLIP on drawn scenes",
        "Trained from nothing on scenes drawn by a program, which knows every object's mask, every relation and the "
        "action; measured on scenes that training never saw. First one pair of towers learns from all three kinds of "
        "views, in the part of the pretrained CLIP; then ScenarioCLIP starts from it: six encoders whose lower blocks "
        "are frozen and shared, an EMA teacher and distillation.",
    )
    report.add_zeroshot(result.trained)
    curves = {name: read_metrics(run.run_dir / "metrics.jsonl") for name, run in runs.items()}
    about = (
        "The second phase has larger batches, so its losses start higher. The action's cannot reach 0: equal texts of "
        "a batch are one class, and c views of one class cost at least log(c) / 2."
    )
    report.add_pictures(config.out, result.trained, samples, curves, about)
    stages = {"before": result.pretrained, "after": result.trained}
    report.sections.append(
        Section(
            "Before and after the second phase",
            ["task, strict", *(f"top-{k} {name}" for k in result.trained.topk for name in stages)],
            [
                [
                    TASKS[level],
                    *(
                        f"{100 * row.top[k]:.1f} %"
                        for k in result.trained.topk
                        for stage in stages.values()
                        if (row := stage.get(level))
                    ),
                ]
                for level in TASKS
                if result.trained.get(level)
            ],
        )
    )
    counts = {
        f"{split} split": f"{n['scenes']:,} scenes, {n['objects']:,} objects, {n['relations']:,} relations"
        for split, n in splits.items()
    }
    speeds = {
        name: f"{run.total_steps:,} steps, {run.views:,} views in {run.seconds:.0f} s "
        f"({run.views / run.seconds:.0f} views/s), loss {run.first_loss:.2f} to {run.last_loss:.2f}"
        for name, run in runs.items()
    }
    report.add_facts(
        "How it was made",
        {
            "command": f"scenarioclip-fast demo --seed {config.seed} --scenes {config.scenes} --views {config.views}",
            **counts,
            **speeds,
            "seconds": ", ".join(f"{name} {seconds:.0f}" for name, seconds in result.seconds.items()),
            "on": f"{platform.machine()}, {_cores()} cores, torch {torch.__version__}, scenarioclip-fast {__version__}",
        },
    )
    report.write(result.report)


class _Watch:
    """Announces each step of the job and keeps how long it took."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str, what: str) -> Iterator[None]:
        print(f"[{len(self.seconds) + 1}/{self.steps}] {name}: {what}", file=sys.stderr, flush=True)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def _prepare(out: Path, config: DemoConfig) -> Path:
    """An empty place for the demo: what an earlier one left there is removed, and nothing else ever is."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a directory")
    if out.is_dir() and any(out.iterdir()) and not (out / _MARK).is_file():
        raise UserError(f"{out} holds something that no demo wrote: name another directory with --out")
    out.mkdir(parents=True, exist_ok=True)
    for folder in _FOLDERS:
        shutil.rmtree(out / folder, ignore_errors=True)
    (out / _MARK).write_text(json.dumps({"seed": config.seed, "scenes": config.scenes, "views": config.views}) + "\n")
    return out


def _cores() -> int:
    return len(os.sched_getaffinity(0))
