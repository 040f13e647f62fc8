"""The published layout: metadata*.json, classes.json, images and SAM-style masks."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from scenarioclip_fast.data.check import (
    MAX_ITEMS,
    UNKNOWN,
    BadEntry,
    CheckedScene,
    Rejection,
    SceneChecker,
    assigned_splits,
    safe_key,
    split_conflict,
)
from scenarioclip_fast.data.scene import Relation, Scene, SceneObject
from scenarioclip_fast.data.shards import split_named, words_of
from scenarioclip_fast.data.sources.annotations import four_numbers, id_text
from scenarioclip_fast.data.sources.base import LARGE, Scan, Source, SourceOptions, SplitOf, by_split, shuffled
from scenarioclip_fast.data.sources.classes import load_classes, load_json
from scenarioclip_fast.data.sources.files import read_file, safe_path
from scenarioclip_fast.data.sources.masks_npz import read_masks
from scenarioclip_fast.data.sources.masks_png import find_png_masks, read_png_masks
from scenarioclip_fast.data.texts import normalise
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.terminal import get_logger, short

MASKS = "sam_results"  # the directory of mask files
_MISSING = b"none\n"  # the status of a file that does not exist

_HINTS = {
    "folder": 'image_path lacks the folder: write "images/0001.jpg"',
    "index": "relations refer to objects by position: write [path, [subject, predicate, object]] with their names",
    "label": 'a relation refers to its objects by their names in "objects", letter for letter',
    "object": "objects are JSON objects: write [name, [x1, y1, x2, y2]]",
    "padded": 'the ids and the names of the mask files differ in leading zeros: the id "0001", a string, '
    'belongs to "0001_grounding_sam.npz"',
    "relation": "relations are JSON objects: write [path, [subject, predicate, object]]",
    "triple": "relations lack the path of their PNG: write [path, [subject, predicate, object]]",
}
"""Cause and remedy of common mistakes, see `check.Rejection`."""

_log = get_logger(__name__)


@dataclass(frozen=True)
class Entry:
    """One element of a metadata file, unparsed."""

    file: str
    position: int
    record: Any
    split: str | None

    @property
    def id(self) -> str:
        """The original id; empty if it has an invalid type."""
        return id_text(self.record.get("id")) if isinstance(self.record, dict) else ""

    def __str__(self) -> str:
        return f"{self.file}: entry {self.position}" + (f" ({short(self.id)[1:-1]})" if self.id else "")


class PublishedSource(Source):
    """A directory in the published layout. The constructor reads its JSON files; images and masks are read per entry.

    Raises:
        UserError: no such directory, no metadata, malformed JSON, or no entries.
    """

    accepts = frozenset({"boxes"})
    expects = "a directory with metadata*.json"

    def __init__(self, directory: str | Path, options: SourceOptions | None = None) -> None:
        self.directory, self._options = Path(directory), options or SourceOptions()
        if not self.directory.is_dir():
            raise UserError(f"{directory}: no such directory; expected a data set in the published layout")
        files = sorted(self.directory.glob("metadata*.json"), key=lambda path: (_split_of(path) is None, path.name))
        if not files:
            raise UserError(f"{directory}: contains no metadata*.json; expected a data set in the published layout")
        self._files: dict[str, str] = {}  # metadata file -> SHA-256
        entries = [entry for path in files for entry in self._load(path)]
        if not entries:
            raise UserError(f"{directory}: the data set is empty: no entries in {', '.join(p.name for p in files)}")
        self.entries, self.conflicts = _resolve_splits(entries)
        self.warnings = [
            f"{path.name}: the suffix {short(_suffix(path))} does not name one split (train, val or test): "
            "its scenes are split by the hash of their ids"
            for path in files
            if _suffix(path) and _split_of(path) is None
        ]
        self._classes = load_classes(self.directory / "classes.json")

    @classmethod
    def recognises(cls, paths: Sequence[str | Path]) -> bool:
        """Whether `paths` is one directory with metadata*.json."""
        return len(paths) == 1 and any(Path(paths[0]).glob("metadata*.json"))

    @classmethod
    def open(cls, paths: Sequence[str | Path], options: SourceOptions) -> PublishedSource:
        """Open the one directory in `paths`."""
        if len(paths) != 1:
            raise UserError(f"got {len(paths)} sources, expected one directory in the published layout")
        return cls(paths[0], options)

    def _load(self, path: Path) -> Iterator[Entry]:
        content, record = load_json(path, strict=False)
        data = record.get("data") if isinstance(record, dict) else None
        if not isinstance(data, list):
            raise UserError(f'{path}: got {short(record)}, expected {{"data": [entries]}}')
        self._files[path.name] = hashlib.sha256(content).hexdigest()
        split = _split_of(path)
        return (Entry(path.name, i, record, split) for i, record in enumerate(data))

    @property
    def total(self) -> int:
        """The number of entries."""
        return len(self.entries)

    @property
    def classes(self) -> dict[str, list[str]] | None:
        """The content of classes.json; None if it does not exist."""
        return self._classes

    @property
    def directories(self) -> set[Path]:
        """The data set's directory."""
        return {self.directory.resolve()}

    @property
    def large(self) -> bool:
        """Whether worker processes pay off."""
        return len(self.entries) >= LARGE

    def scan(self, workers: int, progress: bool) -> Scan:
        """Reject the entries whose id is assigned to another split, and warn of files whose name assigns none."""
        return Scan(self.conflicts, warnings=self.warnings)

    def items(self, split_of: SplitOf) -> Iterator[Entry]:
        """Yield the entries split by split, shuffled within each split by a hash of the id."""
        return by_split(shuffled(self.entries, lambda entry: entry.id), split_of, lambda entry: (entry.id, entry.split))

    def fingerprint(self) -> str:
        """A hash of the metadata, the classes, and the sizes and times of the images and mask files."""
        digest = hashlib.sha256(json.dumps([self._files, self._classes]).encode())
        masks = self.directory / MASKS
        has_masks = masks.is_dir()
        for entry in self.entries:
            record = entry.record if isinstance(entry.record, dict) else {}
            name = str(record.get("id"))
            npz = _status(masks / f"{name}_grounding_sam.npz")
            digest.update(_status(self.directory / str(record.get("image_path"))) + npz)
            if npz == _MISSING and has_masks and (pngs := find_png_masks(masks, name)) is not None:
                for path in pngs if isinstance(pngs, list) else [pngs]:
                    digest.update(f"{path.relative_to(masks)}\0".encode("utf-8", "surrogateescape") + _status(path))
        return digest.hexdigest()

    def reader(self, *, encode: bool = True) -> PublishedReader:
        """Create the reader; with `encode=False`, masks are bool [H, W] instead of RLE."""
        checker = SceneChecker(self._options.max_pixels, self._classes, self._options.boxes)
        return PublishedReader(self.directory, checker, encode)


