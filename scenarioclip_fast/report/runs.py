"""Runs on disk, read for comparison: what each logged, how it was configured and how it was evaluated.

A run may still be going: whatever it has written so far counts.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from scenarioclip_fast.data.vocabulary import LEVELS
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.eval.negatives import CHANCE, KINDS
from scenarioclip_fast.eval.tables import percent
from scenarioclip_fast.eval.zeroshot import TASKS, ZeroShotResult
from scenarioclip_fast.model.config import flat
from scenarioclip_fast.progress import progress
from scenarioclip_fast.report.curves import MATCH_TITLES, accuracy_comparison, run_curves
from scenarioclip_fast.report.page import Report, Section
from scenarioclip_fast.requirements import require
from scenarioclip_fast.train.metrics import read_metrics

METRICS, CONFIG, RESULT = "metrics.jsonl", "config.yaml", "zeroshot.json"
_NONE = "\u2013"
_PROBE = "Linear probe"
_PROBE_CHANCE = "Chance here: always naming the most frequent classes of the train split."
_BEST = "Bold: the best."
Shares = dict[str, tuple[float, float]]  # what is measured -> its share in [0, 1], and that of chance


@dataclass(frozen=True)
class Run:
    """One run's directory as it is now.

    Attributes:
        name: what tables and pictures call it.
        rows: of metrics.jsonl.
        config: dotted key -> value, as in config.yaml.
        results: zero-shot results among the JSON files of the directory, by the stem of their file.
        others: results of the other evaluations among them, by the name of the evaluation.
        left_out: how many scenes an evaluation could not use, by its name; those that could use all are not there.
        finished: it has trained to the end of its budget.
        idle: seconds since it logged its last step.
    """

    name: str
    directory: Path
    rows: list[dict[str, Any]]
    config: dict[str, Any]
    results: dict[str, ZeroShotResult] = field(default_factory=dict)
    others: dict[str, Shares] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    finished: bool = False
    idle: float = 0.0

    @property
    def state(self) -> str:
        """How far it is: "finished", or "step 30 of 200, 2 min ago"."""
        if self.finished:
            return "finished"
        if not self.rows:
            return "no step yet"
        total = self.config.get("train.steps")  # a budget of epochs or views does not say
        of = f" of {total:,}" if total else ""
        unit, seconds = next((u, s) for u, s in (("h", 3600), ("min", 60), ("s", 1)) if self.idle >= s or s == 1)
        return f"step {self.rows[-1]['step']:,}{of}, {self.idle / seconds:.0f} {unit} ago"


def find_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Reads runs. A directory that is no run, but holds some (an ablation's, a demo's), stands for those.

    Raises UserError for a path that is not there or holds no run, and for damaged files.
    """
    directories: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            problem = "is a file" if path.exists() else "does not exist"
            raise UserError(f"{path} {problem}; expected a run's directory")
        found = [path] if _is_run(path) else sorted(p for p in path.iterdir() if _is_run(p))
        if not found:
            raise UserError(f"{path} holds no run: expected {METRICS} in it, or in directories in it")
        directories += found
    directories = list(dict.fromkeys(d.resolve() for d in directories))
    named = list(zip(directories, _names(directories), strict=True))
    return [read_run(d, name) for d, name in progress(named, desc="reading", unit="runs")]


def read_run(directory: Path, name: str) -> Run:
    """Reads one run. Raises UserError for damaged files."""
    path = directory / METRICS
    try:
        rows = [row for row in read_metrics(path) if "views" in row]
        if not rows and b"\n" in path.read_bytes():
            raise UserError(f"{path}: not the metrics of a run: no line has a step and its views")
        idle = time.time() - path.stat().st_mtime
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    finished = (directory / "model" / "model.safetensors").is_file()
    return Run(name, directory, rows, _read_config(directory / CONFIG), *_read_results(directory), finished, idle)


