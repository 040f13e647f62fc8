"""The report page of one or several runs: progress, accuracies, curves and config differences."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from scenarioclip_fast.eval.tables import TASKS, percent
from scenarioclip_fast.eval.zeroshot import ZeroShotResult
from scenarioclip_fast.levels import LEVELS
from scenarioclip_fast.model.config import flat
from scenarioclip_fast.report.accuracy import MATCH_TITLES, accuracy_comparison
from scenarioclip_fast.report.curves import CURVES_NOTE, run_curves
from scenarioclip_fast.report.evaluation import zeroshot_tables
from scenarioclip_fast.report.page import Report, Section
from scenarioclip_fast.report.runs import PROBE, Run, Scores, zeroshot_title

_NONE = "\u2013"
_PROBE_CHANCE = "Chance: the majority baseline, which always predicts the most frequent classes of the train split."
_BEST = "Bold: best in the row."
_SUBSETS = {"all": "", "seen": ", seen in training", "held_out": ", held out of training"}
# metric -> row label and number format; losses and temperatures are averaged over the last 5 % of the steps
_FINAL: dict[str, tuple[str, str]] = {
    "loss": ("loss", ".3f"),
    **{f"contrastive/{level}": (f"contrastive loss, {TASKS[level]}", ".3f") for level in LEVELS},
    "distillation": ("distillation loss", ".3g"),
    **{f"temperature/{level}": (f"temperature, {TASKS[level]}", ".4f") for level in LEVELS},
}
_MEDIAN = {
    "scenes_per_s": ("scenes/s, median", ",.1f"),
    "views_per_s": ("views/s, median", ",.0f"),
    "tflop_per_s": ("TFLOP/s, median", ".3g"),
}
_MEAN_FRACTION = {"mfu": "MFU", "data_wait": "time waiting for data"}


def compare_runs(runs: Sequence[Run], pictures: Path, title: str, lead: str = "") -> Report:
    """Build the page of one or several runs; figures are written to the directory `pictures`."""
    report = Report(title, lead)
    report.sections.append(Section("Summary", *summary_table(runs)))
    for stem in dict.fromkeys(stem for run in runs for stem in run.results):
        results = {run.name: run.results[stem] for run in runs if stem in run.results}
        if len(runs) == 1:
            report.sections += zeroshot_tables(results[runs[0].name])
        else:
            report.sections += _zeroshot_comparison(results, pictures / f"{stem}.png")
    report.sections += _other_evaluations(runs)
    report.sections += _skipped_scenes(runs)
    if logged := {run.name: run.rows for run in runs if run.rows}:
        picture = run_curves(logged, pictures / "curves.png")
        report.sections.append(Section("Training", picture=picture, note=CURVES_NOTE))
    report.sections.append(_config_section(runs))
    return report


def summary_table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """The header and rows: one row per metric, one column per run. Losses: mean over the last 5 % of the steps."""
    rows = [
        ["state", *(run.state for run in runs)],
        ["steps", *(f"{run.rows[-1]['step']:,}" if run.rows else _NONE for run in runs)],
        ["views seen", *(f"{run.rows[-1]['views']:,}" if run.rows else _NONE for run in runs)],
    ]
    for key, (label, form) in _FINAL.items():
        rows.append([label, *(_number(_tail_mean(_values(run, key)), form) for run in runs)])
    for key, (label, form) in _MEDIAN.items():
        rows.append(
            [label, *(_number(median(values) if (values := _values(run, key)) else None, form) for run in runs)]
        )
    for key, label in _MEAN_FRACTION.items():
        means = [_mean(_values(run, key)) for run in runs]
        rows.append([label, *(_NONE if mean is None else percent(mean) for mean in means)])
    rows.append(["peak memory, GiB", *(_number(max(_values(run, "memory_gib"), default=None), ".1f") for run in runs)])
    rows.append(["skipped steps", *(_number(sum(_values(run, "skipped")), ",.0f") for run in runs)])
    rows.append(["bad samples", *(_number(max(_values(run, "bad_samples"), default=0), ",.0f") for run in runs)])
    return ["", *(run.name for run in runs)], [row for row in rows if set(row[1:]) != {_NONE}]


def accuracy_table(
    results: Mapping[str, ZeroShotResult], match: str, subsets: Sequence[str] = ("all",)
) -> tuple[list[str], list[list[str]]]:
    """The header and rows: one row per task and k, one column per run; empty rows are omitted."""
    return score_table(
        {
            name: {
                f"{TASKS[row.level]}{_SUBSETS[row.subset]}, top-{k}": (row.top[k], row.chance[k])
                for row in result.only(match).rows
                if row.subset in subsets
                for k in row.top
            }
            for name, result in results.items()
        }
    )


def score_table(runs: Mapping[str, Scores]) -> tuple[list[str], list[list[str]]]:
    """The header and rows: one row per label, one column per run."""
    rows = []
    for label in dict.fromkeys(label for scores in runs.values() for label in scores):
        found = {name: scores[label] for name, scores in runs.items() if label in scores}
        # Runs evaluated on different views have different chance levels.
        chances = sorted({round(100 * chance, 1) for _, chance in found.values()})
        cells = [percent(found[name][0]) if name in found else _NONE for name in runs]
        rows.append([label, f"{' to '.join(map(str, chances))} %", *cells])
    return ["", "chance", *runs], rows


def config_differences(configs: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """One row per key whose values differ: the key, then one value per config. run.dir is ignored."""
    keys = dict.fromkeys(key for config in configs.values() for key in config if key != "run.dir")
    rows = [[key, *(_shown(config, key) for config in configs.values())] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _zeroshot_comparison(results: Mapping[str, ZeroShotResult], picture: Path) -> list[Section]:
    about = {f"{result.scenes:,} scenes of the {result.split} split" for result in results.values()}
    title = zeroshot_title(picture.stem)
    note = f"{'; '.join(sorted(about))}. Dark marks: expected accuracy of a random ranking of the same views."
    sections = [Section(title, picture=accuracy_comparison(results, picture), note=note)]
    for subsets in (("all",), ("seen", "held_out")):
        for match, rule in MATCH_TITLES.items():
            head, rows = accuracy_table(results, match, subsets)
            if rows:
                kind = f"{title}, {rule}" if "all" in subsets else f"{title}, {rule}: seen and held-out texts"
                sections.append(_score_section(kind, head, rows, folded="all" not in subsets))
    return sections


def _other_evaluations(runs: Sequence[Run]) -> list[Section]:
    sections = []
    for title in dict.fromkeys(title for run in runs for title in run.other_results):
        head, rows = score_table({run.name: run.other_results[title] for run in runs if title in run.other_results})
        sections.append(_score_section(title, head, rows, _PROBE_CHANCE if title.startswith(PROBE) else ""))
    return sections


def _score_section(
    title: str, head: Sequence[str], rows: Sequence[Sequence[str]], note: str = "", folded: bool = False
) -> Section:
    """Make a section of a `score_table` with the best cells of each row in bold."""
    best = _best_cells(rows)
    return Section(title, head, rows, note=f"{note} {_BEST if best else ''}".strip(), strong=best, folded=folded)


def _best_cells(rows: Sequence[Sequence[str]]) -> set[tuple[int, int]]:
    """The cells of a `score_table` with the highest score in their row, except in rows of equal scores."""
    cells = set()
    for i, row in enumerate(rows):
        values = [-1.0 if cell == _NONE else float(cell.removesuffix(" %")) for cell in row[2:]]
        cells |= {(i, 2 + j) for j, value in enumerate(values) if min(values) < value == max(values)}
    return cells


def _skipped_scenes(runs: Sequence[Run]) -> list[Section]:
    titles = dict.fromkeys(title for run in runs for title in run.skipped)
    if not titles:
        return []
    rows = [[title, *(f"{run.skipped.get(title, 0):,}" for run in runs)] for title in titles]
    note = "Scenes that could not be read, decoded or parsed, and were excluded from the evaluations."
    return [Section("Skipped scenes", ["", *(run.name for run in runs)], rows, note=note)]


def _config_section(runs: Sequence[Run]) -> Section:
    if len(runs) > 1:
        rows = config_differences({run.name: run.config for run in runs})
        note = "" if rows else "None: all runs have the same config."
        return Section("Config differences", ["", *(run.name for run in runs)], rows, note=note)
    from scenarioclip_fast.train.config import TrainConfig

    rows = config_differences({"default": flat(TrainConfig.of().to_dict()), "this run": runs[0].config})
    note = "" if rows else "All values are the defaults."
    return Section("Non-default config", ["", "default", "this run"], rows, note=note)


def _values(run: Run, key: str) -> list[float]:
    return [row[key] for row in run.rows if row.get(key) is not None]


def _tail_mean(values: Sequence[float]) -> float | None:
    return _mean(values[-max(len(values) // 20, 1) :])


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _number(value: float | None, form: str) -> str:
    return _NONE if value is None else format(value, form)


def _shown(config: Mapping[str, Any], key: str) -> str:
    value = config.get(key, _NONE)
    return value if isinstance(value, str) else json.dumps(value, default=str)
