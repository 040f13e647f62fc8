"""Reads the published layout: metadata*.json, classes.json, images and SAM-style masks."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scenarioclip_fast.data.check import (
    MAX_IMAGE_BYTES,
    MAX_ITEMS,
    BadEntry,
    Rejection,
    clean_scene,
    given_splits,
    image_reason,
    normalise,
    safe_key,
    short,
    split_conflict,
)
from scenarioclip_fast.data.decode import MAX_PIXELS, DecodeError, TorchDecoder
from scenarioclip_fast.data.scene import Relation, Scene, SceneObject
from scenarioclip_fast.data.shards import SPLITS
from scenarioclip_fast.errors import UserError

MAX_MASK_BYTES = 1 << 30  # all candidate masks of one scene
MAX_NPZ_LISTING = 1 << 20  # the table of contents of one npz, which has three members or so
_MANY = 2000  # entries from which starting more processes pays

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One element of a metadata file, as it stands there."""

    file: str
    position: int
    record: Any
    split: str | None

    @property
    def id(self) -> str:
        """As it is written; empty for one that cannot be an id."""
        name = self.record.get("id") if isinstance(self.record, dict) else None
        return str(name) if isinstance(name, (str, int)) and not isinstance(name, bool) else ""

    def __str__(self) -> str:
        return f"{self.file}: entry {self.position}" + (f" ({short(self.id)[1:-1]})" if self.id else "")


def _settle_splits(entries: list[Entry]) -> tuple[list[Entry], list[Rejection]]:
    """Gives an entry without a split the one that another file gives its id, and takes out those of two splits."""
    given = given_splits((entry.id, entry.split) for entry in entries if entry.id)
    settled: list[Entry] = []
    conflicts: list[Rejection] = []
    for entry in entries:
        split = given.get(entry.id)
        if entry.split not in (None, split) and split is not None:
            conflicts.append(split_conflict(str(entry), split))
        else:
            settled.append(replace(entry, split=split) if entry.split != split and split is not None else entry)
    return settled, conflicts


class ReferenceLayout:
    """A directory in the published layout: its JSON files are read here, images and masks entry by entry.

    Raises:
        UserError: no such directory, no metadata, malformed JSON, no entry at all.
    """

    def __init__(self, directory: str | Path, max_pixels: int = MAX_PIXELS) -> None:
        self.directory, self._max_pixels = Path(directory), max_pixels
        if not self.directory.is_dir():
            raise UserError(f"{directory}: no such directory; expected a data set in the published layout")
        files = sorted(self.directory.glob("metadata*.json"), key=lambda path: (_split_of(path) is None, path.name))
        if not files:
            raise UserError(f"{directory}: no metadata*.json in it; expected a data set in the published layout")
        self._files: dict[str, str] = {}  # metadata file -> SHA-256
        entries = [entry for path in files for entry in self._load(path)]
        if not entries:
            raise UserError(f"{directory}: the data set is empty: no entry in {', '.join(p.name for p in files)}")
        self.entries, self.conflicts = _settle_splits(entries)
        self.classes = load_classes(self.directory / "classes.json")

    def _load(self, path: Path) -> Iterator[Entry]:
        content, data = _load_data(path)
        self._files[path.name] = hashlib.sha256(content).hexdigest()
        split = _split_of(path)
        return (Entry(path.name, i, record, split) for i, record in enumerate(data))

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def directories(self) -> set[Path]:
        """Where the source lies, and no pack may be written."""
        return {self.directory.resolve()}

    @property
    def large(self) -> bool:
        """Whether several processes pay."""
        return len(self) >= _MANY

    def scan(self, workers: int, progress: bool) -> tuple[list[Rejection], dict[str, int]]:
        """What is known to be bad, and what is passed over, before any entry is read."""
        return self.conflicts, {}

    def items(self, split_of: Callable[[str, str | None], str]) -> Iterable[Entry]:
        """The entries split by split, mixed within each; `split_of` maps a key, and the split given, to a split."""
        entries: dict[str, list[tuple[bytes, int]]] = {split: [] for split in SPLITS}
        for i, entry in enumerate(self.entries):
            # Neighbours in a metadata file are often alike (one video, one photographer): a reader that goes through
            # a shard from front to back should not see them together.
            mixed = hashlib.sha256(entry.id.encode("utf-8", "backslashreplace")).digest()
            entries[split_of(_key_or_empty(entry.id), entry.split)].append((mixed, i))
        return [self.entries[i] for split in SPLITS for _, i in sorted(entries[split])]

    def fingerprint(self) -> str:
        """Changes with the metadata, the classes, and the size or time of any image or file of masks."""
        digest = hashlib.sha256(json.dumps([self._files, self.classes]).encode())
        for entry in self.entries:
            record = entry.record if isinstance(entry.record, dict) else {}
            for path in (str(record.get("image_path")), f"sam_results/{record.get('id')}_grounding_sam.npz"):
                try:
                    status = os.stat(os.path.join(self.directory, path))
                    digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
                except (OSError, ValueError):  # ValueError: a name that no file can have
                    digest.update(b"none\n")
        return digest.hexdigest()

    def reader(self) -> EntryReader:
        return EntryReader(self.directory, self.classes, self._max_pixels)


