"""Exchange of scenes with annotation tools, as COCO JSON.

    images        file_name is KEY.jpg; besides COCO's members: key, action, caption, scores, split
    annotations   id: number of the image * 4096 + id of the object; besides COCO's members: key, object (that id)
    categories    the names of objects, in alphabetical order
    relations     id, image_id, subject_id, predicate, object_id, negatives, key, relation

Tools renumber, and drop the members they do not know: `read_coco` accepts that.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from scenarioclip_fast.data import rle
from scenarioclip_fast.data.boxes import clip_box
from scenarioclip_fast.data.check import MAX_ITEMS
from scenarioclip_fast.data.shards import is_packed
from scenarioclip_fast.data.texts import normalise
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import read_regular, replacing
from scenarioclip_fast.generate.images import Item, list_images, read_list
from scenarioclip_fast.generate.records import results
from scenarioclip_fast.parsing import are_numbers, parse_json
from scenarioclip_fast.terminal import short

IDS = 4096  # per image: ids of objects and relations are below
_TOLERANCE = 0.1  # pixels: tools round boxes to one or two decimals

assert MAX_ITEMS <= IDS


@dataclass(frozen=True)
class _Exported:
    number: int
    item: Item
    scene: dict[str, Any]  # as curated

    @property
    def first_id(self) -> int:
        return self.number * IDS


def write_coco(directory: str | Path, path: str | Path, images: str | Path | None = None) -> int:
    """Write the scenes of a packed data set, or the curated ones of a generation run, as COCO JSON.

    Args:
        directory: of the packed data set or of the run.
        path: of the new file.
        images: folder to write the images to, as KEY.jpg (whatever their format); None: they are not written.

    Returns:
        The number of images.

    Raises:
        UserError: `directory` is neither, or has no scenes.
    """
    directory, path = Path(directory), Path(path)
    kind = "packed" if is_packed(directory) else "run"
    if kind == "run" and not (directory / "images.jsonl").is_file():
        raise UserError(f"{directory}: expected a packed data set, or the --out directory of generate")
    names = {item["name"] for one in _scenes(directory, kind) for item in one.scene["objects"]}
    categories = {name: i for i, name in enumerate(sorted(names), start=1)}
    total = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as new, new.open("x", encoding="ascii") as file:
        info = {"description": "scenarioclip-fast scenes", "ids": kind}
        file.write(f'{{"info": {json.dumps(info)},\n"licenses": [],\n"categories": ')
        _write_list(file, ({"id": i, "name": name, "supercategory": ""} for name, i in categories.items()))
        # One pass over the records per list, so that they need not be in memory.
        file.write(',\n"images": ')
        total = _write_list(file, (_image(one) for one in _scenes(directory, kind)))
        file.write(',\n"annotations": ')
        _write_list(file, (a for one in _scenes(directory, kind) for a in _annotations(one, categories)))
        file.write(',\n"relations": ')
        _write_list(file, (r for one in _scenes(directory, kind) for r in _relations(one)))
        file.write("}\n")
        if not total:
            raise UserError(f"{directory}: no scenes; run generate, with the stage curate, first")
    if images is not None:
        Path(images).mkdir(parents=True, exist_ok=True)
        for one in _scenes(directory, kind):
            try:
                data = one.item.read()
            except OSError as error:
                raise UserError(f"{one.item.name}: {error.strerror or error}") from None
            with replacing(Path(images, f"{one.item.key}.jpg")) as new:
                new.write_bytes(data)
    return total


def _scenes(directory: Path, kind: str) -> Iterator[_Exported]:
    """The scenes, numbered from 1 in the order of the list of images, which never changes for a run."""
    if kind == "packed":
        for number, item in enumerate(list_images([directory]), start=1):
            assert isinstance(item, Item)
            try:
                record = item.read_record()
            except (OSError, ValueError) as error:
                raise UserError(f"{directory}: {item.name}: {error}; pack the data set again") from None
            assert record is not None
            for part in ("objects", "relations"):
                record[part] = [{"id": i, **one} for i, one in enumerate(record[part])]
            yield _Exported(number, item, record)
        return
    number = 0
    for unit in read_list(directory / "images.jsonl"):
        found = results(directory / "curate" / unit.file_name)
        for number, item in enumerate(unit.items, start=number + 1):  # noqa: B020
            if item.key in found and not found[item.key].reason:
                yield _Exported(number, item, found[item.key].result["scene"])


def _write_list(file: IO[str], values: Iterable[Any]) -> int:
    n = 0
    for n, value in enumerate(values, start=1):
        file.write(("[\n" if n == 1 else ",\n") + json.dumps(value))
    file.write("\n]" if n else "[]")
    return n


def _image(one: _Exported) -> dict[str, Any]:
    height, width = one.scene["size"]
    key = one.item.key
    image = {"id": one.number, "file_name": f"{key}.jpg", "width": width, "height": height, "key": key}
    image |= {"action": one.scene.get("action"), "caption": one.scene.get("caption")}
    optional = {"scores": one.scene.get("scores"), "split": one.item.split}
    return image | {name: value for name, value in optional.items() if value is not None}


def _annotations(one: _Exported, categories: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    for item in one.scene["objects"]:
        if item["id"] >= IDS:
            raise UserError(f"{one.item.name}: got object {item['id']}, expected fewer than {IDS} objects")
        x, y, width, height = box_to_coco(item["box"])
        yield {
            "id": one.first_id + item["id"],
            "image_id": one.number,
            "category_id": categories[item["name"]],
            "bbox": [x, y, width, height],
            "segmentation": item["mask"] or [],
            "area": rle.area(item["mask"]) if item["mask"] else width * height,
            "iscrowd": 0,
            "key": one.item.key,
            "object": item["id"],
        }


def _relations(one: _Exported) -> Iterator[dict[str, Any]]:
    ids = [one.first_id + item["id"] for item in one.scene["objects"]]
    for relation in one.scene["relations"]:
        yield {
            "id": one.first_id + relation["id"],
            "image_id": one.number,
            "subject_id": ids[relation["subject"]],
            "predicate": relation["predicate"],
            "object_id": ids[relation["object"]],
            "negatives": relation.get("negatives", []),
            "key": one.item.key,
            "relation": relation["id"],
        }


def box_to_coco(box: Sequence[float]) -> list[float]:
    """x1, y1, x2, y2 -> x, y, width, height."""
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def same_box(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two boxes differ by no more than a tool's rounding."""
    return all(abs(x - y) <= _TOLERANCE for x, y in zip(a, b, strict=True))