def compare_runs(runs: Sequence[Run], pictures: Path, title: str, lead: str = "") -> Report:
    """A page of one or several runs: where they stand, accuracies, curves, and how their configs differ.

    Pictures are drawn into the directory `pictures`.
    """
    report = Report(title, lead)
    report.sections.append(Section("Where they stand" if len(runs) > 1 else "Where it stands", *summary_table(runs)))
    for stem in dict.fromkeys(stem for run in runs for stem in run.results):
        results = {run.name: run.results[stem] for run in runs if stem in run.results}
        if len(runs) == 1:
            report.add_zeroshot(results[runs[0].name])
        else:
            _compare_results(report, results, pictures / f"{stem}.png")
    for kind in dict.fromkeys(kind for run in runs for kind in run.others):
        head, rows = share_table({run.name: run.others[kind] for run in runs if kind in run.others})
        strong = _strong(rows)
        notes = [_PROBE_CHANCE] * kind.startswith(_PROBE) + [_BEST] * bool(strong)
        report.sections.append(Section(kind, head, rows, note=" ".join(notes), strong=strong))
    if kinds := dict.fromkeys(kind for run in runs for kind in run.left_out):
        rows = [[kind, *(f"{run.left_out.get(kind, 0):,}" for run in runs)] for kind in kinds]
        note = "Scenes that could not be read, decoded or understood; the evaluations are of the others."
        report.sections.append(Section("Left out of evaluations", ["", *(run.name for run in runs)], rows, note=note))
    logged = {run.name: run.rows for run in runs if run.rows}
    if logged:
        picture = run_curves(logged, pictures / "curves.png")
        note = "Pale: every step. Strong: the mean around it, over a twentieth of the run."
        report.sections.append(Section("Training", picture=picture, note=note))
    report.sections.append(_config_section(runs))
    return report


def summary_table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: a row per metric, a column per run. Losses are means over the last twentieth of the steps."""
    rows = [
        ["state", *(run.state for run in runs)],
        ["steps", *(f"{run.rows[-1]['step']:,}" if run.rows else _NONE for run in runs)],
        ["views seen", *(f"{run.rows[-1]['views']:,}" if run.rows else _NONE for run in runs)],
    ]
    late: dict[str, tuple[str, str]] = {
        "loss": ("loss", ".3f"),
        **{f"contrastive/{level}": (f"contrastive loss, {TASKS[level]}", ".3f") for level in LEVELS},
        "distillation": ("distillation loss", ".3g"),
        **{f"temperature/{level}": (f"temperature, {TASKS[level]}", ".4f") for level in LEVELS},
    }
    speed = {
        "scenes_per_s": ("scenes/s, median", ",.1f"),
        "views_per_s": ("views/s, median", ",.0f"),
        "tflop_per_s": ("TFLOP/s, median", ".3g"),
    }
    for key, (label, form) in late.items():
        rows.append([label, *(_number(_tail(_values(run, key)), form) for run in runs)])
    for key, (label, form) in speed.items():
        rows.append(
            [label, *(_number(median(values) if (values := _values(run, key)) else None, form) for run in runs)]
        )
    for key, label in {"mfu": "MFU", "data_wait": "waiting for data"}.items():
        shares = [_mean(_values(run, key)) for run in runs]
        rows.append([label, *(_NONE if share is None else percent(share) for share in shares)])
    rows.append(["peak memory, GiB", *(_number(max(_values(run, "memory_gib"), default=None), ".1f") for run in runs)])
    rows.append(["steps skipped", *(_number(sum(_values(run, "skipped")), ",.0f") for run in runs)])
    rows.append(["bad samples met", *(_number(max(_values(run, "bad_samples"), default=0), ",.0f") for run in runs)])
    return ["", *(run.name for run in runs)], [row for row in rows if set(row[1:]) != {_NONE}]


def accuracy_table(
    results: Mapping[str, ZeroShotResult], match: str, subsets: Sequence[str] = ("all",)
) -> tuple[list[str], list[list[str]]]:
    """Head and rows: a row per task and k, a column per run; no rows where no run has any."""
    words = {"all": "", "seen": ", seen in training", "held_out": ", held out of training"}
    return share_table(
        {
            name: {
                f"{TASKS[row.level]}{words[row.subset]}, top-{k}": (row.top[k], row.chance[k])
                for row in result.only(match).rows
                if row.subset in subsets
                for k in row.top
            }
            for name, result in results.items()
        }
    )


def share_table(runs: Mapping[str, Shares]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: a row per label, a column per run."""
    rows = []
    for label in dict.fromkeys(label for shares in runs.values() for label in shares):
        found = {name: shares[label] for name, shares in runs.items() if label in shares}
        # runs that were evaluated on different views have different chances
        chances = sorted({round(100 * chance, 1) for _, chance in found.values()})
        cells = [percent(found[name][0]) if name in found else _NONE for name in runs]
        rows.append([label, f"{' to '.join(map(str, chances))} %", *cells])
    return ["", "chance", *runs], rows


