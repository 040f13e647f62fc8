from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scenarioclip_fast.data.check import REASONS
from scenarioclip_fast.data.sources import open_source
from scenarioclip_fast.data.sources.registry import recognise
from scenarioclip_fast.errors import UserError

HEIGHT, WIDTH = 68, 51
NOWHERE = [-1, -1, -1, -1]
NOUNS = {
    "n10787470": {"gloss": ["woman", "adult female"], "def": "an adult female person (as opposed to a man)"},
    "n10287213": {"gloss": ["man", "adult male"], "def": "an adult person who is male (as opposed to a woman)"},
    "n07929519": {"gloss": ["coffee", "java"], "def": "a beverage"},
    "n03147509": {"gloss": ["cup"], "def": "a small open container"},
    "n04284002": {"gloss": ["spoon"], "def": "a piece of cutlery"},
    "n03519981": {"gloss": ["highway", "main road"], "def": "a major road"},
    "n00000000": {"gloss": [], "def": "nothing"},
}
SPACE = {
    "nouns": NOUNS,
    "verbs": {
        "stirring": {
            "framenet": "Cause_to_be_mixed",
            "abstract": "the AGENT stirs the INGREDIENTS in a CONTAINER with a TOOL at a PLACE",
            "def": "mix",
            "order": ["agent", "ingredients", "tool", "place"],
            "roles": {"agent": {"framenet": "agent", "def": "The entity doing the stir action"}},
        },
        "raining": {"framenet": "Precipitation", "abstract": "it rains in the PLACE", "order": ["place"], "roles": {}},
    },
}


class Swig:
    """A clone of the repository with its images, which a test may change before packing."""

    def __init__(self, root: Path, write_jpeg: Any) -> None:
        self.root, self.jsons = root, root / "SWiG_jsons"
        self.jsons.mkdir(parents=True)
        self.space: Any = SPACE
        frame = {"tool": "n04284002", "agent": "n10787470", "ingredients": "n07929519", "place": "n03519981"}
        other = {"tool": "", "agent": "n10287213", "ingredients": "n03147509", "place": ""}
        self.stirring: dict[str, Any] = {
            "verb": "stirring",
            "height": HEIGHT,
            "width": WIDTH,
            "bb": {"place": NOWHERE, "tool": [5, 6, 20, 30], "agent": [1, 2, 50, 60], "ingredients": [10, 20, 30, 40]},
            "frames": [other, frame, frame],
        }
        raining = {
            "verb": "raining",
            "height": HEIGHT,
            "width": WIDTH,
            "bb": {"place": [0, 0, 51, 68]},
            "frames": [{"place": "n03519981"}] * 3,
        }
        self.content: dict[str, Any] = {
            "train": {"stirring_238.jpg": self.stirring},
            "dev": {"raining_1.jpg": raining},
            "test": {"stirring_7.jpg": json.loads(json.dumps(self.stirring))},
        }
        for name in ("stirring_238", "raining_1", "stirring_7"):
            write_jpeg(root / "images_512" / f"{name}.jpg", HEIGHT, WIDTH)

    def write(self) -> Path:
        (self.jsons / "imsitu_space.json").write_text(json.dumps(self.space))
        for split, content in self.content.items():
            (self.jsons / f"{split}.json").write_text(json.dumps(content))
        return self.jsons


@pytest.fixture
def swig(tmp_path: Path, write_jpeg: Any) -> Swig:
    return Swig(tmp_path / "swig", write_jpeg)


@pytest.mark.parametrize("source", ["SWiG_jsons", "."])
def test_valid_images(swig: Swig, packed: Any, texts: Any, source: str) -> None:
    swig.write()
    found = packed(swig.root / source)
    assert not found.rejected
    assert found.splits == {"stirring_238": "train", "raining_1": "val", "stirring_7": "test"}
    scene = found.scenes["stirring_238"]
    assert scene.action == "stirring"
    assert scene.image == (swig.root / "images_512" / "stirring_238.jpg").read_bytes()
    assert [(o.name, list(o.box), o.mask) for o in scene.objects] == [
        ("woman", [1, 2, 50, 60], None),
        ("coffee", [10, 20, 30, 40], None),
        ("spoon", [5, 6, 20, 30], None),
    ], "in the order of the verb's roles, named by two of three annotators"
    assert texts(scene) == ["woman stirring coffee", "woman stirring with spoon"]
    rain = found.scenes["raining_1"]
    assert (rain.action, [o.name for o in rain.objects], rain.relations) == ("raining", ["highway"], [])


def test_ties_and_synonyms(swig: Swig, packed: Any) -> None:
    swig.space = json.loads(json.dumps(SPACE))
    swig.space["nouns"]["n1"] = {"gloss": ["lady"]}
    swig.space["nouns"]["n2"] = {"gloss": ["lady", "gentlewoman"]}
    pairs = [("n10787470", "n04284002"), ("n1", "n03147509"), ("n2", "")]
    frames = [{"agent": agent, "tool": tool} for agent, tool in pairs]
    swig.stirring |= {"frames": frames, "bb": {"agent": [1, 2, 50, 60], "tool": [5, 6, 20, 30]}}
    scene = packed(swig.write()).scenes["stirring_238"]
    assert [o.name for o in scene.objects] == ["lady", "spoon"], "two nouns with one gloss; the first of two on a tie"


