from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scenarioclip_fast.generate.curate.names import clean_name, gerund, present_participle, singular

UNCHANGED = """
glasses sunglasses pants jeans trousers shorts scissors pliers headphones binoculars clothes stairs goggles bus minibus
grass glass dress mattress class princess cactus octopus walrus virus campus tennis iris debris canvas gas lens atlas
christmas news series species physics gymnastics sheep fish deer moose police cattle furniture luggage cheese horse
house mouse purse vase nose rose phone stone woman human german children's t-shirt data media dice series pajamas
crossroads lens-flare tv us 7s
"""


@pytest.mark.parametrize("name", UNCHANGED.split())
def test_names_that_are_no_plurals(name: str) -> None:
    assert singular(name) == name


@pytest.mark.parametrize(
    ("plural", "expected"),
    [
        ("dogs", "dog"),
        ("young men", "young man"),
        ("men", "man"),
        ("women", "woman"),
        ("firemen", "fireman"),
        ("people", "person"),
        ("children", "child"),
        ("buses", "bus"),
        ("glass bottles", "glass bottle"),
        ("wine glasses", "wine glasses"),  # as for spectacles: the singular of the pair is another thing
        ("dresses", "dress"),
        ("lenses", "lens"),
        ("octopuses", "octopus"),
        ("knives", "knife"),
        ("gloves", "glove"),
        ("waves", "wave"),
        ("leaves", "leaf"),
        ("scarves", "scarf"),
        ("horses", "horse"),
        ("benches", "bench"),
        ("potatoes", "potato"),
        ("shoes", "shoe"),
        ("feet", "foot"),
        ("geese", "goose"),
        ("skis", "ski"),
        ("taxis", "taxi"),
        ("emus", "emu"),
        ("cookies", "cookie"),
        ("hoodies", "hoodie"),
        ("cherries", "cherry"),
        ("zebras", "zebra"),
        ("cacti", "cactus"),
        ("traffic-lights", "traffic-light"),
        ("t-shirts", "t-shirt"),
        ("pieces of cake", "piece of cake"),
        ("bowls with oranges", "bowl with oranges"),
        ("tree in flowers", "tree in flowers"),
    ],
)
def test_singular(plural: str, expected: str) -> None:
    assert singular(plural) == expected


@given(st.sampled_from([*UNCHANGED.split(), "dogs", "buses", "dresses", "cookies", "men", "knives", "quizzes"]))
def test_singular_is_idempotent(name: str) -> None:
    assert singular(singular(name)) == singular(name)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" The\tYoung  Man ", "young man"),
        ("a the dog", "dog"),
        ("an apple", "apple"),
        ("some water", "water"),
        ("area", "area"),
        ("theatre", "theatre"),
        ("a", "a"),
        ("the ", "the"),
        ("\u200b", ""),
    ],
)
def test_articles(text: str, expected: str) -> None:
    assert clean_name(text) == expected


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        ("played football", "playing football"),
        ("stopped", "stopping"),
        ("hiked", "hiking"),
        ("carried boxes", "carrying boxes"),
        ("tied a knot", "tying a knot"),
        ("died", "dying"),
        ("canoed", "canoeing"),
        ("dyed hair", "dyeing hair"),
        ("skied downhill", "skiing downhill"),
        ("agreed", "agreeing"),
        ("freed birds", "freeing birds"),
        ("picnicked", "picnicking"),
        ("rode a horse", "riding a horse"),
        ("ran", "running"),
        ("sat on a bench", "sitting on a bench"),
        ("led a dog", "leading a dog"),
        ("red", "red"),
        ("bed", "bed"),
        ("speed", "speed"),
        ("feed animals", "feed animals"),
        ("seed planting", "seed planting"),
        ("shed", "shed"),
        ("naked", "naked"),
        ("playing", "playing"),
        ("being tired", "being tired"),  # the first word only
        ("eat", "eat"),
        ("", ""),
    ],
)
def test_gerund(action: str, expected: str) -> None:
    assert gerund(action) == expected
    assert gerund(expected) == expected


@pytest.mark.parametrize(
    ("verb", "expected"),
    [
        ("holds", "holding"),
        ("rides", "riding"),
        ("sits", "sitting"),
        ("watches", "watching"),
        ("carries", "carrying"),
        ("covers", "covering"),
        ("sees", "seeing"),
        ("eats", "eating"),
        ("jumped", "jumping"),
        ("holding", None),
        ("on", None),
        ("across", None),
        ("is", None),
    ],
)
def test_present_participle(verb: str, expected: str | None) -> None:
    assert present_participle(verb) == expected
