"""The run's config: typed sections, read from YAML, overridden by `key=value`.

A key that does not exist, a value of the wrong type and a value out of range are each one UserError that
names the key.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from scenarioclip_fast.data.config import LoaderConfig
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.model.config import PRESETS, FreezeConfig, ModelConfig, TextConfig, VisionConfig
from scenarioclip_fast.requirements import require

C = TypeVar("C")

_BUDGETS = ("steps", "epochs", "views")
# What other trainers call our keys.
_ELSEWHERE = {
    "learning_rate": "optim.lr",
    "rate": "optim.lr",
    "max_steps": "train.steps",
    "max_epochs": "train.epochs",
    "output_dir": "run.dir",
    "gradient_accumulation_steps": "train.accumulate",
    "accumulate_grad_batches": "train.accumulate",
    "accum_freq": "train.accumulate",
}


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """Where the run lives and what it runs on."""

    dir: str = "runs/train"  # metrics, checkpoints and the trained model go here
    seed: int = 0
    device: str = "auto"  # auto | cpu | cuda | cuda:1; under torchrun each rank takes its own GPU
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    backend: Literal["auto", "reference", "cpu", "triton", "cuda"] = "auto"  # of the ops
    timeout_s: float = 600.0  # a rank that does not appear, is silent, or in one collective for so long ends the others

    def __post_init__(self) -> None:
        _check(bool(self.dir), "run.dir", self.dir, "a directory")
        _check(self.timeout_s > 0, "run.timeout_s", self.timeout_s, "above 0")
        _check(0 <= self.seed < 2**63, "run.seed", self.seed, "at least 0")


@dataclass(frozen=True, kw_only=True)
class DataSection(LoaderConfig):
    """The data set, and how its scenes become batches: the fields of `LoaderConfig` are keys of this section too."""

    shards: str = ""  # the directory that `scenarioclip-fast pack` wrote, or its URL (s3://, gs://, hf://, https://)
    batch_size: int = 128  # scenes per optimiser step, over all ranks together

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")


@dataclass(frozen=True, kw_only=True)
class ModelSection(ModelConfig):
    """The model, and the weights to start from. `ModelSection.preset("tiny")` makes one from a preset.

    In files and overrides, the key model.preset chooses the preset that the other keys change.
    """

    init: str | None = None  # a save_pretrained directory or a CLIP checkpoint; null: random weights

    @property
    def architecture(self) -> ModelConfig:
        return ModelConfig(**{f.name: getattr(self, f.name) for f in fields(ModelConfig)})


@dataclass(frozen=True, kw_only=True)
class LossSection:
    """Contrastive and distillation terms, and the teacher behind the second."""

    init_temperature: float = 0.07
    max_scale: float = 100.0  # upper bound of 1 / temperature
    duplicates: Literal["negatives", "positives"] = "negatives"  # equal texts of a batch
    distillation_scale: float = 1.0  # 1: as published, nearly nothing; model.embed_dim: a share that counts; 0: none
    teacher_decay: float = 0.9995
    teacher_warmup: int = 2000  # steps
    # "distillation" averages the three encoders that it asks for, "all" every one, for `eval --weights teacher`
    teacher_scope: Literal["distillation", "all"] = "distillation"

    def __post_init__(self) -> None:
        _check(self.init_temperature > 0, "loss.init_temperature", self.init_temperature, "above 0")
        _check(self.max_scale >= 1, "loss.max_scale", self.max_scale, "at least 1")
        _check(self.distillation_scale >= 0, "loss.distillation_scale", self.distillation_scale, "at least 0")
        _check(0 <= self.teacher_decay < 1, "loss.teacher_decay", self.teacher_decay, "from 0 to below 1")
        _check(self.teacher_warmup >= 0, "loss.teacher_warmup", self.teacher_warmup, "at least 0")


@dataclass(frozen=True, kw_only=True)
class OptimSection:
    """The optimiser, with linear warm-up and a cosine to zero."""

    name: str = "adamw"  # one of train.optim.OPTIMIZERS
    lr: float = 2e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.2  # not on biases and norms
    decay_logit_scale: bool = False  # True: the published run's quirk
    warmup: float = 0.1  # share of all steps
    warmup_start: float = 1e-3  # first rate, as a share of lr
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        _check(self.lr > 0, "optim.lr", self.lr, "above 0")
        _check(all(0 <= b < 1 for b in self.betas), "optim.betas", self.betas, "two numbers from 0 to below 1")
        _check(self.eps > 0, "optim.eps", self.eps, "above 0")
        _check(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "at least 0")
        _check(0 <= self.warmup <= 1, "optim.warmup", self.warmup, "a share between 0 and 1")
        _check(0 <= self.warmup_start <= 1, "optim.warmup_start", self.warmup_start, "a share between 0 and 1")
        _check(self.clip_norm > 0, "optim.clip_norm", self.clip_norm, "above 0")


@dataclass(frozen=True, kw_only=True)
class TrainSection:
    """How long, and what is written on the way. Exactly one of steps, epochs and views is set."""

    steps: int | None = None
    epochs: float | None = None
    views: int | None = None  # turned into steps by the mean number of views of a scene
    log_every: int = 10  # steps; the only regular points where the host waits for the device
    checkpoint_every: int = 500  # steps
    checkpoint_minutes: float | None = 30.0  # and at the first log interval after so long without one; null: never
    keep_checkpoints: int = 2  # the newest; the one with the lowest mean loss over 100 steps stays beside them
    max_skipped: int = 10  # so many steps in a row with a loss or gradient that is not finite end the run
    tensorboard: bool = True  # where it is installed
    # The step in so many pieces, the loss over the whole batch all the same: the activations of one piece in memory,
    # for one more forward pass of the trained blocks over all but one. Divides the scenes that a rank has of a batch.
    accumulate: int = 1
    # On several ranks: "ddp" keeps everything on each of them, "fsdp" spreads what trains over them, for large towers
    parallel: Literal["ddp", "fsdp"] = "ddp"
    activation_checkpointing: bool = False  # keeps each block's input alone: less memory, one more forward pass
    # torch.compile of the transformer blocks; the first steps take a minute or more. "auto": on a GPU, not on a CPU
    compile: Literal[True, False, "auto"] = False
    # CUDA graphs of the compiled vision blocks, rows padded to few sizes: for small batches, where a GPU waits for
    # launches. Wants compile. Not yet measured.
    cuda_graphs: bool = False
    # First and last step (from 1) of a torch.profiler trace in RUN/profile, by the leading rank; null: none
    profile: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        given = [name for name in _BUDGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"got {' and '.join(f'train.{n}' for n in given)}, expected only one of them")
        minutes = self.checkpoint_minutes
        _check(minutes is None or minutes > 0, "train.checkpoint_minutes", minutes, "above 0, or null")
        for name in (*given, "log_every", "checkpoint_every", "keep_checkpoints", "max_skipped", "accumulate"):
            _check(getattr(self, name) > 0, f"train.{name}", getattr(self, name), "above 0")
        first, last = self.profile or (1, 1)
        _check(1 <= first <= last, "train.profile", self.profile, "the first and the last step, counted from 1")
        if self.cuda_graphs and not self.compile:
            raise UserError(
                "train.cuda_graphs: got true, expected train.compile=true or auto: the compiled blocks are captured"
            )
        if self.cuda_graphs and self.parallel == "fsdp":
            raise UserError("got train.cuda_graphs and train.parallel=fsdp, expected only one of them")
        if self.cuda_graphs and self.activation_checkpointing:
            raise UserError("got train.cuda_graphs and train.activation_checkpointing, expected only one of them")

    def compiles_on(self, device_type: str) -> bool:
        """Whether the transformer blocks are compiled on "cpu" or "cuda"."""
        return device_type == "cuda" if self.compile == "auto" else self.compile


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run. RUN/config.yaml holds it, and `load` reads an equal one back."""

    run: RunSection = field(default_factory=RunSection)
    data: DataSection = field(default_factory=DataSection)
    model: ModelSection = field(default_factory=ModelSection)
    loss: LossSection = field(default_factory=LossSection)
    optim: OptimSection = field(default_factory=OptimSection)
    train: TrainSection = field(default_factory=TrainSection)

    @classmethod
    def of(cls, values: Mapping[str, Any] | None = None, overrides: Iterable[str] = ()) -> TrainConfig:
        """From a nested mapping (a YAML file's content) and `dotted.key=value` strings, which win.

        A budget (train.steps, train.epochs, train.views) among the overrides replaces the mapping's budget.
        Raises UserError for an unknown key, a wrong type and a value out of range.
        """
        tree = _plain("", values or {})
        given = [_parse_override(text) for text in overrides]
        if any(path[0] == "train" and path[-1] in _BUDGETS for path, _ in given):
            section = tree.get("train")
            if isinstance(section, dict):
                for name in _BUDGETS:
                    section.pop(name, None)
        for path, value in given:
            _set(tree, path, value)
        model = tree.get("model")
        if isinstance(model, dict):
            preset = _convert("model.preset", Literal[PRESETS], model.pop("preset", PRESETS[0]))
            tree["model"] = _merge(ModelConfig.preset(preset).to_dict(), model)
        config: TrainConfig = _convert("", cls, tree)
        return config

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> TrainConfig:
        """From a YAML file and overrides: see `of`."""
        yaml = require("yaml")
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the config {path}: {getattr(error, 'strerror', None) or error}") from None
        except yaml.YAMLError as error:
            raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict | None):
            raise UserError(f"{path}: got {_kind(values)}, expected a mapping with the sections {_sections()}")
        return cls.of(values, overrides)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, fit for YAML and JSON."""
        return _lists(asdict(self))

    def save(self, path: str | Path) -> None:
        """As YAML."""
        Path(path).write_text(require("yaml").safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")


class _Raw(str):
    """The text of an override: what it means depends on the type of its key."""


def _check(good: bool, key: str, got: object, expected: str) -> None:
    if not good:
        raise UserError(f"{key}: got {got!r}, expected {expected}")


def _sections() -> str:
    return ", ".join(f.name for f in fields(TrainConfig))


def _parse_override(text: str) -> tuple[list[str], _Raw]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"got {text!r}, expected key=value, for example optim.lr=1e-4")
    return key.strip().split("."), _Raw(value.strip())


def _plain(prefix: str, values: Mapping[Any, Any]) -> dict[str, Any]:
    """A deep copy as dicts; an empty section of a file (None) is an empty mapping."""
    copy: dict[str, Any] = {}
    for key, value in values.items():
        if not isinstance(key, str):
            raise UserError(f"{prefix}{key!r}: got a key of type {type(key).__name__}, expected a name")
        if value is None and not prefix:
            value = {}
        copy[key] = _plain(f"{prefix}{key}.", value) if isinstance(value, Mapping) else value
    return copy


def _lists(values: dict[str, Any]) -> dict[str, Any]:
    """Tuples as lists, which is what YAML and JSON make of them."""
    kinds = ((name, value, type(value)) for name, value in values.items())
    return {name: _lists(v) if kind is dict else list(v) if kind is tuple else v for name, v, kind in kinds}


def _set(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        inner = tree.setdefault(part, {})
        if not isinstance(inner, dict):
            inner = tree[part] = {}
        tree = inner
    tree[path[-1]] = value


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return merged


def _keys(cls: Any, prefix: str = "") -> list[str]:
    """All dotted keys, sections included."""
    hints = get_type_hints(cls)
    keys: list[str] = []
    for f in fields(cls):
        keys.append(prefix + f.name)
        if is_dataclass(hints[f.name]):
            keys += _keys(hints[f.name], f"{prefix}{f.name}.")
    return keys


def _unknown(key: str, siblings: list[str]) -> UserError:
    # The last part may be right and the section wrong (train.lr), or the other way round (optim.decay).
    known = [*_keys(TrainConfig), "model.preset"]
    name = key.rpartition(".")[2]
    near = [_ELSEWHERE[name]] if name in _ELSEWHERE else [k for k in known if k.rpartition(".")[2] == name]
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if near:
        return UserError(f"unknown config key {key}: did you mean {near[0]}?")
    nearest = difflib.get_close_matches(key, siblings, n=1, cutoff=0.0)[0]
    return UserError(f"unknown config key {key}: the nearest is {nearest}; expected one of {', '.join(siblings)}")


def _convert(key: str, wanted: Any, value: Any) -> Any:
    """`value` as the type `wanted`, or UserError that names `key` (dotted; "" for the whole config)."""
    if is_dataclass(wanted) and isinstance(wanted, type):
        return _convert_section(key, wanted, value)
    origin = get_origin(wanted)
    if origin in (Union, types.UnionType):
        if value is None or (isinstance(value, _Raw) and value.lower() in ("null", "none", "~", "")):
            return None
        return _convert(key, next(a for a in get_args(wanted) if a is not type(None)), value)
    if origin is Literal:
        choices = get_args(wanted)
        if isinstance(value, _Raw) and bool in map(type, choices):
            value = _scalar(key, value)
        for choice in choices:
            if choice == value and isinstance(value, type(choice)):  # 1 is not true
                return choice
        shown = (str(c).lower() if isinstance(c, bool) else c for c in choices)
        raise UserError(f"{key}: got {_shown(value)}, expected one of {', '.join(shown)}")
    if wanted is str:
        if isinstance(value, str):
            return str(value)
        raise _wrong_type(key, wanted, value)
    if isinstance(value, _Raw):
        value = _scalar(key, value)
    if origin is tuple:
        inner = get_args(wanted)
        if not isinstance(value, list | tuple) or len(value) != len(inner):
            raise _wrong_type(key, wanted, value)
        return tuple(_convert(f"{key}[{i}]", t, v) for i, (t, v) in enumerate(zip(inner, value, strict=True)))
    number = _number(value)
    if wanted is bool and isinstance(value, bool):
        return value
    if wanted is float and number is not None:
        return number
    if wanted is int and number is not None and number.is_integer():
        return int(value) if isinstance(value, int) else int(number)
    raise _wrong_type(key, wanted, value)


def _convert_section(key: str, cls: type[C], value: Any) -> C:
    hints = get_type_hints(cls)
    if not isinstance(value, Mapping):
        raise UserError(f"{key}: got {_shown(value)}, expected a section with {', '.join(hints)}")
    prefix = f"{key}." if key else ""
    for name in value:
        if name not in hints:
            raise _unknown(prefix + name, [prefix + n for n in hints])
    converted = {name: _convert(prefix + name, hints[name], v) for name, v in value.items()}
    try:
        return cls(**converted)
    except UserError as error:
        if issubclass(cls, ModelSection | VisionConfig | TextConfig | FreezeConfig):
            raise UserError(f"model.{error}") from None  # they name their keys from the model's section on
        if issubclass(cls, LoaderConfig):
            raise UserError(f"{key}.{error}") from None
        raise


def _scalar(key: str, text: str) -> Any:
    yaml = require("yaml")
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"{key}: got {str(text)!r}, which is not a YAML value") from None


def _number(value: Any) -> float | None:
    """YAML 1.1 reads 1e-3 as a string, so such strings count as numbers; NaN and infinity do not."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) != float("inf") and number == number else None


def _wrong_type(key: str, wanted: Any, value: Any) -> UserError:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    expected = names.get(wanted) or f"a list of {len(get_args(wanted))} numbers"
    return UserError(f"{key}: got {_shown(value)}, expected {expected}")


def _shown(value: Any) -> str:
    return repr(str(value)) if isinstance(value, str) else f"{value!r} ({_kind(value)})"


def _kind(value: Any) -> str:
    return {"dict": "a mapping", "list": "a list", "NoneType": "null"}.get(type(value).__name__, type(value).__name__)
