"""Tiny checkpoints of detectors and segmenters, with random weights, in the format of transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is first imported

import pytest
import torch
import torch.nn.functional as F

WORDS = [
    *("a", "red", "blue", "ball", "dog", "cat", "frisbee", "grass", "person", "the", "tree", "car", "bus", "on", "mat"),
    *("##s", "##t"),
]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """For models this small, threads mostly wait for each other: on busy cores, tests take many times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _vocabulary() -> list[str]:
    """The special tokens at BERT's ids, which GroundingDINO has built in, then WORDS."""
    words = [f"[unused{i}]" for i in range(1030)]
    for i, word in {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}.items():
        words[i] = word
    return words + WORDS


def _bert(folder: Path) -> Any:
    from transformers import BertTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(_vocabulary()) + "\n")
    return BertTokenizer(str(folder / "vocab.txt"))


def grounding_dino(folder: Path, *, mm: bool = False, max_text_len: int = 64, scale: float = 4.0) -> Path:
    """Write a GroundingDINO, or an MM-GroundingDINO.

    Args:
        scale: of the text projection, so that the scores of random weights differ.
    """
    import transformers as tf

    torch.manual_seed(0)
    names = ("MMGroundingDinoConfig", "MMGroundingDinoForObjectDetection")
    config_class, model_class = (getattr(tf, name.removeprefix("" if mm else "MM")) for name in names)
    config = config_class(
        backbone_config=tf.SwinConfig(
            image_size=64,
            embed_dim=16,
            depths=[1, 1, 1, 1],
            num_heads=[1, 2, 2, 4],
            window_size=4,
            out_features=["stage2", "stage3", "stage4"],
        ),
        text_config=tf.BertConfig(
            vocab_size=len(_vocabulary()),
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
        ),
        d_model=64,  # 2 channels per group of GroupNorm: a feature map may have one pixel
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=20,
        max_text_len=max_text_len,
    )
    model = model_class(config)
    with torch.no_grad():
        model.model.text_projection.weight.mul_(scale)
        for layer in {id(head.layers[-1]): head.layers[-1] for head in model.bbox_embed}.values():
            layer.weight.normal_(std=0.5)  # zero otherwise: the boxes would be those of the grid
    image_processor = _pil(tf, "GroundingDinoImageProcessor", {"shortest_edge": 64, "longest_edge": 128})
    processor = tf.GroundingDinoProcessor(image_processor, _bert(folder))
    return _save(folder, model, processor)


def owlv2(folder: Path) -> Path:
    """Write an OWLv2."""
    import transformers as tf
    from tokenizers import pre_tokenizers

    torch.manual_seed(0)
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    texts = ["!", *(c for c in characters if c != "!"), *(f"{c}</w>" for c in characters)]
    texts += ["<|startoftext|>", "<|endoftext|>"]  # the model looks for the highest id as the end
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({text: i for i, text in enumerate(texts)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = tf.CLIPTokenizer.from_pretrained(folder, pad_token="!", model_max_length=16)
    end = len(texts) - 1
    config = tf.Owlv2Config(
        text_config={
            "vocab_size": len(texts),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "eos_token_id": end,
            "bos_token_id": end - 1,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 16,
        },
        projection_dim=32,
    )
    model = tf.Owlv2ForObjectDetection(config)
    processor = tf.Owlv2Processor(_pil(tf, "Owlv2ImageProcessor", {"height": 64, "width": 64}), tokenizer)
    return _save(folder, model, processor)


def sam(folder: Path) -> Path:
    """Write a SAM."""
    import transformers as tf

    torch.manual_seed(0)
    config = tf.SamConfig(
        vision_config={
            "hidden_size": 32,
            "output_channels": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 8,
            "window_size": 4,
            "global_attn_indexes": [1],
            "mlp_dim": 64,
            "num_pos_feats": 8,
            "initializer_range": 0.02,  # 1e-10 by default: images would not matter
        },
        prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4},
        mask_decoder_config={
            "hidden_size": 16,
            "mlp_dim": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 16,
        },
    )
    image_processor = _pil(
        tf,
        "SamImageProcessor",
        {"longest_edge": 64},
        pad_size={"height": 64, "width": 64},
        mask_size={"longest_edge": 16},
        mask_pad_size={"height": 16, "width": 16},
    )
    return _save(folder, _enlarged(tf.SamModel(config)), tf.SamProcessor(image_processor))


def sam2(folder: Path) -> Path:
    """Write a SAM 2, without a processor where torchvision is missing."""
    import transformers as tf

    torch.manual_seed(0)
    config = tf.Sam2Config(
        vision_config={
            "backbone_config": tf.Sam2HieraDetConfig(
                hidden_size=16,
                num_attention_heads=1,
                image_size=[64, 64],
                blocks_per_stage=[1, 2, 1, 1],
                embed_dim_per_stage=[16, 32, 64, 128],
                num_attention_heads_per_stage=[1, 1, 2, 4],
                global_attention_blocks=[2],
                window_size_per_stage=[8, 4, 2, 2],
                window_positional_embedding_background_size=[4, 4],
            ),
            "backbone_channel_list": [128, 64, 32, 16],
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
            "fpn_hidden_size": 32,
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": 64, "patch_size": 16, "mask_input_channels": 4},
        mask_decoder_config={
            "hidden_size": 32,
            "mlp_dim": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 16,
        },
    )
    _enlarged(tf.Sam2Model(config)).save_pretrained(folder)
    processor = {
        "image_processor_type": "Sam2ImageProcessor",
        "processor_class": "Sam2Processor",
        "size": {"height": 64, "width": 64},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    (folder / "processor_config.json").write_text(
        json.dumps({"processor_class": "Sam2Processor", "image_processor": processor})
    )
    return folder


class Sam2Images:
    """What SAM 2's image processor does, without torchvision: resizes to squares, normalises, resizes masks back."""

    image_processor = property(lambda self: self)

    def __call__(self, images: list[Any], input_data_format: str, return_tensors: str) -> dict[str, Any]:
        assert (input_data_format, return_tensors) == ("channels_last", "pt")
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
        resized = [
            F.interpolate(torch.from_numpy(image).permute(2, 0, 1)[None], (64, 64), mode="bilinear", antialias=True)
            for image in images
        ]
        return {"pixel_values": (torch.cat(resized) / 255 - mean) / std}

    def post_process_masks(self, masks: list[torch.Tensor], sizes: list[tuple[int, int]]) -> list[torch.Tensor]:
        return [
            F.interpolate(m, s, mode="bilinear", align_corners=False) > 0 for m, s in zip(masks, sizes, strict=True)
        ]


def _enlarged(model: Any) -> Any:
    """Larger weights: with those of the initialisation, all masks of a segmenter are alike."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2 and "positional" not in name:
                weight.mul_(8)
    return model


def _pil(tf: Any, name: str, size: dict[str, int], **options: Any) -> Any:
    """The image processor on Pillow, which needs no torchvision."""
    return getattr(tf, f"{name}Pil")(size=size, **options)


def _save(folder: Path, model: Any, processor: Any) -> Path:
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
