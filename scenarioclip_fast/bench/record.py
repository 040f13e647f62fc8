"""A record: machine, and per benchmark file the command, the commit and every sample.

What reports read of a benchmark's `extra_info` (all optional; anything else is shown as it is):

| field | meaning |
|---|---|
| form | the way that was measured; left out: the parameter `way`, else the test's name. Ours begin with "ours" |
| scenes | scenes of one sample; where all forms of a group say so, times are per scene, and scenes/s are shown |
| views | image views of one sample, likewise |
| bytes, operations | what one sample must move, and compute: with both it stands in the roofline |
| precision | of its products: float32, tf32 or bfloat16; left out: float32 |
| threads | CPU threads that it ran on; a roofline takes the ceilings measured on as many |
| device | cpu or cuda; left out: the record's |
| ceiling | "copy" or "product": this measures a ceiling of the roofline |
| device_seconds | the samples by device events, taken in place of the host's clock |

The group names the inputs; forms of one group are compared with one another.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scenarioclip_fast.errors import UserError

FORMAT = 1
FILE = "record.json"
NOT_MEASURED = "not yet measured"


@dataclass(frozen=True)
class Result:
    """One benchmark's samples, in seconds."""

    name: str
    group: str
    form: str
    samples: list[float]
    clock: str = "host"  # or device: events on its stream
    extra: dict[str, Any] = field(default_factory=dict)
    took: float = 0.0  # checks, warm-up and all

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def ours(self) -> bool:
        return self.form.startswith("ours")

    def per(self, unit: str) -> float:
        """Median seconds for one `unit` ("call", "scene" or "view")."""
        return self.median / float(self.extra.get(f"{unit}s", 1))


def unit_of(results: Sequence[Result]) -> str:
    """What the times of a group are given for: forms may differ in how much they do in a sample."""
    return next((unit for unit in ("scene", "view") if all(f"{unit}s" in r.extra for r in results)), "call")


@dataclass(frozen=True)
class Absent:
    """A benchmark without a time, and why: it failed, or something that it needs is not here."""

    name: str
    reason: str


@dataclass(frozen=True)
class Part:
    """One benchmark file's run.

    exit: pytest's code, or None if it was stopped at its limit.
    start_up: seconds until its cases were collected; None where that was not measured.
    """

    name: str
    command: str
    commit: str
    started: str  # ISO 8601
    seconds: float
    exit: int | None
    before: dict[str, Any]
    after: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    left_out: list[Absent] = field(default_factory=list)
    failed: list[Absent] = field(default_factory=list)
    note: str = ""
    start_up: float | None = None

    @property
    def ok(self) -> bool:
        return self.exit == 0 and not self.failed

    def groups(self) -> dict[str, list[Result]]:
        out: dict[str, list[Result]] = {}
        for result in self.results:
            out.setdefault(result.group, []).append(result)
        return out


@dataclass(frozen=True)
class Record:
    """Everything measured on one machine."""

    machine: dict[str, Any]
    parts: list[Part] = field(default_factory=list)
    name: str = ""  # the directory's, not stored

    @property
    def kind(self) -> str:
        return str(self.machine["kind"])

    @property
    def latest(self) -> str:
        """When its newest part was started, ISO 8601."""
        return max((part.started for part in self.parts), default="")

    @property
    def date(self) -> str:
        return self.latest[:10]

    def results(self) -> Iterator[Result]:
        for part in self.parts:
            yield from part.results

    def with_part(self, part: Part) -> Record:
        """The same with this part in the place of an older one of its name."""
        names = [p.name for p in self.parts]
        if part.name not in names:
            return Record(self.machine, [*self.parts, part], self.name)
        return Record(self.machine, [part if p.name == part.name else p for p in self.parts], self.name)

    def write(self, directory: Path) -> Path:
        """Writes DIRECTORY/record.json, whole or not at all."""
        directory.mkdir(parents=True, exist_ok=True)
        content = {"format": FORMAT, "machine": self.machine, "parts": [asdict(part) for part in self.parts]}
        text = json.dumps(content, indent=1)
        text = re.sub(r"\[\s+([-\d.e,\s]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)  # samples in a line
        path = directory / FILE
        partial = path.with_suffix(".partial")
        partial.write_text(text + "\n", encoding="utf-8")
        os.replace(partial, path)
        return path


def read_record(path: str | Path) -> Record:
    """Reads a record's directory or its record.json. Raises UserError for anything else."""
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{path}: no record here, expected a directory that holds {FILE}, or that file")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise UserError(f"{file}: got format {content['format']!r}, expected {FORMAT}: made by another version")
        machine = content["machine"]
        if not isinstance(machine["versions"], dict) or not {"kind", "device"} <= machine.keys():
            raise ValueError("machine: expected kind, device and versions")
        return Record(machine, [_part(p) for p in content["parts"]], file.resolve().parent.name)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: not a record ({type(error).__name__}: {error})") from error


def _part(content: dict[str, Any]) -> Part:
    if not all(isinstance(content[key], str) for key in ("name", "command", "commit", "started", "note")):
        raise ValueError("a part's name, command, commit, start or note is no text")
    if not content["name"] or Path(content["name"]).name != content["name"]:
        raise ValueError(f"part: got the name {content['name']!r}, expected one that a picture's file can have")
    if not all(isinstance(content[key], dict) for key in ("before", "after")):
        raise ValueError(f"part {content['name']}: before or after is no mapping")
    lists = {
        "results": [_result(r) for r in content["results"]],
        "left_out": [Absent(**a) for a in content["left_out"]],
        "failed": [Absent(**a) for a in content["failed"]],
    }
    return Part(**{**content, **lists})


def _result(content: dict[str, Any]) -> Result:
    result = Result(**content)
    if not all(isinstance(text, str) for text in (result.name, result.group, result.form)):
        raise ValueError(f"result: got name, group and form {result.name!r}, {result.group!r}, {result.form!r}")
    if not all(0 <= sample < math.inf for sample in result.samples) or not result.median > 0:
        raise ValueError(f"{result.name}: expected samples in seconds, their median above 0")
    for field_ in ("scenes", "views", "bytes", "operations"):
        amount = result.extra.get(field_, 1)
        if not (amount > 0 or (field_ == "operations" and amount == 0)):  # a copy has none
            raise ValueError(f"{result.name}: {field_}: got {amount!r}, expected a number above 0")
    if (kind := result.extra.get("ceiling")) and ("bytes" if kind == "copy" else "operations") not in result.extra:
        raise ValueError(f"{result.name}: a ceiling without its amount")
    return result
