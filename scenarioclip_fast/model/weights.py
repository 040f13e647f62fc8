"""Weights from and for other programs: Hugging Face and open_clip CLIP, the method's published code, safetensors.

Every source is first renamed to this package's names of one encoder (`blocks.0.attention.qkv.weight`, ...), query, key
and value in one matrix, and then loaded strictly. Nothing that runs code on loading is read: safetensors, or pickles
with `weights_only=True`.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.model.config import Activation, FreezeConfig, ModelConfig, TextConfig, Variant, VisionConfig
from scenarioclip_fast.model.scenarioclip import ScenarioCLIP
from scenarioclip_fast.model.tokens import LEVELS
from scenarioclip_fast.ops.views import CLIP_MEAN, CLIP_STD
from scenarioclip_fast.requirements import require

SCHEMA = 1
CLIP_START_SCALE = 1 / 0.07  # the factor of the cosines that CLIP starts from
State = dict[str, Tensor]
_INDEX = ".index.json"  # of a checkpoint in several files

# What lies beside the encoders' tensors and is none of theirs: temperature and bias of the loss, and constants.
_BESIDE = {"logit_scale", "logit_bias", "attn_mask", "input_resolution", "context_length", "vocab_size"}
_POSITION_IDS = "embeddings.position_ids"  # of Hugging Face: 0, 1, 2, ...

# This package's names of a block's parts, in Hugging Face's and in open_clip's words; q, k, v are handled apart.
_HF_BLOCK = {
    "norm_1": "layer_norm1",
    "attention.out": "self_attn.out_proj",
    "norm_2": "layer_norm2",
    "expand": "mlp.fc1",
    "contract": "mlp.fc2",
}
_OPEN_CLIP_BLOCK = {
    "norm_1": "ln_1",
    "attention.out": "attn.out_proj",
    "norm_2": "ln_2",
    "expand": "mlp.c_fc",
    "contract": "mlp.c_proj",
}
_HF = {
    "vision": {
        "embedding.class_token": "embeddings.class_embedding",
        "embedding.stem.weight": "embeddings.patch_embedding.weight",
        "embedding.position": "embeddings.position_embedding.weight",
        "pre_norm": "pre_layrnorm",
        "head.norm": "post_layernorm",
    },
    "text": {
        "embedding.token.weight": "embeddings.token_embedding.weight",
        "embedding.position": "embeddings.position_embedding.weight",
        "head.norm": "final_layer_norm",
    },
}
_OPEN_CLIP = {
    "vision": {
        "embedding.class_token": "class_embedding",
        "embedding.stem.weight": "conv1.weight",
        "embedding.position": "positional_embedding",
        "pre_norm": "ln_pre",
        "head.norm": "ln_post",
    },
    "text": {
        "embedding.token.weight": "token_embedding.weight",
        "embedding.position": "positional_embedding",
        "head.norm": "ln_final",
    },
}


def save_pretrained(model: ScenarioCLIP, directory: str | Path, scales: Mapping[str, float] | None = None) -> None:
    """Writes `model.safetensors`, every parameter once, and `config.json` into `directory`.

    scales: of each level, the factor of the cosines that its loss has learnt; kept in config.json for exports.
    """
    safetensors = require("safetensors.torch")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    safetensors.save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    record = {"schema": SCHEMA, "model": model.config.to_dict(), "scales": dict(scales or {})}
    (directory / "config.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")


def from_pretrained(directory: str | Path) -> ScenarioCLIP:
    """Reads what `save_pretrained` wrote."""
    directory = Path(directory)
    record = _read_json(directory / "config.json")
    if record.get("schema") != SCHEMA or "model" not in record:
        raise UserError(
            f"{directory / 'config.json'}: got schema {record.get('schema')!r}, expected {SCHEMA} and a key 'model'; "
            "for a plain CLIP use from_clip, for the method's published code from_reference"
        )
    model = ScenarioCLIP(ModelConfig.from_dict(record["model"]))
    path = directory / "model.safetensors"
    _load(model, _read_state(path), path)
    return model


def read_scales(directory: str | Path) -> dict[str, float]:
    """The `scales` that `save_pretrained` was given: empty if none."""
    path = Path(directory) / "config.json"
    scales = _read_json(path).get("scales", {})
    if not isinstance(scales, dict) or any(type(v) is not float or v <= 0 for v in scales.values()):
        raise UserError(f"{path}: scales: got {scales!r}, expected a factor above 0 for each level")
    return scales


def from_clip(
    path: str | Path,
    *,
    variant: Variant = "scenarioclip1",
    freeze: FreezeConfig | None = None,
    config: ModelConfig | None = None,
    activation: Activation | None = None,
) -> ScenarioCLIP:
    """A ScenarioCLIP whose every level starts from one CLIP checkpoint.

    CLIP's projections become the projections' matrices, with zero biases; the layernorms behind them are new.

    Args:
        path: a Hugging Face directory of a CLIPModel (config.json and model.safetensors or pytorch_model.bin, whole or
            in shards with their index), or an open_clip state dict (a directory with open_clip_model.safetensors or
            open_clip_pytorch_model.bin, or the file itself).
        variant, freeze: as in ModelConfig; the sizes come from the checkpoint. The published freezing is the default,
            of all blocks where an encoder has fewer.
        config: a whole config instead, whose sizes must be the checkpoint's.
        activation: for state dicts without an open_clip_config.json beside them, which do not say it: "quick_gelu"
            (OpenAI's weights; the default) or "gelu" (most others).
    """
    path = Path(path)
    file = _weights_file(path)
    state = _read_state(file)
    # Training checkpoints wrap the state dict and prefix its names.
    state = {name.removeprefix("module."): value for name, value in state.items()}
    if any(name.startswith("visual.") for name in state):
        vision, text, found = _from_open_clip(state, file, activation)
    elif "vision_model.embeddings.class_embedding" in state:
        vision, text, found = _from_hf(state, file, _hf_config(file.parent / "config.json"))
    else:
        raise UserError(
            f"{file}: not a CLIP checkpoint (no 'visual.*' of open_clip, no 'vision_model.*' of Hugging Face among "
            f"its {len(state)} tensors, which start with {sorted(state)[:3]})"
        )
    if config is None:
        usual = FreezeConfig()
        blocks = (min(usual.vision_blocks, found.vision.layers), min(usual.text_blocks, found.text.layers))
        config = replace(found, variant=variant, freeze=freeze or FreezeConfig(*blocks))
    problems = config.differences(found, "embed_dim", "vision", "text")
    if problems:
        raise UserError(f"{path}: not the config's architecture (config, checkpoint): {'; '.join(problems)}")
    model = ScenarioCLIP(config)
    for kind, part in (("vision", vision), ("text", text)):
        for level in LEVELS:
            encoder = getattr(model, kind)[level]
            fresh = {f"head.out_norm.{name}": p for name, p in encoder.head.out_norm.named_parameters()}
            _load(encoder, part | fresh, file, f"{kind} encoder, ")
    return model


def from_reference(
    path: str | Path, *, teacher: bool = False, freeze: FreezeConfig | None = None, heads: tuple[int, int] | None = None
) -> ScenarioCLIP:
    """The model in a Lightning checkpoint (or state dict) of the method's published code, all variants.

    Args:
        path: the `.ckpt`, or the teacher's own `*_ema_teacher.pt`.
        teacher: take the EMA teacher's weights instead of the student's.
        freeze: which parts are frozen from now on; the default is the published freezing. Parts that are frozen must be
            equal at all levels, else UserError names the first that is not.
        heads: of the vision and of the text encoder; the default is CLIP's one per 64 of width.
    """
    path = Path(path)
    record = _unpickle(path)
    if teacher:
        ema = record.get("ema")
        weights = ema.get("teacher_state") if isinstance(ema, dict) else None
        if not isinstance(weights, dict) or not weights:
            raise UserError(f"{path}: no EMA teacher in it (expected ema.teacher_state); pass teacher=False")
        record = weights
    state = _tensors(record, path)
    if any(name.startswith("model.") for name in state):
        # Beside the model lie the temperatures and, in some versions, a copy of the teacher.
        state = _under(state, "model.")
    single = any(name.startswith("visual_encoder.") for name in state)
    prefixes = dict.fromkeys(LEVELS, "") if single else {level: f"{level}_" for level in LEVELS}
    if f"{prefixes['global']}image_projection.weight" not in state:
        raise UserError(
            f"{path}: not a checkpoint of the method's published code (no 'model.global_image_projection.weight' among "
            f"its {len(state)} tensors, which start with {sorted(state)[:3]})"
        )
    parts_of = ["visual_encoder", "text_encoder", "image_projection", "image_norm", "text_projection", "text_norm"]
    known = tuple(f"{prefix}{part}." for prefix in prefixes.values() for part in parts_of)
    extra = sorted(name for name in state if not name.startswith(known))
    if extra:
        raise UserError(f"{path}: unexpected {_some(extra)}: the published code's model has no such tensors")
    encoders: dict[str, dict[str, State]] = {"vision": {}, "text": {}}
    for level, prefix in prefixes.items():
        for kind, encoder, head in (("vision", "visual", "image"), ("text", "text", "text")):
            whole = _under(state, f"{prefix}{encoder}_encoder.")
            part = _rename(
                _under(whole, f"{kind}_model.") or whole, kind, _HF[kind], _HF_BLOCK, "encoder.layers.", path
            )
            for mine, theirs in (("projection", "projection"), ("out_norm", "norm")):
                for name, value in _under(state, f"{prefix}{head}_{theirs}.").items():
                    part[f"head.{mine}.{name}"] = value
            encoders[kind][level] = part
    found = _sizes(encoders["vision"]["global"], encoders["text"]["global"], heads, "quick_gelu", path)
    variant: Variant = "pyramidclip" if single else "scenarioclip1"
    config = replace(found, variant=variant, freeze=freeze or FreezeConfig(pre_layernorm=False))
    model = ScenarioCLIP(config)
    for kind, parts in encoders.items():
        trainable = {name for name, p in getattr(model, kind)["global"].named_parameters() if p.requires_grad}
        for level, part in parts.items():
            for name, value in part.items():
                first = parts["global"].get(name)
                if name not in trainable and (first is None or not torch.equal(first, value)):
                    raise UserError(
                        f"{path}: {kind} encoder, {name}: frozen by the config, but different at 'global' and "
                        f"{level!r}; pass a `freeze` that lets it train"
                    )
            _load(getattr(model, kind)[level], part, path, f"{kind} encoder of level {level!r}, ")
    return model


def export_hf(
    model: ScenarioCLIP, directory: str | Path, level: str = "global", scale: float = CLIP_START_SCALE
) -> None:
    """Writes one level as a Hugging Face CLIPModel: config.json and model.safetensors, read by `transformers`, and
    preprocessor_config.json for images. Texts are tokenized as for any CLIP.

    scale: the factor of the cosines that the level's loss has learnt.

    CLIPModel has neither the projections' biases nor the layernorms behind them. They go into `projection.safetensors`
    (`{vision,text}.{projection.bias,out_norm.weight,out_norm.bias}`), to be applied to `image_embeds` and `text_embeds`
    before these are normalised.
    """
    if level not in LEVELS:
        raise ValueError(f"level: got {level!r}, expected one of {', '.join(LEVELS)}")
    config = model.config
    if config.vision.stem != "linear":
        raise UserError(
            f"vision.stem: got {config.vision.stem!r}, but CLIPModel has no stem other than 'linear': export as "
            "safetensors, or train with model.vision.stem=linear"
        )
    safetensors = require("safetensors.torch")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state: State = {"logit_scale": torch.tensor(scale).log()}
    rest: State = {}
    for kind, projection in (("vision", "visual_projection"), ("text", "text_projection")):
        encoder = {k: v.detach() for k, v in getattr(model, kind)[level].state_dict().items()}
        whole = _HF[kind]
        for name, value in encoder.items():
            stem, _, leaf = name.rpartition(".")
            if name.startswith("blocks."):
                _, i, part = stem.split(".", 2)
                block = f"{kind}_model.encoder.layers.{i}"
                if part == "attention.qkv":
                    for q, third in zip("qkv", value.chunk(3), strict=True):
                        state[f"{block}.self_attn.{q}_proj.{leaf}"] = third.clone()
                else:
                    state[f"{block}.{_HF_BLOCK[part]}.{leaf}"] = value.contiguous()
            elif name == "head.projection.weight":
                state[f"{projection}.weight"] = value.contiguous()
            elif name.startswith(("head.projection.", "head.out_norm.")):
                rest[f"{kind}.{name.removeprefix('head.')}"] = value.contiguous()
            elif name in whole:
                if name == "embedding.stem.weight":
                    p = config.vision.patch_size
                    value = value.view(-1, 3, p, p)
                state[f"{kind}_model.{whole[name]}"] = value.contiguous()
            else:
                state[f"{kind}_model.{whole[stem]}.{leaf}"] = value.contiguous()
    shared = {"layer_norm_eps": 1e-5, "projection_dim": config.embed_dim}
    end = config.text.end_of_text
    record = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "vision_config": _hf_sizes(config.vision)
        | {"image_size": config.vision.image_size, "patch_size": config.vision.patch_size}
        | shared,
        "text_config": _hf_sizes(config.text)
        | {"max_position_embeddings": config.text.context_length, "vocab_size": config.text.vocab_size}
        | {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
        | shared,
    }
    safetensors.save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    safetensors.save_file(rest, directory / "projection.safetensors", metadata={"format": "pt"})
    size = config.vision.image_size
    images = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }
    for name, content in (("config.json", record), ("preprocessor_config.json", images)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _hf_sizes(config: VisionConfig | TextConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "hidden_act": config.activation,
    }


def _from_hf(state: State, path: Path, record: Mapping[str, Any]) -> tuple[State, State, ModelConfig]:
    parts: dict[str, State] = {}
    _refuse_extra(
        [n for n in state if not n.startswith(("vision_model.", "text_model."))],
        _BESIDE | {"visual_projection.weight", "text_projection.weight"},
        path,
    )
    for kind, projection in (("vision", "visual_projection"), ("text", "text_projection")):
        part = _rename(_under(state, f"{kind}_model."), kind, _HF[kind], _HF_BLOCK, "encoder.layers.", path)
        parts[kind] = _with_projection(part, state, f"{projection}.weight", path)
    sub = {kind: _section(record, f"{kind}_config", path) for kind in parts}
    heads = tuple(sub[kind].get("num_attention_heads", default) for kind, default in (("vision", 12), ("text", 8)))
    found = _sizes(parts["vision"], parts["text"], (heads[0], heads[1]), "quick_gelu", path)
    vision, text = (sub[kind].get("hidden_act", "quick_gelu") for kind in ("vision", "text"))
    for kind, activation in (("vision", vision), ("text", text)):
        if sub[kind].get("layer_norm_eps", 1e-5) != 1e-5:
            raise UserError(f"{path}: {kind} layer_norm_eps {sub[kind]['layer_norm_eps']}, expected 1e-05")
        if activation not in ("quick_gelu", "gelu"):
            raise UserError(f"{path}: {kind} hidden_act {activation!r}, expected 'quick_gelu' or 'gelu'")
    end = sub["text"].get("eos_token_id", found.text.end_of_text)
    if end not in (found.text.end_of_text, 2):  # 2: of old configs, which mean the last id
        raise UserError(
            f"{path}: text eos_token_id {end}, expected {found.text.end_of_text}, the last of the vocabulary"
        )
    found = replace(found, vision=replace(found.vision, activation=vision), text=replace(found.text, activation=text))
    return parts["vision"], parts["text"], found


def _from_open_clip(state: State, path: Path, activation: Activation | None) -> tuple[State, State, ModelConfig]:
    vision = _under(state, "visual.")
    # Models with a text tower of their own put it under "text.".
    others = {k: v for k, v in state.items() if not k.startswith("visual.")}
    text = _under(others, "text.") or others
    if text is not others:
        _refuse_extra([name for name in others if not name.startswith("text.")], _BESIDE, path)
    projections = {"head.projection.weight": (vision, "proj"), "text": (text, "text_projection")}
    for part, name in projections.values():
        if name not in part or part[name].ndim != 2:
            raise UserError(f"{path}: no matrix {name!r}, which open_clip's CLIP has; other architectures are not read")
    image_projection, text_projection = vision["proj"].T.contiguous(), text["text_projection"].T.contiguous()
    for part, name in projections.values():
        del part[name]
    v = _rename(vision, "vision", _OPEN_CLIP["vision"], _OPEN_CLIP_BLOCK, "transformer.resblocks.", path)
    t = _rename(text, "text", _OPEN_CLIP["text"], _OPEN_CLIP_BLOCK, "transformer.resblocks.", path)
    for part, projection in ((v, image_projection), (t, text_projection)):
        part["head.projection.weight"] = projection
        part["head.projection.bias"] = projection.new_zeros(projection.shape[0])
    found = _sizes(v, t, None, activation or "quick_gelu", path)
    beside = path.parent / "open_clip_config.json"
    if not beside.is_file():
        return v, t, found
    said = _section(_read_json(beside), "model_cfg", beside)
    activation = "quick_gelu" if said.get("quick_gelu") else "gelu"
    head_width = _section(said, "vision_cfg", beside).get("head_width", 64)
    if not isinstance(head_width, int) or head_width < 1:
        raise UserError(f"{beside}: vision_cfg.head_width {head_width!r}, expected an integer above 0")
    vision_heads = found.vision.width // head_width
    text_heads = _section(said, "text_cfg", beside).get("heads", 8)
    return (
        v,
        t,
        replace(
            found,
            vision=replace(found.vision, heads=vision_heads, activation=activation),
            text=replace(found.text, heads=text_heads, activation=activation),
        ),
    )


def _with_projection(part: State, state: State, name: str, path: Path) -> State:
    if name not in state:
        raise UserError(f"{path}: missing {name}: not a whole CLIPModel")
    if state[name].ndim != 2:
        raise UserError(f"{path}: {name}: got shape {list(state[name].shape)}, expected a matrix")
    bias = state[name].new_zeros(state[name].shape[0])
    return part | {"head.projection.weight": state[name], "head.projection.bias": bias}


def _rename(
    state: State, kind: str, whole: Mapping[str, str], block: Mapping[str, str], layers: str, path: Path
) -> State:
    """One encoder's tensors under this package's names. UserError names those that CLIP does not have."""
    known = {f"{name}{leaf}" for name in whole.values() for leaf in ("", ".weight", ".bias")}
    _refuse_extra([n for n in state if not n.startswith(layers)], known | _BESIDE | {_POSITION_IDS}, path, kind)
    out: State = {}
    for mine, theirs in whole.items():
        if theirs in state:
            out[mine] = state[theirs]
        for leaf in ("weight", "bias"):
            if f"{theirs}.{leaf}" in state:
                out[f"{mine}.{leaf}"] = state[f"{theirs}.{leaf}"]
    stem = out.get("embedding.stem.weight")
    if stem is not None and stem.ndim == 4:
        out["embedding.stem.weight"] = stem.flatten(1)
    rest: dict[str, State] = {}
    for name, value in _under(state, layers).items():
        i, _, tail = name.partition(".")
        rest.setdefault(i, {})[tail] = value
    for i, tensors in rest.items():
        names = {f"{theirs}.": f"blocks.{i}.{mine}." for mine, theirs in block.items()}
        for tail, value in tensors.items():
            hit = next((p for p in names if tail.startswith(p)), None)
            if hit is not None:
                out[names[hit] + tail.removeprefix(hit)] = value
            elif tail.startswith("attn.in_proj_"):
                out[f"blocks.{i}.attention.qkv.{tail.removeprefix('attn.in_proj_')}"] = value
            elif not re.fullmatch(r"self_attn\.[qkv]_proj\.(weight|bias)", tail):
                raise UserError(f"{path}: {kind} encoder, {layers}{i}.{tail}: CLIP has no such tensor")
        for leaf in ("weight", "bias"):
            qkv = [q for q in (tensors.get(f"self_attn.{name}_proj.{leaf}") for name in "qkv") if q is not None]
            if len({q.shape for q in qkv}) > 1:
                shapes = ", ".join(str(list(q.shape)) for q in qkv)
                raise UserError(
                    f"{path}: {kind} encoder, {layers}{i}.self_attn: {leaf} of query, key and value of shapes "
                    f"{shapes}, expected one shape"
                )
            if len(qkv) == 3:
                out[f"blocks.{i}.attention.qkv.{leaf}"] = torch.cat(qkv)
    return out


def _refuse_extra(names: list[str], known: Collection[str], path: Path, kind: str = "") -> None:
    extra = sorted(name for name in names if name not in known)
    if extra:
        what = f"{kind} encoder, " if kind else ""
        raise UserError(f"{path}: {what}unexpected {_some(extra)}: CLIP has no such tensors")


def _section(record: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    """A part of a config; an absent one is empty."""
    found = record.get(name) or {}
    if not isinstance(found, dict):
        raise UserError(f"{path}: {name}: got a {type(found).__name__}, expected an object")
    return found


def _sizes(
    vision: State, text: State, heads: tuple[int, int] | None, activation: Activation, path: Path
) -> ModelConfig:
    """The config that the tensors' shapes tell."""
    try:
        stem, position = vision["embedding.stem.weight"], vision["embedding.position"]
        for part, name in (
            *((vision, f"embedding.{leaf}") for leaf in ("stem.weight", "position")),
            *((text, f"embedding.{leaf}") for leaf in ("token.weight", "position")),
            *((part, "head.projection.weight") for part in (vision, text)),
        ):
            if part[name].ndim != 2 or not part[name].numel():
                raise UserError(f"{path}: {name}: got shape {list(part[name].shape)}, expected a matrix")
        patch = round((stem.shape[1] / 3) ** 0.5)
        side = round((position.shape[0] - 1) ** 0.5)
        width, text_width = stem.shape[0], text["embedding.token.weight"].shape[1]
        # 64 wide, those of ViT-H 80; a narrow encoder has one. ViT-g and larger have another MLP and are not read.
        vision_heads, text_heads = heads or (max(width // (80 if width == 1280 else 64), 1), max(text_width // 64, 1))
        return ModelConfig(
            embed_dim=vision["head.projection.weight"].shape[0],
            vision=VisionConfig(
                image_size=side * patch,
                patch_size=patch,
                width=width,
                layers=_depth(vision),
                heads=vision_heads,
                activation=activation,
            ),
            text=TextConfig(
                context_length=text["embedding.position"].shape[0],
                vocab_size=text["embedding.token.weight"].shape[0],
                width=text_width,
                layers=_depth(text),
                heads=text_heads,
                activation=activation,
            ),
            freeze=FreezeConfig.nothing(),
        )
    except KeyError as error:
        raise UserError(f"{path}: missing what this package calls {error.args[0]!r}: not a whole CLIP") from None


def _depth(state: State) -> int:
    return len({name.split(".")[1] for name in state if name.startswith("blocks.")})


def _load(module: nn.Module, state: Mapping[str, Tensor], path: Path, what: str = "") -> None:
    """Loads strictly; one error names what is missing, what is too much and what has another shape."""
    wanted = module.state_dict()
    lines = []
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing:
        lines.append(f"missing {_some(missing)}")
    if extra:
        lines.append(f"unexpected {_some(extra)}")
    shapes = [
        f"{name} ({list(state[name].shape)}, expected {list(wanted[name].shape)})"
        for name in sorted(wanted.keys() & state.keys())
        if state[name].shape != wanted[name].shape
    ]
    if shapes:
        lines.append(f"of another shape {_some(shapes)}")
    # Quantised weights are numbers of another kind, and would be copied as they are.
    kinds = [f"{name} ({value.dtype})" for name, value in sorted(state.items()) if not value.is_floating_point()]
    if kinds:
        lines.append(f"not floats {_some(kinds)}")
    if lines:
        raise UserError(f"{path}: {what}tensors do not fit the model: {'; '.join(lines)}")
    module.load_state_dict(state)


def _some(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _under(state: Mapping[str, Tensor], prefix: str) -> State:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _weights_file(path: Path) -> Path:
    if path.is_file():
        return path
    names = (
        "model.safetensors",
        f"model.safetensors{_INDEX}",
        "open_clip_model.safetensors",
        "pytorch_model.bin",
        f"pytorch_model.bin{_INDEX}",
        "open_clip_pytorch_model.bin",
    )
    for name in names:
        if (path / name).is_file():
            return path / name
    what = "holds none of " + ", ".join(names) if path.is_dir() else "no such file or directory"
    raise UserError(f"{path}: {what}")


def _read_state(path: Path) -> State:
    if path.name.endswith(_INDEX):
        shards = _read_json(path).get("weight_map")
        names = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
        if not names or any(Path(name).name != name or name.endswith(_INDEX) for name in names):
            raise UserError(f"{path}: expected a weight_map from tensors to files beside it")
        return {name: value for shard in names for name, value in _read_state(path.parent / shard).items()}
    if path.suffix == ".safetensors":
        safetensors = require("safetensors.torch")
        return _checked(lambda: safetensors.load_file(path), path)
    return _tensors(_unpickle(path), path)


def _unpickle(path: Path) -> dict[str, Any]:
    record = _checked(lambda: torch.load(path, map_location="cpu", weights_only=True), path)
    if not isinstance(record, dict):
        raise UserError(f"{path}: got a {type(record).__name__}, expected a dictionary of tensors")
    return record


def _checked(read: Callable[[], Any], path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        return read()
    except pickle.UnpicklingError as error:
        # torch's own message tells how to run the code.
        found = re.search(r"WeightsUnpickler error:\s+(.+)", str(error))
        reason = found[1].partition(". ")[0] if found else "torch.load does not take it"
        raise UserError(
            f"{path}: refused: it holds more than tensors and plain values, and reading it could run code ({reason}); "
            "save its state_dict alone, best as safetensors"
        ) from None
    except (OSError, RuntimeError, ValueError, EOFError, LookupError, AttributeError, TypeError) as error:
        # what is no pickle at all ends in any of these
        if "TorchScript" in str(error):
            raise UserError(
                f"{path}: refused: a TorchScript archive (as OpenAI's own files are), and reading it could run code; "
                "take the same weights in Hugging Face's or open_clip's form"
            ) from None
        raise UserError(f"{path}: not a readable checkpoint ({type(error).__name__}: {error})") from None
    except Exception as error:
        # safetensors raises an exception class of its own, which is only known once it is imported.
        if type(error).__module__.startswith("safetensors"):
            raise UserError(f"{path}: not a readable safetensors file ({error})") from None
        raise


def _tensors(record: dict[str, Any], path: Path) -> State:
    """The tensors of a state dict, or of the one in a training checkpoint."""
    record = record.get("state_dict", record)
    if not isinstance(record, dict):
        raise UserError(f"{path}: state_dict: got a {type(record).__name__}, expected a dictionary of tensors")
    wrong = [str(name) for name, value in record.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if wrong:
        raise UserError(f"{path}: not a dictionary of tensors: {_some(sorted(wrong))} are something else")
    return dict(record)


def _hf_config(path: Path) -> dict[str, Any]:
    return _read_json(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable JSON ({error})") from None
    if not isinstance(record, dict):
        raise UserError(f"{path}: got a {type(record).__name__}, expected an object")
    return record
