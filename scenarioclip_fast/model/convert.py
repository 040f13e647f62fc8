"""Convert encoder weights from Hugging Face, open_clip and the published code, and to Hugging Face.

Tensors are renamed to this package's names of one encoder (`blocks.0.attention.qkv.weight`, ...), with query, key and
value in one matrix, and the sizes of the model are inferred from their shapes. Nothing here reads files; the callers in
`pretrained` add the file to errors.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.levels import LEVELS
from scenarioclip_fast.model.config import Activation, FreezeConfig, ModelConfig, TextConfig, VisionConfig

State = dict[str, Tensor]
KINDS = ("vision", "text")


@dataclass(frozen=True)
class EncoderWeights:
    """Complete encoders under this package's names.

    config: sizes and variant, nothing frozen
    encoders: kind ("vision" or "text") -> level -> state dict
    """

    config: ModelConfig
    encoders: dict[str, dict[str, State]]


@dataclass(frozen=True)
class _NameMap:
    """A foreign library's names for one encoder's tensors: `outer` and `block` map this package's names to them.

    `layers`: the prefix of the numbered blocks. Query, key and value are handled separately.
    """

    outer: dict[str, str]
    block: dict[str, str]
    layers: str


_HF_BLOCK = {
    "norm_1": "layer_norm1",
    "attention.out": "self_attn.out_proj",
    "norm_2": "layer_norm2",
    "expand": "mlp.fc1",
    "contract": "mlp.fc2",
}
_HF = {
    "vision": _NameMap(
        {
            "embedding.class_token": "embeddings.class_embedding",
            "embedding.stem.weight": "embeddings.patch_embedding.weight",
            "embedding.position": "embeddings.position_embedding.weight",
            "pre_norm": "pre_layrnorm",
            "head.norm": "post_layernorm",
        },
        _HF_BLOCK,
        "encoder.layers.",
    ),
    "text": _NameMap(
        {
            "embedding.token.weight": "embeddings.token_embedding.weight",
            "embedding.position": "embeddings.position_embedding.weight",
            "head.norm": "final_layer_norm",
        },
        _HF_BLOCK,
        "encoder.layers.",
    ),
}
_HF_PROJECTION = {"vision": "visual_projection", "text": "text_projection"}
_OPEN_CLIP_BLOCK = {
    "norm_1": "ln_1",
    "attention.out": "attn.out_proj",
    "norm_2": "ln_2",
    "expand": "mlp.c_fc",
    "contract": "mlp.c_proj",
}
_OPEN_CLIP = {
    "vision": _NameMap(
        {
            "embedding.class_token": "class_embedding",
            "embedding.stem.weight": "conv1.weight",
            "embedding.position": "positional_embedding",
            "pre_norm": "ln_pre",
            "head.norm": "ln_post",
        },
        _OPEN_CLIP_BLOCK,
        "transformer.resblocks.",
    ),
    "text": _NameMap(
        {
            "embedding.token.weight": "token_embedding.weight",
            "embedding.position": "positional_embedding",
            "head.norm": "ln_final",
        },
        _OPEN_CLIP_BLOCK,
        "transformer.resblocks.",
    ),
}
_OPEN_CLIP_PROJECTION = {"vision": "proj", "text": "text_projection"}

# Tensors that are constant or outside the encoders; they are not converted.
_IGNORED = {"logit_scale", "logit_bias", "attn_mask", "input_resolution", "context_length", "vocab_size"}
_POSITION_IDS = "embeddings.position_ids"  # 0, 1, 2, ... in older Hugging Face checkpoints


def is_open_clip(state: State) -> bool:
    return any(name.startswith("visual.") for name in state)


def is_hugging_face(state: State) -> bool:
    return "vision_model.embeddings.class_embedding" in state


def from_hugging_face(state: State, record: Mapping[str, Any]) -> EncoderWeights:
    """Convert a CLIPModel; `record` is its config.json."""
    outside = [name for name in state if not name.startswith(("vision_model.", "text_model."))]
    _reject_unknown(outside, _IGNORED | {f"{name}.weight" for name in _HF_PROJECTION.values()})
    parts: dict[str, State] = {}
    for kind in KINDS:
        name = f"{_HF_PROJECTION[kind]}.weight"
        if name not in state:
            raise UserError(f"missing {name}: not a complete CLIPModel")
        if state[name].ndim != 2:
            raise UserError(f"{name}: got shape {list(state[name].shape)}, expected a matrix")
        parts[kind] = _rename(select(state, f"{kind}_model."), kind, _HF[kind]) | _new_head(state[name])
    sections = {kind: _section(record, f"{kind}_config") for kind in KINDS}
    heads = (sections["vision"].get("num_attention_heads", 12), sections["text"].get("num_attention_heads", 8))
    config = _infer_config(parts["vision"], parts["text"], heads)
    activations = {kind: section.get("hidden_act", "quick_gelu") for kind, section in sections.items()}
    for kind, section in sections.items():
        if section.get("layer_norm_eps", 1e-5) != 1e-5:
            raise UserError(f"{kind} layer_norm_eps {section['layer_norm_eps']}, expected 1e-05")
        if activations[kind] not in ("quick_gelu", "gelu"):
            raise UserError(f"{kind} hidden_act {activations[kind]!r}, expected 'quick_gelu' or 'gelu'")
    end = sections["text"].get("eos_token_id", config.text.end_of_text)
    if end not in (config.text.end_of_text, 2):  # older configs have 2 instead of the last id
        raise UserError(f"text eos_token_id {end}, expected {config.text.end_of_text}, the last of the vocabulary")
    vision = replace(config.vision, activation=activations["vision"])
    text = replace(config.text, activation=activations["text"])
    return _same_at_all_levels(replace(config, vision=vision, text=text), parts)


def from_open_clip(
    state: State, record: Mapping[str, Any] | None, activation: Activation | None = None
) -> EncoderWeights:
    """Convert an open_clip CLIP.

    Args:
        record: the parsed open_clip_config.json, if any.
        activation: used without `record`, since tensors do not reveal it; None: "quick_gelu".
    """
    vision = select(state, "visual.")
    outside = {name: value for name, value in state.items() if not name.startswith("visual.")}
    # CustomTextCLIP nests its text tower under "text.".
    text = select(outside, "text.") or outside
    if text is not outside:
        _reject_unknown([name for name in outside if not name.startswith("text.")], _IGNORED)
    parts: dict[str, State] = {}
    for kind, part in (("vision", vision), ("text", text)):
        name = _OPEN_CLIP_PROJECTION[kind]
        if name not in part or part[name].ndim != 2:
            raise UserError(f"no matrix {name!r}, which open_clip's CLIP has; other architectures are not supported")
        head = _new_head(part.pop(name).T.contiguous())
        parts[kind] = _rename(part, kind, _OPEN_CLIP[kind]) | head
    config = _infer_config(parts["vision"], parts["text"], None, activation or "quick_gelu")
    return _same_at_all_levels(config if record is None else _with_open_clip_config(config, record), parts)


def _with_open_clip_config(config: ModelConfig, record: Mapping[str, Any]) -> ModelConfig:
    model = _section(record, "model_cfg")
    activation: Activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    head_width = _section(model, "vision_cfg").get("head_width", 64)
    if not isinstance(head_width, int) or head_width < 1:
        raise UserError(f"open_clip_config.json: vision_cfg.head_width {head_width!r}, expected an integer above 0")
    text_heads = _section(model, "text_cfg").get("heads", 8)
    return replace(
        config,
        vision=replace(config.vision, heads=config.vision.width // head_width, activation=activation),
        text=replace(config.text, heads=text_heads, activation=activation),
    )


def from_published(state: State, heads: tuple[int, int] | None = None) -> EncoderWeights:
    """Convert the model of the published code's Lightning checkpoint (or its state dict), of any variant.

    heads: attention heads of the vision and the text encoder; None: one per 64 of width, as in CLIP.
    """
    if any(name.startswith("model.") for name in state):
        # The temperatures and, in some versions, a copy of the teacher are stored next to the model.
        state = select(state, "model.")
    single = any(name.startswith("visual_encoder.") for name in state)
    prefixes = {"global": ""} if single else {level: f"{level}_" for level in LEVELS}
    if f"{prefixes['global']}image_projection.weight" not in state:
        raise UserError(
            "not a checkpoint of the method's published code (no 'model.global_image_projection.weight' among "
            f"its {len(state)} tensors, which start with {sorted(state)[:3]})"
        )
    modules = ["visual_encoder", "text_encoder", "image_projection", "image_norm", "text_projection", "text_norm"]
    known = tuple(f"{prefix}{module}." for prefix in prefixes.values() for module in modules)
    unknown = sorted(name for name in state if not name.startswith(known))
    if unknown:
        raise UserError(f"unexpected {shorten(unknown)}: the published code's model has no such tensors")
    encoders: dict[str, dict[str, State]] = {
        kind: {level: _published_encoder(state, kind, prefix) for level, prefix in prefixes.items()} for kind in KINDS
    }
    config = _infer_config(encoders["vision"]["global"], encoders["text"]["global"], heads)
    if single:
        parts = {kind: levels["global"] for kind, levels in encoders.items()}
        return _same_at_all_levels(replace(config, variant="pyramidclip"), parts)
    return EncoderWeights(replace(config, variant="scenarioclip1"), encoders)


def _published_encoder(state: State, kind: str, prefix: str) -> State:
    tower, head = ("visual", "image") if kind == "vision" else ("text", "text")
    tensors = select(state, f"{prefix}{tower}_encoder.")
    encoder = _rename(select(tensors, f"{kind}_model.") or tensors, kind, _HF[kind])
    for ours, published in (("projection", "projection"), ("out_norm", "norm")):
        head_tensors = select(state, f"{prefix}{head}_{published}.")
        encoder |= {f"head.{ours}.{name}": value for name, value in head_tensors.items()}
    return encoder


def to_hugging_face(kind: str, encoder: State, patch_size: int) -> tuple[State, State]:
    """Rename one encoder to CLIPModel's names; return that, and the part of its head that CLIPModel lacks.

    Args:
        kind: "vision" or "text".
        encoder: the encoder's state dict.
        patch_size: of the vision encoder, in pixels.
    """
    names = _HF[kind]
    state: State = {}
    rest: State = {}
    for name, value in encoder.items():
        module, _, leaf = name.rpartition(".")
        if name.startswith("blocks."):
            _, i, part = module.split(".", 2)
            block = f"{kind}_model.{names.layers}{i}"
            if part == "attention.qkv":
                for q, third in zip("qkv", value.chunk(3), strict=True):
                    state[f"{block}.self_attn.{q}_proj.{leaf}"] = third.clone()
            else:
                state[f"{block}.{names.block[part]}.{leaf}"] = value.contiguous()
        elif name == "head.projection.weight":
            state[f"{_HF_PROJECTION[kind]}.weight"] = value.contiguous()
        elif name.startswith(("head.projection.", "head.out_norm.")):
            rest[f"{kind}.{name.removeprefix('head.')}"] = value.contiguous()
        elif name in names.outer:
            if name == "embedding.stem.weight":
                value = value.view(-1, 3, patch_size, patch_size)
            state[f"{kind}_model.{names.outer[name]}"] = value.contiguous()
        else:
            state[f"{kind}_model.{names.outer[module]}.{leaf}"] = value.contiguous()
    return state, rest


def select(state: Mapping[str, Tensor], prefix: str) -> State:
    """Return the tensors whose names start with `prefix`, which is removed."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def shorten(names: list[str], limit: int = 6) -> str:
    """Join the first `limit` names with commas, and append the number of the others."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _same_at_all_levels(config: ModelConfig, parts: Mapping[str, State]) -> EncoderWeights:
    return EncoderWeights(config, {kind: dict.fromkeys(LEVELS, part) for kind, part in parts.items()})


def _new_head(projection: Tensor) -> State:  # [D, W]
    """CLIP's projection, with a zero bias and an identity layernorm, which CLIP lacks."""
    width = projection.shape[0]
    return {
        "head.projection.weight": projection,
        "head.projection.bias": projection.new_zeros(width),
        "head.out_norm.weight": torch.ones(width),
        "head.out_norm.bias": torch.zeros(width),
    }


