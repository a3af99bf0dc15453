"""Pages that need no other file: templates, filled with findings and plots."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from cnnrnn.inspection.report import figures
from cnnrnn.inspection.report.findings import Findings, fixed
from cnnrnn.machine.extras import from_extra
from cnnrnn.machine.files import write_whole

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).with_name("templates")
CURVES = 30
UNLIKE_PAIRS = 30
MEASURES = ("C-P", "C-R", "C-F1", "O-P", "O-R", "O-F1", "MAP@10", "mAP", "exact-match",
            "example-F1")  # fmt: skip
SECTIONS = {
    "training": "Training", "decisions": "Decisions", "labels": "Labels",
    "reliability": "Reliability", "pairs": "Pairs", "sizes": "Sizes", "mistakes": "Mistakes",
    "suspects": "Suspects", "known": "Known labels", "map": "Map",
}  # fmt: skip


class UnlikePair(NamedTuple):
    """A pair of labels that is decided more or less often than it is true."""

    names: str
    true: int
    decided: int
    difference: int


def write_page(file: Path, template: str, title: str, values: dict[str, Any]) -> None:
    """Fill a template and write it, whole or not at all.

    Args:
        file: to write.
        template: its name.
        title: of the page.
        values: for the template.

    Raises:
        ModuleNotFoundError: Jinja2 is not installed.
    """
    from markupsafe import Markup

    page = _environment().get_template(template)
    style, script = (
        Markup((TEMPLATES / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js")
    )
    text = page.render(title=title, style=style, script=script, **values)
    # A file name may be bytes that are no text, which a page cannot hold.
    whole = text.encode("utf-8", "replace")
    write_whole(file, lambda part: part.write_bytes(whole))


def _environment() -> Environment:
    with from_extra("Jinja2", "a report", "report"):
        from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "percent": lambda value: fixed(100 * value, 1),
        "number": fixed,
        "thousands": lambda value: f"{value:,}",
        "probability": _probability,
        "path": _svg_path,
        "record": _short_name,
    }
    return environment


def _probability(value: float) -> str:
    percent = 100 * value
    if percent < 0.001:
        return "< 0.001 %"
    return f"{percent:.1f} %" if percent >= 0.1 else f"{percent:.1g} %"


def _short_name(record: str) -> str:
    """Return the file's name of an image, or `row i` of `row i of FILE`."""
    if record.startswith("row ") and " of " in record:
        return record.split(" of ")[0]
    return Path(record).name


def _svg_path(curve: Tensor) -> str:
    """Return a curve [p, 2] in 0..1 as the path of a small plot."""
    steps = (f"{1 + 70 * x:.1f} {25 - 24 * y:.1f}" for x, y in curve.tolist())
    return "M" + "L".join(steps)


def report_values(found: Findings, labels: tuple[str, ...], remarks: list[str]) -> dict[str, Any]:
    """Return what the template of a report needs.

    Args:
        found: what it shows.
        labels: the model's, [L].
        remarks: sentences for its head.
    """
    from markupsafe import Markup

    plots: dict[str, Any] = {
        "recall_precision": figures.recall_precision_plot(
            found.pooled, [row.curve for row in found.labels[:CURVES]], found.decisions
        ),
        "of_scores": figures.reliability_plot(
            "Reliability of scores", found.of_scores, "score of a label", "share that is true"
        ),
        "of_sets": None if found.of_sets is None else figures.reliability_plot(
            "Reliability of label sets", found.of_sets, "probability of the set",
            "share that is right",
        ),
        "pairs": figures.pair_plot(found.pairs),
        "sizes": figures.size_plot(found.sizes),
        "known": figures.known_label_plot(found.known) if found.known else None,
        "map": None if found.map is None else figures.map_plot(found.map),
    }  # fmt: skip
    marked: dict[str, Any] = {k: None if v is None else Markup(v) for k, v in plots.items()}
    drawn = figures.training_curves(found.epochs) if found.epochs else {}
    marked["training"] = {caption: Markup(svg) for caption, svg in drawn.items()}
    metrics = found.evaluation.metrics
    return {
        "found": found,
        "remarks": [*remarks, *(found.notes[n] for n in ("unread", "lacking") if n in found.notes)],
        "plots": marked,
        "sections": list(SECTIONS.items()),
        "measures": MEASURES,
        "best": {measure: _best(metrics, measure) for measure in MEASURES},
        "curves_drawn": min(CURVES, len(found.labels)),
        "has_own_thresholds": bool(found.evaluation.calibration.label_thresholds),
        "num_labels": len(labels),
        "num_images": len(found.evaluation.targets),
        "unlike_pairs": _unlike_pairs(found, labels),
    }


def _best(metrics: dict[str, dict[str, float]], measure: str) -> str | None:
    """Return the decision that is best by a measure, or None where all are the same."""
    values = {name: row[measure] for name, row in metrics.items() if not math.isnan(row[measure])}
    if len({round(value, 4) for value in values.values()}) < 2:
        return None
    return max(values, key=lambda name: values[name])


def _unlike_pairs(found: Findings, labels: tuple[str, ...]) -> list[UnlikePair]:
    pairs = found.pairs
    difference = pairs.decided - pairs.true
    order = difference.abs().sort(descending=True, stable=True).indices[:UNLIKE_PAIRS].tolist()
    return [
        UnlikePair(
            f"{labels[int(pairs.first[i])]} + {labels[int(pairs.second[i])]}",
            int(pairs.true[i]), int(pairs.decided[i]), int(difference[i]),
        )
        for i in order if difference[i]
    ]  # fmt: skip