class PublishedReader:
    """Reads single entries. Does not hold the entries, so it is cheap to pickle."""

    def __init__(self, directory: Path, checker: SceneChecker, encode: bool) -> None:
        self._directory, self._checker, self._encode = directory, checker, encode

    def read(self, entry: Entry) -> CheckedScene:
        """Read and check an entry. The image is decoded to verify that it is intact, and kept as bytes.

        Raises:
            BadEntry: the whole scene is unusable.
        """
        key, image_path, action = _parse_entry(entry.record)
        self._checker.check_action(action)
        image, size = self._image(image_path)
        bad: list[Rejection] = []
        objects = self._objects(entry, size, bad)
        masks = self._masks(entry, objects, size, bad)
        for item, mask in zip(objects, masks or [], strict=masks is not None):
            if item is not None:
                item.mask = mask
        relations = self._relations(entry, objects, bad, usable=masks is not None)
        # Rejected objects are None up to here, because masks and relations refer to objects by index.
        kept = [item for item in objects if item is not None]
        position = {i: k for k, i in enumerate(i for i, item in enumerate(objects) if item is not None)}
        relations = [replace(r, subject=position[r.subject], object=position[r.object]) for r in relations]
        caption = entry.record.get("dense_caption")
        caption = caption.strip() or None if isinstance(caption, str) else None
        scene = Scene(key, image, action, kept, relations, entry.split, caption)
        checked = self._checker.clean(scene, size, str(entry), corners=True, encode=self._encode)
        return replace(checked, rejected=bad + checked.rejected)

    def _image(self, path: PurePosixPath) -> tuple[bytes, tuple[int, int]]:
        try:
            data = read_file(self._directory / path, str(path))
        except BadEntry as error:
            inside = self._directory / "images" / path.name
            if error.reason == "missing_image" and path.parent.name != "images" and inside.is_file():
                raise BadEntry(error.reason, error.detail, _HINTS["folder"]) from None
            raise
        return data, self._checker.image_size(data, f"{path}: ")

    def _objects(self, entry: Entry, size: tuple[int, int], bad: list[Rejection]) -> list[SceneObject | None]:
        objects: list[SceneObject | None] = []
        for i, record in enumerate(entry.record["objects"]):
            here = f"{entry}: object {i}"
            item = _parse_object(record)
            if item is None:
                hint = _HINTS["object"] if isinstance(record, dict) else ""
                bad.append(Rejection(here, "malformed_object", f"got {short(record)}", hint))
            elif not self._checker.is_known("objects", item.name):
                bad.append(Rejection(here, "unknown_object", f"{item.name!r} is not a known object", UNKNOWN))
                item = None
            else:
                item.box = self._checker.corners(item.box, size)
            objects.append(item)
        return objects

    def _masks(
        self, entry: Entry, objects: list[SceneObject | None], size: tuple[int, int], bad: list[Rejection]
    ) -> Sequence[Tensor | None] | None:
        """The masks of the objects, None for each in a data set without masks; None if the mask file is unusable."""
        directory, name = self._directory / MASKS, str(entry.record["id"])
        path = directory / f"{name}_grounding_sam.npz"
        if not objects or not directory.is_dir():
            return [None] * len(objects)
        try:
            try:
                names = [None if item is None else item.name for item in objects]
                return list(read_masks(path, names, size))
            except FileNotFoundError:
                if (pngs := find_png_masks(directory, name)) is None:
                    raise
                path = pngs if isinstance(pngs, Path) else pngs[0].parent
                return read_png_masks(pngs, len(objects), size)
        except FileNotFoundError:
            missing = f"no {path.relative_to(self._directory)}, and no PNGs"
            bad.append(Rejection(str(entry), "missing_masks", missing, _padded(directory, name)))
        except ValueError as error:
            detail = error.detail if isinstance(error, BadEntry) else error
            bad.append(Rejection(str(entry), "bad_masks", f"{path.relative_to(self._directory)}: {detail}"))
        return None

    def _relations(
        self, entry: Entry, objects: list[SceneObject | None], bad: list[Rejection], usable: bool
    ) -> list[Relation]:
        """The valid relations; none if the masks are not `usable`, since all would lack their focused region."""
        relations = []
        names = {normalise(r[0]) for r in entry.record["objects"] if _parse_object(r) is not None}
        for k, record in enumerate(entry.record["relations"]):
            here = f"{entry}: relation {k}"
            triple = _parse_triple(record)
            if triple is None:
                bad.append(Rejection(here, "malformed_relation", f"got {short(record)}", _relation_hint(record)))
                continue
            text = " ".join(triple)
            missing = [name for name in (triple[0], triple[2]) if name not in names]
            pair = nearest_pair(objects, triple[0], triple[2])
            if missing:
                detail = f"{text!r}: no object {missing[0]!r}"
                bad.append(Rejection(here, "relation_unknown_label", detail, _HINTS["label"]))
            elif not self._checker.is_known("relations", text):
                bad.append(Rejection(here, "unknown_relation", f"{text!r} is not a known relation", UNKNOWN))
            elif isinstance(pair, str):
                bad.append(Rejection(here, pair, repr(text)))
            elif not usable:
                bad.append(Rejection(here, "relation_without_mask", f"{text!r}: the scene's mask file is unusable"))
            else:
                relations.append(Relation(pair[0], triple[1], pair[1], _negatives(record)))
        return relations


