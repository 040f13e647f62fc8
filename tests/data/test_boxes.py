"""Boxes in another convention are recognised, by masks or by the size of the image."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scenarioclip_fast.data import Scene, SceneObject, ShardSet, pack, rle
from scenarioclip_fast.data import boxes as conventions
from scenarioclip_fast.data.boxes import Box, to_corners
from scenarioclip_fast.data.check import SceneChecker
from scenarioclip_fast.data.synthetic import write_published_layout
from scenarioclip_fast.errors import UserError

H, W = 120, 160


def scenes(convert: Callable[[Box], Box], masks: bool = True, size: tuple[int, int] = (H, W)) -> list[Scene]:
    """Six scenes of two objects, whose boxes are up to three pixels loose."""
    height, width = size
    found = []
    for i in range(6):
        rng = np.random.default_rng(i)
        objects = []
        for k in range(2):
            x, y = (int(v) for v in rng.integers(5, (width // 2, height // 2)))
            w, h = (int(v) for v in rng.integers(20, (width // 2 - 3, height // 2 - 3)))
            mask = torch.zeros(height, width, dtype=torch.bool)
            mask[y : y + h, x : x + w] = True
            low, high = rng.uniform(0, 3, 2), rng.uniform(0, 3, 2)
            box = (x - low[0], y - low[1], x + w + high[0], y + h + high[1])
            objects.append(SceneObject(f"thing {k}", convert(box), mask if masks else None))
        found.append(Scene(f"s{i}", torch.zeros(height, width, 3, dtype=torch.uint8), "resting", objects))
    return found


def xywh(box: Box) -> Box:
    return box[0], box[1], box[2] - box[0], box[3] - box[1]


def fractions(box: Box) -> Box:
    return box[0] / W, box[1] / H, box[2] / W, box[3] / H


def centred(box: Box) -> Box:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, box[2] - box[0], box[3] - box[1]


CONVENTIONS: dict[str, tuple[Callable[[Box], Box], str]] = {
    "xywh": (xywh, "boxes fit their masks as x, y, width, height, . as x1, y1, x2, y2 in pixels: pass --boxes xywh;"),
    "normalised": (fractions, "12 of 12 boxes fit their masks as x1, y1, x2, y2 as fractions.*pass --boxes normalised"),
    "xywh in fractions": (lambda b: fractions(xywh(b)), "as x, y, width, height as fractions.*: convert them to x1"),
    "centre": (centred, "as centre, width and height, . as x1, y1, x2, y2 in pixels: convert them"),
    "centre in fractions": (lambda b: fractions(centred(b)), "as centre, width and height as fractions.*: convert"),
    "y first": (lambda b: (b[1], b[0], b[3], b[2]), "as y1, x1, y2, x2, . as x1, y1, x2, y2 in pixels: convert them"),
    "of a resized image": (
        lambda b: (b[0] * 448 / W, b[1] * 448 / H, b[2] * 448 / W, b[3] * 448 / H),
        "if they belong to images resized to about 4[45][0-9] x 4[45][0-9] pixels, 0 as they are: scale them",
    ),
}


@pytest.mark.parametrize("name", CONVENTIONS)
def test_recognised_by_masks(name: str, tmp_path: Path) -> None:
    convert, message = CONVENTIONS[name]
    with pytest.raises(UserError, match=message):
        pack(scenes(convert), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    report = pack(scenes(convert), tmp_path / "out", boxes="xyxy", allow_empty_level=True, progress=False)
    assert report.splits["train"]["scenes"] > 0, "packed as they are, on request"


@pytest.mark.parametrize("side", [max, min])
def test_resized_to_a_side(side: Any, tmp_path: Path) -> None:
    """Portraits and landscapes, whose longer or shorter side became 512."""
    both = []
    for size in ((120, 160), (200, 150), (100, 170)):
        scale = 512 / side(size)
        both += scenes(lambda b, s=scale: tuple(v * s for v in b), size=size)  # type: ignore[misc]
    for i, scene in enumerate(both):
        scene.key = f"s{i}"
    which = "longer" if side is max else "shorter"
    with pytest.raises(UserError, match=f"resized to a {which} side of about 51[0-9] pixels"):
        pack(both, tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    ("name", "message"), [("xywh", "pass --boxes xywh"), ("normalised", "pass --boxes normalised")]
)
def test_recognised_without_masks(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        pack(scenes(CONVENTIONS[name][0], masks=False), tmp_path / "out", progress=False)


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("name", ["xyxy", "xywh", "normalised"])
def test_declared(name: Any, masks: bool, tmp_path: Path) -> None:
    convert = {"xyxy": lambda box: box, "xywh": xywh, "normalised": fractions}[name]
    for boxes in (None, "xyxy") if name == "xyxy" else (name,):
        out = tmp_path / str(boxes)
        report = pack(scenes(convert, masks), out, boxes=boxes, val=0, test=0, progress=False)
        assert report.rejected == {} and report.warnings == []
        shards = ShardSet(out)
        for i, scene in enumerate(scenes(lambda box: box, masks)):
            for entry, expected in zip(shards.read(i).objects, scene.objects, strict=True):
                assert entry.box == pytest.approx(expected.box, abs=1e-9)


def test_wrongly_declared(tmp_path: Path) -> None:
    """Boxes that leave the image are reported with the declaration."""
    for boxes in ("xywh", "normalised"):
        report = pack(scenes(lambda box: box), tmp_path / boxes, boxes=boxes, allow_empty_level=True, progress=False)  # type: ignore[arg-type]
        (cause,) = (cause for cause in report.causes if cause.reason == "box_outside")
        assert cause.explanation == f"the boxes were read as --boxes {boxes} says: is it right?"
        assert any(cause.explanation in warning for warning in report.warnings)


def test_few_or_loose_boxes_are_not_judged(tmp_path: Path) -> None:
    """Boxes much larger than their masks, as of occluded objects, and a handful of odd ones."""
    loose = scenes(lambda box: (0.0, 0.0, W - 1.0, H - 1.0))
    pack(loose, tmp_path / "loose", progress=False)
    middle = scenes(lambda box: box)
    for item in (item for scene in middle for item in scene.objects):
        item.box, item.mask = (0.0, 0.0, W, H), torch.zeros(H, W, dtype=torch.bool)
        item.mask[H // 5 : H - H // 5, W // 5 : W - W // 5] = True
    pack(middle, tmp_path / "middle", progress=False)
    few = [replace(scene, objects=scene.objects[:1]) for scene in scenes(xywh)]
    pack(few, tmp_path / "few", allow_empty_level=True, progress=False)
    mostly = [*scenes(lambda box: box), *(replace(s, key=f"odd{s.key}") for s in scenes(xywh)[:2])]
    pack(mostly, tmp_path / "mostly", progress=False)


@pytest.mark.parametrize("value", [1e9, 1e200, 1.7e308, float("inf"), float("nan"), 5e-324])
def test_absurd_boxes_are_rejected_without_warnings(
    value: float, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    odd = [replace(s, key=f"odd{s.key}") for s in scenes(lambda box: (*box[:2], value, value))]
    report = pack([*scenes(lambda box: box), *odd], tmp_path / "out", progress=False)
    assert report.rejected == {"box_outside": 12} and not recwarn.list


def test_boxes_that_miss_their_masks(tmp_path: Path) -> None:
    """In no known convention, they are packed with a warning."""
    rng = np.random.default_rng(0)
    anywhere = [(x, y, x + 12.0, y + 9.0) for x, y in rng.uniform(0, (W - 12, H - 9), (12, 2)).tolist()]
    found = iter(anywhere)
    report = pack(scenes(lambda _: next(found)), tmp_path / "out", progress=False)
    assert report.warnings == ["12 of 12 boxes do not contain half of their masks: check the boxes, and --boxes"]
    loose = scenes(lambda box: (0.0, 0.0, W - 1.0, H - 1.0))
    assert pack(loose, tmp_path / "loose", progress=False).warnings == []


def test_an_early_error_writes_nothing(tmp_path: Path) -> None:
    read = 0

    def many() -> Any:
        nonlocal read
        for i in range(10_000):
            read += 1
            yield replace(scenes(fractions)[i % 6], key=f"s{i}")

    with pytest.raises(UserError, match="pass --boxes normalised"):
        pack(many(), tmp_path / "out", progress=False)
    assert read < 300 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shard_size", [1, 4, 1000])
def test_repeating_the_command_does_not_pack(shard_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run judges the boxes of the finished shards, too; it ends only if the boxes are declared."""
    write_published_layout(scenes(xywh), tmp_path / "set")
    for workers in (1, 2, 1):
        with pytest.raises(UserError, match=r"boxes fit their masks as x, y, width, height, . as .*--boxes xywh"):
            pack(tmp_path / "set", tmp_path / "out", shard_size=shard_size, workers=workers, progress=False)
    assert not (tmp_path / "out").exists()
    images: list[bytes] = []
    check = SceneChecker.image_size
    monkeypatch.setattr(SceneChecker, "image_size", lambda self, *image: images.append(image[0]) or check(self, *image))
    as_they_are = pack(
        tmp_path / "set", tmp_path / "out", shard_size=shard_size, boxes="xyxy", allow_empty_level=True, progress=False
    )
    assert sum(split["scenes"] for split in as_they_are.splits.values()) == 6 and images == [], "resumed"
    pack(tmp_path / "set", tmp_path / "out", shard_size=shard_size, boxes="xywh", progress=False)
    assert len(images) == 6, "packed from the start"


