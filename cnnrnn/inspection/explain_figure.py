"""The picture of an `Explanation`: the image, and its map at each step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cnnrnn.inspection.explain import DECONVOLUTIONS
from cnnrnn.machine.extras import from_extra
from cnnrnn.machine.files import write_whole

if TYPE_CHECKING:
    from cnnrnn.inspection.explain import Explanation

COLUMNS = 6
PANEL = 1.8  # inches, of the longer side
FOR, AGAINST = (0.80, 0.10, 0.10), (0.10, 0.25, 0.80)
BRIGHT = 0.995  # a map's scale ends where so many of its pixels do: few may be far above the rest
FADED = 0.55  # how far towards white the image goes under a map


def require_drawable(file: Path) -> None:
    """Fail where matplotlib is missing, or draws no such file.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: it writes no file of that suffix.
    """
    with from_extra("matplotlib", "the picture of an explanation", "explain"):
        from matplotlib.backend_bases import FigureCanvasBase
    known = FigureCanvasBase.get_supported_filetypes()
    if file.suffix.lower().removeprefix(".") not in known:
        raise ValueError(f"a picture's name must end in one of {', '.join(known)}, got {file}")


def draw(explanation: Explanation, file: Path) -> None:
    """Draw the image, and over it the map of each step; see `Explanation.save`.

    Red is what speaks for the score (of a deconvolution, what arrives), blue against it. Each map
    has its own scale: the title names the nats of full colour.
    """
    require_drawable(file)
    from matplotlib.figure import Figure

    width, height = explanation.size
    longer = max(width, height)
    count = 1 + len(explanation.steps)
    columns = min(count, COLUMNS)
    rows = math.ceil(count / columns)
    panel = (PANEL * width / longer, PANEL * height / longer)
    figure = Figure(
        figsize=(columns * max(panel[0], 1.5) + 0.2, rows * (max(panel[1], 0.5) + 0.6) + 0.35),
        layout="constrained",
    )
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    image = explanation.image.permute(1, 2, 0).numpy() / 255.0  # [S, S, 3]
    grey = np.repeat(image.mean(2, keepdims=True), 3, axis=2)
    faded = grey + (1 - grey) * FADED
    panels: list[tuple[str, NDArray[Any]]] = [(", ".join(explanation.path) or "(no labels)", image)]
    for step, values in zip(explanation.steps, explanation.maps.numpy(), strict=True):
        title = step.name
        if step.label is not None:
            title += f"\n{step.label} {step.score:+.1f}"
        if explanation.method not in DECONVOLUTIONS:  # whose unit means nothing
            title += f"\ncolour ±{full_colour(values):.2g}"
        panels.append((title, overlaid(faded, values)))
    for axes in grid:
        axes.set_axis_off()
    for axes, (title, pixels) in zip(grid, panels, strict=False):
        axes.imshow(pixels, extent=(0, width, height, 0), interpolation="nearest")
        axes.set_title(title, fontsize=8, wrap=True, parse_math=False)  # a label may hold a $
    figure.supxlabel(explanation.explained, fontsize=7, wrap=True, parse_math=False)
    write_whole(file, lambda target: figure.savefig(target, dpi=110))


def full_colour(values: NDArray[Any]) -> float:
    """Return the size at which a map [S, S] has full colour."""
    sizes = np.abs(values)
    return float(np.quantile(sizes, BRIGHT) or sizes.max())


def overlaid(image: NDArray[Any], values: NDArray[Any]) -> NDArray[Any]:
    """Lay a map over an image.

    Args:
        image: [S, S, 3] in 0..1.
        values: [S, S].

    Returns:
        [S, S, 3], red where the map is above 0, blue where it is below.
    """
    strength = np.minimum(np.abs(values)[..., None] / (full_colour(values) or 1.0), 1.0)
    ink = np.where(values[..., None] > 0, FOR, AGAINST)
    mixed: NDArray[Any] = image * (1 - strength) + ink * strength
    return mixed
