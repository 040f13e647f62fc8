"""Plan the views of scenes that `ops.render_views` renders: image windows, boxes, masks and augmentation."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scenarioclip_fast import native
from scenarioclip_fast.data import rle
from scenarioclip_fast.data.decode import probe
from scenarioclip_fast.data.scene import Mask, Scene, mask_pixels
from scenarioclip_fast.data.splitmix64 import mix, uniforms
from scenarioclip_fast.kernels.views.reference import CROP, GLOBAL, MASKED, RELATION
from scenarioclip_fast.ops.view_batch import ViewBatch, check_renderable, is_empty, pixel_box

CROP_MARGIN = 0.1  # of the box's longer side, on each of the four sides
# Config values -> kinds of views.
OBJECT_VIEWS = {"masked": MASKED, "crop": CROP}
RELATION_VIEWS = {"focused": RELATION, "box": CROP, "scene": GLOBAL}

# The augmentation of the published code.
_AREA, _RATIO, _TRIES = (0.8, 1.0), (3 / 4, 4 / 3), 10
_COLOUR_PROBABILITY = 0.2
_COLOUR_RANGE = (  # of each level: brightness, contrast, saturation, hue
    (0.2, 0.2, 0.2, 0.05),
    (0.15, 0.15, 0.15, 0.03),
    (0.1, 0.1, 0.1, 0.02),
)
_BLUR_PROBABILITY, _BLUR_SIGMA = 0.1, (0.1, 1.5)  # global views only

Array = NDArray[np.float64]


class Views(ViewBatch):
    """The views of a batch of scenes (see `ViewBatch` for the arrays)."""

    __slots__ = ()

    @staticmethod
    def of_scenes(
        scenes: Sequence[Scene],
        *,
        object_view: str = "masked",
        relation_view: str = "focused",
        train: bool = False,
        generator: torch.Generator | None = None,
        seed: int = 0,
        epoch: int = 0,
        repetition: Sequence[int] | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> Views:
        """Plan the views of scenes: all global views, then all object views, then all relation views, scene by scene.

        Args:
            scenes: image i of the batch is the image of scenes[i].
            object_view: "masked": the image, black outside the box, whose edges are truncated to whole pixels (as
                published); "crop": a square window around the box, 10 % wider on each side, shifted into the image if
                it fits, otherwise black outside the image.
            relation_view: "focused": the focused region of the relation's two masks (as in the paper). The other two
                are for ablations and for data without masks. "scene": the whole image, i.e. a focused region without
                masks, weights and blur; it does not show which of the image's relations is meant. "box": a crop, as for
                an object, around the boxes of subject and object; it shows the location, without weighting pixels. All
                three have the same augmentation.
            train: apply the published augmentation. A view's random numbers depend only on (seed, epoch, scene key,
                level, position within the scene), not on the batch or the number of workers.
            generator: with `train`, a number drawn from it replaces `seed`.
            seed, epoch: seed of the augmentation, and the epoch.
            repetition: a number for each scene, below 2**24, that tells several occurrences of its key in the epoch
                apart: they get different random numbers. None: 0.
            sizes: (H, W) of each image; None: read from the images.

        Raises:
            ValueError: a focused relation without a mask, a mask that does not match its image, a box outside the
                image, an image too long or too narrow to render (see `check_renderable`), or an unreadable image
                header; the message names the scene and the object or relation.
        """
        if object_view not in OBJECT_VIEWS:
            raise ValueError(f"object_view: got {object_view!r}, expected 'masked' or 'crop'")
        if relation_view not in RELATION_VIEWS:
            raise ValueError(f"relation_view: got {relation_view!r}, expected 'focused', 'box' or 'scene'")
        if sizes is None:
            sizes = [_image_size(scene) for scene in scenes]
        for scene, (height, width) in zip(scenes, sizes, strict=True):
            try:
                check_renderable(height, width)
            except ValueError as error:
                raise ValueError(f"scene {scene.key}: {error}") from None
        rows = _Rows(scenes, sizes)
        kind = np.array([GLOBAL, OBJECT_VIEWS[object_view], RELATION_VIEWS[relation_view]], np.int32)[rows.level]
        source = np.zeros((len(kind), 4), np.int64)
        source[:, 2], source[:, 3] = rows.width, rows.height
        box = np.zeros((len(kind), 4))
        box[rows.objects], pixels = _object_boxes(scenes, rows)
        if object_view == "crop":
            source[rows.objects] = _crop_window(pixels, rows.height[rows.objects], rows.width[rows.objects])

        ends = _subjects_and_objects(scenes, rows)
        if relation_view == "box":
            union = _union_boxes(pixels, ends + rows.first_object[rows.image[rows.relations], None])
            source[rows.relations] = _crop_window(union, rows.height[rows.relations], rows.width[rows.relations])
        mask = np.full((len(kind), 2), -1, np.int64)
        runs, start, size = np.zeros(0, np.int32), np.zeros(1, np.int64), np.zeros((0, 2), np.int32)
        if relation_view == "focused":
            mask[rows.relations], runs, start, size = _masks(scenes, sizes, rows, ends)

        stretch = kind == CROP
        augment = np.tile(np.array([1, 1, 1, 0, 0], np.float32), (len(kind), 1))
        if train:
            if generator is not None:
                seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
            states = _augmentation_states(scenes, rows, seed, epoch, repetition)
            whole = slice(len(scenes))
            draws = uniforms(states[whole], 8 + 3 * _TRIES)
            source[whole] = _random_crop(draws[:, 8:], rows.height[whole], rows.width[whole])
            stretch[whole] = True
            augment = _random_augment(uniforms(states, 8), rows.level)
        arrays = (kind, rows.image, source.astype(np.int32), stretch, box, mask, augment, runs, start, size)
        return Views(*(torch.from_numpy(np.ascontiguousarray(a)) for a in arrays))


class _Rows:
    """The views of scenes in their order, as arrays [V].

    Attributes:
        level: 0 global, 1 object, 2 relation.
        image, position: the scene of each view, and the index of its object or relation within the scene.
        height, width: size of its image.
        objects, relations: slices of the views of these levels.
        first_object: [B + 1], index of the first object of each scene among all objects.
    """

    def __init__(self, scenes: Sequence[Scene], sizes: Sequence[tuple[int, int]]) -> None:
        objects, relations = [len(scene.objects) for scene in scenes], [len(scene.relations) for scene in scenes]
        counts = np.array([[1] * len(scenes), objects, relations], np.int64)
        ends = np.cumsum(counts)
        self.level = np.repeat(np.arange(3), counts.sum(1))
        self.image = np.repeat(np.tile(np.arange(len(scenes)), 3), counts.ravel())
        self.position = np.arange(len(self.image)) - np.repeat(ends - counts.ravel(), counts.ravel())
        self.height, self.width = np.array(sizes, np.int64).reshape(-1, 2)[self.image].T
        self.first_object = np.concatenate([[0], np.cumsum(counts[1])])
        self.objects = slice(len(scenes), len(scenes) + int(self.first_object[-1]))
        self.relations = slice(self.objects.stop, len(self.level))

    def members(self, rows: slice) -> list[tuple[int, int]]:
        """(image, position) of each view in `rows`."""
        return list(zip(self.image[rows].tolist(), self.position[rows].tolist(), strict=True))


def _masks(
    scenes: Sequence[Scene],
    sizes: Sequence[tuple[int, int]],
    rows: _Rows,
    ends: NDArray[np.int64],  # [N_r, 2], subject and object of each relation
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64], NDArray[np.int32]]:
    """The rows of the mask table of each relation [N_r, 2]; and the table: runs, where each mask begins, sizes."""
    if (host := native.host()) is not None:
        used, table_rows = _in_order(ends + rows.first_object[rows.image[rows.relations], None])
        objects = [entry for scene in scenes for entry in scene.objects]
        size = np.stack([rows.height, rows.width], axis=1)[rows.objects][used]
        if (found := host.mask_table([objects[k].mask for k in used.tolist()], size)) is not None:
            return table_rows, *found, size.astype(np.int32)
    # One by one, which reads masks of every form and words the errors.
    table = _MaskTable(scenes, sizes)
    return table.rows(rows.members(rows.relations), ends), *table.arrays()


def _in_order(values: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The distinct values in the order of their first appearance; and for each value, its place among these."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return values.ravel()[first[order]], place[inverse].reshape(values.shape)


class _MaskTable:
    """The masks that the views use; each object's mask is stored once."""

    def __init__(self, scenes: Sequence[Scene], sizes: Sequence[tuple[int, int]]) -> None:
        self._scenes, self._sizes = scenes, sizes
        self._index: dict[tuple[int, int], int] = {}
        self._runs: list[NDArray[np.int64]] = []
        self._size: list[tuple[int, int]] = []

    def rows(
        self,
        relations: Sequence[tuple[int, int]],  # [n], scene and relation
        ends: NDArray[np.int64],  # [n, 2], their subject and object
    ) -> NDArray[np.int64]:  # [n, 2]
        """The table rows of the masks of each relation, added if missing."""
        pairs = [[self._row(i, k, end) for end in both] for (i, k), both in zip(relations, ends.tolist(), strict=True)]
        return np.array(pairs, np.int64).reshape(-1, 2)

    def _row(self, scene: int, relation: int, which: int) -> int:
        if (scene, which) in self._index:
            return self._index[scene, which]
        name = _name(self._scenes[scene], "relation", relation)
        mask = self._scenes[scene].objects[which].mask
        if mask is None:
            raise ValueError(f"{name}: object {which} has no mask, which the relation's focused region requires")
        try:
            height, width, runs = _runs(mask)
        except ValueError as error:
            raise ValueError(f"{name}: mask of object {which}: {error}") from None
        if (height, width) != tuple(self._sizes[scene]):
            raise ValueError(
                f"{name}: got a mask of {width} x {height} for object {which}, expected the image's "
                f"{self._sizes[scene][1]} x {self._sizes[scene][0]}"
            )
        if not runs[1::2].any():
            raise ValueError(f"{name}: the mask of object {which} is empty, expected at least one pixel")
        self._index[scene, which] = len(self._runs)
        self._runs.append(runs)
        self._size.append((height, width))
        return self._index[scene, which]

    def arrays(self) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int32]]:
        start = np.cumsum([0, *(len(r) for r in self._runs)], dtype=np.int64)
        runs = np.concatenate([np.zeros(0, np.int64), *self._runs]).astype(np.int32)
        return runs, start, np.array(self._size, np.int32).reshape(-1, 2)


