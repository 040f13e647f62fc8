"""Ablations: train with and without parts of the method, on the same data, seed and budget, and compare."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from scenarioclip_fast.data.config import shard_sources
from scenarioclip_fast.data.mix import ShardMix
from scenarioclip_fast.distributed import World, join_world
from scenarioclip_fast.errors import TrainingFailed, UserError
from scenarioclip_fast.eval.loading import SkippedScene, skipped_record
from scenarioclip_fast.eval.session import open_session
from scenarioclip_fast.eval.tables import text_table
from scenarioclip_fast.eval.zeroshot import MATCHES, ZeroShotResult, zeroshot
from scenarioclip_fast.files import write_text
from scenarioclip_fast.parsing import parse_json
from scenarioclip_fast.recipes.variants import Variant, differences
from scenarioclip_fast.report.accuracy import MATCH_TITLES
from scenarioclip_fast.report.comparison import accuracy_table, compare_runs, summary_table
from scenarioclip_fast.report.runs import RESULT, Run, read_run
from scenarioclip_fast.terminal import printable, warn
from scenarioclip_fast.train.config import DataSection, TrainConfig
from scenarioclip_fast.train.trainer import Trainer


@dataclass
class Ablation:
    """The state of an ablation.

    Attributes:
        directory: directory of ablation.json, report.html and one run directory per variant.
        split: the evaluation split.
        variants: all planned runs.
        results: variant -> zero-shot result, for those evaluated so far.
        skipped: variant -> scenes skipped by its evaluation.
        failures: variant -> error message.
        stopped_by: the signal that ended the ablation early.
        is_main_process: whether this process writes and prints.
    """

    directory: Path
    split: str
    variants: Sequence[Variant]
    results: dict[str, ZeroShotResult] = field(default_factory=dict)
    skipped: dict[str, list[SkippedScene]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    stopped_by: str | None = None
    is_main_process: bool = True

    @property
    def report(self) -> Path:
        return self.directory / "report.html"

    def runs(self) -> list[Run]:
        """Read the started runs, in the order of the variants."""
        started = (v for v in self.variants if (v.directory / "metrics.jsonl").is_file())
        return [read_run(v.directory, v.name) for v in started]

    def to_dict(self) -> dict[str, Any]:
        """Convert to a dict that can be serialised as JSON."""
        states = {run.name: run.state for run in self.runs()}
        return {
            "split": self.split,
            "variants": {
                v.name: {
                    "run": str(v.directory),
                    "config": v.config.to_dict(),
                    "state": self.failures.get(v.name) or states.get(v.name, "not started"),
                    "zeroshot": _record(found, self.skipped[v.name]) if (found := self.results.get(v.name)) else None,
                }
                for v in self.variants
            },
        }

    def write(self) -> None:
        """Write ablation.json."""
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        write_text(self.directory / "ablation.json", text)

    def write_report(self) -> None:
        """Write report.html, and its figures to pictures/."""
        if runs := self.runs():
            lead = (
                f"{len(self.results)} of {len(self.variants)} variants trained and evaluated, with the same seed, data "
                "and budget."
            )
            page = compare_runs(runs, self.directory / "pictures", f"Ablation: {self.directory.name}", lead)
            page.write(self.report)

    def __str__(self) -> str:
        """The comparison as a table: accuracies under both matching rules, then losses and throughput."""
        head, rows = ["", "chance", *self.results], []
        for match in MATCHES:
            found = accuracy_table(self.results, match)[1]
            rows += [[f"{row[0]}, {MATCH_TITLES[match]}", *row[1:]] for row in found]
        names, summary = summary_table([run for run in self.runs() if run.name in self.results])
        order = [names.index(name) for name in self.results]
        kept = [row for row in summary if row[0].startswith(("loss", "contrastive", "views/s"))]
        rows += [[row[0], "", *(row[i] for i in order)] for row in kept]
        table = text_table(head, rows, names=1) if self.results else "nothing to compare yet"
        failed = [printable(f"{name} failed: {error}") for name, error in self.failures.items()]
        return "\n".join([table, *failed])


def run_ablation(variants: Sequence[Variant], split: str = "test", batch_size: int = 64) -> Ablation:
    """Train and evaluate all variants, and write ablation.json and report.html.

    Finished work of an earlier call is kept, and interrupted training is resumed. If the training of a variant fails,
    the error is reported and the next variant is trained. After a signal, the state is saved and `stopped_by` is set.

    Args:
        variants: the output of `plan_ablation`.
        split: the evaluation split.
        batch_size: scenes per batch of the evaluation.

    Returns:
        The state of the ablation.

    Raises:
        UserError: no such data or split, or a variant's directory contains a run with another config.
    """
    first = variants[0]
    if not first.config.data.shards:
        raise UserError("no data: pass SHARDS, the directory written by `scenarioclip-fast pack`, or set data.shards")
    for variant in variants:
        _check_data(variant.config.data, split)
        _check_directory(variant)
    ablation = Ablation(first.directory.parent, split, variants)
    run = first.config.run
    same = {"the variants": [v.name for v in variants], "--split": split, "--batch-size": batch_size}
    with join_world(run.device, run.timeout_s, setting="run.device", same=same) as world:
        ablation.is_main_process = world.is_main_process
        for variant in variants:
            for name in variant.aliases:
                _log(world, f"{name} is the same as {variant.name}, and is trained only once")
        for number, variant in enumerate(variants, 1):
            where = f"[{number}/{len(variants)}] {variant.name}"
            try:
                ablation.stopped_by = _train(variant, world, where)
                if ablation.stopped_by is not None:
                    break
                found = _evaluate(variant, split, batch_size, world, where)
                ablation.results[variant.name], ablation.skipped[variant.name] = found
            except TrainingFailed as error:
                ablation.failures[variant.name] = str(error)
                _log(world, f"{where}: failed: {error}")
            if world.is_main_process:
                ablation.write()
        if world.is_main_process:
            ablation.write_report()
    return ablation


def _train(variant: Variant, world: World, where: str) -> str | None:
    """Train or resume a variant; return what stopped it early, or None."""
    if world.gather(_finished(variant))[0]:
        _log(world, f"{where}: already trained")
        return None
    resume = (variant.directory / "checkpoints").is_dir()
    _log(world, f"{where}: {'resuming' if resume else 'training in'} {variant.directory}")
    result = Trainer(variant.config, resume=resume).fit()
    # Free the memory for the next variant, and reset torch.compile so that it does not count as a recompilation.
    gc.collect()
    torch.compiler.reset()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return None if result.completed else result.stopped_by or "a call of stop()"


def _evaluate(
    variant: Variant, split: str, batch_size: int, world: World, where: str
) -> tuple[ZeroShotResult, list[SkippedScene]]:
    path = variant.directory / RESULT
    stored = _stored_result(path, variant, split) if world.is_main_process else None
    known: ZeroShotResult | None = world.gather(stored)[0]
    if known is not None:
        _log(world, f"{where}: already evaluated")
        return known, []
    _log(world, f"{where}: evaluating on the {split} split")
    data = variant.config.data
    with (
        open_session(
            variant.directory,
            data.shards,
            device=str(world.device),
            batch_size=batch_size,
            # An earlier call may have trained the run with other settings.
            shard_cache_dir=data.shard_cache_dir,
            shard_cache_gib=data.shard_cache_gib,
            verify=data.verify,
        ) as session,
        session.loader(split) as loader,
    ):
        result = zeroshot(session.model, loader, loader.vocabulary, split=split, world=session.world)
    if world.is_main_process:
        text = json.dumps(_record(result, session.skipped), indent=2) + "\n"
        write_text(path, text)
    return result, session.skipped


def _stored_result(path: Path, variant: Variant, split: str) -> ZeroShotResult | None:
    """The result of an earlier call, if it is for this model and all scenes of this split."""
    try:
        if path.stat().st_mtime < (variant.directory / "model" / "model.safetensors").stat().st_mtime:
            return None
        data = parse_json(path.read_bytes())
        result, skipped = ZeroShotResult.from_dict(data), data["skipped"]["count"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return result if result.split == split and not skipped else None


def _record(result: ZeroShotResult, skipped: Sequence[SkippedScene]) -> dict[str, Any]:
    """The same record as `eval zeroshot --json` writes."""
    return {**result.to_dict(), "skipped": skipped_record(skipped)}


def _finished(variant: Variant) -> bool:
    return (variant.directory / "model" / "model.safetensors").is_file()


def _check_data(data: DataSection, split: str) -> None:
    for name in dict.fromkeys(("train", split)):
        ShardMix(shard_sources(data.shards), name).check_masks(data.relation_view)


def _check_directory(variant: Variant) -> None:
    file = variant.directory / "config.yaml"
    if not file.is_file() or not (_finished(variant) or (variant.directory / "checkpoints").is_dir()):
        return
    if changed := differences(TrainConfig.load(file), variant.config):
        raise UserError(
            f"{variant.directory} contains a run with another config ({'; '.join(changed)}): remove it, or set "
            "another run.dir"
        )


def _log(world: World, text: str) -> None:
    if world.is_main_process:
        warn(text)
