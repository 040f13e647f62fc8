"""Zero-shot recognition of actions, objects and relations against all class texts of a vocabulary.

Each view's image embedding is compared by cosine with the embedding of every text of its level: the action
with the global view, an object with its object view, a relation with its relation view. The published
evaluation counts an object (or relation) as right when any of the top k is among all objects (relations) of
its image: that is `match="any_in_image"`. The strict rule, `match="own"`, asks for the view's own text.
A tie counts against the model: a text is found at rank r when r - 1 wrong ones score at least as much.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from scenarioclip_fast.data.batch import Batch
from scenarioclip_fast.data.vocabulary import LEVELS, Vocabulary
from scenarioclip_fast.distributed import World
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.eval.tables import text_table
from scenarioclip_fast.progress import progress

Match = Literal["own", "any_in_image"]
MATCHES: tuple[Match, ...] = ("own", "any_in_image")
TASKS: dict[str, str] = {"global": "action", "object": "object", "relation": "relation"}
_BLOCK = 1 << 24  # scores at once: 64 MiB
_CHUNK = 256  # views embedded at once
ALONE = World(0, 1, torch.device("cpu"), None)  # one process, on whatever device its tensors are


class Encoder(Protocol):
    """What the evaluation needs of a model."""

    def encode_image(self, pixels: Tensor, level: str) -> Tensor: ...  # [V, 3, S, S] -> [V, D]

    def encode_text(self, texts: list[list[int]], level: str) -> Tensor: ...  # n lists of token ids -> [n, D]


@dataclass(frozen=True)
class Accuracy:
    """Top-k accuracy of one level under one matching rule on one subset of its views.

    `top` and `chance` map k to a share in [0, 1]; `chance` is what a random ranking of the classes scores in
    expectation on the same views. `subset` is "all", or "seen" / "held_out": views whose text occurs (does not
    occur) in the train split.
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
    """Every accuracy of one evaluation. `to_dict()` is ready for JSON, `str()` is the table."""

    split: str
    scenes: int
    topk: tuple[int, ...]
    rows: list[Accuracy] = field(default_factory=list)

    def get(self, level: str, match: str = "own", subset: str = "all") -> Accuracy | None:
        """The row of that level, rule and subset; None where the split has no such view."""
        wanted = (level, match, subset)
        return next((row for row in self.rows if (row.level, row.match, row.subset) == wanted), None)

    def only(self, match: str) -> ZeroShotResult:
        """The rows of one matching rule."""
        return replace(self, rows=[row for row in self.rows if row.match == match])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ZeroShotResult:
        """The inverse of `to_dict`, also after a trip through JSON (which turns the keys k into strings)."""

        def row(entry: dict[str, Any]) -> Accuracy:
            shares = {name: {int(k): share for k, share in entry[name].items()} for name in ("top", "chance")}
            return Accuracy(**{**entry, **shares})

        return cls(data["split"], data["scenes"], tuple(data["topk"]), [row(entry) for entry in data["rows"]])

    def __str__(self) -> str:
        head = ["task", "match", "texts", "views", "classes", *(f"top-{k}  (chance)" for k in self.topk)]
        body = [
            [TASKS[row.level], row.match, row.subset.replace("_", "-"), f"{row.views}", f"{row.classes}"]
            + [f"{100 * row.top[k]:5.1f} % ({100 * row.chance[k]:4.1f})" for k in self.topk]
            for row in self.rows
        ]
        return text_table(head, body, names=3)


def class_embeddings(model: Encoder, vocabulary: Vocabulary, levels: Sequence[str] = LEVELS) -> dict[str, Tensor]:
    """Unit-length embeddings [classes, D] of all class texts, per level. UserError where they are not finite."""
    return {level: embed_texts(model, tokens, level) for level in levels if (tokens := vocabulary.tokens(level))}


def embed_texts(model: Encoder, tokens: list[list[int]], level: str) -> Tensor:  # [n, D], unit length
    """The embeddings of n texts. UserError where they are not finite."""
    text = F.normalize(model.encode_text(tokens, level).float(), dim=-1)
    check_finite(text.isfinite().all(1), f"{level} text")
    return text


def check_finite(
    finite: Tensor,  # bool [n]
    what: str,
) -> None:
    """UserError where embeddings are not: what is measured with them would be a number as any other."""
    if bad := int((~finite).sum()):
        raise UserError(
            f"{bad} of {len(finite)} {what} embeddings are not finite: training diverged, or the weights are damaged"
        )


