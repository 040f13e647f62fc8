"""Hard negatives: does a relation view score its true text above one that differs in a single part?

There are two kinds of negatives, each compared pairwise with the true text, so chance is 50 %:

swapped     subject and object swapped: "man riding horse" becomes "horse riding man"
predicate   predicate replaced by another of the vocabulary: "man riding horse" becomes "man under horse"

The text of another relation of the image is never used as a negative. For a symmetric predicate ("next to"), the
swapped text is true although not annotated, and no model can distinguish the two. Ties score half a point.
"""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F

from scenarioclip_fast.data.batch import Batch
from scenarioclip_fast.data.splitmix64 import hash64
from scenarioclip_fast.data.vocabulary import Vocabulary, tokenize
from scenarioclip_fast.distributed import World
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.eval.encoding import SINGLE_PROCESS, Encoder, embed_texts, evaluating
from scenarioclip_fast.eval.features import Features, embed_views
from scenarioclip_fast.eval.tables import percent, text_table

Kind = Literal["swapped", "predicate"]
KINDS: dict[Kind, str] = {"swapped": "subject and object swapped", "predicate": "predicate replaced"}
CHANCE = 0.5
_CHUNK = 1 << 14  # pairs compared at once


class Triple(NamedTuple):
    """The parts of a relation's text."""

    subject: str
    predicate: str
    object: str

    def __str__(self) -> str:
        return " ".join(self)


@dataclass(frozen=True)
class NegativesAccuracy:
    """Fraction of pairs in which the true text scored higher, for one kind, optionally for one true predicate."""

    kind: str
    accuracy: float
    questions: int
    predicate: str | None = None


@dataclass(frozen=True)
class NegativesResult:
    """Accuracies of one evaluation. `to_dict()` can be serialised as JSON; `str()` is the table.

    `rows` has one entry per kind, `predicates` one per kind and true predicate, most frequent first. `without` counts
    the relations without a valid negative, per kind.
    """

    split: str
    relations: int
    rows: list[NegativesAccuracy] = field(default_factory=list)
    predicates: list[NegativesAccuracy] = field(default_factory=list)
    without: dict[str, int] = field(default_factory=dict)

    def get(self, kind: Kind) -> NegativesAccuracy | None:
        """The row for `kind`; None if no relation has such a negative."""
        return next((row for row in self.rows if row.kind == kind), None)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """The header and rows, as text."""
        head = ["negative", "accuracy", "chance", "pairs", "relations without a negative"]
        body = [
            [
                KINDS[row.kind],  # type: ignore[index]
                percent(row.accuracy),
                percent(CHANCE),
                f"{row.questions}",
                f"{self.without[row.kind]}",
            ]
            for row in self.rows
        ]
        return head, body

    def __str__(self) -> str:
        return text_table(*self.table(), names=1)


def parse_relations(vocabulary: Vocabulary) -> list[Triple | None]:
    """Split each relation text, in order of ids: the longest object names at both ends, and the predicate in between.

    None for texts that do not begin and end with an object name of the vocabulary.
    """
    names = frozenset(vocabulary.objects)
    return [_parse(text, names) for text in vocabulary.relations]


def _parse(text: str, names: Collection[str]) -> Triple | None:
    words = text.split(" ")
    for end in range(len(words) - 2, 0, -1):
        if (subject := " ".join(words[:end])) in names:
            for start in range(end + 1, len(words)):
                if (name := " ".join(words[start:])) in names:
                    return Triple(subject, " ".join(words[end:start]), name)
    return None


def make_negatives(
    triple: Triple,
    true: Collection[str],
    predicates: Sequence[str],
    *seed: int,
) -> dict[Kind, str]:
    """Make the negatives of one relation, by kind; kinds without a valid negative are omitted.

    Args:
        triple: the relation.
        true: the texts of all relations of its image, which are never used as negatives.
        predicates: candidates for the new predicate.
        seed: numbers that determine the choice of the new predicate.
    """
    found: dict[Kind, str] = {}
    swapped = str(Triple(triple.object, triple.predicate, triple.subject))
    if swapped not in true:
        found["swapped"] = swapped
    first = hash64(*seed) % max(len(predicates), 1)
    for i in range(len(predicates)):
        predicate = predicates[(first + i) % len(predicates)]
        if (text := str(triple._replace(predicate=predicate))) not in true:
            found["predicate"] = text
            break
    return found


