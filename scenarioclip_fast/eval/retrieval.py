"""Cross-modal retrieval: from a view to its text, and from a text to a view of it, at each level.

The gallery of texts is the distinct texts of the split; that of images all its views of the level. A view's query
asks for the view's own text, and there is one. A text's query, one per distinct text, asks for any of the views
that carry it: recall at k is the share of queries with a right answer among the first k. A tie counts against the
model, as in `zeroshot`.

Similarities are computed in blocks and dropped: no views x texts matrix is kept. Ranks of several processes exchange
one number per text, so features stay where they were made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from scenarioclip_fast.data.batch import Batch
from scenarioclip_fast.data.vocabulary import LEVELS, Vocabulary
from scenarioclip_fast.distributed import World
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.eval.features import embed_views
from scenarioclip_fast.eval.tables import percent, text_table
from scenarioclip_fast.eval.zeroshot import ALONE, TASKS, Encoder, check_topk, embed_texts, evaluating, random_hit_rate

Direction = Literal["image_to_text", "text_to_image"]
DIRECTIONS: dict[Direction, str] = {"image_to_text": "image to text", "text_to_image": "text to image"}

_BLOCK = 1 << 24  # similarities at once: 64 MiB


@dataclass(frozen=True)
class Recall:
    """Recall at k of one level in one direction.

    `recall` and `chance` map k to a share in [0, 1]; `chance` is what a random ranking of the gallery scores in
    expectation. `median_rank` counts from 1: half of the queries find a right answer there or earlier.
    """

    level: str
    direction: str
    queries: int
    gallery: int
    recall: dict[int, float]
    chance: dict[int, float]
    median_rank: float


@dataclass(frozen=True)
class RetrievalResult:
    """Every recall of one evaluation. `to_dict()` is ready for JSON, `str()` is the table."""

    split: str
    scenes: int
    topk: tuple[int, ...]
    rows: list[Recall] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows, as text."""
        head = ["level", "direction", "queries", "gallery", *(f"R@{k} (chance)" for k in self.topk), "median rank"]
        body = [
            [TASKS[row.level], DIRECTIONS[row.direction], f"{row.queries}", f"{row.gallery}"]  # type: ignore[index]
            + [f"{percent(row.recall[k])} ({100 * row.chance[k]:.1f})" for k in self.topk]
            + [f"{row.median_rank:g}"]
            for row in self.rows
        ]
        return head, body

    def __str__(self) -> str:
        return text_table(*self.table(), names=2)


@torch.no_grad()
def retrieval(
    model: Encoder,
    batches: Iterable[Batch],
    vocabulary: Vocabulary,
    *,
    split: str = "test",
    levels: Sequence[str] = LEVELS,
    topk: Sequence[int] = (1, 5, 10),
    world: World = ALONE,
    show_progress: bool = True,
) -> RetrievalResult:
    """Recall at k of `model` in both directions, on one pass over `batches`. Arguments and errors as of `zeroshot`."""
    topk = check_topk(topk)
    features = embed_views(
        model, batches, levels, desc=f"retrieval, {split}", show_progress=show_progress and world.is_main_process
    )
    scenes = sum(world.gather(len(features.keys)))
    if scenes == 0:
        raise UserError(f"the {split} split holds no scenes: nothing to evaluate")
    rows: list[Recall] = []
    for level in levels:
        tokens = vocabulary.tokens(level)
        own = features.levels.get(level)
        device = world.device if own is None else own.image.device
        ids = torch.empty(0, dtype=torch.int64, device=device) if own is None else own.text_id
        count = world.sum_(torch.bincount(ids, minlength=len(tokens)))  # [all texts of the vocabulary]
        present = count.nonzero()[:, 0]
        if len(present) == 0:
            continue
        with evaluating(model):
            text = embed_texts(model, [tokens[i] for i in present.tolist()], level)
        image = text[:0] if own is None else F.normalize(own.image, dim=-1)
        to_text, to_image = ranks(image, text, torch.searchsorted(present, ids), world)
        views = int(count.sum())
        found = {"image_to_text": (to_text, len(present)), "text_to_image": (to_image.bincount(), views)}
        right = {"image_to_text": torch.ones(1), "text_to_image": count[present].cpu()}
        for direction, (histogram, gallery) in found.items():
            passed = histogram.cumsum(0).cpu()
            queries = int(passed[-1])
            middle = torch.tensor([(queries + 1) // 2, queries // 2 + 1])
            rows.append(
                Recall(
                    level,
                    direction,
                    queries,
                    gallery,
                    {k: int(passed[min(k, len(passed)) - 1]) / queries for k in topk},
                    {k: random_hit_rate(k, gallery, right[direction]) for k in topk},
                    float((torch.searchsorted(passed, middle) + 1).double().mean()),
                )
            )
    return RetrievalResult(split, scenes, topk, rows)


def ranks(
    image: Tensor,  # [N, D], unit length: this rank's
    text: Tensor,  # [U, D], unit length, distinct, the same on every rank
    text_index: Tensor,  # [N] int64: the text of each image
    world: World = ALONE,
) -> tuple[Tensor, Tensor]:  # [U], [U], int64
    """Where the right answers stand, counted from 0, among all ranks' images.

    Returns how many images find their text at rank r, for r = 0 to U - 1, and for each text the rank of the first
    image that carries it. Needs N + U numbers and one block of similarities; float32 throughout.
    """
    best = text.new_full((text.shape[0],), -torch.inf)
    for rows, scores in _blocks(image, text):
        index = text_index[rows]
        best.scatter_reduce_(0, index, scores.gather(1, index[:, None])[:, 0], "amax")
    if world.group is not None:
        dist.all_reduce(best, op=dist.ReduceOp.MAX, group=world.group)
    to_text, to_image = (torch.zeros(text.shape[0], dtype=torch.int64, device=text.device) for _ in range(2))
    for rows, scores in _blocks(image, text):
        own = text_index[rows][:, None]
        right = scores.gather(1, own)
        # The right answers never stand ahead of themselves; whatever is not below one does, NaN included.
        to_text += (~(scores < right)).scatter_(1, own, False).sum(1).bincount(minlength=text.shape[0])
        to_image += (~(scores < best)).scatter_(1, own, False).sum(0)
    return world.sum_(to_text), world.sum_(to_image)


def _blocks(image: Tensor, text: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Cosines of some images with all texts, block by block."""
    step = max(1, _BLOCK // text.shape[0])
    for start in range(0, image.shape[0], step):
        rows = slice(start, start + step)
        yield rows, image[rows] @ text.T
