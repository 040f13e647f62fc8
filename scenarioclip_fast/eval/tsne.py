"""t-SNE map of the embeddings of one level, and the 1-NN accuracy of the embeddings.

In a t-SNE map, only neighbourhoods are meaningful, not distances between clusters or cluster sizes. The 1-NN accuracy
is computed from the embeddings: the fraction of views whose nearest neighbour by cosine similarity has the same class.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from scenarioclip_fast.data.vocabulary import Vocabulary
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.eval.features import Features
from scenarioclip_fast.eval.tables import TASKS, percent, text_table
from scenarioclip_fast.requirements import require

PERPLEXITY = 30.0
MIN_VIEWS = 10


@dataclass(frozen=True)
class EmbeddingMap:
    """A t-SNE map; `keys`, `label`, `x` and `y` have one entry per view.

    Attributes:
        classes: the most frequent classes of the split, in descending order of frequency.
        keys: scene keys.
        label: indices into `classes`.
        agreement: 1-NN accuracy: fraction of views whose nearest neighbour has the same class.
        chance: 1-NN accuracy for a random neighbour.
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
        """The header and one row, as text."""
        head = ["task", "views", "classes", "1-NN accuracy", "chance"]
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
    """Compute a t-SNE map of the views of the `classes` most frequent texts of `level`.

    Args:
        features: features of the split, on the CPU.
        vocabulary: provides the class texts.
        split: name of the split, for the result.
        level: "global", "object" or "relation".
        classes: number of classes.
        views: maximum number of views, divided equally among the classes if they have enough.
        seed: random seed of t-SNE; reproducible on one machine.

    Raises:
        UserError: fewer than two classes or MIN_VIEWS views, or all embeddings are equal.
        MissingDependencyError: scikit-learn is not installed.
    """
    manifold = require("sklearn.manifold")
    check_settings(classes, views, seed)
    rows = features.levels.get(level)
    texts = vocabulary.texts(level)
    counts = torch.zeros(len(texts), dtype=torch.int64) if rows is None else rows.text_id.bincount(minlength=len(texts))
    # At least two views per class, so that each can have a neighbour of the same class.
    limit = min(classes, views // 2)
    frequent = [i for i in counts.sort(descending=True, stable=True).indices[:limit].tolist() if counts[i]]
    chosen = [] if rows is None else _choose_views(rows.text_id, frequent, views)
    total = sum(map(len, chosen))
    if rows is None or len(frequent) < 2 or total < MIN_VIEWS:
        raise UserError(
            f"the {split} split has {total} {level} views of {len(frequent)} classes, expected at least {MIN_VIEWS} "
            "of 2 classes: use a larger split"
        )
    index = torch.cat(chosen)
    label = torch.repeat_interleave(torch.tensor([len(index) for index in chosen]))
    image = F.normalize(rows.image[index].float(), dim=-1)
    if bool((image == image[0]).all()):
        raise UserError(f"all {total} {level} embeddings have the same direction: nothing to map")
    perplexity = min(PERPLEXITY, (total - 1) / 3)
    layout = manifold.TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(image.numpy())
    same = [(label == i).sum().item() for i in range(len(frequent))]
    return EmbeddingMap(
        split,
        level,
        classes=[texts[i] for i in frequent],
        keys=[features.keys[i] for i in rows.scene[index].tolist()],
        label=label.tolist(),
        x=layout[:, 0].tolist(),
        y=layout[:, 1].tolist(),
        agreement=float((label[_nearest(image)] == label).float().mean()),
        chance=sum(n * (n - 1) for n in same) / (total * (total - 1)),
    )


def check_settings(classes: int, views: int, seed: int) -> None:
    """Raise UserError if there are too few classes or views, or scikit-learn would reject the seed."""
    if classes < 2:
        raise UserError(f"classes: got {classes}, expected at least 2")
    if views < MIN_VIEWS:
        raise UserError(f"views: got {views}, expected at least {MIN_VIEWS}")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed: got {seed}, expected 0 to 2^32 - 1")


def _choose_views(
    text_id: torch.Tensor,  # [n]
    classes: list[int],
    views: int,
) -> list[torch.Tensor]:
    """Choose at most `views` views in total, and return the rows of each class."""
    each, more = divmod(views, max(len(classes), 1))
    rows = [(text_id == i).nonzero()[:, 0] for i in classes]
    return [_spread(class_rows, each + (i < more)) for i, class_rows in enumerate(rows)]


def _spread(rows: torch.Tensor, limit: int) -> torch.Tensor:
    """At most `limit` of the rows, evenly spaced."""
    if len(rows) <= limit:
        return rows
    return rows[torch.arange(limit) * len(rows) // max(limit, 1)]


def _nearest(
    image: torch.Tensor,  # [n, D], unit length
) -> torch.Tensor:  # [n]
    """Index of each row's nearest other row."""
    found = []
    for start in range(0, len(image), 1024):
        cosine = image[start : start + 1024] @ image.T
        cosine.diagonal(start).fill_(-torch.inf)
        found.append(cosine.argmax(1))
    return torch.cat(found)