def load_reference(metadata_dir: str | Path, on_bad: Callable[[Rejection], None] | None = None) -> Iterator[Scene]:
    """Read every scene of a directory in the published layout.

    `metadata_train.json`, `metadata_val.json` and `metadata_test.json` assign a split (as do other names of the splits,
    see `shards.split_named`), other `metadata*.json` do not, of which all but metadata.json are logged as a warning.
    An id in several splits stays in test, else in val. Texts are lower-cased. If several objects match a relation's
    labels, the two objects with the nearest box centres are chosen.

    Args:
        metadata_dir: directory with metadata*.json, images, sam_results/ID_grounding_sam.npz (or PNGs, see
            `sources.masks_png`) and, optionally, classes.json.
        on_bad: called with every rejection; None logs a warning.

    Yields:
        Scenes whose image is the file's bytes (decoded once to verify that it is intact) and whose masks are bool
        [H, W] (the candidate with the best score) or None.

    Raises:
        UserError: no such directory, no metadata, malformed JSON, or no entries.
    """
    source = PublishedSource(metadata_dir)  # not in the generator, so that unusable directories raise immediately
    return _scenes(source, on_bad or (lambda rejection: _log.warning("%s", rejection)))


def _scenes(source: PublishedSource, report: Callable[[Rejection], None]) -> Iterator[Scene]:
    reader = source.reader(encode=False)
    seen: set[str] = set()
    for warning in source.warnings:
        _log.warning("%s", warning)
    for rejection in source.conflicts:
        report(rejection)
    for entry in source.entries:
        try:
            found = reader.read(entry)
            if found.scene.key in seen:
                raise BadEntry("duplicate_id", f"an earlier entry has the id {found.scene.key}")
        except BadEntry as error:
            report(Rejection(str(entry), error.reason, error.detail, error.hint))
            continue
        seen.add(found.scene.key)
        for rejection in found.rejected:
            report(rejection)
        yield found.scene


