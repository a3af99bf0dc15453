"""What a comparison found: its file of results, and the table."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from cnnrnn.config import former_options
from cnnrnn.machine.files import write_whole
from cnnrnn.machine.words import without_nan

FORMAT = 3
COLUMNS = ("O-F1", "C-F1", "C-F1 own", "macro-F1", "mAP", "MAP@10", "LRAP", "exact match",
           "exact own", "NLL", "example-F1", "Jaccard", "Hamming", "O-F1 @3",
           "C-F1 @3", "AP, none known", "AP, 1 known")  # fmt: skip
LOWER_IS_BETTER = ("NLL", "Hamming")
NATS = ("NLL",)
"""Columns in nats; all others are in per cent."""
TWO_DIGITS = ("NLL", "Hamming")


@dataclass(frozen=True)
class Row:
    """One row's figures on the test split, for one seed.

    Attributes:
        method: name of the method.
        title: of the row.
        seed: of initial weights, order and dropout; of an ensemble its first member's.
        setting: what was chosen on validation data, such as {"learning_rate": 0.001}; of an
            ensemble the seeds of its members.
        decision: how sets are decided: {"path": 1}, {"k": ...} or {"threshold": ...,
            "min_labels": ...}.
        own: metrics of the sets by that decision.
        at_3: metrics of at most (path) or exactly (others) three labels.
        own_c_f1: C-F1 at the threshold that has the best C-F1 on validation data; NaN for a path.
        own_exact: exact match by the threshold or k that has the best one on validation data; NaN
            for a path.
        nll: mean of -log P(the whole true set) in nats, of the method; NaN where sets have none.
        nll_is_bound: the NLL is at most `nll`.
        seconds: of tuning, training and measuring, less what was trained before.
        others: `reveal.metrics_of_others` of the images with two labels or more, of all but one
            true label that was drawn and not told; empty where there is no such image.
        others_given: the same of the method told of that label; empty where it cannot be.
    """

    method: str
    title: str
    seed: int
    setting: dict[str, float]
    decision: dict[str, float]
    own: dict[str, float]
    at_3: dict[str, float]
    own_c_f1: float
    own_exact: float
    nll: float
    nll_is_bound: bool
    seconds: float
    others: dict[str, float] = field(default_factory=dict)
    others_given: dict[str, float] = field(default_factory=dict)

    def figures(self) -> tuple[float, ...]:
        """Return the figures of `COLUMNS`: the NLL in nats, the others as fractions of 1.

        NaN stands for a measure that the row's file does not have.
        """
        own = {name: self.own.get(name, math.nan) for name in (
            "O-F1", "C-F1", "macro-F1", "mAP", "MAP@10", "LRAP", "exact-match", "example-F1",
            "Jaccard", "Hamming",
        )}  # fmt: skip
        return (
            own["O-F1"], own["C-F1"], self.own_c_f1, own["macro-F1"], own["mAP"], own["MAP@10"],
            own["LRAP"], own["exact-match"], self.own_exact, self.nll, own["example-F1"],
            own["Jaccard"], own["Hamming"], self.at_3["O-F1"], self.at_3["C-F1"],
            *(known.get("example-AP", math.nan) for known in (self.others, self.others_given)),
        )  # fmt: skip


class Results:
    """The file of what is done: the options, and the rows of each method and seed.

    Args:
        file: JSON; made when missing, and replaced whole whenever rows are added.
        description: what must be the same for results to belong together, as flat JSON values.

    Raises:
        ValueError: the file holds results of other options or data, or is not such a file.
    """

    def __init__(self, file: Path, description: dict[str, Any]) -> None:
        self.file = file
        self.description: dict[str, Any] = json.loads(json.dumps(description))
        self._rows: dict[tuple[str, int], list[Row]] = {}
        if file.exists():
            self._read()
        else:
            self._write()

    def __contains__(self, key: tuple[str, int]) -> bool:
        return key in self._rows

    def rows(self, method: str, seed: int) -> list[Row]:
        """Return the rows of a method and seed that are done."""
        return self._rows[method, seed]

    def add(self, rows: list[Row]) -> None:
        """Keep all rows of one method and seed."""
        self._rows[rows[0].method, rows[0].seed] = rows
        self._write()

    def _read(self) -> None:
        try:
            content = json.loads(self.file.read_text(encoding="utf-8"))
            stored, version = dict(content["options"]), content["format"]
            for row in _rows(content) if version == FORMAT else []:
                self._rows.setdefault((row.method, row.seed), []).append(row)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.file} must hold the results of a comparison, got {error!r}; name another "
                "folder, or move the file away"
            ) from error
        if version != FORMAT:
            raise ValueError(f"{self.file} must have format {FORMAT}, got {version!r}")
        former = former_options()
        stored = {k: v for k, v in former.items() if k in self.description} | stored
        names = [*self.description, *(name for name in stored if name not in self.description)]
        differing = [
            f"{name} is {_shown(stored, name)} there and {_shown(self.description, name)} here"
            for name in names
            if (name in stored) != (name in self.description)
            or stored[name] != self.description[name]
        ]
        if differing:
            raise ValueError(
                f"{self.file} holds results of other options or data: {'; '.join(differing)}. Name "
                "another folder, or use the same options"
            )

    def _write(self) -> None:
        content = {
            "format": FORMAT,
            "options": self.description,
            "results": [without_nan(asdict(row)) for rows in self._rows.values() for row in rows],
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        write_whole(self.file, lambda file: file.write_text(text, encoding="utf-8"))


def read_rows(file: Path) -> list[Row]:
    """Return the rows that a comparison's results.json holds, whatever its options were."""
    return _rows(json.loads(file.read_text(encoding="utf-8")))


