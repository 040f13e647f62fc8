"""The variants of an ablation: configs that differ in one part of the method."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.model.config import flat
from scenarioclip_fast.train.config import TrainConfig

# The full method, from which every variant is derived.
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
# Settings that do not affect the weights, and may differ when a run is resumed.
_NOT_AFFECTING_WEIGHTS = {
    "run.dir",
    "run.device",
    "run.timeout_s",
    "data.prefetch",
    "data.threads",
    "data.cache_gib",
    "data.shard_cache_dir",
    "data.shard_cache_gib",
    "data.verify",
    "data.max_batch_gib",
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
    """One run of the ablation, in the subdirectory `name`.

    `aliases`: other requested names for the same training run.
    """

    name: str
    config: TrainConfig
    aliases: list[str] = field(default_factory=list)

    @property
    def directory(self) -> Path:
        return Path(self.config.run.dir)


def plan_ablation(
    file: str | Path | None,
    overrides: Sequence[str] = (),
    names: Iterable[str] = DEFAULT_VARIANTS,
    custom: Mapping[str, Sequence[str]] | None = None,
) -> list[Variant]:
    """Plan the runs of an ablation.

    Requested names for the same training run ("no-distillation" and "scenarioclip0") are merged under the first name.

    Args:
        file: YAML config shared by all variants; None: the defaults.
        overrides: `key=value` strings for all variants. run.dir is the parent directory of the variants.
        names: keys of VARIANTS, in the order of the table.
        custom: custom variants: name -> `key=value` strings that override the full method.

    Raises:
        UserError: an unknown variant or key, a name that is not a valid directory name, or fewer than two variants.
    """

    def load(*more: str) -> TrainConfig:
        values = [*overrides, *more]
        return TrainConfig.load(file, values) if file is not None else TrainConfig.of({}, values)

    for text in overrides:
        if (key := text.partition("=")[0].strip()) in METHOD:
            raise UserError(f"{text}: {key} is set by the variants; remove it, or define a variant with --variant")
    root = Path(load().run.dir)
    variants: list[Variant] = []
    for name, changes in _changes(names, custom or {}).items():
        config = load(*changes, f"run.dir={root / name}")
        same = next((v for v in variants if not differences(v.config, config)), None)
        if same is None:
            variants.append(Variant(name, config))
        else:
            same.aliases.append(name)
    if len(variants) < 2:
        raise UserError(f"got {len(variants)} variant, expected at least 2 to compare")
    return variants


def _changes(names: Iterable[str], custom: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Variant -> `key=value` strings."""
    method = [f"{key}={value}" for key, value in METHOD.items()]
    changes: dict[str, list[str]] = {}
    for name in names:
        if name not in VARIANTS:
            raise UserError(f"variant {name!r}: expected one of {', '.join(VARIANTS)}")
        changes[name] = [*method, *(f"{key}={value}" for key, value in VARIANTS[name].items())]
    for name, overrides in custom.items():
        if name in VARIANTS or not _NAME.fullmatch(name):
            problem = "is built in" if name in VARIANTS else "is not a valid directory name"
            raise UserError(f"variant {name!r} {problem}; expected a new name of letters, digits, '.', '_' and '-'")
        if not overrides:
            raise UserError(f"variant {name!r}: got no changes, expected key=value after its name")
        changes[name] = [*method, *overrides]
    return changes


def differences(before: TrainConfig, after: TrainConfig) -> list[str]:
    """Describe the settings that differ and affect the weights."""
    old, new = flat(before.to_dict()), flat(after.to_dict())
    return [
        f"{key} was {old.get(key)}, is {new.get(key)}"
        for key in dict.fromkeys([*old, *new])
        if key not in _NOT_AFFECTING_WEIGHTS and old.get(key) != new.get(key)
    ]