class EntryReader:
    """Reads single entries; knows the classes, not the other entries, so that it is light to send to a process."""

    def __init__(self, directory: Path, classes: dict[str, list[str]] | None, max_pixels: int = MAX_PIXELS) -> None:
        self._directory, self._max_pixels = directory, max_pixels
        self._classes = None if classes is None else {level: frozenset(texts) for level, texts in classes.items()}
        self._decoder: TorchDecoder | None = None

    def read(self, entry: Entry, *, encode: bool = False) -> tuple[Scene, tuple[int, int], list[Rejection]]:
        """The scene of an entry, its image's (H, W), and what of it was rejected.

        The image is decoded, to know that it is whole, and kept as bytes. Masks are bool [H, W], or RLE with
        `encode`.

        Raises:
            BadEntry: the whole scene is unusable.
        """
        record = entry.record
        key, image_path, action = _identity(record)
        if self._unknown("actions", action):
            raise BadEntry("unknown_action", f"{action!r} is not among the actions of classes.json")
        image, size = self._image(image_path)
        bad: list[Rejection] = []
        objects = self._objects(entry, bad)
        for item, mask in zip(objects, self._masks(entry, objects, size, bad), strict=True):
            if item is not None:
                item.mask = mask
        relations = self._relations(entry, objects, bad)
        # Objects rejected here leave a gap until now, for masks and relations go by position.
        kept = [i for i, item in enumerate(objects) if item is not None]
        position = {i: k for k, i in enumerate(kept)}
        scene = Scene(
            key,
            image,
            action,
            [item for item in objects if item is not None],
            [Relation(position[r.subject], r.predicate, position[r.object]) for r in relations],
            entry.split,
        )
        scene, more = clean_scene(scene, size, str(entry), encode=encode)
        return scene, size, bad + more

    def _unknown(self, level: str, text: str) -> bool:
        return self._classes is not None and text not in self._classes[level]

    def _image(self, path: PurePosixPath) -> tuple[bytes, tuple[int, int]]:
        try:
            status = (self._directory / path).stat()
            if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
                raise BadEntry("missing_image", f"{path}: not a regular file")
            if status.st_size > MAX_IMAGE_BYTES:
                raise BadEntry("image_too_large", f"{path}: {status.st_size} bytes, the limit is {MAX_IMAGE_BYTES}")
            data = (self._directory / path).read_bytes()
        except OSError as error:
            raise BadEntry("missing_image", f"{path}: {error.strerror}") from None
        except UnicodeEncodeError as error:
            raise BadEntry("unsafe_path", f"{path}: {error.reason}") from None
        if self._decoder is None:
            self._decoder = TorchDecoder(threads=1, max_pixels=self._max_pixels)
        (pixels,) = self._decoder.decode([data])
        if isinstance(pixels, DecodeError):
            raise BadEntry(image_reason(pixels), f"{path}: {pixels.detail}")
        return data, (pixels.shape[0], pixels.shape[1])

    def _objects(self, entry: Entry, bad: list[Rejection]) -> list[SceneObject | None]:
        objects: list[SceneObject | None] = []
        for i, record in enumerate(entry.record["objects"]):
            here = f"{entry}: object {i}"
            item = _parse_object(record)
            if item is None:
                bad.append(Rejection(here, "malformed_object", f"got {short(record)}"))
            elif self._unknown("objects", item.name):
                bad.append(Rejection(here, "unknown_object", f"{item.name!r} is not among the objects of classes.json"))
                item = None
            objects.append(item)
        return objects

    def _masks(
        self, entry: Entry, objects: list[SceneObject | None], size: tuple[int, int], bad: list[Rejection]
    ) -> list[Tensor | None]:
        none: list[Tensor | None] = [None] * len(objects)
        if not objects:
            return none
        path = self._directory / "sam_results" / f"{entry.record['id']}_grounding_sam.npz"
        try:
            names = [None if item is None else item.name for item in objects]
            return list(read_masks(path, names, size))
        except FileNotFoundError:
            bad.append(Rejection(str(entry), "missing_masks", f"no {path.relative_to(self._directory)}"))
        except ValueError as error:
            bad.append(Rejection(str(entry), "bad_masks", f"{path.relative_to(self._directory)}: {error}"))
        return none

    def _relations(self, entry: Entry, objects: list[SceneObject | None], bad: list[Rejection]) -> list[Relation]:
        relations = []
        written = {normalise(r[0]) for r in entry.record["objects"] if _parse_object(r) is not None}
        for k, record in enumerate(entry.record["relations"]):
            here = f"{entry}: relation {k}"
            triple = _parse_triple(record)
            if triple is None:
                bad.append(Rejection(here, "malformed_relation", f"got {short(record)}"))
                continue
            text = " ".join(triple)
            missing = [name for name in (triple[0], triple[2]) if name not in written]
            pair = _nearest_pair(objects, triple[0], triple[2])
            if missing:
                bad.append(Rejection(here, "relation_unknown_label", f"{text!r}: no object {missing[0]!r}"))
            elif self._unknown("relations", text):
                bad.append(Rejection(here, "unknown_relation", f"{text!r} is not among the relations of classes.json"))
            elif isinstance(pair, str):
                bad.append(Rejection(here, pair, repr(text)))
            else:
                relations.append(Relation(pair[0], triple[1], pair[1]))
        return relations