def _runs(mask: Mask) -> tuple[int, int, NDArray[np.int64]]:
    if isinstance(mask, dict):
        return rle.read_runs(mask)
    pixels = mask_pixels(mask)
    return *pixels.shape, rle.mask_runs(pixels)


def _image_size(scene: Scene) -> tuple[int, int]:
    if isinstance(scene.image, Tensor):
        shape = tuple(scene.image.shape)
        if len(shape) != 3 or shape[2] != 3 or 0 in shape:
            raise ValueError(f"scene {scene.key}: got an image {list(shape)}, expected [H, W, 3]")
        return shape[:2]
    host = native.host()
    if host is not None and (header := host.jpeg_header(scene.image)) is not None:
        return int(header[0]), int(header[1])
    try:
        parsed = probe(scene.image)
    except ValueError as error:
        raise ValueError(f"scene {scene.key}: {error}") from None
    if parsed is None:
        raise ValueError(f"scene {scene.key}: the image is neither JPEG nor PNG; pass a tensor, or `sizes`")
    return parsed.height, parsed.width


def _subjects_and_objects(scenes: Sequence[Scene], rows: _Rows) -> NDArray[np.int64]:  # [N_r, 2]
    """The subject and object of each relation, checked to be objects of its scene."""
    ends = [(entry.subject, entry.object) for scene in scenes for entry in scene.relations]
    count = np.diff(rows.first_object)[rows.image[rows.relations], None]
    try:
        found = np.array(ends, np.int64).reshape(-1, 2)
        missing = bool(((found < 0) | (found >= count)).any())
    except OverflowError:
        missing = True
    if missing:
        for (i, k), both in zip(rows.members(rows.relations), ends, strict=True):
            for which in both:
                if not 0 <= which < len(scenes[i].objects):
                    name = _name(scenes[i], "relation", k)
                    raise ValueError(f"{name}: got object {which}, expected one of {len(scenes[i].objects)}")
    return found


