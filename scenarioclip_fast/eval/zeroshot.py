"""Zero-shot recognition of actions, objects and relations against all class texts of a vocabulary.

Each view is compared by cosine similarity with all texts of its level: global views with actions, object views with
objects, relation views with relations. There are two matching rules:

own            strict: only the view's own text is correct
any_in_image   as published: any object (relation) of the image is correct for each of its object (relation) views

Ties count against the model: the correct text has rank r if r - 1 wrong texts score at least as high.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from scenarioclip_fast.data.batch import Batch
from scenarioclip_fast.data.vocabulary import Vocabulary
from scenarioclip_fast.distributed import World
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.eval.encoding import (
    SINGLE_PROCESS,
    Encoder,
    check_finite,
    class_embeddings,
    evaluating,
    level_views,
    score_blocks,
)
from scenarioclip_fast.eval.ranking import check_topk, random_hit_rate
from scenarioclip_fast.eval.tables import TASKS, text_table
from scenarioclip_fast.levels import LEVELS
from scenarioclip_fast.parsing import are_numbers
from scenarioclip_fast.progress import progress

Match = Literal["own", "any_in_image"]
MATCHES: tuple[Match, ...] = ("own", "any_in_image")


@dataclass(frozen=True)
class Accuracy:
    """Top-k accuracy of one level under one matching rule on one subset of its views.

    `top` and `chance` map k to an accuracy in [0, 1]; `chance` is the expected accuracy of a random ranking on the same
    views. `subset` is "all", or "seen" / "held_out": views whose text does / does not occur in the train split.
    """

    level: str
    match: str
    subset: str
    views: int
    classes: int
    top: dict[int, float]
    chance: dict[int, float]


@dataclass(frozen=True)
class ZeroShotResult:
    """All accuracies of one evaluation. `to_dict()` can be serialised as JSON; `str()` is the table."""

    split: str
    scenes: int
    topk: tuple[int, ...]
    rows: list[Accuracy] = field(default_factory=list)

    def get(self, level: str, match: str = "own", subset: str = "all") -> Accuracy | None:
        """The row for a level, matching rule and subset; None if the split has no such views."""
        key = (level, match, subset)
        return next((row for row in self.rows if (row.level, row.match, row.subset) == key), None)

    def only(self, match: str) -> ZeroShotResult:
        """Restrict the result to one matching rule."""
        return replace(self, rows=[row for row in self.rows if row.match == match])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ZeroShotResult:
        """Invert `to_dict`, also after a round trip through JSON (where keys are strings).

        Raises:
            ValueError, TypeError, LookupError, AttributeError: `data` is not such a record.
        """

        def row(entry: dict[str, Any]) -> Accuracy:
            by_k = {name: {int(k): value for k, value in entry[name].items()} for name in ("top", "chance")}
            found = Accuracy(**{**entry, **by_k})
            known = found.level in LEVELS and found.match in MATCHES and found.subset in ("all", "seen", "held_out")
            numbers = (found.views, found.classes, *found.top.values(), *found.chance.values())
            if not known or not are_numbers(*numbers) or not {*data["topk"]} == {*found.top} == {*found.chance}:
                raise ValueError("malformed row of a zero-shot result")
            return found

        if not isinstance(data["split"], str) or not are_numbers(data["scenes"], *data["topk"]):
            raise ValueError("malformed zero-shot result")
        return cls(data["split"], data["scenes"], tuple(data["topk"]), [row(entry) for entry in data["rows"]])

    def __str__(self) -> str:
        head = ["task", "match", "texts", "views", "classes", *(f"top-{k}  (chance)" for k in self.topk)]
        body = [
            [TASKS[row.level], row.match, row.subset.replace("_", "-"), f"{row.views}", f"{row.classes}"]
            + [f"{100 * row.top[k]:5.1f} % ({100 * row.chance[k]:4.1f})" for k in self.topk]
            for row in self.rows
        ]
        return text_table(head, body, names=3)


@dataclass
class _Tally:
    """Per view of one level: whether its scores are finite, its class id, the number of classes in its image, and per
    matching rule the number of wrong classes that score at least as high as the best correct one.
    """

    classes: int
    views: list[Tensor] = field(default_factory=list)  # int32 [n, 5]

    def add(
        self,
        scores: Tensor,  # [V, C]
        ids: Tensor,  # [V]
        present: Tensor,  # bool [V, C], the classes of each view's image
    ) -> None:
        own = torch.zeros_like(present).scatter_(1, ids[:, None], True)
        correct: dict[Match, Tensor] = {"own": own, "any_in_image": present}
        columns = [scores.isfinite().all(1), ids, present.sum(1)]
        for match in MATCHES:
            best = scores.masked_fill(~correct[match], -torch.inf).amax(1, keepdim=True)
            columns.append(((scores >= best) & ~correct[match]).sum(1))
        self.views.append(torch.stack(columns, 1).int().cpu())

    def merged(self, world: World) -> Tensor:
        """Gather the views of all ranks on every rank."""
        return torch.cat(world.gather(torch.cat([torch.zeros(0, 5, dtype=torch.int32), *self.views])))

    def rows(self, views: Tensor, level: str, topk: tuple[int, ...], train_counts: Sequence[int]) -> list[Accuracy]:
        finite, ids, classes_in_image, *ranks_by_match = views.long().unbind(1)
        check_finite(finite.bool(), level)
        seen = torch.from_numpy(np.array(train_counts, np.int64))[ids] > 0
        subsets = {"all": torch.ones_like(seen)}
        if not bool(seen.all()):
            subsets |= {"seen": seen, "held_out": ~seen}
        rows = []
        for match, ranks in zip(MATCHES, ranks_by_match, strict=True):
            correct = torch.ones_like(classes_in_image) if match == "own" else classes_in_image
            rows += [
                Accuracy(
                    level,
                    match,
                    name,
                    int(mask.sum()),
                    self.classes,
                    {k: float((ranks[mask] < k).double().mean()) for k in topk},
                    {k: random_hit_rate(k, self.classes, correct[mask]) for k in topk},
                )
                for name, mask in subsets.items()
                if bool(mask.any())
            ]
        return rows


@torch.inference_mode()
def zeroshot(
    model: Encoder,
    batches: Iterable[Batch],
    vocabulary: Vocabulary,
    *,
    split: str = "test",
    levels: Sequence[str] = LEVELS,
    topk: Sequence[int] = (1, 5, 10),
    world: World = SINGLE_PROCESS,
    show_progress: bool = True,
) -> ZeroShotResult:
    """Measure the zero-shot accuracy of `model` in one pass over `batches`.

    Args:
        model: a ScenarioCLIP; use `with teacher.averaged(model)` to evaluate an EMA teacher's weights.
        batches: an `EvaluationLoader` or any iterable of `Batch` on the model's device.
        vocabulary: provides the class texts and their counts in the train split.
        split: name of the split, for the result.
        levels: subset of "global", "object" and "relation"; levels without views in the split have no rows.
        topk: values of k.
        world: the ranks that share the split, each with its own `batches`; every rank returns the complete result.
        show_progress: show a progress bar on the main process.

    Raises:
        UserError: there are no scenes, or the embeddings are not finite.
        ValueError: `topk` is empty or has a number below 1.
    """
    topk = check_topk(topk)
    if show_progress and world.is_main_process:
        batches = progress(batches, desc=f"zero-shot, {split}", unit="batches")
    scenes = 0
    with evaluating(model):
        texts = class_embeddings(model, vocabulary, levels)
        tallies = {level: _Tally(len(texts[level])) for level in texts}
        for batch in batches:
            scenes += batch.num_scenes
            for level, (pixels, ids, scene) in level_views(batch).items():
                if level in texts and len(ids):
                    present = torch.zeros(batch.num_scenes, len(texts[level]), dtype=torch.bool, device=ids.device)
                    present[scene, ids] = True
                    for some, scores in score_blocks(model, pixels, texts[level], level):
                        tallies[level].add(scores, ids[some], present[scene[some]])
    scenes = sum(world.gather(scenes))
    if scenes == 0:
        raise UserError(f"the {split} split has no scenes: nothing to evaluate")
    rows = [
        row
        for level, tally in tallies.items()
        if len(views := tally.merged(world))
        for row in tally.rows(views, level, topk, vocabulary.train_counts(level))
    ]
    return ZeroShotResult(split, scenes, topk, rows)
