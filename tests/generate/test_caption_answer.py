"""Answers as models write them."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scenarioclip_fast.data.texts import normalise
from scenarioclip_fast.generate.caption.answer import MAX_CAPTION, MAX_TEXT, BadAnswer, read_answer
from scenarioclip_fast.generate.caption.prompt import MAX_RELATIONS
from scenarioclip_fast.generate.stages import REASONS

GOOD = {
    "caption": "A woman throws a frisbee for her dog.",
    "action": "throwing a frisbee",
    "objects": ["woman", "dog", "frisbee"],
    "relations": [["woman", "throwing", "frisbee"], ["dog", "chasing", "frisbee"]],
}
TEXT = json.dumps(GOOD)


def with_names(*names: str) -> list[dict[str, str]]:
    """The relations as objects."""
    return [dict(zip(names, triplet, strict=True)) for triplet in GOOD["relations"]]


def read(text: str, **options: Any) -> dict[str, Any]:
    return read_answer(text, **({"max_objects": 10} | options))


def reason(text: str, **options: Any) -> str:
    with pytest.raises(BadAnswer) as caught:
        read(text, **options)
    assert caught.value.reason in REASONS
    return caught.value.reason


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        json.dumps(GOOD, indent=2),
        f"```json\n{TEXT}\n```",
        f"```\n{TEXT}\n```",
        f"Here is the scene:\n{TEXT}\nI hope that this helps {{or not}}!",
        f"<think>{{\"objects\": [\"cat\"], \"relations\": []}} no, a dog</think>{TEXT}",
        f"{{\"example\": true}} {TEXT}",
        f"[{TEXT}]",
        json.dumps({"scene": GOOD}),
        TEXT.replace("]]", "],],").replace("}", ",}"),
        TEXT.replace("frisbee\"]", "frisbee\",]"),
        str(GOOD),  # Python's quotes
        str(GOOD | {"extra": None, "sure": True}),
        TEXT.removesuffix("}"),
        TEXT.removesuffix("]}"),
        TEXT.replace('"objects"', "objects").replace('"relations"', "relations"),
        "\ufeff" + TEXT,
        json.dumps({key.upper(): value for key, value in GOOD.items()}),
        json.dumps({("dense caption" if key == "caption" else key): value for key, value in GOOD.items()}),
        json.dumps({("dense_caption" if key == "caption" else key): value for key, value in GOOD.items()}),
        json.dumps({("triplets" if key == "relations" else key): value for key, value in GOOD.items()}),
        json.dumps(GOOD | {"objects": [{"name": name} for name in GOOD["objects"]]}),
        json.dumps(GOOD | {"objects": ["1. Woman", "- DOG.", "frisbee", "dog"]}),
        json.dumps(GOOD | {"relations": with_names("subject", "predicate", "object")}),
        json.dumps(GOOD | {"relations": with_names("subject", "relation", "object")}),
        json.dumps(GOOD | {"relations": GOOD["relations"] * 2}),
        json.dumps(GOOD | {"action": "Throwing_a\n frisbee."}),
    ],
)  # fmt: skip
def test_answers_with_one_meaning(text: str) -> None:
    assert read(text) == GOOD


def test_a_caption_in_the_object_wins_over_one_of_another_name() -> None:
    assert read(json.dumps(GOOD | {"dense caption": "Longer."}))["caption"] == "Longer."


@pytest.mark.parametrize(("action", "caption"), [(None, None), ("", " "), (3, ["x"]), ("?!", "\u200b")])
def test_action_and_caption_may_be_missing(action: Any, caption: Any) -> None:
    found = read(json.dumps(GOOD | {"action": action, "caption": caption}))
    assert found["action"] is None and found["caption"] is None
    assert found == read(json.dumps({key: GOOD[key] for key in ("objects", "relations")}))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "answer_not_json"),
        ("I cannot see an image.", "answer_not_json"),
        ("{", "answer_not_json"),
        ('{"objects": ["dog" "cat"], "relations": []}', "answer_not_json"),
        ("{'objects': ['the dogs' bowl'], 'relations': []}", "answer_not_json"),
        ('{"objects": ["a "red" dog"], "relations": []}', "answer_not_json"),
        ('{"objects": ["dog"]', "answer_not_json"),
        ('["dog", "cat"]', "answer_not_json"),
        ("{}", "answer_malformed"),
        ('{"objects": "dog, cat", "relations": []}', "answer_malformed"),
        ('{"objects": ["dog"]}', "answer_malformed"),
        ('{"relations": [["dog", "on", "mat"]]}', "answer_malformed"),
        ('{"objects": [], "relations": []}', "no_objects"),
        ('{"objects": ["", " . ", 7, null], "relations": []}', "no_objects"),
        ('{"objects": ["dog"], "relations": []}', "no_relations"),
        ('{"objects": ["dog"], "relations": [["dog", "on"]]}', "no_relations"),
        ("[" * 5000 + '{"objects": ' + "[" * 5000, "answer_not_json"),
    ],
)
def test_unusable_answers(text: str, expected: str) -> None:
    assert reason(text) == expected


def test_apostrophes_in_single_quotes() -> None:
    text = "{'objects': ['man\\'s hat', \"dog's bowl\", 'cat'], 'relations': [['cat', 'in', 'man's hat']]}"
    found = read(text)
    assert found["objects"] == ["man's hat", "dog's bowl", "cat"]
    assert found["relations"] == [["cat", "in", "man's hat"]]


def test_escapes() -> None:
    assert read(TEXT.replace("woman", "caf\\u00e9 \\ud83d\\ude00"))["objects"][0] == "café 😀"
    assert read(TEXT.replace("woman", "wo\\ud800man"))["objects"][0] == "woman"  # half of a surrogate pair
    assert read(TEXT.replace("frisbee for", "frisbee\nfor"))["caption"] == GOOD["caption"]  # not strictly JSON


def test_a_bad_relation_costs_only_itself() -> None:
    bad = [["dog", "on"], "dog on mat", ["dog", "", "mat"], ["dog", 3, "mat"], {"subject": "dog"}, None]
    found = read(json.dumps(GOOD | {"relations": [*bad, *GOOD["relations"]]}))
    assert found["relations"] == GOOD["relations"]
    assert [one["part"] for one in found["rejected"]] == [f"relation {i}" for i in range(len(bad))]
    assert {one["reason"] for one in found["rejected"]} == {"answer_malformed"}
    assert "got ['dog', 'on'], expected [subject, predicate, object]" in found["rejected"][0]["detail"]


def test_limits() -> None:
    many = [f"thing {i}" for i in range(30)]
    relations = [[a, "near", b] for a in many for b in many if a != b]
    found = read(json.dumps(GOOD | {"objects": many, "relations": relations, "caption": "word " * 1000}), max_objects=4)
    assert found["objects"] == many[:4]
    assert found["relations"] == relations[:MAX_RELATIONS]
    assert found["caption"] == ("word " * 1000)[:MAX_CAPTION].strip()
    assert [one["part"] for one in found["rejected"]] == ["object 4 (thing 4)", "relation 64 (thing 2 near thing 7)"]
    long = read(json.dumps(GOOD | {"objects": ["x" * (MAX_TEXT + 1), "y" * MAX_TEXT], "action": "z" * 500}))
    assert long["objects"] == ["y" * MAX_TEXT] and long["action"] is None


@pytest.mark.parametrize("length", range(1, len(TEXT)))
def test_a_truncated_answer_keeps_what_is_complete(length: int) -> None:
    """Cut after every character: a part of the truth, or the reason; never a name that is cut."""
    try:
        found = read(TEXT[:length], truncated=True)
    except BadAnswer as error:
        assert error.reason in ("answer_truncated", "no_relations")
        assert length < TEXT.index('"dog", "chasing"')
    else:
        assert found["objects"] == GOOD["objects"]
        assert found["relations"] == GOOD["relations"][: len(found["relations"])]
        assert len(found["relations"]) == 2 or length <= TEXT.rindex("]]")


def test_a_truncated_answer_without_json() -> None:
    assert reason("Let me think about the", truncated=True) == "answer_truncated"
    assert reason('{"objects": ["dog"], "act', truncated=True) == "answer_truncated"


NAMES = st.text(max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | NAMES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | st.sampled_from(list(GOOD)), inner, max_size=4),
    max_leaves=20,
)
ALMOST = st.lists(
    st.sampled_from([*"{}[],:\"'\\ \n", "objects", "relations", '"objects"', "a", "1", "null"]), max_size=60
)


def check(text: str, truncated: bool) -> None:
    try:
        found = read(text, truncated=truncated)
    except BadAnswer as error:
        assert error.reason in REASONS
        return
    json.dumps(found)
    texts = [*found["objects"], *(text for triplet in found["relations"] for text in triplet)]
    texts += [found["action"]] if found["action"] is not None else []
    assert texts and found["relations"] and len(found["objects"]) <= 10
    assert all(0 < len(one) <= MAX_TEXT and normalise(one) == one for one in texts)
    assert all(len(triplet) == 3 for triplet in found["relations"])


@settings(deadline=None)
@given(st.text(), st.booleans())
def test_any_text(text: str, truncated: bool) -> None:
    check(text, truncated)


@settings(deadline=None)
@given(ALMOST.map("".join), st.booleans())
def test_almost_json(text: str, truncated: bool) -> None:
    check(text, truncated)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(list(GOOD)), JSON), st.booleans())
def test_any_json(record: dict[str, Any], truncated: bool) -> None:
    check(json.dumps(GOOD | record), truncated)
    check(str(GOOD | record), truncated)


@settings(deadline=None)
@given(st.integers(0, len(TEXT)), st.text(max_size=3), st.integers(0, 5))
def test_damaged_answers(at: int, inserted: str, removed: int) -> None:
    check(TEXT[:at] + inserted + TEXT[at + removed :], False)


@pytest.mark.parametrize(
    "text",
    [
        "{" * 300_000,
        '{"a":' * 60_000,
        "{'" * 100_000,
        '{"objects": ["' + "a\\" * 100_000,
        "{'" + "a'a" * 20_000,
        "{ " * 1000 + " " * 60_000,
    ],
)
def test_hostile_answers_take_bounded_time(text: str) -> None:
    """Each of at most 64 attempts reads at most 65,536 characters once: tens of milliseconds, minutes if quadratic."""
    start = time.perf_counter()
    check(text, False)
    assert time.perf_counter() - start < 5
