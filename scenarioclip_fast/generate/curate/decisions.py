"""Decisions made by hand: those of the review page, or a COCO file that was corrected in an annotation tool.

    {"schema": 1, "scenes": {KEY: {
        "scene": "accept" | "reject",
        "action": text,
        "objects": {ID: {"reject": true} | {"name": text}},
        "relations": {ID: {"reject": true} | {"predicate": text}}}}}

IDs are those of the curated record, and all members are optional.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scenarioclip_fast.data.boxes import box_overlap, clip_box
from scenarioclip_fast.data.texts import normalise
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import read_regular
from scenarioclip_fast.generate.coco import IDS, Annotation, Correction, is_coco, read_coco, same_box
from scenarioclip_fast.generate.config import CurateConfig
from scenarioclip_fast.generate.curate.rules import Draft, Link, Mask, Thing
from scenarioclip_fast.parsing import parse_json
from scenarioclip_fast.suggest import nearest
from scenarioclip_fast.terminal import short

_STALE = "the decisions belong to another run, or to records that have changed since"
_TEXTS = {"objects": "name", "relations": "predicate"}
_MATCH = 0.5  # IoU from which an annotation without an id is taken for an object


@dataclass(frozen=True)
class Decisions:
    """The decisions of a file.

    Attributes:
        path: of the file, for messages.
        digest: of its content.
        scenes: by key.
    """

    path: str
    digest: str
    scenes: Mapping[str, Mapping[str, Any] | Correction]

    def check_keys(self, keys: Collection[str]) -> None:
        """Raise UserError if there is a decision for an image that is not among those of the run."""
        for key in self.scenes:
            if key not in keys:
                raise UserError(f"{self.path}: scene {short(key)}: the run has no such image; {_STALE}")

    def apply(self, draft: Draft, records: Mapping[str, Any], min_agreement: float) -> bool | None:
        """Apply the decisions for a scene to its draft.

        Args:
            records: of the stages caption and ground.
            min_agreement: of the boxes and masks of a COCO file, see `_update`.

        Returns:
            Whether the scene is accepted (True) or rejected (False); None if that was not decided.

        Raises:
            UserError: a decision for an object or relation that the records do not have.
        """
        found = self.scenes.get(draft.key)
        if found is None:
            return None
        try:
            if isinstance(found, Correction):
                _correct(draft, found, records, min_agreement)
                return None
            _decide(draft, found, records)
        except _Stale as error:
            raise UserError(f"{self.path}: scene {draft.key}: {error}") from None
        return {"accept": True, "reject": False}.get(found.get("scene", ""))


def read_all_decisions(options: CurateConfig) -> list[Decisions]:
    """Read the COCO file and the decisions, in the order in which they are applied.

    The review page shows what the COCO file made of the scenes.
    """
    files = [(options.coco, "curate.coco"), (options.decisions, "curate.decisions")]
    return [read_decisions(path, key) for path, key in files if path]


def apply_all(
    decisions: Sequence[Decisions], draft: Draft, records: Mapping[str, Any], *, min_agreement: float
) -> bool | None:
    """Apply several files to a draft; see `Decisions.apply`."""
    verdicts = [one.apply(draft, records, min_agreement) for one in decisions]
    return next((verdict for verdict in reversed(verdicts) if verdict is not None), None)


def read_decisions(path: str, key: str = "curate.decisions") -> Decisions:
    """Read a file of decisions, or a COCO file.

    Args:
        key: the config key, for errors.

    Raises:
        UserError: unreadable or malformed; the message names the scene.
    """
    where = f"{key}: {path}"
    try:
        data = read_regular(path)
        content = parse_json(data, strict=False)
    except OSError as error:
        raise UserError(f"{where}: {error.strerror or error}; --set {key}= runs without it") from None
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    digest = hashlib.sha256(data).hexdigest()
    if is_coco(content):
        return Decisions(where, digest, {one.key: one for one in read_coco(where, content)})
    if not isinstance(content, dict) or not {"schema", "scenes"} & content.keys():
        raise UserError(
            f'{where}: got {short(content)}, expected {{"schema": 1, "scenes": {{...}}}} or a COCO file with "images" '
            'and "annotations"'
        )
    _check_members(where, content, ("schema", "scenes"))
    schema, scenes = content.get("schema"), content.get("scenes")
    if type(schema) is not int or schema != 1 or not isinstance(scenes, dict):  # true is an int as well
        raise UserError(f'{where}: got {short(content)}, expected {{"schema": 1, "scenes": {{...}}}}')
    return Decisions(where, digest, {key: _checked(f"{where}: scene {key}", one) for key, one in scenes.items()})


def _checked(where: str, decision: Any) -> dict[str, Any]:
    """Check the decisions for a scene, and normalise the new texts."""
    _check_members(where, decision, ("scene", "action", *_TEXTS))
    if decision.get("scene", "accept") not in ("accept", "reject"):
        raise UserError(f'{where}: got {short(decision["scene"])} as "scene", expected accept or reject')
    checked: dict[str, Any] = dict(decision)
    if "action" in decision:
        checked["action"] = _text(where, decision, "action")
    for part, text in _TEXTS.items():
        values = decision.get(part, {})
        if not isinstance(values, dict):
            raise UserError(f"{where}: got {short(values)} as {part!r}, expected an object")
        checked[part] = {}
        for number, value in values.items():
            here = f"{where}: {part} {number}"
            _check_members(here, value, ("reject", text))
            if not (number.isascii() and number.isdecimal() and len(number) < 10):
                raise UserError(f"{here}: got {short(number)}, expected an id of the curated record")
            if not isinstance(value.get("reject", False), bool):
                raise UserError(f'{here}: got {short(value["reject"])} as "reject", expected true')
            new = {text: _text(here, value, text)} if text in value else {}
            checked[part][int(number)] = {**value, **new}
    return checked


def _check_members(where: str, value: Any, known: tuple[str, ...]) -> None:
    if not isinstance(value, dict):
        raise UserError(f"{where}: got {short(value)}, expected an object")
    for name in value:
        if name not in known:
            near = nearest(name, known)
            hint = f"did you mean {near}?" if near else f"expected {', '.join(known)}"
            raise UserError(f"{where}: unknown member {short(name)}: {hint}")


def _text(where: str, value: Mapping[str, Any], name: str) -> str:
    text = value[name]
    found = normalise(text) if isinstance(text, str) else ""
    if not found:
        raise UserError(f"{where}: got {short(text)} as {name!r}, expected a text")
    return found


class _Stale(ValueError):
    pass


def _decide(draft: Draft, decision: Mapping[str, Any], records: Mapping[str, Any]) -> None:
    """Apply the decisions of the review page; those for parts that the rules drop have no effect."""
    totals = {"objects": len(records["ground"]["objects"]), "relations": len(records["caption"]["relations"])}
    present = {"objects": draft.things.keys(), "relations": {link.id for link in draft.links}}  # with those of COCO
    for part, total in totals.items():
        for number in decision[part]:
            if number >= total and number not in present[part]:
                raise _Stale(f"{part} {number}: the records have {total} {part}; {_STALE}")
    draft.action = decision.get("action", draft.action)
    for link in list(draft.links):
        one = decision["relations"].get(link.id, {})
        if one.get("reject"):
            draft.drop_link(link, "rejected_by_hand")
        link.predicate = one.get("predicate", link.predicate)
    for thing in list(draft.things.values()):
        one = decision["objects"].get(thing.id, {})
        if one.get("reject"):
            draft.drop_thing(thing.id, "rejected_by_hand")
        thing.name = one.get("name", thing.name)


def _correct(draft: Draft, correction: Correction, records: Mapping[str, Any], min_agreement: float) -> None:
    """Make the objects and relations those of a COCO file."""
    if correction.size != draft.size:
        raise _Stale(f"got an image of {correction.size}, expected {draft.size} (height, width)")
    if correction.packed and records["caption"].get("ends") is None:
        raise _Stale("the file was exported from a packed data set; export it from the run")
    draft.action = correction.texts.get("action", draft.action)
    draft.caption = correction.texts.get("caption", draft.caption)
    ids = _ids(draft, correction, len(records["ground"]["objects"]))
    for number in [number for number in draft.things if number not in ids]:
        draft.drop_thing(number, "rejected_by_hand")
    problems = [_update(draft, *one, min_agreement) for one in zip(ids, correction.annotations, strict=True)]
    draft.things = dict(sorted(draft.things.items()))
    if correction.relations is not None:
        _relate(draft, correction, ids, len(records["caption"]["relations"]))
    for number, (reason, detail) in zip(ids, problems, strict=True):
        if reason:
            draft.drop_thing(number, reason, detail)


def _ids(draft: Draft, correction: Correction, total: int) -> list[int]:
    """The id of the object that each annotation is, new ones after the `total` of ground's."""
    found = [one.object for one in correction.annotations]
    if not correction.identified:  # the tool kept no ids: by place
        pairs = [
            (-box_overlap(one.box, thing.box), one.name != thing.name, k, thing.id)
            for k, one in enumerate(correction.annotations)
            for thing in draft.things.values()
        ]
        for overlap, _, k, candidate in sorted(pairs):
            if -overlap >= _MATCH and found[k] is None and candidate not in found:
                found[k] = candidate
    free = max([total - 1, *(one for one in found if one is not None)]) + 1
    ids: list[int] = []
    for one in found:
        ids.append(free if one is None else one)
        free += one is None
    if free > IDS:
        raise _Stale(f"got object {max(ids)}, expected ids below {IDS}")
    return ids


