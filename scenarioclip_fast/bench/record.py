"""The record format: the machine and, per benchmark file, the command, the commit and every sample.

Fields of a benchmark's `extra_info` that reports interpret (all optional; other fields are shown verbatim):

| field | meaning |
|---|---|
| form | the implementation (default: the parameter `form`, else the test's name); this package's start with "ours" |
| scenes | scenes per sample; if all forms of a group have it, times are per scene and scenes/s are shown |
| views | image views per sample; likewise |
| bytes, operations | minimum bytes moved and operations computed per sample; both are required for the roofline |
| precision | of its matrix products: float32, tf32 or bfloat16 (default: float32) |
| threads | CPU threads used; the roofline uses the ceilings measured with the same number |
| device | cpu or cuda (default: the record's) |
| ceiling | "copy" or "product": the benchmark measures a ceiling of the roofline |
| device_seconds | samples timed by device events; they replace the host's |

A group names the inputs; the forms of a group are compared with one another.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import replacing
from scenarioclip_fast.parsing import are_numbers, parse_json
from scenarioclip_fast.terminal import short

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
    clock: str = "host"  # or "device": timed by device events
    extra: dict[str, Any] = field(default_factory=dict)
    took: float = 0.0  # seconds including checks and warm-up

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
    """The unit of a group's times. Forms may process different amounts per sample."""
    return next((unit for unit in ("scene", "view") if all(f"{unit}s" in r.extra for r in results)), "call")


@dataclass(frozen=True)
class Unmeasured:
    """A benchmark without a time: it failed, or was skipped because a requirement is missing."""

    name: str
    reason: str


@dataclass(frozen=True)
class Part:
    """The run of one benchmark file.

    Attributes:
        exit: pytest's exit code, or None if the run was stopped at its time limit.
        start_up: seconds until the cases were collected; None if not measured.
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
    left_out: list[Unmeasured] = field(default_factory=list)
    failed: list[Unmeasured] = field(default_factory=list)
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
    name: str = ""  # of the directory; not stored

    @property
    def kind(self) -> str:
        return str(self.machine["kind"])

    @property
    def latest(self) -> str:
        """Start time of the newest part, ISO 8601."""
        return max((part.started for part in self.parts), default="")

    @property
    def date(self) -> str:
        return self.latest[:10]

    def results(self) -> Iterator[Result]:
        for part in self.parts:
            yield from part.results

    def with_part(self, part: Part) -> Record:
        """This record with `part` added, replacing an older part of the same name."""
        names = [p.name for p in self.parts]
        if part.name not in names:
            return Record(self.machine, [*self.parts, part], self.name)
        return Record(self.machine, [part if p.name == part.name else p for p in self.parts], self.name)

    def write(self, directory: Path) -> Path:
        """Write DIRECTORY/record.json atomically."""
        directory.mkdir(parents=True, exist_ok=True)
        content = {"format": FORMAT, "machine": self.machine, "parts": [asdict(part) for part in self.parts]}
        text = json.dumps(content, indent=1)
        text = re.sub(
            r"\[\s+([-\d.e,\s]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text
        )  # one line per list of samples
        path = directory / FILE
        with replacing(path) as partial:
            partial.write_text(text + "\n", encoding="utf-8")
        return path


def read_record(path: str | Path) -> Record:
    """Read a record from its directory or its record.json.

    Raises:
        UserError: `path` is not a record, or its format is of another version.
    """
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{path}: no record here, expected a directory that holds {FILE}, or that file")
    try:
        content = parse_json(file.read_bytes())
        if content["format"] != FORMAT:
            raise UserError(
                f"{file}: got format {short(content['format'])}, expected {FORMAT}: made by another version"
            )
        machine = content["machine"]
        if not isinstance(machine["versions"], dict) or not {"kind", "device"} <= machine.keys():
            raise ValueError("machine: expected kind, device and versions")
        return Record(machine, [_part(p) for p in content["parts"]], file.resolve().parent.name)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: not a record ({type(error).__name__}: {error})") from error


def _part(content: dict[str, Any]) -> Part:
    if not all(isinstance(content[key], str) for key in ("name", "command", "commit", "started", "note")):
        raise ValueError("a part's name, command, commit, start or note is not a string")
    if not are_numbers(content["seconds"]) or not isinstance(content["exit"], int | None):
        raise ValueError(f"part {content['name']}: seconds or exit is not a number")
    if not content["name"] or Path(content["name"]).name != content["name"]:
        raise ValueError(f"part: got the name {content['name']!r}, expected a valid file name")
    if not all(isinstance(content[key], dict) for key in ("before", "after")):
        raise ValueError(f"part {content['name']}: before or after is not a mapping")
    lists = {
        "results": [_result(r) for r in content["results"]],
        "left_out": [_unmeasured(a) for a in content["left_out"]],
        "failed": [_unmeasured(a) for a in content["failed"]],
    }
    return Part(**{**content, **lists})


def _unmeasured(content: dict[str, Any]) -> Unmeasured:
    if not all(isinstance(text, str) for text in content.values()):
        raise ValueError("a benchmark that was not measured: expected texts")
    return Unmeasured(**content)


def _result(content: dict[str, Any]) -> Result:
    result = Result(**content)
    if not all(isinstance(text, str) for text in (result.name, result.group, result.form)):
        raise ValueError(f"result: got name, group and form {result.name!r}, {result.group!r}, {result.form!r}")
    if not all(0 <= sample < math.inf for sample in result.samples) or not result.median > 0:
        raise ValueError(f"{result.name}: expected samples in seconds, their median above 0")
    for field_ in ("scenes", "views", "bytes", "operations"):
        amount = result.extra.get(field_, 1)
        if not (amount > 0 or (field_ == "operations" and amount == 0)):  # a copy computes nothing
            raise ValueError(f"{result.name}: {field_}: got {amount!r}, expected a number above 0")
    if (kind := result.extra.get("ceiling")) and ("bytes" if kind == "copy" else "operations") not in result.extra:
        raise ValueError(f"{result.name}: ceiling without bytes or operations")
    return result
