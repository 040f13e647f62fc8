"""Lazy package attributes (PEP 562): a submodule is imported when one of its names is first used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def attach(
    package: str, exports: Mapping[str, Sequence[str]], modules: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the `__getattr__` and `__dir__` of `package`.

    Type checkers need the same names imported under TYPE_CHECKING:

        if TYPE_CHECKING:
            from package.circle import area
        else:
            __getattr__, __dir__ = attach(__name__, {"circle": ["area"]})

    Args:
        package: its `__name__`.
        exports: submodule -> the names that the package re-exports from it; none may be the name of a
            submodule, whose import would replace it.
        modules: submodules that are themselves public attributes of the package.
    """
    origin = {name: submodule for submodule, names in exports.items() for name in names}

    def load(name: str) -> Any:
        if name in modules:
            return importlib.import_module(f"{package}.{name}")
        if name not in origin:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{origin[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *origin, *modules})

    return load, names
