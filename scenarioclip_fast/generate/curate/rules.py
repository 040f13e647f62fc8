"""The rules of curation, for the records of one image.

In order: names, objects, relations, decisions made by hand, unused objects, the number of relations, negatives.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scenarioclip_fast.data import rle
from scenarioclip_fast.data.boxes import box_overlap
from scenarioclip_fast.data.scene import SceneObject
from scenarioclip_fast.data.sources.published import nearest_pair
from scenarioclip_fast.data.texts import normalise
from scenarioclip_fast.generate.config import CurateConfig
from scenarioclip_fast.generate.curate.names import clean_name, gerund, singular
from scenarioclip_fast.generate.curate.negatives import TrueTriples, false_texts
from scenarioclip_fast.generate.stages import REASONS, Outcome
from scenarioclip_fast.requirements import require
from scenarioclip_fast.terminal import printable

_MAX_WORDS = 8  # of a predicate; longer ones are sentences
_FUZZY_LETTERS = 5  # shorter names that differ by a letter differ in meaning: "cat", "cart"

Box = Sequence[float]  # x1, y1, x2, y2


class Mask:
    """An RLE with its run lengths."""

    def __init__(self, code: dict[str, Any]) -> None:
        self.code = code
        height, width, self.runs = rle.read_runs(code)
        self.size = height, width
        self.area = int(self.runs[1::2].sum())
        self.bounds = rle.run_bounds(height, self.runs)

    def overlap(self, other: Mask) -> float:
        """IoU with a mask of the same size; 0 if both are empty."""
        if self.bounds is None or other.bounds is None or box_overlap(self.bounds, other.bounds) == 0:
            return 0.0
        shared = rle.shared_area(self.runs, other.runs)
        return shared / (self.area + other.area - shared)


@dataclass
class Part:
    """An object or relation that was dropped."""

    part: str
    reason: str
    detail: str

    def __post_init__(self) -> None:
        assert self.reason in REASONS, f"{self.reason!r} is not a key of stages.REASONS: add it, with a description"

    def to_json(self) -> dict[str, str]:
        return {"part": printable(self.part), "reason": self.reason, "detail": printable(self.detail)}


@dataclass
class Thing:
    """An object; `id` is its position in ground's record, or a greater number if it was drawn by hand."""

    id: int
    name: str
    box: list[float]
    mask: Mask | None
    scores: tuple[float, float]  # of the box and the mask

    def __str__(self) -> str:
        return f"object {self.id} ({self.name})"


@dataclass
class Link:
    """A relation; `id` is its position in caption's record, and the ends are ids of things."""

    id: int
    subject: int
    predicate: str
    object: int


@dataclass
class Draft:
    """A scene that is being curated."""

    key: str
    size: list[int]
    action: str | None
    caption: str | None
    things: dict[int, Thing] = field(default_factory=dict)
    links: list[Link] = field(default_factory=list)
    dropped: list[Part] = field(default_factory=list)

    def text(self, link: Link) -> str:
        return f"relation {link.id} ({' '.join(self.triple(link))})"

    def triple(self, link: Link) -> tuple[str, str, str]:
        return self.things[link.subject].name, link.predicate, self.things[link.object].name

    def drop_thing(self, number: int, reason: str, detail: str = "") -> None:
        """Drop an object and its relations."""
        for link in [link for link in self.links if number in (link.subject, link.object)]:
            self.drop_link(link, "end_dropped", str(self.things[number]))
        self.dropped.append(Part(str(self.things.pop(number)), reason, detail))

    def drop_link(self, link: Link, reason: str, detail: str = "") -> None:
        self.links.remove(link)
        self.dropped.append(Part(self.text(link), reason, detail))

    def drop_repeated(self) -> None:
        """Drop relations with the ends and the predicate of an earlier one."""
        first: dict[tuple[int, str, int], Link] = {}
        for link in list(self.links):
            earlier = first.setdefault((link.subject, link.predicate, link.object), link)
            if earlier is not link:
                self.drop_link(link, "duplicate_relation", f"of relation {earlier.id}")


