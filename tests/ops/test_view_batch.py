"""Which images can be rendered."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scenarioclip_fast.data import Relation, Scene, SceneObject, Views, rle
from scenarioclip_fast.ops import render_views
from scenarioclip_fast.ops.view_batch import MAX_ASPECT, MAX_SIDE, check_renderable


@pytest.mark.parametrize(
    ("longer", "shorter", "message"),
    [
        (MAX_SIDE, MAX_SIDE // MAX_ASPECT, None),
        (MAX_SIDE, MAX_SIDE, None),
        (MAX_ASPECT, 1, None),
        (1, 1, None),
        (MAX_SIDE + 1, MAX_SIDE, "expected sides of at most 32768 pixels"),
        (MAX_ASPECT + 1, 1, "expected a ratio of the sides of at most 1024"),
        (1 << 26, 1, "expected sides of at most 32768 pixels"),
    ],
)
def test_limits(longer: int, shorter: int, message: str | None) -> None:
    for height, width in ((longer, shorter), (shorter, longer)):
        scene = Scene("kitchen", torch.empty(0), "resting")
        if message is None:
            check_renderable(height, width)
            assert len(Views.of_scenes([scene], sizes=[(height, width)])) == 1
        else:
            with pytest.raises(ValueError, match=rf"^got an image of {width} x {height}, {message}"):
                check_renderable(height, width)
            with pytest.raises(ValueError, match=rf"^scene kitchen: got an image of {width} x {height}, {message}"):
                Views.of_scenes([scene], sizes=[(height, width)])


@pytest.mark.parametrize("shape", [(MAX_SIDE, MAX_SIDE // MAX_ASPECT), (1, MAX_ASPECT), (MAX_ASPECT, 1)])
def test_the_most_extreme_images_are_rendered(shape: tuple[int, int]) -> None:
    """No table or index is out of range: colours stay in [0, 1], and a grey image stays grey."""
    height, width = shape
    mask = rle.encode(torch.ones(shape, dtype=torch.bool))
    whole = SceneObject("line", (0, 0, width, height), mask)
    scene = Scene("a", torch.full((*shape, 3), 128, dtype=torch.uint8), None, [whole, whole], [Relation(0, "on", 1)])
    for object_view, relation_view in (("masked", "focused"), ("crop", "box")):
        views = Views.of_scenes([scene], object_view=object_view, relation_view=relation_view)
        pixels = render_views([scene.image], views, size=32, mean=[0] * 3, std=[1] * 3)
        assert pixels.min() >= 0 and pixels.max() <= 1
        assert (pixels[0] == 128 / 255).all(), "the global view"


extreme = st.one_of(
    st.floats(-3, 70), st.sampled_from([math.inf, -math.inf, math.nan, 1e300, -1e300, 2.0**31, -(2.0**31)])
)


@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    boxes=st.lists(st.tuples(extreme, extreme, extreme, extreme), max_size=3),
    object_view=st.sampled_from(["masked", "crop"]),
    train=st.booleans(),
)
@settings(deadline=None, max_examples=300)
def test_planned_views_can_be_rendered(
    size: tuple[int, int], boxes: list[tuple[float, float, float, float]], object_view: str, train: bool
) -> None:
    """The loader replaces a scene that cannot be planned; an error in rendering would end the run."""
    image = torch.zeros(*size, 3, dtype=torch.uint8)
    scene = Scene("a", image, None, [SceneObject("thing", box) for box in boxes])
    try:
        views = Views.of_scenes([scene], object_view=object_view, train=train)
    except ValueError:
        return
    assert render_views([image], views, size=8).isfinite().all()
