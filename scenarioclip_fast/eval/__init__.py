"""Evaluations of a trained model, each with its chance level; `scenarioclip_fast.report` plots the results."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scenarioclip_fast.lazy import attach

if TYPE_CHECKING:
    from scenarioclip_fast.eval.embeddings import EmbeddingTable, embed
    from scenarioclip_fast.eval.negatives import NegativesResult, hard_negatives
    from scenarioclip_fast.eval.probe import ProbeResult, ProbeSettings, linear_probe
    from scenarioclip_fast.eval.retrieval import RetrievalResult
    from scenarioclip_fast.eval.samples import SampleScene, predict_samples
    from scenarioclip_fast.eval.session import Session, open_session
    from scenarioclip_fast.eval.tsne import EmbeddingMap, embedding_map
    from scenarioclip_fast.eval.zeroshot import Accuracy, ZeroShotResult
else:
    __getattr__, __dir__ = attach(
        __name__,
        {
            "embeddings": ["EmbeddingTable", "embed"],
            "negatives": ["NegativesResult", "hard_negatives"],
            "probe": ["ProbeResult", "ProbeSettings", "linear_probe"],
            "retrieval": ["RetrievalResult"],
            "samples": ["SampleScene", "predict_samples"],
            "session": ["Session", "open_session"],
            "tsne": ["EmbeddingMap", "embedding_map"],
            "zeroshot": ["Accuracy", "ZeroShotResult"],
        },
    )

__all__ = [
    "Accuracy",
    "EmbeddingMap",
    "EmbeddingTable",
    "NegativesResult",
    "ProbeResult",
    "ProbeSettings",
    "RetrievalResult",
    "SampleScene",
    "Session",
    "ZeroShotResult",
    "embed",
    "embedding_map",
    "hard_negatives",
    "linear_probe",
    "open_session",
    "predict_samples",
]
