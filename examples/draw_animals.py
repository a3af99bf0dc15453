"""Draw what the animals model answers for four photographs that come with scikit-image.

    python examples/draw_animals.py docs/animals.jpg

It needs the extra `[animals]` and scikit-image. The second line under a photograph without an
animal is what the model answers when it is told so.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import skimage.data
from PIL import Image, ImageDraw, ImageFont

import cnnrnn

HEIGHT, MARGIN, LINE = 220, 12, 24
GREEN, RED, GREY = "#15803d", "#b91c1c", "#555555"
ANIMALS = ("dog", "cat", "horse", "sheep", "cow")


class Photograph(NamedTuple):
    """A photograph of scikit-image, all in the public domain or CC0.

    Attributes:
        name: of the function in `skimage.data`.
        shows: those of the model's labels that it shows.
    """

    name: str
    shows: frozenset[str]


PHOTOGRAPHS = (
    Photograph("chelsea", frozenset({"cat"})),
    Photograph("astronaut", frozenset({"person"})),
    Photograph("camera", frozenset({"person"})),
    Photograph("coffee", frozenset({"diningtable"})),
)


def main() -> None:
    """Predict and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    model = cnnrnn.load("animals")
    images = []
    for photograph in PHOTOGRAPHS:
        pixels = getattr(skimage.data, photograph.name)()
        images.append(Image.fromarray(np.asarray(pixels)).convert("RGB"))
    answers = model.predict(images)
    told = model.predict(images, absent=ANIMALS)
    shown = [i.resize((round(i.width * HEIGHT / i.height), HEIGHT)) for i in images]
    width = sum(i.width for i in shown) + MARGIN * (len(shown) + 1)
    sheet = Image.new("RGB", (width, HEIGHT + 2 * MARGIN + 2 * LINE), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    left = MARGIN
    for photograph, image, answer, without in zip(PHOTOGRAPHS, shown, answers, told, strict=True):
        sheet.paste(image, (left, MARGIN))
        lines = [("", answer.labels)]
        if not photograph.shows & set(ANIMALS):
            lines.append(("told, no animal: ", without.labels))
        for row, (before, labels) in enumerate(lines):
            x, y = float(left), HEIGHT + MARGIN + 4 + row * LINE
            words = [(before, GREY)] if before else []
            words += [(f"{w} ", GREEN if w in photograph.shows else RED) for w in labels]
            for word, colour in words if labels else [*words, ("nothing", GREY)]:
                pen.text((x, y), word, colour, font)
                x += pen.textlength(word, font)
        left += image.width + MARGIN
    sheet.save(options.out, quality=90)


if __name__ == "__main__":
    main()
