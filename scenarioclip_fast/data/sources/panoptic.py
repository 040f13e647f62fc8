"""Segments of panoptic PNGs as objects, for the data sets that have them."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scenarioclip_fast.data import rle
from scenarioclip_fast.data.check import BadEntry, CheckedScene, SceneChecker, malformed_entries
from scenarioclip_fast.data.sources.annotations import Box, Entry, SceneBuilder, load_image
from scenarioclip_fast.data.sources.files import Folders, read_file
from scenarioclip_fast.requirements import require
from scenarioclip_fast.terminal import short

MAX_ID = (1 << 24) - 1  # of a segment: three bytes


def plain_name(name: str) -> str:
    """Turn a category of COCO panoptic into a word: without the suffixes of its taxonomy, and without hyphens.

    >>> plain_name("floor-other-merged"), plain_name("door-stuff"), plain_name("wall-brick")
    ('floor', 'door', 'wall brick')
    """
    return re.sub(r"(-(merged|other|stuff))+$", "", name).replace("-", " ")


class PanopticReader:
    """Reads entries whose objects are segments of a panoptic PNG.

    Args:
        images, masks: folders of the images and of the PNGs.
        names: the objects' names by category id.
        predicates: of the relations.
        checker: of the scenes.
    """

    def __init__(
        self,
        images: Folders,
        masks: Folders,
        names: Mapping[int, str],
        predicates: Sequence[str],
        checker: SceneChecker,
    ) -> None:
        self._images, self._masks, self._checker = images, masks, checker
        self._names, self._predicates = dict(names), list(predicates)

    def read(self, entry: Entry) -> CheckedScene:
        """Read and check an entry.

        Raises:
            BadEntry: the whole scene is unusable.
        """
        with malformed_entries():
            segments = list_field(entry.record, "segments_info")
            boxes = self._boxes(entry.record, segments)
            relations = list_field(entry.record, "relations") if self._predicates else []
            declared = (entry.record.get("height"), entry.record.get("width"))
            image, size = load_image(self._images, self._checker, entry.image, declared)
            builder = SceneBuilder(entry)
            self._add_objects(builder, segments, boxes, size)
            self._add_relations(builder, relations)
            return builder.build(self._checker, image, size, entry.action)

    def png_name(self, record: Any) -> Any:
        """The name of an entry's PNG."""
        return record.get("file_name")

    def _boxes(self, record: Any, segments: list[Any]) -> list[Box | None]:
        """The box of each segment; None: that of its mask."""
        raise NotImplementedError

    def _add_objects(
        self, builder: SceneBuilder, segments: list[Any], boxes: list[Box | None], size: tuple[int, int]
    ) -> None:
        ids = list(dict.fromkeys(id_ for segment in segments if (id_ := _id_of(segment)) is not None))
        masks = self._read_masks(builder, ids, size)
        for segment, box in zip(segments, boxes, strict=True):
            id_ = _id_of(segment)
            category = segment.get("category_id") if isinstance(segment, dict) else None
            if id_ is None:
                builder.reject_object("malformed_object", f"got {short(segment)}, expected a segment with an id")
            elif type(category) is not int or category not in self._names:
                builder.reject_object("unknown_object", f"segment {id_} is of category {short(category)}")
            else:
                found = None if masks is None else masks[id_]
                if masks is not None and found is None:
                    detail = f"segment {id_} has no pixels; the object keeps its box"
                    builder.reject(f"object {len(builder.objects)} ({self._names[category]})", "empty_mask", detail)
                mask, bounds = (None, None) if found is None else found
                builder.add_object(self._names[category], bounds if box is None else box, mask, lost=found is None)

    def _read_masks(self, builder: SceneBuilder, ids: list[int], size: tuple[int, int]) -> dict[int, Any] | None:
        """The mask and its bounds by segment id. If the PNG is unusable: None, and it is listed as rejected."""
        name = self.png_name(builder.entry.record)
        path = self._masks.find(name)
        try:
            if path is None:
                raise BadEntry("missing_masks", f"{name}: not in {self._masks}")
            pixels = decode_png(read_file(path, name, missing="missing_masks", too_large="bad_masks"), size)
            return dict(zip(ids, rle.encode_segments(pixels, ids), strict=True))
        except BadEntry as error:
            builder.reject("", error.reason, error.detail)
        except ValueError as error:
            builder.reject("", "bad_masks", f"{name}: {error}")
        return None

    def _add_relations(self, builder: SceneBuilder, relations: list[Any]) -> None:
        for k, relation in enumerate(relations):
            if not isinstance(relation, list) or len(relation) != 3 or not all(type(i) is int for i in relation):
                builder.reject(f"relation {k}", "malformed_relation", f"got {short(relation)}")
                continue
            subject, object_, predicate = relation
            if not 0 <= predicate < len(self._predicates):
                detail = f"got predicate {predicate}, but there are {len(self._predicates)}"
                builder.reject(f"relation {k}", "unknown_relation", detail)
            else:
                builder.add_relation(k, subject, self._predicates[predicate], object_)


def list_field(record: Any, name: str) -> list[Any]:
    """Return a list in an entry.

    Raises:
        BadEntry: there is none.
    """
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, list):
        raise BadEntry("malformed_entry", f"got {short(value)} as {name!r}, expected a list")
    return value


def decode_png(
    data: bytes, size: tuple[int, int], modes: tuple[str, ...] = ("RGB",)
) -> NDArray[Any]:  # [H, W, 3], or [H, W] in a mode with one value per pixel
    """Decode a panoptic PNG, or another one whose values are not colours.

    Args:
        size: the expected (H, W), checked before the pixels are decoded.
        modes: the accepted modes of Pillow.

    Raises:
        ValueError: damaged, or of another size or mode.
    """
    require("PIL")
    import PIL.Image

    try:
        with PIL.Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if (image.height, image.width) != size:
                raise ValueError(
                    f"got a PNG of {image.width} x {image.height}, expected the image's {size[1]} x {size[0]}"
                )
            if image.mode not in modes:
                raise ValueError(f"got a PNG in mode {image.mode}, expected {' or '.join(modes)}")
            return np.asarray(image)
    except (ValueError, MemoryError):
        raise
    except PIL.UnidentifiedImageError:  # its message contains a memory address, different in every run
        raise ValueError("not a PNG") from None
    except Exception as error:  # Pillow raises many types on damaged files
        raise ValueError(f"not a readable PNG ({type(error).__name__}: {str(error)[:100]})") from None


def _id_of(segment: Any) -> int | None:
    """The id of a segment; None if it is malformed. 0 is for pixels without a segment."""
    value = segment.get("id") if isinstance(segment, dict) else None
    return value if type(value) is int and 0 < value <= MAX_ID else None
