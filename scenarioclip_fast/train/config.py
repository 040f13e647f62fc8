"""The config of a training run: typed sections, read from YAML, with `key=value` overrides.

An unknown key, a wrong type and a value out of range each raise one UserError that names the key. The string below a
field documents it in `scenarioclip-fast train --help` and in the configuration reference (config_reference.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from scenarioclip_fast.config_parse import (
    build,
    convert,
    find_config,
    merge,
    parse_override,
    plain,
    read_yaml,
    set_value,
    with_lists,
)
from scenarioclip_fast.config_types import check_types, expand_user
from scenarioclip_fast.data.config import LoaderConfig, ShardSource, shard_sources
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import is_url, write_text
from scenarioclip_fast.model.config import PRESETS, ModelConfig
from scenarioclip_fast.requirements import require

_BUDGETS = ("steps", "epochs", "views")
PRESET_KEY = "model.preset"


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """Where a run is stored, and its hardware and arithmetic."""

    dir: str = "runs/train"
    """Directory of the metrics, checkpoints and trained model: a path, not a URL; shared by all machines."""
    seed: int = 0
    """Seed of the initial weights, the order of the data and its augmentation."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N. Under torchrun each rank uses its own GPU."""
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    """Arithmetic of the towers: float32; float32 with TF32 matrix products; or bfloat16 autocast."""
    backend: Literal["auto", "reference", "cpu", "triton", "cuda"] = "auto"
    """Backend of the package's ops; auto picks the fastest available one for each op."""
    timeout_s: float = 600.0
    """Seconds after which a rank that has not joined, is silent or hangs in a collective ends the run."""

    def __post_init__(self) -> None:
        check_types(self, "run.")
        expand_user(self, "dir")
        _check(bool(self.dir), "run.dir", self.dir, "a directory")
        _check(not is_url(self.dir), "run.dir", self.dir, "a path, not a URL: on storage that all machines mount")
        _check(self.timeout_s > 0, "run.timeout_s", self.timeout_s, "above 0")
        _check(0 <= self.seed < 2**63, "run.seed", self.seed, "from 0 to 2**63 - 1")


