"""Parts of a pack on a URL: packing one, and installing the pack that is made of them.

The directories are those of local parts (see `parts`), with these differences:

- Nothing is locked. Two processes that pack the same part write the same bytes twice, and so do two that merge.
- A unit is packed in a temporary directory of this machine, and uploaded: shards first, then its record.
- The merge copies shards in the storage and keeps the parts until the manifest is written. An interrupted merge starts
  again, but continues to copy:

    URL/.parts/merge/copied.json    the SHA-256 of the manifest of the pack, and how many of its shards are copied
    URL/.parts/merge/manifest.json  the manifest, before it is moved
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from scenarioclip_fast.data.packing.parts import (
    FILES,
    HEADER,
    MERGE,
    Part,
    directory_of,
    parse_record,
    part_names,
    read_json,
)
from scenarioclip_fast.data.packing.remote_folder import RemoteFolder
from scenarioclip_fast.data.packing.staging import PACK_FILES, PARTS, Stage, damage_of, dump, files_of, local_damage
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import Directory, is_regular, sha256_of
from scenarioclip_fast.progress import progress as show_progress

_COPIED = "copied.json"
_STEP = 256  # shards copied before that is noted


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary directory for files on their way to a URL, below $TMPDIR."""
    with tempfile.TemporaryDirectory(prefix="scenarioclip-pack-") as folder:
        yield Path(folder).resolve()


def is_complete(out: Path | RemoteFolder) -> bool:
    """Whether there is a complete pack."""
    return is_regular(out / "manifest.json") if isinstance(out, Path) else out.exists("manifest.json")


def check_remote_target(out: RemoteFolder, force: bool) -> None:
    """Raise UserError if a part must not be packed into `out`; `force` allows other files."""
    names = [] if force else out.names()
    if foreign := [name for name in names if name != PARTS and not PACK_FILES.fullmatch(name)]:
        raise UserError(
            f"{out}: contains files that are not part of a pack ({foreign[0]}); choose another URL or use --force"
        )
    if names and "manifest.json" not in names and PARTS not in names:
        raise UserError(f"{out}: contains an incomplete pack ({names[0]}); choose another URL or use --force")


@dataclass(frozen=True)
class FoundPack:
    """A pack that seems complete: it has a manifest.

    `fingerprint` is None if source.json is missing or damaged. `damage` says what differs from the manifest.
    """

    manifest: dict[str, Any]
    fingerprint: str | None
    damage: str | None

    @classmethod
    def at(cls, out: Path | RemoteFolder) -> FoundPack:
        """Read and check a pack: the sizes of its shards, and the digests of its other files."""
        with directory_of(out.resolve() if isinstance(out, Path) else out) as files:  # a link may lead to it
            manifest, source = read_json(files, "manifest.json"), read_json(files, "source.json")
        damage = local_damage(out, manifest) if isinstance(out, Path) else _remote_damage(out, manifest)
        fingerprint = (source or {}).get("fingerprint")
        return cls(manifest or {}, fingerprint if isinstance(fingerprint, str) else None, damage)


def _remote_damage(out: RemoteFolder, manifest: dict[str, Any] | None) -> str | None:
    def digest_of(name: str) -> str | None:
        with suppress(FileNotFoundError), out.open(name) as file:
            return sha256_of(file)
        return None

    out.refresh()
    return damage_of(manifest, out.size, digest_of)


class RemotePart(Part):
    """The directory of a part on a URL."""

    _files: RemoteFolder

    def _open(self, stack: ExitStack, header: dict[str, Any]) -> None:
        assert isinstance(self.path, RemoteFolder)
        self._check_others(header)
        self._files = self.path
        self._scratch = stack.enter_context(Directory(stack.enter_context(scratch())))

    def _read(self, names: Sequence[str]) -> Iterator[dict[str, Any] | None]:
        return map(parse_record, self._files.read_each(names, self.cut.batch))

    def _tidy(self, names: Sequence[str]) -> None:
        """Nothing: another process may be uploading these files. If not, this one replaces them."""

    def _remove(self, names: Sequence[str]) -> None:
        for name in names:  # one by one, in this order
            self._files.remove([name])
        self._files.refresh()

    def create(self, name: str) -> IO[bytes]:
        """Create a shard."""
        return self._scratch.open(name, "xb")

    def _store(self, shards: list[dict[str, Any]]) -> None:
        for shard in shards:
            name = shard["name"]
            with self._scratch.open(name) as file:
                shard |= {"sha256": sha256_of(file), "bytes": os.fstat(file.fileno()).st_size}
            self._files.upload(self._scratch.path / name, name)
            self._scratch.unlink(name)

    def _write(self, name: str, record: dict[str, Any]) -> None:
        self._files.write(name, dump(record))


class RemoteMergeStage(Stage):
    """The local staging directory of a merge on a URL.

    Args:
        target: the directory of the pack, on the URL.
        folder: an empty temporary directory.
        progress: report how copying proceeds.
        replace: a damaged pack.
    """

    def __init__(self, target: RemoteFolder, folder: Path, progress: bool, replace: bool = False) -> None:
        super().__init__(folder, folder / MERGE)
        self._target, self._progress, self._replace = target, progress, replace

    def install(self) -> None:
        """Write the pack to the URL, the manifest last."""
        target, merge = self._target, f"{PARTS}/{MERGE}"
        if self._replace:  # of the shards that had been copied, some are damaged
            target.remove([f"{merge}/{_COPIED}"])
            target.remove(["manifest.json"])
        elif target.exists("manifest.json"):
            raise UserError(f"{target}: another process has merged the parts meanwhile; the pack is complete")
        manifest = self.read("manifest.json")
        new = files_of(json.loads(manifest))
        copies = [("/".join((PARTS, *one["from"])), one["name"]) for one in self.records() if "from" in one]
        # Files of the pack are replaced, not removed: another process that merges may have put them there.
        kept = new | {"manifest.json"}
        target.remove(name for name in target.names() if PACK_FILES.fullmatch(name) and name not in kept)
        digest = hashlib.sha256(manifest).hexdigest()
        left = range(self._copied(digest), len(copies))
        for number in show_progress(left, desc="copying", unit="shards") if self._progress else left:
            if number in left[::_STEP]:
                target.copy(copies[number : number + _STEP])
                target.write(f"{merge}/{_COPIED}", dump({"manifest": digest, "copied": number + _STEP}))
        for name in sorted(new.difference(name for _, name in copies)):
            target.upload(self.path / name, name)
        target.write(f"{merge}/manifest.json", manifest)
        target.move(f"{merge}/manifest.json", "manifest.json")

    def _copied(self, digest: str) -> int:
        """The number of shards that an interrupted run with the same manifest has copied."""
        found = read_json(self._target / PARTS / MERGE, _COPIED) or {}
        copied = found.get("copied")
        return copied if found.get("manifest") == digest and isinstance(copied, int) else 0


def remove_parts(out: RemoteFolder) -> None:
    """Remove the parts of a complete pack, but not files of others."""
    names = (out / PARTS).names()
    if not names:
        return
    for name in part_names(out).values():
        folder = out / PARTS / name
        files = [one for one in folder.names() if FILES.fullmatch(one)]
        folder.remove(one for one in files if one != HEADER)
        folder.remove(one for one in files if one == HEADER)  # last: it says what the others are
        folder.remove_folder()
    merge = out / PARTS / MERGE
    merge.remove(name for name in merge.names() if name in (_COPIED, "manifest.json"))
    for folder in (merge, out / PARTS):
        folder.remove_folder()
