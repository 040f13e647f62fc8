"""Figures and self-contained HTML pages of evaluations and training runs. Matplotlib is imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scenarioclip_fast.lazy import attach

if TYPE_CHECKING:
    from scenarioclip_fast.report.accuracy import accuracy_bars, accuracy_comparison
    from scenarioclip_fast.report.bars import negatives_bars, probe_bars, recall_bars
    from scenarioclip_fast.report.comparison import compare_runs
    from scenarioclip_fast.report.curves import loss_curves, run_curves
    from scenarioclip_fast.report.maps import scatter_map
    from scenarioclip_fast.report.page import Report, Section
    from scenarioclip_fast.report.runs import Run, find_runs, read_run
    from scenarioclip_fast.report.sheets import nearest_sheet, sample_sheet
else:
    __getattr__, __dir__ = attach(
        __name__,
        {
            "accuracy": ["accuracy_bars", "accuracy_comparison"],
            "bars": ["negatives_bars", "probe_bars", "recall_bars"],
            "comparison": ["compare_runs"],
            "curves": ["loss_curves", "run_curves"],
            "maps": ["scatter_map"],
            "page": ["Report", "Section"],
            "runs": ["Run", "find_runs", "read_run"],
            "sheets": ["nearest_sheet", "sample_sheet"],
        },
    )

__all__ = [
    "Report",
    "Run",
    "Section",
    "accuracy_bars",
    "accuracy_comparison",
    "compare_runs",
    "find_runs",
    "loss_curves",
    "nearest_sheet",
    "negatives_bars",
    "probe_bars",
    "read_run",
    "recall_bars",
    "run_curves",
    "sample_sheet",
    "scatter_map",
]