@dataclass(frozen=True)
class Annotation:
    """An object as a person left it.

    Attributes:
        object: id of the object in the run; None: unknown, or drawn by hand.
        box: x1, y1, x2, y2; a part of it is in the image.
        mask: RLE; None: the file has none.
    """

    object: int | None
    name: str
    box: tuple[float, float, float, float]
    mask: dict[str, Any] | None


@dataclass(frozen=True)
class Relating:
    """A relation as a person left it.

    Attributes:
        relation: id of the relation in the run; None: unknown, or added by hand.
        subject, object: positions of annotations; None: the file does not have them.
    """

    relation: int | None
    subject: int | None
    predicate: str
    object: int | None


@dataclass(frozen=True)
class Correction:
    """What a file says of one image.

    Attributes:
        key: of the scene.
        size: [H, W].
        texts: "action" and "caption", if the file has them.
        relations: None: the file has none, for no image.
        identified: whether the file has ids of the run's objects, of any image.
        packed: the ids are those of a packed data set.
    """

    key: str
    size: list[int]
    texts: dict[str, str | None]
    annotations: list[Annotation]
    relations: list[Relating] | None
    identified: bool
    packed: bool


def is_coco(content: Any) -> bool:
    """Whether a parsed JSON is meant as a COCO file; `read_coco` refuses it if a part is missing."""
    return isinstance(content, dict) and "scenes" not in content and bool({"images", "annotations"} & content.keys())


def is_coco_file(path: str | Path) -> bool:
    """Whether a file is meant as a COCO file; False also if it cannot be read."""
    try:
        return is_coco(parse_json(read_regular(path), strict=False))
    except (OSError, ValueError):
        return False


def read_coco(path: str | Path, content: Any = None) -> list[Correction]:
    """Read the COCO file that `write_coco` wrote and that was edited since.

    Objects keep their ids by the members "key" and "object" of annotations, also if they are below "attributes"; else,
    if "info" is still that of `write_coco`, by the annotations' ids; else they have none. Masks may be RLE or polygons;
    a pixel belongs to a polygon if its centre is inside.

    Args:
        content: of the file, if it has been parsed.

    Raises:
        UserError: unreadable or malformed; the message names the image or annotation.
    """
    if content is None:
        try:
            content = parse_json(read_regular(path), strict=False)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}") from None
        except ValueError as error:
            raise UserError(f"{path}: not JSON ({error})") from None
    if not is_coco(content) or not {"images", "annotations"} <= content.keys():
        raise UserError(f'{path}: got {short(content)}, expected a COCO file with "images" and "annotations"')
    try:
        return _Reader(content).read()
    except _Malformed as error:
        raise UserError(f"{path}: {error}") from None


