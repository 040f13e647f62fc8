"""Tiny vision-language models with random weights, written in place."""

from __future__ import annotations

from pathlib import Path

import torch

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)


def write_qwen(path: Path, kind: str) -> Path:
    """Write a checkpoint of 0.6 MB with a tokenizer of bytes; `kind`: "qwen2_5_vl" or "qwen3_vl"."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*_SPECIAL, "<|video_pad|>"])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = _TEMPLATE
    ids = {name: fast.convert_tokens_to_ids(name) for name in (*_SPECIAL, "<|video_pad|>")}
    new = kind == "qwen3_vl"
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    text = {
        "vocab_size": len(fast),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "bos_token_id": ids["<|im_start|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "rope_parameters": rope | ({"mrope_interleaved": True} if new else {}),
    } | ({"head_dim": 16} if new else {})
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
    vision |= (
        {"patch_size": 16, "deepstack_visual_indexes": [0], "num_position_embeddings": 64}
        if new
        else {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}
    )
    tokens = {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }
    config_class = transformers.Qwen3VLConfig if new else transformers.Qwen2_5_VLConfig
    model_class = (
        transformers.Qwen3VLForConditionalGeneration if new else transformers.Qwen2_5_VLForConditionalGeneration
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config_class(text_config=text, vision_config=vision, **tokens))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.mul_(3)  # with the usual initial weights, answers hardly depend on the image
    model.save_pretrained(path)
    fast.save_pretrained(path)
    images = transformers.models.qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil
    images(min_pixels=56 * 56, max_pixels=112 * 112, patch_size=vision["patch_size"]).save_pretrained(path)
    return path
