"""Files that are replaced as a whole, and errors that name the file."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest
from special import make_special, snapshot

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import check_folder, naming, replacing, write_text
from scenarioclip_fast.report.page import Report
from scenarioclip_fast.report.style import canvas


@pytest.mark.parametrize("kind", ["symbolic link", "broken link", "regular file"])
def test_links_and_files_are_replaced(tmp_path: Path, kind: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    make_special(tmp_path / "page", kind, victim)
    write_text(tmp_path / "page", "new")
    assert not (tmp_path / "page").is_symlink() and (tmp_path / "page").read_text() == "new"
    assert victim.read_text() == "precious" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("kind", "name"),
    [("directory", "directory"), ("named pipe", "named pipe"), ("socket", "socket"), ("device", "device")],
)
def test_other_things_are_refused(tmp_path: Path, kind: str, name: str) -> None:
    """Also a link to a device, such as /dev/stdout, which root could replace."""
    make_special(tmp_path / "page", kind, tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path))}/page: got a {name}, expected a regular file"):
        write_text(tmp_path / "page", "new")
    assert snapshot(tmp_path) == before


def test_a_failed_write_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "page").write_text("old")
    with pytest.raises(KeyError), replacing(tmp_path / "page") as new:
        new.write_text("half")
        raise KeyError
    assert snapshot(tmp_path).keys() == {"page"} and (tmp_path / "page").read_text() == "old"


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "page"
    with pytest.raises(OSError, match=re.escape(str(path))) as caught, replacing(path):
        os.write(os.open("/dev/full", os.O_WRONLY), b"x")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    with pytest.raises(FileNotFoundError) as missing:
        write_text(tmp_path / "none" / "page", "new")
    assert missing.value.filename == str(tmp_path / "none" / "page")
    with pytest.raises(OSError) as other, naming(path):
        raise OSError("of another package")
    assert other.value.filename is None


def test_pages_and_pictures_do_not_follow_links(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("report.html", "picture.png"):
        (tmp_path / name).symlink_to(victim)
    Report("Title").write(tmp_path / "report.html")
    with canvas(tmp_path / "picture.png", 1, 1):
        pass
    assert victim.read_text() == "precious"
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_folders_may_be_links(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for name in ("none", "disk", "link"):
        check_folder(tmp_path / name)
    (tmp_path / "file").touch()
    (tmp_path / "unmounted").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "to file").symlink_to(tmp_path / "file")
    for name, what in (
        ("file", "regular file"),
        ("unmounted", "symbolic link to .*nothing"),
        ("loop", "symbolic link"),
    ):
        with pytest.raises(UserError, match=rf"{name}: got a {what}.*expected a directory or a link to one"):
            check_folder(tmp_path / name)
    with pytest.raises(UserError, match=r"to file: got a symbolic link to .*file, which is no directory"):
        check_folder(tmp_path / "to file")
