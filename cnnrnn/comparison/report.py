"""The page of a comparison: its table, which sorts, and the methods side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnnrnn.comparison.results import (
    COLUMNS,
    LOWER_IS_BETTER,
    Row,
    TableCell,
    cell_text,
    shown_columns,
    table_cells,
)
from cnnrnn.inspection.report.figures import MUTED, SERIES, draw
from cnnrnn.inspection.report.page import write_page

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DRAWN = ("O-F1", "mAP", "exact match", "NLL", "AP, 1 known")


def write_comparison(rows: Sequence[Row], file: Path, title: str) -> None:
    """Write one HTML page of a comparison, whole or not at all; it needs no other file.

    Args:
        rows: of all methods and seeds.
        file: to write.
        title: of the page.

    Raises:
        ModuleNotFoundError: matplotlib or Jinja2, of the extra `report`, is not installed.
        OSError: the page cannot be written.
    """
    from markupsafe import Markup

    cells = table_cells(rows)
    shown = shown_columns(cells)
    plots = {
        name: Markup(_ranked(name, {title: c[COLUMNS.index(name)] for title, c in cells.items()}))
        for name in DRAWN
        if COLUMNS.index(name) in shown
    }
    values: dict[str, Any] = {
        "columns": [COLUMNS[i] for i in shown],
        "methods": {title: [figures[i] for i in shown] for title, figures in cells.items()},
        "texts": {
            title: [cell_text(figures[i]) for i in shown] for title, figures in cells.items()
        },
        "plots": plots,
        "seeds": len({row.seed for row in rows}),
    }
    write_page(file, "comparison.html.j2", title, values)


def _ranked(name: str, cells: dict[str, TableCell]) -> str:
    """Draw a measure of all methods that have it, the best at the top."""
    known = [(title, cell) for title, cell in cells.items() if not math.isnan(cell.mean)]
    known.sort(key=lambda item: item[1].mean, reverse=name in LOWER_IS_BETTER)

    def plot(axes: Axes) -> None:
        for place, (_, cell) in enumerate(known):
            axes.errorbar(
                cell.mean, place, xerr=cell.error or 0, fmt="o", markersize=5,
                color=SERIES[0] if cell.is_best else MUTED,
            )  # fmt: skip
        axes.set_yticks(range(len(known)), [title for title, _ in known])
        axes.set_ylim(-0.7, len(known) - 0.3)
        axes.set_xlabel("nats per image" if name == "NLL" else "per cent")

    return draw(name, plot, (5.6, 0.9 + 0.21 * len(known)))
