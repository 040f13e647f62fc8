"""Look into the files of a pack, and change them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scenarioclip_fast.data.index import IndexWriter
from scenarioclip_fast.data.shards import ShardSet

Rows = dict[str, list[list[Any]]]


def read_rows(folder: Path) -> Rows:
    """The scenes of each shard: key, offset and size of the image, offset and size of the record."""
    manifest = json.loads((folder / "manifest.json").read_text())
    rows: Rows = {}
    for split, found in manifest["splits"].items():
        rows |= {shard["name"]: [] for shard in found["shards"]}
        for key, name, offset, size, record in ShardSet(folder, split).locations():
            rows[name].append([key, offset, size, *record])
    return rows


def write_rows(folder: Path, rows: Mapping[str, Sequence[Sequence[Any]]]) -> None:
    """Replace the index, and its entries in the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    with (folder / "index.bin").open("wb") as file:
        writer = IndexWriter(file, list(manifest["splits"]))
        for split, found in manifest["splits"].items():
            for shard in found["shards"]:
                writer.add(split, shard["sha256"], rows[shard["name"]])
        writer.finish()
    content = (folder / "index.bin").read_bytes()
    manifest["index"] = {"bytes": len(content)}
    manifest["sha256"]["index.bin"] = hashlib.sha256(content).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def downgrade_index(folder: Path, schema: int = 2) -> Rows:
    """Replace index.bin by the index.json of earlier versions; return its rows."""
    rows = read_rows(folder)
    (folder / "index.bin").unlink()
    content = json.dumps({"schema": schema, "shards": rows}, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
    (folder / "index.json").write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["index"], manifest["sha256"]["index.bin"]
    manifest["sha256"]["index.json"] = hashlib.sha256(content).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return rows
