"""Imports follow the "may import" table of CONTRIBUTING.md, without cycles."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "scenarioclip_fast"
ROOT_HELPERS = "root helpers"


def module_name(path: Path) -> str:
    """kernels/ is installed as scenarioclip_fast.kernels."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == PACKAGE else (PACKAGE, *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for folder in (PACKAGE, "kernels") for path in sorted((ROOT / folder).rglob("*.py"))}


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes below `node`, including function bodies, except those under TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and child in node.body:
            continue
        yield child
        yield from runtime_nodes(child)


def imports_of(name: str) -> set[str]:
    """Return the modules of this package that `name` imports."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in runtime_nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            # `from package import name`: a submodule or something that the package defines.
            found |= {full if (full := f"{source}.{alias.name}") in MODULES else source for alias in node.names}
    return (found & MODULES.keys()) - {name}


GRAPH = {name: imports_of(name) for name in MODULES}


def layer_of_path(path: str) -> str:
    """`scenarioclip_fast/ops/` is "ops", `scenarioclip_fast/losses.py` "losses", `kernels/<op>/` "kernels"."""
    return path.removeprefix(f"{PACKAGE}/").split("/")[0].removesuffix(".py")


def read_layers() -> dict[str, set[str]]:
    """Return layer -> the layers that it may import, in the order of the table.

    The paths of the package in the first column are layers, `scenarioclip_fast/*.py` the root helpers. The third column
    names layers in backticks, "root helpers" and "all of the above".
    """
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## Where things are")[2].partition("\n## ")[0]
    table: dict[str, set[str]] = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|") or len(cells) != 3:
            continue
        paths = [path for path in re.findall(r"`([^`]+)`", cells[0]) if path.startswith((f"{PACKAGE}/", "kernels/"))]
        may = set(re.findall(r"`(\w+)`", cells[2]))
        may |= {ROOT_HELPERS} if "root helpers" in cells[2] else set()
        may |= table.keys() if "all of the above" in cells[2] else set()
        for path in paths:
            name = ROOT_HELPERS if path == f"{PACKAGE}/*.py" else layer_of_path(path)
            table[name] = may | {name}
    return table


LAYERS = read_layers()


def layer_of(module: str) -> str:
    part = module.split(".")[1] if "." in module else ""
    return part if part in LAYERS else ROOT_HELPERS


def test_the_table_names_every_folder_in_order() -> None:
    """Every layer that a row may import is in a row above, so that imports go one way."""
    above: set[str] = set()
    for name, may in LAYERS.items():
        assert may <= above | {name}, f"{name} may import {sorted(may - above)}, which are not above it"
        above.add(name)
    folders = {path.parent.name for path in (ROOT / PACKAGE).glob("*/__init__.py")} - {"_native"}
    assert folders <= LAYERS.keys(), f"no row for {sorted(folders - LAYERS.keys())}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_up_the_table(name: str) -> None:
    may = LAYERS[layer_of(name)]
    bad = sorted(m for m in GRAPH[name] if layer_of(m) not in may)
    assert not bad, f"{name} may import {sorted(may)}, and imports {bad}"
    if name.startswith(f"{PACKAGE}.kernels."):
        folder = ".".join(name.split(".")[:3])
        assert all(m.startswith(folder) for m in GRAPH[name]), f"{name} imports the folder of another op"


def test_no_cycles() -> None:
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' <- '.join(error.args[1])}")
