"""The cost model: bytes and operations of each rank in closed form, and the time of a step on a network.

Weak scaling: every GPU has the same number of scenes, and the loss compares the scenes of all GPUs. `traffic` and
`loss_operations` are compared with counts of real runs (runs.py); times are arithmetic on top of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from scenarioclip_fast.ops.contrastive.chunked import CHUNK
from scenarioclip_fast.train.step import IDS_PER_SCENE


@dataclass(frozen=True)
class Level:
    """The texts of a level: `per_scene` draws from `vocabulary` texts whose frequencies follow Zipf's law.

    vocabulary: 0 if all texts differ
    """

    per_scene: int
    vocabulary: int

    def probabilities(self) -> NDArray[np.float64]:  # [vocabulary]
        p = 1 / np.arange(1.0, self.vocabulary + 1)
        return np.asarray(p / p.sum())

    def distinct(self, draws: int) -> tuple[float, float]:
        """Return the mean and the standard deviation of the number of distinct texts among `draws`."""
        return _distinct(self.vocabulary, draws) if self.vocabulary else (float(draws), 0.0)

    def kept(self, draws: int, ranks: int) -> tuple[float, float]:
        """Return mean and standard deviation of the texts that one of `ranks` ranks, each with `draws`, exchanges."""
        return _kept(self.vocabulary, draws, ranks) if self.vocabulary else (float(draws), 0.0)


@functools.cache
def _distinct(vocabulary: int, draws: int) -> tuple[float, float]:
    p = Level(1, vocabulary).probabilities()
    missing = np.exp(draws * np.log1p(-p)) if vocabulary > 1 else np.zeros(1)
    # Poisson counts, corrected for their fixed sum.
    variance = (missing * (1 - missing)).sum() - draws * (p * missing).sum() ** 2
    return float((1 - missing).sum()), math.sqrt(max(variance, 0.0))


@functools.cache
def _kept(vocabulary: int, draws: int, ranks: int) -> tuple[float, float]:
    # A rank keeps a text that it has, with probability q, if none of the d ranks before it has, counted from one that
    # depends on the text: with probability q (1 - q)^d. Sums of these and of their squares over d, and over the texts.
    p = Level(1, vocabulary).probabilities()
    absent = np.exp(draws * np.log1p(-p)) if vocabulary > 1 else np.zeros(1)
    held = 1 - absent
    once, squares = 1 - absent**ranks, held * (1 - absent ** (2 * ranks)) / (1 + absent)
    # Poisson counts, corrected for the fixed sum of the rank's own.
    by_draw = (p * absent * once / np.maximum(held, 1e-300)).sum() / ranks
    return float(once.sum() / ranks), math.sqrt(max((once - squares).sum() / ranks - draws * by_draw**2, 0.0))


def largest(mean: float, deviation: float, ranks: int) -> float:
    """Return the expected largest of `ranks` normal values (Blom's approximation)."""
    return mean + deviation * NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25)) if ranks > 1 else mean


