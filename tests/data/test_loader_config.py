from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest

from scenarioclip_fast.data import LoaderConfig
from scenarioclip_fast.data.views import OBJECT_VIEWS, RELATION_VIEWS, Views
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.train.config import DataSection


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("object_view", "boxed", "one of masked, crop"),
        ("relation_view", "boxed", "one of focused, box, scene"),
        ("blur", "gaussian", "one of rgb, reference"),
        ("decoder", "pil", "one of auto, dali, nvimgcodec, torchvision, torch"),
        ("prefetch", -1, "at least 0, or null"),
        ("threads", 0, "at least 1, or null"),
        ("cache_gib", float("inf"), "a finite number"),
        ("shard_cache_gib", -1.0, "at least 0"),
        ("max_pixels", 0, "at least 1"),
        ("augment", "false", "true or false"),
        ("augment", 1, "true or false"),
        ("prefetch", "2", "an integer, or null"),
        ("prefetch", True, "an integer, or null"),
        ("threads", 1.5, "an integer, or null"),
        ("cache_gib", "1", "a finite number"),
        ("shard_cache_dir", 3, "text, or null"),
        ("max_bad_fraction", 1.5, "a fraction from 0 to 1"),
    ],
)
def test_an_invalid_value_names_its_field(field: str, value: Any, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        LoaderConfig(**{field: value})
    assert str(caught.value) == f"{field}: got {value!r}, expected {expected}"
    with pytest.raises(UserError, match=f"^{field}: got "):
        DataSection(**{field: value})


def test_every_choice_of_views_is_implemented() -> None:
    for object_view in OBJECT_VIEWS:
        for relation_view in RELATION_VIEWS:
            config = LoaderConfig(object_view=object_view, relation_view=relation_view)  # type: ignore[arg-type]
            assert len(Views.of_scenes([], object_view=config.object_view, relation_view=config.relation_view)) == 0


def test_the_trainer_config_extends_the_loader_config() -> None:
    own = {"shards", "batch_size"}
    assert {f.name for f in fields(DataSection)} == {f.name for f in fields(LoaderConfig)} | own


def test_importing_the_config_does_not_import_torch() -> None:
    code = (
        "import sys, scenarioclip_fast.data.config, scenarioclip_fast.train.config; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
