"""Names of a package that load their submodule when first used, so that importing the package costs nothing."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def attach(
    package: str, homes: Mapping[str, Sequence[str]], modules: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of `package` (PEP 562).

    A package calls it where type checkers do not look, and imports the same names under TYPE_CHECKING:

        if TYPE_CHECKING:
            from package.circle import area
        else:
            __getattr__, __dir__ = attach(__name__, {"circle": ["area"]})

    Args:
        package: its `__name__`.
        homes: submodule -> the names that it gives to the package.
        modules: submodules that are names of the package themselves.
    """
    home = {name: submodule for submodule, names in homes.items() for name in names}

    def load(name: str) -> Any:
        if name in modules:
            return importlib.import_module(f"{package}.{name}")
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{home[name]}"), name)
        # Set last: importing a submodule has just set its own name, which may be that of its function.
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home, *modules})

    return load, names
