"""Make one pack of the parts that many machines have packed (see `parts`).

The units are merged in their order, so that the pack does not depend on the number of parts. Shards are renamed, not
copied; only those that contain a key that stays in another unit are written again, without it. Memory holds the
distinct texts, and a hash per key to find keys that occur twice.

A key stays in the first unit that has it. If tars assign splits, it stays in one that assigns test, else val, else
train, as with local tars.

    DIR/.parts/merge/journal.jsonl   the records of all shards; {"from": [folder, name]} is the file that becomes one
    DIR/.parts/merge/*               the other files of the pack, and shards that were written again

On a URL, these files are in a temporary directory of this machine, and the storage copies shards (see `remote_parts`).
When a local `merge/manifest.json` exists, the pack is complete and only has to be moved, which a later call continues.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from scenarioclip_fast.data.boxes import BoxFormat, BoxTally
from scenarioclip_fast.data.check import Rejection, split_conflict
from scenarioclip_fast.data.packing.options import VERSION
from scenarioclip_fast.data.packing.parts import (
    FILES,
    HEADER,
    LOCK,
    MERGE,
    check_directory,
    command,
    difference,
    directory_of,
    lock_parts,
    parse_record,
    part_names,
    read_done,
    read_header,
    read_json,
)
from scenarioclip_fast.data.packing.remote_folder import RemoteFolder
from scenarioclip_fast.data.packing.remote_parts import FoundPack, RemoteMergeStage, is_complete, remove_parts, scratch
from scenarioclip_fast.data.packing.report import PackReport, report_of
from scenarioclip_fast.data.packing.review import Review
from scenarioclip_fast.data.packing.shard_writer import OpenShard, PackedItem, PackFiles, duplicate
from scenarioclip_fast.data.packing.staging import PARTS, Stage, lock
from scenarioclip_fast.data.packing.units import (
    Units,
    evidence_of,
    rejections_of,
    scan_of,
    sizes_of_unit,
    tar_of,
    unit_name,
)
from scenarioclip_fast.data.shards import SPLITS
from scenarioclip_fast.data.sources.base import Scan
from scenarioclip_fast.data.splitmix64 import hash_texts
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import Directory, is_regular, is_url, sha256_of
from scenarioclip_fast.progress import progress as show_progress


def merge_parts(
    directory: str | Path,
    *,
    verify: bool = False,
    boxes: BoxFormat | None = None,
    allow_empty_level: bool = False,
    progress: bool = True,
) -> PackReport:
    """Make a pack of the parts that `pack(..., part=(i, n))` has written for every i.

    The pack is the same for every n. Repeat the call to resume an interrupted merge; merging again is a no-op.

    Args:
        directory: the `out_dir` of the parts, which may be a URL.
        verify: compare the SHA-256 of all shards with their records, and not only their sizes.
        boxes: "xyxy" accepts boxes that seem to be in another convention.
        allow_empty_level: accept that all objects or all relations were rejected.
        progress: report progress.

    Raises:
        UserError: no parts; a part is missing, unfinished, damaged, or of another source, version or other options; no
            disk space; or the data set was misunderstood (see `pack`). The parts are kept.
    """
    if boxes not in (None, "xyxy"):
        raise UserError(
            f"boxes: got {boxes!r}, expected xyxy: parts are packed with this option, and merged without it"
        )
    if is_url(directory):
        review = Review(RemoteFolder.of(str(directory)), progress, allow_empty_level)
        return _merge_remote(review, verify, boxes is None)
    review = Review(Path(directory), progress, allow_empty_level)
    return _merge_local(review, Path(directory), verify, boxes is None)


def _merge_remote(review: Review, verify: bool, judge_boxes: bool) -> PackReport:
    out = review.out
    assert isinstance(out, RemoteFolder)
    try:
        found = _find_pack(review)
        if found is not None and found.damage is None:
            report = _merged_before(review, found)
        else:
            parts = _parts_for(review, verify, found)
            with scratch() as folder, RemoteMergeStage(out, folder, review.progress, found is not None) as stage:
                report = report_of(out, parts.merge(stage, judge_boxes))
        remove_parts(out)
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror or error}; the parts are kept") from error
    if is_regular(review.listing) and not report.up_to_date:
        review.listing.unlink()
    return report


def _merge_local(review: Review, out: Path, verify: bool, judge_boxes: bool) -> PackReport:
    check_directory(out / PARTS)
    if not (out / PARTS).is_dir():
        found = _find_pack(review)
        assert found is not None
        return _merged_before(review, found)
    held = lock_parts(out, shared=False)
    if held is None:
        raise UserError(_busy(out))
    with held:
        try:
            with _MergeStage(out, out.resolve() / PARTS / MERGE) as stage:
                resumed = is_regular(stage.path / "manifest.json")
                stage.complete_installation()
                found = _find_pack(review) if is_complete(out) else None
                if found is None or found.damage is not None:
                    report = report_of(out, _parts_for(review, verify, found).merge(stage, judge_boxes))
                elif resumed:
                    report = report_of(out, found.manifest)
                else:
                    report = _merged_before(review, found)
            _remove_parts(out)
        except OSError as error:
            raise UserError(f"{error.filename or out}: {error.strerror}; the parts are kept") from error
    if is_regular(review.listing):
        review.listing.unlink()
    return report


def _find_pack(review: Review) -> FoundPack | None:
    """The pack in the directory; None if there are only parts.

    Raises:
        UserError: neither, parts of another source, or a damaged pack without parts.
    """
    out = review.out
    names = part_names(out)
    if not is_complete(out):
        if names:
            return None
        raise UserError(f"{out}: contains no parts of a pack, expected those of `{command(out, None)}`")
    pack = FoundPack.at(out)
    for (i, n), name in names.items():
        with directory_of(out / PARTS / name) as files:
            header = read_header(files)
        if header is not None and header["fingerprint"] != pack.fingerprint:
            raise UserError(
                f"{out}: contains a complete pack, and part {i} of {n} of another source or with other options; move "
                f"the pack away to merge the parts, or remove {out / PARTS}"
            )
    if pack.damage is not None and not names:
        raise UserError(
            f"{out}: the pack is damaged ({pack.damage}), and there are no parts to merge again; restore the file, or "
            "remove the pack and pack the data set again"
        )
    return pack


def _merged_before(review: Review, pack: FoundPack) -> PackReport:
    """The report of an intact pack."""
    review.log(f"{review.out}: up to date, the parts are merged")
    return report_of(review.out, pack.manifest, up_to_date=True)


def _parts_for(review: Review, verify: bool, damaged: FoundPack | None) -> _Parts:
    """The parts to merge, in place of a damaged pack if there is one."""
    if damaged is None:
        return _Parts(review, verify)
    review.log(f"{review.out}: the pack is damaged ({damaged.damage}): merging the parts again")
    try:
        return _Parts(review, verify)
    except UserError as error:
        raise UserError(
            f"{review.out}: the pack is damaged ({damaged.damage}), and its parts cannot replace it: {error}"
        ) from None


def _busy(out: Path) -> str:
    """Why the parts are locked."""
    for (i, n), name in part_names(out).items():
        if _is_locked(out / PARTS / name):
            return f"{out}: part {i} of {n} is unfinished: another process is packing it; merge the parts afterwards"
    return f"{out}: another process is merging the parts"


def _is_locked(folder: Path) -> bool:
    try:
        with Directory(folder) as files, files.open(LOCK, "rb+") as file:
            return not lock(file.fileno())
    except OSError:
        return False


def _remove_parts(out: Path) -> None:
    """Remove what is left of the parts; of their directories, only those without foreign files."""
    for name in part_names(out).values():
        with Directory(out / PARTS / name) as files:
            for one in sorted(files.names(), key=lambda one: one == HEADER):  # last: it says what the others are
                if FILES.fullmatch(one):
                    files.unlink(one)
        with suppress(OSError):
            os.rmdir(out / PARTS / name)
    with Directory(out / PARTS) as files:
        if files.names() == [LOCK]:
            files.unlink(LOCK)
            os.rmdir(out / PARTS)


class _MergeStage(Stage):
    """The staging directory of a merge; most shards are moved from the directories of the parts."""

    def _move_others(self, out: Directory) -> None:
        for record in self.records():
            if "from" in record:
                folder, name = record["from"]
                with Directory(self.path.parent / folder) as part:
                    if part.status(name) is not None:  # otherwise an interrupted run has moved it
                        part.move(name, out, record["name"])


class _Parts:
    """The complete parts of a pack.

    Raises:
        UserError: a part is missing, unfinished, damaged or does not belong to the others.
    """

    def __init__(self, review: Review, verify: bool) -> None:
        self._review, self._out, self._verify = review, review.out, verify
        self._names = part_names(self._out)
        self._count = self._check_names()
        self._folders = {i: self._out / PARTS / name for (i, _), name in self._names.items()}
        for folder in self._folders.values():
            if isinstance(folder, Path):
                check_directory(folder)
        self._header, done = self._check_headers()
        self._total: int = done["items"]
        self._cut = Units.of(self._header)
        self._scan, self._classes = scan_of(done), done["classes"]
        self._splits = set[str | None]()  # that tars assign
        self._repeated = self._find_repeated()
        # Keys with a hash that occurs several times -> the unit in which each stays, and the split that it assigns.
        self._home: dict[str, tuple[int, str | None]] = {}

    def _check_names(self) -> int:
        """The number of parts."""
        counts = sorted({n for _, n in self._names})
        if not counts:
            raise UserError(f"{self._out}: contains no parts of a pack, expected those of `{command(self._out, None)}`")
        if len(counts) > 1:
            (i, n), (j, m) = (min(part for part in self._names if part[1] == count) for count in counts[:2])
            raise UserError(
                f"{self._out}: contains part {i} of {n} and part {j} of {m}, expected parts of one number of parts; "
                f"remove those of the other, such as {self._out / PARTS / self._names[j, m]}"
            )
        missing = [i for i in range(1, counts[0] + 1) if (i, counts[0]) not in self._names]
        if missing:
            raise self._lacking(missing[0], "missing", len(missing))
        return counts[0]

    def _lacking(self, i: int, what: str, parts: int = 1) -> UserError:
        n = len(self._names) if what != "missing" else next(iter(self._names))[1]
        more = f" (and {parts - 1} more)" if parts > 1 else ""
        return UserError(f"{self._out}: part {i} of {n} is {what}{more}: run {command(self._out, (i, n))}")

    def _check_headers(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The common header, and the done.json of part 1."""
        first: tuple[dict[str, Any], dict[str, Any]] | None = None
        unfinished = []
        for i in range(1, self._count + 1):
            with directory_of(self._folders[i]) as files:
                header, done = read_header(files), read_done(files, i)
            if header is None or done is None:
                unfinished.append(i)
                continue
            if first is None:
                first = header, done
                if (what := difference(header, header | VERSION)) is not None:
                    raise UserError(
                        f"{self._out}: part {i} of {self._count} is from {what}; merge with the version that packed it"
                    )
            what = difference(header, first[0])
            if what is not None or done["items"] != first[1]["items"]:
                raise UserError(
                    f"{self._out}: part {i} of {self._count} is from {what or 'a source of another size'}, as the "
                    f"parts before it: remove {self._folders[i]}, and run {command(self._out, (i, self._count))}"
                )
        if unfinished:
            raise self._lacking(unfinished[0], "unfinished", len(unfinished))
        assert first is not None
        return first

    def _units(self) -> Iterator[tuple[int, Path | RemoteFolder, dict[str, Any]]]:
        """The part, the directory and the record of each unit, in order."""
        units = self._cut.of_part((1, 1), self._total)
        for unit, record in zip(units, self._unit_records(units), strict=True):
            i = unit % self._count + 1
            if record is None or record.get("unit") != unit:
                raise self._lacking(i, f"damaged ({unit_name(unit)})")
            yield i, self._folders[i], record

    def _unit_records(self, units: range) -> Iterator[dict[str, Any] | None]:
        files = ((self._folders[unit % self._count + 1], unit_name(unit)) for unit in units)
        if isinstance(self._out, RemoteFolder):
            names = (f"{PARTS}/{folder.name}/{name}" for folder, name in files)
            yield from map(parse_record, self._out.read_each(names, self._cut.batch))
            return
        for folder, name in files:
            with directory_of(folder) as directory:
                yield read_json(directory, name)

    def _find_repeated(self) -> NDArray[np.uint64]:
        """Check the shards of all units, and return the sorted hashes that several keys have."""
        hashes = [np.zeros(0, np.uint64)]
        units = self._units()
        if self._review.progress:
            units = show_progress(units, self._cut.count(self._total), "checking parts", self._cut.noun)
        for i, folder, record in units:
            if sizes_of_unit(record, record["unit"], self._cut, self._total) is None:
                raise self._lacking(i, f"damaged ({unit_name(record['unit'])})")
            try:
                for shard in record["shards"]:
                    self._check_shard(i, folder, shard)
                    hashes.append(_hashes(shard["rows"]))
                self._splits.add(tar_of(record)[1])
            except (TypeError, AttributeError, IndexError):  # a row without a key
                raise self._lacking(i, f"damaged ({unit_name(record['unit'])})") from None
        found = np.concatenate(hashes)
        found.sort()
        return np.unique(found[1:][found[1:] == found[:-1]])

    def _check_shard(self, i: int, folder: Path | RemoteFolder, shard: dict[str, Any]) -> None:
        again = f"run {command(self._out, (i, self._count))}, which packs it again"
        with directory_of(folder) as files:
            size = files.size(shard["name"])
            if size != shard["bytes"]:
                got = "is missing" if size is None else f"got {size} bytes, expected {shard['bytes']}"
                raise UserError(f"{folder / shard['name']}: {got}; {again}")
            if self._verify:
                with files.open(shard["name"]) as file:
                    if sha256_of(file) != shard["sha256"]:
                        raise UserError(
                            f"{folder / shard['name']}: damaged, its SHA-256 is not that of the shard that was packed; "
                            f"remove it, and {again}"
                        )

    def merge(self, stage: Stage, judge_boxes: bool) -> dict[str, Any]:
        """Write the pack and move it into place; returns its manifest."""
        stage.resume(None)  # removes what a merge left that was interrupted before all was written
        files, tally, ignored = PackFiles(stage), BoxTally(), Counter[str]()
        if len(self._splits) > 1 and len(self._repeated):
            self._find_homes()
        shards = 0

        def counted() -> Iterator[dict[str, Any]]:
            nonlocal shards
            for record in self._records(stage, files, tally if judge_boxes else None, ignored):
                files.count(record["split"], record["texts"])
                yield record
                shards += 1

        stage.append(counted())
        scan = Scan(self._scan.rejected, self._scan.ignored | dict(sorted(ignored.items())), self._scan.warnings)
        if not shards:
            raise self._review.no_scenes(scan.rejected + files.rejected, scan.ignored)
        review = partial(self._review.complete, scan, tally, partial(stage.read, "rejected.jsonl"))
        return files.finish(scan, self._classes, self._header["fingerprint"], review)

    def _records(
        self, stage: Stage, files: PackFiles, tally: BoxTally | None, ignored: Counter[str]
    ) -> Iterator[dict[str, Any]]:
        """The records of the shards of the pack. The rejections of units without a shard go to the next one."""
        numbers = Counter[str]()  # of shards, by split
        for _, folder, record in self._units():
            scan = scan_of(record)
            ignored.update(scan.ignored)
            repeated = self._repeated_keys(record)
            rejected = [(number, one) for number, one in rejections_of(record) if number not in repeated]
            rejected += repeated.items()
            files.rejected += scan.rejected
            files.rejected += [one for _, one in sorted(rejected, key=lambda pair: pair[0])]
            if tally is not None:
                for rows in evidence_of(record):
                    tally.add(rows)
            for shard in record["shards"]:
                name = f"{shard['split']}-{numbers[shard['split']]:06d}.tar"
                if repeated.keys().isdisjoint(shard["numbers"]):
                    merged = shard | {"name": name, "from": [folder.name, shard["name"]]}
                elif repeated.keys() >= set(shard["numbers"]):
                    continue
                else:
                    merged = self._rewrite(stage, name, folder, shard, repeated)
                numbers[shard["split"]] += 1
                listed, files.rejected = files.rejected, []
                yield merged | {"rejected": [[r.entry, r.reason, r.detail, r.hint] for r in listed]}

    def _find_homes(self) -> None:
        """Find where each repeated key stays if the tars assign different splits."""

        def rank(split: str | None) -> int:
            return -1 if split is None else SPLITS.index(split)

        for _, _, record in self._units():
            split = tar_of(record)[1]
            for _, key in self._several(record):
                if key not in self._home or rank(split) > rank(self._home[key][1]):
                    self._home[key] = record["unit"], split

    def _several(self, record: dict[str, Any]) -> Iterator[tuple[int, str]]:
        """The items of a unit whose keys have a hash that occurs several times: (number, key)."""
        for shard in record["shards"] if len(self._repeated) else ():
            several = np.isin(_hashes(shard["rows"]), self._repeated)
            yield from ((shard["numbers"][k], shard["rows"][k][0]) for k in np.flatnonzero(several))

    def _repeated_keys(self, record: dict[str, Any]) -> dict[int, Rejection]:
        """The rejections of the items of a unit whose keys stay in other units, by number."""
        repeated = {}
        tar, split = tar_of(record)
        for number, key in self._several(record):
            home, stays = self._home.setdefault(key, (record["unit"], split))
            if home != record["unit"]:  # a unit has no key twice
                conflict = None if split in (None, stays) else stays
                repeated[number] = duplicate(key) if conflict is None else split_conflict(f"{tar}: {key}", conflict)
        return repeated

    def _rewrite(
        self,
        stage: Stage,
        name: str,
        folder: Path | RemoteFolder,
        shard: dict[str, Any],
        without: Collection[int],
    ) -> dict[str, Any]:
        """Write a shard again without some of its scenes."""
        with directory_of(folder) as files, files.open(shard["name"]) as old:
            new = OpenShard.create(name, stage.create(name))
            try:
                for number, (key, *extents) in zip(shard["numbers"], shard["rows"], strict=True):
                    if number not in without:
                        image, record = (_read(old, *extents[at : at + 2]) for at in (0, 2))
                        new.add(PackedItem.of_shard(key, shard["split"], image, record))
                new.close()
            except ValueError as error:
                raise UserError(
                    f"{folder / shard['name']}: damaged ({error}); remove it, and pack its part again"
                ) from None
            finally:
                with suppress(OSError):  # disk full: already reported
                    new.close()
        return new.record(shard["split"]) | stage.seal(name)


def _read(file: IO[bytes], offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _hashes(rows: Sequence[Sequence[Any]]) -> NDArray[np.uint64]:
    """A hash of the key of each row."""
    keys = [row[0].encode() for row in rows]
    return hash_texts(b"".join(keys), np.cumsum([len(key) for key in keys], dtype=np.int64))
