"""The config of the generation pipeline: one section per stage, read from YAML, with `key=value` overrides.

The string below a field documents it in docs/generation.md. Fields marked `_RUN` do not change the results: a stage
whose other fields changed refuses to continue (see `fingerprint`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from scenarioclip_fast.config_parse import build, dotted_keys, merge, parse_override, read_yaml, set_value
from scenarioclip_fast.config_types import check_types
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.requirements import require

STAGES = ("caption", "ground", "segment", "curate", "pack")
"""The stages, in order."""

RECORDED = STAGES[:-1]
"""The stages that have records."""

EXPENSIVE = ("caption", "ground", "segment")
"""The stages whose records are never discarded unasked, because models made them."""

GIVEN = "given"
"""As a model: use the annotations of a packed data set, such as the boxes of one without masks."""

_RUN: Any = {"run": True}

# Settings that may be paths.
_PATHS = {
    "caption": ("model",),
    "ground": ("model",),
    "segment": ("model",),
    "curate": ("embedder", "antonyms", "coco", "decisions"),
}

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """What a vision-language model is asked about each image, and how it is reached."""

    url: str = field(default="", metadata=_RUN)
    """Base URL of an OpenAI-compatible server, http://HOST:8000/v1; empty: `model` is loaded in this process."""
    model: str = ""
    """Name of the model on the server; without a URL, path or hub id of a Qwen2.5-VL or Qwen3-VL model; or given."""
    prompt: Literal["default", "published"] = "default"
    """published: the contents of the published prompt, and images of 448 x 448 pixels."""
    schema: Literal["json_schema", "json_object", "none"] = field(default="json_schema", metadata=_RUN)
    """What the server is asked to enforce; the prompt asks for the same JSON in any case."""
    image_side: int = 1024
    """Images with a longer side are reduced to this many pixels before they are sent."""
    max_objects: int = 10
    """Objects that the model is asked for, at most."""
    max_tokens: int = 1024
    """Length of an answer, at most."""
    temperature: float = 0.0
    """Sampling temperature; 0: greedy."""
    api_key_env: str = field(default="OPENAI_API_KEY", metadata=_RUN)
    """Environment variable of the API key; servers of your own need none."""
    concurrency: int = field(default=16, metadata=_RUN)
    """Requests in flight."""
    timeout_s: float = field(default=120.0, metadata=_RUN)
    """Seconds after which a request is given up and repeated."""
    retries: int = field(default=5, metadata=_RUN)
    """Repetitions of a request that failed for a transient reason: no connection, timeout, 408, 409, 429, 5xx."""
    price_in: float = field(default=0.0, metadata=_RUN)
    """Price of a million prompt tokens, for the report."""
    price_out: float = field(default=0.0, metadata=_RUN)
    """Price of a million answer tokens, for the report."""
    batch_size: int = field(default=8, metadata=_RUN)
    """Images per batch of a model in this process."""
    dtype: Dtype = "auto"
    """Precision of a model in this process; auto: bfloat16 on a GPU, float32 elsewhere."""

    def __post_init__(self) -> None:
        check_types(self, "caption.")
        _at_least("caption", self, 1, "image_side", "max_objects", "max_tokens", "concurrency", "batch_size")
        _at_least("caption", self, 0, "temperature", "retries", "price_in", "price_out")
        _above_0("caption", self, "timeout_s")
        if self.url and not self.url.startswith(("http://", "https://")):
            raise UserError(f"caption.url: got {self.url!r}, expected http://HOST:PORT/v1")


@dataclass(frozen=True, kw_only=True)
class GroundConfig:
    """The detector that finds a box for each name."""

    model: str = "IDEA-Research/grounding-dino-base"
    """Path or hub id of a GroundingDINO, MM-GroundingDINO or OWLv2 checkpoint, MODULE:CLASS of a detector, or given."""
    box_threshold: float = 0.25
    """Boxes with a lower score are dropped."""
    text_threshold: float = 0.25
    """Words with a lower score do not belong to a box's name; GroundingDINO only."""
    nms: float = 0.4
    """A box that overlaps a better one with at least this IoU is dropped, whatever their names."""
    batch_size: int = field(default=8, metadata=_RUN)
    """Images per batch."""
    dtype: Dtype = "auto"
    """Precision of the model; auto: float32."""
    invert: bool = False
    """Invert the colours of the images, as the published loader does."""

    def __post_init__(self) -> None:
        check_types(self, "ground.")
        _fractions("ground", self, "box_threshold", "text_threshold", "nms")
        _at_least("ground", self, 1, "batch_size")
        _named("ground", self)