def _status(path: Path) -> bytes:
    """Size and modification time of a file, as a line."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: not a valid file name
        return _MISSING
    return f"{status.st_size} {status.st_mtime_ns}\n".encode()


def _resolve_splits(entries: list[Entry]) -> tuple[list[Entry], list[Rejection]]:
    """Give entries without a split the one that another file assigns to their id, and reject ids in several splits."""
    assigned = assigned_splits((entry.id, entry.split) for entry in entries if entry.id)
    resolved: list[Entry] = []
    conflicts: list[Rejection] = []
    for entry in entries:
        split = assigned.get(entry.id)
        if entry.split not in (None, split) and split is not None:
            conflicts.append(split_conflict(str(entry), split))
        else:
            resolved.append(replace(entry, split=split) if entry.split != split and split is not None else entry)
    return resolved, conflicts


_FIELDS: dict[str, tuple[type, ...]] = {
    "id": (str, int),
    "image_path": (str,),
    "action": (str,),
    "objects": (list,),
    "relations": (list,),
}


def _parse_entry(record: Any) -> tuple[str, PurePosixPath, str]:
    """Parse the key, image path and action of an entry, and check that its objects and relations are lists."""
    if not isinstance(record, dict):
        raise BadEntry("malformed_entry", f"got {short(record)}, expected an object")
    for name, kinds in _FIELDS.items():
        if not isinstance(record.get(name), kinds) or isinstance(record[name], bool):
            got = short(record[name]) if name in record else "nothing"
            raise BadEntry("malformed_entry", f"got {got} as {name!r}, expected {kinds[0].__name__}")
    action = normalise(record["action"])
    if not action:
        raise BadEntry("malformed_entry", "the action is empty")
    for name in ("objects", "relations"):
        if len(record[name]) > MAX_ITEMS:
            raise BadEntry("malformed_entry", f"got {len(record[name])} {name}, expected at most {MAX_ITEMS}")
    return safe_key(str(record["id"])), safe_path(record["image_path"]), action


def _parse_object(record: Any) -> SceneObject | None:
    if not isinstance(record, list) or len(record) != 2 or not isinstance(record[0], str):
        return None
    name, box = normalise(record[0]), four_numbers(record[1])
    return SceneObject(name, box) if name and box is not None else None


def _parse_triple(record: Any) -> tuple[str, str, str] | None:
    """The texts of [path, [subject, predicate, object], ...]."""
    if not isinstance(record, list) or len(record) < 2 or not isinstance(record[1], list) or len(record[1]) != 3:
        return None
    if not all(isinstance(word, str) for word in record[1]):
        return None
    subject, predicate, object_ = (normalise(word) for word in record[1])
    return (subject, predicate, object_) if subject and predicate and object_ else None


def _padded(directory: Path, name: str) -> str:
    """The hint if there are masks for the number `name` with another number of zeros."""
    if not name.isdecimal():
        return ""
    others = {name.lstrip("0").rjust(width, "0") for width in range(1, 13)} - {name}
    forms = ("_grounding_sam.npz", "_grounding_sam.png", "_grounding_sam", ".png", "")
    found = any((directory / f"{other}{form}").exists() for other in others for form in forms)
    return _HINTS["padded"] if found else ""


def _relation_hint(record: Any) -> str:
    """The hint for a relation that is a JSON object or a bare triple, or that refers to its objects by position."""
    triple = record[1] if isinstance(record, list) and len(record) > 1 and isinstance(record[1], list) else record
    if isinstance(record, dict):
        return _HINTS["relation"]
    if isinstance(record, list) and len(record) == 3 and all(isinstance(word, str) for word in record):
        return _HINTS["triple"]
    by_index = isinstance(triple, list) and len(triple) == 3 and any(type(word) is int for word in triple)
    return _HINTS["index"] if by_index else ""


def _negatives(record: list[Any]) -> list[str]:
    """The texts of the negative samples, the third element of a relation: triples or texts; others are ignored."""
    found = record[2] if len(record) > 2 and isinstance(record[2], list) else []
    texts = [" ".join(map(str, text)) if isinstance(text, list) else text for text in found]
    return [normalise(text) for text in texts if isinstance(text, str) and normalise(text)]


def nearest_pair(objects: Sequence[SceneObject | None], subject: str, object_: str) -> tuple[int, int] | str:
    """The two distinct objects with these names and the nearest box centres, or the reason if there are none."""
    ends = [[i for i, item in enumerate(objects) if item is not None and item.name == n] for n in (subject, object_)]
    if not all(ends):
        return "relation_without_object"
    pairs = [(i, j) for i in ends[0] for j in ends[1] if i != j]
    if not pairs:
        return "relation_with_itself"
    return min(pairs, key=lambda pair: (_distance(objects[pair[0]], objects[pair[1]]), pair))


def _distance(a: SceneObject | None, b: SceneObject | None) -> float:
    assert a is not None and b is not None
    distance = math.hypot(*(a.box[k] + a.box[k + 2] - b.box[k] - b.box[k + 2] for k in (0, 1)))
    return distance if math.isfinite(distance) else math.inf


def _split_of(path: Path) -> str | None:
    """The split that the last word of a metadata file's suffix names, numbers aside; None if there are others, too."""
    words = [word for word in words_of(_suffix(path)) if not word.isdigit()]
    splits = {split for word in words if (split := split_named(word))}
    return split_named(words[-1]) if words and len(splits) == 1 else None


def _suffix(path: Path) -> str:
    return path.stem.removeprefix("metadata").lstrip("-_.")
