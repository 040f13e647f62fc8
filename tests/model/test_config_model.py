"""Configs: presets, round trips, and errors that name the field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.model import FreezeConfig, ModelConfig, TextConfig, VisionConfig


def test_presets() -> None:
    paper = ModelConfig.preset("vit-b-32")
    assert (paper.vision.width, paper.vision.layers, paper.vision.tokens, paper.text.width) == (768, 12, 50, 512)
    assert (paper.freeze.vision_blocks, paper.freeze.text_blocks, paper.embed_dim) == (6, 10, 512)
    tiny = ModelConfig.preset("tiny", variant="pyramidclip")
    assert (tiny.variant, tiny.vision.stem, tiny.vision.image_size) == ("pyramidclip", "conv", 64)
    assert tiny.freeze == FreezeConfig.nothing()
    with pytest.raises(UserError, match="model preset: got 'huge', expected one of vit-b-32, tiny"):
        ModelConfig.preset("huge")


def test_round_trip_through_json() -> None:
    config = ModelConfig.preset("tiny")
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert ModelConfig.from_dict({"embed_dim": 64}).vision == VisionConfig()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"variant": "clip"}, "variant: got 'clip', expected one of scenarioclip1, scenarioclip0, pyramidclip"),
        ({"embed_dim": 0}, "embed_dim: got 0, expected above 0"),
        ({"vision": {"width": 100}}, r"vision.width: got 100, expected a multiple of vision.heads \(12\)"),
        ({"vision": {"image_size": 225}}, "vision.image_size: got 225, expected a multiple of vision.patch_size"),
        ({"vision": {"stem": "deep"}}, "vision.stem: got 'deep', expected one of linear, conv"),
        (
            {"vision": {"stem": "conv", "image_size": 24, "patch_size": 12}},
            "vision.patch_size: got 12, .* power of two",
        ),
        ({"vision": {"stem": "conv", "width": 12}}, "vision.width: got 12, expected a multiple of 16"),
        ({"text": {"layers": 2.5}}, "text.layers: got 2.5, expected an integer"),
        ({"text": {"context_length": 1}}, "text.context_length: got 1, expected at least 2"),
        ({"text": {"activation": "relu"}}, "text.activation: got 'relu', expected one of quick_gelu, gelu"),
        ({"freeze": {"vision_blocks": 13}}, r"freeze.vision_blocks: got 13, expected at most vision.layers \(12\)"),
        ({"freeze": {"text_blocks": -1}}, "freeze.text_blocks: got -1, expected at least 0"),
        ({"freeze": {"embeddings": "no"}}, "freeze.embeddings: got 'no', expected true or false"),
        ({"vision": {"heads": True}}, "vision.heads: got True, expected an integer"),
        ([1], r"model config: got \[1\], expected a mapping"),
        ({"text": {"depth": 3}}, "unknown model config key text.depth: expected text.context_length"),
        ({"lr": 1}, "unknown model config key lr"),
        ({"text": 3}, "text: got 3, expected a mapping"),
    ],
)
def test_errors_name_the_field(record: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModelConfig.from_dict(record)


def test_differences() -> None:
    one, two = ModelConfig(), ModelConfig(embed_dim=256, text=TextConfig(width=256), variant="pyramidclip")
    assert one.differences(two, "embed_dim", "text") == ["embed_dim: 512 and 256", "text.width: 512 and 256"]
    assert "variant: 'scenarioclip1' and 'pyramidclip'" in one.differences(two)
    assert one.differences(one) == []
