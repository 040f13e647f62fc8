"""Output paths are checked before the work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.output import prepare_directory, prepare_file


def test_usable_paths_are_prepared(tmp_path: Path) -> None:
    prepare_directory(tmp_path / "a" / "b", "--out")
    prepare_file(tmp_path / "c" / "file.npz", "--out")
    assert (tmp_path / "a" / "b").is_dir() and os.listdir(tmp_path / "c") == []
    (tmp_path / "kept.npz").write_bytes(b"kept")
    prepare_file(tmp_path / "kept.npz", "--out")
    assert (tmp_path / "kept.npz").read_bytes() == b"kept"


def test_unusable_paths_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for directory in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
        with pytest.raises(UserError, match=r"^--out: .*file is a file, expected a directory$"):
            prepare_directory(directory, "--out")
    with pytest.raises(UserError, match=r"^--json: .* is a directory, expected a file$"):
        prepare_file(tmp_path, "--json")
    with pytest.raises(UserError, match=r"^--out: /proc/new cannot be written \("):
        prepare_directory(Path("/proc/new"), "--out")
