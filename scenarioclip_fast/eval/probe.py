"""Linear probes of the three tasks on frozen embeddings.

As published: `Linear(D, classes)` on the unnormalised encoder outputs, trained by AdamW with weight decay 5e-4. The
learning rate follows a cosine schedule from `lr` to 0. With a validation split, the weights with the best top-1
accuracy on it are selected among `CHECKS` evenly spaced steps (early stopping); without one, the last weights are used.
The test split is used once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scenarioclip_fast.data.vocabulary import Vocabulary
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.eval.features import Features, LevelFeatures
from scenarioclip_fast.eval.ranking import check_topk
from scenarioclip_fast.eval.tables import TASKS, text_table
from scenarioclip_fast.levels import LEVELS
from scenarioclip_fast.progress import progress

WEIGHT_DECAY = 5e-4
CHECKS = 20
_BLOCK = 1 << 24  # scores per block: 64 MiB


@dataclass(frozen=True)
class ProbeSettings:
    """Training settings of probes: `steps` with `batch_size` views (or all, if there are fewer), once per seed."""

    steps: int = 1000
    batch_size: int = 512
    lr: float = 3e-3
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name.replace('_', ' ')}: got {getattr(self, name)}, expected at least 1")
        if not self.lr > 0:
            raise UserError(f"lr: got {self.lr}, expected more than 0")
        if not self.seeds:
            raise UserError("seeds: got none, expected at least one")


@dataclass(frozen=True)
class ProbeAccuracy:
    """Top-k accuracy of one level's probe on the test split.

    Attributes:
        level: "global", "object" or "relation".
        views: views of the test split.
        unseen: number of these views whose class does not occur in the train split.
        classes: number of classes in the vocabulary.
        train_views: views of the train split.
        top: k -> accuracy in [0, 1], mean over seeds.
        spread: k -> standard deviation over seeds; 0 for a single seed.
        baseline: k -> accuracy of always predicting the k most frequent classes of the train split.
        step: step of the selected weights, per seed.
    """

    level: str
    views: int
    unseen: int
    classes: int
    train_views: int
    top: dict[int, float]
    spread: dict[int, float]
    baseline: dict[int, float]
    step: list[int]


@dataclass(frozen=True)
class ProbeResult:
    """The accuracies of one evaluation. `to_dict()` can be serialised as JSON; `str()` is the table."""

    split: str
    topk: tuple[int, ...]
    settings: ProbeSettings
    chosen_on_val: bool
    rows: list[ProbeAccuracy] = field(default_factory=list)

    def get(self, level: str) -> ProbeAccuracy | None:
        """The row for `level`; None if a split has no views of it."""
        return next((row for row in self.rows if row.level == level), None)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """The header and rows, as text."""
        several = len(self.settings.seeds) > 1
        head = ["task", "train views", "views", "views of unseen classes", "classes"]
        head += [f"top-{k} (majority)" for k in self.topk]
        body = [
            [TASKS[row.level], f"{row.train_views}", f"{row.views}", f"{row.unseen}", f"{row.classes}"]
            + [
                f"{100 * row.top[k]:.1f}{f' ± {100 * row.spread[k]:.1f}' if several else ''} % "
                f"({100 * row.baseline[k]:.1f})"
                for k in self.topk
            ]
            for row in self.rows
        ]
        return head, body

    def __str__(self) -> str:
        return text_table(*self.table(), names=1)


def linear_probe(
    train: Features,
    test: Features,
    vocabulary: Vocabulary,
    *,
    val: Features | None = None,
    split: str = "test",
    topk: Sequence[int] = (1, 5, 10),
    settings: ProbeSettings | None = None,
    device: str | torch.device = "cpu",
    show_progress: bool = True,
) -> ProbeResult:
    """Train one probe per level and seed on `train`, select its weights on `val`, and evaluate it on `test`.

    Levels without views in `train` or `test` have no row; for levels without views in `val`, the last weights are used.

    Raises:
        UserError: no level has views in both `train` and `test`.
        ValueError: `topk` is empty or has a number below 1.
    """
    topk = check_topk(topk)
    settings = settings or ProbeSettings()
    levels = [level for level in LEVELS if level in train.levels and level in test.levels]
    if not levels:
        raise UserError(f"no level has views in both the train and the {split} split: nothing to probe")
    jobs = [(level, seed) for level in levels for seed in settings.seeds]
    scores: dict[str, dict[int, list[float]]] = {level: {k: [] for k in topk} for level in levels}
    steps: dict[str, list[int]] = {level: [] for level in levels}
    for level, seed in progress(jobs, desc="linear probes", unit="probes") if show_progress else jobs:
        selection = val.levels.get(level) if val else None
        classes = len(vocabulary.texts(level))
        head, step = _fit(
            _to_device(train.levels[level], device),
            selection and _to_device(selection, device),
            classes,
            settings,
            seed,
        )
        steps[level].append(step)
        ranks = _ranks(head, _to_device(test.levels[level], device))
        for k in topk:
            scores[level][k].append(_topk_accuracy(ranks, k))
    rows = [
        _summarise(
            level,
            train.levels[level].text_id,
            test.levels[level].text_id,
            len(vocabulary.texts(level)),
            scores[level],
            steps[level],
        )
        for level in levels
    ]
    return ProbeResult(split, topk, settings, bool(val and val.levels), rows)


def _summarise(
    level: str,
    train: Tensor,  # [n] class ids
    test: Tensor,  # [m] class ids
    classes: int,
    scores: dict[int, list[float]],
    steps: list[int],
) -> ProbeAccuracy:
    """Summarise `scores` (k -> accuracy per seed) in one row, with the majority baseline."""
    counts = train.bincount(minlength=classes)
    frequent = counts.sort(descending=True, stable=True).indices
    return ProbeAccuracy(
        level,
        views=len(test),
        unseen=int((counts[test] == 0).sum()),
        classes=len(counts),
        train_views=len(train),
        top={k: fmean(values) for k, values in scores.items()},
        spread={k: stdev(values) if len(values) > 1 else 0.0 for k, values in scores.items()},
        baseline={k: int(torch.isin(test, frequent[:k]).sum()) / len(test) for k in scores},
        step=steps,
    )


def _to_device(rows: LevelFeatures, device: str | torch.device) -> LevelFeatures:
    return LevelFeatures(*(t.to(device) for t in (rows.image, rows.text_id, rows.scene)))


def _fit(
    train: LevelFeatures,
    val: LevelFeatures | None,
    classes: int,
    settings: ProbeSettings,
    seed: int,
) -> tuple[nn.Linear, int]:
    """Train a head; return it and the step of its weights. Bitwise reproducible for a seed on the same hardware."""
    device, width = train.image.device, train.image.shape[1]
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(width, classes, device=device)
    with torch.no_grad():
        for p in head.parameters():  # initialisation of nn.Linear, with a seeded generator
            p.copy_((torch.rand(p.shape, generator=generator) * 2 - 1) / math.sqrt(width))
    optimizer = torch.optim.AdamW(head.parameters(), lr=settings.lr, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    every = max(1, settings.steps // CHECKS)
    best, best_step, best_state = -1.0, settings.steps, None
    for step, order in enumerate(_batches(len(train), settings, generator), start=1):
        rows = order.to(device)
        loss = F.cross_entropy(head(train.image[rows]), train.text_id[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if val is not None and (step % every == 0 or step == settings.steps):
            accuracy = _topk_accuracy(_ranks(head, val), 1)
            if accuracy > best:
                best, best_step = accuracy, step
                best_state = {name: p.clone() for name, p in head.state_dict().items()}
    if best_state is not None:
        head.load_state_dict(best_state)
    return head, best_step


def _batches(views: int, settings: ProbeSettings, generator: torch.Generator) -> list[Tensor]:
    """The rows of each step; each epoch reshuffles the views and drops the last partial batch."""
    size = min(settings.batch_size, views)
    per_epoch = views // size
    out: list[Tensor] = []
    while len(out) < settings.steps:
        order = torch.randperm(views, generator=generator)
        out += order[: per_epoch * size].split(size)
    return out[: settings.steps]


@torch.no_grad()
def _ranks(head: nn.Linear, rows: LevelFeatures) -> Tensor:  # [n]
    """Rank of each view's true class, from 0: the number of other classes that score at least as high."""
    found = []
    step = max(1, _BLOCK // head.out_features)
    for image, ids in zip(rows.image.split(step), rows.text_id.split(step), strict=True):
        scores = head(image)
        found.append((~(scores < scores.gather(1, ids[:, None]))).sum(1) - 1)
    return torch.cat(found)


def _topk_accuracy(ranks: Tensor, k: int) -> float:
    return int((ranks < k).sum()) / len(ranks)
