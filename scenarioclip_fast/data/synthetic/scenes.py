"""Render synthetic scenes, each a pure function of the seed and its index."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scenarioclip_fast.data.scene import Relation, Scene, SceneObject, check_fractions
from scenarioclip_fast.data.synthetic.drawings import COLOURS, KINDS, RGB, SUPERSAMPLING, Pen
from scenarioclip_fast.data.synthetic.events import (
    ACTIONS,
    COLOUR_PAIRS,
    HELD_OUT,
    RELATED,
    TEMPLATES,
    Event,
    Place,
    Template,
)
from scenarioclip_fast.requirements import require

# Kinds of unrelated objects, added at random so that they do not correlate with an action.
BYSTANDERS = ("boat", "cactus", "fish", "lamp", "umbrella", "flower", "mushroom", "cup")
HELD_OUT_FRACTION = 0.25  # fraction of the relations of val and test scenes

Box = tuple[float, float, float, float]


class Item(NamedTuple):
    """An object to draw: the kind and colour that form its name, and its unit box in source pixels."""

    kind: str
    colour: str
    box: Box


def split_of(index: int, val: float = 0.05, test: float = 0.15) -> str:
    """The split of scene `index`. The fractions hold for any number of scenes, independent of their content."""
    u = (index * 0.6180339887498949) % 1.0
    return "test" if u < test else "val" if u < test + val else "train"


def generate_scenes(n: int, seed: int = 0, *, start: int = 0, val: float = 0.05, test: float = 0.15) -> Iterator[Scene]:
    """Generate synthetic scenes `start` to `start + n - 1`.

    Args:
        n: number of scenes, at least 0.
        seed: at least 0. Scene `index` depends only on (seed, index, split).
        val, test: fractions of scenes in these splits. Only these contain the relations in `HELD_OUT`.

    Yields:
        Scenes whose image is uint8 [H, W, 3], with bool masks of the visible part of each object, the bounding boxes of
        these masks, and a split.
    """
    if n < 0 or seed < 0 or start < 0:
        raise ValueError(f"got n={n}, seed={seed}, start={start}, expected values >= 0")
    check_fractions(val, test)
    for index in range(start, start + n):
        yield render_scene(seed, index, split_of(index, val, test))


def render_scene(seed: int, index: int, split: str = "train") -> Scene:
    """Render scene `index` of `seed`; the split "train" avoids the relations in `HELD_OUT`."""
    rng = np.random.default_rng([seed, index])
    height = int(rng.integers(120, 193))
    width = round(height * rng.uniform(1.0, 1.34))
    if rng.random() < 0.1:
        width, height = height, width
    action = str(rng.choice(list(ACTIONS)))
    canvas = _Canvas(rng, height, width)
    relations: list[tuple[int, str, int]] = []
    if ACTIONS[action]:
        layouts = ACTIONS[action][rng.integers(len(ACTIONS[action]))]
        event = layouts[rng.integers(len(layouts))]
        items = _event_items(rng, event, height, width, held_out=split != "train")
        relations = list(event.relations)
        canvas.draw(items, event.layers)
        bystanders = _scatter(rng, items, int(rng.integers(0, 3)), (0.20, 0.28), height, width, BYSTANDERS)
    else:
        items = []
        bystanders = _scatter(rng, items, int(rng.integers(2, 5)), (0.36, 0.48), height, width, tuple(KINDS))
    canvas.draw(bystanders, [(i, "whole") for i in range(len(bystanders))])
    image, masks = canvas.render()
    return _scene(rng, f"{seed:04d}{index:06d}", image, masks, action, items + bystanders, relations, split)


def vocabulary() -> dict[str, list[str]]:
    """Every text that a synthetic scene can contain, in the form of classes.json."""
    relations = [f"{s} {t.subject} {t.predicate} {o} {t.object}" for t in TEMPLATES for s, o in COLOUR_PAIRS]
    objects = [f"{colour} {kind}" for colour in COLOURS for kind in KINDS]
    return {"actions": sorted(ACTIONS), "objects": sorted(objects), "relations": sorted(relations)}


def _event_items(rng: np.random.Generator, event: Event, height: int, width: int, *, held_out: bool) -> list[Item]:
    colours = _event_colours(rng, event, held_out)
    # The event stays inside the centre crop, the only part that relation views show.
    side = min(height, width)
    sx, sy = side * rng.uniform(0.88, 0.98, 2)
    left = (width - side) / 2 + rng.uniform(0, side - sx)
    top = (height - side) / 2 + rng.uniform(0, side - sy)
    items = []
    for place, colour in zip(event.places, colours, strict=True):
        x0, y0, x1, y1 = _unit_box(place, rng.uniform(-0.012, 0.012))
        items.append(Item(place.kind, colour, (left + sx * x0, top + sy * y0, left + sx * x1, top + sy * y1)))
    return items


def _unit_box(place: Place, shift: float) -> Box:
    half = place.height * KINDS[place.kind][1] / 2
    return place.x + shift - half, place.foot - place.height, place.x + shift + half, place.foot


def _event_colours(rng: np.random.Generator, event: Event, held_out: bool) -> list[str]:
    """Choose a colour per place. With `held_out`, relations may be held-out ones; otherwise all are training ones."""
    main, *joined = event.relations
    pairs = _pairs(event.template(main), held_out and rng.random() < HELD_OUT_FRACTION)
    colours = list(pairs[rng.integers(len(pairs))])
    for subject, predicate, anchor in joined:
        template = event.template((subject, predicate, anchor))
        use_held_out = held_out and rng.random() < HELD_OUT_FRACTION
        candidates = [s for s, o in _pairs(template, use_held_out) if o == colours[anchor]]
        candidates = candidates or [s for s, o in _pairs(template, False) if o == colours[anchor]]
        colours.append(candidates[rng.integers(len(candidates))])
    return colours


@cache
def _pairs(template: Template, held_out: bool) -> tuple[tuple[str, str], ...]:
    return tuple(pair for pair in COLOUR_PAIRS if ((template, *pair) in HELD_OUT) == held_out)


def _scatter(
    rng: np.random.Generator,
    items: list[Item],
    n: int,
    heights: tuple[float, float],
    height: int,
    width: int,
    kinds: tuple[str, ...],
) -> list[Item]:
    """Place up to `n` more objects that do not overlap others and whose kinds are not related to others."""
    placed = list(items)
    for _ in range(n):
        for _ in range(12):
            kind = kinds[rng.integers(len(kinds))]
            if any(item.kind == kind or frozenset((item.kind, kind)) in RELATED for item in placed):
                continue
            h = min(height, width) * rng.uniform(*heights)
            w = h * KINDS[kind][1]
            # Wide objects get the area of a square object of this height.
            h, w = h / max(1.0, KINDS[kind][1]) ** 0.5, w / max(1.0, KINDS[kind][1]) ** 0.5
            if w > width - 4 or h > height - 4:
                continue
            x, y = rng.uniform(2, width - 2 - w), rng.uniform(2, height - 2 - h)
            if all(x > b[2] + 2 or x + w < b[0] - 2 or y > b[3] + 2 or y + h < b[1] - 2 for _, _, b in placed):
                colour = str(rng.choice(list(COLOURS)))
                placed.append(Item(kind, colour, (x, y, x + w, y + h)))
                break
    return placed[len(items) :]


def _scene(
    rng: np.random.Generator,
    key: str,
    image: Tensor,
    masks: Tensor,  # bool [n, H, W]
    action: str,
    items: list[Item],
    relations: list[tuple[int, str, int]],
    split: str,
) -> Scene:
    """Build a scene with objects and relations in random order, since the order in the event reveals their roles."""
    order = rng.permutation(len(items))
    position = {int(i): k for k, i in enumerate(order)}
    objects = [SceneObject(f"{items[i].colour} {items[i].kind}", _bounds(masks[i]), masks[i]) for i in order]
    relations = [relations[k] for k in rng.permutation(len(relations))]
    return Scene(key, image, action, objects, [Relation(position[s], p, position[o]) for s, p, o in relations], split)


def _bounds(mask: Tensor) -> Box:
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


class _Canvas:
    """A supersampled picture, and the object number of each pixel."""

    def __init__(self, rng: np.random.Generator, height: int, width: int) -> None:
        self._rng, self._size, self._count = rng, (height, width), 0
        image_draw, image = require("PIL.ImageDraw"), require("PIL.Image")
        self._picture = _background(rng, height * SUPERSAMPLING, width * SUPERSAMPLING)
        self._numbers = image.new("L", self._picture.size)
        self._draws = image_draw.Draw(self._picture), image_draw.Draw(self._numbers)

    def draw(self, items: list[Item], layers: Any) -> None:
        """Draw (item, part) layers from back to front."""
        tints = [_tint(self._rng, COLOURS[item.colour]) for item in items]
        for i, part in layers:
            draw, _ = KINDS[items[i].kind]
            x0, y0, x1, y1 = (SUPERSAMPLING * v for v in items[i].box)
            draw(Pen(*self._draws, (x0, y0, x1, y1), tints[i], self._count + i + 1), part)
        self._count += len(items)

    def render(self) -> tuple[Tensor, Tensor]:
        """Downsample; return the image, uint8 [H, W, 3], and the visible masks of the objects, bool [n, H, W]."""
        height, width = self._size
        image = np.asarray(self._picture.reduce(SUPERSAMPLING), np.int16)
        y, x = self._rng.integers(0, 512 - height), self._rng.integers(0, 512 - width)
        image = np.clip(image + _grain()[y : y + height, x : x + width, None], 0, 255).astype(np.uint8)
        numbers = np.asarray(self._numbers)[1::SUPERSAMPLING, 1::SUPERSAMPLING]
        masks = numbers[None] == np.arange(1, self._count + 1, dtype=np.uint8)[:, None, None]
        return torch.from_numpy(image), torch.from_numpy(masks)


@lru_cache(maxsize=1)
def _grain() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 3.0, (512, 512)).round().astype(np.int16)


def _tint(rng: np.random.Generator, rgb: RGB) -> RGB:
    shade = rng.uniform(0.92, 1.05)
    return tuple(int(np.clip(c * shade + rng.uniform(-8, 8), 0, 255)) for c in rgb)  # type: ignore[return-value]


def _background(rng: np.random.Generator, height: int, width: int) -> Any:
    """A cloudy, nearly grey background with a faint pattern: stripes, tiles, dots or none."""
    image_draw, image = require("PIL.ImageDraw"), require("PIL.Image")
    base = rng.uniform(120, 215) + rng.uniform(-14, 14, 3)
    clouds = base + rng.normal(0, 9, (6, 8, 1)) + rng.normal(0, 3, (6, 8, 3))
    picture = image.fromarray(np.clip(clouds, 0, 255).astype(np.uint8), "RGB").resize((width, height), image.BILINEAR)
    pattern = image.new("L", (width, height))
    draw = image_draw.Draw(pattern)
    step, strength = int(rng.integers(14, 48)), int(rng.integers(10, 42))
    kind = rng.integers(4)
    if kind == 0:
        slope = rng.uniform(-1, 1) * height
        for x in range(-height, width + height, step):
            draw.line([(x, 0), (x + slope, height)], fill=strength, width=max(2, step // 3))
    elif kind == 1:
        for y in range(0, height, step):
            draw.line([(0, y), (width, y)], fill=strength, width=3)
        for x in range(0, width, step):
            draw.line([(x, 0), (x, height)], fill=strength, width=3)
    elif kind == 2:
        for y in range(0, height, step):
            for x in range(0, width, step):
                draw.ellipse((x, y, x + step // 3, y + step // 3), fill=strength)
    ink = image.new("RGB", (width, height), (0, 0, 0) if rng.random() < 0.5 else (255, 255, 255))
    return image.composite(ink, picture, pattern)
