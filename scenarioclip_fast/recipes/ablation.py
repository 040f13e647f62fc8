"""Ablations: the same data, seed and budget, trained with and without a part of the method, and compared."""

from __future__ import annotations

import gc
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from scenarioclip_fast.data.shards import ShardSet
from scenarioclip_fast.distributed import World, join_world
from scenarioclip_fast.errors import TrainingFailed, UserError
from scenarioclip_fast.eval.loading import LeftOut, left_out_record
from scenarioclip_fast.eval.session import open_session
from scenarioclip_fast.eval.tables import text_table
from scenarioclip_fast.eval.zeroshot import MATCHES, ZeroShotResult, zeroshot
from scenarioclip_fast.model.config import flat
from scenarioclip_fast.report.curves import MATCH_TITLES
from scenarioclip_fast.report.runs import RESULT, Run, accuracy_table, compare_runs, read_run, summary_table
from scenarioclip_fast.train.config import DataSection, TrainConfig
from scenarioclip_fast.train.trainer import Trainer

# The whole method; every variant starts from it.
METHOD = {"model.variant": "scenarioclip1", "data.relation_view": "focused"}
VARIANTS: dict[str, dict[str, str]] = {
    "full": {},
    "no-distillation": {"model.variant": "scenarioclip0"},
    "no-focused-regions": {"data.relation_view": "scene"},
    "relation-boxes": {"data.relation_view": "box"},
    "scenarioclip1": {},
    "scenarioclip0": {"model.variant": "scenarioclip0"},
    "pyramidclip": {"model.variant": "pyramidclip"},
}
DEFAULT_VARIANTS = ("full", "no-distillation", "no-focused-regions", "pyramidclip")
# What may differ between the two parts of a run that was cut off: it changes no weight.
_HARMLESS = {
    "run.dir",
    "run.device",
    "run.timeout_s",
    "data.prefetch",
    "data.threads",
    "data.cache_gib",
    "data.shard_cache_dir",
    "data.shard_cache_gib",
    "train.log_every",
    "train.checkpoint_every",
    "train.checkpoint_minutes",
    "train.keep_checkpoints",
    "train.tensorboard",
    "train.profile",
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Variant:
    """One run of the ablation; its run.dir is a directory of its name in the ablation's.

    `also`: other names that were asked for and mean the same training.
    """

    name: str
    config: TrainConfig
    also: list[str] = field(default_factory=list)

    @property
    def directory(self) -> Path:
        return Path(self.config.run.dir)


@dataclass
class Ablation:
    """What has been done so far. `left_out` has the scenes that could not be used in an evaluation, `stopped_by` names
    the signal that ended it before its end, and among several ranks the main one, which writes and prints."""

    directory: Path
    split: str
    variants: Sequence[Variant]
    results: dict[str, ZeroShotResult] = field(default_factory=dict)
    left_out: dict[str, list[LeftOut]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    stopped_by: str | None = None
    is_main_process: bool = True

    @property
    def report(self) -> Path:
        return self.directory / "report.html"

    def runs(self) -> list[Run]:
        """Those that have begun, in the order of the variants."""
        begun = (v for v in self.variants if (v.directory / "metrics.jsonl").is_file())
        return [read_run(v.directory, v.name) for v in begun]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        states = {run.name: run.state for run in self.runs()}
        return {
            "split": self.split,
            "variants": {
                v.name: {
                    "run": str(v.directory),
                    "config": v.config.to_dict(),
                    "state": self.failures.get(v.name) or states.get(v.name, "not begun"),
                    "zeroshot": _record(found, self.left_out[v.name]) if (found := self.results.get(v.name)) else None,
                }
                for v in self.variants
            },
        }

    def write(self) -> None:
        """Writes ablation.json."""
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        (self.directory / "ablation.json").write_text(text, encoding="utf-8")

    def write_report(self) -> None:
        """Writes report.html, and its pictures beside it."""
        if runs := self.runs():
            lead = (
                f"{len(self.results)} of {len(self.variants)} variants trained and evaluated; one seed, data, budget."
            )
            page = compare_runs(runs, self.directory / "pictures", f"Ablation: {self.directory.name}", lead)
            page.write(self.report)

    def __str__(self) -> str:
        """The comparison as one table: accuracies under both rules, then losses and speed."""
        head, rows = ["", "chance", *self.results], []
        for match in MATCHES:
            found = accuracy_table(self.results, match)[1]
            rows += [[f"{row[0]}, {MATCH_TITLES[match]}", *row[1:]] for row in found]
        names, summary = summary_table([run for run in self.runs() if run.name in self.results])
        order = [names.index(name) for name in self.results]
        kept = [row for row in summary if row[0].startswith(("loss", "contrastive", "views/s"))]
        rows += [[row[0], "", *(row[i] for i in order)] for row in kept]
        table = text_table(head, rows, names=1) if self.results else "nothing to compare yet"
        failed = [f"{name} failed: {why}" for name, why in self.failures.items()]
        return "\n".join([table, *failed])


def plan_ablation(
    file: str | Path | None,
    overrides: Sequence[str] = (),
    names: Iterable[str] = DEFAULT_VARIANTS,
    own: Mapping[str, Sequence[str]] | None = None,
) -> list[Variant]:
    """The runs of an ablation.

    Args:
        file: YAML config that all share; None: the defaults.
        overrides: `key=value`, for all. Its run.dir holds the variants.
        names: of VARIANTS, in the order of the table.
        own: further variants: name -> `key=value` strings that make it differ from the full method.

    Names that ask for one and the same training ("no-distillation" and "scenarioclip0") become one run, of the first
    name.

    Raises:
        UserError: an unknown variant or key, a name that is no directory's, none or one variant only.
    """

    def load(*more: str) -> TrainConfig:
        given = [*overrides, *more]
        return TrainConfig.load(file, given) if file is not None else TrainConfig.of({}, given)

    for text in overrides:
        if (key := text.partition("=")[0].strip()) in METHOD:
            raise UserError(f"{text}: the variants set {key}; leave it out, or name a variant of your own")
    root = Path(load().run.dir)
    wanted: dict[str, list[str]] = {}
    for name in names:
        if name not in VARIANTS:
            raise UserError(f"variant {name!r}: expected one of {', '.join(VARIANTS)}")
        wanted[name] = [f"{key}={value}" for key, value in {**METHOD, **VARIANTS[name]}.items()]
    for name, changes in (own or {}).items():
        if name in VARIANTS or not _NAME.fullmatch(name):
            problem = "is a built-in one" if name in VARIANTS else "can be no directory's name"
            raise UserError(f"variant {name!r} {problem}; expected a new name of letters, digits, '.', '_' and '-'")
        if not changes:
            raise UserError(f"variant {name!r}: got no changes, expected key=value after its name")
        wanted[name] = [*(f"{key}={value}" for key, value in METHOD.items()), *changes]
    variants: list[Variant] = []
    for name, changes in wanted.items():
        config = load(*changes, f"run.dir={root / name}")
        same = next((v for v in variants if not _differences(v.config, config)), None)
        if same is None:
            variants.append(Variant(name, config))
        else:
            same.also.append(name)
    if len(variants) < 2:
        raise UserError(f"got {len(variants)} variant, expected at least 2 to compare")
    return variants


def run_ablation(variants: Sequence[Variant], split: str = "test", batch_size: int = 64) -> Ablation:
    """Trains what is not trained yet, evaluates what is not evaluated yet, and writes ablation.json and report.html.

    What an earlier call has finished is kept, and what it has begun is resumed. A variant whose training fails is
    reported, and the others go on. After a signal the state is saved and the result says so.

    Args:
        variants: of `plan_ablation`.
        split: of the evaluation.
        batch_size: scenes at a time in the evaluation.

    Raises:
        UserError: no such data or split, or a variant's directory holds a run of another config.
    """
    first = variants[0]
    if not first.config.data.shards:
        raise UserError("no data: give SHARDS, the directory that `scenarioclip-fast pack` wrote, or set data.shards")
    for variant in variants:
        _check_data(variant.config.data, split)
        _check_directory(variant)
    ablation = Ablation(first.directory.parent, split, variants)
    with join_world(first.config.run.device) as world:
        ablation.is_main_process = world.is_main_process
        for variant in variants:
            for name in variant.also:
                _say(world, f"{name} is {variant.name} by another name: trained once")
        for number, variant in enumerate(variants, 1):
            where = f"[{number}/{len(variants)}] {variant.name}"
            try:
                ablation.stopped_by = _train(variant, world, where)
                if ablation.stopped_by is not None:
                    break
                found = _evaluate(variant, split, batch_size, world, where)
                ablation.results[variant.name], ablation.left_out[variant.name] = found
            except TrainingFailed as error:
                ablation.failures[variant.name] = str(error)
                _say(world, f"{where}: failed: {error}")
            if world.is_main_process:
                ablation.write()
        if world.is_main_process:
            ablation.write_report()
    return ablation


def _train(variant: Variant, world: World, where: str) -> str | None:
    """Returns what ended it early, if something did."""
    if world.gather(_finished(variant))[0]:
        _say(world, f"{where}: trained already")
        return None
    begun = (variant.directory / "checkpoints").is_dir()
    _say(world, f"{where}: {'going on with' if begun else 'training in'} {variant.directory}")
    result = Trainer(variant.config, resume=begun).fit()
    # The next variant has the memory to itself, and its blocks do not count as recompilations of this one's.
    gc.collect()
    torch.compiler.reset()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return None if result.completed else result.stopped_by or "a call of stop()"


def _evaluate(
    variant: Variant, split: str, batch_size: int, world: World, where: str
) -> tuple[ZeroShotResult, list[LeftOut]]:
    path = variant.directory / RESULT
    known: ZeroShotResult | None = world.gather(_known_result(path, variant, split) if world.is_main_process else None)[
        0
    ]
    if known is not None:
        _say(world, f"{where}: evaluated already")
        return known, []
    _say(world, f"{where}: evaluating on the {split} split")
    data = variant.config.data
    with (
        open_session(
            variant.directory,
            data.shards,
            device=str(world.device),
            batch_size=batch_size,
            # a run that was trained by an earlier call may have had it elsewhere
            shard_cache_dir=data.shard_cache_dir,
            shard_cache_gib=data.shard_cache_gib,
        ) as session,
        session.loader(split) as loader,
    ):
        result = zeroshot(session.model, loader, loader.vocabulary, split=split, world=session.world)
    if world.is_main_process:
        text = json.dumps(_record(result, session.left_out), indent=2) + "\n"
        path.write_text(text, encoding="utf-8")
    return result, session.left_out


def _known_result(path: Path, variant: Variant, split: str) -> ZeroShotResult | None:
    """That of an earlier call, of this model and all scenes of this split."""
    try:
        if path.stat().st_mtime < (variant.directory / "model" / "model.safetensors").stat().st_mtime:
            return None
        data = json.loads(path.read_text(encoding="utf-8"))
        result, left_out = ZeroShotResult.from_dict(data), data["left_out"]["count"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return result if result.split == split and not left_out else None


def _record(result: ZeroShotResult, left_out: Sequence[LeftOut]) -> dict[str, Any]:
    """What `eval zeroshot --json` writes."""
    return {**result.to_dict(), "left_out": left_out_record(left_out)}


def _finished(variant: Variant) -> bool:
    return (variant.directory / "model" / "model.safetensors").is_file()


def _check_data(data: DataSection, split: str) -> None:
    shards = ShardSet(data.shards, split, shard_cache_dir=data.shard_cache_dir, shard_cache_gib=data.shard_cache_gib)
    scenes = len(shards)
    shards.close()
    if scenes == 0:
        raise UserError(f"{data.shards}: the {split} split holds no scenes to evaluate on; choose another with --split")


def _check_directory(variant: Variant) -> None:
    file = variant.directory / "config.yaml"
    if not file.is_file() or not (_finished(variant) or (variant.directory / "checkpoints").is_dir()):
        return
    if changed := _differences(TrainConfig.load(file), variant.config):
        raise UserError(
            f"{variant.directory} holds a run of another config ({'; '.join(changed)}): remove it, or set another "
            "run.dir"
        )


def _differences(before: TrainConfig, now: TrainConfig) -> list[str]:
    old, new = flat(before.to_dict()), flat(now.to_dict())
    return [
        f"{key} was {old.get(key)}, is {new.get(key)}"
        for key in dict.fromkeys([*old, *new])
        if key not in _HARMLESS and old.get(key) != new.get(key)
    ]


def _say(world: World, text: str) -> None:
    if world.is_main_process:
        print(text, file=sys.stderr, flush=True)
