"""Reads what a model answered: JSON, or nearly so.

Models put their JSON into code fences or sentences, leave commas behind, use Python's quotes, or are cut off. All of
this is read where it can mean one thing only. A relation that cannot be used costs that relation, not the image.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from scenarioclip_fast.data.texts import normalise
from scenarioclip_fast.generate.caption.prompt import MAX_RELATIONS
from scenarioclip_fast.generate.config import CaptionConfig
from scenarioclip_fast.generate.stages import Outcome
from scenarioclip_fast.terminal import short

MAX_TEXT = 100  # characters of a name, a predicate or an action; longer ones are sentences
MAX_CAPTION = 1000
_MAX_ANSWER = 1 << 16  # characters; four times what 4,096 tokens usually are
_MAX_DEPTH = 16
_MAX_STARTS = 64  # braces that are tried as the start of the object

# Members by the letters of their names.
_OBJECTS = ("objects",)
_RELATIONS = ("relations", "relationships", "triplets", "triples")
_ACTION = ("action",)
_CAPTION = ("densecaption", "caption")
_NAME = ("name", "object", "label")
_PREDICATE = ("predicate", "relation", "relationship")

# An apostrophe between letters or digits belongs to a text in single quotes; any other ends it.
_TOKEN = re.compile(
    r"""\s*(?:
        (?P<mark>[{}\[\],:])
        | "(?P<double>(?:[^"\\]|\\.)*+)"
        | '(?P<single>(?:[^'\\]|\\.|(?<=\w)'(?=\w))*)'(?=\s*(?:[,:\]}]|\Z))
        | (?P<word>[^\s{}\[\],:"']+)
        | (?P<end>\Z|["'])
    )""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": " ", "f": " "}
_WORDS: dict[str, Any] = {"true": True, "false": False, "null": None, "none": None}
_LIST_MARK = re.compile(r"(?:\d{1,2}[.)]|[-*•])\s+")


class BadAnswer(ValueError):
    """The answer is unusable; `reason` is a key of `stages.REASONS`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def read_answer(text: str, *, max_objects: int, truncated: bool = False) -> dict[str, Any]:
    """Read an answer.

    Args:
        max_objects: further objects are dropped.
        truncated: the server says that it was cut off.

    Returns:
        "action" and "caption" (None if missing), "objects", "relations" and, if not empty, "rejected": the parts that
        were dropped, each with "part", "reason" and "detail". Names, predicates and the action are normalised.

    Raises:
        BadAnswer: it has no JSON object, no objects or no relations.
    """
    found = _find_object(text[:_MAX_ANSWER].rpartition("</think>")[2])
    if found is None:
        if truncated:
            raise BadAnswer("answer_truncated", f"ends with {short(text[-60:])}")
        raise BadAnswer("answer_not_json", short(text))
    record, complete = found
    objects, relations = _member(record, _OBJECTS), _member(record, _RELATIONS)
    for name, value in (("objects", objects), ("relations", relations)):
        if not isinstance(value, list):
            if truncated:
                raise BadAnswer("answer_truncated", f"cut off before {name}")
            if not complete:
                raise BadAnswer("answer_not_json", f"ends before {name}: {short(text[-60:])}")
            raise BadAnswer("answer_malformed", f"{name}: got {short(value)}, expected a list")
    rejected: list[dict[str, str]] = []
    names = _names(objects, max_objects, rejected)
    if not names:
        raise BadAnswer("no_objects", _first(rejected, "objects", objects))
    triplets = _triplets(relations, rejected)
    if not triplets:
        raise BadAnswer("no_relations", _first(rejected, "relations", relations))
    return {
        "action": _text(_member(record, _ACTION)),
        "caption": _caption(_member(record, _CAPTION)),
        "objects": names,
        "relations": triplets,
    } | ({"rejected": rejected} if rejected else {})


def outcome_of(key: str, size: tuple[int, int], text: str, config: CaptionConfig, *, truncated: bool) -> Outcome:
    """The outcome of an image of `size` = (H, W) from the answer of a model."""
    try:
        found = read_answer(text, max_objects=config.max_objects, truncated=truncated)
    except BadAnswer as error:
        return Outcome(key, reason=error.reason, detail=error.detail)
    return Outcome(key, {"size": list(size), **found})


def _first(rejected: list[dict[str, str]], name: str, value: list[Any]) -> str:
    """Why a list is empty."""
    parts = [one for one in rejected if one["part"].startswith(name[:-1])]
    return f"{parts[0]['part']}: {parts[0]['detail']}" if parts else f"{name}: got {short(value)}"


def _find_object(text: str) -> tuple[dict[str, Any], bool] | None:
    """The first object of the text with objects and relations, or else with one of them; and whether it is complete."""
    best: tuple[int, dict[str, Any], bool] | None = None
    start = -1
    for _ in range(_MAX_STARTS):
        if (start := text.find("{", start + 1)) < 0:
            break
        try:
            value, complete = _Reader(text, start).read()
        except ValueError:
            continue
        rank = sum(_member(value, names) is not None for names in (_OBJECTS, _RELATIONS))
        if best is None or rank > best[0]:
            best = rank, value, complete
        if rank == 2:
            break
    return None if best is None else best[1:]


class _CutOff(Exception):
    """The text ends inside a value."""


class _Reader:
    """Reads one object, keeping what is complete of one that is cut off."""

    def __init__(self, text: str, start: int) -> None:
        self._text, self._at = text, start

    def read(self) -> tuple[dict[str, Any], bool]:
        """The object, and whether it is complete.

        Raises:
            ValueError: it is not JSON, even leniently.
        """
        record: dict[str, Any] = {}
        try:
            self._next()
            self._object(record, 1)
        except _CutOff:
            return record, False
        return record, True

    def _next(self) -> tuple[str, str]:
        found = _TOKEN.match(self._text, self._at)
        if found is None or found.lastgroup is None:
            raise ValueError(f"character {self._at}")
        if found.lastgroup == "end":  # also a quote that opens a text without an end
            if found["end"] == "'" and "'" in self._text[found.end() :]:
                raise ValueError(f"character {self._at}: ambiguous quotes")
            raise _CutOff
        self._at = found.end()
        return found.lastgroup, found[found.lastgroup]

    def _object(self, record: dict[str, Any], depth: int) -> None:
        while True:
            kind, key = self._next()
            if kind == "mark":
                if key == "}":
                    return
                if key == ",":
                    continue
                raise ValueError(f"got {key}, expected a key")
            if self._next() != ("mark", ":"):
                raise ValueError("expected a colon")
            self._value(partial(record.setdefault, _unescaped(key)), depth)
            self._separate("}")

    def _list(self, items: list[Any], depth: int) -> None:
        while True:
            at = self._at
            kind, text = self._next()
            if kind == "mark" and text in "],":
                if text == "]":
                    return
                continue
            self._at = at
            self._value(items.append, depth)
            self._separate("]")

    def _separate(self, end: str) -> None:
        """Require a comma or the end after a value; the end is left for the caller."""
        at = self._at
        kind, text = self._next()
        if kind != "mark" or text not in (",", end):
            raise ValueError(f"got {text[:20]!r}, expected , or {end}")
        if text == end:
            self._at = at

    def _value(self, keep: Callable[[Any], object], depth: int) -> None:
        """Read a value; a list or an object is kept before it is complete."""
        kind, text = self._next()
        if kind in ("double", "single"):
            keep(_unescaped(text))
        elif kind == "word":
            keep(_word(text))
            if self._at == len(self._text):  # a number may go on
                raise _CutOff
        elif depth == _MAX_DEPTH:
            raise ValueError("nested too deeply")
        elif text == "{":
            keep(record := dict[str, Any]())
            self._object(record, depth + 1)
        elif text == "[":
            keep(items := list[Any]())
            self._list(items, depth + 1)
        else:
            raise ValueError(f"got {text}, expected a value")


def _word(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if len(text) > 30:
        raise ValueError("got a word, expected a value")
    return json.loads(text)


def _unescaped(text: str) -> str:
    def one(found: re.Match[str]) -> str:
        code = found[1]
        return chr(int(code[1:], 16)) if len(code) == 5 else _ESCAPED.get(code, code)

    # Halves of a surrogate pair are joined; a lone one is dropped by `normalise`.
    joined = _ESCAPE.sub(one, text).encode("utf-16-le", "surrogatepass")
    return joined.decode("utf-16-le", "surrogatepass")


def _member(record: dict[str, Any], names: tuple[str, ...]) -> Any:
    """The member with one of the names, spelled with any case, spaces and underscores."""
    found = {re.sub(r"[\W_]", "", key).lower(): value for key, value in reversed(record.items())}
    return next((found[name] for name in names if name in found), None)


def _names(values: list[Any], limit: int, rejected: list[dict[str, str]]) -> list[str]:
    names: dict[str, None] = {}
    for i, value in enumerate(values):
        name = _name(value)
        if name is None:
            rejected.append(_part(f"object {i}", f"got {short(value)}, expected a name"))
        elif name not in names and len(names) == limit:
            rejected.append(_part(f"object {i} ({name})", f"more than {limit} objects"))
            break
        else:
            names[name] = None
    return list(names)


def _triplets(values: list[Any], rejected: list[dict[str, str]]) -> list[list[str]]:
    triplets: dict[tuple[str, ...], None] = {}
    for i, value in enumerate(values):
        triplet = tuple(_triplet(value))
        if len(triplet) != 3:
            detail = f"got {short(value)}, expected [subject, predicate, object]"
            rejected.append(_part(f"relation {i}", detail))
        elif triplet not in triplets and len(triplets) == MAX_RELATIONS:
            rejected.append(_part(f"relation {i} ({' '.join(triplet)})", f"more than {MAX_RELATIONS} relations"))
            break
        else:
            triplets[triplet] = None
    return [list(triplet) for triplet in triplets]


def _triplet(value: Any) -> Iterator[str]:
    """The three texts of a relation; fewer if it is malformed."""
    if isinstance(value, dict):
        value = [_member(value, ("subject",)), _member(value, _PREDICATE), _member(value, ("object",))]
    if isinstance(value, list) and len(value) == 3:
        for item, read in zip(value, (_name, _text, _name), strict=True):
            if (text := read(item)) is not None:
                yield text


def _part(part: str, detail: str) -> dict[str, str]:
    return {"part": part, "reason": "answer_malformed", "detail": detail}


def _name(value: Any) -> str | None:
    return _text(_member(value, _NAME) if isinstance(value, dict) else value)


def _text(value: Any) -> str | None:
    """A name, a predicate or an action; None if it is none."""
    if not isinstance(value, str):
        return None
    text = normalise(value.replace("_", " "))
    text = _LIST_MARK.sub("", text, count=1).strip(" .,;:!?\"'`*()[]")
    return text if 0 < len(text) <= MAX_TEXT and any(map(str.isalnum, text)) else None


def _caption(value: Any) -> str | None:
    """A caption, whose case is kept: only its white space and control characters are cleaned."""
    if not isinstance(value, str):
        return None
    text = " ".join(word for word in value.split() if normalise(word))
    text = "".join(c for c in text if c == " " or normalise(c))
    if len(text) > MAX_CAPTION:
        text = text[:MAX_CAPTION].rpartition(" ")[0] or text[:MAX_CAPTION]
    return text or None
