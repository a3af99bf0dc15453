"""Small synthetic images whose labels depend on one another, written as a COCO dataset.

A scene is made in two steps. `draw_labels` picks the labels from the tables below, so the
dependencies are known exactly; `draw_scene` then draws those labels and nothing else. Four
drawings stand for two labels each (a red post is a buoy on the sea and a mailbox by a road), so
only the context tells which, and what is faint is often given away only by what it occurs with.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from cnnrnn.machine.files import writing
from cnnrnn.machine.progress import Progress, no_progress

Colour = tuple[float, float, float]  # red, green, blue, 0..255
Ink = NDArray[np.float64]  # [3], a colour under the light of the scene
Shape = tuple[float, ...]  # 4 numbers: centre and radii of an oval; more: corners of a polygon
Strokes = tuple[tuple[str, Shape], ...]  # (name in PALETTE, shape), bottom layer first
Zones = dict[str, tuple[float, float]]  # top and bottom of "sky", "back", "front", in grid units
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
    *((("road",), 0.30), (("field",), 0.28), (("sea",), 0.21)),
    *((("beach", "sea"), 0.09), (("snow",), 0.10), ((), 0.02)),
)


class Rule(NamedTuple):
    """The chance of a label where all of `needs` and none of `bans` are in the image."""

    label: str
    chance: float
    needs: tuple[str, ...] = ()
    bans: tuple[str, ...] = ()


# Read from top to bottom: the first row of a label that applies decides, and without one it is
# absent. A scene with neither ground nor sky is blank fog, which has no label.
RULES: tuple[Rule, ...] = (
    Rule("sky", 0.74),
    Rule("night", 0.25, ("sky",), ("beach",)),
    Rule("night", 0.12, ("road",)),
    Rule("cloud", 0.15, ("sky", "night")),
    Rule("cloud", 0.45, ("sky",)),
    Rule("sun", 0.15, ("cloud",), ("night",)),
    Rule("sun", 0.65, ("sky",), ("night",)),
    Rule("moon", 0.50, ("sky", "night")),
    Rule("star", 0.90, ("sky", "night"), ("cloud", "moon")),
    Rule("plane", 0.60, ("sky",), ("night", "cloud", "sun")),
    Rule("car", 0.75, ("road",)),
    Rule("truck", 0.10, ("car",)),
    Rule("truck", 0.75, ("road",)),
    Rule("traffic light", 0.35, ("car",), ("truck",)),
    Rule("barn", 0.15, ("field",)),
    Rule("tractor", 0.20, ("barn",), ("night",)),
    Rule("skier", 0.55, ("snow",), ("night",)),
    Rule("tree", 0.90, ("skier",)),
    Rule("tree", 0.30, ("road",), ("traffic light",)),
    Rule("tree", 0.55, ("field",)),
    Rule("mailbox", 0.80, ("road", "tree")),
    Rule("mailbox", 0.05, ("road",), ("traffic light",)),
    Rule("sheep", 0.75, ("field", "tree"), ("tractor",)),
    Rule("sheep", 0.10, ("field",), ("tractor",)),
    Rule("boat", 0.20, ("beach",)),
    Rule("boat", 0.60, ("sea",)),
    Rule("sailboat", 0.50, ("boat",), ("night",)),
    Rule("gull", 0.90, ("boat",)),
    Rule("buoy", 0.65, ("sea",), ("boat",)),
    Rule("umbrella", 0.95, ("beach", "sun")),
    Rule("umbrella", 0.10, ("beach",)),
)
IS_ALSO = {"sailboat": "boat"}  # what the drawing of a label also is

PALETTE: dict[str, Colour] = {
    **{"black": (25, 25, 28), "grey": (105, 105, 108), "white": (238, 238, 235)},
    **{"glass": (150, 190, 210), "wood": (95, 70, 45), "leaf": (43, 98, 53), "navy": (40, 45, 70)},
    **{"red": (205, 45, 40), "brick": (140, 50, 40), "green": (60, 130, 50), "hub": (225, 190, 50)},
    **{"skin": (225, 180, 150), "lamp": (255, 250, 225), "red lamp": (240, 50, 40)},
}
PAINTS: tuple[Colour, ...] = (  # "paint" in a drawing is one of them
    *((190, 45, 40), (45, 80, 165), (215, 215, 210), (225, 180, 50), (50, 120, 80), (70, 70, 78)),
)


def _rect(x0: float, y0: float, x1: float, y1: float) -> Shape:
    return x0, y0, x1, y0, x1, y1, x0, y1


def _wheel(x: float, radius: float, hub: str = "grey") -> Strokes:
    return ("black", (x, radius, radius, radius)), (hub, (x, radius, radius * 0.4, radius * 0.4))


# Drawings stand on their foot at (0, 0), y up, in units of 1/64 of the image's side at scale 1.
DISC: Strokes = (("lamp", (0, 3, 3, 3)),)
SPARK: Strokes = (
    ("lamp", (-1.2, 0.8, -0.3, 0.5, 0, -0.2, 0.3, 0.5, 1.2, 0.8, 0.3, 1.1, 0, 1.8, -0.3, 1.1)),
)
POST: Strokes = (("wood", _rect(-0.4, 0, 0.4, 2.2)), ("red", (0, 2.4, 1.1, 1.0)))
PAIR: Strokes = (
    *(("white", (-1.7, 0.9, 1.2, 0.85)), ("grey", (-0.6, 1.4, 0.5, 0.5))),
    *(("white", (1.5, 1.4, 1.2, 0.85)), ("grey", (2.6, 1.9, 0.5, 0.5))),
)
CLOUD: Strokes = (("white", (-4, 2, 4, 2)), ("white", (4, 2, 4, 1.8)), ("white", (0, 2.8, 4, 2.8)))
CAR: Strokes = (
    ("paint", (-6, 1, 6, 1, 6, 2.8, 3.8, 3.4, 1.4, 5.4, -2.6, 5.4, -4.2, 3.4, -6, 2.8)),
    ("glass", (-3.2, 3.4, -2.2, 4.9, -0.8, 4.9, -0.8, 3.4)),
    ("glass", (-0.2, 3.4, -0.2, 4.9, 1.1, 4.9, 2.3, 3.4)),
    *(("lamp", (5.5, 2.4, 0.5, 0.5)), *_wheel(-3.6, 1.3), *_wheel(3.6, 1.3)),
)
TRUCK: Strokes = (
    *(("paint", _rect(-8, 1.4, 3.4, 7.6)), ("black", _rect(-8, 0.9, 8, 1.6))),
    ("white", (3.8, 1.2, 8, 1.2, 8, 3.6, 6.8, 6, 3.8, 6)),
    *(("glass", (5, 3.7, 7.4, 3.7, 6.5, 5.4, 5, 5.4)), ("lamp", (7.6, 2.4, 0.5, 0.5))),
    *(*_wheel(-6, 1.4), *_wheel(-3, 1.4), *_wheel(5.6, 1.4)),
)
TRAFFIC_LIGHT: Strokes = (
    *(("grey", _rect(-0.35, 0, 0.35, 7)), ("black", _rect(-1.3, 6, 1.3, 12))),
    *(("leaf", (0, 7.1, 0.7, 0.7)), ("wood", (0, 9, 0.7, 0.7)), ("red lamp", (0, 10.9, 0.8, 0.8))),
)
TREE: Strokes = (
    *(("wood", _rect(-0.7, 0, 0.7, 3)), ("leaf", (-4, 2, 4, 2, 0, 7))),
    *(("leaf", (-3.2, 5, 3.2, 5, 0, 10)), ("leaf", (-2.4, 8, 2.4, 8, 0, 13))),
)
BARN: Strokes = (
    *(("brick", _rect(-6, 0, 6, 6)), ("grey", (-6.8, 6, -4.6, 9, 0, 10.6, 4.6, 9, 6.8, 6))),
    *(("white", _rect(-2, 0, 2, 4.4)), ("brick", _rect(-1.5, 0, 1.5, 3.9))),
)
TRACTOR: Strokes = (
    *(("green", _rect(-1, 2, 5, 4)), ("green", _rect(-3.4, 2, 0, 7))),
    *(("glass", _rect(-2.8, 4.4, -0.5, 6.5)), ("black", _rect(3.2, 4, 3.8, 6.2))),
    *(*_wheel(-2.4, 2.4, "hub"), *_wheel(3.9, 1.4, "hub")),
)
HULL: Strokes = (("paint", (-6, 2, -4.6, 0, 4.4, 0, 6.4, 2)), ("white", _rect(-6, 1.9, 6.3, 2.4)))
BOAT: Strokes = (
    *(("white", _rect(-3, 2, 1.6, 5)), ("navy", _rect(-2.4, 3.2, 1, 4.3))),
    *(("paint", _rect(-1.6, 5, -0.4, 6.6)), *HULL),
)
SAILBOAT: Strokes = (
    *(*HULL, ("wood", _rect(-0.2, 2, 0.2, 13))),
    *(("white", (0.5, 3, 5.4, 3, 0.5, 12.6)), ("white", (-0.5, 3, -4, 3, -0.5, 10.6))),
)
UMBRELLA: Strokes = (
    ("wood", _rect(-0.25, 0, 0.25, 5)),
    ("paint", (-4.6, 4, -4, 5.8, -2.3, 7.1, 0, 7.6, 2.3, 7.1, 4, 5.8, 4.6, 4)),
    *(("white", (-2.9, 4, -1.1, 4, 0, 7.6)), ("white", (2.9, 4, 1.1, 4, 0, 7.6))),
)
SKIER: Strokes = (
    *(("black", (-3.4, 0.7, -3.4, 1.2, 3.4, 0.5, 3.4, 0)), ("skin", (1.2, 6.6, 0.9, 0.9))),
    *(("navy", (-1.2, 0.8, 0.2, 0.6, 1.2, 2, 0, 3.4, -1.2, 3)), ("black", _rect(2.8, 0, 3.1, 4.4))),
    ("paint", (-1.2, 2.8, 0.4, 3.2, 0.9, 4.7, 3, 3.9, 3.2, 4.4, 1, 5.7, 0, 6)),
)

# Drawing, where it stands ("sky", "back" or "front" of the ground, "ground" for both), how many.
THINGS: dict[str, tuple[Strokes, str, int]] = {
    **{"cloud": (CLOUD, "sky", 3), "sun": (DISC, "sky", 1), "moon": (DISC, "sky", 1)},
    **{"star": (SPARK, "sky", 1), "plane": (SPARK, "sky", 1)},
    **{"barn": (BARN, "ground", 1), "tractor": (TRACTOR, "ground", 1), "tree": (TREE, "back", 3)},
    **{"car": (CAR, "front", 3), "truck": (TRUCK, "front", 2), "skier": (SKIER, "ground", 2)},
    **{"traffic light": (TRAFFIC_LIGHT, "back", 1), "umbrella": (UMBRELLA, "front", 2)},
    **{"boat": (BOAT, "back", 2), "sailboat": (SAILBOAT, "back", 2)},
    **{"sheep": (PAIR, "ground", 2), "gull": (PAIR, "back", 2)},
    **{"mailbox": (POST, "back", 1), "buoy": (POST, "back", 1)},
}

# Label and colour of the back and of the front of each ground; behind a road is a bare verge.
STRIPS: dict[str, tuple[tuple[str, Colour], tuple[str, Colour]]] = {
    "road": (("", (152, 136, 120)), ("road", (98, 98, 102))),
    "beach": (("sea", (52, 104, 140)), ("beach", (214, 190, 142))),
    "field": (("field", (98, 136, 62)), ("field", (104, 142, 68))),
    "sea": (("sea", (52, 104, 140)), ("sea", (50, 100, 136))),
    "snow": (("snow", (222, 228, 236)), ("snow", (226, 230, 236))),
}
FOG: Colour = (165, 168, 170)
GRID = 64.0  # layouts are made on a 64 x 64 grid, whatever the image's size
OVERSAMPLING = 3


@dataclass(frozen=True)
class Scene:
    """A drawn image and what is in it.

    Attributes:
        image: RGB image, image_size x image_size.
        boxes: (index into `SCENE_LABELS`, (x, y, width, height) in pixels); several boxes may share
            a label, and a context such as sky has the box of the region that shows it.
    """

    image: Image.Image
    boxes: list[tuple[int, Box]]


class _Canvas:
    """Two images drawn in step: the colours, and whose each pixel is, an index into `names`."""

    def __init__(self, image_size: int) -> None:
        size = image_size * OVERSAMPLING, image_size * OVERSAMPLING
        self.unit = size[0] / GRID
        self.names, self.drawn = [""], [0]  # 0 is what has no label; pixels each was drawn with
        self.colours, self.owners = Image.new("RGB", size), Image.new("L", size)

    def fill(self, outline: NDArray[np.float64], ink: Ink, owner: int) -> None:
        """Fill a polygon [corners, 2], given in grid units with y down."""
        red, green, blue = (int(c) for c in ink.clip(0, 255))
        corners = (outline * self.unit).ravel().tolist()
        ImageDraw.Draw(self.colours).polygon(corners, fill=(red, green, blue))
        ImageDraw.Draw(self.owners).polygon(corners, fill=owner)

    def shown(self, owner: int) -> NDArray[np.bool_]:
        """Which pixels show `owner`."""
        return np.asarray(np.asarray(self.owners) == owner)


def _outline(shape: Shape) -> NDArray[np.float64]:
    """Corners of a shape, [corners, 2]."""
    if len(shape) > 4:
        return np.array(list(zip(shape[::2], shape[1::2], strict=True)))
    (x, y, rx, ry), turn = shape, np.linspace(0, 2 * np.pi, 24, endpoint=False)
    return np.stack([x + rx * np.cos(turn), y + ry * np.sin(turn)], axis=1)


def draw_labels(rng: np.random.Generator) -> frozenset[str]:
    """Draw the labels of one scene from `GROUNDS` and `RULES`.

    Args:
        rng: Source of randomness; it is advanced.

    Returns:
        A set of names from `SCENE_LABELS`, in rare cases empty.
    """
    labels = set(GROUNDS[rng.choice(len(GROUNDS), p=[share for _, share in GROUNDS])][0])
    decided: set[str] = set()
    for label, chance, needs, bans in RULES:
        if label not in decided and labels.issuperset(needs) and labels.isdisjoint(bans):
            decided.add(label)
            if rng.random() < chance:
                labels.add(label)
    return frozenset(labels)


def draw_scene(rng: np.random.Generator, image_size: int = 64) -> Scene:
    """Draw one scene: its labels first, then an image that shows exactly those.

    Args:
        rng: Source of randomness; it is advanced.
        image_size: Side of the square image in pixels, 32..512.

    Returns:
        The image and its boxes, all inside the image and at least 1 x 1 pixel.

    Raises:
        ValueError: `image_size` is out of range.
    """
    if not 32 <= image_size <= 512:
        raise ValueError(f"image_size must be in 32..512, got {image_size}")
    labels = draw_labels(rng)
    light = (0.56 + 0.54 * np.sqrt(rng.random())) * rng.normal(1.0, 0.04, 3)
    if "night" in labels:
        light = rng.uniform(0.28, 0.55) * np.array([0.85, 0.92, 1.15])
    while True:  # until no thing is mostly hidden behind others
        canvas = _Canvas(image_size)
        _compose(canvas, labels, light, rng)
        shown = [canvas.shown(owner) for owner in range(len(canvas.names))]
        if all(np.count_nonzero(s) >= 0.6 * d for s, d in zip(shown, canvas.drawn, strict=True)):
            break
    found = [(name, _box(s)) for name, s in zip(canvas.names, shown, strict=True) if name]
    found += [(IS_ALSO[name], box) for name, box in found if name in IS_ALSO]
    if "night" in labels:
        found.append(("night", (0, 0, image_size, image_size)))
    boxes = [(SCENE_LABELS.index(name), box) for name, box in found]
    return Scene(_develop(canvas, light, rng), boxes)


def _compose(canvas: _Canvas, labels: frozenset[str], light: Ink, rng: np.random.Generator) -> None:
    """Draw one layout of `labels`: sky and ground, what is in the sky, the rest far to near."""
    ground = next((name for name in STRIPS if name in labels), "")
    horizon = 0.0 if "sky" not in labels else rng.uniform(18, 36) if ground else GRID
    edge = horizon + (GRID - horizon) * rng.uniform(0.35, 0.6)
    zones: Zones = {"sky": (0.0, horizon), "back": (horizon, edge), "front": (edge, GRID)}
    inks = _draw_backdrop(canvas, ground, zones, light, rng)
    zones["ground"] = horizon, GRID

    placed: list[tuple[bool, float, float, str]] = []
    also = {IS_ALSO[label] for label in labels if label in IS_ALSO}
    for label in THINGS:
        if label in labels and (label not in also or rng.random() < 0.25):
            strokes, zone, most = THINGS[label]
            top = max(y for _, shape in strokes for y in _outline(shape)[:, 1])
            for _ in range(1 + int(rng.integers(most))):
                scale = rng.uniform(0.65, 1.15)
                foot = rng.uniform(max(zones[zone][0], top * scale + 1), zones[zone][1] - 0.5)
                placed.append((zone != "sky", foot, scale, label))
    for on_ground, foot, scale, label in sorted(placed):
        strokes = THINGS[label][0]
        owner = len(canvas.names)
        canvas.names.append(label)
        scale *= 0.75 + 0.6 * (foot - horizon) / GRID if on_ground else 1.0
        x = rng.uniform(3 * scale, GRID - 3 * scale)
        near = "sky" if not on_ground else "back" if foot < edge else "front"
        paint, fade = PAINTS[rng.integers(len(PAINTS))], rng.uniform(0.0, 0.6)
        for name, shape in strokes:
            colour = np.array(paint if name == "paint" else PALETTE[name])
            lit = colour if "lamp" in name else colour * light
            outline = _outline(shape) * (scale, -scale) + (x, foot)
            canvas.fill(outline, (1 - fade) * lit + fade * inks[near], owner)
        canvas.drawn.append(max(1, int(np.count_nonzero(canvas.shown(owner)))))


def _draw_backdrop(
    canvas: _Canvas, ground: str, zones: Zones, light: Ink, rng: np.random.Generator
) -> dict[str, Ink]:
    """Fill the image with sky and ground; return the ink of each zone."""
    blue = rng.random()
    sky = "sky", (150 - 60 * blue, 165 - 20 * blue, 175 + 35 * blue)
    back, front = STRIPS.get(ground, (("", FOG), ("", FOG)))
    jitter = rng.normal(0, 6, 3)
    inks: dict[str, Ink] = {}
    for zone, (label, colour) in {"sky": sky, "back": back, "front": front}.items():
        top, bottom = zones[zone]
        inks[zone] = (np.array(colour) + jitter) * light
        if bottom <= top:
            continue
        if label not in canvas.names:
            canvas.names.append(label)
            canvas.drawn.append(1)
        owner = canvas.names.index(label)
        for i, y in enumerate(np.linspace(top, bottom, 6)[:-1]):
            slope = 4 if zone == "sky" else 2 if zone == "front" else 0
            canvas.fill(_outline(_rect(0, y, GRID, bottom)), inks[zone] + i * slope * light, owner)
        if zone != "sky" and ground:
            # Waves, furrows, ruts or drifts: short strokes, lighter or darker than the ground.
            low, high = (0, top + 1, 2, -24), (GRID, bottom - 1, 9, 24)
            for x, y, length, shade in rng.uniform(low, high, (10, 4)):
                stroke = _outline(_rect(x, y, x + length, y + 0.6))
                canvas.fill(stroke, inks[zone] + shade * light, owner)
        if label == "road":
            y = 0.55 * top + 0.45 * bottom
            for x in np.arange(rng.uniform(-6, 0), GRID, 11):
                canvas.fill(_outline(_rect(x, y, x + 6, y + 1)), 200 * light, owner)
    return inks


def _box(shown: NDArray[np.bool_]) -> Box:
    """Smallest box of whole pixels of the final image around the part that shows."""
    columns = np.flatnonzero(shown.any(axis=0)) // OVERSAMPLING
    rows = np.flatnonzero(shown.any(axis=1)) // OVERSAMPLING
    x, y = int(columns[0]), int(rows[0])
    return x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1


def _develop(canvas: _Canvas, light: Ink, rng: np.random.Generator) -> Image.Image:
    """Reduce to the final size, then add haze, pale colours, low contrast and noise."""
    pixels = np.asarray(canvas.colours.reduce(OVERSAMPLING), dtype=np.float64)
    haze = rng.uniform(0, 0.75) * rng.random()
    pixels = pixels * (1 - haze) + haze * np.array(FOG) * light
    grey = pixels.mean(axis=2, keepdims=True)
    pixels = grey + (pixels - grey) * (0.1 + np.sqrt(rng.random()))
    pixels = pixels.mean() + (pixels - pixels.mean()) * rng.uniform(0.7, 1.15)
    pixels += rng.normal(0, rng.uniform(3, 12) * (0.5 + 0.5 * light.mean()), pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def write_scenes(
    folder: Path | str,
    *,
    train: int = 4000,
    val: int = 1000,
    test: int = 1000,
    seed: int = 0,
    image_size: int = 64,
    progress: Progress = no_progress,
) -> None:
    """Write three splits of scenes as PNG files with COCO instances annotations.

    An image depends on `seed`, its split, its index and `image_size` only, so larger counts add
    images and change none. The folder appears complete or not at all.

    Args:
        folder: Gets `annotations/instances_{split}.json` and `{split}/000001.png`, ...
        train: Number of training images.
        val: Number of validation images.
        test: Number of test images.
        seed: Seed of the dataset, at least 0.
        image_size: Side of the images in pixels, 32..512.
        progress: Told how many images are written.

    Raises:
        FileExistsError: `folder` exists and is not an empty folder.
        ValueError: A count or the seed is negative, or `image_size` is out of range.
        OSError: The disk is full, or the like.
    """
    folder, counts = Path(folder).absolute(), {"train": train, "val": val, "test": test}
    for name, value in {**counts, "seed": seed}.items():
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} must be a new or empty folder: remove it or name another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        writing(folder),
        tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as staging,
        progress("scenes", sum(counts.values())) as advance,
    ):
        unfinished = Path(staging) / folder.name
        (unfinished / "annotations").mkdir(parents=True)
        for number, (split, count) in enumerate(counts.items()):
            (unfinished / split).mkdir()
            boxes: list[list[tuple[int, Box]]] = []
            for index in range(count):
                scene = draw_scene(np.random.default_rng([seed, number, index]), image_size)
                scene.image.save(unfinished / split / _file_name(index))
                boxes.append(scene.boxes)
                advance(1)
            target = unfinished / "annotations" / f"instances_{split}.json"
            target.write_text(json.dumps(_coco_instances(boxes, image_size)), encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)


def _file_name(index: int) -> str:
    return f"{index + 1:06d}.png"


def _coco_instances(boxes: list[list[tuple[int, Box]]], image_size: int) -> dict[str, Any]:
    """COCO's instances format; category ids start at 1 and have gaps, as COCO's own have."""
    size = {"width": image_size, "height": image_size}
    rows = [(i, label, box) for i, found in enumerate(boxes) for label, box in found]
    return {
        "images": [{"id": i + 1, "file_name": _file_name(i), **size} for i in range(len(boxes))],
        "annotations": [
            {"id": n + 1, "image_id": i + 1, "category_id": 2 * label + 1}
            | {"bbox": list(box), "area": box[2] * box[3], "iscrowd": 0}
            for n, (i, label, box) in enumerate(rows)
        ],
        "categories": [{"id": 2 * i + 1, "name": name} for i, name in enumerate(SCENE_LABELS)],
    }