@dataclass(frozen=True)
class Workload:
    """What each rank holds.

    scenes: per rank;  width: D;  item: bytes of an embedding's element
    parameters: trained ones of model and loss, whose float32 gradients DistributedDataParallel averages
    """

    scenes: int
    levels: tuple[Level, Level, Level]
    width: int
    item: int
    parameters: int

    def rows(self, level: Level) -> int:
        return self.scenes * level.per_scene

    def texts(self, level: Level, ranks: int = 1) -> float:
        """Distinct texts of `ranks` ranks together."""
        return level.distinct(ranks * self.rows(level))[0]

    def most(self, ranks: int) -> float:
        """Distinct texts of all levels on the rank that has most: shares are padded to it."""
        return _most([level.distinct(self.rows(level)) for level in self.levels], ranks)

    def kept(self, ranks: int, levels: Sequence[Level] | None = None) -> float:
        """Texts of `levels` that the rank exchanges that exchanges most, if each text travels once."""
        levels = self.levels if levels is None else levels
        return _most([level.kept(self.rows(level), ranks) for level in levels], ranks)

    def chunks(self, ranks: int) -> list[int]:
        """Return into how many chunks each level's texts are divided; [] if they are not."""
        if max(self.texts(level, ranks) for level in self.levels) <= CHUNK:
            return []
        return [math.ceil(self.kept(ranks, [level]) / max(CHUNK // ranks, 1)) for level in self.levels]


def _most(levels: Sequence[tuple[float, float]], ranks: int) -> float:
    means, deviations = zip(*levels, strict=True)
    return largest(sum(means), math.hypot(*deviations), ranks)


@dataclass(frozen=True)
class Collective:
    """A collective of one step; `bytes` is what a rank contributes, for a reduce-scatter its whole input.

    phase: "batch" (sizes and ids, in host memory), "forward", "backward", "gradients" (of the weights), "metrics"
    """

    phase: str
    op: str
    bytes: float

    def sent(self, ranks: int) -> float:
        """Return the bytes that a rank sends in a ring."""
        share = {"all_reduce": 2, "all_gather": ranks, "reduce_scatter": 1}[self.op]
        return share * self.bytes * (ranks - 1) / ranks


_LENGTHS = 256  # bytes of a rank's sizes and flags: 32 integers
_TERMS = 8  # of the loss, which the log averages
_FIRST_BUCKET, _BUCKET = 2**20, 25 * 2**20  # bytes, as DistributedDataParallel's defaults


def buckets(parameters: int) -> list[float]:
    """Return the bytes of each bucket of gradients, in the order of the backward pass, for parameters of any size."""
    total = 4.0 * parameters
    rest = max(total - _FIRST_BUCKET, 0.0)
    full = int(rest // _BUCKET)
    sizes = [min(total, _FIRST_BUCKET), *[float(_BUCKET)] * full, rest - full * _BUCKET]
    return [size for size in sizes if size > 0]


def traffic(form: str, work: Workload, ranks: int) -> list[Collective]:
    """Return the collectives of a step.

    form: "ours"; "open_clip" or "open_clip, local loss", which exchange the same
    """
    out = [Collective("gradients", "all_reduce", size) for size in buckets(work.parameters)]
    out += [Collective("metrics", "all_reduce", 4 * _TERMS)]
    if form.startswith("open_clip"):
        for level in work.levels:
            features = work.rows(level) * work.width * work.item
            out += [Collective("forward", "all_gather", features)] * 2  # images and texts
            out += [Collective("backward", "reduce_scatter", ranks * features)] * 2
        return out
    merged = sum(work.texts(level, ranks) for level in work.levels)
    out += [Collective("batch", "all_gather", _LENGTHS + 8 * IDS_PER_SCENE * work.scenes)]
    if chunks := work.chunks(ranks):
        levels = list(zip([work.kept(ranks, [level]) for level in work.levels], chunks, strict=True))
    else:
        levels = [(work.kept(ranks), 1)]
    for texts, calls in levels:
        numbers = texts * work.width / calls
        out += [Collective("forward", "all_gather", numbers * work.item)] * calls
        out += [Collective("backward", "reduce_scatter", ranks * numbers * 4)] * calls  # summed in float32
    # Counts of rows, the columns' maxima, their sums; then the gradients of these: 8 bytes a number.
    sums = merged + len(work.levels)
    out += [Collective("forward", "all_reduce", 8 * numbers) for numbers in (merged, merged, sums)]
    return [*out, Collective("backward", "all_reduce", 8 * sums)]


def sent_by_gloo(form: str, work: Workload, ranks: int) -> float:
    """Return the bytes that a rank sends in a step over gloo, whose reduce-scatter is an all-reduce."""
    twice = not form.startswith("open_clip")  # its gradients are scattered one rank after the other
    return sum(c.sent(ranks) * (2 if twice and c.op == "reduce_scatter" else 1) for c in traffic(form, work, ranks))


def logits(form: str, work: Workload, ranks: int) -> float:
    """Return the logits that a rank computes."""
    if form == "open_clip":
        return float(sum((ranks * work.rows(level)) ** 2 for level in work.levels))
    if form == "open_clip, local loss":  # two matrices: of images and of texts
        return float(sum(2 * ranks * work.rows(level) ** 2 for level in work.levels))
    return sum(work.rows(level) * work.texts(level, ranks) for level in work.levels)


def loss_operations(form: str, work: Workload, ranks: int) -> float:
    """Return additions and multiplications of the loss's products; this package recomputes the logits once."""
    products = 3 if form.startswith("open_clip") else 4
    return products * 2 * work.width * logits(form, work, ranks)


SMALL = Workload(64, (Level(1, 300), Level(6, 133), Level(3, 4000)), width=64, item=2, parameters=0)
"""Of the counted runs; `parameters` are set from their model."""
# The published run: the classes of OpenPSG; six objects and three relations in a scene, as in bench_step.py.
PUBLISHED = (Level(1, 364), Level(6, 11_572), Level(3, 84_018))
DISTINCT = (Level(1, 0), Level(6, 0), Level(3, 0))