def load_reference(metadata_dir: str | Path, on_bad: Callable[[Rejection], None] | None = None) -> Iterator[Scene]:
    """Reads every scene of a directory in the published layout.

    `metadata_train.json`, `metadata_val.json` and `metadata_test.json` name a split, other `metadata*.json` do not; an
    id of several splits stays in the one that is held out most (test, then val).
    Texts are lower-cased. Where a relation's label occurs more than once, the two objects with the nearest box
    centres are taken.

    Args:
        metadata_dir: holds metadata*.json, images, sam_results/ID_grounding_sam.npz and, optionally, classes.json.
        on_bad: called with everything that is left out; logged as a warning if None.

    Yields:
        Scenes whose image is the file's bytes (decoded once, to know that it is whole) and whose masks are bool
        [H, W], the candidate with the best score, or None.

    Raises:
        UserError: no such directory, no metadata, malformed JSON, no entry at all.
    """
    layout = ReferenceLayout(metadata_dir)
    report = on_bad or (lambda rejection: _log.warning("%s", rejection))
    return _scenes(layout, report)


def _scenes(layout: ReferenceLayout, report: Callable[[Rejection], None]) -> Iterator[Scene]:
    reader = layout.reader()
    seen: set[str] = set()
    for rejection in layout.conflicts:
        report(rejection)
    for entry in layout.entries:
        try:
            scene, _, bad = reader.read(entry)
            if scene.key in seen:
                raise BadEntry("duplicate_id", f"{scene.key} has been read before")
        except BadEntry as error:
            report(Rejection(str(entry), error.reason, error.detail))
            continue
        seen.add(scene.key)
        for rejection in bad:
            report(rejection)
        yield scene


