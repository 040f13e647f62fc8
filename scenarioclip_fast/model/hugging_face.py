"""Export one level as a `transformers` CLIPModel."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.levels import check_level
from scenarioclip_fast.model.config import ModelConfig, TextConfig, VisionConfig
from scenarioclip_fast.model.convert import KINDS, State, to_hugging_face
from scenarioclip_fast.model.scenarioclip import ScenarioCLIP
from scenarioclip_fast.ops.views import CLIP_MEAN, CLIP_STD
from scenarioclip_fast.requirements import require

CLIP_INITIAL_SCALE = 1 / 0.07  # CLIP's initial logit scale


def export_hf(
    model: ScenarioCLIP, directory: str | Path, level: str = "global", scale: float = CLIP_INITIAL_SCALE
) -> None:
    """Write one level as a Hugging Face CLIPModel.

    Writes config.json and model.safetensors for `transformers`, and preprocessor_config.json for images; texts are
    tokenized as for any CLIP. CLIPModel has neither the projections' biases nor the layernorms after them: these are
    written to `projection.safetensors` (`{vision,text}.{projection.bias,out_norm.weight,out_norm.bias}`); apply them to
    `image_embeds` and `text_embeds` before normalisation.

    Args:
        model: the model.
        directory: output directory, created if needed.
        level: "global", "object" or "relation".
        scale: the learned logit scale of the level.

    Raises:
        UserError: the model has a convolutional stem, which CLIPModel lacks, or `scale` is not a finite number above 0.
    """
    check_level(level)
    if not 0 < scale < math.inf:
        raise UserError(f"scale: got {scale!r}, expected a finite number above 0")
    config = model.config
    if config.vision.stem != "linear":
        raise UserError(
            f"vision.stem: got {config.vision.stem!r}, but CLIPModel supports 'linear' only: export as "
            "safetensors, or train with model.vision.stem=linear"
        )
    safetensors = require("safetensors.torch")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state: State = {"logit_scale": torch.tensor(scale).log()}
    rest: State = {}
    for kind in KINDS:
        encoder = {name: value.detach() for name, value in getattr(model, kind)[level].state_dict().items()}
        converted, unsupported = to_hugging_face(kind, encoder, config.vision.patch_size)
        state |= converted
        rest |= unsupported
    safetensors.save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    safetensors.save_file(rest, directory / "projection.safetensors", metadata={"format": "pt"})
    records = {
        "config.json": _model_record(config),
        "preprocessor_config.json": _image_processor_record(config.vision.image_size),
    }
    for name, record in records.items():
        (directory / name).write_text(json.dumps(record, indent=2) + "\n", "utf-8")


def _model_record(config: ModelConfig) -> dict[str, Any]:
    end = config.text.end_of_text
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "vision_config": _encoder_record(config.vision, config.embed_dim)
        | {"image_size": config.vision.image_size, "patch_size": config.vision.patch_size},
        "text_config": _encoder_record(config.text, config.embed_dim)
        | {"max_position_embeddings": config.text.context_length, "vocab_size": config.text.vocab_size}
        | {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end},
    }


def _encoder_record(config: VisionConfig | TextConfig, embed_dim: int) -> dict[str, Any]:
    return {
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "hidden_act": config.activation,
        "layer_norm_eps": 1e-5,
        "projection_dim": embed_dim,
    }


def _image_processor_record(size: int) -> dict[str, Any]:
    return {
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
