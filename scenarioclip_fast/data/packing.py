"""Packs scenes into WebDataset shards with an index, a vocabulary, a manifest and a report of what was left out.

    DIR/train-000000.tar ...  KEY.jpg (the file's own bytes), KEY.json (see `scene.scene_to_json`)
    DIR/index.json            {"schema": 1, "shards": {name: [[key, jpg offset, size, json offset, size], ...]}}
    DIR/vocabulary.json       see `vocabulary.Vocabulary`
    DIR/manifest.json         counts, and the SHA-256 of every other file
    DIR/rejected.jsonl        {"entry", "reason", "detail"} a line
    DIR/source.json           what the pack was made from, to know whether it is up to date; not for scenes from memory

The same scenes give the same bytes, whatever the number of processes, and however often a run was killed and started
again (see `staging`). Memory holds the keys and the distinct texts, and what a shard needs; the rest is on the disk.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from scenarioclip_fast.data.check import BadEntry, Rejection, clean_scene, image_reason, normalised, safe_key, short
from scenarioclip_fast.data.decode import MAX_PIXELS, DecodeError, TorchDecoder
from scenarioclip_fast.data.parallel import ordered_map
from scenarioclip_fast.data.reference_layout import ReferenceLayout
from scenarioclip_fast.data.scene import SCHEMA, Scene, check_shares, scene_to_json
from scenarioclip_fast.data.shards import SPLITS
from scenarioclip_fast.data.staging import INSIDE, OWN_FILES, Stage, dump, holds, sha256
from scenarioclip_fast.data.vocabulary import LEVELS, Vocabulary
from scenarioclip_fast.data.webdataset_layout import WebDatasetLayout, find_tars
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.progress import progress as show_progress
from scenarioclip_fast.requirements import require

FORMATS = ("auto", "published", "webdataset")
_COUNTS = ("scenes", "objects", "relations")
_QUALITY = 95  # of images that come as pixels
# To be raised when the same source comes to give another pack, so that those of before are made anew.
_EDITION = 1


@dataclass
class PackReport:
    """What `pack` wrote: per split the counts of scenes, objects and relations, and rejections by reason.

    `ignored` counts the members of tars that are no part of a scene, by suffix. `up_to_date`: the pack was there
    already, and nothing was written.
    """

    directory: Path
    splits: dict[str, dict[str, int]]
    vocabulary: dict[str, int]
    rejected: dict[str, int] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)
    up_to_date: bool = False

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
        if self.ignored:
            lines.append("passed over: " + ", ".join(f"{n} {suffix}" for suffix, n in self.ignored.items()))
        return "\n".join(lines)


class _Reader(Protocol):
    def read(self, item: Any, *, encode: bool = False) -> tuple[Scene, tuple[int, int], list[Rejection]]: ...


class _Source(Protocol):
    """A data set on disk that can be read item by item, in an order that never changes."""

    @property
    def classes(self) -> dict[str, list[str]] | None: ...
    @property
    def directories(self) -> set[Path]: ...
    @property
    def large(self) -> bool: ...
    def __len__(self) -> int: ...
    def fingerprint(self) -> str: ...
    def scan(self, workers: int, progress: bool) -> tuple[list[Rejection], dict[str, int]]: ...
    def items(self, split_of: Callable[[str, str | None], str]) -> Iterable[Any]: ...
    def reader(self) -> _Reader: ...


@dataclass(frozen=True)
class _SplitRule:
    """The split of a key: the one that the data set gives, or one that follows from a hash of the key alone."""

    val: float
    test: float
    hash_all: bool

    def __call__(self, key: str, given: str | None) -> str:
        if given is not None and not self.hash_all:
            return given
        u = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
        return "test" if u < self.test else "val" if u < self.test + self.val else "train"


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
    source: str | Path | Sequence[str | Path] | Iterable[Scene],
    out_dir: str | Path,
    *,
    format: str = "auto",
    shard_size: int = 1000,
    val: float = 0.1,
    test: float = 0.2,
    split: str = "given",
    workers: int | None = None,
    force: bool = False,
    progress: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> PackReport:
    """Checks scenes and packs those that are sound.

    A run that was killed is gone on with by the same call, and where the pack is there already nothing is done:
    whether the source is the same is told by names, sizes and times of its files, as rsync and make do. Scenes that
    are passed say nothing of that kind and are packed from the start each time.

    Args:
        source: a directory in the published layout; WebDataset tars of KEY.jpg and KEY.json (see `webdataset_layout`):
            a directory, a tar, a glob pattern or a list of tars; or scenes (images as bytes, or as pixels, which
            are then encoded).
        out_dir: made, or replaced if it holds a pack of this schema. Nothing appears in it before all is written.
        format: "published" or "webdataset" says what the source is, "auto" looks.
        shard_size: scenes per shard.
        val, test: shares of the scenes that come without a split; which ones follows from a hash of the key.
        split: "given" takes the split that a file's name or a scene gives, "hash" the key's hash for all.
        workers: processes that read a directory; None: as many as cores for a large one. Scenes that are passed
            are packed in this process.
        force: write into a directory that holds other things, which are left alone; pack even what is up to date.
        progress: show a bar on a terminal, lines elsewhere.
        max_pixels: larger images are rejected.

    Raises:
        UserError: unusable source or directory, no room left, or no scene is left. Single bad entries are rejected,
            counted and listed in rejected.jsonl.
    """
    _check_arguments(format, shard_size, val, test, split, workers)
    if max_pixels < 1:
        raise UserError(f"max_pixels: got {max_pixels}, expected at least 1")
    out = Path(out_dir)
    _check_target(out, force)
    split_of = _SplitRule(val, test, split == "hash")
    layout = _open(source, format, max_pixels)
    if layout is not None and out.resolve() in layout.directories:
        raise UserError(f"{out}: the source lies there; name another directory for the pack")
    options = [SCHEMA, _EDITION, shard_size, val, test, split, max_pixels]
    fingerprint = None
    if layout is not None:
        fingerprint = hashlib.sha256(json.dumps([layout.fingerprint(), *options]).encode()).hexdigest()
    note = partial(print, file=sys.stderr) if progress else _silent
    with Stage(out) as stage:
        stage.complete_installation()
        if fingerprint is not None and not force and (manifest := holds(out, fingerprint)) is not None:
            note(f"{out}: packed already, and neither the source nor the options have changed since: nothing to do")
            return _report(out, manifest, up_to_date=True)
        if stage.resume(fingerprint):
            note(
                f"going on after the {stage.finished} shards that the run before has finished"
                if stage.finished
                else "a run before was killed, but nothing of it can be used: packing from the start"
            )
        try:
            with _Writer(stage, shard_size, ordered=layout is not None) as writer:
                if layout is not None:
                    processes = workers or (_cores() if layout.large else 1)
                    known, ignored = layout.scan(processes if layout.large else 1, progress)
                    packed = _pack_layout(layout, split_of, processes, start=writer.end)
                    total: int | None = len(layout) - writer.end
                else:
                    known, ignored = [], {}
                    packed = _pack_scenes(cast("Iterable[Scene]", source), split_of, max_pixels)
                    total = len(source) if isinstance(source, Sized) else None
                writer.write(show_progress(packed, total, "packing", "scenes") if progress else packed)
                if writer.scenes == 0:
                    raise _nothing_left(out, known + writer.rejected, ignored)
                manifest = writer.finish(known, ignored, layout.classes if layout else None, fingerprint)
        except BaseException as error:
            if stage.worth_keeping:
                note(f"{stage.path} keeps {stage.finished} finished shards: the same command goes on from there")
            if isinstance(error, OSError):
                raise UserError(f"{error.filename or stage.path}: {error.strerror}") from error
            raise
    return _report(out, manifest)


def _check_arguments(format: str, shard_size: int, val: float, test: float, split: str, workers: int | None) -> None:
    if format not in FORMATS:
        raise UserError(f"format: got {format!r}, expected one of {', '.join(FORMATS)}")
    if split not in ("given", "hash"):
        raise UserError(f"split: got {split!r}, expected given or hash")
    for name, number in (("shard size", shard_size), ("workers", 1 if workers is None else workers)):
        if number < 1:
            raise UserError(f"{name}: got {number}, expected at least 1")
    check_shares(val, test)


def _open(source: str | Path | Sequence[str | Path] | Iterable[Scene], format: str, max_pixels: int) -> _Source | None:
    """The data set on disk that `source` names; None for scenes."""
    if not isinstance(source, (str, Path)):
        if not isinstance(source, Sequence) or not source or not isinstance(source[0], (str, Path)):
            return None
        if len(source) > 1:
            if format == "published":
                raise UserError(f"got {len(source)} sources, expected one: only tars can be packed together")
            return WebDatasetLayout(cast("Sequence[str | Path]", source), max_pixels)
        source = source[0]
    if format == "auto":
        tars, metadata = bool(find_tars(source)), Path(source).is_dir() and any(Path(source).glob("metadata*.json"))
        if tars and metadata:
            raise UserError(f"{source}: holds metadata*.json and tars; say which with --format published or webdataset")
        if not tars and not metadata:
            what = (
                "no metadata*.json and no .tar in it"
                if Path(source).is_dir()
                else "neither a directory nor a tar"
                if Path(source).exists()
                else "no such directory or tar"
            )
            raise UserError(f"{source}: {what}; expected a data set in the published layout, or WebDataset tars")
        format = "webdataset" if tars else "published"
    return WebDatasetLayout(source, max_pixels) if format == "webdataset" else ReferenceLayout(source, max_pixels)


def _silent(message: str) -> None:
    pass


def _nothing_left(out: Path, rejected: list[Rejection], ignored: dict[str, int]) -> UserError:
    listing = out.absolute().with_name(f"{out.absolute().name}.rejected.jsonl")  # what lies in `out` stays as it is
    listing.write_bytes(b"".join(_lines(rejected)))
    found = [f"{n} {reason}" for reason, n in sorted(Counter(r.reason for r in rejected).items())]
    found += [f"{n} {suffix} passed over" for suffix, n in ignored.items()]
    reasons = ", ".join(found) or "the source is empty"
    return UserError(f"{out}: no scene is left to pack: {reasons}; see {listing}")


def _report(out: Path, manifest: dict[str, Any], up_to_date: bool = False) -> PackReport:
    splits = {split: {name: found[name] for name in _COUNTS} for split, found in manifest["splits"].items()}
    return PackReport(out, splits, manifest["vocabulary"], manifest["rejected"], manifest["ignored"], up_to_date)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _pack_layout(layout: _Source, split_of: _SplitRule, workers: int, start: int) -> Iterator[_Packed]:
    items = islice(layout.items(split_of), start, None)
    return ordered_map(partial(_pack_item, layout.reader(), split_of), items, workers)


def _pack_item(reader: _Reader, split_of: _SplitRule, item: Any) -> _Packed:
    try:
        scene, size, bad = reader.read(item, encode=True)
    except BadEntry as error:
        return _Packed(None, bad=[Rejection(str(item), error.reason, error.detail)])
    return _packed(scene, size, bad, split_of)


def _pack_scenes(scenes: Iterable[Scene], split_of: _SplitRule, max_pixels: int) -> Iterator[_Packed]:
    decoder = TorchDecoder(threads=1, max_pixels=max_pixels)
    for i, scene in enumerate(scenes):
        entry = f"scene {i} ({short(str(getattr(scene, 'key', None)))[1:-1]})"
        try:
            yield _pack_scene(scene, entry, split_of, decoder)
        except BadEntry as error:
            yield _Packed(None, bad=[Rejection(entry, error.reason, error.detail)])
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:  # fields of other types
            yield _Packed(None, bad=[Rejection(entry, "malformed_entry", f"{type(error).__name__}: {error}")])


def _pack_scene(scene: Scene, entry: str, split_of: _SplitRule, decoder: TorchDecoder) -> _Packed:
    if scene.split not in (None, *SPLITS):
        raise BadEntry("malformed_entry", f"got split {scene.split!r}, expected one of {', '.join(SPLITS)}")
    image = scene.image if isinstance(scene.image, bytes) else _encoded(scene.image)
    (pixels,) = decoder.decode([image])
    if isinstance(pixels, DecodeError):
        raise BadEntry(image_reason(pixels), pixels.detail)
    size = (pixels.shape[0], pixels.shape[1])
    ready = replace(normalised(scene), key=safe_key(scene.key), image=image)
    clean, bad = clean_scene(ready, size, entry, encode=True)
    return _packed(clean, size, bad, split_of)


def _encoded(image: Tensor) -> bytes:
    if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 3 or image.shape[2] != 3:
        got = f"{list(image.shape)}, {image.dtype}" if isinstance(image, Tensor) else short(image)
        raise BadEntry("image_not_an_image", f"got {got}, expected bytes or uint8 [H, W, 3]")
    if image.numel() == 0:
        raise BadEntry("image_not_an_image", f"got {list(image.shape)}, without a pixel")
    pixels = image.cpu().contiguous().numpy()
    return bytes(require("simplejpeg").encode_jpeg(pixels, quality=_QUALITY, colorsubsampling="444"))


def _packed(scene: Scene, size: tuple[int, int], bad: list[Rejection], split_of: _SplitRule) -> _Packed:
    assert isinstance(scene.image, bytes)
    texts = {
        "global": [scene.action],
        "object": [o.name for o in scene.objects],
        "relation": [scene.relation_text(k) for k in range(len(scene.relations))],
    }
    record = dump(scene_to_json(scene, size))
    return _Packed(scene.key, split_of(scene.key, scene.split), scene.image, record, texts, bad)


@dataclass
class _Shard:
    """One that is being written."""

    name: str
    tar: tarfile.TarFile
    rows: list[list[Any]] = field(default_factory=list)
    texts: dict[str, Counter[str]] = field(default_factory=lambda: {level: Counter() for level in LEVELS})

    def add(self, item: _Packed) -> None:
        row: list[Any] = [item.key]
        for suffix, data in (("jpg", item.image), ("json", item.record)):
            header = tarfile.TarInfo(f"{item.key}.{suffix}")  # time, owner and mode are TarInfo's constants
            header.size = len(data)
            row += [self.tar.offset + tarfile.BLOCKSIZE, len(data)]
            self.tar.addfile(header, io.BytesIO(data))
        self.rows.append(row)
        for level, texts in item.texts.items():
            self.texts[level].update(texts)


class _Writer:
    """Writes shards into a stage, and at the end what lies beside them.

    Args:
        ordered: all scenes of a split come before those of the next. At most one shard is then open at a time, and
            `end`, the number of items before the first that is in no finished shard, tells where to go on.
    """

    def __init__(self, stage: Stage, shard_size: int, ordered: bool) -> None:
        self._stage, self._size, self._ordered = stage, shard_size, ordered
        self._open: dict[str, _Shard] = {}
        self._numbers = Counter[str]()  # of shards begun, by split
        self._keys: set[str] = set()
        self._texts: dict[str, set[str]] = {level: set() for level in LEVELS}
        self._train: dict[str, Counter[str]] = {level: Counter() for level in LEVELS}
        # Hashes a shard, waits for the disk and notes it in the journal, one at a time and in order.
        self._finisher = ThreadPoolExecutor(1, "finish")
        self._finishing: Future[None] | None = None
        self.rejected: list[Rejection] = []  # since the last shard was closed
        self.end = 0
        for record in stage.records():
            self.end = record["end"]
            self._numbers[record["split"]] += 1
            self._keys.update(row[0] for row in record["rows"])
            self._count(record["split"], record["texts"])

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._finisher.shutdown()  # what is being finished is worth waiting for
        for shard in self._open.values():
            with suppress(OSError):  # of a disk without room, which has been reported
                shard.tar.close()

    @property
    def scenes(self) -> int:
        return len(self._keys)

    def write(self, packed: Iterable[_Packed]) -> None:
        for i, item in enumerate(packed, self.end):
            if item.key is None:
                self.rejected += item.bad
            elif item.key in self._keys:
                self.rejected.append(Rejection(item.key, "duplicate_id", "another scene of this id has been packed"))
            else:
                self._add(item, i)
        for split in list(self._open):
            self._close(split, i + 1)

    def _add(self, item: _Packed, i: int) -> None:
        assert item.key is not None
        if item.split not in self._open:
            for split in list(self._open) if self._ordered else ():
                self._close(split, i)
            name = f"{item.split}-{self._numbers[item.split]:06d}.tar"
            self._numbers[item.split] += 1
            tar = tarfile.open(self._stage.path / name, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
            self._open[item.split] = _Shard(name, tar)
        self.rejected += item.bad
        self._keys.add(item.key)
        shard = self._open[item.split]
        shard.add(item)
        if len(shard.rows) == self._size:
            self._close(item.split, i + 1)

    def _close(self, split: str, end: int) -> None:
        shard = self._open.pop(split)
        shard.tar.close()
        self._count(split, shard.texts)
        rejected, self.rejected = self.rejected, []
        counts = (len(shard.rows), shard.texts["object"].total(), shard.texts["relation"].total())
        record = {
            "split": split,
            "name": shard.name,
            "end": end,
            "counts": dict(zip(_COUNTS, counts, strict=True)),
            "rows": shard.rows,
            "texts": shard.texts,
            "rejected": [[r.entry, r.reason, r.detail] for r in rejected],
        }
        self._wait()
        self._finishing = self._finisher.submit(self._stage.add, record)

    def _wait(self) -> None:
        if self._finishing is not None:
            self._finishing.result()

    def _count(self, split: str, texts: Mapping[str, Mapping[str, int]]) -> None:
        for level in LEVELS:
            self._texts[level].update(texts[level])
            if split == "train":
                self._train[level].update(texts[level])

    def finish(
        self,
        known: list[Rejection],
        ignored: dict[str, int],
        classes: dict[str, list[str]] | None,
        fingerprint: str | None,
    ) -> dict[str, Any]:
        """Writes the other files, moves the pack to its place, and returns its manifest."""
        self._wait()
        directory = self._stage.path
        splits: dict[str, dict[str, Any]] = {split: dict.fromkeys(_COUNTS, 0) | {"shards": []} for split in SPLITS}
        reasons = Counter(r.reason for r in known + self.rejected)
        with (directory / "index.json").open("wb") as index, (directory / "rejected.jsonl").open("wb") as listing:
            index.write(b'{"schema":%d,"shards":{' % SCHEMA)
            listing.writelines(_lines(known))
            for i, record in enumerate(self._stage.records()):
                found = splits[record["split"]]
                found["shards"].append({name: record[name] for name in ("name", "sha256", "bytes")})
                found["shards"][-1]["scenes"] = record["counts"]["scenes"]
                for name in _COUNTS:
                    found[name] += record["counts"][name]
                index.write(b"," * (i > 0) + dump({record["name"]: record["rows"]}).strip()[1:-1])
                rejected = [Rejection(*row) for row in record["rejected"]]
                reasons.update(r.reason for r in rejected)
                listing.writelines(_lines(rejected))
            listing.writelines(_lines(self.rejected))
            index.write(b"}}\n")
        if classes is not None:
            texts = [classes[level] for level in ("actions", "objects", "relations")]
        else:
            texts = [sorted(self._texts[level]) for level in LEVELS]
        vocabulary = Vocabulary(texts[0], texts[1], texts[2], self._train)
        vocabulary.save(directory / "vocabulary.json")
        names = ["index.json", "rejected.jsonl", "vocabulary.json"]
        manifest = {
            "schema": SCHEMA,
            "splits": splits,
            "vocabulary": {level: len(vocabulary.texts(level)) for level in LEVELS},
            "rejected": dict(sorted(reasons.items())),
            "ignored": ignored,
            "sha256": {name: sha256(directory / name) for name in names},
        }
        if fingerprint is not None:
            (directory / "source.json").write_bytes(dump({"schema": SCHEMA, "fingerprint": fingerprint}))
            names.append("source.json")
        self._stage.finish(manifest, names)
        return manifest


def _lines(rejected: Iterable[Rejection]) -> Iterator[bytes]:
    return (dump({"entry": r.entry, "reason": r.reason, "detail": r.detail}) for r in rejected)


def _check_target(out: Path, force: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out}: is a file; name a directory for the pack")
    if not os.access(out, os.W_OK | os.X_OK):
        raise UserError(f"{out}: not writable; name another directory for the pack")
    foreign = sorted(path.name for path in out.iterdir() if path.name != INSIDE and not OWN_FILES.fullmatch(path.name))
    if foreign and not force:
        raise UserError(
            f"{out}: holds something that is not a pack ({foreign[0]}); name another directory or use --force"
        )
    if force:
        return
    manifest = out / "manifest.json"
    if not manifest.exists():
        tars = sorted(out.glob("*.tar"))
        if tars and not Stage.waits_for(out):
            raise UserError(
                f"{out}: holds tars that are no whole pack ({tars[0].name}); name another directory or use --force"
            )
    else:
        try:
            schema = json.loads(manifest.read_bytes()).get("schema")
        except (ValueError, AttributeError):
            schema = None
        if schema != SCHEMA:
            raise UserError(
                f"{out}: holds a pack of schema {schema}, this is schema {SCHEMA}; use --force to replace it"
            )
