"""Evaluation: zero-shot accuracies with their chance levels, pictures of a run, and its report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scenarioclip_fast.lazy import attach

if TYPE_CHECKING:
    from scenarioclip_fast.eval.report import Report
    from scenarioclip_fast.eval.samples import SampleScene, answer_samples
    from scenarioclip_fast.eval.zeroshot import Accuracy, ZeroShotResult
else:
    __getattr__, __dir__ = attach(
        __name__,
        {
            "report": ["Report"],
            "samples": ["SampleScene", "answer_samples"],
            "zeroshot": ["Accuracy", "ZeroShotResult"],
        },
    )

__all__ = ["Accuracy", "Report", "SampleScene", "ZeroShotResult", "answer_samples"]