@dataclass(frozen=True, kw_only=True)
class DataSection(LoaderConfig):
    """The data set, the views rendered from it, and its loading."""

    shards: str | tuple[ShardSource, ...] = ""
    """Directory written by `scenarioclip-fast pack`, or its URL (s3://, gs://, hf://, https://). Required. Several data
    sets: a list of these, or of {path: DIR, weight: NUMBER}; weight: how many times each scene of the set occurs in an
    epoch (default 1)."""
    batch_size: int = 128
    """Scenes per optimizer step, over all ranks together."""

    def __post_init__(self) -> None:
        if self.shards != "":
            sources = shard_sources(self.shards)
            alone = len(sources) == 1 and sources[0].weight == 1
            object.__setattr__(self, "shards", sources[0].path if alone else sources)
        super().__post_init__()
        _check(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")


@dataclass(frozen=True, kw_only=True)
class ModelSection(ModelConfig):
    """The model and its initial weights.

    In files and overrides, model.preset sets the base that the other model keys modify; in Python, use
    `ModelSection.preset("tiny")`.
    """

    init: str | None = None
    """A CLIP checkpoint or a `save_pretrained` directory to start from; null: random weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        expand_user(self, "init")

    @property
    def architecture(self) -> ModelConfig:
        return ModelConfig(**{f.name: getattr(self, f.name) for f in fields(ModelConfig)})


@dataclass(frozen=True, kw_only=True)
class LossSection:
    """The contrastive and distillation terms, and the EMA teacher of the distillation."""

    init_temperature: float = 0.07
    """Initial temperature of the contrastive softmax; learned, one per level."""
    max_scale: float = 100.0
    """Upper bound of 1 / temperature."""
    duplicates: Literal["negatives", "positives"] = "negatives"
    """Whether equal texts of a batch are each other's negatives, as published, or positives."""
    distillation_scale: float = 1.0
    """Weight of the distillation; 0: none. It is below 1e-4 of the loss at 1 (published), a few percent at
    model.embed_dim."""
    teacher_decay: float = 0.9995
    """Decay of the teacher's moving average after warm-up."""
    teacher_warmup: int = 2000
    """Steps over which the averaging window of the teacher grows to its full width."""
    teacher_scope: Literal["distillation", "all"] = "distillation"
    """Encoders that the teacher averages: the three used by the distillation, or all, for `eval --weights teacher`."""

    def __post_init__(self) -> None:
        check_types(self, "loss.")
        _check(self.init_temperature > 0, "loss.init_temperature", self.init_temperature, "above 0")
        _check(self.max_scale >= 1, "loss.max_scale", self.max_scale, "at least 1")
        # Beyond max_scale the temperature would get no gradient. 1e-7: the rounding of 1 / max_scale.
        possible = self.init_temperature * self.max_scale > 1 - 1e-7
        expected = f"at least 1 / loss.max_scale = {1 / self.max_scale}"
        _check(possible, "loss.init_temperature", self.init_temperature, expected)
        _check(self.distillation_scale >= 0, "loss.distillation_scale", self.distillation_scale, "at least 0")
        _check(0 <= self.teacher_decay < 1, "loss.teacher_decay", self.teacher_decay, "from 0 to below 1")
        _check(self.teacher_warmup >= 0, "loss.teacher_warmup", self.teacher_warmup, "at least 0")


@dataclass(frozen=True, kw_only=True)
class OptimSection:
    """The optimizer, with a linear warm-up and a cosine decay to zero."""

    name: str = "adamw"
    """Optimizer: adamw, sgd, or another key of train.optim.OPTIMIZERS."""
    lr: float = 2e-5
    """Peak learning rate: 2e-5 for fine-tuning from CLIP, about 1e-3 from scratch."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's first and second moments; sgd uses the first as its momentum."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.2
    """Weight decay; biases and norms are excluded."""
    decay_logit_scale: bool = False
    """Apply the weight decay to the temperatures too, as the published run does."""
    warmup: float = 0.1
    """Share of all steps over which the learning rate rises linearly."""
    warmup_start: float = 1e-3
    """Learning rate of the first step, as a share of lr."""
    clip_norm: float = 1.0
    """Maximum norm of the gradient."""

    def __post_init__(self) -> None:
        check_types(self, "optim.")
        _check(self.lr > 0, "optim.lr", self.lr, "above 0")
        _check(all(0 <= b < 1 for b in self.betas), "optim.betas", self.betas, "two numbers from 0 to below 1")
        _check(self.eps > 0, "optim.eps", self.eps, "above 0")
        _check(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "at least 0")
        _check(0 <= self.warmup <= 1, "optim.warmup", self.warmup, "a share from 0 to 1")
        _check(0 <= self.warmup_start <= 1, "optim.warmup_start", self.warmup_start, "a share from 0 to 1")
        _check(self.clip_norm > 0, "optim.clip_norm", self.clip_norm, "above 0")


@dataclass(frozen=True, kw_only=True)
class TrainSection:
    """Length, logging, checkpoints and memory. Set exactly one of steps, epochs and views."""

    steps: int | None = None
    """Length of the run in optimizer steps."""
    epochs: float | None = None
    """Length of the run in passes over the data."""
    views: int | None = None
    """Length of the run in image views, converted to steps by the mean number of views per scene."""
    log_every: int = 10
    """Steps after which metrics are read, the only regular points where the host waits for the device. They are printed
    at most every 5 s."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    checkpoint_minutes: float | None = 30.0
    """Also save when metrics are read after this many minutes without a checkpoint; null: off."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep, in addition to the one with the lowest mean loss over 100 steps."""
    max_skipped: int = 10
    """Consecutive steps with a non-finite loss or gradient that end the run with an error."""
    tensorboard: bool = True
    """Write TensorBoard logs if it is installed."""
    accumulate: int = 1
    """Microbatches per step. The loss still sees the whole batch; costs one more forward pass of the trained blocks.
    Must divide the batch size per rank."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """On several ranks: replicate everything (ddp), or shard the trained weights and their state (fsdp)."""
    activation_checkpointing: bool = False
    """Keep only the input of each block and recompute the rest in the backward pass: less memory, more time."""
    compile: Literal[True, False, "auto"] = False
    """torch.compile the transformer blocks; the first steps take minutes. auto: on a GPU only."""
    cuda_graphs: bool = False
    """Replay the vision encoders' kernels, forward and backward, as CUDA graphs, with views padded to a few sizes: for
    hosts that launch slower than the GPU computes."""
    fp8: Literal["none", "frozen", "all"] = "none"
    """Products of transformer blocks in FP8 (E4M3): none; the forward pass of the frozen vision blocks; or the forward
    pass of all blocks and the gradients of their inputs. Requires run.precision=bf16, and on a GPU compute capability
    8.9 (Ada, Hopper); emulated on a CPU. It has not run on a GPU yet."""
    profile: tuple[int, int] | None = None
    """First and last step, counted from 1, of a torch.profiler trace of rank 0, in RUN/profile; null: none."""

    def __post_init__(self) -> None:
        check_types(self, "train.")
        given = [name for name in _BUDGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"got {' and '.join(f'train.{n}' for n in given)}, expected only one of them")
        minutes = self.checkpoint_minutes
        _check(minutes is None or minutes > 0, "train.checkpoint_minutes", minutes, "above 0, or null")
        for name in (*given, "log_every", "checkpoint_every", "keep_checkpoints", "max_skipped", "accumulate"):
            _check(getattr(self, name) > 0, f"train.{name}", getattr(self, name), "above 0")
        first, last = self.profile or (1, 1)
        _check(1 <= first <= last, "train.profile", self.profile, "the first and the last step, counted from 1")
        if self.cuda_graphs and self.parallel == "fsdp":
            raise UserError("got train.cuda_graphs and train.parallel=fsdp, expected only one of them")
        if self.cuda_graphs and self.activation_checkpointing:
            raise UserError("got train.cuda_graphs and train.activation_checkpointing, expected only one of them")

    def compiles_on(self, device_type: str) -> bool:
        """Whether the transformer blocks are compiled on "cpu" or "cuda"."""
        return device_type == "cuda" if self.compile == "auto" else self.compile


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that determines a run, stored in RUN/config.yaml; `load` restores an equal config."""

    run: RunSection = field(default_factory=RunSection)
    data: DataSection = field(default_factory=DataSection)
    model: ModelSection = field(default_factory=ModelSection)
    loss: LossSection = field(default_factory=LossSection)
    optim: OptimSection = field(default_factory=OptimSection)
    train: TrainSection = field(default_factory=TrainSection)

    def __post_init__(self) -> None:
        check_types(self)
        if self.train.fp8 != "none" and self.run.precision != "bf16":
            raise UserError(
                f"train.fp8: got {self.train.fp8} with run.precision={self.run.precision}, expected run.precision=bf16"
            )

    @classmethod
    def of(cls, values: Mapping[str, Any] | None = None, overrides: Iterable[str] = ()) -> TrainConfig:
        """Build a config from a nested mapping, such as a YAML file's, and `dotted.key=value` overrides.

        A budget (train.steps, train.epochs, train.views) among the overrides replaces the mapping's budget.

        Raises:
            UserError: an unknown key, a wrong type or a value out of range.
        """
        tree = plain(values or {})
        if isinstance(overrides, str):
            raise UserError(f"overrides: got the text {overrides!r}, expected a list of texts")
        given = [parse_override(text) for text in overrides]
        if any(path[0] == "train" and path[-1] in _BUDGETS for path, _ in given):
            section = tree.get("train")
            if isinstance(section, dict):
                for name in _BUDGETS:
                    section.pop(name, None)
        for path, value in given:
            set_value(tree, path, value)
        model = tree.get("model")
        if isinstance(model, dict):
            preset = convert(PRESET_KEY, Literal[PRESETS], model.pop("preset", PRESETS[0]))
            tree["model"] = merge(ModelConfig.preset(preset).to_dict(), model)
        return build(cls, tree, extra_keys=[PRESET_KEY])

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> TrainConfig:
        """Build a config from a YAML file, or a packaged config by name, and overrides: see `of`.

        Args:
            path: a file, or the name "tiny", "fast" or "reference".
        """
        return cls.of(read_yaml(find_config(path)), overrides)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for YAML and JSON."""
        return with_lists(asdict(self))

    def to_yaml(self) -> str:
        """Return the YAML text that `load` reads."""
        text: str = require("yaml").safe_dump(self.to_dict(), sort_keys=False)
        return text

    def save(self, path: str | Path) -> None:
        """Write the config as YAML."""
        write_text(Path(path), self.to_yaml())


def _check(good: bool, key: str, got: object, expected: str) -> None:
    if not good:
        raise UserError(f"{key}: got {got!r}, expected {expected}")
