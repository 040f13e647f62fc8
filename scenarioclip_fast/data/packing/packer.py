"""Pack a data set, whole or a part of it: check its scenes and write the valid ones."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, cast

from scenarioclip_fast.data.boxes import BoxFormat, BoxTally
from scenarioclip_fast.data.check import BadEntry, Rejection
from scenarioclip_fast.data.decode import MAX_PIXELS
from scenarioclip_fast.data.packing.diagnosis import Diagnosis
from scenarioclip_fast.data.packing.merging import merge_parts
from scenarioclip_fast.data.packing.options import PackOptions
from scenarioclip_fast.data.packing.parts import (
    MERGE,
    LocalPart,
    Numbered,
    Part,
    check_part,
    part_name,
    part_names,
    write_units,
)
from scenarioclip_fast.data.packing.remote_folder import RemoteFolder
from scenarioclip_fast.data.packing.remote_parts import FoundPack, RemotePart, check_remote_target, is_complete, scratch
from scenarioclip_fast.data.packing.report import PackReport, report_of
from scenarioclip_fast.data.packing.review import Review, Watch
from scenarioclip_fast.data.packing.shard_writer import COUNTS, PackedItem, ShardWriter
from scenarioclip_fast.data.packing.staging import PARTS, Stage, check_target, find_up_to_date
from scenarioclip_fast.data.packing.units import ItemUnits, TarUnits, evidence_of, rejections_of, scan_of
from scenarioclip_fast.data.parallel import Workers, ordered_map
from scenarioclip_fast.data.scene import Scene
from scenarioclip_fast.data.shards import SPLITS
from scenarioclip_fast.data.sources.base import Reader, Scan, Source, SourceOptions
from scenarioclip_fast.data.sources.memory import MemorySource
from scenarioclip_fast.data.sources.registry import check_format, open_source, open_urls
from scenarioclip_fast.data.sources.remote_tars import FetchedTar, RemoteTarSource
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import is_regular, is_url, kind_of, status_of
from scenarioclip_fast.levels import LEVELS
from scenarioclip_fast.progress import progress as show_progress


def pack(
    source: str | Path | Sequence[str | Path] | Source | Iterable[Scene],
    out_dir: str | Path,
    *,
    format: str = "auto",
    shard_size: int = 1000,
    val: float = 0.1,
    test: float = 0.2,
    split: str = "given",
    workers: int | Workers | None = None,
    force: bool = False,
    progress: bool = True,
    max_pixels: int = MAX_PIXELS,
    images: str | Path | None = None,
    actions: str | Path | None = None,
    boxes: BoxFormat | None = None,
    allow_empty_level: bool = False,
    part: tuple[int, int] | None = None,
) -> PackReport:
    """Check scenes and pack the valid ones.

    Repeat the call to resume an interrupted run; packing an up-to-date data set is a no-op. Changes of the source are
    detected from the names, sizes and modification times of its files, as in rsync. Scenes in memory are always packed
    from the start.

    Args:
        source: a data set on disk (a path, a glob pattern or a list of them, in any format of `sources.registry`); or
            one or several URLs of WebDataset tars, see `sources.remote_tars`; or scenes, whose images are encoded
            bytes, or pixels, which are encoded as JPEG; or a `sources.Source`.
        out_dir: a path or a URL; created, or replaced if it holds a pack of this schema. Files are moved into it when
            the pack is complete. If this or the source is a URL, the data set is packed as a single part, which is then
            merged, and a pack of another source is not replaced.
        format: a registered format ("published", "webdataset", ...), or "auto" to recognise it.
        shard_size: scenes per shard.
        val, test: fractions of the scenes without an assigned split that go to these splits, chosen by a hash of the
            key.
        split: "given" uses the split assigned by the data set, "hash" the hash of the key for all scenes.
        workers: processes that read the source, or `parallel.Workers`; None: all cores for a large source, otherwise
            one. Scenes in memory are packed in this process. Worker processes import the calling script, which
            therefore needs `if __name__ == "__main__":` around the call.
        force: write into a directory that holds other files, which are kept; pack even if up to date.
        progress: show a progress bar on a terminal, and log lines elsewhere.
        max_pixels: larger images are rejected.
        images: directory of the images and panoptic PNGs, for formats that name them in an annotation file; None: where
            such a data set usually has them.
        actions: the actions of a data set that has none: a JSON object of texts by image id or file name, a COCO
            captions file, or a directory of them.
        boxes: convention of the boxes: corners in pixels ("xyxy"), corner and size in pixels ("xywh"), or corners as
            fractions of the image's size ("normalised"). None: "xyxy", unless masks or sizes show that this is wrong,
            which is an error.
        allow_empty_level: pack even if all objects or all relations were rejected.
        part: (i, n), i from 1 to n: pack only this one of n parts of the data set into a directory of `out`, so that n
            machines can share the work; `merging.merge_parts` makes a pack of them.

    Raises:
        UserError: unusable source or directory, parts of another source, no disk space, boxes in another convention, or
            no valid scenes, or no valid object or relation although there are some. Single bad entries do not raise:
            they are counted and listed in rejected.jsonl.
    """
    check_format(format)
    read = SourceOptions(max_pixels, cast("Path | None", images), cast("Path | None", actions), boxes)
    options = PackOptions(shard_size, val, test, split, read)
    if isinstance(workers, int) and workers < 1:
        raise UserError(f"workers: got {workers}, expected at least 1")
    if part is not None:
        part = check_part(part)
    out = RemoteFolder.of(str(out_dir)) if is_url(out_dir) else Path(out_dir)
    in_parts = part is not None or isinstance(out, RemoteFolder) or any(map(is_url, _paths_in(source)))
    if isinstance(out, Path):
        check_target(out, force, in_parts)
    else:
        check_remote_target(out, force)
    data = _open(source, format, read)
    places: set[Path | str | None] = {out.resolve()} if isinstance(out, Path) else {out.local, out.canonical}
    if not places.isdisjoint(data.directories):
        raise UserError(f"{out}: this directory holds the source; choose another directory for the pack")
    review = Review(out, progress, allow_empty_level, "" if part is None else part_name(part))
    run = _Run(data, options, options.fingerprint(data), workers, review)
    if (found := status_of(review.listing)) is not None and not stat.S_ISREG(found.st_mode):
        raise UserError(
            f"{review.listing}: got a {kind_of(found.st_mode)}, expected nothing or the list of an earlier run's "
            "rejections; move it away, or choose another directory for the pack"
        )
    if part is not None:
        report = _pack_part(run, out, part)
    elif in_parts:
        report = _pack_and_merge(run, out)
    else:
        assert isinstance(out, Path)
        report = _pack_all(run, out, force)
    if is_regular(review.listing) and not report.up_to_date:
        review.listing.unlink()
    return report


def _pack_all(run: _Run, out: Path, force: bool) -> PackReport:
    log = run.review.log
    with Stage(out) as stage:
        stage.complete_installation()
        if run.fingerprint is not None and not force and (manifest := find_up_to_date(out, run.fingerprint)):
            log(f"{out}: up to date (neither the source nor the options changed)")
            return report_of(out, manifest, up_to_date=True)
        if stage.resume(run.fingerprint):
            log(
                f"resuming after {stage.finished} finished shards"
                if stage.finished
                else "nothing to resume from the interrupted run (no finished shard, or another source or options): "
                "packing from the start"
            )
        try:
            manifest = run.fill(stage)
        except BaseException as error:
            if stage.resumable:
                resume = "a run with the same source and options resumes after them"
                if not isinstance(error, UserError):
                    resume = "re-run the command to resume"
                log(f"{stage.finished} finished shards are kept in {stage.path}: {resume}")
            if isinstance(error, OSError):
                raise UserError(f"{error.filename or stage.path}: {error.strerror}") from error
            raise
    return report_of(out, manifest)


def _pack_and_merge(run: _Run, out: Path | RemoteFolder) -> PackReport:
    """Pack everything as one part, and merge it."""
    review = run.review
    merge = partial(
        merge_parts,
        str(out),
        boxes="xyxy" if run.options.source.boxes == "xyxy" else None,
        allow_empty_level=review.allow_empty_level,
        progress=review.progress,
    )
    if isinstance(out, Path) and is_regular(out / PARTS / MERGE / "manifest.json"):  # an interrupted merge
        merge()
    report = _pack_part(run, out, (1, 1))
    return report if is_complete(out) and not part_names(out) else merge()


def _pack_part(run: _Run, out: Path | RemoteFolder, part: tuple[int, int]) -> PackReport:
    log = run.review.log
    if run.fingerprint is None and not run.review.part:
        raise UserError(
            f"{out}: got a source without a fingerprint, such as scenes in memory, which is packed to a local path "
            "only; expected such a path, or a data set on disk"
        )
    if run.fingerprint is None:
        raise UserError(
            "part: got a source without a fingerprint, such as scenes in memory, expected a data set on disk: parts "
            "recognise by the fingerprint that they belong together"
        )

    def merged() -> PackReport | None:
        if not is_complete(out):
            return None
        found = FoundPack.at(out)
        if found.fingerprint != run.fingerprint:
            raise UserError(
                f"{out}: contains a complete pack of another source or other options; remove it, or choose another "
                f"directory for the {'parts' if run.review.part else 'pack'}"
            )
        if found.damage is None:
            log(f"{out}: up to date, the parts are merged (neither the source nor the options changed)")
            return report_of(out, found.manifest, up_to_date=True)
        if not part_names(out):
            raise UserError(
                f"{out}: contains a pack of this source that is damaged ({found.damage}); restore the file, or remove "
                "the pack, then pack all parts again and merge them"
            )
        return None  # the merge replaces it

    if (report := merged()) is not None:
        return report
    header = run.options.header() | {"fingerprint": run.fingerprint}
    if isinstance(run.source, RemoteTarSource):
        header["units"] = TarUnits.name
    try:
        with (LocalPart if isinstance(out, Path) else RemotePart)(out, part, header) as files:
            if (report := merged()) is not None:  # since
                return report
            up_to_date = files.is_done
            if up_to_date:
                log(f"{files}: up to date (neither the source nor the options changed)")
            else:
                if files.units:
                    log(f"{files}: resuming after {len(files.units)} finished {files.cut.noun}")
                _fill_part(run, files)
            return _report_part(files, up_to_date)
    except OSError as error:
        raise UserError(f"{error.filename or out / PARTS / part_name(part)}: {error.strerror or error}") from error


def _fill_part(run: _Run, part: Part) -> None:
    log = run.review.log
    try:
        run.fill_part(part)
    except BaseException:
        if part.units:
            log(f"{len(part.units)} finished {part.cut.noun} are kept in {part.path}: re-run the command to resume")
        raise
    if run.review.part:
        log(f"{part}: complete; when all parts are, finish the pack with `scenarioclip-fast pack --merge {part.out}`")


def _report_part(part: Part, up_to_date: bool) -> PackReport:
    splits = {split: dict.fromkeys(COUNTS, 0) for split in SPLITS}
    texts: dict[str, set[str]] = {level: set() for level in LEVELS}
    diagnosis = Diagnosis()
    scan = part.scan
    ignored = Counter[str]()
    diagnosis.add(scan.rejected)
    for record in part.records():
        found = scan_of(record)
        ignored.update(found.ignored)
        diagnosis.add(found.rejected)
        diagnosis.add(one for _, one in rejections_of(record))
        for shard in record["shards"]:
            for name in COUNTS:
                splits[shard["split"]][name] += shard["counts"][name]
            for level in LEVELS:
                texts[level].update(shard["texts"][level])
    kept = {name: sum(counts[name] for counts in splits.values()) for name in COUNTS}
    large = [str(loss) for loss in diagnosis.losses(kept) if loss.is_large]
    return PackReport(
        part.out if isinstance(part.out, Path) else str(part.out),
        splits,
        {level: len(known) for level, known in texts.items()},
        diagnosis.reasons(),
        scan.ignored | dict(sorted(ignored.items())),
        up_to_date,
        diagnosis.causes(),
        [*scan.warnings, *large],
    )


def _paths_in(source: object) -> Sequence[str | Path]:
    """The paths or URLs of a data set; none if it is a source or scenes."""
    if isinstance(source, (str, Path)):
        return [source]
    is_list = isinstance(source, Sequence) and source and isinstance(source[0], (str, Path))
    return cast("Sequence[str | Path]", source) if is_list else []


def _open(
    source: str | Path | Sequence[str | Path] | Source | Iterable[Scene], format: str, options: SourceOptions
) -> Source | RemoteTarSource:
    if paths := _paths_in(source):
        return (open_urls if any(map(is_url, paths)) else open_source)(paths, format, options)
    if isinstance(source, Source):
        return source
    if unused := [option for option in options.given() if option not in MemorySource.accepts]:
        raise UserError(f"{unused[0]}: scenes in memory do not use this option; remove it")
    return MemorySource(cast("Iterable[Scene]", source), options)


@dataclass(frozen=True)
class _Run:
    source: Source | RemoteTarSource
    options: PackOptions
    fingerprint: str | None
    workers: int | Workers | None
    review: Review

    def _scan(self) -> tuple[int | Workers, Scan]:
        """The workers to use, and what the scan of the source finds."""
        source = self.source
        workers = (self.workers or (len(os.sched_getaffinity(0)) if source.large else 1)) if source.parallel else 1
        count = workers.count if isinstance(workers, Workers) else workers
        return workers, source.scan(count if source.large else 1, self.review.progress)

    def _shown(self, packed: Iterable[PackedItem], total: int | None) -> Iterable[PackedItem]:
        return show_progress(packed, total, "packing", "scenes") if self.review.progress else packed

    def fill(self, stage: Stage) -> dict[str, Any]:
        """Write the complete pack into the staging directory, move it into place, and return its manifest."""
        source = self.source
        assert not isinstance(source, RemoteTarSource)
        with ShardWriter(stage, self.options.shard_size, ordered=self.fingerprint is not None) as writer:
            workers, scan = self._scan()
            items = islice(source.items(self.options.split_of), writer.end, None)
            packed = ordered_map(partial(_pack_item, source.reader(), self.options), items, workers)
            tally = BoxTally()
            # A run that declares what these boxes are may resume one that did not.
            for rows in writer.resumed_boxes if self.options.source.boxes is None else ():
                tally.add(rows)
            total = None if source.total is None else source.total - writer.end
            writer.write(Watch(self.review, tally).watched(self._shown(packed, total)))
            if writer.scenes == 0:
                raise self.review.no_scenes(scan.rejected + writer.rejected, scan.ignored)
            review = partial(self.review.complete, scan, tally, partial(stage.read, "rejected.jsonl"))
            return writer.complete().finish(scan, source.classes, self.fingerprint, review)

    def fill_part(self, part: Part) -> None:
        """Pack what is missing of a part."""
        workers, scan = self._scan()
        tally = BoxTally()
        for record in part.records() if self.options.source.boxes is None else ():
            for rows in evidence_of(record):
                tally.add(rows)
        watch = Watch(self.review, tally)
        source = self.source
        if isinstance(source, RemoteTarSource):
            self._pack_tars(source, part, workers, watch)
            total = len(source.tars)
        else:
            total = self._pack_items(source, part, workers, watch)
        part.finish(total, scan, source.classes)

    def _pack_items(self, source: Source, part: Part, workers: int | Workers, watch: Watch) -> int:
        """Pack the items that a part lacks; returns how many the source has."""
        size = self.options.shard_size
        units = ItemUnits(size)
        items = Numbered(source.items(self.options.split_of), units, part)
        packed = ordered_map(partial(_pack_numbered, source.reader(), self.options), items, workers)
        left = None if source.total is None else units.items(part.units_left(source.total), source.total)
        groups = groupby(watch.watched(self._shown(packed, left)), lambda item: item.number // size)
        write_units(part, ((unit, found, {}) for unit, found in groups), size)
        return items.total

    def _pack_tars(self, source: RemoteTarSource, part: Part, workers: int | Workers, watch: Watch) -> None:
        """Pack the tars that a part lacks."""
        left = part.units_left(len(source.tars))
        with ExitStack() as stack:
            pool = workers if isinstance(workers, Workers) else stack.enter_context(Workers(workers))
            fetched = stack.enter_context(closing(source.fetch(left, stack.enter_context(scratch()))))
            tars = show_progress(fetched, len(left), "packing", "tars") if self.review.progress else fetched
            units = ((unit, *self._tar(tar, pool, watch)) for unit, tar in zip(left, tars, strict=True))
            write_units(part, units, self.options.shard_size)

    def _tar(self, tar: FetchedTar, workers: Workers, watch: Watch) -> tuple[Iterator[PackedItem], dict[str, Any]]:
        """The items of a tar, and what its record has besides them."""
        items = ordered_map(partial(_pack_numbered, tar.reader, self.options), enumerate(tar.samples()), workers)
        return watch.watched(items), TarUnits.of_tar(tar.tar.name, tar.tar.split, tar.count, tar.scan)


def _pack_item(reader: Reader, options: PackOptions, item: Any) -> PackedItem:
    try:
        checked = reader.read(item)
    except BadEntry as error:
        return PackedItem(None, rejected=[Rejection(str(item), error.reason, error.detail, error.hint)])
    return PackedItem.of(checked, options.split_of(checked.scene.key, checked.scene.split))


def _pack_numbered(reader: Reader, options: PackOptions, numbered: tuple[int, Any]) -> PackedItem:
    item = _pack_item(reader, options, numbered[1])
    item.number = numbered[0]
    return item
