"""The staging directory of a pack: locked, with a journal of finished shards, moved into place when complete.

    .DIR.partial/journal.jsonl   {"fingerprint"}, then one line per finished shard
    .DIR.partial/*               finished shards, the shard being written and, finally, the other files

An interrupted run leaves this directory behind. The next run with the same fingerprint resumes after the last shard in
the journal, or finishes moving a complete pack. A shard is synced to disk before its journal line is written, and all
files before the manifest.

If files cannot be moved from there into DIR (a mount point, for example), the directory is DIR/.partial.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from scenarioclip_fast.data.scene import READABLE, SCHEMA
from scenarioclip_fast.errors import UserError

PACK_FILES = re.compile(r"(train|val|test)-\d{6,}\.tar|(index|vocabulary|manifest|source)\.json|rejected\.jsonl")
INNER_STAGE = ".partial"
_JOURNAL = "journal.jsonl"


class Stage:
    """The locked staging directory of one run. On exit, it is removed unless a later run can resume from it.

    Raises:
        UserError: another process is packing into `out`.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.path = out.resolve(), self.directory_for(out)
        self.finished = 0  # shards in the journal
        self._fingerprint: str | None = None
        self._lock = self._locked()

    @staticmethod
    def directory_for(out: Path) -> Path:
        """The staging directory for `out`; its name is fixed, so that a later run finds it."""
        out = out.resolve()
        return out / INNER_STAGE if _on_other_device(out) else out.parent / f".{out.name}.partial"

    @classmethod
    def is_complete(cls, out: Path) -> bool:
        """Whether a complete pack is staged, because a run was killed while moving it to `out`."""
        return (cls.directory_for(out) / "manifest.json").exists()

    def _locked(self) -> int:
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:  # another run has just removed it
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Another run may have removed the directory since it was opened.
                if self.path.exists() and os.path.samestat(os.fstat(lock), self.path.stat()):
                    return lock
            except BlockingIOError:
                os.close(lock)
                raise UserError(f"{self.out}: another process is packing into it") from None
            os.close(lock)

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None or not self.resumable:
            shutil.rmtree(self.path)
        os.close(self._lock)

    @property
    def resumable(self) -> bool:
        """Whether a later run can resume from this directory."""
        return (self._fingerprint is not None and self.finished > 0) or self.is_complete(self.out)

    def complete_installation(self) -> None:
        """Finish moving a complete pack that an interrupted run left behind."""
        if self.is_complete(self.out):
            self.install()

    def resume(self, fingerprint: str | None) -> bool:
        """Keep the shards finished by a run with the same fingerprint, and remove all other files.

        Args:
            fingerprint: of the source and options; None, if unknown, keeps nothing.

        Returns:
            Whether an interrupted run left a journal.
        """
        journal = self.path / _JOURNAL
        exists = journal.exists()
        kept: list[str] = []
        end = 0
        if exists and fingerprint is not None:
            with journal.open("rb") as lines:
                for line in lines:
                    name = self._intact(line, fingerprint, first=end == 0)
                    if name is None:
                        break
                    end += len(line)
                    kept.append(name)
        for path in self.path.iterdir():
            if path.name not in (*kept, _JOURNAL):
                path.unlink()
        self._fingerprint, self.finished = fingerprint, max(0, len(kept) - 1)
        with journal.open("ab") as file:
            file.truncate(end)
        if end == 0:
            self._append({"fingerprint": fingerprint})
        return exists

    def _intact(self, line: bytes, fingerprint: str, first: bool) -> str | None:
        """The file name that a journal line refers to (the first line: the journal itself); None if unusable."""
        try:
            record = json.loads(line) if line.endswith(b"\n") else {}
        except ValueError:
            return None
        if not isinstance(record, dict):
            return None
        if first:
            return _JOURNAL if record.get("fingerprint") == fingerprint else None
        path = self.path / str(record.get("name"))
        return path.name if path.is_file() and path.stat().st_size == record.get("bytes") else None

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the records of finished shards, in order of completion."""
        with (self.path / _JOURNAL).open("rb") as lines:
            next(lines)
            yield from map(json.loads, lines)

    def add(self, record: dict[str, Any]) -> None:
        """Add the finished shard record["name"] to the journal, with the state required to resume."""
        path = self.path / record["name"]
        _sync(path)
        _sync(self.path)
        self._append(record | {"sha256": sha256(path), "bytes": path.stat().st_size})
        self.finished += 1

    def _append(self, record: dict[str, Any]) -> None:
        with (self.path / _JOURNAL).open("ab") as file:
            file.write(dump(record))
            file.flush()
            os.fsync(file.fileno())

    def finish(self, manifest: dict[str, Any], names: list[str]) -> None:
        """Write the manifest of a complete pack, whose other small files are `names`, and move the pack into place."""
        for name in names:
            _sync(self.path / name)
        written = self.path / "manifest.tmp"
        written.write_bytes(dump(manifest))
        _sync(written)
        os.replace(written, self.path / "manifest.json")
        _sync(self.path)
        self.install()

    def install(self) -> None:
        """Move a complete pack into place, continuing an interrupted move. Files that are not part of a pack are kept.

        The old manifest is removed first and the new one moved last, so a directory with a manifest is a complete pack.
        """
        manifest = self.path / "manifest.json"
        new = _files(json.loads(manifest.read_bytes()))
        self.out.mkdir(exist_ok=True)
        (self.out / "manifest.json").unlink(missing_ok=True)
        for path in list(self.out.iterdir()):
            if PACK_FILES.fullmatch(path.name) and path.name not in new:
                path.unlink()
        for path in sorted(self.path.iterdir()):
            if path.name in new:
                os.replace(path, self.out / path.name)
        _sync(self.out)
        os.replace(manifest, self.out / "manifest.json")
        _sync(self.out)
        (self.path / _JOURNAL).unlink()


def _on_other_device(out: Path) -> bool:
    """Whether files cannot be moved from the parent directory into `out`."""
    if not out.is_dir():
        return False
    if not os.access(out.parent, os.W_OK | os.X_OK):
        return True
    name = uuid.uuid4().hex
    try:
        os.rename(out.parent / name, out / name)  # EXDEV takes precedence over ENOENT
    except OSError as error:
        return error.errno == errno.EXDEV
    return False


def check_target(out: Path, force: bool) -> None:
    """Raise UserError if a pack must not be written to `out`; `force` allows other files and packs of other schemas."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out}: is a file; choose a directory for the pack")
    if not os.access(out, os.W_OK | os.X_OK):
        raise UserError(f"{out}: not writable; choose another directory for the pack")
    foreign = sorted(
        path.name for path in out.iterdir() if path.name != INNER_STAGE and not PACK_FILES.fullmatch(path.name)
    )
    if foreign and not force:
        raise UserError(
            f"{out}: contains files that are not part of a pack ({foreign[0]}); choose another directory or use --force"
        )
    if force:
        return
    manifest = out / "manifest.json"
    if not manifest.exists():
        tars = sorted(out.glob("*.tar"))
        if tars and not Stage.is_complete(out):
            raise UserError(
                f"{out}: contains an incomplete pack ({tars[0].name}); choose another directory or use --force"
            )
    else:
        try:
            schema = json.loads(manifest.read_bytes()).get("schema")
        except (ValueError, AttributeError):
            schema = None
        if schema not in READABLE:
            raise UserError(
                f"{out}: contains a pack with schema {schema}, this version writes {SCHEMA}; use --force to replace it"
            )


def find_up_to_date(out: Path, fingerprint: str) -> dict[str, Any] | None:
    """Return the manifest of the pack in `out` if it is complete and has this fingerprint."""
    try:
        manifest = json.loads((out / "manifest.json").read_bytes())
        source = json.loads((out / "source.json").read_bytes())
        if manifest["schema"] != SCHEMA or source["fingerprint"] != fingerprint:
            return None
        shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
        intact = all((out / shard["name"]).stat().st_size == shard["bytes"] for shard in shards)
        intact = intact and all(sha256(out / name) == digest for name, digest in manifest["sha256"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if intact else None


def _files(manifest: dict[str, Any]) -> set[str]:
    shards = {shard["name"] for split in manifest["splits"].values() for shard in split["shards"]}
    return {*shards, *manifest["sha256"], "source.json"}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def dump(record: Any) -> bytes:
    """Serialise a record as one line of JSON. Lone surrogates, as in undecodable file names, are escaped."""
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace") + b"\n"
