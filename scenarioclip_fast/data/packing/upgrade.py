"""Convert the index of a data set that an earlier version packed."""

from __future__ import annotations

import os
from pathlib import Path

from scenarioclip_fast.checksums import file_digest
from scenarioclip_fast.data.index import NAME
from scenarioclip_fast.data.packing.staging import dump
from scenarioclip_fast.data.shards import SPLITS, ShardSet
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import is_url, replacing
from scenarioclip_fast.parsing import parse_json


def upgrade_index(directory: str | Path) -> bool:
    """Write index.bin in place of the index.json of earlier versions. Shards and vocabulary stay as they are.

    An interrupted call leaves a data set that can be read, and is completed by another one.

    Returns:
        Whether there was anything to do.

    Raises:
        UserError: no packed data set, a remote one, or a malformed index.
        OSError: the directory cannot be written.
    """
    if is_url(directory):
        raise UserError(f"{directory}: only a local data set can be upgraded; run the command where its files are")
    directory = Path(directory)
    shards = ShardSet(directory, SPLITS[0])
    data = shards.converted_index
    old = directory / "index.json"
    if data is None:
        old.unlink(missing_ok=True)  # left by an interrupted call
        return False
    manifest = parse_json((directory / "manifest.json").read_bytes())
    digests = manifest.setdefault("sha256", {})
    if digests.pop(old.name, None) != file_digest(old):
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
