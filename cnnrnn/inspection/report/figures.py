"""Plots of a report as SVG elements, whose colours the page's style sheet sets."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cnnrnn.inspection.report.findings import Known, LabelMap
from cnnrnn.inspection.report.statistics import BINS, Pairs, Reliability
from cnnrnn.machine.extras import from_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
SERIES = ("#050505", "#060606", "#070707", "#080808")
_VARIABLES = {
    INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper",
    **{colour: f"--series-{number}" for number, colour in enumerate(SERIES, 1)},
}  # fmt: skip
"""Colours that only stand for variables of the style sheet: a plot then follows the theme."""

SIZE = (4.6, 3.3)
WIDE = (9.4, 6.0)
POINTS = 1_500
"""Of more pairs those with the most images are drawn."""


def draw(
    title: str,
    plot: Callable[[Axes], object],
    size: tuple[float, float] = SIZE,
) -> str:
    """Draw a plot and return its `<svg>` element.

    Args:
        title: what it shows, for those who do not see it.
        plot: draws on the axes.
        size: width and height in units of 72 points.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    with from_extra("matplotlib", "a report", "report"):
        from cycler import cycler
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": title, "text.parse_math": False, "font.size": 9.5,
        "axes.edgecolor": GRID, "axes.labelcolor": MUTED, "xtick.color": MUTED,
        "ytick.color": MUTED, "text.color": INK, "axes.facecolor": "none",
        "figure.facecolor": "none", "grid.color": GRID, "axes.grid": True, "grid.linewidth": 0.6,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
        "legend.labelcolor": INK, "axes.prop_cycle": cycler(color=SERIES),
        "axes.axisbelow": True, "figure.constrained_layout.use": True,
    }  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=size)
        FigureCanvasSVG(figure)
        plot(figure.subplots())
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return _inline(text.getvalue(), title)


def _inline(svg: str, title: str) -> str:
    """Make a part of a page of an SVG file: no names that come twice, colours by variable."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    # Names of clip paths and markers, which are used, end in a digest.
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg)
    svg = re.sub(r"font: ?([\d.]+)px [^;\"]+", r"font-size: \1px", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    head, rest = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]+"', head)
    assert box is not None
    label = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return f'<svg role="img" aria-label="{label}" {box[0]}>{rest}'


def training_curves(epochs: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Draw what the log says of each epoch: the loss, and what validation measured."""
    starts = [i for i, e in enumerate(epochs) if i and e.get("stage") != epochs[i - 1].get("stage")]
    numbers = range(1, len(epochs) + 1)

    def curves(names: dict[str, str], scale: float, unit: str) -> Callable[[Axes], None]:
        def plot(axes: Axes) -> None:
            for key, name in names.items():
                values = [_number(epoch.get(key)) * scale for epoch in epochs]
                if any(value == value for value in values):
                    axes.plot(numbers, values, label=name, linewidth=1.6, marker=".")
            for start in starts:
                axes.axvline(start + 0.5, color=MUTED, linewidth=0.8, linestyle=":")
            axes.set_xlabel("epoch, over all stages")
            axes.set_ylabel(unit)
            axes.locator_params(axis="x", integer=True)
            axes.legend()

        return plot

    losses = {"loss": "training loss", "NLL": "validation NLL"}
    measures = {"mAP": "mAP", "O-F1": "O-F1", "path O-F1": "O-F1, path",
                "path exact": "whole sets, path"}  # fmt: skip
    return {
        "Training loss and NLL": draw("Training loss and NLL", curves(losses, 1, "nats per image")),
        "Validation": draw("Validation measures", curves(measures, 100, "per cent")),
    }


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def recall_precision_plot(
    pooled: Tensor, labels: Sequence[Tensor], decisions: dict[str, tuple[float, float]]
) -> str:
    """Draw the curve over all labels together, those of some labels, and each decision's point.

    Args:
        pooled: [p, 2] recall and precision.
        labels: the curves of single labels, alike.
        decisions: recall and precision by decision.
    """

    def plot(axes: Axes) -> None:
        for curve in labels:
            if len(curve):
                axes.plot(*_columns(curve), color=GRID, linewidth=0.8)
        axes.plot(*_columns(pooled), color=SERIES[0], linewidth=2, label="all labels together")
        markers = "osD^vP*X"
        for (name, (recall, precision)), marker in zip(
            decisions.items(), markers * len(decisions), strict=False
        ):
            axes.plot(
                recall, precision, marker, color=SERIES[1], markersize=5.5,
                label=name.replace("_", " "),
            )  # fmt: skip
        axes.set_xlim(0, 1.02)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("recall")
        axes.set_ylabel("precision")
        axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))

    return draw("Precision by recall", plot, (6.2, 3.3))