def _rename(state: State, kind: str, names: _NameMap) -> State:
    """Rename one encoder's tensors to this package's names. Raises UserError for tensors that CLIP does not have."""
    known = {f"{name}{leaf}" for name in names.outer.values() for leaf in ("", ".weight", ".bias")}
    outside = [name for name in state if not name.startswith(names.layers)]
    _reject_unknown(outside, known | _IGNORED | {_POSITION_IDS}, f"{kind} encoder, ")
    out: State = {}
    for ours, foreign in names.outer.items():
        for suffix in ("", ".weight", ".bias"):
            if f"{foreign}{suffix}" in state:
                out[f"{ours}{suffix}"] = state[f"{foreign}{suffix}"]
    stem = out.get("embedding.stem.weight")
    if stem is not None and stem.ndim == 4:
        out["embedding.stem.weight"] = stem.flatten(1)
    blocks: dict[str, State] = {}
    for name, value in select(state, names.layers).items():
        i, _, tail = name.partition(".")
        blocks.setdefault(i, {})[tail] = value
    for i, tensors in blocks.items():
        renamed = _rename_block(tensors, names.block, f"{kind} encoder, {names.layers}{i}.")
        out |= {f"blocks.{i}.{name}": value for name, value in renamed.items()}
    return out


def _rename_block(tensors: State, names: Mapping[str, str], where: str) -> State:
    out: State = {}
    for name, value in tensors.items():
        module, _, leaf = name.rpartition(".")
        renamed = next((ours for ours, foreign in names.items() if foreign == module), None)
        if renamed is not None:
            out[f"{renamed}.{leaf}"] = value
        elif name.startswith("attn.in_proj_"):
            out[f"attention.qkv.{name.removeprefix('attn.in_proj_')}"] = value
        elif not re.fullmatch(r"self_attn\.[qkv]_proj\.(weight|bias)", name):
            raise UserError(f"{where}{name}: CLIP has no such tensor")
    for leaf in ("weight", "bias"):
        qkv = [q for q in (tensors.get(f"self_attn.{name}_proj.{leaf}") for name in "qkv") if q is not None]
        if len({q.shape for q in qkv}) > 1:
            shapes = ", ".join(str(list(q.shape)) for q in qkv)
            raise UserError(
                f"{where}self_attn: got query, key and value {leaf}s of shapes {shapes}, expected equal shapes"
            )
        if len(qkv) == 3:
            out[f"attention.qkv.{leaf}"] = torch.cat(qkv)
    return out


