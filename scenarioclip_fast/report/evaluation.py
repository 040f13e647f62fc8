"""Report sections of each evaluation: a table, a figure, and a caption that defines the measure.

Figures are written to the directory given by the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scenarioclip_fast.eval.negatives import NegativesResult
from scenarioclip_fast.eval.probe import ProbeResult
from scenarioclip_fast.eval.retrieval import RetrievalResult
from scenarioclip_fast.eval.samples import SampleScene
from scenarioclip_fast.eval.tables import TASKS
from scenarioclip_fast.eval.tsne import EmbeddingMap
from scenarioclip_fast.eval.zeroshot import ZeroShotResult
from scenarioclip_fast.report.accuracy import accuracy_bars
from scenarioclip_fast.report.bars import negatives_bars, probe_bars, recall_bars
from scenarioclip_fast.report.curves import CURVES_NOTE, Metrics, loss_curves
from scenarioclip_fast.report.maps import scatter_map
from scenarioclip_fast.report.page import Section
from scenarioclip_fast.report.sheets import nearest_sheet, sample_sheet

_SUBSETS = {"all": "all", "seen": "seen in training", "held_out": "held out of training"}
_RULES = {
    "own": "Zero-shot accuracy, strict: only the view's own text counts",
    "any_in_image": "Zero-shot accuracy, published rule: any text of the image counts",
}


def zeroshot_tables(result: ZeroShotResult) -> list[Section]:
    """Make one table per matching rule: accuracies with their chance levels."""
    head = ["task", "texts", "views", "classes", *(f"top-{k} (chance)" for k in result.topk)]
    note = (
        f"{result.scenes:,} scenes of the {result.split} split. Each view is compared with all class texts of its "
        "level. In parentheses: expected accuracy of a random ranking of the same views."
    )
    sections = []
    for match, title in _RULES.items():
        rows = [
            [TASKS[row.level], _SUBSETS[row.subset], f"{row.views:,}", f"{row.classes:,}"]
            + [f"{100 * row.top[k]:.1f} % ({100 * row.chance[k]:.1f} %)" for k in result.topk]
            for row in result.only(match).rows
        ]
        if rows:
            sections.append(Section(title, head, rows, note=note))
    return sections


def zeroshot_figures(result: ZeroShotResult, samples: Sequence[SampleScene], directory: Path) -> list[Section]:
    """Plot accuracies against chance, and the model's predictions for sample scenes, if any."""
    sections = [
        Section(
            "Accuracy against chance",
            picture=accuracy_bars(result, directory / "accuracy.png"),
            note="Dark marks: chance level. Held out: texts that never occur in training.",
        )
    ]
    if samples:
        note = (
            "Views as seen by the model. Bold: the true text; below it: the top predictions with their cosine "
            "similarities. Frame: green if the top prediction is correct, amber if a lower one is, red otherwise."
        )
        picture = sample_sheet(samples, directory / "scenes.png")
        sections.append(Section("Sample predictions", picture=picture, note=note))
    return sections


def training_section(runs: Metrics, directory: Path, note: str = "") -> Section:
    """Plot loss curves of `runs` (name -> rows of metrics.jsonl); `note` is appended to the caption."""
    picture = loss_curves(runs, directory / "losses.png")
    return Section("Training", picture=picture, note=f"{CURVES_NOTE} {note}".strip())


def retrieval_section(result: RetrievalResult, directory: Path) -> Section:
    """Report recall at k in both directions."""
    note = (
        f"{result.scenes:,} scenes of the {result.split} split; the text gallery contains its distinct texts. An "
        "image query has one correct answer, its own text; for a text query, any view with that text is correct. Dark "
        "marks and parentheses: expected recall of a random ranking."
    )
    picture = recall_bars(result, directory / "retrieval.png")
    return Section("Cross-modal retrieval", *result.table(), picture, note)


def probe_section(result: ProbeResult, directory: Path) -> Section:
    """Report linear-probe accuracies."""
    settings = result.settings
    seeds = len(settings.seeds)
    spread = f"; mean and standard deviation over {seeds} seeds" if seeds > 1 else ""
    selection = " Weights are selected by their accuracy on the val split." if result.chosen_on_val else ""
    note = (
        f"One linear layer on frozen embeddings, trained for {settings.steps:,} steps of AdamW{spread}.{selection} "
        "Dark marks and parentheses: majority baseline, which always predicts the k most frequent classes of the train "
        "split."
    )
    picture = probe_bars(result, directory / "probe.png")
    return Section("Linear probes", *result.table(), picture, note)


def map_sections(found: EmbeddingMap, samples: Sequence[SampleScene], directory: Path) -> list[Section]:
    """Show the t-SNE map, and sample views with their nearest texts."""
    map_note = (
        "One point per view, coloured by class. Only neighbourhoods are meaningful, not distances between clusters or "
        "cluster sizes. 1-NN accuracy: fraction of views whose nearest neighbour, by cosine similarity of the "
        "embeddings, has the same class."
    )
    nearest_note = (
        "Green bar: the true text; if it is not among the nearest texts, it is shown below them with its rank among "
        "all texts. Frame: green if the nearest text is the true one, amber if a lower one is, red otherwise."
    )
    return [
        Section(
            f"t-SNE map of {TASKS[found.level]} embeddings",
            *found.table(),
            scatter_map(found, directory / "map.png"),
            map_note,
        ),
        Section("Nearest texts", picture=nearest_sheet(samples, directory / "nearest.png"), note=nearest_note),
    ]


def negatives_section(result: NegativesResult, directory: Path) -> Section:
    """Report accuracy on hard negatives."""
    note = (
        f"{result.relations:,} relations. Each pair compares a relation's text with a hard negative, a text that "
        "belongs to no relation of the image. A focused region shows both objects alike and does not mark the subject; "
        "for a symmetric predicate, the swapped text is true as well."
    )
    picture = negatives_bars(result, directory / "negatives.png")
    return Section("Hard negatives", *result.table(), picture, note)
