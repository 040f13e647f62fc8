"""The whole pipeline on synthetic scenes, with the same public functions as for real data.

Generates scenes in the published layout, packs them, trains one pair of towers from scratch on all three kinds of views
(in place of a pretrained CLIP), initialises ScenarioCLIP from it as the paper does from CLIP (lower blocks frozen and
shared, six encoders, EMA teacher, distillation), evaluates on held-out scenes, and writes a report.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import torch

from scenarioclip_fast import __version__
from scenarioclip_fast.data.config import LoaderConfig
from scenarioclip_fast.data.packing.packer import pack
from scenarioclip_fast.data.synthetic.write import generate_published_layout
from scenarioclip_fast.devices import pick_device
from scenarioclip_fast.distributed import world_size
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.eval.checkpoint import open_checkpoint
from scenarioclip_fast.eval.loading import EvaluationLoader
from scenarioclip_fast.eval.samples import SampleScene, predict_samples
from scenarioclip_fast.eval.tables import TASKS, percent
from scenarioclip_fast.eval.zeroshot import ZeroShotResult, zeroshot
from scenarioclip_fast.files import write_text
from scenarioclip_fast.recipes.steps import StepTimer, cores, prepare_directory
from scenarioclip_fast.report.evaluation import training_section, zeroshot_figures, zeroshot_tables
from scenarioclip_fast.report.page import Report, Section
from scenarioclip_fast.requirements import require
from scenarioclip_fast.terminal import printable
from scenarioclip_fast.train.config import TrainConfig
from scenarioclip_fast.train.metrics import read_metrics
from scenarioclip_fast.train.trainer import FitResult, Trainer

MIN_SCENES = 40  # with fewer, splits may be empty
PRETRAIN_FRACTION = 5 / 12  # of the training budget
PRETRAINED, METHOD = "Phase 1: PyramidCLIP from scratch", "Phase 2: ScenarioCLIP, initialised from phase 1"
_MARKER = "demo.json"  # marks a directory that a demo may clear
_FOLDERS = ("scenes", "shards", "pretrain", "train")

# Both phases: tiny towers, 64-pixel views, all decoded images cached in memory. Equal texts in a batch are positives,
# since with ten actions every batch has duplicates.
_COMMON: dict[str, Any] = {
    "data": {"object_view": "crop", "cache_gib": 1.0},
    "model": {"preset": "tiny"},
    "loss": {"duplicates": "positives", "teacher_decay": 0.99, "teacher_warmup": 50},
    "optim": {"lr": 1e-3, "weight_decay": 0.1, "betas": [0.9, 0.98]},
    "train": {"checkpoint_every": 1_000_000, "tensorboard": False},
}
# Phase 1 has small batches, for many steps; phase 2 has larger ones, for more negatives.
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
    """Options of the demo; `views` is the total budget of both training phases."""

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
    """Accuracies on the test split after each training phase, and the seconds per step of the pipeline."""

    report: Path
    pretrained: ZeroShotResult
    trained: ZeroShotResult
    seconds: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items())
        total = sum(self.seconds.values())
        return f"{self.trained.only('own')}\n\n{total:.0f} s in total: {parts}\nreport: {printable(self.report)}"


def run_demo(config: DemoConfig) -> DemoResult:
    """Run the demo; writes `report.html`, figures and `result.json` to `config.out`.

    Raises:
        UserError: `config.out` is not empty and was not written by a demo, or there are several ranks.
        KeyboardInterrupt: a signal stopped training.
    """
    if world_size() > 1:
        raise UserError(f"the demo runs in one process: got WORLD_SIZE={world_size()}; start it without torchrun")
    require("matplotlib")  # before the training
    device = pick_device(config.device)
    options = {"seed": config.seed, "scenes": config.scenes, "views": config.views}
    out = prepare_directory(config.out, _MARKER, _FOLDERS, options)
    timer = StepTimer(6)
    with timer.step("generating", f"{config.scenes:,} scenes in the published layout"):
        generate_published_layout(config.scenes, out / "scenes", seed=config.seed, workers=cores())
    with timer.step("packing", "checks, run-length masks, shards"):
        packed = pack(out / "scenes", out / "shards")
    first, scenes = ceil(config.views * PRETRAIN_FRACTION), packed.splits["train"]["scenes"]
    with timer.step("training from scratch", "one pair of towers on all views, in place of a pretrained CLIP"):
        pretrained = _fit(config, device, "pretrain", first, scenes)
    with timer.step("training ScenarioCLIP", "six encoders, EMA teacher and distillation"):
        trained = _fit(config, device, "train", config.views - first, scenes, pretrained.model_dir)
    with timer.step("evaluating", "zero-shot on the test split"):
        before, _ = evaluate(config, device, pretrained, samples=0)
        after, samples = evaluate(config, device, trained, samples=6)
    result = DemoResult(out / "report.html", before, after, timer.seconds)
    with timer.step("reporting", f"{result.report}"):
        runs = {PRETRAINED: pretrained, METHOD: trained}
        _write_report(config, result, runs, packed.splits, samples)
    record = {"config": {**asdict(config), "out": str(config.out)}, "seconds": timer.seconds}
    record |= {"pretrained": before.to_dict(), "trained": after.to_dict()}
    write_text(out / "result.json", json.dumps(record, indent=2) + "\n")
    return result


def train_config(name: str, views: int, scenes: int, **sections: dict[str, Any]) -> TrainConfig:
    """The config of phase "pretrain" or "train"; `sections` override it, and batches have at most `scenes` scenes."""
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


def evaluate(
    config: DemoConfig, device: torch.device, run: FitResult, samples: int
) -> tuple[ZeroShotResult, list[SampleScene]]:
    """Evaluate `run` on the test split of `config.out`/shards; predict the first `samples` scenes."""
    trained = open_checkpoint(run.run_dir, device)
    size, loading = trained.model.config.vision.image_size, LoaderConfig(object_view=trained.data.object_view)
    with EvaluationLoader(config.out / "shards", 64, loading, device=device, size=size) as loader:
        result = zeroshot(trained.model, loader, loader.vocabulary)
        predictions = predict_samples(trained.model, loader, loader.vocabulary, scenes=samples) if samples else []
    return result, predictions


def _write_report(
    config: DemoConfig,
    result: DemoResult,
    runs: dict[str, FitResult],
    splits: dict[str, dict[str, int]],
    samples: list[SampleScene],
) -> None:
    report = Report(
        "ScenarioCLIP on synthetic scenes",
        "Trained from scratch on synthetic scenes with exact masks, relations and actions; evaluated on other scenes. "
        "First, one pair of towers is trained on all three kinds of views, in place of a pretrained CLIP. ScenarioCLIP "
        "is initialised from it: six encoders with frozen, shared lower blocks, an EMA teacher and distillation.",
    )
    report.sections += zeroshot_tables(result.trained) + zeroshot_figures(result.trained, samples, config.out)
    curves = {name: read_metrics(run.run_dir / "metrics.jsonl") for name, run in runs.items()}
    note = (
        "The second phase has larger batches, so its losses start higher. The action loss cannot reach 0: equal texts "
        "in a batch are one class, and c views of the same class have a loss of at least log(c) / 2."
    )
    report.sections += [training_section(curves, config.out, note), _phases(result)]
    report.add_facts("Reproduction", _facts(config, result, runs, splits))
    report.write(result.report)


def _phases(result: DemoResult) -> Section:
    """Strict accuracies before and after the second phase."""
    phases = {"before": result.pretrained, "after": result.trained}
    head = ["task, strict", *(f"top-{k} {name}" for k in result.trained.topk for name in phases)]
    rows = []
    for level in TASKS:
        if result.trained.get(level):
            found = [(phase.get(level), k) for k in result.trained.topk for phase in phases.values()]
            rows.append([TASKS[level], *(percent(row.top[k]) for row, k in found if row)])
    return Section("Accuracy before and after the second phase", head, rows)


def _facts(
    config: DemoConfig, result: DemoResult, runs: dict[str, FitResult], splits: dict[str, dict[str, int]]
) -> dict[str, str]:
    counts = {
        f"{split} split": f"{n['scenes']:,} scenes, {n['objects']:,} objects, {n['relations']:,} relations"
        for split, n in splits.items()
    }
    speeds = {
        name: f"{run.total_steps:,} steps, {run.views:,} views in {run.seconds:.0f} s "
        f"({run.views / run.seconds:.0f} views/s), loss {run.first_loss:.2f} to {run.last_loss:.2f}"
        for name, run in runs.items()
    }
    return {
        "command": f"scenarioclip-fast demo --seed {config.seed} --scenes {config.scenes} --views {config.views}",
        **counts,
        **speeds,
        "seconds": ", ".join(f"{name} {seconds:.0f}" for name, seconds in result.seconds.items()),
        "environment": f"{platform.machine()}, {cores()} cores, torch {torch.__version__}, "
        f"scenarioclip-fast {__version__}",
    }