@dataclass(frozen=True)
class Renaming:
    """The texts that class merging replaces: of "actions", "objects" and "predicates"."""

    config: CurateConfig
    merged: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def object(self, text: str) -> str:
        """The name of an object."""
        name = self.unmerged_object(text)
        return self.merged.get("objects", {}).get(name, name)

    def unmerged_object(self, text: str) -> str:
        """The name of an object before merging."""
        name = clean_name(text)
        return singular(name) if name and self.config.singular else name

    def action(self, text: str | None) -> str | None:
        """The action; None if there is none."""
        action = self.unmerged_action(text)
        return action if action is None else self.merged.get("actions", {}).get(action, action)

    def unmerged_action(self, text: str | None) -> str | None:
        """The action before merging."""
        action = normalise(text or "")
        return (gerund(action) if self.config.gerund else action) or None

    def predicate(self, text: str) -> str:
        """The predicate of a relation."""
        predicate = normalise(text)
        return self.merged.get("predicates", {}).get(predicate, predicate)


@dataclass(frozen=True)
class Rules:
    """The rules with their settings.

    Args:
        renaming: of texts.
        antonyms: by predicate; see `negatives.read_antonyms`.
        decide: applies the decisions made by hand to the draft of a scene; it returns whether the scene is accepted
            (True) or rejected (False), or None if nothing was decided.
    """

    config: CurateConfig
    renaming: Renaming
    antonyms: Mapping[str, str]
    decide: Callable[[Draft, Mapping[str, Any]], bool | None] | None = None

    def curate(self, key: str, records: Mapping[str, Any]) -> Outcome:
        """Curate a scene.

        Args:
            records: of the stages caption, ground and segment.
        """
        caption = records["caption"]
        draft = Draft(key, caption["size"], self.renaming.action(caption["action"]), caption["caption"])
        moved = self._objects(draft, records)
        lost = {i: part.name for i, part in moved.lost.items()}
        self._relations(draft, caption, moved.to, lost)
        draft.drop_repeated()
        accepted = None if self.decide is None else self.decide(draft, records)
        if accepted is False:
            return Outcome(key, reason="rejected_by_hand")
        draft.drop_repeated()
        if self.config.drop_unused:
            used = {end for link in draft.links for end in (link.subject, link.object)}
            for number in [number for number in draft.things if number not in used]:
                draft.drop_thing(number, "unused_object")
        if not accepted and (reason := self._too_little(draft)):
            counts = Counter(part.reason for part in draft.dropped)
            drops = ", ".join(f"{n} {name}" for name, n in sorted(counts.items()))
            detail = f"{len(draft.links)} relations left, expected {self.config.min_relations}"
            return Outcome(key, reason=reason, detail=f"{detail}; dropped: {drops}" if drops else detail)
        return Outcome(key, {"scene": self._scene(draft), "rejected": [part.to_json() for part in draft.dropped]})

    def _too_little(self, draft: Draft) -> str:
        if len(draft.links) < self.config.min_relations:
            return "too_few_relations" if draft.links else "no_relations"
        return "" if draft.things or draft.action is not None else "no_objects"

    def _objects(self, draft: Draft, records: Mapping[str, Any]) -> _Moved:
        """Add the objects that pass; return where relations to the others go."""
        moved = _Moved()
        found = zip(records["ground"]["objects"], records["segment"]["objects"], strict=True)
        for i, (ground, segment) in enumerate(found):
            code = segment["mask"]
            scores = float(ground["score"]), float(segment["score"])
            name, box = self.renaming.object(ground["name"]), [float(v) for v in ground["box"]]
            thing = Thing(i, name, box, None if code is None else Mask(code), scores)
            reason, detail = self._object_problem(thing, draft.size)
            twin = None if reason else self._twin(draft, thing)
            if twin is not None:  # the better one stays
                better, worse = (thing, twin) if _rank(thing) > _rank(twin) else (twin, thing)
                draft.things.pop(twin.id)
                draft.things[better.id] = better
                moved.to = {a: better.id if b == worse.id else b for a, b in moved.to.items()}
                moved.to |= {worse.id: better.id, better.id: better.id}
                draft.dropped.append(Part(str(worse), "duplicate_object", f"of object {better.id}"))
            elif reason:
                moved.lost[i] = thing
                draft.dropped.append(Part(str(thing), reason, detail))
            else:
                draft.things[i] = thing
                moved.to[i] = i
        draft.things = dict(sorted(draft.things.items()))
        return moved

    def _object_problem(self, thing: Thing, size: Sequence[int]) -> tuple[str, str]:
        """(reason, detail) of an object to drop, or two empty strings."""
        config, mask = self.config, thing.mask
        box_score, mask_score = thing.scores
        if not thing.name:
            return "unnamed_object", ""
        if box_score < config.min_box_score:
            return "low_box_score", f"{box_score:.3g}, expected {config.min_box_score:g}"
        if mask is None or mask.bounds is None:
            return "no_mask", "the mask is empty" if mask else ""
        if list(mask.size) != list(size):
            return "no_mask", f"got a mask of {list(mask.size)}, expected the image size {list(size)}"
        if mask_score < config.min_mask_score:
            return "low_mask_score", f"{mask_score:.3g}, expected {config.min_mask_score:g}"
        if mask.area < (low := max(config.min_mask_pixels, config.min_mask_fraction * math.prod(size))):
            return "small_mask", f"{mask.area} pixels, expected {math.ceil(low)}"
        if (agreement := box_overlap(thing.box, mask.bounds)) < config.min_agreement:
            return "mask_not_in_box", f"IoU {agreement:.2f} of the box and the mask's bounds"
        return "", ""

    def _twin(self, draft: Draft, thing: Thing) -> Thing | None:
        """An earlier object of the same name whose mask is nearly the same."""
        same = (one for one in draft.things.values() if one.name == thing.name)
        return next((one for one in same if self._coincide(one, thing)), None)

    def _coincide(self, a: Thing, b: Thing) -> bool:
        return a.mask is not None and b.mask is not None and a.mask.overlap(b.mask) > self.config.max_overlap

    def _relations(self, draft: Draft, caption: Mapping[str, Any], to: dict[int, int], lost: dict[int, str]) -> None:
        """Add the relations that pass.

        to: kept objects by the id of an object, its own or that of its duplicate.
        lost: names of dropped objects.
        """
        given = caption.get("ends")
        names = [SceneObject(thing.name, _box(thing.box)) for thing in draft.things.values()]
        numbers = list(draft.things)
        for i, (subject, text, object_) in enumerate(caption["relations"]):
            ends = self.renaming.object(subject), self.renaming.object(object_)
            predicate = self.renaming.predicate(text)
            here = f"relation {i} ({ends[0]} {predicate} {ends[1]})"
            if not predicate:
                problem = "empty_predicate", ""
            elif (words := len(predicate.split(" "))) > _MAX_WORDS:
                problem = "long_predicate", f"{words} words, expected at most {_MAX_WORDS}"
            else:
                pair = (
                    self._named_ends(names, ends, set(lost.values()))
                    if given is None
                    else _given_ends(given[i], to, lost)
                )
                if isinstance(pair[0], int):
                    subject_id, object_id = (int(end) if given else numbers[int(end)] for end in pair)
                    problem = self._ends_problem(draft, subject_id, object_id)
                    if not problem[0]:
                        draft.links.append(Link(i, subject_id, predicate, object_id))
                        continue
                else:
                    problem = pair
            draft.dropped.append(Part(here, *problem))

    def _named_ends(
        self, objects: list[SceneObject], ends: tuple[str, str], lost: set[str]
    ) -> tuple[int, int] | tuple[str, str]:
        """The positions of a relation's ends, or (reason, detail)."""
        known = list(dict.fromkeys(item.name for item in objects))
        found: list[str] = []
        for end in ends:
            name = end if end in known else None
            if name is None and end in lost:
                return "end_dropped", f"object {end}"
            name = similar_name(end, known, self.config.match) if name is None else name
            if name is None:
                return "unknown_end", f"no object {end!r}"
            found.append(name)
        pair = nearest_pair(objects, *found)
        return ("same_ends", f"one object {found[0]!r}") if isinstance(pair, str) else pair

    def _ends_problem(self, draft: Draft, subject: int, object_: int) -> tuple[str, str]:
        """(reason, detail) of ends that coincide, or two empty strings."""
        a, b = draft.things[subject], draft.things[object_]
        if subject == object_:
            return "same_ends", str(a)
        if self._coincide(a, b):
            return "same_ends", f"the masks of {a} and {b} are nearly identical"
        centres = [[(one.box[k] + one.box[k + 2]) / 2 for k in (0, 1)] for one in (a, b)]
        distance = math.dist(*centres) / math.hypot(*draft.size)
        if distance < self.config.min_ends_distance:
            return "same_ends", f"{distance:.3g} of the diagonal apart, expected {self.config.min_ends_distance:g}"
        return "", ""

    def _scene(self, draft: Draft) -> dict[str, Any]:
        things = list(draft.things.values())
        position = {thing.id: k for k, thing in enumerate(things)}
        names = [thing.name for thing in things]
        known = TrueTriples(draft.triple(link) for link in draft.links)
        wanted = self.config.negatives != "none"
        return {
            "size": draft.size,
            "action": draft.action,
            "caption": draft.caption,
            "objects": [
                {"id": t.id, "name": t.name, "box": t.box, "mask": None if t.mask is None else t.mask.code}
                for t in things
            ],
            "relations": [
                {
                    "id": link.id,
                    "subject": position[link.subject],
                    "predicate": link.predicate,
                    "object": position[link.object],
                    "negatives": false_texts(draft.key, link.id, draft.triple(link), names, known, self.antonyms)
                    if wanted
                    else [],
                }
                for link in draft.links
            ],
            "scores": {"boxes": [t.scores[0] for t in things], "masks": [t.scores[1] for t in things]},
        }