def read_masks(path: Path, names: list[str | None], size: tuple[int, int]) -> Iterator[Tensor]:  # bool [H, W] each
    """The best candidate mask of each object of a SAM-style npz, without unpickling anything.

    Args:
        names: of the objects, in order; None for one whose name could not be read.
        size: (H, W) of the image. Anything else in the file is refused before memory is asked for.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or not one mask per object.
    """
    n = len(names)
    try:
        _check_archive(path)
        with zipfile.ZipFile(path) as archive:
            labels = _read_labels(archive, n)
            scores = _read_scores(archive, n)
            mask = _read_array(archive, "mask", "b", MAX_MASK_BYTES, (n, None, *size))
    except (FileNotFoundError, ValueError, MemoryError):
        raise
    except Exception as error:  # zipfile raises whatever a damaged file makes it raise
        raise ValueError(f"not a readable npz ({type(error).__name__}: {str(error)[:100]})") from None
    if mask.shape[1] == 0:
        raise ValueError(f"got mask {list(mask.shape)}, without a candidate")
    if scores is None and mask.shape[1] > 1:
        raise ValueError(f"got {mask.shape[1]} candidates per object and no score to choose by")
    if scores is not None and scores.shape != mask.shape[:2]:
        raise ValueError(f"got score {list(scores.shape)}, expected {list(mask.shape[:2])}")
    rows = _rows_of(names, labels)
    best = np.zeros(n, np.int64) if scores is None else np.where(np.isnan(scores), -np.inf, scores).argmax(1)
    return (torch.from_numpy(mask[row, best[row]].copy()) for row in rows)


