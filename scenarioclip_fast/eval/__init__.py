"""Evaluation: zero-shot accuracies with their chance levels, pictures of a run, and its report."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scenarioclip_fast.eval.report import Report
    from scenarioclip_fast.eval.samples import SampleScene, answer_samples
    from scenarioclip_fast.eval.zeroshot import Accuracy, ZeroShotResult

_HOMES = {
    "Accuracy": "zeroshot",
    "Report": "report",
    "SampleScene": "samples",
    "ZeroShotResult": "zeroshot",
    "answer_samples": "samples",
}

__all__ = ["Accuracy", "Report", "SampleScene", "ZeroShotResult", "answer_samples"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