@dataclass(frozen=True, kw_only=True)
class SegmentConfig:
    """The segmenter that turns boxes into masks."""

    model: str = "facebook/sam-vit-huge"
    """Path or hub id of a SAM or SAM 2 checkpoint, or MODULE:CLASS of a segmenter."""
    batch_size: int = field(default=4, metadata=_RUN)
    """Images per batch."""
    boxes_per_batch: int = field(default=64, metadata=_RUN)
    """Boxes per call of the mask decoder, over all images of a batch."""
    dtype: Dtype = "auto"
    """Precision of the model; auto: float32."""
    invert: bool = False
    """Invert the colours of the images, as the published loader does."""

    def __post_init__(self) -> None:
        check_types(self, "segment.")
        _at_least("segment", self, 1, "batch_size", "boxes_per_batch")
        if self.model == GIVEN:
            raise UserError("segment.model: got given; masks that a data set has need no run of generate")
        _named("segment", self)


@dataclass(frozen=True, kw_only=True)
class CurateConfig:
    """The rules that correct, keep or drop objects and relations."""

    singular: bool = True
    """Object names in the singular: "dogs" is "dog"."""
    gerund: bool = True
    """Actions in the "-ing" form: "played football" is "playing football"."""
    match: float = 0.85
    """A subject or object that is no object's name means the most similar name with at least this similarity."""
    min_box_score: float = 0.0
    """Objects with a lower score of the detector are dropped."""
    min_mask_score: float = 0.0
    """Objects whose mask has a lower predicted IoU are dropped."""
    min_mask_pixels: int = 16
    """Objects with a smaller mask are dropped."""
    min_mask_fraction: float = 0.0
    """Objects whose mask covers a smaller fraction of the image are dropped."""
    min_agreement: float = 0.5
    """Objects whose mask's bounding box has a smaller IoU with their box are dropped."""
    max_overlap: float = 0.95
    """Of two objects of one name whose masks have a larger IoU, the one with the lower score is dropped."""
    min_ends_distance: float = 0.0
    """Relations of objects whose centres are closer than this fraction of the image's diagonal are dropped."""
    min_relations: int = 1
    """Images with fewer relations are dropped; 3 as published."""
    drop_unused: bool = False
    """Drop objects that no relation uses, as published."""
    merge_actions: float = 0.0
    """Actions whose embeddings have at least this cosine similarity become one; 0: none, 0.8 as published."""
    merge_objects: float = 0.0
    """The same for names of objects."""
    merge_predicates: float = 0.0
    """The same for predicates."""
    embedder: str = ""
    """Path or hub id of the text encoder for merging."""
    negatives: Literal["none", "published"] = "published"
    """published: per relation, one with the antonym of its predicate and one with another object of the image."""
    antonyms: str = ""
    """JSON file of antonyms by predicate, in addition to the package's."""
    coco: str = ""
    """COCO file that was corrected in an annotation tool; applied before the decisions."""
    decisions: str = ""
    """JSON file of decisions: of the review page, or corrected COCO annotations."""

    def __post_init__(self) -> None:
        check_types(self, "curate.")
        _fractions("curate", self, "match", "min_box_score", "min_mask_score", "min_mask_fraction", "min_agreement")
        _fractions("curate", self, "max_overlap", "min_ends_distance")
        _fractions("curate", self, "merge_actions", "merge_objects", "merge_predicates")
        _at_least("curate", self, 0, "min_mask_pixels", "min_relations")
        if not self.embedder and (self.merge_actions or self.merge_objects or self.merge_predicates):
            raise UserError("curate.embedder: merging classes needs a text encoder, a path or hub id")


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """The packed shards."""

    shard_size: int = 1000
    """Scenes per shard."""
    val: float = 0.1
    """Fraction of the scenes without a split that go to val."""
    test: float = 0.2
    """Fraction of the scenes without a split that go to test."""
    layout: Literal["packed", "published", "both"] = "packed"
    """What is written: shards, the published layout, or both."""

    def __post_init__(self) -> None:
        check_types(self, "pack.")
        _at_least("pack", self, 1, "shard_size")
        _fractions("pack", self, "val", "test")
        if self.val + self.test > 1:
            raise UserError(
                f"pack.val: got {self.val:g}, expected at most {1 - self.test:g}, as pack.test is {self.test:g}"
            )


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """The actors of each stage on a Ray cluster (`--ray`)."""

    caption: int = field(default=0, metadata=_RUN)
    """Number of actors; 0: as many as GPUs or CPUs allow, or 4 with a server, which share `caption.concurrency`."""
    ground: int = field(default=0, metadata=_RUN)
    """Number of actors; 0: as many as GPUs or CPUs allow."""
    segment: int = field(default=0, metadata=_RUN)
    """Number of actors; 0: as many as GPUs or CPUs allow."""
    curate: int = field(default=0, metadata=_RUN)
    """Number of actors; 0: as many as CPUs allow."""
    gpus: float = field(default=0.0, metadata=_RUN)
    """GPUs per actor that runs a model; 0: 1, or a part if the cluster has fewer GPUs than stages with models."""
    cpus: float = field(default=1.0, metadata=_RUN)
    """CPUs per actor, at most; less if the cluster has fewer CPUs than actors."""
    retries: int = field(default=4, metadata=_RUN)
    """Repetitions of a unit whose worker or node died."""

    def __post_init__(self) -> None:
        check_types(self, "ray.")
        _at_least("ray", self, 0, *STAGES[:-1], "gpus", "retries")
        _above_0("ray", self, "cpus")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """All sections."""

    caption: CaptionConfig = field(default_factory=CaptionConfig)
    ground: GroundConfig = field(default_factory=GroundConfig)
    segment: SegmentConfig = field(default_factory=SegmentConfig)
    curate: CurateConfig = field(default_factory=CurateConfig)
    pack: PackConfig = field(default_factory=PackConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    def __post_init__(self) -> None:
        check_types(self)

    @classmethod
    def of(cls, *trees: Mapping[str, Any], overrides: Iterable[str] = ()) -> GenerateConfig:
        """Build a config from nested mappings, later ones first, and `key=value` overrides.

        Raises:
            UserError: an unknown key or an invalid value; the message names the key.
        """
        tree: dict[str, Any] = {}
        for part in trees:
            tree = merge(tree, part)
        known = list(dotted_keys(cls))
        for text in overrides:
            path, value = parse_override(text, "ground.box_threshold=0.3")
            set_value(tree, path, value)
        return build(cls, tree, known)

    @classmethod
    def load(cls, path: str | Path, *trees: Mapping[str, Any], overrides: Iterable[str] = ()) -> GenerateConfig:
        """Like `of`, with a YAML file first."""
        return cls.of(read_yaml(path), *trees, overrides=overrides)

    def with_absolute_paths(self) -> GenerateConfig:
        """Make paths that exist absolute, so that the settings also hold for runs from other directories."""
        changed = {}
        for section, names in _PATHS.items():
            part = getattr(self, section)
            if part is self.caption and part.url:  # the name of a model on the server
                continue
            paths = {name: os.path.expanduser(getattr(part, name)) for name in names}
            changed[section] = replace(
                part, **{name: os.path.abspath(path) for name, path in paths.items() if path and os.path.exists(path)}
            )
        return replace(self, **changed)

    def to_yaml(self) -> str:
        """The YAML text that `load` reads."""
        text: str = require("yaml").safe_dump(asdict(self), sort_keys=False)
        return text


PUBLISHED: dict[str, Any] = {
    "caption": {"prompt": "published", "image_side": 448, "max_objects": 10, "max_tokens": 1024, "temperature": 0.0},
    "ground": {"box_threshold": 0.25, "text_threshold": 0.25, "nms": 0.4},
    "curate": {
        "singular": False,
        "match": 1.0,
        "min_mask_pixels": 1,
        "min_agreement": 0.0,
        "max_overlap": 1.0,
        "min_relations": 3,
        "drop_unused": True,
        "negatives": "published",
    },
}
"""The published settings, see docs/generation.md; colour inversion is separate (`ground.invert`, `segment.invert`)."""


def fingerprint(section: Any) -> dict[str, Any]:
    """The fields of a section that its results depend on."""
    run = {f.name for f in fields(section) if f.metadata.get("run")}
    return {name: value for name, value in asdict(section).items() if name not in run}


def _at_least(section: str, config: Any, low: int, *names: str) -> None:
    for name in names:
        if (value := getattr(config, name)) < low:
            raise UserError(f"{section}.{name}: got {value:g}, expected at least {low}")


def _above_0(section: str, config: Any, *names: str) -> None:
    for name in names:
        if (value := getattr(config, name)) <= 0:
            raise UserError(f"{section}.{name}: got {value:g}, expected above 0")


def _fractions(section: str, config: Any, *names: str) -> None:
    for name in names:
        if not 0 <= (value := getattr(config, name)) <= 1:
            raise UserError(f"{section}.{name}: got {value:g}, expected 0 to 1")


def _named(section: str, config: Any) -> None:
    if not config.model:
        raise UserError(f"{section}.model: got nothing, expected a path or hub id of a checkpoint")