@torch.no_grad()
def hard_negatives(
    model: Encoder,
    batches: Iterable[Batch],
    vocabulary: Vocabulary,
    *,
    split: str = "test",
    seed: int = 0,
    world: World = SINGLE_PROCESS,
    show_progress: bool = True,
) -> NegativesResult:
    """Measure how often relation views score their true text above a hard negative, in one pass over `batches`.

    Args:
        model, batches, vocabulary, split, world, show_progress: see `zeroshot`.
        seed: of the replacement predicates, which depend only on it, the scene key and the relation's position.

    Raises:
        UserError: no relations, none with a valid negative, or the embeddings are not finite.
    """
    desc = f"hard negatives, {split}"
    features = embed_views(
        model, batches, ["relation"], desc=desc, show_progress=show_progress and world.is_main_process
    )
    with evaluating(model):
        own = _score_relations(model, features, vocabulary, seed)
    relations = [relation for share in world.gather(own) for relation in share]
    if not relations:
        raise UserError(f"the {split} split has no relations: nothing to evaluate")
    if not any(points for _, points in relations):
        raise UserError(
            f"none of the {len(relations)} relations of the {split} split has a valid negative: every swapped or "
            "replaced text is true of its image, or the relation's text does not name objects of the vocabulary"
        )
    rows, by_predicate, without = _accuracies(relations)
    return NegativesResult(split, len(relations), rows, by_predicate, without)


def _accuracies(
    relations: Sequence[tuple[str, dict[Kind, float]]],
) -> tuple[list[NegativesAccuracy], list[NegativesAccuracy], dict[str, int]]:
    """Accuracies per kind, accuracies per kind and predicate (most frequent first), and counts without a negative."""
    points: dict[tuple[Kind, str | None], list[float]] = defaultdict(list)
    without: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
    for predicate, scored in relations:
        without.update(kind for kind in KINDS if kind not in scored)
        for kind, point in scored.items():
            points[kind, None].append(point)
            points[kind, predicate].append(point)
    # Sums of multiples of 1/2 are exact in any order.
    found = [NegativesAccuracy(kind, sum(p) / len(p), len(p), name) for (kind, name), p in points.items()]
    rows = [row for kind in KINDS for row in found if row.kind == kind and row.predicate is None]
    named = sorted((row for row in found if row.predicate), key=lambda r: (r.kind, -r.questions, r.predicate or ""))
    return rows, named, dict(without)


def _score_relations(
    model: Encoder, features: Features, vocabulary: Vocabulary, seed: int
) -> list[tuple[str, dict[Kind, float]]]:
    """For each relation of this rank: its predicate, and per kind 1 (correct), 0 (wrong) or 1/2 (tie)."""
    if "relation" not in features.levels:
        return []
    relation_views = features.levels["relation"]
    triples = parse_relations(vocabulary)
    ids = relation_views.text_id.tolist()
    negatives = _all_negatives(features, vocabulary, triples, seed)
    texts = sorted({vocabulary.relations[i] for i in ids}.union(*(texts_of.values() for texts_of in negatives)))
    row_of = {text: row for row, text in enumerate(texts)}
    text = embed_texts(model, [tokenize(t, None) for t in texts], "relation")
    image = F.normalize(relation_views.image, dim=-1)
    own_rows = [row_of[vocabulary.relations[i]] for i in ids]
    truth = _cosines(image, text, range(len(ids)), own_rows)
    points: list[dict[Kind, float]] = [{} for _ in ids]
    for kind in KINDS:
        views = [view for view, texts_of in enumerate(negatives) if kind in texts_of]
        false = _cosines(image, text, views, [row_of[negatives[view][kind]] for view in views])
        for view, own_score, other in zip(views, truth[views].tolist(), false.tolist(), strict=True):
            points[view][kind] = 0.5 * (own_score > other) + 0.5 * (own_score >= other)
    names = [triple.predicate if (triple := triples[i]) else "" for i in ids]
    return list(zip(names, points, strict=True))


def _all_negatives(
    features: Features, vocabulary: Vocabulary, triples: Sequence[Triple | None], seed: int
) -> list[dict[Kind, str]]:
    """The negatives of each relation view."""
    predicates = sorted({triple.predicate for triple in triples if triple})
    relation_views = features.levels["relation"]
    ids, scenes = relation_views.text_id.tolist(), relation_views.scene.tolist()
    true: dict[int, set[str]] = defaultdict(set)
    for i, scene in zip(ids, scenes, strict=True):
        true[scene].add(vocabulary.relations[i])
    position: Counter[int] = Counter()
    negatives: list[dict[Kind, str]] = []
    for i, scene in zip(ids, scenes, strict=True):
        triple = triples[i]
        seeds = (seed, zlib.crc32(features.keys[scene].encode()), position[scene])
        position[scene] += 1
        negatives.append(make_negatives(triple, true[scene], predicates, *seeds) if triple else {})
    return negatives


def _cosines(
    image: torch.Tensor,  # [N, D], unit length
    text: torch.Tensor,  # [U, D], unit length
    views: Sequence[int],
    rows: Sequence[int],
) -> torch.Tensor:  # [len(views)], on the CPU
    """Cosine similarity of each of `views` with its row of `text`."""
    pairs = torch.tensor([views, rows], dtype=torch.int64, device=image.device)
    found = [(image[a] * text[b]).sum(-1).cpu() for a, b in (pair for pair in pairs.split(_CHUNK, 1))]
    return torch.cat([torch.zeros(0), *found])
