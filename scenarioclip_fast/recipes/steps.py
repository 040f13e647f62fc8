"""The steps of a demo: their output directory and their durations."""

from __future__ import annotations

import json
import os
import shutil
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import is_regular, kind_of, status_of, write_text
from scenarioclip_fast.terminal import warn


class StepTimer:
    """Logs each step of the pipeline and records its duration."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str, what: str) -> Iterator[None]:
        warn(f"[{len(self.seconds) + 1}/{self.steps}] {name}: {what}")
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def prepare_directory(out: Path, marker: str, folders: Sequence[str], options: Mapping[str, Any]) -> Path:
    """Create the output directory, or remove the folders of an earlier demo; nothing else is ever removed.

    Args:
        marker: name of a file that marks a directory that the demo may clear; holds `options`.

    Raises:
        UserError: the directory is not empty and was not written by this demo.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose a directory")
    if out.is_dir() and any(out.iterdir()) and not is_regular(out / marker):
        raise UserError(f"{out} is not empty and was not written by a demo: choose another directory with --out")
    out.mkdir(parents=True, exist_ok=True)
    earlier = [(out / folder, found) for folder in folders if (found := status_of(out / folder)) is not None]
    for path, found in earlier:
        if not stat.S_ISDIR(found.st_mode):
            raise UserError(
                f"{path}: got a {kind_of(found.st_mode)}, expected a directory of an earlier demo; move it away, or "
                "choose another directory with --out"
            )
    for path, _ in earlier:
        try:
            shutil.rmtree(path)  # follows no links
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be removed ({error.strerror})") from None
    write_text(out / marker, json.dumps(dict(options)) + "\n")
    return out


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0))
