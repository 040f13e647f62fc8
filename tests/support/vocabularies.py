"""Vocabularies of packs in the form of earlier versions."""

from __future__ import annotations

import json
from pathlib import Path

from scenarioclip_fast.checksums import file_digest
from scenarioclip_fast.data import Vocabulary


def use_json_vocabulary(pack: Path) -> Path:
    """Replace the vocabulary.bin of a pack by a vocabulary.json, and return it."""
    path = pack / "vocabulary.json"
    Vocabulary.load(pack / "vocabulary.bin").save(path)
    (pack / "vocabulary.bin").unlink()
    manifest = json.loads((pack / "manifest.json").read_text())
    del manifest["sha256"]["vocabulary.bin"]
    manifest["sha256"]["vocabulary.json"] = file_digest(path)
    (pack / "manifest.json").write_text(json.dumps(manifest))
    return path
