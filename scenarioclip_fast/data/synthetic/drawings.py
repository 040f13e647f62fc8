"""Drawings of each kind of object: flat shapes with dark outlines, in a unit box with y pointing down.

The arguments of a drawing function are a `Pen` and the name of a part: "whole", or a pose or layer of the kind ("back"
and "front" of a container). Shapes are drawn twice, as colour and as the object's number, so the final map of numbers
gives the exact visible mask of each object.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Point = tuple[float, float]
RGB = tuple[int, int, int]

SUPERSAMPLING = 2

COLOURS: dict[str, RGB] = {
    "blue": (40, 90, 225),
    "green": (40, 165, 60),
    "pink": (245, 120, 200),
    "red": (215, 30, 30),
    "yellow": (250, 215, 30),
}

# Colours of details, the same for every object; the object's colour covers most of its area.
_FIXED: dict[str, RGB] = {
    "black": (35, 35, 40),
    "white": (245, 245, 245),
    "grey": (150, 150, 155),
    "skin": (235, 190, 155),
    "wood": (120, 80, 50),
    "glass": (200, 220, 230),
}


def _mix(a: RGB, b: RGB, weight: float) -> RGB:
    return tuple(round(x + (y - x) * weight) for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


class Pen:
    """Draws in the unit box of one object, on the canvas and on the map of object numbers.

    Args:
        colour: `ImageDraw` of the supersampled RGB canvas.
        number: `ImageDraw` of the supersampled map of object numbers.
        box: x0, y0, x1, y1 of the unit box, in canvas pixels.
        rgb: the object's colour.
        index: the object's number.
    """

    def __init__(self, colour: Any, number: Any, box: tuple[float, float, float, float], rgb: RGB, index: int) -> None:
        self._draws, self._box, self._index = (colour, number), box, index
        self._line = max(2, round(0.02 * max(box[2] - box[0], box[3] - box[1])))
        self._outline = _mix(rgb, (0, 0, 0), 0.72)
        self._palette = {
            **_FIXED,
            "own": rgb,
            "dark": _mix(rgb, (0, 0, 0), 0.35),
            "light": _mix(rgb, (255, 255, 255), 0.45),
        }

    def _points(self, points: Sequence[Point]) -> list[Point]:
        x0, y0, x1, y1 = self._box
        return [(x0 + x * (x1 - x0), y0 + y * (y1 - y0)) for x, y in points]

    def _inks(self, fill: str) -> tuple[tuple[Any, RGB | int, RGB | int], ...]:
        colour, number = self._draws
        return (colour, self._palette[fill], self._outline), (number, self._index, self._index)

    def poly(self, points: Sequence[Point], fill: str = "own") -> None:
        corners = self._points(points)
        for draw, ink, outline in self._inks(fill):
            draw.polygon(corners, fill=ink)
            draw.line([*corners, *corners[:2]], fill=outline, width=self._line, joint="curve")

    def oval(self, x0: float, y0: float, x1: float, y1: float, fill: str = "own") -> None:
        (left, top), (right, bottom) = self._points([(x0, y0), (x1, y1)])
        for draw, ink, outline in self._inks(fill):
            draw.ellipse((left, top, right, bottom), fill=ink, outline=outline, width=self._line)

    def disc(self, x: float, y: float, radius: float, fill: str = "own") -> None:
        """Draw a circle, even if the box is not square; `radius` is a fraction of the box height."""
        x0, y0, x1, y1 = self._box
        rx = radius * (y1 - y0) / (x1 - x0)
        self.oval(x - rx, y - radius, x + rx, y + radius, fill)

    def rect(self, x0: float, y0: float, x1: float, y1: float, fill: str = "own") -> None:
        self.poly([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], fill)

    def pie(self, x0: float, y0: float, x1: float, y1: float, start: float, end: float, fill: str = "own") -> None:
        (left, top), (right, bottom) = self._points([(x0, y0), (x1, y1)])
        for draw, ink, outline in self._inks(fill):
            draw.pieslice((left, top, right, bottom), start, end, fill=ink, outline=outline, width=self._line)

    def stroke(self, points: Sequence[Point], width: float, fill: str = "own") -> None:
        """Draw an outlined line; `width` is a fraction of the box height."""
        path = self._points(points)
        thick = max(2, round(width * (self._box[3] - self._box[1])))
        for draw, ink, outline in self._inks(fill):
            for colour, w in ((outline, thick + 2 * self._line), (ink, thick)):
                draw.line(path, fill=colour, width=w, joint="curve")
                for x, y in (path[0], path[-1]):
                    draw.ellipse((x - w / 2, y - w / 2, x + w / 2, y + w / 2), fill=colour)

    def wire(self, points: Sequence[Point], fill: str = "black") -> None:
        """Draw a thin line: strings, whiskers, seams."""
        path = self._points(points)
        for draw, ink, _ in self._inks(fill):
            draw.line(path, fill=ink, width=self._line, joint="curve")


def person(p: Pen, part: str) -> None:
    if part == "ride":  # seated, the near leg in front of the mount
        p.stroke([(0.42, 0.55), (0.72, 0.70), (0.62, 0.93)], 0.13, "dark")
        p.poly([(0.22, 0.26), (0.66, 0.26), (0.66, 0.64), (0.22, 0.64)])
        p.stroke([(0.48, 0.34), (0.88, 0.48)], 0.11)
    else:
        p.poly([(0.24, 0.58), (0.76, 0.58), (0.80, 1), (0.56, 1), (0.5, 0.74), (0.44, 1), (0.2, 1)], "dark")
        p.poly([(0.2, 0.25), (0.8, 0.25), (0.78, 0.64), (0.22, 0.64)])
        p.stroke([(0.2, 0.31), (0.08, 0.58)], 0.10)
        p.stroke([(0.8, 0.31), (0.94, 0.16)] if part == "reach" else [(0.8, 0.31), (0.92, 0.58)], 0.10)
    p.disc(0.5, 0.125, 0.115, "skin")
    p.pie(0.24, 0.0, 0.76, 0.24, 180, 360, "wood")


def horse(p: Pen, part: str) -> None:
    p.stroke([(0.12, 0.42), (0.03, 0.70)], 0.08, "dark")
    for x in (0.20, 0.32, 0.58, 0.70):
        p.rect(x - 0.04, 0.55, x + 0.04, 1)
    p.oval(0.10, 0.34, 0.78, 0.72)
    p.poly(
        [
            (0.58, 0.46),
            (0.74, 0.08),
            (0.80, 0.0),
            (0.84, 0.07),
            (1.0, 0.22),
            (0.97, 0.30),
            (0.84, 0.27),
            (0.77, 0.58),
        ]
    )
    p.poly([(0.56, 0.40), (0.70, 0.08), (0.76, 0.05), (0.66, 0.44)], "dark")
    p.disc(0.85, 0.15, 0.025, "black")


def motorbike(p: Pen, part: str) -> None:
    for x in (0.20, 0.80):
        p.disc(x, 0.70, 0.28, "black")
        p.disc(x, 0.70, 0.12, "grey")
    p.stroke([(0.80, 0.68), (0.66, 0.14), (0.56, 0.10)], 0.07, "grey")
    p.poly([(0.06, 0.26), (0.36, 0.32), (0.48, 0.22), (0.70, 0.24), (0.66, 0.62), (0.36, 0.76), (0.26, 0.50)])
    p.disc(0.72, 0.28, 0.09, "white")


def balloon(p: Pen, part: str) -> None:
    p.wire([(0.5, 0.6), (0.44, 0.75), (0.54, 0.88), (0.5, 1)])
    p.poly([(0.5, 0.56), (0.40, 0.66), (0.60, 0.66)], "dark")
    p.oval(0, 0, 1, 0.62)
    p.oval(0.2, 0.09, 0.42, 0.24, "light")


def kite(p: Pen, part: str) -> None:
    p.wire([(0.60, 0.38), (0.0, 1.0)])
    p.poly([(0.62, 0.0), (1.0, 0.30), (0.54, 0.72), (0.20, 0.22)])
    p.poly([(0.62, 0.0), (0.57, 0.28), (0.20, 0.22)], "light")
    p.poly([(1.0, 0.30), (0.54, 0.72), (0.57, 0.28)], "dark")
    p.wire([(0.54, 0.72), (0.66, 0.82), (0.60, 0.90), (0.74, 1.0)])
    p.poly([(0.60, 0.80), (0.72, 0.76), (0.70, 0.88)])
    p.poly([(0.58, 0.90), (0.70, 0.92), (0.64, 1.0)])


def robot(p: Pen, part: str) -> None:
    p.stroke([(0.5, 0.10), (0.5, 0.03)], 0.03, "grey")
    p.disc(0.5, 0.04, 0.035, "dark")
    for x in (0.06, 0.80):
        p.rect(x, 0.42, x + 0.14, 0.74, "dark")
    for x in (0.28, 0.54):
        p.rect(x, 0.78, x + 0.18, 1, "dark")
    p.rect(0.2, 0.38, 0.8, 0.80)
    p.rect(0.24, 0.10, 0.76, 0.36)
    for x in (0.38, 0.62):
        p.disc(x, 0.20, 0.05, "white")
    p.rect(0.36, 0.28, 0.64, 0.32, "black")
    p.rect(0.34, 0.48, 0.66, 0.64, "glass")


def car(p: Pen, part: str) -> None:
    p.poly([(0.16, 0.46), (0.30, 0.04), (0.68, 0.04), (0.84, 0.46)])
    p.poly([(0.25, 0.42), (0.34, 0.13), (0.47, 0.13), (0.47, 0.42)], "glass")
    p.poly([(0.53, 0.42), (0.53, 0.13), (0.65, 0.13), (0.75, 0.42)], "glass")
    p.poly([(0.0, 0.46), (0.06, 0.42), (0.94, 0.44), (1.0, 0.52), (1.0, 0.80), (0.0, 0.80)])
    for x in (0.22, 0.78):
        p.disc(x, 0.78, 0.22, "black")
        p.disc(x, 0.78, 0.09, "grey")


def truck(p: Pen, part: str) -> None:
    p.rect(0.0, 0.0, 0.64, 0.82)
    for x in (0.16, 0.32, 0.48):
        p.wire([(x, 0.04), (x, 0.78)], "dark")
    p.poly([(0.67, 0.22), (0.86, 0.22), (1.0, 0.52), (1.0, 0.82), (0.67, 0.82)], "dark")
    p.poly([(0.72, 0.30), (0.84, 0.30), (0.93, 0.50), (0.72, 0.50)], "glass")
    for x in (0.14, 0.36, 0.82):
        p.disc(x, 0.86, 0.14, "black")
        p.disc(x, 0.86, 0.05, "grey")


def house(p: Pen, part: str) -> None:
    p.rect(0.70, 0.08, 0.80, 0.36, "dark")
    p.rect(0.08, 0.42, 0.92, 1)
    p.poly([(0.0, 0.44), (0.5, 0.0), (1.0, 0.44)], "dark")
    p.rect(0.18, 0.52, 0.40, 0.72, "glass")
    p.rect(0.60, 0.52, 0.82, 0.72, "glass")
    p.rect(0.42, 0.66, 0.58, 1, "wood")


def tree(p: Pen, part: str) -> None:
    p.rect(0.42, 0.55, 0.58, 1, "wood")
    p.oval(0.0, 0.26, 0.56, 0.70)
    p.oval(0.44, 0.26, 1.0, 0.70)
    p.oval(0.16, 0.0, 0.84, 0.56)
    p.oval(0.25, 0.34, 0.75, 0.70)


def bird(p: Pen, part: str) -> None:
    p.poly([(0.30, 0.52), (0.0, 0.30), (0.04, 0.62)], "dark")
    p.wire([(0.46, 0.82), (0.46, 1.0)])
    p.wire([(0.58, 0.82), (0.58, 1.0)])
    p.poly([(0.88, 0.20), (1.0, 0.30), (0.88, 0.38)], "black")
    p.oval(0.18, 0.30, 0.82, 0.90)
    p.disc(0.74, 0.27, 0.24)
    p.poly([(0.30, 0.44), (0.66, 0.50), (0.40, 0.78)], "dark")
    p.disc(0.80, 0.22, 0.05, "white")
    p.disc(0.81, 0.22, 0.025, "black")


def cat(p: Pen, part: str) -> None:
    p.stroke([(0.76, 0.90), (0.92, 0.80), (0.90, 0.56)], 0.07)
    p.oval(0.20, 0.42, 0.80, 1.0)
    p.poly([(0.16, 0.30), (0.16, 0.0), (0.40, 0.14)])
    p.poly([(0.84, 0.30), (0.84, 0.0), (0.60, 0.14)])
    p.oval(0.10, 0.08, 0.90, 0.56)
    for x in (0.33, 0.67):
        p.oval(x - 0.08, 0.21, x + 0.08, 0.33, "white")
        p.oval(x - 0.03, 0.22, x + 0.03, 0.32, "black")
    p.poly([(0.44, 0.37), (0.56, 0.37), (0.5, 0.44)], "black")
    for y in (0.38, 0.46):
        p.wire([(0.36, 0.42), (0.06, y)])
        p.wire([(0.64, 0.42), (0.94, y)])


def dog(p: Pen, part: str) -> None:
    p.stroke([(0.10, 0.42), (0.03, 0.16)], 0.09)
    for x in (0.14, 0.28, 0.54, 0.68):
        p.rect(x - 0.05, 0.60, x + 0.05, 1)
    p.poly([(0.06, 0.38), (0.70, 0.36), (0.74, 0.74), (0.06, 0.74)])
    p.oval(0.54, 0.06, 0.90, 0.52)
    p.poly([(0.80, 0.26), (1.0, 0.30), (1.0, 0.46), (0.80, 0.50)], "light")
    p.oval(0.93, 0.26, 1.0, 0.36, "black")
    p.oval(0.52, 0.10, 0.67, 0.54, "dark")
    p.disc(0.77, 0.22, 0.035, "black")


def table(p: Pen, part: str) -> None:
    p.rect(0.06, 0.12, 0.17, 1)
    p.rect(0.83, 0.12, 0.94, 1)
    p.rect(0.0, 0.0, 1.0, 0.18)


def chair(p: Pen, part: str) -> None:
    for x in (0.06, 0.82):
        p.rect(x, 0.52, x + 0.12, 1)
    p.rect(0.06, 0.0, 0.18, 0.56)
    p.rect(0.82, 0.0, 0.94, 0.56)
    for y in (0.03, 0.24):
        p.rect(0.10, y, 0.90, y + 0.13)
    p.rect(0.0, 0.52, 1.0, 0.66)


def box(p: Pen, part: str) -> None:
    if part != "front":
        p.poly([(0.14, 0.20), (0.20, 0.04), (0.80, 0.04), (0.86, 0.20), (0.86, 0.36), (0.14, 0.36)], "dark")
    if part != "back":
        p.rect(0.10, 0.30, 0.90, 1)
        p.poly([(0.10, 0.30), (0.0, 0.50), (0.10, 0.56)], "light")
        p.poly([(0.90, 0.30), (1.0, 0.50), (0.90, 0.56)], "light")
        p.rect(0.43, 0.30, 0.57, 1, "light")


def basket(p: Pen, part: str) -> None:
    if part != "front":
        p.stroke([(0.10, 0.46), (0.14, 0.20), (0.32, 0.05), (0.68, 0.05), (0.86, 0.20), (0.90, 0.46)], 0.06, "dark")
        p.oval(0.02, 0.36, 0.98, 0.62, "dark")
    if part != "back":
        p.poly([(0.02, 0.50), (0.98, 0.50), (0.84, 1), (0.16, 1)])
        for x in (0.2, 0.4, 0.6, 0.8):
            p.wire([(x, 0.50), (0.5 + (x - 0.5) * 0.7, 0.99)], "dark")
        for y in (0.67, 0.83):
            p.wire([(0.08, y), (0.92, y)], "dark")
        p.rect(0.0, 0.46, 1.0, 0.56)


def ball(p: Pen, part: str) -> None:
    p.oval(0, 0, 1, 1)
    p.oval(0.30, 0.0, 0.70, 1.0, "white")
    p.oval(0.42, 0.0, 0.58, 1.0)
    p.oval(0.42, 0.0, 0.58, 0.12, "dark")


_APPLE = ((0.5, 0.24), (0.72, 0.17), (0.96, 0.32), (1.0, 0.55), (0.86, 0.88), (0.66, 1.0), (0.5, 0.94))


def apple(p: Pen, part: str) -> None:
    p.stroke([(0.5, 0.24), (0.56, 0.05)], 0.06, "wood")
    p.poly([(0.56, 0.15), (0.74, 0.0), (0.92, 0.06), (0.76, 0.20)], "dark")
    p.poly([*_APPLE, *((1 - x, y) for x, y in reversed(_APPLE))])
    p.oval(0.16, 0.34, 0.34, 0.56, "light")


def cup(p: Pen, part: str) -> None:
    p.stroke([(0.66, 0.26), (0.93, 0.30), (0.91, 0.62), (0.64, 0.74)], 0.10)
    p.poly([(0.0, 0.10), (0.72, 0.10), (0.66, 1.0), (0.06, 1.0)])
    p.oval(0.0, 0.0, 0.72, 0.22, "white")
    p.oval(0.08, 0.04, 0.64, 0.18, "wood")


def flower(p: Pen, part: str) -> None:
    p.stroke([(0.5, 0.45), (0.5, 0.97)], 0.05, "grey")
    p.poly([(0.5, 0.86), (0.16, 0.66), (0.30, 0.88)], "grey")
    p.poly([(0.5, 0.86), (0.84, 0.66), (0.70, 0.88)], "grey")
    for x, y in ((0.5, 0.14), (0.82, 0.24), (0.72, 0.48), (0.28, 0.48), (0.18, 0.24)):
        p.disc(x, y, 0.135)
    p.disc(0.5, 0.31, 0.11, "wood")


def mushroom(p: Pen, part: str) -> None:
    p.poly([(0.36, 0.48), (0.64, 0.48), (0.70, 1.0), (0.30, 1.0)], "white")
    p.pie(0, 0, 1, 1.08, 180, 360)
    for x, y, r in ((0.5, 0.17, 0.09), (0.24, 0.36, 0.08), (0.76, 0.36, 0.08)):
        p.disc(x, y, r, "white")


def cactus(p: Pen, part: str) -> None:
    p.stroke([(0.5, 0.56), (0.16, 0.54), (0.16, 0.30)], 0.12)
    p.stroke([(0.5, 0.44), (0.84, 0.42), (0.84, 0.18)], 0.12)
    p.stroke([(0.5, 0.12), (0.5, 0.74)], 0.20)
    p.wire([(0.45, 0.10), (0.45, 0.72)], "dark")
    p.wire([(0.56, 0.10), (0.56, 0.72)], "dark")
    p.poly([(0.22, 0.74), (0.78, 0.74), (0.70, 1.0), (0.30, 1.0)], "wood")


def umbrella(p: Pen, part: str) -> None:
    p.stroke([(0.5, 0.08), (0.5, 0.90), (0.56, 0.96), (0.64, 0.94), (0.66, 0.86)], 0.03, "black")
    p.pie(0, 0.06, 1, 0.98, 180, 360)
    p.poly([(0.34, 0.52), (0.42, 0.16), (0.5, 0.07), (0.58, 0.16), (0.66, 0.52)], "light")
    p.poly([(0.0, 0.52), (0.16, 0.45), (0.33, 0.52)], "dark")
    p.poly([(0.67, 0.52), (0.84, 0.45), (1.0, 0.52)], "dark")


def boat(p: Pen, part: str) -> None:
    p.stroke([(0.5, 0.04), (0.5, 0.74)], 0.03, "wood")
    p.poly([(0.54, 0.06), (0.92, 0.62), (0.54, 0.62)], "white")
    p.poly([(0.46, 0.14), (0.46, 0.62), (0.16, 0.62)], "white")
    p.poly([(0.0, 0.70), (1.0, 0.70), (0.82, 1.0), (0.18, 1.0)])


def fish(p: Pen, part: str) -> None:
    p.poly([(0.28, 0.5), (0.0, 0.08), (0.06, 0.5), (0.0, 0.92)], "dark")
    p.poly([(0.40, 0.24), (0.58, 0.0), (0.74, 0.22)], "dark")
    p.oval(0.20, 0.10, 1.0, 0.94)
    p.poly([(0.46, 0.48), (0.34, 0.74), (0.58, 0.66)], "dark")
    p.disc(0.80, 0.40, 0.10, "white")
    p.disc(0.82, 0.40, 0.05, "black")


def lamp(p: Pen, part: str) -> None:
    p.stroke([(0.5, 0.4), (0.5, 0.9)], 0.05, "black")
    p.oval(0.22, 0.88, 0.78, 1.0, "black")
    p.poly([(0.30, 0.0), (0.70, 0.0), (1.0, 0.46), (0.0, 0.46)])
    p.poly([(0.12, 0.36), (0.88, 0.36), (0.96, 0.46), (0.04, 0.46)], "light")


# kind -> (drawing function, aspect ratio: width / height)
KINDS: dict[str, tuple[Callable[[Pen, str], None], float]] = {
    "apple": (apple, 0.95),
    "ball": (ball, 1.0),
    "balloon": (balloon, 0.55),
    "basket": (basket, 1.15),
    "bird": (bird, 1.1),
    "boat": (boat, 1.0),
    "box": (box, 1.15),
    "cactus": (cactus, 0.75),
    "car": (car, 1.9),
    "cat": (cat, 0.75),
    "chair": (chair, 0.75),
    "cup": (cup, 1.0),
    "dog": (dog, 1.25),
    "fish": (fish, 1.4),
    "flower": (flower, 0.62),
    "horse": (horse, 1.2),
    "house": (house, 1.05),
    "kite": (kite, 0.9),
    "lamp": (lamp, 0.6),
    "motorbike": (motorbike, 1.5),
    "mushroom": (mushroom, 0.95),
    "person": (person, 0.45),
    "robot": (robot, 0.6),
    "table": (table, 1.4),
    "tree": (tree, 0.85),
    "truck": (truck, 1.6),
    "umbrella": (umbrella, 0.95),
}
