"""Write the settings in docs/generation.md from the dataclasses of scenarioclip_fast/generate/config.py.

Run: python docs/settings.py
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scenarioclip_fast.generate.config import GenerateConfig  # noqa: E402
from scenarioclip_fast.train.config_reference import Section, sections, tables  # noqa: E402

PAGE = ROOT / "docs" / "generation.md"
MARK = "\\*"  # of settings on which no records depend
_BLOCK = re.compile(r"(?<=<!-- generated: settings -->\n).*?(?=<!-- end of generated: settings -->)", re.DOTALL)


def settings() -> Iterator[Section]:
    """The sections of the config, with MARK after the meaning of settings on which no records depend."""
    config = GenerateConfig()
    for section in sections(config):
        free = {f"{section.name}.{f.name}" for f in fields(getattr(config, section.name)) if f.metadata.get("run")}
        keys = [replace(key, meaning=f"{key.meaning} {MARK}") if key.name in free else key for key in section.keys]
        yield replace(section, keys=tuple(keys))


def rendered() -> str:
    """The page with the current settings between its markers."""
    text, count = _BLOCK.subn(lambda _: "\n" + "\n".join(tables(settings(), "###")), PAGE.read_text(encoding="utf-8"))
    assert count == 1, f"{PAGE}: {count} pairs of markers"
    return text


if __name__ == "__main__":
    PAGE.write_text(rendered(), encoding="utf-8")
