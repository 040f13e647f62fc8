"""Records of a stage: one file of JSON lines per unit of work, appended to while the unit is in progress.

    DIR/STAGE/000000.jsonl           a finished unit: a header, then one record per image, in the order of the list
    DIR/STAGE/000001.jsonl.partial   a unit in progress: the same, in the order in which the images were finished
    DIR/STAGE/000001.jsonl.partial-ID  the same, of one of several processes that may process the unit at once

A record is {"key", "result"} or {"key", "rejected": {"reason", "detail", "retry"}}. The header holds a hash of what the
unit depends on: the settings of the stage, and the finished files of the stages before. A file with another hash is not
used, so that a unit is computed anew when anything before it changed. A finished file depends only on its inputs, not
on the order of the images or on interruptions.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from scenarioclip_fast.checksums import file_digest
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import Directory, naming, open_regular, read_regular, replacing
from scenarioclip_fast.generate.stages import Outcome
from scenarioclip_fast.parsing import parse_json
from scenarioclip_fast.terminal import short

# In texts, quotes are escaped.
_RETRY = b'"retry":true'
_REJECTED, _NONE_REJECTED = b'"rejected":', b'"rejected":[]'
_MALFORMED = (AttributeError, KeyError, TypeError, ValueError)
KEPT = re.compile(rb'\{"key":"([\w-]+)","result":')
"""How the line of an image that was not rejected starts; keys are ASCII without quotes, see `check.safe_key`."""

_NAME = re.compile(r"\d{6}\.jsonl(\.partial(-[0-9a-f]+)?)?|\.\d{6}\.jsonl[^/]*\.[0-9a-f]{32}\.partial")


def _dump(record: Any) -> bytes:
    return json.dumps(record, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"


class UnitFile:
    """The records of one unit of a stage.

    Args:
        directory: of the stage.
        unit: number of the unit.
        inputs: hash of what the unit depends on.
        keys: of the unit's images that reach this stage, in order.
        attempt: hexadecimal id of this process where others may process the unit at the same time: each appends to a
            file of its own, and the first to finish wins.

    Attributes:
        has_results: whether an image was finished, and not rejected, before `resume`.
    """

    def __init__(self, directory: Path, unit: int, inputs: str, keys: Sequence[str], attempt: str = "") -> None:
        self.path = directory / f"{unit:06d}.jsonl"
        self.partial = self.path.with_name(f"{self.path.name}.partial{attempt and f'-{attempt}'}")
        self._inputs = inputs
        self._header = {"unit": unit, "inputs": inputs}
        self._keys = list(keys)
        self._finished: set[str] = set()
        self.has_results = False
        self._file: IO[bytes] | None = None

    def _partials(self) -> list[Path]:
        """The files in progress, also of other processes, living or killed."""
        return sorted(self.path.parent.glob(f"{self.path.name}.partial*"))

    def found(self, *, retried: bool = False) -> dict[str, Outcome]:
        """The outcomes so far with the same inputs, by key and in order.

        Args:
            retried: include those that are to be tried again.
        """
        kept: dict[str, Outcome] = {}
        for path in (self.path, *self._partials()):
            try:
                header, records = read_unit(path, complete=path == self.path)
            except FileNotFoundError:  # another process finished the unit
                continue
            if header == self._header:
                kept |= {r.key: r for r in records if retried or not r.retry}
        return {key: kept[key] for key in self._keys if key in kept}

    def resume(self) -> list[str]:
        """Prepare to append, and return the keys of the images that are not finished, in order."""
        kept = self.found()
        self.has_results = any(not r.reason for r in kept.values())
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.partial) as new:  # drops the damaged end of a killed run
            self.close()
            self._file = open(new, "xb", buffering=0)  # noqa: SIM115
            lines = [_dump(self._header), *(_dump(_to_json(r)) for r in kept.values())]
            _write(self._file, b"".join(lines), self.partial)
        self._finished = set(kept)
        return [key for key in self._keys if key not in self._finished]

    def append(self, outcome: Outcome) -> bool:
        """Append an outcome in one write; True if it was the last one of the unit."""
        if outcome.key not in self._finished:
            assert self._file is not None, "append after resume"
            _write(self._file, _dump(_to_json(outcome)), self.partial)
            self._finished.add(outcome.key)
        return len(self._finished) == len(self._keys)

    def finish(self) -> None:
        """Replace the partial files by the finished one, unless another process has finished the unit meanwhile.

        Its file stays then: later stages may have read it.
        """
        self.close()
        if not is_finished(self.path, self._inputs):
            try:
                found = {r.key: r for r in read_unit(self.partial)[1]}
            except FileNotFoundError:
                # Another process may have finished it, with images that are to be tried again.
                if is_finished(self.path, self._inputs, retried=True):
                    return
                raise
            with replacing(self.path) as new, new.open("xb") as file:
                file.write(_dump(self._header))
                file.writelines(_dump(_to_json(found[key])) for key in self._keys)
                file.flush()
                os.fsync(file.fileno())
        for path in self._partials():
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file in progress."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _write(file: IO[bytes], data: bytes, path: Path) -> None:
    """Write to an unbuffered file; a full disk takes a part without an error."""
    with naming(path):
        if file.write(data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _to_json(outcome: Outcome) -> dict[str, Any]:
    if not outcome.reason:
        return {"key": outcome.key, "result": outcome.result}
    retry = {"retry": True} if outcome.retry else {}
    return {"key": outcome.key, "rejected": {"reason": outcome.reason, "detail": outcome.detail, **retry}}


def _from_json(record: Any) -> Outcome:
    if "result" in record:
        return Outcome(str(record["key"]), dict(record["result"]))
    rejected = record["rejected"]
    return Outcome(
        str(record["key"]), {}, str(rejected["reason"]), str(rejected["detail"]), bool(rejected.get("retry"))
    )


def read_unit(path: Path, *, complete: bool = False) -> tuple[dict[str, Any], list[Outcome]]:
    """Read the header and the outcomes of a file.

    Args:
        complete: raise an error for a damaged line; otherwise the file ends before it.

    Raises:
        UserError: a damaged line.
    """
    header: dict[str, Any] = {}
    found: list[Outcome] = []
    with open(path, "rb", opener=open_regular) as file:
        for number, line in enumerate(file, start=1):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("the line is cut off")
                record = parse_json(line)
                if number == 1:
                    header = dict(record)
                else:
                    found.append(_from_json(record))
            except _MALFORMED as error:
                if complete:
                    raise _damaged(path, number, line, error) from None
                break
    return header, found


def _damaged(path: Path, number: int, line: bytes, error: Exception) -> UserError:
    text = short(line.decode("utf-8", "replace"))
    return UserError(f"{path}: line {number} is damaged ({error}): {text}; remove the file")


def is_finished(path: Path, inputs: str, *, retried: bool = False) -> bool:
    """Whether a finished file exists, with these inputs and, unless `retried`, without images to be tried again."""
    try:
        data = read_regular(path)
    except FileNotFoundError:
        return False
    header = data.partition(b"\n")[0]
    return f'"inputs":"{inputs}"'.encode() in header and (retried or _RETRY not in data)


def results(path: Path) -> dict[str, Outcome]:
    """The outcomes of a finished file by key; empty if there is none."""
    return {r.key: r for r in read_unit(path, complete=True)[1]} if path.is_file() else {}


def has_results(path: Path) -> bool:
    """Whether a finished file has an image that was not rejected; the records are not parsed."""
    if not path.is_file():
        return False
    with open(path, "rb", opener=open_regular) as file:
        return any(KEPT.match(line) for line in file)


def rejections(path: Path) -> Iterator[Outcome]:
    """The outcomes of a finished file that were rejected, as a whole or in parts; the others are not parsed.

    Raises:
        UserError: a damaged line.
    """
    if not path.is_file():
        return
    with open(path, "rb", opener=open_regular) as file:
        for number, line in enumerate(file, start=1):
            if _REJECTED in line and _NONE_REJECTED not in line:
                try:
                    outcome = _from_json(parse_json(line))
                except _MALFORMED as error:
                    raise _damaged(path, number, line, error) from None
                yield outcome


def unit_files(directory: Path) -> list[Path]:
    """The finished files of a stage, in order."""
    return sorted(path for path in directory.glob("*.jsonl") if _NAME.fullmatch(path.name))


def all_outcomes(directory: Path) -> Iterator[Outcome]:
    """All outcomes of a stage's finished files, in order."""
    for path in unit_files(directory):
        yield from read_unit(path, complete=True)[1]


def content_hash(path: Path) -> str:
    """The SHA-256 of a finished file; of nothing if there is none."""
    return file_digest(path) if path.is_file() else hashlib.sha256().hexdigest()


def has_outcomes(directory: Path) -> bool:
    """Whether a directory has outcomes of a stage, in finished files or others."""
    if not directory.is_dir():
        return False
    for path in directory.iterdir():
        if _NAME.fullmatch(path.name) and path.is_file():
            with open(path, "rb", opener=open_regular) as file:
                if file.readline() and file.readline():
                    return True
    return False


def clear(directory: Path) -> None:
    """Remove the files of a stage; other files are kept."""
    if directory.is_dir():
        with Directory(directory.resolve()) as opened:  # it may be a link to another disk
            for name in opened.names():
                if _NAME.fullmatch(name):
                    opened.unlink(name)


def hash_of(parts: Iterable[Any]) -> str:
    """A hash of JSON values."""
    return hashlib.sha256(json.dumps(list(parts), sort_keys=True).encode()).hexdigest()