def level_views(batch: Batch) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Per level: pixels [n, 3, S, S], class ids [n] and the scene of each view [n]."""
    pixels = torch.split(batch.pixels, [batch.num_scenes, batch.num_objects, batch.num_relations])
    ids = (batch.action_id, batch.object_id, batch.relation_id)
    scenes = (
        torch.arange(batch.num_scenes, device=batch.action_id.device),
        batch.object_scene,
        batch.relation_scene,
    )
    return dict(zip(LEVELS, zip(pixels, ids, scenes, strict=True), strict=True))


def score_blocks(
    model: Encoder,
    pixels: Tensor,  # [V, 3, S, S]
    classes: Tensor,  # [C, D], unit length
    level: str,
) -> Iterator[tuple[slice, Tensor]]:  # rows of V, their cosines [rows, C]
    """Cosine of every view with every class text, as many views at a time as there is room for."""
    step = max(1, _BLOCK // len(classes))
    for start in range(0, len(pixels), _CHUNK):
        image = F.normalize(model.encode_image(pixels[start : start + _CHUNK], level).float(), dim=-1)
        for first in range(0, len(image), step):
            part = image[first : first + step]
            yield slice(start + first, start + first + len(part)), part @ classes.T


def random_hit_rate(
    k: int,
    classes: int,
    right: Tensor,  # [V] how many classes count as right for each view, >= 1
) -> float:
    """Expected top-k accuracy of a random ranking: the mean of 1 - C(classes - m, k) / C(classes, k)."""
    if k >= classes:
        return 1.0
    right, views = right.unique(return_counts=True)
    i = torch.arange(k, dtype=torch.float64)
    missed = (classes - right.double()[:, None] - i).clamp(min=0) / (classes - i)
    return float(((1 - missed.prod(dim=1)) * views).sum() / views.sum())


@dataclass
class _Tally:
    """What accumulates for one level, of each view: whether its scores are finite, its class, how many classes would
    do, and under each rule the wrong classes that score at least as much as the best right one.
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
        rights: dict[Match, Tensor] = {"own": own, "any_in_image": present}
        columns = [scores.isfinite().all(1), ids, present.sum(1)]
        for match in MATCHES:
            best = scores.masked_fill(~rights[match], -torch.inf).amax(1, keepdim=True)
            columns.append(((scores >= best) & ~rights[match]).sum(1))
        self.views.append(torch.stack(columns, 1).int().cpu())

    def merged(self, world: World) -> Tensor:
        """The views of all ranks, on every rank."""
        return torch.cat(world.gather(torch.cat([torch.zeros(0, 5, dtype=torch.int32), *self.views])))

    def rows(self, views: Tensor, level: str, topk: tuple[int, ...], train_counts: list[int]) -> list[Accuracy]:
        finite, ids, right, *ahead_of_best = views.long().unbind(1)
        check_finite(finite.bool(), level)
        seen = torch.tensor(train_counts)[ids] > 0
        subsets = {"all": torch.ones_like(seen)}
        if not bool(seen.all()):
            subsets |= {"seen": seen, "held_out": ~seen}
        rows = []
        for match, ahead in zip(MATCHES, ahead_of_best, strict=True):
            enough = torch.ones_like(right) if match == "own" else right
            rows += [
                Accuracy(
                    level,
                    match,
                    name,
                    int(mask.sum()),
                    self.classes,
                    {k: float((ahead[mask] < k).double().mean()) for k in topk},
                    {k: random_hit_rate(k, self.classes, enough[mask]) for k in topk},
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
    world: World = ALONE,
    show_progress: bool = True,
) -> ZeroShotResult:
    """Zero-shot accuracy of `model` on one pass over `batches`.

    Args:
        model: a ScenarioCLIP; an EMA teacher lends it its weights by `teacher.averaged(model)`.
        batches: an `EvaluationLoader(...)` or any iterable of `Batch` on the model's device.
        vocabulary: gives the class texts, and which of them the train split contains.
        split: the name to put on the result.
        levels: of "global", "object" and "relation"; one without views in the split has no rows.
        topk: the numbers k.
        world: the ranks that share the split, each with `batches` of its own; all return the whole result.

    Raises:
        UserError: there is no scene at all, or embeddings that are not finite.
        ValueError: a k below 1.
    """
    topk = check_topk(topk)
    with evaluating(model):
        texts = class_embeddings(model, vocabulary, levels)
        tallies = {level: _Tally(len(texts[level])) for level in texts}
        scenes = 0
        for batch in (
            progress(batches, desc=f"zero-shot, {split}") if show_progress and world.is_main_process else batches
        ):
            scenes += batch.num_scenes
            for level, (pixels, ids, scene) in level_views(batch).items():
                if level in texts and len(ids):
                    present = torch.zeros(batch.num_scenes, len(texts[level]), dtype=torch.bool, device=ids.device)
                    present[scene, ids] = True
                    for some, scores in score_blocks(model, pixels, texts[level], level):
                        tallies[level].add(scores, ids[some], present[scene[some]])
    scenes = sum(world.gather(scenes))
    if scenes == 0:
        raise UserError(f"the {split} split holds no scenes: nothing to evaluate")
    rows = [
        row
        for level, tally in tallies.items()
        if len(views := tally.merged(world))
        for row in tally.rows(views, level, topk, vocabulary.train_counts(level))
    ]
    return ZeroShotResult(split, scenes, topk, rows)


def check_topk(topk: Sequence[int]) -> tuple[int, ...]:
    """The numbers k in ascending order, each once. ValueError for one below 1, or none."""
    if not topk or min(topk) < 1:
        raise ValueError(f"topk: got {tuple(topk)}, expected numbers >= 1")
    return tuple(sorted(set(topk)))


@contextmanager
def evaluating(model: object) -> Iterator[None]:
    """A module is in evaluation mode within, and then as it was. Others are left alone."""
    if not isinstance(model, torch.nn.Module):
        yield
        return
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)
