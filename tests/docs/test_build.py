"""Checks that docs/build.py adds to those of Zensical. `make docs` runs the build."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """docs/build.py in a temporary repository with build/site, docs and a source file."""
    module = load(ROOT / "docs" / "build.py")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(module, "SITE", tmp_path / "build" / "site")
    for path in ("docs/index.md", "docs/lost.md", "src/file.py", "build/site/guide/index.html"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    return module


def test_links_to_source_files_become_text(build: ModuleType) -> None:
    page = build.SITE / "index.html"
    kept = '<a href="guide/">a</a> <a href="https://example.org/">b</a> <a class="x" href="#top">c</a> '
    page.write_text(kept + '<a class="y" href="../src/file.py#L1"><code>file</code></a> <a href="absent/">d</a>')
    assert build.repair_links() == ["index.html: dead link absent/"]
    assert page.read_text() == kept + '<code>file</code> <a href="absent/">d</a>'


def test_resources_of_other_sites_are_found(build: ModuleType) -> None:
    page = '<a href="https://example.org/">fine</a><script src="https://cdn.example.org/x.js"></script>'
    (build.SITE / "index.html").write_text(page)
    (found,) = build.fetched_resources()
    assert "cdn.example.org" in found


def test_public_names_must_be_documented(build: ModuleType) -> None:
    files = {
        "docs/api/index.md": "::: package\n\n::: package.module.function\n",
        "package/__init__.py": '__all__ = ["shown", "absent"]\n',
        "build/site/api/index.html": '<h2 id="package.shown">',
    }
    for path, text in files.items():
        (build.ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (build.ROOT / path).write_text(text)
    assert build.undocumented_names() == ["package.absent: public, but not in the API reference: it has no docstring"]


def test_nav_and_pages_must_agree(build: ModuleType) -> None:
    problems = build.nav_problems([{"Home": "index.md"}, {"Guide": [{"Gone": "gone.md"}]}])
    assert problems == ["mkdocs.yml: nav: gone.md does not exist", "docs/lost.md: not in the nav of mkdocs.yml"]


def test_generated_configuration_has_no_second_heading() -> None:
    assert not load(ROOT / "docs" / "build.py").config_reference().startswith("# ")


def test_names_that_share_a_description_are_split() -> None:
    pytest.importorskip("griffe")
    split = load(ROOT / "docs" / "griffe_arguments.py").split_arguments
    docstring = (
        "Do it.\n\nArgs:\n    a, b: both,\n        in two lines.\n    c: one, two: three.\n\nx, y: not an argument."
    )
    both = "both,\n        in two lines.\n"
    assert split(docstring) == docstring.replace(f"    a, b: {both}", f"    a: {both}    b: {both}")
