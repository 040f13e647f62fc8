"""How well a generation run describes scenes whose exact annotations are known.

Definitions, over all images; what a stage rejected counts as not found:

- An object is right if a true object of the image has its name and their boxes have an IoU of at least 0.5. Each true
  object makes at most one right: pairs are chosen greedily, from the largest IoU on; of equal ones, the first.
- A relation is right if its predicate and its ends' names are those of a true relation, and its ends are right because
  of the ends of that true relation. Each true relation makes at most one right, so that a repetition is wrong.
- Precision is the number of right ones over that of found ones, recall over that of true ones.
- A true relation was answered rightly if the model named it, in any wording, in an answer that can be read. Other
  relations cannot be found. Recall of the answer is the fraction of these that was found.
- The IoU of masks is that of right objects with their true objects; 0 without a mask.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from scenarioclip_fast.data import rle
from scenarioclip_fast.data.boxes import box_overlap
from scenarioclip_fast.data.scene import Scene
from scenarioclip_fast.generate.curate.rules import Mask
from scenarioclip_fast.generate.records import results, unit_files

LEAST_IOU = 0.5

Box = Sequence[float]  # x1, y1, x2, y2
Triplet = tuple[str, str, str]


@dataclass(frozen=True)
class Thing:
    """An object; the mask is a COCO RLE."""

    name: str
    box: Box
    mask: dict[str, Any] | None


@dataclass(frozen=True)
class Annotations:
    """The objects of an image, and its relations: (position of the subject, predicate, position of the object)."""

    objects: Sequence[Thing] = ()
    relations: Sequence[tuple[int, str, int]] = ()

    def triplet(self, relation: tuple[int, str, int]) -> Triplet:
        """The texts of a relation."""
        subject, predicate, object_ = relation
        return self.objects[subject].name, predicate, self.objects[object_].name


class Truth(NamedTuple):
    """What is known about an image.

    Attributes:
        answered: positions of the relations that were answered rightly.
    """

    annotations: Annotations
    answered: frozenset[int]


@dataclass
class Scores:
    """Counts, summed over images; see the module for definitions."""

    images: int = 0
    objects_found: int = 0
    objects_true: int = 0
    objects_right: int = 0
    relations_found: int = 0
    relations_true: int = 0
    relations_right: int = 0
    relations_answered: int = 0
    relations_answered_right: int = 0
    mask_iou: float = 0.0
    masks_50: int = 0
    masks_75: int = 0

    def add(self, found: Annotations, true: Annotations, answered: Collection[int]) -> None:
        """Add an image.

        Args:
            answered: positions of the true relations that were answered rightly.
        """
        match = match_objects(found.objects, true.objects)
        right = _right_relations(found, true, match)
        self.images += 1
        self.objects_found += len(found.objects)
        self.objects_true += len(true.objects)
        self.objects_right += len(match)
        self.relations_found += len(found.relations)
        self.relations_true += len(true.relations)
        self.relations_right += len(right)
        self.relations_answered += len(answered)
        self.relations_answered_right += len(right.intersection(answered))
        for i, k in match.items():
            iou = mask_overlap(found.objects[i].mask, true.objects[k].mask)
            self.mask_iou += iou
            self.masks_50 += iou >= 0.5
            self.masks_75 += iou >= 0.75

    def measures(self) -> dict[str, float | None]:
        """Fractions from 0 to 1 by name; None if there was nothing to measure."""
        fractions = {
            "precision of objects": (self.objects_right, self.objects_found),
            "recall of objects": (self.objects_right, self.objects_true),
            "precision of relations": (self.relations_right, self.relations_found),
            "recall of relations": (self.relations_right, self.relations_true),
            "recall of relations answered rightly": (self.relations_answered_right, self.relations_answered),
            "mean IoU of masks": (self.mask_iou, self.objects_right),
            "masks with an IoU of at least 0.5": (self.masks_50, self.objects_right),
            "masks with an IoU of at least 0.75": (self.masks_75, self.objects_right),
        }
        return {name: part / whole if whole else None for name, (part, whole) in fractions.items()}

    def to_dict(self) -> dict[str, float | None]:
        """The measures and the counts by name."""
        return self.measures() | asdict(self)


def match_objects(found: Sequence[Thing], true: Sequence[Thing]) -> dict[int, int]:
    """The positions of right objects -> the positions of their true objects."""
    pairs = [
        (-iou, i, k)
        for i, one in enumerate(found)
        for k, other in enumerate(true)
        if one.name == other.name and (iou := box_overlap(one.box, other.box)) >= LEAST_IOU
    ]
    match: dict[int, int] = {}
    for _, i, k in sorted(pairs):
        if i not in match and k not in match.values():
            match[i] = k
    return match


def _right_relations(found: Annotations, true: Annotations, match: Mapping[int, int]) -> set[int]:
    """The positions of the true relations that were found."""
    position = {relation: k for k, relation in enumerate(true.relations)}
    ends = ((match.get(subject), predicate, match.get(object_)) for subject, predicate, object_ in found.relations)
    return {position[triple] for triple in ends if triple in position}


def mask_overlap(a: dict[str, Any] | None, b: dict[str, Any] | None) -> float:
    """IoU of two COCO RLEs of one size; 0 if one is missing or both are empty."""
    return 0.0 if a is None or b is None else Mask(a).overlap(Mask(b))


def annotations_of(scene: Scene) -> Annotations:
    """The exact annotations of a scene with masks as tensors."""
    objects = [Thing(one.name, one.box, rle.encode(one.mask)) for one in scene.objects]  # type: ignore[arg-type]
    return Annotations(objects, [(one.subject, one.predicate, one.object) for one in scene.relations])


def before_curation(caption: Mapping[str, Any], ground: Mapping[str, Any], segment: Mapping[str, Any]) -> Annotations:
    """What three stages say, with the ends of relations matched to objects of exactly the same name.

    Of several objects of a name, the first is meant, which is the best for the detector. Relations with an end that is
    no object, or with the same object at both ends, are left out.
    """
    masks = [one["mask"] for one in segment["objects"]]
    things = [Thing(o["name"], o["box"], mask) for o, mask in zip(ground["objects"], masks, strict=True)]
    position = {one.name: i for i, one in reversed(list(enumerate(things)))}
    relations = [
        (position[subject], predicate, position[object_])
        for subject, predicate, object_ in caption["relations"]
        if subject in position and object_ in position and subject != object_
    ]
    return Annotations(things, relations)


def after_curation(record: Mapping[str, Any]) -> Annotations:
    """The scene of a record of curate."""
    scene = record["scene"]
    things = [Thing(one["name"], one["box"], one["mask"]) for one in scene["objects"]]
    return Annotations(things, [(r["subject"], r["predicate"], r["object"]) for r in scene["relations"]])


def score_run(directory: Path, truth: Mapping[str, Truth]) -> tuple[Scores, Scores]:
    """Score a run before and after curation.

    Args:
        directory: of the run, with finished records of the stages up to curate.
        truth: by key, of all images.
    """
    before, after = Scores(), Scores()
    left = dict(truth)
    for records in _records(directory):
        for key, caption in records["caption"].items():
            true = left.pop(key)
            ground, segment, curate = (records[stage].get(key) for stage in ("ground", "segment", "curate"))
            found = before_curation(caption, ground, segment) if ground and segment else Annotations()
            before.add(found, *true)
            after.add(after_curation(curate) if curate else Annotations(), *true)
    for true in left.values():  # no answer that could be read
        before.add(Annotations(), *true)
        after.add(Annotations(), *true)
    return before, after


def _records(directory: Path) -> Iterator[dict[str, dict[str, dict[str, Any]]]]:
    """Per unit and stage, the results of the images that were not rejected."""
    for path in unit_files(directory / "caption"):
        stages = ("caption", "ground", "segment", "curate")
        found = {stage: results(directory / stage / path.name) for stage in stages}
        yield {
            stage: {key: outcome.result for key, outcome in outcomes.items() if not outcome.reason}
            for stage, outcomes in found.items()
        }
