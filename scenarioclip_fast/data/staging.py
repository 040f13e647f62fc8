"""Where a pack grows beside its place: locked, with a journal of what is finished, and moved to its place when whole.

    .DIR.partial/journal.jsonl   {"fingerprint"}, then a line for every finished shard
    .DIR.partial/*               finished shards, the one that is being written, at the end the other files

A run that was killed leaves this directory. The next one of the same fingerprint goes on after the last shard in the
journal; if all was written, it moves what has not been moved. A line of the journal is written when the shard is on the
disk, the manifest when everything is, and each is on the disk before anything relies on it.

Where files cannot be moved from there into DIR, a mount point for one, the directory is DIR/.partial.
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

from scenarioclip_fast.data.scene import SCHEMA
from scenarioclip_fast.errors import UserError

OWN_FILES = re.compile(r"(train|val|test)-\d{6,}\.tar|(index|vocabulary|manifest|source)\.json|rejected\.jsonl")
INSIDE = ".partial"
_JOURNAL = "journal.jsonl"


class Stage:
    """The directory, under a lock, for one run; a context manager that removes it unless it is worth going on from.

    Raises:
        UserError: another process is packing into `out`.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.path = out.resolve(), self.beside(out)
        self.finished = 0  # shards in the journal
        self._fingerprint: str | None = None
        self._lock = self._locked()

    @staticmethod
    def beside(out: Path) -> Path:
        """The directory for the pack `out`: of a fixed name, so that it is found again."""
        out = out.resolve()
        return out / INSIDE if _is_apart(out) else out.parent / f".{out.name}.partial"

    @classmethod
    def waits_for(cls, out: Path) -> bool:
        """Whether a run was killed while it moved a pack to `out`."""
        return (cls.beside(out) / "manifest.json").exists()

    def _locked(self) -> int:
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:  # another run has just removed it
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The run that had it may have removed it since it was opened.
                if self.path.exists() and os.path.samestat(os.fstat(lock), self.path.stat()):
                    return lock
            except BlockingIOError:
                os.close(lock)
                raise UserError(f"{self.out}: another process is packing into it") from None
            os.close(lock)

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None or not self.worth_keeping:
            shutil.rmtree(self.path)
        os.close(self._lock)

    @property
    def worth_keeping(self) -> bool:
        """Whether another run could go on from here."""
        return (self._fingerprint is not None and self.finished > 0) or self.waits_for(self.out)

    def complete_installation(self) -> None:
        """Goes on where a run was killed while it moved a whole pack to its place."""
        if self.waits_for(self.out):
            self.install()

    def resume(self, fingerprint: str | None) -> bool:
        """Keeps what a run of the same fingerprint has finished, removes the rest. Whether anything was there.

        None: nothing can be known about the source, so that nothing is kept.
        """
        journal = self.path / _JOURNAL
        there = journal.exists()
        kept: list[str] = []
        end = 0
        if there and fingerprint is not None:
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
        return there

    def _intact(self, line: bytes, fingerprint: str, first: bool) -> str | None:
        """The file of a line of the journal, for the first the journal; None where one cannot go on from it."""
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
        """The finished shards, in the order in which they were finished."""
        with (self.path / _JOURNAL).open("rb") as lines:
            next(lines)
            yield from map(json.loads, lines)

    def add(self, record: dict[str, Any]) -> None:
        """Notes a finished shard: "name", and whatever is needed to go on."""
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
        """Writes the manifest of a whole pack, whose other small files are `names`, and moves all to its place."""
        for name in names:
            _sync(self.path / name)
        written = self.path / "manifest.tmp"
        written.write_bytes(dump(manifest))
        _sync(written)
        os.replace(written, self.path / "manifest.json")
        _sync(self.path)
        self.install()

    def install(self) -> None:
        """Moves a whole pack to its place, from whatever point a killed run has left; what else lies there stays.

        The old manifest goes first and the new one comes last: a directory with a manifest holds a whole pack.
        """
        manifest = self.path / "manifest.json"
        new = _files(json.loads(manifest.read_bytes()))
        self.out.mkdir(exist_ok=True)
        (self.out / "manifest.json").unlink(missing_ok=True)
        for path in list(self.out.iterdir()):
            if OWN_FILES.fullmatch(path.name) and path.name not in new:
                path.unlink()
        for path in sorted(self.path.iterdir()):
            if path.name in new:
                os.replace(path, self.out / path.name)
        _sync(self.out)
        os.replace(manifest, self.out / "manifest.json")
        _sync(self.out)
        (self.path / _JOURNAL).unlink()


def _is_apart(out: Path) -> bool:
    """Whether files cannot be moved from the directory above into `out`."""
    if not out.is_dir():
        return False
    if not os.access(out.parent, os.W_OK | os.X_OK):
        return True
    name = uuid.uuid4().hex
    try:
        os.rename(out.parent / name, out / name)  # there is no such file: the system says so if it would move it
    except OSError as error:
        return error.errno == errno.EXDEV
    return False


def holds(out: Path, fingerprint: str) -> dict[str, Any] | None:
    """The manifest of the whole pack in `out` if it was made from a source of this fingerprint."""
    try:
        manifest = json.loads((out / "manifest.json").read_bytes())
        source = json.loads((out / "source.json").read_bytes())
        if manifest["schema"] != SCHEMA or source["fingerprint"] != fingerprint:
            return None
        shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
        whole = all((out / shard["name"]).stat().st_size == shard["bytes"] for shard in shards)
        whole = whole and all(sha256(out / name) == digest for name, digest in manifest["sha256"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if whole else None


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
    """A file's SHA-256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def dump(record: Any) -> bytes:
    """A line of JSON. What is no character (half of a surrogate pair, as in a tar's or a file's name) is escaped."""
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace") + b"\n"
