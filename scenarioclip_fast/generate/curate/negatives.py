"""Texts that are false of a relation: with the antonym of its predicate, and with another object of the image."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from scenarioclip_fast.data.texts import normalise
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import read_regular
from scenarioclip_fast.generate.curate.names import present_participle
from scenarioclip_fast.parsing import parse_json
from scenarioclip_fast.terminal import short

Triple = tuple[str, str, str]  # subject, predicate, object

# What holds for one order of the ends holds for the other.
_SYMMETRIC = frozenset(
    {
        *("across from", "adjacent to", "along with", "alongside", "attached to", "beside", "by", "close", "close to"),
        *("connected to", "far from", "hugging", "kissing", "meeting", "near", "next to", "opposite", "opposite to"),
        *("talking to", "talking with", "together with", "touching", "with"),
    }
)


def read_antonyms(path: str = "") -> dict[str, str]:
    """The package's antonyms by predicate, updated by those of a JSON file: {"on": "under", ...}.

    Raises:
        UserError: unreadable, not such a file, or a predicate is its own antonym.
    """
    found = dict(_packaged())
    if not path:
        return found
    try:
        given = parse_json(read_regular(path))
    except OSError as error:
        raise UserError(f"curate.antonyms: {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"curate.antonyms: {path}: not JSON ({error})") from None
    if not isinstance(given, dict):
        raise UserError(f'curate.antonyms: {path}: got a {type(given).__name__}, expected {{"on": "under", ...}}')
    for predicate, antonym in given.items():
        pair = normalise(predicate), normalise(antonym) if isinstance(antonym, str) else ""
        if not all(pair) or pair[0] == pair[1]:
            raise UserError(
                f"curate.antonyms: {path}: got {short(antonym)} for {short(predicate)}, expected another predicate"
            )
        found[pair[0]] = pair[1]
    return found


@functools.cache
def _packaged() -> Mapping[str, str]:
    return dict(parse_json(Path(__file__).with_name("antonyms.json").read_bytes()))


def antonym(predicate: str, antonyms: Mapping[str, str]) -> str | None:
    """The predicate with its whole, else its last words, else its first words replaced; None if none has an antonym.

    >>> antonym("standing on", {"on": "under"}), antonym("pushes a", {"pushing": "pulling"})
    ('standing under', 'pulling a')
    """
    if predicate in antonyms:
        return antonyms[predicate]
    words = predicate.split(" ")
    for i in range(1, len(words)):
        if (found := antonyms.get(" ".join(words[i:]))) is not None:
            return " ".join([*words[:i], found])
    for i in range(len(words) - 1, 0, -1):
        if (found := antonyms.get(" ".join(words[:i]))) is not None:
            return " ".join([found, *words[i:]])
    verb = present_participle(words[0])
    return None if verb is None else antonym(" ".join([verb, *words[1:]]), antonyms)


class TrueTriples:
    """The relations of a scene, to tell whether a text is true of it."""

    def __init__(self, triples: Iterable[Triple]) -> None:
        self._predicates: dict[tuple[str, str], list[str]] = {}
        self._texts: set[str] = set()
        for subject, predicate, object_ in triples:
            self._add(subject, predicate, object_)
            if predicate in _SYMMETRIC:
                self._add(object_, predicate, subject)

    def _add(self, subject: str, predicate: str, object_: str) -> None:
        self._predicates.setdefault((subject, object_), []).append(predicate)
        self._texts.add(f"{subject} {predicate} {object_}")

    def may_hold(self, subject: str, predicate: str, object_: str) -> bool:
        """Whether the scene says so, or says more ("standing on" for "on") or less of the same ends."""
        if f"{subject} {predicate} {object_}" in self._texts:
            return True
        known = self._predicates.get((subject, object_), ())
        return any(f" {one}".endswith(f" {predicate}") or f" {predicate}".endswith(f" {one}") for one in known)


def false_texts(
    key: str, relation: int, triple: Triple, names: Sequence[str], known: TrueTriples, antonyms: Mapping[str, str]
) -> list[str]:
    """At most two texts: with the antonym of the predicate, and with the subject or object replaced.

    Args:
        key: of the scene; with `relation`, it determines which end is replaced, and by which object.
        relation: id of the relation.
        names: of the scene's objects.
        known: the scene's relations.
    """
    subject, predicate, object_ = triple
    texts: list[str] = []
    opposite = antonym(predicate, antonyms)
    if opposite is not None and not known.may_hold(subject, opposite, object_):
        texts.append(f"{subject} {opposite} {object_}")
    others = [name for name in dict.fromkeys(names) if name not in (subject, object_)]
    replaced = [(other, predicate, object_) for other in others] + [(subject, predicate, other) for other in others]
    replaced = [one for one in replaced if not known.may_hold(*one)]
    if replaced:
        number = int.from_bytes(hashlib.sha256(json.dumps([key, relation]).encode()).digest()[:8], "big")
        text = " ".join(replaced[number % len(replaced)])
        texts += [text] if text not in texts else []
    return texts
