"""Types of command line arguments that several commands have."""

from __future__ import annotations

import argparse
from pathlib import Path

from scenarioclip_fast.files import is_url


def output_path(text: str) -> Path:
    """A local path. `Path` would take a URL for a relative one."""
    if is_url(text):
        raise argparse.ArgumentTypeError(f"got the URL {text}, expected a path: only `pack` writes to URLs")
    return Path(text)
