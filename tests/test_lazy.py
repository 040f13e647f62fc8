"""Lazy attributes: public names load, unknown ones raise, and importing a package imports nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

PACKAGES = ["", ".data", ".data.sources", ".eval", ".model", ".ops", ".report", ".train"]


@pytest.mark.parametrize("name", PACKAGES)
def test_every_public_name_loads(name: str) -> None:
    package = import_module(f"scenarioclip_fast{name}")
    for public in package.__all__:
        assert public in dir(package)
        assert getattr(package, public) is getattr(package, public)
    with pytest.raises(AttributeError, match=f"'scenarioclip_fast{name}' has no attribute 'no_such_name'"):
        _ = package.no_such_name


def test_a_function_replaces_the_submodule_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes" / "area.py").write_text("def area(): return 4\n")
    (tmp_path / "shapes" / "__init__.py").write_text(
        "from scenarioclip_fast.lazy import attach\n__getattr__, __dir__ = attach(__name__, {'area': ['area']})\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    from shapes import area  # type: ignore[import-not-found]

    assert area() == 4
    assert import_module("shapes").area is area


def test_importing_the_packages_imports_nothing_heavy() -> None:
    code = (
        f"import sys\nfor name in {PACKAGES}: __import__('scenarioclip_fast' + name)\n"
        "print(*{'torch', 'numpy', 'matplotlib', 'yaml', 'PIL'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
