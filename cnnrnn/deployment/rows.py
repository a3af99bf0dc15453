"""What is written of a prediction: as a line of JSON, a row of CSV, or a row of Parquet."""

from __future__ import annotations

import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from cnnrnn.machine.extras import from_extra
from cnnrnn.prediction.result import Prediction

if TYPE_CHECKING:
    import pyarrow

Form = Literal["jsonl", "csv", "parquet"]
SUFFIXES: dict[str, Form] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv",
                             ".parquet": "parquet"}  # fmt: skip
LARGEST_CELL = 1 << 30
ROWS_AT_ONCE = 4096
"""Rows of a group of Parquet, which is held in memory while it is written."""


@dataclass(frozen=True)
class RowOptions:
    """What rows hold beside the labels.

    Attributes:
        scores: those of the decided labels, or of all.
        sets: so many of the most probable label sets.
        neighbours: so many labels nearest to the image.
    """

    scores: Literal["labels", "all"] = "labels"
    sets: int = 0
    neighbours: int = 0

    def __post_init__(self) -> None:
        for name in ("sets", "neighbours"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.scores not in ("labels", "all"):
            raise ValueError(f"scores must be labels or all, got {self.scores!r}")


def record_of(prediction: Prediction, options: RowOptions) -> dict[str, Any]:
    """Return what is written of a prediction, as JSON can hold it; scores have six digits."""
    record = prediction.to_dict(options.scores == "all")
    if prediction.error is not None:
        return record
    for name, score in record["scores"].items():
        record["scores"][name] = None if score is None else round(score, 6)
    if options.sets:
        place = {name: i for i, name in enumerate(prediction.scores)}
        record["sets"] = [
            {"labels": sorted(labels, key=place.__getitem__), "probability": round(share, 6)}
            for labels, share in prediction.sets[: options.sets]
        ]
    if options.neighbours:
        record["neighbours"] = [
            {"label": name, "cosine": round(cosine, 4)}
            for name, cosine in prediction.neighbours(options.neighbours)
        ]
    return record


class RowFile(ABC):
    """A form of files of rows.

    Args:
        options: what rows hold.
        labels: the model's, in path order.
    """

    def __init__(self, options: RowOptions, labels: Sequence[str]) -> None:
        self.options = options
        self.labels = tuple(labels)

    def name(self, image: str) -> str:
        """Return an image's path as `read` gives it back."""
        return image

    @abstractmethod
    def row(self, record: dict[str, Any]) -> Any:
        """Return a record, as `record_of` makes it, as `write` takes it."""

    @abstractmethod
    def write(self, file: Path, rows: Iterator[Any]) -> None:
        """Write rows to a file, one after another."""

    @abstractmethod
    def read(self, file: Path) -> Iterator[tuple[str, str | None, Any]]:
        """Read what `write` wrote: of each row its image, why that was not read, and the row."""


class JsonLines(RowFile):
    """An object a line."""

    def row(self, record: dict[str, Any]) -> str:
        """Return the line, without its end."""
        return json.dumps(record, ensure_ascii=False)

    def write(self, file: Path, rows: Iterator[str]) -> None:
        """Write lines."""
        with _text(file, "w") as stream:
            stream.writelines(f"{row}\n" for row in rows)

    def read(self, file: Path) -> Iterator[tuple[str, str | None, str]]:
        """Read lines."""
        with _text(file, "r") as stream:
            for line in stream:
                record = json.loads(line)
                yield record["image"], record.get("error"), line.removesuffix("\n")


class Csv(RowFile):
    """A table: image, labels with semicolons between, log_prob, error; then what is asked for.

    With all scores each label has a column, `score of NAME`; sets are JSON.
    """

    @property
    def header(self) -> list[str]:
        """Names of the columns."""
        columns = ["image", "labels", "log_prob", "error"]
        if self.options.neighbours:
            columns.append("neighbours")
        if self.options.sets:
            columns.append("sets")
        if self.options.scores == "all":
            columns += [f"score of {name}" for name in self.labels]
        return columns

    def row(self, record: dict[str, Any]) -> list[str]:
        """Return the cells."""
        log_prob, scores = record.get("log_prob"), record.get("scores", {})
        cells = [
            record["image"],
            ";".join(record.get("labels", ())),
            "" if log_prob is None else f"{log_prob:.6g}",
            record.get("error", ""),
        ]
        if self.options.neighbours:
            cells.append(";".join(near["label"] for near in record.get("neighbours", ())))
        if self.options.sets:
            cells.append(json.dumps(record["sets"], ensure_ascii=False) if "sets" in record else "")
        if self.options.scores == "all":
            found = (scores.get(name) for name in self.labels)
            cells += ["" if score is None else f"{score:.6g}" for score in found]
        return cells

    def write(self, file: Path, rows: Iterator[list[str]]) -> None:
        """Write the header and rows."""
        with _text(file, "w") as stream:
            writer = csv.writer(stream)
            writer.writerow(self.header)
            writer.writerows(rows)

    def read(self, file: Path) -> Iterator[tuple[str, str | None, list[str]]]:
        """Read rows."""
        limit = csv.field_size_limit(LARGEST_CELL)  # of the process, whose tables have their own
        try:
            with _text(file, "r") as stream:
                rows = csv.reader(stream)
                next(rows)
                for cells in rows:
                    yield cells[0], cells[3] or None, cells
        finally:
            csv.field_size_limit(limit)


class Parquet(RowFile):
    r"""Columns image, labels, log_prob, scores (a map), error; then what is asked for.

    A file name that is not UTF-8 has its other bytes as `\xff`.

    Raises:
        ModuleNotFoundError: pyarrow is not installed.
    """

    def __init__(self, options: RowOptions, labels: Sequence[str]) -> None:
        super().__init__(options, labels)
        _arrow()

    def name(self, image: str) -> str:
        """Return an image's path as UTF-8 can hold it."""
        return image.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")

    def row(self, record: dict[str, Any]) -> dict[str, Any]:
        """Return the values by column."""
        error = record.get("error")
        return {
            "image": self.name(record["image"]),
            "labels": record.get("labels"),
            "log_prob": record.get("log_prob"),
            "scores": list(record["scores"].items()) if "scores" in record else None,
            "error": None if error is None else self.name(error),
            **{name: record.get(name) for name in ("sets", "neighbours")
               if getattr(self.options, name)},
        }  # fmt: skip

    def write(self, file: Path, rows: Iterator[dict[str, Any]]) -> None:
        """Write groups of rows."""
        pyarrow, parquet = _arrow()
        schema = self._schema(pyarrow)
        rows = (row | {"scores": _pairs(row["scores"])} for row in rows)
        with parquet.ParquetWriter(file, schema) as writer:
            while group := list(islice(rows, ROWS_AT_ONCE)):
                writer.write_table(pyarrow.Table.from_pylist(group, schema=schema))

    def read(self, file: Path) -> Iterator[tuple[str, str | None, dict[str, Any]]]:
        """Read rows, a group at a time."""
        _, parquet = _arrow()
        with parquet.ParquetFile(file) as stream:
            for batch in stream.iter_batches(ROWS_AT_ONCE):
                for row in batch.to_pylist():
                    yield row["image"], row["error"], row

    def _schema(self, pyarrow: Any) -> pyarrow.Schema:
        text, number = pyarrow.string(), pyarrow.float64()
        fields = {
            "image": text,
            "labels": pyarrow.list_(text),
            "log_prob": number,
            "scores": pyarrow.map_(text, pyarrow.float32()),
            "error": text,
        }
        if self.options.sets:
            fields["sets"] = pyarrow.list_(
                pyarrow.struct({"labels": pyarrow.list_(text), "probability": number})
            )
        if self.options.neighbours:
            fields["neighbours"] = pyarrow.list_(pyarrow.struct({"label": text, "cosine": number}))
        return pyarrow.schema(fields)


FORMS: dict[Form, type[RowFile]] = {"jsonl": JsonLines, "csv": Csv, "parquet": Parquet}


def form_of(file: str, default: str) -> str:
    """Return the form of a file by its suffix."""
    return SUFFIXES.get(Path(file).suffix.lower(), default)


def _text(file: Path, mode: str) -> IO[str]:
    # A file name may be bytes that are no text: they leave as they came.
    return open(file, mode, encoding="utf-8", errors="surrogateescape", newline="")


def _pairs(scores: list[Any] | None) -> list[tuple[str, float | None]] | None:
    return None if scores is None else [(name, score) for name, score in scores]


def _arrow() -> tuple[Any, Any]:
    with from_extra("pyarrow", "Parquet", "parquet"):
        import pyarrow
        import pyarrow.parquet
    return pyarrow, pyarrow.parquet
