"""Scenes: drawn, read from the published layout, packed into shards and loaded as batches."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scenarioclip_fast.data.loader import Batch, SceneLoader, scene_loader
    from scenarioclip_fast.data.packing import PackReport, pack
    from scenarioclip_fast.data.reference_layout import load_reference
    from scenarioclip_fast.data.scene import Mask, Relation, Scene, SceneObject
    from scenarioclip_fast.data.shards import BadSample, ShardSet
    from scenarioclip_fast.data.synthetic import generate_scenes, write_reference_layout
    from scenarioclip_fast.data.views import Views
    from scenarioclip_fast.data.vocabulary import Vocabulary

__all__ = [
    "BadSample",
    "Batch",
    "Mask",
    "PackReport",
    "Relation",
    "Scene",
    "SceneLoader",
    "SceneObject",
    "ShardSet",
    "Views",
    "Vocabulary",
    "generate_scenes",
    "load_reference",
    "pack",
    "scene_loader",
    "write_reference_layout",
]

_HOMES = {
    "BadSample": "shards",
    "Batch": "loader",
    "Mask": "scene",
    "PackReport": "packing",
    "Relation": "scene",
    "Scene": "scene",
    "SceneLoader": "loader",
    "SceneObject": "scene",
    "ShardSet": "shards",
    "Views": "views",
    "Vocabulary": "vocabulary",
    "generate_scenes": "synthetic",
    "load_reference": "reference_layout",
    "pack": "packing",  # not "pack": importing a submodule would shadow the function of its name
    "scene_loader": "loader",
    "write_reference_layout": "synthetic",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
