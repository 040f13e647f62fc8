"""WebDataset tars whose samples are KEY.jpg (or .jpeg) and KEY.json in this package's schema.

KEY.json is the output of `scene.scene_to_json`:

    {"schema": 2, "size": [H, W], "action": "riding a bike" or null,
     "objects": [{"name": "dog", "box": [x1, y1, x2, y2], "mask": {"size": [H, W], "counts": "..."} or null}, ...],
     "relations": [{"subject": 0, "predicate": "on", "object": 1, "negatives": ["dog under bike"]}, ...]}

A relation's "negatives" may be omitted, as may a scene's "caption" (a sentence or two) and "scores" (any object).
Records of schema 1, which have none of these and an action for every scene, are accepted.

The members of a key may be in any order, directories become part of the key (see `check.safe_key`), and other members
are ignored and counted. Nothing is extracted: samples are read in place, at the offsets given by the headers.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scenarioclip_fast.data.check import (
    BadEntry,
    CheckedScene,
    SceneChecker,
    assigned_splits,
    normalise_scene,
    split_conflict,
)
from scenarioclip_fast.data.parallel import ordered_map
from scenarioclip_fast.data.scene import Scene, scene_from_json
from scenarioclip_fast.data.shards import SPLITS, split_named
from scenarioclip_fast.data.sources.base import Scan, Source, SourceOptions, SplitOf
from scenarioclip_fast.data.sources.classes import load_classes
from scenarioclip_fast.data.sources.tar_index import COMPRESSED_SUFFIXES, TarIndex, index_tar, open_tar, split_warnings
from scenarioclip_fast.data.texts import normalise
from scenarioclip_fast.data.vocabulary import Vocabulary
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import open_regular
from scenarioclip_fast.parsing import parse_json
from scenarioclip_fast.progress import progress as show_progress

_LARGE = 1 << 28  # bytes of tars from which worker processes pay off


@dataclass(frozen=True)
class Sample:
    """One sample of tar number `tar`: (offset, size) of its image and of its record."""

    tar: int
    name: str
    key: str
    split: str | None
    image: tuple[int, int]
    record: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.name}: {self.key}"


def find_tars(source: str | Path) -> list[Path]:
    """List the tars that a directory, file name or glob pattern refers to, sorted by name.

    Those of a directory include the tars in its subfolders that are named after a split ("val").
    """
    suffixes = (".tar", *COMPRESSED_SUFFIXES)
    path = Path(source)
    if path.is_dir():
        folders = [path, *(entry for entry in path.iterdir() if split_named(entry.name) and entry.is_dir())]
        found = [entry for folder in folders for entry in folder.iterdir() if entry.name.endswith(suffixes)]
    elif path.exists():
        found = [path] if path.name.endswith(suffixes) else []
    else:
        found = [Path(name) for name in glob.glob(str(source)) if name.endswith(suffixes)]
    return sorted(found)


class WebDatasetSource(Source):
    """WebDataset tars.

    A tar whose name starts with a split assigns it ("val-000.tar", "dev_000.tar"; see `shards.split_named`), as does
    one in a folder of such a name below the common directory of all tars ("val/000.tar").

    A key in several splits stays in test, else in val.

    Args:
        source: a directory, a tar, a glob pattern, or several paths of tars. The directory's classes.json, or the
            vocabulary of a pack in it, lists the known texts; otherwise every text is accepted.
        options: `max_pixels` and `boxes`.

    Raises:
        UserError: no such file, no tars, or a compressed tar.
    """

    accepts = frozenset({"boxes"})
    expects = ".tar files of KEY.jpg and KEY.json"

    def __init__(self, source: str | Path | Sequence[str | Path], options: SourceOptions | None = None) -> None:
        self._options = options or SourceOptions()
        single = source if isinstance(source, (str, Path)) else None
        paths = sorted(set(map(Path, source))) if not isinstance(source, (str, Path)) else find_tars(source)
        if not paths:
            raise UserError(f"{single or 'the source'}: found no .tar, expected {self.expects}")
        folders = [Path(single)] if single and Path(single).is_dir() else [path.parent for path in paths]
        common = os.path.commonpath([folder.absolute() for folder in folders])
        self._tars = [open_tar(path, os.path.relpath(path, common)) for path in paths]
        self._indexes: list[TarIndex] = []
        self._assigned: dict[str, str] = {}  # key -> split, unless the tar names determine it
        self._classes: dict[str, list[str]] | None = None
        if single is not None and Path(single).is_dir():
            self._classes = classes_of(Path(single))

    @classmethod
    def recognises(cls, paths: Sequence[str | Path]) -> bool:
        """Whether each path refers to tars."""
        return bool(paths) and all(find_tars(path) for path in paths)

    @classmethod
    def open(cls, paths: Sequence[str | Path], options: SourceOptions) -> WebDatasetSource:
        """Open the tars in `paths`."""
        return cls(paths[0] if len(paths) == 1 else paths, options)

    @property
    def total(self) -> int:
        """The number of samples that `scan` found."""
        return sum(len(index.extents) for index in self._indexes)

    @property
    def classes(self) -> dict[str, list[str]] | None:
        """The known texts; None if every text is accepted."""
        return self._classes

    @property
    def directories(self) -> set[Path]:
        """The directories of the tars."""
        return {tar.path.resolve().parent for tar in self._tars}

    @property
    def large(self) -> bool:
        """Whether worker processes pay off."""
        return sum(tar.size for tar in self._tars) >= _LARGE

    def fingerprint(self) -> str:
        """A hash of the classes and of the names, sizes and times of the tars."""
        tars = [[tar.name, tar.size, tar.mtime_ns] for tar in self._tars]
        return hashlib.sha256(json.dumps([tars, self._classes]).encode()).hexdigest()

    def scan(self, workers: int, progress: bool) -> Scan:
        """Read the headers of all tars."""
        indexes = ordered_map(index_tar, self._tars, min(workers, len(self._tars)), chunk=1)
        if progress:
            indexes = show_progress(indexes, len(self._tars), "reading headers", "tars")
        self._indexes = list(indexes)
        self._resolve_splits()
        ignored: Counter[str] = Counter()
        for index in self._indexes:
            ignored.update(index.ignored)
        rejected = [rejection for index in self._indexes for rejection in index.rejected]
        return Scan(rejected, dict(sorted(ignored.items())), split_warnings([tar.name for tar in self._tars]))

    def _resolve_splits(self) -> None:
        """Give keys without a split the one that another tar assigns to them, and reject keys in several splits."""
        if len({tar.split for tar in self._tars}) == 1:
            return
        indexed = list(zip(self._tars, self._indexes, strict=True))
        self._assigned = assigned_splits((key, tar.split) for tar, index in indexed for key in index.keys.splitlines())
        for tar, index in indexed:
            keys = index.keys.splitlines()
            kept = [i for i, key in enumerate(keys) if tar.split in (None, self._assigned.get(key))]
            for i in sorted(set(range(len(keys))) - set(kept)):
                index.rejected.append(split_conflict(f"{tar.name}: {keys[i]}", self._assigned[keys[i]]))
            index.keys, index.extents = "\n".join(keys[i] for i in kept), index.extents[kept]

    def items(self, split_of: SplitOf) -> Iterable[Sample]:
        """Yield the samples split by split, in tar order: tars are usually shuffled, and sequential reads are fast."""
        for split in SPLITS:
            for i, (tar, index) in enumerate(zip(self._tars, self._indexes, strict=True)):
                for key, extents in zip(index.keys.splitlines(), index.extents, strict=True):
                    assigned = self._assigned.get(key, tar.split)
                    if split_of(key, assigned) == split:
                        a, b, c, d = extents.tolist()
                        yield Sample(i, tar.name, key, assigned, (a, b), (c, d))

    def reader(self) -> SampleReader:
        """Create the reader of the samples."""
        checker = SceneChecker(self._options.max_pixels, self._classes, self._options.boxes)
        return SampleReader([tar.path for tar in self._tars], checker)


class SampleReader:
    """Reads single samples. Cheap to pickle: each process opens its own files."""

    def __init__(self, paths: list[Path], checker: SceneChecker) -> None:
        self._paths = paths
        self._checker = checker
        self._open: tuple[int, int] | None = None  # tar number, file descriptor

    def read(self, sample: Sample) -> CheckedScene:
        """Read and check a sample. The image is decoded to verify that it is intact, and kept as bytes.

        Raises:
            BadEntry: the whole scene is unusable.
            UserError: the tar can no longer be read.
        """
        image = self._pread(sample, *sample.image)
        scene, declared = _parse(sample.key, image, self._pread(sample, *sample.record))
        self._checker.check_action(scene.action)
        size = self._checker.image_size(image)
        if declared != size:
            raise BadEntry(
                "other_size", f"the image is {size[1]} x {size[0]}, but the record has {declared[1]} x {declared[0]}"
            )
        scene.split = sample.split
        return self._checker.clean(scene, size, str(sample))

    def _pread(self, sample: Sample, offset: int, size: int) -> bytes:
        path = self._paths[sample.tar]
        try:
            if self._open is None or self._open[0] != sample.tar:
                self.close()
                self._open = (sample.tar, open_regular(path))
            data = os.pread(self._open[1], size, offset)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; is the file system still mounted?") from None
        if len(data) != size:
            raise UserError(f"{path}: got {len(data)} of {size} bytes at {offset}: the file was changed while packing")
        return data

    def close(self) -> None:
        """Close the open tar."""
        if self._open is not None:
            os.close(self._open[1])
            self._open = None

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None}


def _parse(key: str, image: bytes, content: bytes) -> tuple[Scene, tuple[int, int]]:
    """Parse a record into a scene with normalised texts, and the (H, W) in the record."""
    try:
        record = parse_json(content, strict=False)
        scene = normalise_scene(scene_from_json(key, image, record))
        height, width = (int(n) for n in record["size"])
    except BadEntry:
        raise
    except (ValueError, RecursionError) as error:
        raise BadEntry("malformed_entry", str(error)) from None
    return scene, (height, width)


def classes_of(directory: Path) -> dict[str, list[str]] | None:
    """The known texts of a directory of tars: of its classes.json, or else of the pack in it; None: every text."""
    return load_classes(directory / "classes.json") or _classes_of_pack(directory)


def _classes_of_pack(directory: Path) -> dict[str, list[str]] | None:
    found = [path for name in ("vocabulary.bin", "vocabulary.json") if (path := directory / name).exists()]
    if not found or not (directory / "manifest.json").exists():
        return None
    vocabulary = Vocabulary.load(found[0])
    texts = {"actions": vocabulary.actions, "objects": vocabulary.objects, "relations": vocabulary.relations}
    return {level: sorted(set(map(normalise, known))) for level, known in texts.items()}  # an old pack's may differ
