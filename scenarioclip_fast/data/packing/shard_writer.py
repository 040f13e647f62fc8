"""Write packed scenes into shards, and the files that describe a finished pack."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from scenarioclip_fast.data.boxes import COLUMNS
from scenarioclip_fast.data.check import CheckedScene, Rejection
from scenarioclip_fast.data.index import NAME as INDEX
from scenarioclip_fast.data.index import IndexWriter
from scenarioclip_fast.data.packing.diagnosis import Diagnosis
from scenarioclip_fast.data.packing.staging import Stage, dump
from scenarioclip_fast.data.scene import SCHEMA, Scene, has_masks, scene_from_json, scene_to_json
from scenarioclip_fast.data.shards import SPLITS
from scenarioclip_fast.data.sources.base import Scan
from scenarioclip_fast.data.views_file import NAME as VIEWS
from scenarioclip_fast.data.views_file import count_views
from scenarioclip_fast.data.vocabulary import VocabularyWriter
from scenarioclip_fast.levels import LEVELS

# Per split: scenes, those with an action, objects, relations, and those whose subject and object both have a mask.
COUNTS = ("scenes", "actions", "objects", "relations", "masked_relations")


@dataclass
class PackedItem:
    """A scene ready to be written; or, if `key` is None, the rejections of an unusable item."""

    key: str | None
    split: str = ""
    image: bytes = b""
    record: bytes = b""
    texts: dict[str, list[str]] = field(default_factory=dict)
    masked_relations: int = 0
    rejected: list[Rejection] = field(default_factory=list)
    boxes: NDArray[np.float64] | None = None  # see `boxes.BoxEvidence`
    number: int = 0  # of the item in its source; only used for parts

    @classmethod
    def of(cls, checked: CheckedScene, split: str) -> PackedItem:
        """Serialise a checked scene."""
        item = cls._of_scene(checked.scene, split, dump(scene_to_json(checked.scene, checked.size)))
        item.rejected, item.boxes = checked.rejected, checked.boxes
        return item

    @classmethod
    def of_shard(cls, key: str, split: str, image: bytes, record: bytes) -> PackedItem:
        """Read a scene of a shard.

        Raises:
            ValueError: not the record of a scene.
        """
        return cls._of_scene(scene_from_json(key, image, json.loads(record)), split, record)

    @classmethod
    def _of_scene(cls, scene: Scene, split: str, record: bytes) -> PackedItem:
        assert isinstance(scene.image, bytes)
        texts = {
            "global": [] if scene.action is None else [scene.action],
            "object": [o.name for o in scene.objects],
            "relation": [scene.relation_text(k) for k in range(len(scene.relations))],
        }
        masked = sum(has_masks(scene, relation) for relation in scene.relations)
        return cls(scene.key, split, scene.image, record, texts, masked)


@dataclass
class OpenShard:
    """A shard that is being written, and what its record needs."""

    name: str
    file: IO[bytes]
    tar: tarfile.TarFile
    rows: list[list[Any]] = field(default_factory=list)
    views: list[int] = field(default_factory=list)
    texts: dict[str, Counter[str]] = field(default_factory=lambda: {level: Counter() for level in LEVELS})
    masked_relations: int = 0

    @classmethod
    def create(cls, name: str, file: IO[bytes]) -> OpenShard:
        """Start a shard in an empty file."""
        return cls(name, file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT))

    def record(self, split: str) -> dict[str, Any]:
        """What the files of the pack need to know of the shard."""
        counts = (len(self.rows), *(self.texts[level].total() for level in LEVELS), self.masked_relations)
        return {
            "split": split,
            "name": self.name,
            "counts": dict(zip(COUNTS, counts, strict=True)),
            "rows": self.rows,
            "views": self.views,
            "texts": self.texts,
        }

    def add(self, item: PackedItem) -> None:
        row: list[Any] = [item.key]
        for suffix, data in (("jpg", item.image), ("json", item.record)):
            header = tarfile.TarInfo(f"{item.key}.{suffix}")  # constant defaults for time, owner and mode
            header.size = len(data)
            row += [self.tar.offset + tarfile.BLOCKSIZE, len(data)]
            self.tar.addfile(header, io.BytesIO(data))
        self.rows.append(row)
        self.views.append(count_views(len(item.texts.get("object", ())), len(item.texts.get("relation", ()))))
        for level, texts in item.texts.items():
            self.texts[level].update(texts)
        self.masked_relations += item.masked_relations

    def close(self) -> None:
        """Complete the file; closing it again does nothing.

        Raises:
            OSError: the disk is full.
        """
        if not self.file.closed:
            with self.file:
                self.tar.close()


class ShardWriter:
    """Writes shards into a staging directory, then the index, the vocabulary, the rejections and the manifest.

    Args:
        ordered: scenes are sorted by split. At most one shard is then open at a time, and a later run resumes at `end`,
            the position of the first item that is not in a finished shard.
    """

    def __init__(self, stage: Stage, shard_size: int, ordered: bool) -> None:
        self._stage, self._size, self._ordered = stage, shard_size, ordered
        self._open: dict[str, OpenShard] = {}
        self._numbers = Counter[str]()  # of shards opened, by split
        self._keys: set[str] = set()
        self._files = PackFiles(stage)
        # Hashes a finished shard, syncs it to disk and adds it to the journal, one at a time and in order.
        self._finisher = ThreadPoolExecutor(1, "finish")
        self._finishing: Future[None] | None = None
        self.rejected: list[Rejection] = []  # since the last shard was closed
        self._boxes: list[NDArray[np.float64]] = []  # likewise
        self.resumed_boxes: list[NDArray[np.float64]] = []  # those of the resumed run
        self.end = 0
        for record in stage.records():
            self.end = record["end"]
            self._numbers[record["split"]] += 1
            self._keys.update(row[0] for row in record["rows"])
            self.resumed_boxes += [np.array(rows, np.float64).reshape(-1, COLUMNS) for rows in record.get("boxes", [])]
            self._files.count(record["split"], record["texts"])

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._finisher.shutdown()  # waits for the shard in progress, so that it is kept
        for shard in self._open.values():
            with suppress(OSError):  # disk full: already reported
                shard.close()

    @property
    def scenes(self) -> int:
        """The number of scenes written, including those of the resumed run."""
        return len(self._keys)

    def write(self, packed: Iterable[PackedItem]) -> None:
        """Write scenes, starting with item number `end`, and close all shards."""
        i = self.end - 1
        for i, item in enumerate(packed, self.end):
            if item.key is None:
                self.rejected += item.rejected
            elif item.key in self._keys:
                self._note([duplicate(item.key)], item.boxes)
            else:
                self._add(item, i)
        for split in list(self._open):
            self._close(split, i + 1)

    def _add(self, item: PackedItem, i: int) -> None:
        assert item.key is not None
        if item.split not in self._open:
            for split in list(self._open) if self._ordered else ():
                self._close(split, i)
            name = f"{item.split}-{self._numbers[item.split]:06d}.tar"
            self._numbers[item.split] += 1
            self._open[item.split] = OpenShard.create(name, self._stage.create(name))
        self._note(item.rejected, item.boxes)
        self._keys.add(item.key)
        shard = self._open[item.split]
        shard.add(item)
        if len(shard.rows) == self._size:
            self._close(item.split, i + 1)

    def _note(self, rejected: list[Rejection], boxes: NDArray[np.float64] | None) -> None:
        self.rejected += rejected
        self._boxes += [] if boxes is None else [boxes]

    def _close(self, split: str, end: int) -> None:
        shard = self._open.pop(split)
        shard.close()
        self._files.count(split, shard.texts)
        rejected, self.rejected = self.rejected, []
        boxes, self._boxes = self._boxes, []
        record = shard.record(split) | {
            "end": end,
            "rejected": [[r.entry, r.reason, r.detail, r.hint] for r in rejected],
            "boxes": [rows.tolist() for rows in boxes],
        }
        self._wait()
        self._finishing = self._finisher.submit(self._stage.add, record)

    def _wait(self) -> None:
        if self._finishing is not None:
            self._finishing.result()

    def complete(self) -> PackFiles:
        """Wait until all shards are on disk, and return the files that describe them."""
        self._wait()
        self._files.rejected = self.rejected
        return self._files


class PackFiles:
    """The files that describe a finished pack.

    Args:
        stage: holds the shards, and their records.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._vocabulary = VocabularyWriter(stage.path)
        self.rejected: list[Rejection] = []  # that no record of a shard lists

    def count(self, split: str, texts: Mapping[str, Mapping[str, int]]) -> None:
        """Count the texts of a shard: per level, the occurrences of each."""
        self._vocabulary.add(split, texts)

    def finish(
        self,
        scan: Scan,
        classes: dict[str, list[str]] | None,
        fingerprint: str | None,
        review: Callable[[Mapping[str, int], Diagnosis], list[str]],
    ) -> dict[str, Any]:
        """Write the remaining files, move the pack into place, and return its manifest.

        Args:
            review: called with the counts of all splits and with the rejections, before anything is moved; returns
                warnings, or raises an error.
        """
        splits, diagnosis = self._write_index(scan.rejected)
        warnings = review({name: sum(found[name] for found in splits.values()) for name in COUNTS}, diagnosis)
        with self._stage.create("vocabulary.bin") as file:
            vocabulary = self._vocabulary.write(file, classes)
        names = [INDEX, VIEWS, "rejected.jsonl", "vocabulary.bin"]
        manifest = {
            "schema": SCHEMA,
            "splits": splits,
            "vocabulary": vocabulary,
            "rejected": diagnosis.reasons(),
            "causes": [cause.to_json() for cause in diagnosis.causes()],
            "warnings": warnings,
            "ignored": scan.ignored,
            "index": {"bytes": self._stage.size(INDEX)},
            "sha256": {name: self._stage.sha256(name) for name in names},
        }
        if fingerprint is not None:
            self._write("source.json", {"schema": SCHEMA, "fingerprint": fingerprint})
            names.append("source.json")
        self._stage.finish(manifest, names)
        return manifest

    def _write(self, name: str, record: Any) -> None:
        with self._stage.create(name) as file:
            file.write(dump(record))

    def _write_index(self, scanned: list[Rejection]) -> tuple[dict[str, dict[str, Any]], Diagnosis]:
        """Write the index, the views and rejected.jsonl; return the manifest's splits, and the rejections."""
        splits: dict[str, dict[str, Any]] = {split: dict.fromkeys(COUNTS, 0) | {"shards": []} for split in SPLITS}
        views = {split: bytearray() for split in SPLITS}
        diagnosis = Diagnosis()
        diagnosis.add(scanned)
        with self._stage.create(INDEX) as file, self._stage.create("rejected.jsonl") as listing:
            index = IndexWriter(file, SPLITS)
            listing.writelines(rejection_lines(scanned))
            for record in self._stage.records():
                found = splits[record["split"]]
                found["shards"].append({name: record[name] for name in ("name", "sha256", "bytes")})
                found["shards"][-1]["scenes"] = record["counts"]["scenes"]
                for name in COUNTS:
                    found[name] += record["counts"][name]
                index.add(record["split"], record["sha256"], record["rows"])
                views[record["split"]] += bytes(record["views"])
                rejected = [Rejection(*row) for row in record["rejected"]]
                diagnosis.add(rejected)
                listing.writelines(rejection_lines(rejected))
            diagnosis.add(self.rejected)
            listing.writelines(rejection_lines(self.rejected))
            index.finish()
        with self._stage.create(VIEWS) as file:
            file.writelines(views.values())
        return splits, diagnosis


def duplicate(key: str) -> Rejection:
    """The rejection of a scene whose key another scene has."""
    return Rejection(key, "duplicate_id", "another scene with this id is already packed")


def rejection_lines(rejected: Iterable[Rejection]) -> Iterator[bytes]:
    """The lines of rejected.jsonl."""
    for r in rejected:
        yield dump({"entry": r.entry, "reason": r.reason, "detail": r.detail} | ({"hint": r.hint} if r.hint else {}))
