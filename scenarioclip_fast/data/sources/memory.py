"""Scenes in memory as a source for `pack`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from scenarioclip_fast.data.check import BadEntry, CheckedScene, SceneChecker, malformed_entries
from scenarioclip_fast.data.scene import Scene
from scenarioclip_fast.data.shards import SPLITS
from scenarioclip_fast.data.sources.base import Source, SourceOptions, SplitOf
from scenarioclip_fast.requirements import require
from scenarioclip_fast.terminal import short

_QUALITY = 95  # JPEG quality for images given as pixels


@dataclass(frozen=True)
class Indexed:
    """A scene and its position in the iterable."""

    position: int
    scene: Scene

    def __str__(self) -> str:
        return f"scene {self.position} ({short(str(getattr(self.scene, 'key', None)))[1:-1]})"


class MemorySource(Source):
    """The scenes of an iterable, read in order and in this process; it has no fingerprint."""

    accepts = frozenset({"boxes"})

    def __init__(self, scenes: Iterable[Scene], options: SourceOptions) -> None:
        self._scenes, self._options = scenes, options

    @property
    def directories(self) -> set[Path]:
        """Empty: the scenes are in memory."""
        return set()

    @property
    def total(self) -> int | None:
        """The number of scenes if the iterable has a length."""
        return len(self._scenes) if isinstance(self._scenes, Sized) else None

    @property
    def parallel(self) -> bool:
        """False: sending scenes to worker processes costs more than checking them."""
        return False

    def items(self, split_of: SplitOf) -> Iterator[Indexed]:
        """The scenes and their positions."""
        return (Indexed(i, scene) for i, scene in enumerate(self._scenes))

    def reader(self) -> MemoryReader:
        """Create the reader of the scenes."""
        return MemoryReader(SceneChecker(self._options.max_pixels, boxes=self._options.boxes))


class MemoryReader:
    """Checks scenes, and encodes images given as pixels."""

    def __init__(self, checker: SceneChecker) -> None:
        self._checker = checker

    def read(self, item: Indexed) -> CheckedScene:
        """Check a scene.

        Raises:
            BadEntry: the whole scene is unusable.
        """
        scene = item.scene
        with malformed_entries():
            if scene.split not in (None, *SPLITS):
                raise BadEntry("malformed_entry", f"got split {scene.split!r}, expected one of {', '.join(SPLITS)}")
            image = scene.image if isinstance(scene.image, bytes) else _encode(scene.image)
            return self._checker.check(replace(scene, image=image), str(item))


def _encode(image: Tensor) -> bytes:
    if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 3 or image.shape[2] != 3:
        got = f"{list(image.shape)}, {image.dtype}" if isinstance(image, Tensor) else short(image)
        raise BadEntry("image_not_an_image", f"got {got}, expected bytes or uint8 [H, W, 3]")
    if image.numel() == 0:
        raise BadEntry("image_not_an_image", f"got an empty image {list(image.shape)}")
    pixels = image.cpu().contiguous().numpy()
    return bytes(require("simplejpeg").encode_jpeg(pixels, quality=_QUALITY, colorsubsampling="444"))