def config_differences(configs: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Rows of key and one value per run, for the keys whose values are not the same everywhere; run.dir aside."""
    keys = dict.fromkeys(key for config in configs.values() for key in config if key != "run.dir")
    rows = [[key, *(_shown(config, key) for config in configs.values())] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _zeroshot_title(stem: str) -> str:
    return "Zero-shot accuracies" if stem == Path(RESULT).stem else f"Zero-shot accuracies, {stem}"


def _compare_results(report: Report, results: Mapping[str, ZeroShotResult], picture: Path) -> None:
    about = {f"{result.scenes:,} scenes of the {result.split} split" for result in results.values()}
    title = _zeroshot_title(picture.stem)
    note = f"{'; '.join(sorted(about))}. Dark marks: what a random ranking scores on the same views."
    report.sections.append(Section(title, picture=accuracy_comparison(results, picture), note=note))
    for subsets in (("all",), ("seen", "held_out")):
        for match, rule in MATCH_TITLES.items():
            head, rows = accuracy_table(results, match, subsets)
            if rows:
                kind = f"{title}, {rule}" if "all" in subsets else f"{title}, {rule}: texts seen and held out"
                strong = _strong(rows)
                report.sections.append(
                    Section(kind, head, rows, note=_BEST * bool(strong), strong=strong, folded="all" not in subsets)
                )


def _strong(rows: Sequence[Sequence[str]]) -> set[tuple[int, int]]:
    """The cells of a `share_table` with the highest share of their row, but for rows where all have it."""
    cells = set()
    for i, row in enumerate(rows):
        values = [-1.0 if cell == _NONE else float(cell.removesuffix(" %")) for cell in row[2:]]
        cells |= {(i, 2 + j) for j, value in enumerate(values) if min(values) < value == max(values)}
    return cells


def _config_section(runs: Sequence[Run]) -> Section:
    if len(runs) > 1:
        rows = config_differences({run.name: run.config for run in runs})
        note = "" if rows else "None: the runs have one and the same config."
        return Section("Differences of the configs", ["", *(run.name for run in runs)], rows, note=note)
    from scenarioclip_fast.train.config import TrainConfig

    rows = config_differences({"default": flat(TrainConfig.of().to_dict()), "here": runs[0].config})
    note = "" if rows else "The defaults."
    return Section("Config, where it is not the default", ["", "default", "here"], rows, note=note)


def _is_run(directory: Path) -> bool:
    return (directory / METRICS).is_file()


def _names(directories: Sequence[Path]) -> list[str]:
    """The ends of the paths by which the directories differ: the last part, or as many as it takes."""
    for parts in range(1, max((len(d.parts) for d in directories), default=1) + 1):
        names = [os.sep.join(d.parts[-parts:]) for d in directories]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("directories are distinct")


def _read_config(path: Path) -> dict[str, Any]:
    yaml = require("yaml")
    if not path.is_file():
        return {}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    return flat(values) if isinstance(values, Mapping) else {}


def _read_results(directory: Path) -> tuple[dict[str, ZeroShotResult], dict[str, Shares], dict[str, int]]:
    results: dict[str, ZeroShotResult] = {}
    others: dict[str, Shares] = {}
    left_out: dict[str, int] = {}
    for path in sorted(directory.glob("*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            missing = int(data.get("left_out", {"count": 0})["count"])
            if "match" in data["rows"][0]:
                results[path.stem] = ZeroShotResult.from_dict(data)
                kind = _zeroshot_title(path.stem)
            elif shares := _shares(data):
                kind = f"{shares[0]}, {data['split']} split"
                others[kind] = shares[1]
            else:
                continue
        except (ValueError, LookupError, TypeError, AttributeError):
            continue  # JSON of another kind
        if missing:
            left_out[kind] = missing
    return results, others, left_out


def _shares(data: Mapping[str, Any]) -> tuple[str, Shares] | None:
    """Title and shares of what an evaluation other than zero-shot has left as JSON."""
    rows = data["rows"]
    if "recall" in rows[0]:
        found = {
            f"{TASKS[row['level']]}, {row['direction'].replace('_', ' ')}, R@{k}": (share, row["chance"][k])
            for row in rows
            for k, share in row["recall"].items()
        }
        return "Retrieval", found
    if "baseline" in rows[0]:  # it stands for chance: what naming the most frequent classes scores
        found = {
            f"{TASKS[row['level']]}, top-{k}": (row["top"][k], row["baseline"][k]) for row in rows for k in row["top"]
        }
        return _PROBE, found
    if "questions" in rows[0]:
        return "Hard negatives", {KINDS[row["kind"]]: (row["accuracy"], CHANCE) for row in rows}
    return None


def _values(run: Run, key: str) -> list[float]:
    return [row[key] for row in run.rows if row.get(key) is not None]


def _tail(values: Sequence[float]) -> float | None:
    return _mean(values[-max(len(values) // 20, 1) :])


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _number(value: float | None, form: str) -> str:
    return _NONE if value is None else format(value, form)


def _shown(config: Mapping[str, Any], key: str) -> str:
    value = config.get(key, _NONE)
    return value if isinstance(value, str) else json.dumps(value)
