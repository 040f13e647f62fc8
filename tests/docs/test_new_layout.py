"""Runs the code of docs/new-layout.md."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from scenarioclip_fast.data import ShardSet, pack, sources
from scenarioclip_fast.data.sources import registry

PAGE = Path(__file__).parents[2] / "docs" / "new-layout.md"


def blocks(language: str) -> list[tuple[str, str]]:
    """(title, content) of the page's code blocks in a language, in order."""
    pattern = rf'^```{language}(?: title="([^"\n]*)")?\n(.*?)^```$'
    return [(found[1] or "", found[2]) for found in re.finditer(pattern, PAGE.read_text(), re.MULTILINE | re.DOTALL)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the files of the page, and the data set that its Python code writes and packs."""
    pytest.importorskip("simplejpeg")
    directory = tmp_path_factory.mktemp("page")
    for title, content in blocks("python") + blocks("toml"):
        if title:
            (directory / title).write_text(content)
    assert (directory / "folder_json.py").exists() and (directory / "pyproject.toml").exists()
    script = "".join(content for title, content in blocks("python") if not title)
    # From a file, as required by worker processes.
    (directory / "page.py").write_text(script)
    done = subprocess.run([sys.executable, "page.py"], cwd=directory, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (directory / "output").write_text(done.stdout)
    return directory


def test_the_python_code_packs_the_data_set(directory: Path) -> None:
    assert (directory / "output").read_text() == dict(blocks("text"))["output"]
    shards = ShardSet(directory / "packed")
    assert shards.keys == ["garden", "sofa"]
    assert shards.read(0).relation_text(0) == "cat next to mat"


def test_the_command_line_packs_it_too(directory: Path, tmp_path: Path) -> None:
    if not all(map(find_spec, ("pip", "setuptools"))):
        pytest.skip("pip or setuptools is not installed")
    ((_, commands),) = blocks("sh")
    site = str(tmp_path / "site")
    # pip installs outside this environment and downloads nothing.
    settings = {"PIP_TARGET": site, "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PYTHONPATH": site}
    settings["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-e", "-c", commands], cwd=directory, env=os.environ | settings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for name in ("train-000000.tar", "index.bin", "vocabulary.bin", "source.json"):
        packs = [(directory / pack / name).read_bytes() for pack in ("packed", "packed-by-command")]
        assert packs[0] == packs[1]
    auto = commands.replace(" --format folder-json", "").replace("pip install .\n", "")
    again = subprocess.run(["bash", "-e", "-c", auto], cwd=directory, env=os.environ | settings, capture_output=True)
    assert again.returncode == 0 and b"up to date" in again.stderr


def test_one_file_and_one_registry_line_suffice(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (line,) = (content for title, content in blocks("text") if not title)
    monkeypatch.setattr(sources, "__path__", [*sources.__path__, str(directory)])
    monkeypatch.setattr(registry, "_FORMATS", registry._FORMATS | ast.literal_eval("{" + line + "}"))
    report = pack(directory / "photos", tmp_path / "out", val=0, test=0, progress=False)
    assert str(report) == dict(blocks("text"))["output"].rstrip()