@pytest.mark.parametrize(
    ("role", "text"),
    [
        ("tool", "woman stirring with coffee"),
        ("destination", "woman stirring to coffee"),
        ("source", "woman stirring from coffee"),
        ("place", "woman stirring in coffee"),
        ("surface", "woman stirring on coffee"),
        ("victim", "woman stirring coffee"),
        ("coagent", "woman stirring with coffee"),
    ],
)
def test_predicates(swig: Swig, packed: Any, texts: Any, role: str, text: str) -> None:
    frames = [{"agent": "n10787470", role: "n07929519"}] * 3
    swig.stirring |= {"frames": frames, "bb": {"agent": [1, 2, 50, 60], role: [5, 6, 20, 30]}}
    assert texts(packed(swig.write()).scenes["stirring_238"]) == [text]


# Damage to the first image: the reason, its objects and relations; None: the image is rejected.
DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str, tuple[int, int] | None]] = {
    "no verb": (lambda r: r.pop("verb"), "malformed_entry", None),
    "empty verb": (lambda r: r.update(verb=" "), "malformed_entry", None),
    "verb is a number": (lambda r: r.update(verb=3), "malformed_entry", None),
    "no boxes": (lambda r: r.pop("bb"), "malformed_entry", None),
    "frames not a list": (lambda r: r.update(frames={}), "malformed_entry", None),
    "frames of numbers": (lambda r: r.update(frames=[1, 2, 3]), "malformed_object", (0, 0)),
    "frame of lists": (lambda r: r.update(frames=[{"agent": []}]), "malformed_entry", None),
    "other size": (lambda r: r.update(width=512), "other_size", None),
    "no noun": (lambda r: [frame.pop("tool", None) for frame in r["frames"]], "malformed_object", (2, 1)),
    "unknown noun": (
        lambda r: [frame.update(tool="n99999999") for frame in r["frames"]],
        "malformed_object",
        (2, 1),
    ),
    "noun without a gloss": (
        lambda r: [frame.update(tool="n00000000") for frame in r["frames"]],
        "malformed_object",
        (2, 1),
    ),
    "box of three": (lambda r: r["bb"].update(tool=[1, 2, 3]), "malformed_object", (2, 1)),
    "box outside": (lambda r: r["bb"].update(tool=[1, 2, 90, 90]), "box_outside", (2, 1)),
    "agent rejected": (lambda r: r["bb"].update(agent=None), "relation_without_object", (2, 0)),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_entries(swig: Swig, packed: Any, name: str) -> None:
    damage, reason, left = DAMAGE[name]
    damage(swig.stirring)
    found = packed(swig.write())
    assert reason in REASONS and reason in [row[1] for row in found.rejected], found.rejected
    assert all(entry.startswith("train.json (stirring_238)") for entry, _ in found.rejected)
    assert found.scenes.keys() == {"raining_1", "stirring_7"} | ({"stirring_238"} if left is not None else set())
    if left is not None:
        scene = found.scenes["stirring_238"]
        assert (len(scene.objects), len(scene.relations)) == left


@pytest.mark.parametrize("value", [None, 3, "text", []])
def test_records_of_another_type(swig: Swig, packed: Any, value: Any) -> None:
    swig.content["train"]["stirring_238.jpg"] = value
    assert packed(swig.write()).rejected == [("train.json (stirring_238)", "malformed_entry")]


def test_names_and_files(swig: Swig, packed: Any) -> None:
    train = swig.content["train"]
    train["../stirring_9.jpg"] = train["none.jpg"] = train[""] = swig.stirring
    (swig.root / "images_512" / "stirring_238.jpg").write_bytes(b"no image")
    found = packed(swig.write())
    assert sorted(reason for _, reason in found.rejected) == [
        "image_not_an_image",
        "missing_image",
        "unsafe_path",
        "unsafe_path",
    ]


def test_unusable_directories(swig: Swig, packed: Any, tmp_path: Path) -> None:
    swig.write()
    assert recognise([swig.jsons]) == recognise([swig.root]) == "swig"
    with pytest.raises(UserError, match="actions: data sets of format 'swig' do not use this option"):
        packed(swig.jsons, actions=swig.jsons / "train.json")
    with pytest.raises(UserError, match="expected the directory SWiG_jsons"):
        open_source(tmp_path, "swig")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"is in .*empty; pass the directory .* as --images"):
        packed(swig.jsons, images=tmp_path / "empty")
    swig.content["dev"] = []
    with pytest.raises(UserError, match=r"dev.json: got \[\], expected \{image name: annotation\}"):
        open_source(swig.write(), "swig")
    swig.space = {"nouns": []}
    with pytest.raises(UserError, match=r"imsitu_space.json: got .* expected \{\"nouns\""):
        open_source(swig.write(), "swig")
    (swig.jsons / "imsitu_space.json").write_text("{")
    with pytest.raises(UserError, match=r"imsitu_space.json: not readable as JSON"):
        open_source(swig.jsons, "swig")


def test_part_of_the_splits_and_images_elsewhere(swig: Swig, packed: Any, tmp_path: Path) -> None:
    swig.write()
    (swig.jsons / "train.json").unlink()
    (swig.root / "images_512").rename(tmp_path / "photos")
    assert packed(swig.jsons, images=tmp_path / "photos").splits == {"raining_1": "val", "stirring_7": "test"}


def test_an_up_to_date_pack_and_changes(swig: Swig, packed: Any) -> None:
    assert not packed(swig.write()).report.up_to_date
    assert packed(swig.jsons).report.up_to_date
    swig.stirring["verb"] = "mixing"
    assert packed(swig.write()).scenes["stirring_238"].action == "mixing"
    image = swig.root / "images_512" / "raining_1.jpg"
    image.write_bytes(image.read_bytes() + b"\0")
    assert not packed(swig.jsons).report.up_to_date
