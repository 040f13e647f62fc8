"""Following docs/new-op.md in a copy of the repository gives a working op."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "new-op.md"
BLOCK = re.compile(r'^```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```$', re.MULTILINE | re.DOTALL)


def blocks() -> Iterator[tuple[str, str, str]]:
    """The page's code blocks in order: language, title, text."""
    for block in BLOCK.finditer(PAGE.read_text(encoding="utf-8")):
        yield block["language"], block["title"] or "", block["text"]


def insert(text: str, diff: str) -> str:
    """Insert the added lines of a diff after its context lines, which must occur in order."""
    at = 0
    for line in diff.splitlines(keepends=True):
        content = line[1:]
        if line.startswith("+"):
            text = text[:at] + content + text[at:]
            at += len(content)
        else:
            found = re.compile("^" + re.escape(content), re.MULTILINE).search(text, at)
            assert found is not None, f"not found in the file, or not in this order: {content!r}"
            at = found.end()
    return text


def test_page_adds_a_working_op(tmp_path: Path) -> None:
    for name in ("scenarioclip_fast", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "conftest.py", "tests/conftest.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    # An editable install maps this folder automatically.
    (tmp_path / "scenarioclip_fast" / "kernels").symlink_to(tmp_path / "kernels")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PATH": path}
    outputs = []

    def run(*command: str) -> None:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        outputs.append(done.stdout)

    for language, title, text in blocks():
        target = tmp_path / title
        if language == "text":  # a sketch
            continue
        if language == "sh":
            run("bash", "-e", "-c", text)
        elif language == "diff":
            target.write_text(insert(target.read_text(encoding="utf-8"), text), encoding="utf-8")
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
    assert "14 passed" in outputs[-1]
    run(sys.executable, "-c", "from scenarioclip_fast import dispatch; print(dispatch.__file__, *dispatch.BACKENDS)")
    assert outputs[-1].split()[0] == str(tmp_path / "scenarioclip_fast" / "dispatch.py")  # the copy was tested
    assert "pair_hinge" in outputs[-1]