def _name(scene: Scene, what: str, k: int) -> str:
    return f"scene {scene.key}, {what} {k}"


def _object_boxes(
    scenes: Sequence[Scene], rows: _Rows
) -> tuple[Array, NDArray[np.int64]]:  # [N_o, 4] as given, [N_o, 4] in whole pixels
    box = np.array([entry.box for scene in scenes for entry in scene.objects], np.float64).reshape(-1, 4)
    height, width = rows.height[rows.objects], rows.width[rows.objects]
    pixels = pixel_box(box, height, width)
    if (outside := is_empty(pixels)).any():
        v = int(outside.argmax())
        i, k = rows.members(rows.objects)[v]
        raise ValueError(
            f"{_name(scenes[i], 'object', k)}: got box {list(scenes[i].objects[k].box)}, expected x1, y1, x2, "
            f"y2 that overlap the image ({width[v]} x {height[v]})"
        )
    return box, pixels


def _union_boxes(
    box: NDArray[np.int64],  # [N_o, 4]
    ends: NDArray[np.int64],  # [N_r, 2], rows of `box`
) -> NDArray[np.int64]:  # [N_r, 4]
    """The smallest boxes that contain subject and object."""
    one, other = box[ends].swapaxes(0, 1)
    return np.concatenate([np.minimum(one[:, :2], other[:, :2]), np.maximum(one[:, 2:], other[:, 2:])], axis=1)


