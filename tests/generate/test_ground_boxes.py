"""Clipping and non-maximum suppression."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scenarioclip_fast.generate.ground.boxes import Box, clip, suppress

COORDINATES = st.integers(0, 400).map(lambda n: n / 4)  # few values: equal boxes and touching sides occur


@st.composite
def boxes(draw: st.DrawFn) -> list[Box]:
    found = []
    for _ in range(draw(st.integers(0, 12))):
        x1, y1 = draw(COORDINATES), draw(COORDINATES)
        corners = (x1, y1, x1 + draw(COORDINATES) + 0.25, y1 + draw(COORDINATES) + 0.25)
        found.append(Box(draw(st.sampled_from("abc")), corners, draw(st.sampled_from([0.25, 0.5, 0.75, 1.0]))))
    return found


def iou(a: Box, b: Box) -> Fraction:
    def area(x1: float, y1: float, x2: float, y2: float) -> Fraction:
        return max(Fraction(0), Fraction(x2) - Fraction(x1) + 1) * max(Fraction(0), Fraction(y2) - Fraction(y1) + 1)

    shared = area(*map(max, a.box[:2], b.box[:2]), *map(min, a.box[2:], b.box[2:]))
    return shared / (area(*a.box) + area(*b.box) - shared)


@settings(max_examples=300, deadline=None)
@given(boxes(), st.sampled_from([0.0, 0.125, 0.375, 0.75, 1.0]))  # products with areas are exact
def test_suppression_equals_the_definition(found: list[Box], threshold: float) -> None:
    kept: list[Box] = []
    for box in sorted(found, key=lambda one: (-one.score, one.box, one.name)):
        if all(iou(box, other) < threshold for other in kept):
            kept.append(box)
    assert suppress(found, threshold) == kept


@given(boxes(), st.randoms())
def test_suppression_does_not_depend_on_the_order(found: list[Box], shuffle: random.Random) -> None:
    expected = suppress(found, 0.4)
    shuffle.shuffle(found)
    assert suppress(found, 0.4) == expected


@pytest.mark.parametrize(("threshold", "kept"), [(0.5, 1), (0.51, 2)])
def test_sides_include_both_corners(threshold: float, kept: int) -> None:
    """10 x 10 and 20 x 10 pixels, half of which are shared; without the convention, 9 x 9 of 19 x 9."""
    found = [Box("a", (0, 0, 9, 9), 0.9), Box("b", (0, 0, 19, 9), 0.8)]
    assert len(suppress(found, threshold)) == kept


def test_suppression_ignores_names_and_keeps_the_best() -> None:
    found = [Box("dog", (0, 0, 50, 50), 0.4), Box("cat", (1, 1, 50, 50), 0.9), Box("dog", (60, 60, 90, 90), 0.3)]
    assert suppress(found, 0.4) == [found[1], found[2]]


def test_boxes_are_clipped_and_bad_ones_dropped() -> None:
    nan, inf = math.nan, math.inf
    found = clip(
        [
            Box("a", (-5.0, 2.123456, 200.0, 30.0), 0.123456),
            Box("outside", (101.0, 0.0, 120.0, 10.0), 0.5),
            Box("empty", (5.0, 5.0, 5.0, 9.0), 0.5),
            Box("inverted", (9.0, 5.0, 5.0, 9.0), 0.5),
            Box("thin", (5.0, 5.0, 5.001, 9.0), 0.5),
            Box("nan", (nan, 0.0, 5.0, 9.0), 0.5),
            Box("infinite", (0.0, 0.0, inf, 9.0), 0.5),
            Box("score", (0.0, 0.0, 5.0, 9.0), nan),
        ],
        (50, 100),
    )
    assert found == [Box("a", (0.0, 2.12, 100.0, 30.0), 0.1235)]
