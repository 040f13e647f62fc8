"""Scenes of a generation run with everything that a page shows of them: pixels, masks and focused regions."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from scenarioclip_fast.data import rle
from scenarioclip_fast.data.check import BadEntry, SceneChecker
from scenarioclip_fast.data.config import MAX_PIXELS
from scenarioclip_fast.data.scene import Scene, with_masks
from scenarioclip_fast.data.views import Views
from scenarioclip_fast.generate.images import shrunk_size
from scenarioclip_fast.generate.source import CuratedItem, curated_scene
from scenarioclip_fast.ops.views import render_views
from scenarioclip_fast.requirements import require

REGION_SIDE = 224


@dataclass(frozen=True)
class Example:
    """A curated scene with its image.

    Attributes:
        record: of the stage `curate`.
        scene: the same.
        image: uint8 [H, W, 3].
        regions: the focused region of each relation, uint8 [side, side, 3]; None if a mask is missing.
    """

    item: CuratedItem
    record: dict[str, Any]
    scene: Scene
    image: Tensor
    regions: list[Tensor | None]


def choose(scenes: Sequence[CuratedItem], count: int, seed: int) -> list[CuratedItem]:
    """Choose `count` scenes by a hash of the seed and the key, in the order of the list; 0: all."""
    if not count or count >= len(scenes):
        return list(scenes)

    def rank(i: int) -> bytes:
        return hashlib.sha256(f"{seed}/{scenes[i].item.key}".encode()).digest()

    return [scenes[i] for i in sorted(sorted(range(len(scenes)), key=rank)[:count])]


class ExampleReader:
    """Reads scenes for display."""

    def __init__(self) -> None:
        self._checker = SceneChecker(MAX_PIXELS)

    def read(self, item: CuratedItem) -> Example:
        """Read a scene, and render its focused regions.

        Raises:
            BadEntry: the record or the image is missing, damaged or changed.
        """
        try:
            record = item.read()
            scene = curated_scene(item.item.key, record)
            image = self._checker.decode(item.item.read())
        except OSError as error:
            raise BadEntry("missing_image", str(error.strerror or error)) from None
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, BadEntry):
                raise
            raise BadEntry("malformed_entry", f"{type(error).__name__}: {error}") from None
        size = list(image.shape[:2])
        if size != list(record["size"]):
            raise BadEntry("other_size", f"got an image of {size}, expected {record['size']} as in the record")
        try:
            return Example(item, record, scene, image, _regions(scene, image))
        except ValueError as error:
            raise BadEntry("malformed_entry", str(error)) from None


def _regions(scene: Scene, image: Tensor) -> list[Tensor | None]:
    shown = with_masks(replace(scene, image=image))
    rendered: Iterator[Tensor] = iter(())
    if shown.relations:
        views = Views.of_scenes([shown])
        views = views.select(torch.arange(len(views) - len(shown.relations), len(views)))
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        pixels = render_views([image], views, size=REGION_SIDE, mean=mean, std=std)
        rendered = iter((pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous())
    kept = {id(relation) for relation in shown.relations}
    return [next(rendered) if id(relation) in kept else None for relation in scene.relations]


def shrink_image(image: Tensor, side: int) -> Any:  # uint8 [H, W, 3] -> PIL image
    """Reduce the longer side of an image to `side` pixels if it is longer."""
    pillow = require("PIL.Image")
    height, width = shrunk_size(image.shape[0], image.shape[1], side)
    return pillow.fromarray(image.cpu().numpy()).resize((width, height), pillow.Resampling.LANCZOS)


def shrink_mask(mask: Any, side: int) -> Tensor:  # RLE -> bool [h, w]
    """Reduce a mask like `shrink_image`; a mask that is not empty stays so."""
    pixels = rle.decode(mask)
    size = shrunk_size(pixels.shape[0], pixels.shape[1], side)
    if size == tuple(pixels.shape):
        return pixels
    share = functional.adaptive_avg_pool2d(pixels[None].float(), size)[0]
    small = share >= 0.5
    return small if small.any() else share > 0


def jpeg_uri(picture: Any, quality: int) -> str:
    """Encode a PIL image as a data URI."""
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")