class _Malformed(ValueError):
    pass


class _Reader:
    def __init__(self, content: Mapping[str, Any]) -> None:
        self._images = self._table(content, "images")
        self._annotations = self._table(content, "annotations")
        self._categories = {i: self._text(f"category {i}", c) for i, c in self._table(content, "categories").items()}
        self._relations = self._table(content, "relations") if "relations" in content else None
        info = content.get("info")
        self._kind = info.get("ids") if isinstance(info, dict) else None
        self._has_members = any(_member(a, "object") is not None for a in self._annotations.values())

    @staticmethod
    def _table(content: Mapping[str, Any], part: str) -> dict[int, dict[str, Any]]:
        """The values of a list by their ids."""
        values = content.get(part)
        if not isinstance(values, list):
            raise _Malformed(f"got {short(values)} as {part!r}, expected a list")
        table: dict[int, dict[str, Any]] = {}
        for value in values:
            number = value.get("id") if isinstance(value, dict) else None
            if type(number) is not int or number < 0 or number in table:
                raise _Malformed(f"{part}: got {short(value)}, expected an object with an id of its own, at least 0")
            table[number] = value
        return table

    @staticmethod
    def _text(where: str, value: Mapping[str, Any], member: str = "name") -> str:
        text = value.get(member)
        found = normalise(text) if isinstance(text, str) else ""
        if not found:
            raise _Malformed(f"{where}: got {short(text)} as {member!r}, expected a text")
        return found

    def read(self) -> list[Correction]:
        annotations: dict[int, list[int]] = {i: [] for i in self._images}
        relations: dict[int, list[int]] = {i: [] for i in self._images}
        tables = [("annotation", self._annotations, annotations), ("relation", self._relations or {}, relations)]
        for kind, table, found in tables:
            for number, value in table.items():
                image = _reference(value, "image_id")
                if image not in found:
                    raise _Malformed(f"{kind} {number}: no image {short(value.get('image_id'))}")
                found[image].append(number)
        if not self._images:
            raise _Malformed("'images' is empty, so that nothing would be corrected; expected the images of the export")
        corrections = [self._image(i, annotations[i], relations[i]) for i in self._images]
        identified = any(a.object is not None for one in corrections for a in one.annotations)
        corrections = [replace(one, identified=identified) for one in corrections]
        seen: set[str] = set()
        for one in corrections:
            if one.key in seen:
                raise _Malformed(f"the image {short(one.key)} occurs twice")
            seen.add(one.key)
        return corrections

    def _image(self, number: int, annotations: list[int], relations: list[int]) -> Correction:
        image = self._images[number]
        size: list[Any] = [image.get("height"), image.get("width")]
        if not all(type(n) is int and n > 0 for n in size):
            raise _Malformed(f"image {number}: got a size of {short(size)}, expected integers above 0")
        key = image.get("key") or PurePosixPath(str(image.get("file_name", "")).replace("\\", "/")).stem
        if not isinstance(key, str) or not key:
            raise _Malformed(f"image {number}: no file_name")
        texts: dict[str, str | None] = {}
        for name in ("action", "caption"):
            if name in image:
                if not isinstance(value := image[name], str | None):
                    raise _Malformed(f"image {number}: got {short(value)} as {name!r}, expected a text or null")
                texts[name] = (normalise(value) if name == "action" else value.strip()) or None if value else None
        known: set[int] = set()
        found = [self._annotation(a, key, size, known) for a in annotations]
        position = {a: k for k, a in enumerate(annotations)}
        return Correction(
            key=key,
            size=size,
            texts=texts,
            annotations=found,
            relations=None
            if self._relations is None
            else [self._relation(r, key, position) for r in sorted(relations)],
            identified=False,  # set for all images at once
            packed=self._kind == "packed",
        )

    def _id(self, number: int, value: Mapping[str, Any], key: str, member: str) -> int | None:
        """The id of an object or relation in the run."""
        found = _member(value, member)
        if found is not None:  # a copy on another image keeps the members
            return found if value.get("key", _attribute(value, "key") or key) == key else None
        decoded = self._kind is not None and not self._has_members and number // IDS == value["image_id"]
        return number % IDS if decoded else None

    def _annotation(self, number: int, key: str, size: list[int], known: set[int]) -> Annotation:
        value, where = self._annotations[number], f"annotation {number}"
        name = self._categories.get(_reference(value, "category_id"))
        if name is None:
            raise _Malformed(f"{where}: no category {short(value.get('category_id'))}")
        mask = self._mask(where, value.get("segmentation"), size)
        bbox = value.get("bbox")
        if bbox is None and mask is not None:
            x1, y1, x2, y2 = (float(v) for v in rle.bounds(mask, (size[0], size[1])) or (0, 0, 0, 0))
        elif (
            not isinstance(bbox, list) or len(bbox) != 4 or not are_numbers(*bbox) or not all(map(math.isfinite, bbox))
        ):
            raise _Malformed(f"{where}: got {short(bbox)} as bbox, expected [x, y, width, height]")
        else:
            x1, y1, x2, y2 = bbox[0], bbox[1], bbox[0] + bbox[2], bbox[1] + bbox[3]
        box = float(x1), float(y1), float(x2), float(y2)
        inside = clip_box(box, size)
        if not (inside[2] > inside[0] and inside[3] > inside[1]):
            raise _Malformed(f"{where}: the box {short(bbox)} is empty in an image of {size[1]} x {size[0]}")
        found = self._id(number, value, key, "object")
        found = None if found in known else found  # a copy is a new object
        if found is not None:
            known.add(found)
        return Annotation(found, name, box, mask)

    def _relation(self, number: int, key: str, position: Mapping[int, int]) -> Relating:
        value = (self._relations or {})[number]
        predicate = self._text(f"relation {number}", value, "predicate")
        ends = [position.get(_reference(value, end)) for end in ("subject_id", "object_id")]
        return Relating(self._id(number, value, key, "relation"), ends[0], predicate, ends[1])

    @staticmethod
    def _mask(where: str, value: Any, size: list[int]) -> dict[str, Any] | None:
        try:
            if isinstance(value, dict):
                height, width, runs = rle.read_runs(value)
                if [height, width] != size:
                    raise ValueError(f"got a mask of {[height, width]}, expected the image size {size}")
                counts = value["counts"] if isinstance(value["counts"], str) else rle.compress(runs)
                return {"size": [height, width], "counts": counts} if runs[1::2].any() else None
            polygons = value or []
            if not isinstance(polygons, list):
                raise ValueError(f"got {short(value)}, expected RLE or polygons")
            mask = np.zeros((size[0], size[1]), bool)
            for polygon in polygons:
                mask |= polygon_mask(polygon, (size[0], size[1]))
            return rle.encode(mask) if mask.any() else None
        except ValueError as error:
            raise _Malformed(f"{where}: segmentation: {error}") from None