def _reject_unknown(names: list[str], known: Collection[str], where: str = "") -> None:
    unknown = sorted(name for name in names if name not in known)
    if unknown:
        raise UserError(f"{where}unexpected {shorten(unknown)}: CLIP has no such tensors")


def _section(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a section of a config, empty if absent."""
    found = record.get(name) or {}
    if not isinstance(found, dict):
        raise UserError(f"{name}: got a {type(found).__name__}, expected an object")
    return found


def _infer_config(
    vision: State, text: State, heads: tuple[int, int] | None, activation: Activation = "quick_gelu"
) -> ModelConfig:
    """Infer the config from the tensors' shapes, and the heads from the widths if None."""
    try:
        stem, position, token = (
            _matrix(vision, "embedding.stem.weight"),
            _matrix(vision, "embedding.position"),
            _matrix(text, "embedding.token.weight"),
        )
        context, projection = _matrix(text, "embedding.position"), _matrix(vision, "head.projection.weight")
        _matrix(text, "head.projection.weight")
    except KeyError as error:
        raise UserError(f"missing {error.args[0]!r} (this package's name): not a complete CLIP") from None
    patch = round((stem.shape[1] / 3) ** 0.5)
    side = round((position.shape[0] - 1) ** 0.5)
    width, text_width = stem.shape[0], token.shape[1]
    # A head is 64 wide (80 in ViT-H); narrow encoders have one. ViT-g and larger have a different MLP: unsupported.
    vision_heads, text_heads = heads or (max(width // (80 if width == 1280 else 64), 1), max(text_width // 64, 1))
    return ModelConfig(
        embed_dim=projection.shape[0],
        vision=VisionConfig(
            image_size=side * patch,
            patch_size=patch,
            width=width,
            layers=_depth(vision),
            heads=vision_heads,
            activation=activation,
        ),
        text=TextConfig(
            context_length=context.shape[0],
            vocab_size=token.shape[0],
            width=text_width,
            layers=_depth(text),
            heads=text_heads,
            activation=activation,
        ),
        freeze=FreezeConfig.nothing(),
    )


def _matrix(state: State, name: str) -> Tensor:
    value = state[name]
    if value.ndim != 2 or not value.numel():
        raise UserError(f"{name}: got shape {list(value.shape)}, expected a matrix")
    return value


def _depth(state: State) -> int:
    return len({name.split(".")[1] for name in state if name.startswith("blocks.")})
