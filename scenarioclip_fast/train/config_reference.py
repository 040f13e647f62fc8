"""Document every key of a config: of TrainConfig, for `train --help` and the documentation (docs/build.py), or another.

    python -m scenarioclip_fast.train.config_reference  # prints the Markdown page

Types and defaults come from the dataclasses; meanings are the strings below their fields, which documentation tools
and editors also show. Does not import torch.
"""

from __future__ import annotations

import ast
import inspect
import shutil
import textwrap
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from scenarioclip_fast.config_parse import ALIASES
from scenarioclip_fast.config_types import to_yaml_text
from scenarioclip_fast.model.config import PRESETS, ModelConfig, flat
from scenarioclip_fast.terminal import echo
from scenarioclip_fast.train.config import PRESET_KEY, TrainConfig

_PRESET_MEANING = "Base architecture, which the other model keys modify."
_INTRODUCTION = """\
# Configuration

`scenarioclip-fast train -c FILE [KEY=VALUE ...]` reads a YAML file with the sections below; all keys are optional
except `data.shards` and one of `train.steps`, `train.epochs` and `train.views`. `KEY=VALUE` arguments, such as
`optim.lr=1e-4`, take precedence over the file; a budget among them replaces the file's budget.
`train --print-config` prints the resulting config, and `train --help` this reference. The files in `configs/` are
ready to use.
"""


@dataclass(frozen=True)
class Key:
    """One key: its dotted name, its type and default in YAML notation, and its meaning ("" if undocumented)."""

    name: str
    type: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Section:
    """The keys of one dataclass, and its description."""

    name: str
    description: str
    keys: tuple[Key, ...]


def sections(config: Any = None) -> list[Section]:
    """Return all sections of a config (default: TrainConfig) in its order, nested ones after their parent."""
    return list(_sections("", TrainConfig() if config is None else config))


def meanings(cls: Any) -> dict[str, str]:
    """Map each documented field of `cls` and its base dataclasses to the string literal below it."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if "__dataclass_fields__" not in vars(base):
            continue
        try:
            source = inspect.getsource(base)
        except OSError:  # installed without sources
            continue
        definition = ast.parse(textwrap.dedent(source)).body[0]
        assert isinstance(definition, ast.ClassDef)
        for statement, following in zip(definition.body, definition.body[1:], strict=False):
            match statement, following:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = " ".join(text.split())
    return found


def text(width: int | None = None) -> str:
    """Format the reference for a terminal of `width` columns (default: the current width)."""
    width = min(width or shutil.get_terminal_size().columns, 120)
    all_sections = sections()
    columns = [max(len(getattr(key, column)) for s in all_sections for key in s.keys) for column in ("name", "type")]
    lines: list[str] = []
    for section in all_sections:
        lines += ["", *textwrap.wrap(f"{section.name}: {section.description}", width, subsequent_indent="  ")]
        for key in section.keys:
            lines.append(f"  {key.name:<{columns[0]}}  {key.type:<{columns[1]}}  {key.default}".rstrip())
            lines += textwrap.wrap(key.meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    heading = f"  {'key':<{columns[0]}}  {'type':<{columns[1]}}  default"
    return "\n".join(["config keys:", heading, *lines])


def tables(found: Iterable[Section], heading: str = "##") -> list[str]:
    """Format sections as Markdown: for each, the lines of a heading, the description and a table of the keys."""
    lines: list[str] = []
    for section in found:
        lines += [
            f"{heading} {section.name}\n",
            f"{section.description}\n",
            "| key | type | default | meaning |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| `{key.name}` | {_cell(key.type)} | `{key.default}` | {_cell(key.meaning)} |" for key in section.keys
        ]
        lines.append("")
    return lines


def markdown() -> str:
    """Format the reference as a Markdown page."""
    parts = [_INTRODUCTION, *tables(sections())]
    presets = {name: flat(ModelConfig.preset(name).to_dict()) for name in PRESETS}
    parts += [
        "## Presets\n",
        f"Values that `{PRESET_KEY}` sets; keys set explicitly take precedence.\n",
        f"| key | {' | '.join(f'`{name}`' for name in PRESETS)} |",
        f"|---|{'---|' * len(PRESETS)}",
    ]
    for key in presets[PRESETS[0]]:
        values = [to_yaml_text(preset[key]) for preset in presets.values()]
        if len(set(values)) > 1:
            parts.append(f"| `model.{key}` | {' | '.join(f'`{value}`' for value in values)} |")
    parts += [
        "",
        "## Names in other trainers\n",
        "An error for one of these names suggests the key of this package.\n",
        "| other trainer | this package |",
        "|---|---|",
    ]
    parts += [f"| `{alias}` | `{key}` |" for alias, key in ALIASES.items()]
    return "\n".join(parts) + "\n"


def _sections(prefix: str, config: Any) -> Iterator[Section]:
    cls = type(config)
    hints = get_type_hints(cls)
    documented = meanings(cls)
    keys: list[Key] = []
    nested: list[Section] = []
    for f in fields(cls):
        name, value = prefix + f.name, getattr(config, f.name)
        if is_dataclass(hints[f.name]):
            nested += _sections(f"{name}.", value)
        else:
            keys.append(Key(name, type_name(hints[f.name]), to_yaml_text(value), documented.get(f.name, "")))
    if PRESET_KEY.startswith(prefix) and "." not in PRESET_KEY.removeprefix(prefix):
        keys.insert(0, Key(PRESET_KEY, type_name(Literal[PRESETS]), PRESETS[0], _PRESET_MEANING))
    if keys:
        yield Section(prefix.rstrip("."), _first_paragraph(cls), tuple(keys))
    yield from nested


def type_name(hint: Any) -> str:
    """Format a type for YAML users: "int", "float | null", "[int, int]", or the allowed values."""
    if hint is type(None):
        return "null"
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " | ".join(map(to_yaml_text, inner))
    if origin in (Union, types.UnionType):
        return " | ".join(map(type_name, inner))
    if origin is tuple and inner[-1] is Ellipsis:
        return f"[{type_name(inner[0])}, ...]"
    if is_dataclass(hint):
        return f"{{{', '.join(f'{name}: {type_name(t)}' for name, t in get_type_hints(hint).items())}}}"
    if origin is tuple:
        return f"[{', '.join(map(type_name, inner))}]"
    name: str = hint.__name__
    return name


def _first_paragraph(cls: type) -> str:
    return " ".join((inspect.getdoc(cls) or "").partition("\n\n")[0].split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    echo(markdown().rstrip("\n"), lines=True)
