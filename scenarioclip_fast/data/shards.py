"""Random access to a packed data set."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

from scenarioclip_fast.data.scene import SCHEMA, Scene, scene_from_json
from scenarioclip_fast.data.vocabulary import Vocabulary
from scenarioclip_fast.errors import UserError

SPLITS = ("train", "val", "test")


class BadSample(ValueError):
    """One scene of a shard cannot be used. `reason` is a short name to count by."""

    def __init__(self, key: str, reason: str, detail: str) -> None:
        super().__init__(key, reason, detail)
        self.key, self.reason, self.detail = key, reason, detail

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}: {self.detail}"


class ShardSet:
    """The scenes of one split, in the order of the index.

    Reads are positioned (`pread`), so threads may share one ShardSet; a copy sent to another process opens
    its own files.

    Args:
        directory: what `scenarioclip-fast pack` wrote.
        split: "train", "val" or "test".

    Raises:
        UserError: the directory is not a packed data set, or knows no such split.
    """

    def __init__(self, directory: str | Path, split: str = "train") -> None:
        self.directory, self.split = Path(directory), split
        if split not in SPLITS:
            raise UserError(f"split: got {split!r}, expected one of {', '.join(SPLITS)}")
        if not self.directory.is_dir():
            raise UserError(f"{directory}: no such directory; `scenarioclip-fast pack SOURCE --out DIR` makes one")
        self.manifest = _read_json(self.directory / "manifest.json")
        index = _read_json(self.directory / "index.json")
        try:
            names = [str(shard["name"]) for shard in self.manifest["splits"][split]["shards"]]
            entries = [
                (str(key), shard, int(jo), int(js), int(to), int(ts))
                for shard, name in enumerate(names)
                for key, jo, js, to, ts in index["shards"][name]
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.directory}: malformed index ({type(error).__name__}: {error}); pack it again"
            ) from None
        if any(os.path.basename(name) != name for name in names):
            raise UserError(f"{self.directory / 'manifest.json'}: a shard's name leads out of the directory")
        self._names, self._entries = names, entries
        self.keys = [entry[0] for entry in entries]
        self._vocabulary: Vocabulary | None = None
        self._files: dict[int, int] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def vocabulary(self) -> Vocabulary:
        if self._vocabulary is None:
            self._vocabulary = Vocabulary.load(self.directory / "vocabulary.json")
        return self._vocabulary

    def read(self, i: int) -> Scene:
        """Scene `i`: `image` holds the JPEG's bytes, masks are RLE. BadSample if it is not there whole."""
        key, shard, jpg_offset, jpg_size, json_offset, json_size = self._entries[i]
        image = self._pread(key, shard, jpg_offset, jpg_size)
        record = self._pread(key, shard, json_offset, json_size)
        try:
            scene = scene_from_json(key, image, json.loads(record))
        except ValueError as error:
            raise BadSample(key, "bad_json", str(error)) from error
        scene.split = self.split
        return scene

    def _pread(self, key: str, shard: int, offset: int, size: int) -> bytes:
        try:
            # Opened under the lock: two threads must not leak a descriptor each. Read under no lock.
            with self._lock:
                if shard not in self._files:
                    self._files[shard] = os.open(self.directory / self._names[shard], os.O_RDONLY | os.O_CLOEXEC)
            data = os.pread(self._files[shard], size, offset)
        except OSError as error:
            raise BadSample(key, "unreadable_shard", f"{self._names[shard]}: {error.strerror}") from error
        if len(data) != size:
            raise BadSample(key, "short_shard", f"{self._names[shard]}: got {len(data)} of {size} bytes at {offset}")
        return data

    def close(self) -> None:
        """Closes the shard files; the next read opens them again."""
        with self._lock:
            files, self._files = self._files, {}
        for descriptor in files.values():
            os.close(descriptor)

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_files", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._files, self._lock = {}, threading.Lock()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is this what `scenarioclip-fast pack` wrote?") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); pack the data set again") from None
    got = record.get("schema") if isinstance(record, dict) else type(record).__name__
    if got != SCHEMA:
        raise UserError(f"{path}: got schema {got!r}, expected {SCHEMA}; pack the data set again")
    return dict(record)
