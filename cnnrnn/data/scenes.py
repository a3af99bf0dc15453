"""Small synthetic pictures whose labels depend on one another, written as a COCO dataset.

A scene is made in two steps. `draw_labels` picks the labels from the tables below, so the
dependencies are known exactly; `draw_scene` then draws those labels and nothing else. Four
drawings stand for two labels each (a red post is a buoy on the sea and a mailbox by a road), so
only the context tells which, and what is faint is often given away only by what it occurs with.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Colour = tuple[float, float, float]  # red, green, blue, 0..255
Shape = tuple[float, ...]  # 4 numbers: an oval's centre and radii; more: a polygon's corners
Strokes = tuple[tuple[str, Shape], ...]  # (name in PALETTE, shape), bottom layer first
Box = tuple[int, int, int, int]  # x, y, width, height in pixels

SCENE_LABELS: tuple[str, ...] = (
    *("sky", "night", "sea", "beach", "road", "field", "snow"),
    *("cloud", "sun", "moon", "star", "plane"),
    *("car", "truck", "traffic light", "mailbox"),
    *("barn", "tractor", "tree", "sheep"),
    *("boat", "sailboat", "gull", "buoy", "umbrella", "skier"),
)

# At most one kind of ground shows, but a beach always borders the sea.
GROUNDS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("road",), 0.30),
    (("field",), 0.27),
    (("sea",), 0.20),
    (("beach", "sea"), 0.08),
    (("snow",), 0.09),
    ((), 0.06),
)


class Rule(NamedTuple):
    """The chance of a label where all of `needs` and none of `bans` are in the picture."""

    label: str
    chance: float
    needs: tuple[str, ...] = ()
    bans: tuple[str, ...] = ()


# Read from top to bottom: the first row of a label that applies decides, and without one it is
# absent. A scene with neither ground nor sky is blank fog, which has no label.
RULES: tuple[Rule, ...] = (
    Rule("sky", 0.73, ("road",)),
    Rule("sky", 0.75, ("field",)),
    Rule("sky", 0.73, ("sea",)),
    Rule("sky", 0.73, ("snow",)),
    Rule("sky", 0.91),
    Rule("night", 0.25, ("sky",), ("beach",)),
    Rule("night", 0.12, ("road",)),
    Rule("cloud", 0.15, ("sky", "night")),
    Rule("cloud", 0.45, ("sky",)),
    Rule("sun", 0.15, ("sky", "cloud"), ("night",)),
    Rule("sun", 0.65, ("sky",), ("night",)),
    Rule("moon", 0.50, ("sky", "night")),
    Rule("star", 0.10, ("moon",), ("cloud",)),
    Rule("star", 0.90, ("sky", "night"), ("cloud",)),
    Rule("plane", 0.05, ("sun",), ("cloud",)),
    Rule("plane", 0.50, ("sky",), ("night", "cloud")),
    Rule("car", 0.75, ("road",)),
    Rule("truck", 0.10, ("car",)),
    Rule("truck", 0.75, ("road",)),
    Rule("traffic light", 0.35, ("car",), ("truck",)),
    Rule("barn", 0.15, ("field",)),
    Rule("tractor", 0.20, ("barn",), ("night",)),
    Rule("tractor", 0.005, ("field",), ("night",)),
    Rule("skier", 0.55, ("snow",), ("night",)),
    Rule("tree", 0.85, ("skier",)),
    Rule("tree", 0.10, ("snow",)),
    Rule("tree", 0.30, ("road",), ("traffic light",)),
    Rule("tree", 0.55, ("field",)),
    Rule("mailbox", 0.75, ("road", "tree")),
    Rule("mailbox", 0.06, ("road",), ("traffic light",)),
    Rule("sheep", 0.75, ("field", "tree"), ("tractor",)),
    Rule("sheep", 0.10, ("field",), ("tractor",)),
    Rule("boat", 0.20, ("beach",)),
    Rule("boat", 0.60, ("sea",)),
    Rule("sailboat", 0.50, ("boat",), ("night",)),
    Rule("gull", 0.85, ("boat",)),
    Rule("gull", 0.05, ("sea",)),
    Rule("buoy", 0.65, ("sea",), ("boat",)),
    Rule("umbrella", 0.95, ("beach", "sun")),
    Rule("umbrella", 0.10, ("beach",)),
)

IS_ALSO = {"sailboat": "boat"}  # what the drawing of a label also is

PALETTE: dict[str, Colour] = {
    **{"black": (25, 25, 28), "grey": (105, 105, 108), "white": (238, 238, 235)},
    **{"glass": (150, 190, 210), "wood": (95, 70, 45), "roof": (85, 75, 75), "canvas": (222, 214, 196)},
    **{"red": (205, 45, 40), "brick": (140, 50, 40), "green": (60, 130, 50), "hub": (225, 190, 50)},
    **{"leaf": (40, 92, 50), "leaf2": (46, 104, 56), "skin": (225, 180, 150), "navy": (40, 45, 70)},
    **{"glow": (255, 250, 225), "red lamp": (240, 50, 40), "amber": (75, 55, 15), "go": (15, 60, 30)},
}
GLOWING = {"glow", "red lamp"}  # as bright by night as by day
PAINTS: tuple[Colour, ...] = (  # one of them is "paint" in a drawing
    *((190, 45, 40), (45, 80, 165), (215, 215, 210), (225, 180, 50), (50, 120, 80), (70, 70, 78)),
)


def _rect(x0: float, y0: float, x1: float, y1: float) -> Shape:
    return x0, y0, x1, y0, x1, y1, x0, y1


def _wheel(x: float, radius: float, hub: str = "grey") -> Strokes:
    return ("black", (x, radius, radius, radius)), (hub, (x, radius, radius * 0.4, radius * 0.4))


# Drawings stand on their foot at (0, 0), y up, in units of 1/64 of the picture's side at scale 1.
DISC: Strokes = (("glow", (0, 3, 3, 3)),)
SPARK: Strokes = (
    ("glow", (-1.1, 0.8, 0, 0.4, 1.1, 0.8, 0, 1.2)),
    ("glow", (0, 0, 0.4, 0.8, 0, 1.6, -0.4, 0.8)),
)
POST: Strokes = (("wood", _rect(-0.4, 0, 0.4, 2.2)), ("red", (0, 2.4, 1.1, 1.0)))
PAIR: Strokes = (
    *(("white", (-1.7, 0.9, 1.2, 0.85)), ("grey", (-0.6, 1.4, 0.5, 0.5))),
    *(("white", (1.5, 1.4, 1.2, 0.85)), ("grey", (2.6, 1.9, 0.5, 0.5))),
)
CLOUD: Strokes = (
    *(("white", (-4, 2, 4, 2)), ("white", (4, 2, 4, 1.8))),
    *(("white", (0, 3, 4, 3)), ("white", (-1, 1.6, 6, 1.6))),
)
CAR: Strokes = (
    ("paint", (-6, 1, 6, 1, 6, 2.8, 4, 3.4, -5.6, 3.4, -6, 2.8)),
    ("paint", (-4, 3.3, -2.6, 5.4, 1.4, 5.4, 3.2, 3.3)),
    ("glass", (-3.2, 3.4, -2.2, 4.9, -0.8, 4.9, -0.8, 3.4)),
    ("glass", (-0.2, 3.4, -0.2, 4.9, 1.1, 4.9, 2.3, 3.4)),
    ("glow", (5.5, 2.4, 0.5, 0.5)),
    *(*_wheel(-3.6, 1.3), *_wheel(3.6, 1.3)),
)
TRUCK: Strokes = (
    *(("paint", _rect(-8, 1.4, 3.4, 7.6)), ("black", _rect(-8, 0.9, 8, 1.6))),
    ("white", (3.8, 1.2, 8, 1.2, 8, 3.6, 6.8, 6, 3.8, 6)),
    ("glass", (5, 3.7, 7.4, 3.7, 6.5, 5.4, 5, 5.4)),
    ("glow", (7.6, 2.4, 0.5, 0.5)),
    *(*_wheel(-6, 1.4), *_wheel(-3, 1.4), *_wheel(5.6, 1.4)),
)
TRAFFIC_LIGHT: Strokes = (
    *(("grey", _rect(-0.35, 0, 0.35, 7)), ("black", _rect(-1.3, 6, 1.3, 12))),
    *(("go", (0, 7.1, 0.8, 0.8)), ("amber", (0, 9, 0.8, 0.8)), ("red lamp", (0, 10.9, 0.8, 0.8))),
)
TREE: Strokes = (
    *(("wood", _rect(-0.7, 0, 0.7, 3)), ("leaf", (-4, 2, 4, 2, 0, 7))),
    *(("leaf2", (-3.2, 5, 3.2, 5, 0, 10)), ("leaf", (-2.4, 8, 2.4, 8, 0, 13))),
)
BARN: Strokes = (
    *(("brick", _rect(-6, 0, 6, 6)), ("roof", (-6.8, 6, -4.6, 9, 0, 10.6, 4.6, 9, 6.8, 6))),
    *(("white", _rect(-2, 0, 2, 4.4)), ("brick", _rect(-1.5, 0, 1.5, 3.9))),
    ("white", _rect(-0.8, 6.6, 0.8, 8)),
)
TRACTOR: Strokes = (
    *(("green", _rect(-1, 2, 5, 4)), ("green", _rect(-3.4, 2, 0, 7))),
    *(("glass", _rect(-2.8, 4.4, -0.5, 6.5)), ("black", _rect(3.2, 4, 3.8, 6.2))),
    *(*_wheel(-2.4, 2.4, "hub"), *_wheel(3.9, 1.4, "hub")),
)
HULL: Strokes = (
    *(("paint", (-6, 2.4, -4.6, 0, 4.4, 0, 6.4, 2.4)), ("white", _rect(-5.8, 1.9, 6, 2.4))),
)
BOAT: Strokes = (
    *(("white", _rect(-3, 2, 1.6, 5)), ("navy", _rect(-2.4, 3.2, 1, 4.3))),
    *(("paint", _rect(-1.6, 5, -0.4, 6.6)), *HULL),
)
SAILBOAT: Strokes = (
    *(*HULL, ("wood", _rect(-0.2, 2, 0.2, 13))),
    *(("white", (0.5, 3, 5.4, 3, 0.5, 12.6)), ("canvas", (-0.5, 3, -4, 3, -0.5, 10.6))),
)
UMBRELLA: Strokes = (
    ("wood", _rect(-0.25, 0, 0.25, 5)),
    ("paint", (-4.6, 4, -4, 5.8, -2.3, 7.1, 0, 7.6, 2.3, 7.1, 4, 5.8, 4.6, 4)),
    *(("white", (-3, 4, -1, 4, 0, 7.6, -2.3, 7.1)), ("white", (3, 4, 1, 4, 0, 7.6, 2.3, 7.1))),
)
SKIER: Strokes = (
    ("black", (-3.4, 0.7, -3.4, 1.2, 3.4, 0.5, 3.4, 0)),
    ("navy", (-1.2, 0.8, 0.2, 0.6, 1.2, 2, 0, 3.4, -1.2, 3)),
    *(("paint", (-1.2, 2.8, 0.4, 3.2, 1.4, 5.6, 0, 6)), ("paint", (0.6, 5, 3, 3.9, 3.2, 4.4, 1, 5.7))),
    *(("black", (2.9, 4.4, 3.2, 4.4, 1.4, 0, 1.1, 0)), ("skin", (1.2, 6.6, 0.9, 0.9))),
)


class Thing(NamedTuple):
    """How a label is drawn, where it stands and how many there may be."""

    strokes: Strokes
    zone: str  # "sky", the "back" or "front" of the ground, or "ground" for both
    most: int = 1

    def extent(self) -> tuple[float, float]:
        """Half the width, and the height, in grid units at scale 1."""
        ovals = [shape for _, shape in self.strokes if len(shape) == 4]
        polygons = [shape for _, shape in self.strokes if len(shape) > 4]
        xs = [abs(s[0]) + s[2] for s in ovals] + [abs(x) for s in polygons for x in s[::2]]
        return max(xs), max([s[1] + s[3] for s in ovals] + [y for s in polygons for y in s[1::2]])


THINGS: dict[str, Thing] = {
    **{"cloud": Thing(CLOUD, "sky", 3), "sun": Thing(DISC, "sky"), "moon": Thing(DISC, "sky")},
    **{"star": Thing(SPARK, "sky"), "plane": Thing(SPARK, "sky")},
    **{"barn": Thing(BARN, "ground"), "tractor": Thing(TRACTOR, "ground")},
    **{"tree": Thing(TREE, "back", 3), "traffic light": Thing(TRAFFIC_LIGHT, "back")},
    **{"car": Thing(CAR, "front", 3), "truck": Thing(TRUCK, "front", 2)},
    **{"boat": Thing(BOAT, "back", 2), "sailboat": Thing(SAILBOAT, "back", 2)},
    **{"umbrella": Thing(UMBRELLA, "front", 2), "skier": Thing(SKIER, "ground", 2)},
    **{"sheep": Thing(PAIR, "ground", 2), "gull": Thing(PAIR, "back", 2)},
    **{"mailbox": Thing(POST, "back"), "buoy": Thing(POST, "back")},
}
EXTENTS = {label: thing.extent() for label, thing in THINGS.items()}

# Label and colour of the back and of the front of each ground; behind a road is a bare verge.
STRIPS: dict[str, tuple[tuple[str, Colour], tuple[str, Colour]]] = {
    "road": (("", (152, 136, 120)), ("road", (98, 98, 102))),
    "beach": (("sea", (52, 104, 140)), ("beach", (214, 190, 142))),
    "field": (("field", (98, 136, 62)), ("field", (104, 142, 68))),
    "sea": (("sea", (52, 104, 140)), ("sea", (50, 100, 136))),
    "snow": (("snow", (222, 228, 236)), ("snow", (226, 230, 236))),
}
FOG: Colour = (165, 168, 170)
GRID = 64.0  # layouts are made on a 64 x 64 grid, whatever the picture's size
OVERSAMPLING = 3


@dataclass(frozen=True)
class Scene:
    """A drawn picture and what is in it.

    Attributes:
        image: RGB picture, image_size x image_size.
        boxes: (index into `SCENE_LABELS`, (x, y, width, height) in pixels); several boxes may share
            a label, and a context such as sky has the box of the region that shows it.
    """

    image: Image.Image
    boxes: list[tuple[int, Box]]


class _Canvas:
    """Two images drawn in step: the colours, and which thing owns each pixel (0 is nobody).

    The owners give exact boxes and tell how much of a thing still shows.
    """

    def __init__(self, image_size: int) -> None:
        side = image_size * OVERSAMPLING
        self.unit = side / GRID
        self.colours, self.owners = Image.new("RGB", (side, side)), Image.new("L", (side, side))
        self._pens = ImageDraw.Draw(self.colours), ImageDraw.Draw(self.owners)

    def fill(self, shape: Sequence[float], colour: NDArray[np.float64], owner: int) -> None:
        """Fill a shape, given in grid units with y down."""
        points = [value * self.unit for value in shape]
        red, green, blue = (int(c) for c in np.clip(colour, 0, 255))
        inks: tuple[Any, Any] = (red, green, blue), owner
        for pen, ink in zip(self._pens, inks, strict=True):
            if len(points) == 4:
                x, y, rx, ry = points
                pen.ellipse((x - rx, y - ry, x + rx, y + ry), fill=ink)
            else:
                pen.polygon(points, fill=ink)

    def count(self, owner: int) -> int:
        """Number of pixels that `owner` shows."""
        return int(np.count_nonzero(np.asarray(self.owners) == owner))


class _Placed(NamedTuple):
    label: str
    x: float
    foot: float
    scale: float


def draw_labels(rng: np.random.Generator) -> frozenset[str]:
    """Draw the labels of one scene from `GROUNDS` and `RULES`.

    Args:
        rng: Source of randomness; it is advanced.

    Returns:
        A set of names from `SCENE_LABELS`, in rare cases empty.
    """
    ground = rng.choice(len(GROUNDS), p=[share for _, share in GROUNDS])
    labels = set(GROUNDS[ground][0])
    decided: set[str] = set()
    for rule in RULES:
        if (
            rule.label not in decided
            and labels.issuperset(rule.needs)
            and labels.isdisjoint(rule.bans)
        ):
            decided.add(rule.label)
            if rng.random() < rule.chance:
                labels.add(rule.label)
    return frozenset(labels)


def draw_scene(rng: np.random.Generator, image_size: int = 64) -> Scene:
    """Draw one scene: its labels first, then a picture that shows exactly those.

    Args:
        rng: Source of randomness; it is advanced.
        image_size: Side of the square picture in pixels, 32..512.

    Returns:
        The picture and its boxes, all inside the picture and at least 1 x 1 pixel.

    Raises:
        ValueError: `image_size` is out of range.
    """
    if not 32 <= image_size <= 512:
        raise ValueError(f"image_size must be in 32..512, got {image_size}")
    labels = draw_labels(rng)
    while True:
        scene = _compose(labels, rng, image_size)
        if scene is not None:
            return scene


def _compose(labels: frozenset[str], rng: np.random.Generator, image_size: int) -> Scene | None:
    """Try one layout of `labels`; None if a thing found no room or is mostly hidden."""
    ground = next((name for name in STRIPS if name in labels), None)
    horizon = 0.0 if "sky" not in labels else rng.uniform(18, 36) if ground else GRID
    edge = horizon + (GRID - horizon) * rng.uniform(0.35, 0.6)
    zones = {"sky": (0.0, horizon), "back": (horizon, edge), "front": (edge, GRID)}
    zones["ground"] = horizon, GRID
    placed = _place(labels, zones, rng)
    if placed is None:
        return None

    light = (0.5 + 0.6 * np.sqrt(rng.random())) * rng.normal(1.0, 0.04, 3)
    if "night" in labels:
        light = rng.uniform(0.26, 0.55) * np.array([0.85, 0.92, 1.15])
    canvas = _Canvas(image_size)
    owners: list[str] = []
    tints = _draw_backdrop(canvas, ground, zones, light, owners, rng)
    drawn = [canvas.count(i + 1) // 4 for i in range(len(owners))]
    for label, x, foot, scale in placed:
        owners.append(label)
        zone = "sky" if foot <= horizon else "back" if foot <= edge else "front"
        paint, fade = PAINTS[rng.integers(len(PAINTS))], rng.uniform(0.0, 0.5)
        for name, shape in THINGS[label].strokes:
            colour = np.array(paint if name == "paint" else PALETTE[name])
            ink = (1 - fade) * colour * (1 if name in GLOWING else light) + fade * tints[zone]
            moved = scale * np.array(shape) * np.resize([1, -1], len(shape))
            moved[:2] += x, foot
            if len(shape) == 4:
                moved[3] *= -1
            else:
                moved[2:] += np.resize([x, foot], len(shape) - 2)
            canvas.fill(moved.tolist(), ink, len(owners))
        drawn.append(canvas.count(len(owners)))

    boxes: list[tuple[int, Box]] = []
    for i, label in enumerate(owners):
        if canvas.count(i + 1) < max(0.5 * drawn[i], OVERSAMPLING**2):
            return None
        box = _box(np.asarray(canvas.owners) == i + 1)
        names = (label, IS_ALSO[label]) if label in IS_ALSO else (label,)
        boxes += [(SCENE_LABELS.index(name), box) for name in names]
    if "night" in labels:
        boxes.append((SCENE_LABELS.index("night"), (0, 0, image_size, image_size)))
    return Scene(_develop(canvas, light, rng), boxes)


def _place(
    labels: frozenset[str], zones: dict[str, tuple[float, float]], rng: np.random.Generator
) -> list[_Placed] | None:
    """Find room for every label, farthest thing first; None where one finds none."""
    placed: list[_Placed] = []
    taken = np.empty((0, 4))  # left, top, right, bottom of what is placed
    also = {IS_ALSO[label] for label in labels if label in IS_ALSO}
    for label, thing in THINGS.items():
        if label not in labels or (label in also and rng.random() < 0.75):
            continue
        (top, bottom), (half, height) = zones[thing.zone], EXTENTS[label]
        wanted = len(placed) + 1 + int(rng.integers(thing.most))
        before = len(placed)
        for _ in range(30):
            foot = rng.uniform(top, bottom - 0.5)
            near = 0.3 if thing.zone == "sky" else (foot - zones["sky"][1]) / GRID
            scale = (0.75 + 0.7 * near) * rng.uniform(0.65, 1.15)
            x = rng.uniform(0.6 * half * scale, GRID - 0.6 * half * scale)
            box = np.array([x - half * scale, foot - height * scale, x + half * scale, foot])
            common = np.minimum(box[2:], taken[:, 2:]) - np.maximum(box[:2], taken[:, :2])
            areas = np.prod(taken[:, 2:] - taken[:, :2], axis=1)
            limit = 0.3 * np.minimum(areas, np.prod(box[2:] - box[:2]))
            if box[1] >= 0.5 and np.all(np.prod(common.clip(0), axis=1) <= limit):
                placed.append(_Placed(label, x, foot, scale))
                taken = np.vstack([taken, box])
                if len(placed) == wanted:
                    break
        if len(placed) == before:
            return None
    return sorted(placed, key=lambda it: (THINGS[it.label].zone != "sky", it.foot))


def _draw_backdrop(
    canvas: _Canvas,
    ground: str | None,
    zones: dict[str, tuple[float, float]],
    light: NDArray[np.float64],
    owners: list[str],
    rng: np.random.Generator,
) -> dict[str, NDArray[np.float64]]:
    """Fill the picture with sky and ground, append their labels to `owners`, return their inks."""
    blue = rng.random()
    sky: Colour = (150 - 60 * blue, 165 - 20 * blue, 175 + 35 * blue)
    back, front = STRIPS[ground] if ground else (("", FOG), ("", FOG))
    jitter = rng.normal(0, 7, 3)
    inks: dict[str, NDArray[np.float64]] = {}
    for zone, (label, colour) in (("sky", ("sky", sky)), ("back", back), ("front", front)):
        top, bottom = zones[zone]
        inks[zone] = (np.array(colour) + jitter) * light
        if bottom <= top:
            continue
        if label and label not in owners:
            owners.append(label)
        owner = owners.index(label) + 1 if label else 0
        for i, y in enumerate(np.linspace(top, bottom, 6)[:-1]):
            slope = 4 if zone == "sky" else 2 if zone == "front" else 0
            canvas.fill(_rect(0, y, GRID, bottom), inks[zone] + i * slope * light, owner)
        if zone == "sky" or ground is None:
            continue
        # Waves, furrows, ruts or drifts: short strokes a little lighter or darker than the ground.
        low, high = (0, top + 1, 2, -24), (GRID, bottom - 1, 9, 24)
        for x, y, length, shade in rng.uniform(low, high, (10, 4)):
            canvas.fill(_rect(x, y, x + length, y + 0.6), inks[zone] + shade * light, owner)
        if label == "road":
            y = 0.55 * top + 0.45 * bottom
            for x in np.arange(rng.uniform(-6, 0), GRID, 11):
                canvas.fill(_rect(x, y, x + 6, y + 1), 200 * light, owner)
    return inks


def _box(shown: NDArray[np.bool_]) -> Box:
    """Smallest box of whole pixels around the part that shows, on the grid of the final picture."""
    columns, rows = np.flatnonzero(shown.any(axis=0)), np.flatnonzero(shown.any(axis=1))
    x0, y0 = int(columns[0]) // OVERSAMPLING, int(rows[0]) // OVERSAMPLING
    x1, y1 = int(columns[-1]) // OVERSAMPLING, int(rows[-1]) // OVERSAMPLING
    return x0, y0, x1 - x0 + 1, y1 - y0 + 1


def _develop(
    canvas: _Canvas, light: NDArray[np.float64], rng: np.random.Generator
) -> Image.Image:
    """Reduce to the final size, then add what a camera adds: haze, contrast, noise."""
    pixels = np.asarray(canvas.colours.reduce(OVERSAMPLING), dtype=np.float64)
    haze = rng.uniform(0, 0.6) * rng.random()
    pixels = pixels * (1 - haze) + haze * np.array(FOG) * light
    pixels = pixels.mean() + (pixels - pixels.mean()) * rng.uniform(0.75, 1.15)
    noise = rng.uniform(3, 12) * (0.5 + 0.5 * light.mean())
    pixels = pixels + noise * rng.standard_normal(pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def write_scenes(
    folder: Path | str,
    *,
    train: int = 4000,
    val: int = 1000,
    test: int = 1000,
    seed: int = 0,
    image_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write three splits of scenes as PNG files with COCO instances annotations.

    A picture depends on `seed`, its split, its index and `image_size` only, so larger counts add
    pictures and change none. The folder appears complete or not at all.

    Args:
        folder: Gets `annotations/instances_{split}.json` and `{split}/000001.png`, ...
        train: Number of training pictures.
        val: Number of validation pictures.
        test: Number of test pictures.
        seed: Seed of the dataset, at least 0.
        image_size: Side of the pictures in pixels, 32..512.
        progress: Called with (pictures written, pictures in all) after each picture.

    Raises:
        FileExistsError: `folder` exists and is not an empty folder.
        ValueError: A count or the seed is negative, or `image_size` is out of range.
    """
    folder = Path(folder).absolute()
    counts = {"train": train, "val": val, "test": test}
    for name, value in {**counts, "seed": seed}.items():
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"{folder} exists and is not an empty folder: remove it or choose another one"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as staging:
        torso = Path(staging) / folder.name
        (torso / "annotations").mkdir(parents=True)
        done = 0
        for number, (split, count) in enumerate(counts.items()):
            (torso / split).mkdir()
            records = []
            for index in range(count):
                scene = draw_scene(np.random.default_rng([seed, number, index]), image_size)
                scene.image.save(torso / split / _file_name(index))
                records.append(scene.boxes)
                done += 1
                if progress is not None:
                    progress(done, sum(counts.values()))
            document = _coco_document(records, image_size)
            target = torso / "annotations" / f"instances_{split}.json"
            target.write_text(json.dumps(document), encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        torso.rename(folder)


def _file_name(index: int) -> str:
    return f"{index + 1:06d}.png"


def _coco_document(records: list[list[tuple[int, Box]]], image_size: int) -> dict[str, Any]:
    """COCO instances; category ids have gaps, as COCO's own have, and start at 1."""
    boxes = [(image, label, box) for image, found in enumerate(records) for label, box in found]
    return {
        "info": {"description": "synthetic scenes with label dependencies"},
        "images": [
            {"id": i + 1, "file_name": _file_name(i), "width": image_size, "height": image_size}
            for i in range(len(records))
        ],
        "annotations": [
            {
                "id": i + 1,
                "image_id": image + 1,
                "category_id": 2 * label + 1,
                "bbox": list(box),
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            for i, (image, label, box) in enumerate(boxes)
        ],
        "categories": [{"id": 2 * i + 1, "name": name} for i, name in enumerate(SCENE_LABELS)],
    }
