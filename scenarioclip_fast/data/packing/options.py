"""The options that a pack depends on, and the version of what packs are."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from scenarioclip_fast import __version__
from scenarioclip_fast.config_types import check_types
from scenarioclip_fast.data.scene import SCHEMA, check_fractions
from scenarioclip_fast.data.sources.base import TRAINVAL, Source, SourceOptions, fingerprint_files
from scenarioclip_fast.errors import UserError

if TYPE_CHECKING:
    from scenarioclip_fast.data.sources.remote_tars import RemoteTarSource

# Part of the fingerprint: increment it when the same source gives a different pack, so that existing packs are rebuilt.
_PACK_VERSION = 3
# What the parts of a pack, and the merge, must have in common.
VERSION = {"version": __version__, "pack_version": _PACK_VERSION, "schema": SCHEMA}


@dataclass(frozen=True)
class PackOptions:
    """The options of `pack` that its output depends on.

    Raises:
        UserError: a value has the wrong type or is out of range.
    """

    shard_size: int = 1000
    val: float = 0.1
    test: float = 0.2
    split: str = "given"
    source: SourceOptions = field(default_factory=SourceOptions)

    def __post_init__(self) -> None:
        check_types(self)
        if self.split not in ("given", "hash"):
            raise UserError(f"split: got {self.split!r}, expected given or hash")
        if self.shard_size < 1:
            raise UserError(f"shard size: got {self.shard_size}, expected at least 1")
        check_fractions(self.val, self.test)

    def split_of(self, key: str, given: str | None) -> str:
        """The split of a key: the one assigned by the data set, or else one chosen by a hash of the key.

        Of scenes that the data set keeps out of its test split (TRAINVAL), the fraction `val` goes to val.
        """
        if given not in (None, TRAINVAL) and self.split == "given":
            return given
        u = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
        if given == TRAINVAL and self.split == "given":
            return "val" if u < self.val else "train"
        return "test" if u < self.test else "val" if u < self.test + self.val else "train"

    def header(self) -> dict[str, Any]:
        """What all parts of a pack must agree on, besides the fingerprint."""
        options = {
            "shard_size": self.shard_size,
            "val": float(self.val),
            "test": float(self.test),
            "split": self.split,
            "max_pixels": self.source.max_pixels,
            "boxes": self.source.boxes or "xyxy",
        }
        return VERSION | {"options": options}

    def fingerprint(self, source: Source | RemoteTarSource) -> str | None:
        """A hash of everything that the pack depends on; None if the source has no fingerprint."""
        found = source.fingerprint()
        if found is None:
            return None
        fractions = [float(self.val), float(self.test)]  # 0 and 0.0 are the same option
        options = [SCHEMA, _PACK_VERSION, self.shard_size, *fractions, self.split, self.source.max_pixels]
        options.append(self.source.boxes or "xyxy")
        if (actions := self.source.actions) is not None:
            options.append(fingerprint_files(sorted(actions.glob("*.json")) if actions.is_dir() else [actions]))
        return hashlib.sha256(json.dumps([found, *options]).encode()).hexdigest()