def _columns(points: Tensor) -> tuple[list[float], list[float]]:
    return points[:, 0].tolist(), points[:, 1].tolist()


def reliability_plot(title: str, found: Reliability, what: str, happened: str) -> str:
    """Draw what happened against what was expected, and how often each was expected."""

    def plot(axes: Axes) -> None:
        middle = [(i + 0.5) / BINS for i in range(BINS)]
        shares = (found.counts.double() / found.counts.sum().clamp(min=1)).tolist()
        axes.bar(middle, shares, width=0.9 / BINS, color=GRID, label="share of all")
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=":")
        there = found.counts > 0
        axes.plot(
            found.predicted[there].tolist(), found.observed[there].tolist(),
            color=SERIES[0], marker="o", markersize=4.5, linewidth=1.6, label=happened,
        )  # fmt: skip
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel(what)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)

    return draw(title, plot)


def pair_plot(pairs: Pairs) -> str:
    """Draw how often pairs are decided against how often they are true, on logarithmic axes."""
    total = pairs.true + pairs.decided
    shown = total.topk(min(POINTS, len(total))).indices
    shown = shown[total[shown] > 0]

    def plot(axes: Axes) -> None:
        true, decided = (1 + pairs.true[shown]).tolist(), (1 + pairs.decided[shown]).tolist()
        most = max([*true, *decided, 10])
        axes.plot([1, most], [1, most], color=MUTED, linewidth=0.8, linestyle=":")
        axes.scatter(true, decided, s=9, color=SERIES[0], alpha=0.55, linewidths=0)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("1 + images in which both are true")
        axes.set_ylabel("1 + images in which both are decided")

    return draw("Pairs of labels, decided against true", plot)


def size_plot(counts: dict[str, Tensor]) -> str:
    """Draw how many images have 0, 1, ... labels, true and decided."""

    def plot(axes: Axes) -> None:
        width = 0.8 / len(counts)
        for number, (name, found) in enumerate(counts.items()):
            places = [i + (number + 0.5) * width - 0.4 for i in range(len(found))]
            axes.bar(
                places, found.tolist(), width=width * 0.92, color=(MUTED, *SERIES)[number],
                label=name,
            )  # fmt: skip
        axes.set_xlabel("labels of an image")
        axes.set_ylabel("images")
        axes.locator_params(axis="x", integer=True)
        axes.legend()

    return draw("Sizes of label sets", plot)


def known_label_plot(rows: Sequence[Known]) -> str:
    """Draw how well the other labels are found, before and after some are known."""

    def plot(axes: Axes) -> None:
        counts = [row.known for row in rows]
        for color, name, side in (
            (SERIES[0], "those labels known", "after"),
            (MUTED, "nothing known", "before"),
        ):  # fmt: skip
            values = [100 * getattr(row, side)["example-AP"] for row in rows]
            axes.plot(counts, values, marker="o", color=color, linewidth=1.6, label=name)
        axes.set_xticks(counts)
        axes.set_xlabel("true labels told of each image")
        axes.set_ylabel("example-AP of the other labels, per cent")
        axes.legend()

    return draw("Gain from known labels", plot)


def map_plot(labels: LabelMap) -> str:
    """Draw labels at their places in the plane, the frequent ones larger."""

    def plot(axes: Axes) -> None:
        x, y = _columns(labels.places)
        share = labels.counts.double().clamp(min=1)
        area = (12 + 90 * (share / share.max()).sqrt()).tolist()
        axes.scatter(x, y, s=area, color=SERIES[0], alpha=0.45, linewidths=0)
        axes.margins(0.08)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        axes.set_aspect("equal", adjustable="datalim")
        _name_points(axes, labels, x, y)

    return draw("Map of the labels", plot, WIDE)


def _name_points(axes: Axes, labels: LabelMap, x: list[float], y: list[float]) -> None:
    """Write each label beside its point, the frequent ones first, where there is room."""
    figure: Any = axes.figure
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer() if hasattr(figure.canvas, "get_renderer") else None
    taken: list[Any] = []
    for label in torch.argsort(labels.counts, descending=True, stable=True).tolist():
        name = labels.names[label]
        shown = name if len(name) <= 24 else f"{name[:23]}…"
        text = axes.annotate(
            shown, (x[label], y[label]), xytext=(5, 3),
            textcoords="offset points", fontsize=8.5,
        )  # fmt: skip
        box = text.get_window_extent(renderer)
        if any(box.overlaps(other) for other in taken):
            text.remove()
        else:
            taken.append(box)
