"""Read the metrics, configs and evaluation results of run directories, finished or still training."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scenarioclip_fast.config_parse import read_yaml
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.eval.negatives import CHANCE, KINDS
from scenarioclip_fast.eval.tables import TASKS
from scenarioclip_fast.eval.zeroshot import ZeroShotResult
from scenarioclip_fast.model.config import flat
from scenarioclip_fast.parsing import are_numbers, parse_json
from scenarioclip_fast.progress import progress
from scenarioclip_fast.train.metrics import read_metrics

METRICS, CONFIG, RESULT = "metrics.jsonl", "config.yaml", "zeroshot.json"
PROBE = "Linear probe"
Scores = dict[str, tuple[float, float]]  # label -> accuracy or recall, and its chance level, both in [0, 1]


@dataclass(frozen=True)
class Run:
    """The current contents of a run directory.

    Attributes:
        name: label in tables and figures.
        directory: the run directory.
        rows: rows of metrics.jsonl.
        config: dotted key -> value, as in config.yaml.
        results: file stem -> zero-shot result, from the JSON files in the directory.
        other_results: title -> scores of other evaluations, from the JSON files in the directory.
        skipped: title -> number of scenes skipped by the evaluation, if any.
        finished: whether training is complete.
        idle: seconds since the last logged step.
    """

    name: str
    directory: Path
    rows: list[dict[str, Any]]
    config: dict[str, Any]
    results: dict[str, ZeroShotResult] = field(default_factory=dict)
    other_results: dict[str, Scores] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    finished: bool = False
    idle: float = 0.0

    @property
    def state(self) -> str:
        """Progress: "finished", or "step 30 of 200, 2 min ago"."""
        if self.finished:
            return "finished"
        if not self.rows:
            return "no steps yet"
        total = self.config.get("train.steps")  # None if the budget is in epochs or views
        of_total = f" of {total:,}" if isinstance(total, int) else ""
        unit, seconds = next((u, s) for u, s in (("h", 3600), ("min", 60), ("s", 1)) if self.idle >= s or s == 1)
        return f"step {self.rows[-1]['step']:,}{of_total}, {self.idle / seconds:.0f} {unit} ago"


def find_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Read run directories. A directory of runs (of an ablation or a demo) is replaced by the runs in it.

    Raises:
        UserError: a path does not exist or contains no runs, or a file is damaged.
    """
    directories: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            problem = "is a file" if path.exists() else "does not exist"
            raise UserError(f"{path} {problem}; expected a run directory")
        found = [path] if _is_run(path) else sorted(p for p in path.iterdir() if _is_run(p))
        if not found:
            raise UserError(f"{path} contains no runs: expected {METRICS} in it or in its subdirectories")
        directories += found
    directories = list(dict.fromkeys(d.resolve() for d in directories))
    named = list(zip(directories, _names(directories), strict=True))
    return [read_run(d, name) for d, name in progress(named, desc="reading", unit="runs")]


def read_run(directory: Path, name: str) -> Run:
    """Read one run directory.

    Raises:
        UserError: a file is damaged or cannot be read.
    """
    path = directory / METRICS
    try:
        rows = [row for row in read_metrics(path) if isinstance(row.get("views"), int)]
        if not rows and b"\n" in path.read_bytes():
            raise UserError(f"{path}: not the metrics of a run: no line has a step and its number of views")
        idle = time.time() - path.stat().st_mtime
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    finished = (directory / "model" / "model.safetensors").is_file()
    return Run(name, directory, rows, _read_config(directory / CONFIG), *_read_results(directory), finished, idle)


def zeroshot_title(stem: str) -> str:
    """The title for the zero-shot result in STEM.json."""
    return "Zero-shot accuracy" if stem == Path(RESULT).stem else f"Zero-shot accuracy, {stem}"


def _is_run(directory: Path) -> bool:
    return (directory / METRICS).is_file()


def _names(directories: Sequence[Path]) -> list[str]:
    """The shortest path suffixes that are distinct."""
    for parts in range(1, max((len(d.parts) for d in directories), default=1) + 1):
        names = [os.sep.join(d.parts[-parts:]) for d in directories]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("directories are distinct")


def _read_config(path: Path) -> dict[str, Any]:
    return flat(read_yaml(path)) if path.is_file() else {}


def _read_results(directory: Path) -> tuple[dict[str, ZeroShotResult], dict[str, Scores], dict[str, int]]:
    results: dict[str, ZeroShotResult] = {}
    other_results: dict[str, Scores] = {}
    skipped: dict[str, int] = {}
    for path in sorted(directory.glob("*.json")):
        try:
            data = parse_json(path.read_bytes())
            count = int(data.get("skipped", {"count": 0})["count"])
            if "match" in data["rows"][0]:
                results[path.stem] = ZeroShotResult.from_dict(data)
                title = zeroshot_title(path.stem)
            elif scores := _scores(data):
                if not are_numbers(*(number for pair in scores[1].values() for number in pair)):
                    continue
                title = f"{scores[0]}, {data['split']} split"
                other_results[title] = scores[1]
            else:
                continue
        except (ValueError, LookupError, TypeError, AttributeError):
            continue  # JSON of another kind
        if count:
            skipped[title] = count
    return results, other_results, skipped


def _scores(data: Mapping[str, Any]) -> tuple[str, Scores] | None:
    """The title and scores of an evaluation other than zero-shot; None for other JSON files."""
    rows = data["rows"]
    if "recall" in rows[0]:
        found = {
            f"{TASKS[row['level']]}, {row['direction'].replace('_', ' ')}, R@{k}": (recall, row["chance"][k])
            for row in rows
            for k, recall in row["recall"].items()
        }
        return "Retrieval", found
    if "baseline" in rows[0]:  # shown in place of chance
        found = {
            f"{TASKS[row['level']]}, top-{k}": (row["top"][k], row["baseline"][k]) for row in rows for k in row["top"]
        }
        return PROBE, found
    if "questions" in rows[0]:
        return "Hard negatives", {KINDS[row["kind"]]: (row["accuracy"], CHANCE) for row in rows}
    return None