def test_only_the_first_scenes_are_judged_and_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a large data set: whatever the number of processes, and without a cost for each later scene."""
    monkeypatch.setattr(conventions, "_SCENES", 20)
    verdicts = []
    judge = conventions.BoxTally.verdict
    monkeypatch.setattr(conventions.BoxTally, "verdict", lambda tally: verdicts.append(judge(tally)))
    many = [replace(scenes(xywh if i >= 20 else lambda box: box)[i % 6], key=f"s{i:02d}") for i in range(60)]
    write_published_layout(many, tmp_path / "set")
    for workers in (1, 2):
        pack(tmp_path / "set", tmp_path / "out", workers=workers, val=0, test=0, force=True, progress=False)
    assert verdicts == [None] * 4, "after the first scenes and at the end"


def test_evidence_is_limited_per_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers receive a new copy with every chunk of scenes."""
    monkeypatch.setattr(conventions, "_SCENES", 5)
    evidence, (scene, *_) = conventions.BoxEvidence(), scenes(xywh)
    rows = [pickle.loads(pickle.dumps(evidence)).of(scene.objects, (H, W)) for _ in range(8)]
    assert [None if found is None else found.shape for found in rows] == [(2, conventions.COLUMNS)] * 5 + [None] * 3


def test_to_corners() -> None:
    assert to_corners((1, 2, 3, 4), "xyxy", (100, 200)) == (1, 2, 3, 4)
    assert to_corners((1, 2, 3, 4), "xywh", (100, 200)) == (1, 2, 4, 6)
    assert to_corners((0.1, 0.2, 0.5, 1.0), "normalised", (100, 200)) == (20, 20, 100, 100)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (7, 5), (40, 33)])
def test_bounds_of_masks(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for density in (0.0, 0.01, 0.1, 0.5, 1.0):
        for _ in range(20):
            mask = rng.random(size) < density
            rows, columns = np.nonzero(mask)
            expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else None
            for form in (mask, torch.from_numpy(mask), rle.encode(mask)):
                assert rle.bounds(form, size) == expected
    with pytest.raises(ValueError, match="got a mask of 3 x 2, expected"):
        rle.bounds(np.zeros((2, 3), bool), (3, 2))
