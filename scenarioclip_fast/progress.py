"""Progress of long-running work: a bar on a terminal, occasional plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TextIO, TypeVar

from scenarioclip_fast.requirements import require
from scenarioclip_fast.terminal import echo, printable, unguarded

T = TypeVar("T")

# About this many lines for a known total, and at most one per interval, to keep logs readable.
_LINES = 10
_INTERVAL_S = 10.0


def progress(
    iterable: Iterable[T],
    total: int | None = None,
    desc: str = "",
    unit: str = "it",
    *,
    file: TextIO | None = None,
) -> Iterator[T]:
    """Yield the items of `iterable` and report the progress.

    Args:
        total: number of items (default: `len(iterable)` if it has a length).
        desc: label before each report.
        unit: name of an item.
        file: output stream (default: standard error).
    """
    out = file or sys.stderr
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if out.isatty():
        yield from require("tqdm").tqdm(
            iterable, total=total, desc=printable(desc), unit=unit, file=unguarded(out), dynamic_ncols=True
        )
        return
    start = last = time.monotonic()
    done = 0
    step = max(1, (total or 0) // _LINES)
    for item in iterable:
        yield item
        done += 1
        now = time.monotonic()
        if done != total and now - last >= _INTERVAL_S and (total is None or done % step == 0 or now - last > 60):
            last = now
            echo(f"{desc}: {_count(done, total)} {unit}, {now - start:.0f} s", file=out)
    echo(f"{desc}: {_count(done, total)} {unit}, {time.monotonic() - start:.1f} s", file=out)


def _count(done: int, total: int | None) -> str:
    return f"{done}" if total is None else f"{done}/{total}"
