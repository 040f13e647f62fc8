"""Events of synthetic scenes: kinds of objects, their placement and relations, and the action.

An event is laid out in a unit square with y pointing down. Its first two places are the subject and the object of the
main relation, which determines the action. A third object may be related to one of them; this relation does not affect
the action.

Any two kinds are related in one order only ("person left of robot", never "robot right of person"): a focused region
looks the same in both orders, so each picture has exactly one correct text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from scenarioclip_fast.data.synthetic.drawings import COLOURS


class Template(NamedTuple):
    """A relation between two kinds, without colours."""

    subject: str
    predicate: str
    object: str


class Place(NamedTuple):
    """Position of an object in the unit square: bottom centre (x, foot) and height; `part` is its pose."""

    kind: str
    x: float
    foot: float
    height: float
    part: str = "whole"


@dataclass(frozen=True)
class Event:
    """A layout of two or three objects.

    `join` is the predicate of the third object and the place (0 or 1) that it is related to. `order` lists (place,
    part) from back to front if it differs from the order of the places: a container is drawn in two layers, around its
    content.
    """

    predicate: str
    places: tuple[Place, ...]
    join: tuple[str, int] | None = None
    order: tuple[tuple[int, str], ...] = ()

    @property
    def relations(self) -> tuple[tuple[int, str, int], ...]:
        """(subject place, predicate, object place), the main relation first."""
        main = ((0, self.predicate, 1),)
        return main if self.join is None else (*main, (2, *self.join))

    @property
    def layers(self) -> tuple[tuple[int, str], ...]:
        return self.order or tuple((i, place.part) for i, place in enumerate(self.places))

    def template(self, relation: tuple[int, str, int]) -> Template:
        subject, predicate, object_ = relation
        return Template(self.places[subject].kind, predicate, self.places[object_].kind)


def _event(predicate: str, *places: Place, join: tuple[str, int] | None = None, order: str = "") -> Event:
    """Create an event; `order` lists places from back to front with their layer: w(hole), b(ack) or f(ront)."""
    parts = {"w": "", "b": "back", "f": "front"}
    layers = tuple((int(step[0]), parts[step[1]] or places[int(step[0])].part) for step in order.split())
    return Event(predicate, places, join, layers)


def _playing(toy: str, x: float, height: float, *dog: Place, side: str = "") -> Event:
    player = Place("person", x, 0.97, 0.58, "reach")
    # The hand is at (0.94, 0.16) of the drawing of a person, whose width is 0.45 of its height.
    hand_x, hand_y = x + (0.94 - 0.5) * 0.45 * player.height, player.foot - (1 - 0.16) * player.height
    toy_x = hand_x if toy == "balloon" else hand_x + 0.45 * height
    places = (player, Place(toy, toy_x, hand_y, height), *dog)
    return Event(
        "holding",
        places,
        (side, 0) if dog else None,
        ((1, "whole"), (0, "reach"), (2, "whole"))[: len(places)],
    )


_DOG_LEFT, _DOG_RIGHT = Place("dog", 0.17, 0.97, 0.26), Place("dog", 0.78, 0.97, 0.27)
_HOUSE, _SMALL_HOUSE = Place("house", 0.5, 0.9, 0.86), Place("house", 0.40, 0.9, 0.70)
_TREE_BEHIND = Place("tree", 0.70, 0.74, 0.68)
_TABLE, _CHAIR = Place("table", 0.5, 0.97, 0.62), Place("chair", 0.5, 0.98, 0.92)
_CAT_ON, _DOG_ON = Place("cat", 0.5, 0.57, 0.46), Place("dog", 0.5, 0.57, 0.42)
_BALL_UNDER = Place("ball", 0.5, 0.98, 0.27)


def _packing(fruit: str) -> tuple[Event, ...]:
    inside = "1b 0w 1f"
    beside = f"{inside} 2w"
    left, right = Place("basket", 0.64, 0.97, 0.58), Place("basket", 0.36, 0.97, 0.58)
    return (
        _event("inside", Place(fruit, 0.5, 0.75, 0.45), Place("basket", 0.5, 0.97, 0.76), order=inside),
        _event(
            "inside",
            Place(fruit, 0.64, 0.79, 0.38),
            left,
            Place("flower", 0.15, 0.97, 0.46),
            join=("left of", 1),
            order=beside,
        ),
        _event(
            "inside",
            Place(fruit, 0.36, 0.79, 0.38),
            right,
            Place("flower", 0.85, 0.97, 0.46),
            join=("right of", 1),
            order=beside,
        ),
    )


def _parking(vehicle: str, height: float) -> tuple[Event, ...]:
    front = Place(vehicle, 0.5, 0.99, height)
    return (
        _event("in front of", front, _HOUSE, order="1w 0w"),
        _event(
            "in front of",
            front._replace(x=0.44),
            _SMALL_HOUSE,
            _TREE_BEHIND,
            join=("behind", 1),
            order="2w 1w 0w",
        ),
    )


# action -> main relations that determine it -> layouts without and with a third object
ACTIONS: dict[str, tuple[tuple[Event, ...], ...]] = {
    "riding": (
        (
            _event(
                "riding",
                Place("person", 0.40, 0.80, 0.58, "ride"),
                Place("horse", 0.49, 0.98, 0.64),
                order="1w 0w",
            ),
        ),
        (
            _event(
                "riding",
                Place("person", 0.40, 0.82, 0.60, "ride"),
                Place("motorbike", 0.5, 0.97, 0.52),
                order="1w 0w",
            ),
        ),
    ),
    "playing": (
        (
            _playing("balloon", 0.40, 0.47),
            _playing("balloon", 0.58, 0.47, _DOG_LEFT, side="left of"),
            _playing("balloon", 0.40, 0.47, _DOG_RIGHT, side="right of"),
        ),
        (
            _playing("kite", 0.34, 0.47),
            _playing("kite", 0.50, 0.40, _DOG_LEFT, side="left of"),
            _playing("kite", 0.34, 0.47, _DOG_RIGHT, side="right of"),
        ),
    ),
    "greeting": (
        (_event("left of", Place("person", 0.26, 0.97, 0.86), Place("robot", 0.73, 0.97, 0.84)),),
        (_event("right of", Place("person", 0.74, 0.97, 0.86), Place("robot", 0.27, 0.97, 0.84)),),
    ),
    "parking": (_parking("car", 0.36), _parking("truck", 0.42)),
    "racing": (
        (_event("left of", Place("car", 0.25, 0.66, 0.26), Place("truck", 0.755, 0.64, 0.30)),),
        (_event("right of", Place("car", 0.75, 0.66, 0.26), Place("truck", 0.245, 0.64, 0.30)),),
    ),
    "perching": (
        (
            _event("on", Place("bird", 0.5, 0.34, 0.33), Place("tree", 0.5, 0.99, 0.72), order="1w 0w"),
            _event(
                "on",
                Place("bird", 0.62, 0.34, 0.33),
                Place("tree", 0.62, 0.99, 0.72),
                Place("mushroom", 0.15, 0.99, 0.29),
                join=("left of", 1),
                order="1w 0w 2w",
            ),
            _event(
                "on",
                Place("bird", 0.38, 0.34, 0.33),
                Place("tree", 0.38, 0.99, 0.72),
                Place("mushroom", 0.85, 0.99, 0.29),
                join=("right of", 1),
                order="1w 0w 2w",
            ),
        ),
        (_event("on", Place("bird", 0.5, 0.37, 0.35), Place("house", 0.5, 0.99, 0.67), order="1w 0w"),),
    ),
    "hiding": (
        (
            _event("under", Place("cat", 0.5, 0.97, 0.47), _TABLE),
            _event("under", Place("cat", 0.5, 0.97, 0.47), _TABLE, Place("cup", 0.5, 0.37, 0.31), join=("on", 1)),
        ),
        (_event("inside", Place("cat", 0.5, 0.74, 0.64), Place("box", 0.5, 0.98, 0.64), order="1b 0w 1f"),),
    ),
    "resting": (
        (
            _event("on", _CAT_ON, _CHAIR, order="1w 0w"),
            _event("on", _CAT_ON, _CHAIR, _BALL_UNDER, join=("under", 1), order="1w 0w 2w"),
        ),
        (
            _event("on", _DOG_ON, _CHAIR, order="1w 0w"),
            _event("on", _DOG_ON, _CHAIR, _BALL_UNDER, join=("under", 1), order="1w 0w 2w"),
        ),
    ),
    "packing": (_packing("apple"), _packing("ball")),
    "waiting": (),  # only unrelated objects
}


def _templates(events: Iterable[Event]) -> list[Template]:
    return sorted({event.template(relation) for event in events for relation in event.relations})


TEMPLATES = _templates(event for layouts in ACTIONS.values() for events in layouts for event in events)
RELATED = frozenset(frozenset((t.subject, t.object)) for t in TEMPLATES)

# The main relation of an event -> its action.
ACTION_OF: dict[Template, str] = {
    event.template(event.relations[0]): action
    for action, layouts in ACTIONS.items()
    for events in layouts
    for event in events
}

# Related objects have different colours, so that they are distinguishable where they touch.
COLOUR_PAIRS = [(subject, object_) for subject in COLOURS for object_ in COLOURS if subject != object_]


def _held_out() -> frozenset[tuple[Template, str, str]]:
    """Two colour pairs per template; in training, each colour still occurs as subject and as object of the template."""
    names = list(COLOURS)
    n = len(names)
    return frozenset(
        (template, names[(t + k) % n], names[(t + k + 1 + t % (n - 1)) % n])
        for t, template in enumerate(TEMPLATES)
        for k in (0, 2)
    )


# (template, subject colour, object colour) that never occur as relations in the train split
HELD_OUT = _held_out()


def action_of(templates: Iterable[Template]) -> str:
    """The action of a picture, determined by its main relation; "waiting" if it has none."""
    found = {ACTION_OF[template] for template in templates if template in ACTION_OF}
    assert len(found) <= 1, f"relations of {len(found)} actions in one scene: {sorted(found)}"
    return found.pop() if found else "waiting"
