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
import json
import os
import re
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from scenarioclip_fast.checksums import file_digest
from scenarioclip_fast.data.scene import READABLE, SCHEMA
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import Directory, is_regular, kind_of, read_regular, sha256_of, status_of
from scenarioclip_fast.parsing import parse_json

SHARD_NAME = re.compile(r"(train|val|test)-\d{6,}\.tar")
PACK_FILES = re.compile(
    rf"{SHARD_NAME.pattern}|(index|vocabulary)\.(bin|json)|views\.bin|(manifest|source)\.json|rejected\.jsonl"
)
INNER_STAGE = ".partial"
PARTS = ".parts"  # directory of the parts that are not merged yet, see `parts`
_JOURNAL, _WRITTEN_MANIFEST = "journal.jsonl", "manifest.tmp"


class Stage:
    """The locked staging directory of one run. On exit, it is removed unless a later run can resume from it.

    Only files that a pack writes are ever removed, and no symbolic link is followed.

    Args:
        path: of the staging directory; None: that of a pack in one piece.

    Raises:
        UserError: another process is packing into `out`, or there is something else at the path of the directory or in
            it.
    """

    def __init__(self, out: Path, path: Path | None = None) -> None:
        self.out, self.path = out.resolve(), path or self.directory_for(out)
        self.finished = 0  # shards in the journal
        self._fingerprint: str | None = None
        self._files = self._locked()
        try:
            self._check_files()
        except BaseException:
            self._files.close()
            raise

    @staticmethod
    def directory_for(out: Path) -> Path:
        """The staging directory for `out`; its name is fixed, so that a later run finds it."""
        out = out.resolve()
        return out / INNER_STAGE if _on_other_device(out) else out.parent / f".{out.name}.partial"

    @classmethod
    def is_complete(cls, out: Path) -> bool:
        """Whether a complete pack is staged, because a run was killed while moving it to `out`."""
        return is_regular(cls.directory_for(out) / "manifest.json")

    def _locked(self) -> Directory:
        while True:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                files = Directory(self.path)
            except FileNotFoundError:  # another run has just removed it
                continue
            except (FileExistsError, NotADirectoryError):
                if (found := status_of(self.path)) is None:
                    raise
                raise UserError(
                    f"{self.path}: got a {kind_of(found.st_mode)}, expected the directory of an unfinished pack; "
                    "move it away, or choose another directory for the pack"
                ) from None
            if not lock(files.fd):
                files.close()
                raise UserError(f"{self.out}: another process is packing into it")
            # Another run may have removed the directory since it was opened.
            found = status_of(self.path)
            if found is not None and os.path.samestat(os.fstat(files.fd), found):
                return files
            files.close()

    def _check_files(self) -> None:
        """Raise UserError if the directory contains anything that a pack does not write."""
        for name in self._files.names():
            mode = status.st_mode if (status := self._files.status(name)) else stat.S_IFREG
            if not _is_staged(name) or not stat.S_ISREG(mode):
                raise UserError(
                    f"{self.path / name}: got a {kind_of(mode)} that is not part of a pack, expected only the files of "
                    "an unfinished pack here; move it away, or choose another directory for the pack"
                )

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None or not self.resumable:
            for name in filter(_is_staged, self._files.names()):
                self._files.unlink(name)
            with suppress(OSError):  # files of others have appeared in it: the next run names one
                os.rmdir(self.path)
        self._files.close()

    @property
    def resumable(self) -> bool:
        """Whether a later run can resume from this directory."""
        return (self._fingerprint is not None and self.finished > 0) or self._has("manifest.json")

    def _has(self, name: str) -> bool:
        return self._files.status(name) is not None

    def complete_installation(self) -> None:
        """Finish moving a complete pack that an interrupted run left behind."""
        if self._has("manifest.json"):
            self.install()

    def resume(self, fingerprint: str | None) -> bool:
        """Keep the shards finished by a run with the same fingerprint, and remove all other files.

        Args:
            fingerprint: of the source and options; None, if unknown, keeps nothing.

        Returns:
            Whether an interrupted run left a journal.
        """
        exists = self._has(_JOURNAL)
        kept: list[str] = []
        end = 0
        if exists and fingerprint is not None:
            with self._files.open(_JOURNAL) as lines:
                for line in lines:
                    name = self._intact(line, fingerprint, first=end == 0)
                    if name is None:
                        break
                    end += len(line)
                    kept.append(name)
        for name in filter(_is_staged, self._files.names()):
            if name not in (*kept, _JOURNAL):
                self._files.unlink(name)
        self._fingerprint, self.finished = fingerprint, max(0, len(kept) - 1)
        with self._files.open(_JOURNAL, "ab") as file:
            file.truncate(end)
        if end == 0:
            self.append([{"fingerprint": fingerprint}])
        return exists

    def _intact(self, line: bytes, fingerprint: str, first: bool) -> str | None:
        """The file name that a journal line refers to (the first line: the journal itself); None if unusable."""
        try:
            # Not strict: the boxes of objects without masks are compared with NaN.
            record = parse_json(line, strict=False) if line.endswith(b"\n") else {}
        except ValueError:
            return None
        if not isinstance(record, dict):
            return None
        if first:
            return _JOURNAL if record.get("fingerprint") == fingerprint else None
        name = str(record.get("name"))
        status = self._files.status(name) if SHARD_NAME.fullmatch(name) else None
        return name if status is not None and status.st_size == record.get("bytes") else None

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the records of finished shards, in order of completion."""
        with self._files.open(_JOURNAL) as lines:
            next(lines)
            yield from map(json.loads, lines)

    def create(self, name: str) -> IO[bytes]:
        """Create a file of the pack."""
        return self._files.open(name, "xb")

    def read(self, name: str) -> bytes:
        """The content of a file of the pack."""
        with self._files.open(name) as file:
            return bytes(file.read())

    def sha256(self, name: str) -> str:
        """The SHA-256 of a file of the pack in hex."""
        with self._files.open(name) as file:
            return sha256_of(file)

    def size(self, name: str) -> int:
        """The size of a file of the pack in bytes."""
        with self._files.open(name) as file:
            return os.fstat(file.fileno()).st_size

    def add(self, record: dict[str, Any]) -> None:
        """Add the finished shard record["name"] to the journal, with the state required to resume."""
        sealed = self.seal(record["name"])
        self._files.sync()
        self.append([record | sealed])
        self.finished += 1

    def seal(self, name: str) -> dict[str, Any]:
        """Write a finished shard to disk, and return its digest and size."""
        size = self._sync(name)
        return {"sha256": self.sha256(name), "bytes": size}

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Add records to the journal, and write it to disk."""
        with self._files.open(_JOURNAL, "ab") as file:
            for record in records:
                file.write(dump(record))
            file.flush()
            os.fsync(file.fileno())

    def _sync(self, name: str) -> int:
        """Write a file to disk, and return its size in bytes."""
        with self._files.open(name) as file:
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size

    def finish(self, manifest: dict[str, Any], names: list[str]) -> None:
        """Write the manifest of a complete pack, whose other small files are `names`, and move the pack into place."""
        for name in names:
            self._sync(name)
        with self.create(_WRITTEN_MANIFEST) as file:
            file.write(dump(manifest))
        self._sync(_WRITTEN_MANIFEST)
        self._files.move(_WRITTEN_MANIFEST, self._files, "manifest.json")
        self._files.sync()
        self.install()

    def install(self) -> None:
        """Move a complete pack into place, continuing an interrupted move. Files that are not part of a pack are kept.

        The old manifest is removed first and the new one moved last, so a directory with a manifest is a complete pack.
        """
        try:
            new = files_of(json.loads(self.read("manifest.json")))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{self.path / 'manifest.json'}: damaged, expected the manifest of a complete pack; remove the "
                "directory to pack from the start"
            ) from None
        self.out.mkdir(exist_ok=True)
        with Directory(self.out) as out:
            out.unlink("manifest.json", missing_ok=True)
            for name in out.names():
                if PACK_FILES.fullmatch(name) and name not in new:
                    out.unlink(name)
            for name in self._files.names():
                if PACK_FILES.fullmatch(name) and name in new:
                    self._files.move(name, out)
            self._move_others(out)
            out.sync()
            self._files.move("manifest.json", out)
            out.sync()
        self._files.unlink(_JOURNAL)

    def _move_others(self, out: Directory) -> None:
        """Move the files of the pack that are elsewhere into place; the merge of parts has such files."""


