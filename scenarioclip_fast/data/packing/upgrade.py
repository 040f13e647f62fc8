"""Convert the index of a data set that an earlier version packed."""

from __future__ import annotations

import os
import re
from pathlib import Path

from scenarioclip_fast.checksums import file_digest
from scenarioclip_fast.data.index import NAME
from scenarioclip_fast.data.packing.staging import dump, lock
from scenarioclip_fast.data.shards import SPLITS, ShardSet
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import Directory, is_url, replacing
from scenarioclip_fast.parsing import parse_json

_PARTIAL = re.compile(r"\.(index\.bin|manifest\.json)\.[0-9a-f]{32}\.partial")  # see `files.replacing`


def upgrade_index(directory: str | Path) -> bool:
    """Write index.bin in place of the index.json of earlier versions. Shards and vocabulary stay as they are.

    An interrupted call leaves a data set that can be read, and is completed by another one.

    Returns:
        Whether there was anything to do.

    Raises:
        UserError: no packed data set, a remote one, a malformed index, or another process upgrades it.
        OSError: the directory cannot be written.
    """
    if is_url(directory):
        raise UserError(f"{directory}: only a local data set can be upgraded; run the command where its files are")
    directory = Path(directory)
    ShardSet(directory, SPLITS[0])  # is one
    with Directory(directory) as locked:
        if not lock(locked.fd):
            raise UserError(f"{directory}: another process upgrades the index: wait for it")
        for name in filter(_PARTIAL.fullmatch, locked.names()):  # of an interrupted call
            locked.unlink(name)
        return _upgrade(directory)


def _upgrade(directory: Path) -> bool:
    data = ShardSet(directory, SPLITS[0]).converted_index
    old = directory / "index.json"
    if data is None:
        old.unlink(missing_ok=True)  # left by an interrupted call
        return False
    manifest = parse_json((directory / "manifest.json").read_bytes())
    digests = manifest.setdefault("sha256", {})
    if digests.pop(old.name, file_digest(old)) != file_digest(old):
        raise UserError(f"{old}: the checksum differs from the manifest's; copy the data set again, or pack it again")
    with replacing(directory / NAME) as path:
        _write(path, data)
    manifest["index"] = {"bytes": len(data)}
    digests[NAME] = file_digest(directory / NAME)
    with replacing(directory / "manifest.json") as path:
        _write(path, dump(manifest))
    old.unlink(missing_ok=True)
    return True


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
