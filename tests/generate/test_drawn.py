"""The detector and the segmenter of drawn scenes."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from scenarioclip_fast.data import Scene, generate_scenes, rle
from scenarioclip_fast.data.boxes import box_overlap
from scenarioclip_fast.data.synthetic import COLOURS, KINDS
from scenarioclip_fast.generate.config import GroundConfig, SegmentConfig
from scenarioclip_fast.generate.drawn.detector import DrawnDetector, parse_name
from scenarioclip_fast.generate.drawn.parts import candidates, find_parts
from scenarioclip_fast.generate.drawn.scores import mask_overlap
from scenarioclip_fast.generate.drawn.segmenter import DrawnSegmenter
from scenarioclip_fast.generate.drawn.shapes import _COVERED, _GRID
from scenarioclip_fast.generate.ground.boxes import Box
from scenarioclip_fast.generate.ground.stage import Detector
from scenarioclip_fast.generate.segment.stage import Segmenter

simplejpeg = pytest.importorskip("simplejpeg")
pytest.importorskip("scipy")

SCENES, SEED = 150, 900
THRESHOLD = 0.2  # of the demo


def as_jpeg(image: Tensor) -> Tensor:
    data = simplejpeg.encode_jpeg(image.numpy(), quality=90, colorspace="RGB", colorsubsampling="444")
    return torch.from_numpy(simplejpeg.decode_jpeg(data))


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return list(generate_scenes(SCENES, SEED))


@pytest.fixture(scope="module")
def images(scenes: list[Scene]) -> list[Tensor]:
    return [as_jpeg(scene.image) for scene in scenes]  # type: ignore[arg-type]


def absent_names(scene: Scene, rng: random.Random) -> list[str]:
    """Two names of colours that are in the scene, whose objects are not."""
    present = {one.name for one in scene.objects}
    colours = sorted({name.split()[0] for name in present})
    return rng.sample([f"{c} {k}" for c, k in itertools.product(colours, KINDS) if f"{c} {k}" not in present], 2)


@pytest.fixture(scope="module")
def found(scenes: list[Scene], images: list[Tensor]) -> list[dict[str, Box]]:
    """Boxes by name, asked for together with two absent objects."""
    rng = random.Random(0)
    names = [[*(one.name for one in scene.objects), *absent_names(scene, rng)] for scene in scenes]
    boxes = detector().detect(images, names)
    for one, wanted in zip(boxes, names, strict=True):
        assert len({box.name for box in one}) == len(one) and {box.name for box in one} <= set(wanted)
    return [{box.name: box for box in one} for one in boxes]


def detector() -> Detector:
    return DrawnDetector(GroundConfig(), torch.device("cpu"))


def segmenter() -> Segmenter:
    return DrawnSegmenter(SegmentConfig(), torch.device("cpu"))


def fraction(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def test_objects_are_found(scenes: list[Scene], found: list[dict[str, Box]]) -> None:
    right, absent = [], []
    for scene, boxes in zip(scenes, found, strict=True):
        names = {one.name for one in scene.objects}
        for one in scene.objects:
            box = boxes.get(one.name)
            right.append(box is not None and box.score >= THRESHOLD and box_overlap(box.box, one.box) >= 0.5)
        absent += [box.score >= THRESHOLD for name, box in boxes.items() if name not in names]
    # Of 3,000 objects of other seeds, 97 % were found. Objects of one colour that touch, and covered trees and apples,
    # are confused with others.
    assert fraction(right) >= 0.95
    # 1.5 % of absent objects, of a colour that occurs, had a score of at least .2.
    assert sum(absent) <= 0.03 * 2 * len(scenes)


def test_masks_fit_true_boxes(scenes: list[Scene], images: list[Tensor]) -> None:
    masks = segmenter().segment(images, [[list(one.box) for one in scene.objects] for scene in scenes])
    overlaps, errors = [], []
    for scene, one in zip(scenes, masks, strict=True):
        for object_, (mask, score) in zip(scene.objects, one, strict=True):
            assert mask is not None and mask["size"] == list(scene.image.shape[:2])  # type: ignore[union-attr]
            overlaps.append(mask_overlap(mask, rle.encode(object_.mask)))  # type: ignore[arg-type]
            errors.append(abs(score - overlaps[-1]))
    # Measured on other seeds: .93 in the mean, 99 % above .75. Thin outlines and strings go to a neighbour.
    assert sum(overlaps) / len(overlaps) >= 0.91
    assert fraction([overlap >= 0.75 for overlap in overlaps]) >= 0.97
    assert sum(errors) / len(errors) < 0.1  # the predicted IoU is that of boxes


def test_results_do_not_depend_on_other_images(images: list[Tensor], scenes: list[Scene]) -> None:
    names = [[one.name for one in scene.objects] for scene in scenes[:6]]
    together = detector().detect(images[:6], names)
    assert together == [detector().detect([image], [name])[0] for image, name in zip(images, names, strict=False)]
    boxes = [[list(box.box) for box in one] for one in together]
    masks = segmenter().segment(images[:6], boxes)
    assert masks == [segmenter().segment([image], [box])[0] for image, box in zip(images, boxes, strict=False)]


def test_sums_of_scores_are_exact() -> None:
    """In float32 up to 2^24 / 8, so that the scores do not depend on the order of the sums, hence on threads."""
    assert (8 * _COVERED).is_integer() and _GRID**2 < 2**24 / 8


def test_plain_pictures_have_no_parts() -> None:
    grey = torch.full((90, 120, 3), 160, dtype=torch.uint8)
    tiny = torch.zeros((1, 1, 3), dtype=torch.uint8)
    white = torch.full((40, 40, 3), 255, dtype=torch.uint8)
    for image in (grey, tiny, white):
        assert find_parts(image) == []
        assert detector().detect([image], [["red ball"]]) == [[]]
        assert segmenter().segment([image], [[[0.0, 0.0, 1.0, 1.0]]]) == [[(None, 0.0)]]


def test_the_whole_picture_may_be_one_part() -> None:
    red = torch.tensor(COLOURS["red"], dtype=torch.uint8).expand(40, 50, 3)
    (part,) = find_parts(red)
    assert (part.colour, part.box, part.area) == ("red", (0, 0, 50, 40), 2000)
    assert part.in_image(40, 50).all()
    ((mask, score),) = segmenter().segment([red], [[[0.0, 0.0, 50.0, 40.0]]])[0]
    assert score == 1.0 and mask == rle.encode(torch.ones(40, 50, dtype=torch.bool))


def test_a_mask_stays_in_its_box() -> None:
    red = torch.tensor(COLOURS["red"], dtype=torch.uint8).expand(40, 50, 3)
    ((mask, score),) = segmenter().segment([red], [[[5.0, 10.0, 25.0, 30.0]]])[0]
    assert rle.bounds(mask, (40, 50)) == [5, 10, 25, 30] and score == pytest.approx(400 / 2000)
    assert segmenter().segment([red], [[]]) == [[]]


def test_two_pieces_may_be_one_object() -> None:
    """A green bar in front divides a blue square."""
    image = torch.full((60, 60, 3), 170, dtype=torch.uint8)
    image[10:50, 10:50] = torch.tensor(COLOURS["blue"], dtype=torch.uint8)
    image[5:55, 26:34] = torch.tensor(COLOURS["green"], dtype=torch.uint8)
    parts = find_parts(image)
    assert [part.colour for part in parts] == ["blue", "blue", "green"]
    whole = [part for part in candidates(parts) if part.box == (10, 10, 50, 50)]
    assert len(candidates(parts)) == 4 and len(whole) == 1 and whole[0].area == parts[0].area + parts[1].area
    ((mask, score),) = segmenter().segment([image], [[[10.0, 10.0, 50.0, 50.0]]])[0]
    assert score == 1.0 and rle.area(mask) == whole[0].area  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("red ball", ("red", "ball")),
        ("the small Red balls", ("red", "ball")),
        ("pink boxes", ("pink", "box")),
        ("a kite (yellow)", ("yellow", "kite")),
        ("ball", None),
        ("red", None),
        ("red piano", None),
        ("red and blue ball", None),
        ("red ball on a box", None),
        ("", None),
    ],
)
def test_names(name: str, expected: tuple[str, str] | None) -> None:
    assert parse_name(name) == expected


def test_speed(images: list[Tensor], scenes: list[Scene]) -> None:
    """At least 150 images/s of one core on an idle machine; CPU time, and half of that, since caches are shared."""
    names = [[one.name for one in scene.objects] for scene in scenes]
    boxes = [[list(one.box) for one in scene.objects] for scene in scenes]
    for run in (lambda: detector().detect(images, names), lambda: segmenter().segment(images, boxes)):
        run()
        start = time.process_time()
        run()
        assert time.process_time() - start < SCENES / 75
