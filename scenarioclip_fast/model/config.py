"""The architecture of a ScenarioCLIP. Every error names the field to change.

The string below a field documents it in the configuration reference (train/config_reference.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from scenarioclip_fast.config_types import check_types
from scenarioclip_fast.errors import UserError

Variant = Literal["scenarioclip1", "scenarioclip0", "pyramidclip"]
Stem = Literal["linear", "conv"]
Activation = Literal["quick_gelu", "gelu"]


def _check(ok: bool, name: str, got: object, expected: str) -> None:
    if not ok:
        raise UserError(f"{name}: got {got!r}, expected {expected}")


def _check_sizes(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _check(value > 0, f"{section}.{name}", value, "above 0")


@dataclass(frozen=True)
class VisionConfig:
    """A vision transformer on square images."""

    image_size: int = 224
    """Side of an image, in pixels; a multiple of patch_size."""
    patch_size: int = 32
    """Side of a patch, in pixels."""
    width: int = 768
    """Width of the transformer; a multiple of heads."""
    layers: int = 12
    """Transformer blocks."""
    heads: int = 12
    """Attention heads."""
    stem: Stem = "linear"
    """Patch embedding: a linear projection, as in CLIP, or strided 3 x 3 convolutions (conv), which learn much faster
    from scratch on small images and require a power of two as patch_size."""
    activation: Activation = "quick_gelu"
    """Activation of the MLPs; OpenAI's CLIP weights require quick_gelu."""

    def __post_init__(self) -> None:
        check_types(self, "vision.")
        _check_sizes("vision", self, "image_size", "patch_size", "width", "layers", "heads")
        _check(
            self.width % self.heads == 0,
            "vision.width",
            self.width,
            f"a multiple of vision.heads ({self.heads})",
        )
        _check(
            self.image_size % self.patch_size == 0,
            "vision.image_size",
            self.image_size,
            f"a multiple of vision.patch_size ({self.patch_size})",
        )
        if self.stem == "conv":
            power_of_two = self.patch_size >= 2 and self.patch_size & (self.patch_size - 1) == 0
            _check(power_of_two, "vision.patch_size", self.patch_size, 'a power of two with vision.stem="conv"')
            halvings = self.patch_size.bit_length() - 1
            _check(
                self.width % 2 ** (halvings - 1) == 0,
                "vision.width",
                self.width,
                f'a multiple of {2 ** (halvings - 1)} with vision.stem="conv", which doubles its channels',
            )

    @property
    def tokens(self) -> int:
        """Tokens per image: the class token and one per patch."""
        return 1 + (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class TextConfig:
    """A causal text transformer. The last id of the vocabulary is end-of-text, as in CLIP."""

    context_length: int = 77
    """Tokens per text, start and end included; longer texts are truncated."""
    vocab_size: int = 49408
    """Size of the token vocabulary."""
    width: int = 512
    """Width of the transformer; a multiple of heads."""
    layers: int = 12
    """Transformer blocks."""
    heads: int = 8
    """Attention heads."""
    activation: Activation = "quick_gelu"
    """Activation of the MLPs; OpenAI's CLIP weights require quick_gelu."""

    def __post_init__(self) -> None:
        check_types(self, "text.")
        _check_sizes("text", self, "context_length", "vocab_size", "width", "layers", "heads")
        _check(self.width % self.heads == 0, "text.width", self.width, f"a multiple of text.heads ({self.heads})")
        _check(self.context_length >= 2, "text.context_length", self.context_length, "at least 2 (start and end)")

    @property
    def end_of_text(self) -> int:
        return self.vocab_size - 1


@dataclass(frozen=True)
class FreezeConfig:
    """The frozen weights, which the three levels and the teacher share.

    `FreezeConfig.nothing()` trains everything.
    """

    vision_blocks: int = 6
    """Frozen blocks of the vision encoder, counted from the input."""
    text_blocks: int = 10
    """Frozen blocks of the text encoder, counted from the input."""
    embeddings: bool = True
    """Freeze the patch, class, position and token embeddings."""
    pre_layernorm: bool = True
    """Freeze the vision encoder's layernorm before block 0. The published run trains it (false), which costs a backward
    pass through the frozen blocks."""

    def __post_init__(self) -> None:
        check_types(self, "freeze.")
        for name in ("vision_blocks", "text_blocks"):
            value = getattr(self, name)
            _check(value >= 0, f"freeze.{name}", value, "at least 0")

    @classmethod
    def nothing(cls) -> FreezeConfig:
        return cls(0, 0, False, False)


@dataclass(frozen=True)
class ModelConfig:
    """Variant, sizes and freezing of a ScenarioCLIP; the defaults are the paper's (ViT-B/32)."""

    variant: Variant = "scenarioclip1"
    """scenarioclip1: six encoders, EMA teacher and distillation, the method; scenarioclip0: six encoders, contrastive
    losses only; pyramidclip: one vision and one text encoder for all levels."""
    embed_dim: int = 512
    """Width D of the embeddings."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    freeze: FreezeConfig = field(default_factory=FreezeConfig)

    def __post_init__(self) -> None:
        check_types(self)
        _check(self.embed_dim > 0, "embed_dim", self.embed_dim, "above 0")
        for part in ("vision", "text"):
            frozen, layers = getattr(self.freeze, f"{part}_blocks"), getattr(self, part).layers
            _check(frozen <= layers, f"freeze.{part}_blocks", frozen, f"at most {part}.layers ({layers})")

    @classmethod
    def preset(cls, name: str, variant: Variant = "scenarioclip1") -> ModelConfig:
        """Return the paper's sizes ("vit-b-32"), or "tiny", which trains from scratch on a CPU and freezes nothing."""
        if name == "vit-b-32":
            return cls(variant=variant)
        if name == "tiny":
            return cls(
                variant=variant,
                embed_dim=128,
                vision=VisionConfig(image_size=64, patch_size=16, width=128, layers=4, heads=4, stem="conv"),
                text=TextConfig(context_length=32, width=128, layers=4, heads=4),
                freeze=FreezeConfig.nothing(),
            )
        raise UserError(f"model preset: got {name!r}, expected one of {', '.join(PRESETS)}")

    def to_dict(self) -> dict[str, Any]:
        """Return nested dictionaries of plain values, for JSON and YAML; the fields of subclasses are left out."""
        record = dataclasses.asdict(self)
        return {f.name: record[f.name] for f in dataclasses.fields(ModelConfig)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> ModelConfig:
        """Invert `to_dict`; absent keys keep their defaults, unknown keys raise UserError."""
        if not isinstance(record, Mapping):
            raise UserError(f"model config: got {record!r}, expected a mapping")
        parts = {"vision": VisionConfig, "text": TextConfig, "freeze": FreezeConfig}
        values = {
            key: _from_mapping(parts[key], value, f"{key}.") if key in parts else value for key, value in record.items()
        }
        return _from_mapping(cls, values, "")

    def differences(self, other: ModelConfig, *fields: str) -> list[str]:
        """List the differing fields as "vision.width: 768 and 1024"; `fields` limits the comparison."""
        left, right = flat(self.to_dict()), flat(other.to_dict())
        compared = [key for key in left if not fields or key.split(".")[0] in fields]
        return [f"{key}: {left[key]!r} and {right[key]!r}" for key in compared if left[key] != right[key]]


PRESETS = ("vit-b-32", "tiny")


def _from_mapping(cls: Any, record: object, prefix: str) -> Any:
    if not isinstance(record, Mapping):
        raise UserError(f"{prefix.rstrip('.') or 'model config'}: got {record!r}, expected a mapping")
    names = [f.name for f in dataclasses.fields(cls)]
    unknown = [f"{prefix}{key}" for key in record if key not in names]
    if unknown:
        expected = ", ".join(prefix + name for name in names)
        raise UserError(f"unknown model config key {', '.join(unknown)}: expected {expected}")
    return cls(**record)


def flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a nested mapping to dotted keys."""
    found: dict[str, Any] = {}
    for key, value in record.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found