@dataclass
class _Moved:
    """Kept objects by id of a kept or repeated object, and dropped objects by id."""

    to: dict[int, int] = field(default_factory=dict)
    lost: dict[int, Thing] = field(default_factory=dict)


def _rank(thing: Thing) -> tuple[float, float, int]:
    return (*thing.scores, -thing.id)


def _box(box: Box) -> tuple[float, float, float, float]:
    return box[0], box[1], box[2], box[3]


def _given_ends(
    ends: Sequence[int], to: Mapping[int, int], lost: Mapping[int, str]
) -> tuple[int, int] | tuple[str, str]:
    for end in ends:
        if end not in to:
            return "end_dropped", f"object {end} ({lost.get(end, 'unknown')})"
    return to[ends[0]], to[ends[1]]


def similar_name(name: str, known: Sequence[str], match: float) -> str | None:
    """The known name that another one means; None if none, or several equally.

    First, the only name that ends with the words of `name`, or with whose words `name` ends: "man" and "young man".
    Then the name whose similarity is highest, and at least `match`; see `rapidfuzz.fuzz.ratio`. With a match of 1,
    names must be equal.
    """
    if match >= 1 or not name:
        return None
    same_head = [one for one in known if one.endswith(f" {name}") or name.endswith(f" {one}")]
    if len(same_head) == 1:
        return same_head[0]
    if len(letters := _letters(name)) < _FUZZY_LETTERS:
        return None
    ratio = _fuzz().ratio
    scores = sorted(
        ((ratio(letters, _letters(one)) / 100, one) for one in known if len(_letters(one)) >= _FUZZY_LETTERS),
        reverse=True,
    )
    if not scores or scores[0][0] < match or (len(scores) > 1 and scores[1][0] == scores[0][0]):
        return None
    return scores[0][1]


def _letters(name: str) -> str:
    return name.replace(" ", "").replace("-", "")


@functools.cache
def _fuzz() -> Any:
    return require("rapidfuzz").fuzz
