"""Lazy attributes: public names load, unknown ones raise, and importing a package imports nothing heavy."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from importlib import import_module
from inspect import ismodule

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


@pytest.mark.parametrize("name", PACKAGES)
def test_no_public_name_is_replaced_by_a_submodule(name: str) -> None:
    package = import_module(f"scenarioclip_fast{name}")
    submodules = {module.name for module in pkgutil.iter_modules(package.__path__)}
    assert [public for public in submodules & {*package.__all__} if not ismodule(getattr(package, public))] == []


def test_importing_the_packages_imports_nothing_heavy() -> None:
    code = (
        f"import sys\nfor name in {PACKAGES}: __import__('scenarioclip_fast' + name)\n"
        "print(*{'torch', 'numpy', 'matplotlib', 'yaml', 'PIL'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
