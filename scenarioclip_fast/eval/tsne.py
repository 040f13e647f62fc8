"""A map of the embeddings of one level: t-SNE puts views that the model finds alike next to each other.

The picture shows neighbourhoods; distances between groups and their sizes mean nothing. Beside it stands a number
that needs no map: how often a view's nearest neighbour, by cosine in the embedding itself, is of the same class.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from scenarioclip_fast.data.vocabulary import Vocabulary
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.eval.features import Features
from scenarioclip_fast.eval.tables import percent, text_table
from scenarioclip_fast.eval.zeroshot import TASKS
from scenarioclip_fast.requirements import require

PERPLEXITY = 30.0
MIN_VIEWS = 10


@dataclass(frozen=True)
class EmbeddingMap:
    """Where each view lies: `x`, `y` and `label` have one entry per view, `label` being a position in `classes`.

    classes: the most frequent ones of the split, the most frequent first
    agreement: the share of views whose nearest neighbour is of their class; chance: the same of a random one
    """

    split: str
    level: str
    classes: list[str]
    keys: list[str]
    label: list[int]
    x: list[float]
    y: list[float]
    agreement: float
    chance: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and one row, as text."""
        head = ["level", "views", "classes", "nearest neighbour of the same class", "chance"]
        row = [TASKS[self.level], f"{len(self.x)}", f"{len(self.classes)}"]
        return head, [[*row, percent(self.agreement), percent(self.chance)]]

    def __str__(self) -> str:
        return text_table(*self.table(), names=1)


def embedding_map(
    features: Features,
    vocabulary: Vocabulary,
    *,
    split: str = "test",
    level: str = "object",
    classes: int = 20,
    views: int = 2000,
    seed: int = 0,
) -> EmbeddingMap:
    """Lays out the views of the `classes` most frequent texts of `level`.

    Args:
        features: of the split, on the CPU.
        views: at most so many are shown, an equal number of each class where there are enough.
        seed: of the layout, which is the same for the same seed and features on one machine.

    Raises:
        UserError: fewer than two classes or MIN_VIEWS views, or embeddings that are all the same.
        MissingDependencyError: scikit-learn is not installed.
    """
    manifold = require("sklearn.manifold")
    check_settings(classes, views, seed)
    rows = features.levels.get(level)
    texts = vocabulary.texts(level)
    counts = torch.zeros(len(texts), dtype=torch.int64) if rows is None else rows.text_id.bincount(minlength=len(texts))
    # each class with a neighbour of its own
    most = min(classes, views // 2)
    frequent = [i for i in counts.sort(descending=True, stable=True).indices[:most].tolist() if counts[i]]
    chosen = []
    if rows is not None:
        each, more = divmod(views, max(len(frequent), 1))
        for place, i in enumerate(frequent):
            chosen.append(_spread((rows.text_id == i).nonzero()[:, 0], each + (place < more)))
    total = sum(map(len, chosen))
    if rows is None or len(frequent) < 2 or total < MIN_VIEWS:
        raise UserError(
            f"the {split} split has {total} {level} views of {len(frequent)} classes, expected at least {MIN_VIEWS} "
            "of 2: take a larger split"
        )
    index = torch.cat(chosen)
    label = torch.repeat_interleave(torch.tensor([len(own) for own in chosen]))
    image = F.normalize(rows.image[index].float(), dim=-1)
    if bool((image == image[0]).all()):
        raise UserError(f"all {total} {level} embeddings point the same way: there is nothing to map")
    perplexity = min(PERPLEXITY, (total - 1) / 3)
    layout = manifold.TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(image.numpy())
    same = [(label == i).sum().item() for i in range(len(frequent))]
    return EmbeddingMap(
        split,
        level,
        [texts[i] for i in frequent],
        [features.keys[i] for i in rows.scene[index].tolist()],
        label.tolist(),
        layout[:, 0].tolist(),
        layout[:, 1].tolist(),
        float((label[_nearest(image)] == label).float().mean()),
        sum(n * (n - 1) for n in same) / (total * (total - 1)),
    )


def check_settings(classes: int, views: int, seed: int) -> None:
    """UserError where a map of so few classes or views would show nothing, or scikit-learn knows no such seed."""
    if classes < 2:
        raise UserError(f"classes: got {classes}, expected at least 2")
    if views < MIN_VIEWS:
        raise UserError(f"views: got {views}, expected at least {MIN_VIEWS}")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed: got {seed}, expected 0 to 2^32 - 1")


def _spread(rows: torch.Tensor, limit: int) -> torch.Tensor:
    """At most `limit` of the rows, at even distances."""
    if len(rows) <= limit:
        return rows
    return rows[torch.arange(limit) * len(rows) // max(limit, 1)]


def _nearest(
    image: torch.Tensor,  # [n, D], unit length
) -> torch.Tensor:  # [n]
    """The position of each row's nearest other row."""
    found = []
    for start in range(0, len(image), 1024):
        cosine = image[start : start + 1024] @ image.T
        cosine.diagonal(start).fill_(-torch.inf)
        found.append(cosine.argmax(1))
    return torch.cat(found)
