from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from scenarioclip_fast.data import LoaderConfig, ShardSource
from scenarioclip_fast.data.config import shard_sources
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
        ("max_batch_gib", 0, "above 0"),
        ("max_batch_gib", -1.0, "above 0"),
        ("max_batch_gib", float("nan"), "a finite number"),
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


def test_every_form_of_several_data_sets(tmp_path: Path) -> None:
    expected = (ShardSource("a", 2), ShardSource("b"))
    for shards in (["a"], "a", Path("a"), ShardSource("a"), [{"path": Path("a")}]):
        assert shard_sources(shards) == (ShardSource("a"),)  # type: ignore[arg-type]
    for several in ([{"path": "a", "weight": "2"}, "b"], (ShardSource("a", 2), Path("b")), list(expected)):
        assert shard_sources(several) == expected  # type: ignore[arg-type]
        data = DataSection(shards=several)  # type: ignore[arg-type]
        assert data.shards == expected and replace(data, batch_size=3).shards == expected
    assert shard_sources([{"path": "~/a", "weight": "1e-3"}]) == (ShardSource(str(Path.home() / "a"), 0.001),)
    assert shard_sources(["./[a]", "s3://a", "https://a/b"])[0].path == "./[a]"
    assert DataSection(shards=[{"path": "a", "weight": 1}]).shards == "a"  # type: ignore[list-item,arg-type]
    assert DataSection().shards == ""


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ([], "shards: got an empty list, expected at least one data set"),
        (None, "shards: got None, expected a path, or a list such as [{path: a, weight: 2}, {path: b}]"),
        ({"path": "a"}, "shards: got a mapping, expected a path, or a list such as [{path: a, weight: 2}, {path: b}]"),
        ("[a, b]", "shards: got '[a, b]', expected a path: write a list without quotes, or put ./ before such a name"),
        ("", "shards: got '', expected a directory or a URL"),
        (["a", ""], "shards[1]: got '', expected a directory or a URL"),
        (["a", 7], "shards[1]: got 7, expected a path, or a mapping of path and weight"),
        (["a", ["b"]], "shards[1]: got ['b'], expected a path, or a mapping of path and weight"),
        ([{"weight": 2}], "shards[0]: got no path, expected {path: DIR, weight: NUMBER}"),
        ([{"path": None}], "shards[0].path: got None, expected text"),
        (["a", {"path": "b", "wieght": 2}], "shards[1]: unknown key 'wieght': did you mean weight?"),
        ([{"path": "b", "zzz": 2}], "shards[0]: unknown key 'zzz': expected one of path, weight"),
        ([{"path:b": None}], "shards[0]: unknown key 'path:b': a space must follow the colon"),
        ([{"path": "a", "weight": 0}], "shards[0].weight: got 0, expected above 0, and at most 1000000"),
        ([{"path": "a", "weight": -1.5}], "shards[0].weight: got -1.5, expected above 0, and at most 1000000"),
        ([{"path": "a", "weight": 1e7}], "shards[0].weight: got 10000000.0, expected above 0, and at most 1000000"),
        ([{"path": "a", "weight": float("nan")}], "shards[0].weight: got nan, expected a finite number"),
        ([{"path": "a", "weight": "nan"}], "shards[0].weight: got nan, expected a finite number"),
        ([{"path": "a", "weight": "two"}], "shards[0].weight: got 'two', expected a finite number"),
        ([{"path": "a", "weight": True}], "shards[0].weight: got True, expected a finite number"),
        (
            ["a", "b", "./a/"],
            "shards[2]: got ./a/, the same data set as a: list it once, with the sum of both weights",
        ),
        (
            ["s3://a/b", {"path": "s3://a/b/"}],
            "shards[1]: got s3://a/b/, the same data set as s3://a/b: list it once, with the sum of both weights",
        ),
    ],
)
def test_malformed_data_sets_are_named(shards: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        shard_sources(shards)
    assert str(caught.value) == message
    if shards != "":  # not set
        with pytest.raises(UserError) as caught:
            DataSection(shards=shards)
        assert str(caught.value) == message


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