def lock(descriptor: int, shared: bool = False) -> bool:
    """Lock an open file or directory for this process; returns False if another process has.

    Locks that are `shared` exclude only others.

    A file system without locks counts as unlocked, as does a directory on NFS, which locks only files.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    return True


def _is_staged(name: str) -> bool:
    """Whether a pack writes files of this name into its staging directory."""
    return name in (_JOURNAL, _WRITTEN_MANIFEST) or PACK_FILES.fullmatch(name) is not None


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


def check_target(out: Path, force: bool, part: bool = False) -> None:
    """Raise UserError if a pack must not be written to `out`.

    Args:
        force: allow other files and packs of other schemas.
        part: only a part of a pack is to be written.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out}: is a file; choose a directory for the pack")
    if not os.access(out, os.W_OK | os.X_OK):
        raise UserError(f"{out}: not writable; choose another directory for the pack")
    for path in sorted(out.iterdir()):  # a link to a file is only replaced
        found = status_of(path) if PACK_FILES.fullmatch(path.name) else None
        if found is not None and not (stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode)):
            raise UserError(
                f"{path}: got a {kind_of(found.st_mode)}, expected a file of a pack; move it away, or choose another "
                "directory"
            )
    if (out / PARTS).exists() and not part and not force:
        raise UserError(
            f"{out}: contains parts of a pack; finish them with `pack --merge {out}`, remove {out / PARTS}, or choose "
            "another directory"
        )
    foreign = sorted(
        path.name
        for path in out.iterdir()
        if path.name not in (INNER_STAGE, PARTS) and not PACK_FILES.fullmatch(path.name)
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
        if tars and not Stage.is_complete(out) and not (out / PARTS).exists():
            raise UserError(
                f"{out}: contains an incomplete pack ({tars[0].name}); choose another directory or use --force"
            )
    else:
        try:
            schema = parse_json(read_regular(manifest)).get("schema")
        except (ValueError, AttributeError):
            schema = None
        if schema not in READABLE:
            raise UserError(
                f"{out}: contains a pack with schema {schema}, this version writes {SCHEMA}; use --force to replace it"
            )


def find_up_to_date(out: Path, fingerprint: str) -> dict[str, Any] | None:
    """Return the manifest of the pack in `out` if it is complete and has this fingerprint."""
    manifest, source = _read_object(out / "manifest.json"), _read_object(out / "source.json")
    if manifest is None or source is None or source.get("fingerprint") != fingerprint:
        return None
    return manifest if local_damage(out, manifest) is None else None


def _read_object(path: Path) -> dict[str, Any] | None:
    """A JSON object; None if the file is missing or damaged."""
    try:
        found = parse_json(read_regular(path))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def local_damage(out: Path, manifest: dict[str, Any] | None) -> str | None:
    """What is damaged in a local pack; see `damage_of`."""

    def found(read: Callable[[Path], Any], name: str) -> Any:
        try:
            return read(out / name)
        except OSError:
            return None

    return damage_of(manifest, partial(found, lambda path: path.stat().st_size), partial(found, file_digest))


def damage_of(
    manifest: dict[str, Any] | None, size_of: Callable[[str], int | None], digest_of: Callable[[str], str | None]
) -> str | None:
    """Compare the sizes of a pack's shards and the digests of its other files with its manifest.

    Args:
        manifest: None if it cannot be read.
        size_of, digest_of: the size in bytes and the SHA-256 of a file; None if it is missing.

    Returns:
        The first difference; None if the pack is intact.
    """
    try:
        if manifest is None:
            raise ValueError
        if manifest["schema"] != SCHEMA:
            return f"its schema is {manifest['schema']}, expected {SCHEMA}"
        shards = [(one["name"], one["bytes"]) for split in manifest["splits"].values() for one in split["shards"]]
        for name, expected in shards:
            if (size := size_of(name)) != expected:
                return f"{name} is missing" if size is None else f"{name} has {size} bytes, expected {expected}"
        for name, expected in manifest["sha256"].items():
            if (digest := digest_of(name)) != expected:
                return f"{name} is missing" if digest is None else f"{name} has another SHA-256 than in manifest.json"
        files_of(manifest)
    except (ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json is not that of a pack"
    return None


def files_of(manifest: dict[str, Any]) -> set[str]:
    """The files of a pack besides its manifest."""
    shards = {shard["name"] for split in manifest["splits"].values() for shard in split["shards"]}
    return {*shards, *manifest["sha256"], "source.json"}


def dump(record: Any) -> bytes:
    """Serialise a record as one line of JSON. Lone surrogates, as in undecodable file names, are escaped."""
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace") + b"\n"
