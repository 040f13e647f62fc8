"""Build the documentation into build/site; every warning is an error.

Run: python docs/build.py (`make docs` does). Needs the extra `docs`, but neither torch nor a build of the package: the
API reference comes from static analysis of the sources. Neither the build nor its pages fetch anything from a network.
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCS, SITE = ROOT / "docs", ROOT / "build" / "site"
CONFIG = ROOT / "build" / "docs" / "configuration.md"
REFERENCE = "scenarioclip_fast.train.config_reference"
# `zensical build --strict` counts only its own warnings, not those of the API reference.
_WARNING = re.compile(r"^(griffe|mkdocstrings|mkdocs_autorefs|WARNING|ERROR)\b.*", re.MULTILINE)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# Resources that a browser would fetch from other sites; links to them are allowed.
_FETCHED = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"(?:https?:)?//[^\"]*|<link\b[^>]*\bhref=\"https?://[^\"]*"
)

_LINK = re.compile(r"<a\b[^>]*\bhref=\"(?![a-z]+:|//|/|#)(?P<path>[^\"#?]+)[^>]*>(?P<text>.*?)</a>", re.DOTALL)


def config_reference() -> str:
    """All config keys, from the dataclasses, without the heading, which docs/configuration.md has."""
    sys.path.insert(0, str(ROOT))
    return str(importlib.import_module(REFERENCE).markdown()).removeprefix("# Configuration\n")


def nav_pages(nav: list[Any]) -> Iterator[str]:
    """The pages of mkdocs.yml's `nav`, in order."""
    for entry in nav:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            if isinstance(value, str):
                yield value
            else:
                yield from nav_pages(value)


def nav_problems(nav: list[Any]) -> list[str]:
    """Pages of the navigation that do not exist, and pages that it lacks."""
    listed = list(nav_pages(nav))
    present = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    missing = [f"mkdocs.yml: nav: {page} does not exist" for page in listed if page not in present]
    return missing + [f"docs/{page}: not in the nav of mkdocs.yml" for page in sorted(present - set(listed))]


def undocumented_names() -> list[str]:
    """Public names that the page of their package lacks, because they have no docstring."""
    missing = []
    for page in sorted((DOCS / "api").glob("*.md")):
        built = SITE / "api" / f"{page.stem}.html"
        for package in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE):
            source = ROOT.joinpath(*package.split("."), "__init__.py")
            for statement in ast.parse(source.read_text(encoding="utf-8")).body if source.is_file() else []:
                if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
                    names = [f"{package}.{name}" for name in ast.literal_eval(statement.value)]
                    missing += [name for name in names if f'id="{name}"' not in built.read_text(encoding="utf-8")]
    return [f"{name}: public, but not in the API reference: it has no docstring" for name in missing]


def fetched_resources() -> list[str]:
    """Resources that the built pages would fetch from other sites."""
    pages = ((page, page.read_text(encoding="utf-8")) for page in sorted(SITE.rglob("*.html")))
    return [f"{page.relative_to(SITE)}: fetches {found}" for page, text in pages for found in _FETCHED.findall(text)]


def repair_links() -> list[str]:
    """Turn links to source files, which work on GitHub only, into text; return the dead links."""
    dead = []
    for page in sorted(SITE.rglob("*.html")):

        def repaired(link: re.Match[str], page: Path = page) -> str:
            target = (page.parent / unquote(link["path"])).resolve()
            if (target / "index.html").is_file() or target.is_file():
                return link[0]
            if target.is_relative_to(SITE.parent) and (ROOT / target.relative_to(SITE.parent)).exists():
                return link["text"]
            dead.append(f"{page.relative_to(SITE)}: dead link {link['path']}")
            return link[0]

        text = page.read_text(encoding="utf-8")
        if (new := _LINK.sub(repaired, text)) != text:
            page.write_text(new, encoding="utf-8")
    return dead


def main() -> int:
    CONFIG.parent.mkdir(parents=True, exist_ok=True)
    CONFIG.write_text(config_reference(), encoding="utf-8")
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    problems = nav_problems(config["nav"])
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    output = _COLOUR.sub("", done.stdout + done.stderr)
    print(output, end="")
    problems += [found[0] for found in _WARNING.finditer(output)]
    if done.returncode == 0:
        problems += undocumented_names() + fetched_resources() + repair_links()
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems or done.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
