"""Draw where in a scene and in two photographs the scores of label paths come from.

    python examples/draw_explanations.py docs/explain_scene.jpg docs/explain_photographs.jpg

The scene is explained by the small demo model, photographs of scikit-image by the animals model. It
needs the extras `[animals]` and `[explain]` and scikit-image.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import skimage.data
from matplotlib.figure import Figure
from PIL import Image

import cnnrnn
from cnnrnn.data.sources.scenes import draw_scene
from cnnrnn.inspection.explain import DECONVOLUTIONS, Explanation, Method
from cnnrnn.inspection.explain_figure import full_colour, overlaid

SCENE = [5, 2, 3]  # seed 5, test split, fourth image of `cnnrnn scenes --seed 5`
PHOTOGRAPHS = (("chelsea", "cat"), ("astronaut", "person"))
Panel = tuple[str, np.ndarray[Any, Any], tuple[int, int]]  # title, [S, S, 3], width and height


def pixels_of(found: Explanation) -> np.ndarray[Any, Any]:
    """Return the image [S, S, 3] in 0..1."""
    return found.image.permute(1, 2, 0).numpy() / 255


def map_panel(found: Explanation, step: int, title: str) -> Panel:
    """Lay the map of a step over the image in grey; the title gets the nats of full colour."""
    grey = pixels_of(found).mean(2, keepdims=True).repeat(3, axis=2)
    values = found.maps[step].numpy()
    if found.method not in DECONVOLUTIONS:
        title += f"\ncolour ±{full_colour(values):.2g}"
    return title, overlaid(0.45 * grey + 0.55, values), found.size


def draw(rows: Sequence[tuple[str, Sequence[Panel]]], file: Path, side: float) -> None:
    """Draw rows of panels, each row with a name."""
    columns = max(len(panels) for _, panels in rows)
    figure = Figure((side * columns + 0.3, (side + 0.3) * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for (name, panels), line in zip(rows, grid, strict=True):
        for axes in line:
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        line[0].set_ylabel(name, fontsize=8)
        for axes, (title, pixels, (width, height)) in zip(line, panels, strict=False):
            axes.imshow(pixels, extent=(0, width, height, 0))
            axes.set_title(title, fontsize=8)
    figure.savefig(file, dpi=100, pil_kwargs={"quality": 80})


def scene_rows() -> list[tuple[str, list[Panel]]]:
    """Explain a scene by each method, step by step."""
    image = draw_scene(np.random.default_rng(SCENE), 64).image
    model = cnnrnn.load("scenes")
    rows = []
    for method in get_args(Method):
        found = cnnrnn.explain(image, model, method=method)
        panels: list[Panel] = [("the image", pixels_of(found), found.size)]
        for i, step in enumerate(found.steps):
            score = "" if step.label is None else f"\n{step.label} {step.score:+.1f}"
            panels.append(map_panel(found, i, step.name + score))
        rows.append((method.replace("_", "\n"), panels))
    return rows


def photograph_rows() -> list[tuple[str, list[Panel]]]:
    """Explain one label of each photograph before the first label."""
    model = cnnrnn.load("animals")
    rows = []
    for name, label in PHOTOGRAPHS:
        image = Image.fromarray(getattr(skimage.data, name)())
        panels: list[Panel] = []
        for method in ("occlusion", "integrated_gradients"):
            found = cnnrnn.explain(image, model, method=method, path=[], label=label)
            if not panels:
                panels.append(("the image", pixels_of(found), found.size))
            title = f"{method.replace('_', ' ')}\n{label} {found.steps[0].score:+.1f}"
            panels.append(map_panel(found, 0, title))
        rows.append((name, panels))
    return rows


def main() -> None:
    """Explain and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scene", type=Path)
    parser.add_argument("photographs", type=Path)
    options = parser.parse_args()
    draw(scene_rows(), options.scene, 1.35)
    draw(photograph_rows(), options.photographs, 1.9)


if __name__ == "__main__":
    main()
