"""What a comparison found: its file of results, and the table."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cnnrnn.state import write_whole

FORMAT = 2
COLUMNS = ("O-F1", "C-F1", "C-F1 own", "mAP", "MAP@10", "exact match", "exact own", "example-F1",
           "O-F1 @3", "C-F1 @3")  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One row's figures on the test split, for one seed.

    Attributes:
        method: name of the method.
        title: of the row.
        seed: of initial weights, order and dropout; of an ensemble its first member's.
        setting: what was chosen on validation data, such as {"learning_rate": 0.001}; of an
            ensemble the seeds of its members.
        decision: how sets are decided: {"path": 1}, {"k": ...} or {"threshold": ...}.
        own: metrics of the sets by that decision.
        at_3: metrics of at most (path) or exactly (others) three labels.
        own_c_f1: C-F1 at the threshold that has the best C-F1 on validation data; NaN for a path.
        own_exact: exact match by the threshold or k that has the best one on validation data; NaN
            for a path.
        seconds: of tuning, training and measuring, less what was trained before.
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
    seconds: float

    def figures(self) -> tuple[float, ...]:
        """Return the figures of `COLUMNS`, as fractions of 1."""
        own = self.own
        return (
            own["O-F1"], own["C-F1"], self.own_c_f1, own["mAP"], own["MAP@10"],
            own["exact-match"], self.own_exact, own["example-F1"],
            self.at_3["O-F1"], self.at_3["C-F1"],
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
            "results": [_without_nan(asdict(row)) for rows in self._rows.values() for row in rows],
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
            name: {key: _number(value) for key, value in record[name].items()}
            for name in ("own", "at_3")
        }
        chosen = {name: _number(record[name]) for name in ("own_c_f1", "own_exact")}
        rows.append(Row(**record | measures | chosen))
    return rows


def _shown(values: dict[str, Any], name: str) -> str:
    text = repr(values[name]) if name in values else "absent"
    return text if len(text) <= 60 else text[:57] + "..."


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: a figure that is not defined becomes null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _number(value: float | None) -> float:
    return math.nan if value is None else value


class Cell(NamedTuple):
    """A figure over seeds, in per cent: mean, standard error (None of one seed), and rank."""

    mean: float
    error: float | None
    is_best: bool


def table_cells(rows: Sequence[Row]) -> dict[str, list[Cell]]:
    """Return the figures of each title: one cell for each of `COLUMNS`.

    Args:
        rows: of any methods and seeds; those of one title are averaged.
    """
    figures: dict[str, list[tuple[float, ...]]] = {}
    for row in rows:
        figures.setdefault(row.title, []).append(row.figures())
    means = {title: [statistics.fmean(c) for c in zip(*f, strict=True)]
             for title, f in figures.items()}  # fmt: skip
    best = [
        max((mean for mean in column if not math.isnan(mean)), default=math.inf)
        for column in zip(*means.values(), strict=True)
    ]
    return {
        title: [
            Cell(100 * mean, _standard_error(values), mean == top)
            for mean, values, top in zip(
                means[title], zip(*figures[title], strict=True), best, strict=True
            )
        ]
        for title in figures
    }


def _standard_error(values: Sequence[float]) -> float | None:
    if len(values) < 2 or math.isnan(sum(values)):
        return None
    return 100 * statistics.stdev(values) / math.sqrt(len(values))


def text_table(rows: Sequence[Row]) -> str:
    """Lay the comparison out as text: mean and standard error in per cent, * at the best."""
    cells = table_cells(rows)
    width = max(map(len, cells), default=0)
    lines = [" " * width + "".join(f"{name:>14}" for name in COLUMNS)]
    for title, figures in cells.items():
        shown = (f"{_cell_text(cell)}{'*' if cell.is_best else ' '}" for cell in figures)
        lines.append(f"{title:<{width}}" + "".join(f"{text:>14}" for text in shown))
    return "\n".join(lines)


def markdown_table(rows: Sequence[Row]) -> str:
    """Lay the comparison out as a Markdown table: as `text_table`, the best in bold."""
    lines = ["|  | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for title, figures in table_cells(rows).items():
        shown = (f"**{_cell_text(c)}**" if c.is_best else _cell_text(c) for c in figures)
        lines.append(f"| {title} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _cell_text(cell: Cell) -> str:
    if math.isnan(cell.mean):
        return "–"
    return f"{cell.mean:.1f}" + ("" if cell.error is None else f" ± {cell.error:.1f}")
