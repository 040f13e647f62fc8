"""Generate scenes, read data sets, pack them into shards and load batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scenarioclip_fast.lazy import attach

if TYPE_CHECKING:
    from scenarioclip_fast.data.batch import Batch
    from scenarioclip_fast.data.config import LoaderConfig, ShardSource
    from scenarioclip_fast.data.loader import SceneLoader, scene_loader
    from scenarioclip_fast.data.mix import ShardMix
    from scenarioclip_fast.data.packing.merging import merge_parts
    from scenarioclip_fast.data.packing.on_ray import pack_on_ray
    from scenarioclip_fast.data.packing.packer import pack
    from scenarioclip_fast.data.packing.report import PackReport
    from scenarioclip_fast.data.scene import Mask, Relation, Scene, SceneObject
    from scenarioclip_fast.data.shards import BadSample, ShardSet
    from scenarioclip_fast.data.sources.base import Reader, Source
    from scenarioclip_fast.data.sources.published import load_reference
    from scenarioclip_fast.data.synthetic import generate_scenes, write_published_layout
    from scenarioclip_fast.data.views import Views
    from scenarioclip_fast.data.vocabulary import Vocabulary
else:
    __getattr__, __dir__ = attach(
        __name__,
        {
            "batch": ["Batch"],
            "config": ["LoaderConfig", "ShardSource"],
            "loader": ["SceneLoader", "scene_loader"],
            "packing.merging": ["merge_parts"],
            "mix": ["ShardMix"],
            "packing.packer": ["pack"],
            "packing.report": ["PackReport"],
            "packing.on_ray": ["pack_on_ray"],
            "scene": ["Mask", "Relation", "Scene", "SceneObject"],
            "shards": ["BadSample", "ShardSet"],
            "sources.base": ["Reader", "Source"],
            "sources.published": ["load_reference"],
            "synthetic": ["generate_scenes", "write_published_layout"],
            "views": ["Views"],
            "vocabulary": ["Vocabulary"],
        },
    )

__all__ = [
    "BadSample",
    "Batch",
    "LoaderConfig",
    "Mask",
    "PackReport",
    "Reader",
    "Relation",
    "Scene",
    "SceneLoader",
    "SceneObject",
    "ShardMix",
    "ShardSet",
    "ShardSource",
    "Source",
    "Views",
    "Vocabulary",
    "generate_scenes",
    "load_reference",
    "merge_parts",
    "pack",
    "pack_on_ray",
    "scene_loader",
    "write_published_layout",
]