def _rows(content: dict[str, Any]) -> list[Row]:
    rows = []
    for record in content["results"]:
        measures = {
            name: {key: _number(value) for key, value in record.get(name, {}).items()}
            for name in ("own", "at_3", "others", "others_given")
        }
        chosen = {name: _number(record.get(name)) for name in ("own_c_f1", "own_exact", "nll")}
        is_bound = {"nll_is_bound": bool(record.get("nll_is_bound"))}
        rows.append(Row(**record | measures | chosen | is_bound))
    return rows


def _shown(values: dict[str, Any], name: str) -> str:
    text = repr(values[name]) if name in values else "absent"
    return text if len(text) <= 60 else text[:57] + "..."


def _number(value: float | None) -> float:
    return math.nan if value is None else value


class TableCell(NamedTuple):
    """A figure over seeds, in per cent or nats: mean, standard error (None of one seed), and rank.

    Attributes:
        mean: NaN where there is none.
        error: standard error.
        is_best: no other mean of the column is better.
        digits: after the point.
        is_bound: the figure is at most this.
    """

    mean: float
    error: float | None
    is_best: bool
    digits: int = 1
    is_bound: bool = False


def table_cells(rows: Sequence[Row]) -> dict[str, list[TableCell]]:
    """Return the figures of each title: one cell for each of `COLUMNS`.

    Args:
        rows: of any methods and seeds; those of one title are averaged.
    """
    of_title: dict[str, list[Row]] = {}
    for row in rows:
        of_title.setdefault(row.title, []).append(row)
    figures = {title: [row.figures() for row in found] for title, found in of_title.items()}
    cells: dict[str, list[TableCell]] = {title: [] for title in of_title}
    for i, name in enumerate(COLUMNS):
        columns = {title: [values[i] for values in found] for title, found in figures.items()}
        means = {title: statistics.fmean(values) for title, values in columns.items()}
        known = [mean for mean in means.values() if not math.isnan(mean)]
        best = (min if name in LOWER_IS_BETTER else max)(known, default=math.nan)
        unit = 1 if name in NATS else 100
        for title, values in columns.items():
            error = _standard_error(values)
            cells[title].append(
                TableCell(
                    unit * means[title],
                    None if error is None else unit * error,
                    means[title] == best,
                    2 if name in TWO_DIGITS else 1,
                    name == "NLL" and any(row.nll_is_bound for row in of_title[title]),
                )
            )
    return cells


def _standard_error(values: Sequence[float]) -> float | None:
    if len(values) < 2 or math.isnan(sum(values)):
        return None
    return statistics.stdev(values) / math.sqrt(len(values))


def shown_columns(cells: dict[str, list[TableCell]]) -> list[int]:
    """Return the columns that have a figure."""
    return [
        i
        for i in range(len(COLUMNS))
        if any(not math.isnan(figures[i].mean) for figures in cells.values())
    ]


def text_table(rows: Sequence[Row]) -> str:
    """Lay the comparison out as text: mean and standard error, * at the best.

    All but the NLL are in per cent. A column without any figure is left out.
    """
    cells = table_cells(rows)
    shown = shown_columns(cells)
    width = max(map(len, cells), default=0)
    lines = [" " * width + "".join(f"{COLUMNS[i]:>16}" for i in shown)]
    for title, figures in cells.items():
        texts = (f"{cell_text(figures[i])}{'*' if figures[i].is_best else ' '}" for i in shown)
        lines.append(f"{title:<{width}}" + "".join(f"{text:>16}" for text in texts))
    return "\n".join(lines)


def markdown_table(rows: Sequence[Row]) -> str:
    """Lay the comparison out as a Markdown table: as `text_table`, the best in bold."""
    cells = table_cells(rows)
    shown = shown_columns(cells)
    lines = ["|  | " + " | ".join(COLUMNS[i] for i in shown) + " |",
             "|---" * (len(shown) + 1) + "|"]  # fmt: skip
    for title, figures in cells.items():
        texts = (cell_text(figures[i]) for i in shown)
        marked = (f"**{text}**" if figures[i].is_best else text
                  for i, text in zip(shown, texts, strict=True))  # fmt: skip
        lines.append(f"| {title} | " + " | ".join(marked) + " |")
    return "\n".join(lines)


def cell_text(cell: TableCell) -> str:
    """Write a figure with its standard error, or a dash where there is none."""
    if math.isnan(cell.mean):
        return "–"
    text = f"{'≤ ' if cell.is_bound else ''}{cell.mean:.{cell.digits}f}"
    return text + ("" if cell.error is None else f" ± {cell.error:.{cell.digits}f}")