def _reference(value: Mapping[str, Any], name: str) -> int:
    """The id in a member; -1, which is no id, if it is no integer."""
    found = value.get(name)
    return found if type(found) is int else -1


def _attribute(value: Mapping[str, Any], name: str) -> Any:
    attributes = value.get("attributes")
    return attributes.get(name) if isinstance(attributes, dict) else None


def _member(value: Mapping[str, Any], name: str) -> int | None:
    """The id in a member, or in an attribute, which a tool may have turned into a text; None: there is none."""
    found = value.get(name, _attribute(value, name))
    if isinstance(found, str) and found.isdecimal() and len(found) < 10:
        found = int(found)
    return found if type(found) is int and found >= 0 else None


def polygon_mask(polygon: Sequence[float], size: tuple[int, int]) -> NDArray[np.bool_]:  # [H, W]
    """The pixels whose centre is inside a polygon, by the even-odd rule.

    Pillow's polygons have integer corners and include their outline, a pixel more than the area.

    Args:
        polygon: x, y, x, y, ...; the pixel in row i and column j covers [j, j + 1] x [i, i + 1].
        size: (H, W).

    Raises:
        ValueError: not at least three points.
    """
    if (
        not isinstance(polygon, list)
        or len(polygon) < 6
        or len(polygon) % 2
        or not are_numbers(*polygon)
        or not all(map(math.isfinite, polygon))
    ):
        raise ValueError(f"got {short(polygon)}, expected a polygon [x, y, x, y, ...] of at least three points")
    height, width = size
    x, y = np.asarray(polygon, np.float64).reshape(-1, 2).T
    next_x, next_y = np.roll(x, -1), np.roll(y, -1)
    mask = np.zeros((height + 1, width), np.int64)
    first = max(0, math.floor(x.min()))
    centre = np.arange(first, min(width, math.ceil(x.max()))) + 0.5
    edge, column = np.nonzero((x[:, None] <= centre) != (next_x[:, None] <= centre))
    slope = (next_y - y)[edge] / (next_x - x)[edge]
    crossing = y[edge] + (centre[column] - x[edge]) * slope
    # Each crossing toggles the pixels below it.
    np.add.at(mask, (np.clip(np.ceil(crossing - 0.5), 0, height).astype(np.int64), column + first), 1)
    return np.cumsum(mask[:height], axis=0) % 2 == 1