def _update(draft: Draft, number: int, annotation: Annotation, min_agreement: float) -> tuple[str, str]:
    """Make an object that of an annotation; return (reason, detail) if it is to be dropped, or two empty strings.

    Its box and mask must agree as those of the models must. A box that was left alone follows the mask. In other cases
    a person moved the box: no mask can be made from that, and a mask of something else would train the wrong thing.
    """
    mask = None if annotation.mask is None else Mask(annotation.mask)
    thing = draft.things.get(number)
    moved = thing is None or not same_box(thing.box, annotation.box)
    if thing is None:
        thing = draft.things[number] = Thing(number, annotation.name, [], mask, (1.0, 1.0))
        if mask is None:
            return "no_mask", "drawn by hand, without a segmentation"
    thing.name, thing.mask = annotation.name, mask or thing.mask
    if moved:
        thing.box = list(clip_box(annotation.box, draft.size))
    bounds = None if thing.mask is None else thing.mask.bounds
    if bounds is None or (agreement := box_overlap(thing.box, bounds)) >= min_agreement:
        return "", ""
    if moved:
        return "mask_not_in_box", f"IoU {agreement:.2f} of the corrected box and the mask's bounds"
    thing.box = [float(v) for v in bounds]
    return "", ""


def _relate(draft: Draft, correction: Correction, ids: list[int], total: int) -> None:
    """Make the relations those of a COCO file, without those whose ends it has not."""
    before = {link.id: link for link in draft.links}
    after: dict[int, Link] = {}
    free = max([total - 1, *(one.relation for one in correction.relations or [] if one.relation is not None)]) + 1
    for one in correction.relations or []:
        ends = [None if end is None else ids[end] for end in (one.subject, one.object)]
        old = None if one.relation is None else before.get(one.relation)
        if one.relation is None:  # of the tool's: the same ends are the same relation
            same = (link for link in before.values() if [link.subject, link.object] == ends and link.id not in after)
            old = next(same, None)
        if old is not None:
            ends = [new if new is not None else kept for new, kept in zip(ends, (old.subject, old.object), strict=True)]
        subject, object_ = ends
        if subject is None or object_ is None or subject == object_:
            continue
        number = old.id if old is not None else free if one.relation is None or one.relation in after else one.relation
        free += number == free
        after[number] = Link(number, subject, one.predicate, object_)
    for number, link in before.items():
        if number not in after:
            draft.drop_link(link, "rejected_by_hand")
    draft.links = [after[number] for number in sorted(after)]
    if free > IDS:
        raise _Stale(f"got {free} relations, expected at most {IDS}")