def _check_archive(path: Path) -> None:
    """Refuses what zipfile would take too much memory for: it reads the whole table of contents at once."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    if status.st_size > MAX_MASK_BYTES:
        raise ValueError(f"got {status.st_size} bytes, expected at most {MAX_MASK_BYTES}")
    with path.open("rb") as file:
        file.seek(max(0, status.st_size - _ZIP_TAIL))
        tail = file.read()
    # Whatever may be taken for an end record counts: readers differ in which one they find.
    ends = [match.start() for match in re.finditer(b"(?=PK\5\6)", tail)]
    listing = max((int.from_bytes(tail[end + 12 : end + 16], "little") for end in ends), default=0)
    if listing > MAX_NPZ_LISTING:
        raise ValueError(f"got a table of contents of {listing} bytes, expected at most {MAX_NPZ_LISTING}")
    if b"PK\6\7" in tail:
        raise ValueError("got an archive in zip64 form, which no file of masks needs")


_ZIP_TAIL = 22 + 0xFFFF  # the end record, and the longest comment behind it


def _rows_of(names: list[str | None], labels: list[str] | None) -> list[int]:
    """The row of each object: its own, unless the labels say that rows are in another order."""
    if labels is None or all(name in (None, label) for name, label in zip(names, labels, strict=True)):
        return list(range(len(names)))
    if None in names or sorted(labels) != sorted(str(name) for name in names):
        raise ValueError(f"the labels {short(labels)} are not those of the objects")
    rows: dict[str, list[int]] = {}
    for row, label in enumerate(labels):
        rows.setdefault(label, []).append(row)
    return [rows[str(name)].pop(0) for name in names]


def _read_labels(archive: zipfile.ZipFile, n: int) -> list[str] | None:
    """None where there are none that can be read without unpickling: rows are then in the order of the objects."""
    if "labels.npy" not in archive.namelist():
        return None
    with _open(archive, "labels") as file:
        if _header(file, "labels")[2].hasobject:
            return None
    labels = _read_array(archive, "labels", "U", 1 << 24, (n,))
    return [normalise(str(label)) for label in labels]


def _read_scores(archive: zipfile.ZipFile, n: int) -> NDArray[np.float64] | None:
    if "score.npy" not in archive.namelist():
        return None
    scores = _read_array(archive, "score", "f", 1 << 24).astype(np.float64)
    return scores[:, None] if scores.ndim == 1 else scores


def _read_array(
    archive: zipfile.ZipFile, name: str, kind: str, limit: int, expected: tuple[int | None, ...] | None = None
) -> NDArray[Any]:
    """An array of dtype `kind`, at most `limit` bytes and the shape `expected` (None: any); its header tells all."""
    with _open(archive, name) as file:
        shape, fortran, dtype = _header(file, name)
        if dtype.kind != kind or dtype.hasobject:
            raise ValueError(f"got {name} of type {dtype}, expected {_KINDS[kind]}")
        if len(shape) > 4 or not all(0 <= extent <= MAX_PIXELS for extent in shape):
            raise ValueError(f"got {name} of shape {list(shape)}, expected at most 4 axes of at most {MAX_PIXELS}")
        size = math.prod(shape) * dtype.itemsize
        if size > limit:
            raise ValueError(f"got {name} of {size} bytes, expected at most {limit}")
        if expected is not None and (
            len(shape) != len(expected) or any(e not in (None, s) for s, e in zip(shape, expected, strict=True))
        ):
            wanted = ", ".join("k" if extent is None else str(extent) for extent in expected)
            raise ValueError(f"got {name} {list(shape)}, expected [{wanted}]")
        data = file.read(size)
    if len(data) != size:
        raise ValueError(f"{name} ends after {len(data)} of {size} bytes")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


_KINDS = {"b": "bool", "U": "text", "f": "float"}


def _open(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    info = archive.getinfo(f"{name}.npy")
    # What NumPy writes; zipfile unpacks the other methods without a bound.
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"got {name} in zip compression {info.compress_type}, expected none or deflate")
    return archive.open(info)


def _header(file: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    # Later versions differ in the length of the header alone, which they let grow to 4 GiB.
    if version != (1, 0):
        raise ValueError(f"got {name} in npy version {version}, expected 1.0")
    try:
        return np.lib.format.read_array_header_1_0(file)
    except Exception as error:  # NumPy parses it as Python: SyntaxError, TokenError, RecursionError, MemoryError, ...
        detail = " ".join(str(error)[:100].split())
        raise ValueError(f"damaged header of {name} ({type(error).__name__}: {detail})") from None


def _identity(record: Any) -> tuple[str, PurePosixPath, str]:
    """Key, image path and action of an entry, whose lists are then known to be lists."""
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
    return safe_key(str(record["id"])), _safe_path(record["image_path"]), action


_FIELDS: dict[str, tuple[type, ...]] = {
    "id": (str, int),
    "image_path": (str,),
    "action": (str,),
    "objects": (list,),
    "relations": (list,),
}


def _key_or_empty(raw: str) -> str:
    try:
        return safe_key(raw)
    except BadEntry:
        return ""


def _safe_path(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or re.search(r"[\\\x00]", name):
        raise BadEntry("unsafe_path", f"{short(name)}: expected a path inside the data set's directory")
    return path


def _parse_object(record: Any) -> SceneObject | None:
    if not isinstance(record, list) or len(record) != 2 or not isinstance(record[0], str):
        return None
    name, box = normalise(record[0]), record[1]
    if not name or not isinstance(box, list) or len(box) != 4:
        return None
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in box):
        return None
    try:
        x1, y1, x2, y2 = (float(v) for v in box)
    except OverflowError:
        return None
    return SceneObject(name, (x1, y1, x2, y2))


def _parse_triple(record: Any) -> tuple[str, str, str] | None:
    """The words of [path, [subject, predicate, object], ...]; what follows (negative samples) is not used."""
    if not isinstance(record, list) or len(record) < 2 or not isinstance(record[1], list) or len(record[1]) != 3:
        return None
    if not all(isinstance(word, str) and word.strip() for word in record[1]):
        return None
    subject, predicate, object_ = (normalise(word) for word in record[1])
    return subject, predicate, object_


def _nearest_pair(objects: list[SceneObject | None], subject: str, object_: str) -> tuple[int, int] | str:
    """Of the pairs of two different objects with these names, the one with the nearest box centres, else a reason."""
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
    found = re.fullmatch(r"metadata.*_(train|val|test)", path.stem)
    return found[1] if found else None


def _load_json(path: Path) -> tuple[bytes, Any]:
    try:
        content = path.read_bytes()
        return content, json.loads(content.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from None


def _load_data(path: Path) -> tuple[bytes, list[Any]]:
    content, record = _load_json(path)
    data = record.get("data") if isinstance(record, dict) else None
    if not isinstance(data, list):
        raise UserError(f'{path}: got {short(record)}, expected {{"data": [entries]}}')
    return content, data


def load_classes(path: Path) -> dict[str, list[str]] | None:
    """The texts of a classes.json by "actions", "objects" and "relations"; None where there is no such file."""
    if not path.exists():
        return None
    _, record = _load_json(path)
    levels = ("actions", "objects", "relations")
    if not isinstance(record, dict) or not all(
        isinstance(record.get(level), list) and all(isinstance(text, str) for text in record[level]) for level in levels
    ):
        raise UserError(f"{path}: expected {{{', '.join(f'{level!r}: [texts]' for level in levels)}}}")
    return {level: sorted({normalise(text) for text in record[level]}) for level in levels}
