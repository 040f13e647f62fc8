"""Packs scenes into WebDataset shards with an index, a vocabulary, a manifest and a report of what was left out.

    DIR/train-000000.tar ...  KEY.jpg (the file's own bytes), KEY.json (see `scene.scene_to_json`)
    DIR/index.json            {"schema": 1, "shards": {name: [[key, jpg offset, size, json offset, size], ...]}}
    DIR/vocabulary.json       see `vocabulary.Vocabulary`
    DIR/manifest.json         counts, and the SHA-256 of every other file
    DIR/rejected.jsonl        {"entry", "reason", "detail"} a line

The same scenes give the same bytes, whatever the number of processes.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from scenarioclip_fast.data.check import BadEntry, Rejection, clean_scene
from scenarioclip_fast.data.decode import MAX_PIXELS, DecodeError, TorchDecoder
from scenarioclip_fast.data.parallel import ordered_map
from scenarioclip_fast.data.reference_layout import (
    Entry,
    EntryReader,
    ReferenceLayout,
    image_reason,
    normalise,
    safe_key,
)
from scenarioclip_fast.data.scene import SCHEMA, Scene, SceneObject, scene_to_json
from scenarioclip_fast.data.shards import SPLITS
from scenarioclip_fast.data.vocabulary import LEVELS, Vocabulary
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.progress import progress as show_progress
from scenarioclip_fast.requirements import require

_OWN_FILES = re.compile(r"(train|val|test)-\d{6}\.tar|(index|vocabulary|manifest)\.json|rejected\.jsonl")
_MANY = 2000  # entries from which starting more processes pays
_QUALITY = 95  # of images that come as pixels


@dataclass
class PackReport:
    """What `pack` wrote: per split the counts of scenes, objects and relations, and rejections by reason."""

    directory: Path
    splits: dict[str, dict[str, int]]
    vocabulary: dict[str, int]
    rejected: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{'':<6}  {'scenes':>8}  {'objects':>8}  {'relations':>9}"]
        lines += [
            f"{split:<6}  {n['scenes']:>8}  {n['objects']:>8}  {n['relations']:>9}" for split, n in self.splits.items()
        ]
        sizes = self.vocabulary
        lines.append(f"texts   {sizes['global']} actions, {sizes['object']} objects, {sizes['relation']} relations")
        if self.rejected:
            lines.append("rejected, in full in rejected.jsonl:")
            lines += [f"  {n:>8}  {reason}" for reason, n in self.rejected.items()]
        return "\n".join(lines)


@dataclass
class _Packed:
    """A scene ready to be written, or (key None) what became of an entry that is not one."""

    key: str | None
    split: str = ""
    image: bytes = b""
    record: bytes = b""
    texts: dict[str, list[str]] = field(default_factory=dict)
    bad: list[Rejection] = field(default_factory=list)


def pack(
    source: str | Path | Iterable[Scene],
    out_dir: str | Path,
    *,
    shard_size: int = 1000,
    val: float = 0.1,
    test: float = 0.2,
    workers: int | None = None,
    force: bool = False,
    progress: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> PackReport:
    """Checks scenes and packs those that are sound.

    Args:
        source: a directory in the published layout, or scenes (images as bytes, or as pixels, which are then
            encoded).
        out_dir: made, or replaced if it holds a pack of this schema. Nothing appears in it before all is written.
        shard_size: scenes per shard.
        val, test: shares of the scenes that come without a split; which ones follows from a hash of the key.
        workers: processes that read a directory; None: as many as cores for a large one. Scenes that are passed
            are packed in this process.
        force: write into a directory that holds other things, which are left alone.
        progress: show a bar on a terminal, lines elsewhere.
        max_pixels: larger images are rejected.

    Raises:
        UserError: unusable source or directory, or no scene is left. Single bad entries are rejected, counted and
            listed in rejected.jsonl.
    """
    if shard_size < 1 or (workers is not None and workers < 1):
        raise UserError(f"got shard size {shard_size} and {workers} workers, expected at least one")
    if min(val, test) < 0 or val + test > 1:
        raise UserError(f"got shares val={val:g} and test={test:g}, expected them to be >= 0 and to add up to <= 1")
    out = Path(out_dir)
    _check_target(out, force)
    split_of = partial(_split_by_hash, val=val, test=test)
    classes: dict[str, list[str]] | None = None
    total: int | None = None
    if isinstance(source, (str, Path)):
        layout = ReferenceLayout(source, max_pixels)
        classes, total = layout.classes, len(layout.entries)
        packed = _pack_entries(layout, split_of, workers or (_cores() if total >= _MANY else 1))
    else:
        total = len(source) if isinstance(source, Sized) else None
        packed = _pack_scenes(source, split_of, max_pixels)
    if progress:
        packed = show_progress(packed, total, "packing", "scenes")
    listing = out.absolute().with_name(f"{out.absolute().name}.rejected.jsonl")  # what lies in `out` stays as it is
    with _staging(out) as stage:
        report = _write(packed, stage, shard_size, classes)
        scenes = sum(n["scenes"] for n in report.splits.values())
        if scenes:
            _install(stage, out)
        else:
            os.replace(stage / "rejected.jsonl", listing)
    report.directory = out
    if not scenes:
        reasons = ", ".join(f"{n} {reason}" for reason, n in report.rejected.items()) or "the source is empty"
        raise UserError(f"{out}: no scene is left to pack: {reasons}; see {listing}")
    return report


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _split_by_hash(key: str, val: float, test: float) -> str:
    u = int.from_bytes(_digest(key)[:8], "big") / 2**64
    return "test" if u < test else "val" if u < test + val else "train"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _pack_entries(layout: ReferenceLayout, split_of: partial[str], workers: int) -> Iterator[_Packed]:
    # Neighbours in a metadata file are often alike (one video, one photographer): a reader that goes through a shard
    # from front to back should not see them together.
    entries = sorted(enumerate(layout.entries), key=lambda pair: (_digest(str(_raw_id(pair[1]))), pair[0]))
    ordered = [entry for _, entry in entries]
    job = partial(_pack_entry, layout.reader(), split_of)
    return ordered_map(job, ordered, workers)


def _raw_id(entry: Entry) -> Any:
    return entry.record.get("id") if isinstance(entry.record, dict) else None


def _pack_entry(reader: EntryReader, split_of: partial[str], entry: Entry) -> _Packed:
    try:
        scene, size, bad = reader.read(entry, encode=True)
    except BadEntry as error:
        return _Packed(None, bad=[Rejection(str(entry), error.reason, error.detail)])
    return _packed(scene, size, bad, split_of)


def _pack_scenes(scenes: Iterable[Scene], split_of: partial[str], max_pixels: int) -> Iterator[_Packed]:
    decoder = TorchDecoder(threads=1, max_pixels=max_pixels)
    for i, scene in enumerate(scenes):
        entry = f"scene {i} ({scene.key})"
        try:
            if scene.split not in (None, *SPLITS):
                raise BadEntry("malformed_entry", f"got split {scene.split!r}, expected one of {', '.join(SPLITS)}")
            image = scene.image
            if not isinstance(image, bytes):
                image = require("simplejpeg").encode_jpeg(image.numpy(), quality=_QUALITY, colorsubsampling="444")
            (pixels,) = decoder.decode([image])
            if isinstance(pixels, DecodeError):
                raise BadEntry(image_reason(pixels), pixels.detail)
            size = (pixels.shape[0], pixels.shape[1])
            clean, bad = clean_scene(_normalised(scene, image), size, entry, encode=True)
        except BadEntry as error:
            yield _Packed(None, bad=[Rejection(entry, error.reason, error.detail)])
            continue
        yield _packed(clean, size, bad, split_of)


def _normalised(scene: Scene, image: bytes) -> Scene:
    objects = [SceneObject(normalise(o.name), o.box, o.mask) for o in scene.objects]
    relations = [type(r)(r.subject, normalise(r.predicate), r.object) for r in scene.relations]
    return Scene(safe_key(scene.key), image, normalise(scene.action), objects, relations, scene.split)


def _packed(scene: Scene, size: tuple[int, int], bad: list[Rejection], split_of: partial[str]) -> _Packed:
    assert isinstance(scene.image, bytes)
    texts = {
        "global": [scene.action],
        "object": [o.name for o in scene.objects],
        "relation": [scene.relation_text(k) for k in range(len(scene.relations))],
    }
    record = _dump(scene_to_json(scene, size))
    return _Packed(scene.key, scene.split or split_of(scene.key), scene.image, record, texts, bad)


def _dump(record: Any) -> bytes:
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


class _ShardWriter:
    """Writes the shards of one split."""

    def __init__(self, directory: Path, split: str, shard_size: int) -> None:
        self._directory, self._split, self._size = directory, split, shard_size
        self._tar: tarfile.TarFile | None = None
        self.shards: list[dict[str, Any]] = []
        self.index: dict[str, list[list[Any]]] = {}
        self.counts = Counter[str]()

    def add(self, item: _Packed) -> None:
        if self._tar is None:
            name = f"{self._split}-{len(self.shards):06d}.tar"
            self._tar = tarfile.open(self._directory / name, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
            self.shards.append({"name": name})
            self.index[name] = []
        rows = self.index[self.shards[-1]["name"]]
        row: list[Any] = [item.key]
        for suffix, data in (("jpg", item.image), ("json", item.record)):
            header = tarfile.TarInfo(f"{item.key}.{suffix}")  # time, owner and mode are TarInfo's constants
            header.size = len(data)
            row += [self._tar.offset + tarfile.BLOCKSIZE, len(data)]
            self._tar.addfile(header, io.BytesIO(data))
        rows.append(row)
        self.counts.update(scenes=1, objects=len(item.texts["object"]), relations=len(item.texts["relation"]))
        if len(rows) == self._size:
            self.close()

    def close(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        self._tar = None
        shard = self.shards[-1]
        path = self._directory / shard["name"]
        shard.update(sha256=_sha256(path), scenes=len(self.index[shard["name"]]), bytes=path.stat().st_size)

    def summary(self) -> dict[str, int]:
        return {name: self.counts[name] for name in ("scenes", "objects", "relations")}


def _write(packed: Iterable[_Packed], stage: Path, shard_size: int, classes: dict[str, list[str]] | None) -> PackReport:
    writers = {split: _ShardWriter(stage, split, shard_size) for split in SPLITS}
    texts: dict[str, set[str]] = {level: set() for level in LEVELS}
    train: dict[str, Counter[str]] = {level: Counter() for level in LEVELS}
    rejected: list[Rejection] = []
    keys: set[str] = set()
    for item in packed:
        rejected += item.bad
        if item.key is None:
            continue
        if item.key in keys:
            rejected.append(Rejection(item.key, "duplicate_id", "another scene of this id has been packed"))
            continue
        keys.add(item.key)
        writers[item.split].add(item)
        for level in LEVELS:
            texts[level].update(item.texts[level])
            if item.split == "train":
                train[level].update(item.texts[level])
    for writer in writers.values():
        writer.close()
    if classes is not None:
        texts = {"global": set(classes["actions"]), "object": set(classes["objects"])}
        texts["relation"] = set(classes["relations"])
    vocabulary = Vocabulary(texts["global"], texts["object"], texts["relation"], train)
    vocabulary.save(stage / "vocabulary.json")
    index = {name: rows for writer in writers.values() for name, rows in writer.index.items()}
    (stage / "index.json").write_bytes(_dump({"schema": SCHEMA, "shards": index}))
    rows = [{"entry": r.entry, "reason": r.reason, "detail": r.detail} for r in rejected]
    (stage / "rejected.jsonl").write_bytes(b"".join(map(_dump, rows)))
    reasons = dict(sorted(Counter(r.reason for r in rejected).items()))
    sizes = {level: len(vocabulary.texts(level)) for level in LEVELS}
    manifest = {
        "schema": SCHEMA,
        "splits": {split: {**w.summary(), "shards": w.shards} for split, w in writers.items()},
        "vocabulary": sizes,
        "rejected": reasons,
        "sha256": {name: _sha256(stage / name) for name in ("index.json", "rejected.jsonl", "vocabulary.json")},
    }
    (stage / "manifest.json").write_bytes(_dump(manifest))
    return PackReport(stage, {split: w.summary() for split, w in writers.items()}, sizes, reasons)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_target(out: Path, force: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out}: is a file; name a directory for the pack")
    foreign = sorted(path.name for path in out.iterdir() if not _OWN_FILES.fullmatch(path.name))
    if foreign and not force:
        raise UserError(
            f"{out}: holds something that is not a pack ({foreign[0]}); name another directory or use --force"
        )
    manifest = out / "manifest.json"
    if manifest.exists() and not force:
        try:
            schema = json.loads(manifest.read_bytes()).get("schema")
        except (ValueError, AttributeError):
            schema = None
        if schema != SCHEMA:
            raise UserError(
                f"{out}: holds a pack of schema {schema}, this is schema {SCHEMA}; use --force to replace it"
            )


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A directory beside `out`, on the same file system, with a fixed name so that a killed run's is found again."""
    out = out.absolute()
    stage = out.parent / f".{out.name}.partial"
    stage.mkdir(parents=True, exist_ok=True)
    lock = os.open(stage, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: another process is packing into it") from None
        try:
            for path in stage.iterdir():
                path.unlink()
            yield stage
        finally:
            shutil.rmtree(stage)
    finally:
        os.close(lock)


def _install(stage: Path, out: Path) -> None:
    """Moves the finished pack to its place; what else lies there stays.

    The manifest goes first and comes last: a directory with a manifest holds a whole pack at every moment.
    """
    out.mkdir(exist_ok=True)
    (out / "manifest.json").unlink(missing_ok=True)
    for path in sorted(out.iterdir()):
        if _OWN_FILES.fullmatch(path.name):
            path.unlink()
    for path in sorted(stage.iterdir()):
        if path.name != "manifest.json":
            os.replace(path, out / path.name)
    os.replace(stage / "manifest.json", out / "manifest.json")
