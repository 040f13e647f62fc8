"""A log file of unusable scenes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from scenarioclip_fast.data.shards import BadSample
from scenarioclip_fast.terminal import get_logger

_log = get_logger(__name__)


class BadSampleLog:
    """Append bad samples to a file, one JSON object per line. Pass it as `on_bad` to a loader.

    If the file cannot be written, e.g. on a full disk, the records are logged as a warning and the run continues.

    Args:
        path: the file; created, with its directory, when the first record is written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __call__(self, epoch: int, samples: Sequence[BadSample]) -> None:
        records = [
            {"epoch": epoch, "key": bad.key, "reason": bad.reason, "detail": bad.detail}
            | ({} if bad.source is None else {"source": bad.source})
            for bad in samples
        ]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:
            lost = ", ".join(lines.splitlines())
            _log.warning("cannot write %s: %s; lost records: [%s]", self.path, error, lost)