def _crop_window(
    box: NDArray[np.int64],  # [n, 4]
    height: NDArray[np.int64],
    width: NDArray[np.int64],
) -> NDArray[np.int64]:  # [n, 4]
    longer = (box[:, 2:] - box[:, :2]).max(1)
    side = np.ceil(longer * (1 + 2 * CROP_MARGIN)).astype(np.int64)[:, None]
    spare = np.stack([width, height], axis=1) - side
    low = (box[:, :2] + box[:, 2:] - side) // 2
    low = np.where(spare >= 0, low.clip(0, spare.clip(0)), spare // 2)
    return np.concatenate([low, low + side], axis=1)


def _augmentation_states(
    scenes: Sequence[Scene], rows: _Rows, seed: int, epoch: int, repetition: Sequence[int] | None
) -> NDArray[np.uint64]:  # [V]
    """The states of each view's random numbers: the first 8 are for colour and blur, the others for the crop."""
    keys = _hashes(f"{seed}/{epoch}/", [scene.key for scene in scenes])
    place = rows.level.astype(np.uint64) << np.uint64(32) | rows.position.astype(np.uint64)
    if repetition is not None:
        place |= np.array(repetition, np.uint64)[rows.image] << np.uint64(40)
    states: NDArray[np.uint64] = keys[rows.image] ^ mix(place)
    return states


def _random_crop(
    draws: Array,  # [n, 3 tries] in [0, 1)
    height: NDArray[np.int64],
    width: NDArray[np.int64],
) -> NDArray[np.int64]:  # [n, 4]
    """Random resized crop: the first of ten random areas and aspect ratios that fits, else a centre crop."""
    h, w = height[:, None], width[:, None]
    draws = draws.reshape(-1, 3, _TRIES)
    area = h * w * _between(draws[:, 0], *_AREA)
    ratio = np.exp(_between(draws[:, 1], *np.log(_RATIO)))
    tall, wide = np.rint(np.sqrt(area / ratio)), np.rint(np.sqrt(area * ratio))
    fits = (tall > 0) & (wide > 0) & (tall <= h) & (wide <= w)
    first = fits.argmax(1)[:, None]
    tall, wide = np.take_along_axis(tall, first, 1), np.take_along_axis(wide, first, 1)
    none = ~fits.any(1, keepdims=True)
    tall = np.where(none, np.maximum(np.minimum(h, np.rint(w / _RATIO[0])), 1), tall)
    wide = np.where(none, np.maximum(np.minimum(w, np.rint(h * _RATIO[1])), 1), wide)
    place = draws[:, 2]
    x = np.where(none, (w - wide) // 2, np.floor(place[:, :1] * (w - wide + 1)))
    y = np.where(none, (h - tall) // 2, np.floor(place[:, 1:2] * (h - tall + 1)))
    return np.concatenate([x, y, x + wide, y + tall], axis=1).astype(np.int64)


def _random_augment(
    draws: Array,  # [n, 8] in [0, 1)
    level: NDArray[np.int64],  # [n]
) -> NDArray[np.float32]:  # [n, 5]
    spread = np.array(_COLOUR_RANGE)[level]
    neutral = np.array([1.0, 1.0, 1.0, 0.0])
    change = neutral + spread * (2 * draws[:, 1:5] - 1)
    colour = np.where(draws[:, :1] < _COLOUR_PROBABILITY, change, neutral)
    blurred = (level == 0) & (draws[:, 5] < _BLUR_PROBABILITY)
    blur = np.where(blurred, _between(draws[:, 6], *_BLUR_SIGMA), 0.0)
    return np.concatenate([colour, blur[:, None]], axis=1).astype(np.float32)


def _between(draw: Array, low: float, high: float) -> Array:
    return low + (high - low) * draw


def _hashes(prefix: str, keys: Sequence[str]) -> NDArray[np.uint64]:  # [n]
    """BLAKE2b of `prefix` followed by each key, eight bytes."""
    start, digests = blake2b(prefix.encode(), digest_size=8), []
    for key in keys:
        state = start.copy()
        state.update(key.encode())
        digests.append(state.digest())
    return np.frombuffer(b"".join(digests), "<u8")
