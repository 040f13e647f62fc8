"""Links and other things where `generate` writes: directories may be links to other disks, files may not."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from curation import records, write_run
from special import bounded, make_special, snapshot

from scenarioclip_fast.cli.main import main
from scenarioclip_fast.data.shards import is_packed
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.generate.config import GenerateConfig
from scenarioclip_fast.generate.pipeline import generate
from scenarioclip_fast.generate.records import clear

FOLDERS = ("caption", "ground", "segment", "curate", "shards", "published")
FILES = ("report.html", "review.html", "rejected.jsonl", "generate.json", "images.jsonl")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose models have finished."""
    scene = records([("man", (0, 0, 20, 40)), ("horse", (10, 20, 50, 60))], [("man", "riding", "horse")])
    return write_run(tmp_path, {"a": scene, "b": scene, "c": scene})


def finish(run: Path) -> Any:
    with bounded(60):
        config = GenerateConfig.of({"pack": {"layout": "both"}})
        return generate([], run, config, stages=("curate", "pack"), redo=("curate",), progress=False, review=2)


def test_directories_may_be_links(run: Path, tmp_path: Path) -> None:
    for name in FOLDERS:
        disk = tmp_path / "disk" / name
        disk.parent.mkdir(exist_ok=True)
        (run / name).rename(disk) if (run / name).exists() else disk.mkdir()
        (run / name).symlink_to(disk)
    for _ in range(2):
        finish(run)
    assert all((run / name).is_symlink() for name in FOLDERS)
    assert is_packed(tmp_path / "disk/shards") and len(list((tmp_path / "disk/curate").iterdir())) == 2
    assert len(list((tmp_path / "disk/published/images").iterdir())) == 3
    assert {path.name for path in (tmp_path / "disk").iterdir()} == set(FOLDERS)
    clear(run / "curate")
    assert not list((tmp_path / "disk/curate").iterdir())


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("kind", ["broken link", "named pipe", "regular file"])
def test_what_is_no_directory_is_refused_before_anything_is_written(
    run: Path, tmp_path: Path, name: str, kind: str
) -> None:
    if (run / name).is_dir():
        (run / name).rename(tmp_path / "moved")
    make_special(run / name, kind, tmp_path / "none")
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=rf"^{re.escape(str(run / name))}: got a .*expected a directory or a link to"):
        finish(run)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["lock", "runs.jsonl"])
@pytest.mark.parametrize("kind", ["symbolic link", "broken link", "named pipe", "directory"])
def test_files_written_in_place_may_not_be_links(
    run: Path, tmp_path: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "victim").write_text("precious")
    make_special(run / name, kind, tmp_path / "victim")
    before = snapshot(tmp_path)
    kind = "symbolic link" if kind == "broken link" else kind
    with bounded(60):
        assert main(["generate", "--out", str(run), "--stages", "curate"]) == 2
    assert capsys.readouterr().err == f"error: {run / name}: got a {kind}, expected a regular file; move it away\n"
    assert snapshot(tmp_path) == before


def test_links_in_place_of_other_files_are_replaced(run: Path, tmp_path: Path) -> None:
    for name in FILES:
        victim = tmp_path / f"victim-{name}"
        (run / name).rename(victim) if (run / name).exists() else victim.write_text("precious")
        (run / name).symlink_to(victim)
    before = {path: path.read_bytes() for path in tmp_path.glob("victim-*")}
    finish(run)
    assert {path: path.read_bytes() for path in before} == before
    assert [name for name in FILES if (run / name).is_symlink()] == ["images.jsonl"]  # only read


def test_a_published_directory_with_files_of_others_is_kept(run: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("precious")
    (run / "published").symlink_to(home)
    with pytest.raises(UserError, match=r"home: contains thesis.tex, which generate does not write; move it away"):
        finish(run)
    assert (home / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize("part", ["image", "masks", "metadata"])
def test_a_full_disk_names_the_file_of_the_published_layout(
    run: Path, part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")  # as of a write to an open file: without a name

    owner, name, shown = {
        "image": (Path, "write_bytes", r"images/\w\.jpg"),
        "masks": (np, "savez_compressed", r"sam_results/\w_grounding_sam\.npz"),
        "metadata": (Path, "write_text", r"metadata_\w+\.json"),
    }[part]
    if part == "metadata":
        write_text = Path.write_text
        only = lambda path, *args, **more: (full if "metadata" in path.name else write_text)(path, *args, **more)  # noqa: E731
        monkeypatch.setattr(owner, name, only)
    else:
        monkeypatch.setattr(owner, name, full)
    assert main(["generate", "--out", str(run), "--stages", "curate,pack", "--layout", "published"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(rf"error: {re.escape(str(run))}/\.published\.partial/{shown}: No space left on device", last)


def test_a_full_disk_names_the_file_of_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scenarioclip_fast.generate.records import UnitFile
    from scenarioclip_fast.generate.stages import Outcome

    file = UnitFile(tmp_path, 0, "-", ["a", "b"])
    file.resume()

    class Full:
        """Takes a part, as a disk does that becomes full."""

        def write(self, data: bytes) -> int:
            return len(data) // 2

        def close(self) -> None:
            pass

    monkeypatch.setattr(file, "_file", Full())
    with pytest.raises(OSError, match="No space left") as caught:
        file.append(Outcome("a"))
    assert caught.value.filename == str(file.partial)
    monkeypatch.undo()
    file.close()
