"""`pack --upgrade-index`; the other forms of the command are in tests/data."""

from __future__ import annotations

from pathlib import Path

import pytest
from packs import downgrade_index

from scenarioclip_fast.cli.main import main
from scenarioclip_fast.data import ShardSet, generate_scenes, pack


def test_upgrade_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "old"
    pack(list(generate_scenes(6, seed=2)), out, progress=False)
    keys = list(ShardSet(out).keys)
    downgrade_index(out)
    command = ["pack", "--upgrade-index", str(out)]
    assert main(command) == 0 and capsys.readouterr().out == f"{out}: index.json replaced by index.bin\n"
    assert ShardSet(out).keys == keys and not (out / "index.json").exists()
    assert main(command) == 0 and capsys.readouterr().out == f"{out}: has index.bin: nothing to do\n"
    for extra, named in ((["source"], "SOURCE"), (["--out", "x"], "--out"), (["--shard-size", "5"], "--shard-size")):
        assert main([*command, *extra]) == 2
        assert (
            capsys.readouterr()
            .err.strip()
            .endswith(f"--upgrade-index: got {named} as well, expected only `pack --upgrade-index DIR`")
        )
    assert main(["pack", "--upgrade-index", str(tmp_path / "none")]) == 2
    assert "no such directory" in capsys.readouterr().err
