"""Cross-modal retrieval between views and texts, in both directions, at each level.

The text gallery consists of the distinct texts of the split, the image gallery of all views of the level. An image
query has one correct answer, its own text. There is one text query per distinct text, and any view with that text is
correct. Recall at k is the fraction of queries with a correct answer among the first k; ties count against the model,
as in `zeroshot`.

Similarities are computed in blocks, so no views x texts matrix is stored. Processes exchange one number per text, and
features stay on the rank that computed them.
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
from scenarioclip_fast.data.vocabulary import Vocabulary
from scenarioclip_fast.distributed import World
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.eval.encoding import SINGLE_PROCESS, Encoder, embed_texts, evaluating
from scenarioclip_fast.eval.features import embed_views
from scenarioclip_fast.eval.ranking import check_topk, random_hit_rate
from scenarioclip_fast.eval.tables import TASKS, percent, text_table
from scenarioclip_fast.levels import LEVELS

Direction = Literal["image_to_text", "text_to_image"]
DIRECTIONS: dict[Direction, str] = {"image_to_text": "image to text", "text_to_image": "text to image"}

_BLOCK = 1 << 24  # similarities per block: 64 MiB


@dataclass(frozen=True)
class Recall:
    """Recall at k of one level in one direction.

    `recall` and `chance` map k to a value in [0, 1]; `chance` is the expected recall of a random ranking of the
    gallery. `median_rank`, from 1, is the median over queries of the rank of the first correct answer.
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
    """All recalls of one evaluation. `to_dict()` can be serialised as JSON; `str()` is the table."""

    split: str
    scenes: int
    topk: tuple[int, ...]
    rows: list[Recall] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """The header and rows, as text."""
        head = ["task", "direction", "queries", "gallery", *(f"R@{k} (chance)" for k in self.topk), "median rank"]
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
    world: World = SINGLE_PROCESS,
    show_progress: bool = True,
) -> RetrievalResult:
    """Measure recall at k in both directions, in one pass over `batches`. Arguments and errors as for `zeroshot`."""
    topk = check_topk(topk)
    features = embed_views(
        model, batches, levels, desc=f"retrieval, {split}", show_progress=show_progress and world.is_main_process
    )
    scenes = sum(world.gather(len(features.keys)))
    if scenes == 0:
        raise UserError(f"the {split} split has no scenes: nothing to evaluate")
    rows: list[Recall] = []
    for level in levels:
        tokens = vocabulary.tokens(level)
        found = features.levels.get(level)
        device = world.device if found is None else found.image.device
        ids = torch.empty(0, dtype=torch.int64, device=device) if found is None else found.text_id
        count = world.sum_(torch.bincount(ids, minlength=len(tokens)))  # [all texts of the vocabulary]
        present = count.nonzero()[:, 0]
        if len(present) == 0:
            continue
        with evaluating(model):
            text = embed_texts(model, [tokens[i] for i in present.tolist()], level)
        image = text[:0] if found is None else F.normalize(found.image, dim=-1)
        to_text, to_image = ranks(image, text, torch.searchsorted(present, ids), world)
        views = int(count.sum())
        rows += [
            _recall(level, "image_to_text", to_text, len(present), torch.ones(1), topk),
            _recall(level, "text_to_image", to_image.bincount(), views, count[present].cpu(), topk),
        ]
    return RetrievalResult(split, scenes, topk, rows)


def _recall(
    level: str,
    direction: Direction,
    histogram: Tensor,  # [ranks] number of queries whose first correct answer has that rank
    gallery: int,
    correct: Tensor,  # number of correct answers of each query, or one number for all
    topk: Sequence[int],
) -> Recall:
    found = histogram.cumsum(0).cpu()
    queries = int(found[-1])
    middle = torch.tensor([(queries + 1) // 2, queries // 2 + 1])
    return Recall(
        level,
        direction,
        queries,
        gallery,
        recall={k: int(found[min(k, len(found)) - 1]) / queries for k in topk},
        chance={k: random_hit_rate(k, gallery, correct) for k in topk},
        median_rank=float((torch.searchsorted(found, middle) + 1).double().mean()),
    )


def ranks(
    image: Tensor,  # [N, D], unit length, of this rank
    text: Tensor,  # [U, D], unit length, distinct, the same on every rank
    text_index: Tensor,  # [N] int64, the text of each image
    world: World = SINGLE_PROCESS,
) -> tuple[Tensor, Tensor]:  # [U], [U], int64
    """Rank the correct answers, from 0, among the images of all processes.

    Memory: N + U numbers and one block of float32 similarities.

    Returns:
        For r = 0 to U - 1, the number of images whose text has rank r; and for each text, the rank of the first image
        with that text.
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
        correct = scores.gather(1, own)
        # "not less" instead of "greater or equal", so that NaN ranks higher; correct answers do not outrank themselves.
        to_text += (~(scores < correct)).scatter_(1, own, False).sum(1).bincount(minlength=text.shape[0])
        to_image += (~(scores < best)).scatter_(1, own, False).sum(0)
    return world.sum_(to_text), world.sum_(to_image)


def _blocks(image: Tensor, text: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield similarities of images with all texts, in blocks."""
    step = max(1, _BLOCK // text.shape[0])
    for start in range(0, image.shape[0], step):
        rows = slice(start, start + step)
        yield rows, image[rows] @ text.T
