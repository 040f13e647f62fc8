"""Hard negatives: does a relation's view prefer its true text to one that differs in a single respect?

Two kinds, each one question per view with two answers, so that guessing scores 50 %:

swapped     subject and object change places: "man riding horse" becomes "horse riding man"
predicate   another predicate of the vocabulary: "man riding horse" becomes "man under horse"

A text that is true of the image (that any of its relations carries) is never a negative. True means annotated: of a
symmetric predicate ("next to") the swapped text holds as well, and no model can know which one was written down.
Where both texts score the same, half a point is given.
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
from scenarioclip_fast.eval.features import Features, embed_views
from scenarioclip_fast.eval.tables import percent, text_table
from scenarioclip_fast.eval.zeroshot import ALONE, Encoder, embed_texts, evaluating

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
class Preference:
    """How often the true text was preferred: over all questions of a kind, or those of one true predicate."""

    kind: str
    accuracy: float
    questions: int
    predicate: str | None = None


@dataclass(frozen=True)
class NegativesResult:
    """Accuracies of one evaluation. `to_dict()` is ready for JSON, `str()` is the table.

    `rows` has one entry per kind, `predicates` one per kind and true predicate, the most frequent first.
    `without` counts, per kind, relations that allow no such negative.
    """

    split: str
    relations: int
    rows: list[Preference] = field(default_factory=list)
    predicates: list[Preference] = field(default_factory=list)
    without: dict[str, int] = field(default_factory=dict)

    def get(self, kind: Kind) -> Preference | None:
        """The row of that kind; None where no relation allows such a negative."""
        return next((row for row in self.rows if row.kind == kind), None)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows, as text."""
        head = ["negative", "true text preferred", "chance", "questions", "relations without"]
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
    """The parts of every relation text, by id: the longest names of objects at either end, a predicate between them.

    None where a text does not begin and end with a name of the vocabulary.
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


def draw(
    triple: Triple,
    true: Collection[str],
    predicates: Sequence[str],
    *numbers: int,
) -> dict[Kind, str]:
    """The negatives of one relation: texts not among `true`, those of its image; a kind without any is left out.

    The new predicate is a function of `numbers` alone (and of what there is to choose from).
    """
    found: dict[Kind, str] = {}
    swapped = str(Triple(triple.object, triple.predicate, triple.subject))
    if swapped not in true:
        found["swapped"] = swapped
    first = hash64(*numbers) % max(len(predicates), 1)
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
    world: World = ALONE,
    show_progress: bool = True,
) -> NegativesResult:
    """How often relation views prefer their true text to a hard negative, on one pass over `batches`.

    Args:
        model, batches, vocabulary, split, world: as of `zeroshot`.
        seed: of the predicates drawn, which depend on nothing else but the scene's key and the relation's position.

    Raises:
        UserError: the split has no relation, none that allows a negative, or embeddings that are not finite.
    """
    desc = f"hard negatives, {split}"
    features = embed_views(
        model, batches, ["relation"], desc=desc, show_progress=show_progress and world.is_main_process
    )
    with evaluating(model):
        asked = _ask(model, features, vocabulary, seed)
    asked = [question for own in world.gather(asked) for question in own]
    if not asked:
        raise UserError(f"the {split} split holds no relations: nothing to ask")
    if not any(answers for _, answers in asked):
        raise UserError(
            f"none of the {len(asked)} relations of the {split} split allows a negative: swapped or with another "
            "predicate of the vocabulary, each text is true of its image or not made of the vocabulary's objects"
        )
    points: dict[tuple[Kind, str | None], list[float]] = defaultdict(list)
    without: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
    for predicate, answers in asked:
        without.update(kind for kind in KINDS if kind not in answers)
        for kind, point in answers.items():
            points[kind, None].append(point)
            points[kind, predicate].append(point)
    # the halves add up without rounding, in whatever order
    found = [Preference(kind, sum(own) / len(own), len(own), name) for (kind, name), own in points.items()]
    rows = [row for kind in KINDS for row in found if row.kind == kind and row.predicate is None]
    named = sorted((row for row in found if row.predicate), key=lambda r: (r.kind, -r.questions, r.predicate or ""))
    return NegativesResult(split, len(asked), rows, named, dict(without))


def _ask(model: Encoder, features: Features, vocabulary: Vocabulary, seed: int) -> list[tuple[str, dict[Kind, float]]]:
    """For each relation of this rank its predicate, and per kind 1, 0 or 1/2 for the answer."""
    if "relation" not in features.levels:
        return []
    own = features.levels["relation"]
    triples = parse_relations(vocabulary)
    predicates = sorted({triple.predicate for triple in triples if triple})
    ids, scenes = own.text_id.tolist(), own.scene.tolist()
    true: dict[int, set[str]] = defaultdict(set)
    for i, scene in zip(ids, scenes, strict=True):
        true[scene].add(vocabulary.relations[i])

    position: Counter[int] = Counter()
    drawn: list[dict[Kind, str]] = []
    for i, scene in zip(ids, scenes, strict=True):
        triple = triples[i]
        numbers = (seed, zlib.crc32(features.keys[scene].encode()), position[scene])
        position[scene] += 1
        drawn.append(draw(triple, true[scene], predicates, *numbers) if triple else {})

    texts = sorted({vocabulary.relations[i] for i in ids}.union(*(negatives.values() for negatives in drawn)))
    row_of = {text: row for row, text in enumerate(texts)}
    text = embed_texts(model, [tokenize(t, None) for t in texts], "relation")
    image = F.normalize(own.image, dim=-1)
    own_rows = [row_of[vocabulary.relations[i]] for i in ids]
    truth = _cosines(image, text, range(len(ids)), own_rows)
    answers: list[dict[Kind, float]] = [{} for _ in ids]
    for kind in KINDS:
        views = [view for view, negatives in enumerate(drawn) if kind in negatives]
        false = _cosines(image, text, views, [row_of[drawn[view][kind]] for view in views])
        for view, own_score, other in zip(views, truth[views].tolist(), false.tolist(), strict=True):
            answers[view][kind] = 0.5 * (own_score > other) + 0.5 * (own_score >= other)
    names = [triple.predicate if (triple := triples[i]) else "" for i in ids]
    return list(zip(names, answers, strict=True))


def _cosines(
    image: torch.Tensor,  # [N, D], unit length
    text: torch.Tensor,  # [U, D], unit length
    views: Sequence[int],
    rows: Sequence[int],
) -> torch.Tensor:  # [len(views)], on the CPU
    """Of each of `views` with its row of `text`."""
    pairs = torch.tensor([views, rows], dtype=torch.int64, device=image.device)
    found = [(image[a] * text[b]).sum(-1).cpu() for a, b in (pair for pair in pairs.split(_CHUNK, 1))]
    return torch.cat([torch.zeros(0), *found])
